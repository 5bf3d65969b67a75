"""Jacobian norms at data: what a network's Lipschitz constant is, seen from single points."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlip.norms._models.eval_mode import eval_mode
from fastlip.norms._models.wrappers import bare_model


def local_lipschitz(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    *,
    rtol: float = 1e-3,
    max_steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of the Jacobian of a model's output by its input, at each sample.

    Power iteration on J^T J, a forward-mode product and a backward one per step, all samples at once. Each value is
    ||J v|| for a unit v, so it is attained: a lower bound of the Jacobian's norm up to rounding, and of the model's L2
    Lipschitz constant where the model is differentiable. It certifies nothing from above. At each step the two products
    are held against each other, because PyTorch's two derivatives of an operation can differ at its kinks: no Jacobian
    stands behind such a pair. Kinks at which they agree (ReLU's at 0) cannot be seen.

    Args:
        model: a module whose outputs depend on their own sample alone, as in eval mode, in which it runs; it is left as
            it was.
        x: samples, [B, ...], in the model's dtype and on its device.
        rtol: relative growth per step below which a sample counts as settled.
        max_steps: most steps.
        generator: source of the starts; by default one seeded by the operating system.

    Returns:
        Norms, [B] float64 on x's device.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``x`` is not a floating-point batch, the output not one tensor of it, part of the model is
            TorchScript, or at some sample the derivatives are not finite or forward and reverse mode disagree.
    """
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x must be a floating-point batch [B, ...], got {x.dtype} of shape {list(x.shape)}")
    model = bare_model(model)  # forward-mode derivatives through TorchScript can be zeros
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    with eval_mode(model), torch.enable_grad(), _plain_attention():
        x = x.detach().clone()  # one made under inference_mode cannot take part in autograd
        draws = torch.randn(x.shape, dtype=torch.float64, generator=generator, device=generator.device)
        v = unit(draws).to(x)
        best = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for _ in range(max_steps):
            tangent, back = _products(model, x, v)
            _check_products(model, x, v, tangent, back)
            # v is a unit vector up to its dtype's rounding, which is divided out.
            stretch = _norms(tangent) / _norms(v).clamp_min(1e-300)
            settled = stretch <= best * (1.0 + rtol)
            best = torch.maximum(best, stretch)
            if bool(settled.all()):
                break
            v = unit(back.double()).to(x)
    return best


def _products(model: nn.Module, x: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """``scale`` times J v by forward mode, and J^T u by reverse mode, u = J v / ||J v||; J^T (J v) can underflow."""
    point = x.detach().requires_grad_()
    products: Any = torch.func.jvp(model, (point,), (scale * v,))
    out, tangent = products
    if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
        raise ValueError("model must return one tensor with a row per sample")
    tangent = tangent.detach()
    cotangent = scale * unit(tangent.double()).to(tangent)
    (back,) = torch.autograd.grad(out, point, cotangent, allow_unused=True)
    return tangent, torch.zeros_like(x) if back is None else back


def _check_products(model: nn.Module, x: Tensor, v: Tensor, tangent: Tensor, back: Tensor) -> None:
    """Raise where <v, J^T u> is not ||J v||, as it is for every matrix J, or where there is no number."""
    finite = tangent.flatten(1).isfinite().all(1) & back.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"the model's derivatives are not finite at {_named(~finite)}: it is not differentiable there, or they "
            "overflow; move these inputs a little, or use a wider dtype"
        )
    length = _norms(tangent)
    gap = ((v.double() * back.double()).flatten(1).sum(1) - length).abs()
    # Rounding is relative to a layer's largest singular value and v is not yet its vector, so that hundreds of eps
    # are ordinary, and depth adds to it; derivatives that differ at a kink differ in the first digits. The fourth root
    # is 1e-4 in float64 and 2e-2 in float32.
    apart = gap > torch.finfo(x.dtype).eps ** 0.25 * length
    if not bool(apart.any()):
        return
    # Where J v cancels to next to nothing (a saturated softmax) it is all rounding, which unlike J is not linear in v.
    rounding = torch.zeros_like(gap)
    for scale in _SCALES:
        scaled_tangent, scaled_back = _products(model, x, v, scale)
        forward = _norms(scaled_tangent.double() / scale - tangent.double())
        reverse = _norms(scaled_back.double() / scale - back.double()) * _norms(v)
        rounding = torch.maximum(rounding, forward + reverse)
    apart &= ~(gap <= 10.0 * rounding)
    if bool(apart.any()):
        raise ValueError(
            f"forward- and reverse-mode derivatives disagree at {_named(apart)}: the model is not differentiable there "
            "(PReLU at an exact 0), or one of its operations has a wrong derivative; move these inputs a little"
        )


#: Factors that are no powers of 2, so that products of what they scale round anew; one alone can round the same way.
_SCALES = (0.7, 1.1, 0.9, 1.3)
#: Samples that an error names.
_NAMED = 8


def _named(which: Tensor) -> str:
    """Samples by their places in the batch."""
    rows = which.nonzero().flatten().tolist()
    return f"sample{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_NAMED]))}{', ...' * (len(rows) > _NAMED)}"


def _norms(t: Tensor) -> Tensor:
    """Norm of each sample, [B] float64."""
    return torch.linalg.vector_norm(t.flatten(1).double(), dim=1)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by operations that have a forward-mode derivative, which the fused ones lack."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def unit(v: Tensor) -> Tensor:
    """Samples scaled to norm 1; zeros stay."""
    norm = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return v / torch.where(norm > 0.0, norm, 1.0).reshape(-1, *(1,) * (v.dim() - 1))

"""Jacobian norms at data: what a network's Lipschitz constant is, seen from single points."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlip.norms._model import bare_model, eval_mode


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
    Lipschitz constant where the model is differentiable. It certifies nothing from above.

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
        ValueError: ``x`` is not a floating-point batch, the output not one tensor of it, or part of the model is
            TorchScript.
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
        v = _unit(draws).to(x)
        best = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for _ in range(max_steps):
            point = x.detach().requires_grad_()
            products: Any = torch.func.jvp(model, (point,), (v,))
            out, tangent = products
            if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
                raise ValueError("model must return one tensor with a row per sample")
            # v is a unit vector up to its dtype's rounding, which is divided out.
            lengths = torch.linalg.vector_norm(v.flatten(1).double(), dim=1)
            stretch = torch.linalg.vector_norm(tangent.detach().flatten(1).double(), dim=1) / lengths.clamp_min(1e-300)
            settled = stretch <= best * (1.0 + rtol)
            best = torch.maximum(best, stretch)
            if bool(settled.all()):
                break
            (back,) = torch.autograd.grad(out, point, tangent.detach(), allow_unused=True)
            if back is None:
                break
            v = _unit(back.double()).to(x)
    return best


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


def _unit(v: Tensor) -> Tensor:
    """Samples scaled to norm 1; zeros stay."""
    norm = torch.linalg.vector_norm(v.flatten(1), dim=1)
    return v / torch.where(norm > 0.0, norm, 1.0).reshape(-1, *(1,) * (v.dim() - 1))

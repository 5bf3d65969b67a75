"""Jacobian norms at single inputs: lower bounds on a network's Lipschitz constant."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlip.lipschitz._intervals import as_rows
from fastlip.norms._models.eval_mode import eval_mode
from fastlip.norms._models.outputs import tensor_in
from fastlip.norms._models.wrappers import bare_model

#: Computes J v and J^T u of a model at samples.
_Products = Callable[..., tuple[Tensor, Tensor]]


def local_lipschitz(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    *,
    rtol: float = 1e-3,
    max_steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of the Jacobian of a model's output with respect to its input, at each sample.

    Power iteration on J^T J, with one forward-mode and one reverse-mode product per step for all samples at once. Each
    value is ||J v|| for a unit vector v. Up to rounding it is therefore a lower bound on the Jacobian's norm and on the
    model's L2 Lipschitz constant where the model is differentiable, but not an upper bound on either. Each step
    compares the two products, because PyTorch's forward and reverse derivatives of an operation can differ at its
    kinks, where neither is a Jacobian. Kinks at which they agree, such as ReLU's at 0, cannot be detected.

    A model without forward derivatives (an LSTM, or a ``torch.autograd.Function`` without ``jvp``) gets those of its
    backward pass, which is linear in the vector that it multiplies; there is nothing to compare then.

    Args:
        model: a module, run in eval mode, each of whose outputs depends on one sample only; it is not changed. What it
            returns may hold the output as ``logits``, or first in a tuple.
        x: samples, [B, ...], in the model's dtype and on its device.
        rtol: relative growth per step below which a sample has converged.
        max_steps: largest number of steps.
        generator: source of the start vectors; by default one that the operating system seeds.

    Returns:
        Norms, [B] float64 on x's device.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``x`` is not a floating-point batch, the output is not one tensor with a row per sample, part of the
            model is TorchScript or has neither forward derivatives nor a backward pass that can be differentiated, or
            at some sample the derivatives are not finite or differ between the two modes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> print(fastlip.local_lipschitz(model, torch.rand(4, 6)))
    """
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x must be a floating-point batch [B, ...], got {x.dtype} of shape {list(x.shape)}")
    model = bare_model(model)  # refuses TorchScript, whose forward-mode derivatives can be zeros
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    with eval_mode(model), torch.enable_grad(), _plain_attention(), _quiet_forward_mode():
        x = x.detach().clone()  # autograd refuses tensors that were made in inference mode
        draws = torch.randn(x.shape, dtype=torch.float64, generator=generator, device=generator.device)
        v = unit(draws).to(x)
        best = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        products = _products_of(model, x, v)
        for _ in range(max_steps):
            tangent, back = products(model, x, v)
            _check_products(model, x, v, tangent, back, products)
            # v is a unit vector up to the rounding of its dtype.
            stretch = _norms(tangent) / _norms(v).clamp_min(1e-300)
            settled = stretch <= best * (1.0 + rtol)
            best = torch.maximum(best, stretch)
            if bool(settled.all()):
                break
            v = unit(back.double()).to(x)
    return best


def _products_of(model: nn.Module, x: Tensor, v: Tensor) -> _Products:
    """How the products with the Jacobian are computed: by both modes, or by reverse mode alone."""
    try:
        _jacobian_products(model, x, v)
    except AssertionError as error:  # as vision transformers check the size of images
        raise ValueError(f"model does not run on x of shape {list(x.shape)}: {error}") from error
    except RuntimeError as error:  # of which NotImplementedError is one
        where = _innermost(model, x, v)
        try:
            _reverse_products(model, x, v)
        except RuntimeError:
            raise ValueError(
                f"{where} has no forward-mode derivative, and its backward pass cannot be differentiated: {error}"
            ) from None
        return _reverse_products
    return _jacobian_products


def _innermost(model: nn.Module, x: Tensor, v: Tensor) -> str:
    """The innermost module that was at work when forward mode failed."""
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    active: list[nn.Module] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        active.pop()

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(lambda m, args: active.append(m)))
            stack.enter_context(module.register_forward_hook(leave))
        with suppress(RuntimeError):
            _jacobian_products(model, x, v)
    last = active[-1] if active else model
    return f"{names[last]} ({type(last).__name__})"


def _reverse_products(model: nn.Module, x: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Like :func:`_jacobian_products`; ``scale`` J v as the derivative of <J^T u, scale v> in u."""
    point = x.detach().requires_grad_()
    out = tensor_in(model(point))
    if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
        raise ValueError("model must return one tensor with a row per sample")
    u = torch.ones_like(out).requires_grad_()
    (back,) = torch.autograd.grad(out, point, u, create_graph=True, allow_unused=True)
    if back is None or not back.requires_grad:
        return torch.zeros_like(out), torch.zeros_like(x)
    (tangent,) = torch.autograd.grad(back, u, scale * v, retain_graph=True)
    cotangent = scale * unit(tangent.double()).to(tangent)
    (back,) = torch.autograd.grad(out, point, cotangent)
    return tangent, back


def _jacobian_products(model: nn.Module, x: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """``scale`` times J v by forward mode and J^T u by reverse mode, u = J v / ||J v||, as J^T (J v) can underflow."""
    point = x.detach().requires_grad_()
    jvp: Any = torch.func.jvp(lambda t: tensor_in(model(t)), (point,), (scale * v,))
    out, tangent = jvp
    if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
        raise ValueError("model must return one tensor with a row per sample")
    tangent = tangent.detach()
    cotangent = scale * unit(tangent.double()).to(tangent)
    (back,) = torch.autograd.grad(out, point, cotangent, allow_unused=True)
    return tangent, torch.zeros_like(x) if back is None else back


def _check_products(model: nn.Module, x: Tensor, v: Tensor, tangent: Tensor, back: Tensor, products: _Products) -> None:
    """Raise ValueError where the products are not finite, or where <v, J^T u> is not ||J v|| as for every matrix J."""
    finite = as_rows(tangent).isfinite().all(1) & as_rows(back).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"the model's derivatives are not finite at {_named(~finite)}: it is not differentiable there, or they "
            "overflow; move these inputs a little, or use a wider dtype"
        )
    length = _norms(tangent)
    gap = (as_rows(v.double() * back.double()).sum(1) - length).abs()
    # Rounding is relative to the largest singular value of a layer, and v need not be near its singular vector, so that
    # gaps of hundreds of eps are ordinary, and depth adds to them. Derivatives that differ at a kink differ in their
    # first digits. The fourth root of eps is 1e-4 in float64 and 2e-2 in float32.
    apart = gap > torch.finfo(x.dtype).eps ** 0.25 * length
    if not bool(apart.any()):
        return
    # If J v nearly cancels (a saturated softmax), it consists of rounding, which is not linear in v as J is.
    rounding = torch.zeros_like(gap)
    for scale in _SCALES:
        scaled_tangent, scaled_back = products(model, x, v, scale)
        forward = _norms(scaled_tangent.double() / scale - tangent.double())
        reverse = _norms(scaled_back.double() / scale - back.double()) * _norms(v)
        rounding = torch.maximum(rounding, forward + reverse)
    apart &= ~(gap <= 10.0 * rounding)
    if bool(apart.any()):
        raise ValueError(
            f"forward- and reverse-mode derivatives disagree at {_named(apart)}: the model is not differentiable there "
            "(PReLU at an exact 0), or one of its operations has a wrong derivative; move these inputs a little"
        )


#: Factors that are not powers of 2, so that scaled numbers round differently; several, as one may round alike.
_SCALES = (0.7, 1.1, 0.9, 1.3)
#: Largest number of samples that an error names.
_NAMED = 8


def _named(which: Tensor) -> str:
    """Samples by their indices in the batch."""
    rows = which.nonzero().flatten().tolist()
    return f"sample{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_NAMED]))}{', ...' * (len(rows) > _NAMED)}"


def _norms(t: Tensor) -> Tensor:
    """Norm of each sample, [B] float64."""
    return torch.linalg.vector_norm(as_rows(t).double(), dim=1)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by operations with a forward-mode derivative, which the fused ones lack."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _quiet_forward_mode() -> Iterator[None]:
    """Without the warning that torch's own rules of forward mode use ``torch.jit.script``, which it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script`")
        yield


def unit(v: Tensor) -> Tensor:
    """Samples scaled to norm 1; zeros stay zeros."""
    norm = torch.linalg.vector_norm(as_rows(v), dim=1)
    return v / torch.where(norm > 0.0, norm, 1.0).reshape(-1, *(1,) * (v.dim() - 1))

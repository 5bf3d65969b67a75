"""Jacobian norms at single inputs: lower bounds on a network's Lipschitz constant."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlip._generators import unpredictable_generator
from fastlip.lipschitz._intervals import as_rows
from fastlip.norms._models.eval_mode import eval_mode
from fastlip.norms._models.outputs import tensor_in
from fastlip.norms._models.wrappers import bare_model


def local_lipschitz(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    *,
    rtol: float = 1e-3,
    max_steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Norm of the Jacobian of a model's output with respect to its input, at each sample.

    Locally optimal conjugate gradients on J^T J (A. V. Knyazev, "Toward the optimal preconditioned eigensolver", SIAM
    J. Sci. Comput. 23, 2001, without a preconditioner), with one forward-mode and one reverse-mode product per step for
    all samples at once: each step takes the best of all vectors in the span of the current one, its residual and the
    previous step. Each value is ||J v|| for a unit vector v. Up to rounding it is therefore a lower bound on the
    Jacobian's norm and on the model's L2 Lipschitz constant where the model is differentiable, but not an upper bound
    on either. Each step compares the two products, because PyTorch's forward and reverse derivatives of an operation
    can differ at its kinks, where neither is a Jacobian. Kinks at which they agree, such as ReLU's at 0, cannot be
    detected.

    A model without forward derivatives (an LSTM, or a ``torch.autograd.Function`` without ``jvp``) gets those of its
    backward pass, which is linear in the vector that it multiplies; there is nothing to compare then.

    Args:
        model: a module, run in eval mode, each of whose outputs depends on one sample only; it is not changed. What it
            returns may hold the output as ``logits``, or first in a tuple.
        x: samples, [B, ...], in the model's dtype and on its device.
        rtol: relative growth below which, in two steps, a sample has converged.
        max_steps: largest number of vectors that are tried.
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
    generator = unpredictable_generator() if generator is None else generator
    with eval_mode(model), torch.enable_grad(), _plain_attention(), _quiet_forward_mode():
        x = x.detach().clone()  # autograd refuses tensors that were made in inference mode
        draws = torch.randn(x.shape, dtype=torch.float64, generator=generator, device=generator.device)
        start = unit(draws.to(x.device))
        return _climbed(_products_of(model, x, start), start, rtol, max_steps)


@dataclass(frozen=True)
class _Products:
    """Products with the Jacobians J of a model at samples x, [B, ...], in x's dtype with vectors in float64.

    Attributes:
        model: in eval mode.
        x: the samples.
        reverse: whether J v comes from the backward pass too.
    """

    model: nn.Module
    x: Tensor
    reverse: bool = False

    def __call__(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """J v for v [B, ...], [B, outputs], and the function of one call that returns J^T u, [B, ...], for such a u.

        Raises:
            ValueError: the output is not one tensor with a row per sample.
        """
        point, v = self.x.detach().requires_grad_(), v.to(self.x)
        if self.reverse:
            out = self._output(self.model(point))
            tangent = self._by_backward_pass(out, point, v)
        else:
            jvp: Any = torch.func.jvp(lambda t: tensor_in(self.model(t)), (point,), (v,))
            out, tangent = self._output(jvp[0]), jvp[1]

        def transposed(u: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(out, point, u.to(out).reshape(out.shape), allow_unused=True)
            return torch.zeros_like(v, dtype=torch.float64) if back is None else back.double()

        return as_rows(tangent.detach()).double(), transposed

    def _output(self, out: Any) -> Tensor:
        out = tensor_in(out)
        if not isinstance(out, Tensor) or out.shape[:1] != self.x.shape[:1]:
            raise ValueError("model must return one tensor with a row per sample")
        return out

    def _by_backward_pass(self, out: Tensor, point: Tensor, v: Tensor) -> Tensor:
        """The derivative of <J^T u, v> in u."""
        u = torch.ones_like(out).requires_grad_()
        (back,) = torch.autograd.grad(out, point, u, create_graph=True, allow_unused=True)
        if back is None or not back.requires_grad:
            return torch.zeros_like(out)
        (tangent,) = torch.autograd.grad(back, u, v, retain_graph=True)
        return tangent


def _products_of(model: nn.Module, x: Tensor, v: Tensor) -> _Products:
    """The products by both modes, or by reverse mode alone where ``v`` cannot be pushed forward."""
    products = _Products(model, x)
    try:
        tangent, transposed = products(v)
        transposed(tangent)
    except AssertionError as error:  # as vision transformers check the size of images
        raise ValueError(f"model does not run on x of shape {list(x.shape)}: {error}") from error
    except RuntimeError as error:  # of which NotImplementedError is one
        where = _innermost(products, v)
        products = _Products(model, x, reverse=True)
        try:
            tangent, transposed = products(v)
            transposed(tangent)
        except RuntimeError:
            raise ValueError(
                f"{where} has no forward-mode derivative, and its backward pass cannot be differentiated: {error}"
            ) from None
    return products


def _innermost(products: _Products, v: Tensor) -> str:
    """The innermost module that was at work when forward mode failed."""
    model = products.model
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    active: list[nn.Module] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        active.pop()

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_pre_hook(lambda m, args: active.append(m)))
            stack.enter_context(module.register_forward_hook(leave))
        with suppress(RuntimeError):
            products(v)
    last = active[-1] if active else model
    return f"{names[last]} ({type(last).__name__})"


#: Of the length of a vector in float64, the share that orthogonalisation leaves of it if there was nothing more.
_ROUNDING = 1e-12


def _climbed(products: _Products, v: Tensor, rtol: float, max_steps: int) -> Tensor:
    """||J v|| of the last of ``max_steps`` unit vectors, [B], or of an earlier one after two steps of small gain."""
    image, transposed = products(v)
    if not (image.numel() and v.numel()):
        return v.new_zeros(len(v))
    before, before_image = torch.zeros_like(v), torch.zeros_like(image)
    slow, stay = torch.zeros(len(v), dtype=torch.long, device=v.device), torch.eye(3, device=v.device).to(v)
    for _ in range(1, max_steps):
        residual = _orthogonal_part(_checked(products, v, image, transposed), [v, before])
        residual_image, transposed = products(residual)
        _require_finite(residual_image)
        span = torch.stack([as_rows(t) for t in (v, residual, before)], 1)
        images = torch.stack([image, residual_image, before_image], 1)
        # A step of Newton's iteration to an orthonormal basis, as rounding would add up.
        correction = 1.5 * stay - 0.5 * span @ span.mT
        span, images = correction @ span, correction @ images
        weights, gain = _best_combination(images)
        # Each sample ends by itself, whatever the others need.
        weights = torch.where(_rows(slow < 2, weights), weights, stay[:2])
        slow = torch.where((gain <= rtol) | (slow >= 2), slow + 1, 0)
        v, before = (weights @ span).view(len(v), 2, *v.shape[1:]).unbind(1)
        image, before_image = (weights @ images).unbind(1)
        if bool((slow >= 2).all()):
            break
    # The image of a combination is the combination of images up to rounding only, and so is v a unit vector.
    image, transposed = products(v)
    _checked(products, v, image, transposed)
    return _norms(image) / _norms(v.to(products.x)).clamp_min(1e-300)


def _orthogonal_part(t: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """The part of t that is orthogonal to orthonormal vectors, or zeros, as unit vectors; 0 if it is only rounding."""
    rest = t
    for _ in range(2):  # once is not enough where most of it cancels, as near a singular vector
        for vector in basis:
            rest = rest - _rows(_dots(rest, vector), rest) * vector
    return torch.where(_rows(_norms(rest) > _ROUNDING * _norms(t), rest), unit(rest), 0.0)


def _best_combination(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of orthonormal vectors with these images, [B, 3, outputs]: the combination whose image is longest.

    Returns:
        Its weights and those of the unit vector orthogonal to it in the plane of it and the first vector, which is the
        step from one to the other, [B, 2, 3]; and the growth of the image over the first vector's, relative, [B].
    """
    largest = images.abs().amax((1, 2), keepdim=True)
    images = images / torch.where(largest > 0.0, largest, 1.0)
    values, vectors = torch.linalg.eigh(images @ images.mT)
    best = vectors[:, :, -1]
    step = best * best[:, :1]
    step[:, 0] -= 1.0
    gain = values[:, -1].clamp_min(0.0).sqrt() / images[:, 0].norm(dim=1).clamp_min(1e-300) - 1.0
    return torch.stack([best, unit(step)], 1), torch.where(largest.flatten() > 0.0, gain, 0.0)


def _checked(products: _Products, v: Tensor, image: Tensor, transposed: Callable[[Tensor], Tensor]) -> Tensor:
    """J^T u for u = J v / ||J v||, as J^T (J v) can underflow.

    Raises:
        ValueError: a product is not finite, or <v, J^T u> is not ||J v|| as for every matrix J.
    """
    _require_finite(image)
    u = unit(image)
    back = transposed(u)
    _require_finite(back)
    length = _norms(image)
    gap = (_dots(v.to(products.x).double(), back) - length).abs()
    # Rounding is relative to the largest singular value of a layer, and v need not be near its singular vector, so that
    # gaps of hundreds of eps are ordinary, and depth adds to them. Derivatives that differ at a kink differ in their
    # first digits. The fourth root of eps is 1e-4 in float64 and 2e-2 in float32.
    apart = gap > torch.finfo(products.x.dtype).eps ** 0.25 * length
    if not bool(apart.any()):
        return back
    # If J v nearly cancels (a saturated softmax), it consists of rounding, which is not linear in v as J is.
    rounding = torch.zeros_like(gap)
    for scale in _SCALES:
        scaled_image, transposed = products(scale * v)
        forward = _norms(scaled_image / scale - image)
        reverse = _norms(transposed(scale * u) / scale - back) * _norms(v)
        rounding = torch.maximum(rounding, forward + reverse)
    apart &= ~(gap <= 10.0 * rounding)
    if bool(apart.any()):
        raise ValueError(
            f"forward- and reverse-mode derivatives disagree at {_named(apart)}: the model is not differentiable there "
            "(PReLU at an exact 0), or one of its operations has a wrong derivative; move these inputs a little"
        )
    return back


def _require_finite(product: Tensor) -> None:
    finite = as_rows(product).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"the model's derivatives are not finite at {_named(~finite)}: it is not differentiable there, or they "
            "overflow; move these inputs a little, or use a wider dtype"
        )


#: Factors that are not powers of 2, so that scaled numbers round differently; several, as one may round alike.
_SCALES = (0.7, 1.1, 0.9, 1.3)
#: Largest number of samples that an error names.
_NAMED = 8


def _named(which: Tensor) -> str:
    """Samples by their indices in the batch."""
    rows = which.nonzero().flatten().tolist()
    return f"sample{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_NAMED]))}{', ...' * (len(rows) > _NAMED)}"


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Products of samples, [B]."""
    return (as_rows(a) * as_rows(b)).sum(1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, [B], to go with [B, ...]."""
    return values.view(-1, *(1,) * (like.dim() - 1))


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

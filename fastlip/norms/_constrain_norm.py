"""A parametrisation that keeps a layer's norm below a bound."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlip._arguments import integer, number
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, module_operator
from fastlip.norms._operators.operator import Operator, per_axis, require_finite, require_floating
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options
from fastlip.norms._solvers.solve import solve
from fastlip.norms._spectral_norm_value import stretch, unit

#: Power iteration for the gradient in eval mode: the most steps, and the growth of the norm at which it stops.
_MOST_STEPS, _SETTLED = 1000, 1e-12


def constrain_norm(
    module: nn.Module,
    input_size: int | Sequence[int] = (),
    *,
    bound: float = 1.0,
    iterations: int = 1,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> nn.Module:
    """Keep the norm of a Conv, ConvTranspose or Linear module below ``bound``, on inputs of one size.

    What torch's ``spectral_norm`` does for the reshaped kernel, this does for the convolution itself, by a
    parametrisation of ``weight`` (``torch.nn.utils.parametrize``). In training each forward takes ``iterations`` warm
    steps of power iteration and scales the weight by min(1, bound / norm), with the gradient of the norm. That norm is
    approached from below. In eval mode the weight is scaled by a certified upper side instead, computed again whenever
    the weight has changed, so that the bound holds with ``confidence``; the gradient is that of the norm as well.

    The bound holds on inputs of ``input_size``. On any other size the norm of a convolution is another one, of which a
    warning says so, once for each module.

    Args:
        module: the module; changed in place and returned.
        input_size: spatial size of its input, one number or one per axis; nothing for Linear.
        bound: positive upper bound for the norm.
        iterations: steps of power iteration per forward in training.
        options: how to compute the certified upper side in eval mode.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Raises:
        TypeError: ``module`` is of another kind, its weight no floating-point tensor, or an argument of the wrong type;
            the message names it.
        ValueError: ``bound`` is not positive, or the size does not fit; the message names it.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> conv = fastlip.norms.constrain_norm(nn.Conv2d(3, 4, 3, padding=1), 8, bound=1.0)
        >>> print(fastlip.conv_norm(conv.eval(), 8).upper)  # at most 1, but for rtol
    """
    bound = positive_bound(bound)
    iterations = integer(iterations, "iterations")
    chosen = chosen_options("constrain_norm", options, keywords)
    if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)):
        raise TypeError(f"module must be a Conv, ConvTranspose or Linear, got {type(module).__name__}")
    weight = module.weight
    require_floating(weight)
    axes = weight.dim() - 2
    if isinstance(input_size, Sequence) and not isinstance(input_size, str) and len(input_size) != axes:
        raise ValueError(f"input_size must have {axes} axes for {type(module).__name__}, got {input_size!r}")
    sizes = per_axis(input_size, "input_size", axes, 1)
    op = module_operator(module, (0, *sizes))
    constraint = LayerConstraint(op, weight, bound, iterations, chosen)
    parametrize.register_parametrization(module, "weight", constraint)
    if axes:
        module.register_forward_pre_hook(SizeWatch(tuple(sizes)))
    return module


def positive_bound(bound: float) -> float:
    """The bound as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    bound = number(bound, "bound", "a positive number")
    if not 0.0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}")
    return bound


class SizeWatch:
    """A hook that warns once of an input on whose size the bound does not hold; a named layer refuses it in eval mode.

    Raises:
        ValueError: a named layer is in eval mode, and its input of another size.
    """

    def __init__(self, size: tuple[int, ...], name: str = "") -> None:
        self.size, self.name = size, name
        self.warned = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        refuses = self.name and not module.training
        if (self.warned and not refuses) or not args or not isinstance(args[0], Tensor):
            return
        size = tuple(args[0].shape[-len(self.size) :])
        if size != self.size and refuses:
            raise ValueError(
                f"layer {self.name} is constrained on inputs of size {list(self.size)}, and its norm on {list(size)} "
                "is not known to be below the bound"
            )
        if size != self.size:
            self.warned = True
            warnings.warn(
                f"{type(module).__name__} is constrained on inputs of size {list(self.size)}, but is used on "
                f"{list(size)}, where its norm may exceed the bound",
                stacklevel=3,
            )


class LayerConstraint(nn.Module):
    """The parametrisation: the weight, scaled so that its norm stays below the bound."""

    v: Tensor  # [Cin, *input_size]

    def __init__(self, op: Operator, weight: Tensor, bound: float, iterations: int, options: NormOptions) -> None:
        super().__init__()
        self.bound, self.iterations, self.options = bound, iterations, options
        self._geometry = op.with_weight(torch.empty(op.weight.shape, device="meta"))
        generator = torch.Generator()
        generator.seed()
        start = torch.randn(op.input_shape, dtype=torch.float64, generator=generator).to(weight)
        self.register_buffer("v", start / torch.linalg.vector_norm(start))
        self._certified: tuple[Tensor, float] | None = None
        self._top: Tensor | None = None  # the singular vector of the certified weight, [1, Cin, *input_size]

    def forward(self, weight: Tensor) -> Tensor:
        # A matrix's operator holds it as it is; a transposed convolution's holds its adjoint, with the same weight.
        op = self._geometry
        if not self.training:
            scale = min(1.0, self.bound / self._upper(weight))
            if scale == 1.0 or not (torch.is_grad_enabled() and weight.requires_grad):
                return weight * scale
            norm = stretch(op, weight, self._singular_vector(weight))
            return weight * scale * (norm.detach() / norm)  # which is 1, with a gradient
        convolution = TorchOperator(op, weight.detach())
        with torch.no_grad():
            v = self.v[None]
            for _ in range(self.iterations):
                image = unit(convolution.adjoint(unit(convolution.forward(v))))
                # Weights of zeros, as layers may start with, or of NaN must not take the vector along.
                v = torch.where(image.any() & image.isfinite().all(), image, v)
            self.v.copy_(v[0])
        norm = stretch(op, weight, self.v.clone())
        # The backward pass of a number over the norm would square the norm's reciprocal, which may be out of range.
        return weight / (norm / self.bound).clamp_min(1.0)

    def _upper(self, weight: Tensor) -> float:
        if self._certified is None or not same_weight(self._certified[0], weight.detach()):
            copy = weight.detach().clone()
            op = self._geometry.with_weight(copy)
            require_finite(op)
            (upper,) = certified_uppers([op], self.options)
            self._certified, self._top = (copy, upper), None
        return self._certified[1]

    def _singular_vector(self, weight: Tensor) -> Tensor:
        """The first singular vector of the certified weight."""
        if self._top is None:
            self._top = settled_vector(TorchOperator(self._geometry, weight.detach()), self.v)
        return self._top


def same_weight(certified: Tensor, weight: Tensor) -> bool:
    """Whether a weight holds the numbers that were certified, in that dtype or in one where scaling rounds less."""
    wider = torch.promote_types(certified.dtype, weight.dtype) == weight.dtype
    return wider and certified.device == weight.device and torch.equal(certified.to(weight.dtype), weight)


def certified_uppers(ops: Sequence[Operator], options: NormOptions) -> list[float]:
    """Upper sides of norms that hold jointly, also after the weights are scaled by a number and rounded.

    They are positive. The weights are finite.
    """
    intervals = solve(ops, options.resolved([op.weight for op in ops]))
    uppers = []
    for op, interval in zip(ops, intervals, strict=True):
        limits = torch.finfo(op.weight.dtype)
        # Scaling the weight rounds it, each element by at most one unit.
        uppers.append(max(interval.upper + limits.eps * op.absolute_bound, limits.tiny))
    return uppers


@torch.no_grad()
def settled_vector(convolution: TorchOperator, start: Tensor) -> Tensor:
    """The first singular vector, [Cin, *input_size], by power iteration until its norm stands still."""
    v, last = start[None], 0.0
    for _ in range(_MOST_STEPS):
        image = convolution.forward(v)
        length = float(torch.linalg.vector_norm(image))
        back = unit(convolution.adjoint(unit(image)))
        if not (back.any() and back.isfinite().all()):
            break
        v = back
        if length <= last * (1 + _SETTLED):
            break
        last = length
    return v[0].clone()

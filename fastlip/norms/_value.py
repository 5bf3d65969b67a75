"""The norm as a differentiable number, and a parametrisation that keeps it below a bound."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlip._arguments import integer, number
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, module_operator
from fastlip.norms._operators.operator import Operator, conv_operator, per_axis, require_floating
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._operators.trim import trim
from fastlip.norms._solve import Settings, operator_norms
from fastlip.norms._solvers.iteration import Plan
from fastlip.norms._solvers.lanczos import lanczos_norms


def spectral_norm_value(
    weight: Tensor,  # [Cout, Cin / groups, *kernel]
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    rtol: float = 1e-3,
    max_steps: int = 300,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The norm of the convolution a network applies, as a number to differentiate.

    With the leading singular vectors u and v held fixed, the norm is <u, A v>, whose gradient in A is u v^T; through
    the convolution autograd makes it the gradient in ``weight``. Where the largest singular value is multiple this is
    one of its subgradients. The number is approached from below and certifies nothing: use :func:`conv_norm` for that.

    Args:
        weight: kernel, float32 or float64; may require grad.
        input_size: see :func:`conv_norm`.
        stride: see :func:`conv_norm`.
        padding: see :func:`conv_norm`.
        dilation: see :func:`conv_norm`.
        groups: see :func:`conv_norm`.
        padding_mode: see :func:`conv_norm`.
        rtol: accuracy that the iteration aims at.
        max_steps: most steps of the iteration.
        generator: source of the start; by default one seeded by the operating system.

    Returns:
        A scalar in weight's dtype and on its device.

    Raises:
        TypeError: ``weight`` is not float32 or float64, or another argument is of the wrong type; the message names it.
        ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64):
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a float32 or float64 tensor, got {given}")
    settings = Settings(rtol=rtol, max_steps=integer(max_steps, "max_steps"), generator=generator)
    op = conv_operator(
        weight,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    trimmed = trim(op)
    largest = trimmed.weight.abs().max().double()
    if largest == 0:
        return (weight * 0.0).sum()
    plan = Plan(0.5, 1, settings.rtol, max_steps, torch.float32, generator, keep_vectors=True)
    found = lanczos_norms([trimmed.with_weight(trimmed.weight.double() / largest)], plan)[0]
    assert found.vector is not None
    return _stretch(op, weight, found.vector.to(weight.dtype))


def _stretch(op: Operator, weight: Tensor, v: Tensor) -> Tensor:
    """||A v|| / ||v|| as <u, A v> with u and v constant."""
    image = TorchOperator(op, weight).forward(_unit(v.detach())[None])
    return (_unit(image.detach()) * image).sum()


def _unit(x: Tensor) -> Tensor:
    """The vector over its norm, though its squares may leave the range of its dtype; 0 for 0."""
    least = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax().clamp_min(least)
    return x / torch.linalg.vector_norm(x).clamp_min(least)


def constrain_norm(
    module: nn.Module,
    input_size: int | Sequence[int] = (),
    *,
    bound: float = 1.0,
    iterations: int = 1,
    rtol: float = 1e-2,
    confidence: float = 1.0 - 1e-6,
) -> nn.Module:
    """Keep the norm of a Conv, ConvTranspose or Linear module below ``bound``, on inputs of one size.

    What torch's ``spectral_norm`` does for the reshaped kernel, this does for the convolution itself, by a
    parametrisation of ``weight`` (``torch.nn.utils.parametrize``). In training each forward takes ``iterations`` warm
    steps of power iteration and scales the weight by min(1, bound / norm), with the gradient of the norm. That norm is
    approached from below. In eval mode the weight is scaled by a certified upper side instead, computed again whenever
    the weight has changed, so that the bound holds with ``confidence``.

    Args:
        module: the module; changed in place and returned.
        input_size: spatial size of its input, one number or one per axis; nothing for Linear.
        bound: positive upper bound for the norm.
        iterations: steps of power iteration per forward in training.
        rtol: width of the certified interval in eval mode.
        confidence: of the certified interval in eval mode.

    Raises:
        TypeError: ``module`` is of another kind, its weight no floating-point tensor, or an argument of the wrong type;
            the message names it.
        ValueError: ``bound`` is not positive, or the size does not fit; the message names it.
    """
    bound = number(bound, "bound", "a positive number")
    if not 0.0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}")
    iterations = integer(iterations, "iterations")
    settings = Settings(rtol=rtol, confidence=confidence)
    if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)):
        raise TypeError(f"module must be a Conv, ConvTranspose or Linear, got {type(module).__name__}")
    weight = module.weight
    require_floating(weight)
    axes = weight.dim() - 2
    if isinstance(input_size, Sequence) and not isinstance(input_size, str) and len(input_size) != axes:
        raise ValueError(f"input_size must have {axes} axes for {type(module).__name__}, got {input_size!r}")
    op = module_operator(module, (0, *per_axis(input_size, "input_size", axes, 1)))
    constraint = _Constraint(op, weight, bound, iterations, settings)
    parametrize.register_parametrization(module, "weight", constraint)
    return module


class _Constraint(nn.Module):
    """The parametrisation: the weight, scaled so that its norm stays below the bound."""

    v: Tensor  # [Cin, *input_size]

    def __init__(self, op: Operator, weight: Tensor, bound: float, iterations: int, settings: Settings) -> None:
        super().__init__()
        self.bound, self.iterations, self.settings = bound, iterations, settings
        self._geometry = op.with_weight(torch.empty(op.weight.shape, device="meta"))
        generator = torch.Generator()
        generator.seed()
        start = torch.randn(op.input_shape, dtype=torch.float64, generator=generator).to(weight)
        self.register_buffer("v", start / torch.linalg.vector_norm(start))
        self._certified: tuple[Tensor, float] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        # A matrix's operator holds it as it is; a transposed convolution's holds its adjoint, with the same weight.
        if not self.training:
            return weight * min(1.0, self.bound / self._upper(weight))
        op = self._geometry
        convolution = TorchOperator(op, weight.detach())
        with torch.no_grad():
            v = self.v[None]
            for _ in range(self.iterations):
                image = _unit(convolution.adjoint(_unit(convolution.forward(v))))
                # Weights of zeros, as layers may start with, or of NaN must not take the vector along.
                v = torch.where(image.any() & image.isfinite().all(), image, v)
            self.v.copy_(v[0])
        norm = _stretch(op, weight, self.v.clone())
        # The backward pass of a number over the norm would square the norm's reciprocal, which may be out of range.
        return weight / (norm / self.bound).clamp_min(1.0)

    def _upper(self, weight: Tensor) -> float:
        if self._certified is None or not torch.equal(self._certified[0], weight.detach()):
            copy = weight.detach().clone()
            op = self._geometry.with_weight(copy)
            # Scaling the weight rounds it, each element by at most one unit.
            rounding = torch.finfo(weight.dtype).eps * op.absolute_bound
            upper = operator_norms([op], self.settings)[0].upper + rounding
            self._certified = (copy, max(upper, torch.finfo(weight.dtype).tiny))
        return self._certified[1]

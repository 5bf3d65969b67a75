"""The norm as a number to differentiate."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from fastlip._arguments import integer
from fastlip.norms._operators.operator import Operator, conv_operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._operators.trim import trim
from fastlip.norms._options import NormOptions, chosen_options
from fastlip.norms._solvers.iteration_config import IterationConfig
from fastlip.norms._solvers.lanczos import lanczos_norms

#: Most steps of the iteration where nothing else is said.
_MOST_STEPS = 300
#: Probability that the iteration is content with too small a value, because its start hardly holds the leading vector.
_ETA = 1e-3
#: Accuracies from which on vectors in float32 are good enough: they add up rounding where Ritz values repeat.
_FLOAT32_RTOL = 1e-4


class _Keywords(TypedDict, total=False):
    rtol: float
    max_steps: int
    generator: torch.Generator | None


def spectral_norm_value(
    weight: Tensor,  # [Cout, Cin / groups, *kernel]
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    options: NormOptions | None = None,
    **keywords: Unpack[_Keywords],
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
        options: of these ``rtol`` (the accuracy that the iteration aims at; unless ``max_steps`` or rounding ends it
            before, it misses that with a probability of at most 0.001), ``max_steps`` (if None 300) and ``generator``
            play a part.
        keywords: the same three, in place of ``options``; ``rtol`` is 0.001 if it is not given.

    Returns:
        A scalar in weight's dtype and on its device.

    Raises:
        TypeError: ``weight`` is not float32 or float64, or another argument is of the wrong type; the message names it.
        ValueError: an argument is wrong; the message names it.

    Example:
        >>> import torch
        >>> import fastlip
        >>> weight = torch.randn(4, 3, 3, 3, requires_grad=True)
        >>> norm = fastlip.norms.spectral_norm_value(weight, 8, padding=1)
        >>> norm.backward()
    """
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64):
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a float32 or float64 tensor, got {given}")
    if "max_steps" in keywords:
        integer(keywords["max_steps"], "max_steps")  # of which None is none, unlike in options
    if options is None:
        keywords = {"rtol": 1e-3, **keywords}
    chosen = chosen_options("spectral_norm_value", options, keywords, _Keywords.__annotations__).resolved([weight])
    op = conv_operator(
        weight,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    vector = leading_vector(op, chosen.rtol, chosen.max_steps or _MOST_STEPS, chosen.generator)
    return (weight * 0.0).sum() if vector is None else stretch(op, weight, vector.to(weight.dtype))


def leading_vector(op: Operator, rtol: float, max_steps: int, generator: torch.Generator) -> Tensor | None:
    """The first singular vector of an operator, [Cin, *input_size] float64, by a Lanczos iteration; None for 0."""
    trimmed = trim(op)
    largest = trimmed.weight.abs().max().double()
    if largest == 0:
        return None
    dtype = torch.float32 if rtol >= _FLOAT32_RTOL else torch.float64
    config = IterationConfig(_ETA, 1, rtol, max_steps, dtype, generator, keep_vectors=True)
    vector = lanczos_norms([trimmed.with_weight(trimmed.weight.double() / largest)], config)[0].vector
    assert vector is not None
    return vector.view(op.input_shape)


def stretch(op: Operator, weight: Tensor, v: Tensor) -> Tensor:
    """||A v|| / ||v|| as <u, A v> with u and v constant."""
    image = TorchOperator(op, weight).forward(unit(v.detach())[None])
    return (unit(image.detach()) * image).sum()


def unit(x: Tensor) -> Tensor:
    """The vector over its norm, though its squares may leave the range of its dtype; 0 for 0."""
    least = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax().clamp_min(least)
    return x / torch.linalg.vector_norm(x).clamp_min(least)

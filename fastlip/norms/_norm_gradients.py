"""The norms of many layers and their gradients, by one operation of power iteration for all of them.

With unit vectors u and v the norm is <u, A v>, which is linear in the weight: it is <G, W> for the gradient G, the
outer product of u and v through the convolution. G is kept in place of u. Then the norm of a changed weight is one
product, and a step of power iteration, which G comes from, need not be taken for every layer each time.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlip.norms._operators.operator import PADDING_MODES, Operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._spectral_norm_value import unit

#: Most outer products that G is kept as: of more the two factors take longer to multiply than G takes to read.
_MOST_PRODUCTS = 4


class NormGradient(NamedTuple):
    """The gradient G of a norm in the weight, [Cout, n]: ``left`` times ``right``, or ``left`` where that is empty.

    Attributes:
        left: [Cout, r], or [Cout, n].
        right: [r, n], or [0].
    """

    left: Tensor
    right: Tensor

    def norm_of(self, weight: Tensor) -> Tensor:
        """<G, weight>, which is the norm where G is its gradient; a scalar."""
        rows = weight.reshape(len(self.left), -1)
        if not self.right.numel():
            return torch.dot(rows.flatten(), self.left.flatten())
        return (torch.mm(self.right, rows.mT) * self.left.mT).sum()

    def subtracted_from(self, gradient: Tensor, factor: Tensor | float) -> Tensor:
        """The difference of a gradient and ``factor`` G, of the gradient's shape."""
        rows = gradient.reshape(len(self.left), -1)
        if self.right.numel():
            found = torch.addmm(rows, self.left * -factor, self.right)
        elif isinstance(factor, float):
            found = torch.sub(rows, self.left, alpha=factor)
        else:
            found = rows - self.left * factor
        return found.view(gradient.shape)


def encode(op: Operator) -> tuple[int, ...]:
    """An operator's geometry as numbers, as an operation of torch's takes it."""
    pads = tuple(p for pair in op.padding for p in pair)
    mode = PADDING_MODES.index(op.padding_mode)
    return (len(op.input_size), op.groups, mode, *op.input_size, *op.stride, *op.dilation, *pads)


def _operators(weights: Sequence[Tensor], geometry: Sequence[int]) -> list[Operator]:
    """The operators of several layers, whose numbers of :func:`encode` follow each other."""
    found, rest = [], tuple(geometry)
    for weight in weights:
        axes, groups, mode = rest[:3]
        sizes, stride, dilation = (rest[3 + i * axes : 3 + (i + 1) * axes] for i in range(3))
        pads, rest = rest[3 + 3 * axes : 3 + 5 * axes], rest[3 + 5 * axes :]
        pairs = tuple(zip(pads[::2], pads[1::2], strict=True))
        kernel = weight if axes else weight.reshape(weight.shape[0], -1)
        found.append(Operator(kernel, sizes, stride, dilation, pairs, groups, PADDING_MODES[mode]))
    return found


@torch.library.custom_op("fastlip::norm_gradients", mutates_args=())
def norm_gradients(
    weights: Sequence[Tensor], vectors: Sequence[Tensor], geometry: Sequence[int], iterations: int
) -> list[Tensor]:
    """Steps of power iteration for all layers at once, each with two vectors that are orthogonal to each other.

    The second vector stands by: where training makes another singular value the largest, a single vector would take
    many steps to leave the former one. A weight of 16 bits is computed with in float32. Vectors that a weight of zeros
    or of NaN would spoil stay.

    Args:
        weights: [Cout, Cin / groups, *kernel] each.
        vectors: the layers' singular vectors so far, [2, Cin, *input_size] each, of length 1.
        geometry: numbers of :func:`encode`, one layer after the other.
        iterations: steps, at least 1.

    Returns:
        For each layer the new vectors, and ``left`` and ``right`` of its :class:`NormGradient`.
    """
    found: list[Tensor] = []
    with torch.autocast(weights[0].device.type, enabled=False):
        for op, vector in zip(_operators(weights, geometry), vectors, strict=True):
            found += _step(op, vector, iterations)
    return found


@norm_gradients.register_fake
def _(weights: Sequence[Tensor], vectors: Sequence[Tensor], geometry: Sequence[int], iterations: int) -> list[Tensor]:
    found: list[Tensor] = []
    for op, vector in zip(_operators(weights, geometry), vectors, strict=True):
        rows, columns, positions = len(op.weight), math.prod(op.weight.shape[1:]), _positions(op)
        empty = partial(torch.empty, dtype=computing_dtype(op.weight), device=op.weight.device)
        found.append(torch.empty(vector.shape, dtype=vector.dtype, device=vector.device))
        found += [empty(rows, positions), empty(positions, columns)] if positions else [empty(rows, columns), empty(0)]
    return found


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to compute with: float32 for 16 bits."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def computable(weight: Tensor) -> Tensor:
    """The weight in the dtype to compute with."""
    return weight.to(computing_dtype(weight))


def _step(op: Operator, vectors: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The new vectors, in the dtype of the old, and the gradient's two factors."""
    convolution = TorchOperator(op, computable(op.weight))
    v = vectors.to(convolution.weight.dtype)
    for _ in range(iterations):
        images = convolution.forward(v)
        # The two are rotated so that the first is stretched most; over the largest entry no square leaves its range.
        scaled = images.flatten(1) / images.abs().amax().clamp_min(torch.finfo(images.dtype).tiny)
        first, second, product = scaled[0].square().sum(), scaled[1].square().sum(), (scaled[0] * scaled[1]).sum()
        angle = 0.5 * torch.atan2(2.0 * product, first - second)
        cos, sin = angle.cos(), angle.sin()
        u = unit(cos * images[0] + sin * images[1])
        back = convolution.adjoint(torch.stack([u, unit(cos * images[1] - sin * images[0])]))
        one = unit(back[0])
        other = unit(back[1])
        other = unit(other - (other * one).sum() * one)
        found = torch.stack([one, other])
        usable = found.flatten(1).any(1) & found.flatten(1).isfinite().all(1)
        v = torch.where(usable.view(-1, *(1,) * (v.dim() - 1)), found, v)
    u = torch.where(u.isfinite().all(), u, 0.0)
    left, right = _outer(convolution, u[None], v[:1])
    return v.to(vectors.dtype).clone(memory_format=torch.contiguous_format), left, right


def _positions(op: Operator) -> int:
    """Number of outer products that G is kept as; 0 where it is kept as it is."""
    if op.groups > 1 or (op.kernel and not _unfolds(op)):
        return 0
    positions = math.prod(op.output_size)
    kept = positions * (len(op.weight) + math.prod(op.weight.shape[1:]))
    return positions if positions <= _MOST_PRODUCTS and 2 * kept <= op.weight.numel() else 0


def _unfolds(op: Operator) -> bool:
    """Whether torch's ``unfold`` lists the windows of the convolution."""
    return len(op.kernel) == 2 and op.padding_mode == "zeros" and all(a == b >= 0 for a, b in op.padding)


def _outer(convolution: TorchOperator, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of <u, A v> in the weight; u and v are [1, C, *size]."""
    op = convolution.geometry
    if op.groups == 1 and (not op.kernel or _unfolds(op)):
        left = u[0].reshape(len(u[0]), -1)
        pads = tuple(before for before, _ in op.padding)
        right = F.unfold(v, op.kernel, op.dilation, pads, op.stride)[0].mT if op.kernel else v
        if _positions(op):
            return left.clone(memory_format=torch.contiguous_format), right.contiguous()
        return left @ right, v.new_empty(0)
    return convolution.outer(u, v).flatten(1), v.new_empty(0)

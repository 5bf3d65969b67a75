"""The norms of many layers and their gradients, by one operation of Krylov steps for all of them.

With unit vectors u and v the norm is <u, A v>, which is linear in the weight: it is <G, W> for the gradient G, the
outer product of u and v through the convolution. G is kept in place of u. Then the norm of a changed weight is one
product, and the steps, which G comes from, need not be taken for every layer each time.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.norms._constrain.transforms import is_batched, without_autocast
from fastlip.norms._operators.operator import PADDING_MODES, Operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers.applied_operator import unfolds, windows
from fastlip.norms._solvers.krylov_steps import LeadingVectors, krylov_steps
from fastlip.norms._solvers.krylov_steps_together import krylov_steps_together
from fastlip.norms._solvers.waves import Waves
from fastlip.ops import norm_along, scaled_weight_grad

#: Forwards, at least, from one look for waves that overtake to the next, as a look takes as long as a step or more.
BETWEEN_WAVES = 4
#: Most outer products that G is kept as: of more the two factors take longer to multiply than G takes to read.
_MOST_PRODUCTS = 16


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
        return torch.dot(torch.mm(rows, self.right.mT).flatten(), self.left.flatten())

    def number_of(self, weight: Tensor) -> float:
        """The same as a number, of a weight on a CPU, without a graph and in the dtype of the factors."""
        return norm_along(weight, self.left, self.right if self.right.numel() else None).item()

    def through_scale(self, gradient: Tensor, scaled: Tensor, norm: Tensor | float, bound: float) -> Tensor:
        """The gradient in a weight, from that in (bound / norm) weight, the norm being <G, weight>.

        Args:
            gradient: in the scaled weight, in the dtype to compute with.
            scaled: the scaled weight, likewise.
            norm: a number above ``bound``, or a scalar tensor that is not read, for which (bound / norm) stands for 1
                if it is more.
            bound: of the norm.
        """
        left, right = self.left.to(gradient.dtype), self.right.to(gradient.dtype)
        if isinstance(norm, float) and gradient.device.type == "cpu" and not is_batched(gradient):
            return scaled_weight_grad(gradient, scaled, left, right if right.numel() else None, norm, bound)
        along: Tensor = torch.dot(gradient.flatten(), scaled.flatten()) / bound
        scale: Tensor | float
        if isinstance(norm, float):
            scale = bound / norm
        else:
            along, scale = torch.where(norm > bound, along, 0.0), (bound / norm).clamp(max=1.0)
        product = left @ right if right.numel() else left
        return (gradient - along * product.view(gradient.shape)).mul_(scale)


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
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    geometry: Sequence[int],
    steps: int,
    most_steps: int | None = None,
) -> list[Tensor]:
    """Krylov steps for all layers at once.

    A weight of 16 bits is computed with in float32. Vectors that a weight of zeros or of NaN would spoil stay.

    Args:
        weights: [Cout, Cin / groups, *kernel] each, on one device.
        vectors: the layers' first two singular vectors so far, orthonormal, and on a CPU more to choose from, if any;
            [at least 2, Cin, *input_size] each.
        geometry: numbers of :func:`encode`, one layer after the other.
        steps: to take, at least 1.
        most_steps: to take at most on a CPU; elsewhere, and if None, ``steps`` are taken.

    Returns:
        For each layer the new vectors, the norm before and after the steps, [2], and ``left`` and ``right`` of the
        :class:`NormGradient` after them.
    """
    ops = [op.with_weight(computable(op.weight)) for op in _operators(weights, geometry)]
    found: list[Tensor] = []
    with without_autocast(weights[0].device):
        leading = _leading_vectors(ops, vectors, steps, most_steps)
        for op, given, (v, u, norms) in zip(ops, vectors, leading, strict=True):
            found += [v.to(given.dtype), norms, *_outer(TorchOperator(op, op.weight), u, v[:1])]
    return found


def with_wave(vectors: Tensor, waves: Waves, op: Operator, norm: float) -> Tensor:
    """The vectors of an operator, [2, Cin, *input_size], and that of a wave that may have overtaken, if there is one.

    Args:
        vectors: the first two singular vectors so far.
        waves: of the operator.
        op: the operator with the weight as it is now, on a CPU.
        norm: of it, as far as it is known.
    """
    with without_autocast(op.weight.device), op.weight.device:  # whatever the default device is
        wave = waves.overtaking(op.with_weight(computable(op.weight)), norm)
    return vectors if wave is None else torch.cat([vectors, wave[None].to(vectors.dtype)])


def _leading_vectors(
    ops: Sequence[Operator], vectors: Sequence[Tensor], steps: int, most_steps: int | None
) -> list[LeadingVectors]:
    """What the steps find for each layer: on a CPU one after the other, elsewhere all of one dtype at once."""
    given = [pair.to(op.weight.dtype) for op, pair in zip(ops, vectors, strict=True)]
    if ops[0].weight.device.type == "cpu":
        return [krylov_steps(op, pair, steps, most_steps) for op, pair in zip(ops, given, strict=True)]
    found: dict[int, LeadingVectors] = {}
    for dtype in {op.weight.dtype for op in ops}:
        places = [place for place, op in enumerate(ops) if op.weight.dtype == dtype]
        some = krylov_steps_together([ops[i] for i in places], [given[i] for i in places], steps)
        found |= zip(places, some, strict=True)
    return [found[place] for place in range(len(ops))]


@norm_gradients.register_fake
def _(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    geometry: Sequence[int],
    steps: int,
    most_steps: int | None = None,
) -> list[Tensor]:
    found: list[Tensor] = []
    for op, vector in zip(_operators(weights, geometry), vectors, strict=True):
        left, right = gradient_like(op)
        found += [vector.new_empty(2, *vector.shape[1:]), left.new_empty(2), left, right]
    return found


def gradient_like(op: Operator) -> NormGradient:
    """Tensors without numbers, of the shapes of the gradient of an operator's norm."""
    rows, columns, positions = len(op.weight), math.prod(op.weight.shape[1:]), _positions(op)
    empty = partial(torch.empty, dtype=computing_dtype(op.weight), device=op.weight.device)
    if not positions:
        return NormGradient(empty(rows, columns), empty(0))
    return NormGradient(empty(rows, positions), empty(positions, columns))


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to compute with: float32 for 16 bits."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def computable(weight: Tensor) -> Tensor:
    """The weight in the dtype to compute with."""
    dtype = computing_dtype(weight)
    return weight if weight.dtype == dtype else weight.to(dtype)  # asking takes less time than a call


def _positions(op: Operator) -> int:
    """Number of outer products that G is kept as; 0 where it is kept as it is."""
    if op.groups > 1 or (op.kernel and not unfolds(op)):
        return 0
    positions = math.prod(op.output_size)
    kept = positions * (len(op.weight) + math.prod(op.weight.shape[1:]))
    return positions if positions <= _MOST_PRODUCTS and 2 * kept <= op.weight.numel() else 0


def _outer(convolution: TorchOperator, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of <u, A v> in the weight; u and v are [1, C, *size]."""
    op = convolution.geometry
    if op.groups == 1 and (not op.kernel or unfolds(op)):
        left = u[0].reshape(len(u[0]), -1)
        right = windows(op, v[0]).mT if op.kernel else v
        if _positions(op):
            return left.contiguous(), right.clone(memory_format=torch.contiguous_format)
        return left @ right, v.new_empty(0)
    return convolution.outer(u, v).flatten(1), v.new_empty(0)

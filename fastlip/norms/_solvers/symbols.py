"""Intervals of convolutions on large inputs, with certainty: by their symbol on a grid of frequencies.

A convolution on an input of n pixels is part of a circular one on any ring that is long enough, and that is block
diagonal: one block P(w), the symbol, for each frequency w = 2 pi f / M of a ring of M pixels. With stride s the s
phases of the input become channels of a convolution without stride. P(w) P(w)^H is a trigonometric polynomial in w,
whose few coefficients are sums of products of taps; so all of these matrices together cost little more than one. That
every one of them is below t is shown by a Cholesky factorisation, as in :mod:`fastlip.norms._solvers.deterministic`.

Fewer frequencies than a ring has do too. Let q(w) = Re(c u^H P(w) v) with |c| = 1 attain its maximum 1 at w*. In each
variable it is, up to a factor of modulus 1, a trigonometric polynomial of degree d = (k - 1) / 2, so that
q(w) >= cos(d (w - w*)) up to a distance of pi / d (H. Ehlich and K. Zeller, "Schwankung von Polynomen zwischen
Gitterpunkten", Math. Z. 86, 1964), and a grid of M > 2 d frequencies has one within pi / M. So the largest norm of all
is at most that on the grid divided by cos(pi d / M), for each axis.

The lower side is attained by a wave of the frequency found, faded out towards the borders and then refined.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormOptions
from fastlip.norms._solvers.deterministic import ring_sizes
from fastlip.norms._solvers.float64_rounding import reduction_length, rounding_terms

_EPS = torch.finfo(torch.float64).eps
#: Share of the width asked for that a coarser grid may cost, and that the search for the largest eigenvalue may.
_GRID_SHARE, _SEARCH_SHARE = 0.3, 0.03
#: Steps after which it is asked whether the wave is close enough to the vector sought, the most of them, and products
#: to find the largest block.
_REFINED, _MOST_REFINED, _PRODUCTS = 6, 48, 8
#: Share of the width asked for that the rounding of float32 may cost, and the least side of blocks that gain by it.
_ROUNDING_SHARE, _NARROW_SIDE = 0.4, 16
#: Complex numbers of blocks that are in memory at once.
MOST_ENTRIES = 1 << 21
#: Least pixels per axis, and that many times the root of the width asked for: on smaller inputs the norm of the ring is
#: above the operator's by more than an iteration's bound would be.
LEAST_SIZE, _LEAST_PER_WIDTH = 12, 2.0
#: Multiplications of an iteration in the time of one of a factorisation, and of one of the coefficients' products; and
#: those of a factorisation that take as long as a call.
_SLOWER, _SLOWER_PRODUCT, _CALL = 8.0, 2.5, 1e7


@dataclass(frozen=True, eq=False)
class Phases:
    """A convolution without stride, of which the phases of the input are channels.

    Attributes:
        weight: [groups, Cout / groups, channels, *kernel]; channels are [Cin / groups, *phases].
        before: padding in front, per axis.
        smaller_in: whether blocks are P^H P rather than P P^H.
    """

    weight: Tensor
    before: tuple[int, ...]
    smaller_in: bool

    @property
    def side(self) -> int:
        """Side of the blocks."""
        return self.weight.shape[2 if self.smaller_in else 1]


class _Plan(NamedTuple):
    """Frequencies and taps per axis, and by how much the norm may exceed the largest on these frequencies."""

    grid: tuple[int, ...]
    taps: tuple[int, ...]
    looseness: float


def takes_symbol(op: Operator, options: NormOptions) -> bool:
    """Whether :func:`symbol_interval` is going to be tried on an operator, whose weight is not read."""
    return options.method == "auto" and _plan(op, options) is not None


def _plan(op: Operator, options: NormOptions) -> _Plan | None:
    rings = ring_sizes(op) if op.kernel and op.weight.device.type == "cpu" else []
    if not rings or min(op.input_size) < max(LEAST_SIZE, _LEAST_PER_WIDTH / math.sqrt(options.rtol)):
        return None
    exact = tuple(m // s for m, s in zip(rings[0], op.stride, strict=True))
    taps = taps_of(op)
    grid, looseness = _grid(exact, taps, _GRID_SHARE * options.rtol)
    return _Plan(grid, taps, looseness) if _pays(op, options, grid, taps, min(_sides(op))) else None


def _sides(op: Operator) -> tuple[int, int]:
    """Rows and columns of the symbol, for each channel group."""
    return op.weight.shape[0] // op.groups, op.weight.shape[1] * math.prod(op.stride)


def symbol_interval(op: Operator, options: NormOptions) -> NormInterval | None:
    """The interval of a normalised operator, where this takes less time than an iteration and is narrow enough."""
    plan = _plan(op, options)
    if plan is None:
        return None
    grid, taps, looseness = plan
    rows, columns = _sides(op)
    phases = phases_of(op, taps, columns < rows)
    square, wave = _largest(phases, grid, options.rtol)
    # The coefficients are sums of so many products, whose magnitudes add up to at most the square in the end.
    square += 2.0 * _EPS * (reduction_length(op) + 16) * op.absolute_bound**2
    upper = math.sqrt(square) * looseness * (1.0 + 1e-14)
    lower, steps = _attained(op, wave, upper / (1.0 + options.rtol))
    return NormInterval(lower, upper, 1.0, "ring", steps, True) if upper <= lower * (1.0 + options.rtol) else None


def _grid(exact: Sequence[int], taps: Sequence[int], share: float) -> tuple[tuple[int, ...], float]:
    """Frequencies per axis, and by how much the norm may exceed the largest on them."""
    grid, looseness = [], 1.0
    for m, k in zip(exact, taps, strict=True):
        degree = 0.5 * (k - 1)
        coarser = max(k, math.ceil(math.pi * degree / math.acos(1.0 / (1.0 + share / len(taps)))))
        if coarser < m:
            looseness /= math.cos(math.pi * degree / coarser)
        grid.append(min(coarser, m))
    return tuple(grid), looseness * (1.0 + 1e-12)


def _pays(op: Operator, options: NormOptions, grid: Sequence[int], taps: Sequence[int], side: int) -> bool:
    """Whether this takes less time than iterating, by a count of multiplications."""
    steps = 1.2 * min(30.0 * math.sqrt(1e-2 / options.rtol), 100.0)
    iterated = 2.0 * steps * options.starts * op.weight.numel() * math.prod(op.output_size)
    blocks = op.groups * math.prod(grid[:-1]) * (grid[-1] // 2 + 1)
    lags = 0.5 * math.prod(2 * k - 1 for k in taps)
    factorised = blocks * (side**3 + 30.0 * side**2 + 2.0 * lags * side**2 + 100.0)
    products = 0.5 * math.prod(taps) * op.weight.numel() * side
    return _SLOWER * (factorised + _CALL) + _SLOWER_PRODUCT * products < iterated


def taps_of(op: Operator) -> tuple[int, ...]:
    """Taps per axis of the convolution without stride."""
    return tuple(-(-e // s) for e, s in zip(op.extent, op.stride, strict=True))


def phases_of(
    op: Operator, taps: Sequence[int], smaller_in: bool = False, dtype: torch.dtype = torch.float64
) -> Phases:
    """The convolution without stride, with taps per axis as :func:`taps_of` gives them."""
    axes = len(taps)
    weight = op.weight.to(dtype)
    spread = weight.new_zeros(*weight.shape[:2], *(k * s for k, s in zip(taps, op.stride, strict=True)))
    spread[(slice(None), slice(None), *(slice(0, e, d) for e, d in zip(op.extent, op.dilation, strict=True)))] = weight
    for axis, (k, s) in enumerate(zip(taps, op.stride, strict=True)):
        spread = spread.unflatten(2 + 2 * axis, (k, s))
    spread = spread.permute(0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)).flatten(1, 1 + axes)
    return Phases(spread.unflatten(0, (op.groups, -1)), tuple(left for left, _ in op.padding), smaller_in)


def _lags(taps: Sequence[int]) -> list[tuple[int, ...]]:
    """Differences of taps, one of each pair of opposite ones."""
    every = list(product(*(range(1 - k, k) for k in taps)))
    return every[len(every) // 2 :]


def _coefficients(phases: Phases, lags: Sequence[tuple[int, ...]]) -> Tensor:
    """C_l with P(w) P(w)^H = C_0 + sum over l of C_l exp(i l w) + C_l^T exp(-i l w), [lags, groups, n, n] float64."""
    weight = phases.weight
    taps = weight.shape[3:]
    found = []
    for lag in lags:
        one, other = weight, weight
        for axis, (k, step) in enumerate(zip(taps, lag, strict=True)):
            one = one.narrow(3 + axis, max(step, 0), k - abs(step))
            other = other.narrow(3 + axis, max(-step, 0), k - abs(step))
        if phases.smaller_in:  # P^H P has the conjugates of the phases that P P^H has
            one, other = (t.transpose(1, 2) for t in (other, one))
        found.append(one.flatten(2) @ other.flatten(2).mT)
    return torch.stack(found)


def _blocks(
    coefficients: Tensor, lags: Sequence[tuple[int, ...]], grid: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Frequencies, [F, axes], and their blocks in complex numbers of ``dtype``, [F, groups, n, n], some at a time."""
    half = (*grid[:-1], grid[-1] // 2 + 1)  # opposite frequencies have conjugate blocks
    angles = [2.0 * math.pi / m * torch.arange(count, dtype=torch.float64) for m, count in zip(grid, half, strict=True)]
    frequencies = torch.cartesian_prod(*angles).view(-1, len(grid))
    # C_l + C_l^T goes with the cosine, C_l - C_l^T with the sine.
    even = (coefficients + coefficients.mT).flatten(1)
    odd = (coefficients - coefficients.mT).flatten(1).to(dtype)
    even[0] = coefficients[0].flatten()
    even = even.to(dtype)
    steps = torch.tensor(lags, dtype=torch.float64)
    for some in frequencies.split(max(1, MOST_ENTRIES // even.shape[1])):
        turned = some @ steps.mT
        blocks = torch.complex(turned.cos().to(dtype) @ even, turned.sin().to(dtype) @ odd)
        yield some, blocks.unflatten(1, coefficients.shape[1:])


@dataclass(frozen=True, eq=False)
class Wave:
    """The input of an operator's phases that about attains the largest norm, up to its amplitude's fading.

    Attributes:
        group: the channel group.
        frequency: per axis.
        amplitudes: of the phases' channels, [channels] complex128.
    """

    group: int
    frequency: Tensor
    amplitudes: Tensor


def _largest(phases: Phases, grid: Sequence[int], rtol: float) -> tuple[float, Wave]:
    """A number above all eigenvalues of all blocks whose coefficients are exact; and the wave of about the largest."""
    lags, n = _lags(phases.weight.shape[3:]), phases.side
    narrow = n >= _NARROW_SIDE and _backward_error(n, torch.float32) <= 2.0 * _ROUNDING_SHARE * rtol
    dtype = torch.float32 if narrow else torch.float64
    coefficients = _coefficients(phases, lags)
    step = 2.0 * _SEARCH_SHARE * min(rtol, 1.0)
    bound, largest = 0.0, -1.0
    found: tuple[int, Tensor, Tensor] | None = None
    for frequencies, blocks in _blocks(coefficients, lags, grid, dtype):
        groups, flat = blocks.shape[1], blocks.flatten(0, 1)
        likely = int(_quotients(flat).argmax())
        value = torch.linalg.eigvalsh(flat[likely])[-1].item()
        if value > largest:
            largest, found = value, (likely % groups, frequencies[likely // groups], flat[likely])
        bound = _above(flat, max(bound, value * (1.0 + step)), step)
    assert found is not None
    # A block is a sum of 2 L - 1 products of coefficients and cosines or sines, each rounded.
    sizes = torch.linalg.vector_norm(coefficients, dim=(2, 3)).amax(1)
    terms = torch.finfo(dtype).eps * (4 * len(lags) + 16) * sizes.sum().item()
    return bound * (1.0 + _backward_error(n, dtype)) + terms, _wave(phases, *found)


def _backward_error(n: int, dtype: torch.dtype) -> float:
    """Of a factorisation of a Hermitian n x n matrix t I - G, relative to t: see :func:`cholesky_bound`."""
    return 4.0 * torch.finfo(dtype).eps * n * (n + 2)


def _wave(phases: Phases, group: int, frequency: Tensor, block: Tensor) -> Wave:
    """The wave that belongs to the largest eigenvalue of a block."""
    amplitudes = torch.linalg.eigh(block.to(torch.complex128)).eigenvectors[:, -1]
    if not phases.smaller_in:
        taps = phases.weight.shape[3:]
        positions = torch.tensor(list(product(*map(range, taps))), dtype=torch.float64)
        turns = torch.polar(torch.ones(len(positions), dtype=torch.float64), positions @ frequency)
        symbol = phases.weight[group].flatten(2).to(turns.dtype) @ turns
        amplitudes = symbol.mH @ amplitudes
    return Wave(group, frequency, amplitudes)


def _quotients(blocks: Tensor) -> Tensor:
    """Rayleigh quotients of a few steps of the power iteration, which any start will do for, [B]."""
    columns = blocks.diagonal(dim1=1, dim2=2).real.argmax(1)
    v = blocks[torch.arange(len(blocks)), :, columns][..., None]
    for _ in range(_PRODUCTS):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)
        image = blocks @ v
        quotients = (v.conj() * image).sum((1, 2)).real
        v = image
    return quotients


def _above(blocks: Tensor, bound: float, step: float) -> float:
    """``bound``, or a larger number, that a factorisation says is above all eigenvalues of Hermitian [B, n, n].

    The backward error of the factorisation is not in it yet.
    """
    n = blocks.shape[1]
    bound = max(bound, 1e-300)
    if n == 1:
        return max(bound, blocks.real.max().item() * (1.0 + step))
    while True:
        shifted = -blocks
        shifted.diagonal(dim1=1, dim2=2).add_(bound)
        failed = torch.linalg.cholesky_ex(shifted).info != 0
        if not bool(failed.any()):
            return bound
        blocks = blocks[failed]
        some = blocks[_quotients(blocks).topk(min(4, len(blocks))).indices]
        bound = max(bound, torch.linalg.eigvalsh(some)[:, -1].max().item()) * (1.0 + step)


def _attained(op: Operator, wave: Wave, wanted: float) -> tuple[float, int]:
    """The stretch of the wave, refined until it is the one wanted, rounded downwards; and the steps that this took."""
    v = faded(op, wave, torch.float32)[None]
    v, steps = _refined(op, v, wanted)
    v = v.double()
    length = torch.linalg.vector_norm(v).item()
    if not 0.0 < length < math.inf:
        return 0.0, steps
    image = torch.linalg.vector_norm(TorchOperator(op, op.weight.double()).forward(v)).item()
    rounding = rounding_terms([op], np.array([v.numel()], dtype=np.int64))
    stretch = image / length * (1.0 - rounding.quotient.item()) - rounding.application.item()
    return max(stretch, 0.0), steps


def faded(op: Operator, wave: Wave, dtype: torch.dtype) -> Tensor:
    """A wave as an input of an operator, [Cin, *input_size], which fades towards borders of zeros."""
    amplitudes, device = wave.amplitudes.unflatten(0, (-1, *op.stride)), op.weight.device  # [Cin / groups, *phases]
    field, channels = amplitudes, len(amplitudes)
    axes = zip(op.input_size, op.stride, op.padding, wave.frequency.tolist(), strict=True)
    for axis, (n, s, (left, _), w) in enumerate(axes):
        at = torch.arange(n, device=device) + left
        turn = torch.polar(torch.ones(n, dtype=torch.float64, device=device), w * (at // s).double())
        if op.padding_mode == "zeros":
            turn = turn * torch.sin(math.pi * (at - left + 1).double() / (n + 1))
        field = field.index_select(1 + axis, at % s) * turn.view(-1, *(1,) * (len(op.stride) - 1 - axis))
    v = torch.zeros(op.input_shape, dtype=dtype, device=device)
    v[wave.group * channels : (wave.group + 1) * channels] = field.real
    return v


def _refined(op: Operator, v: Tensor, wanted: float) -> tuple[Tensor, int]:
    """About the vector with the largest stretch of a Krylov space of A^T A and v, [1, *shape] float32; and steps."""
    narrow = TorchOperator(op, op.weight.float())
    basis: list[Tensor] = []
    images: list[Tensor] = []
    for step in range(1, _MOST_REFINED + 1):
        before = torch.linalg.vector_norm(v)
        for _ in range(2 if basis else 0):
            rows = torch.cat(basis).flatten(1)
            v = v - (rows.mT @ (rows @ v.flatten())).view_as(v)
        length = torch.linalg.vector_norm(v)
        if not length > max(1e-4 * before, 1e-20):  # what is left is rounding, and need not be orthogonal
            break
        basis.append(v / length)
        images.append(narrow.forward(basis[-1]))
        v = narrow.adjoint(images[-1])
        if step % _REFINED == 0 and _ritz(images)[0] > (1.0001 * wanted) ** 2:
            break
    if not basis:
        return v, 0
    return (_ritz(images)[1] @ torch.cat(basis).flatten(1)).view_as(v), len(basis)


def _ritz(images: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The largest eigenvalue of the images' Gram matrix and its eigenvector."""
    rows = torch.cat(list(images)).flatten(1)
    squares, vectors = torch.linalg.eigh(rows @ rows.mT)
    return squares[-1].item(), vectors[:, -1]

"""The wave that a convolution stretches the most, followed in little time while its weight changes.

A convolution turns a wave into one of the same frequency, but for the borders. So an iteration that follows the leading
singular vector while the weight changes hardly ever meets the waves of other frequencies, one of which may overtake
(horizontal and vertical edges in a first layer, say). Here each of some frequencies has its own wave, which follows the
leading singular vector of the symbol at that frequency; see :mod:`fastlip.norms._solvers.symbols`.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.deterministic import ring_sizes
from fastlip.norms._solvers.krylov_steps import krylov_steps
from fastlip.norms._solvers.start_vectors import fixed_direction
from fastlip.norms._solvers.symbols import LEAST_SIZE, MOST_ENTRIES, Wave, faded, taps_of

#: Steps at all frequencies when they are first looked at, and later.
_FIRST_STEPS, _STEPS = 8, 2
#: Most frequencies per axis.
_MOST_FREQUENCIES = 16
#: Krylov steps that bring a wave to the borders.
_REFINING = 2
#: Growth of the largest stretch in terms of the norm from which on a wave may have overtaken.
_OVERTAKING = 1.002
#: Least stretch of a wave that may overtake, in terms of the norm: between the frequencies it may be larger.
_NEAR = 0.98
#: Length of a residual, relative, below which it is rounding, and the least of all lengths that are told from it.
_SETTLED, _LEAST = 1e-4, 1e-18
#: Magnitudes of weights between which products of four of them, summed up, are in the range of float32.
_SAFE = (1e-6, 1e4)


def has_waves(op: Operator) -> bool:
    """Whether an operator is a convolution of zero or circular padding, on at least twelve pixels along each axis."""
    return bool(op.kernel) and min(op.input_size) >= LEAST_SIZE and bool(ring_sizes(op))


class Waves:
    """For each of some frequencies the wave that a convolution stretches the most, while its weight changes.

    Attributes:
        frequencies: [F, axes] float64.
        amplitudes: what the waves were like when they were last looked at, [F, groups, Cin / groups * phases]
            complex64; None before that.
    """

    def __init__(self, op: Operator) -> None:
        """The waves of an operator that :func:`has_waves`, whose weight is not read."""
        # On so many frequencies per axis the largest norm is at least cos(pi / 4) of that of all, and mostly close to
        # it. An even number has those of edges, which is what first layers look for.
        wanted = [min(2 * k + 2 if k > 1 else 1, _MOST_FREQUENCIES) for k in taps_of(op)]
        counts = [min(n // s, m) for n, s, m in zip(ring_sizes(op)[0], op.stride, wanted, strict=True)]
        half = (*counts[:-1], counts[-1] // 2 + 1)  # opposite frequencies have conjugate symbols
        settings: dict[str, Any] = {"dtype": torch.float64, "device": op.weight.device}
        angles = [2.0 * math.pi / m * torch.arange(n, **settings) for m, n in zip(counts, half, strict=True)]
        self.frequencies = torch.cartesian_prod(*angles).view(-1, len(half))
        self.amplitudes: Tensor | None = None
        # The least of the largest stretch over the norm, since a wave overtook.
        self._least = 1.0

    def overtaking(self, op: Operator, norm: float) -> Tensor | None:
        """A vector along the wave that is stretched the most, if it may have overtaken since the last look.

        That is if its stretch has grown in terms of the norm. Its stretch by the operator is a little less than that of
        the wave, which does not end at the borders.

        Args:
            op: the operator with the weight as it is now, on a CPU, in float32 or float64.
            norm: of what is followed, that the operator has at least.

        Returns:
            A vector, [Cin, *input_size], of length 1 in each group; or None.
        """
        found = self.leading(op) if norm > 0.0 else None
        if found is None:
            return None
        wave, stretch = found
        share, least = stretch / norm, _OVERTAKING * self._least
        self._least = share if share > least else min(share, self._least)
        if not share > max(_NEAR, least):
            return None
        vector = faded(op, wave, op.weight.dtype)
        return krylov_steps(op, torch.stack([vector, torch.zeros_like(vector)]), _REFINING).vectors[0]

    def leading(self, op: Operator) -> tuple[Wave, float] | None:
        """The wave that is stretched the most, and its stretch; None for a weight of zeros or that is not finite."""
        largest = torch.linalg.vector_norm(op.weight, math.inf).item()
        if not 0.0 < largest < math.inf:
            return None
        scale = 1.0 if _SAFE[0] < largest < _SAFE[1] else largest
        weight = (op.weight if scale == 1.0 else op.weight / scale).float().unflatten(0, (op.groups, -1)).flatten(3)
        channels, phases = weight.shape[2], math.prod(op.stride)
        steps = _STEPS
        if self.amplitudes is None:
            start = fixed_direction(channels * phases, torch.float32, weight.device).to(torch.complex64)
            self.amplitudes, steps = start.expand(len(self.frequencies), op.groups, -1), _FIRST_STEPS
        phase, shifts = _taps(op)
        by_symbol = phases == 1 and weight.shape[1] < weight.shape[3]
        entries = op.groups * channels * (weight.shape[1] if by_symbol else weight.shape[3])
        many = max(1, MOST_ENTRIES // max(entries, weight.shape[3]))
        parts = []
        for frequencies, amplitudes in zip(self.frequencies.split(many), self.amplitudes.split(many), strict=True):
            angles = (frequencies @ shifts).float()
            turns = torch.polar(torch.ones_like(angles), angles)
            symbols = _Blocks(weight, turns) if by_symbol else _Windows(weight, turns, phase, phases)
            parts.append(_followed(symbols, amplitudes, steps))
        self.amplitudes = torch.cat([part[0] for part in parts])
        stretches = torch.cat([part[1] for part in parts])
        frequency, group = divmod(int(stretches.argmax()), op.groups)
        amplitudes = self.amplitudes[frequency, group].to(torch.complex128)
        return Wave(group, self.frequencies[frequency], amplitudes), stretches[frequency, group].item() * scale


def _taps(op: Operator) -> tuple[Tensor, Tensor]:
    """Which phase of the input each tap reads, [taps], and how many strides further on, [axes, taps] float64."""
    device = op.weight.device
    places = [torch.arange(k, device=device) * d for k, d in zip(op.kernel, op.dilation, strict=True)]
    taps = torch.cartesian_prod(*places).view(-1, len(places))
    phase = torch.zeros(len(taps), dtype=torch.int64, device=device)
    for axis, s in enumerate(op.stride):
        phase = phase * s + taps[:, axis] % s
    return phase, (taps // torch.tensor(op.stride, device=device)).double().mT


class _Symbols(Protocol):
    """The symbols of a convolution at some frequencies, one for each group."""

    def forward(self, x: Tensor) -> Tensor:
        """Of inputs [F, groups, channels * phases], [F, groups, Cout / groups]."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """Of outputs, likewise."""
        ...


class _Windows:
    """By products with the weight of what it sees of the waves, as the symbols of many channels are large."""

    def __init__(self, weight: Tensor, turns: Tensor, phase: Tensor, phases: int) -> None:
        self._weight, self._turns = weight.flatten(2), turns[:, None, None]
        self._phase, self._phases = phase, phases

    def forward(self, x: Tensor) -> Tensor:
        seen = x.unflatten(2, (-1, self._phases))[..., self._phase] * self._turns
        return _complex(_real(seen.flatten(2)) @ self._weight.mT)

    def adjoint(self, y: Tensor) -> Tensor:
        seen = _complex(_real(y) @ self._weight).unflatten(2, (-1, len(self._phase))) * self._turns.conj()
        found = seen.new_zeros(*seen.shape[:3], self._phases)
        return found.index_add_(3, self._phase, seen).flatten(2)


class _Blocks:
    """By the symbols themselves, of few channels without stride."""

    def __init__(self, weight: Tensor, turns: Tensor) -> None:
        blocks = torch.view_as_real(turns).permute(0, 2, 1).flatten(0, 1) @ weight.flatten(0, 2).mT
        self._blocks = _whole(blocks.unflatten(1, weight.shape[:3]))

    def forward(self, x: Tensor) -> Tensor:
        return (self._blocks * x[:, :, None]).sum(3)

    def adjoint(self, y: Tensor) -> Tensor:
        return (self._blocks.conj() * y[..., None]).sum(2)


def _whole(parts: Tensor) -> Tensor:
    """Complex numbers [F, ...] from their parts, [2 F, ...]."""
    return torch.view_as_complex(parts.unflatten(0, (-1, 2)).movedim(1, -1).contiguous())


def _real(t: Tensor) -> Tensor:
    """Complex rows [F, groups, n] as real ones, [groups, 2 F, n]."""
    return torch.view_as_real(t).permute(1, 0, 3, 2).flatten(1, 2)


def _complex(rows: Tensor) -> Tensor:
    """Undoes :func:`_real`."""
    return torch.view_as_complex(rows.unflatten(1, (-1, 2)).permute(1, 0, 3, 2).contiguous())


def _followed(symbols: _Symbols, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Steps of steepest ascent towards the leading singular vectors, and the stretches of the unit vectors found.

    In a step the best combination of x and the residual of A^H A x takes the place of x.
    """
    x = x / _length(x).clamp_min(1e-30)
    y = symbols.forward(x)
    for _ in range(steps):
        back = symbols.adjoint(y)
        residual = back - (x.conj() * back).sum(2, keepdim=True) * x
        length = _length(residual)
        least = (_SETTLED * _length(back)).clamp_min(_LEAST)
        residual = residual * torch.where(length > least, 1.0 / length.clamp_min(_LEAST), 0.0)
        image = symbols.forward(residual)
        mixed = (y.conj() * image).sum(2, keepdim=True)
        half = 0.5 * (_length(y).square() - _length(image).square())
        first = half + torch.sqrt(half.square() + mixed.abs().square())
        scale = torch.hypot(first, mixed.abs())
        # Both are 0 where x is of length 0 or stretched by less than a residual that it does not mix with.
        first = torch.where(scale > 0.0, first / scale, 1.0)
        second = torch.where(scale > 0.0, mixed.conj() / scale, 0.0)
        x, y = first * x + second * residual, first * y + second * image
    return x, (_length(y) / _length(x).clamp_min(1e-30))[:, :, 0]


def _length(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=2, keepdim=True)

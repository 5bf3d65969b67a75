"""The wave that a convolution stretches the most, in little time, to start an iteration from.

A convolution turns a wave into one of the same frequency, but for the borders. So an iteration that follows the leading
singular vector while the weight changes hardly ever meets the waves of other frequencies, one of which may overtake
(horizontal and vertical edges in a first layer, say). Here the norms of the symbol are compared on a grid of
frequencies; see :mod:`fastlip.norms._solvers.symbols`.
"""

import math

import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.deterministic import ring_sizes
from fastlip.norms._solvers.start_vectors import fixed_direction
from fastlip.norms._solvers.symbols import LEAST_SIZE, MOST_ENTRIES, Wave, faded, phases_of, taps_of

#: Steps of power iteration at all frequencies, and how many more at so many of them whose norms seem the largest.
_STEPS, _MORE_STEPS, _LIKELY = 4, 8, 4


def leading_wave(op: Operator, above: float) -> Tensor | None:
    """The wave that an operator stretches about the most, [Cin, *input_size], if its stretch may be above ``above``.

    None for what is no convolution of zero or circular padding on an input of at least twelve pixels along each axis.

    Args:
        op: on a CPU, in float32 or float64.
        above: stretch below which the wave is not of interest.
    """
    rings = ring_sizes(op) if op.kernel else []
    if not rings or min(op.input_size) < LEAST_SIZE:
        return None
    largest = op.weight.abs().max().item()
    if not 0.0 < largest < math.inf:
        return None
    taps = taps_of(op)
    # On so many frequencies per axis the largest norm is at least cos(pi / 4) of that of all, and mostly close to it.
    # An even number has those of edges, which is what first layers look for.
    counts = [min(n // s, 2 * k + 2 if k > 1 else 1) for n, s, k in zip(rings[0], op.stride, taps, strict=True)]
    half = (*counts[:-1], counts[-1] // 2 + 1)  # opposite frequencies have conjugate symbols
    angles = [2.0 * math.pi / m * torch.arange(count) for m, count in zip(counts, half, strict=True)]
    frequencies = torch.cartesian_prod(*angles).view(-1, len(half))
    phases = phases_of(op.with_weight(op.weight / largest), taps, dtype=torch.float32)
    positions = torch.cartesian_prod(*(torch.arange(k, dtype=torch.float32) for k in taps)).view(-1, len(taps))
    by_tap = phases.weight.flatten(3).permute(3, 0, 1, 2).flatten(1).contiguous()
    start = fixed_direction(phases.weight.shape[1], torch.float32, by_tap.device).to(torch.complex64)[None, None]
    found, best = None, above / largest
    for some in frequencies.split(max(1, MOST_ENTRIES // by_tap.shape[1])):
        turns = some @ positions.mT
        symbols = torch.complex(turns.cos() @ by_tap, turns.sin() @ by_tap).view(-1, *phases.weight.shape[1:3])
        images, _, stretches = _power_iteration(symbols, start.expand(len(symbols), -1, -1), _STEPS)
        likely = stretches.topk(min(_LIKELY, len(stretches))).indices
        _, amplitudes, stretches = _power_iteration(symbols[likely], images[likely], _MORE_STEPS)
        place = int(stretches.argmax())
        if stretches[place].item() > best:
            best, (frequency, group) = stretches[place].item(), divmod(int(likely[place]), op.groups)
            found = Wave(group, some[frequency].double(), amplitudes[place].to(torch.complex128))
    return None if found is None else faded(op, found, op.weight.dtype)


def _power_iteration(matrices: Tensor, images: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of power iteration on complex matrices [B, m, n].

    Args:
        matrices: A.
        images: conjugates of vectors of the range, [B, 1, m], from which the first step begins.
        steps: how many.

    Returns:
        The conjugates of A v, [B, 1, m], unit vectors v, [B, n], and their stretches ||A v||, [B].
    """
    for _ in range(steps):
        v = (images @ matrices).conj().resolve_conj()
        v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True).clamp_min(1e-30)
        images = torch.bmm(matrices, v.mT).mT.conj().resolve_conj()
    return images, v[:, 0], torch.linalg.vector_norm(images, dim=(1, 2))

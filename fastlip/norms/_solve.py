"""From a list of operators to their intervals: exact ones first, the others by one randomised certificate."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from fastlip._arguments import integer, number
from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.composed import AnyOperator, Composed, weight_numel
from fastlip.norms._operators.operator import Operator, compute_frobenius, matrix_entries, require_finite, smallest_side
from fastlip.norms._operators.trim import flatten, trim
from fastlip.norms._solvers.batched import kind
from fastlip.norms._solvers.deterministic import deterministic_upper, ring_sizes
from fastlip.norms._solvers.exact import dense_norm
from fastlip.norms._solvers.iteration import Iterate, Plan
from fastlip.norms._solvers.lanczos import lanczos_norms
from fastlip.norms._solvers.power import power_norms

DETERMINISTIC = ("ring", "gram", "cholesky")
METHODS = ("auto", "lanczos", "power", *DETERMINISTIC, "svd")

# Above this a matrix costs more than the iteration, which takes more steps the narrower its interval is to be. GPUs
# iterate many at once, and leave the eigenvalues of a small matrix to the host: each is waited for. Their limit is a
# guess that no GPU has measured.
_DENSE_SIDE = 512
_DENSE_SIDE_NARROW = 1024
_NARROW = 5e-3
_DENSE_SIDE_ON_GPU = 32
_DENSE_ENTRIES = 1 << 26
# Width of matrices' intervals over the width asked for: they are to cost no more than needed, and look exact beside
# the others.
_SHARPER = 0.01
# Bytes that vectors may take where nothing else is said.
_MEMORY = 1 << 31
# Bytes of vectors iterated at once on a CPU: more gain nothing there, and cost page faults.
_CPU_WAVE = 1 << 28
# Binary orders of magnitude that a weight may be from 1 and be taken as it is.
_NEAR_ONE = 10
# Multiplications of a factorisation of all blocks of a ring that take about as long as a few steps of the iteration.
_CHEAP_RING = 1 << 30


@dataclass(frozen=True)
class Settings:
    """How to compute norms; checked on construction, where numbers of numpy become Python's.

    Attributes:
        rtol: relative width ``upper / lower - 1`` to stop at; positive and finite.
        confidence: joint probability that all upper sides hold.
        method: one of ``METHODS``.
        starts: independent random starts per iterated operator.
        max_steps: most steps of an iteration; None for the method's default.
        dtype: arithmetic of the Lanczos iteration, torch.float32 or torch.float64.
        max_memory: bytes the vectors of one iteration may take; see :func:`memory_for`.
        generator: source of the starts; seeded by the operating system if None.
        progress: called with the number of operators done and their total.

    Raises:
        TypeError: a field is of the wrong type; the message names it.
        ValueError: its value is out of range.
    """

    rtol: float = 1e-2
    confidence: float = 1.0 - 1e-6
    method: str = "auto"
    starts: int = 4
    max_steps: int | None = None
    dtype: torch.dtype = torch.float32
    max_memory: int = _MEMORY
    generator: torch.Generator | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        checked = {
            "rtol": number(self.rtol, "rtol", "a positive number"),
            "confidence": number(self.confidence, "confidence", "a number strictly between 0 and 1"),
            "starts": integer(self.starts, "starts"),
            "max_steps": None if self.max_steps is None else integer(self.max_steps, "max_steps"),
            "max_memory": integer(self.max_memory, "max_memory"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not 0.0 < self.rtol < math.inf:
            raise ValueError(f"rtol must be positive and finite, got {self.rtol}")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {self.dtype!r}")
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be callable or None, got {type(self.progress).__name__}")


def memory_for(given: int | None, tensors: Iterable[Tensor]) -> int:
    """``given``, or what is taken without asking where these tensors are: 2 GiB, on a GPU half of what is free there.

    Of operators iterated at once a GPU has use for as many as fit, since each wave of them is launched and waited for.
    """
    if given is not None:
        return given
    device = next((t.device for t in tensors), None)
    if device is None or device.type != "cuda":
        return _MEMORY
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_MEMORY, (torch.cuda.mem_get_info(device)[0] + unused) // 2)


def operator_norms(ops: Sequence[AnyOperator], settings: Settings) -> list[NormInterval]:
    """Norm intervals of all operators, whose upper sides hold jointly with ``settings.confidence``.

    Which operators are iterated, with how many starts and at what share of 1 - confidence each, is settled before the
    first random number is drawn.

    Raises:
        TypeError: ``ops`` are no operators, or ``settings`` no :class:`Settings`.
        ValueError: a weight holds NaN or infinite values, or the method does not apply to one of the operators.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be a Settings, got {type(settings).__name__}")
    if not isinstance(ops, Sequence) or not all(isinstance(op, AnyOperator) for op in ops):
        raise TypeError(f"ops must be a sequence of Operator and Composed, got {ops!r:.80}")
    given = list(chain.from_iterable(op.parts if isinstance(op, Composed) else (op,) for op in ops))
    compute_frobenius(given)
    for part in given:
        require_finite(part)
    results: dict[int, NormInterval] = {}

    def settle(index: int, interval: NormInterval, exponent: int) -> None:
        results[index] = _rescale(interval, exponent, settings.rtol)
        if settings.progress is not None:
            settings.progress(len(results), len(ops))

    iterated: list[tuple[int, AnyOperator, int]] = []
    ops = [_as_applied(op) if isinstance(op, Operator) else op for op in ops]
    compute_frobenius(op for op in ops if isinstance(op, Operator))
    for index, op in enumerate(ops):
        if isinstance(op, Composed):
            iterated.append((index, op, 0))
            continue
        scaled, exponent = _normalise(op)
        if scaled is None:
            settle(index, NormInterval(0.0, 0.0, 1.0, "closed form", 0, True), 0)
        elif settings.method == "svd":
            needed = 8 * matrix_entries(scaled)
            if needed > settings.max_memory:
                raise ValueError(f"method 'svd' needs {needed:.1e} bytes; raise max_memory or use 'auto'")
            settle(index, dense_norm(scaled, settings.rtol), exponent)
        elif settings.method in ("lanczos", "power"):
            iterated.append((index, scaled, exponent))
        else:
            small = flatten(scaled)
            if settings.method == "auto" and _is_small(small, settings.rtol):
                accuracy = _SHARPER * min(settings.rtol, 1.0)
                how = "svd" if small.kernel else "closed form"
                settle(index, dense_norm(small, settings.rtol, how, accuracy), exponent)
            else:
                iterated.append((index, small, exponent))
    if iterated:
        solve = _deterministic if settings.method in DETERMINISTIC else _certified
        for at, interval in solve([op for _, op, _ in iterated], settings):
            settle(iterated[at][0], interval, iterated[at][2])
    return [results[index] for index in range(len(ops))]


def _is_small(op: Operator, rtol: float) -> bool:
    side, entries = smallest_side(op), matrix_entries(op)
    most = _DENSE_SIDE_NARROW if rtol < _NARROW else _DENSE_SIDE
    if op.weight.device.type != "cpu":
        most = _DENSE_SIDE_ON_GPU
    return entries == 0 or (side <= most and entries <= _DENSE_ENTRIES)


def _certified(ops: list[AnyOperator], settings: Settings) -> Iterator[tuple[int, NormInterval]]:
    """Intervals by iteration from random starts; each operator has an equal share of 1 - confidence."""
    eta = (1.0 - settings.confidence) / len(ops)
    method = "power" if settings.method == "power" else "lanczos"
    for at, found in _iterate(ops, eta, settings):
        # Where the sides contradict each other these were the unlucky starts, and nothing is known of the upper one.
        upper = found.upper if found.upper >= found.lower else math.inf
        interval = NormInterval(found.lower, upper, 1.0 - eta, method, found.steps, False)
        if settings.method == "auto" and interval.width > settings.rtol:
            interval = _intersected(ops[at], interval, settings)
        yield at, replace(interval, converged=interval.width <= settings.rtol)


def _intersected(op: AnyOperator, interval: NormInterval, settings: Settings) -> NormInterval:
    """The interval with the ring's upper side where that is lower, and cheap to have."""
    rings = ring_sizes(op) if isinstance(op, Operator) and op.kernel else []
    if not isinstance(op, Operator) or not rings:
        return interval
    side = min(op.weight.shape[0] // op.groups, op.weight.shape[1] * math.prod(op.stride))
    if math.prod(rings[0]) // math.prod(op.stride) * op.groups * side**3 > _CHEAP_RING:
        return interval
    try:
        upper = deterministic_upper(op, "ring", interval.lower, settings.rtol, settings.max_memory)
    except ValueError:  # it does not fit into memory
        return interval
    return replace(interval, upper=upper, confidence=1.0, method="ring") if upper < interval.upper else interval


def _deterministic(ops: list[AnyOperator], settings: Settings) -> Iterator[tuple[int, NormInterval]]:
    """Deterministic upper sides, with the lower sides of one short iteration from a single start."""
    # Of that iteration's own upper side nothing is used but when to stop: the lower side should rarely be early.
    short = replace(settings, method="lanczos", starts=1, rtol=max(settings.rtol / 4.0, sys.float_info.min))
    for at, found in _iterate(ops, 1e-3, short):
        op = ops[at]
        if isinstance(op, Composed):
            raise ValueError(f"method {settings.method!r} takes single convolutions only; use 'auto'")
        upper = deterministic_upper(op, settings.method, found.lower, settings.rtol, settings.max_memory)
        converged = upper <= found.lower * (1.0 + settings.rtol)
        yield at, NormInterval(found.lower, upper, 1.0, settings.method, found.steps, converged)


def _iterate(ops: list[AnyOperator], eta: float, settings: Settings) -> Iterator[tuple[int, Iterate]]:
    """Iterate operators together; yields positions in ``ops`` and results."""
    generator = settings.generator
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    power = settings.method == "power"
    run: Callable[[Sequence[AnyOperator], Plan], list[Iterate]] = power_norms if power else lanczos_norms
    stacked: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for index, op in enumerate(ops):
        stacked[kind(op)].append(index)
    for (_, device), indices in stacked.items():
        # What is of one size is handled together where it stands together.
        indices.sort(key=lambda index: math.prod(ops[index].input_shape))
        memory = min(settings.max_memory, _CPU_WAVE) if device.type == "cpu" else settings.max_memory
        for part, steps in _waves(indices, ops, settings, memory):
            plan = Plan(eta, settings.starts, settings.rtol, steps, settings.dtype, generator)
            yield from zip(part, run([ops[i] for i in part], plan), strict=True)


def _waves(
    indices: list[int], ops: list[AnyOperator], settings: Settings, memory: int
) -> Iterator[tuple[list[int], int]]:
    """Operators to iterate at once, within ``memory`` bytes if several, and the most steps they may take."""
    power = settings.method == "power"
    most = settings.max_steps or (2000 if power else 300)
    wave: list[int] = []
    used, longest = 0, most
    for index in indices:
        op = ops[index]
        vector = settings.starts * math.prod(op.input_shape) * settings.dtype.itemsize
        # The Krylov basis is kept: bound its length, and how many operators are iterated at once.
        steps = most if power else min(most, max(16, settings.max_memory // vector))
        needed = vector * (8 if power else min(steps, 64)) + 24 * weight_numel(op)
        if wave and used + needed > memory:
            yield wave, longest
            wave, used, longest = [], 0, most
        wave.append(index)
        used, longest = used + needed, min(longest, steps)
    yield wave, longest


def _as_applied(op: Operator) -> Operator:
    """Without the taps that never meet the input, whose magnitude must not set the scale of the others."""
    trimmed = trim(op)
    return op if trimmed is op else trimmed.with_weight(trimmed.weight)  # with a Frobenius norm of its own


def _normalise(op: Operator) -> tuple[Operator | None, int]:
    """The operator with a weight of magnitude about 1, and the power of two taken out; None for zero."""
    weight: Tensor = op.weight.detach()
    if op.frobenius == 0.0:
        return None, 0
    # A finite weight's Frobenius norm may overflow.
    _, exponent = math.frexp(min(op.frobenius, sys.float_info.max) / math.sqrt(weight.numel()))
    if abs(exponent) <= _NEAR_ONE and weight.dtype in (torch.float32, torch.float64):
        return op, 0  # no copy: of a network's weights it takes as long as their norms
    half = exponent // 2
    # In two factors, each of which is representable for every float64 weight.
    weight = weight.to(torch.float64, copy=True).mul_(2.0**-half).mul_(2.0 ** (half - exponent))
    return replace(op, weight=weight), exponent


def _rescale(interval: NormInterval, exponent: int, rtol: float) -> NormInterval:
    lower, upper = _ldexp(interval.lower, exponent), _ldexp(interval.upper, exponent)
    # Results outside float64's normal range lose bits: give way outwards.
    if math.isinf(lower) or (lower > 0.0 and math.ldexp(lower, -exponent) > interval.lower):
        lower = math.nextafter(lower, 0.0)
    if 0.0 < upper < math.inf and math.ldexp(upper, -exponent) < interval.upper:
        upper = math.nextafter(upper, math.inf)
    if upper == 0.0 < interval.upper:
        upper = math.ulp(0.0)
    rescaled = replace(interval, lower=lower, upper=upper)
    # Where bits were lost the interval has become wider.
    return replace(rescaled, converged=interval.converged and rescaled.width <= max(rtol, interval.width))


def _ldexp(x: float, exponent: int) -> float:
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.inf

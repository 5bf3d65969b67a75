"""Random operators of every kind that fastlip.norms supports, and their norms by torch alone.

The truth is the dense singular value of what torch's own convolution makes of an identity basis, in float64, of a
weight that was scaled by a power of two, without fastlip.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.norms import (
    NormInterval,
    NormOptions,
    Operator,
    conv_norm,
    conv_operator,
    module_operator,
    operator_norms,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "zeros", "zeros", "circular", "reflect", "replicate")
METHODS = ("auto", "auto", "lanczos", "power", "ring", "gram", "cholesky", "svd")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: What the documentation says a method does not take; anything else that is raised is a fault.
REFUSALS = ("needs zero padding, or circular padding", "cannot be certified at this confidence")
EPS = torch.finfo(torch.float64).eps
#: Most rows and columns of a matrix that is decomposed, and of one in thirty that "auto" has to iterate.
SMALL, LARGE = 160, 760
#: Seconds that no call may take.
LIMIT = 20.0


@dataclass
class Case:
    """One operator with the settings to ask for its norm.

    Attributes:
        seed: what it was drawn from.
        kind: "conv", "transposed" or "operator", which differ in how it is put to fastlip.
        weight: [Cout, Cin / groups, *kernel], for "transposed" [Cin, Cout / groups, *kernel].
        size: spatial size of the input.
        padding: (before, after) per axis, in numbers; for "transposed" both are the module's.
        geometry: stride, dilation, groups, padding_mode and, for "transposed", output_padding.
        given: the padding as conv_norm takes it.
        settings: keyword arguments of NormOptions, without the generator.
    """

    seed: int
    kind: str
    weight: Tensor
    size: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    geometry: dict[str, Any]
    given: Any
    settings: dict[str, Any]

    def interval(self) -> NormInterval:
        """What fastlip says."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "conv":
            options = {**self.geometry, **self.settings, "generator": generator}
            return conv_norm(self.weight, self.size, padding=self.given, **options)
        return operator_norms([self.operator()], NormOptions(**self.settings, generator=generator))[0]

    def operator(self) -> Operator:
        """What the norm is taken of."""
        if self.kind == "conv":
            return conv_operator(self.weight, self.size, padding=self.given, **self.geometry)
        if self.kind == "operator":
            return Operator(self.weight, self.size, padding=self.padding, **self.geometry)
        return module_operator(self.module(self.weight), (self.weight.shape[0], *self.size))

    def module(self, weight: Tensor) -> nn.Module:
        """The transposed convolution with this weight."""
        axes, groups = len(self.size), self.geometry["groups"]
        padding = tuple(left for left, _ in self.padding)
        channels = weight.shape[0], weight.shape[1] * groups
        made = TRANSPOSED[axes](*channels, tuple(weight.shape[2:]), padding=padding, bias=False, **self.geometry)
        made.weight = nn.Parameter(weight)
        return made

    def matrix(self, weight: Tensor) -> Tensor:
        """The images of the unit vectors under torch's convolution with ``weight``, float64."""
        transposed = self.kind == "transposed"
        channels = weight.shape[0] if transposed else weight.shape[1] * self.geometry["groups"]
        units = torch.eye(channels * math.prod(self.size), dtype=torch.float64).reshape(-1, channels, *self.size)
        if transposed:
            with torch.no_grad():
                return self.module(weight)(units).flatten(1)
        mode = self.geometry["padding_mode"]
        pads = [p for pair in reversed(self.padding) for p in pair]
        padded = F.pad(units, pads, mode="constant" if mode == "zeros" else mode)
        stride, dilation, groups = (self.geometry[name] for name in ("stride", "dilation", "groups"))
        return CONV[len(self.size)](padded, weight, None, stride, 0, dilation, groups).flatten(1)

    def truth(self) -> tuple[float, float]:
        """The largest singular value, and a bound on its rounding error."""
        weight = self.weight.double()
        largest = weight.abs().max().item()
        if largest == 0.0:
            return 0.0, 0.0
        _, exponent = math.frexp(largest)
        weight = weight * 2.0 ** (-exponent // 2) * 2.0 ** (-exponent - -exponent // 2)
        matrix = self.matrix(weight)
        norm = torch.linalg.matrix_norm(matrix, 2).item()
        error = 8.0 * EPS * max(matrix.shape) * norm
        if self.geometry.get("padding_mode", "zeros") != "zeros":
            # Entries are sums of several weights, which may cancel.
            error += EPS * math.prod(weight.shape[2:]) * torch.linalg.matrix_norm(self.matrix(weight.abs())).item()
        return math.ldexp(norm, exponent), math.ldexp(error, exponent)

    def __str__(self) -> str:
        padding = self.given if self.kind == "conv" else self.padding
        options = {"padding": padding, **self.geometry, **self.settings}
        shown = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"seed {self.seed}: {self.kind} {list(self.weight.shape)} {self.weight.dtype} on {self.size}, {shown}"


def random_case(seed: int) -> Case:
    """An operator that torch applies, drawn from a seed."""
    rng = random.Random(seed)
    limit = LARGE if rng.randrange(30) == 0 else SMALL
    while True:
        case = _draw(seed, rng, limit)
        if case is not None:
            return case


def _draw(seed: int, rng: random.Random, limit: int) -> Case | None:
    """A random operator, or None if it is not valid or too large."""
    axes = rng.choice((1, 2, 2, 2, 3))
    top = {1: 40, 2: 9, 3: 5}[axes] * (2 if limit == LARGE else 1)
    size = [rng.randint(1, top) for _ in range(axes)]
    if rng.randrange(4) == 0:  # 1 x N and N x 1
        size[rng.randrange(axes)] = 1
    kernel = [rng.choice((1, 2, 3, 3, 4, 5, 7)[: 7 if axes < 3 else 5]) for _ in range(axes)]
    stride = [rng.choice((1, 1, 1, 2, 2, 3, 5)) for _ in range(axes)]
    dilation = [rng.choice((1, 1, 1, 2, 3, n, n + 2)) for n in size]
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    groups = rng.choice((1, 1, 1, 2, 3))
    inner, outer = groups * rng.choice((1, 1, 2, 3, 5)), groups * rng.choice((1, 1, 2, 3, 5))
    if rng.randrange(6) == 0:  # depthwise, with a multiplier
        groups = inner
        outer = inner * rng.choice((1, 1, 2))
    if limit == LARGE:
        inner, outer = inner * rng.choice((1, 2, 4)), outer * rng.choice((1, 2, 4))
    kind = rng.choice(("conv", "conv", "conv", "transposed", "operator"))
    shared = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups}
    if kind == "transposed":
        pads = [rng.choice((0, 0, 1, k // 2, e // 2, e - 1, e + 1)) for k, e in zip(kernel, extents, strict=True)]
        extra = [rng.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
        shape, mode = (inner, outer // groups, *kernel), "zeros"
        ends = zip(size, stride, pads, extents, extra, strict=True)
        output = [(n - 1) * s - 2 * p + e + more for n, s, p, e, more in ends]
        given: Any = tuple(pads)
        padding = [(p, p) for p in pads]
        shared["output_padding"] = tuple(extra)
    else:
        shape, mode = (outer, inner // groups, *kernel), rng.choice(MODES)
        given, padding = _padding(rng, kind, mode, size, kernel, extents, stride)
        shared["padding_mode"] = mode
        ends = zip(size, padding, extents, stride, strict=True)
        output = [(n + left + right - e) // s + 1 for n, (left, right), e, s in ends]
        if any(n + min(left, 0) + min(right, 0) < 1 for n, (left, right) in zip(size, padding, strict=True)):
            return None
    if min(output) < 1 or max(inner * math.prod(size), outer * math.prod(output)) > limit:
        return None
    if limit == LARGE and min(inner * math.prod(size), outer * math.prod(output)) // groups <= 512:
        return None
    weight = _weight(rng, shape, seed)
    return Case(seed, kind, weight, tuple(size), tuple(padding), shared, given, _settings(rng))


def _padding(
    rng: random.Random,
    kind: str,
    mode: str,
    size: list[int],
    kernel: list[int],
    extents: list[int],
    stride: list[int],
) -> tuple[Any, list[tuple[int, int]]]:
    """The padding as an argument of conv_norm, and as numbers."""
    if kind == "conv" and rng.randrange(8) == 0:
        return "valid", [(0, 0) for _ in size]
    if kind == "conv" and max(stride) == 1 and rng.randrange(4) == 0:
        total = [e - 1 for e in extents]
        if require_fit(mode, size, [(t // 2, t - t // 2) for t in total]):
            return "same", [(t // 2, t - t // 2) for t in total]
    most = {"zeros": 10**6, "replicate": 12, "reflect": min(size) - 1, "circular": min(size)}[mode]
    choices = [(0, 0, 1, k // 2, e - 1, e // 2, e + 2) for k, e in zip(kernel, extents, strict=True)]
    if kind == "conv":
        same = [min(rng.choice(c), most) for c in choices]
        return tuple(same), [(p, p) for p in same]
    # Operators take each side by itself, and crops.
    sides = [[min(rng.choice((*c, -1, -2)), most) for _ in range(2)] for c in choices]
    if mode == "circular":  # of an input that is cropped on one side torch repeats what is left, and Operator all of it
        sides = [pair if min(pair) >= 0 else [min(side, 0) for side in pair] for pair in sides]
    return None, [(left, right) for left, right in sides]


def require_fit(mode: str, size: list[int], padding: list[tuple[int, int]]) -> bool:
    most = {"reflect": -1, "circular": 0}.get(mode, 10**6)
    return all(max(pair) <= n + most for n, pair in zip(size, padding, strict=True))


def _settings(rng: random.Random) -> dict[str, Any]:
    method = rng.choice(METHODS)
    settings: dict[str, Any] = {
        "method": method,
        "rtol": rng.choice((1e-2, 1e-2, 1e-2, 1e-3, 0.3, 1e-6, 1e-17, 100.0)),
        "dtype": rng.choice((torch.float32, torch.float32, torch.float64)),
        "starts": rng.choice((4, 4, 4, 8, 1)),
        "confidence": 1.0 - rng.choice((1e-6, 1e-6, 1e-9, 1e-12)),
        "max_steps": rng.choice((None, None, 1, 2, 7, 30, 100)),
    }
    if method == "power" and settings["max_steps"] is None and rng.randrange(4):
        settings["max_steps"] = 60
    return settings


def _weight(rng: random.Random, shape: tuple[int, ...], seed: int) -> Tensor:
    """Of one of many patterns and a magnitude between 1e-40 and 1e30, as far as the dtype has it."""
    dtype = rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = rng.choice(PATTERNS)(weight, rng)
    scale = 10.0 ** rng.uniform(-40.0, 30.0) if rng.randrange(2) else 1.0
    if dtype == torch.float16 and scale != 1.0:
        scale = 10.0 ** rng.uniform(-8.0, 4.0)
    info = torch.finfo(dtype)
    if rng.randrange(12) == 0:  # denormal numbers alone
        least = info.tiny * info.eps if dtype != torch.float64 else 5e-324
        weight = (weight / weight.abs().max().clamp_min(1e-300) * 5.0).round() * least
        return weight.to(dtype)
    weight = (weight * scale).clamp(-info.max, info.max).to(dtype)
    if rng.randrange(8) == 0:  # not contiguous
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    return weight


def _identity(w: Tensor, rng: random.Random) -> Tensor:
    w = torch.zeros_like(w)
    for channel in range(min(w.shape[:2])):
        w[channel, channel][tuple(k // 2 for k in w.shape[2:])] = 1.0
    return w


def _one_entry(w: Tensor, rng: random.Random) -> Tensor:
    w = torch.zeros_like(w)
    w.view(-1)[rng.randrange(w.numel())] = -3.0
    return w


def _zero_channels(w: Tensor, rng: random.Random) -> Tensor:
    w[rng.randrange(len(w))] = 0.0
    w[:, rng.randrange(w.shape[1])] = 0.0
    return w


def _first_rank(w: Tensor, rng: random.Random) -> Tensor:
    return torch.einsum("o,...->o...", w.flatten(1)[:, 0], w[0])


def _lone_tap(w: Tensor, rng: random.Random) -> Tensor:
    """One tap far above the others, in a corner, where padding alone may meet it."""
    w[(slice(None), slice(None), *(rng.choice((0, -1)) for _ in w.shape[2:]))] *= 10.0 ** rng.uniform(5.0, 30.0)
    return w


PATTERNS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    lambda w, rng: w,
    lambda w, rng: w,
    lambda w, rng: w,
    lambda w, rng: torch.ones_like(w),
    lambda w, rng: w.sign(),
    lambda w, rng: torch.zeros_like(w),
    lambda w, rng: w - w.mean(tuple(range(2, w.dim())), keepdim=True),  # taps that cancel
    lambda w, rng: w * (w.abs() * 20.0).exp(),  # of very mixed magnitude
    lambda w, rng: w * 10.0 ** (8.0 * torch.sin(torch.arange(w.shape[1]) * 2.0)).view(1, -1, *(1,) * (w.dim() - 2)),
    _identity,
    _one_entry,
    _zero_channels,
    _first_rank,
    _lone_tap,
)


@dataclass
class Tally:
    """The outcomes of many cases.

    Attributes:
        number: of calls.
        refusals: how often each documented refusal was given.
        faults: descriptions of misses, undocumented errors and calls that took too long.
        slowest: seconds of the longest call, and the case.
        methods: how often which method gave the upper side.
        exact_zeros: how many operators are zero as applied and were said to be.
    """

    number: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    methods: Counter[str] = field(default_factory=Counter)
    exact_zeros: int = 0

    def add(self, case: Case) -> None:
        """Compute one case and compare it with the truth."""
        self.number += 1
        begin = time.perf_counter()
        try:
            interval = case.interval()
        except ValueError as error:
            reason = next((known for known in REFUSALS if known in str(error)), None)
            if reason is None:
                self.faults.append(f"{case}\n  {error!r}")
            else:
                self.refusals[reason] += 1
            return
        except Exception as error:  # whatever it is, it must not be raised
            self.faults.append(f"{case}\n  {error!r}")
            return
        seconds = time.perf_counter() - begin
        self.slowest = max(self.slowest, (seconds, str(case)))
        self.methods[interval.method] += 1
        truth, error = case.truth()
        fault = fault_of(case, interval, truth, error)
        if fault or seconds > LIMIT:
            self.faults.append(f"{case}\n  {fault}: {interval!r}, truth {truth!r}, {seconds:.1f} s")
        if truth == 0.0 == interval.upper:
            self.exact_zeros += 1


def fault_of(case: Case, interval: NormInterval, truth: float, error: float) -> str:
    """What is wrong with an interval; "" if nothing is."""
    if not 0.0 <= interval.lower <= interval.upper:
        return "sides"
    if interval.lower > truth + error:
        return "lower side"
    if interval.upper < truth - error:
        return "upper side"
    if truth == 0.0 < interval.upper and case.geometry.get("padding_mode", "zeros") == "zeros":
        return "zero as applied"
    if interval.converged and interval.upper > interval.lower * (1.0 + case.settings["rtol"]) * (1.0 + 4.0 * EPS):
        return "not converged"
    return ""


def check(seeds: Iterable[int]) -> Tally:
    """The tally of the cases of these seeds."""
    tally = Tally()
    for seed in seeds:
        tally.add(random_case(seed))
    return tally

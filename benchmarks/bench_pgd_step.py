"""One fused PGD step against what people run today, and against the floor.

    python benchmarks/bench_pgd_step.py                  # one core, CSV under benchmarks/results
    python benchmarks/bench_pgd_step.py --device cuda
    python benchmarks/bench_pgd_step.py --device cuda --only "fastlip pgd_step_" --label old --seconds 0.05

Compared in the same run, on the same float32 data, warm on the CPU and with a cold L2 on a GPU. ``ms_call``, on a GPU:
the wall clock's time of a call among up to 50 in a row, launches included, L2 as the one before leaves it. Compared:

- floor: three arrays read and one of them written (CPU: a native kernel of the same instruction set; GPU: torch's copy
  of two arrays, which moves as much);
- torchattacks: the eager sequence of torchattacks 3.5.1's PGD and PGDL2, and ``torch.compile`` of it. Its L2
  projection alternates ball and box instead of projecting onto both;
- what the model reads, normalised by channel and in float16, written by the step (reading its float16 gradient: as many
  bytes), and the same step with eager conversions before and after it;
- L1: SLIDE's step followed by the sort-based projection onto ball and box of APGD-L1 (Croce and Hein 2021,
  "Mind the box", Alg. 1, written here from the paper, for the comparison only).
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _timing import Results, Session, environment, percentiles, times
from torch import Tensor

from fastlip import ops
from fastlip.ops import Norm

#: On a CPU; on a GPU the batch at which launches count, and arrays well beyond its L2.
SHAPES = ("256x3x32x32", "32x3x224x224")
BATCH_SHAPES = ("1024x3x32x32",)
LARGE_SHAPES = ("8192x3x32x32", "512x3x224x224")
#: ImageNet's, of the three channels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: eps and step size of each norm at 32x32; scaled by the root of the pixel ratio (l2) or the ratio (l1) elsewhere.
BUDGET: dict[Norm, tuple[float, float]] = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1), "l1": (12.0, 1.0)}


def torchattacks_linf(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step: float) -> Tensor:
    x = x.detach() + step * grad.sign()
    delta = torch.clamp(x - x0, min=-eps, max=eps)
    return torch.clamp(x0 + delta, min=0, max=1).detach()


def torchattacks_l2(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step: float) -> Tensor:
    lengths = torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10
    grad = grad / lengths.view(len(x), 1, 1, 1)
    x = x.detach() + step * grad
    delta = x - x0
    lengths = torch.norm(delta.view(len(x), -1), p=2, dim=1)
    delta = delta * torch.min(eps / lengths, torch.ones_like(lengths)).view(-1, 1, 1, 1)
    return torch.clamp(x0 + delta, min=0, max=1).detach()


def sort_project_l1(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    """Projection onto L1 ball and box by sorting the breakpoints of its dual, as APGD-L1 does."""
    d = (x - x0).flatten(1)
    cap = torch.where(d > 0, 1 - x0.flatten(1), x0.flatten(1))
    size = d.abs()
    # The slope of f(lam) = sum min(max(size - lam, 0), cap) changes at each `size - cap` and back at each `size`.
    points = torch.cat([size - cap, size], 1)
    turns = torch.cat([-torch.ones_like(d), torch.ones_like(d)], 1)
    points, order = points.sort(1)
    slope = turns.gather(1, order).cumsum(1)
    value = cap.sum(1, keepdim=True) + (slope[:, :-1] * points.diff(dim=1)).cumsum(1)
    value = torch.cat([cap.sum(1, keepdim=True), value], 1)
    last = (value > eps).sum(1, keepdim=True).clamp(1, value.shape[1]) - 1
    lam = points.gather(1, last) + (value.gather(1, last) - eps) / -slope.gather(1, last).clamp(max=-1)
    inside = torch.minimum(size, cap).sum(1, keepdim=True) <= eps
    lam = torch.where(inside, 0, lam).clamp_min(0)
    return x0 + (d.sign() * torch.minimum((size - lam).clamp_min(0), cap)).view_as(x)


def slide_l1(x: Tensor, grad: Tensor, x0: Tensor, eps: float, step: float) -> Tensor:
    size = grad.abs().flatten(1)
    keep = (size >= size.quantile(0.99, dim=1, keepdim=True)).view_as(grad)
    direction = grad.sign() * keep
    direction = direction / keep.flatten(1).sum(1).view(-1, 1, 1, 1)
    return sort_project_l1(x + step * direction, x0, eps)


def floor_of(device: str, x: Tensor, grad: Tensor, x0: Tensor) -> Callable[[], object]:
    if device == "cpu":
        from fastlip import _native

        arrays = [t.numpy().reshape(-1) for t in (x, x, grad, x0)]  # in place, as a step is
        return lambda: _native._stream(*arrays)
    both, into = torch.cat([x, grad]), torch.empty_like(torch.cat([x, grad]))  # 2 reads, 2 writes
    return lambda: into.copy_(both)


def median_call(run: Callable[[], object], ms: float) -> float:
    """Milliseconds of a call among up to 50 in a row on a GPU, fewer where they are slow; the median of three rows."""
    calls, rows = max(1, min(50, int(100 / ms))), []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        rows.append((time.perf_counter() - begin) * 1e3 / calls)
    return percentiles(rows)[0]


#: What is timed, and what runs before each repetition outside of the time.
Calls = tuple[Callable[[], object], Callable[[], object]]


def nothing() -> None:
    """The setup of what needs none."""


@dataclass(frozen=True)
class Measurement:
    """One row to be.

    Attributes:
        phase: on a GPU all measurements of a phase come before any of the next: fastlip's step beside the floor, what
            else fastlip has, peers, compiled peers.
        make: prepares the calls, when the row's turn comes.
        factor: what the time is multiplied by: that of the floor of a step that moves more bytes.
    """

    shape: str
    norm: Norm
    what: str
    phase: int
    make: Callable[[], Calls]
    factor: float = 1.0


class Table:
    """Rows of results, each with its ratio to the floor last measured for its shape and norm."""

    def __init__(self, device: str, seconds: float, results: Results) -> None:
        self.device, self.seconds, self.results = device, seconds, results
        self.flush = torch.empty(2**26, device=device) if device == "cuda" else None
        self.floors: dict[tuple[str, str], float] = {}

    def add(self, measurement: Measurement) -> None:
        m = measurement
        run, setup = m.make()
        # Peers take up to a thousand times as long on a GPU.
        least, warm = (5, 2) if self.device == "cuda" and m.phase > 1 else (15, 3)
        found = times(run, setup=setup, seconds=self.seconds, least=least, warm=warm, flush=self.flush)
        median, low, high = (ms * m.factor for ms in percentiles(found))
        if m.what == "floor":
            self.floors[m.shape, m.norm] = median
        row: dict[str, Any] = {"shape": m.shape, "norm": m.norm, "what": m.what}
        row |= {"ms": median, "ms_p20": low, "ms_p80": high}
        if self.device == "cuda":
            row["ms_call"] = median_call(run, median / m.factor) * m.factor
        floor = self.floors.get((m.shape, m.norm))
        self.results.add(row | {"x_floor": "" if floor is None else median / floor})


class Problem:
    """One shape and norm: images, gradients and what the steps of fastlip and of its peers make of them."""

    def __init__(self, data: "Data", norm: Norm) -> None:
        self.data, self.norm = data, norm
        pixels = data.pixels / (3 * 32 * 32)
        scale = {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]
        self.eps, self.step = (v * scale for v in BUDGET[norm])

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.data.device).manual_seed(1)

    @cached_property
    def start(self) -> Tensor:
        return ops.random_start(self.data.x0, eps=self.eps, norm=self.norm, generator=self.generator)

    @cached_property
    def x(self) -> Tensor:
        """Not reset before a step: from any point near the surface it costs the same."""
        return self.start.clone()

    @cached_property
    def outside(self) -> Tensor:
        noise = torch.randn(self.start.shape, generator=self.generator, device=self.data.device)
        return self.start + noise * (2 * self.step if self.norm == "linf" else self.step / 15)

    @property
    def options(self) -> dict[str, Any]:
        return {"step_size": self.step, "eps": self.eps, "norm": self.norm}

    def floor(self) -> Calls:
        return floor_of(self.data.device, self.start.clone(), self.data.grad, self.data.x0), nothing

    def pgd_step(self) -> Calls:
        return lambda: ops.pgd_step_(self.x, self.data.grad, self.data.x0, **self.options), nothing

    def project(self) -> Calls:
        options = {"eps": self.eps, "norm": self.norm}
        return lambda: ops.project_(self.x, self.data.x0, **options), lambda: self.x.copy_(self.outside)

    def model_input(self, within: bool) -> Calls:
        x, x0 = self.x, self.data.x0
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        low, z = self.data.grad.half(), ops.model_input(x, mean=mean, std=std, dtype=torch.float16)

        def fused() -> None:
            ops.pgd_step_(x, low, x0, **self.options, model_input=z)

        def after() -> None:
            ops.pgd_step_(x, low.float() / std, x0, **self.options)
            z.values.copy_((x - mean) / std)

        return fused if within else after, nothing

    def peer(self, compiled: bool) -> Calls:
        step: Callable[..., Tensor] = {"linf": torchattacks_linf, "l2": torchattacks_l2, "l1": slide_l1}[self.norm]
        step = torch.compile(step) if compiled else step
        return lambda: step(self.start, self.data.grad, self.data.x0, self.eps, self.step), nothing

    def sort_projection(self) -> Calls:
        x0, outside = self.data.x0, self.outside
        ours = ops.project(outside, x0, eps=self.eps, norm=self.norm)
        torch.testing.assert_close(sort_project_l1(outside, x0, self.eps), ours, rtol=0, atol=1e-4)
        return lambda: sort_project_l1(outside, x0, self.eps), nothing


class Data:
    """Images and gradients of one shape, made when first asked for."""

    def __init__(self, device: str, shape: tuple[int, ...]) -> None:
        self.device, self.shape = device, shape
        self.pixels = math.prod(shape[1:])
        self._generator = torch.Generator(device).manual_seed(0)

    @cached_property
    def x0(self) -> Tensor:
        return torch.rand(self.shape, generator=self._generator, device=self.device)

    @cached_property
    def grad(self) -> Tensor:
        return torch.randn(self.x0.shape, generator=self._generator, device=self.device)


def measurements(device: str, name: str, data: Data, norm: Norm) -> Iterator[Measurement]:
    """In the order of a CPU, where the machine is shared and what is compared must be near in time."""
    p = Problem(data, norm)
    peer = "SLIDE step, sort projection" if norm == "l1" else "torchattacks"
    yield Measurement(name, norm, "floor", 0, p.floor)
    yield Measurement(name, norm, "fastlip pgd_step_", 0, p.pgd_step)
    yield Measurement(name, norm, "fastlip, float16 model input", 1, lambda: p.model_input(True))
    yield Measurement(name, norm, "fastlip, converted eagerly", 2, lambda: p.model_input(False))
    yield Measurement(name, norm, "fastlip project_", 1, p.project)
    yield Measurement(name, norm, f"{peer} eager", 2, lambda: p.peer(False))
    if compared_with_compiler(device, name):
        yield Measurement(name, norm, f"{peer} compiled", 3, lambda: p.peer(True))
    if norm == "l1":
        yield Measurement(name, norm, "sort projection eager", 2, p.sort_projection)


def compared_with_compiler(device: str, shape: str) -> bool:
    """Compiling takes longer than anything else: on a GPU at the one batch at which launches count."""
    return device == "cpu" or shape in BATCH_SHAPES


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Options of the benchmarks of a step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no measurement after so many seconds")
    parser.add_argument("--shape", nargs="+", help="in place of the usual ones, such as 256x3x32x32")
    parser.add_argument("--norms", nargs="+", choices=list(BUDGET), default=list(BUDGET))
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name begins so; the floor is always there")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--label", default="", help="a column, and part of the file's name, to tell two builds apart")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def run(args: argparse.Namespace, name: str, measurements_of: Callable[..., Iterator[Measurement]]) -> None:
    """Measure everything that ``args`` ask for into NAME_DEVICE.csv, or NAME_DEVICE-LABEL.csv, and print it."""
    torch.set_num_threads(args.threads)
    shapes = args.shape or (BATCH_SHAPES + LARGE_SHAPES if args.device == "cuda" else SHAPES)
    data = {shape: Data(args.device, tuple(map(int, shape.split("x")))) for shape in shapes}
    wanted = [
        m
        for shape in shapes
        for norm in args.norms
        for m in measurements_of(args.device, shape, data[shape], norm)
        if m.what == "floor" or m.what.startswith(tuple(args.only))
        if not (args.no_compile and m.phase == 3)
    ]
    if args.device == "cuda":
        wanted.sort(key=lambda m: m.phase)
    suffix = f"-{args.label}" if args.label else ""
    shared = {"label": args.label} | environment(args.device)
    results = Results(args.out / f"{name}_{args.device}{suffix}.csv", shared)
    table, session = Table(args.device, args.seconds, results), Session(args.limit)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s) {args.label}")
    print(f"{'shape':<14} {'norm':<5} {'what':<38} {'ms':>9} {'x floor':>8} {'ms a call':>9}")
    for m in wanted:
        compiling = 12.0 if m.phase == 3 else 0.0  # seconds
        session.attempt(f"{m.shape} {m.norm} {m.what}", lambda m=m: measure(table, m), compiling)
    session.close()


def measure(table: Table, measurement: Measurement) -> None:
    table.add(measurement)
    r = table.results.rows[-1]
    over = f"{r['x_floor']:>8.2f}" if r["x_floor"] != "" else f"{'':>8}"
    call = f"{r['ms_call']:>9.3f}" if "ms_call" in r else ""
    print(f"{r['shape']:<14} {r['norm']:<5} {r['what']:<38} {r['ms']:>9.3f} {over} {call}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    run(parser_of(__doc__).parse_args(argv), "pgd_step", measurements)


if __name__ == "__main__":
    with torch.no_grad():
        main()

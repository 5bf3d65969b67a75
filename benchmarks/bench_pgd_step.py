"""One fused PGD step against what people run today, and against the floor.

    python benchmarks/bench_pgd_step.py                  # one core, CSV under benchmarks/results
    python benchmarks/bench_pgd_step.py --device cuda

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
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import environment, percentiles, times, write_csv
from torch import Tensor

from fastlip import ops
from fastlip.ops import Norm

SHAPES = {"256x3x32x32": (256, 3, 32, 32), "32x3x224x224": (32, 3, 224, 224)}
#: On a GPU, arrays well beyond its L2, too; and the batch at which launches count, where torch.compile is compared.
BATCH_SHAPES = {"1024x3x32x32": (1024, 3, 32, 32)}
LARGE_SHAPES = {"8192x3x32x32": (8192, 3, 32, 32), "512x3x224x224": (512, 3, 224, 224)}
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
    calls, rows = max(3, min(50, int(100 / ms))), []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        rows.append((time.perf_counter() - begin) * 1e3 / calls)
    return percentiles(rows)[0]


class Table:
    """Rows of results for one shape, each with its ratio to the floor."""

    def __init__(self, device: str, shape: str, seconds: float) -> None:
        self.device, self.shape, self.seconds = device, shape, seconds
        self.flush = torch.empty(2**26, device=device) if device == "cuda" else None
        self.rows: list[dict] = []
        self.floor = 0.0

    def add(self, norm: str, what: str, run: Callable[[], object], setup: Callable[[], object] = lambda: None) -> None:
        median, low, high = percentiles(times(run, setup=setup, seconds=self.seconds, flush=self.flush))
        if what == "floor":
            self.floor = median
        row = {"shape": self.shape, "norm": norm, "what": what, "ms": median, "ms_p20": low, "ms_p80": high}
        if self.device == "cuda":
            row["ms_call"] = median_call(run, median)
        self.rows.append(row | {"x_floor": median / self.floor} | environment(self.device))

    def rescale_floor(self, factor: float) -> None:
        """Let the floor just added stand for ``factor`` times the bytes it moved."""
        for name in ("ms", "ms_p20", "ms_p80", "ms_call"):
            if name in self.rows[-1]:
                self.rows[-1][name] *= factor
        self.floor = self.rows[-1]["ms"]


def add_model_input(table: Table, norm: Norm, x: Tensor, grad: Tensor, x0: Tensor, step: dict[str, float]) -> None:
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    low, z = grad.half(), ops.model_input(x, mean=mean, std=std, dtype=torch.float16)

    def after() -> None:
        ops.pgd_step_(x, low.float() / std, x0, norm=norm, **step)
        z.values.copy_((x - mean) / std)

    def within() -> None:
        ops.pgd_step_(x, low, x0, norm=norm, model_input=z, **step)

    table.add(norm, "fastlip, float16 model input", within)
    table.add(norm, "fastlip, converted eagerly", after)


def measure_norm(table: Table, norm: Norm, x0: Tensor, grad: Tensor, compile_peers: bool) -> None:
    pixels = x0[0].numel() / (3 * 32 * 32)
    scale = {"linf": 1.0, "l2": pixels**0.5, "l1": pixels}[norm]
    eps, step = (v * scale for v in BUDGET[norm])
    generator = torch.Generator(device=x0.device).manual_seed(1)
    start = ops.random_start(x0, eps=eps, norm=norm, generator=generator)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    outside = start + noise * (2 * step if norm == "linf" else step / 15)
    x = start.clone()
    # x is not reset before a step: from any point near the surface it costs the same.
    table.add(norm, "fastlip pgd_step_", lambda: ops.pgd_step_(x, grad, x0, step_size=step, eps=eps, norm=norm))
    add_model_input(table, norm, x, grad, x0, {"step_size": step, "eps": eps})
    table.add(norm, "fastlip project_", lambda: ops.project_(x, x0, eps=eps, norm=norm), lambda: x.copy_(outside))

    peer = {"linf": torchattacks_linf, "l2": torchattacks_l2, "l1": slide_l1}[norm]
    label = "SLIDE step, sort projection" if norm == "l1" else "torchattacks"
    table.add(norm, f"{label} eager", lambda: peer(start, grad, x0, eps, step))
    if compile_peers:
        compiled = torch.compile(peer)
        table.add(norm, f"{label} compiled", lambda: compiled(start, grad, x0, eps, step))
    if norm == "l1":
        table.add(norm, "sort projection eager", lambda: sort_project_l1(outside, x0, eps))
        ours = ops.project(outside, x0, eps=eps, norm=norm)
        torch.testing.assert_close(sort_project_l1(outside, x0, eps), ours, rtol=0, atol=1e-4)


def shapes_for(device: str) -> dict[str, tuple[int, ...]]:
    return SHAPES | BATCH_SHAPES | LARGE_SHAPES if device == "cuda" else SHAPES


def measure(device: str, name: str, shape: tuple[int, ...], seconds: float, compile_peers: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device)
    table = Table(device, name, seconds)
    floor = floor_of(device, x0.clone(), grad, x0)
    for norm in BUDGET:
        table.add(norm, "floor", floor)  # anew for each norm: a shared machine drifts
        measure_norm(table, norm, x0, grad, compile_peers)
    return table.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--shape", nargs="*", help="only these, such as 256x3x32x32")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, shape in shapes_for(args.device).items():
        if args.shape and name not in args.shape:
            continue
        # Compiling takes longer than anything else: on a GPU at the one batch that it is compared at.
        compiled = not args.no_compile and (args.device == "cpu" or name in BATCH_SHAPES)
        rows += measure(args.device, name, shape, args.seconds, compiled)
    write_csv(args.out / f"pgd_step_{args.device}.csv", rows)
    print(f"{rows[0]['device']}, {rows[0]['isa']}, torch {rows[0]['torch']}, {args.threads} thread(s)")
    print(f"{'shape':<14} {'norm':<5} {'what':<38} {'ms':>9} {'x floor':>8} {'ms a call':>9}")
    for r in rows:
        call = f"{r['ms_call']:>9.3f}" if "ms_call" in r else ""
        print(f"{r['shape']:<14} {r['norm']:<5} {r['what']:<38} {r['ms']:>9.3f} {r['x_floor']:>8.2f} {call}")


if __name__ == "__main__":
    with torch.no_grad():
        main()

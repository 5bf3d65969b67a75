"""Norms of ResNet-50's 53 convolutions on a GPU, against power iteration, the same Lanczos on cuDNN, and the floor.

    python benchmarks/bench_gpu_norms.py                        # CSV under benchmarks/results
    python benchmarks/bench_gpu_norms.py --device cpu --tiny    # every path on a small network; says nothing of speed

CIFAR stem on 3x32x32, random weights, float32, rtol 0.01 at joint confidence 1 - 1e-6. Time is the wall clock's, with
the device waited for, of warm calls (the weights of one network fit an H200's L2: it is not emptied). Rows:

- one network: :func:`fastlip.layer_norms`, with CUDA graphs and without, with products by 3xTF32 on matrix units in
  place of multiply-adds (the same thing where the CUDA library does not run), and on torch's convolutions (cuDNN, TF32
  off, autotuned, in the graphs of pairs of steps that fastlip's own iteration uses): the same starts, steps and
  certificate;
- power iteration: 100 steps of every layer by torch, one-sided, TF32 off, and as torch has it by default (cuDNN's
  convolutions in TF32);
- iteration alone: 24 steps of the 17 convolutions larger than 1 x 1, without looking the layers up and without a
  certificate, on both;
- checkpoints: many networks in one call, the same weights moved a little, by either products; ``ms_each`` is per
  network.

``x_floor``: over METHODS section 7, what the operations and bytes of the steps that ran take at this device's measured
rates of a float32 matrix product and of a copy, whichever is more, for 3xTF32 too; layers that needed no steps count
nothing.
"""

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _norm_peers import power_iteration
from _timing import environment, percentiles, times, write_csv
from _torch_stack import TorchStack
from bench_layer_norms import INPUT, layers_of
from bench_operator_step import allow_tf32, captured, rates
from torch import nn

import fastlip
from fastlip import models
from fastlip.norms import Operator, conv_operator
from fastlip.norms._solvers import cuda_graphs, lanczos
from fastlip.norms._solvers.batched_operator import BatchedOperator, batched_operator
from fastlip.norms._solvers.recurrence import Recurrence

STARTS, STEPS = 4, 24


def build(tiny: bool) -> nn.Module:
    """Without the classifier, so that all methods see the same operators."""
    if tiny:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, stride=2)).eval()
    model = models.resnet50(10, stem="cifar", seed=0)
    model[1].fc = nn.Identity()
    return model.eval()


def operators(model: nn.Module) -> list[Operator]:
    """The convolutions larger than 1 x 1."""
    return [
        conv_operator(m.weight.detach(), shape[1:], stride=m.stride, padding=m.padding)
        for m, shape in layers_of(model)
        if m.kernel_size != (1, 1)
    ]


@contextmanager
def with_graphs(on: bool) -> Iterator[None]:
    """Whether fastlip's steps are replayed from CUDA graphs."""
    with patch.object(cuda_graphs, "_HIDDEN", cuda_graphs._HIDDEN if on else -1):
        yield


def with_products(name: str) -> Any:
    """How the CUDA library multiplies in stacks that are built here."""
    return patch.dict(os.environ, FASTLIP_PRODUCTS=name)


@contextmanager
def on_torch() -> Iterator[None]:
    """IterationResult by torch's convolutions; the certificate stays fastlip's."""
    with patch.object(lanczos, "batched_operator", TorchStack):
        yield


def work(ops: list[Operator], steps: list[int]) -> tuple[float, float]:
    """Operations and bytes: a step reads each weight twice and moves x, previous and out of both directions."""
    flop = moved = 0.0
    for op, k in zip(ops, steps, strict=True):
        inputs, outputs = (STARTS * torch.Size(shape).numel() for shape in (op.input_shape, op.output_shape))
        flop += k * 2 * 2.0 * outputs * op.weight[0].numel()
        moved += k * 4.0 * (2 * op.weight.numel() + 3 * inputs + 3 * outputs)
    return flop, moved


class Table:
    """Rows of results."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.rows: list[dict[str, Any]] = []
        self.flop_rate, self.byte_rate = rates(device, min(seconds, 0.2))

    def floor(self, ops: list[Operator], steps: list[int]) -> float:
        flop, moved = work(ops, steps)
        return 1e3 * max(flop / self.flop_rate, moved / self.byte_rate)

    def add(
        self, what: str, setting: str, run: Callable[[], Any], floor: float | None = None, networks: int = 1
    ) -> Any:
        results: list[Any] = []

        def once() -> None:
            results[:] = [run()]
            if self.device == "cuda":
                torch.cuda.synchronize()

        ms = times(once, seconds=self.seconds, least=3, warm=2)
        median, low, high = percentiles(ms)
        row = {"what": what, "setting": setting, "networks": networks, "ms": median, "ms_p20": low, "ms_p80": high}
        row |= {"ms_each": median / networks, "runs": len(ms)}
        row |= {"floor_ms": "", "x_floor": ""} if floor is None else {"floor_ms": floor, "x_floor": median / floor}
        row |= {"gflops": self.flop_rate / 1e9, "gbs": self.byte_rate / 1e9, "l2": "warm"}
        self.rows.append(row | environment(self.device))
        return results[0]


def steps_of(model: nn.Module, report: fastlip.NormReport) -> list[int]:
    """Steps that each convolution larger than 1 x 1 took."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return [report[name].iterations for name in names]


def norms(target: nn.Module | list[nn.Module], memory: int) -> Any:
    return fastlip.layer_norms(target, INPUT, fold_batchnorm=False, starts=STARTS, max_memory=memory)


def meet(report: fastlip.NormReport, other: fastlip.NormReport) -> None:
    for name, interval in report.items():
        assert interval.lower <= other[name].upper, f"{name}: intervals do not meet"
        assert other[name].lower <= interval.upper, f"{name}: intervals do not meet"


def measure_network(table: Table, model: nn.Module, memory: int) -> None:
    ops = operators(model)
    report = norms(model, memory)
    floor = table.floor(ops, steps_of(model, report))
    assert all(interval.converged for interval in report.values()), "an interval is wider than 1%"
    table.add("fastlip", "one network", lambda: norms(model, memory), floor)
    with with_graphs(False):
        table.add("fastlip", "one network, no CUDA graph", lambda: norms(model, memory), floor)
    with with_products("3xtf32"):
        found = norms(model, memory)
        floor_found = table.floor(ops, steps_of(model, found))
        table.add("fastlip, 3xTF32", "one network", lambda: norms(model, memory), floor_found)
    assert all(interval.converged for interval in found.values()), "an interval by 3xTF32 is wider than 1%"
    meet(report, found)
    with on_torch():
        other = table.add("Lanczos on torch's convolutions", "one network", lambda: norms(model, memory), floor)
    meet(report, other)
    layers = layers_of(model)
    lower = table.add("torch power iteration", "100 steps, TF32 off", lambda: power_iteration(layers, 100))
    assert max(v / report[n].upper for v, n in zip(lower, conv_names(model), strict=True)) <= 1.0 + 1e-5
    if table.device == "cuda":
        torch.backends.cudnn.allow_tf32 = True  # torch's default; matrix products are not in TF32 by default
        table.add("torch power iteration", "100 steps, default TF32", lambda: power_iteration(layers, 100))
        allow_tf32(False)


def conv_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def measure_iteration(table: Table, model: nn.Module) -> None:
    ops = operators(model)
    floor = table.floor(ops, [STEPS] * len(ops))

    def begun(kind: Callable[..., BatchedOperator]) -> Recurrence:
        operators_ = kind(ops, STARTS, torch.float32)
        starts = torch.randn(operators_.domain[-1].stop, device=operators_.device)
        return Recurrence(operators_, starts / starts.norm() * (len(ops) * STARTS) ** 0.5)

    def steps(run: Recurrence) -> Callable[[], None]:
        def go() -> None:
            run.steps = 0  # the same memory again
            run.advance(STEPS)

        return go

    setting = f"iteration alone, {STEPS} steps"
    table.add("fastlip", setting, steps(begun(batched_operator)), floor)
    with with_products("3xtf32"):
        table.add("fastlip, 3xTF32", setting, steps(begun(batched_operator)), floor)
    with with_graphs(False):
        table.add("fastlip", f"{setting}, no CUDA graph", steps(begun(batched_operator)), floor)
        plain = steps(begun(TorchStack))
    table.add("Lanczos on torch's convolutions", setting, steps(begun(TorchStack)), floor)
    if table.device == "cuda":
        table.add("Lanczos on torch's convolutions", f"{setting}, one CUDA graph", captured(plain), floor)


def measure_checkpoints(table: Table, model: nn.Module, count: int, memory: int) -> None:
    networks = [copy.deepcopy(model) for _ in range(count)]
    for i, network in enumerate(networks):
        for parameter in network.parameters():
            parameter.mul_(1.0 + 0.001 * i)
    ops = [op for network in networks for op in operators(network)]
    for what, products in (("fastlip", "float32"), ("fastlip, 3xTF32", "3xtf32")):
        with with_products(products):
            reports = norms(networks, memory)
            steps = [k for network, report in zip(networks, reports, strict=True) for k in steps_of(network, report)]
            table.add(what, f"{count} checkpoints", lambda: norms(networks, memory), table.floor(ops, steps), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small network: tries every path")
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--memory", type=float, default=32.0, help="GiB that the vectors may take")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    allow_tf32(False)
    torch.backends.cudnn.benchmark = True
    memory = int(args.memory * 2**30)
    table = Table(args.device, args.seconds)
    model = build(args.tiny).to(args.device)
    measure_network(table, model, memory)
    measure_iteration(table, model)
    measure_checkpoints(table, model, args.checkpoints, memory)
    write_csv(args.out / f"gpu_norms_{args.device}.csv", table.rows)
    first = table.rows[0]
    print(f"{first['device']}, {first['isa']}, torch {first['torch']}")
    print(f"matrix product {first['gflops']:.0f} GFLOP/s, copy {first['gbs']:.0f} GB/s")
    print(f"{'what':<32} {'setting':<40} {'ms each':>9} {'x floor':>8}")
    for r in table.rows:
        over = f"{r['x_floor']:>8.2f}" if r["x_floor"] != "" else f"{'':>8}"
        print(f"{r['what']:<32} {r['setting']:<40} {r['ms_each']:>9.3f} {over}")


if __name__ == "__main__":
    with torch.no_grad():
        main()

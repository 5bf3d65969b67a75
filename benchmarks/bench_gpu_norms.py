"""Norms of ResNet-50's 53 convolutions on a GPU, against power iteration, the same Lanczos on cuDNN, and the floor.

    python benchmarks/bench_gpu_norms.py                        # CSV under benchmarks/results
    python benchmarks/bench_gpu_norms.py --device cpu --tiny    # every path, small network; timings mean nothing

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
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _norm_peers import power_iteration
from _timing import Results, Session, environment, percentiles, times
from _torch_operator import TorchBatchedOperator
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
    """ResNet-50 without the classifier, so that all methods see the same operators."""
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


def with_matmul_precision(name: str) -> Any:
    """The matmul precision of batched operators that are built in this context."""
    return patch.dict(os.environ, FASTLIP_MATMUL_PRECISION=name)


@contextmanager
def on_torch() -> Iterator[None]:
    """Iterate by torch's convolutions; the certificate stays fastlip's."""
    with patch.object(lanczos, "batched_operator", TorchBatchedOperator):
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
    """Rows of results, stored and printed as they are measured."""

    def __init__(self, device: str, seconds: float, results: Results) -> None:
        self.device, self.seconds, self.results = device, seconds, results
        self.flop_rate, self.byte_rate = rates(device, min(seconds, 0.2))
        print(f"matrix product {self.flop_rate / 1e9:.0f} GFLOP/s, copy {self.byte_rate / 1e9:.0f} GB/s")
        print(f"{'what':<32} {'setting':<40} {'ms each':>9} {'x floor':>8}", flush=True)

    def floor(self, ops: list[Operator], steps: list[int]) -> float:
        flop, moved = work(ops, steps)
        return 1e3 * max(flop / self.flop_rate, moved / self.byte_rate)

    def add(
        self,
        what: str,
        setting: str,
        run: Callable[[], Any],
        floor: float | None = None,
        networks: int = 1,
        *,
        least: int = 3,
        check: Callable[[Any], None] = lambda found: None,
    ) -> None:
        """Time ``run``; there is no row if its last result fails the ``check``."""
        results: list[Any] = []

        def once() -> None:
            results[:] = [run()]
            if self.device == "cuda":
                torch.cuda.synchronize()

        ms = times(once, seconds=self.seconds, least=least, warm=1)
        check(results[0])
        median, low, high = percentiles(ms)
        row = {"what": what, "setting": setting, "networks": networks, "ms": median, "ms_p20": low, "ms_p80": high}
        row |= {"ms_each": median / networks, "runs": len(ms)}
        row |= {"floor_ms": "", "x_floor": ""} if floor is None else {"floor_ms": floor, "x_floor": median / floor}
        self.results.add(row | {"gflops": self.flop_rate / 1e9, "gbs": self.byte_rate / 1e9, "l2": "warm"})
        over = f"{'':>8}" if floor is None else f"{median / floor:>8.2f}"
        print(f"{what:<32} {setting:<40} {median / networks:>9.3f} {over}", flush=True)


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


def conv_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def meets(report: fastlip.NormReport) -> Callable[[fastlip.NormReport], None]:
    return lambda found: meet(report, found)


class Norms:
    """Intervals of one network's norms, and the bare iteration on its convolutions larger than 1 x 1."""

    def __init__(self, table: Table, model: nn.Module, memory: int) -> None:
        self.table, self.model, self.memory = table, model, memory

    @cached_property
    def operators(self) -> list[Operator]:
        return operators(self.model)

    def intervals(self) -> fastlip.NormReport:
        return norms(self.model, self.memory)

    @cached_property
    def report(self) -> fastlip.NormReport:
        report = self.intervals()
        assert all(interval.converged for interval in report.values()), "an interval is wider than 1%"
        return report

    def floor(self, report: fastlip.NormReport) -> float:
        return self.table.floor(self.operators, steps_of(self.model, report))

    def network(self) -> None:
        self.table.add("fastlip", "one network", self.intervals, self.floor(self.report))

    def network_without_graphs(self) -> None:
        with with_graphs(False):
            self.table.add("fastlip", "one network, no CUDA graph", self.intervals, self.floor(self.report))

    def network_by_3xtf32(self) -> None:
        with with_matmul_precision("3xtf32"):
            found = self.intervals()
            assert all(interval.converged for interval in found.values()), "an interval by 3xTF32 is wider than 1%"
            meet(self.report, found)
            self.table.add("fastlip, 3xTF32", "one network", self.intervals, self.floor(found))

    def network_on_torch(self) -> None:
        what, floor = "Lanczos on torch's convolutions", self.floor(self.report)
        with on_torch():
            self.table.add(what, "one network", self.intervals, floor, check=meets(self.report))

    def iteration(self, kind: Callable[..., BatchedOperator] = batched_operator) -> Callable[[], None]:
        run_on = kind(self.operators, STARTS, torch.float32)
        starts = torch.randn(run_on.domain[-1].stop, device=run_on.device)
        run = Recurrence(run_on, starts / starts.norm() * (len(self.operators) * STARTS) ** 0.5)

        def go() -> None:
            run.steps = 0  # the same memory again
            run.advance(STEPS)

        return go

    def add_iteration(self, what: str, run: Callable[[], Any], rest: str = "") -> None:
        floor = self.table.floor(self.operators, [STEPS] * len(self.operators))
        self.table.add(what, f"iteration alone, {STEPS} steps{rest}", run, floor)

    def iteration_alone(self) -> None:
        self.add_iteration("fastlip", self.iteration())

    def iteration_by_3xtf32(self) -> None:
        with with_matmul_precision("3xtf32"):
            self.add_iteration("fastlip, 3xTF32", self.iteration())

    def iteration_without_graphs(self) -> None:
        with with_graphs(False):
            self.add_iteration("fastlip", self.iteration(), ", no CUDA graph")

    def iteration_on_torch(self) -> None:
        self.add_iteration("Lanczos on torch's convolutions", self.iteration(TorchBatchedOperator))

    def iteration_on_torch_in_one_graph(self) -> None:
        with with_graphs(False):
            replay = captured(self.iteration(TorchBatchedOperator))
        self.add_iteration("Lanczos on torch's convolutions", replay, ", one CUDA graph")

    def power(self, setting: str) -> None:
        layers = layers_of(self.model)

        def check(lower: list[float]) -> None:
            over = max(v / self.report[n].upper for v, n in zip(lower, conv_names(self.model), strict=True))
            assert over <= 1.0 + (1e-5 if setting == "TF32 off" else 1e-2), "above the upper side"

        run = functools.partial(power_iteration, layers, 100)
        self.table.add("torch power iteration", f"100 steps, {setting}", run, least=2, check=check)

    def power_in_tf32(self) -> None:
        torch.backends.cudnn.allow_tf32 = True  # torch's default; matrix products are not in TF32 by default
        try:
            self.power("default TF32")
        finally:
            allow_tf32(False)


class Checkpoints:
    """Many networks in one call: the same weights moved a little."""

    def __init__(self, table: Table, model: nn.Module, count: int, memory: int) -> None:
        self.table, self.model, self.count, self.memory = table, model, count, memory

    @cached_property
    def networks(self) -> list[nn.Module]:
        networks = [copy.deepcopy(self.model) for _ in range(self.count)]
        for i, network in enumerate(networks):
            for parameter in network.parameters():
                parameter.mul_(1.0 + 0.001 * i)
        return networks

    @cached_property
    def operators(self) -> list[Operator]:
        return [op for network in self.networks for op in operators(network)]

    def add(self, what: str, precision: str) -> None:
        networks = self.networks
        with with_matmul_precision(precision):
            reports = norms(networks, self.memory)
            steps = [k for network, report in zip(networks, reports, strict=True) for k in steps_of(network, report)]
            floor = self.table.floor(self.operators, steps)
            run = functools.partial(norms, networks, self.memory)
            self.table.add(what, f"{self.count} checkpoints", run, floor, self.count)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small network: tries every path")
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no measurement after so many seconds")
    parser.add_argument("--memory", type=float, default=32.0, help="GiB that the vectors may take")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    allow_tf32(False)
    torch.backends.cudnn.benchmark = True
    memory, cuda = int(args.memory * 2**30), args.device == "cuda"
    session, shared = Session(args.limit), environment(args.device)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}")
    table = Table(args.device, args.seconds, Results(args.out / f"gpu_norms_{args.device}.csv", shared))
    model = build(args.tiny).to(args.device)
    one, many = Norms(table, model, memory), Checkpoints(table, model, args.checkpoints, memory)
    # The most valuable measurements first, the longest and least valuable last.
    session.attempt("one network", one.network)
    session.attempt("one network on torch's convolutions", one.network_on_torch)
    session.attempt("iteration alone", one.iteration_alone)
    session.attempt("iteration on torch's convolutions", one.iteration_on_torch)
    if cuda:
        session.attempt("iteration on torch's convolutions, one CUDA graph", one.iteration_on_torch_in_one_graph)
    session.attempt("one network by 3xTF32", one.network_by_3xtf32)
    session.attempt("iteration by 3xTF32", one.iteration_by_3xtf32)
    session.attempt("checkpoints", lambda: many.add("fastlip", "float32"))
    session.attempt("checkpoints by 3xTF32", lambda: many.add("fastlip, 3xTF32", "3xtf32"))
    session.attempt("one network without CUDA graphs", one.network_without_graphs)
    session.attempt("iteration without CUDA graphs", one.iteration_without_graphs)
    session.attempt("power iteration", lambda: one.power("TF32 off"))
    if cuda:
        session.attempt("power iteration in TF32", one.power_in_tf32)
    session.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()

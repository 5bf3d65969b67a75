"""A sweep, A and then A^T, over the convolutions of ResNet-50 by operator_step_, against torch's convolutions.

    python benchmarks/bench_operator_step.py                  # one core, CSV under benchmarks/results
    python benchmarks/bench_operator_step.py --device cuda

ResNet-50 with the stem for 32 x 32 images, random weights, float32, TF32 off unless a row says otherwise. "k x k" are
its 17 convolutions larger than 1 x 1, "all" its 53. Compared in the same run, per number of starts (vectors of each
operator), warm on the CPU and with a cold L2 on a GPU:

- floor: what the operations and bytes of METHODS section 7 take at this machine's measured rates, whichever is more:
  those of a float32 matrix product of 2048 x 2048 and of a copy. Products with padding count, as they do in torch's
  convolutions; operator_step_ leaves some of them out, so it may go below;
- operator_step_: both half steps of the bidiagonalisation, with scaling, subtraction and squared norms, for all
  layers at once; on a GPU with either way to multiply float32 numbers, multiply-adds and 3xTF32;
- torch: conv2d and conv_transpose2d of every layer, channels_last and not, and nothing else; on a GPU also in one CUDA
  graph, and with TF32, which is too coarse for certificates.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import Results, Session, environment, percentiles, times
from torch import Tensor, nn

from fastlip import models, ops
from fastlip.ops import ConvGeometry


@dataclass
class Layer:
    """A convolution and the geometry of its input."""

    weight: Tensor
    geometry: ConvGeometry


def layers(device: str) -> list[Layer]:
    """ResNet-50's convolutions on 32 x 32 images."""
    model = models.resnet50(num_classes=10, stem="cifar").eval()
    found: list[Layer] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        geometry = ConvGeometry(
            module.in_channels,
            module.out_channels,
            module.groups,
            tuple(module.kernel_size),
            tuple(inputs[0].shape[2:]),
            tuple(output.shape[2:]),
            tuple(module.stride),
            tuple(module.dilation),
            tuple((int(p), int(p)) for p in module.padding),
        )
        found.append(Layer(module.weight.detach().to(device), geometry))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.zeros(1, 3, 32, 32))
    return found


def work(selected: list[Layer], starts: int) -> tuple[float, float]:
    """Operations and bytes of a sweep: each weight and each vector once a direction, previous and out apart."""
    flop = bytes_ = 0.0
    for layer in selected:
        g = layer.geometry
        inputs, outputs = (c * p * starts for c, p in (g.input, g.output))
        flop += 2 * 2 * outputs * g.in_channels // g.groups * layer.weight[0, 0].numel()
        bytes_ += 4 * (2 * layer.weight.numel() + (inputs + 2 * outputs) + (outputs + 2 * inputs))
    return flop, bytes_


def rates(device: str, seconds: float) -> tuple[float, float]:
    """Operations a second of a float32 matrix product, and bytes a second of a copy."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    large = torch.zeros(2**26 if device == "cuda" else 2**24, device=device)
    copy = torch.empty_like(large)
    flush = torch.empty(2**26, device=device) if device == "cuda" else None
    product, _, _ = percentiles(times(lambda: a @ b, seconds=seconds, flush=flush))
    moved, _, _ = percentiles(times(lambda: copy.copy_(large), seconds=seconds, flush=flush))
    return 2 * 2048**3 / product * 1e3, 2 * 4 * large.numel() / moved * 1e3


def fused(
    selected: list[Layer], starts: int, device: str, precision: ops.MatmulPrecision = "float32"
) -> Callable[[], object]:
    geometries, vectors = [layer.geometry for layer in selected], [starts] * len(selected)
    plans = [ops.operator_plan(geometries, vectors, adjoint=adjoint, device=device) for adjoint in (False, True)]
    kernels, groups = [layer.weight for layer in selected], [layer.geometry.groups for layer in selected]
    weights = [ops.pack_weights(kernels, groups, adjoint=adjoint) for adjoint in (False, True)]
    v, w = (torch.randn(plans[0].source_size, device=device) for _ in range(2))
    u, u_before = (torch.randn(plans[0].target_size, device=device) for _ in range(2))
    alpha, alpha_before, beta, beta_next = (
        torch.ones(plans[0].vectors, dtype=torch.float64, device=device) for _ in range(4)
    )

    before = {"x_square": beta, "previous": u_before, "previous_square": alpha_before}
    after = {"x_square": alpha, "previous": v, "previous_square": beta}

    def sweep() -> None:
        ops.operator_step_(u, alpha, v, weights[0], plans[0], matmul_precision=precision, **before)
        ops.operator_step_(w, beta_next, u, weights[1], plans[1], matmul_precision=precision, **after)

    return sweep


def torch_sweep(selected: list[Layer], starts: int, device: str, layout: torch.memory_format) -> Callable[[], object]:
    calls = []
    for layer in selected:
        g = layer.geometry
        x = torch.randn(starts, g.in_channels, *g.input_size, device=device).to(memory_format=layout)
        weight = layer.weight.to(memory_format=layout)
        pads, extra = [p for p, _ in g.padding], []
        for n, m, k, s, p in zip(g.input_size, g.output_size, g.kernel, g.stride, pads, strict=True):
            extra.append(n - ((m - 1) * s - 2 * p + k))
        calls.append((x, weight, g.stride, pads, extra))

    def sweep() -> None:
        for x, weight, stride, pads, extra in calls:
            y = F.conv2d(x, weight, None, stride, pads)
            F.conv_transpose2d(y, weight, None, stride, pads, extra)

    return sweep


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one run."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def measure(device: str, starts: list[int], seconds: float, results: Results, session: Session) -> None:
    allow_tf32(False)
    torch.backends.cudnn.benchmark = True
    flush = torch.empty(2**26, device=device) if device == "cuda" else None
    everything = layers(device)
    flop_rate, byte_rate = rates(device, seconds)
    print(f"matrix product {flop_rate / 1e9:.0f} GFLOP/s, copy {byte_rate / 1e9:.0f} GB/s")
    print(f"{'layers':<7} {'starts':>6} {'what':<36} {'ms':>9} {'x floor':>8}", flush=True)
    for name, selected in (
        ("k x k", [layer for layer in everything if layer.geometry.kernel != (1, 1)]),
        ("all", everything),
    ):
        for b in starts:
            flop, moved = work(selected, b)
            floor = 1e3 * max(flop / flop_rate, moved / byte_rate)

            def add(what: str, run: Callable[[], object], name=name, b=b, flop=flop, floor=floor) -> None:
                median, low, high = percentiles(times(run, seconds=seconds, least=5, flush=flush))
                row = {"layers": name, "starts": b, "what": what, "ms": median, "ms_p20": low, "ms_p80": high}
                row |= {"x_floor": median / floor, "gflop": flop / 1e9, "floor_ms": floor}
                results.add(row | {"floor_gflops": flop_rate / 1e9, "floor_gbs": byte_rate / 1e9})
                print(f"{name:<7} {b:>6} {what:<36} {median:>9.3f} {median / floor:>8.2f}", flush=True)

            def ours(selected=selected, b=b, add=add) -> None:
                sweep = fused(selected, b, device)
                add("operator_step_", sweep)
                if device == "cuda":
                    add("operator_step_, CUDA graph", captured(sweep))
                    matrix = fused(selected, b, device, "3xtf32")
                    add("operator_step_, 3xTF32", matrix)
                    add("operator_step_, 3xTF32, CUDA graph", captured(matrix))

            def theirs(label: str, layout: torch.memory_format, selected=selected, b=b, add=add) -> None:
                peer = torch_sweep(selected, b, device, layout)
                add(label, peer)
                if device == "cuda":
                    add(f"{label}, CUDA graph", captured(peer))
                    allow_tf32(True)
                    try:
                        add(f"{label}, TF32, CUDA graph", captured(peer))
                    finally:
                        allow_tf32(False)

            session.attempt(f"{name}, {b} starts", ours)
            for label, layout in (("torch", torch.contiguous_format), ("torch channels_last", torch.channels_last)):
                session.attempt(f"{name}, {b} starts, {label}", functools.partial(theirs, label, layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no measurement after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    session, shared = Session(args.limit), environment(args.device)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    results = Results(args.out / f"operator_step_{args.device}.csv", shared)
    measure(args.device, args.starts, args.seconds, results, session)
    session.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()

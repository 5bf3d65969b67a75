"""Both passes of small networks as one function, beside PyTorch's layers and fastlip's one after the other.

    python benchmarks/bench_small_networks.py                # CSV under benchmarks/results

A pass forward and the gradient with respect to the images, with random weights: the three convolutions of
``bench_attacks.py``, LeNet for CIFAR-10, the network with two pools of PyTorch's MNIST example in its first version,
and the smaller network of Wong and Kolter (2018) for MNIST. "one function" is ``fastlip.ops.InterleavedLayers`` as
attacks with ``fast=True`` run it, "separate" such a copy with its layers one after the other. "floor" is one product
of matrices by PyTorch with the multiply-adds of both passes, a square of 512 by 512 the second factor.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import Results, environment, percentiles, times
from bench_attacks import small_network
from torch import Tensor, fx, nn

from fastlip.attacks._interleaved import OneFunction, SmallNetwork
from fastlip.attacks._rewrite import fuse

BATCHES = (1, 8, 64)
_SIDE = 512


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mnist_example() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10),
    )  # fmt: skip


def wong_kolter() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "three convolutions": (small_network, (3, 32, 32)),
    "LeNet, CIFAR-10": (lenet, (3, 32, 32)),
    "PyTorch's MNIST example": (mnist_example, (1, 28, 28)),
    "Wong and Kolter, MNIST": (wong_kolter, (1, 28, 28)),
}


def both_passes(network: Callable[[Tensor], Tensor], x: Tensor) -> None:
    seen = x.clone().requires_grad_()
    torch.autograd.grad(network(seen).sum(), seen)


def copies(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """The model as one function, with its layers one after the other, and an image's multiply-adds in both passes."""
    one, separate = fused(model), fused(model)
    one(x)
    (way,) = only_part(one).ways.values()
    (whole,) = way
    assert isinstance(whole, OneFunction)
    small = only_part(separate)
    small.ways[x.shape[2], x.shape[3]] = list(small.parts)
    products = 0
    for layer in whole.interleaved.layers:
        outputs, height, width = layer.output
        own = layer.channels * layer.kernel[0] * layer.kernel[1] if layer.kind == "conv" else 0
        products += 2 * outputs * height * width * own
    return one, separate, products


def fused(model: nn.Module) -> fx.GraphModule:
    """The model as an attack's copy is made of it."""
    made = fx.symbolic_trace(copy.deepcopy(model))
    fuse(made)
    made.delete_all_unused_submodules()
    made.recompile()
    return made


def only_part(made: fx.GraphModule) -> SmallNetwork:
    (small,) = (m for m in made.modules() if isinstance(m, SmallNetwork))
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = environment("cpu")
    results = Results(args.out / "small_networks_cpu.csv", shared)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for batch in BATCHES:
            x = torch.rand(batch, *shape)
            one, separate, products = copies(model, x)
            left, right = torch.rand(max(1, batch * products // _SIDE**2), _SIDE), torch.rand(_SIDE, _SIDE)
            runs = {
                "PyTorch": lambda x=x, model=model: both_passes(model, x),
                "separate": lambda x=x, separate=separate: both_passes(separate, x),
                "one function": lambda x=x, one=one: both_passes(one, x),
                "floor": lambda left=left, right=right: torch.mm(left, right),
            }
            medians = {what: percentiles(times(run, seconds=args.seconds, least=50)) for what, run in runs.items()}
            for what, (median, low, high) in medians.items():
                row = {"network": name, "images": batch, "what": what, "ms": median, "ms_p20": low, "ms_p80": high}
                row |= {"gflops": 2e-6 * batch * products / median, "x_torch": medians["PyTorch"][0] / median}
                results.add(row)
                rate, ratio = row["gflops"], row["x_torch"]
                print(f"{name:<24} {batch:>3} {what:<13} {median:>8.3f} ms {rate:>7.1f} GFLOP/s  x {ratio:.2f}")


if __name__ == "__main__":
    main()

"""Convolutions of a faster copy on the CPU, by ``fastlip.ops``'s three operators for them, and PyTorch's.

    python benchmarks/bench_indirect_conv.py                # CSV under benchmarks/results
    python benchmarks/bench_indirect_conv.py --network resnet18 --images 8

Each different convolution of ResNet-50 with the ImageNet stem and of ResNet-18 with the CIFAR stem, at 3x32x32, and of
two small networks for 3x32x32 and 1x28x28, of two 4x4 convolutions at stride 2 to 16 and 32 channels, as in the work on
certified training; in the forward pass and as the gradient of its input, float32, channels last, without bias, ReLU or
sum:

- packed: :class:`fastlip.attacks._packed.PackedConv`, which prepared networks run where it can be packed;
- PyTorch: ``conv2d`` and its backward operator, by oneDNN;
- fused: :class:`fastlip.attacks._fused.FusedConv`, which does without packing: matrix products where maps are small;
- floor: one matrix product by PyTorch with as many multiply-adds as the convolution has without its padding. On large
  maps its operands outgrow the caches, and it is no floor; nor is it where 3x3 kernels go by Winograd's filtering.

``count`` is how often the network has the convolution, ``x_torch`` the time over PyTorch's.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import Results, environment, percentiles, times
from torch import Tensor, nn

from fastlip.attacks._fused import FusedConv
from fastlip.attacks._packed import PackedConv
from fastlip.models import resnet18, resnet50
from fastlip.ops import IndirectConvs

NETWORKS = {
    "resnet50": lambda: resnet50(10, seed=0),
    "resnet18": lambda: resnet18(10, stem="cifar", seed=0),
    "small": lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1)),
    "small_mnist": lambda: nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1)),
}
SHAPES = {"small_mnist": (1, 28, 28)}  # of images; of others 3x32x32
Geometry = tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], int]


def geometries(network: str) -> Counter[Geometry]:
    """Channels in and out, kernel, stride, padding and side of the map of each convolution, and how many there are."""
    found: Counter[Geometry] = Counter()
    model = NETWORKS[network]().eval()

    def seen(conv: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        padding = (int(conv.padding[0]), int(conv.padding[1]))
        side = args[0].shape[-1]
        found[conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding, side] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(seen)
    with torch.no_grad():
        model(torch.rand(1, *SHAPES.get(network, (3, 32, 32))))
    return found


def multiply_adds(conv: nn.Conv2d, side: int) -> int:
    """Those of one image, without the products with padding."""
    plain = nn.Conv2d(1, 1, conv.kernel_size, conv.stride, conv.padding, bias=False)
    nn.init.ones_(plain.weight)
    with torch.no_grad():
        return int(plain(torch.ones(1, 1, side, side)).sum()) * conv.in_channels * conv.out_channels


def candidates(conv: nn.Conv2d, x: Tensor, products: int, *, backward: bool) -> dict[str, Callable[[], object]]:
    now = IndirectConvs()
    packed, fused = PackedConv(conv, relu=False), FusedConv(conv, relu=False)
    grad = torch.randn_like(conv(x), memory_format=torch.channels_last)
    packed.product(x, None, False, now)  # packs
    depth = min(conv.in_channels * math.prod(conv.kernel_size), 512)
    one, other = torch.randn(products // (depth * conv.out_channels) + 1, depth), torch.randn(depth, conv.out_channels)
    if backward:
        return {
            "packed": lambda: packed.gradient(grad, x, None, None, now),
            "PyTorch": lambda: torch.ops.aten.convolution_backward(
                grad, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1,
                [True, False, False],
            ),
            "fused": lambda: fused.gradient(grad, x, None, None, now),
            "floor": lambda: torch.mm(one, other),
        }  # fmt: skip
    return {
        "packed": lambda: packed.product(x, None, False, now),
        "PyTorch": lambda: conv(x),
        "fused": lambda: fused.product(x, None, False, now),
        "floor": lambda: torch.mm(one, other),
    }


def measure(network: str, args: argparse.Namespace, results: Results) -> None:
    total: Counter[tuple[str, str]] = Counter()
    for (channels, outputs, kernel, stride, padding, side), count in geometries(network).items():
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=False).requires_grad_(False)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.rand(args.images, channels, side, side).contiguous(memory_format=torch.channels_last)
        products = args.images * multiply_adds(conv, side)
        for name, backward in (("forward", False), ("gradient", True)):
            with torch.no_grad():
                medians = {
                    what: percentiles([1e3 * ms for ms in times(run, seconds=args.seconds)])
                    for what, run in candidates(conv, x, products, backward=backward).items()
                }
            for what, (median, low, high) in medians.items():
                total[name, what] += count * median
                row = {"network": network, "images": args.images, "channels": channels, "outputs": outputs}
                row |= {"kernel": kernel[0], "stride": stride[0], "side": side, "count": count, "pass": name}
                row |= {"what": what, "us": median}
                row |= {"us_p20": low, "us_p80": high, "gflops": 2e-3 * products / median}
                results.add(row | {"x_torch": median / medians["PyTorch"][0]})
                what_it_is = f"{channels}->{outputs} {kernel[0]}x{kernel[1]} /{stride[0]} at {side}"
                rate, ratio = 2e-3 * products / median, median / medians["PyTorch"][0]
                print(f"{what_it_is:<28} {count:>5} {name:<8} {what:<8} {median:>9.0f} {rate:>8.1f} {ratio:>8.2f}")
    for (name, what), us in total.items():
        print(f"{network}, all of them, {name}: {what:<8} {us / 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.15, help="per measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = environment("cpu")
    results = Results(args.out / "indirect_conv_cpu.csv", shared)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    print(f"{'convolution':<28} {'count':>5} {'pass':<8} {'what':<8} {'us':>9} {'GFLOP/s':>8} {'x torch':>8}")
    for network in args.network:
        measure(network, args, results)


if __name__ == "__main__":
    main()

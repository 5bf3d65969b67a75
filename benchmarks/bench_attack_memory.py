"""Peak memory of a whole attack beside what the process holds, of torchattacks' PGD, fastlip's and another build's.

    python benchmarks/bench_attack_memory.py
    python benchmarks/bench_attack_memory.py --old OTHER_TREE      # beside another build of fastlip

PGD in Linf on standing images, with random weights: ResNet-50 with the ImageNet stem on 32 images of 3x32x32,
ResNet-18 with the CIFAR stem on 16, three small convolutions on 64. Each is measured in a process of its own, which
holds the model and the images, has run one forward pass and an attack on another network, and gives large blocks back
as soon as they are free. ``memory_mb`` is by how much its resident memory grows at most: the copy that ``fast=True``
makes is part of it. ``old_mb`` is that of the build in the folder OTHER_TREE (what PYTHONPATH would name).
"""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from _timing import Results, environment
from bench_attacks import OURS, RADII, Attack, fastlip_attack, small_network
from torch import nn

from fastlip.models import resnet18, resnet50

STEPS = 3
NETWORKS = {
    "resnet50": (lambda: resnet50(10, seed=0).eval(), 32),
    "resnet18": (lambda: resnet18(10, stem="cifar", seed=0).eval(), 16),
    "small": (small_network, 64),
}
WAYS = ("torchattacks", "fastlip", "fastlip, fast", "fastlip, fast, bfloat16")


def attack_of(model: nn.Module, way: str) -> Attack:
    """An attack at the radius at which nearly all images stand."""
    eps = RADII["standing"] / 255
    if way == "torchattacks":
        import torchattacks

        attack: Attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)
        return attack
    return fastlip_attack(model, "pgd", eps, "cpu", OURS[way], STEPS)


def resident(field: str) -> float:
    """A field of this process's status, in MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def measure(network: str, way: str) -> float:
    """By how much this process grows during an attack, in MB."""
    make, count = NETWORKS[network]
    model = make()
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    other = small_network()
    attack_of(other, way)(images[:2], other(images[:2]).argmax(1))  # imports what it needs
    attack = attack_of(model, way)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    attack(images, labels)
    return resident("VmHWM") - before


def in_a_process(network: str, way: str, threads: int, tree: Path | None) -> float:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    if tree is not None:
        environ["PYTHONPATH"] = str(tree)
    command = [sys.executable, __file__, "--measure", network, way, "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--old", type=Path, help="folder of another build of fastlip")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.measure is not None:
        print(measure(*args.measure))
        return
    results = Results(args.out / "attack_memory_cpu.csv", environment("cpu"), digits=3)
    for network in args.network:
        for way in WAYS:
            row = {"network": network, "images": NETWORKS[network][1], "what": way}
            row["memory_mb"] = in_a_process(network, way, args.threads, None)
            ours = args.old is not None and way in OURS
            row["old_mb"] = in_a_process(network, way, args.threads, args.old) if ours else ""
            results.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()

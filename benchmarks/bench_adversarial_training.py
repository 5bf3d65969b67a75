"""Adversarial training: images a CPU second of whole steps, beside torchattacks.

    python benchmarks/bench_adversarial_training.py

A step is PGD in Linf (7 steps, cross-entropy, random start) on a batch, while the model is in training mode, and the
update of the weights on what it found. The networks are a ResNet-18 with a stem for 32x32, from torchvision, and one of
three small layers, where the loop is a larger part; the images are noise. "plain" is the update alone, without attack.
Ways take turns, each from the same weights; the rows are medians over ``--repeats`` turns of ``--steps`` steps. CPU
seconds, which on one thread are seconds, do not count what else the machine does. A network's rows take the place of
those of an earlier run.

fastlip's rows: ``keep="last"`` takes every step on every image, as torchattacks does; the default stops on an image
once it is misclassified, as most are to begin with here, where labels are random: "falling" tells what that saves. With
``fast=True`` every step makes a copy of the model anew.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment
from torch import Tensor, nn
from torch.nn import functional

from fastlip import attacks

EPS, STEPS = 8 / 255, 7
Attack = Callable[[Tensor, Tensor], Tensor]


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip


def ways(model: nn.Module) -> dict[str, Attack]:
    """The attacks on ``model``, by name."""
    call: dict[str, Any] = {"eps": EPS, "steps": STEPS, "step_size": EPS / 4, "loss": "ce"}
    found: dict[str, Attack] = {
        "plain": lambda x, y: x,
        "fastlip": lambda x, y: attacks.pgd(model, x, y, keep="last", **call),
        "fastlip, falling": lambda x, y: attacks.pgd(model, x, y, **call),
        "fastlip, fast": lambda x, y: attacks.pgd(model, x, y, keep="last", fast=True, **call),
        "fastlip, fast, falling": lambda x, y: attacks.pgd(model, x, y, fast=True, **call),
    }
    try:
        import torchattacks
    except ImportError:
        print("torchattacks is not installed")
        return found
    return {"torchattacks": torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS), **found}


def seconds(make: Callable[[], nn.Module], way: str, batches: list[tuple[Tensor, Tensor]], state: dict) -> float:
    """CPU seconds of a training step, the first one aside."""
    model = make()
    model.load_state_dict(state)
    model.train()
    attack = ways(model)[way]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    begin = 0.0
    for number, (images, labels) in enumerate(batches):
        if number == 1:  # the first has memory to get
            begin = time.process_time()
        adversarial = attack(images, labels)
        assert model.training
        optimizer.zero_grad()
        functional.cross_entropy(model(adversarial), labels).backward()
        optimizer.step()
    return (time.process_time() - begin) / (len(batches) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", choices=("resnet18", "small"), nargs="*", default=["resnet18", "small"])
    out = Path(__file__).parent / "results" / "adversarial_training_cpu.csv"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.out, environment("cpu"), keys=("network", "way"))
    for name in options.network:
        torch.manual_seed(0)
        make = resnet if name == "resnet18" else small
        state = copy.deepcopy(make().state_dict())
        generator = torch.Generator().manual_seed(1)
        batches = [
            (torch.rand(options.batch, 3, 32, 32, generator=generator),
             torch.randint(10, (options.batch,), generator=generator))
            for _ in range(options.steps + 1)
        ]  # fmt: skip
        names = list(ways(make()))
        measured: dict[str, list[float]] = {way: [] for way in names}
        for _ in range(options.repeats):
            for way in names:
                measured[way].append(seconds(make, way, batches, state))
        peer = statistics.median(measured[names[0]])
        for way in names:
            median = statistics.median(measured[way])
            row = {
                "network": name, "way": way, "batch": options.batch, "images_per_cpu_second": options.batch / median,
                "least": options.batch / max(measured[way]), "most": options.batch / min(measured[way]),
                "x_torchattacks": peer / median if names[0] == "torchattacks" else "",
            }  # fmt: skip
            results.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()

"""PGD-20 on ResNet-50 over 10,000 images of CIFAR-10's size, end to end, against torchattacks in the same run.

    python benchmarks/bench_gpu_attack.py                      # CSV under benchmarks/results
    python benchmarks/bench_gpu_attack.py --checkpoint FILE    # with FASTLIP_DATA: CIFAR-10's test images
    python benchmarks/bench_gpu_attack.py --device cpu --images 16 --batch 8    # every path; timings mean nothing

Linf, cross-entropy, a random start, ImageNet stem at 32 x 32, in batches, on images that the network classifies
correctly, so that no library gains by leaving out the others. Without a checkpoint the
network is trained here for a moment on fastlip's generated images, and attacked on such. All take the same radius,
number and size of steps; ``peer`` says which library is compared with, and where it is not installed that a loop that
does as much stands for it. ``fast`` folds BatchNorm, takes channels_last and replays CUDA graphs, whose number and
memory have columns; in bfloat16 every success is confirmed in float32. Robust accuracy is the float32 model's, for all
alike. Time is the wall clock's with the device waited for, and includes making the fast copy and capturing its graphs
once.
"""

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import Results, Session, environment, percentiles
from bench_pgd_step import torchattacks_linf
from torch import Tensor, nn

from fastlip import attacks
from fastlip.data import cifar10, generated
from fastlip.models import load_checkpoint, resnet50

STEPS = 20
Attack = Callable[[Tensor, Tensor], Tensor]


def trained(device: str, seconds: float) -> nn.Module:
    """ResNet-50 after a short training on generated images."""
    model = resnet50(10, seed=0).to(device).train()
    task = generated("target", "train", 5000)
    images, labels = task.images.float().div(255).to(device), task.labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    stop = time.perf_counter() + seconds
    generator = torch.Generator().manual_seed(0)
    while time.perf_counter() < stop:
        chosen = torch.randint(len(images), (128,), generator=generator).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    # A short training leaves running statistics behind the weights.
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average
    with torch.no_grad():
        for first in range(0, 640, 128):
            model(images[first : first + 128])
    return model.eval()


def peer(model: nn.Module, eps: float, step: float) -> tuple[str, Attack]:
    """PGD of torchattacks with its version; if that is not installed, an equivalent loop with a name that says so."""
    try:
        import torchattacks
    except ImportError:

        def loop(images: Tensor, labels: Tensor) -> Tensor:
            x = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
            for _ in range(STEPS):
                x = x.detach().requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
                x = torchattacks_linf(x, grad, images, eps, step)
            return x

        return "a loop like torchattacks'", loop
    return f"torchattacks {version('torchattacks')}", torchattacks.PGD(model, eps=eps, alpha=step, steps=STEPS)


class Prepared:
    """An attack on a network that is made once, in the first batch."""

    def __init__(
        self, model: nn.Module, attack: Callable[[Tensor, Tensor, object], Tensor], precision: torch.dtype | None
    ) -> None:
        self.model, self.attack, self.precision = model, attack, precision
        self.network: attacks.Network | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.network is None:
            self.network = attacks.prepare(self.model, x, precision=self.precision)
        return self.attack(x, y, self.network)

    def graphs(self) -> dict[str, Any]:
        """Columns on the CUDA graphs that are alive."""
        graphs = None if self.network is None else self.network.graphs
        if graphs is None:
            return {}
        return {"graphs": graphs.alive, "captures": graphs.captures, "graph_mib": graphs.bytes / 2**20}


def candidates(model: nn.Module, eps: float) -> dict[str, Attack]:
    """The peer with which all are compared, and fastlip's variants, the fastest first."""
    step = 2.5 * eps / STEPS
    options = {"norm": "linf", "eps": eps, "steps": STEPS, "step_size": step, "loss": "ce"}

    def ours(x: Tensor, y: Tensor, network: object) -> Tensor:
        return attacks.pgd(network, x, y, generator=torch.Generator(x.device).manual_seed(0), **options)

    name, attack = peer(model, eps, step)
    return {
        name: attack,
        "fastlip, fast, bfloat16": Prepared(model, ours, torch.bfloat16),
        "fastlip, fast": Prepared(model, ours, None),
        "fastlip": lambda x, y: ours(x, y, model),
    }


def attack_all(run: Attack, images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, float]:
    """Adversarial images, and milliseconds."""
    if images.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    parts = zip(images.split(batch), labels.split(batch), strict=True)
    found = torch.cat([run(x, y) for x, y in parts])
    if images.is_cuda:
        torch.cuda.synchronize()
    return found, (time.perf_counter() - begin) * 1e3


@torch.no_grad()
def decisions(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    return torch.cat([model(x).argmax(1) for x in images.split(batch)])


class Table:
    """A row for each way to attack, with the median of its runs so far."""

    def __init__(self, results: Results, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace):
        self.results, self.model, self.images, self.labels = results, model, images, labels
        self.batch, self.eps_255 = args.batch, args.eps
        self.ms: dict[str, list[float]] = {}

    def add(self, name: str, attack: Attack, peer: str, clean: float) -> None:
        found, spent = attack_all(attack, self.images, self.labels, self.batch)
        assert (found - self.images).abs().max() <= self.eps_255 / 255 * (1 + 1e-5) + 1e-7, f"{name} left the ball"
        self.ms.setdefault(name, []).append(spent)
        median, low, high = percentiles(self.ms[name])
        row: dict[str, Any] = {"what": name, "peer": peer, "images": len(self.images), "batch": self.batch}
        row |= {"eps_255": self.eps_255, "clean": clean, "ms": median, "ms_p20": low, "ms_p80": high}
        # A peer that failed leaves nothing to compare with.
        base = percentiles(self.ms[peer])[0] if peer in self.ms else None
        row |= {"runs": len(self.ms[name]), "x_peer": "" if base is None else base / median}
        row |= attack.graphs() if isinstance(attack, Prepared) else {}
        row["robust_accuracy"] = (decisions(self.model, found, self.batch) == self.labels).double().mean().item()
        before = [i for i, r in enumerate(self.results.rows) if r["what"] == name]
        if before:
            self.results.rows[before[0]] = row
            self.results.rewrite()
        else:
            self.results.add(row)
        over = "" if base is None else f"x {base / median:.2f}"
        print(f"{name:<26} {median:>9.0f} ms  {over}  robust accuracy {row['robust_accuracy']:.4f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="a network of fastlip.models.resnet50; needs FASTLIP_DATA")
    parser.add_argument("--train-seconds", type=float, default=20.0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--eps", type=float, default=1.0, help="radius in 255ths")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no attack after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    session, shared = Session(args.limit), environment(args.device)
    results = Results(args.out / f"gpu_attack_{args.device}.csv", shared)
    if args.checkpoint is None:
        model, test = trained(args.device, args.train_seconds), generated("target", "test", args.images * 5 // 4 + 64)
    else:
        model, test = resnet50(10, seed=0), cifar10(os.environ["FASTLIP_DATA"], train=False)
        model.load_state_dict(load_checkpoint(args.checkpoint)[0])
        model = model.to(args.device).eval()
    warnings.simplefilter("ignore")
    most = 4 * args.images  # of which enough should be classified correctly
    images, labels = test.images[:most].float().div(255).to(args.device), test.labels[:most].to(args.device)
    right = decisions(model, images, args.batch) == labels
    images, labels = images[right][: args.images], labels[right][: args.images]
    clean = right.double().mean().item()
    if len(images) == 0:
        parser.error("no image is classified correctly; train longer or take a checkpoint")
    print(f"{shared['device']}, torch {shared['torch']}, {len(images)} images, clean accuracy {clean:.3f}", flush=True)
    table = Table(results, model, images, labels, args)
    first, attack = next(iter(candidates(model, args.eps / 255).items()))
    session.attempt("warm-up", lambda: attack_all(attack, images[: args.batch], labels[: args.batch], args.batch))
    for repeat in range(args.repeats):
        torch.manual_seed(repeat)
        for name, attack in candidates(model, args.eps / 255).items():
            session.attempt(name, lambda name=name, attack=attack: table.add(name, attack, first, clean))
    session.close()


if __name__ == "__main__":
    main()

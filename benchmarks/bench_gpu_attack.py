"""PGD-20 on ResNet-50 over 10,000 images of CIFAR-10's size, end to end, against torchattacks in the same run.

    python benchmarks/bench_gpu_attack.py                      # CSV under benchmarks/results
    python benchmarks/bench_gpu_attack.py --checkpoint FILE    # with FASTLIP_DATA: CIFAR-10's test images
    python benchmarks/bench_gpu_attack.py --device cpu --images 16 --batch 8    # every path; says nothing of speed

Linf, cross-entropy, a random start, ImageNet stem at 32 x 32, in batches, on images that the network classifies
correctly: where a library's own shortcut leaves out those that it does not, nothing is gained. Without a checkpoint the
network is trained here for a moment on fastlip's generated images, and attacked on such. All take the same radius,
number and size of steps. ``fast`` folds BatchNorm, takes channels_last and replays CUDA graphs; in bfloat16 every
success is confirmed in float32. Robust accuracy is the float32 model's, for all alike. Time is the wall clock's with
the device waited for, and includes making the fast copy and capturing its graphs once.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import environment, percentiles, write_csv
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


def peer(model: nn.Module, eps: float, step: float) -> Attack:
    """PGD of torchattacks; where that is not installed, a loop that does as much."""
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

        return loop
    return torchattacks.PGD(model, eps=eps, alpha=step, steps=STEPS)


def candidates(model: nn.Module, eps: float) -> dict[str, Attack]:
    step = 2.5 * eps / STEPS
    options = {"norm": "linf", "eps": eps, "steps": STEPS, "step_size": step, "loss": "ce"}

    def ours(x: Tensor, y: Tensor, network: object) -> Tensor:
        return attacks.pgd(network, x, y, generator=torch.Generator(x.device).manual_seed(0), **options)

    def prepared(precision: torch.dtype | None) -> Attack:
        networks: list[object] = []  # made once, in the first batch

        def run(x: Tensor, y: Tensor) -> Tensor:
            if not networks:
                networks.append(attacks.prepare(model, x, precision=precision))
            return ours(x, y, networks[0])

        return run

    return {
        "torchattacks": peer(model, eps, step),
        "fastlip": lambda x, y: ours(x, y, model),
        "fastlip, fast": prepared(None),
        "fastlip, fast, bfloat16": prepared(torch.bfloat16),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="a network of fastlip.models.resnet50; needs FASTLIP_DATA")
    parser.add_argument("--train-seconds", type=float, default=20.0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=2_000)
    parser.add_argument("--eps", type=float, default=1.0, help="radius in 255ths")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further repeat after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.checkpoint is None:
        model, test = trained(args.device, args.train_seconds), generated("target", "test", args.images * 5 // 4 + 64)
    else:
        model, test = resnet50(10, seed=0), cifar10(os.environ["FASTLIP_DATA"], train=False)
        model.load_state_dict(load_checkpoint(args.checkpoint)[0])
        model = model.to(args.device).eval()
    warnings.simplefilter("ignore")
    most = 4 * args.images  # of which so many shall be right
    images, labels = test.images[:most].float().div(255).to(args.device), test.labels[:most].to(args.device)
    right = decisions(model, images, args.batch) == labels
    images, labels = images[right][: args.images], labels[right][: args.images]
    clean = right.double().mean().item()
    if len(images) < args.batch:
        parser.error(f"only {len(images)} images are classified correctly; train longer or take a checkpoint")
    run = candidates(model, args.eps / 255)
    ms: dict[str, list[float]] = {name: [] for name in run}
    standing: dict[str, float] = {}
    begin = time.perf_counter()
    attack_all(run["torchattacks"], images[: args.batch], labels[: args.batch], args.batch)  # warms up
    for repeat in range(args.repeats):
        if repeat and time.perf_counter() - begin > args.seconds:
            break
        for name, attack in candidates(model, args.eps / 255).items():
            torch.manual_seed(repeat)
            found, spent = attack_all(attack, images, labels, args.batch)
            ms[name].append(spent)
            assert (found - images).abs().max() <= args.eps / 255 * (1 + 1e-5) + 1e-7, f"{name} left the ball"
            standing[name] = (decisions(model, found, args.batch) == labels).double().mean().item()
    base = percentiles(ms["torchattacks"])[0]
    installed = "torchattacks" if find_spec("torchattacks") else "a loop like torchattacks'"
    rows = []
    for name, spent_ in ms.items():
        median, low, high = percentiles(spent_)
        row = {
            "what": name,
            "peer": installed,
            "images": len(images),
            "batch": args.batch,
            "eps_255": args.eps,
            "clean": clean,
        }
        row |= {"ms": median, "ms_p20": low, "ms_p80": high, "runs": len(spent_)}
        row |= {"x_torchattacks": base / median, "robust_accuracy": standing[name]}
        rows.append(row | environment(args.device))
    write_csv(args.out / f"gpu_attack_{args.device}.csv", rows)
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, {len(images)} images, clean accuracy {clean:.3f}")
    for r in rows:
        print(
            f"{r['what']:<26} {r['ms']:>9.0f} ms  x {r['x_torchattacks']:.2f}  robust accuracy "
            f"{r['robust_accuracy']:.4f}"
        )


if __name__ == "__main__":
    main()

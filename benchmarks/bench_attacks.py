"""Whole attacks, against torchattacks, foolbox, ART and auto-attack in one run.

    FASTLIP_DATA=DIR python benchmarks/bench_attacks.py --checkpoint resnet50.safetensors
    FASTLIP_DATA=DIR python benchmarks/bench_attacks.py --checkpoint resnet50.safetensors --device cuda
    python benchmarks/bench_attacks.py --network small                       # needs no data
    python benchmarks/bench_attacks.py --network small --old OTHER_TREE      # beside another build of fastlip

PGD-20 and APGD-20 in Linf with cross-entropy and a random start: on correctly classified CIFAR-10 test images by a
ResNet-50 with the ImageNet stem at 32x32; and on random images, with the network's own decisions as labels, by a
ResNet-18 with the CIFAR stem and random weights, and by a convolutional network of three small layers, where the loop
is a larger part. Two radii: one at which nearly all images stay robust, where only the speed of a step counts, and
one at which attacks succeed. The libraries take turns, so that a drift affects all alike. "last iterate" is
``keep="last"``, which is what the peers' PGD returns; by default the best iterate is kept. ``fast`` and ``precision``
are those of ``fastlip.attacks``; every success of theirs is confirmed in float32, and the copy that they follow, made
in the first round and kept, is compared with the model in every call. Robust accuracy is judged alike for all, by the
float32 model.

"compiled" is torchattacks' loop with model and update under torch.compile, the peer of ``prepare``; it is left out
where compiling takes longer than ``--compile`` seconds (0: at once). ``calls_per_step`` counts the dispatcher's calls
of one more step on a linear model, whose own are among them.

``--old`` names the folder of another build (what PYTHONPATH would name): it attacks in a process of its own, in turn
with the others, and ``x_old`` compares with its row of the same name.

``--attack``, ``--regime`` and ``--network`` choose a part, whose rows take the place of those of an earlier run. The
committed results are runs on one thread with ``--repeats 2``, ResNet-50 with ``--images 32``, ResNet-18 with 16.

The checkpoint holds a network of ``fastlip.models.resnet50``, as a study run writes; where the file is missing it is
trained here on 20,000 images for 6 epochs, which takes 12 minutes on two cores.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _timing import Results, environment, percentiles
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import attacks
from fastlip.data import cifar10
from fastlip.models import load_checkpoint, resnet18, resnet50, save_checkpoint

STEPS = 20
NETWORKS = ("resnet50", "resnet18", "small")
#: fastlip's ways, by the options of an attack.
OURS: dict[str, dict[str, Any]] = {
    "fastlip": {},
    "fastlip, last iterate": {"keep": "last"},
    "fastlip, fast": {"fast": True},
    "fastlip, fast, bfloat16": {"fast": True, "precision": torch.bfloat16},
}
#: Radii in 255ths: at the first nearly all images stay robust, at the second attacks succeed.
RADII = {"standing": 0.1, "falling": 4.0}
Attack = Callable[[Tensor, Tensor], Tensor]


def network(path: Path, data: str) -> nn.Module:
    model = resnet50(10, seed=0)
    if not path.exists():
        from fastlip.study.settings.training import Schedule
        from fastlip.study.training.train import train

        images = cifar10(data, train=True)
        schedule = Schedule(images=20_000, epochs=6, max_lr=0.1)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            train(
                model, images.images[:20_000], images.labels[:20_000], schedule, seed=0, precision=torch.bfloat16,
                state_path=state, save_seconds=1e9, progress=lambda *a: None,
            )  # fmt: skip
        save_checkpoint(path, model)
    model.load_state_dict(load_checkpoint(path)[0])
    return model.eval()


def small_network() -> nn.Module:
    """Three small convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def fastlip_attack(model: nn.Module, kind: str, eps: float, device: str, options: dict[str, Any], steps: int) -> Attack:
    def run(x: Tensor, y: Tensor) -> Tensor:
        settings = {"generator": torch.Generator(device).manual_seed(0), "steps": steps, "loss": "ce"} | options
        if kind == "pgd":
            settings["step_size"] = 2.5 * eps / STEPS
        return getattr(attacks, kind)(model, x, y, norm="linf", eps=eps, **settings)

    return run


def candidates(model: nn.Module, kind: str, eps: float, device: str, steps: int = STEPS) -> dict[str, Attack]:
    """Each library's attack with the same norm, radius, steps, step size and loss."""
    out = peers(model, kind, eps, 2.5 * eps / STEPS, device, steps)
    ours = {name: o for name, o in OURS.items() if kind == "pgd" or "keep" not in o}
    return out | {name: fastlip_attack(model, kind, eps, device, o, steps) for name, o in ours.items()}


def compiled(model: nn.Module, eps: float, step: float) -> Attack:
    """The loop of torchattacks' PGD with its model and its update compiled."""
    from bench_pgd_step import torchattacks_linf

    logits, update = torch.compile(model), torch.compile(torchattacks_linf)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        x = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(STEPS):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(logits(x), labels), x)
            x = update(x.detach(), grad, images, eps, step)
        return x

    return run


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += 1
        return function(*args, **(kwargs or {}))


def calls_per_step(kind: str) -> dict[str, float]:
    """The dispatcher's calls of one more step of each library's attack on images that stand, 3x32x32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    images = torch.rand(8, 3, 32, 32)
    labels = model(images).argmax(1)
    made: dict[str, list[int]] = {}
    for steps in (20, 40):
        for name, run in candidates(model, kind, 1e-6, "cpu", steps).items():
            if "fast, " not in name:
                run(images, labels)  # copies are made the first time
                with _Calls() as calls:
                    run(images, labels)
                made.setdefault(name, []).append(calls.made)
    return {name: (few[1] - few[0]) / 20 for name, few in made.items()}


class OtherBuild:
    """Another build of fastlip in a process of its own, which attacks when told to."""

    def __init__(self, tree: Path, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
        self.folder = tempfile.TemporaryDirectory()
        problem = Path(self.folder.name) / "problem.pt"
        torch.save((model, images, labels, args.device, args.threads), problem)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(problem)], env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, kind: str, name: str, eps: float, few: int | None) -> float:
        """Milliseconds of one attack."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([kind, name, eps, few]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the other build ended early")
        return float(answer)

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()


def serve(problem: Path) -> None:
    """Attack as told on standard input, one line each, and answer with the milliseconds that it took."""
    model, images, labels, device, threads = torch.load(problem, weights_only=False)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        kind, name, eps, few = json.loads(line)
        run = fastlip_attack(model, kind, eps, device, OURS[name], STEPS)
        print(timed(run, images[:few], labels[:few])[1], flush=True)


def timed(run: Attack, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Adversarial images, and the milliseconds that they took."""
    begin = time.perf_counter()
    found = run(images, labels)
    if images.is_cuda:
        torch.cuda.synchronize()
    return found, (time.perf_counter() - begin) * 1e3


def peers(model: nn.Module, kind: str, eps: float, step: float, device: str, steps: int) -> dict[str, Attack]:
    import torchattacks
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    art_model = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type=device
    )

    def art(attack: object) -> Attack:
        return lambda x, y: torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    if kind == "pgd":
        import foolbox

        foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
        foolbox_attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps)
        art_attack = ProjectedGradientDescent(
            art_model, np.inf, eps, step, max_iter=steps, num_random_init=1, batch_size=512, verbose=False
        )
        return {
            "torchattacks": torchattacks.PGD(model, eps=eps, alpha=step, steps=steps),
            "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps)[1],
            "ART": art(art_attack),
        }
    from pyautoattack.autopgd_base import APGDAttack

    art_attack = AutoProjectedGradientDescent(
        art_model, np.inf, eps, 2 * eps, max_iter=steps, nb_random_init=1, batch_size=512, verbose=False,
        loss_type="cross_entropy",
    )  # fmt: skip
    auto = APGDAttack(model, n_iter=steps, norm="Linf", eps=eps, loss="ce", seed=0, device=device)
    return {
        "torchattacks": torchattacks.APGD(model, eps=eps, steps=steps, loss="ce"),
        "auto-attack": lambda x, y: auto.perturb(x, y),
        "ART": art(art_attack),
    }


def measure(
    model: nn.Module,
    kind: str,
    regime: str,
    images: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    calls: dict[str, float],
    old: OtherBuild | None,
) -> list[dict[str, Any]]:
    eps = RADII[regime] / 255
    attack = candidates(model, kind, eps, args.device)
    if kind == "pgd" and args.compile:
        attack["torchattacks' loop, compiled"] = run = compiled(model, eps, 2.5 * eps / STEPS)
        try:
            with within(args.compile):
                run(images, labels)
        except Exception as error:  # a compiler may fail in any way
            print(f"compiled: left out, {type(error).__name__} {error}", flush=True)
            del attack["torchattacks' loop, compiled"]
    ms: dict[str, list[float]] = {name: [] for name in attack}
    ms_old: dict[str, list[float]] = {name: [] for name in OURS if old is not None}
    robust = {}
    for repeat in range(args.repeats + 1):
        few = 8 if repeat == 0 else None  # the first round warms up
        for name, run in attack.items():
            torch.manual_seed(repeat)
            np.random.seed(repeat)  # noqa: NPY002  # what ART draws from
            found, spent = timed(run, images[:few], labels[:few])
            if repeat:
                ms[name].append(spent)
            if old is not None and name in OURS:
                spent = old(kind, name, eps, few)
                if repeat:
                    ms_old[name].append(spent)
            model.eval()
            with torch.no_grad():
                robust[name] = (model(found.float()).argmax(1) == labels[:few]).double().mean().item()
    median = {name: percentiles(times) for name, times in ms.items()}
    fastest = min(median[n][0] for n in attack if n not in OURS)
    rows = []
    for name in attack:
        row = {"attack": f"{kind}-{STEPS}", "regime": regime, "eps_255": RADII[regime], "what": name}
        row |= {"images": len(images), "ms": median[name][0], "ms_p20": median[name][1], "ms_p80": median[name][2]}
        row |= {"x_fastest_peer": fastest / median[name][0], "calls_per_step": calls.get(name, "")}
        row["x_old"] = percentiles(ms_old[name])[0] / median[name][0] if ms_old.get(name) else ""
        rows.append(row | {"robust_accuracy": robust[name]})
    return rows


def problem_of(network_name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images with the labels that it gives them."""
    if network_name != "resnet50":
        model = small_network() if network_name == "small" else resnet18(10, stem="cifar", seed=0).eval()
        model = model.to(args.device)
        images = torch.rand(args.images, 3, 32, 32).to(args.device)
        with torch.no_grad():
            return model, images, model(images).argmax(1)
    data = os.environ["FASTLIP_DATA"]
    model = network(args.checkpoint, data).to(args.device)
    test = cifar10(data, train=False)
    images, labels = test.images[: 8 * args.images].float().div(255), test.labels[: 8 * args.images]
    with torch.no_grad():
        right = model(images.to(args.device)).argmax(1).cpu() == labels
    images, labels = (t[right][: args.images].to(args.device) for t in (images, labels))
    return model, images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--checkpoint", type=Path, help="needed for resnet50")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attack", choices=["pgd", "apgd"], nargs="*", default=["pgd", "apgd"])
    parser.add_argument("--regime", choices=list(RADII), nargs="*", default=list(RADII))
    parser.add_argument("--compile", type=float, default=300.0, help="seconds that compiling may take; 0: left out")
    parser.add_argument("--old", type=Path, help="folder of another build of fastlip, measured in turn")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    if "resnet50" in args.network and args.checkpoint is None:
        parser.error("--network resnet50 needs --checkpoint")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    shared = environment(args.device)
    print(f"{shared['device']}, torch {shared['torch']}, {args.threads} thread(s), {args.images} images", flush=True)
    keys = ("network", "attack", "regime", "what")
    results = Results(args.out / f"attacks_{args.device}.csv", shared, keys=keys)
    calls = {kind: calls_per_step(kind) for kind in args.attack}
    for name in args.network:
        model, images, labels = problem_of(name, args)
        old = None if args.old is None else OtherBuild(args.old, model, images, labels, args)
        for kind in args.attack:
            for regime in args.regime:
                for r in measure(model, kind, regime, images, labels, args, calls[kind], old):
                    results.add({"network": name} | r)
                    beside = f"  x old {r['x_old']:.2f}" if r["x_old"] else ""
                    print(
                        f"{name:<8} {r['attack']:<8} {r['regime']:<9} {r['what']:<28} {r['ms']:>9.1f} ms"
                        f"  x {r['x_fastest_peer']:.2f}{beside}  calls {r['calls_per_step'] or '-'}"
                        f"  robust accuracy {r['robust_accuracy']:.3f}",
                        flush=True,
                    )
        if old is not None:
            old.close()


if __name__ == "__main__":
    main()

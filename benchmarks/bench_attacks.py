"""Whole attacks on ResNet-50, against torchattacks, foolbox, ART and auto-attack in one run.

    FASTLIP_DATA=DIR python benchmarks/bench_attacks.py --checkpoint resnet50.safetensors
    FASTLIP_DATA=DIR python benchmarks/bench_attacks.py --checkpoint resnet50.safetensors --device cuda

PGD-20 and APGD-20 in Linf with cross-entropy and a random start, on correctly classified CIFAR-10 test images, by a
ResNet-50 with the ImageNet stem at 32x32. Two radii: one at which nearly all images stay robust, where only the speed
of a step counts, and one at which attacks succeed. The libraries take turns, so that a drift affects all alike.
``fast`` and ``precision`` are those of ``fastlip.attacks``; every success of theirs is confirmed in float32, and the
copy that they follow, made in the first round and kept, is compared with the model in every call. Robust accuracy is
judged alike for all, by the float32 model.

``--attack`` and ``--regime`` choose a part; the committed results are a run on one thread and one on two, put into one
file (``--images 32 --repeats 2``).

The checkpoint holds a network of ``fastlip.models.resnet50``, as a study run writes; where the file is missing it is
trained here on 20,000 images for 6 epochs, which takes 12 minutes on two cores.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import Results, environment, percentiles
from torch import Tensor, nn

from fastlip import attacks
from fastlip.data import cifar10
from fastlip.models import load_checkpoint, resnet50, save_checkpoint

STEPS = 20
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


def candidates(model: nn.Module, kind: str, eps: float, device: str) -> dict[str, Attack]:
    """Each library's attack with the same norm, radius, steps, step size and loss."""
    step = 2.5 * eps / STEPS
    common = {"norm": "linf", "eps": eps, "steps": STEPS, "loss": "ce"}

    def ours(**options: object) -> Attack:
        def run(x: Tensor, y: Tensor) -> Tensor:
            generator = torch.Generator(device).manual_seed(0)
            if kind == "pgd":
                return attacks.pgd(model, x, y, step_size=step, generator=generator, **common, **options)
            return attacks.apgd(model, x, y, generator=generator, **common, **options)

        return run

    out = peers(model, kind, eps, step, device)
    out["fastlip"] = ours()
    out["fastlip, fast"] = ours(fast=True)
    out["fastlip, fast, bfloat16"] = ours(fast=True, precision=torch.bfloat16)
    return out


def peers(model: nn.Module, kind: str, eps: float, step: float, device: str) -> dict[str, Attack]:
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
        foolbox_attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS)
        art_attack = ProjectedGradientDescent(
            art_model, np.inf, eps, step, max_iter=STEPS, num_random_init=1, batch_size=512, verbose=False
        )
        return {
            "torchattacks": torchattacks.PGD(model, eps=eps, alpha=step, steps=STEPS),
            "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps)[1],
            "ART": art(art_attack),
        }
    from pyautoattack.autopgd_base import APGDAttack

    art_attack = AutoProjectedGradientDescent(
        art_model, np.inf, eps, 2 * eps, max_iter=STEPS, nb_random_init=1, batch_size=512, verbose=False,
        loss_type="cross_entropy",
    )  # fmt: skip
    auto = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=eps, loss="ce", seed=0, device=device)
    return {
        "torchattacks": torchattacks.APGD(model, eps=eps, steps=STEPS, loss="ce"),
        "auto-attack": lambda x, y: auto.perturb(x, y),
        "ART": art(art_attack),
    }


def measure(
    model: nn.Module, kind: str, regime: str, images: Tensor, labels: Tensor, repeats: int, device: str
) -> list[dict]:
    eps = RADII[regime] / 255
    attack = candidates(model, kind, eps, device)
    ms: dict[str, list[float]] = {name: [] for name in attack}
    standing = {}
    for repeat in range(repeats + 1):
        for name, run in attack.items():
            torch.manual_seed(repeat)
            np.random.seed(repeat)  # noqa: NPY002  # what ART draws from
            few = slice(0, 8) if repeat == 0 else slice(None)  # the first round warms up
            begin = time.perf_counter()
            found = run(images[few], labels[few])
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                ms[name].append((time.perf_counter() - begin) * 1e3)
            model.eval()
            with torch.no_grad():
                standing[name] = (model(found.float()).argmax(1) == labels[few]).double().mean().item()
    median = {name: percentiles(times) for name, times in ms.items()}
    fastest = min(median[n][0] for n in attack if not n.startswith("fastlip"))
    return [
        {
            "attack": f"{kind}-{STEPS}",
            "regime": regime,
            "eps_255": RADII[regime],
            "what": name,
            "images": len(images),
            "ms": median[name][0],
            "ms_p20": median[name][1],
            "ms_p80": median[name][2],
            "x_fastest_peer": fastest / median[name][0],
            "robust_accuracy": standing[name],
        }
        for name in attack
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attack", choices=["pgd", "apgd"], nargs="*", default=["pgd", "apgd"])
    parser.add_argument("--regime", choices=list(RADII), nargs="*", default=list(RADII))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = os.environ["FASTLIP_DATA"]
    model = network(args.checkpoint, data).to(args.device)
    test = cifar10(data, train=False)
    images, labels = test.images[: 8 * args.images].float().div(255), test.labels[: 8 * args.images]
    with torch.no_grad():
        right = model(images.to(args.device)).argmax(1).cpu() == labels
    images, labels = (t[right][: args.images].to(args.device) for t in (images, labels))
    warnings.simplefilter("ignore")
    shared = environment(args.device)
    print(f"{shared['device']}, torch {shared['torch']}, {args.threads} thread(s), {args.images} images", flush=True)
    results = Results(args.out / f"attacks_{args.device}.csv", shared)
    for kind in args.attack:
        for regime in args.regime:
            for r in measure(model, kind, regime, images, labels, args.repeats, args.device):
                results.add(r)
                print(
                    f"{r['attack']:<8} {r['regime']:<9} {r['what']:<26} {r['ms']:>9.0f} ms  x {r['x_fastest_peer']:.2f}"
                    f"  robust accuracy {r['robust_accuracy']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""How strong the attacks are: evaluate's standard suite beside AutoAttack, and min_norm beside adversarial-library.

    FASTLIP_DATA=DIR python benchmarks/bench_strength.py suites plain.safetensors robust.safetensors
    FASTLIP_DATA=DIR python benchmarks/bench_strength.py norms plain.safetensors robust.safetensors

The networks are those of ``train_cnn.py``, the images those of CIFAR-10's test set from ``--first`` on. Needs
``pyautoattack`` and ``adv-lib``. What an earlier run has measured on as many images stays and is not measured again.

"suites": AutoAttack's standard version and ``fastlip.attacks.evaluate`` on the same images, one after the other in one
process: images that each leaves robust, wall and CPU seconds, and the images that only one of the two fools. An image
of either counts as fooled if the model decides wrongly on it and it lies in the box and, but for rounding, in the ball.
``strength_suite_images.csv`` has a row for each image.

"norms": the smallest perturbation of each correctly classified image under each method with so many forward and so
many backward passes for an image (``--calls``), a few more or less, as counted. Judged alike for all: found are images
of the box that the model misclassifies, by their distance in float64; ``lost`` of them are classified correctly when
each is given to the model alone. Quantisation is off (adv-lib's DDN has it on by default). ``strength_norm_images.csv``
has a row for each image and a column for each method.
"""

import argparse
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _timing import Results, Session, environment
from torch import Tensor, nn
from train_cnn import test_images, trained_cnn

from fastlip import attacks
from fastlip.attacks import count_forward_backward
from fastlip.ops import Norm

RESULTS = Path(__file__).parent / "results"
ORDER: dict[Norm, float] = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
#: Norms and radii of the suites.
THREATS: list[tuple[Norm, float]] = [
    ("linf", 1 / 255), ("linf", 2 / 255), ("linf", 4 / 255), ("l2", 0.25), ("l1", 6.0),
]  # fmt: skip
#: What fastlip's own ways have of evaluate's options.
SUITES: dict[str, dict[str, Any]] = {"fastlip": {}, "fastlip, fast": {"fast": True}}
#: Radius at which adv-lib's minimal APGD begins, half of the largest that it tries; above nearly all norms found.
FIRST: dict[Norm, float] = {"linf": 8 / 255, "l2": 1.0, "l1": 12.0}
Method = Callable[[nn.Module, Tensor, Tensor], Tensor]


def name_of(norm: Norm, eps: float) -> str:
    """A threat in words."""
    return f"Linf {eps * 255:g}/255" if norm == "linf" else f"{norm.upper()} {eps:g}"


def lengths(x: Tensor, x0: Tensor, norm: Norm) -> Tensor:
    """Lengths of perturbations, [B] float64."""
    return torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), ORDER[norm], dim=1)


def median(values: Tensor) -> float:
    """The median of [N] numbers, between the two in the middle where N is even; torch's own is the lower one."""
    ordered = values.double().sort().values
    return ((ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2).item()


@torch.no_grad()
def decisions(model: nn.Module, images: Tensor, size: int = 250) -> Tensor:
    """The model's classes, [N] int64, in batches of one size."""
    return torch.cat([model(part).argmax(1) for part in images.split(size)])


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``run`` returns, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def auto_attack(model: nn.Module, norm: Norm, eps: float, images: Tensor, labels: Tensor) -> Tensor:
    """AutoAttack's standard version, [N, ...]."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attack = AutoAttack(model, norm=norm.capitalize(), eps=eps, version="standard", seed=0, device="cpu")
    return attack.run_standard_evaluation(images, labels, batch_size=250)[0]


def robust_of(model: nn.Module, x: Tensor, images: Tensor, labels: Tensor, norm: Norm, eps: float) -> Tensor:
    """Whether each image stands what an attack made of it, [N] bool."""
    # Rounding: of each element of x in float32, and of the projections of AutoAttack, which are sums in float32.
    allowed = eps * (1 + 1e-5) + (2.0**-24 if norm == "linf" else 0.0)
    inside = (lengths(x, images, norm) <= allowed) & ((x >= 0) & (x <= 1)).flatten(1).all(1)
    return (decisions(model, images) == labels) & ~(inside & (decisions(model, x) != labels))


def suites(args: argparse.Namespace) -> None:
    images, labels = (t[args.first : args.first + args.images] for t in test_images(os.environ["FASTLIP_DATA"]))
    shared = environment("cpu") | {"pyautoattack": version("pyautoattack")}
    out = Results(RESULTS / f"{args.name}_suites.csv", shared, keys=("network", "norm", "eps", "what"))
    each = Results(RESULTS / f"{args.name}_suite_images.csv", digits=6, keys=("network", "norm", "eps", "image"))
    session = Session(args.seconds)

    def measure(path: Path, norm: Norm, eps: float) -> None:
        model, key = trained_cnn(path), {"network": path.stem, "norm": norm, "eps": eps}
        clean = decisions(model, images) == labels
        ids = range(args.first, args.first + args.images)
        methods: dict[str, Callable[[], tuple[Tensor, str]]] = {
            "AutoAttack": lambda: (auto_attack(model, norm, eps, images, labels), "")
        }
        for name in args.suites:
            methods[name] = partial(evaluated, model, norm, eps, images, labels, SUITES[name])
        # What is compared in time is measured in one run.
        again = args.again or any(
            (row := out.find(key | {"what": name})) is None or int(row["images"]) != len(images) for name in methods
        )
        stands: dict[str, Tensor] = {}
        for name, method in methods.items() if again else ():
            (x, parts), wall, cpu = timed(method)
            stands[name] = robust_of(model, x, images, labels, norm, eps)
            row = key | {"what": name, "images": len(images), "clean": int(clean.sum())}
            row |= {"robust": int(stands[name].sum()), "wall_s": wall, "cpu_s": cpu}
            peer = row if name == "AutoAttack" else out.find(key | {"what": "AutoAttack"})
            assert peer is not None
            row |= {"x_wall": wall / float(peer["wall_s"]), "x_cpu": cpu / float(peer["cpu_s"])}
            missed = stands[name] & ~stands["AutoAttack"]
            row |= {"fooled_alone": int((stands["AutoAttack"] & ~stands[name]).sum()), "missed": int(missed.sum())}
            row |= {"which_missed": " ".join(str(ids[i]) for i in missed.nonzero().flatten().tolist())}
            out.add(row | {"seconds_each": parts})
            print(row, parts, flush=True)
            for i, of_image in enumerate(clean.tolist()):
                known = each.find(key | {"image": ids[i]}) or {}
                each.add(known | key | {"image": ids[i], "clean": int(of_image), name: int(stands[name][i])})

    for path in args.checkpoint:
        for norm, eps in THREATS:
            if not args.threat or name_of(norm, eps) in args.threat:
                session.attempt(f"{path.stem} {name_of(norm, eps)}", lambda p=path, n=norm, e=eps: measure(p, n, e))
    session.close()


def evaluated(
    model: nn.Module, norm: Norm, eps: float, images: Tensor, labels: Tensor, options: dict[str, Any]
) -> tuple[Tensor, str]:
    """Images [N, ...] of the standard suite, and the seconds of its attacks in words."""
    report = attacks.evaluate(model, images, labels, norm=norm, eps=eps, check=False, **options)
    return report.adversarial, " ".join(f"{attack}:{seconds:.1f}" for attack, seconds in report.seconds.items())


def ours(norm: Norm, calls: int) -> dict[str, Method]:
    """Our methods within ``calls`` forward and backward passes."""

    def run(**options: Any) -> Method:
        return lambda model, x, y: attacks.min_norm(model, x, y, norm=norm, **options).adversarial

    # Of the passes, one is the estimate's, and some are those that pull back what was found and make it hold.
    radii = max(calls // 35, 2)
    return {
        "fastlip fmn": run(method="fmn", fmn_steps=calls - 10),
        "fastlip search": run(method="search", search_steps=radii, steps=calls // radii - 8, tolerance=0.001),
    }


def peers(norm: Norm, calls: int) -> dict[str, Method]:
    """adversarial-library's methods within ``calls`` passes, with their own defaults but for the number of steps."""
    from adv_lib.attacks import alma, ddn, fmn, pdgd, pdpgd
    from adv_lib.attacks.auto_pgd import minimal_apgd

    order, few = ORDER[norm], calls < 1000
    # As many radii and steps as the passes allow; a run of n steps has n + 1 passes and one more judges it. A hundred
    # passes are too few for several classes.
    radii, classes = 9, 5
    out: dict[str, Method] = {
        "FMN": lambda m, x, y: fmn(m, x, y, norm=order, steps=calls),
        # Its first rate is made for more steps: in a hundred it would not come back from where that leads.
        "PDPGD": lambda m, x, y: pdpgd(
            m, x, y, norm=order, num_steps=calls, primal_lr=0.01 if few and norm != "l1" else 0.1
        ),
        "APGD, minimal": lambda m, x, y: minimal_apgd(
            m, x, y, norm=order, max_eps=FIRST[norm], binary_search_steps=5 if few else 10,
            n_iter=calls // (5 if few else 10) - 3, use_large_reps=norm == "l1",
        ),
    }  # fmt: skip
    if not few:
        out["APGD-T, minimal"] = lambda m, x, y: minimal_apgd(
            m, x, y, norm=order, max_eps=FIRST[norm], binary_search_steps=radii, targeted_version=True,
            n_iter=calls // (radii * classes) - 3, num_targets=classes, use_large_reps=norm == "l1",
        )  # fmt: skip
    if norm == "l2":
        out["DDN"] = lambda m, x, y: ddn(m, x, y, steps=calls, levels=None)
        out["PDGD"] = lambda m, x, y: pdgd(m, x, y, num_steps=calls, primal_lr=0.01 if few else 0.1)
    if norm != "linf":
        out["ALMA"] = lambda m, x, y: alma(
            m, x, y, num_steps=calls, distance=norm, init_lr_distance=0.25 if norm == "l2" else 0.5
        )
    return out


def norms(args: argparse.Namespace) -> None:
    shared = environment("cpu") | {"adv_lib": version("adv-lib")}
    out = Results(RESULTS / f"{args.name}_norms.csv", shared, 5, keys=("network", "norm", "calls", "what"))
    each = Results(RESULTS / f"{args.name}_norm_images.csv", digits=6, keys=("network", "norm", "calls", "image"))
    session = Session(args.seconds)

    def measure(path: Path, norm: Norm, calls: int) -> None:
        model, key = trained_cnn(path), {"network": path.stem, "norm": norm, "calls": calls}
        images, labels = (t[args.first : args.first + 4 * args.images] for t in test_images(os.environ["FASTLIP_DATA"]))
        ids = (decisions(model, images) == labels).nonzero().flatten()[: args.images]
        x, y, numbers = images[ids], labels[ids], [args.first + i for i in ids.tolist()]
        methods = ours(norm, calls) | ({} if args.no_peers else peers(norm, calls))
        for name, method in methods.items():
            if args.method and name not in args.method:
                continue
            known = out.find(key | {"what": name})
            if known and int(known["images"]) == len(x) and not args.again:
                continue
            torch.manual_seed(0)

            def attacked(method: Method = method) -> Tensor:
                return torch.cat(
                    [method(model, a, b) for a, b in zip(x.split(args.batch), y.split(args.batch), strict=True)]
                )

            with count_forward_backward(model) as passes:
                adversarial, wall, cpu = timed(attacked)
            adversarial = adversarial.detach()
            wrong = (decisions(model, adversarial) != y) & ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
            found = torch.where(wrong, lengths(adversarial, x, norm), torch.inf)
            alone = decisions(model, adversarial, 1) != y
            row = key | {"what": name, "images": len(x)}
            row |= {"forward": passes.forward / len(x), "backward": passes.backward / len(x)}
            row |= {"found": int(wrong.sum()), "lost": int((wrong & ~alone).sum())}
            row |= {"median": median(found), "mean": found[found.isfinite()].mean().item()}
            for number, length in zip(numbers, found.tolist(), strict=True):
                each.add((each.find(key | {"image": number}) or {}) | key | {"image": number, name: length})
            out.add(row | {"wall_s": wall, "cpu_s": cpu})
            print(row, flush=True)
            compare(key)
        for row in compare(key):
            print({k: row[k] for k in ("network", "norm", "calls", "what", "median", "x_median", "wins")}, flush=True)

    def compare(key: dict[str, Any]) -> list[dict[str, Any]]:
        """Fill in how each method of one measurement compares with the best peer so far; the methods' rows."""
        rows = [r for r in out.rows if all(str(r[k]) == str(v) for k, v in key.items())]
        table = [r for r in each.rows if all(str(r[k]) == str(v) for k, v in key.items())]
        found = {r["what"]: torch.tensor([float(t[r["what"]]) for t in table], dtype=torch.float64) for r in rows}
        others = [name for name in found if not name.startswith("fastlip")]
        least = min((median(found[name]) for name in others), default=math.nan)
        for row in rows:
            mine, rivals = found[row["what"]], [found[name] for name in others if name != row["what"]]
            nearest = torch.stack(rivals).amin(0) if rivals else torch.full_like(mine, torch.nan)
            row |= {"x_median": median(mine) / least, "wins": int((mine <= nearest).sum())}
            row |= {"within_1%": int((mine <= 1.01 * nearest).sum())}
        out.rewrite()
        return rows

    for path in args.checkpoint:
        for norm in args.norm:
            for calls in args.calls:
                session.attempt(f"{path.stem} {norm} {calls}", lambda p=path, n=norm, c=calls: measure(p, n, c))
    session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["suites", "norms"])
    parser.add_argument("checkpoint", type=Path, nargs="*", help="networks of train_cnn.py")
    parser.add_argument("--images", type=int, default=256, help="how many; for norms, that are classified correctly")
    parser.add_argument("--first", type=int, default=0, help="position of the first one among the test images")
    parser.add_argument("--again", action="store_true", help="measure what an earlier run has measured, too")
    parser.add_argument("--batch", type=int, default=256, help="images that an attack on norms gets at once")
    parser.add_argument("--threat", nargs="*", help="such as 'Linf 1/255'; all if not given")
    parser.add_argument("--suites", nargs="*", default=list(SUITES))
    parser.add_argument("--norm", choices=list(ORDER), nargs="*", default=list(ORDER))
    parser.add_argument("--calls", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--method", nargs="*", help="methods by name; all if not given")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="strength", help="how the files of results begin")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many seconds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    {"suites": suites, "norms": norms}[args.part](args)


if __name__ == "__main__":
    sys.exit(main())

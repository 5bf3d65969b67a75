"""How much of the eps budget the projections of attack libraries use, and whether they exceed it.

    pip install torchattacks foolbox adversarial-robustness-toolbox pyautoattack attackbenchlib
    pip install --no-deps adv-lib visdom cleverhans robustness secml-torch
    python benchmarks/bench_projections.py

Each library projects 10,000 points x0 + d onto the eps ball around x0 and the box [0, 1], with its own function or,
where it has none, by one step of its attack on a model whose gradient is along d; that the step arrives at x0 + d is
checked with an eps that does not bind. A third of the images x0 are uniform, in a third half of the pixels are exactly
0 or 1, in the last most lie within 0.001 of a face. The perturbations d (signs in Linf; normal, heavy-tailed and sparse
ones in L2 and L1) are 1.02 to 20 times as long as eps, and in a sixth of the batches half as long. eps is 8/255, 0.5
and 12. APGD's first step is always twice eps.

Columns. ``share``: the norm of what is left of d, over that of the Euclidean projection onto ball and box, which is
min(eps, ||clip(x0 + d) - x0||); for points beyond the ball. ``inside``: the largest |share - 1| of points inside.
``farther``: how much farther from x0 + d the result lies than the Euclidean projection, on average, relative.
``excess``: the largest ||result - x0|| - eps; ``over``: how many points exceed eps by more than roundings of float32
can explain, half a unit in the last place at 1 for each pixel. ``box``: how far the result leaves [0, 1]. A library
that is not installed is named and left out. About three minutes on one core.
"""

import argparse
import importlib.metadata
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment
from torch import Tensor, nn

import fastlip

RESULTS = Path(__file__).parent / "results"
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
P = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
#: ||d|| / eps of successive batches.
RATIOS = (1.02, 1.5, 2.0, 5.0, 20.0, 0.5)
SHAPE = (3, 32, 32)
Projection = Callable[[Tensor, Tensor, float], Tensor]


def size(d: Tensor, norm: str) -> Tensor:
    """The norm of each perturbation; [B] float64."""
    return torch.linalg.vector_norm(d.double().flatten(1), P[norm], dim=1)


def inputs(count: int, norm: str, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and perturbations ``ratio`` times as long as eps; each [count, *SHAPE] float32."""
    x0 = torch.rand(count, *SHAPE, generator=generator)
    kind = (torch.arange(count) % 3).reshape(-1, 1, 1, 1)
    coin = torch.rand(x0.shape, generator=generator)
    near = torch.where(coin < 0.4, 1e-3 * x0, torch.where(coin < 0.8, 1.0 - 1e-3 * x0, x0))
    x0 = torch.where(kind == 1, torch.where(coin < 0.5, x0.round(), x0), torch.where(kind == 2, near, x0))
    d = torch.randn(x0.shape, generator=generator)
    if norm == "linf":
        d = d.sign()
    else:
        shape = (torch.arange(count) // 3 % 3).reshape(-1, 1, 1, 1)
        kept = torch.rand(x0.shape, generator=generator) < 0.01
        d = torch.where(shape == 1, d**3, torch.where(shape == 2, d * kept, d))
    return x0, (d * (ratio * EPS[norm] / size(d, norm)).float().reshape(-1, 1, 1, 1))


def nearest(x0: Tensor, d: Tensor, eps: float, norm: str) -> Tensor:
    """The Euclidean projection of x0 + d onto ball and box, by bisection for its multiplier; float64."""
    x0, d = x0.double(), d.double()
    if norm == "linf":
        return (x0 + d.clamp(-eps, eps)).clamp(0.0, 1.0)

    def at(m: Tensor) -> Tensor:
        m = m.reshape(-1, 1, 1, 1)
        shrunk = d / (1.0 + m) if norm == "l2" else d.sign() * (d.abs() - m).clamp(min=0.0)
        return (x0 + shrunk).clamp(0.0, 1.0)

    low = torch.zeros(len(d), dtype=torch.float64)
    high = size(d, norm) / eps if norm == "l2" else d.flatten(1).abs().amax(1)
    high = torch.where(size(at(low) - x0, norm) <= eps, low, high)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = size(at(middle) - x0, norm) > eps
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return at(high)


@dataclass
class Score:
    """What a projection did, gathered over batches."""

    norm: str
    share: list[Tensor] = field(default_factory=list)
    inside: float | str = ""
    farther: list[Tensor] = field(default_factory=list)
    excess: float = -math.inf
    over: int = 0
    box: float = 0.0

    def add(self, x0: Tensor, d: Tensor, best: Tensor, result: Tensor) -> None:
        """Judge one batch, all [B, *SHAPE]: ``best`` from :func:`nearest`, ``result`` as the library gives it."""
        eps, found = EPS[self.norm], result.double()
        left = size(found - x0.double(), self.norm)
        # The library may have added d in float32, so that the point itself is off by half a unit in the last place.
        rounding = size(torch.full_like(d[:1], 2.0**-25), self.norm).item() + 1e-6 * eps
        share = left / size((x0.double() + d.double()).clamp(0.0, 1.0) - x0.double(), self.norm).clamp(max=eps)
        if size(d[:1], self.norm).item() < eps:
            self.inside = max(self.inside or 0.0, (share - 1.0).abs().max().item())
        else:
            self.share.append(share)
            way = x0.double() + d.double()
            self.farther.append(size(found - way, "l2") / size(best - way, "l2") - 1.0)
        self.excess = max(self.excess, (left - eps).max().item())
        self.over += int((left > eps + rounding).sum())
        self.box = max(self.box, (-found).max().item(), (found - 1.0).max().item())

    def row(self) -> dict[str, Any]:
        share = torch.cat(self.share)
        return {
            "norm": self.norm, "eps": EPS[self.norm], "share_mean": share.mean().item(),
            "share_p1": share.quantile(0.01).item(), "share_min": share.min().item(), "share_max": share.max().item(),
            "inside": self.inside, "farther": torch.cat(self.farther).mean().item(), "excess": self.excess,
            "over": self.over, "box": max(self.box, 0.0),
        }  # fmt: skip


class Driven(nn.Module):
    """Two logits whose cross-entropy for label 0 has a gradient along d everywhere; beyond x0 the decision is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # libraries look for a parameter's device

    def aim(self, x0: Tensor, d: Tensor) -> None:
        self.x0, self.d = x0, d

    def forward(self, x: Tensor) -> Tensor:
        # Scaled so that the softmax does not saturate anywhere on the way.
        along = ((x - self.x0) * self.d).flatten(1).sum(1) / self.d.square().flatten(1).sum(1)
        return torch.stack([-along, along], 1) * self.scale


@dataclass(frozen=True)
class Peer:
    """A library's projection in one norm.

    Attributes:
        library: its name for pip.
        what: the function or attack.
        norm: "linf", "l2" or "l1".
        project: (x0, d, eps) -> the projected points.
        step: whether it is one step of an attack, whose length is checked.
        ratio: the only length of a step that it can take, over eps; None for any.
    """

    library: str
    what: str
    norm: str
    project: Projection
    step: bool = False
    ratio: float | None = None


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


def fastlip_peers() -> Iterator[Peer]:
    for norm in EPS:
        yield Peer(
            "fastlip", "ops.project", norm,
            lambda x0, d, eps, norm=norm: fastlip.ops.project(x0 + d, x0, eps=eps, norm=norm),
        )  # fmt: skip


def torchattacks_peers() -> Iterator[Peer]:
    import torchattacks

    model = Driven()

    def step(norm: str) -> Projection:
        def run(x0: Tensor, d: Tensor, eps: float) -> Tensor:
            model.aim(x0, d)
            length = size(d[:1], norm).item()
            kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
            return kind(model, eps=eps, alpha=length, steps=1, random_start=False)(x0, zeros(x0))

        return run

    yield Peer("torchattacks", "PGD", "linf", step("linf"), True)
    yield Peer("torchattacks", "PGDL2", "l2", step("l2"), True)


def foolbox_peers() -> Iterator[Peer]:
    import eagerpy as ep
    import foolbox

    def step(attack: Any) -> Projection:
        def run(x0: Tensor, d: Tensor, eps: float) -> Tensor:
            x, center = ep.astensor(x0 + d), ep.astensor(x0)
            return ep.clip(attack.project(x, center, eps), 0.0, 1.0).raw

        return run

    for name, norm in (("LinfPGD", "linf"), ("L2PGD", "l2"), ("L1PGD", "l1"), ("SparseL1DescentAttack", "l1")):
        attack = getattr(foolbox.attacks, name)()
        yield Peer("foolbox", f"{name}.project, clip", norm, step(attack))


def art_peers() -> Iterator[Peer]:
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = Driven()
    estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, 2, clip_values=(0.0, 1.0), device_type="cpu")

    def step(norm: str) -> Projection:
        def run(x0: Tensor, d: Tensor, eps: float) -> Tensor:
            model.aim(x0, d)
            attack = ProjectedGradientDescentPyTorch(
                estimator, np.inf if norm == "linf" else int(P[norm]), eps, size(d[:1], norm).item(), max_iter=1,
                num_random_init=0, batch_size=len(x0), verbose=False,
            )  # fmt: skip
            return torch.from_numpy(attack.generate(x0.numpy(), np.zeros(len(x0), dtype=np.int64)))

        return run

    def scaled(x0: Tensor, d: Tensor, eps: float) -> Tensor:
        # The attack's own step in L1 goes along one coordinate; what follows it is this: the box, then the ball.
        left = (x0 + d).clamp(0.0, 1.0) - x0
        return x0 + ProjectedGradientDescentPyTorch._projection(left, eps, 1)

    for norm in ("linf", "l2"):
        yield Peer("adversarial-robustness-toolbox", "ProjectedGradientDescentPyTorch", norm, step(norm), True)
    yield Peer("adversarial-robustness-toolbox", "ProjectedGradientDescentPyTorch._projection", "l1", scaled)


def autoattack_peers() -> Iterator[Peer]:
    from pyautoattack.autopgd_base import APGDAttack, L1_projection

    model = Driven()

    def step(norm: str) -> Projection:
        def run(x0: Tensor, d: Tensor, eps: float) -> Tensor:
            model.aim(x0, d)
            name = "Linf" if norm == "linf" else "L2"
            attack = APGDAttack(model, n_iter=1, norm=name, eps=eps, loss="ce", device="cpu")
            attack.init_hyperparam(x0)
            return attack.attack_single_run(x0, zeros(x0), x_init=x0)[3].detach()

        return run

    yield Peer("pyautoattack", "APGDAttack", "linf", step("linf"), True, 2.0)
    yield Peer("pyautoattack", "APGDAttack", "l2", step("l2"), True, 2.0)
    yield Peer("pyautoattack", "L1_projection", "l1", _croce(L1_projection))


def _croce(function: Callable[..., Tensor]) -> Projection:
    """Functions that return what to add to the perturbation, as APGD-L1 uses them."""
    return lambda x0, d, eps: x0 + d + function(x0, d, eps).view(x0.shape)


def attackbench_peers() -> Iterator[Peer]:
    from attackbench.attacks.original.auto_pgd import L1_projection

    yield Peer("attackbenchlib", "original.auto_pgd.L1_projection", "l1", _croce(L1_projection))


def adv_lib_peers() -> Iterator[Peer]:
    from adv_lib.attacks import auto_pgd, pgd_linf
    from adv_lib.attacks import fast_minimum_norm as fmn

    model = Driven()

    def pgd(x0: Tensor, d: Tensor, eps: float) -> Tensor:
        model.aim(x0, d)
        length = size(d[:1], "linf").item()
        # Its last step is not evaluated, so that the result is the one before.
        return pgd_linf(model, x0, zeros(x0), eps, steps=2, random_init=False, absolute_step_size=length)

    def minimum(function: Callable[[Tensor, Tensor], Tensor]) -> Projection:
        def run(x0: Tensor, d: Tensor, eps: float) -> Tensor:
            left = function(d.clone(), torch.full((len(d),), eps)).view(x0.shape)
            return (x0 + left).clamp(0.0, 1.0)

        return run

    yield Peer("adv-lib", "pgd_linf", "linf", pgd, True)
    for norm in EPS:
        function = getattr(fmn, f"{norm}_projection_")
        yield Peer("adv-lib", f"fmn {norm}_projection_, clamp", norm, minimum(function))
    whole = _croce(lambda x0, d, eps: auto_pgd.l1_projection(x0, d, torch.full((len(d),), eps)))
    yield Peer("adv-lib", "auto_pgd.l1_projection", "l1", whole)


def cleverhans_peers() -> Iterator[Peer]:
    from cleverhans.torch.utils import clip_eta

    for norm in ("linf", "l2"):
        p = math.inf if norm == "linf" else 2
        yield Peer(
            "cleverhans", "clip_eta, clamp", norm,
            lambda x0, d, eps, p=p: (x0 + clip_eta(d.clone(), p, eps)).clamp(0.0, 1.0),
        )  # fmt: skip


def robustness_peers() -> Iterator[Peer]:
    from robustness.attack_steps import L2Step, LinfStep

    for kind, norm in ((LinfStep, "linf"), (L2Step, "l2")):
        yield Peer(
            "robustness", f"{kind.__name__}.project", norm,
            lambda x0, d, eps, kind=kind: kind(x0, eps, 0.0).project(x0 + d),
        )  # fmt: skip


def secmlt_peers() -> Iterator[Peer]:
    from secmlt.optimization.constraints import ClipConstraint, L1Constraint, L2Constraint, LInfConstraint

    for kind, norm in ((LInfConstraint, "linf"), (L2Constraint, "l2"), (L1Constraint, "l1")):
        yield Peer(
            "secml-torch", f"{kind.__name__}, ClipConstraint", norm,
            lambda x0, d, eps, kind=kind: ClipConstraint(0.0, 1.0)(x0 + kind(eps)(d)),
        )  # fmt: skip


LIBRARIES: dict[str, Callable[[], Iterator[Peer]]] = {
    "fastlip": fastlip_peers,
    "torchattacks": torchattacks_peers,
    "foolbox": foolbox_peers,
    "adversarial-robustness-toolbox": art_peers,
    "pyautoattack": autoattack_peers,
    "attackbenchlib": attackbench_peers,
    "adv-lib": adv_lib_peers,
    "cleverhans": cleverhans_peers,
    "robustness": robustness_peers,
    "secml-torch": secmlt_peers,
}


def takes_the_step(peer: Peer) -> bool:
    """Whether one step with a large eps arrives at clip(x0 + d), so that this point is what is projected otherwise."""
    if not peer.step or peer.ratio is not None:  # APGD's step is twice its eps, and its own first
        return True
    x0, d = inputs(30, peer.norm, 2.0, torch.Generator().manual_seed(1))
    reached = peer.project(x0, d, 1e4)
    return bool((reached - (x0 + d).clamp(0.0, 1.0)).abs().max() < 1e-5)


def measure(peers: Sequence[Peer], count: int, batch: int = 250) -> list[dict[str, Any]]:
    """Project ``count`` points in batches of ``batch`` by peers of one norm and ratio: a row each, seconds included."""
    norm, fixed = peers[0].norm, peers[0].ratio
    scores, seconds = [Score(norm) for _ in peers], [0.0 for _ in peers]
    for peer in peers:
        if not takes_the_step(peer):
            raise RuntimeError(f"{peer.library} {peer.what}: a step is not along d, so that it is not projected")
        peer.project(*inputs(30, norm, fixed or 2.0, torch.Generator().manual_seed(2)), EPS[norm])  # warms up
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch):
        x0, d = inputs(min(batch, count - start), norm, fixed or RATIOS[start // batch % len(RATIOS)], generator)
        best = nearest(x0, d, EPS[norm], norm)
        for i, peer in enumerate(peers):
            given = x0.clone(), d.clone()
            begin = time.perf_counter()
            result = peer.project(*given, EPS[norm])
            seconds[i] += time.perf_counter() - begin
            scores[i].add(x0, d, best, result)
    return [
        {
            "library": peer.library, "version": importlib.metadata.version(peer.library), "what": peer.what,
            "how": "one step" if peer.step else "function", "points": count, **score.row(),
            "seconds_per_1000": taken / count * 1000,
        }
        for peer, score, taken in zip(peers, scores, seconds, strict=True)
    ]  # fmt: skip


COLUMNS = (
    "library", "version", "what", "how", "norm", "eps", "points", "share_mean", "share_p1", "share_min", "share_max",
    "inside", "farther", "excess", "over", "box", "seconds_per_1000",
)  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    columns = ("norm", "library", "version", "what", "share: mean", "1%", "min", "inside", "farther", "over", "excess")
    columns += ("box", "s / 1,000")
    lines = [
        "# How much of eps the projections of attack libraries use", "",
        "Made by `python benchmarks/bench_projections.py`, which says what the columns mean; do not edit.", "",
        f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
    ]  # fmt: skip
    for row in rows:
        inside = format(row["inside"], ".1e") if row["inside"] != "" else "-"
        shares = [format(row[name], ".4f") for name in ("share_mean", "share_p1", "share_min")]
        cells = [
            row["norm"],
            row["library"],
            row["version"],
            row["what"],
            *shares,
            inside,
            format(row["farther"], ".1e"),
        ]
        cells += [str(row["over"]), f"{row['excess']:.1e}", f"{row['box']:.1e}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds_per_1000'], '.3f')])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=list(LIBRARIES), nargs="*", default=list(LIBRARIES))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peers: list[Peer] = []
    for library in args.library:
        try:
            peers += LIBRARIES[library]()
        except ImportError as missing:
            print(f"{library}: left out, {missing} (pip install {library})", flush=True)
    results = Results(args.out / "projections.csv", environment("cpu"))
    for norm in EPS:
        for ratio in (None, 2.0):
            alike = [peer for peer in peers if (peer.norm, peer.ratio) == (norm, ratio)]
            for row in measure(alike, args.count) if alike else ():
                print(*(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True)
                results.add({c: row[c] for c in COLUMNS})
    (args.out / "projections.md").write_text(summary(results.rows))


if __name__ == "__main__":
    main()

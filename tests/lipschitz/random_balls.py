"""Random networks on random balls: local Lipschitz bounds against the stretches that a search finds inside.

An independent judge of :func:`fastlip.lipschitz.local_lipschitz_bounds`, on the networks of random_networks.py that are
not hostile. The search runs the network alone, in float64.

    python tests/lipschitz/random_balls.py --seeds 0:2000
"""

import argparse
import math
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from random_networks import Network, build, random_network
from torch import Tensor, nn

from fastlip.lipschitz import BallBounds, local_lipschitz_bounds

#: Radii of the balls of one network, in units of the size of its inputs.
_RADII = (1e-4, 0.03, 0.5)
#: Points of a ball to start from, and steps of the search from there.
_POINTS, _STEPS = 24, 6
#: Share of the radius by which neighbouring points differ, and what is taken for rounding.
_NEAR, _ROUNDING = 1e-4, 1e-9
#: By how much rounding may lift what is found, where large values inside of a network cancel.
_UNCERTAIN = 1e-4


@dataclass
class BallVerdict:
    """What became of one network.

    Attributes:
        seed: of the network, its balls and the search.
        outcome: "accepted", "refused", "crashed", or "left out" if hostile or not to be run in float64.
        reason: the refusal or error.
        bounds: of the local constants; None unless accepted.
        found: the largest stretch found in each ball.
    """

    seed: int
    outcome: str
    reason: str = ""
    bounds: BallBounds | None = None
    found: tuple[float, ...] = ()

    @property
    def unsound(self) -> bool:
        """Whether an upper side is below a lower one, or below what was found."""
        if self.bounds is None:
            return False
        lower, upper = self.bounds.lower, self.bounds.upper
        found = torch.tensor(self.found, dtype=torch.float64)
        return bool((lower > upper * (1.0 + 1e-6)).any() or (found > upper * (1.0 + _UNCERTAIN)).any())


def judge_balls(seed: int) -> BallVerdict:
    """Bound a network on three balls, and look for larger stretches in them."""
    network = random_network(seed)
    try:
        if network.hostile:
            return BallVerdict(seed, "left out")
        model, generator = network.model.eval(), torch.Generator().manual_seed(seed)
        size = 10.0 ** (3.0 * torch.rand((), generator=generator).item() - 2.0)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        x = (size * torch.randn(len(_RADII), *network.input_shape, generator=generator)).to(dtype)
        norm, radius = ("l2", "linf")[seed % 2], size * torch.tensor(_RADII)
        try:
            bounds = local_lipschitz_bounds(model, x, radius, norm=norm, points=2, generator=generator)
        except ValueError as error:
            return BallVerdict(seed, "refused", str(error))
        except Exception as error:
            return BallVerdict(seed, "crashed", f"{type(error).__name__}: {error}")
    finally:
        network.close()
    found = _found(network, x, bounds.radius, norm, generator)
    if found is None:
        return BallVerdict(seed, "left out", "does not run in float64")
    return BallVerdict(seed, "accepted", bounds=bounds, found=found)


def _found(
    network: Network, x: Tensor, radius: Tensor, norm: str, generator: torch.Generator
) -> tuple[float, ...] | None:
    own = build(network.program, network.input_shape, network.traits, network.seed)
    try:
        wide = own.model.eval().double()
        try:
            if wide(x.double()).dtype != torch.float64:  # float32's rounding would pass for stretches
                return None
        except (RuntimeError, TypeError, ValueError):
            return None
        balls = zip(x.double(), radius.tolist(), strict=True)
        return tuple(largest_stretch_in_ball(wide, centre, r, norm, generator) for centre, r in balls)
    finally:
        own.close()


def largest_stretch_in_ball(
    model: nn.Module, centre: Tensor, radius: float, norm: str, generator: torch.Generator
) -> float:
    """The largest ||f(x) - f(y)|| / ||x - y|| seen for two points of a ball, where rounding does not hide it."""

    def within(points: Tensor) -> Tensor:
        moved, rows = points - centre, (-1, *(1,) * centre.dim())
        if norm == "linf":
            return centre + moved.clamp(-radius, radius)
        return centre + moved * (radius / moved.flatten(1).norm(dim=1).clamp_min(radius)).view(rows)

    def stretch(a: Tensor, b: Tensor, fa: Tensor, fb: Tensor) -> float:
        moved, apart = (fa - fb).norm(dim=1), (a - b).flatten(1).norm(dim=1)
        seen = (apart > 0.0) & (moved > 1e2 * _ROUNDING * (fa.norm(dim=1) + fb.norm(dim=1)))
        return (moved / apart)[seen].max().item() if bool(seen.any()) else 0.0

    with torch.no_grad():
        draws = torch.randn(2 * _POINTS, *centre.shape, generator=generator, dtype=torch.float64)
        if norm == "linf":
            draws = torch.cat(
                [draws[:_POINTS].sign(), 2.0 * torch.rand(draws[:_POINTS].shape, generator=generator) - 1.0]
            )
        else:
            draws = draws / draws.flatten(1).norm(dim=1).view(-1, *(1,) * centre.dim())
            draws[_POINTS:] *= torch.rand(_POINTS, *(1,) * centre.dim(), generator=generator)
        points = torch.cat([centre[None], within(centre + radius * draws)])
        values = model(points.clone()).flatten(1)
        order = torch.randperm(len(points), generator=generator)
        best = stretch(points, points[order], values, values[order])
    direction = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    for _ in range(_STEPS):
        direction = direction / direction.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *(1,) * centre.dim())
        beside = within(points + _NEAR * radius * direction)
        leaf = points.clone().requires_grad_()
        here = model(leaf.clone()).flatten(1)
        there = model(beside.clone()).flatten(1).detach()
        best = max(best, stretch(points, beside, here.detach(), there))
        if not here.requires_grad:
            break
        (direction,) = torch.autograd.grad((here * (there - here.detach())).sum(), leaf, allow_unused=True)
        if direction is None or not bool(direction.isfinite().all()):
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge local_lipschitz_bounds on random networks and balls.")
    parser.add_argument("--seeds", default="0:100", help="first and last (exclusive) seed, as 0:2000")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    ratios = []
    for seed in range(*map(int, parser.parse_args().seeds.split(":"))):
        verdict = judge_balls(seed)
        counts["unsound" if verdict.unsound else verdict.outcome] += 1
        if verdict.unsound or verdict.outcome == "crashed":
            print(verdict, flush=True)
        if verdict.bounds is not None:
            pairs = zip(verdict.bounds.upper.tolist(), verdict.found, strict=True)
            ratios += [upper / found for upper, found in pairs if found and upper < math.inf]
    ratios.sort()
    print(dict(counts), "median of upper sides over stretches found:", ratios[len(ratios) // 2] if ratios else "none")


if __name__ == "__main__":
    main()

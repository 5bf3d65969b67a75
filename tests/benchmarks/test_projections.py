"""What bench_projections.py says of projections that are known to be right and wrong."""

import csv
import math

import bench_projections as bench
import pytest
import torch
from torch import Tensor, nn


def scored(norm: str, project: bench.Projection) -> dict:
    peer = bench.Peer("fastlip", "test", norm, project)
    (row,) = bench.measure([peer], 36, batch=6)
    return row


def exact(norm: str) -> bench.Projection:
    return lambda x0, d, eps: bench.nearest(x0, d, eps, norm).float()


@pytest.mark.parametrize("norm", list(bench.EPS))
def test_an_exact_projection(norm):
    row = scored(norm, exact(norm))
    assert row["share_min"] == pytest.approx(1.0, abs=1e-5)
    assert row["inside"] < 1e-5
    assert abs(row["farther"]) < 1e-6
    assert (row["over"], row["box"]) == (0, 0.0)


@pytest.mark.parametrize("norm", list(bench.EPS))
def test_the_reference_is_the_nearest_point(norm):
    """No feasible point on the way to other feasible ones is nearer."""
    generator = torch.Generator().manual_seed(0)
    x0, d = bench.inputs(9, norm, 2.0, generator)
    best = bench.nearest(x0, d, bench.EPS[norm], norm)
    way = x0.double() + d.double()
    assert bench.size(best - x0.double(), norm).max() <= bench.EPS[norm] * (1 + 1e-9)
    for _ in range(20):
        z = bench.inputs(9, norm, 1.0, generator)[1]
        other = (x0.double() + z.double()).clamp(0.0, 1.0)
        # A point is the projection where no feasible direction makes an acute angle with what is cut off.
        assert ((way - best) * (other - best)).flatten(1).sum(1).max() <= 1e-6


def test_clipping_after_scaling_loses_budget():
    def scale_then_clip(x0: Tensor, d: Tensor, eps: float) -> Tensor:
        factor = (eps / bench.size(d, "l2")).clamp(max=1.0).float().reshape(-1, 1, 1, 1)
        return (x0 + factor * d).clamp(0.0, 1.0)

    row = scored("l2", scale_then_clip)
    assert row["share_min"] < 0.9
    assert row["farther"] > 1e-3
    assert row["over"] == 0


@pytest.mark.parametrize("norm", list(bench.EPS))
def test_a_ball_that_is_too_large_is_seen(norm):
    row = scored(norm, lambda x0, d, eps: bench.nearest(x0, d, 1.001 * eps, norm).float())
    assert row["over"] > 0
    assert row["excess"] == pytest.approx(1e-3 * bench.EPS[norm], rel=0.05)


def test_a_box_that_is_left_and_points_moved_inside_are_seen():
    def no_box(x0: Tensor, d: Tensor, eps: float) -> Tensor:
        return x0 + d.clamp(-eps, eps)

    assert scored("linf", no_box)["box"] > 0.01

    def to_the_sphere(x0: Tensor, d: Tensor, eps: float) -> Tensor:
        return (x0 + d * (eps / bench.size(d, "l2")).float().reshape(-1, 1, 1, 1)).clamp(0.0, 1.0)

    assert scored("l2", to_the_sphere)["inside"] > 0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_driven_step_follows_d(norm):
    model = bench.Driven()
    x0, d = bench.inputs(6, norm, 3.0, torch.Generator().manual_seed(0))
    model.aim(x0, d)
    x = x0.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), bench.zeros(x0)).backward()
    along = torch.nn.functional.cosine_similarity(x.grad.flatten(1), d.flatten(1))
    assert along.min().item() == pytest.approx(1.0, abs=1e-5)
    assert model(x0 + d).argmax(1).eq(1).all()
    still = bench.Peer("fastlip", "test", norm, lambda x0, d, eps: x0, step=True)
    assert not bench.takes_the_step(still)
    with pytest.raises(RuntimeError, match="not along d"):
        bench.measure([still], 6)


def test_committed_results_are_sound():
    with (bench.RESULTS / "projections.csv").open() as f:
        rows = list(csv.DictReader(f))
    table = (bench.RESULTS / "projections.md").read_text()
    assert all(f"| {row['library']} | {row['version']} | {row['what']} |" in table for row in rows)
    ours = [row for row in rows if row["library"] == "fastlip"]
    assert {row["norm"] for row in ours} == set(bench.EPS)
    for row in ours:
        assert math.isclose(float(row["share_min"]), 1.0, abs_tol=1e-4)
        assert (row["over"], float(row["box"])) == ("0", 0.0)

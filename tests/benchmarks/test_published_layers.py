"""What bench_published_layers.py measures, on layers whose constants are known."""

import csv
import math
from dataclasses import replace

import bench_published_layers as bench
import pytest
import torch
from _stretch import dense_matrix, frozen, is_affine, matrix_stretch, stretch, verdict
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def isometry(factor: float, **options: object) -> nn.Conv2d:
    """A 1x1 convolution by an orthogonal matrix times ``factor``, within a 3x3 kernel."""
    conv = nn.Conv2d(4, 4, 3, padding=1, **options)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 1, 1] = factor * torch.linalg.qr(torch.randn(4, 4)).Q
    return conv


def row(layer: nn.Module, shape: tuple[int, ...], **options: object) -> dict:
    case = bench.Case("torch", type(layer).__name__, "", lambda: layer, shape, **options)
    return bench.measure(layer.eval(), case, "initial")


def test_layers_that_hold_and_exceed_their_promise():
    torch.manual_seed(0)
    good, bad = row(isometry(1.0), (4, 6, 6), orthogonal=True), row(isometry(1.1), (4, 6, 6))
    assert good["verdict"] == "holds"
    assert good["smallest"] == pytest.approx(1.0, abs=1e-5)
    assert bad["verdict"] == "exceeds by 10%"
    assert bad["attained"] == pytest.approx(1.1, rel=1e-6)
    assert bad["pair"] == pytest.approx(1.1, rel=1e-6)
    assert bad["lower"] <= 1.1 * (1 + 1e-6)
    assert bad["upper"] >= 1.1 * (1 - 1e-6)
    assert not good["note"] + bad["note"]


def test_loose_below_and_tolerance():
    torch.manual_seed(0)
    assert row(isometry(0.5), (4, 6, 6))["verdict"] == "loose"
    assert row(isometry(1.1), (4, 6, 6), tolerance=0.2)["verdict"] == "holds"
    squeezed = nn.Linear(3, 3)
    with torch.no_grad():
        squeezed.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.5])))
    assert row(squeezed, (3,), orthogonal=True)["verdict"] == "below"
    assert row(squeezed, (3,))["verdict"] == "holds"
    assert row(squeezed, (3,), promised=math.nan)["verdict"] == "nothing promised"


def test_a_verdict_needs_the_layer_itself():
    found = stretch(isometry(1.1), (4, 6, 6))
    assert verdict(found, 1.0, 1e-5, False).startswith("exceeds")
    # What only the float64 copy shows may be its own.
    assert verdict(replace(found, pair=1.0), 1.0, 1e-5, False) == "holds"
    assert verdict(replace(found, pair=math.nan), 1.0, 1e-5, False) == "not finite"


def test_large_layers_are_iterated():
    torch.manual_seed(0)
    found = stretch(isometry(1.1), (4, 20, 20))
    assert found.method == "power iteration"
    assert found.attained == pytest.approx(1.1, rel=1e-5)


class Jump(nn.Module):
    """Constant but for a step of 1e-3 at 0.3 in the first coordinate."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-3 * (x > 0.3).to(x.dtype)


def test_search_finds_slopes_and_jumps():
    assert stretch(nn.LeakyReLU(1.5), (6,)).attained == pytest.approx(1.5, rel=1e-3)
    sharp = stretch(nn.Softplus(beta=10.0), (6,))
    assert 0.98 < sharp.attained <= 1.0 + 1e-9
    assert stretch(Jump(), (6,)).attained > 0.1


def test_the_frozen_copy_applies_the_layer_and_leaves_it_be():
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(5, 3)).eval()
    x = torch.randn(2, 5)
    before = layer(x)
    copy = frozen(layer)
    torch.testing.assert_close(copy(x.double()), before.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(x), before)
    assert torch.nn.utils.parametrize.is_parametrized(layer)


def test_dense_matrices_and_their_norms():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    with torch.no_grad():
        assert is_affine(layer, (5,))
        assert not is_affine(nn.ReLU(), (5,))
        torch.testing.assert_close(dense_matrix(layer, (5,)), layer.weight)
    for p, q in ((2.0, 2.0), (1.0, 1.0), (1.0, math.inf), (2.0, math.inf), (math.inf, math.inf)):
        norm, at = matrix_stretch(layer.weight.detach(), p, q)
        reached = torch.linalg.vector_norm(layer.weight @ at, q) / torch.linalg.vector_norm(at, p)
        assert reached.item() == pytest.approx(norm, rel=1e-12)
        x = torch.randn(5, 500, dtype=torch.float64)
        ratios = torch.linalg.vector_norm(layer.weight @ x, q, dim=0) / torch.linalg.vector_norm(x, p, dim=0)
        assert ratios.max().item() <= norm * (1 + 1e-12)
    with pytest.raises(ValueError, match="no closed form"):
        matrix_stretch(layer.weight.detach(), math.inf, 1.0)


def test_rows_before_and_after_training_and_of_what_fails():
    case = bench.Case("torch", "Linear", "3, 3", lambda: nn.Linear(3, 3), (3,), export=lambda layer: layer)
    assert [r["when"] for r in bench.rows_of(case)] == [
        "initial",
        "trained, 0.3",
        "trained, 0.01",
        "exported",
    ]
    broken = bench.Case("torch", "Linear", "3, 3", lambda: nn.Linear(3, 3), (4,))
    (only,) = bench.rows_of(broken)
    assert only["verdict"] == "does not run"
    assert "RuntimeError" in only["note"]


def test_committed_results_are_sound():
    with (bench.RESULTS / "published_layers.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert (bench.RESULTS / "published_layers.md").read_text() == bench.summary(rows)
    assert not any("DISAGREES" in r["note"] for r in rows)
    for r in rows:
        if r["verdict"].startswith("exceeds"):
            least = float(r["promised"]) * (1 + float(r["tolerance"]))
            assert min(float(r["attained"]), float(r["pair"])) > least
            assert r["stated"]

"""The probabilistic certificates: their distribution, their failure rate, and their rounding terms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastlip.norms import conv_operator
from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers import lanczos as lanczos_module
from fastlip.norms._solvers.batched_operator import BatchedConvolutions
from fastlip.norms._solvers.certificate import krylov_bound, power_bound, sketch_scale, start_overlap
from fastlip.norms._solvers.iteration_config import IterationConfig
from fastlip.norms._solvers.lanczos import lanczos_norms
from fastlip.norms._solvers.start_vectors import draw_starts


@pytest.mark.parametrize("dimension", [2, 3, 10, 1000, 10**6])
@pytest.mark.parametrize(("eta", "starts"), [(1e-12, 1), (1e-6, 1), (1e-6, 4), (0.1, 1), (0.5, 3), (0.9, 1)])
def test_overlap_is_the_quantile_of_the_beta_distribution(dimension: int, eta: float, starts: int) -> None:
    expected = math.sqrt(stats.beta.ppf(eta ** (1 / starts), 0.5, (dimension - 1) / 2))
    value = start_overlap(dimension, eta, starts)
    assert value == pytest.approx(expected, rel=1e-5)
    assert value <= expected


def test_overlap_in_one_dimension_is_one() -> None:
    assert start_overlap(1, 1e-9, 1) == 1.0


@pytest.mark.parametrize(("eta", "sketches"), [(0.1, 1), (1e-3, 2), (1e-9, 12)])
def test_sketch_scale_is_the_quantile_of_the_largest_normal(eta: float, sketches: int) -> None:
    assert (2 * stats.norm.cdf(sketch_scale(eta, sketches)) - 1) ** sketches == pytest.approx(eta, rel=1e-3)


def lanczos(diagonal: np.ndarray, starts: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain Lanczos in float64 on a diagonal matrix, with full orthogonalisation; one run per row of ``starts``."""
    basis = [starts]
    alphas, betas = [], []
    for _ in range(steps):
        w = diagonal * basis[-1]
        alphas.append((w * basis[-1]).sum(1))
        for _ in range(2):
            for v in basis:
                w = w - (w * v).sum(1, keepdims=True) * v
        betas.append(np.linalg.norm(w, axis=1))
        basis.append(w / betas[-1][:, None])
    return np.stack(alphas, 1), np.stack(betas, 1)


@pytest.mark.parametrize(("eta", "starts"), [(0.5, 1), (0.1, 1), (0.3, 2), (0.2, 4)])
def test_failure_rate_on_a_two_level_spectrum_is_eta(eta: float, starts: int) -> None:
    # One eigenvalue 1 and N - 1 equal ones, one step: the case in which the bound is exact for its event.
    size, trials = 50, 4000
    rng = np.random.default_rng(7)
    spectrum = np.full(size, 0.3)
    spectrum[0] = 1.0
    v = rng.standard_normal((trials * starts, size))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    alpha, beta = lanczos(spectrum, v, 1)
    bounds = krylov_bound(
        alpha,
        beta,
        np.ones(len(v)),
        np.zeros(len(v)),
        np.full(len(v), start_overlap(size, eta, starts)),
    )
    misses = int((bounds.reshape(trials, starts).max(axis=1) < 1.0).sum())
    # The bound misses only in the event; in two dimensions it is sharp, so the event's rate is its rate.
    interval = stats.binomtest(misses, trials).proportion_ci(0.9999)
    assert interval.low <= eta <= interval.high


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 12])
def test_no_miss_at_any_step_outside_the_event(steps: int) -> None:
    size, eta = 30, 0.05
    rng = np.random.default_rng(steps)
    spectrum = np.sort(rng.uniform(0.0, 1.0, size))
    spectrum[-1] = 1.0
    v = rng.standard_normal((2000, size))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    threshold = start_overlap(size, eta, 1)
    v = v[np.abs(v[:, -1]) >= threshold]
    alpha, beta = lanczos(spectrum, v, steps)
    bounds = krylov_bound(alpha, beta, np.ones(len(v)), np.full(len(v), 1e-13), np.full(len(v), threshold))
    assert (bounds >= 1.0).all()


def test_krylov_bound_solves_its_equation() -> None:
    rng = np.random.default_rng(0)
    alpha, beta = rng.uniform(1, 2, (5, 6)), rng.uniform(0.1, 0.5, (5, 6))
    residual, overlaps = np.full(5, 1e-4), np.full(5, 1e-2)
    squares = krylov_bound(alpha, beta, np.ones(5), residual, overlaps) ** 2
    for a, b, t in zip(alpha, beta, squares, strict=True):
        matrix = np.diag(a) + np.diag(b[:-1], 1) + np.diag(b[:-1], -1)
        assert t > np.linalg.eigvalsh(matrix)[-1]
        inverse = np.linalg.inv(t * np.eye(6) - matrix)
        # One percent on the residual is for the rounding of the solver.
        value = np.prod(b) / np.linalg.det(t * np.eye(6) - matrix) + 1.01e-4 * np.linalg.norm(inverse[:, 0])
        assert value == pytest.approx(1e-2, rel=1e-6)


def test_large_residual_widens_the_bound_and_never_breaks_it() -> None:
    alpha, beta = np.full((1, 4), 1.0), np.full((1, 4), 0.1)
    bounds = [
        krylov_bound(alpha, beta, np.ones(1), np.array([f]), np.array([1e-3]))[0] for f in (0.0, 1e-6, 1e-3, 1.0, 1e3)
    ]
    assert bounds == sorted(bounds)
    assert np.isfinite(bounds).all()


def test_power_bound_is_dixons_without_rounding() -> None:
    growth, prefix = np.array([-3.0]), np.log(np.array([[1.0, 0.9, 0.8]]))
    bound = power_bound(growth, prefix, np.array([-700.0]), np.array([1e-3]))[0]
    assert bound == pytest.approx(math.exp((-3.0 - math.log(1e-3)) / 3 / 2), rel=1e-9)


def test_power_bound_misses_only_in_the_event() -> None:
    size, eta = 40, 0.1
    rng = np.random.default_rng(3)
    spectrum = np.linspace(0.5, 1.0, size)
    v = rng.standard_normal((2000, size))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    unlucky = np.abs(v[:, -1]) < start_overlap(size, eta, 1)
    logs = np.zeros((len(v), 1))
    for _ in range(6):
        v = v * spectrum
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        v /= norms
        logs = np.concatenate([logs, logs[:, -1:] + np.log(norms)], axis=1)
    errors, overlaps = np.full(len(v), math.log(1e-15)), np.full(len(v), start_overlap(size, eta, 1))
    bounds = power_bound(logs[:, -1], logs[:, :-1], errors, overlaps)
    assert (bounds[~unlucky] >= 1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize(("eta", "starts"), [(0.3, 1), (0.4, 2)])
def test_lanczos_in_working_precision_misses_no_more_often_than_promised(
    dtype: torch.dtype, steps: int, eta: float, starts: int
) -> None:
    size, trials = 40, 1000
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    values = torch.full((size,), 0.3, dtype=torch.float64)
    values[0] = 1.0
    op = Operator(q * values)
    plan = IterationConfig(eta, starts, 1e-9, steps, dtype, torch.Generator().manual_seed(steps))
    results = lanczos_norms([op] * trials, plan)
    assert all(r.lower <= 1.0 + 1e-12 for r in results)
    misses = sum(r.upper < 1.0 for r in results)
    rate = stats.binomtest(misses, trials).proportion_ci(0.9999)
    assert rate.low <= eta
    if steps == 1 and dtype == torch.float64:
        # Sharp here, up to the tenth of eta that is kept for rounding: a loose bound would show.
        assert rate.high >= 0.9 * eta


def test_starts_are_uniform_and_drawn_in_float64() -> None:
    plan = IterationConfig(1e-6, 8, 1e-2, 10, torch.float32, torch.Generator().manual_seed(0))
    drawn, moved = draw_starts([15] * 150 + [4] + [15] * 50, plan, torch.device("cpu"))
    assert drawn.dtype == torch.float32
    assert moved.shape == (201,)
    assert ((moved > 0.0) & (moved < 1e-6)).all()
    four = drawn[150 * 8 * 15 :][: 8 * 4].view(8, 4).double()
    others = torch.cat([drawn[: 150 * 8 * 15], drawn[150 * 8 * 15 + 8 * 4 :]]).view(-1, 15).double()
    assert len(others) == 200 * 8
    for rows in (four, others):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows), dtype=torch.float64), rtol=1e-6, atol=0)
    assert stats.kstest(others[:, 0].numpy() ** 2, stats.beta(0.5, 7).cdf).pvalue > 1e-3
    assert (drawn != 0.0).all()


def test_how_far_rounding_moved_the_starts() -> None:
    """Against the same draws in float64, which are not rounded."""
    sizes, device = [7, 7, 30, 1], torch.device("cpu")

    def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_starts(sizes, IterationConfig(1e-6, 3, 1e-2, 10, dtype, torch.Generator().manual_seed(5)), device)

    (rounded, moved), (exact, unmoved) = draw(torch.float32), draw(torch.float64)
    parts = (rounded.double() - exact).split([3 * size for size in sizes])
    furthest = torch.stack([part.view(3, -1).norm(dim=1).max() for part in parts])
    torch.testing.assert_close(moved, furthest + 1e-15)
    assert (unmoved == 1e-15).all()


class Coarse(BatchedConvolutions):
    """Products of vectors rounded to TF32's ten bits, as a matrix unit would take them."""

    def forward(self, x: torch.Tensor, *args: object, **history: object) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(self.rounded(x), *args, **history)

    def adjoint(self, x: torch.Tensor, *args: object, **history: object) -> tuple[torch.Tensor, torch.Tensor]:
        return super().adjoint(self.rounded(x), *args, **history)

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_the_certificate_sees_whatever_arithmetic_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0)) / 17
    op = conv_operator(weight, (16, 16), padding=1)

    def norm(dtype: torch.dtype, rtol: float = 1e-2):
        return lanczos_norms([op], IterationConfig(1e-6, 4, rtol, 60, dtype, torch.Generator().manual_seed(1)))[0]

    truth, fine = norm(torch.float64, 1e-5), norm(torch.float32)
    monkeypatch.setattr(lanczos_module, "batched_operator", Coarse)
    coarse = norm(torch.float32)
    assert fine.upper <= fine.lower * 1.01
    assert coarse.upper > 2.0 * coarse.lower  # TF32 is no use for a certificate, and this one says so
    for found in (fine, coarse):
        assert found.lower <= truth.upper
        assert found.upper >= truth.lower
    # The lower side is an explicit vector's, evaluated in float64: rounding hardly moves it.
    assert coarse.lower == pytest.approx(fine.lower, rel=1e-3)

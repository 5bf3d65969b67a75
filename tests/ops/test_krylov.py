"""Operators on tridiagonal matrices: against dense eigenvalues, and the certificate's equation in long arithmetic."""

import pytest
import torch
from mpmath import mp, mpf

from fastlip import ops
from fastlip.ops import _reference_operators, reference

NATIVE = ops.backends["cpu"].name == "native"


def matrices(count: int, steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonals of B^T B for random bidiagonal B."""
    generator = torch.Generator().manual_seed(seed)
    alpha, beta = 1.0 + torch.rand(2, count, steps, generator=generator, dtype=torch.float64)
    diagonal, beta = alpha**2, 0.4 * beta
    diagonal[:, 1:] += beta[:, :-1] ** 2
    return diagonal, alpha * beta


def numbers(count: int, value: float) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 33])
@pytest.mark.parametrize("steps", [1, 2, 3, 17, 64, 300])
def test_match_the_reference(count, steps):
    diagonal, off = matrices(count, steps, seed=count + steps)
    values, vectors = ops.top_eigenpairs(diagonal, off)
    want, _ = reference.top_eigenpairs(diagonal, off)
    torch.testing.assert_close(values, want, rtol=1e-14 * steps + 1e-14, atol=0)
    # Of close eigenvalues vectors mix: what counts is the quotient and the norm.
    dense = _reference_operators._tridiagonal(diagonal, off)
    quotient = torch.einsum("ci,cij,cj->c", vectors, dense, vectors)
    torch.testing.assert_close(quotient, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), numbers(count, 1.0), rtol=1e-13, atol=0)
    for residual, overlap in ((0.0, 1e-3), (1e-7, 1e-3), (1e-2, 1e-4), (10.0, 0.5), (0.0, 1e-6)):
        arguments = (numbers(count, 1.0), numbers(count, residual), numbers(count, overlap))
        got = ops.krylov_bound(diagonal, off, *arguments)
        truth = reference.krylov_bound(diagonal, off, *arguments, 1e-12)
        torch.testing.assert_close(got, truth, rtol=1e-8, atol=0)
        assert (got**2 >= want).all()
        coarse = ops.krylov_bound(diagonal, off, *arguments, tolerance=1e-2)
        assert (coarse >= got * (1 - 1e-12)).all(), "a coarse bracket's upper end is no lower"
        assert (coarse <= got * 1.01).all()


@pytest.mark.parametrize("scale", [1e-280, 1e-90, 1.0, 1e90, 1e150] if NATIVE else [1e-90, 1e90])
def test_any_magnitude(scale):
    diagonal, off = matrices(5, 9)
    plain = ops.krylov_bound(diagonal, off, numbers(5, 1.0), numbers(5, 1e-6), numbers(5, 1e-3))
    got = ops.krylov_bound(diagonal * scale, off * scale, numbers(5, 1.0), numbers(5, 1e-6 * scale), numbers(5, 1e-3))
    torch.testing.assert_close(got / scale**0.5, plain, rtol=1e-10, atol=0)
    values, vectors = ops.top_eigenpairs(diagonal * scale, off * scale)
    torch.testing.assert_close(values / scale, ops.top_eigenpairs(diagonal, off)[0], rtol=1e-13, atol=0)
    assert (vectors > 0).all()


def test_matrices_of_exhausted_krylov_spaces():
    """An off-diagonal 0 splits T; the certificate's first term vanishes, and the residual's remains."""
    diagonal, off = matrices(4, 6)
    off[0, 2] = 0.0
    off[1, -1] = 0.0
    diagonal[2], off[2] = 0.0, 0.0
    values, vectors = ops.top_eigenpairs(diagonal, off)
    want = reference.top_eigenpairs(diagonal, off)[0]
    torch.testing.assert_close(values, want, rtol=1e-13, atol=0)
    assert values[2] == 0.0
    assert vectors.isfinite().all()
    arguments = (numbers(4, 1.0), numbers(4, 1e-9), numbers(4, 1e-3))
    got = ops.krylov_bound(diagonal, off, *arguments)
    torch.testing.assert_close(got, reference.krylov_bound(diagonal, off, *arguments, 1e-12), rtol=1e-9, atol=0)
    assert (got**2 >= want).all()


def test_equal_and_close_eigenvalues():
    diagonal = torch.ones(2, 12, dtype=torch.float64)
    off = torch.full((2, 12), 1e-9, dtype=torch.float64)
    off[1] = 0.0
    values, vectors = ops.top_eigenpairs(diagonal, off)
    torch.testing.assert_close(values, reference.top_eigenpairs(diagonal, off)[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), numbers(2, 1.0), rtol=1e-13, atol=0)
    assert (ops.krylov_bound(diagonal, off, *(numbers(2, v) for v in (1.0, 1e-9, 1e-3))) >= 1.0).all()


def test_the_bound_is_right_of_the_root_in_long_arithmetic():
    """The left side of the equation, in 60 digits, is at most the overlap at the bound; just left of it, above."""
    mp.dps = 60
    for seed in range(12):
        diagonal, off = matrices(1, 2 + seed, seed)
        residual, overlap = 10.0 ** -(seed % 5 + 3), 10.0 ** -(seed % 3 + 2)
        upper = ops.krylov_bound(diagonal, off, *(numbers(1, v) for v in (1.0, residual, overlap))).item()

        def left(t, diagonal=diagonal, off=off, residual=residual):
            d, o = diagonal[0].tolist(), off[0].tolist()
            pivots, forward = [t - mpf(d[0])], [mpf(1)]
            for i in range(1, len(d)):
                forward.append(forward[-1] * mpf(o[i - 1]) / pivots[-1])
                pivots.append(t - mpf(d[i]) - mpf(o[i - 1]) ** 2 / pivots[-1])
            solution = [forward[-1] / pivots[-1]]
            for i in range(len(d) - 2, -1, -1):
                solution.append((forward[i] + mpf(o[i]) * solution[-1]) / pivots[i])
            product = mpf(1)
            for pivot, b in zip(pivots, o, strict=True):
                product *= mpf(b) / pivot
            return product + mpf(residual) * mp.sqrt(sum(y * y for y in solution))

        assert left(mpf(upper) ** 2) <= overlap
        # A hundredth of the residual is given away for rounding.
        top = ops.top_eigenpairs(diagonal, off)[0].item()
        nearer = mpf(top) + (mpf(upper) ** 2 - mpf(top)) * (1 - mpf("1e-6"))
        assert left(nearer) * mpf("1.0101") > overlap


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_bounds_nothing(value):
    diagonal, off = matrices(9, 5)
    for spoiled in ("diagonal", "off", "residual", "start_overlap"):
        given = {
            "diagonal": diagonal.clone(),
            "off": off.clone(),
            "residual": numbers(9, 1e-6),
            "start_overlap": numbers(9, 1e-3),
        }
        given[spoiled].view(-1)[given[spoiled].shape[-1] - 1 if given[spoiled].dim() == 2 else 0] = value
        if spoiled == "start_overlap" and value == float("inf"):
            continue  # an overlap above 1 does not exist
        got = ops.krylov_bound(
            given["diagonal"], given["off"], numbers(9, 1.0), given["residual"], given["start_overlap"]
        )
        assert got[0] == float("inf")
        clean = ops.krylov_bound(diagonal, off, numbers(9, 1.0), numbers(9, 1e-6), numbers(9, 1e-3))
        torch.testing.assert_close(got[1:], clean[1:], rtol=1e-12, atol=0)


def test_no_overlap_bounds_nothing():
    diagonal, off = matrices(2, 5)
    start_overlap = torch.tensor([0.0, -1e-3], dtype=torch.float64)
    assert (ops.krylov_bound(diagonal, off, numbers(2, 1.0), numbers(2, 0.0), start_overlap) == float("inf")).all()


WRONG = {
    "diagonal must be [matrices, steps]": (ValueError, {"diagonal": torch.ones(3, dtype=torch.float64)}),
    "with at least one step": (ValueError, {"diagonal": torch.ones(3, 0, dtype=torch.float64)}),
    "diagonal must be float64": (TypeError, {"diagonal": torch.ones(3, 4)}),
    "off_diagonal must have shape [3, 4]": (ValueError, {"off_diagonal": torch.ones(3, 3, dtype=torch.float64)}),
    "last must have shape [3]": (ValueError, {"last": torch.ones(2, dtype=torch.float64)}),
    "residual must be float64": (TypeError, {"residual": torch.ones(3)}),
    "start_overlap must be on the CPU": (
        ValueError,
        {"start_overlap": torch.ones(3, dtype=torch.float64, device="meta")},
    ),
    "tolerance must be positive": (ValueError, {"tolerance": 0.0}),
}


@pytest.mark.parametrize(("message", "error", "wrong"), [(m, *rest) for m, rest in WRONG.items()])
def test_errors_name_the_argument(message, error, wrong):
    given = {name: torch.ones(3, 4, dtype=torch.float64) for name in ("diagonal", "off_diagonal")}
    given |= {name: numbers(3, 0.5) for name in ("last", "residual", "start_overlap")}
    with pytest.raises(error) as raised:
        ops.krylov_bound(**(given | wrong))
    assert message in str(raised.value)
    if "diagonal" in next(iter(wrong)):
        with pytest.raises(error) as raised:
            ops.top_eigenpairs(**{k: v for k, v in (given | wrong).items() if "diagonal" in k})
        assert message in str(raised.value)


def test_opcheck():
    diagonal, off = matrices(3, 4)
    torch.library.opcheck(torch.ops.fastlip.top_eigenpairs.default, (diagonal, off))
    rest = (numbers(3, 1.0), numbers(3, 1e-6), numbers(3, 1e-3), 1e-12)
    torch.library.opcheck(torch.ops.fastlip.krylov_bound.default, (diagonal, off, *rest))
    if NATIVE:
        with pytest.raises(RuntimeError, match="off_diagonal must be like diagonal"):
            torch.ops.fastlip.top_eigenpairs(diagonal, off[:, :2].contiguous())


def test_a_matrix_does_not_depend_on_the_others():
    """Matrices are handled eight at a time, and by several threads."""
    diagonal, off = matrices(200, 20)
    arguments = (numbers(200, 1.0), numbers(200, 1e-6), numbers(200, 1e-3))
    together = (ops.krylov_bound(diagonal, off, *arguments), *ops.top_eigenpairs(diagonal, off))
    for i in (0, 3, 64, 199):
        own = slice(i, i + 1)
        alone = (ops.krylov_bound(diagonal[own], off[own], *(n[own] for n in arguments)),)
        alone += ops.top_eigenpairs(diagonal[own], off[own])
        for one, every in zip(alone, together, strict=True):
            torch.testing.assert_close(one, every[own], rtol=0 if NATIVE else 1e-12, atol=0 if NATIVE else 1e-12)

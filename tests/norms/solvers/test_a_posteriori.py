"""Operators whose a-posteriori bounds are computed together: equal intervals, in a fixed number of launches."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip.norms import Composed, Operator, conv_operator
from fastlip.norms._operators.operator import compute_frobenius
from fastlip.norms._solvers import lanczos, recurrence
from fastlip.norms._solvers.batched_operator import BatchedConvolutions, batched_operator
from fastlip.norms._solvers.combinations import combine, runs_of
from fastlip.norms._solvers.iteration_config import DEVICE_LIMITS, DeviceLimits, IterationConfig, IterationResult
from fastlip.norms._solvers.lanczos import lanczos_norms
from fastlip.norms._solvers.recurrence import BLOCK

VECTORS = 3
ALONE = DeviceLimits(1, 0, 64, 1 << 29)  # one operator at a time, a few columns of it
TOGETHER = DEVICE_LIMITS["cuda"]._replace(steps=1, ahead=0)


class Vectors(NamedTuple):
    """Stands for a recurrence in :func:`combine`: a tensor [steps, VECTORS, size] for each operator."""

    own: list[Tensor]

    def basis(self, operators: slice, count: int) -> list[Tensor]:
        return list(torch.stack(self.own[operators], dim=1)[:count].split(BLOCK))


def some_vectors(sizes: list[int], counts: list[int], beyond: float = float("nan")) -> Vectors:
    """Random vectors, and ``beyond`` after the last vector of each operator, which must not be used."""
    g = torch.Generator().manual_seed(4)
    own = [torch.randn(max(counts) + 3, VECTORS, size, generator=g) for size in sizes]
    for vectors, count in zip(own, counts, strict=True):
        vectors[count:] = beyond
    return Vectors(own)


SIZES = [5] * 3 + [7] + [5] * 2 + [11] * 9
COUNTS = {
    "equal": [20] * 15,
    "one block": list(range(2, 17)),
    "a few go on": [3, 4, 5, 6, 40, 2, 16, 17, 33, 2, 2, 2, 2, 2, 50],
    "most go on": [40, 31, 33, 64, 47, 18, 30, 17, 34, 2, 48, 49, 40, 32, 33],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("elements", [1, 16 * VECTORS * 2, 16 * VECTORS * 11 * 3, 1 << 25])
@pytest.mark.parametrize("beyond", [float("nan"), float("inf"), -1e30])
def test_sums_of_an_operators_own_vectors(
    counts: list[int], elements: int, beyond: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DeviceLimits(1, 0, elements, 1 << 29))
    vectors = some_vectors(SIZES, counts, beyond)
    g = torch.Generator().manual_seed(5)
    coefficients = torch.randn(4, sum(counts) + 1, VECTORS, dtype=torch.float64, generator=g)
    coefficients[:, -1] = 0.0
    for first, last in ((0, len(SIZES)), (3, 12)):
        own, chosen = SIZES[first:last], np.array(counts[first:last])
        begin = sum(counts[:first])
        part = torch.cat([coefficients[:, begin : begin + chosen.sum()], coefficients[:, -1:]], dim=1)
        runs = runs_of(own, VECTORS, torch.device("cpu"))
        sums = [row for total in combine(vectors, first, runs, chosen, part) for row in total]
        for found, x, count in zip(sums, vectors.own[first:last], chosen.tolist(), strict=True):
            expected = torch.einsum("rib,ibn->rn", coefficients[:, begin : begin + count], x[:count].double())
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            begin += count


def test_runs_are_neighbours_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DeviceLimits(1, 0, 2 * BLOCK * VECTORS * 11, 1))
    runs = runs_of(SIZES, VECTORS, torch.device("cpu"))
    assert [i for own in runs for i in range(own.start, own.stop)] == list(range(len(SIZES)))
    assert [len(set(SIZES[own])) for own in runs] == [1] * len(runs)
    assert [own.stop - own.start for own in runs] == [3, 1, 2, 2, 2, 2, 2, 1]


def convolutions() -> list[Operator]:
    """Of few sizes, that take different numbers of steps; some have hardly any to take."""
    g = torch.Generator().manual_seed(3)

    def op(cout: int, cin: int, kernel: int, size: int, weight: Tensor | None = None) -> Operator:
        weight = torch.randn(cout, cin, kernel, kernel, generator=g) if weight is None else weight
        return conv_operator(weight, (size, size), padding=kernel // 2)

    ops = [op(n, 3, 3, 9) for n in (4, 5, 6, 7)] + [op(3, 4, 1, 9), op(7, 4, 5, 9), op(4, 12, 3, 5), op(9, 12, 5, 5)]
    one = torch.zeros(4, 4, 3, 3)
    one[0, 0, 1, 1] = 1.0  # ends after a step or two
    nearly = torch.randn(5, 4, 3, 3, generator=g)
    nearly[1:] = 0.0
    rank_one = torch.einsum("i,jkl->ijkl", torch.randn(6, generator=g), torch.randn(4, 3, 3, generator=g))
    ops += [op(0, 0, 3, 9, weight) for weight in (one, torch.zeros(4, 4, 3, 3), nearly, rank_one)]
    return [*ops, op(2, 1, 3, 1), op(3, 1, 1, 1), op(2, 1, 3, 2), op(1, 4, 1, 1)]


def compositions() -> list[Composed]:
    g = torch.Generator().manual_seed(6)
    parts = [
        conv_operator(torch.randn(4, 4, 3, 3, generator=g) / 6, (n, n), padding=1) for n in (6, 6, 6, 6, 5, 5, 5, 5)
    ]
    pairs = [(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return [Composed(pair, (3.0, 3.0), 1.0, float(i)) for i, pair in enumerate(pairs)]


KINDS: dict[str, Callable[[], list]] = {"convolutions": convolutions, "compositions": compositions}


def norms(kind: str, dtype: torch.dtype, max_steps: int) -> list[IterationResult]:
    rtol = 1e-3 if dtype == torch.float32 else 1e-6
    plan = IterationConfig(1e-6, 4, rtol, max_steps, dtype, torch.Generator().manual_seed(1), keep_vectors=True)
    return lanczos_norms(KINDS[kind](), plan)


def assert_same(found: list[IterationResult], expected: list[IterationResult]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.steps == other.steps
        assert one.lower == pytest.approx(other.lower, rel=1e-12, abs=1e-15)
        assert one.upper == pytest.approx(other.upper, rel=1e-8)
        torch.testing.assert_close(one.vector, other.vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_steps", [1, 19, 80])
def test_together_as_alone(kind: str, dtype: torch.dtype, max_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", ALONE)
    alone = norms(kind, dtype, max_steps)
    assert max_steps < 80 or len({found.steps for found in alone}) > 1
    for other in (TOGETHER, TOGETHER._replace(elements=1 << 15)):
        monkeypatch.setitem(DEVICE_LIMITS, "cpu", other)
        assert_same(norms(kind, dtype, max_steps), alone)


@pytest.mark.parametrize("limits", [ALONE, TOGETHER])
def test_what_memory_held_before_plays_no_part(limits: DeviceLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", limits)
    before = norms("convolutions", torch.float32, 80)
    fresh = recurrence._vectors

    def poisoned(*args: object) -> Tensor:
        return fresh(*args).fill_(float("nan"))

    monkeypatch.setattr(recurrence, "_vectors", poisoned)
    for one, other in zip(norms("convolutions", torch.float32, 80), before, strict=True):
        assert one[:3] == other[:3]
        assert torch.equal(one.vector, other.vector)


class Failing(BatchedConvolutions):
    """From the fourth application on the first operator's results are not finite."""

    def forward(self, *args: object, **history: object) -> tuple[Tensor, Tensor]:
        self.applied = getattr(self, "applied", 0) + 1
        image, square = super().forward(*args, **history)
        if self.applied > 3:
            image[self.range[0]] = square[self.vectors[0]] = float("nan")
        return image, square


@pytest.mark.parametrize("limits", [ALONE, TOGETHER])
def test_a_failed_operator_has_no_upper_side_and_harms_no_other(
    limits: DeviceLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", limits)
    before = norms("convolutions", torch.float32, 80)
    monkeypatch.setattr(lanczos, "batched_operator", Failing)
    failed, *others = norms("convolutions", torch.float32, 80)
    assert (failed.lower, failed.upper) == (0.0, float("inf"))
    for one, other in zip(others, before[1:], strict=True):
        assert one.upper == pytest.approx(other.upper, rel=1e-3)
        assert one.lower == pytest.approx(other.lower, rel=1e-3)


class Launches(TorchDispatchMode):
    """Counts operations that are not mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        self.count += not any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object]) -> int:
    with Launches() as seen:
        run()
    return seen.count


def test_launches_are_counted() -> None:
    x = torch.ones(3, 4)
    assert launches(lambda: x[:1].mT.view(4)) == 0
    assert launches(lambda: x.mul_(2.0) + x) == 2


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_launches_of_sums_do_not_grow(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", TOGETHER)

    def count(copies: int) -> int:
        own = counts[6:] * copies
        vectors = some_vectors([11] * len(own), own)
        coefficients = torch.ones(4, sum(own) + 1, VECTORS, dtype=torch.float64)
        runs = runs_of([11] * len(own), VECTORS, torch.device("cpu"))
        assert len(runs) == 1
        # The stand-in's basis is one launch.
        return launches(lambda: list(combine(vectors, 0, runs, np.array(own), coefficients)))

    blocks = -(-max(counts[6:]) // BLOCK)
    few, many = count(1), count(20)
    assert few <= 6 + 6 * blocks
    assert many <= 6 + 6 * blocks


def test_launches_do_not_grow_with_equal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", TOGETHER)

    def count(models: int) -> int:
        g = torch.Generator().manual_seed(7)
        layers = [(3, 4, 9), (4, 4, 9), (4, 6, 5), (6, 6, 5), (6, 6, 4)]
        ops = [
            conv_operator(torch.randn(cout, cin, 3, 3, generator=g), (size, size), padding=1)
            for (cin, cout, size), _ in itertools.product(layers, range(models))
        ]
        plan = IterationConfig(1e-6, 4, 1e-9, 18, torch.float32, torch.Generator().manual_seed(1))
        compute_frobenius(ops)
        packing = launches(lambda: (batched_operator(ops, 4, torch.float32), batched_operator(ops, 17, torch.float64)))
        found = []
        total = launches(lambda: found.extend(lanczos_norms(ops, plan)))
        assert {op.steps for op in found} == {18}
        return total - packing

    assert count(1) == count(2) == count(9)

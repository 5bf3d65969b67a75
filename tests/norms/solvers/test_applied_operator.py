"""The ways to apply one operator on a CPU are the operator and its adjoint."""

import math

import pytest
import torch
from random_operators import random_case

from fastlip.norms import Operator, conv_operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers.applied_operator import _PackedOperator, _UnfoldedOperator, applied_operator, unfolds


def assert_is(op: Operator, way: type) -> None:
    applied, wanted = way(op), TorchOperator(op, op.weight.double())
    pair = torch.randn(2, *op.input_shape, dtype=torch.float64)
    rows = torch.stack([applied.row(x) for x in pair.to(op.weight.dtype)])
    assert torch.equal(applied.vectors(rows), pair.to(op.weight.dtype))
    by_group = pair.to(op.weight.dtype).reshape(2, op.groups, -1)
    torch.testing.assert_close(rows.sum(2), by_group.sum(2))  # in an order of its own
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * op.weight.abs().max().item()}
    if op.weight.dtype == torch.float64:
        tolerance = {key: value * 1e-8 for key, value in tolerance.items()}
    outs = torch.full((2, op.groups, math.prod(op.output_shape) // op.groups), math.nan, dtype=op.weight.dtype)
    applied.forward(rows, outs, 0.5)
    one = torch.full_like(outs[:1], math.nan)
    applied.forward(rows[1:], one, 0.5)
    torch.testing.assert_close(one, outs[1:], **tolerance)
    for x, out in zip(pair, outs, strict=True):
        image = wanted.forward(x.to(op.weight.dtype)[None].double())
        torch.testing.assert_close(applied.image(out).double(), 0.5 * image, **tolerance)
        back = wanted.adjoint(applied.image(out).double())
        found = applied.adjoint(out, 2.0)
        torch.testing.assert_close(applied.vectors(found[None]).double(), 2.0 * back, **tolerance)
        assert found.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(60))
def test_random_operators(seed: int, dtype: torch.dtype) -> None:
    op = random_case(seed).operator()
    largest = op.weight.abs().max().item()  # of some seeds at an end of the range
    op = op.with_weight((op.weight / largest if largest else op.weight).to(dtype))
    assert_is(op, _PackedOperator)
    if op.groups == 1 and (not op.kernel or unfolds(op)):
        assert_is(op, _UnfoldedOperator)


@pytest.mark.parametrize(
    ("channels", "kernel", "size", "geometry", "way"),
    [
        ((128, 3), 3, 2, {"padding": 1}, _UnfoldedOperator),
        ((128, 5), 3, 3, {"stride": 2, "padding": 1}, _UnfoldedOperator),
        ((128, 5), 3, 2, {"padding": 1, "padding_mode": "circular"}, _PackedOperator),
        ((128, 5), 3, 2, {"padding": "same"}, _UnfoldedOperator),
        ((64, 3), 3, 4, {"padding": 1}, _PackedOperator),
        ((8, 3), 1, 6, {}, _UnfoldedOperator),
        ((8, 3), 1, 6, {"stride": 2}, _UnfoldedOperator),
        ((8, 3), 1, 6, {"padding": 1}, _UnfoldedOperator),
        ((8, 3), 1, 7, {"padding": 3, "stride": 2}, _UnfoldedOperator),
        ((8, 3), 1, 6, {"groups": 2}, _PackedOperator),
    ],
)
def test_the_way_that_is_chosen(
    channels: tuple[int, int], kernel: int, size: int, geometry: dict[str, int | str], way: type
) -> None:
    op = conv_operator(torch.randn(*channels, kernel, kernel), size, **geometry)
    assert isinstance(applied_operator(op), way)
    assert_is(op, way)


def test_matrices_are_multiplied_as_they_are() -> None:
    assert isinstance(applied_operator(Operator(torch.randn(5, 7))), _UnfoldedOperator)
    assert isinstance(applied_operator(conv_operator(torch.randn(64, 3, 3), 2, padding=1)), _PackedOperator)

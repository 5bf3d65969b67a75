"""Layers between masks: intervals around exact norms, and one application for all that share a layer."""

import math

import pytest
import torch
from torch import Tensor

from fastlip.norms import Masked, Operator, conv_operator, operator_norms
from fastlip.norms._operators.dense import dense_matrix
from fastlip.norms._solvers import batched_operator


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers() -> dict[str, Operator]:
    return {
        "convolution": conv_operator(drawn(5, 4, 3, 3, seed=0), (6, 5), padding=1),
        "strided": conv_operator(drawn(5, 4, 3, 3, seed=1).double(), (7, 6), padding=1, stride=2),
        "matrix": Operator(drawn(20, 30, seed=2)),
        "circular, one axis": conv_operator(drawn(3, 4, 3, seed=3), 8, padding=1, padding_mode="circular"),
    }


def mask(shape: tuple[int, ...], seed: int) -> Tensor:
    """Zeros and numbers up to 2, of either sign."""
    t = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(t < 0.4, 0.0, 4.0 * t - 2.0)


def matrix(op: Masked) -> Tensor:
    dense = torch.block_diag(*dense_matrix(op.layer)).double()
    left = 1.0 if op.after is None else op.after.expand(op.output_shape).reshape(-1, 1)
    return left * dense * (1.0 if op.before is None else op.before.expand(op.input_shape).reshape(-1))


@pytest.mark.parametrize("name", layers())
def test_intervals_contain_the_exact_norms(name):
    layer = layers()[name]
    ops = [Masked(layer, mask(layer.input_shape, 2 * i), mask(layer.output_shape, 2 * i + 1)) for i in range(4)]
    ops += [Masked(layer, None, mask(layer.output_shape, 9)), Masked(layer, mask(layer.input_shape, 10)), Masked(layer)]
    ops += [Masked(layer, after=mask((layer.output_shape[0], *(1,) * len(layer.kernel)), 11))]
    for method in ("auto", "power"):
        for op, found in zip(ops, operator_norms(ops, method=method, rtol=0.05), strict=True):
            exact = torch.linalg.matrix_norm(matrix(op), 2).item()
            assert found.lower <= exact * (1.0 + 1e-12)
            assert exact * (1.0 - 1e-12) <= found.upper <= 1.06 * exact
            assert op.magnitude >= exact
    nothing = operator_norms([Masked(layer, torch.zeros(layer.input_shape))])[0]
    assert nothing.lower == 0.0
    assert nothing.upper == 0.0


def test_all_masks_of_a_layer_are_one_application_of_it(monkeypatch):
    layer = layers()["strided"]
    ops = [Masked(layer, mask(layer.input_shape, i), mask(layer.output_shape, i + 5)) for i in range(5)]
    packed, applied = [], []
    pack, step = batched_operator.pack_weights, batched_operator.operator_step_
    monkeypatch.setattr(batched_operator, "pack_weights", lambda w, *a, **k: packed.append(len(w)) or pack(w, *a, **k))
    monkeypatch.setattr(batched_operator, "operator_step_", lambda *a, **k: applied.append(1) or step(*a, **k))
    together = batched_operator.batched_operator(ops, 2, torch.float64)
    assert packed == [1, 1]  # the layer and its adjoint
    x, y = drawn(together.domain[-1].stop, seed=0).double(), drawn(together.range[-1].stop, seed=1).double()
    image, squares = together.forward(x)
    back, _ = together.adjoint(y)
    assert len(applied) == 2
    for i, op in enumerate(ops):
        # Vectors lie with pixels before channels.
        def rows(t: Tensor, places: list[slice], shape: tuple[int, ...], i: int = i) -> Tensor:
            return t[places[i]].view(2, math.prod(shape[1:]), shape[0]).mT.flatten(1)

        given, found = rows(x, together.domain, op.input_shape), rows(image, together.range, op.output_shape)
        assert torch.allclose(found, given @ matrix(op).mT)
        assert torch.allclose(squares[together.vectors[i]], found.square().sum(1))
        expected = rows(y, together.range, op.output_shape) @ matrix(op)
        assert torch.allclose(rows(back, together.domain, op.input_shape), expected)


def test_masks_of_other_shapes_or_without_numbers_are_refused():
    layer = layers()["convolution"]
    for wrong in (torch.ones(3, 6, 5), torch.ones(1, 4, 6, 5), torch.ones(6)):
        with pytest.raises(ValueError, match="before must broadcast"):
            Masked(layer, wrong)
    with pytest.raises(ValueError, match="after must broadcast"):
        Masked(layer, after=torch.ones(4, 6, 5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Masked(layer, torch.full((4, 6, 5), math.inf))
    with pytest.raises(ValueError, match="one layer"):
        batched_operator.batched_operator([Masked(op) for op in layers().values()], 1, torch.float64)
    with pytest.raises(ValueError, match="single convolutions"):
        operator_norms([Masked(layer)], method="ring")

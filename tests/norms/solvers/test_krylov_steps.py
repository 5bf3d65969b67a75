"""The steps that follow leading singular vectors through training."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from random_operators import random_case
from torch import Tensor

from fastlip.norms import Operator, conv_operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._solvers.krylov_steps import LeadingVectors, krylov_steps
from fastlip.norms._solvers.krylov_steps_together import eigenvectors_by_squaring, krylov_steps_together


def alone_of_many(op: Operator, vectors: Tensor, steps: int) -> LeadingVectors:
    """The way of a GPU, which is to find the same."""
    return krylov_steps_together([op], [vectors], steps)[0]


WAYS = pytest.mark.parametrize("way", [krylov_steps, alone_of_many])
Way = Callable[[Operator, Tensor, int], LeadingVectors]


def start(op: Operator) -> Tensor:
    """Two random vectors, orthonormal."""
    drawn = torch.randn(math.prod(op.input_shape), 2, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0] if len(drawn) > 1 else torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return basis.mT.reshape(2, *op.input_shape).to(op.weight.dtype)


def singular_values(op: Operator) -> Tensor:
    identity = torch.eye(math.prod(op.input_shape), dtype=torch.float64).view(-1, *op.input_shape)
    return torch.linalg.svdvals(TorchOperator(op, op.weight.double()).forward(identity).flatten(1))


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(40))
def test_norms_and_vectors_of_random_operators(seed: int, dtype: torch.dtype, way: Way) -> None:
    op = random_case(seed).operator()
    op = op.with_weight(op.weight.to(dtype))
    truth = singular_values(op)
    accuracy = 1e-4 if dtype == torch.float32 else 1e-7
    found = way(op, start(op), 40)
    before, norm = found.norms.tolist()
    assert before <= norm * (1 + accuracy)
    assert norm == pytest.approx(truth[0].item(), rel=3e-3, abs=torch.finfo(dtype).tiny)
    if not truth[0] > torch.finfo(dtype).tiny:
        return
    # Each group has vectors of its own.
    pair = found.vectors.reshape(2, op.groups, -1).double()
    products = torch.einsum("igk,jgk->gij", pair, pair)
    torch.testing.assert_close(products[:, 0, 0], torch.ones(op.groups).double(), rtol=0, atol=accuracy)
    torch.testing.assert_close(products[:, 0, 1], torch.zeros(op.groups).double(), rtol=0, atol=accuracy)
    if op.groups == 1 and truth[1:2].sum() > 1e-3 * truth[0] and truth[0] > 1e-30:
        assert products[0, 1, 1].item() == pytest.approx(1.0, abs=accuracy)
    # What is called the norm is the length of a vector's image, and so never above the norm itself.
    applied = TorchOperator(op, op.weight.double()).forward(found.vectors[:1].double()).reshape(op.groups, -1)
    lengths = applied.norm(dim=1)
    assert lengths.max().item() == pytest.approx(norm, rel=accuracy)
    image = found.image.reshape(op.groups, -1).double()
    (largest,) = image.any(1).nonzero()[:, 0].tolist()
    assert lengths[largest].item() == pytest.approx(norm, rel=accuracy)
    torch.testing.assert_close(image[largest], applied[largest] / lengths[largest], rtol=0, atol=accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(10, 512), (512, 10), (32, 40), (2, 3), (1, 7), (7, 1), (1, 1)])
def test_narrow_matrices_at_once(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    """One call finds what no steps from these vectors would: the singular vectors of the two largest values."""
    op = Operator((torch.randn(shape, dtype=torch.float64) * scale).to(dtype))
    _, values, vh = torch.linalg.svd(op.weight.double(), full_matrices=False)
    given = vh[-1:].expand(2, -1).to(dtype)
    found = krylov_steps(op, given, 1)
    accuracy = 2e-6 if dtype == torch.float32 else 1e-9
    expected = [values[-1].item(), values[0].item()]
    assert found.norms.tolist() == pytest.approx(expected, rel=accuracy)
    gaps = (values[:-1] - values[1:]) / values[0]
    for place in range(min(2, len(values))):
        if len(values) == 1 or gaps[: place + 1].min() > 1e-3:
            overlap = (found.vectors[place].double() @ vh[place]).abs().item()
            assert overlap == pytest.approx(1.0, abs=1e3 * accuracy)
    image = op.weight.double() @ found.vectors[0].double() / values[0]
    torch.testing.assert_close(found.image[0].double(), image, rtol=0, atol=10 * accuracy)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_narrow_matrices_without_a_norm(value: float) -> None:
    op, given = Operator(torch.full((3, 50), value)), torch.randn(2, 50)
    found = krylov_steps(op, given, 1)
    assert torch.equal(found.vectors, given)
    assert found.norms[1].item() == 0.0 if value == 0.0 else math.isnan(found.norms[1].item())
    assert not found.image.any()


def test_a_narrow_matrix_of_rank_one() -> None:
    op = Operator(torch.outer(torch.randn(4), torch.randn(50)))
    found = krylov_steps(op, torch.randn(2, 50), 1)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(2), rtol=0, atol=1e-5)


@WAYS
@pytest.mark.parametrize("shape", [(6, 1, 3, 3), (6, 2, 3, 3), (12, 4, 1, 1)])
def test_every_group_is_followed_though_all_weights_move(shape: tuple[int, ...], way: Way) -> None:
    """A vector in one group says nothing of another, which may grow beyond it at any time."""
    groups = 6 if shape[1] < 4 else 3
    weight, pair = torch.randn(shape), torch.zeros(2, groups * shape[1], 4, 4)
    pair[:, : shape[1]] = torch.randn(2, shape[1], 4, 4)  # nothing of the other groups
    for taken in range(40):
        weight += 0.02 * torch.randn(shape)
        weight[-shape[0] // groups :] *= 1.05
        op = conv_operator(weight.clone(), 4, padding=shape[2] // 2, groups=groups)
        found = way(op, pair, 1)
        pair, truth = found.vectors, singular_values(op)[0].item()
        assert found.norms[1].item() <= truth * (1 + 1e-5)
        assert found.norms[1].item() > 0.95 * truth or taken < 10


@WAYS
def test_equal_groups_have_one_gradient(way: Way) -> None:
    op = conv_operator(torch.randn(1, 1, 3, 3).repeat(4, 1, 1, 1), 4, padding=1, groups=4)
    found = way(op, torch.randn(2, 1, 4, 4).repeat(1, 4, 1, 1), 8)
    assert found.image.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert found.image[0].flatten(1).any(1).sum() == 1


@WAYS
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize(
    "op",
    [
        Operator(torch.randn(50, 50, generator=torch.Generator().manual_seed(0))),
        Operator(torch.randn(1, 50, generator=torch.Generator().manual_seed(1))),
        Operator(torch.randn(50, 1, generator=torch.Generator().manual_seed(2))),
        conv_operator(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(3)), 6, padding=1),
        conv_operator(torch.randn(1, 64, 1, 1, generator=torch.Generator().manual_seed(4)), 1),
    ],
    ids=["matrix", "row", "column", "convolution", "row by a convolution"],
)
def test_starts_of_any_length_and_direction(op: Operator, steps: int, way: Way) -> None:
    """The norm is approached from below, and vectors that are found have length 1, or the second one none."""
    truth = singular_values(op)[0].item()
    first = torch.nn.functional.normalize(torch.randn(1, *op.input_shape).flatten(1)).view(op.input_shape)
    other = torch.nn.functional.normalize(torch.randn(1, *op.input_shape).flatten(1)).view(op.input_shape)
    starts = [(first, first), (first, 0.0 * first), (first, 30.0 * other), (first, 0.1 * other), (first, -2.0 * first)]
    for pair in [*starts, (0.0 * first, other), (5.0 * first, other)]:
        found = way(op, torch.stack(pair), steps)
        assert found.norms[1].item() <= truth * (1 + 1e-5)
        if pair[0].any() or steps == 20:
            assert found.norms[1].item() >= found.norms[0].item() / pair[0].norm().clamp_min(1.0).item() * (1 - 1e-5)
            assert found.vectors[0].norm().item() == pytest.approx(1.0, abs=1e-4)
        assert found.vectors[1].norm().item() <= 1.0 + 1e-4
        if steps == 20:
            assert found.norms[1].item() == pytest.approx(truth, rel=1e-3)


@WAYS
@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 500), (6, 6), (2, 1)])
def test_weights_that_move_between_single_steps(shape: tuple[int, int], way: Way) -> None:
    weight = torch.randn(shape)
    pair = start(Operator(weight))
    for taken in range(60):
        weight = weight + 0.05 * weight.norm() * torch.nn.functional.normalize(torch.randn(shape).view(1, -1)).view(
            shape
        )
        found = way(Operator(weight), pair, 1)
        pair = found.vectors
        truth = torch.linalg.matrix_norm(weight, 2).item()
        assert found.norms[1].item() <= truth * (1 + 1e-5)
        assert found.norms[1].item() > 0.8 * truth or taken < 10  # the start was drawn
        assert pair[0].norm().item() == pytest.approx(1.0, abs=1e-4)


def test_operators_together_are_each_by_itself() -> None:
    ops = [
        conv_operator(torch.randn(4, 3, 3, 3), 6, padding=1),
        Operator(torch.randn(5, 7)),
        conv_operator(torch.randn(6, 1, 3, 3), 5, groups=6),
        conv_operator(torch.zeros(4, 3, 3, 3), 6, padding=1),
        conv_operator(torch.randn(4, 2, 2, 2), 5, padding="same", groups=2),
    ]
    vectors = [start(op) for op in ops]
    together = krylov_steps_together(ops, vectors, 11)
    for place, (op, pair, found) in enumerate(zip(ops, vectors, together, strict=True)):
        for way in (krylov_steps, alone_of_many):
            own = way(op, pair, 11)
            torch.testing.assert_close(found.norms, own.norms, rtol=1e-5, atol=0)
            assert (found.image * own.image).sum().abs() == pytest.approx(0.0 if place == 3 else 1.0, abs=1e-3)
    assert torch.equal(together[3].vectors, vectors[3])
    assert not together[3].norms.any()


@WAYS
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_weights_whose_squares_leave_the_range(size: float, way: Way) -> None:
    op = conv_operator(torch.rand(4, 3, 3, 3), 6, padding=1)
    pair = start(op)
    expected = way(op, pair, 6)
    found = way(op.with_weight(op.weight * size), pair, 6)
    assert found.norms[1].item() == pytest.approx(expected.norms[1].item() * size, rel=1e-4)
    torch.testing.assert_close(found.image, expected.image, rtol=1e-3, atol=1e-4)


@WAYS
@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_weights_that_are_not_finite_leave_the_vectors(spoilt: float, way: Way) -> None:
    op = conv_operator(torch.rand(4, 3, 3, 3), 6, padding=1)
    pair = start(op)
    of_one = op.weight.index_fill(0, torch.tensor(1), spoilt)
    # The squares of the last one leave the range of float64, which squares are computed in.
    for weight in (torch.full_like(op.weight, spoilt), of_one, op.weight.double() * 1e200):
        pair = pair.to(weight.dtype)
        found = way(op.with_weight(weight), pair, 3)
        assert torch.equal(found.vectors, pair)
        assert not found.image.any()
        assert not found.norms[1].isfinite()


@WAYS
def test_the_second_vector_takes_over_where_its_singular_value_becomes_the_largest(way: Way) -> None:
    u, v = (torch.linalg.qr(torch.randn(40, 40))[0] for _ in range(2))
    values = torch.linspace(0.9, 0.1, 40)
    values[:2] = torch.tensor([1.0, 0.95])
    pair = v[:2]
    for raised in torch.linspace(0.95, 1.2, 26):
        values[1] = raised
        weight = u * values @ v + 1e-4 * torch.randn(40, 40)  # all of it moves, as in training
        found = way(Operator(weight), pair, 1)
        pair = found.vectors
        assert found.norms[1].item() == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-4)
    # Without it the step starts from a vector that has almost nothing of the new one.
    without = torch.stack([v[0], F.normalize(v[5] + 1e-6 * v[1], dim=0)])
    assert way(Operator(u * values @ v), without, 1).norms[1] < 1.1


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["matrix", "convolution"])
def test_other_singular_vectors_than_the_first_are_left_though_the_weight_stands_still(
    kind: str, dtype: torch.dtype, way: Way
) -> None:
    op = Operator(torch.randn(50, 40)) if kind == "matrix" else conv_operator(torch.randn(3, 2, 3, 3), 4, padding=1)
    op = op.with_weight(op.weight.to(dtype))
    identity = torch.eye(math.prod(op.input_shape), dtype=torch.float64).view(-1, *op.input_shape)
    right, values, _ = torch.linalg.svd(TorchOperator(op, op.weight.double()).forward(identity).flatten(1))
    pair = right.mT[[2, 4]].reshape(2, *op.input_shape).to(dtype)
    found = way(op, pair, 3)
    # Nothing but the first vector stays: the second one starts again.
    assert found.norms.tolist() == pytest.approx([values[2].item()] * 2, rel=1e-5)
    kept = found.vectors.flatten(1).double() @ right
    torch.testing.assert_close(kept[0].abs(), identity.flatten(1)[2], rtol=0, atol=1e-4)
    assert kept[1, 4].abs() < 0.9
    for _ in range(300):
        found = way(op, found.vectors, 1)
        assert found.norms[1].item() <= values[0].item() * (1 + 1e-5)
    assert found.norms[1].item() == pytest.approx(values[0].item(), rel=2e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_eigenvectors_by_squaring(size: int) -> None:
    for spread in (0.0, 0.1, 1.0, 10.0):
        basis = torch.linalg.qr(torch.randn(20, size, size, dtype=torch.float64))[0]
        values = torch.rand(20, size, dtype=torch.float64).mul(spread).exp() * 10.0 ** torch.randint(-6, 6, (20, 1))
        matrices = basis * values[:, None] @ basis.mT
        count = min(size, 2)
        found = eigenvectors_by_squaring(matrices, count)
        products = found @ found.mT
        torch.testing.assert_close(products, torch.eye(count, dtype=torch.float64).expand_as(products))
        quotients = torch.einsum("bki,bij,bkj->bk", found, matrices, found)
        expected = values.sort(1, descending=True).values[:, :count]
        torch.testing.assert_close(quotients, expected, rtol=1e-4, atol=0)


def test_eigenvectors_of_nothing() -> None:
    matrices = torch.zeros(2, 3, 3, dtype=torch.float64)
    matrices[1] = math.nan
    assert not eigenvectors_by_squaring(matrices, 2).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_holds_the_steps_of_all_operators() -> None:
    ops = [
        conv_operator(torch.randn(8, 3, 3, 3), 6, padding=1),
        Operator(torch.randn(5, 7)),
        conv_operator(torch.randn(6, 1, 3, 3), 5, groups=6),
    ]
    vectors = [start(op) for op in ops]
    on_gpu = [op.with_weight(op.weight.cuda()) for op in ops]
    given = [pair.cuda() for pair in vectors]
    krylov_steps_together(on_gpu, given, 3)  # what is cached, tables among it, is made before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = krylov_steps_together(on_gpu, given, 3)
    for op, held in zip(ops, on_gpu, strict=True):
        held.weight.copy_(op.weight.mul_(1.5))
    graph.replay()
    for op, pair, found in zip(ops, vectors, together, strict=True):
        expected = krylov_steps(op, pair, 3)
        torch.testing.assert_close(found.norms.cpu(), expected.norms, rtol=1e-4, atol=0)
        assert (found.image.cpu() * expected.image).sum().abs().item() == pytest.approx(1.0, abs=1e-3)

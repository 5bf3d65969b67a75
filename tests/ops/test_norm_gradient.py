"""A norm by its gradient, and that of a weight scaled to a bound, against definitions, on every instruction set."""

import math

import pytest
import torch
from instruction_sets import every_isa, run_with_isa

from fastlip import ops
from fastlip.ops import reference

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def operands(rows, columns, rank, dtype, seed=0):
    """A gradient, a scaled weight, and a gradient of the norm in factors, or whole for rank 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, columns), (rows, columns), (rows, rank or columns), (rank, columns) if rank else (0,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def assert_norm_agrees(weight, left, right):
    got = torch.ops.fastlip.norm_along(weight, left, right)
    want = reference.norm_along(weight, left, right)
    gradient = left.double().abs() @ right.double().abs() if right.numel() else left.double().abs()
    terms = (weight.double().abs().view_as(gradient) * gradient).sum().item()
    rounding = (len(right) + 2) * torch.finfo(weight.dtype).eps + weight.numel() * torch.finfo(torch.float64).eps
    torch.testing.assert_close(got, want, atol=rounding * terms, rtol=0)


def assert_agrees(grad, scaled, left, right, norm, bound):
    """The results are the definitions', up to the rounding of their terms and of the sum over all elements."""
    assert_norm_agrees(scaled, left, right)
    got = torch.ops.fastlip.scaled_weight_grad(grad, scaled, left, right, norm, bound)
    want = reference.scaled_weight_grad(grad, scaled, left, right, norm, bound)
    eps, rank = torch.finfo(grad.dtype).eps, len(right)
    gradient = left.abs() @ right.abs() if rank else left.abs()
    of_sum = (grad * scaled).abs().sum() / norm * gradient.max()
    atol = eps * (4 * (rank + 4) * want.abs().max() + of_sum).item()
    torch.testing.assert_close(got, want, atol=atol, rtol=8 * eps)


@DTYPES
@pytest.mark.parametrize("rank", [0, 1, 2, 5, 16, 33])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 3), (3, 1), (4, 16), (5, 17), (7, 64), (8, 131), (70, 33), (33, 1030)]
)
def test_the_definition(rows, columns, rank, dtype):
    tensors = operands(rows, columns, rank, dtype)
    assert_agrees(*tensors, 2.5, 1.0)
    assert_agrees(*tensors, 0.3, 7.0)


@DTYPES
def test_the_sum_over_many_elements(dtype):
    """Terms of one sign, and terms that cancel, over many chunks and a part of one."""
    grad, scaled, left, right = operands(321, 1023, 2, dtype)
    signs = torch.arange(grad.numel()).view_as(grad) % 2 * 2 - 1
    assert_agrees(grad.abs(), scaled.abs(), left, right, 3.0, 1.0)
    assert_agrees(1e4 * signs.to(dtype), scaled.abs(), left, right, 3.0, 1.0)


@DTYPES
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("rows", "columns"), [(137, 512), (130, 1000), (66, 1024)])
def test_gradients_that_are_written_past_the_caches(rows, columns, rank, dtype):
    tensors = operands(rows, columns, rank, dtype)
    assert tensors[0].numel() * tensors[0].element_size() >= 2**18
    assert_agrees(*tensors, 2.5, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_singular_value(seed):
    torch.manual_seed(seed)
    weight = torch.randn(6, 3, 3, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    for given in (weight, weight.mT.contiguous().mT):
        torch.testing.assert_close(ops.norm_along(given, u[:, :1], vh[:1]), s[0])
        torch.testing.assert_close(ops.norm_along(given, u[:, :1] @ vh[:1], None), s[0])


@pytest.mark.parametrize("seed", range(5))
def test_autograd_through_the_singular_value(seed):
    torch.manual_seed(seed)
    weight = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    given = torch.randn(6, 9, dtype=torch.float64)
    scaled = weight * (0.7 / torch.linalg.matrix_norm(weight, 2))
    (want,) = torch.autograd.grad(scaled, weight, given)
    u, s, vh = torch.linalg.svd(weight.detach())
    for left, right in ((u[:, :1], vh[:1]), (u[:, :1] @ vh[:1], None)):
        got = ops.scaled_weight_grad(given, scaled, left, right, s[0].item(), 0.7)
        torch.testing.assert_close(got, want)
    # An axis more, and operands that are not contiguous.
    parts = (t.mT.contiguous().mT for t in (given, scaled))
    got = ops.scaled_weight_grad(*(t.unflatten(1, (3, 3)) for t in parts), u[:, :1], vh[:1], s[0].item(), 0.7)
    torch.testing.assert_close(got, want.unflatten(1, (3, 3)))


def test_threads_change_nothing():
    grad, scaled, left, right = operands(300, 700, 3, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.scaled_weight_grad(grad, scaled, left, right, 2.0, 1.0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_native
def test_threads_do_not_change_the_norm():
    weight, _, left, right = operands(300, 700, 3, torch.float32)
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(ops.norm_along(weight, left, right).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_do(shape):
    empty = torch.empty(shape)
    assert ops.scaled_weight_grad(empty, empty, torch.empty(shape), None, 2.0, 1.0).shape == shape
    left, right = torch.empty(shape[0], 3), torch.empty(3, shape[1])
    assert ops.scaled_weight_grad(empty, empty, left, right, 2.0, 1.0).shape == shape
    assert ops.norm_along(empty, left, right).item() == 0.0
    assert ops.norm_along(empty, torch.empty(shape), None).item() == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18])
def test_products_that_leave_the_range_of_float32(size):
    grad, scaled, left, right = operands(5, 20, 2, torch.float32)
    got = ops.scaled_weight_grad(grad, scaled * size, left, right, 2.0 / size, size)
    want = reference.scaled_weight_grad(grad, scaled * size, left, right, 2.0 / size, size)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
    for power in (1.0, size):
        assert_norm_agrees(scaled * power, left, right)


def test_nan_stays_in_sight():
    grad, scaled, left, right = operands(5, 20, 2, torch.float32)
    grad[1, 2] = math.nan
    assert ops.scaled_weight_grad(grad, scaled, left, right, 2.0, 1.0).isnan().all()
    assert ops.norm_along(grad, left, right).isnan()


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition or many or caches")


@pytest.mark.parametrize("rank", [0, 2])
def test_opcheck(rank):
    arguments = operands(5, 20, rank, torch.float32)
    torch.library.opcheck(torch.ops.fastlip.scaled_weight_grad.default, (*arguments, 2.0, 1.0))
    torch.library.opcheck(torch.ops.fastlip.norm_along.default, tuple(arguments[1:]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(5, 20).half()}, TypeError, "grad must be float32 or float64"),
        ({0: torch.tensor(1.0)}, ValueError, "grad must have at least one axis"),
        ({1: torch.zeros(5, 20).double()}, TypeError, "scaled must be in grad's dtype"),
        ({1: torch.zeros(4, 20)}, ValueError, "scaled must have grad's shape"),
        ({2: torch.zeros(4, 2)}, ValueError, r"left must be \[5, 2\]"),
        ({2: torch.zeros(5, 3)}, ValueError, r"left must be \[5, 2\]"),
        ({3: None}, ValueError, r"left must be \[5, 20\]"),
        ({3: torch.zeros(2, 19)}, ValueError, r"right must be \[rank, 20\]"),
        ({3: torch.zeros(0, 20)}, ValueError, "with a rank of at least 1"),
        ({3: torch.zeros(40)}, ValueError, r"right must be \[rank, 20\]"),
        ({3: torch.zeros(2, 20, device="meta")}, ValueError, "right must be on the CPU"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = [*operands(5, 20, 2, torch.float32), 2.0, 1.0]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(error, match=message):
        ops.scaled_weight_grad(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(5, 20).half()}, TypeError, "weight must be float32 or float64"),
        ({0: torch.tensor(1.0)}, ValueError, "weight must have at least one axis"),
        ({0: torch.zeros(5, 20, device="meta")}, ValueError, "weight must be on the CPU"),
        ({1: torch.zeros(5, 2).double()}, TypeError, "left must be in weight's dtype"),
        ({1: torch.zeros(4, 2)}, ValueError, r"left must be \[5, 2\]"),
        ({2: None}, ValueError, r"left must be \[5, 20\]"),
        ({2: torch.zeros(2, 19)}, ValueError, r"right must be \[rank, 20\]"),
    ],
)
def test_wrong_arguments_of_the_norm(change, error, message):
    arguments = operands(5, 20, 2, torch.float32)[1:]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(error, match=message):
        ops.norm_along(*arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 20).half()}, "weight must be float32 or float64"),
        ({0: torch.tensor(1.0)}, "weight must have at least one axis"),
        ({0: torch.zeros(5, 40)[:, ::2]}, "weight must be contiguous"),
        ({1: torch.zeros(4, 2)}, "left must be"),
        ({1: torch.zeros(5, 3)}, "right must be"),
        ({2: torch.zeros(0)}, "left must be .rows, columns. without right"),
        ({1: torch.zeros(5, 20), 2: torch.zeros(40)}, "right must be"),
    ],
)
def test_direct_calls_for_the_norm_are_checked(change, message):
    arguments = operands(5, 20, 2, torch.float32)[1:]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.norm_along(*arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 20).half()}, "grad must be float32 or float64"),
        ({0: torch.zeros(5, 40)[:, ::2]}, "grad must be contiguous"),
        ({1: torch.zeros(5, 20).double()}, "scaled must be contiguous, in grad's dtype"),
        ({1: torch.zeros(5, 21)}, "scaled must have grad's shape"),
        ({2: torch.zeros(4, 2)}, "left must be"),
        ({2: torch.zeros(5, 3)}, "right must be"),
        ({3: torch.zeros(0)}, "left must be .rows, columns. without right"),
        ({3: torch.zeros(2, 19)}, "right must be"),
    ],
)
def test_direct_calls_are_checked(change, message):
    arguments = [*operands(5, 20, 2, torch.float32), 2.0, 1.0]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.scaled_weight_grad(*arguments)

"""Gradients with respect to images against torch's in float64, on every instruction set."""

import itertools

import pytest
import torch
from instruction_sets import every_isa, run_with_isa
from torch.nn import functional

from fastlip import ops
from fastlip.ops import reference

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")

CASES = [
    # channels, outputs, kernel, stride, padding, size
    (3, 16, (3, 3), (1, 1), (1, 1), (32, 32)),
    (1, 8, (5, 5), (1, 1), (2, 2), (14, 15)),
    (3, 64, (7, 7), (2, 2), (3, 3), (17, 30)),
    (2, 5, (4, 4), (2, 2), (1, 1), (12, 9)),
    (4, 33, (3, 1), (1, 3), (0, 2), (7, 11)),
    (15, 17, (3, 3), (2, 1), (1, 0), (9, 8)),
    (5, 3, (1, 1), (2, 2), (0, 0), (6, 5)),  # most pixels meet nothing
    (3, 4, (2, 3), (4, 4), (3, 1), (10, 13)),
    (7, 20, (3, 3), (1, 1), (4, 5), (3, 1)),  # more padding than kernel
    (3, 6, (64, 2), (5, 1), (0, 0), (70, 4)),
    (3, 1, (8, 8), (3, 2), (7, 0), (2, 8)),
    (8, 16, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 12, (16, 16), (16, 16), (0, 0), (40, 33)),
    (2, 6, (3, 3), (9, 11), (2, 1), (12, 5)),
]
EMPTY = [
    (3, 0, (3, 3), (1, 1), (1, 1), (4, 4)),
    (0, 3, (3, 3), (1, 1), (1, 1), (4, 4)),
    (2, 3, (2, 2), (1, 1), (1, 1), (0, 5)),
    (2, 3, (1, 1), (2, 2), (1, 1), (3, 0)),
]


def operands(batch, case, seed=0):
    """An empty out, grad [B, H', W', outputs] and the weight."""
    channels, outputs, kernel, stride, padding, size = case
    generator = torch.Generator().manual_seed(seed)
    maps = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    grad = torch.randn(batch, *maps, outputs, generator=generator)
    weight = torch.randn(outputs, channels, *kernel, generator=generator)
    return torch.full((batch, channels, *size), torch.nan), grad, weight


def wanted(out, grad, weight, case, dtype=torch.float64):
    _, _, _, stride, padding, _ = case
    return torch.nn.grad.conv2d_input(out.shape, weight.to(dtype), grad.to(dtype).movedim(3, 1), stride, padding)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_definition(case, batch):
    out, grad, weight = operands(batch, case)
    want = wanted(out, grad, weight, case)
    sizes = wanted(out, grad.abs(), weight.abs(), case)  # of what is added up
    for layout in (torch.contiguous_format, torch.channels_last):
        found = torch.full_like(out, torch.nan, memory_format=layout)
        assert ops.conv_input_grad_(found, grad, weight, stride=case[3], padding=case[4]) is found
        assert ((found - want).abs() <= 2e-6 * sizes).all()


def test_the_definition_on_random_convolutions():
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for seed in range(200):
        kernel, stride, padding = ((number(low, high), number(low, high)) for low, high in ((1, 7), (1, 4), (0, 4)))
        size = tuple(number(max(1, k - 2 * p), 18) for k, p in zip(kernel, padding, strict=True))
        case = (number(1, 9), number(1, 40), kernel, stride, padding, size)
        out, grad, weight = operands(2, case, seed)
        ops.conv_input_grad_(out, grad, weight, stride=stride, padding=padding)
        torch.testing.assert_close(out, wanted(out, grad, weight, case).float(), atol=2e-4, rtol=1e-4, msg=str(case))


@pytest.mark.parametrize("case", CASES + EMPTY)
def test_the_reference(case):
    out, grad, weight = operands(2, case)
    want = out.clone()
    ops.conv_input_grad_(out, grad, weight, stride=case[3], padding=case[4])
    reference.conv_input_grad_(want, grad, weight, case[3], case[4])
    torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-5)


def test_it_is_the_adjoint():
    """<y, K x> = <K^T y, x>."""
    case = CASES[2]
    out, grad, weight = operands(3, case)
    x = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    image = functional.conv2d(x.double(), weight.double(), stride=case[3], padding=case[4]).movedim(1, 3)
    ops.conv_input_grad_(out, grad, weight, stride=case[3], padding=case[4])
    torch.testing.assert_close((grad * image).sum(), (out.double() * x).sum(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_pixels_that_it_should(case, value):
    """Vectors hold more than the outputs that a pixel meets."""
    out, grad, weight = operands(1, case)
    grad[0, 2, 3, 1] = value
    ops.conv_input_grad_(out, grad, weight, stride=case[3], padding=case[4])
    met = torch.nn.grad.conv2d_input(
        out.shape, torch.ones_like(weight), (~grad.isfinite()).float().movedim(3, 1), case[3], case[4]
    )
    assert torch.equal(out.isfinite(), met == 0)


@needs_native
@pytest.mark.parametrize("case", [CASES[0], CASES[2], (3, 24, (5, 5), (2, 3), (2, 1), (90, 40))])
def test_an_image_depends_on_neither_its_batch_nor_the_threads(case):
    out, grad, weight = operands(9, case)
    whole = ops.conv_input_grad_(out, grad, weight, stride=case[3], padding=case[4])
    threads = torch.get_num_threads()
    for rows, count in itertools.product((slice(0, 1), slice(3, 7), slice(0, 9)), (1, 2, 3, 8)):
        torch.set_num_threads(count)
        try:
            part = ops.conv_input_grad_(
                torch.empty_like(whole[rows]), grad[rows], weight, stride=case[3], padding=case[4]
            )
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(part, whole[rows])


def test_numbers_for_both_sides():
    out, grad, weight = operands(2, CASES[0])
    want = wanted(out, grad, weight, CASES[0]).float()
    torch.testing.assert_close(ops.conv_input_grad_(out, grad, weight, padding=1), want, atol=1e-4, rtol=1e-5)


@needs_native
def test_strides_beyond_the_map_cost_nothing():
    """Phases are those that pixels have: all strides would be 2^60."""
    weight, grad = torch.randn(4, 3, 3, 3), torch.randn(1, 1, 1, 4)
    out = ops.conv_input_grad_(torch.empty(1, 3, 5, 5), grad, weight, stride=2**30)
    want = torch.zeros(1, 3, 5, 5)
    want[:, :, :3, :3] = torch.einsum("k,kcij->cij", grad.flatten(), weight)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_nothing_to_do():
    case = CASES[0]
    out, grad, weight = operands(2, case)
    ops.conv_input_grad_(out[:0], grad[:0], weight, stride=case[3], padding=case[4])
    assert out.isnan().all()


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition or finite")


def test_opcheck():
    out, grad, weight = operands(2, CASES[3])
    arguments = (out.zero_(), grad, weight, [2, 2], [1, 1])
    torch.library.opcheck(torch.ops.fastlip.conv_input_grad_.default, arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 2, 12, 9).double()}, "out must be float32"),
        ({0: torch.zeros(2, 2, 12, 18)[..., ::2]}, "contiguous or channels_last"),
        ({0: torch.zeros(1, 2, 12, 9).expand(2, 2, 12, 9)}, "contiguous or channels_last"),
        ({0: torch.zeros(3, 2, 12, 9)}, "out must be"),
        ({0: torch.zeros(2, 2, 108)}, "out must be"),
        ({0: torch.zeros(2, 3, 12, 9)}, "weight must be"),
        ({0: torch.zeros(2, 2, 14, 9)}, "grad must have the height and width"),
        ({0: torch.zeros(2, 2, 1, 9)}, "grad must have the height and width"),
        ({1: torch.zeros(2, 6, 4, 5).half()}, "grad must be contiguous float32"),
        ({1: torch.zeros(2, 6, 4, 10)[..., ::2]}, "grad must be contiguous float32"),
        ({1: torch.zeros(2, 6, 5, 5)}, "grad must have the height and width"),
        ({1: torch.zeros(2, 6, 4, 6)}, "weight must be"),
        ({2: torch.zeros(5, 2, 4, 4).double()}, "weight must be contiguous float32"),
        ({2: torch.zeros(5, 2, 16)}, "weight must be"),
        ({2: torch.zeros(5, 2, 0, 4)}, "1 to 64 taps"),
        ({2: torch.zeros(5, 2, 65, 4)}, "1 to 64 taps"),
        ({3: [2]}, "two numbers"),
        ({3: [0, 2]}, "stride must be at least 1"),
        ({3: [2, 2**31]}, "at most 2"),
        ({4: [1, 2**63 - 1]}, "at most 2"),
        ({4: [1, -1]}, "padding at least 0"),
        ({4: [1, 1, 1]}, "two numbers"),
    ],
)
def test_direct_calls_are_checked(change, message):
    arguments = [*operands(2, CASES[3]), [2, 2], [1, 1]]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.conv_input_grad_(*arguments)

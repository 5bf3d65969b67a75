"""Convolutions of few channels and their adjoints against torch's in float64, on every instruction set."""

import itertools

import pytest
import torch
from instruction_sets import every_isa, run_with_isa
from torch.nn import functional

from fastlip import ops
from fastlip.ops import reference

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
FORMATS = (torch.contiguous_format, torch.channels_last)
both_passes = pytest.mark.parametrize("adjoint", [False, True])

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
    (4, 4, (1, 1), (1, 5), (0, 2), (3, 2)),  # all taps in a row of padding
    (34, 3, (3, 3), (2, 2), (1, 1), (18, 65)),
]
EMPTY = [
    (3, 0, (3, 3), (1, 1), (1, 1), (4, 4)),
    (0, 3, (3, 3), (1, 1), (1, 1), (4, 4)),
    (2, 3, (2, 2), (1, 1), (1, 1), (0, 5)),
    (2, 3, (1, 1), (2, 2), (1, 1), (3, 0)),
]


def geometry(case):
    return {"stride": case[3], "padding": case[4]}


def operands(batch, case, adjoint, seed=0):
    """An empty out, x and the weight; then a bias, another summand and where a ReLU is active."""
    channels, outputs, kernel, stride, padding, size = case
    generator = torch.Generator().manual_seed(seed)
    maps = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    image, result = (batch, channels, *size), (batch, outputs, *maps)
    source, target = (result, image) if adjoint else (image, result)
    weight = torch.randn(outputs, channels, *kernel, generator=generator)
    x, other, passed = (torch.randn(shape, generator=generator) for shape in (source, target, target))
    return torch.full(target, torch.nan), x, weight, torch.randn(target[1], generator=generator), other, passed > 0


def wanted(out, x, weight, case, adjoint, dtype=torch.float64):
    x, weight = x.to(dtype), weight.to(dtype)
    if adjoint:
        return torch.nn.grad.conv2d_input(out.shape, weight, x, case[3], case[4])
    return functional.conv2d(x, weight, None, case[3], case[4])


@both_passes
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_definition(case, batch, adjoint):
    out, x, weight, *_ = operands(batch, case, adjoint)
    want = wanted(out, x, weight, case, adjoint)
    sizes = wanted(out, x.abs(), weight.abs(), case, adjoint)  # of what is added up
    for given, own in itertools.product(FORMATS, FORMATS):
        found = torch.full_like(out, torch.nan, memory_format=own)
        x = x.contiguous(memory_format=given)
        assert ops.direct_conv_(found, x, weight, adjoint=adjoint, **geometry(case)) is found
        assert ((found - want).abs() <= 2e-6 * sizes).all()


@both_passes
def test_the_definition_on_random_convolutions(adjoint):
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for seed in range(200):
        kernel, stride, padding = ((number(low, high), number(low, high)) for low, high in ((1, 7), (1, 4), (0, 4)))
        size = tuple(number(max(1, k - 2 * p), 38) for k, p in zip(kernel, padding, strict=True))
        case = (number(1, 20), number(1, 40), kernel, stride, padding, size)
        out, x, weight, bias, other, active = operands(2, case, adjoint, seed)
        given, own = FORMATS[number(0, 1)], FORMATS[number(0, 1)]
        found = torch.full_like(out, torch.nan, memory_format=own)
        x, other, passed = (t.clone(memory_format=f) for t, f in ((x, given), (other, own), (active, own)))
        relu = bool(number(0, 1))
        then = {"bias": bias, "other": other, "relu": relu, "active": passed}
        ops.direct_conv_(found, x, weight, adjoint=adjoint, **then, **geometry(case))
        want = wanted(out, x, weight, case, adjoint) + bias[:, None, None] + other
        want = want.relu() if relu else torch.where(active, want, 0)
        assert torch.equal(passed, found > 0 if relu else active)
        torch.testing.assert_close(found, want.float(), atol=2e-4, rtol=1e-4, msg=str(case))


@both_passes
@pytest.mark.parametrize("case", CASES + EMPTY)
def test_the_reference(case, adjoint):
    out, x, weight, bias, other, active = operands(2, case, adjoint)
    want, none = out.clone(), torch.empty(0)
    if 0 in out.shape[1:]:
        bias, other, active = none, none, none
    for relu in (False, True):
        then = {"bias": bias, "other": other, "relu": relu, "active": active}
        ops.direct_conv_(out, x, weight, adjoint=adjoint, **then, **geometry(case))
        reference.direct_conv_(want, x, weight, bias, other, active, case[3], case[4], adjoint, relu)
        torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-5)
        assert not relu or torch.equal(active.view(out.shape), out > 0)


@both_passes
@pytest.mark.parametrize("case", CASES)
def test_the_result_may_take_the_place_of_other(case, adjoint):
    for layout in FORMATS:
        want, x, weight, _, other, active = operands(3, case, adjoint)
        want, other, active = (t.contiguous(memory_format=layout) for t in (want, other, active))
        ops.direct_conv_(want, x, weight, adjoint=adjoint, other=other, active=active, **geometry(case))
        ops.direct_conv_(other, x, weight, adjoint=adjoint, other=other, active=active, **geometry(case))
        assert torch.equal(other, want)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_adjoint(case):
    """<y, K x> = <K^T y, x>."""
    out, x, weight, *_ = operands(3, case, adjoint=False)
    y = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ops.direct_conv_(out, x, weight, **geometry(case))
    back = ops.direct_conv_(torch.empty_like(x), y, weight, adjoint=True, **geometry(case))
    products = (y.double() * out).sum(), (back.double() * x).sum()
    assert (products[0] - products[1]).abs() <= 1e-5 * (y.double() * out).norm() * weight.numel() ** 0.5


@both_passes
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[9], CASES[15]])
def test_what_is_not_finite_reaches_the_pixels_that_it_should(case, value, adjoint):
    """Vectors hold pixels of several rows, and zeros between them."""
    for layout in FORMATS:
        out, x, weight, *_ = operands(1, case, adjoint)
        x[0, -1, -1, 1] = value
        x = x.contiguous(memory_format=layout)
        ops.direct_conv_(out, x, weight, adjoint=adjoint, **geometry(case))
        met = wanted(out, (~x.isfinite()).float(), torch.ones_like(weight), case, adjoint)
        assert torch.equal(out.isfinite(), met == 0)


@both_passes
def test_what_follows_the_sums(adjoint):
    """Negative sums become 0 with ``relu``, NaN stays and is active, and where the ReLU is not active there is 0."""
    case = CASES[3]
    for layout in FORMATS:
        out, x, weight, bias, other, active = operands(2, case, adjoint)
        other[0, 0, 0, 0] = torch.nan
        out, other, active = (t.contiguous(memory_format=layout) for t in (out, other, active))
        sums = wanted(out, x, weight, case, adjoint) + bias[:, None, None] + other
        then = {"bias": bias, "other": other, "active": active}
        ops.direct_conv_(out, x, weight, adjoint=adjoint, relu=True, **then, **geometry(case))
        torch.testing.assert_close(out, sums.relu().float(), atol=1e-4, rtol=1e-4, equal_nan=True)
        assert out[0, 0, 0, 0].isnan()
        assert torch.equal(active, ~(out <= 0))
        ops.direct_conv_(out, x, weight, adjoint=adjoint, **then, **geometry(case))
        want = torch.where(active, sums, 0).float()
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert (out[~active] == 0).all()


@needs_native
@both_passes
@pytest.mark.parametrize("case", [CASES[0], CASES[2], (3, 24, (5, 5), (2, 3), (2, 1), (90, 40))])
def test_an_image_depends_on_neither_its_batch_nor_the_threads(case, adjoint):
    out, x, weight, *_ = operands(9, case, adjoint)
    whole = ops.direct_conv_(out, x, weight, adjoint=adjoint, **geometry(case))
    threads = torch.get_num_threads()
    for rows, count in itertools.product((slice(0, 1), slice(3, 7), slice(0, 9)), (1, 2, 3, 8)):
        torch.set_num_threads(count)
        try:
            part = ops.direct_conv_(torch.empty_like(whole[rows]), x[rows], weight, adjoint=adjoint, **geometry(case))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(part, whole[rows])


@needs_native
@both_passes
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[13], CASES[15]])
def test_nothing_outside_of_the_operands_is_read_or_written(case, adjoint):
    """Beside NaN and in memory of its own kind."""
    for given, own in itertools.product(FORMATS, FORMATS):
        out, x, weight, *_ = operands(2, case, adjoint)
        want = ops.direct_conv_(out.clone(), x, weight, adjoint=adjoint, **geometry(case))
        memory = torch.full((2, out.numel() + 128), torch.nan)
        around = torch.full((x.numel() + 128,), torch.nan)
        strides = [torch.empty_like(t, memory_format=f).stride() for t, f in ((out, own), (x, given))]
        result = memory[1, 64 : 64 + out.numel()].as_strided(out.shape, strides[0])
        source = around[64 : 64 + x.numel()].as_strided(x.shape, strides[1]).copy_(x)
        ops.direct_conv_(result, source, weight, adjoint=adjoint, **geometry(case))
        assert torch.equal(result, want)
        assert memory[1, :64].isnan().all()
        assert memory[1, 64 + out.numel() :].isnan().all()


def test_numbers_for_both_sides():
    out, x, weight, *_ = operands(2, CASES[0], adjoint=False)
    want = wanted(out, x, weight, CASES[0], adjoint=False).float()
    torch.testing.assert_close(ops.direct_conv_(out, x, weight, padding=1), want, atol=1e-4, rtol=1e-5)


def test_strides_beyond_the_map():
    case = (3, 4, (3, 3), (64, 64), (0, 0), (5, 5))
    for adjoint in (False, True):
        out, x, weight, *_ = operands(2, case, adjoint)
        ops.direct_conv_(out, x, weight, adjoint=adjoint, **geometry(case))
        torch.testing.assert_close(out, wanted(out, x, weight, case, adjoint).float(), atol=1e-5, rtol=1e-5)


@needs_native
@both_passes
@pytest.mark.parametrize("size", [(6, 1), (1, 6), (1, 1)])
def test_strides_along_axes_of_one_element_say_nothing(size, adjoint):
    case = (17, 18, (1, 1), (1, 1), (0, 0), size)
    out, x, weight, *_ = operands(1, case, adjoint)
    want = ops.direct_conv_(out.clone(), x, weight, adjoint=adjoint)

    def strange(t):
        strides = [99 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
        return torch.full((t.numel() + 99,), torch.nan).as_strided(t.shape, strides).copy_(t)

    assert torch.equal(ops.direct_conv_(strange(out), strange(x), weight, adjoint=adjoint), want)


@both_passes
def test_nothing_to_do(adjoint):
    out, x, weight, *_ = operands(2, CASES[0], adjoint)
    ops.direct_conv_(out[:0], x[:0], weight, adjoint=adjoint, **geometry(CASES[0]))
    assert out.isnan().all()


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition or finite or follows or outside")


@both_passes
def test_opcheck(adjoint):
    out, x, weight, bias, other, active = operands(2, CASES[3], adjoint)
    arguments = (out.zero_(), x, weight, bias, other, active, [2, 2], [1, 1], adjoint, True)
    torch.library.opcheck(torch.ops.fastlip.direct_conv_.default, arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 2, 12, 9).double()}, "out must be float32"),
        ({0: torch.zeros(2, 2, 12, 18)[..., ::2]}, "out .*contiguous or channels_last"),
        ({0: torch.zeros(1, 2, 12, 9).expand(2, 2, 12, 9)}, "contiguous or channels_last"),
        ({0: torch.zeros(3, 2, 12, 9)}, "x must be"),
        ({0: torch.zeros(2, 2, 108)}, "x must be"),
        ({0: torch.zeros(2, 3, 12, 9)}, "must"),
        ({0: torch.zeros(2, 2, 14, 9), 4: torch.empty(0), 5: torch.empty(0)}, "x must have the height and width"),
        ({0: torch.zeros(2, 2, 1, 9), 4: torch.empty(0), 5: torch.empty(0)}, "x must have the height and width"),
        ({1: torch.zeros(2, 5, 6, 4).half()}, "x must be float32"),
        ({1: torch.zeros(2, 5, 6, 8)[..., ::2]}, "x .*contiguous or channels_last"),
        ({1: torch.zeros(2, 5, 5, 4)}, "x must have the height and width"),
        ({1: torch.zeros(2, 6, 6, 4)}, "weight must be"),
        ({2: torch.zeros(5, 2, 4, 4).double()}, "weight must be contiguous float32"),
        ({2: torch.zeros(5, 2, 16)}, "weight must be"),
        ({2: torch.zeros(2, 5, 4, 4)}, "weight must be"),
        ({2: torch.zeros(5, 2, 0, 4)}, "1 to 64 taps"),
        ({2: torch.zeros(5, 2, 65, 4)}, "1 to 64 taps"),
        ({3: torch.zeros(5)}, "bias must have an element for each channel"),
        ({3: torch.zeros(2).double()}, "bias must be contiguous float32"),
        ({4: torch.zeros(2, 2, 12, 8)}, "other must be float32 on the CPU with out's shape and memory format"),
        (
            {4: torch.zeros(2, 2, 12, 9).contiguous(memory_format=torch.channels_last)},
            "other must be .*memory format",
        ),
        ({5: torch.zeros(1, 2, 12, 9)}, "active must be bool on the CPU with out's shape and memory format"),
        ({5: torch.zeros(2, 2, 12, 9)}, "active must be bool"),
        ({6: [2]}, "two numbers"),
        ({6: [0, 2]}, "stride must be 1 to 64"),
        ({6: [2, 65]}, "stride must be 1 to 64"),
        ({7: [1, 2**63 - 1]}, "padding must be 0 to"),
        ({7: [1, -1]}, "padding must be 0 to"),
        ({7: [1, 1, 1]}, "two numbers"),
    ],
)
def test_direct_calls_are_checked(change, message):
    arguments = [*operands(2, CASES[3], adjoint=True), [2, 2], [1, 1], True, False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.direct_conv_(*arguments)

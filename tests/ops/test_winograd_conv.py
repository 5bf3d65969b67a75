"""Winograd's filtering, and that of maps of 2x2 pixels, against convolutions in float64, on every instruction set."""

import itertools

import pytest
import torch
from instruction_sets import every_isa, run_with_isa
from torch.nn import functional

from fastlip import ops
from fastlip.ops import reference

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")

SIZES = [
    # height, width, channels, outputs, padding
    (1, 1, 1, 1, 1),
    (3, 3, 5, 7, 0),
    (4, 4, 16, 16, 1),
    (5, 7, 3, 70, 1),
    (8, 8, 33, 32, 1),
    (9, 6, 65, 33, 2),
    (2, 13, 48, 17, 1),
    (14, 15, 20, 40, 0),
    (4, 8, 300, 20, 1),
    (6, 6, 130, 15, 3),
    # of 2x2 pixels, and some close to that, which are not filtered as they are
    (2, 2, 1, 1, 1),
    (2, 2, 3, 17, 1),
    (2, 2, 64, 64, 1),
    (2, 2, 17, 130, 1),
    (2, 2, 130, 3, 1),
    (2, 2, 5, 17, 2),
    (4, 4, 17, 5, 0),
    (2, 3, 20, 17, 1),
    (3, 2, 17, 20, 1),
]
EMPTY = [
    (0, 0, 4, 5, 2),
    (0, 3, 4, 5, 1),
    (2, 5, 4, 3, 0),
    (5, 4, 0, 3, 1),
    (5, 4, 3, 0, 1),
    (2, 2, 0, 3, 1),
    (2, 2, 3, 0, 1),
]


def maps(pixels):
    """[B, H, W, C] as [B, C, H, W], channels_last."""
    return pixels.permute(0, 3, 1, 2)


def operands(batch, height, width, channels, outputs, padding, seed=0):
    """x, the kernel [outputs, channels, 3, 3], and what follows the sums."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (batch, height + 2 * padding - 2, width + 2 * padding - 2, outputs)
    extra = {"bias": random(outputs), "other": maps(random(*shape)), "active": maps(random(*shape)) > 0}
    kernel = random(outputs, channels, 3, 3) / max(9 * channels, 1) ** 0.5
    return maps(random(batch, height, width, channels)), kernel, extra


def packed(kernel, adjoint=False):
    """For the adjoint's operator, the weights of the convolution whose adjoint this kernel makes."""
    return ops.packed_taps(kernel.flatten(2).permute(2, 0, 1) if adjoint else kernel.flatten(2).permute(2, 1, 0))


def convolved(x, kernel, padding, turned, dtype=torch.float64):
    """By torch."""
    kernel = kernel.to(dtype).flip(2, 3) if turned else kernel.to(dtype)
    return functional.conv2d(x.to(dtype), kernel, padding=padding)


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_definition(sizes, batch):
    """Rounding is some five times that of sums of products: of their sizes, not of what they come to."""
    x, kernel, extra = operands(batch, *sizes)
    for adjoint in (False, True):
        sums = convolved(x, kernel, sizes[-1], adjoint)
        atol = 3e-6 * float(convolved(x.abs(), kernel.abs(), sizes[-1], adjoint).amax())
        for relu, count in itertools.product((False, True), range(len(extra) + 1)):
            for names in itertools.combinations(extra, count):
                chosen = {name: extra[name].clone() for name in names}
                out = torch.full_like(extra["other"], torch.nan)
                weight = packed(kernel, adjoint)
                assert ops.winograd_conv_(out, x, weight, adjoint=adjoint, relu=relu, **chosen) is out
                want = sums + (chosen["bias"][:, None, None] if "bias" in names else 0.0) + chosen.get("other", 0.0)
                want = want.relu() if relu else want
                if "active" in names:
                    want = want if relu else torch.where(extra["active"], want, 0.0)
                    assert torch.equal(chosen["active"], out > 0 if relu else extra["active"])
                torch.testing.assert_close(out, want.float(), atol=atol, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("sizes", SIZES + EMPTY)
def test_the_adjoint_definition_is_the_turned_kernel(sizes):
    """The same sums from the other convolution's weights, one multiply-add after the other."""
    x, kernel, extra = operands(5, *sizes)
    out, want = (torch.full_like(extra["other"], torch.nan) for _ in range(2))
    ops.winograd_conv_(out, x, packed(kernel, adjoint=True), adjoint=True, **extra)
    ops.winograd_conv_(want, x, packed(kernel.flip(2, 3)), **extra)
    assert torch.equal(out, want)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_result_may_take_the_place_of_other(sizes):
    x, kernel, extra = operands(5, *sizes)
    for adjoint in (False, True):
        want, out = torch.empty_like(extra["other"]), extra["other"].clone()
        ops.winograd_conv_(want, x, packed(kernel, adjoint), adjoint=adjoint, **extra)
        ops.winograd_conv_(out, x, packed(kernel, adjoint), adjoint=adjoint, **{**extra, "other": out})
        assert torch.equal(out, want)


@pytest.mark.parametrize("sizes", SIZES + EMPTY)
def test_the_reference(sizes):
    x, kernel, extra = operands(2, *sizes)
    out, want = (torch.full_like(extra["other"], torch.nan) for _ in range(2))
    for adjoint, relu in itertools.product((False, True), (False, True)):
        weight = packed(kernel, adjoint)
        ops.winograd_conv_(out, x, weight, adjoint=adjoint, relu=relu, **extra)
        reference.winograd_conv_(want, x, weight, adjoint, *extra.values(), relu)
        torch.testing.assert_close(out, want, atol=3e-5, rtol=1e-5)


@needs_native
def test_rounding_is_about_five_times_that_of_sums():
    """On what a network computes: positive maps, and weights whose squares add up to 1."""
    generator = torch.Generator().manual_seed(0)
    x = maps(torch.randn(8, 16, 16, 128, generator=generator).relu())
    kernel = torch.randn(64, 128, 3, 3, generator=generator) / (9 * 128) ** 0.5
    want = convolved(x, kernel, 1, False)
    out = ops.winograd_conv_(maps(torch.empty(8, 16, 16, 64)), x, packed(kernel))
    error, sums = ((found - want).norm() for found in (out, convolved(x, kernel, 1, False, torch.float32)))
    assert error < 2e-6 * want.norm()
    assert error < 10.0 * sums


@needs_native
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (3, 17), (17, 3), (64, 64), (130, 33), (512, 20)])
def test_maps_of_2x2_pixels_round_about_as_sums_do(channels, outputs, adjoint):
    x, kernel, extra = operands(256, 2, 2, channels, outputs, 1)
    want = convolved(x, kernel, 1, adjoint)
    out = ops.winograd_conv_(torch.empty_like(extra["other"]), x, packed(kernel, adjoint), adjoint=adjoint)
    error, sums = ((found - want).norm() for found in (out, convolved(x, kernel, 1, adjoint, torch.float32)))
    assert error < (4.0 if channels < 16 else 2.0) * sums
    assert (out - want).abs().amax() < 4e-7 * convolved(x.abs(), kernel.abs(), 1, adjoint).amax()


@needs_native
@pytest.mark.parametrize("adjoint", [False, True])
def test_maps_of_2x2_pixels_round_more_where_one_tap_outweighs_the_others(adjoint):
    """Positive maps, and the centre tap alone, which all products hold: about five times as much."""
    for channels, outputs in ((64, 64), (512, 20)):
        x, kernel, extra = operands(64, 2, 2, channels, outputs, 1)
        x = x.relu()
        kernel[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
        want = convolved(x, kernel, 1, adjoint)
        out = ops.winograd_conv_(torch.empty_like(extra["other"]), x, packed(kernel, adjoint), adjoint=adjoint)
        error, sums = ((found - want).norm() for found in (out, convolved(x, kernel, 1, adjoint, torch.float32)))
        assert error < 8.0 * sums


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_pixels_of_a_2x2_map_round_together(adjoint):
    """A pixel that is 1e4 times as large costs the others four digits, and other images none."""
    x, kernel, extra = operands(2, 2, 2, 32, 32, 1)
    x[0, :, 1, 1] *= 1e4
    out = ops.winograd_conv_(torch.empty_like(extra["other"]), x, packed(kernel, adjoint), adjoint=adjoint)
    error = (out - convolved(x, kernel, 1, adjoint)).abs()
    assert error[0].amax() < 0.1
    assert error[1].amax() < 1e-5


def test_values_up_to_1e36_do_not_overflow():
    x, kernel, extra = operands(2, 9, 9, 32, 32, 1)
    out = ops.winograd_conv_(torch.empty_like(extra["other"]), 1e36 * x.clamp(-3.0, 3.0), packed(kernel))
    assert out.isfinite().all()


def test_the_adjoint():
    """<y, K x> = <K^T y, x>, in which the turned kernel has the other padding."""
    x, kernel, extra = operands(3, 9, 7, 20, 36, 0)
    y = extra["other"]
    image = ops.winograd_conv_(torch.empty_like(y), x, packed(kernel))
    back = ops.winograd_conv_(torch.empty_like(x), y, packed(kernel), adjoint=True)
    torch.testing.assert_close((y.double() * image).sum(), (back.double() * x).sum(), rtol=1e-5, atol=1e-3)


def test_what_is_not_finite_reaches_the_pixels_that_it_should():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    out = ops.winograd_conv_(torch.empty(1, 1, 8, 8), x, packed(torch.ones(1, 1, 3, 3)), relu=True)
    assert out[0, 0, :2, :2].isnan().all()
    assert (out[0, 0, 4:, 4:] == 0).all()


def test_negative_sums_and_where_the_relu_is_active():
    active = torch.tensor([False, False, True, True]).view(1, 1, 1, 4)
    out, x = torch.empty(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = -1.0
    ops.winograd_conv_(out, x, packed(kernel), active=active)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, -1.0, -1.0]))
    ops.winograd_conv_(out, x, packed(kernel), relu=True, active=active)
    assert (out == 0).all()
    assert not active.any()
    ops.winograd_conv_(out, -x, packed(kernel), relu=True, active=active)
    assert active.all()


@needs_native
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("side", [2, 12])
def test_an_image_depends_on_neither_its_batch_nor_the_threads(side, adjoint):
    x, kernel, extra = operands(40, side, side, 72, 100, 1)
    weight = packed(kernel, adjoint)
    whole = ops.winograd_conv_(torch.empty_like(extra["other"]), x, weight, adjoint=adjoint, **extra)
    threads = torch.get_num_threads()
    for rows, count in itertools.product((slice(0, 1), slice(3, 10), slice(39, 40), slice(0, 40)), (1, 2, 3, 7)):
        part = torch.full_like(whole[rows], torch.nan)
        more = {name: t if name == "bias" else t[rows] for name, t in extra.items()}
        torch.set_num_threads(count)
        try:
            ops.winograd_conv_(part, x[rows], weight, adjoint=adjoint, **more)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("side", [2, 4])
def test_nothing_to_do(side):
    x, kernel, extra = operands(2, side, side, 3, 5, 1)
    memory = torch.ones_like(extra["other"])
    ops.winograd_conv_(memory[:0], x[:0], packed(kernel))
    assert (memory == 1).all()


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition")


def test_opcheck():
    x, kernel, extra = operands(2, 4, 5, 3, 6, 1)
    out = torch.zeros_like(extra["other"])
    arguments = (out, x, packed(kernel, True), True, *extra.values(), True)
    torch.library.opcheck(torch.ops.fastlip.winograd_conv_.default, arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: maps(torch.zeros(2, 4, 5, 6)).double()}, "out must be float32"),
        ({0: torch.zeros(2, 6, 4, 5)}, "out must be float32 on the CPU, channels_last"),
        ({0: maps(torch.zeros(2, 4, 5, 12))[:, ::2]}, "out must be float32 on the CPU, channels_last"),
        ({0: maps(torch.zeros(3, 4, 5, 6))}, "x must be"),
        ({0: torch.zeros(2, 20, 6)}, "x must be"),
        ({0: maps(torch.zeros(2, 5, 6, 6))}, "out must have x's height and width"),
        ({0: maps(torch.zeros(2, 6, 5, 6))}, "out must have x's height and width"),
        ({0: maps(torch.zeros(2, 0, 1, 6))}, "out must have x's height and width"),
        ({0: maps(torch.zeros(2, 4, 5, 17))}, "weight must be"),
        ({1: maps(torch.zeros(2, 4, 5, 3)).half()}, "x must be float32"),
        ({1: torch.zeros(2, 3, 4, 5)}, "x must be float32 on the CPU, channels_last"),
        ({1: maps(torch.zeros(2, 4, 5, 4))}, "weight must be"),
        ({2: torch.zeros(1, 27, 16).double()}, "weight must be contiguous float32"),
        ({2: torch.zeros(1, 36, 16)}, "weight must be"),
        ({3: True}, "weight must be .*9 . outputs"),
        ({4: torch.zeros(5)}, "bias must have"),
        ({4: torch.zeros(6).double()}, "bias must be contiguous float32"),
        ({5: maps(torch.zeros(2, 4, 5, 5))}, "other must be float32 on the CPU with out's shape"),
        ({5: torch.zeros(2, 6, 4, 5)}, "other must be .*memory format"),
        ({6: torch.zeros(2, 20, 6, dtype=torch.bool)}, "active must be bool on the CPU with out's shape"),
        ({6: maps(torch.zeros(2, 4, 5, 6))}, "active must be bool"),
    ],
)
def test_direct_calls_are_checked(change, message):
    x, kernel, extra = operands(2, 4, 5, 3, 6, 1)
    arguments = [maps(torch.zeros(2, 4, 5, 6)), x, packed(kernel), False, *extra.values(), False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.winograd_conv_(*arguments)


def test_rounding_goes_by_the_largest_pixel_that_a_tile_meets():
    """As the docstring says: a pixel that is 1e4 times as large costs its neighbours four digits, and no other tile."""
    x, kernel, extra = operands(1, 12, 12, 32, 32, 1)
    x[0, :, 0, 0] *= 1e4
    out = ops.winograd_conv_(torch.empty_like(extra["other"]), x, packed(kernel))
    error = (out - convolved(x, kernel, 1, False)).abs()[0]
    assert error[:, :4, :4].amax() < 0.1
    assert error[:, 4:, 4:].amax() < 1e-4

"""conv_norm against dense singular values of the convolution that torch itself applies."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.norms import NormInterval, NormOptions, Operator, conv_norm, conv_operator, operator_norms
from fastlip.norms._solvers.certificate import Array, power_bound
from fastlip.norms._solvers.eigenvalues import gram_matrix
from fastlip.norms._solvers.iteration_config import DEVICE_LIMITS

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def true_norm(weight: Tensor, size: tuple[int, ...], **kwargs: object) -> float:
    """Largest singular value of the float64 matrix whose columns are the module's images of the unit vectors."""
    channels = weight.shape[1] * int(kwargs.get("groups", 1))
    conv = CONV[len(size)](channels, weight.shape[0], tuple(weight.shape[2:]), bias=False, **kwargs).double()
    conv.weight = nn.Parameter(weight.double())
    with torch.no_grad():
        units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
        return torch.linalg.matrix_norm(conv(units).flatten(1), 2).item()


def random_case(seed: int) -> tuple[Tensor, tuple[int, ...], dict[str, object]]:
    """A random operator of at most a few hundred dimensions."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: object) -> object:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    while True:
        axes = pick(1, 2, 2, 2, 2, 3)
        top = {1: 24, 2: 9, 3: 4}[axes]
        kernel = tuple(int(torch.randint(1, 8 if axes < 3 else 4, (1,), generator=g)) for _ in range(axes))
        size = tuple(int(torch.randint(1, top + 1, (1,), generator=g)) for _ in range(axes))
        stride = tuple(pick(1, 1, 2, 3) for _ in range(axes))
        dilation = tuple(pick(1, 1, 2, 3) for _ in range(axes))
        mode = pick("zeros", "zeros", "zeros", "circular", "reflect", "replicate")
        padding = tuple(pick(0, 1, 2, k // 2, 3) for k in kernel)
        if pick(*range(6)) == 0 and max(stride) == 1:
            padding = "same"
        groups = pick(1, 1, 2, 3)
        cin, cout = groups * pick(1, 2, 3), groups * pick(1, 2, 3)
        if pick(*range(8)) == 0:
            groups, cout = cin, 2 * cin
        weight = torch.randn(cout, cin // groups, *kernel, generator=g)
        special = pick(*range(16))
        if special == 0:
            weight = weight[:1, :1].sign().expand_as(weight).clone()
        elif special == 1:
            weight = torch.zeros_like(weight)
        elif special == 2:
            weight = torch.zeros_like(weight)
            for c in range(min(weight.shape[:2])):
                weight[c, c][tuple(k // 2 for k in kernel)] = 1.0
        elif special in (3, 4):
            weight = weight.double() * (1e20 if special == 3 else 1e-20)
        kwargs = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
        try:
            conv = CONV[axes](cin, cout, kernel, **kwargs)
            conv(torch.zeros(1, cin, *size))
        except (RuntimeError, AssertionError):
            continue
        return weight, size, kwargs


def assert_holds(interval: NormInterval, truth: float) -> None:
    # The dense value itself is rounded.
    assert interval.lower <= truth * (1 + 1e-11), (interval, truth)
    assert interval.upper >= truth * (1 - 1e-11), (interval, truth)


def check_range(seeds: range, method: str) -> None:
    generator = torch.Generator().manual_seed(seeds.start)
    for seed in seeds:
        weight, size, kwargs = random_case(seed)
        interval = conv_norm(weight, size, method=method, generator=generator, max_steps=60, **kwargs)
        truth = true_norm(weight, size, **kwargs)
        assert_holds(interval, truth)
        if method in ("auto", "svd"):
            assert interval.upper <= truth * (1 + 1e-7)
            assert interval.lower >= truth * (1 - 1e-7)


@pytest.mark.parametrize("method", ["auto", "svd", "lanczos", "power"])
def test_holds_on_random_operators(method: str) -> None:
    check_range(range(75), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "lanczos", "power"])
def test_holds_on_many_random_operators(method: str) -> None:
    check_range(range(1000, 3000), method)


def check_together(seeds: range, device: str = "cpu", method: str = "lanczos", rtol: float = 1e-3) -> None:
    cases = [random_case(seed) for seed in seeds]
    ops = [conv_operator(weight.to(device), size, **kwargs) for weight, size, kwargs in cases]
    generator = torch.Generator().manual_seed(seeds.start)
    found = operator_norms(ops, NormOptions(method=method, max_steps=60, rtol=rtol, generator=generator))
    for interval, (weight, size, kwargs) in zip(found, cases, strict=True):
        assert_holds(interval, true_norm(weight, size, **kwargs))
    assert len({interval.iterations for interval in found}) > 3


@pytest.mark.parametrize(("method", "rtol"), [("lanczos", 1e-3), ("power", 0.1)])
def test_random_operators_hold_together(method: str, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one iteration, with a-posteriori bounds in groups of the size used on a GPU."""
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DEVICE_LIMITS["cuda"]._replace(steps=1))
    check_together(range(5000, 5120), method=method, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_operators_hold_together_on_the_device() -> None:
    check_together(range(5000, 5120), "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_many_random_operators_hold_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DEVICE_LIMITS[device]._replace(steps=1))
    check_together(range(6000, 8000))


@pytest.mark.parametrize("method", ["auto", "lanczos", "power", "svd"])
def test_kernel_whose_circular_norm_is_too_small(method: str) -> None:
    k = torch.tensor([-1.0, 2.0, -1.0])
    interval = conv_norm(torch.outer(k, k)[None, None], 7, padding=1, method=method)
    # The zero-padded second difference has eigenvalues 4 sin^2(j pi / 16) at n = 7.
    truth = (4 * math.sin(7 * math.pi / 16) ** 2) ** 2
    assert truth == pytest.approx(14.805, abs=1e-3)
    assert interval.lower <= truth * (1 + 1e-12)
    assert truth <= interval.upper <= truth * 1.011


def test_groups_are_maximised_not_multiplied() -> None:
    weight = torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1)
    interval = conv_norm(weight, 4, groups=2)
    assert interval.upper == pytest.approx(5.0)
    assert interval.lower == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("shape", "size", "kwargs"),
    [
        ((20, 30, 1, 1), (64, 48), {"stride": 2}),
        ((20, 30, 2, 2), (64, 48), {"stride": 2}),
        ((20, 30, 2, 3), (63, 50), {"stride": (4, 3)}),
        ((20, 30, 3, 3), (1, 1), {"padding": 1}),
        ((20, 30, 5, 7), (5, 7), {}),
        ((20, 30, 1, 1), (40, 40), {"padding": 2}),
        ((20, 10, 1, 1), (40, 40), {"groups": 2}),
    ],
)
def test_closed_forms_need_no_iteration_at_any_size(
    shape: tuple[int, ...], size: tuple[int, int], kwargs: dict
) -> None:
    weight = torch.randn(shape)
    interval = conv_norm(weight, size, **kwargs)
    matrix = weight[:, :, 1, 1] if kwargs == {"padding": 1} else weight.flatten(1)
    blocks = matrix.double().unflatten(0, (kwargs.get("groups", 1), -1))
    truth = torch.linalg.matrix_norm(blocks, 2).max().item()
    assert (interval.method, interval.iterations, interval.confidence) == ("closed form", 0, 1.0)
    assert interval.lower == pytest.approx(truth, rel=1e-9)
    assert interval.upper == pytest.approx(truth, rel=1e-9)
    assert interval.lower <= truth * (1 + 1e-12) <= interval.upper * (1 + 2e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weight_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8, 3, 3).to(dtype)
    assert_holds(conv_norm(weight, 6, padding=1), true_norm(weight, (6, 6), padding=1))


def test_the_ring_helps_out_where_the_iteration_is_cut_short() -> None:
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    short = {"padding": 1, "max_steps": 3, "generator": generator}
    iterated, joined = conv_norm(weight, 32, method="lanczos", **short), conv_norm(weight, 32, **short)
    ring = conv_norm(weight, 32, padding=1, method="ring", generator=generator)
    assert joined.method == "ring"
    assert joined.confidence == 1.0
    assert joined.upper < iterated.upper
    assert joined.upper == pytest.approx(ring.upper, rel=1e-2)
    # Reflect padding has no ring: the iteration's own interval is all there is.
    assert conv_norm(weight, 32, padding_mode="reflect", **short).method == "lanczos"


def test_large_operator_is_within_rtol_and_certified() -> None:
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    wide = conv_norm(weight, 20, padding=1, method="lanczos", generator=generator)
    tight = conv_norm(weight, 20, padding=1, method="lanczos", rtol=1e-3, dtype=torch.float64, generator=generator)
    assert wide.converged
    assert tight.converged
    assert wide.method == tight.method == "lanczos"
    assert wide.width <= 1e-2
    assert tight.width <= 1e-3
    assert wide.confidence == pytest.approx(1 - 1e-6)
    assert wide.lower <= tight.upper
    assert tight.lower <= wide.upper
    power = conv_norm(weight, 20, padding=1, method="power", generator=generator)
    assert power.lower <= tight.upper
    assert tight.lower <= power.upper


def test_scaling_by_powers_of_two_is_exact() -> None:
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    intervals = [
        conv_norm(weight * 2.0**e, 12, padding=1, method="lanczos", generator=torch.Generator().manual_seed(3))
        for e in (0, 300, -300)
    ]
    assert intervals[1].upper == intervals[0].upper * 2.0**300
    assert intervals[2].lower == intervals[0].lower * 2.0**-300


def test_extreme_weights() -> None:
    largest = conv_norm(torch.full((4, 4, 3, 3), 1e308, dtype=torch.float64), 4, padding=1)
    assert largest.upper == math.inf
    tiny = conv_norm(torch.full((1, 1, 1, 1), 5e-324, dtype=torch.float64), 4)
    assert tiny.lower <= 5e-324 <= tiny.upper
    zero = conv_norm(torch.zeros(4, 4, 3, 3), 16, padding=1)
    assert (zero.lower, zero.upper, zero.confidence, zero.converged) == (0.0, 0.0, 1.0, True)


def test_kernel_that_only_meets_padding() -> None:
    # The centre tap is zero, and at n = 1 it is the only one that meets the input.
    weight = torch.ones(2, 2, 3, 3)
    weight[:, :, 1, 1] = 0.0
    assert conv_norm(weight, 1, padding=1).upper == 0.0


@pytest.mark.parametrize("rank", [1, 3, 700])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_matrices_are_exact_by_factorisation(rank: int, groups: int) -> None:
    torch.manual_seed(rank)
    shape = (600 * groups, 700)
    weight = torch.randn(shape[0], rank, dtype=torch.float64) @ torch.randn(rank, 700, dtype=torch.float64)
    truth = torch.linalg.matrix_norm(weight.unflatten(0, (groups, 600)), 2).max().item()
    for options, width in (({"method": "svd"}, 2e-8), ({"rtol": 1e-3}, 1e-5)):
        interval = conv_norm(weight[:, :, None], 3, groups=groups, **options)
        assert interval.confidence == 1.0
        assert interval.method == ("svd" if "method" in options else "closed form")
        assert interval.width < width
        assert interval.lower <= truth * (1 + 1e-12)
        assert interval.upper >= truth * (1 - 1e-12)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (385, 385)])
def test_middling_matrices_are_no_more_exact_than_asked_for_and_hold(shape: tuple[int, int]) -> None:
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape, dtype=torch.float64)
    interval = conv_norm(weight[:, :, None], 3)
    truth = torch.linalg.matrix_norm(weight, 2).item()
    assert (interval.method, interval.confidence) == ("closed form", 1.0)
    assert interval.width <= 1e-4
    assert interval.lower <= truth * (1 + 1e-12)
    assert interval.upper >= truth * (1 - 1e-12)


def test_equal_singular_values_of_a_large_matrix() -> None:
    # No gap to converge in, and none needed.
    q, _ = torch.linalg.qr(torch.randn(640, 640, dtype=torch.float64))
    interval = conv_norm(3.0 * q[:, :, None], 2, method="svd")
    assert interval.lower <= 3.0 * (1 + 1e-12)
    assert 3.0 * (1 - 1e-12) <= interval.upper <= 3.0 * (1 + 1e-8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 127, 9), (1, 128, 200), (3, 300, 40), (1, 257, 1), (2, 0, 4)])
def test_gram_matrix_by_halves_is_the_gram_matrix(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(gram_matrix(matrices), matrices @ matrices.mT, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "svd", "cholesky", "lanczos", "power"])
def test_pixels_repeated_by_padding_whose_weights_cancel(method: str) -> None:
    """The only entry is 0.1 + 0.2 - 0.3, which float64 arithmetic computes as twice the exact sum."""
    weight = torch.tensor([[[0.1, 0.2, -0.3]]], dtype=torch.float64)
    truth = float(abs(Fraction(0.1) + Fraction(0.2) - Fraction(0.3)))
    interval = conv_norm(weight, 1, padding=1, padding_mode="replicate", method=method)
    assert interval.lower <= truth <= interval.upper


@pytest.mark.parametrize("channels", [3, 300])
@pytest.mark.parametrize("method", ["auto", "svd", "cholesky"])
def test_an_operator_that_padding_cancels_has_next_to_no_norm(channels: int, method: str) -> None:
    tap = torch.randn(channels, channels, 1, generator=torch.Generator().manual_seed(0))
    interval = conv_norm(torch.cat([tap, -tap], 2), 1, padding=1, padding_mode="replicate", method=method, max_steps=9)
    assert interval.lower == 0.0
    assert interval.upper < 1e-11


@pytest.mark.parametrize("method", ["auto", "svd", "cholesky", "ring", "lanczos", "power"])
@pytest.mark.parametrize("pads", [(2, -1), (-1, 2), (-2, -1)])
def test_every_method_has_the_same_operator_where_a_circular_input_is_cropped(
    pads: tuple[int, int], method: str
) -> None:
    """The whole input is repeated, including what the other side crops."""
    n, weight = 6, torch.tensor([[[1.0, 2.0, -3.0]]], dtype=torch.float64)
    copied = torch.eye(n, dtype=torch.float64)[torch.arange(-pads[0], n + pads[1]) % n]
    truth = torch.linalg.matrix_norm(F.conv1d(copied.T[:, None], weight)[:, 0], 2).item()
    op = Operator(weight, (n,), (1,), (1,), (pads,), 1, "circular")
    settings = NormOptions(method=method, rtol=1e-6, dtype=torch.float64)
    interval = operator_norms([op], settings)[0]
    assert_holds(interval, truth)
    if method != "ring":
        assert interval.width < 1e-2


def test_converged_is_said_of_the_interval_that_is_returned() -> None:
    """At the end of float64's range, rescaling makes the interval wider."""
    denormal = conv_norm(torch.full((1, 1, 2), 5e-324, dtype=torch.float64), 4)
    assert denormal.lower < denormal.upper
    assert not denormal.converged
    huge = conv_norm(torch.full((4, 4, 3), 1e308, dtype=torch.float64), 4)
    assert huge.upper == math.inf
    assert not huge.converged
    assert conv_norm(torch.full((4, 4, 3), 1e300, dtype=torch.float64), 4).converged


def test_power_iteration_bounds_less_often_the_more_steps_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(growth: Array, prefix: Array, *numbers: Array) -> Array:
        looks.append(prefix.shape[1])
        return power_bound(growth, prefix, *numbers)

    monkeypatch.setattr("fastlip.norms._solvers.power.power_bound", counted)
    interval = conv_norm(torch.ones(1, 1, 3), 12, padding=1, method="power", rtol=1e-15, max_steps=1234)
    assert interval.iterations == looks[-1] == 1234
    assert looks[:5] == [10, 20, 30, 40, 50]
    assert len(looks) < 60


def test_generator_decides_the_result_and_the_global_state_is_left_alone() -> None:
    weight = torch.randn(4, 4, 3, 3)
    state = torch.get_rng_state()
    runs = [
        conv_norm(weight, 24, padding=1, method="lanczos", generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    conv_norm(weight, 24, padding=1, method="lanczos")
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_unconverged_interval_says_so_and_still_holds() -> None:
    weight = torch.randn(4, 4, 3, 3)
    truth = true_norm(weight, (8, 8), padding=1)
    for method in ("lanczos", "power"):
        interval = conv_norm(weight, 8, padding=1, method=method, max_steps=3)
        assert not interval.converged
        assert interval.iterations == 3
        assert_holds(interval, truth)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stride": 2, "padding": "same"}, "padding='same' needs stride 1"),
        ({"padding": "full"}, "padding must be numbers"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"padding": 8, "padding_mode": "reflect"}, "padding must be smaller"),
        ({"padding": 9, "padding_mode": "circular"}, "padding must be at most"),
        ({"groups": 3}, "groups must divide"),
        ({"stride": 0}, "stride must be"),
        ({"stride": 2.0}, "stride must be"),
        ({"dilation": (1, 2, 3)}, "dilation must be"),
        ({"dilation": 4}, "smaller than the kernel"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"method": "fft"}, "method must be one of"),
        ({"starts": 0}, "starts must be"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"method": "svd", "max_memory": 8}, "raise max_memory"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_norm(torch.ones(4, 4, 3, 3), 8, **kwargs)


def test_one_start_is_for_float64() -> None:
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"starts=1 in torch\.float32 cannot be certified"):
        conv_norm(weight, 40, padding=1, method="lanczos", starts=1, confidence=1 - 1e-9)
    interval = conv_norm(weight, 9, padding=1, method="lanczos", starts=1, dtype=torch.float64)
    assert interval.converged
    assert_holds(interval, true_norm(weight, (9, 9), padding=1))


def test_strided_layer_of_resnet_size_converges_in_float32() -> None:
    # Strided kernels round more, and what rounding is charged must still leave the interval narrow.
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(1))
    interval = conv_norm(weight, 24, stride=2, padding=1, confidence=1 - 1e-6 / 20, method="lanczos")
    assert interval.method == "lanczos"
    assert interval.converged


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(4, 4, 3, 3)
    weight[1, 2, 0, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        conv_norm(weight, 8)


def test_weight_must_be_a_floating_point_kernel() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        conv_norm(torch.ones(4, 4, 3, 3, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match="kernel axes"):
        conv_norm(torch.ones(4, 4), 8)
    with pytest.raises(TypeError, match=r"torch\.Generator or None, got int"):
        conv_norm(torch.ones(4, 4, 3, 3), 8, generator=0)  # type: ignore[arg-type]  # what is refused


def test_lower_side_is_attained() -> None:
    # Power iteration in torch's own convolution never climbs above the upper side, and reaches the lower one.
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(5)).double()
    interval = conv_norm(weight, 24, padding=1)
    x = torch.randn(1, 8, 24, 24, dtype=torch.float64)
    for _ in range(400):
        x = F.conv_transpose2d(F.conv2d(x, weight, padding=1), weight, padding=1)
        x /= x.norm()
    reached = F.conv2d(x, weight, padding=1).norm().item()
    assert interval.lower * (1 - 1e-2) <= reached <= interval.upper


def test_memory_that_nobody_named(monkeypatch):
    """The default is 2 GiB, on a GPU half of the free memory, including what torch has cached."""
    from fastlip.norms import memory_for

    assert memory_for(5, []) == 5
    assert memory_for(None, []) == memory_for(None, [torch.zeros(1)]) == 2**31
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * 2**30)

    class OnGPU:
        device = torch.device("cuda:0")

    assert memory_for(None, [OnGPU()]) == 32 * 2**30

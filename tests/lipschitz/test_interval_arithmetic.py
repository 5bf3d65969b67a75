"""Interval arithmetic: exact values, of rational arithmetic or of mpmath, never leave the bounds."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._slopes import slope_bounds
from fastlip.norms import Operator, conv_operator, module_operator
from fastlip.norms._operators.dense import dense_matrix

INF = float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def interval(*shape: int, width: float, scale: float = 1.0, seed: int = 0) -> Interval:
    x = scale * random(*shape, seed=seed)
    radius = abs(scale) * width * random(*shape, seed=seed + 1).abs()
    return Interval(x - radius, x + radius)


def inside(x: Interval, seed: int, corner: bool = False) -> torch.Tensor:
    t = torch.rand(x.lower.shape, generator=generator(seed), dtype=torch.float64)
    t = t.round() if corner else t
    return torch.minimum(torch.maximum(x.lower * (1.0 - t) + x.upper * t, x.lower), x.upper)


def assert_exactly_inside(y: Interval, exact: list, shape_of: torch.Tensor) -> None:
    """``exact`` are rational or mpmath numbers, in the order of the elements of ``y``."""
    assert y.lower.shape == shape_of.shape
    for low, high, value in zip(y.lower.flatten().tolist(), y.upper.flatten().tolist(), exact, strict=True):
        assert low == -INF or low <= value
        assert high == INF or value <= high


def exact_product(matrix: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> list[Fraction]:
    """Rows of x, [B, n], times a matrix [m, n], in rational arithmetic."""
    weights = [[Fraction(v) for v in row] for row in matrix.tolist()]
    offsets = [Fraction(0)] * len(weights) if bias is None else [Fraction(v) for v in bias.tolist()]
    found = []
    for row in x.tolist():
        numbers = [Fraction(v) for v in row]
        found += [
            sum(a * b for a, b in zip(w, numbers, strict=True)) + o for w, o in zip(weights, offsets, strict=True)
        ]
    return found


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e150])
@pytest.mark.parametrize("width", [0.0, 1e-16, 0.5])
def test_linear_layers_round_outwards(width, scale):
    layer = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(scale)
    x = interval(3, 7, width=width, scale=scale, seed=4)
    y = arithmetic.through_operator(module_operator(layer, (7,)), x, layer.bias)
    for seed in range(4):
        point = inside(x, seed, corner=True)
        assert_exactly_inside(y, exact_product(layer.weight, point, layer.bias), y.lower)
    spread = (y.upper - y.lower).amax() if scale == 1.0 else torch.zeros(())
    assert spread <= 2.0 * (layer.weight.abs() @ (0.5 * (x.upper - x.lower)).T).amax() + 1e-13


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": 2, "padding": 2},
        {"dilation": 2, "padding": "same"},
        {"groups": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate", "stride": 2},
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_every_geometry_round_outwards(settings, transposed):
    operator = conv_operator(random(4, 4 // settings.get("groups", 1), 3), 6, **settings)
    blocks = dense_matrix(operator)
    matrix = torch.block_diag(*blocks)
    matrix, shape = (matrix.mT, operator.output_shape) if transposed else (matrix, operator.input_shape)
    for width in (0.0, 0.3):
        x = interval(2, *shape, width=width, seed=8)
        y = arithmetic.through_operator(operator, x, transposed=transposed)
        for seed in range(3):
            point = inside(x, seed, corner=True)
            assert_exactly_inside(y, exact_product(matrix, point.flatten(1)), y.lower)
        reach = (x.upper - x.lower).flatten(1) @ matrix.abs().mT
        found = (y.upper - y.lower).flatten(1)
        # Where a pixel is repeated, a sum of weights is taken for their magnitudes' sum.
        repeats = settings.get("padding_mode") in ("reflect", "replicate")
        assert (found >= reach - 1e-12).all() if repeats else torch.allclose(found, reach, atol=1e-12)


def test_an_element_is_bounded_by_its_row_and_the_norm_of_the_input():
    weight = random(3, 400)
    x = Interval(torch.full((1, 400), -1.0), torch.full((1, 400), 1.0), torch.tensor([2.0]))
    y = arithmetic.through_operator(module_operator(_linear(weight), (400,)), x)
    assert torch.allclose(y.upper, 2.0 * weight.norm(dim=1), rtol=1e-9)
    worst = 2.0 * weight / weight.norm(dim=1, keepdim=True)
    assert (y.upper[0] >= (weight * worst).sum(1)).all()


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    layer.weight.data = weight
    return layer


def test_what_reads_an_unbounded_input_is_unbounded_and_the_rest_is_not():
    weight = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1e-320, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    x = Interval(torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[1.0, 5.0, INF]]))
    y = arithmetic.through_operator(module_operator(_linear(weight), (3,)), x)
    assert y.lower.tolist() == [[-INF] * 3]
    assert not y.upper.isnan().any()
    x = Interval(torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[1.0, 5.0, 2.0]]))
    y = arithmetic.through_operator(module_operator(_linear(weight), (3,)), x)
    assert y.lower.isfinite().tolist() == [[True, False, True]]
    assert y.upper.isfinite().tolist() == [[True, False, True]]


def test_overflow_is_unbounded():
    x = Interval.box(-1e200, 1e200, (3,))
    y = arithmetic.through_operator(module_operator(_linear(1e200 * random(2, 3)), (3,)), x)
    assert (y.lower == -INF).all()
    assert (y.upper == INF).all()


mpmath.mp.prec = 200


def _mp_gelu(x: mpmath.mpf) -> mpmath.mpf:
    return x * (1 + mpmath.erf(x / mpmath.sqrt(2))) / 2


def _mp_gelu_tanh(x: mpmath.mpf) -> mpmath.mpf:
    return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2


def _mp_sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def _mp_selu(x: mpmath.mpf) -> mpmath.mpf:
    alpha, scale = mpmath.mpf("1.6732632423543772848170429916717"), mpmath.mpf("1.0507009873554804934193349852946")
    return scale * (x if x > 0 else alpha * mpmath.expm1(x))


def _mp_softplus(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(x))


ACTIVATIONS = [
    (nn.ReLU(inplace=True), lambda x: max(x, mpmath.mpf(0))),
    (nn.ReLU6(), lambda x: min(max(x, mpmath.mpf(0)), mpmath.mpf(6))),
    (nn.Hardtanh(-0.5, 2.0), lambda x: min(max(x, mpmath.mpf(-0.5)), mpmath.mpf(2))),
    (nn.Sigmoid(), _mp_sigmoid),
    (nn.Hardsigmoid(), lambda x: min(max(x / 6 + mpmath.mpf(0.5), mpmath.mpf(0)), mpmath.mpf(1))),
    (nn.Tanh(), mpmath.tanh),
    (nn.Softsign(), lambda x: x / (1 + abs(x))),
    (nn.Tanhshrink(), lambda x: x - mpmath.tanh(x)),
    (nn.Softshrink(0.5), lambda x: x - mpmath.sign(x) * mpmath.mpf(0.5) if abs(x) > 0.5 else mpmath.mpf(0)),
    (nn.LogSigmoid(), lambda x: -_mp_softplus(-x)),
    (nn.SELU(), _mp_selu),
    (nn.ELU(0.75), lambda x: x if x > 0 else mpmath.mpf(0.75) * mpmath.expm1(x)),
    (nn.ELU(-0.75), lambda x: x if x > 0 else mpmath.mpf(-0.75) * mpmath.expm1(x)),
    (nn.CELU(2.0), lambda x: x if x > 0 else 2 * mpmath.expm1(x / 2)),
    (nn.GELU(), _mp_gelu),
    (nn.GELU("tanh"), _mp_gelu_tanh),
    (nn.SiLU(), lambda x: x * _mp_sigmoid(x)),
    (nn.Mish(), lambda x: x * mpmath.tanh(_mp_softplus(x))),
    (nn.Hardswish(), lambda x: x * min(max(x / 6 + mpmath.mpf(0.5), mpmath.mpf(0)), mpmath.mpf(1))),
    (nn.Softplus(), _mp_softplus),
    (nn.RReLU(0.25, 0.75), lambda x: x if x > 0 else x / 2),
    (nn.Threshold(0.5, 0.5), lambda x: max(x, mpmath.mpf(0.5))),
    (nn.LeakyReLU(0.25), lambda x: x if x > 0 else x / 4),
    (nn.LeakyReLU(-0.25), lambda x: x if x > 0 else -x / 4),
]


@pytest.mark.parametrize(("module", "exact"), ACTIVATIONS, ids=lambda a: repr(a) if isinstance(a, nn.Module) else "")
def test_activations_keep_their_values(module, exact):
    ends = sorted([-800.0, -40.0, -20.5, -5.0, -3.0, -1.6, -1.3, -1.2, -1.1, -0.76, -0.7, -1e-9, 0.0, 0.3, 4.0, 50.0])
    pairs = [(a, b) for i, a in enumerate(ends) for b in ends[i:]]
    x = Interval(*(torch.tensor([end], dtype=torch.float64) for end in zip(*pairs, strict=True)))
    before = x.lower.clone()
    y = arithmetic.module_interval(module, x)
    assert torch.equal(x.lower, before)
    values = {}
    for point in {*ends, *(0.5 * (a + b) for a, b in pairs), *torch.linspace(-3, 0, 25).tolist()}:
        values[point] = exact(mpmath.mpf(point))
    for (a, b), low, high in zip(pairs, y.lower[0].tolist(), y.upper[0].tolist(), strict=True):
        some = [v for point, v in values.items() if a <= point <= b]
        assert low <= min(some), (a, b, low, float(min(some)))
        assert max(some) <= high, (a, b, high, float(max(some)))
        # Not much wider than what was seen.
        assert high - low <= float(max(some) - min(some)) * 1.2 + 2e-2
    unknown = arithmetic.module_interval(module, Interval.unbounded((3,)))
    assert not (unknown.lower.isnan() | unknown.upper.isnan()).any()
    assert (unknown.lower <= float(min(values.values()))).all()
    assert (unknown.upper >= float(max(values.values()))).all()


@pytest.mark.parametrize("module", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()])
def test_least_values_of_activations_are_where_they_are_said_to_be(module):
    x = torch.linspace(-4.0, 1.0, 1_000_001, dtype=torch.float64)
    y = module(x)
    at = x[y.argmin()].item()
    narrow = arithmetic.module_interval(module, Interval.box(at - 1e-6, at + 1e-6, (1,)))
    assert y.min().item() - 1e-4 <= narrow.lower.item() <= y.min().item()
    beside = arithmetic.module_interval(module, Interval.box(at + 0.01, at + 0.02, (1,)))
    assert beside.lower.item() > y.min().item()


def test_prelu_by_channel():
    module = nn.PReLU(3)
    module.weight.data = torch.tensor([0.5, -2.0, 1.5])
    x = interval(4, 3, 5, width=2.0)
    y = arithmetic.module_interval(module, x)
    for seed in range(50):
        value = F.prelu(inside(x, seed, corner=seed % 2 == 0), module.weight.double())
        assert ((y.lower <= value) & (value <= y.upper)).all()


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.AdaptiveMaxPool2d(2),
        nn.AvgPool2d(2, 1, 1),
        nn.AvgPool2d(2, divisor_override=-3),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.Flatten(),
        nn.PixelShuffle(2),
        nn.ZeroPad2d(1),
        nn.Dropout().eval(),
    ],
)
def test_pools_and_moves(module):
    x = interval(2, 4, 5, 4, width=0.5)
    y = arithmetic.module_interval(module, x)
    for seed in range(40):
        value = module(inside(x, seed, corner=seed % 2 == 0))
        slack = 1e-15 * value.abs()  # of this evaluation
        assert ((y.lower - slack <= value) & (value <= y.upper + slack)).all()
        assert (value.flatten(1).norm(dim=1) <= y.norm * (1.0 + 1e-14)).all()
    unknown = arithmetic.module_interval(module, Interval.unbounded((4, 5, 4)))
    assert (unknown.lower[0, 0] <= -1e300).any()
    assert unknown.shape == y.shape


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160])
def test_products_sums_and_quotients_in_rational_arithmetic(scale):
    a, b = interval(2, 40, width=0.7, scale=scale), interval(2, 40, width=0.7, scale=scale, seed=5)
    results = {
        "sum": (arithmetic.add(a, b), lambda s, t: s + t),
        "difference": (arithmetic.subtract(a, b), lambda s, t: s - t),
        "product": (arithmetic.multiply(a, b), lambda s, t: s * t),
        "quotient": (arithmetic.divide(a, b), lambda s, t: s / t),
        "scaled": (arithmetic.scale(a, -3.7), lambda s, t: s * Fraction(-3.7)),
        "shifted": (arithmetic.shift(a, 0.1), lambda s, t: s + Fraction(0.1)),
    }
    for y, exact in results.values():
        for seed in range(4):
            p, q = inside(a, seed, corner=True), inside(b, seed + 9, corner=seed < 3)
            pairs = zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)
            assert_exactly_inside(y, [exact(Fraction(s), Fraction(t)) for s, t in pairs], p)
    straddles = (b.lower <= 0.0) & (b.upper >= 0.0)
    assert straddles.any()
    assert (results["quotient"][0].upper[straddles] == INF).all()


def test_products_with_unbounded_factors():
    zero, nothing = Interval.box(0.0, 0.0, (2,)), Interval.unbounded((2,))
    assert arithmetic.multiply(zero, nothing).magnitude().max() < 1e-300
    assert arithmetic.multiply(Interval.box(0.0, 1.0, (2,)), nothing).magnitude().min() == INF
    assert arithmetic.divide(Interval.box(1.0, 2.0, (2,)), Interval.box(0.0, 1.0, (2,))).magnitude().min() == INF


@pytest.mark.parametrize("width", [0.0, 0.4])
def test_matrix_products_in_rational_arithmetic(width):
    a, b = interval(2, 3, 4, width=width), interval(2, 4, 2, width=width, seed=7)
    y = arithmetic.matmul(a, b)
    for seed in range(5):
        p, q = inside(a, seed, corner=True), inside(b, seed + 5, corner=True)
        exact = [
            sum(Fraction(p[s, i, k].item()) * Fraction(q[s, k, j].item()) for k in range(4))
            for s in range(2)
            for i in range(3)
            for j in range(2)
        ]
        assert_exactly_inside(y, exact, y.lower)
        assert ((p @ q).flatten(1).norm(dim=1) <= y.norm).all()


def test_concatenation_of_one_domain_and_of_several():
    a, b = interval(3, 2, 4, width=0.1), Interval.box(0.0, 1.0, (5, 4))
    y = arithmetic.concatenate([a, b], 1)
    assert y.lower.shape == (3, 7, 4)
    assert (y.norm >= (a.norm.square() + b.norm.square()).sqrt()).all()
    assert (y.norm <= (a.norm.square() + b.norm.square()).sqrt() * (1.0 + 1e-12)).all()


@pytest.mark.parametrize(("width", "scale"), [(0.0, 1.0), (0.1, 1.0), (1.0, 30.0), (0.0, 300.0)])
def test_softmax_against_mpmath(width, scale):
    x = interval(2, 5, 3, width=width, scale=scale)
    y = arithmetic.softmax(x, 1)
    for seed in range(5):
        p = inside(x, seed, corner=True)
        exact = []
        for s in range(2):
            powers = [[mpmath.exp(mpmath.mpf(v)) for v in row] for row in p[s].tolist()]
            sums = [sum(row[j] for row in powers) for j in range(3)]
            exact += [row[j] / sums[j] for row in powers for j in range(3)]
        assert_exactly_inside(y, exact, p)
    if width == 0.0:
        assert (y.upper - y.lower).max() < 1e-13 * scale
    assert (y.norm <= math.sqrt(3.0) * (1.0 + 1e-14)).all()


def test_softmax_of_what_is_unbounded_is_between_0_and_1():
    x = Interval(torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([[INF, 5.0, 800.0]]))
    y = arithmetic.softmax(x, 1)
    assert y.lower.tolist() == [[0.0] * 3]
    assert y.upper.tolist() == [[1.0] * 3]
    masked = arithmetic.softmax(Interval(torch.tensor([[0.0, -INF]]), torch.tensor([[0.0, -INF]])), 1)
    assert masked.lower[0, 0] > 1.0 - 1e-13
    assert masked.upper[0, 1] < 1e-13


@pytest.mark.parametrize("width", [0.0, 1e-3, 0.3, 100.0, INF])
@pytest.mark.parametrize("centred", [True, False])
def test_normalisation_stays_within_the_better_of_two_bounds(width, centred):
    x = interval(3, 4, 8, width=width) if width < INF else Interval.unbounded((4, 8), 3)
    weight, bias = random(8, seed=3), random(8, seed=4)
    y = arithmetic.normalised(x, (-1,), 1e-5, centred=centred, weight=weight, bias=bias)
    assert (y.magnitude() <= math.sqrt(7.0 if centred else 8.0) * weight.abs() + bias.abs() + 1e-12).all()
    assert (y.norm <= math.sqrt(32.0) * weight.abs().max() + 2.0 * bias.norm() + 1e-9).all()
    bounded = Interval(x.lower.clamp_min(-1e3), x.upper.clamp_max(1e3))
    for seed in range(60):
        p = inside(bounded, seed, corner=seed % 2 == 0)
        mean = p.mean(-1, keepdim=True) if centred else 0.0
        value = (p - mean) / ((p - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        slack = 1e-14 if width == 0.0 else 0.0
        assert ((y.lower - slack <= value) & (value <= y.upper + slack)).all()
        assert (value.flatten(1).norm(dim=1) <= y.norm + slack).all()
    if width == 0.0:
        assert (y.upper - y.lower).max() < 1e-11


def test_moves_take_the_interval_where_it_is_among_the_arguments():
    x = interval(2, 3, 4, width=0.5)
    y = arithmetic.moved(torch.permute)(x, (0, 2, 1))
    assert torch.equal(y.lower, x.lower.permute(0, 2, 1))
    assert torch.equal(y.upper, x.upper.permute(0, 2, 1))
    assert torch.equal(y.norm, x.norm)


@pytest.mark.parametrize(("module", "exact"), ACTIVATIONS, ids=lambda a: repr(a) if isinstance(a, nn.Module) else "")
def test_slopes_of_points_against_mpmath(module, exact):
    points = torch.tensor(
        [[-90.0, -7.3, -3.7, -2.9, -1.41, -0.7, -0.1, 0.1, 0.6, 1.49, 2.4, 3.9, 7.1, 30.0, 1e3]]
    ).double()
    low, high = slope_bounds(module, Interval(points, points))
    for point, a, b in zip(points[0].tolist(), low[0].tolist(), high[0].tolist(), strict=True):
        slope = mpmath.diff(exact, mpmath.mpf(point))
        assert a <= slope + mpmath.mpf(10) ** -30
        assert slope <= b + mpmath.mpf(10) ** -30


@pytest.mark.parametrize("turned", [False, True])
def test_products_with_matrices_of_positive_elements_keep_their_sign(turned):
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    positive = Interval(drawn(1, 3, 4, 4), 1.0 + drawn(1, 3, 4, 4))
    low = drawn(1, 3, 4, 4) - 0.5
    low[..., 0, :], low[..., 0] = 0.0, 0.0
    other = Interval(low, low.abs() + drawn(1, 3, 4, 4))
    pair = (positive, other) if turned else (other, positive)
    known = arithmetic.matmul(*pair)
    row = known.lower[..., 0] if turned else known.lower[..., 0, :]
    assert bool((row >= 0.0).all())
    for _ in range(50):
        a, b = (x.lower + (x.upper - x.lower) * drawn(*x.lower.shape).round() for x in pair)
        assert bool((known.lower <= a @ b).all() and (a @ b <= known.upper).all())
    zero = Interval(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    nothing = arithmetic.matmul(zero, Interval(torch.ones(1, 2, 2), torch.ones(1, 2, 2)))
    assert bool((nothing.lower == 0.0).all() and (nothing.upper == 0.0).all())


def test_a_point_beside_a_box_through_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, centre = (torch.randn(*shape, generator=generator).double() for shape in ((5, 7), (1, 3, 7)))
    weight[0] = 1e-200 * weight[0]
    operator, point = Operator(weight), Interval(centre, centre)
    box = Interval(centre - 0.5, centre + 0.5)
    for other in (Interval(1e-250 * centre.abs() - 1e-300, 1e-250 * centre.abs()), point):
        both = Interval(torch.cat([box.lower, other.lower]), torch.cat([box.upper, other.upper]))
        found = arithmetic.through_operator(operator, both)
        alone = arithmetic.through_operator(operator, box)
        assert torch.equal(found.lower[:1], alone.lower)
        assert torch.equal(found.upper[:1], alone.upper)
        corners = torch.stack([other.lower[0], other.upper[0], 0.5 * (other.lower + other.upper)[0]])
        for corner in corners:
            exact = [
                [sum(Fraction(w) * Fraction(t) for w, t in zip(row, column, strict=True)) for row in weight.tolist()]
                for column in corner.tolist()
            ]
            for at, column in enumerate(exact):
                for i, value in enumerate(column):
                    assert Fraction(found.lower[1, at, i].item()) <= value <= Fraction(found.upper[1, at, i].item())
    width = (found.upper - found.lower)[1]
    assert bool((width <= 1e-12).all())

"""The constants of activations and pooling, derived; the registry; and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import Tensor, nn

import fastlip
from fastlip.lipschitz import FunctionCall, _registry, lipschitz_bound, require_rules, rule

#: Constants of functions below.
POINTS = torch.linspace(-1.0, 1.0, 30).view(5, 6)
CHOICE = torch.arange(6) % 2 == 0

SMOOTH = [
    nn.CELU(2.0), nn.ELU(0.5), nn.ELU(3.0), nn.GELU(), nn.GELU("tanh"), nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(),
    nn.LeakyReLU(0.1), nn.LeakyReLU(-3.0), nn.LogSigmoid(), nn.Mish(), nn.PReLU(init=-2.5), nn.ReLU(), nn.ReLU6(),
    nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.Softplus(3.0), nn.Softshrink(), nn.Softsign(), nn.Tanh(),
    nn.RReLU(), nn.RReLU(-2.0, -1.0), nn.Threshold(0.5, 0.5), nn.Threshold(-1.0, -1.0), nn.Hardshrink(0.0),
    nn.Tanhshrink(),
]  # fmt: skip


@pytest.mark.parametrize("module", SMOOTH, ids=repr)
def test_activation_constants_are_the_largest_slope_rounded_upwards(module: nn.Module) -> None:
    x = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(module.double().eval()(x).sum(), x)
    largest = slope.abs().max().item()
    constant = lipschitz_bound(module, (3,)).upper
    assert largest <= constant * (1 + 1e-12)
    assert constant <= largest * 1.0003


POOLS = [
    (nn.AvgPool2d(2), (1, 6, 6)),
    (nn.AvgPool2d(3, 2, 1), (1, 7, 8)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 7, 8)),
    (nn.AvgPool2d((2, 3), ceil_mode=True), (1, 7, 8)),
    (nn.AvgPool2d(3, 1, divisor_override=2), (1, 6, 5)),
    (nn.AvgPool3d(2, 1), (1, 3, 4, 3)),
    (nn.AdaptiveAvgPool2d(1), (1, 5, 4)),
    (nn.AdaptiveAvgPool2d((None, 3)), (1, 5, 4)),
    (nn.AdaptiveAvgPool2d(7), (1, 1, 1)),
    (nn.AdaptiveAvgPool1d(4), (1, 7)),
]


@pytest.mark.parametrize(("module", "shape"), POOLS, ids=repr)
def test_average_pools_are_their_matrix_norm(module: nn.Module, shape: tuple[int, ...]) -> None:
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    truth = torch.linalg.matrix_norm(module(units).flatten(1), 2).item()
    bound = lipschitz_bound(module, shape).upper
    assert bound == pytest.approx(truth, rel=1e-9)
    assert bound >= truth * (1 - 1e-12)


@pytest.mark.parametrize(
    ("module", "size", "squared"),
    [
        (nn.MaxPool2d(3, 2, 1), 8, 4),
        (nn.MaxPool2d(2), 8, 1),
        (nn.MaxPool2d(3, 1), 8, 9),
        (nn.MaxPool2d(3, 2, dilation=2), 12, 9),
        (nn.MaxPool2d(3, 3, dilation=2), 12, 1),
        (nn.MaxPool2d(3, 2, ceil_mode=True), 8, 4),
        (nn.MaxPool2d(4, 4), 3 + 1, 1),
        (nn.AdaptiveMaxPool2d(3), 5, 4),
        (nn.AdaptiveMaxPool2d(1), 5, 1),
    ],
    ids=repr,
)
def test_max_pools_are_bounded_and_the_bound_is_attained(module: nn.Module, size: int, squared: int) -> None:
    bound = lipschitz_bound(module, (1, size, size)).upper
    assert bound == pytest.approx(math.sqrt(squared))
    # One raised pixel lifts every window it lies in.
    spikes = torch.eye(size * size).reshape(-1, 1, size, size)
    assert module(spikes).flatten(1).norm(dim=1).max().item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        F.relu, F.relu6, torch.tanh, torch.sigmoid, F.silu, F.gelu, F.softplus, F.hardswish,
        lambda x: x.relu(), lambda x: F.leaky_relu(x, 0.2), lambda x: F.elu(x, alpha=1.5), lambda x: -2.0 * x,
        lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1), lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 3, 1), lambda x: F.adaptive_avg_pool2d(x, (1, 1)), lambda x: x.mean([2, 3]),
        lambda x: F.softshrink(x, 0.2), lambda x: F.threshold(x, 0.1, 0.1), lambda x: F.rrelu(x),
        lambda x: F.hardshrink(x, 0.0),
        lambda x: F.instance_norm(x, eps=0.1),
        lambda x: F.instance_norm(x, weight=torch.tensor([2.0, -1.0]).to(x), eps=0.1),
        lambda x: F.instance_norm(x, torch.zeros(2).to(x), torch.tensor([4.0, 0.25]).to(x), use_input_stats=False),
        lambda x: torch.cdist(x[:, 0], POINTS[None].to(x)), lambda x: torch.cdist(POINTS[None].to(x), x[:, 1]),
        lambda x: torch.cdist(x[:, :1], POINTS.view(1, 5, 1, 6).to(x)), lambda x: torch.cdist(x[:, :1], x),
        lambda x: F.pairwise_distance(x[:, :1], POINTS.view(1, 5, 1, 6).to(x)),
        lambda x: torch.cdist(x[:, 0, 0], POINTS.to(x)),
        lambda x: torch.cdist(x[:, 0], x[:, 1]), lambda x: F.pairwise_distance(x[:, 0], POINTS.to(x)[0]),
        lambda x: F.pairwise_distance(x[:, 0], x[:, 1], 2.0), lambda x: torch.where(x[:, :1].new_ones(1) > 0, x, -x),
        lambda x: torch.where(CHOICE, x, x.flip(2)), lambda x: torch.add(x, x.roll(1, 2), alpha=-0.5),
        lambda x: F.dropout(x, 0.5, training=False), lambda x: x.mul(torch.tensor([1.0, -3.0]).view(2, 1, 1)),
    ],
)  # fmt: skip
def test_functions_have_their_modules_rules(function: object) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    torch.manual_seed(0)
    bound = lipschitz_bound(Wrapped(), (2, 6, 6)).upper
    x = torch.randn(512, 2, 6, 6, dtype=torch.float64)
    moves = 1e-4 * torch.randn_like(x)
    stretch = (function(x + moves) - function(x)).flatten(1).norm(dim=1) / moves.flatten(1).norm(dim=1)
    assert stretch.max().item() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.threshold(x, 0.1, 3.0), r"Threshold jumps from 3 to 0\.1, and has no Lipschitz constant"),
        (lambda x: F.hardshrink(x), r"Hardshrink jumps at 0\.5, and has no Lipschitz constant"),
        (lambda x: F.rrelu(x, training=True), r"rrelu runs with training=True also in eval mode"),
        (lambda x: x.round(), r"round \(at round_1\) jumps, and has no Lipschitz constant"),
        (lambda x: x * (x > 0), r"gt \(at gt\) jumps, .*x \* \(x > 0\) has, make it an activation"),
        (lambda x: x % 1.0, r"mod \(at mod\) jumps"),
        (lambda x: sum(x.max(2, keepdim=True)), r"add(_1)? reads the indices that max_1 gives, which jump"),
        (lambda x: torch.mul(*x.topk(2, dim=1)), "mul reads the indices that topk gives, which jump"),
        (lambda x: x.sort(1).indices.float(), r"float_1 reads the indices that sort gives, which jump"),
        (lambda x: torch.cat([x, x.min(1)[1][:, None]], 1), r"min_1 gives, which jump"),
        (lambda x: x.kthvalue(2, 2)[1], r"output reads the indices that kthvalue gives, which jump"),
        (lambda x: torch.bucketize(x, POINTS[0].to(x).sort()[0]), r"bucketize \(at bucketize\) jumps"),
        (lambda x: torch.searchsorted(POINTS[0].to(x).sort()[0], x), r"searchsorted \(at searchsorted\) jumps"),
        (
            lambda x: x.to(torch.float8_e4m3fn).float(),
            r"to rounds to torch\.float8_e4m3fn, and has no Lipschitz constant",
        ),
        (lambda x: torch.view_as_real(x.to(torch.complex64)), "to makes complex numbers, which no rule covers"),
        (lambda x: x + 0.1 * torch.randn_like(x), r"randn_like \(at randn_like\) draws random numbers"),
        (lambda x: torch.bernoulli(x.sigmoid()), r"bernoulli \(at bernoulli\) draws random numbers"),
        (lambda x: torch.cdist(x, x[:, :1], p=1.0), "cdist in another norm than L2"),
        (lambda x: x.cumsum(0), "cumsum along the batch's axis|depends on the others in its batch"),
        (lambda x: torch.diff(x, dim=0), "diff along the batch's axis|depends on the others in its batch|does not run"),
    ],
)
def test_functions_that_jump_or_mix_the_batch(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(Applied(function), (2, 3))


class Binned(nn.Module):
    """Embeds the bins that values are in, or what numbers are cut off to."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut, self.table = cut, nn.Embedding(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.long() if self.cut else torch.bucketize(x, POINTS[0].to(x)))


def test_embeddings_are_refused_for_what_jumps_in_front_of_them() -> None:
    with pytest.raises(ValueError, match=r"bucketize \(at bucketize\) jumps"):
        lipschitz_bound(Binned(False), (3,), bounds=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"rounds to torch\.int64"):
        lipschitz_bound(Binned(True), (3,), bounds=(0.0, 1.0))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x if bool((x.sum() > 1e9).item()) else 2.0 * x + 0.0


def test_a_rule_can_be_registered() -> None:
    class Mine(Twice):
        pass

    with pytest.raises(ValueError, match=r"torch\.fx.*register a rule"):
        lipschitz_bound(nn.Sequential(Mine()), (3,))

    @fastlip.lipschitz.rule(Mine)
    def _(module: nn.Module, input_shape: tuple[int, ...]) -> float:
        assert input_shape == (3,)
        return 2.0

    assert lipschitz_bound(nn.Sequential(Mine(), nn.ReLU(), Mine()), (3,)).upper == pytest.approx(4.0)


def test_rules_may_return_intervals_operators_and_diagonals() -> None:
    class Interval(Twice):
        pass

    class Operator(Twice):
        pass

    class Scale(Twice):
        pass

    matrix = torch.diag(torch.tensor([3.0, 1.0, 1.0]))
    fastlip.lipschitz.rule(Interval)(lambda m, s: fastlip.NormInterval(1.0, 5.0, 0.75, "lanczos", 3, False))
    fastlip.lipschitz.rule(Operator)(lambda m, s: fastlip.norms.Operator(matrix))
    fastlip.lipschitz.rule(Scale)(lambda m, s: fastlip.lipschitz.Diagonal(torch.tensor([1.0, -7.0, 2.0])))
    bound = lipschitz_bound(nn.Sequential(Interval(), Operator(), Scale()), (3,))
    assert bound.upper == pytest.approx(105.0)
    assert bound.confidence == 0.75


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Curious(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.digamma(x)


class Overwritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        x.mul_(10.0)
        return x


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(input=x, start_dim=1)


class Careless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.Bilinear(4, 4, 4)), (4,), "Bilinear"),
        (Square(), (4,), r"mul \(mul\) has no global Lipschitz constant.*bounds=\(lower, upper\), or around="),
        (Curious(), (4,), "no Lipschitz rule for the function digamma"),
        (Mixer(), (3, 4), "mixes the batch axis"),
        (nn.Sequential(nn.ReLU(), Careless()), (4,), r"^1\.dropout: .*training=self\.training"),
        (nn.Sequential(nn.ReLU(), Twice()), (4,), r"^Twice \(at 1\) cannot be traced"),
        (nn.Linear(3, 3), (4,), r"^Linear does not run on an input of shape \[4\], without the batch axis: [^\n]*$"),
        (Unknown(), (4,), "no Lipschitz rule for the function logcumsumexp"),
        (nn.BatchNorm1d(4, track_running_stats=False), (4,), "without running statistics"),
        (nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1)), (2,), "MultiheadAttention"),
    ],
)  # fmt: skip
def test_what_has_no_bound_is_refused(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    for function in (lipschitz_bound, require_rules):
        with pytest.raises(ValueError, match=message):
            function(model, shape)


def test_rules_are_looked_for_without_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr("fastlip.lipschitz._bound._norms", None)
    require_rules(model, (3, 8, 8))
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Softplus(1.0, 1.0), "Softplus with beta 1 jumps at its threshold 1 "),
        (nn.Softplus(2.0, 0.0), "jumps at its threshold 0"),
        (nn.Softplus(-1.0, -5.0), "jumps at its threshold -5"),
        (nn.Softplus(0.0), "Softplus with beta 0"),
        (nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Softplus()), r"20 by more than torch\.float64.*=37"),
        (nn.CELU(-1.0), "CELU with alpha -1.0 grows like an exponential"),
        (nn.CELU(math.nan), "CELU with alpha nan"),
        (nn.LeakyReLU(math.nan), "LeakyReLU .* returned nan"),
        (nn.ELU(math.inf), "ELU .* returned inf"),
        (nn.PReLU(init=math.nan), "PReLU .* returned nan"),
    ],
)  # fmt: skip
def test_activations_without_a_constant_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(nn.Sequential(model), (3,))


@pytest.mark.parametrize(
    "model", [nn.Softplus(), nn.Softplus(3.0, 25.0), nn.Softplus(-2.0, 30.0), nn.Softplus(1.0, math.inf), nn.CELU(0.3)]
)
def test_activations_near_their_limits_are_accepted(model: nn.Module) -> None:
    assert lipschitz_bound(nn.Sequential(model), (3,)).upper == 1.0
    wide = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Softplus(1.0, 37.0))
    assert lipschitz_bound(wide, (3,)).upper > 0.0


@pytest.mark.parametrize(
    ("pool", "shape", "largest"),
    [
        (nn.MaxPool1d(3, 1), (7,), math.sqrt(3.0)),
        (nn.MaxPool2d(3, 1), (9, 9), 3.0),
        (nn.MaxPool2d((3,), (1,)), (2, 9, 9), 3.0),
        (nn.MaxPool3d(2, 1), (5, 5, 5), math.sqrt(8.0)),
        (nn.AvgPool1d(3, 3), (9,), 3**-0.5),
        (nn.AvgPool2d(3, 1, divisor_override=1), (9, 9), None),
        (nn.AdaptiveAvgPool2d(7), (1, 1), 7.0),
        (nn.AdaptiveAvgPool1d(12), (3,), 2.0),
        (nn.AdaptiveMaxPool2d(6), (2, 2), 3.0),
        (nn.AdaptiveAvgPool3d((None, 1, 1)), (2, 3, 3), 1 / 3),
    ],
)
def test_pools_of_batches_without_channels(pool: nn.Module, shape: tuple[int, ...], largest: float | None) -> None:
    """Torch reads the samples as channels, and pools each of them alone."""
    if largest is None:
        basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        largest = torch.linalg.matrix_norm(pool(basis).flatten(1), 2).item()
    assert lipschitz_bound(nn.Sequential(pool), shape).upper == pytest.approx(largest, rel=1e-9)


class Turned(nn.Module):
    """A function of the input with arguments that fit no rule, which torch.export drops."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x, out=None)


def test_what_torch_fx_records_in_other_words_is_bounded_as_exported() -> None:
    for model, constant in ((Turned(), 1.0), (Named(), 1.0), (Overwritten(), 10.0)):
        assert lipschitz_bound(model, (3,)).upper == pytest.approx(constant, rel=1e-12)


def test_weights_that_are_not_finite_name_their_module() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"module 1: weight holds NaN or infinite"):
        lipschitz_bound(model, (3,))


def test_a_rule_must_return_a_finite_bound() -> None:
    class Bad(Twice):
        pass

    fastlip.lipschitz.rule(Bad)(lambda m, s: math.nan)
    with pytest.raises(ValueError, match=r"Bad .* returned nan"):
        lipschitz_bound(Bad(), (3,))
    fastlip.lipschitz.rule(Bad)(lambda m, s: torch.tensor(1.0))  # type: ignore[arg-type, return-value]  # what is refused
    with pytest.raises(ValueError, match=r"Bad .* returned Tensor, not a float"):
        lipschitz_bound(Bad(), (3,))


class Standardised(nn.Conv2d):
    """Weight standardisation: the map that it applies is not its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias)


class Activated(nn.BatchNorm1d):
    """BatchNorm with an activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * F.silu(super().forward(x))


class Renamed(nn.ReLU):
    """A ReLU by another name, traced into."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_does_not_inherit_a_rule() -> None:
    standardised = Standardised(2, 2, 1)
    weight = ((standardised.weight - standardised.weight.mean()) / standardised.weight.std()).detach().flatten(1)
    norm = torch.linalg.matrix_norm(weight, 2).item()
    assert lipschitz_bound(nn.Sequential(standardised), (2, 4, 4)).upper == pytest.approx(norm, rel=1e-3)
    activated = 3.0 * 1.0999 / math.sqrt(1.0 + 1e-5)
    assert lipschitz_bound(nn.Sequential(Activated(4)), (4,)).upper == pytest.approx(activated, rel=1e-6)
    assert lipschitz_bound(nn.Sequential(Renamed()), (4,)).upper == 1.0
    patched = nn.ReLU()
    patched.forward = lambda x: 2.0 * F.relu(x)  # type: ignore[method-assign]  # as users do
    assert lipschitz_bound(nn.Sequential(patched), (4,)).upper == pytest.approx(2.0)
    parametrised = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    norm = torch.linalg.matrix_norm(parametrised.weight, 2).item()
    assert lipschitz_bound(parametrised, (4,)).upper == pytest.approx(norm, rel=1e-5)


def _random_upsamples(count: int) -> list[tuple[nn.Upsample, tuple[int, ...]]]:
    """Upsamples of random modes, factors and sizes, and shapes of their inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    modes = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic", "area")
    for at in range(count):
        mode = modes[at % len(modes)]
        axes = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}.get(mode, draw(1, 3))
        shape = (draw(1, 2), *(draw(1, 5) for _ in range(axes)))
        options: dict[str, object] = {"mode": mode}
        if "linear" in mode or mode == "bicubic":
            options["align_corners"] = bool(draw(0, 1))
        kind = draw(0, 3)
        if kind == 0:
            options["scale_factor"] = draw(1, 4)
        elif kind == 1:  # a size below the input's shrinks it
            options["scale_factor"] = tuple(1 + draw(0, 5) / 3 for _ in range(axes))
            options["recompute_scale_factor"] = bool(draw(0, 1))
        else:
            options["size"] = draw(1, 9) if kind == 2 else tuple(draw(1, 9) for _ in range(axes))
        found.append((nn.Upsample(**options), shape))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("module", "shape"), _random_upsamples(70), ids=repr)
def test_upsampling_is_its_matrix_norm(module: nn.Module, shape: tuple[int, ...]) -> None:
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    truth = torch.linalg.matrix_norm(module(units).flatten(1), 2).item()
    bound = lipschitz_bound(module, shape).upper
    assert bound == pytest.approx(truth, rel=1e-9)
    assert bound >= truth * (1 - 1e-12)


@pytest.mark.parametrize("factor", [1, 2, 4, 7])
def test_upsampling_by_a_whole_factor(factor: int) -> None:
    shape = (3, 8, 8)
    assert lipschitz_bound(nn.Upsample(scale_factor=factor), shape).upper == pytest.approx(factor, rel=1e-11)
    smooth = lipschitz_bound(nn.Upsample(scale_factor=factor, mode="bilinear"), shape).upper
    assert factor / 2 < smooth <= factor * (1 + 1e-11)


class Resized(nn.Module):
    """Interpolation as a function."""

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=3, mode="bilinear", antialias=self.antialias)


def test_interpolation_as_a_function_has_the_rule_of_the_module() -> None:
    expected = lipschitz_bound(nn.Upsample(scale_factor=3, mode="bilinear"), (2, 5, 4)).upper
    assert lipschitz_bound(Resized(antialias=False), (2, 5, 4)).upper == expected
    with pytest.raises(ValueError, match=r"^interpolate: interpolate with antialias has no Lipschitz rule"):
        lipschitz_bound(Resized(antialias=True), (2, 5, 4))


class Filled(nn.Module):
    def forward(self, x):
        return torch.nan_to_num(x, 1.0)


class FilledByMethod(nn.Module):
    def forward(self, x):
        return x.nan_to_num(1.0)


@pytest.mark.parametrize(
    ("function", "module", "args", "said"),
    [
        (torch.nan_to_num, Filled(), (1.0,), "rule(torch.nan_to_num)"),
        (torch.Tensor.nan_to_num, FilledByMethod(), (1.0,), "rule(torch.Tensor.nan_to_num)"),
    ],
)
def test_a_rule_for_a_function(monkeypatch, function, module, args, said):
    monkeypatch.setattr(_registry, "_FUNCTION_RULES", {})
    model, shape = nn.Sequential(nn.Linear(4, 4), module), (4,)
    with pytest.raises(ValueError, match="no Lipschitz rule for the function nan_to_num") as caught:
        lipschitz_bound(model, shape)
    assert said in str(caught.value)
    calls = []

    @rule(function)
    def _(call, input_shape):
        calls.append((call, input_shape))
        return 1.0

    norm = torch.linalg.matrix_norm(model[0].weight.double(), 2).item()
    assert lipschitz_bound(model, shape).upper == pytest.approx(norm, rel=1e-6)
    assert calls == [(FunctionCall(args, {}), shape)]

    rule(function)(lambda call, input_shape: 0.5)  # which two inputs refute
    with pytest.raises(ValueError, match="does not hold"):
        lipschitz_bound(model, shape)
    for wrong in (math.inf, -1.0, "x", None):
        rule(function)(lambda call, input_shape, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="the rule of nan_to_num"):
            lipschitz_bound(model, shape)


@pytest.mark.parametrize("kind", [3, int, "torch.flip", None])
def test_kinds_that_have_no_rules(kind):
    with pytest.raises(TypeError, match="rule takes module classes and functions"):
        rule(kind)

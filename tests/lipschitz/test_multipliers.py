"""Bounds by multipliers against exact constants, dense matrices, the closed form they start from, and stretches."""

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz import _multipliers as multipliers
from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._multipliers import Activation, Map, SlopeNetwork, log10_bound
from fastlip.lipschitz._regions import find_regions
from fastlip.lipschitz._slopes import _PIECEWISE, _SMOOTH, slope_range
from fastlip.lipschitz._steps import topological_order


def norm(m: Tensor) -> float:
    return torch.linalg.matrix_norm(m, 2).item()


def random_weights(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(sizes)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(n) for n, m in pairs]


def chain(weights: Sequence[Tensor], low: float = 0.0, high: float = 1.0) -> SlopeNetwork:
    activations = [Activation({i: Map(w, 0.0)}, low, high) for i, w in enumerate(weights[:-1])]
    return SlopeNetwork(weights[0].shape[1], activations, {len(weights) - 1: Map(weights[-1], 0.0)})


def patterns(weights: Sequence[Tensor], low: float, high: float) -> float:
    """Largest norm of the Jacobian over all slopes at the ends of their interval: no bound by slopes can be less."""
    best = 0.0
    sizes = [len(w) for w in weights[:-1]]
    for choice in itertools.product((low, high), repeat=sum(sizes)):
        slopes = torch.tensor(choice, dtype=torch.float64).split(sizes)
        product = weights[0]
        for d, w in zip(slopes, weights[1:], strict=True):
            product = w @ (d[:, None] * product)
        best = max(best, norm(product))
    return best


def eclipse_fast(weights: Sequence[Tensor]) -> float:
    """The recursion in closed form, written out with inverses, for slopes in [0, 1]."""
    spread = weights[0] @ weights[0].mT
    for w in weights[1:]:
        a = torch.linalg.eigvalsh(spread)[-1]
        inverse = a**2 * torch.linalg.inv(2.0 * a * torch.eye(len(spread), dtype=torch.float64) - spread)
        spread = w @ inverse @ w.mT
    return math.sqrt(torch.linalg.eigvalsh(spread)[-1].item())


SHAPES = [(3, 2, 2), (2, 5, 3), (7, 4, 3, 2), (3, 2, 4, 2, 6), (1, 3, 1), (4, 1, 1, 3)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 1.0), (-0.5, 1.5), (-1.0, 1.0), (0.0, 0.25)])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_a_chain_lies_between_its_worst_slopes_and_the_plain_product(
    sizes: tuple[int, ...], low: float, high: float
) -> None:
    weights = random_weights(*sizes)
    bound = 10 ** log10_bound(chain(weights, low, high))
    largest = max(abs(low), abs(high))
    plain = math.prod(map(norm, weights)) * largest ** (len(weights) - 1)
    assert patterns(weights, low, high) * (1.0 - 1e-9) <= bound
    # With slopes around 0 the closed form is a limit.
    assert bound <= plain * (1.0 + (1e-8 if low + high else 1e-2))


@pytest.mark.parametrize("sizes", [(20, 30, 30, 30, 5), (40, 12, 12, 4), (3, 8, 40)], ids=str)
def test_it_starts_from_the_closed_form_and_is_never_above_it(sizes: tuple[int, ...]) -> None:
    weights = random_weights(*sizes, seed=1)
    start, found = (10 ** log10_bound(chain(weights), work) for work in (0.0, 1e10))
    assert start == pytest.approx(eclipse_fast(weights), rel=1e-6)
    assert start >= eclipse_fast(weights) * (1.0 - 1e-12)
    assert found < 0.97 * start


def test_one_hidden_layer_is_the_optimum_of_the_semidefinite_program() -> None:
    # Solved by cvxpy with Clarabel: minimise rho such that the matrix of two blocks is positive semidefinite.
    weights = random_weights(4, 6, 3, seed=2)
    assert 10 ** log10_bound(chain(weights)) == pytest.approx(ONE_HIDDEN, rel=2e-3)


ONE_HIDDEN = 1.555095


def dense_form(network: SlopeNetwork, roots: Sequence[Tensor], rho: float) -> Tensor:
    """F of the module's docstring, assembled from its terms one after the other."""
    sizes = network.sizes
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    n = starts[-1]

    def wide(maps: dict[int, Map]) -> Tensor:
        whole = torch.zeros(len(next(iter(maps.values())).matrix), n, dtype=torch.float64)
        for j, m in maps.items():
            whole[:, starts[j] : starts[j + 1]] = m.matrix
        return whole

    form = torch.zeros(n, n, dtype=torch.float64)
    form[: sizes[0], : sizes[0]] = torch.eye(sizes[0], dtype=torch.float64)
    y = wide(network.output)
    form -= y.mT @ y / rho
    for i, activation in enumerate(network.activations, start=1):
        z, v = wide(activation.maps), torch.zeros(sizes[i], n, dtype=torch.float64)
        v[:, starts[i] : starts[i + 1]] = torch.eye(sizes[i], dtype=torch.float64)
        term = (v - activation.low * z).mT @ ((roots[i] ** 2)[:, None] * (activation.high * z - v))
        form -= 0.5 * (term + term.mT)
    return form


def residual(depth: int, size: int, low: float, high: float, seed: int) -> SlopeNetwork:
    """A residual network x + W2 f(W1 x), with the activation of a block applied to the sum before."""
    weights = random_weights(*(size,) * (2 * depth + 1), seed=seed)
    eye = torch.eye(size, dtype=torch.float64)
    activations: list[Activation] = []
    stream = {0: eye}
    for one, two in zip(weights[::2], weights[1::2], strict=True):
        activations.append(Activation({j: Map(one @ m, 0.0) for j, m in stream.items()}, low, high))
        stream = stream | {len(activations): two}
    return SlopeNetwork(size, activations, {j: Map(m, 0.0) for j, m in stream.items()})


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.2, 1.1), (0.3, 0.9)])
@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_what_is_certified_is_positive_definite(kind: str, low: float, high: float) -> None:
    network = chain(random_weights(5, 4, 6, 3), low, high) if kind == "chain" else residual(3, 4, low, high, 3)
    start = multipliers._closed_form(network)
    assert start is not None
    for roots in (start, multipliers._searched(network, start, 1e9)):
        rho = multipliers._certified(network, roots)
        least = torch.linalg.eigvalsh(dense_form(network, roots, rho))[0].item()
        assert least >= -1e-12
        # It is also the least rho for these multipliers.
        assert torch.linalg.eigvalsh(dense_form(network, roots, rho * (1.0 - 1e-6)))[0].item() < 0.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.2, 1.1), (0.3, 0.9), (-1.0, 1.0)])
@pytest.mark.parametrize("kind", ["chain", "residual", "uneven"])
def test_the_search_ends_at_the_optimum_of_the_semidefinite_program(kind: str, low: float, high: float) -> None:
    weights = random_weights(9, 12, 7, 10, 5, seed=7)
    if kind == "uneven":  # units of very different magnitudes
        weights = [torch.logspace(-3, 1, len(w), dtype=torch.float64)[:, None] * w for w in weights]
    network = residual(6, 8, low, high, 7) if kind == "residual" else chain(weights, low, high)
    found = 10 ** log10_bound(network)
    worst = multipliers._WorstCase(network)
    for _ in range(300):
        worst.improve()
    # By duality no multipliers prove less than what the worst case attains.
    assert worst.value * (1.0 - 1e-9) <= found <= 1.005 * worst.value
    generator = torch.Generator().manual_seed(8)
    for size in (0.0, 0.1, 1.0):
        roots = [
            r * (size * torch.randn(len(r), generator=generator).double()).exp() for r in worst.roots(ones(network))
        ]
        least = torch.linalg.eigvalsh(dense_form(network, roots, (1.0 - 1e-6) * worst.value**2))[0].item()
        assert least < 0.0


def ones(network: SlopeNetwork) -> list[Tensor]:
    return [torch.ones(n, dtype=torch.float64) for n in network.sizes]


@pytest.mark.parametrize("excess", [-1e-15, -1e-16, 0.0, 1e-16, 1e-15, 1e-9])
def test_a_form_that_rounding_makes_positive_definite_proves_nothing(excess: float) -> None:
    # The second unit does not reach the output, but its multiplier is too large or on the edge: F is not definite.
    one, two = torch.tensor([[1.0, 0.0], [0.3, 0.7]]).double(), torch.tensor([[1.0, 0.0]]).double()
    network = chain([one, two])
    edge = 2.0 / one[1].norm().item()
    roots = [torch.ones(2).double(), torch.tensor([1.0, edge * (1.0 + excess)]).double()]
    assert multipliers._certified(network, roots) == math.inf


def test_errors_of_the_maps_are_paid_for() -> None:
    weights = random_weights(4, 3, 2, seed=5)
    error = 1e-3
    exact = chain(weights)
    vague = SlopeNetwork(4, [Activation({0: Map(weights[0], error)}, 0.0, 1.0)], {1: Map(weights[1], error)})
    # The worst matrices within the error of the given ones.
    worst = []
    for w in weights:
        u, _, v = torch.linalg.svd(w)
        worst.append(w + error * torch.outer(u[:, 0], v[0]))
    assert 10 ** log10_bound(vague) >= patterns(worst, 0.0, 1.0)
    assert 10 ** log10_bound(exact) < 10 ** log10_bound(vague) < 1.1 * 10 ** log10_bound(exact)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_the_scale_of_weights_does_not_matter(exponent: int) -> None:
    weights = random_weights(5, 4, 4, 3, seed=6)
    usual = log10_bound(chain(weights))
    powers = [exponent, -exponent, exponent]
    scaled = [w * 10.0**p for w, p in zip(weights, powers, strict=True)]
    assert log10_bound(chain(scaled)) == pytest.approx(usual + sum(powers), abs=1e-9)
    # A network within which all powers of ten occur, in the model's own dtype.
    model = nn.Sequential(*[m for w in scaled for m in (nn.Linear(w.shape[1], len(w)), nn.ReLU())][:-1])
    for layer, w in zip(model[::2], scaled, strict=True):
        layer.weight.data.copy_(w)
    assert lipschitz_bound(model, (5,), check=False).log10_upper == pytest.approx(usual + sum(powers), abs=1e-5)


def test_zeros_and_what_does_not_fit_float64_prove_nothing() -> None:
    weights = random_weights(3, 3, 3)
    assert log10_bound(chain([weights[0], 0.0 * weights[1]])) == math.inf
    assert log10_bound(chain([weights[0] * 1e300, weights[1] * math.nan])) == math.inf
    assert 10 ** log10_bound(chain([0.0 * weights[0], weights[1]])) < 1e6  # the plain product says 0
    assert lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), _zero(nn.Linear(3, 3))), (3,)).upper == 0.0


def _zero(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.zero_()
    return layer


def stretch(model: nn.Module, shape: tuple[int, ...], points: int = 12, steps: int = 12) -> float:
    """Largest Jacobian norm found by climbing from random points, in float64."""
    model = model.double().eval()
    best = 0.0
    for x in 2.0 * torch.randn(points, *shape, dtype=torch.float64):
        for _ in range(2):
            jacobian = torch.autograd.functional.jacobian(model, x[None]).reshape(-1, math.prod(shape))
            best = max(best, norm(jacobian))
            x = x + torch.linalg.svd(jacobian)[2][0].view(shape)
    return best


class Residual(nn.Module):
    def __init__(self, channels: int, activation: nn.Module, subtract: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, channels, 3, padding=1)
        self.bn, self.act, self.subtract = nn.BatchNorm2d(4), activation, subtract

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.act(self.bn(self.one(x))))
        return x - y if self.subtract else y + x


class Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), torch.tanh(self.two(x))], 1)


NETWORKS = {
    "layers": lambda a: nn.Sequential(nn.Flatten(), nn.Linear(48, 6), a, nn.Linear(6, 6), a, nn.Linear(6, 4)),
    "convolutions": lambda a: nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        a,
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        a,
        nn.Linear(5, 2),
    ),
    "residual": lambda a: nn.Sequential(
        Residual(3, a), a, Residual(3, a, subtract=True), nn.Flatten(), nn.Linear(48, 3)
    ),
    "fire": lambda a: nn.Sequential(Fire(), a, nn.Conv2d(5, 2, 1, groups=1), nn.AdaptiveAvgPool2d(1)),
}
ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.LeakyReLU(-0.5), nn.ELU(2.0), nn.Sigmoid(), nn.PReLU(init=1.5), nn.Hardswish()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_networks_lie_between_their_stretch_and_the_composition(build: object, activation: nn.Module) -> None:
    torch.manual_seed(len(repr(activation)))
    model = build(copy.deepcopy(activation)).eval()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.3, 2.0)
            module.weight.data.normal_()
    shape = (3, 4, 4)
    plain = lipschitz_bound(model, shape, tight_chains=False, check=False)
    bound = lipschitz_bound(model, shape)
    assert stretch(model, shape, 4) <= bound.upper
    assert bound.log10_upper < plain.log10_upper - 0.01
    assert sum(part.log10_factor for part in bound.parts) == pytest.approx(bound.log10_upper)
    assert bound.log10_plain == pytest.approx(plain.log10_plain, abs=2e-2)


def test_a_single_layer_keeps_its_norm() -> None:
    torch.manual_seed(0)
    for model in (nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.Tanh())):
        plain, bound = (lipschitz_bound(model, (5,), tight_chains=tight) for tight in (False, True))
        assert bound.log10_upper == plain.log10_upper


def names(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, str]]:
    steps = topological_order(trace(model.eval(), shape).last)
    return [(region.origin.name, region.end.name) for region in find_regions(steps, sums=True)]


def test_regions_end_where_slopes_are_unknown_or_matrices_too_large() -> None:
    features = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)]
    model = nn.Sequential(*features, *classifier)
    assert names(model, (3, 8, 8)) == [("x", "2"), ("5", "9")]
    wide = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 4, 9), *classifier[:1], nn.Linear(4, 8)
    )
    assert names(nn.Sequential(*wide, nn.ReLU(), nn.Linear(8, 3)), (3, 9, 9)) == [("3", "6")]


def test_no_identity_of_a_large_input_is_formed() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names(pooled, (8, 16, 16)) == [("x", "4")]
    # From the large input itself it would have 8192 rows and columns; behind the pool there are 8.
    assert names(pooled, (8, 32, 32)) == [("1", "4")]


class Unused(nn.Module):
    """Computes a sum that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        x = x + y
        return self.two(F.relu(y))


def test_what_does_not_lead_to_the_output_is_passed_over() -> None:
    assert names(Unused(), (3,)) == [("x", "two")]


class Moves(nn.Module):
    def __init__(self, move: str) -> None:
        super().__init__()
        self.one, self.two, self.move = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), move

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x))
        if self.move == "transposed":
            y = y.transpose(2, 3)
        if self.move == "side by side":
            return torch.cat([self.two(y), x], dim=3)
        return self.two(y.contiguous()) + x


@pytest.mark.parametrize("move", ["transposed", "side by side"])
def test_values_in_another_order_are_not_taken_for_those_in_order(move: str) -> None:
    model = Moves(move).double()
    with torch.no_grad():
        for layer in (model.one, model.two):
            layer.weight.copy_(torch.eye(2)[:, :, None, None])
        model.one.bias.fill_(9.0)
    jacobian = torch.autograd.functional.jacobian(model, torch.zeros(1, 2, 3, 3).double()).reshape(-1, 18)
    bound = lipschitz_bound(model, (2, 3, 3)).upper
    assert norm(jacobian) * (1.0 - 1e-9) <= bound
    assert bound == pytest.approx(norm(jacobian), rel=1e-6)
    # Places along another axis than the first are in no matrix, but a transposition is.
    assert [end for _, end in names(model, (2, 3, 3))] == ["add" if move == "transposed" else "two"]


@pytest.mark.parametrize("kind", [*_PIECEWISE, *_SMOOTH, nn.PReLU], ids=lambda kind: kind.__name__)
def test_slopes_are_those_of_differences(kind: type[nn.Module]) -> None:
    module = (kind(0.5, 0.5) if kind is nn.Threshold else kind()).double().eval()
    found = slope_range(module)
    assert found is not None
    x = torch.linspace(-40.0, 40.0, 400_001, dtype=torch.float64)
    with torch.no_grad():
        slopes = module(x).diff() / x.diff()
    assert found[0] - 1e-9 <= slopes.min().item() <= found[0] + 2e-3
    assert found[1] - 2e-3 <= slopes.max().item() <= found[1] + 1e-9


def test_slopes_follow_parameters_and_only_of_torchs_own_classes() -> None:
    class Mirrored(nn.ReLU):
        pass

    assert slope_range(Mirrored()) is None
    assert slope_range(nn.Softmax(0)) is None
    assert slope_range(nn.LeakyReLU(-0.5)) == (-0.5, 1.0)
    assert slope_range(nn.ELU(3.0)) == pytest.approx((0.0, 3.0), abs=1e-9)
    assert slope_range(nn.ELU(-2.0)) == pytest.approx((-2.0, 1.0), abs=1e-9)
    prelu = nn.PReLU(2)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([-0.5, 2.0]))
    assert slope_range(prelu) == (-0.5, 2.0)


def test_multipliers_on_the_edge_of_what_a_factorisation_accepts_prove_nothing() -> None:
    one, two = torch.eye(2).double(), torch.tensor([[1.0, 0.0], [0.3, 0.7]]).double()
    network = chain([one, two, torch.tensor([[1.0, 0.0]]).double()])
    plan = multipliers._plan(network)

    def roots(last: float) -> list[Tensor]:
        return [torch.ones(2).double(), torch.ones(2).double(), torch.tensor([1.0, last], dtype=torch.float64)]

    low, high = 1.0, 100.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if multipliers._rho(plan, roots(middle)) < math.inf else (low, middle)
    assert multipliers._rho(plan, roots(low)) < math.inf
    assert multipliers._certified(network, roots(low)) == math.inf
    assert multipliers._certified(network, roots(0.99 * low)) < math.inf


def test_an_error_of_the_last_map_is_paid_for_where_the_bound_is_attained() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    vague = SlopeNetwork(1, [Activation({0: Map(one, 0.0)}, 0.0, 1.0)], {1: Map(one, 1e-3)})
    assert 1.001 <= 10 ** log10_bound(vague) <= 1.01

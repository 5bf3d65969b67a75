"""Local constants on balls: the upper side is above every gradient and stretch found inside, and close to them."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import Tensor, nn

from fastlip import ops
from fastlip.lipschitz import _ball_graph, _balls, lipschitz_bound, local_lipschitz_bounds
from fastlip.lipschitz._ball_graph import _columns_through, _State
from fastlip.lipschitz._ball_pass import Balls
from fastlip.lipschitz._gain import OpenUnits, _Problem, largest_norm
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._slopes import slope_bounds
from fastlip.norms._operators.modules import module_operator
from fastlip.norms._solvers import batched_operator


def mlp(activation: nn.Module, *widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), copy.deepcopy(activation))]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.down, self.head = nn.Conv2d(4, 6, 1, stride=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem((x - 0.4) / 0.5)
        x = x + self.second(F.relu(self.norms[1](self.first(F.relu(self.norms[0](x))))))
        x = F.gelu(self.down(F.relu(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 4)
        self.c = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        a, b = torch.tanh(self.a(x)), F.leaky_relu(0.7 - self.b(x), 0.2)
        return self.c(torch.cat([a, b], 1)) - 2.0 * a[:, :3] if False else self.c(torch.cat([a, b], dim=1))


def weights(net: nn.Module, gain: float, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=g))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=g))
    with torch.no_grad():
        for p in net.parameters():
            size = gain / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.3
            p.copy_(size * torch.randn(p.shape, generator=g, dtype=torch.float64) + (p.dim() < 2) * 0.1)
    return net


NETS = {
    "relu": (lambda: mlp(nn.ReLU(), 8, 12, 12, 4), (8,)),
    "wide": (lambda: mlp(nn.ReLU(), 5, 40, 20, 3), (5,)),
    "large": (lambda: mlp(nn.ReLU(), 60, 30, 40, 3), (60,)),
    "tanh": (lambda: mlp(nn.Tanh(), 6, 8, 8, 8, 3), (6,)),
    "gelu": (lambda: mlp(nn.GELU(), 5, 7, 7, 2), (5,)),
    "softplus": (lambda: mlp(nn.Softplus(threshold=40.0), 5, 7, 7, 2), (5,)),
    "prelu": (lambda: mlp(nn.PReLU(), 6, 8, 8, 2), (6,)),
    "relu6": (lambda: mlp(nn.ReLU6(), 6, 8, 8, 2), (6,)),
    "hardswish": (lambda: mlp(nn.Hardswish(), 6, 8, 8, 2), (6,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 2, 2),
            nn.ELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 4, 4),
    ),
    "max-pool": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.SiLU(), nn.Linear(6, 2)
        ),
        (2, 6, 6),
    ),
    "residual": (Residual, (2, 4, 4)),
    "branches": (Branches, (2, 3)),
}


def balls(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand((3, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobians(net: nn.Module, x: Tensor) -> Tensor:
    """Jacobians of single samples, [B, outputs, inputs]."""
    together = torch.autograd.functional.jacobian(lambda t: net(t).flatten(1).sum(0), x.detach())
    return together.flatten(2).transpose(0, 1)


def largest_found(net: nn.Module, x: Tensor, radius: float, norm: str, seed: int = 0) -> Tensor:
    """Largest Jacobian norm at points of the ball, moved along the worst direction, and stretches."""
    g = torch.Generator().manual_seed(seed)
    best = torch.zeros(len(x), dtype=torch.float64)

    def project(t: Tensor) -> Tensor:
        away = t - x
        if norm == "linf":
            return x + away.clamp(-radius, radius)
        size = away.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
        return x + away * (radius / size.clamp_min(1e-30)).clamp_max(1.0)

    with torch.no_grad():
        for _ in range(3):
            point = project(x + 2.0 * radius * torch.randn(x.shape, generator=g, dtype=torch.float64))
            for _ in range(4):
                _, values, right = torch.linalg.svd(jacobians(net, point), full_matrices=False)
                best = torch.maximum(best, values[:, 0])
                other = project(point + radius * right[:, 0].view_as(x))
                distance = (other - point).flatten(1).norm(dim=1)
                stretch = (net(other) - net(point)).flatten(1).norm(dim=1) / distance.clamp_min(1e-30)
                best = torch.maximum(best, torch.where(distance > 1e-6, stretch, 0.0))
                point = other
    return best


@pytest.mark.parametrize("name", NETS)
def test_upper_sides_are_above_what_is_found_in_the_ball(name):
    build, shape = NETS[name]
    net, x = weights(build(), 2.0, 0), balls(shape)
    for radius, norm in ((0.05, "l2"), (0.5, "l2"), (0.05, "linf"), (20.0, "l2")):
        found = largest_found(net, x, radius, norm)
        bounds = local_lipschitz_bounds(net, x, radius, norm=norm, points=1, check=radius == 20.0)
        assert (bounds.upper >= found * (1.0 - 1e-9)).all(), (radius, norm)
        assert (bounds.upper >= bounds.lower * (1.0 - 1e-9)).all()
        assert bounds.upper.isfinite().all()
        assert bounds.confidence == 1.0


def test_a_wrong_mask_gives_a_bound_that_is_refuted(monkeypatch):
    """Units held to be on one side of their kink all over the ball, because they are at its centre."""

    def wrong(module: nn.Module, x: Interval) -> tuple[Tensor, Tensor]:
        positive = (0.5 * (x.lower + x.upper) > 0.0).double()
        return positive, positive

    net, x = weights(mlp(nn.ReLU(), 8, 12, 12, 4), 1.0, 0), balls((8,))
    found = largest_found(net, x, 0.5, "l2")
    assert (local_lipschitz_bounds(net, x, 0.5).upper >= found).all()
    monkeypatch.setattr(_ball_graph, "slope_bounds", wrong)
    assert (local_lipschitz_bounds(net, x, 0.5).upper < found).any()


def test_both_sides_meet_at_a_point_and_stay_within_the_global_bound():
    net, x = weights(mlp(nn.ReLU(), 8, 12, 12, 4), 1.5, 3), balls((8,))
    point = local_lipschitz_bounds(net, x, 0.0, points=1)
    exact = torch.linalg.matrix_norm(jacobians(net, x), 2)
    assert torch.allclose(point.upper, exact, rtol=1e-6)
    assert torch.allclose(point.lower, exact, rtol=1e-2)
    plain = lipschitz_bound(net, (8,)).upper
    last = torch.zeros(3, dtype=torch.float64)
    for radius in (0.01, 0.1, 1.0, 100.0):
        upper = local_lipschitz_bounds(net, x, radius, points=1).upper
        assert (upper >= last * (1.0 - 1e-2)).all()
        assert (upper <= plain * (1.0 + 1e-9)).all()
        last = upper


def test_a_radius_for_each_sample_and_points_within_it():
    net, x = weights(mlp(nn.Tanh(), 6, 8, 3), 2.0, 1).float(), balls((6,)).float()
    radius = torch.tensor([0.0, 0.1, 1.0])
    for norm in ("l2", "linf"):
        bounds = local_lipschitz_bounds(net, x, radius, norm=norm, generator=torch.Generator().manual_seed(0))
        away = (bounds.points - x).double()
        size = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
        assert (size <= radius * (1.0 + 1e-5) + 1e-7).all()
        at = jacobians(net.double(), bounds.points.double())
        net.float()
        assert (torch.linalg.matrix_norm(at, 2) >= bounds.lower * (1.0 - 1e-4)).all()
        one = [local_lipschitz_bounds(net, t[None], r.item(), norm=norm).upper for t, r in zip(x, radius, strict=True)]
        assert torch.allclose(torch.cat(one), bounds.upper, rtol=0.05)


def nothing(model: nn.Module, b: Balls, *_: object) -> tuple[Tensor, float]:
    """In place of the bound that holds everywhere, of which the least is taken."""
    return torch.full_like(b.radius, torch.inf), 1.0


@pytest.mark.parametrize("name", NETS)
def test_masked_products_are_above_what_is_found_in_the_ball(name, monkeypatch):
    build, shape = NETS[name]
    net, x = weights(build(), 2.0, 0), balls(shape)
    monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", 0)
    monkeypatch.setattr("fastlip.lipschitz._balls._by_composition", nothing)
    for radius, norm in ((0.02, "l2"), (0.5, "linf")):
        bounds = local_lipschitz_bounds(net, x, radius, norm=norm, points=1, check=False)
        assert (bounds.upper >= largest_found(net, x, radius, norm) * (1.0 - 1e-9)).all(), (radius, norm)
        assert bounds.upper.isfinite().all()
        assert bounds.confidence >= 1.0 - 1e-6


def test_networks_too_large_for_columns_get_masked_products(monkeypatch):
    net, x = weights(mlp(nn.ReLU(), 8, 30, 30, 4), 1.0, 0), balls((8,))
    everywhere = lipschitz_bound(net, (8,))
    columns = local_lipschitz_bounds(net, x, 1e-3, points=1).upper
    monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", 8 * 38)  # one sample at a time
    assert torch.allclose(local_lipschitz_bounds(net, x, 1e-3, points=1).upper, columns, rtol=1e-3)
    monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", 0)
    assert (local_lipschitz_bounds(net, x, 100.0, points=1).upper <= everywhere.upper * (1.0 + 1e-2)).all()
    monkeypatch.setattr("fastlip.lipschitz._balls._by_composition", nothing)
    masked = local_lipschitz_bounds(net, x, 1e-3, points=1)
    assert (masked.upper < 0.95 * 10.0**everywhere.log10_product).all()
    assert (masked.upper >= columns * (1.0 - 1e-9)).all()
    assert 1.0 - 1e-6 <= masked.confidence < 1.0


def test_masked_layers_are_read_once_for_all_samples(monkeypatch):
    net, x = weights(NETS["convolutions"][0](), 1.0, 0), balls((2, 4, 4)).repeat(3, 1, 1, 1)
    monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", 0)
    monkeypatch.setattr("fastlip.lipschitz._balls._by_composition", nothing)
    packed = []

    def pack(given: list[Tensor], *args: object, **keywords: object) -> Tensor:
        packed.extend(w.numel() for w in given)
        return ops.pack_weights(given, *args, **keywords)

    monkeypatch.setattr(batched_operator, "pack_weights", pack)
    upper = local_lipschitz_bounds(net, x, 0.05, points=1, check=False).upper
    once = sum(packed)
    packed.clear()
    single = local_lipschitz_bounds(net, x[:1], 0.05, points=1, check=False).upper
    assert once == sum(packed) > 0
    assert torch.allclose(upper[::3], single, rtol=0.05)


class Gated(nn.Module):
    """Without a constant everywhere: a product of two traced tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))


def test_products_of_traced_tensors_have_a_constant_on_each_ball():
    net, x = weights(Gated(), 2.0, 0), balls((5,))
    for radius, norm in ((0.1, "l2"), (0.3, "linf")):
        bounds = local_lipschitz_bounds(net, x, radius, norm=norm, points=1)
        assert bounds.upper.isfinite().all()
        assert (bounds.upper >= largest_found(net, x, radius, norm)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1.0}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"radius": torch.ones(2)}, "radius"),
        ({"radius": 0.1, "norm": "l1"}, "norm must be one of l2, linf"),
        ({"radius": 0.1, "norm": 3}, "norm"),
        ({"radius": 0.1, "points": 0}, "points"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_lipschitz_bounds(mlp(nn.ReLU(), 4, 4, 2), torch.rand(3, 4), **arguments)


@pytest.mark.parametrize(("spelled", "norm"), [(2, "l2"), ("Linf", "linf"), (math.inf, "linf")])
def test_norms_are_spelled_as_elsewhere(spelled, norm):
    net, x = mlp(nn.ReLU(), 4, 4, 2), torch.rand(3, 4)
    bounds = local_lipschitz_bounds(net, x, 0.1, norm=spelled, points=1)
    assert bounds.norm == norm
    assert torch.equal(bounds.upper, local_lipschitz_bounds(net, x, 0.1, norm=norm, points=1).upper)


def units(seed: int, scale: float = 1.0, error: float = 0.0) -> OpenUnits:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    between = draw(2, 5, 5).tril(-1)
    between[:, 1:3, 1:3] = 0.0
    between[:, 3:, 3:] = 0.0
    delta = torch.rand(2, 5, generator=g, dtype=torch.float64)
    delta[1, 2] = 0.0
    return OpenUnits(
        scale * draw(2, 3, 4), draw(2, 3, 5), between, scale * draw(2, 5, 4), delta, scale * torch.ones(2, 5) * 3.0,
        [slice(0, 1), slice(1, 3), slice(3, 5)], torch.full((2, 9), error), torch.full((2, 3, 9), error),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_the_gain_covers_every_choice_of_slopes(scale):
    for seed in range(10):
        u = units(seed, scale)
        bound = largest_norm(u)
        worst = torch.zeros(2, dtype=torch.float64)
        for signs in itertools.product((-1.0, 1.0), repeat=5):
            d = torch.diag_embed(u.delta * torch.tensor(signs, dtype=torch.float64))
            inner = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - u.between @ d, u.right)
            worst = torch.maximum(worst, torch.linalg.matrix_norm(u.outer + u.left @ d @ inner, 2))
        assert (bound >= worst).all()
        assert (bound <= 2.0 * worst).all()


def wide(seed: int, inputs: int, error: float = 0.0) -> OpenUnits:
    """Four units in the first block, that read two inputs; further inputs do nothing."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    between = draw(2, 7, 7).tril(-1)
    for own in (slice(0, 4), slice(4, 7)):
        between[:, own, own] = 0.0
    outer, right = (F.pad(draw(2, n, 2), (0, inputs - 2)) for n in (3, 7))
    return OpenUnits(
        outer, draw(2, 3, 7), between, right, torch.rand(2, 7, generator=g, dtype=torch.float64), torch.ones(2, 7),
        [slice(0, 4), slice(4, 7)], torch.full((2, inputs + 7), error), torch.full((2, 2, inputs + 7), error),
    )  # fmt: skip


def test_the_gain_is_the_same_by_inputs_and_by_units():
    for seed in range(5):
        few, many = wide(seed, 2), wide(seed, 6)
        assert (_Problem(few).gram is None, _Problem(many).gram is None) == (True, False)
        bound = largest_norm(few)
        assert torch.allclose(bound, largest_norm(many), rtol=1e-3)
        worst = torch.zeros(2, dtype=torch.float64)
        for signs in itertools.product((-1.0, 1.0), repeat=7):
            d = torch.diag_embed(few.delta * torch.tensor(signs, dtype=torch.float64))
            inner = torch.linalg.solve(torch.eye(7, dtype=torch.float64) - few.between @ d, few.right)
            worst = torch.maximum(worst, torch.linalg.matrix_norm(few.outer + few.left @ d @ inner, 2))
        assert (bound >= worst).all()
        assert (bound <= 2.0 * worst).all()
        assert (largest_norm(wide(seed, 2, error=1e-5)) > bound * (1.0 + 1e-7)).all()


@pytest.mark.parametrize("inputs", [2, 6])
def test_only_norms_below_1_are_proved(inputs):
    problem = _Problem(wide(0, inputs))
    by_row, by_column = problem._scales(problem.start())
    for lost in (0.0, 0.3):
        for share in (0.0, 0.9):
            m = problem._m(by_row, by_column)
            m = m * (share * (1.0 - lost) / torch.linalg.matrix_norm(m, 2))[:, None, None]
            square, x = m @ m.mT, problem.x * by_row[..., None]
            full = F.pad(square, (0, problem.first, 0, problem.first))
            low, high = torch.zeros(2, 1, 1, dtype=torch.float64), torch.full((2, 1, 1), 1e3, dtype=torch.float64)
            for _ in range(80):  # where the norm of [M, X] is 1 - lost
                middle = 0.5 * (low + high)
                norm = torch.linalg.matrix_norm(full + middle**2 * x @ x.mT, 2).sqrt()[:, None, None]
                low, high = torch.where(norm < 1.0 - lost, middle, low), torch.where(norm < 1.0 - lost, high, middle)
            losses = torch.full((2,), lost, dtype=torch.float64)
            assert problem._proved(square, x * low * (1.0 - 1e-9), losses).all()
            assert not problem._proved(square, x * high * (1.0 + 1e-9), losses).any()


def test_the_gain_grows_with_the_errors_of_its_matrices():
    exact, blurred, lost = (largest_norm(units(0, error=e)) for e in (0.0, 1e-5, 1e3))
    assert (blurred > exact * (1.0 + 1e-7)).all()
    assert (blurred < exact * 1.1).all()
    assert lost.isinf().all() or (lost > 1e3).all()


def test_samples_are_bounded_alike_in_any_company(monkeypatch):
    """Samples of many and of few open units, in groups of several and of one."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    blocks = [slice(0, 4), slice(4, 7), slice(7, 12)]
    between = 0.3 * draw(6, 12, 12).tril(-1)
    for own in blocks:
        between[:, own, own] = 0.0
    delta = torch.rand(6, 12, generator=g, dtype=torch.float64)
    delta[1, 2:], delta[2], delta[3, 4:7], delta[4, :4] = 0.0, 0.0, 0.0, 0.0
    nothing = torch.zeros(6, 17, dtype=torch.float64)
    u = OpenUnits(
        draw(6, 3, 5), draw(6, 3, 12), between, draw(6, 12, 5), delta, torch.ones(6, 12), blocks, nothing,
        nothing[:, None].expand(-1, 3, -1),
    )  # fmt: skip
    worst = torch.zeros(6, dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=12):
        d = torch.diag_embed(u.delta * torch.tensor(signs, dtype=torch.float64))
        inner = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - u.between @ d, u.right)
        worst = torch.maximum(worst, torch.linalg.matrix_norm(u.outer + u.left @ d @ inner, 2))
    together = largest_norm(u)
    monkeypatch.setattr("fastlip.lipschitz._gain._CACHED", 0)
    alone = largest_norm(u)
    for bound in (together, alone):
        assert (bound >= worst).all()
        assert (bound <= 2.0 * worst).all()
    assert together[2] == pytest.approx(torch.linalg.matrix_norm(u.outer[2], 2).item(), rel=1e-6)
    assert torch.allclose(together, alone, rtol=0.1)


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 5), lambda: nn.Conv1d(3, 2, 3, padding=1)])
def test_unit_vectors_pass_a_layer_as_other_columns_do(make):
    layer = make().double()
    shape = (12,) if isinstance(layer, nn.Linear) else (3, 4)
    operator = module_operator(layer, shape)
    last = torch.tensor([[11, 0, 12, 5, 7, 3, 12], [1, 2, 3, 4, 12, 12, 12]])
    units = F.one_hot(last, 13)[..., :12].double().view(2, 7, *shape)
    columns = torch.cat([torch.randn(2, 3, *shape, dtype=torch.float64), units], 1)
    zeros = torch.zeros(2, dtype=torch.float64)
    state = _State(Interval.unbounded(shape, 2), columns[:, 0], columns, zeros, zeros[:, None].expand(-1, 10))
    expected = F.linear(columns, layer.weight) if isinstance(layer, nn.Linear) else torch.stack(
        [F.conv1d(c, layer.weight, padding=1) for c in columns]
    )  # fmt: skip
    for known in (None, last):
        torch.testing.assert_close(_columns_through(operator, replace(state, last=known), False), expected)
    same = columns[:1].expand(2, -1, *(-1 for _ in shape))
    torch.testing.assert_close(
        _columns_through(operator, replace(state, columns=same), False), expected[:1].expand_as(expected)
    )


class Reshaping(nn.Module):
    """Sizes of the batch stand in the forward, as most people write it."""

    def __init__(self, reshape) -> None:
        super().__init__()
        self.conv, self.reshape, self.head = nn.Conv2d(2, 3, 3, padding=1), reshape, nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reshape(F.relu(self.conv(x))))


_RESHAPES = [
    lambda x: x.view(x.size(0), -1),
    lambda x: x.view(x.shape[0], 48),
    lambda x: x.reshape(len(x), 48),
    lambda x: torch.reshape(x, (x.size(0), 3, 16)).flatten(1),
    # The bound that holds everywhere, with which masked products are compared, is larger with this one.
    lambda x: x.transpose(1, 3).contiguous().view(x.size(0), 4, 4, 3).transpose(1, 3).reshape(x.size(0), -1),
]


@pytest.mark.parametrize(("reshape", "most"), [*((r, None) for r in _RESHAPES), *((r, 1) for r in _RESHAPES[:-1])])
def test_sizes_of_the_batch_in_the_forward_make_no_difference(monkeypatch, reshape, most):
    if most is not None:  # masked products in place of columns
        monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", most)
    torch.manual_seed(0)
    model, x = Reshaping(reshape).eval(), torch.rand(5, 2, 4, 4)
    plain = Reshaping(nn.Flatten()).eval()
    plain.load_state_dict(model.state_dict())
    found, expected = (
        local_lipschitz_bounds(m, x, 0.1, points=1, generator=torch.Generator().manual_seed(0)).upper
        for m in (model, plain)
    )
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("move", [lambda x: torch.roll(x, 1, 2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)])
def test_masks_move_with_the_values(monkeypatch, move):
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return move(x)

    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Moved(), nn.Conv2d(4, 3, 2, stride=2), nn.Flatten()
    model, x = nn.Sequential(*layers).eval(), torch.rand(4, 2, 4, 4)
    monkeypatch.setattr("fastlip.lipschitz._balls._MOST_ELEMENTS", 1)
    bounds = local_lipschitz_bounds(model, x, 0.05)
    assert (bounds.lower <= bounds.upper).all()
    assert (bounds.upper < 0.999 * lipschitz_bound(model, (2, 4, 4), tight_chains=False).upper).any()


def test_an_empty_batch_has_no_bounds():
    bounds = local_lipschitz_bounds(mlp(nn.ReLU(), 4, 4, 2), torch.rand(0, 4), 0.1)
    assert bounds.upper.shape == bounds.lower.shape == (0,)
    assert bounds.points.shape == (0, 4)


def test_rounding_of_float32_does_not_lift_lower_sides():
    """The slope of a saturated SELU is a difference of two numbers that are equal in float32."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([-17.3, -17.9]))
    model = nn.Sequential(layer, nn.SELU()).eval()
    bounds = local_lipschitz_bounds(model, torch.rand(6, 2), 1e-3)
    assert (bounds.lower <= bounds.upper).all()
    assert (bounds.lower >= 0.9 * bounds.upper).all()


def test_no_sample_is_above_the_bound_that_holds_everywhere_once_it_is_known():
    torch.manual_seed(1)
    net, x = mlp(nn.ReLU(), 8, 24, 24, 4), torch.rand(12, 8)
    radius = torch.linspace(0.01, 8.0, 12)
    bounds = local_lipschitz_bounds(net, x, radius, points=1)
    everywhere = lipschitz_bound(net, (8,)).upper
    assert (bounds.upper <= everywhere * (1.0 + 1e-6)).all()


SLOPES = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5), nn.Hardtanh(-0.5, 0.7), nn.Hardsigmoid(),
    nn.Softshrink(), nn.RReLU(), nn.RReLU(-1.0, -0.5), nn.Threshold(0.3, 0.3), nn.Sigmoid(), nn.Tanh(), nn.Softsign(),
    nn.Tanhshrink(), nn.LogSigmoid(), nn.Softplus(), nn.Softplus(3.0, 40.0), nn.ELU(), nn.ELU(2.0),
    nn.ELU(-0.5), nn.CELU(0.5), nn.SELU(), nn.GELU(), nn.GELU("tanh"),
    nn.SiLU(), nn.Mish(), nn.Hardswish(),
]  # fmt: skip


@pytest.mark.parametrize("module", SLOPES, ids=repr)
def test_slopes_stay_within_their_bounds(module):
    grid = torch.linspace(-7.03, 6.97, 141, dtype=torch.float64)
    leaf = grid.clone().requires_grad_()
    (values,) = torch.autograd.grad(module.eval()(leaf).sum(), leaf)
    secants = module(grid).diff() / grid.diff()
    for a, b in itertools.combinations(range(0, 141, 5), 2):
        low, high = slope_bounds(module, Interval(grid[a].view(1, 1), grid[b].view(1, 1)))
        inside = torch.cat([values[a : b + 1], secants[a:b]])
        assert low.item() <= inside.min() + 1e-8
        assert inside.max() - 1e-8 <= high.item()  # autograd takes 1 / 6 in float32
        # The bounds are attained, up to the grid.
        assert low.item() >= inside.min() - 0.1
        assert high.item() <= inside.max() + 0.1
    low, high = slope_bounds(module, Interval.unbounded((1,)))
    assert low.item() - 1e-8 <= values.min()
    assert values.max() <= high.item() + 1e-8
    far = Interval(torch.tensor([[1e6, -1e300]]), torch.tensor([[1e300, -1e6]]))
    low, high = slope_bounds(module, far)
    assert (high - low <= 2e-9).all() or isinstance(module, nn.ELU | nn.SELU)
    touching = slope_bounds(nn.ReLU(), Interval(torch.zeros(1, 1), torch.ones(1, 1)))
    assert (touching[0].item(), touching[1].item()) == (0.0, 1.0)


def test_slopes_of_prelu_by_channel():
    module = nn.PReLU(2).double()
    module.weight.data = torch.tensor([0.25, -3.0], dtype=torch.float64)
    x = Interval(torch.tensor([[[-1.0, 1.0], [-1.0, -2.0]]]), torch.tensor([[[1.0, 2.0], [1.0, -1.0]]]))
    low, high = slope_bounds(module, x)
    assert low.tolist() == [[[0.25, 1.0], [-3.0, -3.0]]]
    assert high.tolist() == [[[1.0, 1.0], [1.0, -3.0]]]


def test_modules_without_known_slopes_have_none():
    assert slope_bounds(nn.MaxPool2d(2), Interval.box(0.0, 1.0, (1, 4, 4))) is None


class _Attending(nn.Module):
    """A block whose factors depend on how large values are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def test_balls_of_networks_whose_factors_depend_on_values() -> None:
    model, x = _Attending().eval(), torch.rand(4, 3, 4)
    everywhere = lipschitz_bound(model, (3, 4)).upper
    radii = torch.tensor([0.01, 0.05, 1e-3, 0.1])
    found = local_lipschitz_bounds(model, x, radii)
    alone = [lipschitz_bound(model, (3, 4), around=c, radius=r.item()) for c, r in zip(x, radii, strict=True)]
    for upper, lower, bound in zip(found.upper.tolist(), found.lower.tolist(), alone, strict=True):
        assert lower <= upper <= min(everywhere, bound.upper) * (1.0 + 1e-9)
    assert found.upper.min() < everywhere / 10
    assert found.confidence >= 1.0 - 1e-6
    # On large balls nothing is gained, and what holds everywhere holds there.
    assert local_lipschitz_bounds(model, x, 30.0).upper.tolist() == pytest.approx([everywhere] * 4)
    # Linf balls count with the L2 ball around them.
    assert (local_lipschitz_bounds(model, x, radii / 12**0.5, norm="linf").upper <= found.upper * (1.0 + 1e-6)).all()


class SqueezeAndExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 2), nn.Linear(2, 4)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.head((x * gate[:, :, None, None]).flatten(1))


WEIGHTED = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)
    ),
    "square": (lambda: nn.Sequential(nn.Linear(6, 8), Applied(torch.square), nn.Linear(8, 3)), (6,)),
    "exponential": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Applied(torch.exp), nn.Linear(8, 3)), (6,)),
    "gated linear unit": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)), (6,)),
    "gate": (SqueezeAndExcite, (2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("most", [None, 1], ids=["columns", "masks"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_factors_that_depend_on_values_are_those_of_each_ball(
    name: str, norm: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr(_balls, "_MOST_ELEMENTS", most)
    make, shape = WEIGHTED[name]
    torch.manual_seed(3)
    net = make().double().eval()
    x = torch.randn(4, *shape, dtype=torch.float64)
    radius = torch.tensor([0.0, 0.01, 0.05, 0.3], dtype=torch.float64)
    found = local_lipschitz_bounds(net, x, radius, norm=norm, points=32)
    assert (found.upper >= found.lower).all()
    for sample, r, upper in zip(x, radius, found.upper, strict=True):
        ball = torch.randn(20, *shape, dtype=torch.float64)
        ball = ball.sign() if norm == "linf" else F.normalize(ball.flatten(1)).view_as(ball)
        for point in sample + r * torch.rand(20, *(1,) * len(shape)) * ball:
            jacobian = torch.autograd.functional.jacobian(net, point[None]).view(-1, point.numel())
            assert torch.linalg.matrix_norm(jacobian, 2) <= upper * (1 + 1e-9)
    # On a small ball nothing is above what follows from how large values are there.
    composed = lipschitz_bound(net, shape, around=x[0], radius=1e-9).upper
    assert found.upper[0] <= max(composed, 2.0 * found.lower[0]) * (1 + 1e-6)

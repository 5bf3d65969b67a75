"""Linear maps without weights: every one is as good as its matrix multiplied into the layer behind it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import Tensor, nn

from fastlip.lipschitz import _balls, lipschitz_bound, local_lipschitz_bounds
from fastlip.lipschitz._gain import OpenUnits, largest_norm

SHAPE = (4, 4, 4)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: torch.flip(x, (1, 3)),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "moveaxis": lambda x: torch.moveaxis(x, 1, 2),
    "movedim": lambda x: x.movedim(3, 1),
    "swapaxes": lambda x: torch.swapaxes(x, 2, 3),
    "swapdims": lambda x: x.swapdims(1, 2),
    "transpose": lambda x: x.transpose(1, 3),
    "adjoint": lambda x: x.adjoint(),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "ravel of a slice": lambda x: x[:, 1].reshape(len(x), -1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "detach": lambda x: x.detach(),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "double": lambda x: x.double(),
    "slice": lambda x: x[:, :, 1:3, ::2],
    "select": lambda x: x.select(1, 2),
    "index": lambda x: x[:, [2, 0, 2]],
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 1])),
    "narrow": lambda x: x.narrow(3, 1, 2),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "tril": lambda x: x.tril(),
    "masked_fill": lambda x: x.masked_fill(torch.eye(4) > 0, 0.0),
    "unfold": lambda x: F.unfold(x, 2),
    "windows": lambda x: x.unfold(2, 2, 1),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(1),
    "neg": lambda x: -x,
    "mul": lambda x: x * torch.linspace(-1.0, 2.0, 4),
    "multiply": lambda x: torch.multiply(x, 0.5),
    "div": lambda x: x / torch.tensor([0.5, 4.0])[:, None].repeat(2, 1),
    "divide": lambda x: x.divide(3.0),
}
MODULES: dict[str, nn.Module] = {
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout(),
    "Dropout2d": nn.Dropout2d(),
    "AlphaDropout": nn.AlphaDropout(),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(),
    "Flatten": nn.Flatten(2),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "ChannelShuffle": nn.ChannelShuffle(2),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReplicationPad2d": nn.ReplicationPad2d(1),
    "AvgPool2d": nn.AvgPool2d(2, stride=1),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(3),
}


#: Those that only move values.
MOVING = (
    *("roll", "flip", "rot90", "moveaxis", "movedim", "swapaxes", "swapdims", "transpose", "adjoint", "permute"),
    *("unflatten", "detach", "pixel_shuffle", "channel_shuffle", "double", "dropout", "Identity", "Dropout"),
    *("Dropout2d", "AlphaDropout", "FeatureAlphaDropout", "Flatten", "Unflatten", "PixelShuffle", "PixelUnshuffle"),
    "ChannelShuffle",
)
LINEAR = {**{name: Applied(function) for name, function in FUNCTIONS.items()}, **MODULES}


def around(step: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network with a step between two layers, and the same one with the step's matrix in the second layer."""
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
    with torch.no_grad():
        matrix = torch.cat([step.eval()(unit[None]).flatten(1) for unit in units])
    first, last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(matrix.shape[1], 6)
    joined = nn.Linear(len(matrix), 6)
    with torch.no_grad():
        joined.weight.copy_(last.weight.double() @ matrix.mT)
        joined.bias.copy_(last.bias)
    net = nn.Sequential(
        first, nn.ReLU(), step, nn.Flatten(), last, nn.LeakyReLU(0.3), Applied(lambda x: x[:, :1] - x[:, 1:3])
    )
    return net.double().eval(), nn.Sequential(*net[:2], nn.Flatten(), joined, *net[5:]).double().eval()


@pytest.mark.parametrize("name", LINEAR)
def test_balls_lose_nothing_by_a_linear_step(name: str) -> None:
    net, joined = around(LINEAR[name])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), joined(x), rtol=1e-5, atol=1e-5)
    found, expected = (local_lipschitz_bounds(model, x, radius=0.05, points=4).upper for model in (net, joined))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", MOVING)
def test_masks_lose_nothing_by_what_only_moves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_balls, "_MOST_ELEMENTS", 1)
    net, joined = around(LINEAR[name])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found, expected = (local_lipschitz_bounds(model, x, radius=0.02, points=4).upper for model in (net, joined))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_regions_lose_nothing_by_a_linear_module(name: str) -> None:
    net, joined = around(MODULES[name])
    x = torch.zeros(1, *SHAPE)
    found, expected = (lipschitz_bound(model, (2, 4, 4)).upper for model in (net, joined))
    assert found <= expected * 1.02 or MODULES[name](x).numel() != x.numel()


@pytest.mark.parametrize("keeps", [nn.Identity(), nn.Dropout(), nn.AlphaDropout(), nn.FeatureAlphaDropout()])
def test_residual_blocks_lose_nothing_by_a_dropout(keeps: nn.Module) -> None:
    class Block(nn.Module):
        def __init__(self, between: nn.Module) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
            self.between = between

        def forward(self, x: Tensor) -> Tensor:
            return x + self.between(self.second(self.between(F.relu(self.first(x)))))

    block = Block(keeps).eval()
    plain = Block(nn.Identity()).eval()
    plain.load_state_dict(block.state_dict())
    found, expected = (lipschitz_bound(model, (9,)).upper for model in (block, plain))
    assert found == pytest.approx(expected, rel=1e-9)


def test_units_that_reach_no_output_cost_nothing() -> None:
    """The multiplier of such a unit would best be 0, by which the errors of its column would be divided."""
    outer = torch.randn(2, 3, 5, dtype=torch.float64)
    units = OpenUnits(
        outer,
        torch.zeros(2, 3, 1, dtype=torch.float64),
        torch.zeros(2, 1, 1, dtype=torch.float64),
        torch.randn(2, 1, 5, dtype=torch.float64),
        torch.full((2, 1), 0.5, dtype=torch.float64),
        torch.ones(2, 1, dtype=torch.float64),
        [slice(0, 1)],
        torch.full((2, 6), 1e-15, dtype=torch.float64),
        torch.full((2, 1, 6), 1e-15, dtype=torch.float64),
    )
    torch.testing.assert_close(largest_norm(units), torch.linalg.matrix_norm(outer, 2), rtol=1e-4, atol=0)


class Split(nn.Module):
    """Two halves of the channels, one of which goes through another layer."""

    def __init__(self, halves: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.first, self.own = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.last, self.halves = nn.Linear(64, 3), halves

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.halves(F.relu(self.first(x)))
        return self.last(torch.cat([a, F.gelu(self.own(b))], 1).flatten(1))


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, 1),
        lambda x: torch.split(x, 2, dim=1),
        lambda x: x.tensor_split(2, 1),
        lambda x: x.split([2, 2], 1)[0:2],
    ],
)
def test_balls_lose_nothing_by_a_split(halves: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    net = Split(halves).double().eval()
    sliced = Split(lambda x: (x[:, :2], x[:, 2:])).double().eval()
    sliced.load_state_dict(net.state_dict())
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found, expected = (local_lipschitz_bounds(model, x, radius=0.05, points=4) for model in (net, sliced))
    torch.testing.assert_close(found.upper, expected.upper, rtol=1e-6, atol=0)
    assert (found.upper < 1.3 * found.lower).all()


@pytest.mark.parametrize("pair", [lambda x: torch.std_mean(x, 1), lambda x: (x.sort(1)[0], x.sort(1)[0])])
def test_balls_of_tuples_that_are_not_linear(pair: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Each part's constant is its own: they do not multiply, and none is forgotten."""

    def both(x: Tensor) -> Tensor:
        a, b = pair(x)
        return torch.cat([a.flatten(1), b.flatten(1)], 1)

    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Applied(both)).double().eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found = local_lipschitz_bounds(net, x, radius=0.05, points=64)
    assert (found.upper >= found.lower).all()
    for sample, upper in zip(x, found.upper, strict=True):
        moved = sample + 0.05 * F.normalize(torch.randn(200, 32, dtype=torch.float64)).view(-1, 2, 4, 4)
        stretch = (net(moved) - net(sample[None])).flatten(1).norm(dim=1) / (moved - sample).flatten(1).norm(dim=1)
        assert stretch.max() <= upper


@pytest.mark.parametrize("value", [0.28125, 1.28125, 2.40625, 0.40625, 3.0, -1.0, math.inf])
def test_no_constant_passes_for_an_element(value: float) -> None:
    """Elements are found by numbers in their place, of which a constant may be one."""
    fills = [
        lambda x: F.pad(x, (1, 2), value=value),
        lambda x: x.masked_fill(torch.tensor([True, False, True]), value),
        lambda x: torch.index_fill(x, 1, torch.tensor([1]), value),
        lambda x: x.scatter(1, torch.zeros(len(x), 1, dtype=torch.long), value),
        lambda x: x.scatter(1, torch.ones(len(x), 1, dtype=torch.long), torch.full((len(x), 1), value)),
    ]
    for fill in fills:
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Applied(fill), Applied(lambda x: x.clamp(-9.0, 9.0)))
        width = net(torch.zeros(1, 3)).shape[1]
        net = nn.Sequential(*net, nn.Linear(width, 2))
        found = local_lipschitz_bounds(net, torch.randn(4, 3), 0.1, points=4)
        assert (found.upper >= found.lower * (1.0 - 1e-6)).all()
        assert (found.lower > 0.0).all()
        assert lipschitz_bound(net, (3,)).upper >= found.lower.max() * (1.0 - 1e-6)


def test_what_changes_elements_selects_none() -> None:
    index = torch.zeros(1, 1, dtype=torch.long)
    for reduce in ("multiply", "add"):
        net = Applied(lambda x, reduce=reduce: x.scatter(1, index.expand(len(x), 1), 20.0, reduce=reduce))
        with pytest.raises(ValueError, match="no Lipschitz rule for the function scatter"):
            lipschitz_bound(net, (3,))


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": lambda h: h[:, 0] - h[:, 1],
    "sum": lambda h: h.sum(1),
    "mean": lambda h: h.mean(-1),
    "squeezed": lambda h: h[:, :1].squeeze(1),
    "squeezed and back": lambda h: (h[:, 0] + h[:, 1]).unsqueeze(1),
    "broadcast": lambda h: h - h[:, 0].unsqueeze(1),
    "activation": lambda h: torch.tanh(h[:, 0] + 0.5),
    "relu of a mean": lambda h: F.relu(h.mean(-1)).unsqueeze(1) * 2.0,
    "einsum": lambda h: torch.einsum("bi->b", h)[:, None],
    "nothing beside": lambda h: torch.cat([F.relu(h[:, :0]), h], 1),
    "nothing added up": lambda h: torch.cat([h[:, :0].cumsum(1), h], 1),
    "another axis of samples": lambda h: h.flatten(0, 1).unsqueeze(1).mul(2.0).view(len(h), -1),
}


@pytest.mark.parametrize("most", [None, 1], ids=["columns", "masks"])
@pytest.mark.parametrize("name", SCALARS)
def test_samples_without_axes_or_elements(name: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if most is not None:
        monkeypatch.setattr(_balls, "_MOST_ELEMENTS", most)
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(), Applied(SCALARS[name])).double().eval()
    x = torch.randn(3, 3, dtype=torch.float64)
    found = local_lipschitz_bounds(net, x, 0.05, points=8)
    assert (found.upper >= found.lower * (1.0 - 1e-9)).all()
    for sample, upper in zip(x, found.upper, strict=True):
        for point in sample + 0.05 * F.normalize(torch.randn(10, 3, dtype=torch.float64)):
            jacobian = torch.autograd.functional.jacobian(net, point[None]).reshape(-1, 3)
            assert torch.linalg.matrix_norm(jacobian, 2) <= upper * (1.0 + 1e-9)


def test_a_layer_whose_batch_holds_parts_of_samples() -> None:
    conv = nn.Conv1d(1, 1, 3, padding=1)
    net = nn.Sequential(
        Applied(lambda x: conv(x.flatten(0, 1).unsqueeze(1)).view(x.shape[0], -1)), nn.ReLU(), nn.Linear(12, 2)
    )
    found = local_lipschitz_bounds(net, torch.randn(2, 3, 4), 0.05, points=4)
    assert (found.upper >= found.lower * (1.0 - 1e-6)).all()


def test_units_that_read_nothing_cost_nothing() -> None:
    """The multiplier of such a unit would best be infinite, by which the errors of its block would be multiplied."""
    outer = torch.randn(2, 3, 5, dtype=torch.float64)
    units = OpenUnits(
        outer,
        torch.randn(2, 3, 2, dtype=torch.float64),
        torch.zeros(2, 2, 2, dtype=torch.float64),
        torch.stack([torch.zeros(2, 5), 0.01 * torch.randn(2, 5)], 1).double(),
        torch.full((2, 2), 0.5, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.float64),
        [slice(0, 2)],
        torch.full((2, 7), 1e-15, dtype=torch.float64),
        torch.full((2, 1, 7), 1e-15, dtype=torch.float64),
    )
    norm = torch.linalg.matrix_norm(outer, 2)
    found = largest_norm(units)
    assert (found >= norm).all()
    assert (found <= 1.1 * norm).all()

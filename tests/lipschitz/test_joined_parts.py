"""Disjoint parts of a tensor, and what is made of them, put together again; and parts that only look disjoint."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import Tensor, nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._composition import _log_norm

TWO = math.sqrt(2.0)


def jacobian_norm(model: nn.Module, shape: tuple[int, ...], point: Tensor | None = None) -> float:
    x = torch.zeros(1, *shape, dtype=torch.float64) if point is None else point[None].double()
    jacobian = torch.autograd.functional.jacobian(model.double().eval(), x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2).item()


def merged_patches(x: Tensor) -> Tensor:
    """As in Swin transformers, for [B, H, W, C]."""
    return torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)


def shuffled(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 1), 1).view(-1, 2, 2, 3, 3).transpose(1, 2).flatten(1, 2)


# Linear maps, with their norm.
MAPS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "chunk": (lambda x: torch.cat(x.chunk(2, 1), 1), 1.0),
    "exchanged": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 1.0),
    "split, stacked": (lambda x: torch.stack(x.split(2, 1), 0), 1.0),
    "unbind": (lambda x: torch.stack(x.unbind(2), 1), 1.0),
    "slices": (lambda x: torch.cat([x[:, :1], x[:, 1:]], 1), 1.0),
    "strides": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), 1.0),
    "lists": (lambda x: torch.cat([x[:, [3, 1]], x[:, [0, 2]]], 1), 1.0),
    "patches": (merged_patches, 1.0),
    "shuffled": (shuffled, 1.0),
    "channels that are scaled": (lambda x: torch.cat([3.0 * x[:, :2], 2.0 * x[:, 2:]], 1), 3.0),
    "a part of a part": (lambda x: torch.cat([torch.cat(x[:, :2].chunk(2, 1), 1), x[:, 2:3]], 1), 1.0),
    "a part twice": (lambda x: torch.cat([x[:, :2], x[:, :2], x[:, 2:]], 1), TWO),
    "a part that is repeated": (lambda x: torch.cat([x[:, :2].repeat(1, 2, 1, 1), x[:, 2:]], 1), TWO),
    "an element of an element twice": (lambda x: torch.cat([x[:, [0, 0]], x[:, [1, 2, 3]]], 1), TWO),
    "overlapping": (lambda x: torch.cat([x[:, :3], x[:, 2:]], 1), TWO),
    "overlapping beside another": (lambda x: torch.cat([x[:, :2], x[:, 1:3], x[:, 3:]], 1), TWO),
    "the whole beside a part": (lambda x: torch.cat([x, x[:, 2:]], 1), TWO),
    "the whole, sliced": (lambda x: torch.cat([x[:, :], x[:, 2:]], 1), TWO),
    "negative indices": (lambda x: torch.cat([x[:, -2:], x[:, 2:]], 1), TWO),
    "moved, then parts of it and of it unmoved": (lambda x: torch.cat([x.flip(1)[:, :2], x[:, 2:]], 1), TWO),
    "sum": (lambda x: x[:, :2] + x[:, 2:], TWO),
    "difference": (lambda x: 3.0 * x[:, :2] - 4.0 * x[:, 2:], 5.0),
    "sum with a common part": (lambda x: x[:, :3] + x[:, 1:], 2.0),
}


@pytest.mark.parametrize(("function", "norm"), MAPS.values(), ids=MAPS)
def test_linear_maps_of_parts_get_their_norm(function: Callable[[Tensor], Tensor], norm: float) -> None:
    shape = (4, 4, 4) if function is merged_patches else (4, 3, 3)
    model = Applied(function)
    bound = lipschitz_bound(model, shape, check=False).upper
    exact = jacobian_norm(model, shape)
    assert exact * (1.0 - 1e-12) <= bound <= norm * (1.0 + 1e-9)
    if norm != 2.0:  # of two windows of a tensor the sum's norm is a little less
        assert exact == pytest.approx(norm, rel=1e-9)


class Mixture(nn.Module):
    """Random linear maps of random selections, whose results are joined at random, one level after the other."""

    def __init__(self, seed: int, activation: nn.Module) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        self.activation = activation
        self.levels: list[tuple[str, list[list[tuple[list[int], nn.Module]]]]] = []
        size = 6
        for _ in range(self.number(1, 4)):
            branches = []
            width = self.number(1, 4)
            places = torch.randperm(size, generator=self.generator).tolist()
            for part in range(self.number(2, 4)):
                chosen = places[part::3]
                if self.number(0, 4) == 0:  # not disjoint
                    chosen = [*chosen, places[self.number(0, size)]]
                terms = [(chosen, self.layer(len(chosen), width))]
                if self.number(0, 3) == 0:  # as in Res2Net
                    other = places[self.number(0, 3) :: 3]
                    terms.append((other, self.layer(len(other), width)))
                branches.append(terms)
            join = ["cat", "sum", "difference", "largest"][self.number(0, 4)]
            self.levels.append((join, branches))
            size = width * (len(branches) if join == "cat" else 1)
            if size < 3:
                break

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self.generator))

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        layer.weight.data.copy_(torch.randn(outputs, inputs, generator=self.generator, dtype=torch.float64))
        layer.bias.data.zero_()
        self.layers.append(layer)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        for join, branches in self.levels:
            made = []
            for terms in branches:
                first, *others = (layer(x[:, chosen]) for chosen, layer in terms)
                made.append(self.activation(sum(others, first)))
            x = made[0]
            if join == "cat":
                x = torch.cat(made, 1)
            for y in made[1:] if join != "cat" else ():
                x = x + y if join == "sum" else x - y if join == "difference" else torch.maximum(x, y)
        return x


@pytest.mark.parametrize("seed", range(60))
def test_random_mixtures_of_parts_stay_below_the_bound(seed: int) -> None:
    model = Mixture(seed, nn.Identity() if seed % 2 else nn.LeakyReLU(0.5))
    bound = lipschitz_bound(model, (6,), tight_chains=False, check=False)
    points = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert max(jacobian_norm(model, (6,), point) for point in points) <= bound.upper * (1.0 + 1e-9)
    assert bound.log10_upper <= bound.log10_plain


class Unit(nn.Module):
    """A unit of ShuffleNet V2: one half of the channels is kept."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
        with torch.no_grad():
            self.branch[3].weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat((kept, self.branch(changed)), dim=1), 2)


class Hierarchy(nn.Module):
    """The middle of a Res2Net block: each part is added to what was made of the part before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.split(x, 2, 1)
        made, y = [first], first
        for layer, part in zip(self.layers, parts, strict=True):
            y = F.relu(layer(part + y))
            made.append(y)
        return torch.cat(made, 1)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_unit_that_keeps_half_of_the_channels_has_the_larger_of_its_branches(scale: float) -> None:
    torch.manual_seed(0)
    model = Unit(scale).eval()
    bound = lipschitz_bound(model, (4, 4, 4))
    branch = lipschitz_bound(model.branch, (2, 4, 4)).upper
    assert bound.upper == pytest.approx(max(1.0, branch), rel=2e-2)
    assert sum(part.log10_factor for part in bound.parts) == pytest.approx(bound.log10_upper)
    points = torch.randn(6, 4, 4, 4)
    assert max(jacobian_norm(model, (4, 4, 4), point) for point in points) <= bound.upper


def test_a_hierarchy_of_parts_is_the_norm_of_a_triangular_matrix() -> None:
    torch.manual_seed(0)
    model = Hierarchy().eval()
    norms = [lipschitz_bound(layer, (2, 3, 3)).upper for layer in model.layers]
    matrix = torch.eye(4)
    for i, norm in enumerate(norms):
        matrix[i + 1] = norm * (matrix[i] + torch.eye(4)[i + 1])
    bound = lipschitz_bound(model, (8, 3, 3), tight_chains=False)
    assert bound.upper == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=2e-2)
    points = torch.randn(6, 8, 3, 3)
    assert max(jacobian_norm(model, (8, 3, 3), point) for point in points) <= bound.upper < 0.8 * 10**bound.log10_plain


def test_a_gate_of_the_other_half_adds_squares() -> None:
    model = Applied(lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]))
    bound = lipschitz_bound(model, (4,), bounds=(-4.0, 4.0))
    gate = torch.sigmoid(torch.tensor(4.0)).item()
    assert bound.upper == pytest.approx(math.hypot(gate, 0.25 * 4.0), rel=1e-6)
    assert bound.upper < 0.8 * 10**bound.log10_plain
    points = 4.0 * torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.2, 0.2], [1.0, -1.0, 1.0, 0.4]])
    assert max(jacobian_norm(model, (4,), point) for point in points) <= bound.upper


def test_norms_of_logarithms_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((2, 3), (4, 4), (1, 5), (6, 2)):
        matrix = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        matrix[0, 0] = 0.0
        exact = math.log10(torch.linalg.matrix_norm(matrix, 2).item())
        for shift in (0.0, 400.0, -400.0):
            logs = [[math.log10(v) + shift if v else -math.inf for v in row] for row in matrix.tolist()]
            assert exact + shift <= _log_norm(logs) <= exact + shift + 1e-9
    assert _log_norm([[-math.inf, 2.0], [1.0, -math.inf]]) == 2.0
    assert _log_norm([[-math.inf], [-math.inf]]) == -math.inf
    assert _log_norm([[math.inf, 1.0], [1.0, 1.0]]) == math.inf

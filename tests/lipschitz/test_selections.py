"""Functions that copy, move or drop elements have the norm of their matrix, and bounds of their values."""

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval

SHAPE = (4, 6, 5)
INDEX = torch.tensor([2, 0, 2, 1, 2])


ONE = {
    "slice": lambda x: x[:, 1:3, ::2],
    "ellipsis": lambda x: x[..., :2],
    "new axis": lambda x: x[:, None, 0],
    "list": lambda x: x[:, [2, 0, 2, 2]],
    "tensor": lambda x: x[:, :, INDEX],
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: torch.narrow(x, 2, 1, 3),
    "index_select": lambda x: torch.index_select(x, 2, INDEX),
    "expand": lambda x: x[:, :1].expand(-1, 7, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=2),
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "flip": lambda x: x.flip(2),
    "swapaxes": lambda x: x.swapaxes(1, 3),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "tril": lambda x: x.tril(),
    "windows": lambda x: x.unfold(2, 3, 1),
    "columns": lambda x: F.unfold(x, (3, 2), padding=1),
    "sum of windows": lambda x: F.fold(x.flatten(2).expand(-1, 4, -1)[:, :, :20], (6, 5), 2, stride=1),
    "zeros": lambda x: F.pad(x, (1, 2, 0, 3)),
    "cropped": lambda x: F.pad(x, (-1, 2)),
    "constant": lambda x: F.pad(x, (1, 1), value=3.0),
    "reflect": lambda x: F.pad(x, (2, 1, 3, 0), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 4, 0), mode="circular"),
    "reflection module": nn.ReflectionPad2d((1, 2, 3, 1)),
    "replication module": nn.ReplicationPad2d(2),
    "circular module": nn.CircularPad2d((1, 0, 2, 2)),
    "constant module": nn.ConstantPad2d(1, 0.5),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "take_along_dim": lambda x: torch.take_along_dim(x, INDEX[:4].view(1, 4, 1, 1).expand(len(x), -1, 6, 5), 1),
    "scatter": lambda x: x.scatter(2, torch.ones(len(x), 4, 1, 5, dtype=torch.long), 0.25),
    "index_fill": lambda x: torch.index_fill(x, 2, torch.tensor([1, 4]), -2.0),
    "fold module": nn.Sequential(nn.Flatten(2), nn.Fold((7, 6), 2)),
    "masked_fill": lambda x: x.masked_fill(torch.arange(5) > 2, -1.0),
}
SEVERAL = {
    "chunk": lambda x: x.chunk(3, dim=2)[1],
    "split": lambda x: torch.split(x, [1, 3], dim=1)[1],
    "split, equal": lambda x: x.split(2, 1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "tensor_split": lambda x: x.tensor_split(2, dim=3)[1],
}


def matrix(function):
    jacobian = torch.autograd.functional.jacobian(function, torch.rand(1, *SHAPE, dtype=torch.float64))
    return jacobian.flatten(-len(SHAPE)).reshape(-1, 4 * 6 * 5)


@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_the_constant_is_the_norm_of_the_matrix(name):
    function = (ONE | SEVERAL)[name]
    norm = torch.linalg.matrix_norm(matrix(function), 2).item()
    bound = lipschitz_bound(Applied(function), SHAPE).upper
    assert norm <= bound * (1.0 + 1e-12)
    assert bound == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("name", ONE)
def test_values_lie_within_their_bounds_and_their_norm(name):
    traced = trace(Applied(ONE[name]).double(), SHAPE)
    generator = torch.Generator().manual_seed(3)
    centre, away = (torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    x = Interval(centre - away.abs(), centre + away.abs())
    known, values = {}, [{}, {}, {}]
    for node, step in traced.steps.items():
        if node.op == "placeholder":
            known[node] = x
            for env, value in zip(values, (x.lower, x.upper, centre), strict=True):
                env[node] = value
            continue
        given = (node.args, node.kwargs)
        args, kwargs = torch.fx.node.map_arg(given, lambda n: known.get(n, traced.values.constants.get(n)))
        known[node] = step.interval(*args, **kwargs)
        for env in values:
            args, kwargs = torch.fx.node.map_arg(given, lambda n, env=env: env.get(n, traced.values.constants.get(n)))
            env[node] = step.apply(*args, **kwargs)
            assert env[node].shape[1:] == step.shape
            assert bool((known[node].lower <= env[node]).all() and (env[node] <= known[node].upper).all())
            size = torch.linalg.vector_norm(env[node].flatten(1), dim=1)
            assert bool((size <= known[node].norm * (1.0 + 1e-12)).all())
    assert len(known) > 1


def test_what_depends_on_the_input_does_not_select():
    def function(x):
        return torch.gather(x.flatten(1), 1, x.flatten(1).argsort(1))

    with pytest.raises(ValueError, match=r"argsort \(at argsort\) jumps"):
        lipschitz_bound(Applied(function), SHAPE)


class Overwrites(nn.Module):
    """Gives all of a product other values, so that the product itself does not count."""

    def forward(self, x):
        scores = 100.0 * x
        scores[:, :, 0:] = 3.0 * x + scores.mean((1, 2, 3), keepdim=True)
        return scores


def test_what_is_overwritten_is_not_what_counts():
    model = Overwrites()
    norm = torch.linalg.matrix_norm(matrix(lambda x: model(x.clone())), 2).item()
    bound = lipschitz_bound(model, SHAPE).upper
    assert norm <= bound * (1.0 + 1e-12)

"""torch.einsum: bounds above the stretch of random instances, and exact for a constant operand."""

import pytest
import torch
from torch import nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval


class Applied(nn.Module):
    def __init__(self, function, constant=None):
        super().__init__()
        self.function = function
        if constant is not None:
            self.register_buffer("constant", constant)

    def forward(self, x):
        return self.function(x) if not hasattr(self, "constant") else self.function(x, self.constant)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


TWO = {
    "scores": lambda x: torch.einsum("bnd,bmd->bnm", x, 2.0 * x),
    "heads": lambda x: torch.einsum(
        "b h n d, b h m d -> b h n m", x.unflatten(2, (2, 3)).transpose(1, 2), x[:, None].expand(-1, 2, -1, -1)[..., :3]
    ),
    "values": lambda x: torch.einsum("bnm,bmd->bdn", x[:, :, :4], x),
    "gate": lambda x: torch.einsum("bnd,bd->bnd", x, x.mean(1)),
    "summed": lambda x: torch.einsum("bnd,bm->bdm", x, x[:, :, 0]),
    "ellipsis": lambda x: torch.einsum("...nd,...md->...nm", x, x),
    "list": lambda x: torch.einsum("bnd,bnd->bn", [x, x]),
}
ONE = {
    "matrix": (lambda x, c: torch.einsum("bnd,de->bne", x, c), (6, 5)),
    "first": (lambda x, c: torch.einsum("mn,bnd->bdm", c, x), (3, 4)),
    "batch of matrices": (lambda x, c: torch.einsum("bnd,nde->bne", x, c), (4, 6, 2)),
    "sum": (lambda x, c: torch.einsum("bnd,e->bde", x, c), (3,)),
    "scale": (lambda x, c: torch.einsum("bnd,d->bnd", x, c), (6,)),
}


def stretch(model, centre, rounds=30):
    """The largest stretch found from points of [0, 1] in float64, in directions that power iteration finds."""
    best = 0.0
    for _ in range(rounds):
        point = torch.rand_like(centre).round() if best == 0.0 else torch.rand_like(centre)
        jacobian = torch.autograd.functional.jacobian(model, point).reshape(-1, centre.numel())
        best = max(best, torch.linalg.matrix_norm(jacobian, 2).item())
    ones = torch.autograd.functional.jacobian(model, torch.ones_like(centre)).reshape(-1, centre.numel())
    return max(best, torch.linalg.matrix_norm(ones, 2).item())


@pytest.mark.parametrize("name", TWO)
def test_two_traced_tensors_have_a_bound_on_a_box_alone_and_above_every_stretch(name):
    model = Applied(TWO[name]).double()
    bound = lipschitz_bound(model, (4, 6), bounds=(0.0, 1.0)).upper
    found = stretch(model, torch.rand(1, 4, 6, dtype=torch.float64), rounds=10)
    assert found <= bound <= 4.0 * found
    with pytest.raises(ValueError, match=r"no global Lipschitz constant.*bounds="):
        lipschitz_bound(model, (4, 6))


@pytest.mark.parametrize("name", ONE)
def test_a_constant_operand_gives_the_norm_of_the_matrix(name):
    function, shape = ONE[name]
    model = Applied(function, drawn(*shape))
    x = torch.rand(1, 4, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    norm = torch.linalg.matrix_norm(jacobian, 2).item()
    assert lipschitz_bound(model, (4, 6)).upper == pytest.approx(norm, rel=1e-6)
    assert lipschitz_bound(model, (4, 6)).upper >= norm


@pytest.mark.parametrize("name", ["scores", *ONE])
def test_values_lie_within_their_bounds(name):
    function, constant = (TWO[name], None) if name in TWO else (ONE[name][0], drawn(*ONE[name][1]))
    model = Applied(function, constant).double()
    traced = trace(model, (4, 6))
    constants = traced.values.constants
    centre, away = drawn(1, 4, 6), drawn(2, 4, 6)[:1].abs()
    known = {}
    for node, step in traced.steps.items():
        if node.op == "placeholder":
            known[node] = Interval(centre - away, centre + away)
            continue
        if step.kind == "mul":  # by 2, in "scores"
            known[node] = Interval(2.0 * (centre - away), 2.0 * (centre + away))
            continue
        given = {n: known.get(n, constants.get(n)) for n in node.all_input_nodes}
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.get)
        known[node] = step.interval(*args, **kwargs)
    bounds = known[node]
    for x in (centre - away, centre + away, centre):
        value = model(x)
        assert bool((bounds.lower <= value).all() and (value <= bounds.upper).all())


@pytest.mark.parametrize("equation", ["bii", "bnd,bnd,bnd->bn", "bnd,bnd", "bnn,bnd->bd"])
def test_other_equations_are_refused(equation):
    def function(x):
        square = x[:, :, :4]
        return torch.einsum(equation, *([square] * (equation.count(",") + 1)))

    with pytest.raises(ValueError, match="no Lipschitz rule"):
        lipschitz_bound(Applied(function), (4, 6))

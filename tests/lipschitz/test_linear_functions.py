"""Sums, means, products with constants and conversions have the norms of their matrices; extremes have constant 1."""

from collections.abc import Callable

import pytest
import torch
from applied import Applied
from torch import Tensor, fx

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "sum over two": lambda x: torch.sum(x, (1, -1), keepdim=True),
    "sum over the rest": lambda x: x.sum(dim=(1, 2, 3)),
    "mean": lambda x: x.mean(-2),
    "mean of all": lambda x: torch.mean(x, dim=[-1, 1, 2]),
    "matrix behind": lambda x: x @ draw(3, 6),
    "matrix in front": lambda x: torch.matmul(draw(5, 4), x),
    "matrices behind": lambda x: x @ draw(2, 3, 5),
    "matrices for one": lambda x: x[:, :1] @ draw(4, 3, 2),
    "number": lambda x: -3.0 * x,
    "per channel": lambda x: x * draw(2, 1, 1),
    "per column": lambda x: x * draw(3),
    "each": lambda x: draw(1, 2, 4, 3) * x,
    "broadcast": lambda x: x[:, :1] * draw(5, 4, 3),
    "more axes": lambda x: x.unsqueeze(1) * draw(3, 2, 1, 3),
    "quotient": lambda x: x / draw(4, 1),
    "widened": lambda x: x.double(),
    "the same": lambda x: x.to(torch.float32),
    "cumulative sum": lambda x: x.cumsum(2),
    "cumulative sum of one": lambda x: torch.cumsum(x[:, :, :1], dim=2),
    "difference": lambda x: torch.diff(x, dim=2),
    "difference along the last": lambda x: x.diff(),
    "chosen or a number": lambda x: torch.where(draw(4, 3) > 0, x, torch.tensor(0.5)),
    "chosen or a constant": lambda x: torch.where(draw(2, 4, 3) > 0, draw(4, 1), x),
    "chosen by a method": lambda x: x.where(draw(4, 3) > 0.2, -1.0),
    "chosen and broadcast": lambda x: torch.where(draw(5, 4, 3) > 0, x[:, :1], torch.tensor(0.0)),
    "constant minus": lambda x: torch.rsub(x, 1.5),
    "plus a multiple": lambda x: torch.add(draw(4, 3), x, alpha=-2.0),
    "minus a constant's multiple": lambda x: x.sub(draw(4, 3), alpha=0.5),
    "of its own shape": lambda x: x + torch.full_like(x, 2.0) * torch.ones_like(x),
    "einsum, sum": lambda x: torch.einsum("bchw->bc", x),
    "einsum, sum of two": lambda x: torch.einsum("bchw->bh", x),
    "einsum, moved": lambda x: torch.einsum("bchw->bwch", x),
    "einsum, diagonal": lambda x: torch.einsum("bchh->bch", x[:, :, :3]),
    "einsum, trace": lambda x: torch.einsum("bchh->bc", x[:, :, :3]),
    "nothing left": lambda x: x[:, :0].sum((2, 3)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_functions_have_the_norm_of_their_matrix(case: str) -> None:
    function, shape = LINEAR[case], (2, 4, 3)
    with torch.no_grad():
        eye = torch.eye(24).view(-1, *shape)
        rows = [(function(e[None]) - function(torch.zeros(1, *shape))).flatten() for e in eye]
    matrix = torch.stack(rows).double()
    true = torch.linalg.matrix_norm(matrix, 2).item() if matrix.numel() else 0.0
    bound = lipschitz_bound(Applied(function), shape).upper
    assert true <= bound * (1.0 + 1e-5)
    # Several matrices for one: each has its own norm, which the others may not attain at the same place.
    assert bound <= true * (2.0 if case == "matrices for one" else 1.0 + 1e-5) + 1e-12


ORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: torch.amin(x, -1, keepdim=True),
    "max with places": lambda x: x.max(1).values,
    "min with places": lambda x: torch.min(x, 2)[0],
    "sort": lambda x: torch.sort(x, -1)[0],
    "topk": lambda x: x.flatten(1).topk(5)[0],
    "logsumexp": lambda x: x.logsumexp(1),
    "median": lambda x: x.median(2).values,
    "median of all": lambda x: torch.median(x, 3, keepdim=True)[0],
    "kthvalue": lambda x: torch.kthvalue(x, 2, dim=1)[0],
}


@pytest.mark.parametrize("case", ORDERED)
def test_extremes_and_order_have_constant_one_which_is_attained(case: str) -> None:
    function = ORDERED[case]
    assert lipschitz_bound(Applied(function), (2, 4, 3)).upper == pytest.approx(1.0, rel=1e-12)
    x, y = (draw(200, 2, 4, 3, seed=seed).double() for seed in (0, 1))
    y = x + 1e-3 * y
    moved = torch.linalg.vector_norm((function(x) - function(y)).flatten(1), dim=1)
    assert bool((moved <= torch.linalg.vector_norm((x - y).flatten(1), dim=1) * (1.0 + 1e-9)).all())


@pytest.mark.parametrize("function", [lambda x: x.half(), lambda x: x.to(torch.bfloat16), lambda x: x.int()])
def test_conversions_that_round_have_no_constant(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"rounds to torch\.(float16|bfloat16|int32)"):
        lipschitz_bound(Applied(function), (3,))


@pytest.mark.parametrize("case", [c for c in LINEAR if c not in ("nothing left", "more axes", "broadcast")])
def test_values_stay_within_their_bounds(case: str) -> None:
    """The last step's bounds contain what it gives, on boxes around random points."""
    function, shape = LINEAR[case], (2, 4, 3)
    traced = trace(Applied(function), shape)
    (first,) = (n for n in traced.steps if n.op == "placeholder")
    lower = draw(3, *shape).double()
    box = Interval(lower, lower + draw(3, *shape, seed=1).double().abs())
    point = box.lower + 0.37 * (box.upper - box.lower)
    bounds, values, constants = {first: box}, {first: point}, traced.values.constants
    for node, step in traced.steps.items():
        if node is first:
            continue
        args = fx.node.map_arg(node.args, lambda n: bounds.get(n, constants.get(n)))
        bounds[node] = step.interval(*args, **node.kwargs)  # type: ignore[misc]
        rows = []
        for i in range(3):
            given = fx.node.map_arg(node.args, lambda n, i=i: values[n][i : i + 1] if n in values else constants[n])
            rows.append(step.apply(*given, **node.kwargs))
        values[node] = torch.cat(rows) if step.alone else torch.stack(rows)
        assert bool((values[node] >= bounds[node].lower).all())
        assert bool((values[node] <= bounds[node].upper).all())
        norms = torch.linalg.vector_norm(values[node].reshape(3, -1), dim=1)
        assert bool((norms <= bounds[node].norm * (1.0 + 1e-12)).all())

"""Functions that are traced as others, pools by powers, and sampling at fixed places."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from applied import Applied
from torch import Tensor, nn

import fastlip
from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._registry import _FUNCTION_RULES

# Drawn before a test's seed is set.
DRAWN = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHT, OTHER = DRAWN(6, 5) / 2, DRAWN(5, 3)
STACK, OFFSET = DRAWN(4, 6, 5) / 2, DRAWN(5)
WEIGHTS = {shape: DRAWN(shape) for shape in ((4, 6), (6, 5))}


def stacked(x: Tensor) -> Tensor:
    return WEIGHT.type_as(x).expand(len(x), 6, 5)


LINEAR: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "addmm": (lambda x: torch.addmm(OFFSET.to(x), x, WEIGHT.to(x)), (6,)),
    "addmm with factors": (lambda x: torch.addmm(OFFSET.to(x), x, WEIGHT.to(x), beta=0.5, alpha=-3.0), (6,)),
    "addmm without the offset": (lambda x: torch.addmm(OFFSET.to(x) * math.nan, x, WEIGHT.to(x), beta=0), (6,)),
    "addmm by names": (lambda x: torch.addmm(input=OFFSET.to(x), mat1=x, mat2=WEIGHT.to(x)), (6,)),
    "a method": (lambda x: OFFSET.to(x).expand(len(x), 5).addmm(x, WEIGHT.to(x)), (6,)),
    "baddbmm": (lambda x: torch.baddbmm(OFFSET.to(x).expand(len(x), 4, 5), x, stacked(x)), (4, 6)),
    "tensordot": (lambda x: torch.tensordot(x, WEIGHT.to(x), dims=1), (3, 6)),
    "tensordot of other axes": (lambda x: torch.tensordot(x, STACK.to(x), dims=([1, 2], [1, 0])), (6, 4)),
    "tensordot of one axis": (lambda x: torch.tensordot(x, STACK.to(x), dims=([-2], [1])), (6, 2)),
    "lerp": (lambda x: torch.lerp(x, x.flip(1), 0.3), (7,)),
    "lerp to a constant": (lambda x: x.lerp(OFFSET.to(x), torch.full((5,), 0.25).to(x)), (5,)),
    "lerp by elements": (lambda x: torch.lerp(torch.zeros_like(x), x, OFFSET.to(x)), (5,)),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, WEIGHT.to(x), OTHER.to(x)]), (6,)),
}


def norm_of_jacobian(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(model, x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


@pytest.mark.parametrize("name", LINEAR)
def test_bounds_of_linear_functions(name: str) -> None:
    function, shape = LINEAR[name]
    model = Applied(function).double()
    norm = norm_of_jacobian(model, torch.rand(1, *shape, dtype=torch.float64))
    bound = lipschitz_bound(model, shape, check=True).upper
    # A matrix for each position, one after the other, or sums of the input and itself, are bounded with some loss.
    assert norm <= bound * (1 + 1e-6)  # constants are rounded to float32
    assert bound <= 2.5 * norm


class ByProducts(nn.Module):
    """Layers as products with parameters, in the ways that they are written."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(6, 12), (5, 12), (10, 5), (4, 4)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s) / s[1] ** 0.5) for s in shapes)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, mixing = self.weights
        y = torch.relu(x @ first + self.bias)
        y = mixing @ y  # positions
        y = torch.relu(torch.matmul(y, second.t()))
        return torch.matmul(y, other=third.T)


class ByEinsum(ByProducts):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third, mixing = self.weights
        y = torch.relu(torch.einsum("bti,io->bto", x, first) + self.bias)
        y = torch.einsum("st,bto->bso", mixing, y)
        y = torch.relu(torch.einsum("...o, po -> ...p", y, second))
        return torch.einsum("bsp,qp->bsq", [y, third])


class ByLayers(nn.Module):
    """The same network."""

    def __init__(self, given: ByProducts) -> None:
        super().__init__()
        first, second, third, mixing = given.weights
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]) for w in (first.T, mixing, second, third))
        for layer, weight in zip(self.layers, (first.T, mixing, second, third), strict=True):
            layer.weight.data.copy_(weight.data)
            layer.bias.data.zero_()
        self.layers[0].bias.data.copy_(given.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        first, mixing, second, third = self.layers
        y = mixing(torch.relu(first(x)).mT).mT
        return third(torch.relu(second(y)))


@pytest.mark.parametrize("kind", [ByProducts, ByEinsum])
def test_layers_that_are_written_as_products_are_layers(kind: type[ByProducts]) -> None:
    products = kind().eval()
    layers, x = ByLayers(products).eval(), torch.rand(2, 4, 6)
    torch.testing.assert_close(products(x), layers(x))
    bounds = [lipschitz_bound(model, (4, 6)).upper for model in (products, layers)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    local = [fastlip.lipschitz.local_lipschitz_bounds(model, x, radius=0.1).upper for model in (products, layers)]
    torch.testing.assert_close(local[0], local[1], rtol=1e-5, atol=0)
    assert (local[0] >= fastlip.lipschitz.local_lipschitz(products, x) * (1 - 1e-6)).all()


def test_the_margin_of_a_product_with_an_offset() -> None:
    layer = nn.Linear(6, 4).eval()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    expected = lipschitz_bound(layer, (6,)).log10_margin
    assert lipschitz_bound(Applied(lambda x: x @ weight.T + bias), (6,)).log10_margin == pytest.approx(expected)
    # A factor changes it.
    doubled = lipschitz_bound(Applied(lambda x: 2.0 * (x @ weight.T + bias)), (6,)).log10_margin
    assert doubled >= expected + math.log10(2.0) - 1e-9


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :0] @ torch.zeros(0, 4).to(x) + x,
        lambda x: torch.cat([torch.relu(x @ torch.zeros(4, 0).to(x)) @ torch.zeros(0, 4).to(x), x], 1),
    ],
)
def test_products_over_nothing(function: Callable[[Tensor], Tensor]) -> None:
    assert lipschitz_bound(Applied(function), (4,)).upper == pytest.approx(1.0)
    nothing = Applied(lambda x: torch.cat([torch.zeros(0, 4).to(x) @ x, x], 1))
    local = fastlip.lipschitz.local_lipschitz_bounds(nothing, torch.randn(2, 4, 3), radius=0.1).upper
    torch.testing.assert_close(local, torch.ones(2, dtype=torch.float64))


def test_sparse_matrices() -> None:
    matrix = torch.randn(4, 4) * (torch.rand(4, 4) < 0.5)
    sparse, norm = matrix.to_sparse(), torch.linalg.matrix_norm(matrix.double(), 2).item()
    functions = [lambda x: x @ sparse, lambda x: (sparse @ x.T).T, lambda x: (sparse.to(x) @ x.T).T]
    for function in functions:
        assert lipschitz_bound(Applied(function), (4,)).upper == pytest.approx(norm, rel=1e-5)


def test_an_operator_of_ones_own_that_is_called_as_a_conversion() -> None:
    library = torch.library.Library("fastlip_test_conversions", "DEF")
    library.define("type_as(Tensor c, Tensor x) -> Tensor")
    library.impl("type_as", lambda c, x: c * x, "CompositeImplicitAutograd")
    model = Applied(lambda x: torch.ops.fastlip_test_conversions.type_as(5.0 * torch.ones(4), x) + x)
    with pytest.raises(ValueError, match="no Lipschitz rule for type_as"):
        lipschitz_bound(model, (4,), check=False)


@pytest.mark.parametrize("equation", ["bti,io->bot", "bti,ti->bt", "bti,io->bo", "bti,io->btio", "bti,io->bt"])
def test_other_contractions_have_bounds_as_well(equation: str) -> None:
    """They are no layers: their axes are in another order, or summed, or kept."""
    shape = (4, 6) if ",ti" in equation else (6, 5)
    model = Applied(lambda x: torch.einsum(equation, x, WEIGHTS[shape].to(x)))
    bound = lipschitz_bound(model, (4, 6)).upper
    norm = norm_of_jacobian(model, torch.rand(1, 4, 6, dtype=torch.float64))
    assert norm <= bound * (1 + 1e-6)
    assert bound <= 3.0 * norm


def test_a_product_of_two_that_depend_on_the_input_needs_a_domain() -> None:
    model = Applied(lambda x: torch.baddbmm(x, x, x.mT)).double()
    with pytest.raises(ValueError, match="bounds="):
        lipschitz_bound(model, (3, 3))
    bound = lipschitz_bound(model, (3, 3), bounds=(-1.0, 1.0)).upper
    stretches = [norm_of_jacobian(model, 2 * torch.rand(1, 3, 3, dtype=torch.float64) - 1) for _ in range(50)]
    assert max(stretches) <= bound < 10 * max(stretches)


def test_a_blend_whose_weight_depends_on_the_input() -> None:
    model = Applied(lambda x: torch.lerp(x, x.flip(1), x.sigmoid())).double()
    bound = lipschitz_bound(model, (6,), bounds=(-2.0, 2.0)).upper
    stretches = [norm_of_jacobian(model, 4 * torch.rand(1, 6, dtype=torch.float64) - 2) for _ in range(200)]
    assert max(stretches) <= bound < 10 * max(stretches)


def test_hypot() -> None:
    model = Applied(lambda x: torch.hypot(x[:, :4], x[:, 4:])).double()
    bound = lipschitz_bound(model, (8,)).upper
    stretches = [norm_of_jacobian(model, torch.randn(1, 8, dtype=torch.float64)) for _ in range(50)]
    assert max(stretches) <= bound * (1 + 1e-12) <= 1.5 * max(stretches)


def test_a_users_rule_comes_first() -> None:
    @fastlip.lipschitz.rule(torch.hypot)
    def _(call: fastlip.lipschitz.FunctionCall, input_shape: tuple[int, ...]) -> float:
        return 7.0

    model = Applied(lambda x: torch.hypot(x, torch.ones_like(x)))
    try:
        assert lipschitz_bound(model, (3,)).upper == pytest.approx(7.0)
    finally:
        del _FUNCTION_RULES[torch.hypot]
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(1.0)


def test_results_in_memory_that_is_given_are_refused() -> None:
    for function in (
        lambda x: torch.addmm(OFFSET.to(x), x, WEIGHT.to(x), out=torch.empty(1, 5)),
        lambda x: torch.hypot(x, x, out=torch.empty(1, 6)),
    ):
        with pytest.raises(ValueError, match=r"trace|rule"):
            lipschitz_bound(Applied(function), (6,))


POOLS = list(itertools.product((1, 2, 3), (1, 2, 4, math.inf), (False, True)))


@pytest.mark.parametrize(("axes", "p", "ceil_mode"), POOLS)
def test_pools_by_powers(axes: int, p: float, ceil_mode: bool) -> None:
    pool = getattr(nn, f"LPPool{axes}d")
    for kernel, stride, size in ((2, None, 6), (3, 2, 8), (3, 1, 5), (2, 3, 7)):
        shape = (2, *(size,) * axes) if axes < 3 else (1, size, 4, 4)
        model = pool(p, kernel, stride, ceil_mode=ceil_mode).double()
        bound = lipschitz_bound(model, shape).upper
        function = partial(getattr(F, f"lp_pool{axes}d"), norm_type=p, kernel_size=kernel, stride=stride)
        assert lipschitz_bound(Applied(partial(function, ceil_mode=ceil_mode)), shape).upper == bound
        largest = 0.0
        for trial in range(8):
            x = torch.randn(1, *shape, dtype=torch.float64)
            if trial % 2:  # windows with one large value, whose norm has the slope 1 in it
                x = torch.where(torch.rand_like(x) < 0.15, x, 1e-3 * x)
            largest = max(largest, norm_of_jacobian(model, x))
        assert largest <= bound * (1 + 1e-9)
        assert bound <= (1 + 1e-9 if p == 1 else 2.5) * largest


@pytest.mark.parametrize("p", [3, 2.5, -2, -1, 10, 64])
def test_powers_without_a_bound(p: float) -> None:
    with pytest.raises(ValueError, match="norm_type"):
        lipschitz_bound(nn.LPPool2d(p, 2), (3, 6, 6))


class Sampled(nn.Module):
    """The input at places that a random affine map gives."""

    def __init__(self, mode: str, padding: str, corners: bool) -> None:
        super().__init__()
        self.settings = {"mode": mode, "padding_mode": padding, "align_corners": corners}
        self.register_buffer("map", torch.eye(2, 3) + 0.4 * torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.map.expand(len(x), 2, 3), [len(x), x.shape[1], 7, 5], align_corners=True)
        return F.grid_sample(x, grid.to(x), **self.settings)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("corners", [False, True])
def test_samples_at_fixed_places(mode: str, padding: str, corners: bool) -> None:
    for _ in range(4):
        model = Sampled(mode, padding, corners)
        bound = lipschitz_bound(model, (2, 6, 6)).upper
        norm = norm_of_jacobian(model.double(), torch.rand(1, 2, 6, 6, dtype=torch.float64))
        assert norm <= bound * (1 + 1e-5)
        assert bound <= 3.0 * norm
        on_box = lipschitz_bound(nn.Sequential(model, nn.Flatten(), nn.Softmax(1)), (2, 6, 6), bounds=(0, 1)).upper
        assert 0.0 < on_box <= bound


def test_samples_that_have_no_bound() -> None:
    with pytest.raises(ValueError, match="bicubic"):
        lipschitz_bound(Sampled("bicubic", "zeros", False), (2, 6, 6))
    model = Sampled("bilinear", "zeros", False)
    model.map[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        lipschitz_bound(model, (2, 6, 6))
    moved = Applied(lambda x: F.grid_sample(x, x[:, :2].movedim(1, 3), align_corners=False))
    with pytest.raises(ValueError, match="grid_sample"):
        lipschitz_bound(moved, (2, 6, 6), bounds=(0, 1))

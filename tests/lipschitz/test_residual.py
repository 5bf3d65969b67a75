"""The tighter constants of residual blocks against explicit matrices and the largest stretch found."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz import _residual, lipschitz_bound, rule
from fastlip.norms import Composed, NormOptions, Operator, conv_operator, operator_norms
from fastlip.norms._solvers import symbols


def matrix(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Matrix of an affine module, [out, in] float64."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    return torch.autograd.functional.jacobian(module.double().eval(), x).reshape(-1, math.prod(shape)).detach()


def norm(m: Tensor) -> float:
    return torch.linalg.matrix_norm(m, 2).item()


class Bottleneck(nn.Module):
    def __init__(self, channels: int, mid: int, out: int, stride: int = 1, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, mid, 1), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, 1), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, out, 1), nn.BatchNorm2d(out)
        self.act = activation or nn.ReLU(inplace=True)
        self.down = nn.Identity()
        if stride > 1 or channels != out:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.down(x)


class Basic(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        out += x
        return out


def observed(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest Jacobian norm over random points, in float64."""
    model = model.double().eval()
    points = 3.0 * torch.randn(24, *shape, dtype=torch.float64)
    return max(norm(torch.autograd.functional.jacobian(model, x[None]).reshape(-1, math.prod(shape))) for x in points)


@pytest.mark.parametrize("channels", [4, 2, 12])
def test_identity_bottleneck_is_the_formula_and_holds(channels: int) -> None:
    torch.manual_seed(0)
    block = Bottleneck(channels, 3, channels)
    shape = (channels, 5, 5)
    one = matrix(nn.Sequential(block.conv1, block.bn1), shape)
    two = matrix(nn.Sequential(block.conv2, block.bn2), (3, 5, 5))
    three = matrix(nn.Sequential(block.conv3, block.bn3), (3, 5, 5))
    linear = norm(torch.eye(25 * channels, dtype=torch.float64) + 0.25 * three @ two @ one)
    rest = norm(three @ two) * norm(one) + norm(three) * norm(two @ one) + norm(three) * norm(two) * norm(one)
    expected = linear + 0.25 * rest
    bound = lipschitz_bound(block, shape, rtol=1e-4, tight_chains=False)
    assert expected * (1 - 1e-9) <= bound.upper <= expected * (1 + 1e-3)
    assert bound.upper < 10**bound.log10_plain
    assert 10**bound.log10_plain == pytest.approx(1 + norm(one) * norm(two) * norm(three), rel=1e-3)
    assert observed(block, shape) <= bound.upper


def test_channels_that_only_the_skip_connection_uses_count() -> None:
    # The branch undoes the skip connection on one channel of eight where it is linear, and leaves the others alone.
    block = Bottleneck(8, 1, 8)
    block.bn1 = block.bn2 = block.bn3 = nn.Identity()
    with torch.no_grad():
        for conv, weight in ((block.conv1, 2.0), (block.conv2, 2.0), (block.conv3, -1.0)):
            conv.weight.zero_()
            conv.weight[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = weight
    bound = lipschitz_bound(block, (8, 4, 4), tight_chains=False)
    assert bound.upper == pytest.approx(1.0 + 0.25 * 3 * 4.0, rel=1e-3)


def test_identity_basic_block_is_the_formula_and_holds() -> None:
    torch.manual_seed(1)
    block = Basic(3)
    shape = (3, 6, 6)
    one, two = matrix(block.conv1, shape), matrix(block.conv2, shape)
    expected = norm(torch.eye(108, dtype=torch.float64) + 0.5 * two @ one) + 0.5 * norm(two) * norm(one)
    bound = lipschitz_bound(block, shape, rtol=1e-4, tight_chains=False)
    assert expected * (1 - 1e-9) <= bound.upper <= expected * (1 + 1e-3)
    assert observed(block, shape) <= bound.upper


@pytest.mark.parametrize("stride", [1, 2])
def test_projection_block_lies_between_the_stretch_and_skip_plus_branch(stride: int) -> None:
    torch.manual_seed(2)
    block = Bottleneck(4, 3, 8, stride)
    shape = (4, 6, 6)
    bound = lipschitz_bound(block, shape, rtol=1e-4, tight_chains=False)
    assert observed(block, shape) <= bound.upper < 10**bound.log10_plain * 0.999


def test_negative_identity_is_where_the_formula_bites() -> None:
    # The branch undoes the skip where it is linear: plain composition says 3, the Jacobian is between -1 and 1.
    block = Basic(1)
    with torch.no_grad():
        for conv, centre in ((block.conv1, 2.0), (block.conv2, -1.0)):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = centre
    bound = lipschitz_bound(block, (1, 4, 4), tight_chains=False)
    assert 10**bound.log10_plain == pytest.approx(3.0)
    assert 1.0 <= bound.upper <= 1.02


class Subtracted(nn.Module):
    """The input minus a branch."""

    def __init__(self, *branch: nn.Module, swapped: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) - x if self.swapped else x - self.branch(x)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("depth", [2, 3])
def test_a_branch_that_is_subtracted_counts_with_its_sign(depth: int, swapped: bool) -> None:
    # Where all units are active the Jacobian is 1 + 4 = 5; added instead of subtracted it would be -3.
    linear = [nn.Linear(3, 3, bias=False) for _ in range(depth)]
    with torch.no_grad():
        for layer, scale in zip(linear, (2.0, -2.0, 1.0), strict=False):
            layer.weight.copy_(scale * torch.eye(3))
    branch = [module for layer in linear for module in (layer, nn.Hardtanh(-9.0, 9.0))][:-1]
    block = Subtracted(*branch, swapped=swapped)
    bound = lipschitz_bound(block, (3,), tight_chains=False)
    assert 5.0 <= bound.upper <= 5.0 * 1.001
    assert bound.parts[-1].kind == "difference"
    # With the other sign the block is between the identity and -3.
    with torch.no_grad():
        linear[0].weight.neg_()
    assert 3.0 <= lipschitz_bound(block, (3,), tight_chains=False).upper <= (4.01 if depth == 3 else 3.01)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.LeakyReLU(-0.5), nn.ELU(2.0)], ids=repr)
def test_other_slopes_fall_back_to_skip_plus_branch(activation: nn.Module) -> None:
    torch.manual_seed(3)
    bound = lipschitz_bound(Bottleneck(4, 3, 4, activation=activation), (4, 5, 5), tight_chains=False)
    assert bound.log10_upper == bound.log10_plain


def test_a_subclass_with_a_rule_of_its_own_has_unknown_slopes() -> None:
    class Mirrored(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return -F.relu(x)

    rule(Mirrored)(lambda module, input_shape: 1.0)
    block = Bottleneck(4, 3, 4, activation=Mirrored())
    bound = lipschitz_bound(block, (4, 5, 5), tight_chains=False)
    assert bound.log10_upper == bound.log10_plain


def test_it_can_be_switched_off_and_deterministic_methods_do_without() -> None:
    torch.manual_seed(4)
    block = Basic(2)
    for bound in (
        lipschitz_bound(block, (2, 5, 5), tight_residuals=False, tight_chains=False),
        lipschitz_bound(block, (2, 5, 5), method="svd", tight_chains=False),
    ):
        assert bound.log10_upper == bound.log10_plain
        assert bound.confidence == 1.0
    assert lipschitz_bound(block, (2, 5, 5), confidence=0.999, tight_chains=False).confidence == 0.999


def test_composed_operators_are_those_of_the_sequence() -> None:
    torch.manual_seed(5)
    first, second = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Conv2d(3, 2, 3, padding=1, bias=False)
    a = conv_operator(first.weight, 7, padding=1)
    b = conv_operator(second.weight, 7, padding=1)
    one, two = matrix(first, (2, 7, 7)), matrix(second, (3, 7, 7))
    norms = (1.01 * norm(one), 1.01 * norm(two))
    for identity, scale in ((0.0, 1.0), (1.0, -0.5)):
        truth = norm(identity * torch.eye(98, dtype=torch.float64) + scale * two @ one)
        for method in ("auto", "power"):
            settings = NormOptions(method=method, rtol=1e-3)
            interval = operator_norms([Composed((a, b), norms, scale, identity)], settings)[0]
            assert interval.lower <= truth * (1 + 1e-11)
            assert truth * (1 - 1e-11) <= interval.upper <= truth * (1 + 2e-3)
    with pytest.raises(ValueError, match="single convolutions only"):
        operator_norms([Composed((a, b), norms)], NormOptions(method="ring"))


class Moved(nn.Module):
    """A residual block whose branch or skip moves values, by a function of its own."""

    def __init__(self, move: Callable[[Tensor], Tensor], where: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, groups=2)
        self.move, self.where = move, where
        with torch.no_grad():
            for conv, sign in ((self.a, -1.0), (self.b, 1.0)):
                conv.weight.zero_()
                conv.bias.fill_(50.0)  # keeps the activation at slope 1
                for channel in range(4):
                    conv.weight[channel, channel % 2] = sign

    def forward(self, x: Tensor) -> Tensor:
        turn = {
            name: self.move if name == self.where else (lambda y: y) for name in ("skip", "before", "between", "after")
        }
        branch = turn["after"](self.b(turn["between"](F.relu(self.a(turn["before"](x))))))
        return turn["skip"](x) + branch


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


MOVES = {
    "channel shuffle": shuffle,
    "transposition": lambda x: x.transpose(2, 3),
    "permutation": lambda x: x.permute(0, 1, 3, 2),
    "reinterpretation": lambda x: x.flatten(1).view(-1, 3, 3, 4).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("where", ["skip", "before", "between", "after"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_values_moved_inside_a_block_are_not_passed_over(move: Callable[[Tensor], Tensor], where: str) -> None:
    block = Moved(move, where)
    x = torch.zeros(1, 36, dtype=torch.float64).reshape(1, 4, 3, 3)
    jacobian = torch.autograd.functional.jacobian(block.double(), x).reshape(36, 36)
    assert norm(jacobian) > 1.99  # skip and branch add up somewhere, where without the move they cancel
    assert lipschitz_bound(block.float(), (4, 3, 3), tight_chains=False).upper >= norm(jacobian) * (1 - 1e-9)


def test_copies_and_reshapings_to_the_same_shape_keep_the_tighter_constant() -> None:
    class Copied(Basic):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x).contiguous().view(-1, 3, 6, 6)
            return self.conv2(F.relu(y.clone())).reshape(y.shape) + x

    torch.manual_seed(3)
    block = Copied(3)
    bound = lipschitz_bound(block, (3, 6, 6), tight_chains=False)
    assert bound.upper < 0.99 * 10**bound.log10_plain


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_identity_beside_three_layers_as_one_convolution(monkeypatch: pytest.MonkeyPatch, sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, size = ((2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)), 20
    weights = [torch.randn(*shape, generator=generator) for shape in shapes]
    ops = tuple(conv_operator(w, size, padding=w.shape[-1] // 2) for w in weights)
    bounds = tuple(interval.upper for interval in operator_norms(ops))
    options = NormOptions(rtol=4e-2)
    apart = _residual._beside_identity(ops, bounds, 0.25 * sign, options)
    monkeypatch.setattr(symbols, "_pays", lambda *_: True)
    joint = _residual._beside_identity(ops, bounds, 0.25 * sign, options)
    assert isinstance(apart.operator, Composed)
    assert isinstance(joint.operator, Operator)
    uppers = [auxiliary.upper(operator_norms([auxiliary.operator], options)[0]) for auxiliary in (apart, joint)]

    def layers(x: Tensor) -> Tensor:
        for op in ops:
            x = F.conv2d(x, op.weight.double(), padding=op.padding[0][0])
        return x

    def images(x: Tensor) -> Tensor:
        return x + 0.25 * sign * layers(x)

    v = torch.randn(1, 8, size, size, generator=generator, dtype=torch.float64)
    for _ in range(100):
        v, stretch = torch.func.vjp(images, v)[1](images(v / v.norm()))[0], images(v / v.norm()).norm().item()
    assert all(stretch <= upper <= 1.06 * stretch for upper in uppers)

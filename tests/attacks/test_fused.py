"""Fused convolutions against convolutions, in float64, and the patterns in which they are found."""

import copy

import pytest
import torch
from torch import fx, nn

from fastlip import attacks
from fastlip.attacks._chain import Chain, Plan
from fastlip.attacks._fused import FusedConv, dense_matrix
from fastlip.attacks._rewrite import FullFirst, fold, fuse, lower
from fastlip.norms._models.tracing import InPlaceTracer

GEOMETRIES = [
    # channels, size, kernel, stride, padding, dilation, groups
    ((5, 7), (8, 6), 1, 1, 0, 1, 1),
    ((5, 7), (7, 9), 1, 2, 0, 1, 1),
    ((5, 7), (4, 4), 1, 1, 1, 1, 1),
    ((4, 6), (5, 5), 1, 1, 0, 1, 2),
    ((5, 7), (1, 1), 3, 1, 1, 1, 1),
    ((5, 7), (2, 2), 3, 1, 1, 1, 1),
    ((5, 7), (2, 3), 3, 2, 1, 1, 1),
    ((5, 7), (2, 1), (3, 1), 1, (1, 0), 1, 1),
    ((5, 7), (4, 2), 5, (2, 1), (3, 4), 2, 1),
    ((6, 6), (2, 2), 3, 1, 1, 1, 6),
    ((3, 8), (12, 10), 7, 2, 3, 1, 1),
    ((5, 7), (9, 9), 3, 2, 1, 1, 1),
]


def conv_of(geometry, bias, dtype=torch.float64):
    channels, _, kernel, stride, padding, dilation, groups = geometry
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias, dtype=dtype).requires_grad_(False)


def alone(layer, x, other=None):
    """What a layer gives as the only one of a chain."""
    given = (x,) if other is None else (x, other)
    return Chain([layer], Plan(len(given), (0,), (None if other is None else 1,), (len(given),)))(*given)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_convolution(geometry, channels_last, batch):
    generator = torch.Generator().manual_seed(1)
    conv = conv_of(geometry, bias=geometry[2] != 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, geometry[0][0], *geometry[1], generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=layout).requires_grad_()
    other = torch.randn(conv(x).shape, generator=generator, dtype=torch.float64, requires_grad=True)
    for args, relu in (((x,), False), ((x,), True), ((x, other), False), ((x, other), True)):
        want = conv(x) if len(args) == 1 else conv(x) + other
        want = want.relu() if relu else want
        got = alone(FusedConv(conv, relu), *args)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        expected = torch.autograd.grad((want * weight).sum(), args)
        found = torch.autograd.grad((got * weight).sum(), args)
        for grad, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-12)
    assert (other == other.detach()).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2)])
def test_the_dense_matrix_is_the_convolution(size):
    conv = conv_of(((2, 3), size, 3, 1, 1, 1, 1), bias=False)
    basis = torch.eye(2 * size[0] * size[1], dtype=torch.float64).view(-1, *size, 2).permute(0, 3, 1, 2)
    columns = conv(basis).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(dense_matrix(conv, size, size), columns.T)


def test_a_map_of_another_size_and_a_sum_that_broadcasts():
    layer = FusedConv(conv_of(GEOMETRIES[4], bias=True), relu=True)
    for side in (1, 2, 6, 1):
        x = torch.randn(2, 5, side, side, dtype=torch.float64)
        for other in (torch.randn(2, 7, 1, 1, dtype=torch.float64), torch.randn(7, side, side, dtype=torch.float64)):
            torch.testing.assert_close(alone(layer, x, other), (layer.conv(x) + other).relu(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_first_layer_of_low_precision_output(precision):
    conv = conv_of(GEOMETRIES[-2], bias=True, dtype=torch.float32)
    x = torch.rand(2, 3, 12, 10, requires_grad=True)
    got = alone(FusedConv(conv, True, precision), x)
    want = conv(x).relu()
    assert got.dtype == precision
    assert torch.equal(got, want.to(precision))
    (grad,) = torch.autograd.grad(got.float().square().sum(), x)
    (wanted,) = torch.autograd.grad(want.square().sum(), x)
    assert grad.dtype == torch.float32
    assert (grad - wanted).norm() < 0.02 * wanted.norm()


class Patterns(nn.Module):
    """Sums and ReLUs in all spellings, with some that must not be fused."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(4, 4, 3, padding="same")

    def forward(self, x):
        c = self.convs
        a = self.act(c[0](x))
        b = torch.relu(a + self.norm(c[1](a)))
        d = c[2](b)
        d += b
        e = nn.functional.relu(d, inplace=True)
        f = torch.add(c[3](e), c[4](e)).relu_()
        g = c[5](f) + 1.0
        h = c[6](g)
        i = h + h.relu()  # read twice
        j = c[7](h)
        i += j  # changes i, not what the convolution gave
        k = torch.add(c[8](i), h, alpha=2)
        return self.same(self.circular(k)) + h


def test_every_spelling_is_fused_and_nothing_else():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Patterns().double()
        model(torch.randn(8, 4, 5, 5, dtype=torch.float64))
    model.eval().requires_grad_(False)
    copied = copy.deepcopy(model)
    made = fx.GraphModule(copied, InPlaceTracer().trace(copied))
    fold(made)
    fuse(made)
    made.delete_all_unused_submodules()
    made.recompile()
    for side in (1, 2, 5):
        x = torch.randn(3, 4, side, side, dtype=torch.float64, requires_grad=True)
        want, got = model(x), made(x)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), x),
            torch.autograd.grad(want.square().sum(), x),
            atol=1e-9,
            rtol=1e-9,
        )
    called = [str(n.target) for n in made.graph.nodes if n.op != "placeholder"]
    assert sum(isinstance(m, FusedConv) for m in made.modules()) == 9
    assert sum("relu" in name or name == "act" for name in called) == 1
    assert isinstance(made.circular, nn.Conv2d)
    assert isinstance(made.same, nn.Conv2d)


class Overwritten(nn.Module):
    """Tensors that change in place while something else refers to them."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        c = self.convs
        a = c[0](x)
        same = a
        a *= 2.0  # changes both
        b = c[1](same) + a
        d = c[2](x)
        e = c[3](b) + d  # before d changes
        d += 1.0
        e = e.relu()
        f = c[4](x)
        g = f + c[5](e)
        self.act(f)
        return g.relu() + f * d


def test_what_changes_in_place_is_read_as_it_was():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Overwritten().eval().requires_grad_(False)
    copied = copy.deepcopy(model).double()
    made = fx.GraphModule(copied, InPlaceTracer().trace(copied))
    fuse(made)
    made.recompile()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(x), copy.deepcopy(model).double()(x), atol=1e-12, rtol=1e-12)
    images = x.float()
    network = attacks.prepare(nn.Sequential(model, nn.Flatten()).eval(), images)
    assert network.faster is not None
    found = []
    for call in (network.faster, network.model):
        own = images.clone().requires_grad_()
        found.append(torch.autograd.grad(call(own).square().sum(), own)[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_only_the_first_layer_stays_wide():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    made = fx.symbolic_trace(model.requires_grad_(False))
    lower(made, torch.bfloat16)
    assert isinstance(made.get_submodule("0"), FullFirst)
    fuse(made)
    first = made.get_submodule("0")
    assert first.conv.weight.dtype == torch.float32
    assert first.back.dtype == torch.bfloat16
    assert made.get_submodule("2").conv.weight.dtype == made.get_submodule("4").weight.dtype == torch.bfloat16

"""Packed convolutions against autograd's, on shapes of every kind, and the patterns of chains."""

import copy
import itertools
import weakref

import pytest
import torch
from torch import fx, nn

from fastlip import attacks, ops
from fastlip.attacks import _chain, _rewrite
from fastlip.attacks._chain import Chain, Plan, run
from fastlip.attacks._fused import FusedConv
from fastlip.attacks._interleaved import SmallNetwork
from fastlip.attacks._packed import PackedConv, can_be_packed
from fastlip.attacks._rewrite import fold, fuse

pytestmark = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="only the compiled library packs")

NOW = ops.IndirectConvs()

GEOMETRIES = [
    # channels, size, kernel, stride, padding, dilation
    ((16, 7), (8, 6), 1, 1, 0, 1),
    ((17, 33), (7, 9), 1, 2, 0, 1),
    ((20, 16), (4, 4), 1, 1, 1, 1),
    ((16, 7), (1, 1), 3, 1, 1, 1),
    ((40, 48), (2, 2), 3, 1, 1, 1),
    ((19, 5), (4, 4), 3, 1, 1, 1),
    ((16, 65), (2, 3), 3, 2, 1, 1),
    ((18, 7), (2, 1), (3, 1), 1, (1, 0), 1),
    ((16, 7), (6, 4), 5, (2, 1), (3, 4), 2),
    ((24, 3), (9, 9), 3, 2, 1, 1),
    ((16, 16), (9, 8), 3, 3, 0, 2),
    ((16, 4), (7, 7), (2, 4), (3, 2), (0, 1), (2, 1)),
    # few input channels
    ((3, 8), (12, 10), 7, 2, 3, 1),
    ((3, 20), (11, 9), 3, 1, 1, 1),
    ((3, 32), (12, 10), 7, 2, 3, 1),
    ((1, 35), (8, 8), 3, 1, 0, 1),
    ((3, 33), (9, 7), 5, (2, 1), (3, 4), 2),
    ((2, 40), (9, 9), 3, 2, (0, 1), (1, 3)),
    ((4, 36), (6, 6), 1, 2, 0, 1),
    ((1, 33), (10, 10), (2, 3), 4, 1, 1),
    ((5, 37), (5, 5), 3, 1, 1, 1),
    # few outputs as well
    ((3, 8), (16, 15), 3, 2, 1, 1),
    ((1, 16), (14, 14), 4, 2, 1, 1),
    ((8, 16), (7, 9), (3, 2), (2, 1), (1, 0), 1),
    ((15, 2), (6, 8), 3, 1, 2, 1),
    ((6, 5), (1, 1), 3, 1, 1, 1),
    ((4, 9), (8, 8), 3, 1, 2, 2),
    # large maps
    ((18, 17), (16, 17), 3, 1, 1, 1),
    ((16, 20), (33, 34), 3, 2, 1, 1),
    ((17, 40), (16, 16), 1, 1, 0, 1),
]


def conv_of(geometry, bias):
    channels, _, kernel, stride, padding, dilation = geometry
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_convolution(geometry, channels_last, batch):
    generator = torch.Generator().manual_seed(1)
    conv = conv_of(geometry, bias=batch != 1)
    packed = PackedConv(conv, relu=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, geometry[0][0], *geometry[1], generator=generator).contiguous(memory_format=layout)
    double = copy.deepcopy(conv).double()
    y = double(x.double())
    other = torch.randn(y.shape, generator=generator)
    assert packed.out_shape(x) == y.shape
    for summand, relu in itertools.product((None, other), (False, True)):
        want = y if summand is None else y + summand
        got, active = packed.product(x, summand, relu, NOW, record=True)
        torch.testing.assert_close(got, (want.relu() if relu else want).float(), atol=2e-5, rtol=1e-5)
        assert torch.equal(active > 0, got > 0) if relu else active is None
        again, unwanted = packed.product(x, summand, relu, NOW)
        assert torch.equal(again, got)
        assert unwanted is None
    grad = torch.randn(y.shape, generator=generator)
    wide = x.double().requires_grad_()
    (back,) = torch.autograd.grad(double(wide), wide, grad.double())
    more, relu = (torch.randn(x.shape, generator=generator) for _ in range(2))
    like, before = torch.empty_like(x, device="meta"), more.clone()
    for summand, active in itertools.product((None, more), (None, relu.relu(), relu > 0)):
        want = back if summand is None else back + summand
        want = want if active is None else torch.where(active > 0, want, 0.0)
        got = packed.gradient(grad, like, summand, active, NOW)
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-5)
        assert torch.equal(more, before)
        spare = None if summand is None else summand.clone()
        assert torch.equal(packed.gradient(grad, like, spare, active, NOW, in_place=True), got)


def test_default_devices_and_dtypes_do_not_matter():
    conv, x = conv_of(GEOMETRIES[4], bias=True), torch.randn(2, 40, 2, 2)
    want, _ = PackedConv(conv, relu=False).product(x, None, False, NOW)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        (got,) = run([PackedConv(conv, relu=False)], Plan(1, (0,), (None,), (1,)), x.requires_grad_())
        (grad,) = torch.autograd.grad(got, x, torch.ones_like(got))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(got, want)
    assert grad.device.type == "cpu"


def test_what_is_packed():
    conv = conv_of(GEOMETRIES[0], bias=True)
    assert can_be_packed(conv)
    assert not can_be_packed(nn.Conv2d(16, 16, 3, groups=2))
    assert not can_be_packed(nn.Conv2d(16, 16, 3).double())
    assert not can_be_packed(nn.Conv2d(16, 16, 3).bfloat16())
    assert not can_be_packed(nn.Conv2d(16, 16, 3, device="meta"))


def test_weights_are_kept_once_for_both_passes_unless_they_are_few():
    for kernel, stride, size, factor in ((3, 1, 8, 1), (3, 1, 20, 1), (3, 2, 8, 1), (3, 2, 40, 1), (1, 1, 8, 2)):
        conv = nn.Conv2d(64, 128, kernel, stride)
        packed = PackedConv(copy.deepcopy(conv), False)
        packed.product(torch.zeros(1, 64, size, size), None, False, NOW)
        held = {t.data_ptr(): t.numel() for t in packed.state_dict().values()}
        assert sum(held.values()) == factor * conv.weight.numel() + conv.bias.numel()


class Residual(nn.Module):
    """Blocks of several kinds: plain, with a shortcut of its own, read outside, broadcasting, in dead ends."""

    def __init__(self, channels, more):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(9))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.short, self.strided = nn.Conv2d(channels, more, 1, 2), nn.Conv2d(channels, more, 3, 2, 1)
        self.squeezed, self.wide = nn.Conv2d(more, more, 1), nn.Conv2d(more, more, 3, padding=1, groups=4)
        self.last = nn.Conv2d(more, 5, 1)

    def forward(self, x):
        c = self.convs
        a = self.first(x).relu()
        b = (c[1](c[0](a).relu()) + a).relu()  # a block
        b = (b + c[2](b)).relu()  # of one layer
        d = c[3](b)  # no ReLU, read twice
        e = (c[4](d) + d).relu()
        f = c[5](e) + b  # read outside of the chain as well
        self.dead = c[6](f)
        g = (self.strided(f) + self.short(f)).relu()
        h = (self.squeezed(g.mean((2, 3), keepdim=True)) + g).relu()  # the convolution broadcasts
        i = (self.wide(h) + h.mean((2, 3), keepdim=True)).relu()  # the summand broadcasts
        return self.last(i).relu().mean((2, 3)) + f.sigmoid().mean((1, 2, 3))[:, None] + c[7](c[8](e)).mean()


@pytest.fixture(params=[(16, 24), (6, 12), (12, 20)], ids=str)
def residual(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual(*request.param).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (1, 1)])
@pytest.mark.parametrize("batch", [1, 6])
def test_blocks_of_all_kinds(residual, size, batch):
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2), requires_grad=True)
    want = residual(x)
    wanted = torch.autograd.grad(want.square().sum(), x)[0]
    made = fx.symbolic_trace(residual)
    fold(made)
    fuse(made)
    made.delete_all_unused_submodules()
    made.recompile()
    got = made(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(made(x), got)
    chained = [m for m in made.modules() if isinstance(m, Chain)]
    assert max(len(m.layers) for m in chained) >= 7
    assert sum(isinstance(m, PackedConv) for m in made.modules()) >= 12
    if residual.first.out_channels == 16:
        small = [m for part in made.modules() if isinstance(part, SmallNetwork) for m in part.modules()]
        plain = [m for m in made.modules() if isinstance(m, FusedConv) and m not in small]
        assert len(plain) == 1 + 1, "the grouped one and the first"


def test_random_chains():
    """Values and gradients of random plans are autograd's, and nothing that others hold is overwritten."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for _ in range(40):
        channels, side, inputs, count = (8, 16, 24)[number(0, 2)], number(1, 6), number(1, 2), number(1, 12)
        layers = [
            conv_of(((channels,) * 2, None, *((3, 1, 1), (1, 1, 0))[number(0, 1)], 1), True) for _ in range(count)
        ]
        sources, others = [], []
        for i in range(count):
            last = inputs + i - 1
            sources.append(number(max(0, last - 2), last))
            others.append(number(0, last) if number(0, 1) else None)
        outputs = {inputs + count - 1, *(number(inputs, inputs + count - 1) for _ in range(number(0, 2)))}
        plan = Plan(inputs, tuple(sources), tuple(others), tuple(outputs))
        chained = [PackedConv(copy.deepcopy(conv), bool(number(0, 1))) for conv in layers]
        x = [torch.randn(2, channels, side, side, generator=generator).requires_grad_() for _ in range(inputs)]
        got = run(chained, plan, *x)
        values = [t.detach().double().requires_grad_() for t in x]
        wide = list(values)
        for conv, own, source, other in zip(layers, chained, sources, others, strict=True):
            y = copy.deepcopy(conv).double()(wide[source]) + (0.0 if other is None else wide[other])
            wide.append(y.relu() if own.relu else y)
        want = [wide[v] for v in plan.outputs]
        weights = [torch.randn(t.shape, generator=generator) for t in got]
        before = [t.clone() for t in (*weights, *x, *got)]
        for _ in range(2):
            grads = torch.autograd.grad(got, x, weights, retain_graph=True, allow_unused=True)
            wanted = torch.autograd.grad(
                want, values, [w.double() for w in weights], retain_graph=True, allow_unused=True
            )
            for back, exact in zip(grads, wanted, strict=True):
                assert (back is None) == (exact is None)
                if back is not None:
                    torch.testing.assert_close(back, exact.float(), atol=1e-3, rtol=1e-3, msg=str(plan))
        assert all(torch.equal(t, kept) for t, kept in zip((*weights, *x, *got), before, strict=True))
        for y, exact in zip(got, want, strict=True):
            torch.testing.assert_close(y, exact.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("outputs", [8, 16, 20])
def test_inputs_in_either_memory_format(outputs, monkeypatch):
    """Images are converted for PyTorch's convolution alone, and their gradients are contiguous in any case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, outputs, 3, 2, 1), nn.ReLU(), nn.Conv2d(outputs, 16, 3, 1, 1), nn.ReLU())
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16 * 64, 4)).eval()
    monkeypatch.setattr(_rewrite, "can_be_interleaved", lambda chain: False)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    faster = attacks.prepare(model, x, fast=True).faster
    assert (faster.memory_format == torch.preserve_format) == (outputs <= 16)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        own = x.contiguous(memory_format=layout).requires_grad_()
        logits = faster(own)
        found.append((logits, torch.autograd.grad(logits.square().sum(), own)[0]))
    wide = x.double().requires_grad_()
    want = copy.deepcopy(model).double()(wide)
    (grad,) = torch.autograd.grad(want.square().sum(), wide)
    for logits, back in found:
        torch.testing.assert_close(logits, want.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back, grad.float(), atol=1e-5, rtol=1e-4)
    assert found[0][1].is_contiguous()


def test_inputs_without_gradients_and_outputs_without_use():
    layers = [PackedConv(conv_of(((16, 16), None, 3, 1, 1, 1), True), relu=True) for _ in range(2)]
    plan = Plan(2, (0, 2), (None, 1), (2, 3))
    x, other = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4, requires_grad=True)
    _, second = run(layers, plan, x, other)
    (grad,) = torch.autograd.grad(second.sum(), other)
    assert torch.equal(grad, (second > 0).float())
    first, _ = run(layers, plan, x.requires_grad_(), other.detach())
    (grad,) = torch.autograd.grad(first.sum(), x)
    want = layers[0].gradient((first > 0).float(), x.detach(), None, None, NOW)
    assert torch.equal(grad, want)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_do_not_depend_on_autocast(size):
    """Among them products by matrices, which autocast would round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        model = nn.Sequential(*body, nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()
        x = torch.randn(2, 3, size, size, requires_grad=True)
    made = fx.symbolic_trace(model.requires_grad_(False))
    fuse(made)
    made.recompile()
    y = made(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(y, x, weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(got, want)


def test_values_that_nothing_reads_again_are_freed():
    layer = PackedConv(conv_of(((16, 16), None, 3, 1, 1, 1), True), relu=False)
    made, alive = [], []

    class Watched:
        relu = False
        out_shape = layer.out_shape

        gradient = layer.gradient

        def product(self, x, other, relu, convs, record=False):
            alive.append(sum(y() is not None for y in made))
            y, active = layer.product(x, other, self.relu, convs, record)
            made.append(weakref.ref(y))
            return y, active

    x, plan = torch.randn(2, 16, 4, 4), Plan(1, tuple(range(40)), (None,) * 40, (40,))
    for relu, gradient in itertools.product((False, True), (False, True)):
        alive.clear()
        Watched.relu = relu
        (y,) = run([Watched()] * 40, plan, x.clone().requires_grad_(gradient))
        assert y.requires_grad == gradient
        assert max(alive) <= _chain._TOGETHER


def test_the_same_images_fall_as_with_the_model_itself():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip
        inputs = torch.rand(32, 3, 16, 16)
        for _ in range(20):
            model(inputs)
    model.eval()
    labels = model(inputs).argmax(1)
    call = {"eps": 0.045, "steps": 20, "loss": "ce"}
    fell = []
    for fast in (False, True):
        found = attacks.pgd(model, inputs, labels, fast=fast, generator=torch.Generator().manual_seed(0), **call)
        assert ((found - inputs).abs() <= 0.045 + 1e-6).all()
        fell.append(model(found).argmax(1) != labels)
    assert not attacks.prepare(model, inputs).exact
    assert 3 <= fell[0].sum() <= 29
    assert (fell[0] != fell[1]).sum() <= 1

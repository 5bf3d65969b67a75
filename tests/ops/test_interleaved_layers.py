"""Layers on interleaved images against PyTorch's in float64, on every instruction set."""

import itertools

import pytest
import torch
from instruction_sets import every_isa, run_with_isa
from torch import nn
from torch.nn import functional

from fastlip import ops
from fastlip.ops import InterleavedLayers, LayerGeometry, reference
from fastlip.ops._interleaved_layers import flat_geometry

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")

NETWORKS = {
    "three convolutions": [
        LayerGeometry(3, 8, (32, 32), (3, 3), (2, 2), (1, 1), (1, 1), True),
        LayerGeometry(8, 16, (16, 16), (3, 3), (2, 2), (1, 1), (1, 1), True),
        LayerGeometry(16, 16, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), True),
        LayerGeometry(256, 10),
    ],
    "two linear layers": [
        LayerGeometry(1, 5, (9, 14), (4, 4), (2, 2), (1, 1), (1, 1), True),
        LayerGeometry(140, 23, relu=True),
        LayerGeometry(23, 3),
    ],
    "no linear layer": [
        LayerGeometry(4, 17, (7, 5), (3, 3), padding=(1, 1), relu=True),
        LayerGeometry(17, 2, (7, 5), (3, 3), padding=(1, 1), relu=True),
    ],
    "all kinds of geometry": [
        LayerGeometry(2, 9, (15, 18), (5, 2), (1, 3), (2, 1), (3, 0)),
        LayerGeometry(9, 6, (13, 6), (1, 3), (3, 1), (1, 3), (0, 4), True),
        LayerGeometry(6, 11, (5, 8), (2, 2), (5, 7), (1, 2), (0, 1)),
    ],
    "more padding than kernel": [LayerGeometry(3, 4, (2, 3), (2, 2), (1, 2), (1, 1), (4, 5), True)],
    "strides beyond the kernel": [LayerGeometry(3, 7, (9, 10), (1, 1), (4, 3), (1, 1), (0, 1), True)],
    "reach beyond the map": [LayerGeometry(2, 3, (3, 2), (3, 3), (2, 1), (3, 2), (3, 2), True)],
    "large kernels": [LayerGeometry(1, 3, (40, 33), (16, 16), (16, 16)), LayerGeometry(3, 2, (2, 2), (2, 1))],
    "a column": [LayerGeometry(3, 5, (19, 1), (3, 1), (2, 1), relu=True), LayerGeometry(5, 4, (9, 1), (2, 1))],
    "linear": [LayerGeometry(37, 9, relu=True)],
    "max pools": [
        LayerGeometry(2, 5, (13, 12), (3, 3), padding=(1, 1)),
        LayerGeometry(5, 5, (13, 12), (2, 2), (2, 2), relu=True, kind="max_pool"),
        LayerGeometry(5, 3, (6, 6), (3, 3), padding=(1, 1), relu=True),
        LayerGeometry(3, 3, (6, 6), (3, 3), (2, 2), padding=(1, 1), kind="max_pool"),
        LayerGeometry(27, 4),
    ],
    "average pools": [
        LayerGeometry(2, 5, (13, 11), (3, 3), relu=True),
        LayerGeometry(5, 5, (11, 9), (3, 2), (2, 3), padding=(1, 1), relu=True, kind="average_pool"),
        LayerGeometry(5, 5, (6, 4), (6, 4), kind="average_pool"),
        LayerGeometry(5, 3),
    ],
    "a mean of 256": [
        LayerGeometry(2, 2, (17, 18), (16, 16), kind="average_pool"),
        LayerGeometry(2, 3, (2, 3), (2, 2)),
    ],
    "pools at both ends": [
        LayerGeometry(3, 3, (9, 10), (3, 2), (1, 2), (2, 3), (1, 1), relu=True, kind="max_pool"),
        LayerGeometry(3, 4, (7, 5), (2, 2)),
        LayerGeometry(4, 4, (6, 4), (2, 3), (2, 1), padding=(0, 1), relu=True, kind="max_pool"),
    ],
    "a map that stays": [LayerGeometry(2, 2, (1, 17), (1, 1)), LayerGeometry(2, 1, (1, 17), (1, 3), padding=(0, 1))],
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def is_linear(layer):
    return layer == LayerGeometry(layer.channels, layer.outputs, relu=layer.relu)


def weights_of(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for i, layer in enumerate(layers):
        if layer.kind != "conv":
            weights.append(None)
            biases.append(None)
            continue
        taps = () if is_linear(layer) else layer.kernel
        weights.append(torch.randn(layer.outputs, layer.channels, *taps, generator=generator))
        weights[-1] /= weights[-1][0].numel() ** 0.5
        biases.append(torch.randn(layer.outputs, generator=generator) if i % 2 == 0 else None)
    return weights, biases


def images(batch, layers, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layers[0].channels, *layers[0].size, generator=generator)


def by_pytorch(layers, weights, biases, x):
    """The layers by PyTorch, in the precision of ``x``."""
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        own = None if bias is None else bias.to(x.dtype)
        if layer.kind == "max_pool":
            x = functional.max_pool2d(x, layer.kernel, layer.stride, layer.padding, layer.dilation)
        elif layer.kind == "average_pool":
            x = functional.avg_pool2d(x, layer.kernel, layer.stride, layer.padding)
        elif is_linear(layer):
            x = functional.linear(x.flatten(1), weight.to(x.dtype), own)
        else:
            x = functional.conv2d(x, weight.to(x.dtype), own, layer.stride, layer.padding, layer.dilation)
        x = x.relu() if layer.relu else x
    return x if x.dim() == 4 else x[:, :, None, None]


def both_passes(layers, weights, biases, x, grad):
    network = InterleavedLayers(layers, weights, biases)
    out, active = network.product(x, record=True)
    assert torch.equal(network.product(x)[0], out)
    return out, network.gradient(grad, active)


def check(layers, weights, biases, batch, seed=1):
    x = images(batch, layers, seed)
    seen = x.double().requires_grad_()
    want = by_pytorch(layers, weights, biases, seen)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed + 1))
    (want_back,) = torch.autograd.grad(want, seen, grad.double())
    out, back = both_passes(layers, weights, biases, x, grad)
    assert out.dtype == back.dtype == torch.float32
    torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(back, want_back.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 16, 17, 40])
@every_network
def test_the_definition(name, batch):
    check(NETWORKS[name], *weights_of(NETWORKS[name]), batch)


def random_layers(number):
    """Layers that fit each other; ``number`` draws one of a range."""
    layers = []
    channels, size = number(1, 12), (number(1, 24), number(1, 24))
    for _ in range(number(1, 4)):
        kind = ("conv", "conv", "max_pool", "average_pool")[number(0, 3)]
        if kind != "conv":
            kernel = [number(1, min(4, n)) for n in size]
            stride, padding = [number(1, 3) for _ in size], [number(0, k // 2) for k in kernel]
            shape = map(tuple, (size, kernel, stride, (1, 1), padding))
            layers.append(LayerGeometry(channels, channels, *shape, bool(number(0, 1)), kind))
            channels, *size = layers[-1].output
            continue
        kernel, dilation, padding, stride = ([number(1, most) for _ in size] for most in (5, 3, 4, 4))
        kernel = [min(k, (n + 2 * p - 1) // d + 1) for k, n, p, d in zip(kernel, size, padding, dilation, strict=True)]
        shape = (size, kernel, stride, dilation, padding)
        layers.append(LayerGeometry(channels, number(1, 20), *map(tuple, shape), bool(number(0, 1))))
        channels, *size = layers[-1].output
    for _ in range(number(0, 2)):
        elements = channels * size[0] * size[1]
        layers.append(LayerGeometry(elements, number(1, 30), relu=bool(number(0, 1))))
        channels, *size = layers[-1].output
    return layers


def test_the_definition_of_random_networks():
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for seed in range(150):
        layers = random_layers(number)
        try:
            check(layers, *weights_of(layers, seed), number(1, 35), seed)
        except AssertionError as error:
            raise AssertionError(f"{layers}: {error}") from error


@pytest.mark.parametrize("batch", [0, 5, 21])
@every_network
def test_the_reference(name, batch):
    """On the operator itself; without flags, too."""
    layers = NETWORKS[name]
    weights, biases = weights_of(layers)
    network, x = InterleavedLayers(layers, weights, biases), images(batch, layers)
    out, active = network.product(x, record=True)
    back = network.gradient(torch.ones_like(out), active)
    rest = [network._biases, flat_geometry(layers)]
    want, kept = torch.empty_like(out), torch.zeros_like(active)
    reference.interleaved_layers_(want, x, network._forward, *rest, kept, False)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-5)
    of_images = [t.transpose(1, 2).flatten(0, 1)[:batch] for t in (active, kept)]
    assert torch.equal(*of_images)
    want = torch.empty_like(back)
    reference.interleaved_layers_(want, torch.ones_like(out), network._adjoint, *rest, kept, True)
    torch.testing.assert_close(back, want, atol=2e-5, rtol=1e-5)
    reference.interleaved_layers_(
        want := torch.empty_like(out), x, network._forward, *rest, torch.empty(0).bool(), False
    )
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-5)


@every_network
def test_it_is_the_adjoint(name):
    """<y, K x> = <K^T y, x> for layers without ReLUs."""
    layers = [
        layer._replace(relu=False, kind="average_pool" if layer.kind == "max_pool" else layer.kind)
        for layer in NETWORKS[name]
    ]
    weights, _ = weights_of(layers)
    network, x = InterleavedLayers(layers, weights, [None] * len(layers)), images(11, layers)
    out, active = network.product(x, record=True)
    y = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    back = network.gradient(y, active)
    assert torch.equal(network.gradient(y, None), back)
    products = (y.double() * out).sum(), (back.double() * x).sum()
    assert (products[0] - products[1]).abs() <= 1e-5 * y.double().norm() * out.double().norm() + 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@every_network
def test_what_is_not_finite_stays_with_its_image(name, value):
    """It reaches the elements that it should, of its own image alone."""
    layers = [layer._replace(relu=False) for layer in NETWORKS[name]]
    weights, biases = weights_of(layers)
    network, x = InterleavedLayers(layers, weights, biases), images(9, layers)
    clean = network.product(x)[0]
    x[4, -1, -1, 0] = value
    out = network.product(x)[0]
    ones = [None if w is None else torch.ones_like(w) for w in weights]
    met = by_pytorch(layers, ones, [None] * len(layers), (~x.isfinite()).double())
    assert torch.equal(out.isfinite(), met == 0)
    assert torch.equal(out[met == 0], clean[met == 0])


@pytest.mark.parametrize("relu", [False, True])
def test_maxima_that_are_met_several_times_and_nan(relu):
    """The first of equal elements gets the gradient, and NaN wins, as in PyTorch."""
    layer = LayerGeometry(1, 1, (4, 6), (3, 3), (1, 1), padding=(1, 1), relu=relu, kind="max_pool")
    network = InterleavedLayers([layer], [None], [None])
    x = torch.randint(-1, 2, (40, 1, 4, 6), generator=torch.Generator().manual_seed(0)).float()
    x[::3][x[::3] > 0] = torch.nan
    x[::4][x[::4] < 0] = -torch.inf
    seen = x.clone().requires_grad_()
    want = functional.max_pool2d(seen, 3, 1, 1)
    want = want.relu() if relu else want
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad(want, seen, grad)
    out, active = network.product(x, record=True)
    torch.testing.assert_close(out, want, equal_nan=True, atol=0, rtol=0)
    torch.testing.assert_close(network.gradient(grad, active), wanted)


def test_relus_keep_nan_and_stop_what_is_not_positive():
    layers = [LayerGeometry(2, 2, (1, 2), relu=True), LayerGeometry(2, 1, (1, 2))]
    eye = torch.eye(2)[:, :, None, None]
    network = InterleavedLayers(layers, [eye, torch.ones(1, 2, 1, 1)], [None, None])
    x = torch.tensor([[[[torch.nan, -1.0]], [[2.0, 0.0]]]]).repeat(3, 1, 1, 1)
    out, active = network.product(x, record=True)
    torch.testing.assert_close(out, torch.tensor([[[[torch.nan, 0.0]]]]).expand(3, 1, 1, 2), equal_nan=True)
    back = network.gradient(torch.full((3, 1, 1, 2), 5.0), active)
    torch.testing.assert_close(back, torch.tensor([[[[5.0, 0.0]], [[5.0, 0.0]]]]).expand(3, 2, 1, 2))


def test_a_relu_at_the_end_stops_the_gradient_where_it_is_not_active():
    layers = NETWORKS["more padding than kernel"]
    weights, biases = weights_of(layers)
    network, x = InterleavedLayers(layers, weights, biases), images(3, layers)
    out, active = network.product(x, record=True)
    noise = torch.where(out > 0, 0.0, torch.nan)  # where the ReLU is not active nothing counts
    assert torch.equal(
        network.gradient(torch.ones_like(out) + noise, active), network.gradient(torch.ones_like(out), active)
    )


@needs_native
@pytest.mark.parametrize("name", ["three convolutions", "all kinds of geometry", "two linear layers"])
def test_an_image_depends_on_neither_its_batch_nor_the_threads(name):
    layers = NETWORKS[name]
    weights, biases = weights_of(layers)
    x = images(37, layers)
    grad = torch.randn(len(x), *layers[-1].output, generator=torch.Generator().manual_seed(2))
    whole = both_passes(layers, weights, biases, x, grad)
    threads = torch.get_num_threads()
    for rows, count in itertools.product((slice(0, 1), slice(3, 11), slice(5, 14), slice(1, 37)), (1, 2, 3, 8)):
        torch.set_num_threads(count)
        try:
            part = both_passes(layers, weights, biases, x[rows], grad[rows])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


@needs_native
@every_network
def test_nothing_outside_of_the_operands_is_read_or_written(name):
    """Beside NaN and in memory of its own kind."""
    layers = NETWORKS[name]
    weights, biases = weights_of(layers)
    network = InterleavedLayers(layers, weights, biases)
    for batch in (1, 9, 18):
        x = images(batch, layers)
        want, active = network.product(x, record=True)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
        back = network.gradient(grad, active)
        for given, found, packed, adjoint in (
            (x, want, network._forward, False),
            (grad, back, network._adjoint, True),
        ):
            memory, around = (
                torch.full((found.numel() + 128,), torch.nan),
                torch.full((given.numel() + 128,), torch.nan),
            )
            flags = torch.full((active.numel() + 128,), 7, dtype=torch.uint8)
            result, source = memory[64 : 64 + found.numel()].view(found.shape), around[64 : 64 + given.numel()]
            own = flags[64 : 64 + active.numel()]
            own.copy_(active.flatten())
            source = source.view(given.shape).copy_(given)
            arguments = (packed, network._biases, network._geometry, own.view(active.shape), adjoint)
            torch.ops.fastlip.interleaved_layers_(result, source, *arguments)
            assert torch.equal(result, found)
            assert memory[:64].isnan().all()
            assert memory[64 + found.numel() :].isnan().all()
            assert (flags[:64] == 7).all()
            assert (flags[64 + active.numel() :] == 7).all()


def test_layouts_of_the_input_and_changes_of_the_weights():
    layers = NETWORKS["three convolutions"]
    weights, biases = weights_of(layers)
    network, x = InterleavedLayers(layers, weights, biases), images(6, layers)
    out, active = network.product(x, record=True)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        assert torch.equal(network.product(other)[0], out)
    grad = torch.randn(6, 20, 1, 1, generator=torch.Generator().manual_seed(2))[:, ::2]
    assert torch.equal(network.gradient(grad, active), network.gradient(grad.contiguous(), active))
    weights[0].zero_()
    biases[0].zero_()
    assert torch.equal(network.product(x)[0], out)


def test_nothing_to_do():
    layers = NETWORKS["three convolutions"]
    network = InterleavedLayers(layers, *weights_of(layers))
    out, active = network.product(images(0, layers), record=True)
    assert out.shape == (0, 10, 1, 1)
    assert network.gradient(out, active).shape == (0, 3, 32, 32)


def test_default_devices_and_dtypes_do_not_matter():
    layers = NETWORKS["two linear layers"]
    weights, biases = weights_of(layers)
    x = images(3, layers)
    want = InterleavedLayers(layers, weights, biases).product(x)[0]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            network = InterleavedLayers(layers, weights, biases)
            found, active = network.product(x, record=True)
            back = network.gradient(found, active)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, want)
    assert back.device == x.device


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition or finite or relu or maxima or outside or depends")


@pytest.mark.parametrize("adjoint", [False, True])
def test_opcheck(adjoint):
    layers = NETWORKS["two linear layers"]
    network, x = InterleavedLayers(layers, *weights_of(layers)), images(3, layers)
    out, active = network.product(x, record=True)
    weights, source = (network._adjoint, torch.ones_like(out)) if adjoint else (network._forward, x)
    result = torch.zeros_like(x if adjoint else out)
    arguments = (result, source, weights, network._biases, network._geometry, active, adjoint)
    torch.library.opcheck(torch.ops.fastlip.interleaved_layers_.default, arguments)


def test_weights_are_checked():
    layers = NETWORKS["two linear layers"]
    weights, biases = weights_of(layers)
    with pytest.raises(ValueError, match="there must be a layer"):
        InterleavedLayers([], [], [])
    with pytest.raises(ValueError, match="there must be a layer"):
        InterleavedLayers(layers, weights[1:], biases)
    with pytest.raises(ValueError, match="there must be a layer"):
        InterleavedLayers(layers, weights, biases[1:])
    with pytest.raises(ValueError, match="kind must be one of conv, max_pool, average_pool"):
        InterleavedLayers([LayerGeometry(2, 2, kind="pool")], [None], [None])
    for layer, weight in ((LayerGeometry(2, 2, kind="max_pool"), torch.eye(2)), (LayerGeometry(2, 2), None)):
        with pytest.raises(ValueError, match="convolutions alone must have a weight"):
            InterleavedLayers([layer], [weight], [None])
    for wrong in (weights[0][:4], weights[0][:, :, :3], weights[0].flatten(2)[..., 1:]):
        with pytest.raises(ValueError, match=r"must be \[outputs, channels, h, w\]"):
            InterleavedLayers(layers, [wrong, *weights[1:]], biases)


def numbers(layers, position, value):
    geometry = flat_geometry(layers)
    geometry[position] = value
    return geometry


LAYERS = NETWORKS["two linear layers"]


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3).double()}, "out must be contiguous float32"),
        ({0: torch.zeros(2, 6)[:, ::2]}, "out must be contiguous float32"),
        ({0: torch.zeros(3, 3)}, "x and out must have as many images"),
        ({0: torch.zeros(2, 4)}, "out must have the elements of the last output"),
        ({0: torch.zeros(())}, "as many images"),
        ({1: torch.zeros(2, 1, 9, 14).half()}, "x must be contiguous float32"),
        ({1: torch.zeros(2, 1, 9, 28)[..., ::2]}, "x must be contiguous float32"),
        ({1: torch.zeros(2, 1, 9, 13)}, "x must have the elements of the first input"),
        ({2: []}, "there must be a layer"),
        ({2: [torch.zeros(1, 1, 16, 8)] * 3}, "weight must be"),
        ({2: [torch.zeros(1, 1, 16, 8).double()] * 3}, "weight must be contiguous float32"),
        ({2: [torch.zeros(1, 16, 8)] * 3}, "weight must be"),
        ({3: []}, "a bias"),
        ({3: [torch.zeros(4)] * 3}, "bias must have an element for each output"),
        ({3: [torch.zeros(5).double()] * 3}, "bias must be contiguous float32"),
        ({4: [1] * 14}, "14 numbers"),
        ({4: numbers(LAYERS, 0, 0)}, "channels must be 1 to"),
        ({4: numbers(LAYERS, 1, -1)}, "channels must be 1 to"),
        ({4: numbers(LAYERS, 2, 0)}, "1 to 2.20 pixels"),
        ({4: numbers(LAYERS, 3, 1)}, "1 to 2.20 pixels"),
        ({4: numbers(LAYERS, 4, 17)}, "1 to 16 taps"),
        ({4: numbers(LAYERS, 5, 0)}, "1 to 16 taps"),
        ({4: numbers(LAYERS, 6, 0)}, "stride and dilation must be 1 to 64"),
        ({4: numbers(LAYERS, 9, 65)}, "stride and dilation must be 1 to 64"),
        ({4: numbers(LAYERS, 10, -1)}, "padding must be 0 to 64"),
        ({4: numbers(LAYERS, 11, 65)}, "padding must be 0 to 64"),
        ({4: numbers(LAYERS, 14, 139)}, "a layer must take what the one before it gives"),
        ({4: numbers(LAYERS, 1, 2**40)}, "channels must be 1 to"),
        ({5: torch.zeros(1, 163, 15, dtype=torch.uint8)}, "active must be contiguous uint8"),
        ({5: torch.zeros(1, 163, 16)}, "active must be contiguous uint8"),
        ({4: numbers(LAYERS, 27, 3)}, "kind must be 0, 1 or 2"),
        (
            {4: [2, 2, 17, 17, 16, 16, 1, 1, 1, 1, 0, 0, 0, 1], 2: [torch.zeros(0)], 3: [torch.zeros(0)]},
            "maxima must be of at most 255 taps",
        ),
        ({4: numbers(LAYERS, 27, 1)}, "pools have as many outputs as channels"),
        ({4: numbers(LAYERS, 2, 2**20), 2: [torch.zeros(1, 1, 16, 8)] * 3}, "at most 2.31 elements|must take"),
        ({6: True, 0: torch.zeros(2, 126), 1: torch.zeros(2, 3)}, "weight must be"),
    ],
)
def test_direct_calls_are_checked(change, message):
    network = InterleavedLayers(LAYERS, *weights_of(LAYERS))
    x = images(2, LAYERS)
    out, active = network.product(x, record=True)
    arguments = [out, x, network._forward, network._biases, network._geometry, active, False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.interleaved_layers_(*arguments)


def test_the_adjoint_needs_to_know_where_relus_are_active():
    network = InterleavedLayers(LAYERS, *weights_of(LAYERS))
    if ops.backends["cpu"].name == "native":
        with pytest.raises(RuntimeError, match="must have active"):
            network.gradient(torch.ones(2, 3, 1, 1), None)


@pytest.mark.parametrize("batch", [2, 20])
def test_a_module_of_the_same_layers(batch):
    """What a user would write, with autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4))
    layers = [LayerGeometry(3, 6, (8, 8), (3, 3), padding=(1, 1), relu=True), LayerGeometry(6 * 64, 4)]
    own = (model[0], model[3])
    network = InterleavedLayers(layers, [m.weight for m in own], [m.bias for m in own])
    x = torch.rand(batch, 3, 8, 8, requires_grad=True)
    want = model(x)
    (back,) = torch.autograd.grad(want.sum(), x)
    out, active = network.product(x.detach(), record=True)
    torch.testing.assert_close(out.flatten(1), want)
    torch.testing.assert_close(network.gradient(torch.ones_like(out), active), back)


@needs_native
def test_layers_that_would_take_too_much_scratch_memory():
    layer = LayerGeometry(16, 16, (1 << 17, 1), (1, 1), (64, 64), padding=(0, 64))
    network = InterleavedLayers([layer], [torch.zeros(16, 16, 1, 1)], [None])
    with pytest.raises(RuntimeError, match=r"at most 2\^28 floats of scratch memory"):
        network.product(torch.zeros(1, 16, 1 << 17, 1))

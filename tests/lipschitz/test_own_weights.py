"""Functions that apply a layer with weights that do not depend on the input do what that layer does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlip.lipschitz import lipschitz_bound
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._intervals import Interval

SHAPE = (4, 6, 5)


class Applied(nn.Module):
    """Calls a function with tensors that are the module's own."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return self.function(x, **dict(self.named_buffers()))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES = {
    "linear": (F.linear, {"weight": drawn(7, 5), "bias": drawn(7)}),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, padding=1), {"w": drawn(6, 4, 3, 3), "b": drawn(6)}),
    "same": (lambda x, w: F.conv2d(x, w, padding="same", dilation=2), {"w": drawn(6, 4, 3, 3)}),
    "groups": (lambda x, w: F.conv2d(x, w, groups=2, stride=(2, 1)), {"w": drawn(6, 2, 2, 3)}),
    "standardised": (lambda x, w: F.conv2d(x, (w - w.mean()) / w.std(), None), {"w": drawn(6, 4, 3, 3)}),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, output_padding=1, groups=2),
        {"w": drawn(4, 3, 3, 3), "b": drawn(6)},
    ),
    "batch_norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, False, 0.1, 1e-3),
        {"m": drawn(4), "v": drawn(4).abs() + 0.1, "w": drawn(4), "b": drawn(4)},
    ),
    "batch_norm without weights": (
        lambda x, m, v: F.batch_norm(x, m, v, eps=1e-4),
        {"m": drawn(4), "v": drawn(4).abs() + 0.1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_constant_is_the_norm_of_the_matrix_and_values_lie_within_bounds(name):
    function, tensors = CASES[name]
    model = Applied(function, **tensors).double()
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(model, x).flatten(-len(SHAPE)).reshape(-1, x.numel())
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    bound = lipschitz_bound(model, SHAPE, rtol=1e-3).upper
    assert norm <= bound <= norm * 1.01

    traced = trace(model, SHAPE)
    node = next(n for n, step in traced.steps.items() if step is traced.last)
    centre, away = torch.rand(2, *SHAPE, dtype=torch.float64), torch.rand(2, *SHAPE, dtype=torch.float64)
    within = Interval(centre - away, centre + away)
    args, kwargs = torch.fx.node.map_arg(
        (node.args, node.kwargs), lambda n: within if n in traced.steps else traced.values.constants[n]
    )
    known = traced.last.interval(*args, **kwargs)
    for value in (model(within.lower), model(within.upper), model(centre)):
        assert bool((known.lower <= value).all() and (value <= known.upper).all())


def test_a_batch_norm_is_folded_into_the_convolution_before_it():
    tensors = {"w": drawn(6, 4, 3, 3), "m": drawn(6), "v": drawn(6).abs() + 0.1}

    def function(x, w, m, v):
        return F.batch_norm(F.conv2d(x, w, padding=1), m, v)

    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    conv.weight.data.copy_(tensors["w"])
    norm = nn.BatchNorm2d(6)
    norm.running_mean, norm.running_var = tensors["m"], tensors["v"]
    layers = nn.Sequential(conv, norm).eval()
    expected = lipschitz_bound(layers, SHAPE, method="svd").upper
    assert lipschitz_bound(Applied(function, **tensors), SHAPE, method="svd").upper == pytest.approx(expected)


def test_statistics_of_the_batch_are_refused():
    with pytest.raises(ValueError, match="statistics of its batch"):
        lipschitz_bound(Applied(lambda x: F.batch_norm(x, None, None, training=True)), SHAPE)


def test_weights_that_depend_on_the_input_are_refused():
    def function(x):
        return F.conv2d(x, x[:1])

    with pytest.raises(ValueError, match=r"weights that depend on the input|mixes the batch axis"):
        lipschitz_bound(Applied(function), SHAPE)

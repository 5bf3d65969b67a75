"""Which taps of a convolution touch its input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlip.models import build_model, dead_share, live_taps


def by_gradient(conv, shape):
    """Taps with any gradient, for an input without zeros."""
    conv = conv.double()
    output = conv(torch.rand(1, *shape, dtype=torch.float64) + 1.0)
    (slope,) = torch.autograd.grad(output.sum(), conv.weight)
    return slope.abs().amax((0, 1)) > 0


def random_convolutions(count):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    while count:
        kernel = (draw(1, 5), draw(1, 5))
        options = {
            "stride": (draw(1, 3), draw(1, 3)),
            "padding": (draw(0, 4), draw(0, 4)),
            "dilation": (draw(1, 3), draw(1, 2)),
        }
        if draw(0, 4) == 0:
            options |= {"stride": 1, "padding": "same"}
        size = (draw(1, 7), draw(1, 7))
        conv = nn.Conv2d(2, 3, kernel, **options)
        try:
            conv(torch.zeros(1, 2, *size))
        except RuntimeError:  # the kernel is larger than the input
            continue
        count -= 1
        yield conv, (2, *size)


@pytest.mark.parametrize(("conv", "shape"), list(random_convolutions(40)), ids=repr)
def test_live_taps_are_those_with_a_gradient(conv, shape):
    model = nn.Sequential(conv, nn.Flatten())
    assert torch.equal(live_taps(model, shape)["0"], by_gradient(conv, shape))


class Padded(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2)


def test_padding_before_the_convolution_counts_as_padding():
    conv = nn.Conv2d(2, 3, 3)
    model = nn.Sequential(nn.ZeroPad2d((0, 2, 1, 1)), conv, nn.Flatten())
    expected = torch.tensor([[False] * 3, [True, False, False], [False] * 3])
    assert torch.equal(live_taps(model, (2, 1, 1))["1"], expected)
    own = Padded(2, 3, 2)
    assert torch.equal(live_taps(nn.Sequential(own), (2, 1, 1))["0"], torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize("mode", ["circular", "replicate"])
def test_other_padding_is_made_of_pixels(mode):
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    assert live_taps(nn.Sequential(conv), (2, 1, 1))["0"].all()


@pytest.mark.parametrize(
    ("stem", "scale", "dead"),
    [("imagenet", 1, 0.235), ("stride-2", 1, 0.0), ("stride-1-pool", 1, 0.0), ("imagenet", 2, 0.0)],
)
def test_dead_weights_of_resnet50_on_small_images(stem, scale, dead):
    model = build_model("torchvision:resnet50", 10, stem=stem, scale=scale, seed=0)
    assert dead_share(live_taps(model, (3, 32, 32)), model) == pytest.approx(dead, abs=5e-4)


def test_nothing_is_dead_without_convolutions():
    assert dead_share({}, nn.Linear(2, 2)) == 0.0


def test_a_convolution_used_on_two_sizes_has_the_taps_of_both():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), conv)
    assert live_taps(model, (2, 4, 4))["0"].all()

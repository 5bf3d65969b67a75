"""Small networks that "bigger" is relative to; each takes normalised images of one size."""

import math
from collections import OrderedDict

from torch import nn

#: Width of the hidden layers of the perceptron and of the ConvNet.
_WIDTH = 512
#: Channels of the ConvNet's convolutions.
_CHANNELS = (32, 64, 128)


def softmax(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Softmax regression: one linear layer on the pixels, [B, C, H, W] to [B, num_classes]."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=nn.Linear(math.prod(shape), num_classes)))


def mlp(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A perceptron with two hidden layers, [B, C, H, W] to [B, num_classes]."""
    return _initialised(
        nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                hidden1=nn.Linear(math.prod(shape), _WIDTH),
                relu1=nn.ReLU(),
                hidden2=nn.Linear(_WIDTH, _WIDTH),
                relu2=nn.ReLU(),
                head=nn.Linear(_WIDTH, num_classes),
            )
        )
    )


def convnet(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A ConvNet as in 2013: three convolutions, each with a pool, and a hidden layer; no BatchNorm.

    [B, C, H, W] with H and W of at least 8 to [B, num_classes].
    """
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (wide, kernel) in enumerate(zip(_CHANNELS, (5, 5, 3), strict=True), start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, wide, kernel, padding=kernel // 2)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels, height, width = wide, height // 2, width // 2
    layers |= {
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(channels * height * width, _WIDTH),
        "relu": nn.ReLU(),
        "head": nn.Linear(_WIDTH, num_classes),
    }
    return _initialised(nn.Sequential(layers))


def _initialised(network: nn.Sequential) -> nn.Sequential:
    """``network`` with weights that keep the variance behind ReLUs (He et al. 2015): there is no BatchNorm to do it."""
    for module in network:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    # Small first logits: the head is followed by no ReLU.
    nn.init.normal_(network.get_submodule("head").get_parameter("weight"), std=0.01)
    return network


REFERENCES = {"softmax": softmax, "mlp": mlp, "convnet": convnet}

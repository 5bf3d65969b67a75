"""Whether training in bfloat16 pays for a network on a CPU whose matrix products are faster in it."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastlip._precision import least_seconds
from fastlip.study.settings.machine import Machine
from fastlip.study.settings.settings import Settings
from fastlip.study.training import architectures

#: Images in the batch that is timed.
_TIMED = 16


def precision_of_training(settings: Settings, machine: Machine) -> Literal["float32", "bfloat16"]:
    """The machine's precision, or float32 where that is left open and is faster for the network.

    On CPUs PyTorch's grouped convolutions, depthwise ones above all, can be slower in bfloat16. A network without any
    is not timed.
    """
    left_open = settings.precision == "auto" and machine.device == "cpu" and not settings.checkpoints
    if not left_open or machine.precision == "float32":
        return machine.precision
    network = architectures.build(settings, architectures.SOURCE, classes=10, seed=0)
    if not any(isinstance(m, _ConvNd) and m.groups > 1 for m in network.modules()):
        return "bfloat16"
    with torch.random.fork_rng(devices=[]):  # as dropout draws
        images = torch.rand(_TIMED, *architectures.image_shape(settings)).contiguous(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last).train()
        low, wide = least_seconds([partial(_step, network, images, low) for low in (True, False)], rounds=2)
    return "bfloat16" if low < wide else "float32"


def _step(network: nn.Module, images: Tensor, low: bool) -> None:
    """Both passes of a step of training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits = network(images)
    logits.float().square().sum().backward()
    network.zero_grad()

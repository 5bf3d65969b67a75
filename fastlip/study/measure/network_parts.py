"""The parts of the networks that are measured, found once for each network."""

from weakref import WeakKeyDictionary

from torch import nn

from fastlip.models import Anatomy, anatomy
from fastlip.study.measure.images import Images

_GIVEN: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def give(network: nn.Module, parts: Anatomy) -> None:
    """Take ``parts`` for the network from now on, as the settings may name them."""
    _GIVEN[network] = parts


def parts_of(network: nn.Module, images: Images) -> Anatomy:
    """The parts given for the network, or those found on images of this shape."""
    if network not in _GIVEN:
        give(network, anatomy(network, images.pixels.shape[1:]))
    return _GIVEN[network]

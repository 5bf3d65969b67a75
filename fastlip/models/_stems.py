"""How a network begins: the stride of its first convolution, and whether a max-pool follows."""

from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip.models._calls import Call, calls

Stem = Literal["imagenet", "stride-2", "stride-1", "stride-1-pool", "cifar"]

#: Stems by name, and what they mean. All but "cifar" keep the shapes of the weights, so that published weights load.
STEMS: dict[str, str] = {
    "imagenet": "as the architecture defines it",
    "stride-2": "first convolution at stride 2, no max-pool",
    "stride-1": "first convolution at stride 1, no max-pool",
    "stride-1-pool": "first convolution at stride 1, then the architecture's max-pool",
    "cifar": "first convolution replaced by one of 3x3 at stride 1, no max-pool",
}


class _Stem(NamedTuple):
    stride: int
    pool: bool
    replaced: bool = False


_CHANGED = {
    "stride-2": _Stem(2, pool=False),
    "stride-1": _Stem(1, pool=False),
    "stride-1-pool": _Stem(1, pool=True),
    "cifar": _Stem(1, pool=False, replaced=True),
}


def change_stem(network: nn.Module, stem: str, shape: tuple[int, int, int], spec: str) -> None:
    """Give ``network``, which takes images of ``shape`` [C, H, W], another stem, in place.

    Raises:
        ValueError: it does not begin in a way that can be changed so; the message names ``spec``.
    """
    wanted = _CHANGED.get(stem)
    if wanted is None:
        return
    with _PoolCounter() as counter:
        ran, _ = calls(network, shape)
    first = next((c for c in ran if isinstance(c.module, nn.Conv2d)), None)
    if first is None or not isinstance(first.module, nn.Conv2d) or max(first.module.stride) == 1:
        begins = "has no convolution" if first is None else f"begins with {first.name} at stride 1"
        raise ValueError(f"stem={stem} does not fit {spec}, which {begins}; use stem=imagenet, its own")
    pool = _pool_behind(first, ran)
    if pool is None and wanted.pool:
        raise ValueError(f"stem={stem} does not fit {spec}, which has no max-pool; use stem=stride-1 or imagenet")
    if counter.pools > sum(isinstance(c.module, nn.MaxPool2d) for c in ran):
        raise ValueError(f"stem={stem} does not fit {spec}, whose max-pool is no module; use stem=imagenet, its own")
    conv = first.module
    if wanted.replaced:
        bias = conv.bias is not None
        smaller = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=bias)
        nn.init.kaiming_normal_(smaller.weight, mode="fan_out", nonlinearity="relu")
        replace_module(network, first.name, smaller)
    else:
        conv.stride = (wanted.stride, wanted.stride)
    if pool is not None and not wanted.pool:
        replace_module(network, pool.name, nn.Identity())


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent).register_module(child, module)


def _pool_behind(first: Call, ran: list[Call]) -> Call | None:
    """The max-pool that belongs to the stem: the first one, where nothing else made the map smaller before it."""
    assert first.output is not None
    height = first.output.shape[2]
    for call in ran[ran.index(first) + 1 :]:
        if isinstance(call.module, nn.MaxPool2d):
            return call
        if call.output is not None and (call.output.dim() != 4 or call.output.shape[2] < height):
            return None
    return None


class _PoolCounter(TorchDispatchMode):
    """Counts max-pools, whether modules or functions."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.pools += func is torch.ops.aten.max_pool2d_with_indices.default
        return func(*args, **(kwargs or {}))

"""Functions that only move values."""

import torch
from torch import nn

from fastlip.lipschitz._calls import Call, as_function
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import by_ends, same_norm
from fastlip.lipschitz._steps import Step

#: Functions that keep all values, in their order.
_IN_ORDER = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.clone,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
)
#: Functions that only move values, each to one place.
_MOVES = (*_IN_ORDER, torch.permute, torch.transpose, "permute", "transpose")


@builds(*_MOVES, fixed=True)
def _move(call: Call) -> Step | None:
    if not call.on_one:
        return None
    if call.values.dtypes[call.node] != call.source_dtype:
        raise missing_rule(f"{call.name} to another dtype", call.where)
    same = call.target in _IN_ORDER
    module = nn.Identity() if same and call.shape == call.sources[0].shape else None
    apply = as_function(call.target)
    interval = by_ends(call, apply, norm=same_norm)
    return Step(call.where, call.name, call.sources, 1.0, call.shape, module, apply, interval, same=same)

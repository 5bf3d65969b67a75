"""Operators of ATen, of which exported programs are made, as the functions of torch that do the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

_ATEN: Any = torch.ops.aten
_CONVS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
#: Functions that take the same arguments in the same order.
_SAME: dict[Any, Callable[..., Any]] = {
    **{getattr(_ATEN, f.__name__): f for f in (*_CONVS, *_TRANSPOSED)},
    **{_ATEN.linear: F.linear, _ATEN.matmul: torch.matmul, _ATEN.mm: torch.mm, _ATEN.addmm: torch.addmm},
    **{_ATEN.pad: F.pad, _ATEN.scaled_dot_product_attention: F.scaled_dot_product_attention},
}


def as_function(called: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any], str]:
    """The function that an operator is, its positional arguments and its name; of others what is given."""
    if not isinstance(called, OpOverload):
        return called, args, getattr(called, "__name__", str(called))
    operator = called.overloadpacket
    name = str(operator.__name__)
    if operator is _ATEN.convolution:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        if transposed:
            transposition = _TRANSPOSED[len(stride) - 1]
            return transposition, (x, weight, bias, stride, padding, output_padding, groups, dilation), name
        return _CONVS[len(stride) - 1], (x, weight, bias, stride, padding, dilation, groups), name
    if operator is _ATEN.batch_norm:
        x, weight, bias, mean, variance, training, momentum, eps, *_ = args
        return F.batch_norm, (x, mean, variance, weight, bias, training, momentum, eps), name
    return _SAME.get(operator, called), args, name

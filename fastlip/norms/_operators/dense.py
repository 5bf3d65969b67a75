"""Operators as dense matrices."""

import math

import torch
from torch import Tensor

from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.torch_operator import TorchOperator

_EPS = torch.finfo(torch.float64).eps


def dense_matrix(op: Operator) -> Tensor:
    """The operator's matrices, one per group, in float64: [groups, rows, columns]."""
    g, axes = op.groups, len(op.kernel)
    weight = op.weight.double().unflatten(0, (g, -1))  # [g, o, i, *kernel]
    if not axes:
        return weight
    if op.padding_mode != "zeros":
        return _from_unit_vectors(op)
    for axis, (n, (left, _), d, s, m) in enumerate(
        zip(op.input_size, op.padding, op.dilation, op.stride, op.output_size, strict=True)
    ):
        k, dim = op.kernel[axis], 3 + 2 * axis
        offset = torch.arange(n) - (torch.arange(m) * s - left)[:, None]  # [m, n], tap * dilation
        tap = torch.where((offset % d == 0) & (offset >= 0) & (offset < k * d), offset // d, k)
        zero = torch.zeros_like(weight.narrow(dim, 0, 1))
        weight = (
            torch.cat([weight, zero], dim).index_select(dim, tap.flatten().to(weight.device)).unflatten(dim, (m, n))
        )
    # [g, o, i, m0, n0, m1, n1, ...] to [g, o, m..., i, n...]
    order = (0, 1, *range(3, 3 + 2 * axes, 2), 2, *range(4, 4 + 2 * axes, 2))
    return weight.permute(order).flatten(1 + 1 + axes).flatten(1, 1 + axes)


def entry_error(op: Operator) -> float:
    """Bound on the 2-norm of the rounding error of :func:`dense_matrix`.

    With zero padding an entry is a weight, without an error. With padding that repeats pixels an entry can be a sum of
    several weights, whose error is at most as many units of the sum of their magnitudes.
    """
    return 0.0 if op.padding_mode == "zeros" else _EPS * math.prod(op.kernel) * op.absolute_bound


def _from_unit_vectors(op: Operator) -> Tensor:
    """One column per input position, all groups at once."""
    g, pixels = op.groups, math.prod(op.input_size)
    channels = op.input_shape[0] // g
    units = torch.eye(channels * pixels, dtype=torch.float64, device=op.weight.device)
    stacked = units.reshape(-1, channels, *op.input_size).repeat(1, g, *(1 for _ in op.input_size))
    images = TorchOperator(op, op.weight.double()).forward(stacked)  # [columns, Cout, *output]
    return images.flatten(2).unflatten(1, (g, -1)).flatten(2).permute(1, 2, 0)

"""Operators with fewer taps or axes, and the same norm."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from fastlip.norms._operators.operator import Operator, inherit_frobenius


def trim(op: Operator) -> Operator:
    """The same operator without the taps that, with zero padding, only ever meet zeros.

    Outer taps are cut off; those between others, which wide strides can leave idle, become 0. If no tap ever meets the
    input, the operator is 0, and so is the whole weight.

    Example:
        >>> import torch
        >>> import fastlip
        >>> op = fastlip.norms.conv_operator(torch.randn(4, 3, 3, 3), 1, padding=1)
        >>> print(fastlip.norms.trim(op).kernel)  # around one pixel only the middle tap counts
    """
    if op.padding_mode != "zeros":
        return op
    alive = [window.alive for window in _windows(op)]
    if all(len(taps) == k for taps, k in zip(alive, op.kernel, strict=True)):
        return op
    if not all(alive):
        return replace(op, weight=torch.zeros_like(op.weight))
    weight, pads = op.weight, []
    for axis, (taps, (left, right)) in enumerate(zip(alive, op.padding, strict=True)):
        first, last = taps[0], taps[-1]
        weight = weight.narrow(axis + 2, first, last - first + 1)
        idle = [tap - first for tap in range(first, last) if tap not in taps]
        if idle:
            weight = weight.index_fill(axis + 2, torch.tensor(idle, device=weight.device), 0.0)
        spread = op.dilation[axis]
        pads.append((left - spread * first, right - spread * (op.kernel[axis] - 1 - last)))
    return inherit_frobenius(replace(op, weight=weight, padding=tuple(pads)), op)


def as_applied(op: Operator) -> Operator:
    """:func:`trim` with a Frobenius norm of its own: taps that never meet the input must not set the others' scale."""
    trimmed = trim(op)
    return op if trimmed is op else trimmed.with_weight(trimmed.weight)


def simplify(op: Operator) -> Operator:
    """An operator with the same norm and fewer taps or axes.

    If, with zero padding and after trimming, no two windows overlap and one of them lies inside the input, A A^T is
    block diagonal and its largest block is that of the flattened kernel. The same holds where there is only one window.
    The result is then the matrix of the flattened kernel, without spatial axes.

    Example:
        >>> import torch
        >>> import fastlip
        >>> op = fastlip.norms.conv_operator(torch.randn(4, 3, 2, 2), 8, stride=2)
        >>> print(fastlip.norms.simplify(op).weight.shape)  # windows that do not overlap: a matrix
    """
    return flatten(trim(op))


def flatten(op: Operator) -> Operator:
    """:func:`simplify` for an operator that is trimmed already."""
    if op.padding_mode != "zeros" or not op.kernel:
        return op
    if not all(window.disjoint for window in _windows(op)):
        return op
    return inherit_frobenius(Operator(op.weight.flatten(1), groups=op.groups), op)


class _Window(NamedTuple):
    """How a kernel's windows lie along one axis, with zero padding."""

    alive: tuple[int, ...]  # taps that ever meet the input
    disjoint: bool  # whether no two windows overlap, and one lies inside the input


def _windows(op: Operator) -> list[_Window]:
    axes = zip(op.input_size, op.output_size, op.kernel, op.stride, op.dilation, op.padding, strict=True)
    return [_window(n, m, k, s, d, left) for n, m, k, s, d, (left, _) in axes]


@lru_cache(maxsize=1024)
def _window(n: int, m: int, k: int, stride: int, dilation: int, left: int) -> _Window:
    """The windows of an axis with n inputs and m outputs."""

    def begins_between(first: int, end: int) -> bool:
        """Whether a window's first tap is at one of these positions, which are negative in the padding."""
        return max(0, -(-(first + left) // stride)) <= min(m - 1, (end - 1 + left) // stride)

    alive = tuple(j for j in range(k) if begins_between(-j * dilation, n - j * dilation))
    inside = begins_between(0, n - dilation * (k - 1))
    disjoint = inside and (m == 1 or k == 1 or (dilation == 1 and k <= stride))
    return _Window(alive, disjoint)

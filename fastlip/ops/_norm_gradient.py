"""The checked wrappers of the operators that go by the gradient of a norm, which run on the CPU alone."""

import math
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64)


def norm_along(
    weight: Tensor,  # [rows, ...]
    left: Tensor,  # [rows, rank], or [rows, columns]
    right: Tensor | None,  # [rank, columns]
) -> Tensor:
    """Return <G, weight>, which is the norm of a weight where G is its gradient.

    The weight is read once, and G is not formed where it is given in factors. Products are rounded to the dtype at
    most, and added in float64. The result does not depend on the number of threads.

    Args:
        weight: float32 or float64, on the CPU; columns are the elements of a row.
        left: G, or the left one of two factors of it, in that dtype.
        right: the right one; None where ``left`` is G.

    Returns:
        The sum, a float64 scalar.

    Raises:
        ValueError: a shape or device is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weight = torch.randn(4, 6)
        >>> u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        >>> print(ops.norm_along(weight, u[:, :1], vh[:1]) / s[0])  # 1, up to rounding
    """
    found: Tensor = torch.ops.fastlip.norm_along(*_checked("weight", {"weight": weight}, left, right))
    return found


def scaled_weight_grad(
    grad: Tensor,  # [rows, ...]
    scaled: Tensor,  # [rows, ...]
    left: Tensor,  # [rows, rank], or [rows, columns]
    right: Tensor | None,  # [rank, columns]
    norm: float,
    bound: float,
) -> Tensor:
    """Return the gradient in a weight that was scaled to a bound on its norm.

    With scaled = (bound / norm) W, where norm is a function of W whose gradient is G,

        (bound / norm) (grad - <grad, scaled> / bound G).

    The weight and its gradient are each read once, and the gradient once more while the result is written. The result
    does not depend on the number of threads.

    Args:
        grad: gradient in the scaled weight, float32 or float64, on the CPU.
        scaled: the scaled weight, of that shape and dtype; columns are the elements of a row.
        left: G, or the left one of two factors of it.
        right: the right one; None where ``left`` is G.
        norm: of the weight before it was scaled.
        bound: norm of the scaled weight.

    Returns:
        The gradient, contiguous, like ``grad``.

    Raises:
        ValueError: a shape or device is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weight = torch.randn(4, 6)
        >>> u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        >>> scaled = weight / s[0]
        >>> grad = ops.scaled_weight_grad(torch.randn(4, 6), scaled, u[:, :1], vh[:1], s[0].item(), 1.0)
    """
    operands = _checked("grad", {"grad": grad, "scaled": scaled}, left, right)
    found: Tensor = torch.ops.fastlip.scaled_weight_grad(*operands, norm, bound)
    return found


def _checked(first: str, given: dict[str, Tensor], left: Tensor, right: Tensor | None) -> list[Any]:
    """The operands, contiguous and without a graph; those in ``given`` have the shape of the one called ``first``."""
    like = given[first]
    if like.dtype not in _DTYPES:
        raise TypeError(f"{first} must be float32 or float64, got {like.dtype}")
    if not like.dim():
        raise ValueError(f"{first} must have at least one axis")
    rows, columns = len(like), math.prod(like.shape[1:])
    for name, tensor in {**given, "left": left, **({} if right is None else {"right": right})}.items():
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} must be in {first}'s dtype {like.dtype}, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
        if name in given and tensor.shape != like.shape:
            raise ValueError(f"{name} must have {first}'s shape {list(like.shape)}, got {list(tensor.shape)}")
    if right is not None and (right.dim() != 2 or len(right) == 0 or right.shape[1] != columns):
        raise ValueError(f"right must be [rank, {columns}] with a rank of at least 1, got {list(right.shape)}")
    wanted = [rows, columns if right is None else len(right)]
    if list(left.shape) != wanted:
        raise ValueError(f"left must be {wanted}, got {list(left.shape)}")
    right = like.new_empty(0) if right is None else right
    return [tensor.detach().contiguous() for tensor in (*given.values(), left, right)]

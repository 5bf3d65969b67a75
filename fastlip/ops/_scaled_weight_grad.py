"""The checked wrapper of ``scaled_weight_grad``, which runs on the CPU alone."""

import math

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64)


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
    if grad.dtype not in _DTYPES:
        raise TypeError(f"grad must be float32 or float64, got {grad.dtype}")
    rows, columns = (len(grad), math.prod(grad.shape[1:])) if grad.dim() else (0, 0)
    given = {"grad": grad, "scaled": scaled, "left": left} | ({} if right is None else {"right": right})
    for name, tensor in given.items():
        if tensor.dtype != grad.dtype:
            raise TypeError(f"{name} must be in grad's dtype {grad.dtype}, got {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    if not grad.dim() or scaled.shape != grad.shape:
        raise ValueError(f"scaled must have grad's shape, of at least one axis, got {list(scaled.shape)}")
    if right is not None and (right.dim() != 2 or len(right) == 0 or right.shape[1] != columns):
        raise ValueError(f"right must be [rank, {columns}] with a rank of at least 1, got {list(right.shape)}")
    wanted = [rows, columns if right is None else len(right)]
    if list(left.shape) != wanted:
        raise ValueError(f"left must be {wanted}, got {list(left.shape)}")
    if grad.numel() == 0:
        return torch.empty_like(grad)
    right = grad.new_empty(0) if right is None else right
    operands = (tensor.detach().contiguous() for tensor in (grad, scaled, left, right))
    found: Tensor = torch.ops.fastlip.scaled_weight_grad(*operands, norm, bound)
    return found

"""The checked wrapper of ``operator_step_``."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastlip._renamed import renamed_keywords
from fastlip.ops._operator_plan import OperatorPlan

#: How the CUDA library multiplies float32 numbers; see :func:`operator_step_`.
MatmulPrecision = Literal["float32", "3xtf32"]
MATMUL_PRECISIONS: tuple[MatmulPrecision, ...] = get_args(MatmulPrecision)


@renamed_keywords(products="matmul_precision")
def operator_step_(
    out: Tensor,  # [target_size]
    out_square: Tensor,  # [vectors] float64
    x: Tensor,  # [source_size]
    weights: Tensor,  # [weight_size]
    plan: OperatorPlan,
    *,
    x_square: Tensor | None = None,  # [vectors] float64
    previous: Tensor | None = None,  # [target_size]
    previous_square: Tensor | None = None,  # [vectors] float64
    active: Tensor | None = None,  # [operators] bool
    matmul_precision: MatmulPrecision = "float32",
) -> Tensor:
    """Apply many operators to many vectors, with the scaling of a bidiagonalisation step, in place; returns ``out``.

    For each operator A of the plan and each of its vectors x

        out <- A x / ||x|| - (||x|| / ||previous||) previous,    out_square <- ||out||^2,

    This is a half step of Golub-Kahan bidiagonalisation (Golub and Kahan 1965) on vectors that are not normalised:
    x = b_{i-1} v_i, previous = a_{i-1} u_{i-1} and out = a_i u_i. The other half is the same with the plan of A^T.
    Without ``previous`` it is a step of power iteration, and without ``x_square`` a plain application of A. Where ||x||
    is 0, ``out`` is 0. The result does not depend on the number of threads.

    ``matmul_precision`` affects the CUDA library in float32 only: "float32" uses multiply-adds, "3xtf32" matrix units
    on numbers that are split in two (Ootomo and Yokota 2022), about as accurate on finite numbers below 2^127. The CPU
    library, the Triton kernels, the reference and float64 use multiply-adds in either case.

    Args:
        out: target vectors of all operators, each [vectors, pixels, channels], float32 or float64; not ``x``.
        out_square: receives the squared norms, [vectors] float64.
        x: source vectors in the same order, in the dtype of ``out``.
        weights: packed weights of all operators, in the dtype of ``out``.
        plan: memory layout and tiles, from :func:`operator_plan`.
        x_square: squared norms of ``x``; None leaves ``x`` as it is.
        previous: vectors to subtract, like ``out``; may not be ``out``. Needs ``x_square`` and ``previous_square``.
        previous_square: squared norms of ``previous``.
        active: operators to apply; ``out`` and ``out_square`` of the others are not changed.
        matmul_precision: "float32" or "3xtf32".

    Raises:
        ValueError: a shape, device, layout or ``matmul_precision`` is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> sizes = {"kernel": (3,), "input_size": (10,), "output_size": (8,)}
        >>> geometry = ops.ConvGeometry(3, 8, **sizes, stride=(1,), dilation=(1,), padding=((0, 0),))
        >>> plan = ops.operator_plan([geometry], [4])
        >>> weights = ops.pack_weights([torch.randn(8, 3, 3)], [1])
        >>> out, square = torch.empty(plan.target_size), torch.empty(plan.vectors, dtype=torch.float64)
        >>> ops.operator_step_(out, square, torch.randn(plan.source_size), weights, plan)
    """
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64, got {out.dtype}")
    sizes = {"x": (x, plan.source_size), "weights": (weights, plan.weight_size), "out": (out, plan.target_size)}
    if previous is not None:
        sizes["previous"] = (previous, plan.target_size)
        if x_square is None or previous_square is None:
            raise ValueError("previous needs x_square and previous_square")
    elif previous_square is not None:
        raise ValueError("previous_square needs previous")
    for name, (tensor, size) in sizes.items():
        if tensor.dtype != out.dtype:
            raise TypeError(f"{name} must have out's dtype {out.dtype}, got {tensor.dtype}")
        _check(name, tensor, size, plan)
    squares = {"out_square": out_square, "x_square": x_square, "previous_square": previous_square}
    for name, square in squares.items():
        if square is not None:
            if square.dtype != torch.float64:
                raise TypeError(f"{name} must be float64, got {square.dtype}")
            _check(name, square, plan.vectors, plan)
    if active is not None:
        if active.dtype != torch.bool:
            raise TypeError(f"active must be bool, got {active.dtype}")
        _check("active", active, len(plan.problems), plan)
    if matmul_precision not in MATMUL_PRECISIONS:
        raise ValueError(f"matmul_precision must be one of {', '.join(MATMUL_PRECISIONS)}, got {matmul_precision!r}")
    if any(other is out for other in (x, previous)):
        raise ValueError("out must be another tensor than x and previous")
    tables = (plan.problems, plan.tiles, plan.gather_groups, plan.entries, plan.max_vectors, plan.parts)
    history = (x_square, previous, previous_square)
    torch.ops.fastlip.operator_step_(out, out_square, x, *history, weights, *tables, matmul_precision, active)
    return out


def _check(name: str, tensor: Tensor, size: int, plan: OperatorPlan) -> None:
    if tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous of shape [{size}] for this plan, got {list(tensor.shape)}")
    if tensor.device != plan.problems.device:
        raise ValueError(f"{name} must be on the plan's device {plan.problems.device}, got {tensor.device}")

"""Batched operators: one call applies all operators, or all of their adjoints, to all of their vectors.

The environment variable ``FASTLIP_MATMUL_PRECISION`` chooses the matmul precision of float32: ``3xtf32`` lets the CUDA
library multiply on matrix units; see :func:`fastlip.ops.operator_step_`. A-posteriori bounds measure the rounding of
either.
"""

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from fastlip.norms._operators.composed import AnyOperator, Composed
from fastlip.norms._operators.masked import Masked
from fastlip.norms._operators.operator import Operator
from fastlip.ops import (
    MATMUL_PRECISIONS,
    ConvGeometry,
    MatmulPrecision,
    OperatorPlan,
    operator_plan,
    operator_step_,
    pack_weights,
)

_VARIABLE, _FORMER_VARIABLE = "FASTLIP_MATMUL_PRECISION", "FASTLIP_PRODUCTS"


class BatchedOperator(Protocol):
    """Operators that are applied together, each to as many vectors, which lie flat, [vectors, pixels, channels].

    Attributes:
        domain: where each operator's vectors are in a flat source of A.
        range: where each operator's vectors are in a flat target of A.
        vectors: which of all vectors, counted from 0, are each operator's.
        dtype: of all vectors.
        device: of all vectors.
    """

    domain: list[slice]
    range: list[slice]
    vectors: list[slice]
    dtype: torch.dtype
    device: torch.device

    def forward(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A x, or A x / ||x|| - (||x|| / ||previous||) previous, and its squared norms.

        Nothing is read on the host, so that a CUDA graph can hold it.

        Args:
            x: vectors of all operators.
            out: where to put the result; a new tensor if None.
            square: where to put the squared norms; a new tensor if None.
            active: operators to apply, [operators] bool; all if None. The others' results are undefined.
            history: x_square, previous and previous_square of :func:`fastlip.ops.operator_step_`.
        """
        ...

    def adjoint(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same for A^T."""
        ...


def batched_operator(ops: Sequence[AnyOperator], vectors: int, dtype: torch.dtype) -> BatchedOperator:
    """Operators on one device, each with as many vectors, in the arithmetic of ``dtype``.

    Composed operators must all have the same number of parts, and masked ones the same layer.
    """
    masked = [op for op in ops if isinstance(op, Masked)]
    if masked:
        return BatchedMasked(masked, vectors, dtype)
    composed = [op for op in ops if isinstance(op, Composed)]
    if composed:
        return BatchedCompositions(composed, vectors, dtype)
    return BatchedConvolutions([op for op in ops if isinstance(op, Operator)], vectors, dtype)


def from_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Vectors [b, pixels * C] as [b, C, *size]; ``shape`` is [C, *size]."""
    return rows.unflatten(1, (-1, shape[0])).mT.reshape(-1, *shape)


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def _geometry(op: Operator) -> ConvGeometry:
    return ConvGeometry(
        in_channels=op.input_shape[0],
        out_channels=op.output_shape[0],
        groups=op.groups,
        kernel=op.kernel,
        input_size=op.input_size,
        output_size=op.output_size,
        stride=op.stride,
        dilation=op.dilation,
        padding=op.padding,
        padding_mode=op.padding_mode,
    )


@lru_cache(maxsize=64)
def _operator_plan(
    geometries: tuple[ConvGeometry, ...], vectors: int, adjoint: bool, device: torch.device
) -> OperatorPlan:
    """The op's tables. They take time, and are cached because a network's checkpoints often come one by one."""
    return operator_plan(geometries, [vectors] * len(geometries), adjoint=adjoint, device=device)


def matmul_precision() -> MatmulPrecision:
    """The precision that the environment chooses; "float32" by default.

    Raises:
        ValueError: the environment variable's value is unknown.
    """
    chosen = os.environ.get(_VARIABLE)
    former = os.environ.get(_FORMER_VARIABLE)
    if not chosen and former:
        warnings.warn(f"{_FORMER_VARIABLE} is now {_VARIABLE}", DeprecationWarning, stacklevel=2)
    chosen = chosen or former or "float32"
    for known in MATMUL_PRECISIONS:
        if chosen == known:
            return known
    raise ValueError(f"{_VARIABLE}={chosen} is unknown; choose one of {', '.join(MATMUL_PRECISIONS)}")


class BatchedConvolutions:
    """Convolutions and matrices."""

    def __init__(self, ops: Sequence[Operator], vectors: int, dtype: torch.dtype) -> None:
        self.dtype, self.device, self._precision = dtype, ops[0].weight.device, matmul_precision()
        self.domain = _slices([vectors * prod(op.input_shape) for op in ops])
        self.range = _slices([vectors * prod(op.output_shape) for op in ops])
        self.vectors = _slices([vectors] * len(ops))
        geometries = tuple(_geometry(op) for op in ops)
        groups = [op.groups for op in ops]
        self._directions = []
        for adjoint in (False, True):
            plan = _operator_plan(geometries, vectors, adjoint, self.device)
            weights = pack_weights([op.weight for op in ops], groups, adjoint=adjoint, dtype=dtype)
            self._directions.append((plan, weights))

    def forward(
        self, x: Tensor, out: Tensor | None = None, square: Tensor | None = None, **history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._apply(*self._directions[0], x, out, square, history)

    def adjoint(
        self, x: Tensor, out: Tensor | None = None, square: Tensor | None = None, **history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._apply(*self._directions[1], x, out, square, history)

    def _apply(
        self,
        plan: OperatorPlan,
        weights: Tensor,
        x: Tensor,
        out: Tensor | None,
        square: Tensor | None,
        history: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        out = x.new_empty(plan.target_size) if out is None else out
        square = torch.zeros(plan.vectors, dtype=torch.float64, device=x.device) if square is None else square
        return operator_step_(out, square, x, weights, plan, matmul_precision=self._precision, **history), square


class BatchedCompositions:
    """Compositions: one batched operator for each of their parts, and the identity beside them."""

    def __init__(self, ops: Sequence[Composed], vectors: int, dtype: torch.dtype) -> None:
        self._ops = ops
        self._parts = [
            BatchedConvolutions([op.parts[i] for op in ops], vectors, dtype) for i in range(len(ops[0].parts))
        ]
        self.domain, self.range = self._parts[0].domain, self._parts[-1].range
        self.vectors, self.dtype, self.device = self._parts[0].vectors, dtype, self._parts[0].device
        # Vectors between two parts, in either direction, and squared norms that are not used.
        self._between = [torch.empty(part.range[-1].stop, dtype=dtype, device=self.device) for part in self._parts[:-1]]
        self._unused = torch.zeros(self.vectors[-1].stop, dtype=torch.float64, device=self.device)

    def forward(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = x
        for part, target in zip(self._parts, (*self._between, out), strict=True):
            y, _ = part.forward(y, target, self._unused, active=active)
        return self._finish(y, x, square, self.range, self.domain, active, **history)

    def adjoint(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = x
        for part, target in zip(reversed(self._parts), (*reversed(self._between), out), strict=True):
            y, _ = part.adjoint(y, target, self._unused, active=active)
        return self._finish(y, x, square, self.domain, self.range, active, **history)

    def _finish(
        self,
        product: Tensor,
        x: Tensor,
        square: Tensor | None,
        targets: list[slice],
        sources: list[slice],
        active: Tensor | None,
        x_square: Tensor | None = None,
        previous: Tensor | None = None,
        previous_square: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if square is None:
            square = torch.zeros(self.vectors[-1].stop, dtype=torch.float64, device=x.device)
        # Only a CPU's mask can be read without waiting for the device; elsewhere all operators are finished.
        on = active.tolist() if active is not None and active.device.type == "cpu" else [True] * len(self._ops)
        for i, op in enumerate(self._ops):
            if not on[i]:
                continue
            own = self.vectors[i]
            rows = product[targets[i]].unflatten(0, (own.stop - own.start, -1))  # a view: finished in place
            rows *= op.scale
            if op.identity:
                rows += op.identity * x[sources[i]].view_as(rows)
            if x_square is not None:
                _recur(
                    rows,
                    x_square[own],
                    None if previous is None else previous[targets[i]],
                    None if previous_square is None else previous_square[own],
                )
            square[own] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return product, square


class BatchedMasked:
    """Masks around one layer, which is applied to the vectors of all operators at once."""

    def __init__(self, ops: Sequence[Masked], vectors: int, dtype: torch.dtype) -> None:
        layer, count = ops[0].layer, len(ops)
        if any(op.layer is not layer for op in ops):
            raise ValueError("masked operators that are applied together must have one layer")
        self._layer = BatchedConvolutions([layer], vectors * count, dtype)
        self.dtype, self.device = dtype, self._layer.device
        self.domain = _slices([vectors * prod(layer.input_shape)] * count)
        self.range = _slices([vectors * prod(layer.output_shape)] * count)
        self.vectors = _slices([vectors] * count)
        self._before = self._factors([op.before for op in ops], layer.input_shape)
        self._after = self._factors([op.after for op in ops], layer.output_shape)
        self._unused = torch.zeros(vectors * count, dtype=torch.float64, device=self.device)

    def _factors(self, masks: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
        """Factors of elements as vectors have them, [operators, 1, pixels * C]; None where all are 1."""
        if all(mask is None for mask in masks):
            return None
        one = torch.ones(shape, dtype=torch.float64, device=self.device)
        stacked = torch.stack([one if mask is None else mask.to(one).expand(shape) for mask in masks])
        flat = stacked.flatten(2).mT.flatten(1) if len(shape) > 1 else stacked
        return flat.to(self.dtype)[:, None]

    def forward(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,  # all are applied: they share the layer's products
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, _ = self._layer.forward(self._times(x, self._before), out, self._unused)
        return self._finish(y, square, self._after, **history)

    def adjoint(
        self,
        x: Tensor,
        out: Tensor | None = None,
        square: Tensor | None = None,
        *,
        active: Tensor | None = None,
        **history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, _ = self._layer.adjoint(self._times(x, self._after), out, self._unused)
        return self._finish(y, square, self._before, **history)

    def _times(self, x: Tensor, factors: Tensor | None) -> Tensor:
        return x if factors is None else (x.view(len(self.vectors), -1, factors.shape[2]) * factors).view(-1)

    def _finish(
        self,
        product: Tensor,
        square: Tensor | None,
        factors: Tensor | None,
        x_square: Tensor | None = None,
        previous: Tensor | None = None,
        previous_square: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if factors is not None:
            product.view(len(self.vectors), -1, factors.shape[2]).mul_(factors)
        rows = product.view(len(self._unused), -1)
        if x_square is not None:
            _recur(rows, x_square, previous, previous_square)
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return product, squares if square is None else square.copy_(squares)


def _recur(rows: Tensor, x_square: Tensor, previous: Tensor | None, previous_square: Tensor | None) -> None:
    """A x / ||x|| - (||x|| / ||previous||) previous from A x, in place, for the vectors in the rows."""
    length = x_square.sqrt()
    rows *= torch.where(length > 0, 1.0 / length, 0.0).to(rows.dtype)[:, None]
    if previous is not None and previous_square is not None:
        other = previous_square.sqrt()
        shift = torch.where(other > 0, length / other, 0.0).to(rows.dtype)
        rows -= shift[:, None] * previous.view_as(rows)

"""Contractions by torch.einsum: of two traced tensors, or of one and a constant, and sums and moves of one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fastlip.lipschitz import _interval_arithmetic as arithmetic
from fastlip.lipschitz._broadcast import spectral_norm
from fastlip.lipschitz._calls import Call
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._intervals import EPS, INF, Interval
from fastlip.lipschitz._registry import builds, missing_rule
from fastlip.lipschitz._rowwise import by_ends
from fastlip.lipschitz._steps import Step, in_graph, in_sample


@dataclass(frozen=True)
class _Axes:
    """The labels of a contraction by their part in it, so that it is a product of matrices for each of ``batch``.

    Attributes:
        operands: labels of both operands, in order.
        output: labels of the output, in order.
        batch: labels of both operands and the output.
        rows: labels of the first operand and the output.
        inner: labels of both operands, summed over.
        columns: labels of the second operand and the output.
        sizes: the size of each label.
    """

    operands: tuple[str, str]
    output: str
    batch: str
    rows: str
    inner: str
    columns: str
    sizes: dict[str, int]

    def count(self, labels: str) -> int:
        return math.prod(self.sizes[label] for label in labels)

    def matrices(self, t: Tensor, operand: int) -> Tensor:
        """An operand, summed over labels that only it has, as [batch, rows, inner] or [batch, inner, columns]."""
        labels = self.operands[operand]
        parts = (self.batch, self.rows, self.inner) if operand == 0 else (self.batch, self.inner, self.columns)
        for axis in reversed([i for i, label in enumerate(labels) if label not in "".join(parts)]):
            t, labels = t.sum(axis), labels[:axis] + labels[axis + 1 :]
        order = "".join(parts)
        return t.permute([labels.index(label) for label in order]).reshape([self.count(part) for part in parts])

    def restored(self, product: Tensor) -> Tensor:
        """The output from its matrices, [batch, rows, columns]."""
        order = self.batch + self.rows + self.columns
        t = product.reshape([self.sizes[label] for label in order])
        return t.permute([order.index(label) for label in self.output])

    def summed(self, operand: int) -> int:
        """How many elements of an operand are added up before it is multiplied."""
        used = self.batch + self.rows + self.inner + self.columns
        return self.count("".join(label for label in self.operands[operand] if label not in used))


@dataclass(frozen=True)
class Contraction(Weighted):
    """Products of matrices, into which both operands are brought: A B - A' B' = (A - A') B + A' (B - B').

    Attributes:
        matrices: brings the magnitudes of each input, [1, *shape], to [batch, n, m].
        summed: the norm of what is added up in each input before.
    """

    name: ClassVar[str] = "contraction"
    matrices: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    summed: tuple[float, float]

    def weights(self, magnitudes: Sequence[Interval]) -> Sequence[float]:
        a, b = (spectral_norm(to(x.magnitude()), INF) for to, x in zip(self.matrices, magnitudes, strict=True))
        return [b * self.summed[0], a * self.summed[1]]


@builds(torch.einsum)
def _einsum(call: Call) -> Step | None:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if isinstance(equation, str) and len(operands) == 1 and isinstance(operands[0], fx.Node) and not call.kwargs:
        return _summed(call, equation, operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or call.kwargs:
        return None
    if not all(isinstance(t, (fx.Node, Tensor)) for t in operands):
        return None
    shapes = [call.values.shapes[t] if isinstance(t, fx.Node) else tuple(t.shape) for t in operands]
    axes = _axes_of(equation, shapes)
    if axes is None:
        raise missing_rule(f"einsum with {equation!r} on shapes {list(map(list, shapes))}", call.where)
    traced = [at for at, t in enumerate(operands) if isinstance(t, fx.Node)]
    inputs = [call.steps[operands[at]] for at in traced]
    constants = {at: t.detach() for at, t in enumerate(operands) if not isinstance(t, fx.Node)}
    summed = [math.sqrt(axes.summed(at)) * (1.0 + EPS) for at in range(2)]

    def apply(_: str, *given: Any) -> Tensor:
        now = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
        for at, constant in constants.items():
            now[at] = constant.to(next(t for i, t in enumerate(now) if i not in constants))
        return torch.einsum(equation, *now)

    def to_matrices(at: int) -> Callable[[Tensor], Tensor]:
        step = call.steps[operands[at]]
        return lambda t: axes.matrices(in_graph(t, step, call.values.batch), at)

    def ends(at: int, x: Interval) -> Interval:
        convert = to_matrices(at)
        low, high = (torch.stack([convert(row[None]) for row in end]) for end in (x.lower, x.upper))
        slack = EPS * (axes.summed(at) + 8) * torch.maximum(low.abs(), high.abs()).nan_to_num(0.0, 0.0, 0.0)
        return Interval(low - slack, high + slack) if axes.summed(at) > 1 else Interval(low, high)

    def interval(_: str, *given: Any) -> Interval:
        now = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
        both = []
        for at in range(2):
            if at in constants:
                matrix = axes.matrices(constants[at].double(), at)[None]
                both.append(Interval(matrix, matrix))
            else:
                both.append(ends(at, now[at]))
        product = arithmetic.matmul(both[0], both[1])
        low, high = (
            torch.cat([in_sample(axes.restored(row), step) for row in end]) for end in (product.lower, product.upper)
        )
        return Interval(low, high)

    if len(traced) == 2:
        by_matrices = (to_matrices(0), to_matrices(1))
        factor: Contraction | float = Contraction(by_matrices, (summed[0], summed[1]))
    else:
        (at,) = constants
        # The constant's own sums are in its matrices; those are exact but for rounding.
        matrices = axes.matrices(constants[at].double(), at)
        norm = torch.linalg.matrix_norm(matrices, 2).max().item() if matrices.numel() else 0.0
        if not math.isfinite(norm):
            raise ValueError(f"{call.where}: einsum with a constant that is not finite")
        factor = norm * (1.0 + 1e-12) * summed[1 - at]
    step = Step(call.where, call.name, inputs, factor, call.shape, apply=apply, interval=interval)
    return step


def _summed(call: Call, equation: str, operand: fx.Node) -> Step | None:
    """A sum over some axes, a permutation or a diagonal: each element of the output is a sum of as many elements."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    shape = call.values.shapes[operand]
    if not arrow or len(given) != len(shape) or not given.isalpha() or len(set(output)) != len(output):
        return None
    sizes = dict(zip(given, shape, strict=True))
    count = math.prod(size for label, size in sizes.items() if label not in output)
    factor = math.sqrt(count) * (1.0 + EPS) if count != 1 else 1.0

    def apply(_: str, *given: Any) -> Tensor:
        return torch.einsum(equation, *given)

    means = by_ends(call, lambda *args, **_: apply(*args) / max(count, 1), terms=max(count, 2))
    return Step(
        *(call.where, call.name, [call.steps[operand]], factor, call.shape),
        apply=apply,
        interval=lambda *args, **kwargs: arithmetic.scale(means(*args, **kwargs), float(count)),
        linear=True,
    )


def _axes_of(equation: str, shapes: Sequence[Sequence[int]]) -> _Axes | None:
    """The parts that labels have in a contraction of two operands; None where it is no such product of matrices."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    if len(operands) != 2 or not arrow:
        return None
    if any("..." in labels for labels in operands):
        counts = [len(s) - len(o.replace("...", "")) for s, o in zip(shapes, operands, strict=True) if "..." in o]
        if len(set(counts)) != 1 or "..." not in output:
            return None
        spare = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation)[: counts[0]]
        operands, output = [o.replace("...", spare) for o in operands], output.replace("...", spare)
    sizes: dict[str, int] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        if len(labels) != len(shape) or len(set(labels)) != len(labels):
            return None
        for label, size in zip(labels, shape, strict=True):
            if sizes.setdefault(label, size) != size:
                return None
    first, second = operands
    if len(set(output)) != len(output) or not set(output) <= set(first) | set(second):
        return None
    return _Axes(
        (first, second),
        output,
        batch="".join(x for x in first if x in second and x in output),
        rows="".join(x for x in first if x not in second and x in output),
        inner="".join(x for x in first if x in second and x not in output),
        columns="".join(x for x in second if x not in first and x in output),
        sizes=sizes,
    )

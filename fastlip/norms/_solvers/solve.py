"""From operators to intervals: exact norms first, then the other operators by one iteration for all of them."""

from collections.abc import Sequence

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.composed import AnyOperator, Composed
from fastlip.norms._operators.operator import Operator, compute_frobenius
from fastlip.norms._operators.trim import as_applied, flatten
from fastlip.norms._options import ResolvedOptions
from fastlip.norms._solvers.exact import exact_norm
from fastlip.norms._solvers.iterated import iterated_norms
from fastlip.norms._solvers.scaling import normalise, rescale


def solve(ops: Sequence[AnyOperator], options: ResolvedOptions) -> list[NormInterval]:
    """Norm intervals of operators with finite weights; the upper sides hold jointly with ``options.confidence``.

    Which operators are iterated, from how many start vectors, and at what share of 1 - confidence each, is settled
    before the first random number is drawn.

    Raises:
        ValueError: the method does not apply to one of the operators.
    """
    found: dict[int, NormInterval] = {}
    exponents = dict.fromkeys(range(len(ops)), 0)
    iterated: dict[int, AnyOperator] = {}

    def finish(index: int, interval: NormInterval) -> None:
        found[index] = rescale(interval, exponents[index], options.rtol)
        if options.progress is not None:
            options.progress(len(found), len(ops))

    applied = [as_applied(op) if isinstance(op, Operator) else op for op in ops]
    compute_frobenius(op for op in applied if isinstance(op, Operator))
    for index, op in enumerate(applied):
        if isinstance(op, Composed):
            iterated[index] = op
            continue
        if op.frobenius == 0.0:
            finish(index, NormInterval(0.0, 0.0, 1.0, "closed form", 0, True))
            continue
        if options.method not in ("svd", "lanczos", "power"):
            op = flatten(op)
        scaled, exponents[index] = normalise(op)
        interval = exact_norm(scaled, options)
        if interval is None:
            iterated[index] = scaled
        else:
            finish(index, interval)
    for index, interval in iterated_norms(iterated, options):
        finish(index, interval)
    return [found[index] for index in range(len(ops))]

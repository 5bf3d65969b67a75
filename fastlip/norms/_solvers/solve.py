"""From operators to intervals: exact norms first, then the other operators by one iteration for all of them."""

from collections.abc import Iterator, Sequence

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.composed import AnyOperator
from fastlip.norms._operators.operator import Operator, compute_frobenius
from fastlip.norms._operators.trim import as_applied, flatten
from fastlip.norms._options import ResolvedOptions
from fastlip.norms._solvers.exact import exact_norm
from fastlip.norms._solvers.iterated import iterated_norms
from fastlip.norms._solvers.scaling import normalise, rescale
from fastlip.norms._solvers.symbols import symbol_interval


def solve(ops: Sequence[AnyOperator], options: ResolvedOptions) -> list[NormInterval]:
    """Norm intervals of operators with finite weights; the upper sides hold jointly with ``options.confidence``.

    Which operators are iterated, from how many start vectors, and at what share of 1 - confidence each, is settled
    before the first random number is drawn.

    Raises:
        ValueError: the method does not apply to one of the operators.
    """
    found: dict[int, NormInterval] = {}
    for index, interval, exponent in _intervals(ops, options):
        found[index] = rescale(interval, exponent, options.rtol)
        if options.progress is not None:
            options.progress(len(found), len(ops))
    return [found[index] for index in range(len(ops))]


def _intervals(ops: Sequence[AnyOperator], options: ResolvedOptions) -> Iterator[tuple[int, NormInterval, int]]:
    """Positions in ``ops``, intervals, and the exponents of the powers of 2 that they are to be multiplied by."""
    iterated: dict[int, AnyOperator] = {}
    exponents: dict[int, int] = {}
    applied = [as_applied(op) if isinstance(op, Operator) else op for op in ops]
    compute_frobenius(op for op in applied if isinstance(op, Operator))
    for index, op in enumerate(applied):
        if not isinstance(op, Operator):
            iterated[index], exponents[index] = op, 0
            continue
        if op.frobenius == 0.0:
            yield index, NormInterval(0.0, 0.0, 1.0, "closed form", 0, True), 0
            continue
        fewer_taps = op if options.method in ("svd", "lanczos", "power") else flatten(op)
        scaled, exponent = normalise(fewer_taps)
        interval = exact_norm(scaled, options)
        if interval is None and options.method == "auto":
            interval = symbol_interval(scaled, options)
        if interval is None:
            iterated[index], exponents[index] = scaled, exponent
        else:
            yield index, interval, exponent
    for index, interval in iterated_norms(iterated, options):
        yield index, interval, exponents[index]

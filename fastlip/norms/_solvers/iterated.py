"""Intervals of operators that are iterated: upper sides by random start vectors, or deterministic ones."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.composed import AnyOperator, magnitude
from fastlip.norms._operators.masked import Masked
from fastlip.norms._operators.operator import Operator
from fastlip.norms._options import DETERMINISTIC, ResolvedOptions
from fastlip.norms._solvers.batches import iterate_in_batches
from fastlip.norms._solvers.deterministic import deterministic_upper, ring_sizes

#: Multiplications of a factorisation of all blocks of a ring that take about as long as a few steps of the iteration.
_CHEAP_RING = 1 << 30
#: Probability that the start vectors of a deterministic method's lower side may fail with; nothing rests on it.
_SHORT_ETA = 1e-3


def iterated_norms(ops: Mapping[int, AnyOperator], options: ResolvedOptions) -> Iterator[tuple[int, NormInterval]]:
    """Keys of ``ops`` and intervals of normalised operators, as they are done."""
    if not ops:
        return
    if options.method in DETERMINISTIC:
        yield from _deterministic(ops, options)
    else:
        yield from _probabilistic(ops, options)


def _probabilistic(ops: Mapping[int, AnyOperator], options: ResolvedOptions) -> Iterator[tuple[int, NormInterval]]:
    """Intervals by iteration from random start vectors; each operator has an equal share of 1 - confidence."""
    eta = (1.0 - options.confidence) / len(ops)
    method = "power" if options.method == "power" else "lanczos"
    for key, found in iterate_in_batches(ops, eta, options):
        # Where the sides contradict each other the starts were unlucky ones, and nothing is known of the upper side.
        upper = found.upper if found.upper >= found.lower else math.inf
        if isinstance(ops[key], Masked):  # its masks may leave nothing of the layer, of which no iteration learns
            upper = min(upper, magnitude(ops[key]))
        interval = NormInterval(found.lower, upper, 1.0 - eta, method, found.steps, False)
        if options.method == "auto" and interval.width > options.rtol:
            interval = _intersected(ops[key], interval, options)
        yield key, replace(interval, converged=interval.width <= options.rtol)


def _intersected(op: AnyOperator, interval: NormInterval, options: ResolvedOptions) -> NormInterval:
    """The interval with the ring's upper side where that is lower, and cheap to compute."""
    rings = ring_sizes(op) if isinstance(op, Operator) and op.kernel else []
    if not isinstance(op, Operator) or not rings:
        return interval
    side = min(op.weight.shape[0] // op.groups, op.weight.shape[1] * math.prod(op.stride))
    if math.prod(rings[0]) // math.prod(op.stride) * op.groups * side**3 > _CHEAP_RING:
        return interval
    try:
        upper = deterministic_upper(op, "ring", interval.lower, options.rtol, options.max_memory)
    except ValueError:  # the ring's blocks do not fit into memory
        return interval
    return replace(interval, upper=upper, confidence=1.0, method="ring") if upper < interval.upper else interval


def _deterministic(ops: Mapping[int, AnyOperator], options: ResolvedOptions) -> Iterator[tuple[int, NormInterval]]:
    """Deterministic upper sides, with the lower sides of one short iteration from a single start vector."""
    # That iteration's own upper side only decides when to stop; the lower side should rarely be early.
    short = replace(options, method="lanczos", starts=1, rtol=max(options.rtol / 4.0, sys.float_info.min))
    for key, found in iterate_in_batches(ops, _SHORT_ETA, short):
        op = ops[key]
        if not isinstance(op, Operator):
            raise ValueError(f"method {options.method!r} takes single convolutions only; use 'auto'")
        upper = deterministic_upper(op, options.method, found.lower, options.rtol, options.max_memory)
        converged = upper <= found.lower * (1.0 + options.rtol)
        yield key, NormInterval(found.lower, upper, 1.0, options.method, found.steps, converged)

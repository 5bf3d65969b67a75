"""The norms of operators that are put together by hand."""

from collections.abc import Sequence
from typing import Unpack

from fastlip._renamed import renamed_keywords
from fastlip.norms._interval import NormInterval
from fastlip.norms._operators.composed import AnyOperator, parts
from fastlip.norms._operators.operator import compute_frobenius, require_finite
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options
from fastlip.norms._solvers.solve import solve


@renamed_keywords(settings="options")
def operator_norms(
    ops: Sequence[AnyOperator], options: NormOptions | None = None, **keywords: Unpack[NormKeywords]
) -> list[NormInterval]:
    """Norm intervals of all operators, whose upper sides hold jointly with ``options.confidence``.

    Args:
        ops: operators, all on one device or not.
        options: how to compute the norms.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Raises:
        TypeError: ``ops`` are no operators, or an option is of the wrong type; the message names it.
        ValueError: an option is wrong, a weight holds NaN or infinite values, or the method does not apply to one of
            the operators.

    Example:
        >>> import torch
        >>> import fastlip
        >>> ops = [fastlip.norms.conv_operator(torch.randn(4, 3, 3, 3), size, padding=1) for size in (8, 16)]
        >>> small, large = fastlip.norms.operator_norms(ops, rtol=0.05)
    """
    chosen = chosen_options("operator_norms", options, keywords)
    if not isinstance(ops, Sequence) or not all(isinstance(op, AnyOperator) for op in ops):
        raise TypeError(f"ops must be a sequence of Operator, Composed and Masked, got {ops!r:.80}")
    every = list({id(part): part for op in ops for part in parts(op)}.values())
    compute_frobenius(every)
    for part in every:
        require_finite(part)
    return solve(ops, chosen.resolved(part.weight for part in every))

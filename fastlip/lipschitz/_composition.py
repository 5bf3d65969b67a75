"""How the constant up to a step follows from those up to its inputs, and tensors that disjoint parts make up again.

The squares of the changes of disjoint parts of a tensor add up to at most the square of its own. With the constant A_ji
from part i to the j-th of some tensors, these change by at most A d, where d has the changes of the parts, and all of
them together by at most ||A|| times the change of the tensor: max_i A_ii where each goes its own way, in place of the
root of a sum of squares. A sum of such tensors changes by at most the length of its only row A.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlip.lipschitz._combinations import Combination, Concatenation, Weighted, weighted_sum
from fastlip.lipschitz._log_arithmetic import exp10, log10, multiply
from fastlip.lipschitz._magnitudes import Sizes
from fastlip.lipschitz._steps import Step, between, origin_of

#: The end of each tighter part, with its origin and log10 of its constant.
Tighter = dict[Step, tuple[Step, float]]

#: Most parts of a tensor that are told apart.
_MOST_PARTS = 64


def step_total(
    step: Step, totals: Mapping[Step, float], logs: Mapping[Step, float], sizes: Mapping[Step, Sizes]
) -> float:
    """log10 of the constant up to a step with inputs.

    Args:
        step: the step.
        totals: log10 of the constants up to its inputs.
        logs: log10 of the constants of steps with one.
        sizes: of the inputs of steps whose constants depend on them.
    """
    inputs = [totals[source] for source in step.inputs]
    if isinstance(step.factor, Weighted):
        return weighted_sum(inputs, sizes[step].weights)
    return step.factor.constant(inputs, ()) if isinstance(step.factor, Combination) else multiply(logs[step], inputs[0])


def joined_parts(
    steps: Sequence[Step], logs: Mapping[Step, float], sizes: Mapping[Step, Sizes], *tighter: Tighter
) -> Tighter:
    """Each step that joins disjoint parts of a tensor, with the step of that tensor and log10 of the constant from it.

    Args:
        steps: all steps in topological order.
        logs: as for :func:`step_total`.
        sizes: as there.
        tighter: tighter parts, which may be inside.
    """
    order = {step: at for at, step in enumerate(steps)}
    selecting = [step.inputs[0] for step in steps if step.selected is not None]
    found: Tighter = {}
    for step in steps:
        if not selecting or not isinstance(step.factor, Combination) or len(set(step.inputs)) < 2:
            continue
        origin = origin_of(step, order)
        if selecting.count(origin) < 2:
            continue
        inside = between(origin, step, order)
        parts = _disjoint([s for s in inside if origin in s.inputs])
        if not 1 < len(parts) <= _MOST_PARTS:
            continue
        columns = []
        for part in parts:
            totals = {s: logs[s] if s in part else -math.inf for other in parts for s in other}
            for s in inside[:-1]:
                if s not in totals:
                    totals[s] = step_total(s, totals, logs, sizes)
                    # All ways to s lead through the origin of a tighter part, so that it serves all parts alike.
                    ends = (ends[s] for ends in (*tighter, found) if s in ends)
                    totals[s] = min([totals[s], *(multiply(totals[o], log) for o, log in ends if o in totals)])
            joins = type(step.factor) is Concatenation
            columns.append([totals[s] for s in step.inputs] if joins else [step_total(step, totals, logs, sizes)])
        found[step] = origin, _log_norm(columns)
    return found


def _disjoint(selections: Sequence[Step]) -> list[list[Step]]:
    """The selections in groups, no two of which share an element; none if there are other steps among them."""
    groups: list[tuple[Tensor, list[Step]]] = []
    for step in selections:
        if step.selected is None:
            return []
        elements, members, apart = step.selected, [step], []
        for other, its_members in groups:
            if bool((other & step.selected).any()):
                elements, members = elements | other, [*members, *its_members]
            else:
                apart.append((other, its_members))
        groups = [*apart, (elements, members)]
    return [members for _, members in groups]


def _log_norm(lines: Sequence[Sequence[float]]) -> float:
    """log10 of the 2-norm of a matrix, from log10 of the entries of its rows or columns; rounded upwards."""
    entries = [log for line in lines for log in line if log > -math.inf]
    largest = max(entries, default=-math.inf)
    if math.isinf(largest) or all(
        sum(log > -math.inf for log in line) <= 1 for line in (*lines, *zip(*lines, strict=True))
    ):
        return largest
    matrix = torch.tensor([[exp10(multiply(log, -largest)) for log in line] for line in lines], dtype=torch.float64)
    # The errors of the powers, and of the singular values of at most a few hundred rows and columns.
    return multiply(largest, log10(torch.linalg.matrix_norm(matrix, 2).item() * (1.0 + 1e-11)))

"""Parts of a network that are bounded as a whole: layers, sums and activations with known slopes, in dense matrices."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.lipschitz._combinations import Combination, Concatenation, Difference, Sum
from fastlip.lipschitz._multipliers import WORK, Activation, Map, SlopeNetwork, log10_bound, multiplications
from fastlip.lipschitz._registry import Diagonal
from fastlip.lipschitz._slopes import slope_range
from fastlip.lipschitz._steps import Step, between, is_its_operator, origin_of
from fastlip.norms import Operator
from fastlip.norms._models.layer_output import apply_operator
from fastlip.norms._solvers.float64_rounding import application_error

_EPS = torch.finfo(torch.float64).eps
#: Most elements of a matrix, and of a variable other than a region's input.
_ENTRIES, _ELEMENTS = 1 << 24, 2048


@dataclass(frozen=True, eq=False)
class Region:
    """Steps between two steps through the first of which all paths to the second lead.

    Attributes:
        origin: the step whose output is the region's input.
        end: the last step.
        steps: all steps after the origin up to the end, each after its inputs.
    """

    origin: Step
    end: Step
    steps: tuple[Step, ...]


def find_regions(steps: Sequence[Step], sums: bool) -> list[Region]:
    """The largest regions that can be bounded as a whole and may gain by it, given all steps in topological order.

    Args:
        steps: the network's steps.
        sums: whether a region may contain sums, differences and concatenations.
    """
    order = {step: at for at, step in enumerate(steps)}
    starts: dict[Step, Step] = {}
    for step in steps:
        if not step.inputs or not _is_covered(step) or (isinstance(step.factor, Combination) and not sums):
            starts[step] = step
            continue
        origin = origin_of(step, order)
        start = starts[origin]
        inside = between(origin, step, order)
        if len(inside) > 1 and not all(_is_covered(s) for s in inside):
            starts[step] = step
        elif _fits(start, between(start, step, order)):
            starts[step] = start
        else:
            starts[step] = origin if _fits(origin, inside) else step
    regions: list[Region] = []
    for step in steps:
        start = starts[step]
        users = [starts[user] for user in step.users if user in starts]  # others do not lead to the output
        if start is not step and (not users or any(user is not start for user in users)):
            found = _trimmed(start, step, order)
            if found is not None and found.end not in (region.end for region in regions):
                regions.append(found)
    return regions


def bound_regions(regions: Sequence[Region]) -> dict[Step, tuple[Step, float]]:
    """For the end of each region, its origin and log10 of its constant, where one could be certified."""
    bounds = {}
    share = WORK / max(len(regions), 1)
    for region in regions:
        if _work(region.origin, region.steps) > share:  # before any matrix is made
            continue
        network = _network(region)
        if network is None or multiplications(network) > share:
            continue
        log = log10_bound(network, share)
        if log < math.inf:
            bounds[region.end] = region.origin, log
    return bounds


def _trimmed(origin: Step, end: Step, order: Mapping[Step, int]) -> Region | None:
    """The region without activations at its ends, where they gain nothing; None if nothing is left to gain."""
    while end is not origin and not isinstance(end.factor, Combination) and not _is_map(end):
        (end,) = end.inputs
    if end is origin:
        return None
    steps = between(origin, end, order)
    while len([s for s in steps if origin in s.inputs]) == 1 and not _is_map(steps[0]) and len(steps[0].inputs) == 1:
        origin, steps = steps[0], steps[1:]
    layers = sum(map(_is_map, steps))
    together = any(isinstance(step.factor, Combination) for step in steps)
    active = any(_slopes(step) is not None for step in steps)
    if not layers or not (together or (active and layers > 1)):
        return None
    return Region(origin, end, tuple(steps))


def _fits(origin: Step, steps: Sequence[Step]) -> bool:
    """Whether the region's matrices, and the work that they take, are small enough."""
    size = math.prod(origin.shape)
    if size * size > _ENTRIES:  # the first map is applied to the identity
        return False
    variables = size
    for step in steps:
        elements = math.prod(step.shape)
        if _slopes(step) is not None:
            if elements > _ELEMENTS:
                return False
            variables = max(variables, elements)
        if elements * variables > _ENTRIES:
            return False
    return _work(origin, steps) <= WORK


def _work(origin: Step, steps: Sequence[Step]) -> float:
    """Multiplications that the factorisations of a region take at least."""
    active = sum(math.prod(step.shape) ** 3 for step in steps if _slopes(step) is not None)
    return float(min(math.prod(origin.shape), _ELEMENTS)) ** 3 + active


def _is_covered(step: Step) -> bool:
    if not all(part.alone for part in (step, *step.inputs)):
        return False
    factor, shapes = step.factor, [source.shape for source in step.inputs]
    if type(factor) in (Sum, Difference):
        return all(shape == step.shape for shape in shapes)
    if type(factor) is Concatenation:  # along the first axis
        if not step.shape or any(len(shape) != len(step.shape) for shape in shapes):
            return False
        return step.shape[0] == sum(shape[0] for shape in shapes) and all(s[1:] == step.shape[1:] for s in shapes)
    if isinstance(factor, Combination):
        return False
    return _is_same(step) or _only_moves(step) or _is_map(step) or _slopes(step) is not None


def _only_moves(step: Step) -> bool:
    return step.places is not None and math.prod(step.shape) == math.prod(step.inputs[0].shape)


def _is_same(step: Step) -> bool:
    return step.folded or (step.same and math.prod(step.shape) == math.prod(step.inputs[0].shape))


def _slopes(step: Step) -> tuple[float, float] | None:
    return None if step.folded or not isinstance(step.factor, (int, float)) else slope_range(step.module)


def _is_map(step: Step) -> bool:
    if step.linear:  # a function may take more of its node's arguments
        of_one = step.module is not None or step.pad is not None
        return of_one and step.places is None and not _is_same(step)
    if isinstance(step.factor, Diagonal):
        return step.exact
    return is_its_operator(step)


class _Row(NamedTuple):
    """How a tensor depends on a variable: ``matrix`` transposed, [variable, elements], or None for the identity."""

    matrix: Tensor | None
    error: float


_Rows = dict[int, _Row]


def _network(region: Region) -> SlopeNetwork | None:
    """The region in matrices; None if it is none."""
    sizes = [math.prod(region.origin.shape)]
    rows: dict[Step, _Rows] = {region.origin: {0: _Row(None, 0.0)}}
    activations: list[Activation] = []
    left = Counter(source for step in region.steps for source in step.inputs)
    for step in region.steps:
        given = [rows[source] for source in step.inputs]
        for source in step.inputs:
            left[source] -= 1
            if not left[source]:
                del rows[source]
        slopes = _slopes(step)
        if isinstance(step.factor, Combination):
            rows[step] = _combined(step, given, sizes)
        elif _is_same(step):
            rows[step] = given[0]
        elif step.places is not None:
            places = step.places()
            rows[step] = {j: _Row(_explicit(row, sizes[j]).matrix[:, places], row.error) for j, row in given[0].items()}
        elif slopes is None:
            rows[step] = {j: _mapped(step, row, sizes[j]) for j, row in given[0].items()}
        else:
            activations.append(Activation(_maps(given[0], sizes), *slopes))
            sizes.append(math.prod(step.shape))
            rows[step] = {len(activations): _Row(None, 0.0)}
    output = _maps(rows[region.end], sizes)
    return SlopeNetwork(sizes[0], activations, output)


def _maps(rows: _Rows, sizes: Sequence[int]) -> dict[int, Map]:
    return {j: Map(_explicit(row, sizes[j]).matrix.mT, row.error) for j, row in rows.items()}


def _explicit(row: _Row, size: int) -> Map:
    return Map(torch.eye(size, dtype=torch.float64) if row.matrix is None else row.matrix, row.error)


def _mapped(step: Step, row: _Row, size: int) -> _Row:
    """What a linear step makes of a tensor that depends on a variable."""
    before, error = _explicit(row, size)
    length = torch.linalg.vector_norm(before).item() * (1.0 + 1e-9)
    images = before.unflatten(1, step.inputs[0].shape)
    factor = step.factor
    if isinstance(factor, Operator):
        on_cpu = factor.with_weight(factor.weight.cpu().double())
        after = apply_operator(on_cpu, images)
        own, norm = application_error(on_cpu), on_cpu.absolute_bound
    elif isinstance(factor, Diagonal):
        scale = factor.scale.cpu().double()
        after = images * scale.view(-1, *(1,) * (images.dim() - 2))
        norm = scale.abs().max().item()
        own = _EPS * norm
    else:
        assert isinstance(factor, (int, float))
        after = step.apply(images)
        norm = float(factor)
        own = _EPS * (math.prod(step.inputs[0].shape) + 2) * norm
    return _Row(after.flatten(1), (norm * error + own * (length + error)) * (1.0 + 1e-9))


def _combined(step: Step, given: Sequence[_Rows], sizes: Sequence[int]) -> _Rows:
    """Sum, difference or concatenation (along the first axis of a sample)."""
    variables = dict.fromkeys(j for rows in given for j in rows)
    found: _Rows = {}
    for j in variables:
        present = [_explicit(rows[j], sizes[j]) if j in rows else None for rows in given]
        error = sum(row.error for row in present if row is not None)
        if isinstance(step.factor, Concatenation):
            parts = [
                row.matrix if row is not None else torch.zeros(sizes[j], math.prod(source.shape), dtype=torch.float64)
                for row, source in zip(present, step.inputs, strict=True)
            ]
            matrix = torch.cat(parts, dim=1)
        else:
            signs = (1.0, -1.0) if isinstance(step.factor, Difference) else (1.0,) * len(present)
            terms = [sign * row.matrix for sign, row in zip(signs, present, strict=True) if row is not None]
            matrix = sum(terms[1:], terms[0])
            error += _EPS * len(terms) * sum(torch.linalg.vector_norm(term).item() for term in terms)
        found[j] = _Row(matrix, error)
    return found

"""A sound upper bound on the Lipschitz constant of a whole network."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Unpack

import torch
from torch import Tensor, nn

from fastlip.lipschitz._bound_result import LipschitzBound, Part
from fastlip.lipschitz._combinations import Combination, Sum
from fastlip.lipschitz._composition import Tighter, joined_parts, step_total
from fastlip.lipschitz._counterexamples import refute, require_bounded
from fastlip.lipschitz._domain import Domain, domain_of
from fastlip.lipschitz._graph import Traced, fold_scales, trace
from fastlip.lipschitz._log_arithmetic import exp10, log10, multiply
from fastlip.lipschitz._magnitudes import Sizes, sizes_on
from fastlip.lipschitz._regions import bound_regions, find_regions
from fastlip.lipschitz._registry import Diagonal
from fastlip.lipschitz._replay import in_float64, replay
from fastlip.lipschitz._residual import Block, block_factor, block_operators, find_block
from fastlip.lipschitz._steps import Step, is_its_operator, origin_of, topological_order
from fastlip.norms import NormInterval, NormOptions, Operator, diagonal_norm, operator_norms
from fastlip.norms._models.eval_mode import eval_mode, require_eval
from fastlip.norms._models.inputs import checked_shape, example_input
from fastlip.norms._models.wrappers import bare_model
from fastlip.norms._options import NormKeywords, ResolvedOptions, chosen_options

#: Relative width of auxiliary norms, in units of that of the layers' norms.
_AUXILIARY = 4.0
#: Most pairs of rows whose distance is computed directly.
_PAIRS = 1 << 12
#: Most distances of rows that are in memory at once.
_DISTANCES = 1 << 22
#: Largest exponent of two whose square is far from the ends of the range.
_SQUARES = 400
#: Depth of nested branches up to which a bound shows its parts.
_DEEPEST = 100


def lipschitz_bound(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    bounds: tuple[float | Tensor, float | Tensor] | None = None,
    around: Tensor | None = None,
    radius: float | None = None,
    tight_residuals: bool = True,
    tight_chains: bool = True,
    check: bool = True,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> LipschitzBound:
    """Bound a network's L2 Lipschitz constant on inputs of one shape, by composition over its traced graph.

    Layers with weights contribute the upper side of their norm, with BatchNorm and input normalisation multiplied in
    beforehand. Activations and pooling contribute constants of their own. A sum contributes the sum of its branches, a
    concatenation the root of their sum of squares. Residual blocks of layers with monotone activations between them
    get a tighter constant than skip + branch (after Fazlyab et al. 2023). A product of two tensors contributes the
    constant of each times how large the other gets, by interval arithmetic over the set of inputs and by its distance
    from the value at that set's centre; softmax attention likewise, and LayerNorm bounds what it gives. The result is
    a product of worst cases: it is sound, and usually far above what any input attains.

    The bound describes the graph of one sample, by torch.fx along a run that knows all shapes, or by torch.export where
    that gives none or one with parts that have no rule. To make sure that the model does the same, each step of the
    graph is computed as its rule assumes, on random inputs one at a time, and compared with the model, including its
    hooks; and what the model makes of these inputs in batches must be what it makes of each alone. No two of them, or
    of those that a short search for a counter-example tries, may be further apart at any step than the bound allows. If
    the root module is in training mode, the bound is that of eval mode; otherwise every module keeps its mode.

    Args:
        model: a module that torch.fx can trace or torch.export export, also inside DataParallel or as ``torch.compile``
            returns it, from one tensor to one tensor, a tuple that begins with it, or a dict or an object that holds it
            as ``logits``; it is not changed.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        bounds: a box of inputs, (lower, upper), within which the bound holds: numbers, one for each channel, or tensors
            that broadcast to ``input_shape``; either may be infinite. Squeeze-and-excitation, other gates and attention
            without a normalisation before it have a bound on bounded sets of inputs only.
        around: one input, of shape ``input_shape``; with ``radius`` the bound holds between the inputs within this L2
            distance, and within ``bounds`` if these are given too.
        radius: the distance.
        tight_residuals: whether residual blocks get their tighter constant, which costs up to three more norms per
            block and half of 1 - ``confidence``. Has an effect only if ``method`` is "auto", "lanczos" or "power".
        tight_chains: whether small networks, and small parts of others, are bounded as a whole, by multipliers for the
            slopes of their activations (LipSDP); such a bound is certain. Parts with sums need ``tight_residuals``.
        check: whether to compare the traced graph with the model, and to look for a counter-example. Without it the
            bound is that of the graph: hooks on modules with a rule, for instance, are not seen.
        options: how to compute the layers' norms; ``options.confidence`` is the probability that the bound holds, and
            ``options.progress`` counts layers first and then the operators of residual blocks.
        keywords: fields of :class:`fastlip.norms.NormOptions`, in place of ``options``.

    Raises:
        TypeError: the model is not a module.
        ValueError: an argument is wrong, the model cannot be traced or run, something in it has no rule or no bound, or
            the model does something other than its traced graph; the message says what.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> bound = fastlip.lipschitz_bound(model, (6,))
        >>> print(bound.upper)
        >>> near = fastlip.lipschitz_bound(model, (6,), around=torch.rand(6), radius=0.1)
    """
    chosen = chosen_options("lipschitz_bound", options, keywords)
    bare, shape = bare_model(model), checked_shape(input_shape)
    domain = domain_of(shape, bounds, around, radius)
    resolved = chosen.resolved(bare.parameters())
    training = bare.training
    with eval_mode(bare):
        traced = trace(bare, shape)
        require_eval(bare, training, traced.modules())
        if check:
            replay(bare, shape, traced, domain)
        fold_scales(traced.last)
        bound, totals, ends = _bound(bare, traced, domain, resolved, tight_residuals, tight_chains)
        if check:
            require_bounded(topological_order(traced.last), totals, ends)
            refute(bare, shape, traced, domain, bound.log10_upper)
    return bound


def require_rules(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    bounds: tuple[float | Tensor, float | Tensor] | None = None,
    around: Tensor | None = None,
    radius: float | None = None,
) -> None:
    """Raise where :func:`lipschitz_bound` has no bound for a part of a network, without computing any norm.

    Args:
        model: as for :func:`lipschitz_bound`.
        input_shape: shape of one input without the batch axis, such as (3, 32, 32).
        bounds: a box of inputs, as for :func:`lipschitz_bound`.
        around: one input, as there.
        radius: the L2 distance from it, as there.

    Raises:
        TypeError: the model is not a module.
        ValueError: as for :func:`lipschitz_bound`; a bound that norms alone show to be wrong is not noticed here.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> fastlip.lipschitz.require_rules(model, (6,))  # raises where there is no bound
    """
    bare, shape = bare_model(model), checked_shape(input_shape)
    domain = domain_of(shape, bounds, around, radius)
    training = bare.training
    with eval_mode(bare):
        traced = trace(bare, shape)
        require_eval(bare, training, traced.modules())
        replay(bare, shape, traced, domain)
        # Whether anything is unbounded does not depend on how large the norms are.
        _sizes(bare, traced, None, domain)


def _sizes(model: nn.Module, traced: Traced, logs: dict[Step, float] | None, domain: Domain) -> dict[Step, Sizes]:
    """How large the inputs of steps are whose constants depend on it, computed in float64."""
    like = example_input(model, domain.centre.shape)
    with torch.no_grad(), in_float64(model, like):
        return sizes_on(traced, logs, domain, like.device)


def _bound(
    model: nn.Module,
    traced: Traced,
    domain: Domain,
    options: ResolvedOptions,
    tight_residuals: bool,
    tight_chains: bool,
) -> tuple[LipschitzBound, dict[Step, float], set[Step]]:
    """The bound, log10 of the bound from the model's input to each step, and the steps that end in a tighter part."""
    last = traced.last
    steps = topological_order(last)
    blocks = _blocks(steps) if tight_residuals and options.method in ("auto", "lanczos", "power") else []
    # Layers and blocks have start vectors of their own, and each family gets half of the probability of failure, before
    # it is known which operators need random vectors.
    share = replace(options, confidence=1.0 - (1.0 - options.confidence) / 2.0) if blocks else options
    padded = _padded_layers(steps)
    norms, of_padded = _norms(steps, [joined for _, joined in padded.values()], share)
    logs = {step: log10(_constant(step, norms)) for step in steps if not isinstance(step.factor, Combination)}
    sizes = _sizes(model, traced, logs, domain)
    plain, _ = _compose(steps, logs, sizes)
    # These norms are added to other terms, so that less accuracy suffices.
    tighter, chances = _tighten(blocks, plain, norms, replace(share, rtol=_AUXILIARY * options.rtol))
    chances += [interval.confidence for interval in of_padded if interval.confidence < 1.0]
    with_padding = {
        step: (origin, log10(interval.upper))
        for (step, (origin, _)), interval in zip(padded.items(), of_padded, strict=True)
    }
    regions = bound_regions(find_regions(steps, tight_residuals)) if tight_chains else {}
    parts = joined_parts(steps, logs, sizes, tighter, with_padding, regions)
    totals, origins = _compose(steps, logs, sizes, tighter, with_padding, regions, parts)
    given = [n.confidence for n in norms.values() if n.confidence < 1.0] + chances
    drawn = bool(chances) or any(isinstance(s.factor, Operator) and norms[s].confidence < 1.0 for s in norms)
    # Operators share 1 - confidence; each interval that a rule returns adds its own probability of failure.
    own = sum(1.0 - norms[s].confidence for s in norms if isinstance(s.factor, NormInterval))
    layers = [s for s in steps if isinstance(s.factor, (Operator, NormInterval))]
    bound = LipschitzBound(
        totals[last],
        max(0.0, (options.confidence if drawn else 1.0) - own) if given else 1.0,
        tuple(_PartTree(steps, totals, logs, norms, sizes, origins).parts(last, None)),
        reduce(multiply, (logs[s] for s in layers), 0.0),
        _margin(last, totals),
        plain[last],
        options.generator.initial_seed() if drawn else None,
        domain,
    )
    return bound, totals, set(origins)


def _padded_layers(steps: list[Step]) -> dict[Step, tuple[Step, Operator]]:
    """Layers whose input was padded with its own values, each with the step that was padded and both as one operator.

    The norm of padding comes of the elements that it repeats, of which a layer behind it rarely makes as much.
    """
    found: dict[Step, tuple[Step, Operator]] = {}
    for step in steps:
        before = step.inputs[0] if step.inputs and is_its_operator(step) else step
        if before.pad is None or before.factor == 1.0 or not isinstance(step.factor, Operator):
            continue
        joined, origin = before.pad.before(step.factor), before.inputs[0]
        if joined is not None and (joined.input_shape, joined.output_shape) == (origin.shape, step.shape):
            found[step] = origin, joined
    return found


def _norms(
    steps: list[Step], more: Sequence[Operator], options: ResolvedOptions
) -> tuple[dict[Step, NormInterval], list[NormInterval]]:
    """Intervals of all layers, and of ``more`` operators, jointly.

    The norm of a module that is used several times on one shape is computed once.
    """
    pending: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[Step]] = {}
    norms: dict[Step, NormInterval] = {}
    for step in steps:
        if isinstance(step.factor, NormInterval):
            norms[step] = step.factor
        elif isinstance(step.factor, Operator):
            same = step if step.scaled or step.module is None else step.module
            key = (id(same), step.inputs[0].shape, step.shape)
            pending.setdefault(key, []).append(step)
    operators = [group[0].factor for group in pending.values()]
    intervals = operator_norms([*(op for op in operators if isinstance(op, Operator)), *more], options)
    for group, interval in zip(pending.values(), intervals[: len(pending)], strict=True):
        norms |= dict.fromkeys(group, interval)
    return norms, list(intervals[len(pending) :])


def _constant(step: Step, norms: dict[Step, NormInterval]) -> float:
    if step in norms:
        return norms[step].upper
    if isinstance(step.factor, Diagonal):
        return diagonal_norm(step.factor.scale)
    assert isinstance(step.factor, (int, float))
    return float(step.factor)


def _blocks(steps: list[Step]) -> list[Block]:
    order = {step: at for at, step in enumerate(steps)}
    found = (find_block(step, origin_of(step, order)) for step in steps if isinstance(step.factor, Sum))
    return [block for block in found if block is not None]


def _tighten(
    blocks: list[Block], plain: dict[Step, float], norms: dict[Step, NormInterval], options: ResolvedOptions
) -> tuple[Tighter, list[float]]:
    """Each block's sum with its origin and log10 of its tighter constant; and the confidences of the norms used."""
    # The difference of two logarithms, each rounded upwards, may be too small.
    before = [
        exp10(math.nextafter(plain[block.layers[-1].inputs[0]] - plain[block.origin], math.inf)) for block in blocks
    ]
    finite = [i for i, block in enumerate(blocks) if math.isfinite(plain[block.total]) and math.isfinite(before[i])]
    requests = {i: block_operators(blocks[i], norms, before[i], options) for i in finite}
    intervals = iter(operator_norms([needed.operator for ops in requests.values() for needed in ops], options))
    tighter: Tighter = {}
    chances: list[float] = []
    for i, ops in requests.items():
        auxiliary = [next(intervals) for _ in ops]
        chances += [interval.confidence for interval in auxiliary if interval.confidence < 1.0]
        factor = block_factor(blocks[i], ops, norms, auxiliary, before[i])
        tighter[blocks[i].total] = (blocks[i].origin, log10(factor))
    return tighter, chances


def _compose(
    steps: list[Step], logs: dict[Step, float], sizes: dict[Step, Sizes], *tighter: Tighter
) -> tuple[dict[Step, float], dict[Step, Step]]:
    """log10 of the bound from the model's input to each step; and the origins of the tighter parts that made it less.

    Each of ``tighter`` has the origin and log10 of the constant of the part that ends in a step.
    """
    totals: dict[Step, float] = {}
    origins: dict[Step, Step] = {}
    for step in steps:
        totals[step] = step_total(step, totals, logs, sizes) if step.inputs else 0.0
        for origin, log in (part[step] for part in tighter if step in part):
            total = multiply(totals[origin], log)
            if total < totals[step]:
                totals[step], origins[step] = total, origin
    return totals, origins


def _margin(last: Step, totals: dict[Step, float]) -> float:
    """log10 of a bound for the difference of any two outputs."""
    bound = multiply(totals[last], log10(math.sqrt(2.0) * (1.0 + 1e-15)))
    layer = last
    while layer.same and len(layer.inputs) == 1 and layer.inputs[0].shape == last.shape:
        layer = layer.inputs[0]  # a constant that is added moves both outputs
    is_matrix = isinstance(layer.module, nn.Linear) and layer.exact and len(layer.shape) == 1
    if is_matrix and isinstance(layer.factor, Operator):
        rows = layer.factor.weight.double()
        distance = _largest_distance(rows)
        bound = min(bound, multiply(totals[layer.inputs[0]], log10(distance * (1.0 + 1e-12))))
    return bound


def _largest_distance(rows: Tensor) -> float:
    """Largest distance of two rows of a matrix [n, m] float64, rounded upwards; inf beyond the range."""
    if rows.numel() == 0:
        return 0.0
    _, exponent = math.frexp(rows.abs().max().item())
    if abs(exponent) > _SQUARES:  # squares would leave the range: halved or doubled, which is exact
        half = exponent // 2
        rows = rows * 2.0**-half * 2.0 ** (half - exponent)
        lost = math.sqrt(rows.shape[1]) * torch.finfo(torch.float64).tiny  # what underflows
        distance = _largest_distance(rows) + lost if exponent > 0 else _largest_distance(rows)
        return distance * 2.0**half * 2.0 ** (exponent - half)
    squares = rows.square().sum(1)
    # The expanded square suffers from cancellation: all pairs that may be the farthest are computed once more.
    slack = 4.0 * (rows.shape[1] + 4) * torch.finfo(torch.float64).eps * squares.max()
    first, found = 0, []
    while first < len(rows):  # in blocks, as there may be many classes
        last = first + max(1, _DISTANCES // (len(rows) - first))
        expanded = squares[first:last, None] + squares[first:] - 2.0 * rows[first:last] @ rows[first:].mT
        expanded.masked_fill_(torch.ones_like(expanded, dtype=torch.bool).tril(-1), -math.inf)  # pairs seen before
        values, places = expanded.flatten().topk(min(_PAIRS, expanded.numel()))
        found.append((values, first + places // expanded.shape[1], first + places % expanded.shape[1]))
        first = last
    values, one, other = (torch.cat(parts) for parts in zip(*found, strict=True))
    near = (values >= values.max() - 2.0 * slack).nonzero()[:, 0]
    exact = torch.linalg.vector_norm(rows[one[near]] - rows[other[near]], dim=1).max().item()
    return exact if len(near) < _PAIRS else math.sqrt(max((values.max() + slack).item(), 0.0))


class _PartTree:
    """The factors of a bound, as lists of parts that branch at sums and concatenations; each part appears once."""

    def __init__(
        self,
        steps: list[Step],
        totals: dict[Step, float],
        logs: dict[Step, float],
        norms: dict[Step, NormInterval],
        sizes: dict[Step, Sizes],
        origins: dict[Step, Step],
    ) -> None:
        self._origins = dict(origins)
        self._order = {step: at for at, step in enumerate(steps)}
        self._totals, self._logs, self._norms, self._sizes = totals, logs, norms, sizes
        self._shown: set[Step] = set()

    def parts(self, step: Step, stop: Step | None, depth: int = 0) -> list[Part]:
        """The parts after ``stop`` up to ``step``; branches nested too deeply are left out."""
        parts: list[Part] = []
        while step is not stop and step.inputs and step not in self._shown:
            first = self._origins.pop(step, None)
            if first is not None and self._is_joint(step, first, stop):
                inside = (tuple(self.parts(step, first, depth + 1)),) if depth < _DEEPEST else ()
                parts.append(Part(step.name, "joint bound", self._totals[step] - self._totals[first], None, inside))
                step = first
                continue
            self._shown.add(step)
            if isinstance(step.factor, Combination):
                origin = origin_of(step, self._order)
                inner = step.inputs if depth < _DEEPEST and len(step.inputs) > 1 else []
                branches = tuple(tuple(self.parts(source, origin, depth + 1)) for source in inner)
                branches = branches if any(branches) else ()
                total = self._totals[step]
                log = total - self._totals[origin] if math.isfinite(total) else total
                largest = self._sizes[step].largest if step in self._sizes else ()
                kind = step.factor.name if len(step.inputs) > 1 else step.kind
                parts.append(Part(step.name, kind, log, None, branches, largest))
                step = origin
            else:
                log = self._logs[step]
                if not step.folded and (log != 0.0 or step in self._norms):
                    kind = f"{step.kind} + scale" if step.scaled else step.kind
                    parts.append(Part(step.name, kind, log, self._norms.get(step)))
                step = step.inputs[0]
        return parts[::-1]

    def _is_joint(self, step: Step, first: Step, stop: Step | None) -> bool:
        """Whether steps after ``first`` up to ``step`` are shown as one factor, unlike a residual block's sum."""
        if not math.isfinite(self._totals[step]) or (stop is not None and self._order[first] < self._order[stop]):
            return False
        return not (isinstance(step.factor, Combination) and origin_of(step, self._order) is first)

"""Residual blocks, bounded more tightly than skip + branch.

Identity blocks: an activation with slopes in [0, 1] is half the identity plus a map with constant 1/2, a loop
transformation (M. Fazlyab, T. Entesari, A. Roy and R. Chellappa, "Certified robustness via dynamic margin
maximization and improved Lipschitz regularization", NeurIPS 2023). The linear part is then added to the skip connection
before any norm is computed.

Projection blocks: D x + C g(x) is [D, a C] applied to (x, g(x) / a), for every a > 0.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from fastlip.lipschitz._combinations import Difference, Sum
from fastlip.lipschitz._multipliers import covering_factor
from fastlip.lipschitz._steps import Step, is_its_operator
from fastlip.norms import Composed, NormInterval, NormOptions, Operator, simplify, trim
from fastlip.norms._solvers.symbols import takes_symbol

_EPS = torch.finfo(torch.float64).eps
_MONOTONE = (nn.CELU, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Softsign)
# Largest entries between which products of weights fit float32: composed operators are not normalised.
_ORDINARY = (1e-6, 1e6)


@dataclass(frozen=True, eq=False)
class Block:
    """A sum or difference of an identity or a projection, and a branch of layers with activations between them.

    Attributes:
        total: the step that adds or subtracts.
        origin: the step at which the branches begin.
        layers: the layers of the branch, in order.
        projection: the layer on the other branch, None for the identity.
        sign: -1 if identity and branch are subtracted, in either order.
    """

    total: Step
    origin: Step
    layers: tuple[Step, ...]
    projection: Step | None
    sign: float = 1.0


def find_block(step: Step, origin: Step) -> Block | None:
    """The residual block that ends in ``step``; None if it is not of a kind that is bounded here."""
    if not isinstance(step.factor, Sum) or len(step.inputs) != 2:
        return None
    ends = [_strip(source, origin) for source in step.inputs]
    for skip, branch in (ends, ends[::-1]):
        if skip is origin:
            layers = _layers(branch, origin)
            if layers is not None and len(layers) in (2, 3):
                return Block(step, origin, layers, None, -1.0 if isinstance(step.factor, Difference) else 1.0)
        elif is_its_operator(skip) and _strip(skip.inputs[0], origin) is origin and is_its_operator(branch):
            matrices = [simplify(op) for op in (skip.factor, branch.factor) if isinstance(op, Operator)]
            if all(not m.kernel and m.groups == 1 and _ordinary(m.weight) for m in matrices) and skip is not branch:
                return Block(step, origin, (branch,), skip)
    return None


def _strip(step: Step, origin: Step) -> Step:
    """The first step before ``step``, or itself, that changes its input."""
    while step is not origin and step.inputs and (step.folded or _keeps(step)):
        step = step.inputs[0]
    return step


def _keeps(step: Step) -> bool:
    """Whether all values stay where they are, but for a constant that is added."""
    return step.same and step.shape == step.inputs[0].shape


def _ordinary(weight: Tensor) -> bool:
    return _ORDINARY[0] <= weight.abs().max().item() <= _ORDINARY[1]


def _has_slopes_in_unit_interval(step: Step) -> bool:
    # Only these classes: a subclass with a rule of its own may do something else.
    module = step.module
    if type(module) is nn.LeakyReLU:
        return 0.0 <= module.negative_slope <= 1.0
    if type(module) is nn.ELU:
        return 0.0 <= module.alpha <= 1.0
    return type(module) in _MONOTONE


def _layers(step: Step, origin: Step) -> tuple[Step, ...] | None:
    """The layers between two steps, with one activation between neighbours; None if there is anything else."""
    found: list[Step] = []
    while True:
        if not is_its_operator(step) or not isinstance(step.factor, Operator) or not _ordinary(step.factor.weight):
            return None
        found.append(step)
        step = _strip(step.inputs[0], origin)
        if step is origin:
            return tuple(reversed(found))
        if not _has_slopes_in_unit_interval(step):
            return None
        step = _strip(step.inputs[0], origin)
        if step is origin:
            return None


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """An operator whose norm, or one that it is an upper bound of, :func:`block_factor` needs.

    Attributes:
        operator: the operator.
        excess: by how much the norm needed may exceed the operator's.
        least: a number that the norm needed may be as large as, whatever the operator's is.
    """

    operator: Composed | Operator
    excess: float = 0.0
    least: float = 0.0

    def upper(self, interval: NormInterval) -> float:
        """An upper bound on the norm needed, from the interval of the operator's."""
        return max(interval.upper + self.excess, self.least) * (1.0 + 1e-15)


def block_operators(
    block: Block, norms: dict[Step, NormInterval], before: float, options: NormOptions
) -> list[Auxiliary]:
    """The auxiliary operators whose norms :func:`block_factor` expects, in its order.

    Args:
        block: the block.
        norms: intervals of its layers.
        before: for a projection block, the constant from the origin to the input of the branch's last layer.
        options: how the operators' norms are going to be computed.
    """
    ops = tuple(trim(_operator(step)) for step in block.layers)
    bounds = tuple(norms[step].upper for step in block.layers)
    if block.projection is not None:
        d, c = simplify(_operator(block.projection)).weight.double(), simplify(ops[0]).weight.double()
        return [Auxiliary(Operator(torch.cat([d, _best_weight(d, c, before) * c], dim=1)))]
    if len(ops) == 2:
        return [Auxiliary(Composed(ops, bounds, scale=0.5 * block.sign, identity=1.0))]
    return [
        _beside_identity(ops, bounds, 0.25 * block.sign, options),
        _later(ops[1:], bounds[1:]),
        _earlier(ops[:2], bounds[:2]),
    ]


def block_factor(
    block: Block,
    operators: list[Auxiliary],
    norms: dict[Step, NormInterval],
    auxiliary: list[NormInterval],
    before: float,
) -> float:
    """Upper bound on the block's Lipschitz constant."""
    bounds = [norms[step].upper for step in block.layers]
    uppers = [needed.upper(interval) for needed, interval in zip(operators, auxiliary, strict=True)]
    if block.projection is not None:
        # The weight a is recovered from the operator that was bounded.
        joint = operators[0].operator
        assert isinstance(joint, Operator)
        c = simplify(_operator(block.layers[0])).weight.double()
        at = int(c.abs().argmax())
        a = (joint.weight[:, -c.shape[1] :].flatten()[at] / c.flatten()[at]).item()
        return uppers[0] * math.hypot(1.0, before / a) * (1.0 + 1e-12)
    if len(bounds) == 2:
        return (uppers[0] + 0.5 * bounds[0] * bounds[1]) * (1.0 + 1e-14)
    one, two, three = bounds
    linear, later, earlier = uppers
    return (linear + 0.25 * (later * one + three * earlier + three * two * one)) * (1.0 + 1e-14)


def _pointwise(op: Operator) -> Tensor | None:
    """The matrix that an operator applies at each pixel, [Cout, Cin] float64; None if it is none of that kind."""
    simple = bool(op.kernel) and op.groups == 1 and {*op.kernel, *op.stride} == {1}
    return op.weight.double().flatten(1) if simple and not any(map(any, op.padding)) else None


def _later(ops: tuple[Operator, ...], bounds: tuple[float, ...]) -> Auxiliary:
    """A pointwise map after another layer: R in its place, with R^T R at least its square, goes into that's weight."""
    matrix = _pointwise(ops[1])
    if matrix is None or ops[0].groups != 1 or len(matrix) < matrix.shape[1]:
        return Auxiliary(Composed(ops, bounds))
    factor = covering_factor(matrix.mT, 0.0).mT
    return _merged(ops[0], torch.tensordot(factor, ops[0].weight.double(), dims=([1], [0])), factor)


def _earlier(ops: tuple[Operator, ...], bounds: tuple[float, ...]) -> Auxiliary:
    """A pointwise map before another layer, likewise."""
    matrix = _pointwise(ops[0])
    if matrix is None or ops[1].groups != 1 or len(matrix) > matrix.shape[1]:
        return Auxiliary(Composed(ops, bounds))
    factor = covering_factor(matrix, 0.0)
    weight = torch.tensordot(ops[1].weight.double(), factor, dims=([1], [0])).movedim(-1, 1)
    return _merged(ops[1], weight, factor)


def _merged(layer: Operator, weight: Tensor, factor: Tensor) -> Auxiliary:
    """The layer with ``weight``, its product with ``factor`` in float64, in place of its own."""
    op = replace(layer, weight=_narrow(weight, layer))
    terms = (len(factor) + 2) * torch.linalg.matrix_norm(factor).item() * layer.absolute_bound
    rounding = torch.finfo(op.weight.dtype).eps * op.absolute_bound
    return Auxiliary(op, 1.01 * (rounding + torch.finfo(torch.float64).eps * terms))


def _beside_identity(
    ops: tuple[Operator, ...], bounds: tuple[float, ...], scale: float, options: NormOptions
) -> Auxiliary:
    """The identity beside three layers; on few of the channels only, if the others see nothing but the identity.

    With C_1 = T D for a contraction D, made orthonormal by more channels that are 0, the layers read D x alone. Of what
    they give, D C_3 = T^-1 C_1 C_3 = L_1 returns there, and of the rest only L_2^T L_2 = C_3^T C_3 - L_1^T L_1 counts.
    """
    first, last = _pointwise(ops[0]), _pointwise(ops[2])
    if first is None or last is None or len(last) <= first.shape[0] + last.shape[1]:
        return Auxiliary(Composed(ops, bounds, scale=scale, identity=1.0))
    into = covering_factor(first, 0.0)
    both = first @ last
    inside = torch.linalg.solve_triangular(into, both, upper=False)
    inverse = torch.linalg.solve_triangular(into, torch.eye(len(into)).to(into), upper=False)
    # The error of `inside`, by its residual: the products' and the inverse's own errors are covered twice.
    size = torch.linalg.matrix_norm(first).item() * torch.linalg.matrix_norm(last).item()
    residual = torch.linalg.matrix_norm(into @ inside - both).item() + 8.0 * _EPS * (len(last) + 16) * size
    error = 2.0 * torch.linalg.matrix_norm(inverse).item() * residual
    outside = _remainder(last, inside, error)
    if outside is None or not error <= 1e-4 * bounds[2]:
        return Auxiliary(Composed(ops, bounds, scale=scale, identity=1.0))
    # Relative to the norms of first and last, whose upper bounds are known.
    missing = error / bounds[2] + 1e-7
    stacked = _stacked(ops[1], into, inside, outside, scale, options)
    if stacked is not None:
        operator, weight, least = stacked
        # Of the outer part no more than this times its product counts; it is at least 1.
        rounding = torch.finfo(operator.weight.dtype).eps * operator.absolute_bound
        excess = weight * abs(scale) * math.prod(bounds) * missing * 4.0 + 1.01 * rounding
        return Auxiliary(operator, excess, least)
    nothing = torch.zeros_like(into)
    narrow = [
        replace(ops[0], weight=_narrow(torch.cat([into, nothing], dim=1), ops[0])),
        ops[1],
        replace(ops[2], weight=_narrow(torch.cat([inside, outside]), ops[2])),
    ]
    for op, bound in ((narrow[0], bounds[0]), (narrow[2], bounds[2])):
        missing += torch.finfo(op.weight.dtype).eps * op.frobenius / bound
    wider = tuple(bound * (1.0 + missing) for bound in bounds)
    excess = abs(scale) * math.prod(wider) * missing * (1.0 + missing)
    return Auxiliary(Composed(tuple(narrow), wider, scale=scale, identity=1.0), excess, 1.0)


def _remainder(last: Tensor, inside: Tensor, error: float) -> Tensor | None:
    """R with R^T R at least last^T last - L^T L for all L within ``error`` of ``inside``; None if rounding forbids."""
    gram = last.mT @ last - inside.mT @ inside
    trace = last.square().sum().item() + inside.square().sum().item()
    shift = 8.0 * (len(last) + len(gram) + 16) * _EPS * trace + 2.0 * error * (2.0 * math.sqrt(trace) + error) + 1e-290
    gram.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    return factor.mT if int(info) == 0 else None


def _stacked(
    middle: Operator, into: Tensor, inside: Tensor, outside: Tensor, scale: float, options: NormOptions
) -> tuple[Operator, float, float] | None:
    """The identity beside three layers as one convolution, where that is decomposed at once on a ring.

    Let P = 1 + s L_1 W T and Q = s L_2 W T for the middle layer W. For t > 1 the norm is at most t if ||P a||^2 + w^2
    ||Q a||^2 <= t^2 ||a||^2 for all a, with w^2 = t^2 / (t^2 - 1): the part of x that the layers do not read is then at
    its worst. As w falls with t, the norm is at most the larger of t and the norm of (P, w Q), for any t > 1.

    Returns:
        The convolution (P, w Q), w and t; None where an iteration of the three layers is faster, or t is near 1.
    """
    if middle.groups != 1 or {*middle.stride} != {1} or middle.input_shape != middle.output_shape:
        return None
    rows = len(inside) + len(outside)
    shape = replace(middle, weight=middle.weight.new_empty(rows, *middle.weight.shape[1:]))
    if any(left != right or 2 * left + 1 != e for (left, right), e in zip(middle.padding, middle.extent, strict=True)):
        return None  # the centre tap is not the identity's
    if not takes_symbol(shape, options):
        return None
    before = torch.tensordot(middle.weight.double(), into, dims=([1], [0])).movedim(-1, 1)
    weight = scale * torch.tensordot(torch.cat([inside, outside]), before, dims=([1], [0]))
    centre = tuple(k // 2 for k in middle.kernel)
    if any(k % 2 == 0 for k in middle.kernel):
        return None
    weight[(slice(0, len(inside)), slice(None), *centre)] += torch.eye(len(inside)).to(weight)
    # Where the layers' product is largest for waves that are the same, or alternate, along each axis; less is safe too.
    least = 0.0
    for signs in product((1.0, -1.0), repeat=len(middle.kernel)):
        symbol = weight
        for sign, k in zip(signs, middle.kernel, strict=True):
            symbol = (symbol.movedim(2, -1) * sign ** torch.arange(k).to(symbol)).sum(-1)
        least = max(least, torch.linalg.eigvalsh(symbol.mT @ symbol)[-1].item())
    least = 0.97 * math.sqrt(least)
    if least < 1.2:
        return None
    factor = least / math.sqrt(least * least - 1.0) * (1.0 + 1e-12)
    weight[len(inside) :] *= factor
    return replace(middle, weight=_narrow(weight, middle)), factor, least


def _narrow(weight: Tensor, like: Operator) -> Tensor:
    """A weight in the dtype of another operator's, which has at least the digits of float32, and its kernel's axes."""
    wide = torch.promote_types(like.weight.dtype, torch.float32)
    return weight.reshape(*weight.shape[:2], *like.kernel).to(wide)


def _operator(step: Step) -> Operator:
    assert isinstance(step.factor, Operator)
    return step.factor


def _best_weight(d: Tensor, c: Tensor, before: float) -> float:
    """The a that about minimises ||[d, a c]|| sqrt(1 + (before / a)^2); the bound is sound for every positive a."""
    first = math.sqrt(before * d.norm().item() / c.norm().item())
    candidates = [first * 2.0 ** (0.5 * i) for i in range(-3, 4)] if first > 0.0 else [1.0]
    weights = torch.tensor(candidates, dtype=torch.float64, device=d.device)
    v = torch.ones(len(candidates), len(d), dtype=torch.float64, device=d.device)
    for _ in range(15):
        v = (v @ d) @ d.mT + weights[:, None] ** 2 * ((v @ c) @ c.mT)
        growth = torch.linalg.vector_norm(v, dim=1)
        v = v / growth[:, None].clamp_min(1e-300)
    return candidates[int((growth * (1.0 + (before / weights) ** 2)).argmin())]

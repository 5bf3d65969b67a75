"""Lipschitz bounds of small networks of linear maps and activations with known slopes, by multipliers (LipSDP).

The input v_0 and the outputs v_1, ..., v_l of the activations are the variables. The argument of activation i is
z_i = sum_j Z_ij v_j, over j < i, and the network's output y = sum_j Y_j v_j. Of the changes of an elementwise function
with slopes in [a, b] it is known that (v - a z)(b z - v) >= 0. Weighted by multipliers lambda >= 0, a number for each
element, and added up, this proves ||y|| <= sqrt(rho) ||v_0|| where the matrix F of the quadratic form

    ||v_0||^2 - ||y||^2 / rho - sum_i (v_i - a z_i)^T diag(lambda_i) (b z_i - v_i)

is positive definite (M. Fazlyab, A. Robey, H. Hassani, M. Morari and G. J. Pappas, "Efficient and accurate estimation
of Lipschitz constants for deep neural networks", NeurIPS 2019). Here F is factorised one variable after the other, of
which only those stay in the front that are still needed. In a chain of layers that is the recursion
M_i = L_i - L_i W_i M_{i-1}^{-1} W_i^T L_i / 4 for slopes in [0, 1], from whose closed form the search starts (Y. Xu and
S. Sivaranjani, "ECLipsE: Efficient compositional Lipschitz constant estimation for deep neural networks", NeurIPS
2024); it descends on log lambda. Whatever it finds is a bound only because the factorisation of F, shifted by all
rounding errors, runs to its end (S. M. Rump, "Verification of positive definiteness", BIT 46, 2006).

Multiplied into the variables, roots s of the multipliers replace Z_ij by diag(s_i) Z_ij diag(1 / s_j) and lambda by 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.lipschitz._log_arithmetic import log10, multiply
from fastlip.norms._solvers.eigenvalues import largest_eigenvalue

#: Twice the unit roundoff of float64; with the factors below it errs on the safe side.
_EPS = torch.finfo(torch.float64).eps
#: Orders of the norm that replaces the largest eigenvalue while searching, and each one's share of the evaluations.
_ORDERS = ((4, 0.3), (16, 0.3), (64, 0.4))
#: Steps that the descent remembers, its longest step in log s, and the relative decrease at which it ends.
_MEMORY, _LONGEST, _SETTLED = 12, 1.0, 1e-4
#: Most evaluations of the search, and multiplications that it may take: a second on one core.
_EVALUATIONS, WORK = 80, 1.2e10
#: Least half-width of the slopes, relative to the largest: an activation without any would be a linear map.
_NARROWEST = 1e-3
#: Largest exponent of a power of 2 by which variables are scaled.
_FARTHEST = 900


class Map(NamedTuple):
    """A matrix [rows, columns] float64, and an upper bound on the 2-norm of its error."""

    matrix: Tensor
    error: float


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function of sum_j Z_ij v_j.

    Attributes:
        maps: the Z_ij by the number j of the variable, which is smaller than that of the activation's own output.
        low: lower bound on the function's slopes.
        high: upper bound on the function's slopes.
    """

    maps: Mapping[int, Map]
    low: float
    high: float

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(next(iter(self.maps.values())).matrix)

    @property
    def middle(self) -> float:
        """(low + high) / 2."""
        return 0.5 * (self.low + self.high)

    @property
    def radius(self) -> float:
        """(high - low) / 2, but no less than a small part of the largest slope."""
        return max(0.5 * (self.high - self.low), _NARROWEST * max(abs(self.low), abs(self.high)))

    @property
    def product(self) -> float:
        """Product of the bounds on the slopes, low and high as ``middle`` and ``radius`` have them."""
        return (self.middle - self.radius) * (self.middle + self.radius)


@dataclass(frozen=True, eq=False)
class SlopeNetwork:
    """Variable 0 is the input, variable i the output of ``activations[i - 1]``; ``output`` are the maps Y_j."""

    input_size: int
    activations: Sequence[Activation]
    output: Mapping[int, Map]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each variable."""
        return [self.input_size, *(activation.size for activation in self.activations)]


def multiplications(network: SlopeNetwork) -> float:
    """About how many multiplications one evaluation takes."""
    sizes = network.sizes
    ends = _last_uses(network)
    front, total, skipped = [0], 0.0, 0
    if _starts_from_gram(network):
        front, skipped = [1], 1
    for i, activation in enumerate(network.activations[skipped:], start=1 + skipped):
        size = sum(sizes[j] for j in front)
        total += size**3 / 6.0 + size * activation.size * (size + activation.size) / 2.0
        front = [j for j in (*front, i) if ends[j] > i]
    return total


def log10_bound(network: SlopeNetwork, work: float = WORK) -> float:
    """log10 of an upper bound on the L2 Lipschitz constant, rounded upwards; inf where none could be certified.

    Args:
        network: the network.
        work: about how many multiplications the search may take beyond those of its start.
    """
    scaled = _normalised(network)
    if scaled is None:
        return math.inf
    balanced, exponent = scaled
    reduced = _reduced(balanced)
    start = _closed_form(reduced)
    if start is None:
        return math.inf
    # Forward and backward an evaluation takes about four times the multiplications of the factorisation.
    evaluations = min(_EVALUATIONS, int(work / (4.0 * multiplications(reduced) + 1.0)))
    # Without activations there is nothing to search for.
    searched = _descend(reduced, start, evaluations) if evaluations and len(start) > 1 else start
    best = _certified(reduced, searched)
    if not math.isfinite(best):
        return math.inf
    # The logarithm of 2 and its product each have an error of half a unit.
    power = math.nextafter(math.nextafter(exponent * math.log10(2.0), math.inf), math.inf) if exponent else 0.0
    return multiply(log10(math.sqrt(best) * (1.0 + _EPS)), power)


def _normalised(network: SlopeNetwork) -> tuple[SlopeNetwork, int] | None:
    """The network with variables multiplied by powers of 2, so that its matrices are of ordinary magnitude.

    Returns also the exponent of the power of 2 by which the bound is to be multiplied; None if the range of float64
    does not suffice.
    """
    exponents = [0]
    layers = []

    def scaled(maps: Mapping[int, Map]) -> tuple[dict[int, Map], int] | None:
        sizes = {
            j: torch.linalg.vector_norm(m.matrix / peak).item() * peak if (peak := _peak(m)) > 0.0 else 0.0
            for j, m in maps.items()
        }
        if not all(map(math.isfinite, sizes.values())):
            return None
        logs = [math.frexp(size)[1] - exponents[j] for j, size in sizes.items() if size > 0.0]
        own = -max(logs, default=0)
        shifts = {j: own - exponents[j] for j in maps}
        if any(abs(shift) > _FARTHEST for shift in shifts.values()):
            return None
        powers = {j: math.ldexp(1.0, shift) for j, shift in shifts.items()}
        return {j: Map(m.matrix * powers[j], m.error * powers[j]) for j, m in maps.items()}, own

    for activation in network.activations:
        found = scaled(activation.maps)
        if found is None:
            return None
        maps, own = found
        exponents.append(own)
        layers.append(Activation(maps, activation.low, activation.high))
    found = scaled(network.output)
    if found is None:
        return None
    return SlopeNetwork(network.input_size, layers, found[0]), -found[1]


def _peak(m: Map) -> float:
    return m.matrix.abs().max().item() if m.matrix.numel() else 0.0


def _reduced(network: SlopeNetwork) -> SlopeNetwork:
    """The network with an input and an output of no more elements than the maps from and to them have.

    If R R^T is at least Z Z^T, each change z = Z v is R q for some q that is no longer than v, and so R may replace Z.
    """
    if _starts_from_gram(network):
        return _with_narrow_output(network)
    first = [(i, activation.maps[0]) for i, activation in enumerate(network.activations) if 0 in activation.maps]
    size, layers, output = network.input_size, list(network.activations), dict(network.output)
    rows = sum(len(m.matrix) for _, m in first) + (len(output[0].matrix) if 0 in output else 0)
    if rows < size:
        tall = [m for _, m in first] + ([output[0]] if 0 in output else [])
        factor = covering_factor(torch.cat([m.matrix for m in tall]), _joint_error(tall))
        parts = iter(factor.split([len(m.matrix) for m in tall]))
        for i, _ in first:
            old = layers[i]
            layers[i] = Activation({**old.maps, 0: Map(next(parts), 0.0)}, old.low, old.high)
        if 0 in output:
            output[0] = Map(next(parts), 0.0)
        size = rows
    return _with_narrow_output(SlopeNetwork(size, layers, output))


def _starts_from_gram(network: SlopeNetwork) -> bool:
    """Whether the input is read by the first activation alone, so that Z Z^T takes the place of its map Z."""
    readers = [i for i, maps in enumerate((*(a.maps for a in network.activations), network.output)) if 0 in maps]
    return readers == [0] and bool(network.activations) and network.activations[0].product == 0.0


def _with_narrow_output(network: SlopeNetwork) -> SlopeNetwork:
    output = dict(network.output)
    wide = list(output.values())
    columns = [m.matrix.shape[1] for m in wide]
    if sum(columns) < len(wide[0].matrix):
        whole = torch.cat([m.matrix for m in wide], dim=1)
        factor = covering_factor(whole.mT, _joint_error(wide)).mT
        output = {j: Map(m, 0.0) for j, m in zip(output, factor.split(columns, dim=1), strict=True)}
    return SlopeNetwork(network.input_size, network.activations, output)


def _joint_error(maps: Sequence[Map]) -> float:
    return math.sqrt(sum(m.error**2 for m in maps)) * (1.0 + _EPS * len(maps))


def covering_factor(matrix: Tensor, error: float) -> Tensor:
    """A triangular R with R R^T at least M M^T for all M within ``error`` of ``matrix`` [n, m]; [n, n]."""
    return torch.linalg.cholesky(_covering_gram(matrix, error))


def _covering_gram(matrix: Tensor, error: float) -> Tensor:
    """A matrix that is at least M M^T for all M within ``error`` of ``matrix`` [n, m], by more than rounding."""
    n, m = matrix.shape
    gram = matrix @ matrix.mT
    trace = gram.diagonal().sum().item()
    size = math.sqrt(trace)
    gram.diagonal().add_(8.0 * (n + m + 16) * _EPS * trace + 2.0 * error * (2.0 * size + error) + 1e-290)
    return gram


class _Stage(NamedTuple):
    """How an activation joins the front, and which part of the front it is the last to need.

    Attributes:
        order: places that the front's elements are taken from first; None to leave them.
        front: variables of the front, in that order.
        maps: the activation's maps beside each other, [n, front]; of the first activation their Gram matrix [n, n], if
            the front is empty.
        dead: number of leading elements of the front that are eliminated.
        middle: of the slopes.
        product: of the bounds on the slopes.
    """

    order: Tensor | None
    front: tuple[int, ...]
    maps: Tensor
    dead: int
    middle: float
    product: float


class _Plan(NamedTuple):
    """The stages of all activations, and the output's maps over the front that they leave, [m, front].

    ``input_size`` is 0 if the first activation's stage stands for the input as well.
    """

    input_size: int
    stages: list[_Stage]
    front: tuple[int, ...]
    output: Tensor


def _last_uses(network: SlopeNetwork) -> list[int]:
    """For each variable, the last activation that reads it; for those that the output reads, one after the last."""
    ends = [0] * (len(network.activations) + 1)
    for i, maps in enumerate((*(a.maps for a in network.activations), network.output), start=1):
        for j in maps:
            ends[j] = i
    return ends


def _plan(network: SlopeNetwork) -> _Plan:
    sizes, ends = network.sizes, _last_uses(network)
    front: tuple[int, ...] = (0,)
    stages = []
    if _starts_from_gram(network):
        first, front = network.activations[0], (1,)
        stages.append(_Stage(None, (), _covering_gram(*first.maps[0]), 0, first.middle, 0.0))
    for i, activation in enumerate(network.activations[len(stages) :], start=1 + len(stages)):
        order = tuple(sorted(front, key=lambda j: ends[j] > i))
        places = None
        if order != front:
            starts = dict(zip(front, torch.tensor([0] + [sizes[j] for j in front]).cumsum(0).tolist(), strict=False))
            places = torch.cat([torch.arange(starts[j], starts[j] + sizes[j]) for j in order])
        dead = sum(sizes[j] for j in order if ends[j] <= i)
        maps = _beside(activation.maps, order, sizes, activation.size)
        stages.append(_Stage(places, order, maps, dead, activation.middle, activation.product))
        front = (*(j for j in order if ends[j] > i), i)
    rows = len(next(iter(network.output.values())).matrix)
    return _Plan(
        0 if stages and not stages[0].front else network.input_size,
        stages,
        front,
        _beside(network.output, front, sizes, rows),
    )


def _beside(maps: Mapping[int, Map], front: Sequence[int], sizes: Sequence[int], rows: int) -> Tensor:
    like = next(iter(maps.values())).matrix
    return torch.cat([maps[j].matrix if j in maps else like.new_zeros(rows, sizes[j]) for j in front], dim=1)


class _Eliminated(NamedTuple):
    """A front after an activation joined it and what it was the last to need has left it.

    Attributes:
        front: the matrix that is left.
        factor: Cholesky factor of the part that left; None if nothing did.
        rows: the inverse of ``factor`` times the coupling of that part with what is left, [left, front].
    """

    front: Tensor
    factor: Tensor | None
    rows: Tensor | None


def _ordered(stage: _Stage, front: Tensor) -> Tensor:
    return front if stage.order is None else front[stage.order][:, stage.order]


def _eliminate(stage: _Stage, front: Tensor, maps: Tensor, own: float = 1.0) -> _Eliminated | None:
    """The front after an activation joined it with the scaled ``maps`` and ``own`` times the identity.

    None where it is not positive definite.
    """
    if not stage.front:
        return _Eliminated(torch.diag(front.new_full((len(maps),), own)) - maps * (stage.middle**2 / own), None, None)
    front = _ordered(stage, front)
    if stage.product != 0.0:
        front = torch.addmm(front, maps.mT, maps, alpha=stage.product)
    coupling, dead = maps * -stage.middle, stage.dead
    joined = torch.diag(front.new_full((len(maps),), own))
    if dead < len(front):
        beside = coupling[:, dead:]
        joined = torch.cat([torch.cat([front[dead:, dead:], beside.mT], 1), torch.cat([beside, joined], 1)])
        coupling = torch.cat([front[dead:, :dead], coupling[:, :dead]])
    if not dead:
        return _Eliminated(joined, None, None)
    factor, info = torch.linalg.cholesky_ex(front[:dead, :dead])
    if int(info):
        return None
    rows = torch.linalg.solve_triangular(factor, coupling.mT, upper=False)
    return _Eliminated(joined.addmm_(rows.mT, rows, alpha=-1.0), factor, rows)


def _pulled_back(stage: _Stage, maps: Tensor, found: _Eliminated, adjoint: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of a number by the front and by the maps given to :func:`_eliminate`, from that by its result."""
    if not stage.front:
        return adjoint, adjoint * -(stage.middle**2)
    own = len(maps)
    kept, dead = len(adjoint) - own, stage.dead
    to_front = adjoint.new_zeros(dead + kept, dead + kept)
    to_front[dead:, dead:] = adjoint[:kept, :kept]
    to_maps = adjoint.new_zeros(own, dead + kept)
    to_maps[:, dead:] = adjoint[kept:, :kept] * (-2.0 * stage.middle)
    if found.factor is not None:
        solved = torch.linalg.solve_triangular(found.factor.mT, found.rows, upper=True)  # [dead, kept + own]
        turned = solved @ adjoint
        to_front[:dead, :dead] = turned @ solved.mT
        to_front[:dead, dead:] = -turned[:, :kept]
        to_front[dead:, :dead] = -turned[:, :kept].mT
        to_maps[:, :dead] = turned[:, kept:].mT * (2.0 * stage.middle)
    if stage.product != 0.0:
        to_maps = torch.addmm(to_maps, maps, to_front, alpha=2.0 * stage.product)
    if stage.order is not None:
        unordered = torch.empty_like(to_front)
        unordered[stage.order[:, None], stage.order] = to_front
        to_front = unordered
    return to_front, to_maps


def _output_gram(front: Tensor, output: Tensor) -> _Eliminated | None:
    """Y M^-1 Y^T for the front's matrix M; None where that is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(front)
    if int(info):
        return None
    rows = torch.linalg.solve_triangular(factor, output.mT, upper=False)
    return _Eliminated(rows.mT @ rows, factor, rows)


def _columns(roots: Sequence[Tensor], front: Sequence[int]) -> Tensor:
    return roots[front[0]] if len(front) == 1 else torch.cat([roots[j] for j in front])


def _scaled(plan: _Plan, roots: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The maps of all activations and of the output, in variables multiplied by their roots.

    Each entry is the result of two operations.
    """
    maps = [
        own[:, None] * stage.maps / _columns(roots, stage.front) if stage.front else own[:, None] * stage.maps * own
        for own, stage in zip(roots[1:], plan.stages, strict=True)
    ]
    return maps, plan.output / _columns(roots, plan.front)


def _eliminated(plan: _Plan, maps: Sequence[Tensor], output: Tensor, own: float = 1.0) -> list[_Eliminated] | None:
    """The fronts after each activation, and the output's matrix; F is diminished by 1 - ``own`` times the identity.

    That matrix's largest eigenvalue, over ``own``, is the least rho for these maps. None where there is none.
    """
    front = torch.diag(output.new_full((plan.input_size,), own))
    found = []
    for stage, scaled in zip(plan.stages, maps, strict=True):
        eliminated = _eliminate(stage, front, scaled, own)
        if eliminated is None:
            return None
        front = eliminated.front
        found.append(eliminated)
    last = _output_gram(front, output)
    return None if last is None else [*found, last]


def _closed_form(network: SlopeNetwork) -> list[Tensor] | None:
    """Roots of the best multipliers that are equal within each activation, one activation after the other.

    With a the largest eigenvalue of the matrix z_i z_i^T that the multipliers before allow, m and r the middle and the
    radius of the slopes, that is 1 / (a r (r + |m|)), or 2 / a for slopes in [0, 1].
    """
    plan, activations = _plan(network), network.activations
    like = plan.output
    roots = [like.new_ones(network.input_size)]
    front = torch.eye(plan.input_size, dtype=like.dtype, device=like.device)
    for stage, activation in zip(plan.stages, activations, strict=True):
        maps = stage.maps / _columns(roots, stage.front) if stage.front else stage.maps
        allowed = _output_gram(_ordered(stage, front), maps) if stage.front else _Eliminated(maps, None, None)
        if allowed is None:
            return None
        largest = max(largest_eigenvalue(allowed.front[None], 1e-6)[1], 1e-200)
        # Without a middle the least multiplier is the limit where the matrix is singular.
        radius, middle = activation.radius, max(abs(activation.middle), _NARROWEST * activation.radius)
        root = 1.0 / math.sqrt(largest * radius * (radius + middle))
        roots.append(like.new_full((activation.size,), root))
        found = _eliminate(stage, front, root * maps if stage.front else root**2 * maps)
        if found is None:
            return None
        front = found.front
    return roots


def _descend(network: SlopeNetwork, start: list[Tensor], evaluations: int) -> list[Tensor]:
    """Roots of multipliers with a smaller bound, by L-BFGS on their logarithms.

    The largest eigenvalue, which is not smooth, is replaced by norms of growing order.
    """
    plan, sizes = _plan(network), network.sizes[1:]
    point = torch.cat(start[1:]).log()
    ones = start[0]
    for order, share in _ORDERS:
        left = int(share * evaluations)
        current = _slope(plan, ones, sizes, point, order)
        steps: list[tuple[Tensor, Tensor]] = []
        while left > 0 and current is not None:
            value, gradient = current
            direction = _quasi_newton(gradient, steps)
            slope = torch.dot(gradient, direction).item()
            length, following = 1.0, None
            while left > 0:
                left -= 1
                following = _slope(plan, ones, sizes, point + length * direction, order)
                if following is not None and following[0] <= value + 1e-4 * length * slope:
                    break
                length, following = 0.4 * length, None
            if following is None:
                break
            moved, turned = length * direction, following[1] - gradient
            if torch.dot(moved, turned) > 1e-12 * moved.norm() * turned.norm():
                steps = [*steps[1 - _MEMORY :], (moved, turned)]
            point, current = point + moved, following
            if value - current[0] < _SETTLED:
                break
    found = [ones, *point.exp().split(sizes)]
    return found if _rho(plan, found) < _rho(plan, start) else start


def _rho(plan: _Plan, roots: Sequence[Tensor]) -> float:
    """The least rho for these roots of multipliers, up to rounding; inf where there is none."""
    found = _eliminated(plan, *_scaled(plan, roots))
    return math.inf if found is None else largest_eigenvalue(found[-1].front[None], 1e-9)[1]


def _quasi_newton(gradient: Tensor, steps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the gradient times the inverse Hessian that the last steps and changes of the gradient suggest."""
    direction = -gradient
    if not steps:
        return direction * (0.3 * _LONGEST / gradient.abs().max().clamp_min(1e-300))
    weights = []
    for moved, turned in reversed(steps):
        weights.append(torch.dot(moved, direction) / torch.dot(moved, turned))
        direction = direction - weights[-1] * turned
    moved, turned = steps[-1]
    direction = direction * (torch.dot(moved, turned) / torch.dot(turned, turned))
    for (moved, turned), weight in zip(steps, reversed(weights), strict=True):
        direction = direction + moved * (weight - torch.dot(turned, direction) / torch.dot(moved, turned))
    return direction * (_LONGEST / direction.abs().max().clamp_min(_LONGEST))


def _slope(plan: _Plan, ones: Tensor, sizes: list[int], point: Tensor, order: int) -> tuple[float, Tensor] | None:
    """Logarithm of the output matrix's norm of ``order``, a power of 2, and its gradient in the logarithms of roots.

    None where there is no bound.
    """
    maps, output = _scaled(plan, [ones, *point.exp().split(sizes)])
    found = _eliminated(plan, maps, output)
    if found is None:
        return None
    last = found[-1]
    value, weights = _log_norm(last.front, order)
    assert last.factor is not None
    assert last.rows is not None
    solved = torch.linalg.solve_triangular(last.factor.mT, last.rows, upper=True)  # [front, m]
    turned = solved @ weights
    adjoint = -(turned @ solved.mT)
    gradients = [torch.zeros_like(ones), *(point.new_zeros(n) for n in sizes)]

    def subtract(columns: Tensor, front: Sequence[int]) -> None:
        for j, part in zip(front, columns.split([len(gradients[j]) for j in front]), strict=True):
            gradients[j] -= part

    subtract(2.0 * (turned * output.mT).sum(1), plan.front)
    for i in range(len(maps), 0, -1):
        stage, scaled = plan.stages[i - 1], maps[i - 1]
        adjoint, to_maps = _pulled_back(stage, scaled, found[i - 1], adjoint)
        to_maps = to_maps * scaled
        gradients[i] += to_maps.sum(1)
        if stage.front:
            subtract(to_maps.sum(0), stage.front)
        else:
            gradients[i] += to_maps.sum(0)
    gradient = torch.cat(gradients[1:])
    return (value, gradient) if math.isfinite(value) and bool(torch.isfinite(gradient).all()) else None


def _log_norm(gram: Tensor, order: int) -> tuple[float, Tensor]:
    """Logarithm of the norm of ``order``, a power of 2, of a positive semidefinite matrix; and its derivative."""
    trace = gram.trace()
    log, derivative, power = trace.log(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / trace, 1
    while power < order:
        # The derivative of tr G^p is p G^(p - 1), which is the product of G, G^2, G^4, ..., G^(p / 2).
        gram = gram / trace
        derivative = derivative @ gram
        gram, power = gram @ gram, 2 * power
        trace = gram.trace()
        log, derivative = log + trace.log() / power, derivative / trace
    return log.item(), derivative


def _certified(network: SlopeNetwork, roots: list[Tensor]) -> float:
    """A rho for which these multipliers prove the bound, rounding included; inf where they prove none."""
    plan = _plan(network)
    maps, output = _scaled(plan, roots)
    guess = _rho(plan, roots)
    if not 1e-280 < guess < 1e280:
        return math.inf
    output = output / math.sqrt(guess)
    shift = _shift(network, roots, maps, output, guess)
    found = _eliminated(plan, maps, output, 1.0 - shift) if shift < 0.1 else None
    if found is None:
        return math.inf
    gram = found[-1].front
    largest = largest_eigenvalue(gram[None], 1e-9)[1] / (1.0 - shift)
    for excess in (1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        # The output joins the front as the last variable, scaled by the root of rho.
        factor = largest * (1.0 + excess)
        last = gram / -factor
        last.diagonal().add_(1.0 - shift)
        if factor >= 0.5 and int(torch.linalg.cholesky_ex(last).info) == 0:
            return factor * guess * (1.0 + 4.0 * _EPS)
    return math.inf


def _shift(
    network: SlopeNetwork,
    roots: Sequence[Tensor],
    maps: Sequence[Tensor],
    output: Tensor,
    rho: float,
) -> float:
    """Bound on the 2-norm of all rounding errors of F and of its factorisation, and of those of the given maps.

    A factorisation that runs to its end is the exact one of a matrix that differs by at most K units of the trace, K
    being the number of products that are added up in an entry at most. That bound holds for every order of these sums,
    and is taken several times, as triangular solvers may multiply by inverses of diagonal blocks.
    """
    sizes = [*network.sizes, len(output)]
    # Twice the output: rho may be up to half of the guess.
    trace, entries = float(sum(sizes)), 2.0 * torch.linalg.vector_norm(output).item()
    given = 2.0 * _given(network.output, roots, 1.0) / math.sqrt(rho)
    layers = list(zip(network.activations, roots[1:], maps, strict=True))
    if _starts_from_gram(network):  # which contains the errors of the map
        first, _, scaled = layers.pop(0)
        entries += 2.0 * first.middle**2 * torch.linalg.vector_norm(scaled).item()
    for activation, own, scaled in layers:
        norm, middle, product = torch.linalg.vector_norm(scaled).item(), abs(activation.middle), abs(activation.product)
        error = _given(activation.maps, roots, own.max().item())
        trace += product * norm**2
        entries += middle * norm
        given += middle * error + product * error * (2.0 * norm + error)
    rounding = 8.0 * (2 * sum(sizes) + 16) * _EPS * (trace + entries)
    return rounding + given * (1.0 + 1e-9)


def _given(maps: Mapping[int, Map], roots: Sequence[Tensor], own: float) -> float:
    """Bound on the 2-norm of the errors of maps beside each other, scaled."""
    return own * math.sqrt(sum((m.error / roots[j].min().item()) ** 2 for j, m in maps.items()))

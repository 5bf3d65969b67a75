"""Lipschitz bounds of small networks of linear maps and activations with known slopes, by multipliers (LipSDP).

The input v_0 and the outputs v_1, ..., v_l of the activations are the variables. The argument of activation i is
z_i = sum_j Z_ij v_j, over j < i, and the network's output y = sum_j Y_j v_j. Of the changes of an elementwise function
with slopes in [a, b] it is known that (v - a z)(b z - v) >= 0. Weighted by multipliers lambda >= 0, a number for each
element, and added up, this proves ||y|| <= sqrt(rho) ||v_0|| where the matrix F of the quadratic form

    ||v_0||^2 - ||y||^2 / rho - sum_i (v_i - a z_i)^T diag(lambda_i) (b z_i - v_i)

is positive definite (M. Fazlyab, A. Robey, H. Hassani, M. Morari and G. J. Pappas, "Efficient and accurate estimation
of Lipschitz constants for deep neural networks", NeurIPS 2019). Here F is factorised one variable after the other, of
which only those stay in the front that are still needed. In a chain of layers that is the recursion
M_i = L_i - L_i W_i M_{i-1}^{-1} W_i^T L_i / 4 for slopes in [0, 1], which has a closed form (Y. Xu and S. Sivaranjani,
"ECLipsE: Efficient compositional Lipschitz constant estimation for deep neural networks", NeurIPS 2024).

Better multipliers come from the worst case that they cannot exclude, the dual of the semidefinite program: the largest
||Y V||_F over matrices V_j of a few columns each in place of the vectors v_j (S. Burer and R. D. C. Monteiro, "A
nonlinear programming algorithm for solving semidefinite programs via low-rank factorization", Math. Program. 95, 2003),
where ||V_0||_F = 1 and each row v of V_i lies in the ball around m z with the radius r ||z||, m and r being the middle
and the radius of the slopes. At a worst case v - m z points where the objective grows, and with the derivative g of
||Y V||_F^2 / 2 by v the multiplier is ||g|| / (r ||z|| rho). It is found by going there again and again; products of
the maps with a few columns are all that this takes, which is little beside a factorisation of F. As no worst case is
found exactly, multipliers between these and the best so far are tried. Whatever is found is a bound only because the
factorisation of F, shifted by all rounding errors, runs to its end (S. M. Rump, "Verification of positive
definiteness", BIT 46, 2006).

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
#: Columns of a worst case, iterations towards it between two trials of multipliers, and how many such rounds there are.
_COLUMNS, _ITERATIONS, _ROUNDS = 8, 40, 6
#: Parts of the way, in logarithms, from the best multipliers so far to those of the worst case: these one after the
#: other as long as the bound falls, or others if the first gives no bound.
_BEYOND, _BEFORE = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999), (0.75, 0.5, 0.25)
#: The search ends within this of the worst case's value, relative.
_CLOSE = 2e-3
#: Farthest that roots go in a round, in logarithms.
_APART = 8.0
#: Most multiplications that the search may take: a second on one core.
WORK = 1.2e10
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
    # Without activations there is nothing to search for.
    best = _certified(reduced, _searched(reduced, start, work) if len(start) > 1 else start)
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


def _ordered(stage: _Stage, front: Tensor) -> Tensor:
    return front if stage.order is None else front[stage.order][:, stage.order]


def _eliminate(stage: _Stage, front: Tensor, maps: Tensor, own: float = 1.0) -> Tensor | None:
    """The front after an activation joined it with the scaled ``maps`` and ``own`` times the identity.

    What it was the last to need has left. None where that part is not positive definite.
    """
    if not stage.front:
        return torch.diag(front.new_full((len(maps),), own)) - maps * (stage.middle**2 / own)
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
        return joined
    factor, info = torch.linalg.cholesky_ex(front[:dead, :dead])
    if int(info):
        return None
    rows = torch.linalg.solve_triangular(factor, coupling.mT, upper=False)
    return joined.addmm_(rows.mT, rows, alpha=-1.0)


def _output_gram(front: Tensor, output: Tensor) -> Tensor | None:
    """Y M^-1 Y^T for the front's matrix M; None where that is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(front)
    if int(info):
        return None
    rows = torch.linalg.solve_triangular(factor, output.mT, upper=False)
    return rows.mT @ rows


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


def _eliminated(plan: _Plan, maps: Sequence[Tensor], output: Tensor, own: float = 1.0) -> Tensor | None:
    """The output's matrix after all variables were eliminated; F is diminished by 1 - ``own`` times the identity.

    Its largest eigenvalue, over ``own``, is the least rho for these maps. None where there is none.
    """
    front: Tensor | None = torch.diag(output.new_full((plan.input_size,), own))
    for stage, scaled in zip(plan.stages, maps, strict=True):
        assert front is not None
        front = _eliminate(stage, front, scaled, own)
        if front is None:
            return None
    assert front is not None
    return _output_gram(front, output)


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
        allowed = _output_gram(_ordered(stage, front), maps) if stage.front else maps
        if allowed is None:
            return None
        largest = max(largest_eigenvalue(allowed[None], 1e-6)[1], 1e-200)
        # Without a middle the least multiplier is the limit where the matrix is singular.
        radius, middle = activation.radius, max(abs(activation.middle), _NARROWEST * activation.radius)
        root = 1.0 / math.sqrt(largest * radius * (radius + middle))
        roots.append(like.new_full((activation.size,), root))
        found = _eliminate(stage, front, root * maps if stage.front else root**2 * maps)
        if found is None:
            return None
        front = found
    return roots


def _searched(network: SlopeNetwork, start: list[Tensor], work: float) -> list[Tensor]:
    """Roots of multipliers with a smaller bound than ``start``, from the worst case; ``start`` if none is found."""
    plan = _plan(network)
    trial = multiplications(network) + 1.0
    worst = _WorstCase(network)
    best, least = start, _rho(plan, start)
    for _ in range(_ROUNDS):
        for _ in range(_ITERATIONS):
            worst.improve()
        work -= _ITERATIONS * worst.multiplications
        anchor, toward = best, worst.roots(best)
        for shares in (_BEYOND, _BEFORE):
            before = math.inf
            for share in shares:
                if work < trial:
                    return best
                work -= trial
                tried = [torch.lerp(a.log(), b.log(), share).exp() for a, b in zip(anchor, toward, strict=True)]
                rho = _rho(plan, tried)
                if rho < least:
                    best, least = tried, rho
                if rho >= before:
                    break
                before = rho
            if before < math.inf:
                break
        if least <= worst.value**2 * (1.0 + 2.0 * _CLOSE):
            break
    return best


class _WorstCase:
    """A growing ||Y V||_F over what the multipliers of a network cannot exclude; see the module's docstring.

    Attributes:
        value: ||Y V||_F of the last iterate; up to rounding no multipliers prove a smaller bound.
        multiplications: about how many an iteration takes.
    """

    def __init__(self, network: SlopeNetwork) -> None:
        self._network = network
        generator = torch.Generator().manual_seed(0)  # no bound rests on it
        like = next(iter(network.output.values())).matrix
        columns = [torch.randn(n, _COLUMNS, generator=generator, dtype=like.dtype) for n in network.sizes]
        #: V_0, and for each activation the directions of v - m z, rows of length 1.
        self._points = [x.to(like.device) for x in columns]
        self._multipliers: list[Tensor] = []
        self.value = 0.0
        maps = [m for maps in (*(a.maps for a in network.activations), network.output) for m in maps.values()]
        self.multiplications = 2.0 * _COLUMNS * sum(m.matrix.numel() for m in maps)

    def improve(self) -> None:
        """Go to where the objective grows."""
        activations, output = self._network.activations, self._network.output
        outputs, arguments = [self._points[0] / torch.linalg.vector_norm(self._points[0]).clamp_min(1e-300)], []
        directions = [_unit_rows(x) for x in self._points[1:]]
        for activation, direction in zip(activations, directions, strict=True):
            z = _applied(activation.maps, outputs)
            arguments.append(z)
            outputs.append(activation.middle * z + activation.radius * _lengths(z) * direction)
        y = _applied(output, outputs)
        self.value = torch.linalg.vector_norm(y).item()
        slopes = [torch.zeros_like(v) for v in outputs]

        def add(maps: Mapping[int, Map], by: Tensor) -> None:
            for j, m in maps.items():
                slopes[j].addmm_(m.matrix.mT, by)

        add(output, y)
        self._multipliers = []
        for i in range(len(activations), 0, -1):
            activation, slope, z, direction = activations[i - 1], slopes[i], arguments[i - 1], directions[i - 1]
            along = (slope * direction).sum(1, keepdim=True)
            add(activation.maps, activation.middle * slope + activation.radius * along * _unit_rows(z))
            self._multipliers.insert(0, (_lengths(slope) / (activation.radius * _lengths(z)))[:, 0])
        self._points = slopes

    def roots(self, near: Sequence[Tensor]) -> list[Tensor]:
        """Roots of the multipliers; those of ``near`` where a unit has none, and not too far from them elsewhere."""
        rho = max(self.value**2, 1e-300)
        found = [near[0]]
        for given, multiplier in zip(near[1:], self._multipliers, strict=True):
            ratio = (0.5 * (multiplier / rho).log() - given.log()).nan_to_num(0.0, _APART, -_APART)
            found.append(given * ratio.clamp(-_APART, _APART).exp())
        return found


def _applied(maps: Mapping[int, Map], outputs: Sequence[Tensor]) -> Tensor:
    first, *others = (m.matrix @ outputs[j] for j, m in maps.items())
    return sum(others, first)


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _unit_rows(rows: Tensor) -> Tensor:
    return rows / _lengths(rows).clamp_min(1e-300)


def _rho(plan: _Plan, roots: Sequence[Tensor]) -> float:
    """The least rho for these roots of multipliers, up to rounding; inf where there is none."""
    found = _eliminated(plan, *_scaled(plan, roots))
    return math.inf if found is None else largest_eigenvalue(found[None], 1e-9)[1]


def _certified(network: SlopeNetwork, roots: list[Tensor]) -> float:
    """A rho for which these multipliers prove the bound, rounding included; inf where they prove none."""
    plan = _plan(network)
    maps, output = _scaled(plan, roots)
    guess = _rho(plan, roots)
    if not 1e-280 < guess < 1e280:
        return math.inf
    output = output / math.sqrt(guess)
    shift = _shift(network, roots, maps, output, guess)
    gram = _eliminated(plan, maps, output, 1.0 - shift) if shift < 0.1 else None
    if gram is None:
        return math.inf
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

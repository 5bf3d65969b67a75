"""Upper bounds of the norms of matrices J + T D (I - S D)^-1 C, where the diagonal D is only known within bounds.

Such a matrix is the Jacobian of a network whose activations have slopes m + d, |d| <= delta: J, T, S and C belong to
the network with the slopes m, and D = diag(d). With multipliers lambda > 0 and the scaled matrices
M = [T; delta sqrt(lambda) S] / sqrt(lambda) and X = [J; delta sqrt(lambda) C], its norm is at most gamma wherever
||[M, X / gamma]|| <= 1 (the scaled small-gain theorem). Over all multipliers that is the neuron-wise LipSDP (M.
Fazlyab, A. Robey, H. Hassani, M. Morari and G. Pappas, "Efficient and accurate estimation of Lipschitz constants for
deep neural networks", NeurIPS 2019) of the units that D leaves open, with their slopes on the domain. Every choice is a
bound; a descent over their logarithms looks for a good one, and a Cholesky factorisation certifies the last one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip.lipschitz._intervals import EPS, INF

#: Step of the descent over logarithms, and the decay of its two averages (D. Kingma and J. Ba, "Adam", ICLR 2015).
_STEP, _FIRST, _SECOND = 0.4, 0.7, 0.9
#: Multiply-adds that the descent may spend on each block of a sample, and the most steps it takes.
_BUDGET, _MOST_STEPS = 1e7, 48
#: The descent ends once as many steps gain no sample more than this.
_PATIENCE, _PROGRESS = 6, 0.01
#: By how much a bound is raised until it is certified; the first ones are for values of the eigenvalue solver.
_SMALL_RAISES, _RAISES = (1e-8, 1e-5), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
#: Largest logarithm of a multiplier, and the largest difference of two.
_FARTHEST, _SPREAD = 300.0, 40.0
#: What the error of a column may become when it is divided by the root of a multiplier, and by how much a column that
#: is to be short is divided.
_MAGNIFIED, _SHORTENED = 1e-6, 1e4
#: Rows and columns up to so many times their error are rounding.
_ROUNDED = 1e3
#: What a bound is at least.
_TINIEST = 1e-200
#: Number of open units up to which units have guesses of their own, in two blocks and in more: with depth one
#: multiplier for each block is a worse guess.
_FEW_UNITS, _FEW_UNITS_DEEP = 96, 192
#: Side up to which the eigenvalue solver is the fastest way to the largest eigenvalue; steps of the iteration during
#: the descent and after it.
_SMALL, _RITZ_STEPS, _LAST_STEPS = 48, 6, 16
#: Elements of the scaled matrices of samples that are bounded together: larger ones leave the cache, and cost page
#: faults.
_CACHED = 1 << 19


@dataclass(frozen=True)
class OpenUnits:
    """Jacobians of B samples, as functions of the slopes of N units each.

    Attributes:
        outer: J, [B, m, d].
        left: T, [B, m, N].
        between: S, [B, N, N]; a unit reads earlier ones only.
        right: C, [B, N, d].
        delta: half-widths of the slopes, [B, N]; 0 for units that only fill the batch.
        reach: upper bounds on the norms of the units' gradients, [B, N]; only the choice of multipliers rests on them.
        blocks: the units of each activation, none of which reads another's of its own block.
        outer_error: bounds on the L2 norms of the errors of the columns of [J, T], [B, d + N].
        inner_error: of those of [C, S] in each block, [B, blocks, d + N].
    """

    outer: Tensor
    left: Tensor
    between: Tensor
    right: Tensor
    delta: Tensor
    reach: Tensor
    blocks: list[slice]
    outer_error: Tensor
    inner_error: Tensor


def largest_norm(units: OpenUnits) -> Tensor:
    """Upper bounds on the norms of the Jacobians, [B]; inf where none is found."""
    bound = units.delta.new_full((len(units.delta),), INF)
    for some in _alike(units):
        problem = _Problem(_taken(units, some))
        bound[some] = problem.certified(problem.descend(problem.start()))
    return bound


def _alike(units: OpenUnits) -> list[Tensor]:
    """Indices of samples to bound together: of about as many open units, and as many as fit into the cache."""
    m, d = units.outer.shape[1:]
    counts, order = (units.delta > 0.0).sum(1).sort(descending=True)
    groups, first, given = [], 0, counts.tolist()
    while first < len(given):
        size = m + given[first]
        last = first + max(1, _CACHED // (size * (size + d)))
        groups.append(order[first:last])
        first = last
    return groups


def _taken(units: OpenUnits, some: Tensor) -> OpenUnits:
    """Some of the samples, without the units that none of these has open."""
    delta, d = units.delta[some], units.outer.shape[2]
    opened = (delta > 0.0).any(0)
    chosen = opened.nonzero()[:, 0]
    columns = torch.cat([torch.arange(d, device=some.device), d + chosen])
    blocks, kept, start = [], [], 0
    for i, block in enumerate(units.blocks):
        if count := int(opened[block].sum()):
            blocks.append(slice(start, start + count))
            kept.append(i)
            start += count
    by_row, by_block = some[:, None], some[:, None, None]
    return OpenUnits(
        units.outer[some],
        units.left.mT[by_row, chosen].mT,
        units.between[by_block, chosen[:, None], chosen],
        units.right[by_row, chosen],
        delta[:, chosen],
        units.reach[by_row, chosen],
        blocks,
        units.outer_error[by_row, columns],
        units.inner_error[by_block, torch.tensor(kept, dtype=torch.long, device=some.device)[:, None], columns],
    )


class _Problem:
    """The scaled matrices of multipliers, and what follows from them.

    The units of the first block read none: their rows of M are 0. The rows of all matrices here are those of the
    outputs, then of the later units, then of the first block's; M is kept without the last ones.
    """

    def __init__(self, units: OpenUnits) -> None:
        self.units = units
        first = units.blocks[0].stop if units.blocks else 0
        self.m, self.first = units.outer.shape[1], first
        x = torch.cat([units.outer, units.right[:, first:], units.right[:, :first]], 1)
        self.size, self.d = x.shape[1:]
        self.read = self.size - first  # rows of M
        # The products below would under- or overflow for Jacobians that are far from 1.
        self.unit = x.abs().amax((1, 2)).clamp(1e-150, 1e150)
        self.x = x / self.unit[:, None, None]
        # With more units in the first block than inputs, their products are those of their columns.
        self.wide = first > self.d
        self.gram = None if self.wide else self.x @ self.x.mT
        self.rows = torch.cat([units.left, units.between[:, first:]], 1)
        self.open = units.delta > 0.0
        self.least, self.most = self._limits()
        self.vector, self.steps = _draw(min(self.size, self.d), x), _RITZ_STEPS

    def _limits(self) -> tuple[Tensor, Tensor]:
        """The least and the largest logarithms of multipliers, [B, N].

        Units that reach no output would best have the multiplier 0, by which the errors of their columns would be
        divided, and those that read nothing an infinite one, by which the errors of their block would be multiplied:
        it is enough that their columns become short.
        """
        units = self.units
        error, reach = units.outer_error[:, self.d :], torch.linalg.vector_norm(self.rows, dim=1)
        least = _limit(reach <= _ROUNDED * error, error / _MAGNIFIED, -_FARTHEST)
        widths = torch.tensor([b.stop - b.start for b in units.blocks], dtype=torch.long, device=error.device)
        of_block = torch.linalg.vector_norm(units.inner_error[:, : len(widths)], dim=2)
        error = of_block.repeat_interleave(widths, 1)
        read_nothing = torch.linalg.vector_norm(torch.cat([units.right, units.between], 2), dim=2) <= _ROUNDED * error
        return least, _limit(read_nothing, _SHORTENED * reach, _FARTHEST)

    def _scales(self, log: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of rows, [B, m + N], and of columns, [B, N]."""
        root = (0.5 * log).exp()
        by_unit = self.units.delta * root
        rows = [log.new_ones(len(log), self.m), by_unit[:, self.first :], by_unit[:, : self.first]]
        return torch.cat(rows, 1), torch.where(self.open, 1.0 / root, 0.0)

    def _m(self, by_row: Tensor, by_column: Tensor) -> Tensor:
        """M without the rows of the first block, [B, read, N]."""
        return self.rows * by_row[:, : self.read, None] * by_column[:, None]

    def evaluate(self, log: Tensor) -> tuple[Tensor, Tensor]:
        """The least gamma of multipliers, [B], inf where there is none, and the gradient of its square's logarithm.

        No bound rests on it.
        """
        by_row, by_column = self._scales(log)
        m = self._m(by_row, by_column)
        return self._evaluate(by_row, m, m @ m.mT)

    def _evaluate(self, by_row: Tensor, m: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        identity, r = _eye(square), self.read
        factor, info = torch.linalg.cholesky_ex(identity - square)
        fails = (info != 0) | ~square.flatten(1).isfinite().all(1)
        factor = torch.where(fails[:, None, None], identity, factor)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)

        def solved(t: Tensor) -> Tensor:
            """P^-1 t for rows [B, m + N, ...], where P P^T = I - M M^T."""
            return torch.cat([inverse @ t[:, :r], t[:, r:]], 1)

        if self.gram is None or _SMALL < self.size >= self.d:
            z = solved(self.x * by_row[..., None])
            top, right = self._largest(z.mT @ z)
            vector = (z @ right[..., None])[..., 0] / top.clamp_min(1e-300).sqrt()[:, None]
        else:
            half = solved(self.gram * by_row[:, :, None] * by_row[:, None])
            top, vector = self._largest(solved(half.mT))
        reads = (inverse.mT @ vector[:, :r, None])[..., 0]
        own = torch.cat([vector[:, r:], reads[:, self.m :]], 1)
        slope = own.square() - (m.mT @ reads[..., None])[..., 0].square()
        slope = slope / top.clamp_min(1e-300)[:, None]
        gamma = torch.where(fails, INF, top.clamp_min(0.0).sqrt() * self.unit)
        return gamma, torch.where(fails[:, None] | ~slope.isfinite(), 0.0, slope)

    def _largest(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues of symmetric matrices and their vectors; of large ones from the last such vectors."""
        if matrices.shape[1] <= _SMALL:
            values, vectors = torch.linalg.eigh((0.5 * (matrices + matrices.mT)).nan_to_num(0.0, 0.0, 0.0))
            return values[:, -1], vectors[:, :, -1]
        top, vector = _lanczos(matrices, self.vector, self.steps)
        # A little of another direction, in case that of the last multipliers is orthogonal to the next one's.
        mixed = vector + 1e-3 * _draw(vector.shape[1], self.x)
        self.vector = mixed / torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
        return top, vector

    def start(self) -> Tensor:
        """Logarithms of the best multipliers of a few guesses."""
        units = self.units
        if not units.delta.shape[1]:
            return units.delta
        guesses = []
        for log in (self._layerwise(), *_guesses(units)):
            log = torch.where(self.open & log.isfinite(), log, -INF)
            log = torch.minimum(log, self.most)
            least = torch.maximum(self.least, log.amax(1, keepdim=True).clamp(-_FARTHEST, _FARTHEST) - _SPREAD)
            guesses.append(torch.where(self.open, torch.maximum(log, least).clamp_max(_FARTHEST), 0.0))
        if len(guesses) == 1:
            return guesses[0]
        gammas = torch.stack([self.evaluate(log)[0] for log in guesses])
        return torch.stack(guesses)[gammas.argmin(0), torch.arange(len(self.x), device=self.x.device)]

    def _layerwise(self) -> Tensor:
        """Logarithms of one multiplier for each block, in closed form; they are always feasible.

        From the first block on, P bounds what G G^T can be for the Jacobian G of a block's arguments, and of all later
        ones and the outputs; with the multiplier 1 / (2 ||delta P delta||) for the block just passed this is the
        recursion of Y. Xu and S. Sivaranjani, "ECLipsE: Efficient compositional Lipschitz constant estimation for deep
        neural networks", NeurIPS 2024, for the units that are open.
        """
        units, m = self.units, self.m
        log = torch.zeros_like(units.delta)
        block, *later = units.blocks
        delta, outside, inside = units.delta[:, block], self.x[:, : self.read], self.x[:, self.read :]
        if self.gram is None:
            scaled = inside * delta[..., None]
            multiplier, factor = _halved(scaled.mT @ scaled)
            p = _gained(self.rows[..., block], multiplier, outside, factor)
        else:
            multiplier, factor = _halved(delta[:, :, None] * self.gram[:, self.read :, self.read :] * delta[:, None])
            across = self.gram[:, : self.read, self.read :] * (delta * multiplier.sqrt()[:, None])[:, None]
            p = self.gram[:, : self.read, : self.read] + _gained(self.rows[..., block], multiplier, across, factor)
        log[:, block] = multiplier.log()[:, None]
        rows = self.rows
        for block in later:
            delta, width = units.delta[:, block], block.stop - block.start
            own = slice(m, m + width)
            rows, rest = _without(rows, own), _without(p, own)
            multiplier, factor = _halved(delta[:, :, None] * p[:, own, own] * delta[:, None])
            across = rest[..., own] * (delta * multiplier.sqrt()[:, None])[:, None]
            log[:, block] = multiplier.log()[:, None]
            p = _without(rest.mT, own) + _gained(rows[..., block], multiplier, across, factor)
        top = torch.linalg.eigvalsh(p.nan_to_num(0.0, 0.0, 0.0))[:, -1].clamp_min(1e-300)
        return log + top.log()[:, None]

    def descend(self, log: Tensor) -> Tensor:
        """Logarithms of multipliers after a descent that never accepts worse ones."""
        cost = 3.0 * self.read**2 * self.size + 32.0 * self.size * min(self.size, self.d)
        steps = int(min(_MOST_STEPS, len(self.units.blocks) * _BUDGET / cost)) if bool(self.open.any()) else 0
        if not steps:
            return log
        best, slope = self.evaluate(log)
        best_log, step = log, torch.full_like(best, _STEP)
        first, second = torch.zeros_like(log), torch.zeros_like(log)
        last = best
        for i in range(1, steps + 1):
            if i % _PATIENCE == 0:
                if bool((best >= last * (1.0 - _PROGRESS)).all()):
                    break
                last = best
            first = _FIRST * first + (1.0 - _FIRST) * slope
            second = _SECOND * second + (1.0 - _SECOND) * slope.square()
            move = first / (1.0 - _FIRST**i) / ((second / (1.0 - _SECOND**i)).sqrt() + 1e-12)
            log = torch.maximum(torch.minimum(log - step[:, None] * move, self.most), self.least)
            log = torch.where(self.open, log, 0.0)
            gamma, slope = self.evaluate(log)
            # From where there is no bound, or a much worse one, go back and on with half the step.
            bad = ~(gamma <= 1.2 * best)
            better = gamma < best
            best_log = torch.where(better[:, None], log, best_log)
            best = torch.where(better, gamma, best)
            if bool(bad.any()):
                log = torch.where(bad[:, None], best_log, log)
                step = torch.where(bad, 0.5 * step, step)
                first = torch.where(bad[:, None], 0.0, first)
                slope = torch.where(bad[:, None], self.evaluate(log)[1], slope)
            elif i > steps // 2:
                step = step * 0.9
        return best_log

    def certified(self, log: Tensor) -> Tensor:
        """The least of a few raised values that a Cholesky factorisation proves, [B]; inf if it proves none.

        The errors of J, T, S and C lessen the norm that [M, X / gamma] may have.
        """
        units = self.units
        self.steps = _LAST_STEPS
        by_row, by_column = self._scales(log)
        m = self._m(by_row, by_column)
        square = m @ m.mT
        gamma, _ = self._evaluate(by_row, m, square)
        by_unit = units.delta * (0.5 * log).exp()
        weights = torch.stack([torch.ones_like(gamma), *(by_unit[:, block].amax(1) for block in units.blocks)], 1)
        error = weights[:, :, None] * torch.cat([units.outer_error[:, None], units.inner_error], 1)
        error = torch.linalg.vector_norm(error, dim=1) * (1.0 + 1e-6)
        outer_error = torch.linalg.vector_norm(error[:, : self.d], dim=1)
        inner_error = torch.linalg.vector_norm(error[:, self.d :] * by_column, dim=1)
        bound = torch.full_like(gamma, INF)
        on = torch.arange(len(gamma), device=gamma.device)
        for raise_by in (*_SMALL_RAISES, *_RAISES) if self.size <= _SMALL else _RAISES:
            tried = gamma[on] * (1.0 + raise_by) + 4.0 * outer_error[on] + _TINIEST
            lost = torch.hypot(inner_error[on], outer_error[on] / tried) * (1.0 + 1e-6)  # ||[dM, dX / gamma]||
            x = self.x[on] * (by_row[on] * (self.unit[on] / tried)[:, None])[..., None]
            proved = self._proved(square[on], x, lost) & tried.isfinite()
            bound[on[proved]] = tried[proved]
            on = on[~proved]
            if not len(on):
                break
        return bound

    def _proved(self, square: Tensor, x: Tensor, lost: Tensor) -> Tensor:
        """Whether ||[M, X]|| + lost <= 1 for M M^T and X, [B] bool, rounding included.

        With rho = (1 - lost)^2 and X = [X_0; X_1], X_1 of the first block, that is so if rho I - M M^T - X X^T is
        positive definite, or, eliminating X_1 from [[rho I - M M^T, X], [X^T, I]], if the matrix
        [[rho I - M_0 M_0^T, X_0], [X_0^T, I - X_1^T X_1 / rho]] is. A Cholesky factorisation succeeds for a matrix that
        rounding may have changed by the sums' errors (Higham 2002, section 3.5) and by that of the factorisation,
        (n + 1) units of the trace (S. M. Rump, BIT 46, 2006), which is at most n here.
        """
        rho, r = (1.0 - lost).clamp_min(0.0).square(), self.read
        outside, inside = x[:, :r], x[:, r:]
        if self.gram is None:
            columns = inside / rho.sqrt().clamp_min(1e-150)[:, None, None]
            inner = columns.mT @ columns
            # An error of X_0 is at most one unit of its Frobenius norm, which is below 1 or its square.
            moved = inner.diagonal(dim1=1, dim2=2).sum(1) + 1.0 + outside.square().sum((1, 2))
            upper = torch.cat([rho[:, None, None] * _eye(square) - square, outside], 2)
            matrix = torch.cat([upper, torch.cat([outside.mT, _eye(inner) - inner], 2)], 1)
        else:
            total = x @ x.mT
            total[:, :r, :r] += square
            moved = total.diagonal(dim1=1, dim2=2).sum(1)
            matrix = rho[:, None, None] * _eye(total) - total
        n = matrix.shape[1]
        moved = moved + square.diagonal(dim1=1, dim2=2).sum(1)
        rounding = 4.0 * EPS * ((self.d + self.size + self.first + 20) * moved + n * (n + 2.0))
        matrix = matrix - rounding[:, None, None] * _eye(matrix)
        _, info = torch.linalg.cholesky_ex(matrix)
        return (info == 0) & (lost < 1.0) & matrix.flatten(1).isfinite().all(1)


def _limit(where: Tensor, root: Tensor, otherwise: float) -> Tensor:
    """Limits of the logarithms of multipliers with such roots, where there is a reason for one."""
    return torch.where(where, 2.0 * root.log(), otherwise).clamp(-_FARTHEST, _FARTHEST)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _draw(size: int, like: Tensor) -> Tensor:
    """A fixed unit vector for each sample, [B, size]."""
    draws = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    return (draws / torch.linalg.vector_norm(draws)).expand(len(like), -1)


def _lanczos(matrices: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Largest Ritz values of symmetric matrices [B, n, n], n >= steps, and unit vectors, from unit vectors [B, n]."""
    basis, images = [], []
    for _ in range(steps):
        basis.append(v)
        w = (matrices @ v[..., None])[..., 0]
        images.append(w)
        rows = torch.stack(basis, 1)
        w = w - (rows.mT @ (rows @ w[..., None]))[..., 0]
        v = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-300)
    projected = (rows @ torch.stack(images, 2)).nan_to_num(0.0, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(0.5 * (projected + projected.mT))
    top = (vectors[:, None, :, -1] @ rows)[:, 0]
    return values[:, -1], top / torch.linalg.vector_norm(top, dim=1, keepdim=True).clamp_min(1e-300)


def _halved(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """A multiplier t of about 1 / (2 ||A||) for positive semidefinite A, [B, n, n], and the factor of I - t A."""
    scaled = scaled.nan_to_num(0.0, 0.0, 0.0)
    if scaled.shape[1] <= _SMALL:
        size = torch.linalg.eigvalsh(scaled)[:, -1]
    else:
        size, _ = _lanczos(scaled, _draw(scaled.shape[1], scaled), _RITZ_STEPS)
    multiplier = 0.5 / size.clamp_min(1e-200)
    factor, _ = torch.linalg.cholesky_ex(_eye(scaled) - multiplier[:, None, None] * scaled)
    return multiplier, factor


def _gained(reads: Tensor, multiplier: Tensor, across: Tensor, factor: Tensor) -> Tensor:
    """What a block adds to P: T T^T / t for what reads its units, and A (L L^T)^-1 A^T for what shares its inputs."""
    passed = torch.linalg.solve_triangular(factor, across.mT, upper=False)
    both = torch.cat([reads / multiplier.sqrt()[:, None, None], passed.mT], 2)
    return both @ both.mT


def _without(rows: Tensor, own: slice) -> Tensor:
    """All rows but some, of [B, rows, ...]."""
    return torch.cat([rows[:, : own.start], rows[:, own.stop :]], 1)


def _guesses(units: OpenUnits) -> list[Tensor]:
    """Logarithms of multipliers that would be best for one unit alone, if the norm were so and so large."""
    if units.delta.shape[1] > (_FEW_UNITS if len(units.blocks) <= 2 else _FEW_UNITS_DEEP):
        return []
    weights = (units.delta[..., None] * units.between.abs()).mT
    outer = torch.linalg.vector_norm(units.outer, dim=(1, 2)).clamp_min(1e-300)
    tau = torch.linalg.vector_norm(units.left, dim=1)
    # How much of a unit's output reaches the outputs: at most this, added up over all paths.
    paths = torch.linalg.solve_triangular(_eye(weights) - weights, tau[..., None], upper=True)[..., 0]
    best_for_one = paths.clamp_min(1e-300) / units.reach.clamp_min(1e-300) / units.delta * outer[:, None]
    return [(best_for_one * size).log() for size in (1.0, 3.0, 20.0)]

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
#: Multiply-adds that the descent may spend on a sample, and the most steps it takes.
_BUDGET, _MOST_STEPS = 1.5e8, 48
#: The descent ends once as many steps gain no sample more than this.
_PATIENCE, _PROGRESS = 6, 0.01
#: By how much a bound is raised until it is certified.
_RAISES = (1e-8, 1e-5, 1e-3, 1e-2, 0.1, 1.0)
#: Largest logarithm of a multiplier, and the largest difference of two.
_FARTHEST, _SPREAD = 300.0, 40.0
#: What a bound is at least.
_TINIEST = 1e-200
#: Number of open units up to which units have guesses of their own.
_FEW_UNITS = 192
#: Side up to which the eigenvalue solver is the fastest way to the largest eigenvalue; steps of the iteration during
#: the descent and after it.
_SMALL, _RITZ_STEPS, _LAST_STEPS = 48, 8, 30


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
    problem = _Problem(units)
    return problem.certified(problem.descend(problem.start()))


class _Problem:
    """The scaled matrices of multipliers, and what follows from them."""

    def __init__(self, units: OpenUnits) -> None:
        self.units = units
        self.m = units.outer.shape[1]
        x = torch.cat([units.outer, units.right], 1)
        self.size = x.shape[1]
        # The products below would under- or overflow for Jacobians that are far from 1.
        self.unit = x.abs().amax((1, 2)).clamp(1e-150, 1e150)
        x = x / self.unit[:, None, None]
        self.gram = x @ x.mT
        self.rows = torch.cat([units.left, units.between], 1)
        self.open = units.delta > 0.0
        draws = torch.randn(self.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
        self.other = (draws / torch.linalg.vector_norm(draws)).expand(len(x), -1)
        self.vector, self.steps = self.other, _RITZ_STEPS

    def _scales(self, log: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of rows, [B, m + N], and of columns, [B, N]."""
        root = (0.5 * log).exp()
        ones = log.new_ones(len(log), self.m)
        return torch.cat([ones, self.units.delta * root], 1), torch.where(self.open, 1.0 / root, 0.0)

    def _matrices(self, log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M, M M^T and X X^T (in units of ``unit`` squared)."""
        by_row, by_column = self._scales(log)
        m = self.rows * by_row[:, :, None] * by_column[:, None]
        return m, m @ m.mT, self.gram * by_row[:, :, None] * by_row[:, None]

    def evaluate(self, log: Tensor) -> tuple[Tensor, Tensor]:
        """The least gamma of multipliers, [B], inf where there is none, and the gradient of its square's logarithm."""
        return self._evaluate(*self._matrices(log))

    def _evaluate(self, m: Tensor, square: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        identity = torch.eye(self.size, dtype=m.dtype, device=m.device)
        factor, info = torch.linalg.cholesky_ex(identity - square)
        fails = (info != 0) | ~square.flatten(1).isfinite().all(1)
        factor = torch.where(fails[:, None, None], identity, factor)
        gram = torch.where(fails[:, None, None], 0.0, gram)
        top, vector = self._largest(factor, gram)
        u = torch.linalg.solve_triangular(factor.mT, vector[..., None], upper=True)
        weight = (u * (gram @ u)).sum((1, 2))
        slope = u[:, self.m :, 0].square() - (m.mT @ u)[..., 0].square()
        slope = slope / weight.clamp_min(1e-300)[:, None]
        gamma = torch.where(fails, INF, top.clamp_min(0.0).sqrt() * self.unit)
        return gamma, torch.where(fails[:, None] | ~slope.isfinite(), 0.0, slope)

    def _largest(self, factor: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The largest eigenvalue of P^-1 K P^-T and its vector; of large matrices by Lanczos from the last such vector.

        No bound rests on it.
        """
        if self.size <= _SMALL:
            half = torch.linalg.solve_triangular(factor, gram, upper=False)
            inner = torch.linalg.solve_triangular(factor, half.mT, upper=False)
            values, vectors = torch.linalg.eigh((0.5 * (inner + inner.mT)).nan_to_num(0.0, 0.0, 0.0))
            return values[:, -1], vectors[:, :, -1]
        v, basis, images = self.vector, [], []
        for _ in range(min(self.steps, self.size)):
            basis.append(v)
            w = gram @ torch.linalg.solve_triangular(factor.mT, v[..., None], upper=True)
            w = torch.linalg.solve_triangular(factor, w, upper=False)[..., 0]
            images.append(w)
            rows = torch.stack(basis, 1)
            w = w - (rows.mT @ (rows @ w[..., None]))[..., 0]
            v = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-300)
        projected = rows @ torch.stack(images, 2)
        values, vectors = torch.linalg.eigh(0.5 * (projected + projected.mT))
        top = (vectors[:, None, :, -1] @ rows)[:, 0]
        top = top / torch.linalg.vector_norm(top, dim=1, keepdim=True).clamp_min(1e-300)
        # A little of another direction, in case that of the last multipliers is orthogonal to the next one's.
        mixed = top + 1e-3 * self.other
        self.vector = mixed / torch.linalg.vector_norm(mixed, dim=1, keepdim=True)
        return values[:, -1], top

    def start(self) -> Tensor:
        """Logarithms of the best multipliers of a few guesses."""
        units = self.units
        weights = (units.delta[..., None] * units.between.abs()).mT
        tau = torch.linalg.vector_norm(units.left, dim=1)
        # How much of a unit's output reaches the outputs: at most this, added up over all paths.
        inverse = torch.eye(tau.shape[1], dtype=tau.dtype, device=tau.device) - weights
        paths = torch.linalg.solve_triangular(inverse, tau[..., None], upper=True)[..., 0]
        outer = torch.linalg.vector_norm(units.outer, dim=(1, 2)).clamp_min(1e-300)
        if not tau.shape[1]:
            return tau
        guesses = []
        for log in (self._layerwise(), *_guesses(paths, units, outer)):
            log = torch.where(self.open & log.isfinite(), log, -INF)
            # Units that reach no output would get multipliers by which rounding errors are divided.
            least = log.amax(1, keepdim=True).clamp(-_FARTHEST, _FARTHEST) - _SPREAD
            guesses.append(torch.where(self.open, torch.maximum(log, least), 0.0).clamp_max(_FARTHEST))
        if len(guesses) == 1:
            return guesses[0]
        gammas = torch.stack([self.evaluate(log)[0] for log in guesses])
        return torch.stack(guesses)[gammas.argmin(0), torch.arange(len(tau), device=tau.device)]

    def _layerwise(self) -> Tensor:
        """Logarithms of one multiplier for each block, in closed form; they are always feasible.

        From the first block on, P bounds what G G^T can be for the Jacobian G of a block's arguments, and of all later
        ones and the outputs; with the multiplier 1 / (2 ||delta P delta||) for the block just passed this is the
        recursion of Y. Xu and S. Sivaranjani, "ECLipsE: Efficient compositional Lipschitz constant estimation for deep
        neural networks", NeurIPS 2024, for the units that are open.
        """
        units, m = self.units, self.m
        p, log = self.gram.clone(), torch.zeros_like(units.delta)
        for block in units.blocks:
            own, later = slice(m + block.start, m + block.stop), slice(m + block.stop, None)
            delta = units.delta[:, block]
            scaled = delta[:, :, None] * p[:, own, own] * delta[:, None]
            size = torch.linalg.eigvalsh(scaled.nan_to_num(0.0, 0.0, 0.0))[:, -1].clamp_min(1e-200)
            multiplier = 0.5 / size
            log[:, block] = multiplier.log()[:, None]
            inner = torch.eye(delta.shape[1], dtype=p.dtype, device=p.device) - multiplier[:, None, None] * scaled
            factor, _ = torch.linalg.cholesky_ex(inner)
            for rows in (slice(0, m), later):  # P of what was passed is not read again
                reads = self.rows[:, rows, block] / multiplier.sqrt()[:, None, None]
                across = p[:, rows, own] * (delta * multiplier.sqrt()[:, None])[:, None]
                passed = torch.linalg.solve_triangular(factor, across.mT, upper=False)
                both = torch.cat([reads, passed.mT], 2)
                if rows.start == 0:
                    outer = both
                else:
                    p[:, rows, rows] += both @ both.mT
                    p[:, :m, rows] += outer @ both.mT
                    p[:, rows, :m] = p[:, :m, rows].mT
            p[:, :m, :m] += outer @ outer.mT
        top = torch.linalg.eigvalsh(p[:, :m, :m].nan_to_num(0.0, 0.0, 0.0))[:, -1].clamp_min(1e-300)
        return log + top.log()[:, None]

    def descend(self, log: Tensor) -> Tensor:
        """Logarithms of multipliers after a descent that never accepts worse ones."""
        cost = 6.0 * self.size**3
        steps = int(min(_MOST_STEPS, _BUDGET / cost)) if bool(self.open.any()) else 0
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
            log = torch.where(self.open, log - step[:, None] * move, 0.0)
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

        It succeeds for a matrix that rounding may have changed by the sums' errors (Higham 2002, section 3.5) and by
        that of the factorisation, (n + 1) units of the trace (S. M. Rump, BIT 46, 2006); the errors of J, T, S and C
        lessen the norm that [M, X / gamma] may have.
        """
        units, n = self.units, self.size
        self.steps = _LAST_STEPS
        m, square, gram = self._matrices(log)
        gamma, _ = self._evaluate(m, square, gram)
        by_row, by_column = self._scales(log)
        rows = [by_row[:, self.m + block.start : self.m + block.stop].amax(1) for block in units.blocks]
        weights = torch.stack([torch.ones_like(gamma), *rows], 1)
        error = weights[:, :, None] * torch.cat([units.outer_error[:, None], units.inner_error], 1)
        error = torch.linalg.vector_norm(error, dim=1) * (1.0 + 1e-6)
        d = units.right.shape[2]
        outer_error = torch.linalg.vector_norm(error[:, :d], dim=1)
        inner_error = torch.linalg.vector_norm(error[:, d:] * by_column, dim=1)
        length = units.right.shape[2] + m.shape[2] + n + 20
        identity = torch.eye(n, dtype=log.dtype, device=log.device)
        bound = torch.full_like(gamma, INF)
        for raise_by in _RAISES:
            tried = gamma * (1.0 + raise_by) + 4.0 * outer_error + _TINIEST
            relative = (self.unit / tried).square()
            total = square + relative[:, None, None] * gram
            trace = total.diagonal(dim1=1, dim2=2).sum(1)
            rounding = 4.0 * EPS * (length * trace + n * (n + 2.0))
            lost = torch.hypot(inner_error, outer_error / tried) * (1.0 + 1e-6)  # ||[dM, dX / gamma]||
            room = (1.0 - lost).clamp_min(0.0).square() - rounding
            _, info = torch.linalg.cholesky_ex(room[:, None, None] * identity - total)
            proved = (info == 0) & (room > 0.0) & total.flatten(1).isfinite().all(1) & tried.isfinite()
            bound = torch.where(proved & ~bound.isfinite(), tried, bound)
            if bool(bound.isfinite().all()):
                break
        return bound


def _guesses(paths: Tensor, units: OpenUnits, outer: Tensor) -> list[Tensor]:
    """Logarithms of multipliers that would be best for one unit alone, if the norm were so and so large."""
    if paths.shape[1] > _FEW_UNITS:  # the guess for whole blocks is better then
        return []
    best_for_one = paths.clamp_min(1e-300) / units.reach.clamp_min(1e-300) / units.delta * outer[:, None]
    return [(best_for_one * size).log() for size in (1.0, 3.0, 20.0)]

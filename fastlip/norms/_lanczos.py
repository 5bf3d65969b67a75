"""Golub-Kahan-Lanczos bidiagonalisation from several starts, with the Krylov certificate.

The recurrence A v_i = b_{i-1} u_{i-1} + a_i u_i, A^T u_i = a_i v_i + b_i v_{i+1} runs in float32 (or float64) without
re-orthogonalisation: the certificate needs none, and ghosts of converged Ritz values cost nothing here. What rounding
did is measured afterwards. F = A^T A V - V T - b_k v_{k+1} e_k^T, taken over all chains of an operator at once, is
applied in float64 to a few Gaussian vectors; with a share of eta of its own this bounds ||F||, whatever arithmetic ran.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fastlip.norms._certificate import Array, krylov_bound, overlap, ritz_values, sketch_scale, tridiagonal
from fastlip.norms._composed import AnyOperator, Batch, device_of, forward_error, magnitude, make_batch
from fastlip.norms._iterate import Iterate, Plan, draw_starts, norm_error

_SKETCH_SHARE = 0.1
_CHECK_EVERY = 3
_PATIENCE = 6
_ENDED = 1e-30


def lanczos_norms(ops: list[AnyOperator], plan: Plan) -> list[Iterate]:
    """Intervals for operators of one geometry; each upper side fails with probability at most ``plan.eta``."""
    count, chains = len(ops), plan.starts
    exact, batch = make_batch(ops, torch.float64), make_batch(ops, plan.dtype)
    device = device_of(ops[0])
    size = math.prod(ops[0].input_shape)
    # Rounding the weights to the plan's arithmetic is part of F, which is measured against the exact ones.
    v, moved = draw_starts(ops[0].input_shape, count, plan, device)
    overlaps = np.full((count, chains), overlap(size, plan.eta * (1.0 - _SKETCH_SHARE), chains) - moved)
    if overlaps.min() <= 0.0:
        raise ValueError(
            f"starts={chains} in {plan.dtype} cannot be certified at this confidence, since rounding the starts moves "
            "them by more than their least overlap; use starts=4 or dtype=torch.float64"
        )
    amount, scale = _sketches(plan, overlaps.min())
    sketches = torch.randn(
        (count, amount, plan.max_steps, chains),
        dtype=torch.float64,
        generator=plan.generator,
        device=plan.generator.device,
    ).to(device)

    axes = tuple(range(2, v.dim()))
    basis = [v]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    u = torch.zeros(())
    widths: list[float] = []
    for step in range(1, plan.max_steps + 1):
        image = batch.forward(v)
        u = torch.addcmul(image, betas[-1], u, value=-1.0) if betas else image
        alpha = torch.linalg.vector_norm(u, dim=axes, keepdim=True)
        u = u * _inverse(alpha)
        w = torch.addcmul(batch.adjoint(u), alpha, v, value=-1.0)
        beta = torch.linalg.vector_norm(w, dim=axes, keepdim=True)
        v = w * _inverse(beta)
        alphas.append(alpha)
        betas.append(beta)
        basis.append(v)
        if step % _CHECK_EVERY == 0:
            widths.append(_expected_width(alphas, betas, overlaps, plan.dtype, scale))
            # Rounding sets a floor, below which more steps do not help.
            stalled = len(widths) > _PATIENCE and min(widths[-_PATIENCE:]) > 0.98 * min(widths[:-_PATIENCE])
            if widths[-1] <= 0.97 * plan.rtol or stalled:
                break
    results, vectors = _finish(ops, exact, basis, _series(alphas), _series(betas), sketches, overlaps, scale)
    if plan.keep_vectors:
        return [result._replace(vector=vector) for result, vector in zip(results, vectors, strict=True)]
    return results


def _sketches(plan: Plan, smallest: float) -> tuple[int, float]:
    """How many Gaussian vectors to draw, and the scale that turns the largest ||F z|| into a bound on ||F||.

    Each costs one application in float64. Enough of them for the rounding expected of a usual number of steps to be a
    small part of the overlap, the more so the narrower the interval that is asked for.
    """
    share = 0.15 if plan.rtol >= 5e-3 else 0.05
    for amount in range(4, 17):
        scale = sketch_scale(plan.eta * _SKETCH_SHARE, amount)
        if _rounding(plan.dtype, 40 * plan.starts, scale) <= share * smallest:
            break
    return amount, scale


def _rounding(dtype: torch.dtype, columns: int, scale: float) -> float:
    """What the bound on ||F|| usually comes to, in units of sigma_1^2: two units of rounding in each column."""
    return 2.0 * torch.finfo(dtype).eps * math.sqrt(columns) / scale


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, and 0 where the chain has ended and only rounding is left."""
    return torch.where(norm > _ENDED, 1.0 / norm, 0.0)


def _series(values: list[Tensor]) -> Array:
    """Recorded coefficients as [P, b, k] float64."""
    stacked = torch.stack([x.flatten(1) for x in values], dim=2)
    return stacked.double().cpu().numpy()


def _coefficients(alpha: Array, beta: Array) -> tuple[Array, Array]:
    """Diagonal and off-diagonal of T = B^T B, [P, b, k] each; the last off-diagonal couples to v_{k+1}."""
    diagonal = alpha**2
    diagonal[..., 1:] += beta[..., :-1] ** 2
    return diagonal, alpha * beta


def _expected_width(
    alphas: list[Tensor], betas: list[Tensor], overlaps: Array, dtype: torch.dtype, scale: float
) -> float:
    """Relative width of the widest interval, with rounding guessed.

    It decides when to stop and nothing else. The Gaussian vectors are looked at once, after the last step.
    """
    diagonal, off = (x.reshape(-1, len(alphas)) for x in _coefficients(_series(alphas), _series(betas)))
    theta = ritz_values(diagonal, off)
    ritz = np.sqrt(np.maximum(theta[:, -1], 0.0))
    guess = ritz**2 * _rounding(dtype, diagonal.shape[1] * overlaps.shape[1], scale)
    upper = krylov_bound(theta, diagonal, off, np.ones(len(theta)), guess, overlaps.reshape(-1), 16)
    lower = ritz.reshape(overlaps.shape).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(upper.reshape(overlaps.shape).max(axis=1) / lower - 1.0, nan=0.0).max())


def _top_vector(theta: Array, diagonal: Array, off: Array) -> Array:
    """Eigenvector of one tridiagonal matrix for its largest eigenvalue, [k], by inverse iteration."""
    steps = len(diagonal)
    shift = theta[-1] + 1e-13 * max(theta[-1], 1e-30)
    matrix = shift * np.eye(steps) - tridiagonal(diagonal, off)
    vector = np.linspace(1.0, 2.0, steps)
    for _ in range(3):
        vector = np.linalg.solve(matrix, vector)
        vector = vector / np.linalg.norm(vector)
    return vector


def _finish(
    ops: list[AnyOperator],
    exact: Batch,
    basis: list[Tensor],
    alpha: Array,
    beta: Array,
    sketches: Tensor,  # [P, s, max_steps, b]
    overlaps: Array,
    scale: float,
) -> tuple[list[Iterate], Tensor]:
    """Evaluate the lower side on the best Ritz vectors, [P, *shape], and the upper side with its measured rounding."""
    count, chains, steps = alpha.shape
    diagonal, off = _coefficients(alpha, beta)
    theta = ritz_values(diagonal, off)
    ritz = np.zeros((count, 1, steps, chains))
    for i, chain in enumerate(theta[..., -1].argmax(axis=1)):
        ritz[i, 0, :, chain] = _top_vector(theta[i, chain], diagonal[i, chain], off[i, chain])
    device = sketches.device
    z = sketches[:, :, :steps]
    inner = torch.cat([z, torch.from_numpy(ritz).to(device)], dim=1)
    d = torch.from_numpy(diagonal).to(device).transpose(1, 2)[:, None]  # [P, 1, k, b]
    o = torch.from_numpy(off).to(device).transpose(1, 2)[:, None]
    expected = z.new_zeros(count, z.shape[1], steps + 1, chains)  # coefficients of V T z + b_k v_{k+1} z_k
    expected[:, :, :steps] = d * z
    expected[:, :, 1:] += o * z
    expected[:, :, : steps - 1] += o[:, :, :-1] * z[:, :, 1:]

    combined, target = _combine(basis, inner, expected)
    images = exact.forward(combined)
    axes = tuple(range(2, combined.dim()))
    lengths = torch.linalg.vector_norm(combined, dim=axes).cpu().numpy()
    stretch = torch.linalg.vector_norm(images, dim=tuple(range(2, images.dim()))).cpu().numpy()
    missed = exact.adjoint(images[:, :-1]) - target
    residuals = torch.linalg.vector_norm(missed, dim=axes).cpu().numpy()
    last = torch.linalg.vector_norm(basis[-1].double(), dim=axes).cpu().numpy()

    relative = norm_error(ops[0])
    results = []
    for i, op in enumerate(ops):
        slack, bound = forward_error(op), magnitude(op)
        ritz_length = lengths[i, -1]
        lower = (stretch[i, -1] / ritz_length * (1.0 - relative) - slack) if ritz_length > 0.0 else 0.0
        # Evaluating F z in float64 rounds too: the two applications, and the sums that form V z and V T z.
        size = np.abs(z[i].cpu().numpy()).sum(axis=(1, 2)).max()
        evaluation = size * (2.1 * slack * bound + 1e-15 * (steps * chains + 8) * bound**2)
        residual = (residuals[i].max() * (1.0 + relative) + evaluation) / scale
        bounds = krylov_bound(
            theta[i], diagonal[i], off[i], last[i] * (1.0 + relative), np.full(chains, residual), overlaps[i]
        )
        results.append(Iterate(max(float(lower), 0.0), float(bounds.max()), steps))
    return results, combined[:, -1]


def _combine(basis: list[Tensor], inner: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over steps and chains in float64: [P, s + 1, ...] of v_1 ... v_k, and [P, s, ...] of v_1 ... v_{k+1}."""
    shape = basis[0].shape[2:]
    combined = inner.new_zeros(*inner.shape[:2], math.prod(shape))
    target = inner.new_zeros(*expected.shape[:2], math.prod(shape))
    for i, v in enumerate(basis):
        columns = v.flatten(2).double()
        target.baddbmm_(expected[:, :, i], columns)
        if i < len(basis) - 1:
            combined.baddbmm_(inner[:, :, i], columns)
    return combined.unflatten(2, shape), target.unflatten(2, shape)

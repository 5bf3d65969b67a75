"""Upper bounds that hold with certainty: circular embeddings on a ring, Gram iteration, and Cholesky factorisation.

A zero-padded convolution is part of a circular one on any ring that is long enough for its two borders to share their
zeros, so the circular operator's norm is an upper bound. Its blocks, one per frequency, are small matrices. Sources:
H. Sedghi, V. Gupta and P. M. Long, "The singular values of convolutional layers", ICLR 2019, for the blocks without
stride; B. Delattre, Q. Barthelemy, A. Araujo and A. Allauzen, "Efficient bound of Lipschitz constant for convolutional
layers by Gram iteration", ICML 2023; S. M. Rump, "Verification of positive definiteness", BIT 46 (2006).
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastlip.norms._operators.dense import dense_matrix, entry_error
from fastlip.norms._operators.operator import Operator, matrix_entries

_EPS = torch.finfo(torch.float64).eps


def ring_sizes(op: Operator) -> list[tuple[int, ...]]:
    """Lengths per axis of rings the operator embeds in, multiples of the stride; empty if there is none.

    With zero padding these are the shortest ring and the next one, since neither is better for all kernels. With
    circular padding the input is its own ring where every window starts at a multiple of the stride around it. Other
    modes have no ring.
    """
    sizes = []
    for n, (left, right), e, s, m in zip(op.input_size, op.padding, op.extent, op.stride, op.output_size, strict=True):
        if op.padding_mode == "circular":
            if n % s or e > n or m * s > n:
                return []
            sizes.append(n)
        elif op.padding_mode == "zeros":
            # A crop shortens the input. Padding lengthens the ring, by the wider side only.
            inside = n + min(left, 0) + min(right, 0)
            shortest = max(inside + max(left, right, 0), e, m * s)
            sizes.append(-(-shortest // s) * s)
        else:
            return []
    if op.padding_mode == "circular":
        return [tuple(sizes)]
    return [tuple(m + extra * s for m, s in zip(sizes, op.stride, strict=True)) for extra in range(2)]


def ring_grams(op: Operator, sizes: tuple[int, ...], max_memory: int) -> tuple[Tensor, float]:
    """Gram matrices of a strided circular operator's blocks, [B, n, n] complex128, and a bound on their error.

    With stride s the frequencies w + 2 pi r / s alias: their blocks stand side by side, divided by the root of s per
    axis. Blocks of opposite frequencies are conjugate, so half of the last axis is enough.

    Raises:
        ValueError: the blocks do not fit into ``max_memory`` bytes.
    """
    axes, groups = len(sizes), op.groups
    coarse = [size // s for size, s in zip(sizes, op.stride, strict=True)]
    half = coarse[-1] // 2 + 1
    alias = math.prod(op.stride)
    rows, columns = op.weight.shape[0] // groups, op.weight.shape[1]
    count = groups * math.prod(coarse[:-1]) * half
    smaller = min(rows, alias * columns)
    needed = 16 * (2 * math.prod(sizes) * op.weight.shape[0] * columns + count * smaller**2)
    if needed > max_memory:
        raise ValueError(f"the blocks of method 'ring' need {needed:.1e} bytes; raise max_memory or use 'auto'")
    ring = op.weight.new_zeros(*op.weight.shape[:2], *sizes, dtype=torch.float64)
    places = [[j * d for j in range(k)] for k, d in zip(op.kernel, op.dilation, strict=True)]
    index = torch.meshgrid(*(torch.tensor(p, device=op.weight.device) for p in places), indexing="ij")
    taps: Any = (slice(None), slice(None), *index)
    ring[taps] = op.weight.double()
    spectrum = torch.fft.fftn(ring, dim=tuple(range(2, 2 + axes)))
    # Frequency f of an axis is coarse frequency f mod M / s and alias f // (M / s).
    for axis in range(axes):
        spectrum = spectrum.unflatten(2 + 2 * axis, (op.stride[axis], coarse[axis]))
    spectrum = spectrum.narrow(1 + 2 * axes, 0, half).unflatten(0, (groups, rows))
    # [g, o, i, r0, f0, r1, f1, ...] to [g, f..., o, r..., i]
    order = (0, *range(4, 4 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2), 2)
    blocks = spectrum.permute(order).flatten(2 + axes).flatten(0, axes) / math.sqrt(alias)
    if rows > alias * columns:
        blocks = blocks.mH
    largest = blocks.abs().square().sum((1, 2)).max().item()
    # The rounding of the transform and of the products is proportional to ||block||_F^2.
    error = _EPS * (8.0 * math.log2(2.0 * math.prod(sizes)) + 4.0 * blocks.shape[2] + 32.0) * largest
    return blocks @ blocks.mH, error


def dense_grams(op: Operator, max_memory: int) -> tuple[Tensor, float]:
    """Gram matrices of the operator itself, one per group, [groups, n, n] float64, and a bound on their error.

    Raises:
        ValueError: the matrices do not fit into ``max_memory`` bytes.
    """
    needed = 24 * matrix_entries(op)
    if needed > max_memory:
        raise ValueError(f"the matrix of method 'cholesky' needs {needed:.1e} bytes; raise max_memory or use 'auto'")
    matrices = dense_matrix(op)
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    largest = matrices.square().sum((1, 2)).max().item()
    error = _EPS * (matrices.shape[2] + 10 * math.prod(op.kernel) + 20) * largest
    return matrices @ matrices.mT, error


def cholesky_bound(grams: Tensor, error: float, start: float, rtol: float) -> float:
    """The root of a number above all eigenvalues of Hermitian matrices [B, n, n], within rtol / 4 of the least one.

    t I - G is positive definite up to the rounding of its factorisation where that runs to its end; its backward error
    is at most (n + 1) units times the trace of t I (Rump 2006), doubled twice for complex arithmetic. The largest
    eigenvalue lies between a diagonal element and the trace, which bounds the search.

    Args:
        grams: the matrices, positive semidefinite but for ``error``.
        error: bound on their error, in the 2-norm.
        start: a number that is not much above the root sought, such as a lower side; may be 0.
        rtol: relative accuracy; the bound cannot be more accurate than rounding lets it be.
    """
    n = grams.shape[1]
    diagonal = grams.diagonal(dim1=1, dim2=2).real
    # Rounding may have left negative eigenvalues, which lower the trace.
    most = math.sqrt(diagonal.sum(1).max().item() + n * error) * (1.0 + 4.0 * _EPS * n)
    least = math.sqrt(max(diagonal.max().item(), 0.0))
    if least == 0.0:
        return math.sqrt(most**2 + error)
    if not least < start < most:
        start = least
    identity = torch.eye(n, dtype=grams.dtype, device=grams.device)

    def definite(root: float) -> bool:
        return int(torch.linalg.cholesky_ex(root**2 * identity - grams).info.abs().max()) == 0

    fine, far = max(rtol / 4.0, 8.0 * _EPS), most / start - 1.0
    low, step = 0.0, fine
    while step < far and not definite(start * (1.0 + step)):
        low, step = step, 2.0 * step
    step = min(step, far)
    while step - low > fine * (1.0 + step):
        middle = 0.5 * (low + step)
        low, step = (low, middle) if definite(start * (1.0 + middle)) else (middle, step)
    root = start * (1.0 + step)
    return math.sqrt(root**2 * (1.0 + 4.0 * _EPS * n * (n + 2)) + error)


def gram_bound(grams: Tensor, error: float, rtol: float) -> float:
    """Gram iteration: the largest Schatten norm of order 2^t of the blocks, in logarithms; t grows until it is tight.

    The Schatten norm of order p of an n x n matrix is at most n^(1/p) times its largest eigenvalue.
    """
    n = grams.shape[1]
    doublings = max(1, math.ceil(math.log2(max(math.log(n), 1.0) / (0.5 * max(rtol, _EPS)))))
    matrix = grams
    log = torch.zeros(len(grams), dtype=torch.float64, device=grams.device)
    for power in range(doublings):
        norm = torch.linalg.matrix_norm(matrix)
        log += torch.where(norm > 0.0, norm.log(), -math.inf) * 0.5**power
        # A block of zeros stays 0, with the logarithm -inf.
        matrix = matrix / torch.where(norm > 0.0, norm, 1.0)[:, None, None]
        matrix = matrix @ matrix.mH
    log += torch.linalg.matrix_norm(matrix).clamp_min(1e-300).log() * 0.5**doublings
    # A squaring has an error of at most 4 (n + 2) units of the squared Frobenius norm, which is at most n times the
    # largest eigenvalue squared. The weight of this error halves with every squaring.
    relative = 16.0 * _EPS * n * (n + 2) + 1e-13
    return math.sqrt(math.exp(log.max().item()) * (1.0 + relative) + error)


def deterministic_upper(op: Operator, method: str, lower: float, rtol: float, max_memory: int) -> float:
    """Upper side by "ring", "gram" or "cholesky", in the scale of a normalised weight.

    "ring" and "gram" bound the circular embeddings, by factorisation and by Gram iteration; an operator without
    spatial axes is its own block. "cholesky" factorises the operator's own Gram matrix.

    Raises:
        ValueError: the method does not apply to this operator, or needs more than ``max_memory`` bytes.
    """
    if method == "cholesky" or not op.kernel:
        candidates = [dense_grams(op, max_memory)]
    else:
        rings = ring_sizes(op)
        if not rings:
            raise ValueError(
                f"method {method!r} needs zero padding, or circular padding whose size the stride divides and the "
                "kernel does not exceed; use 'auto'"
            )
        candidates = [ring_grams(op, sizes, max_memory) for sizes in rings]
    if method == "gram":
        return min(gram_bound(grams, error, rtol) for grams, error in candidates)
    upper = min(cholesky_bound(grams, error, lower, rtol) for grams, error in candidates)
    return upper + entry_error(op) if method == "cholesky" else upper

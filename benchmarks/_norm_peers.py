"""Methods that bench_layer_norms.py compares with: power and Gram iteration after their papers, and SciPy's svds."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

Layer = tuple[nn.Conv2d, tuple[int, ...]]  # a convolution and its input's shape


def forward(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def adjoint(conv: nn.Conv2d, weight: Tensor, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    rest = [
        n + 2 * p - d * (k - 1) - 1 - (m - 1) * s
        for n, p, d, k, m, s in zip(
            shape[1:], conv.padding, conv.dilation, conv.kernel_size, y.shape[2:], conv.stride, strict=True
        )
    ]
    return F.conv_transpose2d(y, weight, None, conv.stride, conv.padding, rest, conv.groups, conv.dilation)


def power_iteration(layers: list[Layer], steps: int) -> list[float]:
    """Power iteration on A^T A from one random start, as users write it today; a lower bound only."""
    norms = []
    for conv, shape in layers:
        weight = conv.weight.detach()
        v = torch.randn(1, *shape, device=weight.device)
        for _ in range(steps):
            v = v / torch.linalg.vector_norm(v)
            u = forward(conv, weight, v)
            v = adjoint(conv, weight, u, shape)
        norms.append(torch.linalg.vector_norm(u).item())
    return norms


def gram_iteration(layers: list[Layer], steps: int) -> list[float]:
    """Gram iteration on the Fourier blocks of the circular convolution (Delattre et al. 2023, algorithm 3).

    An upper bound on the stride-1 circular convolution of the input's size, not on the zero-padded one.
    """
    norms = []
    for conv, shape in layers:
        weight = conv.weight.detach()
        if weight.shape[0] > weight.shape[1]:
            weight = weight.transpose(0, 1)
        # All blocks of a 1x1 kernel are equal.
        sizes = [max(n, k) if k > 1 else 1 for n, k in zip(shape[1:], conv.kernel_size, strict=True)]
        blocks = torch.fft.rfft2(weight, s=sizes).permute(2, 3, 0, 1).flatten(0, 1)
        log = torch.zeros(len(blocks), device=weight.device)
        for _ in range(steps):
            norm = torch.linalg.matrix_norm(blocks)
            blocks = blocks / norm[:, None, None]
            log = 2.0 * (log + norm.log())
            blocks = blocks @ blocks.mH
        log = (log + torch.linalg.matrix_norm(blocks).log()) / 2.0**steps
        norms.append(math.exp(log.max().item()))
    return norms


def scipy_svds(layers: list[Layer]) -> list[float]:
    """The largest singular value by SciPy's ARPACK on the operator, in float64, to about eight digits."""
    norms = []
    for conv, shape in layers:
        weight = conv.weight.detach().double().cpu()
        if conv.kernel_size == (1, 1) and conv.padding == (0, 0):
            norms.append(torch.linalg.matrix_norm(weight.flatten(1), 2).item())
            continue
        out = forward(conv, weight, torch.zeros(1, *shape, dtype=torch.float64)).shape

        def apply(v: np.ndarray, conv: nn.Conv2d = conv, w: Tensor = weight, shape: tuple = shape) -> np.ndarray:
            return forward(conv, w, torch.from_numpy(v.reshape(1, *shape))).flatten().numpy()

        def back(
            u: np.ndarray, conv: nn.Conv2d = conv, w: Tensor = weight, shape: tuple = shape, out: tuple = out
        ) -> np.ndarray:
            return adjoint(conv, w, torch.from_numpy(u.reshape(out)), shape).flatten().numpy()

        operator = LinearOperator((math.prod(out), math.prod(shape)), matvec=apply, rmatvec=back, dtype=np.float64)
        norms.append(float(svds(operator, k=1, tol=1e-8, return_singular_vectors=False, random_state=0)[0]))
    return norms

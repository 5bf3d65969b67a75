"""krylov_bound and top_eigenpairs: the certificates of many Lanczos iterations, computed on the host.

    python benchmarks/bench_krylov.py          # CSV under benchmarks/results

212 matrices are those of the 53 convolutions of ResNet-50 with four start vectors each. Rows:

- top_eigenpairs; krylov_bound to a bracket of 1e-5 (when to stop) and of 1e-12 (the certificate);
- torch eigh: LAPACK's eigenvectors of every matrix, batched, which fastlip.ops.reference builds both from;
- scipy: eigh_tridiagonal for the largest eigenpair of one matrix after the other.

``x_native`` is over top_eigenpairs of the same size. ``floor`` is one pass of the pivots' divisions by torch, k of them
one after the other for all matrices at once: less than any of them has to do.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment, percentiles, times
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from fastlip import ops
from fastlip.ops import reference

SIZES = ((212, 6), (212, 12), (212, 30), (212, 60), (21200, 30))


def matrices(count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Diagonals of B^T B for random bidiagonal B."""
    generator = torch.Generator().manual_seed(0)
    alpha, beta = 1.0 + torch.rand(2, count, steps, generator=generator, dtype=torch.float64)
    diagonal, beta = alpha**2, 0.4 * beta
    diagonal[:, 1:] += beta[:, :-1] ** 2
    return diagonal, alpha * beta


def floor(diagonal: Tensor, off: Tensor) -> Tensor:
    t = diagonal.amax(1) * 4.0
    columns, squares = diagonal.T.contiguous(), off.T.square()
    pivot = t - columns[0]
    for i in range(1, len(columns)):
        pivot = t - columns[i] - squares[i - 1] / pivot
    return pivot


def measure(count: int, steps: int, seconds: float, results: Results) -> None:
    diagonal, off = matrices(count, steps)
    rest = [torch.full((count,), value, dtype=torch.float64) for value in (1.0, 1e-6, 1e-3)]

    def scipy_pairs() -> list[Any]:
        which = {"select": "i", "select_range": (steps - 1, steps - 1)}
        return [eigh_tridiagonal(d, o[:-1], **which) for d, o in zip(diagonal.numpy(), off.numpy(), strict=True)]

    methods: dict[str, Callable[[], Any]] = {
        "top_eigenpairs": lambda: ops.top_eigenpairs(diagonal, off),
        "krylov_bound, 1e-5": lambda: ops.krylov_bound(diagonal, off, *rest, tolerance=1e-5),
        "krylov_bound, 1e-12": lambda: ops.krylov_bound(diagonal, off, *rest),
        "torch eigh": lambda: reference.top_eigenpairs(diagonal, off),
        "scipy eigh_tridiagonal": scipy_pairs,
        "floor": lambda: floor(diagonal, off),
    }
    native = 0.0
    for what, run in methods.items():
        ms = times(run, seconds=seconds, least=3, warm=1)
        median, low, high = percentiles(ms)
        native = native or median  # top_eigenpairs comes first
        row = {"matrices": count, "steps": steps, "what": what, "ms": median, "ms_p20": low, "ms_p80": high}
        results.add(row | {"runs": len(ms), "x_native": median / native})
        print(f"{count:>8} {steps:>6} {what:<24} {median:>9.3f} {median / native:>9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = environment("cpu")
    results = Results(args.out / "krylov_cpu.csv", shared)
    print(f"{shared['device']}, {shared['isa']}, torch {shared['torch']}, {args.threads} thread(s)")
    print(f"{'matrices':>8} {'steps':>6} {'what':<24} {'ms':>9} {'x native':>9}")
    for count, steps in SIZES:
        measure(count, steps, args.seconds, results)


if __name__ == "__main__":
    main()

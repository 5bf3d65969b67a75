"""What coarser arithmetic does to a certificate: emulated on the CPU, no GPU involved, nothing timed.

    python benchmarks/bench_precision.py          # CSV under benchmarks/results

The same Lanczos run, on the same starts, in the arithmetics a GPU's matrix units offer. Emulated are their inputs: both
factors of every product are rounded to 10 (TF32, ties away as cvt.rna) or 7 (bfloat16) fraction bits; products of such
numbers are exact in float32, and sums are float32, as on the device (whose matrix units truncate some of the additions,
so that they are at best this good). "3xTF32" splits each factor into two TF32 numbers and leaves out the product of the
small ones (Ootomo and Yokota 2022). The certificate is measured in each case as it is for float32: F is applied to
Gaussian vectors in float64, and the lower side is an explicit vector's in float64. So every interval here is sound;
the question is how wide it is.

Layers: one of each size of ResNet-50 with the CIFAR stem on 3x32x32, random weights, each with 1/53 of 1e-6. Columns:
``residual`` is the bound on ||F|| over sigma_1^2, ``overlap`` what it has to stay well below; ``width`` is
upper / lower - 1, ``lower_gap`` how far the lower side is below the truth, which is float64's interval at 1e-7.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from _timing import Results
from torch import Tensor

import fastlip
from fastlip import models
from fastlip.norms import Operator, conv_operator
from fastlip.norms._solvers import a_posteriori, lanczos
from fastlip.norms._solvers.batched_operator import BatchedOperator, batched_operator
from fastlip.norms._solvers.certificate import Array
from fastlip.norms._solvers.iteration_config import IterationConfig

Split = Callable[[Tensor], tuple[Tensor, ...]]
ETA = 1e-6 / 53


def tf32(x: Tensor) -> Tensor:
    """Ten fraction bits, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def two_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    large = tf32(x)
    return large, tf32(x - large)


ARITHMETIC: dict[str, Split] = {
    "float32": lambda x: (x,),
    "3xTF32": two_tf32,
    "TF32": lambda x: (tf32(x),),
    "bfloat16": lambda x: (x.bfloat16().float(),),
}


class Emulated:
    """A batched operator that multiplies in another arithmetic; sums, scaling and subtraction are float32."""

    def __init__(self, split: Split, ops: Sequence[Operator], vectors: int, dtype: torch.dtype) -> None:
        self._split = split
        weights = zip(*(split(op.weight.to(torch.float32)) for op in ops), strict=True)
        self._parts = [
            batched_operator([op.with_weight(w) for op, w in zip(ops, part, strict=True)], vectors, dtype)
            for part in weights
        ]
        first = self._parts[0]
        self.domain, self.range, self.vectors = first.domain, first.range, first.vectors
        self.dtype, self.device = dtype, first.device

    def forward(self, x: Tensor, *args: Tensor, **history: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply("forward", self.range, x, *args, **history)

    def adjoint(self, x: Tensor, *args: Tensor, **history: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply("adjoint", self.domain, x, *args, **history)

    def _apply(
        self,
        direction: str,
        targets: list[slice],
        x: Tensor,
        out: Tensor,
        square: Tensor,
        *,
        x_square: Tensor,
        active: Tensor,
        previous: Tensor | None = None,
        previous_square: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        out.zero_()
        pieces = self._split(x)
        # The smallest first, and of two small ones none.
        for i, j in sorted(((i, j) for i in range(len(pieces)) for j in range(len(pieces)) if i + j < 2), reverse=True):
            if i + j < len(pieces):
                out += getattr(self._parts[i], direction)(pieces[j])[0]
        for place, own in zip(targets, self.vectors, strict=True):
            rows = out[place].unflatten(0, (own.stop - own.start, -1))
            length = x_square[own].sqrt()
            rows *= torch.where(length > 0, 1.0 / length, 0.0).float()[:, None]
            if previous is not None and previous_square is not None:
                other = previous_square[own].sqrt()
                shift = torch.where(other > 0, length / other, 0.0).float()
                rows -= shift[:, None] * previous[place].view_as(rows)
            square[own] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return out, square


def layers() -> dict[str, Operator]:
    """One convolution of each size, as layer_norms would iterate it."""
    model = models.resnet50(10, stem="cifar", seed=0)[1]
    chosen = {
        "3->64, 32x32": (model.conv1, 32),
        "64->64, 32x32": (model.layer1[0].conv2, 32),
        "128->128, 16x16": (model.layer2[1].conv2, 16),
        "256->256, 8x8": (model.layer3[1].conv2, 8),
        "512->512, 4x4": (model.layer4[1].conv2, 4),
    }
    return {
        name: conv_operator(conv.weight.detach(), size, stride=conv.stride, padding=conv.padding)
        for name, (conv, size) in chosen.items()
    }


def run(op: Operator, split: Split | None, plan: IterationConfig) -> tuple[float, float, int, float, float]:
    """Lower side, upper side, steps, bound on ||F||, and the overlap it is compared with."""
    seen: dict[str, float] = {}
    bound = a_posteriori.krylov_bound

    def noted(diagonal: Array, off: Array, last: Array, residual: Array, start_overlap: Array) -> Array:
        seen["residual"], seen["overlap"] = float(residual.max()), float(start_overlap.min())
        return bound(diagonal, off, last, residual, start_overlap)

    build: Callable[..., BatchedOperator] = batched_operator if split is None else functools.partial(Emulated, split)
    with patch.object(lanczos, "batched_operator", build), patch.object(a_posteriori, "krylov_bound", noted):
        (found,) = lanczos.lanczos_norms([op], plan)
    return found.lower, found.upper, found.steps, seen["residual"], seen["overlap"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def config(starts: int, rtol: float, steps: int, dtype: torch.dtype) -> IterationConfig:
        return IterationConfig(ETA, starts, rtol, steps, dtype, torch.Generator().manual_seed(1))

    shared = {"emulated_on": "cpu", "torch": torch.__version__, "fastlip": fastlip.__version__}
    results = Results(args.out / "precision_emulated.csv", shared)
    for name, op in layers().items():
        low, high, *_ = run(op, None, config(4, 1e-7, 120, torch.float64))
        truth = 0.5 * (low + high)
        for starts in args.starts:
            for rtol in (1e-2, 1e-3):
                for arithmetic, split in ARITHMETIC.items():
                    lower, upper, steps, residual, overlap = run(op, split, config(starts, rtol, 60, torch.float32))
                    row = {"layer": name, "starts": starts, "rtol": rtol, "arithmetic": arithmetic, "steps": steps}
                    row |= {"width": f"{upper / lower - 1:.3g}", "lower_gap": f"{1 - lower / truth:.3g}"}
                    row |= {"residual": f"{residual / truth**2:.3g}", "overlap": f"{overlap:.3g}"}
                    assert lower <= high, "an interval missed the truth"
                    assert upper >= low, "an interval missed the truth"
                    results.add(row)
                    print(*(f"{value!s:<16}" for value in row.values()), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Certified upper sides that weights are scaled by in eval mode."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlip.norms._constrain.norm_gradients import NormGradient, computable, encode, norm_gradients
from fastlip.norms._constrain.transforms import outside_of_transforms, unwrapped
from fastlip.norms._operators.operator import Operator
from fastlip.norms._operators.torch_operator import TorchOperator
from fastlip.norms._options import NormOptions
from fastlip.norms._solvers.solve import solve
from fastlip.norms._spectral_norm_value import unit

#: Power iteration for the gradient: the most steps, and the growth of the norm at which it stops.
_MOST_STEPS, _SETTLED = 1000, 1e-12


class Certificate:
    """What is certified of the norm of an operator with one weight.

    Attributes:
        upper: upper side of the norm, also after the weight is scaled by a number and rounded to a dtype of ``eps``.
        eps: of that dtype.
        lost: by how much products that become subnormal numbers may exceed that.
    """

    def __init__(self, op: Operator, upper: float, dtype: torch.dtype) -> None:
        limits = torch.finfo(dtype)
        self._op, self.upper, self.eps, self.lost = op, upper, limits.eps, 0.0
        if dtype == torch.float16:  # subnormal numbers of others are too small to matter
            ones = op.with_weight(torch.ones_like(op.weight, dtype=torch.float64))
            self.lost = 0.5 * limits.smallest_normal * limits.eps * ones.absolute_bound
        self._gradient: tuple[NormGradient, float] | None = None

    def holds_for(self, weight: Tensor, applied: Tensor) -> bool:
        """Whether the map of ``applied`` was certified, for scaling ``weight``, in whose dtype that may round less."""
        if torch.finfo(weight.dtype).eps > self.eps:
            return False
        certified = self._op.weight
        wider = torch.promote_types(certified.dtype, applied.dtype) == applied.dtype
        shaped = applied.reshape(certified.shape)
        return wider and certified.device == applied.device and torch.equal(certified.to(applied.dtype), shaped)

    def scale(self, bound: float) -> float:
        """The number, at most 1, that brings the norm below a bound."""
        return 1.0 if self.upper <= bound else (bound - self.lost) / self.upper

    def gradient(self, vectors: Tensor) -> tuple[NormGradient, float]:
        """The gradient of the weight's norm, and that norm, by power iteration until it stands still.

        Args:
            vectors: first two singular vectors of a weight like this one, [2, Cin, *input_size].
        """
        if self._gradient is None:
            with outside_of_transforms():  # what they wrap would outlive them
                self._gradient = self._new_gradient(unwrapped(vectors))
        return self._gradient

    def _new_gradient(self, vectors: Tensor) -> tuple[NormGradient, float]:
        weight = computable(self._op.weight)
        start = vectors.to(weight.dtype)
        first = _settled_vector(TorchOperator(self._op, weight), start[0])
        encoded = encode(self._op)
        _, norms, left, right = norm_gradients([weight], [torch.stack([first, start[1]])], encoded, 4)
        return NormGradient(left, right), float(norms[1])


def certified_uppers(ops: Sequence[Operator], options: NormOptions) -> list[float]:
    """Upper sides of norms that hold jointly, also after the weights are scaled by a number and rounded.

    They are positive. The weights are finite.
    """
    intervals = solve(ops, options.resolved([op.weight for op in ops]))
    uppers = []
    for op, interval in zip(ops, intervals, strict=True):
        limits = torch.finfo(op.weight.dtype)
        # Scaling the weight rounds it, each element by at most one unit.
        uppers.append(max(interval.upper + limits.eps * op.absolute_bound, limits.tiny))
    return uppers


@torch.no_grad()
def _settled_vector(convolution: TorchOperator, start: Tensor) -> Tensor:
    """The first singular vector, [Cin, *input_size], by power iteration until its norm stands still."""
    v, last = start[None], 0.0
    for _ in range(_MOST_STEPS):
        image = convolution.forward(v)
        length = float(torch.linalg.vector_norm(image))
        back = unit(convolution.adjoint(unit(image)))
        if not (back.any() and back.isfinite().all()):
            break
        v = back
        if length <= last * (1 + _SETTLED):
            break
        last = length
    return v[0].clone()

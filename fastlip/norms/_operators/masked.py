"""A layer between elementwise factors, such as the slopes of the activations around it at one sample."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fastlip.norms._operators.operator import Operator


@dataclass(frozen=True, eq=False)
class Masked:
    """x to ``after`` * A (``before`` * x), elementwise.

    Operators with one and the same ``layer`` are iterated together: its weights are read once for all of them, and
    each has memory for its own vectors and masks alone.

    Attributes:
        layer: A. It is not normalised, so its magnitude should be about 1.
        before: factors of the input, ``layer.input_shape``; None for 1.
        after: factors of the output, ``layer.output_shape``; None for 1.

    Raises:
        ValueError: factors are not finite, or do not broadcast to their shape.

    Example:
        >>> import torch
        >>> import fastlip
        >>> layer = fastlip.norms.conv_operator(torch.randn(4, 3, 3, 3) / 5, 8, padding=1)
        >>> active = (torch.rand(layer.output_shape) < 0.5).float()
        >>> print(fastlip.norms.operator_norms([fastlip.norms.Masked(layer, after=active)])[0])
    """

    layer: Operator
    before: Tensor | None = None
    after: Tensor | None = None

    def __post_init__(self) -> None:
        for name, mask, shape in (("before", self.before, self.input_shape), ("after", self.after, self.output_shape)):
            if mask is None:
                continue
            # As broadcasting would have it, without an axis in front.
            fits = mask.dim() <= len(shape) and all(
                n in (1, m) for n, m in zip(reversed(mask.shape), reversed(shape), strict=False)
            )
            if not fits:
                raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(mask.shape)}")
            if not bool(mask.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input."""
        return self.layer.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return self.layer.output_shape

    @cached_property
    def magnitude(self) -> float:
        """An upper bound on the norm, also of the operator with the absolute values of its entries."""
        peaks = [mask.abs().max().item() for mask in (self.before, self.after) if mask is not None and mask.numel()]
        bound = self.layer.absolute_bound
        for peak in peaks:
            bound *= peak * (1.0 + 1e-15)
        return bound

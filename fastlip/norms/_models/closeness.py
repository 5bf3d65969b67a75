"""Whether two results are the same but for rounding."""

import torch
from torch import Tensor

#: Largest difference between two ways to compute one layer, relative to its largest output, by the output's dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: On a GPU convolutions of float32 numbers may be done in TF32.
_ROUNDING_TF32 = 1e-2


def rounding_of(output: Tensor) -> float:
    """Relative difference that rounding may make between two ways to compute a layer."""
    if output.dtype == torch.float32 and output.device.type == "cuda":
        return _ROUNDING_TF32
    return _ROUNDING.get(output.dtype, _ROUNDING[torch.bfloat16])


def agree(said: Tensor, seen: Tensor, rounding: float) -> bool:
    """Whether two results are the same but for rounding, with non-finite values in the same places."""
    if said.shape != seen.shape:
        return False
    if not said.numel():
        return True
    said, seen = said.double(), seen.double()
    ends = torch.stack([end for t in (said, seen, said - seen) for end in torch.aminmax(t)])
    if bool(ends.isfinite().all()):  # the usual case, in fewer passes
        sizes = ends.abs().view(3, 2).amax(1)
        return bool(sizes[2] <= rounding * torch.maximum(sizes[0], sizes[1]))
    difference = (said - seen).abs()
    largest = torch.maximum(said.abs(), seen.abs())
    finite = torch.isfinite(largest)
    alike = finite | (said == seen) | (said.isnan() & seen.isnan())
    difference, largest = (torch.where(finite, t, 0.0).amax() for t in (difference, largest))
    return bool(alike.all() & (difference <= rounding * largest))


def gap(said: Tensor, seen: Tensor) -> Tensor:
    """Largest difference and largest magnitude, [2] float64, where non-finite values count as 0."""
    if not said.numel():
        return said.new_zeros(2, dtype=torch.float64)
    both = torch.stack([(seen - said).abs(), said.abs(), seen.abs().to(said.dtype)]).nan_to_num_(0.0, 0.0, 0.0)
    difference, one, other = both.flatten(1).amax(1).double()
    return torch.stack([difference, torch.maximum(one, other)])

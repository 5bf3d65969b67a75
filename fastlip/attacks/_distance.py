"""Lengths of perturbations and of gradients."""

import torch
from torch import Tensor

from fastlip.ops import Bounds, Norm

ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
#: Order of the dual norm, in which a gradient's length is the steepest slope.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


def distance(
    x: Tensor,  # [B, ...]
    x0: Tensor,  # [B, ...]
    norm: Norm,
) -> Tensor:
    """Length of x - x0 in ``norm``, [B] float64."""
    return torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), ORDER[norm], dim=1)


def slope(
    grad: Tensor,  # [B, ...]
    norm: Norm,
) -> Tensor:
    """Steepest slope in ``norm`` (the dual norm of ``grad``), [B] float64; non-finite elements count as 0."""
    return torch.linalg.vector_norm(grad.nan_to_num(0, 0, 0).flatten(1).double(), DUAL[norm], dim=1)


def largest_radius(
    inputs: Tensor,  # [B, ...]
    norm: Norm,
    bounds: Bounds,
) -> Tensor:
    """Diameter of the box, [B] float64."""
    lo, hi = (torch.as_tensor(b, dtype=torch.float64, device=inputs.device).expand(inputs.shape) for b in bounds)
    return torch.linalg.vector_norm((hi - lo).flatten(1), ORDER[norm], dim=1)

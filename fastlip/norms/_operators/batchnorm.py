"""BatchNorm in eval mode: the factors that it multiplies channels by, and the norm of such a diagonal map."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

#: Says why a BatchNorm has no factors.
NO_STATISTICS = "BatchNorm without running statistics uses those of the batch, and has no Lipschitz constant"


def batchnorm_scale(module: nn.Module) -> Tensor:
    """Factors gamma / sqrt(var + eps) of a BatchNorm in eval mode, [C] float64.

    Raises:
        ValueError: the module has no running statistics, or its factors are not finite.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> scale = fastlip.norms.batchnorm_scale(nn.BatchNorm2d(3).eval())
    """
    assert isinstance(module, _BatchNorm)
    if module.running_var is None:
        raise ValueError(NO_STATISTICS)
    (scale,) = batchnorm_scales([module])
    require_finite_scale(scale)
    return scale


def require_finite_scale(scale: Tensor) -> None:
    """Raise ValueError if a BatchNorm's factors, or others, are not finite."""
    if not torch.isfinite(scale).all():
        raise ValueError("BatchNorm's factors gamma / sqrt(var + eps), or others, are NaN or infinite")


def batchnorm_scales(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Factors of BatchNorms with running statistics, [C] float64 each, by a few operations for all on one device."""
    scales: dict[int, Tensor] = {}
    together: dict[torch.device, list[tuple[int, _BatchNorm, Tensor]]] = defaultdict(list)
    for index, module in enumerate(modules):
        assert isinstance(module, _BatchNorm)
        assert module.running_var is not None
        together[module.running_var.device].append((index, module, module.running_var.detach()))
    for device, group in together.items():
        indices, some, variances = zip(*group, strict=True)
        sizes = [v.numel() for v in variances]
        eps = torch.tensor([m.eps for m in some], dtype=torch.float64)
        eps = eps.repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)
        scale = (torch.cat(variances) + eps).rsqrt_()  # in float64, as eps is
        gammas = [torch.ones_like(v) if m.weight is None else m.weight.detach() for _, m, v in group]
        scale *= torch.cat(gammas)
        scales |= zip(indices, scale.split(sizes), strict=True)
    return [scales[index] for index in range(len(modules))]


def batchnorm_factors(
    variance: Tensor,  # [C]
    weight: Tensor | None,  # [C]
    eps: float,
) -> Tensor:
    """Factors gamma / sqrt(var + eps), [C] float64."""
    scale = (variance.detach().double() + eps).rsqrt_()
    return scale if weight is None else scale * weight.detach()


def diagonal_norms(scales: Sequence[Tensor]) -> list[float]:
    """Largest magnitudes of vectors of factors, rounded upwards by the error of the operations that made them."""
    if not scales:
        return []
    return [norm * (1.0 + 1e-14) for norm in torch.stack([s.abs().amax().cpu() for s in scales]).tolist()]


def diagonal_norm(scale: Tensor) -> float:
    """:func:`diagonal_norms` of one vector.

    Example:
        >>> import torch
        >>> import fastlip
        >>> print(fastlip.norms.diagonal_norm(torch.tensor([0.5, -2.0], dtype=torch.float64)))
    """
    return diagonal_norms([scale])[0]

"""Rules of linear maps (layers with weights, BatchNorm in eval mode, average pooling, resizing) and of other pools."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz._registry import Diagonal, axes_of, linear, rule
from fastlip.norms import Operator, batchnorm_scale, module_operator


@rule(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
def weighted(module: nn.Module, input_shape: tuple[int, ...]) -> Operator:
    """The linear map of a layer with weights."""
    return module_operator(module, input_shape)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batchnorm(module: nn.Module, input_shape: tuple[int, ...]) -> Diagonal:
    """The factors of a BatchNorm in eval mode."""
    return Diagonal(batchnorm_scale(module))


@linear
@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average_pool(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """A product over the axes, because the average over a window is separable, including borders and divisors."""
    assert isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
    size = _spatial(module, input_shape)
    kernel = axes_of(module.kernel_size, len(size))
    stride = axes_of(module.stride, len(size))
    padding = axes_of(module.padding, len(size))
    factor = 1.0
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        factor *= _axis_norm(
            n,
            lambda x, k=k, s=s, p=p: F.avg_pool1d(  # type: ignore[misc]
                x, k, s, p, module.ceil_mode, module.count_include_pad
            ),
        )
    override = getattr(module, "divisor_override", None)
    if override:
        if module.ceil_mode or (max(padding) > 0 and not module.count_include_pad):
            raise ValueError("AvgPool with divisor_override needs ceil_mode False and count_include_pad True")
        factor *= math.prod(kernel) / abs(override)
    return factor


@linear
@rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_average_pool(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    factor = 1.0
    for n, m in _adaptive_axes(module, input_shape):
        factor *= _axis_norm(n, lambda x, m=m: F.adaptive_avg_pool1d(x, m))  # type: ignore[misc]
    return factor


_AXES = {
    1: (nn.AvgPool1d, nn.MaxPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.AvgPool3d, nn.MaxPool3d, nn.LPPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}


def _spatial(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the axes that a pool works on, which are the last ones with or without a channel axis."""
    axes = next(n for n, kinds in _AXES.items() if isinstance(module, kinds))
    return input_shape[len(input_shape) - axes :]


def _axis_norm(n: int, linear: Callable[[Tensor], Tensor]) -> float:
    """Norm of a linear map along one axis of n values, rounded upwards; it is given all unit vectors, [n, 1, n]."""
    matrix = linear(torch.eye(n, dtype=torch.float64)[:, None])[:, 0]
    return torch.linalg.matrix_norm(matrix, 2).item() * (1.0 + 1e-12)


@rule(nn.Upsample)
def _upsample(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """A product over the axes, because every mode interpolates along one axis after the other.

    The norm of "nearest" is therefore the root of the product of whole factors, and those of "linear" to "trilinear",
    whose values are averages of two neighbours, are a little smaller.
    """
    assert isinstance(module, nn.Upsample)
    size = input_shape[1:]
    outputs = (None,) * len(size) if module.size is None else axes_of(module.size, len(size))
    factors = module.scale_factor
    scales = factors if isinstance(factors, tuple) else (factors,) * len(size)
    norm = 1.0
    for n, m, s in zip(size, outputs, scales, strict=True):
        norm *= _axis_norm(n, partial(_resize, module, size=m, scale=s))
    return norm


def _resize(
    module: nn.Upsample,
    x: Tensor,  # [n, 1, n]
    size: int | None,
    scale: float | None,
) -> Tensor:
    """What an Upsample does along one axis, [n, 1, m]."""
    mode = {"bilinear": "linear", "trilinear": "linear"}.get(module.mode, module.mode)
    both: dict[str, Any] = {
        "mode": mode,
        "align_corners": module.align_corners,
        "recompute_scale_factor": module.recompute_scale_factor,
    }
    if mode != "bicubic":
        return F.interpolate(x, size, scale, **both)
    # Torch has it for two axes alone; along one of size 1 it changes nothing.
    sizes, scales = None if size is None else (size, 1), None if scale is None else (scale, 1.0)
    return F.interpolate(x[..., None], sizes, scales, **both)[..., 0]


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Root of the most windows that share a value, because no output changes more than the values in its window."""
    assert isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
    size = _spatial(module, input_shape)
    settings = (module.kernel_size, module.stride, module.padding, module.dilation)
    windows = 1
    for n, k, s, p, d in zip(size, *(axes_of(value, len(size)) for value in settings), strict=True):
        # ceil_mode adds at most one window.
        count = (n + 2 * p - d * (k - 1) - 1) // s + 1 + int(module.ceil_mode)
        windows *= _most_covered(n, ((o * s - p + j * d for j in range(k)) for o in range(count)))
    return math.sqrt(windows) * (1.0 + 1e-15)


@rule(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
def _power_average_pool(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """That of the windows' p-norms, which change by no more than the values in a window do, for even p.

    A window that reaches beyond the input, with ceil_mode, counts by k / c of its c values, where others have k. With
    p = 1 the pool adds up, signs and all. Other roots of sums have no bound where the sum is 0, or are no number.

    Raises:
        ValueError: the exponent is not 1, an even number of at most eight, or infinite.
    """
    assert isinstance(module, (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d))
    size, p = _spatial(module, input_shape), float(module.norm_type)
    kernel = axes_of(module.kernel_size, len(size))
    stride = axes_of(module.stride or module.kernel_size, len(size))
    if not (p == 1.0 or math.isinf(p) or (p > 0.0 and p % 2.0 == 0.0)):
        raise ValueError(f"LPPool with norm_type {p:g} has no Lipschitz constant, or is no number for negative inputs")
    if 8.0 < p < math.inf:
        raise ValueError(f"LPPool with norm_type {p:g} takes powers that leave the range of floats")
    factor = 1.0
    for n, k, s in zip(size, kernel, stride, strict=True):
        if p == 1.0:
            factor *= k * _axis_norm(n, lambda x, k=k, s=s: F.avg_pool1d(x, k, s, 0, module.ceil_mode))  # type: ignore[misc]
            continue
        count = (n - k) // s + 1
        if module.ceil_mode and count * s < n and (n - k) % s:
            count += 1
        factor *= math.sqrt(_most_covered(n, ((o * s + j for j in range(k)) for o in range(count))))
        inside = min(k, n - (count - 1) * s)
        factor *= (k / inside) ** (0.0 if math.isinf(p) else 1.0 / p)
    return factor * (1.0 + 1e-14)


@rule(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max_pool(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    windows = 1
    for n, m in _adaptive_axes(module, input_shape):
        windows *= _most_covered(n, (range(o * n // m, -(-(o + 1) * n // m)) for o in range(m)))
    return math.sqrt(windows) * (1.0 + 1e-15)


def _most_covered(n: int, windows: Iterable[Iterable[int]]) -> int:
    """Largest number of windows that contain the same one of n positions."""
    cover = [0] * n
    for window in windows:
        for position in window:
            if 0 <= position < n:
                cover[position] += 1
    return max(1, *cover)


def _adaptive_axes(module: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Input and output size of each axis; an output size of None keeps the size."""
    size = _spatial(module, input_shape)
    output = module.output_size
    wanted = (output,) * len(size) if output is None or isinstance(output, int) else tuple(output)  # type: ignore[arg-type]
    return [(n, n if m is None else m) for n, m in zip(size, wanted, strict=True)]

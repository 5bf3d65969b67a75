"""Rules of activations.

Each constant is the largest magnitude of the function's slope, rounded upwards; a test derives them.
"""

import math

import torch
from torch import nn

from fastlip.lipschitz._registry import rule

CONSTANTS: dict[type[nn.Module], float] = {
    nn.GELU: 1.1290,
    nn.Hardsigmoid: 0.16667,
    nn.Hardswish: 1.5,
    nn.Hardtanh: 1.0,
    nn.LogSigmoid: 1.0,
    nn.Mish: 1.0885,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.SELU: 1.7581,
    nn.SiLU: 1.0999,
    nn.Sigmoid: 0.25,
    nn.Softplus: 1.0,
    nn.Softshrink: 1.0,
    nn.Softsign: 1.0,
    nn.Tanh: 1.0,
    nn.Tanhshrink: 1.0,
}


@rule(*CONSTANTS)
def _constant(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    return next(CONSTANTS[cls] for cls in type(module).__mro__ if cls in CONSTANTS)


@rule(nn.CELU)
def _celu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.CELU)
    if not module.alpha > 0.0:
        raise ValueError(f"CELU with alpha {module.alpha} grows like an exponential, and has no Lipschitz constant")
    return 1.0


@rule(nn.ELU)
def _elu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.ELU)
    return _largest_slope(abs(module.alpha))


@rule(nn.LeakyReLU)
def _leaky_relu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.LeakyReLU)
    return _largest_slope(abs(module.negative_slope))


@rule(nn.RReLU)
def _rrelu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """In eval mode a leaky ReLU with the mean of both slopes."""
    assert isinstance(module, nn.RReLU)
    return _largest_slope(abs(0.5 * (module.lower + module.upper)))


@rule(nn.Threshold)
def _threshold(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.Threshold)
    if module.value != module.threshold:
        raise ValueError(
            f"Threshold jumps from {module.value:g} to {module.threshold:g}, and has no Lipschitz constant"
        )
    return 1.0


@rule(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    raise ValueError(f"{type(module).__name__} looks rows up by whole numbers: it jumps, and has no Lipschitz constant")


@rule(nn.Hardshrink)
def _hardshrink(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.Hardshrink)
    if module.lambd > 0.0:
        raise ValueError(f"Hardshrink jumps at {module.lambd:g}, and has no Lipschitz constant; Softshrink has one")
    return 1.0


@rule(nn.PReLU)
def _prelu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.PReLU)
    return _largest_slope(module.weight.detach().double().abs().max().item())


def _largest_slope(negative: float) -> float:
    """The constant of a function with slope 1 for positive inputs and ``negative`` for others; NaN stays NaN."""
    return negative if math.isnan(negative) else max(1.0, negative)


def require_continuous(module: nn.Module, dtype: torch.dtype) -> None:
    """Raise ValueError for a Softplus that jumps by more than the rounding of its input's dtype.

    Above its threshold torch returns its input x in place of x + log(1 + exp(-beta x)) / beta.
    """
    if not isinstance(module, nn.Softplus):
        return
    beta, threshold = float(module.beta), float(module.threshold)
    if math.isinf(threshold) and threshold > 0.0 and beta != 0.0:
        return
    jump = math.log1p(math.exp(-threshold)) if threshold > 0.0 else math.inf
    # The value at the threshold is (threshold + jump) / beta.
    if beta == 0.0 or not jump <= 0.5 * torch.finfo(dtype).eps * threshold:
        enough = math.ceil(-math.log(torch.finfo(dtype).eps))
        raise ValueError(
            f"Softplus with beta {beta:g} jumps at its threshold {threshold:g} by more than {dtype} rounds, and has no "
            f"Lipschitz constant; threshold={enough} is enough"
        )

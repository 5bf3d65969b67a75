"""Rules of activations, and of modules that only move or drop values.

The constants are the largest magnitude of each function's slope, rounded upwards; a test derives them.
"""

from torch import nn

from fastlip.lipschitz._registry import rule

_CONSTANTS: dict[type[nn.Module], float] = {
    nn.CELU: 1.0,
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
    # These keep or drop values; dropout does nothing in eval mode.
    nn.AlphaDropout: 1.0,
    nn.ChannelShuffle: 1.0,
    nn.Dropout: 1.0,
    nn.Dropout1d: 1.0,
    nn.Dropout2d: 1.0,
    nn.Dropout3d: 1.0,
    nn.FeatureAlphaDropout: 1.0,
    nn.Flatten: 1.0,
    nn.Identity: 1.0,
    nn.PixelShuffle: 1.0,
    nn.PixelUnshuffle: 1.0,
    nn.Unflatten: 1.0,
    nn.ZeroPad1d: 1.0,
    nn.ZeroPad2d: 1.0,
    nn.ZeroPad3d: 1.0,
}


@rule(*_CONSTANTS)
def _constant(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    return next(_CONSTANTS[cls] for cls in type(module).__mro__ if cls in _CONSTANTS)


@rule(nn.ELU)
def _elu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.ELU)
    return max(1.0, abs(module.alpha))


@rule(nn.LeakyReLU)
def _leaky_relu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.LeakyReLU)
    return max(1.0, abs(module.negative_slope))


@rule(nn.PReLU)
def _prelu(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    assert isinstance(module, nn.PReLU)
    return max(1.0, module.weight.detach().double().abs().max().item())

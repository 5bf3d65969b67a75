"""Bounds on the slopes of activations, from below and from above."""

from torch import nn

#: Elementwise activations whose slopes lie between two constants, rounded outwards. The magnitude of the larger one is
#: the constant of the activation's rule.
_SLOPES: dict[type[nn.Module], tuple[float, float]] = {
    nn.CELU: (0.0, 1.0),
    # x s(x) with s(-x) = 1 - s(x) has slopes at x and -x that add up to 1; SiLU has them too.
    nn.GELU: (-0.1290, 1.1290),
    nn.Hardsigmoid: (0.0, 0.16667),
    nn.Hardswish: (-0.5, 1.5),
    nn.Hardtanh: (0.0, 1.0),
    nn.LogSigmoid: (0.0, 1.0),
    nn.Mish: (-0.1126, 1.0885),
    nn.ReLU: (0.0, 1.0),
    nn.ReLU6: (0.0, 1.0),
    nn.SELU: (0.0, 1.7581),
    nn.SiLU: (-0.0999, 1.0999),
    nn.Sigmoid: (0.0, 0.25),
    nn.Softplus: (0.0, 1.0),
    nn.Softshrink: (0.0, 1.0),
    nn.Softsign: (0.0, 1.0),
    nn.Tanh: (0.0, 1.0),
    nn.Tanhshrink: (0.0, 1.0),
}


def slopes_of(module: nn.Module | None) -> tuple[float, float] | None:
    """The least and the largest slope of an elementwise activation; None where they are not known.

    Only of torch's own classes: a subclass with a rule of its own may do something else.
    """
    negative = None
    if type(module) is nn.LeakyReLU:
        negative = [float(module.negative_slope)]
    elif type(module) is nn.PReLU:
        negative = module.weight.detach().double().flatten().tolist()
    elif type(module) is nn.ELU:
        negative = [0.0, float(module.alpha)]
    if negative is not None:
        return min(1.0, *negative), max(1.0, *negative)
    return _SLOPES.get(type(module)) if module is not None else None

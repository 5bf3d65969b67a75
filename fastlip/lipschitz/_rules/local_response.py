"""Local response normalisation (Krizhevsky, Sutskever and Hinton 2012, section 3.3).

y_i = x_i s_i^-beta with s_i = k + (alpha / n) sum x_j^2 over a window of n channels around i. With t_i = s_i - k the
Jacobian is diag(s_i^-beta) - M, where the row of channel i of M is 2 beta (alpha / n) x_i x_j s_i^(-beta-1) for j in
the window: its norm is at most 2 beta t_i (k + t_i)^(-beta-1), which grows until t_i = k / beta. An input is in the
windows of at most n channels, so that ||M|| is at most sqrt(n) times the largest of these norms.
"""

import math

from torch import nn

from fastlip.lipschitz._interval_arithmetic import scale
from fastlip.lipschitz._intervals import Interval
from fastlip.lipschitz._registry import Ranged, rule

#: Rounding of a few operations on numbers.
_ROUNDING = 1e-14


@rule(nn.LocalResponseNorm)
def _local_response_norm(module: nn.Module, input_shape: tuple[int, ...]) -> Ranged:
    assert isinstance(module, nn.LocalResponseNorm)
    alpha, beta, k = float(module.alpha), float(module.beta), float(module.k)
    if not (alpha >= 0.0 and beta >= 0.0 and k > 0.0):
        raise ValueError(
            f"LocalResponseNorm with alpha {alpha:g}, beta {beta:g} and k {k:g} has no known Lipschitz constant; it "
            "needs alpha and beta of at least 0, and a positive k"
        )
    window = min(module.size, input_shape[0])
    largest = _power(k, -beta)
    steepest = k / beta if alpha > 0.0 and beta > 0.0 else 0.0  # the t of the largest row

    def constant(x: Interval) -> float:
        size = x.magnitude().max().item() if x.lower.numel() else 0.0
        t = steepest if math.isinf(size) else min(alpha / module.size * window * size * size, steepest)
        return largest + math.sqrt(window) * 2.0 * beta * t * _power(k + t, -beta - 1.0) * (1.0 + _ROUNDING)

    def values(x: Interval) -> Interval:
        """Nearer to 0 than k^-beta times the input, with its sign."""
        scaled = scale(x, largest)
        return Interval(scaled.lower.clamp_max(0.0), scaled.upper.clamp_min(0.0))

    return Ranged(constant, values)


def _power(base: float, exponent: float) -> float:
    """Upper bound on a power of a positive number, inf beyond the range."""
    logarithm = exponent * math.log(base)
    return math.exp(logarithm) * (1.0 + _ROUNDING * (1.0 + abs(logarithm))) if logarithm < 700.0 else math.inf

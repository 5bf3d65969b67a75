#!/bin/sh
# monotonicnetworks 1.5.1, LipschitzLinear and MonotonicWrapper (needs torch 2.14.1)
#
# Behaviour: two LipschitzLinear layers with their default settings, wrapped to be monotone, make a network that
#   falls: its partial derivatives go down to -31 where they must not be negative.
# Expected: layers whose Lipschitz constant is given as 1 by default compose to 1, so that the wrapper's residual of
#   slope 1 keeps every derivative at least 0. A reader of the page would guess: smallest derivative 0.
# Seen: -31.0 by default; with kind="inf" on the second layer the smallest derivative is 0.
# Source: LipschitzLinear. Its default kind, "one-inf", bounds single entries, a norm from L1 to L-infinity, which
#   only a first layer may have: between two such layers a factor of the width is lost (32 here). The same description
#   names "one" as the default, and calls lipschitz_const the constant of the layer without saying between which
#   norms.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    monotonicnetworks==1.5.1 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from monotonicnetworks import GroupSort, LipschitzLinear, MonotonicWrapper


def smallest_derivative(name, **second):
    torch.manual_seed(0)
    network = torch.nn.Sequential(LipschitzLinear(2, 32), GroupSort(16), LipschitzLinear(32, 1, **second))
    with torch.no_grad():  # weights at their constraint, where training takes them
        for layer, sign in ((network[0], 1.0), (network[2], -1.0)):
            layer.parametrizations.weight.original.fill_(10 * sign)
    model = MonotonicWrapper(network, lipschitz_const=1.0)
    x = torch.randn(64, 2, requires_grad=True)
    (derivative,) = torch.autograd.grad(model(x).sum(), x)
    print(f"{name}: smallest partial derivative {derivative.min():.3f}")
    return derivative.min().item()


default, right = smallest_derivative("default kinds"), smallest_derivative('second layer kind="inf"', kind="inf")
sys.exit(0 if default < -30 and right > -1e-5 else "the behaviour has changed")
PY

#!/bin/sh
# eclipse-nn 0.1.7, LipConstEstimator.estimate("ECLipsE") (needs torch 2.14.1 and cvxpy 1.9.3 with its SCS solver)
#
# Behaviour: given an activation whose slope lies in [alpha, beta] with alpha < 0, the returned "Lipschitz constant"
#   is alpha + beta for one unit: below beta, which the activation reaches.
# Expected: a bound of at least max(-alpha, beta), or the refusal that ECLipsE_Fast gives for such slopes. A reader of
#   the page would guess: ValueError, for the message about signs stands in the same function.
# Seen: slopes [-0.1, 1.1], those of SiLU rounded outwards: 1.0, below the derivative 1.0998 of SiLU at 2.4. Slopes
#   [-0.5, 1]: 0.5. The signs are checked only where the solver fails and ECLipsE_Fast takes over.
# Source: ECLipsE, which computes the product of the two slopes and never uses it; without that term the multiplier
#   argument holds only for slopes of one sign. The accepted slopes are described with alpha <= beta as the one rule.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    eclipse-nn==0.1.7 cvxpy==1.9.3 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from eclipse_nn import LipConstEstimator

one = torch.ones(1, 1, dtype=torch.float64)


def estimate(alpha, beta, method="ECLipsE"):
    return float(LipConstEstimator(weights=[one, one], alphas=[alpha], betas=[beta]).estimate(method))


x = torch.tensor(2.4, dtype=torch.float64, requires_grad=True)
(slope,) = torch.autograd.grad(torch.nn.functional.silu(x), x)
silu, wide, relu = estimate(-0.1, 1.1), estimate(-0.5, 1.0), estimate(0.0, 1.0)
print(f"x -> SiLU(x): reported {silu:.4f}, derivative at 2.4 {slope:.4f}")
print(f"slopes in [-0.5, 1]: reported {wide:.4f}; slopes in [0, 1]: reported {relu:.4f}")
try:
    estimate(-0.1, 1.1, "ECLipsE_Fast")
    refused = False
except ValueError as error:
    refused = True
    print("ECLipsE_Fast refuses the same slopes:", error)
same = abs(silu - 1.0) < 1e-3 and slope.item() > 1.09 and abs(wide - 0.5) < 1e-3 and abs(relu - 1) < 1e-3 and refused
sys.exit(0 if same else "the behaviour has changed")
PY

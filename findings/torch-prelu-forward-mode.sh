#!/bin/sh
# torch 2.14.1, torch.nn.functional.prelu
#
# Behaviour: at 0 the forward-mode derivative of PReLU is 1 and the reverse-mode derivative is its slope. The two
#   Jacobians of one function at one point are different matrices, and no error says so.
# Expected: jvp and vjp agree at the kink, as they do for ReLU, leaky ReLU, ELU, max-pooling and about fifty others
#   that were tried beside it (lp_pool2d at a window of zeros is nan forward, 0 in reverse). Guess before running:
#   both give the slope, as F.leaky_relu does.
# Seen: jvp 1.0, vjp 0.25; leaky_relu 0.25 both ways.
# Why it matters: a Lanczos or power iteration on J^T J that takes J v from jvp and J^T u from vjp iterates a product
#   that is neither symmetric nor semidefinite. With a slope of -1 (which training can reach) the quotient v.J^T J v
#   is negative, and exact zeros are what zero padding and a preceding ReLU produce.
# Source: the derivative formulas of _prelu_kernel; reverse mode asks x > 0, forward mode x >= 0. The forward-mode
#   tutorial presents jvp as computing the same derivative in the other order.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch
from torch.func import jvp, vjp
from torch.nn.functional import leaky_relu, prelu


def both(function):
    x, one = torch.zeros(1), torch.ones(1)
    forward = jvp(function, (x,), (one,))[1].item()
    reverse = vjp(function, x)[1](one)[0].item()
    return forward, reverse


quarter = both(lambda x: prelu(x, torch.tensor([0.25])))
negative = both(lambda x: prelu(x, torch.tensor([-1.0])))
leaky = both(lambda x: leaky_relu(x, 0.25))
print("derivative at 0, (forward mode, reverse mode)")
print("  prelu, slope 0.25: ", quarter)
print("  prelu, slope -1:   ", negative, " so v.J^T(J v) =", negative[0] * negative[1])
print("  leaky_relu, 0.25:  ", leaky)
same = quarter == (1.0, 0.25) and negative == (1.0, -1.0) and leaky == (0.25, 0.25)
sys.exit(0 if same else "the behaviour has changed")
PY

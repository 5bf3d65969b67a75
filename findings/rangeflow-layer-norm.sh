#!/bin/sh
# rangeflow 0.5.0, rangeflow.RangeLayerNorm and rangeflow.RangeGELU (needs torch 2.14.1 and matplotlib 3.11.2)
#
# Behaviour: the interval that comes out does not hold the outputs of all inputs of the interval that went in.
#   Layer normalisation takes mean and variance from the centre alone, and GELU is evaluated at the two ends.
# Expected: an enclosure, loose perhaps: the package is for certified robustness, and its front page promises that the
#   output is guaranteed to lie in the bounds. Guess before running: layer normalisation encloses every corner of the
#   box, and GELU of [-1.5, 0] goes down to -0.17, its minimum.
# Seen: entries of layer_norm up to 0.11 outside of the interval for a box of radius 0.3; GELU of [-1.5, 0] is given as
#   [-0.1004, 0], and GELU(-0.75) is -0.17. RangeLinear's interval holds.
# Why it matters: "certified" accuracy of a network with either layer counts images that can be attacked.
# Source: RangeLayerNorm.forward and RangeGELU.forward in rangeflow/layers.py. Their descriptions do not restrict the
#   promise.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    rangeflow==0.5.0 matplotlib==3.11.2 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from rangeflow import RangeGELU, RangeLayerNorm, RangeLinear, RangeTensor

torch.manual_seed(0)
centre, radius = torch.randn(1, 4), 0.3
corners = centre + radius * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)


def outside(name, layer, outputs):
    low, high = layer(RangeTensor.from_epsilon_ball(centre, radius)).decay()
    worst = torch.maximum(low - outputs, outputs - high).max().item()
    print(f"{name}: an output lies {worst:+.4f} outside of the interval (negative: inside)")
    return worst


with torch.no_grad():
    linear = RangeLinear(4, 3)
    weights = dict(linear.named_parameters())
    held = outside("linear", linear, torch.nn.functional.linear(corners, weights["weight"], weights["bias"]))
    broken = outside("layer norm", RangeLayerNorm(4), torch.nn.functional.layer_norm(corners, (4,)))
    low, high = RangeGELU()(RangeTensor.from_range(torch.tensor([-1.5]), torch.tensor([0.0]))).decay()
    dip = torch.nn.functional.gelu(torch.tensor(-0.75)).item()
print(f"GELU of [-1.5, 0]: [{low.item():.4f}, {high.item():.4f}]; GELU(-0.75) = {dip:.4f}")
sys.exit(0 if held < 1e-5 and broken > 0.05 and low.item() > dip + 0.05 else "the behaviour has changed")
PY

#!/bin/sh
# orthogonium 0.0.4, layers.conv.AOL.AOLConv2D (needs torch 2.14.1)
#
# Behaviour: with padding_mode="reflect" or "replicate" the layer stretches a vector by 1.78 and 1.83.
# Expected: the class says that its Lipschitz constant "is guaranteed to be less than 1", and lists padding_mode among
#   its arguments without a restriction. A reader would guess: at most 1, or an error for the modes that repeat pixels.
# Seen: zeros 1.000, circular 1.000, reflect 1.779, replicate 1.835, without an error or a warning.
# Why it matters: padding that repeats pixels is a map of norm above 1 in front of the convolution. A certificate read
#   off the promise, margin / sqrt(2), is too large by this factor for each such layer.
# Source: the weight is rescaled for a convolution that pads with zeros or around, and padding_mode goes to Conv2d as
#   it comes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check orthogonium==0.0.4 torch==2.14.1 numpy==2.4.6
TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from orthogonium.layers.conv.AOL import AOLConv2D


def stretch(mode):
    torch.manual_seed(0)
    layer = AOLConv2D(8, 8, 3, padding=1, padding_mode=mode, bias=False).eval()
    x = torch.randn(1, 8, 8, 8)
    for _ in range(60):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
        x = (gradient / gradient.norm()).detach()
    return (layer(x).norm() / x.norm()).item()


seen = {mode: stretch(mode) for mode in ("zeros", "circular", "reflect", "replicate")}
for mode, value in seen.items():
    print(f"{mode:>9}: one vector is stretched by {value:.4f}")
kept = max(seen["zeros"], seen["circular"]) < 1.0001
sys.exit(0 if kept and min(seen["reflect"], seen["replicate"]) > 1.5 else "the behaviour has changed")
PY

#!/bin/sh
# deel-torchlip 1.0.5, deel.torchlip.ScaledAvgPool2d (needs torch 2.14.1)
#
# Behaviour: with ceil_mode=True the "1-Lipschitz" average pooling stretches one pixel by the kernel size: 3 for a 3x3
#   kernel on a 4x4 image.
# Expected: norm at most 1, which is what the layer is for; it refuses padding and overlapping windows to keep it. A
#   reader of the page would guess: ceil_mode is refused too, or divides by the full window.
# Seen: norm 1 without ceil_mode on 4x4, 3 with it on 4x4, 1 with it on 6x6, where the windows fit.
# Source: ScaledAvgPool2d.forward multiplies by the square root of the full window's area, and torch.nn.AvgPool2d
#   divides a window that hangs over the edge by the few pixels inside. The layer's description offers ceil_mode as a
#   way to compute the output's shape.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check deel-torchlip==1.0.5 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from deel.torchlip import ScaledAvgPool2d


def norm(size, ceil_mode):
    layer = ScaledAvgPool2d(3, ceil_mode=ceil_mode)
    basis = torch.eye(size * size).view(-1, 1, size, size)
    value = torch.linalg.matrix_norm(layer(basis).flatten(1), 2).item()
    print(f"3x3 pooling of {size}x{size}, ceil_mode={ceil_mode}: norm {value:.4f}")
    return value


plain, over, fits = norm(4, False), norm(4, True), norm(6, True)
same = abs(plain - 1) < 1e-5 and abs(over - 3) < 1e-5 and abs(fits - 1) < 1e-5
sys.exit(0 if same else "the behaviour has changed")
PY

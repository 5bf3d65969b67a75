#!/bin/sh
# torch 2.14.1, torch.clamp
#
# Behaviour: the gradient of x.clamp(0, 1) is 0 at the values 0 and 1 themselves, for which clamp leaves x alone.
#   Written with tensor bounds the same clamp has gradient 1/2 there. torch 2.11.0 gave 1 for scalar bounds.
# Expected: 1 at both bounds, as it had been for years, and the same for both spellings. Guess before running: [1, 1,
#   1] for the values [0, 1, 0.5].
# Seen: scalar bounds [0, 0, 1], tensor bounds [0.5, 0.5, 1].
# Why it matters: a model that clamps its input to the pixel box gives no gradient for any pixel that is exactly black
#   or white. Gradient attacks then start blind there: below, a linear model loses 2 of 3 pixels, and the sign step of
#   an L-infinity attack moves the loss by a sixth of what the same eps allows.
# Source: the derivative of torch.clamp; its page gives the formula and does not mention the derivative.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch


def gradient(function, weight):
    pixels = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    (function(pixels) * weight).sum().backward()
    return pixels.grad


ones = torch.ones(3)
scalar = gradient(lambda x: x.clamp(0, 1), ones)
tensor = gradient(lambda x: x.clamp(torch.tensor(0.0), torch.tensor(1.0)), ones)
print("gradient at the values 0, 1 and 0.5")
print("  scalar bounds:", scalar.tolist())
print("  tensor bounds:", tensor.tolist())

weight, eps = torch.tensor([3.0, -2.0, 1.0]), 0.1
seen = eps * (gradient(lambda x: x.clamp(0, 1), weight).sign() * weight).sum().item()
possible = eps * weight.abs().sum().item()
print(f"one sign step of {eps} raises a linear loss by {seen:.3f}; {possible:.3f} is possible inside the box")
same = scalar.tolist() == [0, 0, 1] and tensor.tolist() == [0.5, 0.5, 1] and abs(seen * 6 - possible) < 1e-5
sys.exit(0 if same else "the behaviour has changed")
PY

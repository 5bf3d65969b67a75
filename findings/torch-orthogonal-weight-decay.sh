#!/bin/sh
# torch 2.14.1, torch.nn.utils.parametrizations.orthogonal
#
# Behaviour: on a rectangular layer, one step of an optimiser with any weight decay at all sets the whole weight
#   matrix to exactly zero. A square layer with the default map is unharmed.
# Expected: a parametrised weight stays orthogonal whatever happens to the tensor behind it. Guess before running:
#   noise added to the parameter of the Householder map keeps the matrix orthogonal. It did not, which led to weight
#   decay.
# Seen: singular values 1 to 1 before the step, 0 to 0 after one SGD step with weight_decay=1e-4 (Linear(64, 10)).
#   Linear(32, 32) keeps 1 to 1.
# Source: _Orthogonal.forward. A rectangular weight takes the Householder map, which keeps the signs of its columns
#   (+1 or -1) on the diagonal of the very parameter that is trained, and reads them by casting to int. Decay moves -1
#   to -0.9999, whose int is 0. The documentation promises that the weight will be orthogonal, and says of the maps
#   only what they cost and how fast they train.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn.utils.parametrizations import orthogonal


def singular_values(layer):
    values = torch.linalg.svdvals(layer.weight.detach())
    return values.min().item(), values.max().item()


def one_step(features, decay):
    torch.manual_seed(0)
    layer = orthogonal(torch.nn.Linear(*features))
    before = singular_values(layer)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=decay)
    layer(torch.randn(8, features[0])).square().sum().backward()
    optimiser.step()
    after = singular_values(layer)
    print(f"Linear{features}, weight_decay={decay}: singular values {before} before, {after} after one step")
    return after


plain = one_step((64, 10), 0.0)
decayed = one_step((64, 10), 1e-4)
square = one_step((32, 32), 1e-4)
same = abs(plain[0] - 1) < 1e-4 and decayed == (0.0, 0.0) and abs(square[0] - 1) < 1e-4
sys.exit(0 if same else "the behaviour has changed")
PY

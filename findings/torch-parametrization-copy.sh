#!/bin/sh
# torch 2.14.1, torch.nn.utils.parametrize.remove_parametrizations
#
# Behaviour: a deep copy of a parametrized layer shares the class that parametrize made for the original. Removing the
#   parametrization of the copy deletes the property from that class, and the original has no weight any more.
# Expected: copy.deepcopy gives layers that do not affect each other. A reader would guess: the original computes what
#   it did.
# Seen: the original still counts as parametrized, and its forward pass raises AttributeError: no attribute 'weight'.
#   A layer that was parametrized by itself is unharmed.
# Why it matters: "copy the network, bake the spectral or orthogonal weights into the copy, evaluate it, train on" is
#   an ordinary thing to do, and it is the network in training that breaks.
# Source: remove_parametrizations: the property is deleted from type(module). Its page says "Remove the
#   parametrizations on a tensor in a module".
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import copy
import sys

import torch
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations


def outcome(layer):
    try:
        return layer(torch.ones(1, 4)).norm().item()
    except AttributeError as error:
        return str(error)


torch.manual_seed(0)
original, other = spectral_norm(torch.nn.Linear(4, 4)), spectral_norm(torch.nn.Linear(4, 4))
copied = copy.deepcopy(original)
before = outcome(original)
remove_parametrizations(copied, "weight")
print("the original before the copy loses its parametrization:", before)
print("the original after:", outcome(original))
print("still parametrized:", is_parametrized(original), "; a layer of its own:", outcome(other))
broken = isinstance(before, float) and "no attribute 'weight'" in str(outcome(original)) and is_parametrized(original)
alone = isinstance(outcome(copied), float) and isinstance(outcome(other), float)
sys.exit(0 if broken and alone else "the behaviour has changed")
PY

#!/bin/sh
# torchattacks 3.5.1, torchattacks.CW (needs torch 2.14.1)
#
# Behaviour: a pixel that is exactly 0 or exactly 1 is never changed by the Carlini-Wagner attack. Images of black and
#   white alone come back as they were, and the model counts as robust on them.
# Expected: every pixel can move, black ones upwards. A reader of the page would guess: such images are a little
#   harder, since tanh is flat there, and some of them are fooled.
# Seen: 8 of 8 grey images fooled; 0 of 8 of the same images rounded to 0 and 1, with a change of exactly 0. With half
#   of the pixels rounded only the other half moves. No warning, no nan.
# Source: CW.inverse_tanh_space clamps to the closed interval, so the variable starts at plus or minus infinity, where
#   tanh has derivative 0. Implementations elsewhere shrink the interval a little first.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torchattacks==3.5.1 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
import torchattacks

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
with torch.no_grad():
    model[1].weight.mul_(20)
    model[1].bias.add_(100)  # positive logits
grey = torch.rand(8, 1, 4, 4)


def attack(name, images):
    labels = model(images).argmax(1)
    found = torchattacks.CW(model, c=5, steps=300, lr=0.02)(images, labels)
    moved = (found - images).abs()
    extreme = (images == 0) | (images == 1)
    fooled = int((model(found).argmax(1) != labels).sum())
    most = moved[extreme].max().item() if extreme.any() else None
    print(f"{name}: {fooled} of {len(images)} fooled; largest change {moved.max():.3f}, at black or white {most}")
    return fooled, most


half = grey.clone()
half[..., :2] = half[..., :2].round()
first, mixed, last = attack("grey", grey), attack("half rounded", half), attack("black and white", grey.round())
same = first[0] == 8 and mixed[1] == 0 and last == (0, 0.0)
sys.exit(0 if same else "the behaviour has changed")
PY

#!/bin/sh
# torchattacks 3.5.1, torchattacks.CW (needs torch 2.14.1)
#
# Behaviour: add one constant to all logits of a model, which changes neither its predictions nor its softmax, and the
#   Carlini-Wagner attack fools another number of images; with all logits below 0 it fools none.
# Expected: the attack's margin is a difference of logits, so a shift cancels. A reader of the page would guess: the
#   same images to the last digits, at every shift.
# Seen: of 8 images 3 are fooled at shift 0, 8 at +100, and none at -100, where they come back untouched. A model that
#   ends in log_softmax, all of whose outputs are negative, is in that last case.
# Source: CW.f leaves the other classes out by multiplying with 0 before the maximum; where all logits are negative
#   that 0 is the maximum, for both terms, and the margin is 0 with no gradient. The page gives the formula of the
#   paper, with its maximum over the other classes.
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
linear, images = torch.nn.Linear(16, 3), torch.rand(8, 1, 4, 4)


class Shifted(torch.nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.linear, self.shift = linear, shift

    def forward(self, x):
        return 20 * self.linear(x.flatten(1)) + self.shift


def fooled(shift):
    model = Shifted(shift).eval()
    labels = model(images).argmax(1)
    found = torchattacks.CW(model, c=1, steps=200, lr=0.01)(images, labels)
    count = int((model(found).argmax(1) != labels).sum())
    print(f"logits {shift:+.0f}: {count} of {len(images)} fooled, largest change {(found - images).abs().max():.3f}")
    return count


plain, up, down = fooled(0.0), fooled(100.0), fooled(-100.0)
sys.exit(0 if down == 0 < plain < up == len(images) else "the behaviour has changed")
PY

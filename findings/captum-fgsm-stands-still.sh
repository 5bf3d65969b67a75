#!/bin/sh
# captum 0.9.0, captum.robust.FGSM (needs torch 2.14.1)
#
# Behaviour: FGSM returns the image unchanged, without a word, where the model is confident: a pixel whose gradient is
#   at most 1e-6 is not moved, although only the sign of the gradient is used.
# Expected: the fast gradient sign step does not depend on the scale of the loss. A reader of the page would guess:
#   logits multiplied by 10 give the same image, as long as the gradient is a nonzero float.
# Seen: a model with margin 1.9 moves by eps = 0.3 and is fooled; the same model with logits times 10, whose gradient
#   is small and nonzero, does not move at all and counts as robust. PGD calls FGSM and inherits it. Mean losses add
#   to it, for they divide the gradient by the batch size.
# Source: FGSM._perturb and its attribute zero_thresh, which the class describes as the value below which a gradient
#   is treated as zero and which the constructor does not take.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check captum==0.9.0 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from captum.robust import FGSM

weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
image, label, eps = torch.tensor([[0.74, 0.26, 0.74, 0.26]]), torch.tensor([0]), 0.3
loss = torch.nn.CrossEntropyLoss(reduction="none")


def attack(scale):
    def model(x):
        return scale * x @ weight.T

    x = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x), label).sum(), x)
    moved = FGSM(model, loss).perturb(image.clone(), eps, label)
    distance, fooled = (moved - image).abs().max().item(), bool((model(moved).argmax(1) != label).item())
    print(f"logits times {scale}: least |gradient| {gradient.abs().min():.1e}, moved {distance:.3f}, fooled: {fooled}")
    return gradient.abs().min().item(), distance, fooled


soft, sharp = attack(1.0), attack(10.0)
same = soft[1] > 0.29 and soft[2] and sharp[0] > 0 and sharp[1] == 0 and not sharp[2]
sys.exit(0 if same else "the behaviour has changed")
PY

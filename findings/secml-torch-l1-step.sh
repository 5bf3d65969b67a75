#!/bin/sh
# secml-torch 1.5, PGD with perturbation model "l1", native backend (needs torch 2.14.1)
#
# Behaviour: of a batch of images, one step of the L1 attack moves only the image that has the largest gradient of the
#   whole batch. The others stay where they are and count as robust.
# Expected: images of a batch are attacked each on its own, as the same class does for L2. A reader of the page would
#   guess: one pixel of every image moves.
# Seen: L1 moves 1 of 8 images in 2 steps and the same 1 in 10, L2 all 8 in 2; one image at a time, L1 moves all 8
#   too.
# Source: lin_proj_l1, which compares with the maximum over the whole tensor, behind
#   LinearProjectionGradientProcessing, whose description is that it maximises the scalar product with the gradient
#   over the ball.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    secml-torch==1.5 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from secmlt.adv.backends import Backends
from secmlt.adv.evasion.pgd import PGD
from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3)).eval()
model = BasePyTorchClassifier(network)
images = 0.3 + 0.4 * torch.rand(8, 16)
labels = network(images).argmax(1)


def moved(norm, steps, batch):
    attack = PGD(norm, epsilon=2.0, num_steps=steps, step_size=0.05, backend=Backends.NATIVE)
    found = attack(model, DataLoader(TensorDataset(images, labels), batch_size=batch))
    after = torch.cat([part[0] for part in found])
    count = int(((after - images).abs().amax(1) > 1e-6).sum())
    print(f"{norm}, {steps} steps, batches of {batch}: {count} of 8 images moved")
    return count


first, ten, alone, euclidean = moved("l1", 2, 8), moved("l1", 10, 8), moved("l1", 2, 1), moved("l2", 2, 8)
sys.exit(0 if first <= 2 and ten < 8 and alone == euclidean == 8 else "the behaviour has changed")
PY

#!/bin/sh
# adversarial-robustness-toolbox 1.20.1, art.metrics.empirical_robustness (needs torch 2.14.1)
#
# Behaviour: a classifier that the attack fools on no image gets an empirical robustness of 0.0, lower than a
#   classifier that it fools on all of them.
# Expected: the score stands for the relative size of the perturbation that is needed, so it is large, infinite or nan
#   where none was found. A reader of the page would guess: nan with a warning, as the mean of nothing.
# Seen: 0.0 where FGSM with eps 1e-4 fools none of 5 images, and 0.27 where eps 0.9 fools all 5. Compared by this
#   number the model under the failing attack is the weaker one, and a mean over models is dragged towards 0.
# Source: empirical_robustness returns 0 when no prediction changes, and otherwise averages over the images that were
#   fooled alone. Its description speaks of the minimal perturbation needed to fool the classifier, averaged.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    adversarial-robustness-toolbox==1.20.1 packaging==26.4 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import torch
from art.attacks.evasion import FastGradientMethod
from art.estimators.classification import PyTorchClassifier
from art.metrics import empirical_robustness

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 2))
classifier = PyTorchClassifier(
    model, loss=torch.nn.CrossEntropyLoss(), input_shape=(8,), nb_classes=2, clip_values=(0, 1), device_type="cpu"
)
images = np.random.default_rng(0).random((5, 8), dtype=np.float32)


def measure(eps):
    score = float(empirical_robustness(classifier, images, "fgsm", {"eps": eps, "minimal": False}))
    moved = FastGradientMethod(classifier, eps=eps).generate(images)
    fooled = int((classifier.predict(moved).argmax(1) != classifier.predict(images).argmax(1)).sum())
    print(f"eps {eps}: fooled {fooled} of 5, empirical robustness {score:.4f}")
    return fooled, score


(none, weak), (some, strong) = measure(1e-4), measure(0.9)
sys.exit(0 if none == 0 and weak == 0.0 and some > 0 and strong > weak else "the behaviour has changed")
PY

#!/bin/sh
# corrupt-tta 0.1.7, corrupt_tta.corrupt (with scikit-image 0.26.0); imagecorruptions 1.1.2 does the same
#
# Behaviour: after the same numpy.random.seed, impulse noise is other noise each time. The other random corruptions are
#   the same to the bit, so a check with any of them passes.
# Expected: all of them follow NumPy's global seed; there is no argument for another one. Guess before running, made
#   of imagecorruptions and then again of this package: the same image twice, for every name.
# Seen: gaussian, shot and speckle noise, frost, snow and elastic transform are the same twice, impulse noise differs in
#   a few hundred of 3072 values.
# Why it matters: corruption robustness that is "seeded" cannot be repeated, two models are not compared on the same
#   images, and impulse noise is one of the fifteen corruptions in every mean corruption error.
# Source: impulse_noise calls skimage.util.random_noise without its seed argument, which then draws a generator of its
#   own; the others call numpy.random. The page of corrupt says nothing of randomness.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 scikit-image==0.26.0 scipy==1.17.1 pillow==13.0.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check --no-deps corrupt-tta==0.1.7
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
from corrupt_tta import corrupt

image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


def differing(name):
    results = []
    for _ in range(2):
        np.random.seed(3)
        results.append(np.asarray(corrupt(image, severity=3, corruption_name=name)))
    count = int((results[0] != results[1]).sum())
    print(f"{name}: {count} of {image.size} values differ between two runs from the same seed")
    return count


names = ("gaussian_noise", "shot_noise", "speckle_noise", "frost", "snow", "elastic_transform")
others, impulse = [differing(name) for name in names], differing("impulse_noise")
sys.exit(0 if max(others) == 0 < impulse else "the behaviour has changed")
PY

#!/bin/sh
# attackbenchlib 2.0.2, attackbench.metrics.curves (needs torch 2.14.1 to be imported)
#
# Behaviour: the area under the robust-accuracy curve does not change when every adversarial distance grows by the
#   same amount, and is 0 when all distances are equal, however large they are.
# Expected: the area grows with the distances; it stands for the mean distance an attack needs. A reader of the page
#   would guess: about 2.5 for the distances 1, 2, 3, 4 and about 102.5 for 101, 102, 103, 104.
# Seen: 1.125 for both, and 0.0 for 5, 5, 5, 5, which no attack of size under 5 breaks at all.
# Source: compute_robust_accuracy_curve starts its curve at the smallest distance, without the stretch from 0 to there
#   on which accuracy is 1, and compute_auc_robust_accuracy integrates what is left by trapezoids over a step
#   function. In the same package _aurec, behind the optimality score, does integrate from 0 and warns of trapezoids.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    attackbenchlib==2.0.2 torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
from attackbench.metrics.curves import compute_auc_robust_accuracy, compute_robust_accuracy_curve


def area(distances):
    curve = compute_robust_accuracy_curve(np.array(distances), np.ones(len(distances), dtype=bool))
    value = compute_auc_robust_accuracy(curve["thresholds"], curve["robust_accuracies"])
    print(f"distances {distances}: area {value}, mean distance {np.mean(distances)}")
    return value


near, far, equal = area([1.0, 2.0, 3.0, 4.0]), area([101.0, 102.0, 103.0, 104.0]), area([5.0, 5.0, 5.0, 5.0])
sys.exit(0 if near == far == 1.125 and equal == 0.0 else "the behaviour has changed")
PY

#!/bin/sh
# scipy 1.17.1, scipy.stats.bootstrap
#
# Behaviour: the interval of the median of six runs is [nan, nan] as soon as the middle of the data is tied three
#   times, however far the other runs lie apart. The method that does it, "BCa", is the one used when none is named.
# Expected: an interval within the range of the data. Guess before running: finite for [0.81, 0.82, 0.82, 0.83, 0.80,
#   0.82].
# Seen: [nan, nan] for these accuracies, with a warning that blames a degenerate distribution, and for [0.1, 0.5, 0.5,
#   0.5, 0.9, 0.3]. "percentile" gives [0.805, 0.825] for the first, and the mean instead of the median [0.808, 0.823]
#   with BCa.
# Why it matters: six seeds and accuracies on a thousand images are the field's usual sample, ties included, and the
#   median is chosen because it is robust. A nan in one cell of a table reads like a failed run.
# Source: _bca_interval takes its acceleration from the six values that the statistic has when one run is left out.
#   None of them can move a median with three ties, so the acceleration is 0/0. The page says that the interval may be
#   nan for degenerate distributions, which it describes as all elements being one.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys
import warnings

import numpy as np
from scipy.stats import bootstrap


def interval(values, statistic, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bootstrap((np.array(values),), statistic, rng=0, **options).confidence_interval
    said = ", ".join(sorted({w.category.__name__ for w in caught})) or "no warning"
    print(f"{statistic.__name__} of {values}, {options or 'defaults'}: [{found.low:.4f}, {found.high:.4f}]; {said}")
    return np.array(found)


runs, spread, distinct = [0.81, 0.82, 0.82, 0.83, 0.80, 0.82], [0.1, 0.5, 0.5, 0.5, 0.9, 0.3], [1, 2, 3, 4, 5, 6]
tied = [interval(values, np.median) for values in (runs, spread)]
others = [interval(runs, np.median, method="percentile"), interval(runs, np.mean), interval(distinct, np.median)]
sys.exit(0 if np.isnan(tied).all() and np.isfinite(others).all() else "the behaviour has changed")
PY

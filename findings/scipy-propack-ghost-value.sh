#!/bin/sh
# scipy 1.17.1, scipy.sparse.linalg.svds(solver="propack")
#
# Behaviour: a dense matrix of rank 1, in double precision, is given a second singular value as large as its only one.
#   The two right singular vectors returned with it are the same vector up to the fourth digit.
# Expected: the second value is 0 to rounding, as from the default solver, or the LinAlgError about an invariant
#   subspace that PROPACK raises for other matrices of low rank. Guess before running: rounding, about 1e-15.
# Seen: [36.975, 36.97] from PROPACK, [36.975, 1e-15] from ARPACK; the squares of PROPACK's two values add up to twice
#   the squared Frobenius norm, which no singular values do. A matrix of rank 2 beside it comes out right.
# Why it matters: an effective rank, a nuclear norm or a spectral gap taken from such values is off by a factor of 2.
# Source: svds, whose page says of PROPACK only how it is implemented and which options it ignores.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import numpy as np
from scipy.sparse.linalg import svds


def matrix(rank):
    return np.random.default_rng(1).standard_normal((50, rank)) @ np.random.default_rng(2).standard_normal((rank, 40))


def two(solver, rank):
    _, values, right = svds(matrix(rank), k=2, solver=solver, rng=0)
    large, small = values.max(), values.min()
    frobenius = np.linalg.norm(matrix(rank))
    cosine = abs(right[0] @ right[1])
    print(f"rank {rank}, {solver}: {large:.4f} and {small:.4g}, cosine between their vectors {cosine:.4f}")
    print(f"    sum of squares / squared Frobenius norm {(values @ values) / frobenius**2:.4f}")
    return large, small, (values @ values) / frobenius**2


default, ghost, right = two("arpack", 1), two("propack", 1), two("propack", 2)
same = default[1] < 1e-6 and ghost[1] > 0.9 * ghost[0] and ghost[2] > 1.9 and abs(right[2] - 1) < 1e-6
sys.exit(0 if same else "the behaviour has changed")
PY

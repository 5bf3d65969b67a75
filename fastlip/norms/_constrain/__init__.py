"""Norms that are kept below a bound, or pulled towards it, in training."""

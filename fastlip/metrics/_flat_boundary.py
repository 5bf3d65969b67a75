"""What geometry alone predicts: adversarial against random perturbations at a flat decision boundary."""

import math

from fastlip.metrics._extra import scipy_stats


def flat_boundary_ratio(dimensions: int, directions: int) -> float:
    """Smallest adversarial over smallest Gaussian distortion at a flat decision boundary, the median over noise.

    At distance r from a hyperplane with unit normal w the smallest adversarial perturbation has the norm r. Along a
    Gaussian direction z, sigma z crosses where sigma <z, w> = r, at a norm of r sqrt(n) / <z, w> in n dimensions, and
    <z, w> is standard normal. The largest of k such numbers has the median q = quantile(2^(-1/k)), so that the ratio is
    q / sqrt(n), of the order 1 / sqrt(n) as in Fawzi et al. (2016). It is 0 for one direction, half of which point away
    from the boundary.

    Args:
        dimensions: number n of pixel values.
        directions: number k of Gaussian directions, of which the best counts.

    Raises:
        ValueError: a number is below 1.
        ImportError: SciPy is missing.

    Example:
        >>> import fastlip
        >>> print(fastlip.metrics.flat_boundary_ratio(dimensions=3072, directions=8))
    """
    if dimensions < 1 or directions < 1:
        raise ValueError(f"dimensions and directions must be at least 1, got {dimensions} and {directions}")
    return float(scipy_stats().norm.ppf(0.5 ** (1 / directions))) / math.sqrt(dimensions)

"""The optional dependency of this package."""

from typing import Any


def scipy_stats() -> Any:
    """Return scipy.stats; the error where it is missing says what to install."""
    try:
        from scipy import stats
    except ImportError:
        raise ImportError('intervals need SciPy: pip install "fastlip[study]"') from None
    return stats

"""The optional dependency of this package."""

from typing import Any


def scipy_stats() -> Any:
    """Return scipy.stats; the error says what to install if it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise ImportError('intervals need SciPy: pip install "fastlip[study]"') from None
    return stats

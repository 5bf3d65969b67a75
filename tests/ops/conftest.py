"""Triton's interpreter where it cannot run the kernels."""

from pathlib import Path

import numpy as np
import pytest
from op_inputs import INTERPRETED


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the op tests where loops over run-time bounds are more than the interpreter takes; compiled ones work."""
    if not INTERPRETED:
        return
    triton = pytest.importorskip("triton")
    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 5):
        reason = f"the interpreter of Triton {triton.__version__} needs NumPy < 2.5, which is {np.__version__} here"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))

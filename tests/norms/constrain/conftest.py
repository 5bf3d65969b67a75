"""What tests of constrained networks have in common."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """What other tests compiled counts towards the compiler's limit."""
    yield
    torch._dynamo.reset()

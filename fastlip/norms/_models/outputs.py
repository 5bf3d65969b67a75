"""The tensor in what a model returns, in the forms that models have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def tensor_in(output: Any) -> Any:
    """The tensor in what a model returned: it may be in a dict or an object as ``logits``, or come first in a tuple.

    Anything else is returned as it is.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    first = output[0] if isinstance(output, (tuple, list)) and len(output) > 0 else output
    return getattr(output, "logits", first)

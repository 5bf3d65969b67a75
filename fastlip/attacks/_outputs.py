"""The logits in what a model returns, in the forms that models have."""

from typing import Any

import torch
from torch import Tensor

from fastlip.norms._models.outputs import tensor_in


def logits_in(output: Any, size: int) -> Any:
    """The logits [B, C] in what a model returned for ``size`` images; anything else as it is.

    They may be in a dict or an object as ``logits``, or come first in a tuple. One logit z for each image, [B] or
    [B, 1], is that of class 1 of two: it stands for (0, z), whose probabilities are those of the sigmoid.
    """
    if not isinstance(output, Tensor):
        output = tensor_in(output)
    elif output.dim() > 1 and output.shape[1] != 1:  # before anything else: most models are asked thousands of times
        return output
    if not isinstance(output, Tensor) or output.shape not in ((size,), (size, 1)):
        return output
    one = output.reshape(size, 1)
    return torch.cat([torch.zeros_like(one), one], 1)

"""CUDA graphs of a model, for a few batch sizes: one replay takes the place of hundreds of kernel launches."""

from typing import Any

import torch
from torch import Tensor

from fastlip.attacks._model import Model


class Graphed:
    """``model`` replayed from CUDA graphs, in the forward and the backward pass.

    A graph is captured for one batch size. Batches shrink as images fall, so that every batch is padded to the next
    power of two and few graphs are captured.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graphs: dict[tuple[object, ...], Any] = {}

    def works(
        self,
        inputs: Tensor,  # [B, ...]
    ) -> bool:
        """Whether the model can be captured and the replay gives the same logits."""
        try:
            with torch.enable_grad():
                got = self(inputs.clone().requires_grad_())
        except RuntimeError:
            return False
        return torch.allclose(got.float(), self.model(inputs).float(), rtol=1e-2, atol=1e-2)

    def __call__(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.model(x)
        size = x.shape[0]
        room = padded_size(size)
        if room > size:
            x = torch.cat([x, x.new_zeros(room - size, *x.shape[1:])])
        key = (*x.shape, *x.stride(), x.dtype)
        if key not in self.graphs:
            example = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())
            self.graphs[key] = torch.cuda.make_graphed_callables(self.model, (example.requires_grad_(),))
        # The graph's output is overwritten by its next replay.
        return self.graphs[key](x)[:size].clone()


def padded_size(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()

"""The decisions of a model, whatever form it and its outputs have."""

import torch
from torch import Tensor

from fastlip import attacks
from fastlip.attacks._model import Model, eval_mode


def decisions(
    model: Model,
    x: Tensor,  # [N, ...]
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    draws: int = 1,
) -> Tensor:
    """The class of largest logit, [N] int64 on the device of ``x``, by the model in eval mode on its own ``device``."""
    network = attacks.prepare(model, x, fast=False, draws=draws)
    with eval_mode(network), torch.no_grad():
        parts = [
            network.judge(part.to(device or x.device)).argmax(1).to(x.device)
            for part in x.split(batch_size or len(x) or 1)
        ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)

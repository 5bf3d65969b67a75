"""BatchNorm over the batches of all processes of a group."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` that shares its parameters and buffers, with BatchNorm statistics over all processes.

    Args:
        model: the network.
        device: where it runs; :class:`torch.nn.SyncBatchNorm` is for GPUs alone.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, memo)
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _SharedBatchNorm(module))
    return network


class _SharedBatchNorm(nn.Module):
    """BatchNorm2d over the batches of all processes as over one batch, for the CPU, which SyncBatchNorm refuses."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not self.training:
            out: Tensor = norm(x)
            return out
        wide = x if x.dtype == torch.float64 else x.float()
        n = dist.get_world_size() * (x.numel() // x.shape[1])
        mean = all_reduce(wide.sum((0, 2, 3))) / n
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.momentum is not None
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var), norm.momentum)
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked += 1
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)

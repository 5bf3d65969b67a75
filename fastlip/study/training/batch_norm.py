"""BatchNorm over the batches of all processes of a group."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from fastlip.study.errors import StudyError

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` that shares its parameters and buffers, with BatchNorm statistics over all processes.

    Args:
        model: the network.
        device: where it runs; :class:`torch.nn.SyncBatchNorm` is for GPUs alone.

    Raises:
        StudyError: a BatchNorm is none of torch's own and may do more, which would be lost.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in (*_KINDS, nn.SyncBatchNorm):
            raise StudyError(
                f"{name} is a BatchNorm of its own kind ({type(module).__name__}), whose statistics cannot be shared; "
                "train in one process",
                status=2,
            )
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, memo)
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted
    for name, module in list(network.named_modules()):
        if isinstance(module, _KINDS):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _SharedBatchNorm(module))
    return network


class _SharedBatchNorm(nn.Module):
    """BatchNorm over the batches of all processes as over one batch, for the CPU, which SyncBatchNorm refuses."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
        super().__init__()
        self.norm = norm
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not self.training:
            out: Tensor = norm(x)
            return out
        wide = x if x.dtype == torch.float64 else x.float()
        axes, shape = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        n = dist.get_world_size() * (x.numel() // x.shape[1])
        mean = all_reduce(wide.sum(axes)) / n
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / n
        if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
            with torch.no_grad():
                norm.num_batches_tracked += 1
                part = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean.to(norm.running_mean), part)
                norm.running_var.lerp_((variance * (n / (n - 1))).to(norm.running_var), part)
        scaled = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
        return scaled.to(x.dtype)

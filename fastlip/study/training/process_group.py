"""Several processes on one run, started by torchrun; alone, every operation here is a no-op.

Training splits each batch over the processes (DistributedDataParallel, with BatchNorm's statistics taken over all of
them); evaluation splits the batches of images. The leader, rank 0, writes all files and speaks to the terminal.
"""

import contextlib
import copy
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

#: Others wait while the leader bounds norms, which takes as long as it takes.
_PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class Team:
    """This process among those of the run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number among those on this machine, which is its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The leader's ``value``, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def sum_(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def device(self, name: str) -> torch.device:
        """The device of this process where the run is on ``name``."""
        return torch.device("cuda", self.local_rank) if name == "cuda" and self.size > 1 else torch.device(name)

    def trainer(self, model: nn.Module) -> nn.Module:
        """What to call in training: the model itself, or its parameters and buffers in DistributedDataParallel."""
        if self.size == 1:
            return model
        return DistributedDataParallel(synchronised(model), broadcast_buffers=False)


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun's environment describes; a team of one without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Team()
        return
    team = Team(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if team.size == 1:
        yield team
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(team.local_rank)
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield team
    finally:
        dist.destroy_process_group()


def merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Per-image arrays of all processes as one process would have made them.

    Rows are put in the order of "id"; an array shorter than it ("image") holds those of the lowest ids.
    """
    parts = [part for part in parts if part]
    order = np.argsort(np.concatenate([part["id"] for part in parts]), kind="stable")
    found = {}
    for name in parts[0]:
        whole = np.concatenate([part[name] for part in parts])
        if len(whole) == len(order):
            found[name] = whole[order]
        else:
            kept = np.concatenate([np.sort(part["id"])[: len(part[name])] for part in parts])
            found[name] = whole[np.argsort(kept, kind="stable")]
    return found


def synchronised(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` on the same parameters and buffers, its BatchNorm taking moments over all."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, memo)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _SharedBatchNorm(module))
    return network


class _SharedBatchNorm(nn.Module):
    """BatchNorm2d over the batches of all processes, as over one batch (torch's SyncBatchNorm refuses the CPU)."""

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

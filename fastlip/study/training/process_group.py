"""Several processes on one run, started by torchrun; alone, every operation here is a no-op.

Training splits each batch over the processes (DistributedDataParallel, with BatchNorm's statistics taken over all of
them); evaluation splits the batches of images. The leader, rank 0, writes all files and speaks to the terminal.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.study.training.batch_norm import synchronised

T = TypeVar("T")

#: Others wait while the leader bounds norms, which takes as long as it takes.
_PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class ProcessGroup:
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

    def broadcast(self, value: T) -> T:
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
def process_group() -> Iterator[ProcessGroup]:
    """The group that torchrun's environment describes; a group of one without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ProcessGroup()
        return
    group = ProcessGroup(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if group.size == 1:
        yield group
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(group.local_rank)
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group()

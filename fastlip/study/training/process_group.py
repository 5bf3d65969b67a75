"""The process group of a run that torchrun started. In a single process, every operation here is a no-op.

Training splits each batch over the processes (DistributedDataParallel, with BatchNorm statistics over all of them).
Evaluation distributes whole batches. Rank 0, the leader, writes all files and all terminal output.
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

#: Timeout of collective operations: the other processes wait while the leader bounds norms, which can take hours.
_PATIENCE = datetime.timedelta(hours=12)


@dataclass(frozen=True)
class ProcessGroup:
    """This process and its place among the processes of the run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine, which is also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The value that the leader passes, returned in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes in order of rank, returned in every process."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def sum_(self, value: Tensor) -> Tensor:
        """Replace ``value`` by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def device(self, name: str) -> torch.device:
        """The device of this process in a run on the device ``name``."""
        return torch.device("cuda", self.local_rank) if name == "cuda" and self.size > 1 else torch.device(name)

    def trainer(self, model: nn.Module) -> nn.Module:
        """The module to call in training: ``model``, or DistributedDataParallel on its parameters and buffers."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(synchronised(model, device), broadcast_buffers=False)


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The process group that torchrun's environment variables describe; a single process without them."""
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

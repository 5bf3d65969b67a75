"""A constrained model under DistributedDataParallel."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from constrained_rank import train


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_every_rank_has_the_same_vectors(tmp_path: Path) -> None:
    # Not by forks: a backward pass in one fails once autograd has threads.
    mp.spawn(train, (2, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(name.endswith(".v") for name in one)
    assert sum(name.startswith("G ") for name in one) == 2
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)

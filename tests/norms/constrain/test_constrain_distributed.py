"""A constrained model under DistributedDataParallel."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.norms import constrain_norms
from fastlip.norms._constrain_norms import constrained_layers


def _train(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)  # so that what is equal afterwards was made so
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = DistributedDataParallel(constrain_norms(layers, (3, 4, 4), bound=0.5))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        F.cross_entropy(model(torch.rand(4, 3, 4, 4)), torch.randint(3, (4,))).backward()
        optimiser.step()
    model(torch.rand(1, 3, 4, 4))
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    state |= {f"G {c.name}": c.tracking.gradient.left for c, _ in constrained_layers(layers)}
    torch.save(state, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_every_rank_has_the_same_vectors(tmp_path: Path) -> None:
    mp.spawn(_train, (2, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(name.endswith(".v") for name in one)
    assert sum(name.startswith("G ") for name in one) == 2
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)

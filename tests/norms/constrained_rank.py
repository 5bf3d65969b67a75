"""One rank of a distributed training under a norm constraint, in a file that a new process can import."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastlip.norms import constrain_norms
from fastlip.norms._constrain.whole_model import constrained_layers


def train(rank: int, world: int, folder: str) -> None:
    """Train for four steps, and save what the rank then holds to ``folder``."""
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
    state |= {f"G {c.name}": c.tracking.gradient.left for c, _ in constrained_layers(layers) if c.tracking.gradient}
    torch.save(state, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()

"""The start vectors of an iteration."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from fastlip.norms._solvers.iteration_config import IterationConfig


def on_device(config: IterationConfig, device: torch.device) -> IterationConfig:
    """The config with a generator on the operators' GPU, seeded by the given one: drawing on a CPU is too slow."""
    if device.type != "cuda" or config.generator.device.type == "cuda":
        return config
    seed = int(torch.randint(2**63 - 1, (), generator=config.generator))
    return replace(config, generator=torch.Generator(device).manual_seed(seed))


def draw_starts(sizes: Sequence[int], config: IterationConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Independent uniform draws from the unit spheres of R^size, in the arithmetic of ``config``.

    They are drawn in float64 on the generator's device, where neighbours of one size are handled together.

    Returns:
        The start vectors of all operators, flat, [starts, size] each; and by how much rounding moved the furthest one
        of each operator, [operators], a tensor on the generator's device for which the host has not waited.
    """
    total, home = config.starts * sum(sizes), config.generator.device
    exact = torch.randn(total, dtype=torch.float64, generator=config.generator, device=home)
    for rows in rows_by_size(exact, sizes, config.starts):
        rows /= torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    rounded = exact.to(config.dtype, copy=True)
    exact -= rounded
    moved = [torch.linalg.vector_norm(rows, dim=2).amax(1) for rows in rows_by_size(exact, sizes, config.starts)]
    return rounded.to(device), torch.cat(moved) + 1e-15


def rows_by_size(flat: Tensor, sizes: Sequence[int], starts: int) -> Iterator[Tensor]:
    """Views [operators, starts, size] of neighbours of equal size, in ``flat`` one after the other."""
    at = 0
    for size, run in groupby(sizes):
        count = len(list(run))
        end = at + count * starts * size
        yield flat[at:end].view(count, starts, size)
        at = end


@lru_cache(maxsize=64)
def fixed_direction(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers without a pattern that an operator could share, [size], the same in each run."""
    return torch.sin(torch.arange(size, dtype=torch.float64, device=device).square() + 1.0).to(dtype)

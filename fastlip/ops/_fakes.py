"""The shapes that operators return, without computing anything, for tracers and torch.compile."""

import torch
from torch import Tensor

from fastlip.ops import _register  # noqa: F401  # defines the operators
from fastlip.ops._schemas import SCHEMAS


def _in_place(x: Tensor, *others: object) -> None:
    return None


for _name, _schema in SCHEMAS.items():
    if _schema.endswith("-> ()"):
        torch.library.register_fake(f"fastlip::{_name}")(_in_place)


@torch.library.register_fake("fastlip::random_start")
def _random_start(x0: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x0)


@torch.library.register_fake("fastlip::judge")
def _judge(logits: Tensor, labels: Tensor, *others: object, **record: object) -> tuple[Tensor, ...]:
    flags = [torch.empty_like(labels, dtype=torch.bool) for _ in range(3)]
    return logits.new_empty(len(logits)), torch.empty_like(logits), *flags


@torch.library.register_fake("fastlip::top_eigenpairs")
def _top_eigenpairs(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    return diagonal.new_empty(len(diagonal)), torch.empty_like(diagonal)


@torch.library.register_fake("fastlip::krylov_bound")
def _krylov_bound(diagonal: Tensor, *others: object) -> Tensor:
    return diagonal.new_empty(len(diagonal))

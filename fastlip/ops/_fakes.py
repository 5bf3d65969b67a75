"""The shapes that operators return, without computing anything, for tracers and torch.compile."""

import torch
from torch import Tensor

from fastlip.ops import _register  # noqa: F401  # defines the operators
from fastlip.ops._schemas import HOST_SCHEMAS, SCHEMAS


def _in_place(*operands: object) -> None:
    """Nothing; but a tensor on the meta device beside one that is not is answered here, and shall not be."""
    listed = (t for given in operands for t in (given if isinstance(given, list) else [given]))
    devices = {t.device: None for t in listed if isinstance(t, Tensor)}
    if len(devices) > 1:
        first, second = list(devices)[:2]
        raise RuntimeError(f"all tensors must be on {first}, got one on {second}")


for _name, _schema in (SCHEMAS | HOST_SCHEMAS).items():
    if _schema.endswith("-> ()"):
        torch.library.register_fake(f"fastlip::{_name}")(_in_place)


@torch.library.register_fake("fastlip::random_start")
def _random_start(x0: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x0)


@torch.library.register_fake("fastlip::judge")
def _judge(logits: Tensor, labels: Tensor, *others: object, **record: object) -> tuple[Tensor, ...]:
    for t in (labels, *others, *record.values()):
        if isinstance(t, Tensor) and t.device != logits.device:
            raise RuntimeError(f"judge: all tensors must be on {logits.device}, got one on {t.device}")
    flags = [torch.empty_like(labels, dtype=torch.bool) for _ in range(3)]
    return logits.new_empty(logits.shape[0]), torch.empty_like(logits), *flags


@torch.library.register_fake("fastlip::norm_along")
def _norm_along(weight: Tensor, *others: object) -> Tensor:
    return weight.new_empty((), dtype=torch.float64)


@torch.library.register_fake("fastlip::scaled_weight_grad")
def _scaled_weight_grad(grad: Tensor, *others: object) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("fastlip::top_eigenpairs")
def _top_eigenpairs(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    return diagonal.new_empty(len(diagonal)), torch.empty_like(diagonal)


@torch.library.register_fake("fastlip::krylov_bound")
def _krylov_bound(diagonal: Tensor, *others: object) -> Tensor:
    return diagonal.new_empty(len(diagonal))

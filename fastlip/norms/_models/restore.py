"""Undo what a forward pass changes on a model: attributes, containers, tensors, and random states."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Containers that a forward pass may write into; the items of larger ones than this are not looked at.
_CONTAINERS = (list, dict, set, deque)
_MOST_ITEMS = 10_000
#: Most numbers in a model's parameters with which they are copied, or widened to float64.
MOST_COPIED = 1 << 27
#: Attributes that every module has and forwards rarely change, such as hooks. They are restored after all runs, not
#: after each.
_RARELY_CHANGED = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}


@contextmanager
def as_found(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Undo afterwards whatever runs of a model change on its modules.

    All attributes are restored, containers included, and the values of buffers and other tensors; with ``parameters``
    those of parameters too.

    Raises:
        ValueError: a forward wrote into parameters that are too large for a copy.
    """
    snapshot = _Snapshot(model, parameters)
    try:
        yield
    finally:
        written = snapshot.restore()
    if written is not None:
        raise ValueError(f"the model's forward writes into its parameter {written}, so that no two runs are alike")


class _Snapshot:
    """The state that a forward pass can change on a model's modules."""

    def __init__(self, model: nn.Module, parameters: bool) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in list(model.modules())]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, Tensor] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        for own, _ in self._attributes:
            for name, value in own.items():
                if parameters or name not in _RARELY_CHANGED:
                    self._keep(value)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._outer = parameters
        copied = parameters and sum(p.numel() for p in model.parameters()) <= MOST_COPIED
        held = [t for t in self._tensors.values() if id(t) not in self._names]
        # A forward may exchange a tensor's data, or write into them: both the data and a copy are kept.
        self._held = [(t, t.data, t.detach().clone(), t._version) for t in held]
        self._wanted = [(t, t.requires_grad) for t in self._tensors.values() if t.is_leaf]
        self._parameters = [
            (t, t.data, t.detach().clone() if copied else None, version_of(t))
            for t in self._tensors.values()
            if id(t) in self._names
        ]

    def _keep(self, value: object) -> None:
        if isinstance(value, Tensor):
            if not value.is_inference() or isinstance(value, nn.Parameter):
                self._tensors[id(value)] = value
        elif isinstance(value, np.ndarray):
            self._arrays[id(value)] = (value, value.copy())
        elif isinstance(value, torch.Generator):
            self._generators[id(value)] = (value, value.get_state())
        elif isinstance(value, tuple):
            for inner in value:
                self._keep(inner)
        elif isinstance(value, _CONTAINERS) and id(value) not in self._containers:
            self._containers[id(value)] = (value, value.copy())
            if len(value) <= _MOST_ITEMS:
                for inner in value.values() if isinstance(value, dict) else value:
                    self._keep(inner)

    def restore(self) -> str | None:
        """Undo all changes; returns the name of a parameter that was written and cannot be restored, or None."""
        for own, before in self._attributes:
            if not _same(own, before):
                own.clear()
                own.update(before)
        for container, before in self._containers.values():
            if _same(container, before):
                continue
            container.clear()
            container.extend(before) if isinstance(container, (list, deque)) else container.update(before)
        for tensor, data, *_ in (*self._held, *self._parameters):
            if tensor.dtype != data.dtype or tensor.shape != data.shape or _address(tensor) != _address(data):
                tensor.data = data
        for leaf, wanted in self._wanted:
            if not leaf.is_leaf:  # it was written into while gradients were recorded
                leaf.detach_()
            if leaf.requires_grad != wanted:
                leaf.requires_grad_(wanted)
        for array, numbers in self._arrays.values():
            array[...] = numbers
        for generator, state in self._generators.values():
            generator.set_state(state)
        for tensor, data, values, version in self._held:
            if tensor._version != version:
                data.copy_(values)
        copied = [
            (data, values) for _, data, values, _ in self._parameters if values is not None and _has_numbers(data)
        ]
        if self._outer:
            copied += [(data, values) for _, data, values, _ in self._held if _has_numbers(data) and _is_dense(data)]
        if copied:
            # No version counts writes through .data, so values are compared, with one read for all.
            written = torch.stack([_differ(data, values).cpu() for data, values in copied]).tolist()
            for (data, values), changed in zip(copied, written, strict=True):
                if changed:
                    data.copy_(values)
        uncopied = [(t, v) for t, _, values, v in self._parameters if values is None and self._outer]
        return next((self._names[id(t)] for t, version in uncopied if version_of(t) != version), None)


def _has_numbers(t: Tensor) -> bool:
    return t.numel() > 0 and not t.is_meta


def _is_dense(t: Tensor) -> bool:
    return t.layout == torch.strided


def _address(t: Tensor) -> int:
    """The address of a tensor's data; 0 for sparse tensors, which have no single one."""
    return t.data_ptr() if _is_dense(t) else 0


def _differ(now: Tensor, before: Tensor) -> Tensor:
    """Whether any number has changed, 0-d bool; a zero's sign counts."""
    differ = (now != before).any()
    if now.is_floating_point():
        differ |= (torch.signbit(now) != torch.signbit(before)).any()
    return differ


def version_of(t: Tensor) -> int:
    """Number of in-place changes to a tensor; 0 for tensors of inference mode, whose changes are not counted."""
    return 0 if t.is_inference() else t._version


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects as before, in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(now.items(), before.items(), strict=True))
    return all(v is w for v, w in zip(now, before, strict=True))


@contextmanager
def random_state() -> Iterator[None]:
    """Restore the random states of Python and NumPy afterwards; torch has ``fork_rng`` for its own."""
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002, a forward may draw from it
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002

"""The state of an evaluation in a file, from which a later call goes on."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlip._files import replacing

#: Seconds between two savings while an attack runs.
_EVERY = 60.0


class SavedState:
    """Where an evaluation of certain images with certain settings keeps what it has so far.

    Args:
        path: the file; nothing is kept if None.
        settings: what makes another evaluation: tensors, values with a repr, and tuples and dicts of them.
        model: what is evaluated. The weights of a module make another evaluation, too; those of a function are unknown.

    Raises:
        ValueError: the file belongs to another evaluation, or is none of ours.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: tuple[Any, ...], model: object) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = "" if path is None else _fingerprint(settings)
        weights = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
        self.weights = "" if path is None else _fingerprint(weights)
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved; None where there is no file yet."""
        if self.path is None or not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
        except Exception:  # what torch.load raises depends on what is in the file
            content = None
        if not isinstance(content, dict) or "fingerprint" not in content:
            raise ValueError(f"state is not the state of an evaluation: {self.path}")
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(f"state belongs to other images, attacks or settings: {self.path}")
        if content.get("weights") != self.weights:
            raise ValueError(f"state belongs to another model, which has other weights: {self.path}")
        state: dict[str, Any] = content["state"]
        return state

    def save(self, state: Callable[[], dict[str, Any]], *, now: bool) -> None:
        """Keep ``state()``, if it is long enough ago or ``now``."""
        if self.path is None or not (now or time.monotonic() - self.saved > _EVERY):
            return
        with replacing(self.path) as temporary:
            torch.save({"fingerprint": self.fingerprint, "weights": self.weights, "state": state()}, temporary)
        self.saved = time.monotonic()


def _fingerprint(settings: tuple[Any, ...]) -> str:
    digest = hashlib.sha256()
    for value in settings:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, tuple | list):
            digest.update(_fingerprint(tuple(value)).encode())
        elif isinstance(value, dict):
            digest.update(_fingerprint(tuple(sorted(value.items()))).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()

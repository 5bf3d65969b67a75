"""The state of an evaluation in a file, from which a later call goes on."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlip._files import replacing

#: Seconds between two savings while an attack runs.
_EVERY = 60.0
#: What a callable says of itself where its own name does not tell it from others.
_NAME = "state_name"
#: Values that their repr tells apart.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, np.generic)


class SavedState:
    """Where an evaluation of certain images with certain settings keeps what it has so far.

    Images come in batches, whose digests are kept in their order.

    Args:
        path: the file; nothing is kept if None.
        settings: what makes another evaluation, by name: tensors, plain values, callables, and collections of them.
        model: what is evaluated. The weights of a module make another evaluation, too; those of a function are unknown.

    Attributes:
        finished: the batches that all attacks are done with: how many came together, for each part in turn.
        run: the state of the attacks on the batches after those; None where they have not begun.
        results: those of the batches that are finished.

    Raises:
        ValueError: the file belongs to another evaluation, or is none of ours; or a callable in ``settings`` has no
            name by which another process would know it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any], model: object) -> None:
        self.path = None if path is None else Path(path)
        weights = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
        self.fingerprint = self.weights = ""
        if path is not None:
            self.fingerprint = _fingerprint({name: described(value, name) for name, value in settings.items()})
            self.weights = _fingerprint(weights)
        self.saved = time.monotonic()
        self.finished: list[int] = []
        self.run: dict[str, Any] | None = None
        self.results: dict[str, Any] | None = None
        self._digests: list[str] = []  # of all batches so far
        self._known: list[str] = []  # those of the file
        self._load()

    def _load(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            content = torch.load(self.path, weights_only=True)
        except Exception:  # what torch.load raises depends on what is in the file
            content = None
        if not isinstance(content, dict) or not {"fingerprint", "digests"} <= content.keys():
            raise ValueError(f"state is not the state of an evaluation: {self.path}")
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(f"state belongs to other images, attacks or settings: {self.path}")
        if content.get("weights") != self.weights:
            raise ValueError(f"state belongs to another model, which has other weights: {self.path}")
        self._known = content["digests"]
        self.finished, self.run, self.results = content["finished"], content["run"], content["results"]

    def check(
        self,
        images: Tensor,  # [B, ...]
        labels: Tensor,  # [B]
    ) -> None:
        """Take note of the next batch.

        Raises:
            ValueError: it is not the one that the state was made with.
        """
        if self.path is None:
            return
        number, digest = len(self._digests), _fingerprint((images, labels))
        if number < len(self._known) and digest != self._known[number]:
            raise ValueError(
                f"state belongs to other images: batch {number} differs (a loader must not shuffle, change its images "
                f"or the size of its batches): {self.path}"
            )
        self._digests.append(digest)

    def check_end(self) -> None:
        """Raise a ValueError where there are fewer batches than the state was made with."""
        if len(self._digests) < len(self._known):
            now, then = len(self._digests), len(self._known)
            raise ValueError(f"state belongs to other images: there were {then} batches, not {now}: {self.path}")

    def save(
        self,
        results: Callable[[], dict[str, Any]],
        run: Callable[[], dict[str, Any]] | None,
        now: bool,
    ) -> None:
        """Keep ``results()`` and ``run()``, if it is long enough ago or ``now``.

        Args:
            results: gives the results of the batches that are finished.
            run: gives the state of the attacks on the batches after those; None where all are finished.
            now: whether to save in any case.
        """
        if run is None:
            self.finished.append(len(self._digests) - sum(self.finished))
        if self.path is None or not (now or time.monotonic() - self.saved > _EVERY):
            return
        content = {
            "fingerprint": self.fingerprint, "weights": self.weights, "digests": self._digests,
            "finished": self.finished, "results": results(), "run": None if run is None else run(),
        }  # fmt: skip
        with replacing(self.path) as temporary:
            torch.save(content, temporary)
        self.saved = time.monotonic()


def described(value: Any, name: str) -> Any:
    """What tells ``value`` from others, in another process too: plain values and tensors, in tuples.

    A function is told by its module and name, and a ``functools.partial`` by what it wraps and its arguments. Any other
    object is told by its class and its attributes. An attribute ``state_name``, a str, takes the place of all of that.

    Args:
        value: what is to be told from others.
        name: what the caller knows it as.

    Raises:
        ValueError: something has no name that another process would know: a lambda, a function inside another one, or
            an object that holds what cannot be compared.
    """
    return _described(value, name, ())


def _described(value: Any, name: str, inside: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, (Tensor, *_PLAIN)):
        return value
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    own = getattr(value, _NAME, None)
    if isinstance(own, str):
        return "named", own
    if id(value) in inside:  # an object that holds itself says nothing more of it
        return "again", len(inside) - inside.index(id(value))
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        parts = {repr(_described(k, name, inside)): _described(v, name, inside) for k, v in value.items()}
        return "mapping", tuple(parts.items())
    if isinstance(value, (set, frozenset)):
        return "set", tuple(sorted(repr(_described(v, name, inside)) for v in value))
    if isinstance(value, (list, tuple)):
        return "sequence", tuple(_described(v, name, inside) for v in value)
    if isinstance(value, torch.Generator):
        return "generator", value.get_state()
    if isinstance(value, partial):
        return "partial", tuple(_described(v, name, inside) for v in (value.func, value.args, value.keywords))
    if hasattr(value, "__self__") and hasattr(value, "__func__"):
        return "method", value.__func__.__qualname__, _described(value.__self__, name, inside)
    if hasattr(value, "__qualname__"):  # a function or a class
        if "<" not in value.__qualname__:
            return value.__module__, value.__qualname__
    elif hasattr(value, "__dict__"):
        kind = type(value)
        return kind.__module__, kind.__qualname__, _described(vars(value), name, inside)
    raise ValueError(
        f"state needs a name for {name}, which holds {_shown(value)} that no other process would know: define it at "
        f"the top of a module, or give it an attribute {_NAME}"
    )


def _shown(value: Any) -> str:
    return f"the function {value.__qualname__}" if hasattr(value, "__qualname__") else f"a {type(value).__qualname__}"


def _fingerprint(value: Any) -> str:
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(_fingerprint(sorted(value.items())).encode())
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for part in value:
            digest.update(_fingerprint(part).encode())
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()

"""The images of an evaluation: all at once, or from batches of which a few are in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastlip.attacks._arguments import INTEGERS, LABELS_MISSING, check_images, checked_inputs, shown
from fastlip.attacks._quantize import grid_of
from fastlip.attacks._saved import SavedState
from fastlip.attacks._suite_run import Images
from fastlip.ops import Bounds

#: Maps images [B, ...] to their bounds.
BoundsOf = Callable[[Tensor], Bounds]

#: Batches of the evaluation that are in memory together, so that the images that stand fill batches once others fell.
_TOGETHER = 4


class Source:
    """Images, labels and what belongs to them, checked, in parts that are in memory one after another.

    Args:
        inputs: images, [N, ...], or an iterable of batches (images, labels, ...).
        labels: [N]; None where ``inputs`` are batches.
        ids: [N], or None for 0 .. N-1.
        bounds: bounds, or a function that maps images to them.
        quantize: bits of a value.
        attacks: the attacks, whose own bounds must not have rows for images that come in batches.
        batch_size: images in a batch of the evaluation. A part of batches has four times as many, and what the last one
            has beyond.

    Attributes:
        streams: whether images come in batches.
        total: how many images there are; -1 where that is not known before the last one.

    Raises:
        TypeError: there are neither images with labels nor batches.
    """

    def __init__(
        self,
        inputs: Any,
        labels: Any,
        *,
        ids: Tensor | None,
        bounds: Bounds | BoundsOf,
        quantize: int | None,
        attacks: Iterable[object],
        batch_size: int,
    ) -> None:
        self.streams = labels is None
        if not self.streams:
            check_images(inputs)
        elif isinstance(inputs, Tensor):
            raise TypeError(LABELS_MISSING)
        elif isinstance(inputs, str) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs must be a tensor or batches, not {shown(inputs)}")
        self.inputs, self.labels = inputs, labels
        self.ids, self.bounds, self.quantize = ids, bounds, quantize
        self.fixed = [bounds, *(a.keywords.get("bounds") for a in attacks if isinstance(a, partial))]
        self.size = _TOGETHER * batch_size
        self.total = _length(inputs) if self.streams else len(inputs)
        if ids is not None:
            _check_integers(ids, "ids", self.total)

    def check_order(self) -> None:
        """Raise a ValueError where a DataLoader gives its images in another order each time."""
        if isinstance(self.inputs, DataLoader):
            sampler = getattr(self.inputs.batch_sampler, "sampler", self.inputs.sampler)
            if "Random" in type(sampler).__name__ or getattr(sampler, "shuffle", False) is True:
                name = type(sampler).__name__
                raise ValueError(f"state needs a loader that does not shuffle (shuffle=False), got one with a {name}")

    def parts(self, saved: SavedState) -> Iterator[Images]:
        """The images, part after part; those that ``saved`` is done with in the same parts as then."""
        first = 0
        for x, y in self._streamed(saved) if self.streams else self._whole(saved):
            part = self._checked(x, y, first)
            first += len(x)
            del x, y  # whose memory is the caller's to free
            yield part
            del part
        saved.check_end()

    def _whole(self, saved: SavedState) -> Iterator[tuple[Tensor, Tensor]]:
        _check_integers(self.labels, "labels", self.total)
        saved.check(self.inputs, self.labels)
        yield self.inputs, self.labels

    def _streamed(self, saved: SavedState) -> Iterator[tuple[Tensor, Tensor]]:
        images: list[Tensor] = []
        labels: list[Tensor] = []
        finished = iter(list(saved.finished))
        wanted = next(finished, None)
        empty = True
        for batch in self.inputs:
            empty = False
            if not isinstance(batch, Sequence) or len(batch) < 2 or not all(isinstance(p, Tensor) for p in batch[:2]):
                raise TypeError("inputs must be batches (images, labels, ...) of tensors where no labels are given")
            x, y = batch[0].cpu(), batch[1].cpu()
            check_images(x)
            _check_integers(y, "labels", len(x))
            saved.check(x, y)
            images.append(x)
            labels.append(y)
            if sum(map(len, labels)) >= self.size if wanted is None else len(labels) == wanted:
                yield torch.cat(images), torch.cat(labels)
                images, labels = [], []
                wanted = next(finished, None)
        if empty:
            raise ValueError("inputs hold no batch")
        saved.check_end()
        if images:
            yield torch.cat(images), torch.cat(labels)

    def _checked(self, x: Tensor, y: Tensor, first: int) -> Images:
        """Images with what belongs to them, all on the device of ``x``."""
        if self.streams and any(map(partial(_has_rows, dims=x.dim()), self.fixed)):
            raise ValueError(
                "bounds must be the same for all images where these come in batches: give evaluate a function of a "
                "batch's images (a partial of feature_box)"
            )
        bounds = self.bounds(x) if callable(self.bounds) else self.bounds
        if isinstance(bounds, tuple) and len(bounds) == 2:
            lo, hi = (b.to(x.device) if isinstance(b, Tensor) else b for b in bounds)
            bounds = lo, hi
        x, bounds = checked_inputs(x, bounds)
        if self.ids is None:
            ids = torch.arange(first, first + len(x))
        else:
            ids = self.ids[first : first + len(x)].long()
            _check_integers(ids, "ids", len(x))
        return Images(x, y.long(), ids, bounds, grid_of(self.quantize, x, bounds))


def _check_integers(values: Any, what: str, size: int) -> None:
    """Raise where there is not one integer for each of ``size`` images (any number of them if -1)."""
    shape = f"[{'N' if size < 0 else size}]"
    if not isinstance(values, Tensor) or values.dtype not in INTEGERS:
        raise TypeError(f"{what} must be a tensor of integers of shape {shape}, got {shown(values)}")
    if values.dim() != 1 or (size >= 0 and len(values) != size):
        raise ValueError(f"{what} must be of shape {shape}, got {list(values.shape)}")


def _has_rows(bounds: object, dims: int) -> bool:
    """Whether bounds of inputs with ``dims`` axes have a row for each of them."""
    pair = bounds if isinstance(bounds, (tuple, list)) else ()
    return any(isinstance(b, Tensor) and b.dim() == dims and len(b) > 1 for b in pair)


def _length(batches: Any) -> int:
    """How many images there are; -1 where that is not known before the last one."""
    try:
        if isinstance(batches, DataLoader):
            told = not batches.drop_last and batches.batch_size is not None
            return len(batches.sampler) if told else -1  # type: ignore[arg-type]  # a sampler need not have a length
        if isinstance(batches, Sequence):
            return sum(len(batch[1]) for batch in batches)
    except (TypeError, IndexError, KeyError, NotImplementedError):
        pass
    return -1

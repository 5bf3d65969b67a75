"""Iterations of an attack as CUDA graphs: forward, judge, backward and step by one launch, without the host.

A graph reads and writes the same memory each time. All that an iteration touches (:class:`Iterates`) therefore lives in
buffers with a row for each image of the largest batch so far, whose first rows are a batch's room: a graph is captured
for each size of that room, and as images fall the others move up to the front of a smaller one.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlip._cuda_graph import captured
from fastlip.attacks._batch import Iterates, map_rows
from fastlip.ops import PerSample

Iterate = Callable[[Iterates], None]

#: Graphs that are kept; of the others the least recently used goes first.
_MOST = 32
#: Share of the device's memory that graphs and buffers may take.
_SHARE = 0.5
#: Steps that have to be left for a capture to be worth it, which takes as long as about three of them.
_WORTH = 4
#: Iterations before a capture: kernels are loaded, workspaces allocated and algorithms chosen.
_WARM_UP = 2


class Capture(Protocol):
    """How an iteration is recorded."""

    def __call__(self, iterate: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Record ``iterate``, which touches the same memory each time, and return what replays it.

        It may be carried out before, and what it changes then does not matter. RuntimeError where it cannot be
        recorded.
        """

    def budget(self, device: torch.device) -> int:
        """Bytes that graphs may take if the user says nothing else."""

    def bytes(self) -> int:
        """Memory that all recordings hold together, beside the buffers."""

    def release(self) -> None:
        """Called when no recording is left, whose memory can go."""


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory.

    A graph leaves nothing in the pool that another one needs: what lasts is in the buffers. So the pool is about as
    large as the largest graph needs, whatever their number, and graphs are replayed in any order, but not at once.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, iterate: Callable[[], None], device: torch.device) -> Callable[[], None]:
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            # On the stream of the capture, because cuBLAS has a workspace for each.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    iterate()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.empty_cache()  # what passes outside of graphs left behind, which the pool takes the place of
            graph = captured(iterate, stream, self._pool)
            current.wait_stream(stream)
        return graph.replay

    def budget(self, device: torch.device) -> int:
        return int(_SHARE * torch.cuda.get_device_properties(device).total_memory)

    def bytes(self) -> int:
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def release(self) -> None:
        self._pool = None


@dataclass
class Graph:
    """Room for images in the buffers, and what takes a step in all of it."""

    now: Iterates
    replay: Callable[[], None]
    room: int
    most: int

    def fits(self, size: int) -> bool:
        """Whether so many images need as much room."""
        return roomy_size(size, self.most) == self.room


class IterationGraphs:
    """The graphs of attacks on one network; an attack on any number of images shares them with all others.

    At most ``most`` graphs are alive, and with their buffers they take at most ``budget`` bytes; what goes beyond is
    carried out as it is, with the same results. They belong to one thread.

    Args:
        capture: how iterations are recorded; as CUDA graphs if None.
        most: how many graphs are kept.
        budget: bytes that they may take; half of the device's memory if None.

    Attributes:
        captures: how many iterations have been recorded so far.
        replays: how many were replayed.
    """

    def __init__(self, capture: Capture | None = None, *, most: int = _MOST, budget: int | None = None) -> None:
        self.captures = self.replays = 0
        self._capture: Capture = CudaCapture() if capture is None else capture
        self._most, self._budget = most, budget
        self._graphs: OrderedDict[tuple[Hashable, int], Callable[[], None]] = OrderedDict()
        self._buffers: dict[Hashable, Iterates] = {}
        self._refused: set[Hashable] = set()

    @property
    def alive(self) -> int:
        """How many graphs there are now."""
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """Memory that graphs and buffers hold now."""
        tensors = (t for buffers in self._buffers.values() for t in _rows(buffers))
        return self._capture.bytes() + sum(t.untyped_storage().nbytes() for t in tensors)

    def __repr__(self) -> str:
        return f"{self.alive} graphs, {self.bytes / 2**20:.0f} MiB, {self.captures} captures, {self.replays} replays"

    def clear(self) -> None:
        """Free all graphs and buffers."""
        self._graphs.clear()
        self._buffers.clear()
        self._capture.release()

    def place(self, settings: Hashable, iterate: Iterate, now: Iterates, steps_left: int) -> Graph | None:
        """Move ``now`` into buffers and return the graph of ``iterate`` on them; None where there is to be none.

        Args:
            settings: all that ``iterate`` depends on beside the iterates.
            iterate: takes a step of iterates in place, without waiting for the device.
            now: the iterates.
            steps_left: how often the graph would be replayed.
        """
        now = _all_in_rows(now)
        key = (settings, _structure(now))
        size = len(now)
        buffers = self._buffers.get(key)
        most = size if buffers is None else max(size, len(buffers))
        room = roomy_size(size, most)
        known = buffers is not None and len(buffers) == most and (key, room) in self._graphs
        if key in self._refused or (steps_left < _WORTH and not known):
            return None
        if not known:
            try:
                known = self._record(key, iterate, now, room, most)
            except RuntimeError as error:
                warnings.warn(f"iterations are not replayed, since their capture failed: {error}", stacklevel=2)
                known = False
            if not known:
                self._refused.add(key)
                self._forget(key)
                return None
        buffers = self._buffers[key]
        _load(buffers, now, room)
        self._graphs.move_to_end((key, room))
        replay = self._graphs[key, room]

        def replayed() -> None:
            self.replays += 1
            replay()

        return Graph(map_rows(buffers, lambda t: t[:size], most), replayed, room, most)

    def _record(self, key: Hashable, iterate: Iterate, now: Iterates, room: int, most: int) -> bool:
        """Make a graph, and buffers for it; False where that takes more memory than there may be."""
        device = now.x.device
        budget = self._capture.budget(device) if self._budget is None else self._budget
        for _ in range(2):
            if key not in self._buffers or len(self._buffers[key]) < most:
                self._forget(key)
                self._buffers[key] = map_rows(now, lambda t: _empty_rows(t, most), len(now))
            buffers = self._buffers[key]
            _load(buffers, now, room)
            views = map_rows(buffers, lambda t: t[:room], most)
            self._graphs[key, room] = self._capture(partial(iterate, views), device)
            self.captures += 1
            while len(self._graphs) > self._most:
                (old, _), _ = self._graphs.popitem(last=False)
                if not any(k == old for k, _ in self._graphs):
                    del self._buffers[old]
            if self.bytes <= budget:
                return True
            self.clear()  # and once more, with nothing beside it
        return False

    def _forget(self, key: Hashable) -> None:
        """Free the buffers of ``key`` and all graphs that use them."""
        for known in [k for k in self._graphs if k[0] == key]:
            del self._graphs[known]
        self._buffers.pop(key, None)
        if not self._graphs:
            self._capture.release()


def roomy_size(size: int, most: int) -> int:
    """The room for ``size`` images, at most an eighth more than they need: 1, 2, ..., 16, 18, ..., 32, 36, ..."""
    step = 1 << max(size.bit_length() - 4, 0)
    return min(-(-size // step) * step, most)


def _all_in_rows(now: Iterates) -> Iterates:
    """``now`` with a row for each image of everything that may differ between calls with the same graph."""
    batch, x = now.batch, now.x

    def in_rows(value: PerSample) -> Tensor:
        return value.to(x.dtype) if isinstance(value, Tensor) else torch.full_like(batch.rows, value, dtype=x.dtype)

    lo, hi = (torch.empty_like(batch.x0).copy_(b) if isinstance(b, Tensor) else b for b in batch.bounds)
    batch = replace(batch, eps=in_rows(batch.eps), step_size=in_rows(batch.step_size), bounds=(lo, hi))
    return replace(now, batch=batch)


def _structure(now: Iterates) -> Hashable:
    """What iterates in the same buffers have in common."""
    batch, record, state = now.batch, now.record, now.state
    present = tuple(part is not None for part in (batch.targets, batch.toward, now.best, record, state))
    numbers = tuple(b for b in batch.bounds if not isinstance(b, Tensor))
    constant = (
        present, tuple(isinstance(b, Tensor) for b in batch.bounds), numbers, now.x.device,
        record is not None and record.early_stop, 0 if state is None else len(state.schedule),
    )  # fmt: skip
    return constant, tuple((t.dtype, t.shape[1:], t.stride()[1:]) for t in _rows(now))


def _rows(now: Iterates) -> list[Tensor]:
    """All tensors of ``now`` with a row for each image, always in the same order."""
    found: list[Tensor] = []

    def seen(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_rows(now, seen, len(now))
    return found


def _empty_rows(t: Tensor, size: int) -> Tensor:
    """Room for ``size`` rows in the layout of ``t``."""
    strides = (math.prod(t.shape[1:]), *t.stride()[1:])
    return torch.empty_strided((size, *t.shape[1:]), strides, dtype=t.dtype, device=t.device)


def _load(buffers: Iterates, now: Iterates, room: int) -> None:
    """Copy ``now`` to the front of ``buffers``; the rest of the ``room`` gets its first image, as a finished one."""
    size = len(now)
    for to, rows in zip(_rows(buffers), _rows(now), strict=True):
        to[:size].copy_(rows)
        to[size:room].copy_(rows[:1].expand_as(to[size:room]))
    if buffers.record is not None:
        buffers.record.succeeded[size:room] = True
    if buffers.state is not None and now.state is not None:
        buffers.state.schedule.copy_(now.state.schedule)

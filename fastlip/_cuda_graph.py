"""The capture of a CUDA graph."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def captured(work: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """The graph of ``work``, recorded on ``stream``, in the memory ``pool`` if one is given.

    Unlike ``torch.cuda.graph`` it neither collects garbage nor empties the allocator's cache, so that a capture costs
    no more than a few replays.

    Raises:
        RuntimeError: ``work`` cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    return graph

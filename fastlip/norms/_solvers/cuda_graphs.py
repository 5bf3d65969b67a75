"""CUDA graphs of a few steps, replayed where launching their kernels could take longer than running them."""

import warnings
from collections.abc import Callable

import torch

from fastlip._cuda_graph import captured
from fastlip.ops import backends

Step = Callable[[], None]
Runner = Callable[[Step], None]

#: Elements of all vectors of a half step above which launches hide behind the kernels: there a graph saves nothing, and
#: copying the vectors out of its fixed memory would cost more. Estimated, not measured.
_HIDDEN = 1 << 24


def worthwhile(device: torch.device, elements: int) -> bool:
    """Whether steps on vectors of so many elements are better replayed; the reference backend cannot be captured."""
    return device.type == "cuda" and elements <= _HIDDEN and backends["cuda"].name != "reference"


class Replayed:
    """Runs a step that reads and writes the same memory each time, and nothing on the host.

    The first call runs the step as it is, which loads the kernels; the second one captures it. Where the capture fails,
    every call runs the step as it is, after a warning. The step is passed to each call and not kept: a reference to it
    would form a cycle, and keep its memory alive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step) -> None:
        self._calls += 1
        if self._calls == 2:
            self._graph = _captured(step, self._device)
        if self._graph is None:
            step()
        else:
            self._graph.replay()


def _captured(step: Step, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """The graph of the step; None, with a warning, where it cannot be captured."""
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return captured(step, stream)
    except RuntimeError as error:
        warnings.warn(f"steps are launched one by one, since CUDA graph capture failed: {error}", stacklevel=2)
        return None

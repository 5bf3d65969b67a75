"""How torch computes while a run is carried out."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

from fastlip.study.settings.machine import Machine


@contextlib.contextmanager
def numerics(machine: Machine) -> Iterator[None]:
    """The threads and the rules of arithmetic of a run within the block.

    float32 means float32 everywhere: torch would let cuDNN round the inputs of convolutions to TF32. On a GPU the
    algorithms are deterministic, so that a resumed run ends like one that was never interrupted. An operator without a
    deterministic form is used with a warning, because a model of the user's may need it. The price is time alone: cuDNN
    does not try its algorithms out, and sums over equal indices are sorted first. On a CPU nothing needs to be switched
    on, and sums do not depend on anything but the number of threads.
    """
    memory: Any = torch.utils.deterministic  # whose one attribute torch sets at run time
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads, fills = torch.get_num_threads(), memory.fill_uninitialized_memory
    torch.set_num_threads(machine.threads)
    cudnn.allow_tf32 = products.allow_tf32 = machine.tf32
    if machine.deterministic:
        cudnn.deterministic, cudnn.benchmark = True, False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        memory.fill_uninitialized_memory = False  # nothing here reads memory before it is written
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        memory.fill_uninitialized_memory = fills

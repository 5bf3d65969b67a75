"""Which operators are iterated together, within the memory that their vectors may take."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from fastlip.norms._operators.composed import AnyOperator, Composed, parts, weight_numel
from fastlip.norms._operators.masked import Masked
from fastlip.norms._options import ResolvedOptions
from fastlip.norms._solvers.iteration_config import IterationConfig, IterationResult
from fastlip.norms._solvers.lanczos import lanczos_norms
from fastlip.norms._solvers.power import power_norms

#: Bytes of vectors that are iterated at once on a CPU: more gain nothing there, and cost page faults.
_CPU_BATCH = 1 << 28
#: Most steps of an iteration where the options do not say.
_LANCZOS_STEPS, _POWER_STEPS = 300, 2000


class _Batch(NamedTuple):
    """Operators that are iterated at once, and the most steps that they may take."""

    keys: list[int]
    max_steps: int


def iterate_in_batches(
    ops: Mapping[int, AnyOperator], eta: float, options: ResolvedOptions
) -> Iterator[tuple[int, IterationResult]]:
    """Keys of ``ops`` and results of normalised operators; each upper side fails with probability at most ``eta``."""
    solver = power_norms if options.method == "power" else lanczos_norms
    for batch in _batches(ops, options):
        config = IterationConfig(eta, options.starts, options.rtol, batch.max_steps, options.dtype, options.generator)
        yield from zip(batch.keys, solver([ops[key] for key in batch.keys], config), strict=True)


def _batches(ops: Mapping[int, AnyOperator], options: ResolvedOptions) -> Iterator[_Batch]:
    """Operators of one kind and device, within the memory of the options where there are several."""
    together: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for key, op in ops.items():
        together[_kind(op)].append(key)
    power = options.method == "power"
    most = options.max_steps or (_POWER_STEPS if power else _LANCZOS_STEPS)
    for (_, device), keys in together.items():
        # Operators of one size are handled together where they are neighbours.
        keys.sort(key=lambda key: math.prod(ops[key].input_shape))
        memory = min(options.max_memory, _CPU_BATCH) if device.type == "cpu" else options.max_memory
        batch: list[int] = []
        used, longest = 0, most
        for key in keys:
            vectors = options.starts * math.prod(ops[key].input_shape) * options.dtype.itemsize
            # The Krylov basis is kept: its length is limited, and so is how many operators are iterated at once.
            steps = most if power else min(most, max(16, options.max_memory // vectors))
            needed = vectors * (8 if power else min(steps, 64)) + 24 * weight_numel(ops[key])
            if batch and used + needed > memory:
                yield _Batch(batch, longest)
                batch, used, longest = [], 0, most
            batch.append(key)
            used, longest = used + needed, min(longest, steps)
        yield _Batch(batch, longest)


def _kind(op: AnyOperator) -> tuple[int, torch.device]:
    """Equal for operators that can be iterated together: the number of parts or the layer shared, and the device."""
    device = parts(op)[0].weight.device
    if isinstance(op, Masked):
        return id(op.layer), device
    return (len(op.parts) if isinstance(op, Composed) else 0), device

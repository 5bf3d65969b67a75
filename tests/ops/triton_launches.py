"""What launches of Triton kernels on CPU tensors would compile on an H100, or compile; neither takes a GPU.

As a pytest plugin (``-p triton_launches``, ``FASTLIP_BACKEND=reference``) it launches the Triton kernels beside every
operator that tests call, and prints how many specialisations a GPU would have compiled for them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlip import ops
from fastlip.ops import _register, reference, triton_kernels
from fastlip.ops._triton.elements import NO_INPUT

#: A kernel's name and what Triton's cache knows a specialisation of it by.
Key = tuple[str, str]


class _Driver:
    """An H100's (``capability`` 90) or other GPU's, as far as compiling needs one."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self._device = object()  # kernels are kept by device: none is known yet

    def get_current_device(self) -> object:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def _without_a_gpu(capability: int) -> Iterator[None]:
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver.set_active(None)  # what is there is looked for when next needed


@contextlib.contextmanager
def recorded() -> Iterator[set[Key]]:
    """The specialisations that launches in this context ask for; nothing is compiled or run."""
    keys: set[Key] = set()

    def record(*, key, fn, **kwargs) -> bool:
        keys.add((fn.name, key))
        return True  # as if compiling went on elsewhere: nothing to run

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, record
    try:
        with _without_a_gpu(90):
            yield keys
    finally:
        knobs.runtime.jit_cache_hook = before


@contextlib.contextmanager
def compiled(capability: int = 90) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """The kernels, by name, that launches in this context compile; none runs."""
    kernels: list[tuple[str, CompiledKernel]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for _, other in kernels):
            kernels.append((self.__name__, kernel))

    JITFunction.run = compile_only
    try:
        with _without_a_gpu(capability):
            yield kernels
    finally:
        JITFunction.run = run


def counted(keys: set[Key]) -> Counter[str]:
    """How many specialisations each kernel has."""
    return Counter(name for name, _ in keys)


def numbers_of(x: Tensor, *values: float | Tensor | None) -> list[float | Tensor | None]:
    """Each value as operators take it: a float and a tensor in the arithmetic's dtype or None."""
    dtype = reference.compute_dtype(x.dtype)
    pairs = ((0.0, v.to(dtype)) if isinstance(v, Tensor) else (v, None) for v in values)
    return [part for pair in pairs for part in pair]


def launch_pgd(
    x: Tensor,
    norm: str,
    *,
    grad: Tensor | None = None,
    x0: Tensor | None = None,
    step_size: float | Tensor = 0.1,
    eps: float | Tensor = 0.3,
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    active: Tensor | None = None,
    read: torch.dtype | None = None,
    statistics: tuple[float | Tensor, float | Tensor] = (0.5, 0.25),
    saved: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> None:
    """A PGD step and a projection; ``read``: the dtype of what the model reads; ``saved``: best, better, not_finite."""
    x0 = x.clone() if x0 is None else x0
    grad = x.clone() if grad is None else grad
    fed = NO_INPUT
    if read is not None:
        grad = grad.to(read)
        fed = (torch.empty_like(x, dtype=read), *numbers_of(x, *statistics))
    radius, box = numbers_of(x, eps), numbers_of(x, *bounds)
    triton_kernels.pgd_step_(x, grad, x0, *numbers_of(x, step_size), *radius, norm, *box, 0.99, active, *fed, *saved)
    triton_kernels.project_(x, x0, *radius, norm, *box, active)


def launch_apgd(
    x: Tensor,
    norm: str,
    *,
    eps: float | Tensor = 0.3,
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    active: Tensor | None = None,
    read: torch.dtype | None = None,
    statistics: tuple[float | Tensor, float | Tensor] = (0.5, 0.25),
    saved: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> None:
    """A step of APGD."""
    state = ops.apgd_state(x, steps=10, eps=eps, norm=norm)
    names = ("x_prev", "x_best", "grad_best", "best_loss", "past_loss", "step_size", "counters", "schedule")
    rows = [getattr(state, name) for name in names]
    grad, fed = x.clone(), NO_INPUT
    if read is not None:
        grad = grad.to(read)
        fed = (torch.empty_like(x, dtype=read), *numbers_of(x, *statistics))
    triton_kernels.apgd_step_(
        x, grad, torch.zeros_like(state.best_loss), x.clone(), *rows, *numbers_of(x, eps), norm,
        *numbers_of(x, *bounds), 0.75, 0.75, active, *fed, *saved,
    )  # fmt: skip


def launch_start(
    x: Tensor,
    norm: str,
    *,
    eps: float | Tensor = 0.3,
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
) -> None:
    """A random start."""
    ids, key = torch.arange(len(x)), torch.zeros(1, dtype=torch.int64)
    triton_kernels.random_start(x, *numbers_of(x, eps), norm, *numbers_of(x, *bounds), ids, key)


def launch_judge(
    logits: Tensor,
    loss: str = "dlr",
    *,
    targets: Tensor | None = None,
    toward: Tensor | None = None,
    record: bool = False,
    partly: bool = False,
    early_stop: bool = True,
) -> None:
    """What an attack reads off logits; ``partly``: of a record that has neither doubts nor confirmations."""
    labels = torch.zeros(len(logits), dtype=torch.int64)
    flags = [torch.zeros(len(logits), dtype=torch.bool) for _ in range(1 if partly else 3)]
    kept = (torch.zeros(len(logits), dtype=torch.float64), *flags, *[None] * (3 - len(flags)), early_stop)
    triton_kernels.judge(logits, labels, targets, toward, loss, 1e-3, *(kept if record else ()))


def launch_operator(
    geometries: list[ops.ConvGeometry],
    dtype: torch.dtype,
    *,
    vectors: int = 2,
    recurrence: bool = False,
    mask: bool = False,
) -> None:
    """Apply operators by a plan such as a GPU's, tiles in parts among it."""
    plan = ops.operator_plan(geometries, [vectors] * len(geometries), tile_columns=64, merge=True, part_products=64)
    out, previous = (torch.zeros(plan.target_size, dtype=dtype) for _ in range(2))
    x, weights = (torch.zeros(size, dtype=dtype) for size in (plan.source_size, plan.weight_size))
    square = torch.zeros(plan.vectors, dtype=torch.float64)
    history = (square, previous, square) if recurrence else (None, None, None)
    active = torch.ones(len(geometries), dtype=torch.bool) if mask else None
    tables = (plan.problems, plan.tiles, plan.gather_groups, plan.entries, plan.max_vectors, plan.parts)
    triton_kernels.operator_step_(out, square.clone(), x, *history, weights, *tables, "float32", active)


def _both(name: str) -> Callable[..., object]:
    launch, compute = getattr(triton_kernels, name), getattr(reference, name)

    def run(*args, **kwargs):
        if launch is not compute:
            launch(*args, **kwargs)
        return compute(*args, **kwargs)

    return run


def pytest_configure(config: pytest.Config) -> None:
    assert _register.backends["cpu"].name == "reference", "the plugin wants FASTLIP_BACKEND=reference"
    library = torch.library.Library("fastlip", "IMPL")
    for name in _register.SCHEMAS:
        library.impl(name, _both(name), "CPU", allow_override=True)
    context = recorded()
    config.stash[_COUNT] = (library, context, context.__enter__())


def pytest_unconfigure(config: pytest.Config) -> None:
    _, context, keys = config.stash[_COUNT]
    context.__exit__(None, None, None)
    print(f"\n{len(keys)} specialisations: {dict(sorted(counted(keys).items()))}")


_COUNT = pytest.StashKey[tuple]()

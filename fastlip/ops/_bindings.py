"""Operators tried on their arguments as they are, where compiled bindings check them.

The bindings refuse whatever is wrong before they write anything. They do not say what they got, nor do they bring
anything into another layout: the checks in Python do, and take longer than the operator. So these are for what the
bindings refuse.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlip.ops._checks import Bounds, PerSample
from fastlip.ops._model_input import ModelInput
from fastlip.ops._register import backends
from fastlip.ops.reference import compute_dtype

_CHECKED_CPU, _CHECKED_CUDA = (device in backends and backends[device].name == "native" for device in ("cpu", "cuda"))


def checked_by_bindings(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on a device whose compiled bindings check it."""
    return type(x) is Tensor and (_CHECKED_CPU if x.is_cpu else _CHECKED_CUDA and x.is_cuda)


def as_given(x: Tensor, *others: Tensor, model_input: ModelInput | None = None) -> bool:
    """Whether an operator may be tried on these: plain tensors without gradients, where bindings check them."""
    if not checked_by_bindings(x) or x.requires_grad:
        return False
    for t in others:
        if type(t) is not Tensor or t.requires_grad:
            return False
    return (model_input is None or isinstance(model_input, ModelInput)) and not torch.compiler.is_compiling()


def tried(operator: Callable[..., object], *arguments: object) -> bool:
    """Whether the bindings have taken the arguments: the operator is done, or nothing is."""
    try:
        operator(*arguments)
    except RuntimeError as error:
        raise_unless_refused(error)
        return False
    return True


def raise_unless_refused(error: RuntimeError) -> None:
    """Raise the error of a launch again, for which no argument is to blame."""
    if "CUDA error" in str(error):
        raise error


def number_as_given(value: PerSample, x: Tensor) -> tuple[float, Tensor | None] | None:
    """``value`` as operators take it, where nothing has to be converted."""
    if type(value) is float:
        return value, None
    if type(value) is Tensor and value.dtype == compute_dtype(x.dtype) and not value.requires_grad:
        return 0.0, value
    return None


def ball_as_given(eps: PerSample, norm: str, bounds: Bounds, x: Tensor) -> tuple[object, ...] | None:
    """Ball and box as operators take them, where the box's limits are numbers and nothing has to be converted."""
    radius = number_as_given(eps, x)
    if radius and type(bounds) is tuple and len(bounds) == 2:
        lo, hi = bounds
        if type(lo) is float and type(hi) is float:
            return *radius, norm, lo, None, hi, None
    return None


def read_and_saved(
    model_input: ModelInput | None, best: Tensor | None, better: Tensor | None, not_finite: Tensor | None
) -> tuple[object, ...]:
    """A step's last arguments, or none of them: each takes its time."""
    if model_input is not None:
        mean, std = ((0.0, v) if isinstance(v, Tensor) else (v, None) for v in (model_input.mean, model_input.std))
        return model_input.values, *mean, *std, best, better, not_finite
    if best is None and better is None and not_finite is None:
        return ()
    return None, 0.0, None, 1.0, None, best, better, not_finite

"""What attacks ask of their arguments: a message names the argument as the caller knows it, and what is expected."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastlip.ops import Bounds, PerSample

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def plain(value: Any) -> Any:
    """A NumPy scalar, or an array or tensor without axes, as Python's own number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """What was given, in few words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return repr(value)[:60] if value is None or isinstance(value, (str, bool, int, float)) else type(value).__name__


def count(value: Any, name: str, least: int = 0) -> int:
    """``value`` as an int, ``least`` at least."""
    whole = integer(value, name)
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {whole}")
    return whole


def integer(value: Any, name: str) -> int:
    """``value`` as an int."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    return value


def number(value: Any, name: str, what: str = "a float") -> float:
    """``value`` as a float."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {what}, got {shown(value)}")
    return float(value)


def share(value: Any, name: str) -> float:
    """``value`` as a float in [0, 1]."""
    part = number(value, name)
    if not 0 <= part <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {part}")
    return part


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool: a string or a number in its place is more likely a mistake."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return value


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raise where ``value`` is none of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def check_model(model: Any) -> None:
    """Raise where ``model`` is nothing to call with images; a class is not, only what it makes."""
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else shown(model)
        raise TypeError(f"model must be a module or a function that maps inputs to logits [B, C], got {got}")


def check_generator(generator: Any) -> None:
    """Raise where ``generator`` is none."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")


def check_images(inputs: Any, name: str = "inputs") -> None:
    """Raise where ``inputs`` are not images [B, ...]."""
    if not isinstance(inputs, Tensor) or inputs.dtype not in _DTYPES or inputs.layout != torch.strided:
        raise TypeError(
            f"{name} must be a floating-point tensor (float32, float64, float16 or bfloat16), got {shown(inputs)}"
        )
    if inputs.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")


def check_vector(t: Any, name: str, inputs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise where ``t`` is not one value of ``dtype`` (any number if None) for each of ``inputs``."""
    if not isinstance(t, Tensor) or not (_is_numbers(t) if dtype is None else t.dtype == dtype):
        wanted = "tensor of numbers" if dtype is None else f"{dtype} tensor"
        raise TypeError(f"{name} must be a {wanted} of shape [{inputs.shape[0]}], got {shown(t)}")
    if t.shape != inputs.shape[:1] or t.device != inputs.device:
        raise ValueError(
            f"{name} must have shape [{inputs.shape[0]}] on {inputs.device}, got {list(t.shape)} on {t.device}"
        )


def per_image(value: Any, name: str, inputs: Tensor) -> PerSample:
    """``value`` as one float for all of ``inputs``, or as a tensor of one for each."""
    value = plain(value)
    if not isinstance(value, Tensor):
        return number(value, name, "a float or a [B] tensor")
    check_vector(value, name, inputs)
    return value.detach()


def radius(value: Any, name: str, inputs: Tensor, *, finite: str = "") -> PerSample:
    """``value`` as a radius, or as a tensor of one for each of ``inputs``; ``finite`` says why inf will not do."""
    radii = per_image(value, name, inputs)
    worst = _first(radii, (lambda r: (r >= 0) & (r < math.inf)) if finite else (lambda r: r >= 0))
    if worst == "inf":
        raise ValueError(f"{name} must be finite {finite}, got inf")
    if worst:
        raise ValueError(f"{name} must be at least 0, got {worst}")
    return radii


def length(value: Any, name: str, inputs: Tensor) -> PerSample:
    """``value`` as a finite float, or as a tensor of one for each of ``inputs``."""
    lengths = per_image(value, name, inputs)
    if worst := _first(lengths, lambda v: (v > -math.inf) & (v < math.inf)):
        raise ValueError(f"{name} must be finite, got {worst}")
    return lengths


def checked_bounds(bounds: Any, inputs: Tensor) -> Bounds:
    """``bounds`` as a pair of floats or tensors that broadcast to ``inputs``, whose order is not looked at."""
    if isinstance(bounds, (str, bytes)) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        got = f"{len(bounds)} values" if isinstance(bounds, (tuple, list)) else shown(bounds)
        raise TypeError(f"bounds must be a pair (lower, upper), got {got}")
    return _bound(bounds[0], inputs), _bound(bounds[1], inputs)


def check_inside(inputs: Tensor, bounds: Bounds) -> None:
    """Raise where ``bounds`` are in the wrong order or ``inputs`` leave them."""
    lo, hi = bounds
    inside = bool(((inputs >= lo) & (inputs <= hi)).all())
    if inside and inputs.numel():
        return
    ordered = lo <= hi
    if not (bool(ordered.all()) if isinstance(ordered, Tensor) else ordered):
        if any(bool(torch.as_tensor(b).isnan().any()) for b in bounds):
            raise ValueError("bounds hold NaN")
        got = "in every element" if isinstance(ordered, Tensor) else f"but are ({lo:g}, {hi:g})"
        raise ValueError(f"bounds must satisfy lower <= upper, {got}")
    if inside:
        return
    if bool(inputs.isnan().any()):
        raise ValueError("inputs hold NaN")
    least, most = inputs.min().item(), inputs.max().item()
    raise ValueError(
        f"inputs must lie within bounds, but hold values from {least:g} to {most:g}: "
        "scale them, or pass the bounds they have (normalisation belongs into the model)"
    )


def _bound(bound: Any, inputs: Tensor) -> PerSample:
    bound = plain(bound)
    if not isinstance(bound, Tensor):
        return number(bound, "bounds", "floats or tensors")
    if not _is_numbers(bound):
        raise TypeError(f"bounds must be floats or tensors of numbers, got {shown(bound)}")
    if bound.device != inputs.device:
        raise ValueError(f"bounds must be on inputs' device {inputs.device}, got {bound.device}")
    try:
        fits = torch.broadcast_shapes(bound.shape, inputs.shape) == inputs.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"bounds must broadcast to inputs' shape {list(inputs.shape)}, got {list(bound.shape)}")
    return bound.detach()


def _is_numbers(t: Tensor) -> bool:
    return t.dtype != torch.bool and not t.is_complex() and not t.is_quantized and t.layout == torch.strided


def _first(value: PerSample, right: Callable[[Any], Any]) -> str:
    """The first of the values that is not right; empty where all are."""
    fine = right(value)
    if not isinstance(value, Tensor):
        return "" if fine else str(value)
    return "" if bool(fine.all()) else str(value[~fine][0].item())

"""Checks of the attacks' arguments; every message names the argument as the caller knows it and says what is expected.

An attack checks its arguments before it does anything else: :func:`check_call` covers those that all attacks take,
:func:`check_settings` those that all gradient attacks take. What comes later trusts them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastlip import _arguments as shared
from fastlip.ops import Bounds, Loss, Norm, PerSample
from fastlip.ops._checks import checked_norm

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Dtypes of labels, targets and ids.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: What to do where there are none: attacks have to know which decisions are right.
LABELS_MISSING = "labels must be given; those of the model itself are model(inputs).argmax(1)"
#: How far outside the bounds an input may lie by rounding, in units of its dtype's eps at the larger bound: undoing a
#: normalisation, (x - mean) / std, errs by four roundings at most.
_ROUNDING = 2.0


class Call(NamedTuple):
    """The arguments that all attacks take, as the attacks go on with them."""

    inputs: Tensor
    labels: Tensor
    targets: Tensor | None
    ids: Tensor | None
    bounds: Bounds
    norm: Norm


def check_call(
    model: Any,
    inputs: Any,
    labels: Any,
    targets: Any,
    *,
    norm: Any,
    loss: Any,
    bounds: Any,
    active: Any,
    fast: Any,
    precision: Any,
    ids: Any = None,
    generator: Any = None,
) -> Call:
    """Raise where an argument that all attacks take is wrong; return them as the attacks go on with them.

    The first forward pass alone tells which classes there are: :func:`check_classes` follows it.
    """
    check_model(model)
    inputs, bounds = checked_inputs(inputs, bounds)
    labels = checked_integers(labels, "labels", inputs)
    targets = None if targets is None else checked_integers(targets, "targets", inputs)
    if active is not None:
        check_vector(active, "active", inputs, torch.bool)
    ids = None if ids is None else checked_integers(ids, "ids", inputs)
    check_generator(generator)
    norm = checked_norm(norm)
    check_loss(loss)
    flag(fast, "fast")
    check_precision(precision)
    return Call(inputs, labels, targets, ids, bounds, norm)


def check_settings(
    steps: Any,
    restarts: Any,
    keep: Any,
    early_stop: Any,
    random_start: Any,
    start: Any,
    inputs: Tensor,
) -> tuple[int, int]:
    """Raise where an argument that all gradient attacks take is wrong; return ``steps`` and ``restarts`` as ints."""
    steps, restarts = count(steps, "steps"), count(restarts, "restarts", 1)
    check_choice(keep, "keep", ("best", "last"))
    flag(early_stop, "early_stop")
    flag(random_start, "random_start")
    if restarts > 1 and not random_start:
        raise ValueError("restarts above 1 need random_start=True: every run would be the same")
    if start is None:
        return steps, restarts
    if random_start:
        raise ValueError("start needs random_start=False")
    check_images(start, "start")
    if start.shape != inputs.shape or start.device != inputs.device:
        raise ValueError(
            f"start must have inputs' shape {list(inputs.shape)} and be on {inputs.device}, "
            f"got {list(start.shape)} on {start.device}"
        )
    if bool(start.isnan().any()):
        raise ValueError("start holds NaN")
    return steps, restarts


def plain(value: Any) -> Any:
    """A NumPy scalar, or an array or tensor without axes, as Python's own number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def shown(value: Any) -> str:
    """What was given, in few words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    simple = value is None or isinstance(value, (str, bool, int, float))
    return repr(value)[:60] if simple else type(value).__name__


def count(value: Any, name: str, least: int = 0) -> int:
    """``value`` as an int of at least ``least``."""
    return shared.integer(plain(value), name, least)


def number(value: Any, name: str, expected: str = "a float") -> float:
    """``value`` as a float."""
    return shared.number(plain(value), name, expected)


def share(value: Any, name: str) -> float:
    """``value`` as a float in [0, 1]."""
    part = number(value, name)
    if not 0 <= part <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {part}")
    return part


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool; a string or a number in its place is more likely a mistake."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return value


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raise where ``value`` is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def check_loss(loss: Any) -> None:
    """Raise where the loss is neither known nor a function; a class is refused, since only its instances are."""
    if isinstance(loss, type) or not callable(loss):
        check_choice(loss, "loss", get_args(Loss))


def check_callback(callback: Any) -> None:
    """Raise where ``callback`` cannot be called."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function or None, got {shown(callback)}")


def check_classes(
    logits: Tensor,  # [B, C]
    **classes: Tensor | None,  # [B] int64
) -> None:
    """Raise where a label or a target is not a class of the model, which only its logits tell."""
    for name, wanted in classes.items():
        if wanted is not None and bool(((wanted < 0) | (wanted >= logits.shape[1])).any()):
            raise ValueError(f"{name} must lie in [0, {logits.shape[1]}), the model's classes")


def check_precision(precision: Any) -> None:
    """Raise where a faster copy of a model cannot have this precision."""
    known = isinstance(precision, str) and precision == "auto"
    if not known and not any(precision is p for p in (None, torch.bfloat16, torch.float16)):
        raise ValueError(f'precision must be None, torch.bfloat16, torch.float16 or "auto", got {precision!r}')


def check_model(model: Any) -> None:
    """Raise where ``model`` cannot be called with images; a class is refused, since only its instances are models."""
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else shown(model)
        raise TypeError(f"model must be a module or a function that maps inputs to logits [B, C], got {got}")


def check_generator(generator: Any) -> None:
    """Raise where ``generator`` is neither a generator nor None."""
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
    """Raise where ``t`` does not hold one value of ``dtype`` (any real type if None) for each of ``inputs``."""
    if not isinstance(t, Tensor) or not (_is_real(t) if dtype is None else t.dtype == dtype):
        wanted = "tensor of numbers" if dtype is None else f"{dtype} tensor"
        raise TypeError(f"{name} must be a {wanted} of shape [{inputs.shape[0]}], got {shown(t)}")
    if t.shape != inputs.shape[:1] or t.device != inputs.device:
        raise ValueError(
            f"{name} must have shape [{inputs.shape[0]}] on {inputs.device}, got {list(t.shape)} on {t.device}"
        )


def checked_integers(t: Any, name: str, inputs: Tensor) -> Tensor:
    """``t`` as int64, [B]; any integer type is taken."""
    if t is None and name == "labels":
        raise TypeError(LABELS_MISSING)
    if isinstance(t, Tensor) and t.dtype in INTEGERS and t.dtype != torch.int64:
        t = t.long()
    check_vector(t, name, inputs, torch.int64)
    checked: Tensor = t
    return checked


def per_image(value: Any, name: str, inputs: Tensor) -> PerSample:
    """``value`` as one float for all of ``inputs``, or as a tensor with one for each."""
    value = plain(value)
    if not isinstance(value, Tensor):
        return number(value, name, "a float or a [B] tensor")
    check_vector(value, name, inputs)
    return value.detach()


def radius(value: Any, name: str, inputs: Tensor, *, finite: str = "") -> PerSample:
    """``value`` as a radius, or as a tensor with one for each of ``inputs``.

    ``finite`` says why the radius cannot be inf; where it is empty, inf is allowed.
    """
    radii = per_image(value, name, inputs)
    wrong = _first_wrong(radii, (lambda r: (r >= 0) & (r < math.inf)) if finite else (lambda r: r >= 0))
    if wrong == "inf":
        raise ValueError(f"{name} must be finite {finite}, got inf")
    if wrong:
        raise ValueError(f"{name} must be at least 0, got {wrong}")
    return radii


def warn_of_wide(eps: PerSample, norm: Norm, inputs: Tensor, bounds: Bounds) -> None:
    """Warn where a ball holds the whole box whatever its centre is, as 8 does in place of 8 / 255."""
    lo, hi = bounds
    if isinstance(eps, Tensor) or isinstance(lo, Tensor) or isinstance(hi, Tensor) or not len(inputs):
        return
    size = inputs[0].numel()
    diameter = (hi - lo) * {"linf": 1.0, "l2": math.sqrt(size), "l1": size}[norm]
    if diameter < eps < math.inf:
        warnings.warn(
            f"eps={eps:g} allows any image within bounds ({lo:g}, {hi:g}): radii are in the units of the inputs, for "
            f"example 8 / 255",
            stacklevel=3,
        )


def length(value: Any, name: str, inputs: Tensor) -> PerSample:
    """``value`` as a finite float, or as a tensor with one for each of ``inputs``."""
    lengths = per_image(value, name, inputs)
    if wrong := _first_wrong(lengths, lambda v: (v > -math.inf) & (v < math.inf)):
        raise ValueError(f"{name} must be finite, got {wrong}")
    return lengths


def checked_inputs(inputs: Any, bounds: Any) -> tuple[Tensor, Bounds]:
    """Raise where ``inputs`` are not images within ``bounds``; return both, the bounds as floats or tensors.

    What lies outside by no more than rounding is clipped.
    """
    check_images(inputs)
    bounds = _checked_bounds(bounds, inputs)
    return _inside(inputs, bounds), bounds


def _checked_bounds(bounds: Any, inputs: Tensor) -> Bounds:
    """``bounds`` as a pair of floats or tensors that broadcast to ``inputs``; their order is checked elsewhere."""
    if isinstance(bounds, (str, bytes)) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        got = f"{len(bounds)} values" if isinstance(bounds, (tuple, list)) else shown(bounds)
        raise TypeError(f"bounds must be a pair (lower, upper), got {got}")
    return _bound(bounds[0], inputs), _bound(bounds[1], inputs)


def _inside(inputs: Tensor, bounds: Bounds) -> Tensor:
    """``inputs``, clipped where they leave ``bounds`` by rounding; raise where they leave them by more."""
    lo, hi = bounds
    if inputs.numel() and not isinstance(lo, Tensor) and not isinstance(hi, Tensor):
        least, most = torch.stack(inputs.detach().aminmax()).tolist()  # NaN where there is one
        inside = bool(lo <= least and most <= hi)
    else:
        inside = bool(((inputs >= lo) & (inputs <= hi)).all())
    if inside and inputs.numel():
        return inputs
    ordered = lo <= hi
    if not (bool(ordered.all()) if isinstance(ordered, Tensor) else ordered):
        if any(bool(torch.as_tensor(b).isnan().any()) for b in bounds):
            raise ValueError("bounds hold NaN")
        got = "in every element" if isinstance(ordered, Tensor) else f"but are ({lo:g}, {hi:g})"
        raise ValueError(f"bounds must satisfy lower <= upper, {got}")
    if inside:
        return inputs
    if bool(inputs.isnan().any()):
        raise ValueError("inputs hold NaN")
    clipped = clipped_to(inputs, bounds)
    sizes = [torch.as_tensor(b, dtype=torch.float64, device=inputs.device).abs() for b in bounds]
    largest = torch.maximum(*(size.masked_fill(size.isinf(), 0) for size in sizes))
    slack = _ROUNDING * torch.finfo(inputs.dtype).eps * largest
    if bool(((inputs.double() - clipped.double()).abs() <= slack).all()):
        return clipped
    least, most = inputs.min().item(), inputs.max().item()
    raise ValueError(
        f"inputs must lie within bounds, but hold values from {least:g} to {most:g}: "
        "scale them, or pass the bounds they have (normalisation belongs into the model)"
    )


def clipped_to(inputs: Tensor, bounds: Bounds) -> Tensor:
    """``inputs`` with each element moved to the nearest point of its bounds, [B, ...]."""
    lo, hi = (torch.as_tensor(b, dtype=inputs.dtype, device=inputs.device) for b in bounds)
    return torch.minimum(torch.maximum(inputs.detach(), lo), hi)


def _bound(bound: Any, inputs: Tensor) -> PerSample:
    bound = plain(bound)
    if not isinstance(bound, Tensor):
        return number(bound, "bounds", "floats or tensors")
    if not _is_real(bound):
        raise TypeError(f"bounds must be floats or tensors of numbers, got {shown(bound)}")
    if bound.device != inputs.device:
        raise ValueError(f"bounds must be on inputs' device {inputs.device}, got {bound.device}")
    check_broadcast(bound, inputs, "bounds")
    return bound.detach()


def check_broadcast(values: Tensor, inputs: Tensor, name: str) -> None:
    """Raise ValueError unless ``values`` broadcast to the shape of ``inputs``."""
    try:
        fits = torch.broadcast_shapes(values.shape, inputs.shape) == inputs.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to inputs' shape {list(inputs.shape)}, got {list(values.shape)}")


def _is_real(t: Tensor) -> bool:
    return t.dtype != torch.bool and not t.is_complex() and not t.is_quantized and t.layout == torch.strided


def _first_wrong(value: PerSample, is_right: Callable[[Any], Any]) -> str:
    """The first of the values that is not right, as text; empty where all of them are."""
    right = is_right(value)
    if not isinstance(value, Tensor):
        return "" if right else str(value)
    return "" if bool(right.all()) else str(value[~right][0].item())

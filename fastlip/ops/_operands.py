"""The tensors of a step: refused, brought into one layout or, as most often, taken as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlip.ops._checks import (
    DTYPES,
    begin_together,
    check_inputs,
    check_like,
    checked_mask,
    in_one_layout,
    same_layout,
    sample_dense,
)
from fastlip.ops._model_input import NOT_READ, READ_DTYPES, ModelInput, check_gradient, normalised
from fastlip.ops._schemas import Saved

#: x, grad, x0, active and the last arguments of an operator.
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[float | Tensor | None, ...]]


def operands(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    active: Tensor | None,
    model_input: ModelInput | None,
    saved: Saved,
    **state: Tensor,
) -> Operands:
    """A step's tensors as operators take them; ``state`` are those like ``x`` that it changes besides.

    That is x, whose samples are dense, grad and x0 in its layout, active, and an operator's last arguments: what the
    model reads and what is saved, or nothing where there is neither.

    Raises:
        ValueError: a shape or layout is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.
        RuntimeError: ``x`` requires grad while gradients are enabled.
    """
    best, better, not_finite = saved
    if model_input is None:
        alike, fed = [x0, grad, *state.values()], []
    elif isinstance(model_input, ModelInput):
        alike, fed = [x0, *state.values()], [model_input.values, grad]
    else:
        raise TypeError(f"model_input must be a ModelInput or None, got {type(model_input).__name__}")
    if best is not None:
        alike.append(best)
    if (best is None) != (better is None) or not plain(x, alike, fed, (active, better, not_finite)):
        x, grad, x0, active, better = _fitted(x, grad, x0, active, model_input, saved, state)
    if model_input is None and better is None and not_finite is None:
        return x, grad, x0, active, ()  # each argument takes its time
    read = NOT_READ if model_input is None else normalised(model_input, x)
    return x, grad, x0, active, (*read, best, better, not_finite)


def plain(x: Tensor, alike: Sequence[Tensor], fed: Sequence[Tensor] = (), masks: Sequence[Tensor | None] = ()) -> bool:
    """Whether there is nothing to refuse or to bring into another layout: the common case, settled in a microsecond.

    ``x`` is contiguous or channels_last, the others are like it, ``fed`` but for a dtype of their own, and masks are
    bool, [B] and contiguous, or None; none requires grad, and each is in memory of its own. Where this is False, other
    checks say what that means.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in DTYPES or x.requires_grad:
        return False
    shape, device, strides, places = x.shape, x.device, x.stride(), {x.data_ptr()}
    if not shape or not (x.is_contiguous() or (len(shape) == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        return False
    dtypes = [x.dtype] * len(alike)
    if fed:
        if x.dtype != torch.float32 or fed[0].dtype not in READ_DTYPES:
            return False
        dtypes += [fed[0].dtype] * len(fed)
    for t, dtype in zip((*alike, *fed), dtypes, strict=True):
        if type(t) is not Tensor or t.shape != shape or t.dtype != dtype or t.device != device or t.requires_grad:
            return False
        if t.stride() != strides or (place := t.data_ptr()) in places:
            return False
        places.add(place)
    for mask in masks:
        if mask is not None:
            if type(mask) is not Tensor or mask.shape != shape[:1] or mask.dtype != torch.bool or mask.device != device:
                return False
            if not mask.is_contiguous() or (place := mask.data_ptr()) in places:
                return False
            places.add(place)
    return True


def _fitted(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    active: Tensor | None,
    model_input: ModelInput | None,
    saved: Saved,
    state: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """``x``, ``grad``, ``x0``, ``active`` and ``better`` once all is checked, as operators take them."""
    check_inputs(x, x0=x0, **state)
    beside = {"x": x, "x0": x0, "grad": grad, **state}
    if model_input is None:
        check_like(grad, x, "grad")
    else:
        check_gradient(grad, x, model_input)
        beside["model_input"] = model_input.values
    active, better = checked_mask(active, x), checked_mask(saved.better, x, "better")
    _check_saved(saved, active, beside)
    x, grad, x0 = in_one_layout(x, grad, x0)
    for t in state.values():
        if not _dense_like(t, x):
            raise ValueError("x must have the memory layout that state was made for")
    if saved.best is not None and not _dense_like(saved.best, x):
        raise ValueError("best must be dense in x's memory layout, because it is changed in place")
    return x, grad, x0, active, better


def _check_saved(saved: Saved, active: Tensor | None, beside: dict[str, Tensor]) -> None:
    """Raise where what is saved is wrong, apart from its layout; ``beside`` is what the step reads and changes."""
    best, better, not_finite = saved
    if (best is None) != (better is None):
        raise ValueError("best and better go together")
    x, apart = beside["x"], not torch.compiler.is_compiling()
    if best is not None:
        check_like(best, x, "best")
        for name, t in beside.items():
            if apart and x.numel() and begin_together(best, t):
                raise ValueError(f"best must not share its memory with {name}")
    if not_finite is not None:
        if checked_mask(not_finite, x, "not_finite") is not not_finite:
            raise ValueError("not_finite must be contiguous, because it is changed in place")
        for name, mask in (("active", active), ("better", better)):
            if apart and len(x) and mask is not None and begin_together(not_finite, mask):
                raise ValueError(f"not_finite must not share its memory with {name}")


def _dense_like(t: Tensor, x: Tensor) -> bool:
    return same_layout(t, x) and (len(x) <= 1 or sample_dense(t))

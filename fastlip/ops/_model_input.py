"""The input of a model: the iterate, normalised and in another dtype, written by the step that moves the iterate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip.ops._checks import (
    PerSample,
    begin_together,
    check_like,
    check_tensor,
    dense_strides,
    describe,
    in_one_layout,
    per_element,
    same_layout,
    sample_dense,
)
from fastlip.ops._schemas import Normalised

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelInput:
    """(x - mean) / std of an iterate x, from :func:`model_input`; the steps that it is passed to keep it up to date."""

    values: Tensor
    """The model's input, [B, ...] in the iterate's memory layout; float32, float16 or bfloat16."""
    mean: float | Tensor
    """Subtracted from x; a number, or [1, ...] float32 in the iterate's layout."""
    std: float | Tensor
    """Divides x - mean; a number or a tensor like ``mean``."""

    def __getitem__(self, samples: Tensor | slice) -> "ModelInput":
        """The input of some samples (bool mask [B], indices or slice); its values are a copy, with a slice a view."""
        return ModelInput(self.values[samples], self.mean, self.std)


def model_input(
    x: Tensor,  # [B, ...]
    *,
    mean: PerSample = 0.0,
    std: PerSample = 1.0,
    dtype: torch.dtype = torch.float32,
) -> ModelInput:
    """The model's input at ``x``, (x - mean) / std rounded to ``dtype``, which the steps keep up to date.

    Passed to :func:`pgd_step_` or :func:`apgd_step_`, it is written in the same pass over memory as x and by the same
    arithmetic: difference and quotient in float32, each rounded once, as in torchvision's ``Normalize``. The iterate
    itself stays in float32, so that steps below the resolution of ``dtype`` accumulate until the model sees them. With
    a standard deviation of 1/4 adjacent numbers are up to 1/2048 of the pixel range apart in float16 and 1/256 in
    bfloat16, which is as far as a ball of 1/255 reaches.

    Args:
        x: the first iterate, [B, ...] float32, of the shape and memory layout of those to come.
        mean: subtracted from x; a float or a tensor that broadcasts to a sample of ``x``, such as [3, 1, 1].
        std: divides the difference, likewise; above 0.
        dtype: torch.float32, torch.float16 or torch.bfloat16.

    Raises:
        ValueError: a shape or value is wrong; the message names the argument.
        TypeError: a dtype or type is wrong; the message names the argument.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> grad = torch.randn_like(x0)
        >>> read = ops.model_input(x0, mean=0.5, std=0.25, dtype=torch.bfloat16)
        >>> x = x0.clone()
        >>> ops.pgd_step_(x, grad.bfloat16(), x0, step_size=2 / 255, eps=8 / 255, model_input=read)
        >>> print(read.values.dtype)
    """
    check_tensor(x, "x")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {describe(x)}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    (layout,) = in_one_layout(x.detach())
    centre, spread = _for_a_sample(mean, layout, "mean"), _for_a_sample(std, layout, "std")
    if not bool((torch.as_tensor(spread) > 0).all()):
        raise ValueError("std must be above 0")
    values = torch.empty_strided(x.shape, dense_strides(layout), dtype=dtype, device=x.device)
    return ModelInput(values.copy_((layout - centre) / spread), centre, spread)


def _for_a_sample(value: PerSample, x: Tensor, name: str) -> float | Tensor:
    number, rows = per_element(value, x, name)
    if rows is None:
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
        return number
    if rows.shape[0] != 1:
        raise ValueError(f"{name} must broadcast to a sample of x, got {list(rows.shape)}")
    return rows


def check_gradient(grad: Tensor, x: Tensor, given: ModelInput) -> None:
    """Raise where the model's input is wrong, or where ``grad`` is not a gradient with respect to it."""
    if not isinstance(given, ModelInput):
        raise TypeError(f"model_input must be a ModelInput or None, got {type(given).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32 where there is a model_input, got {describe(x)}")
    values = given.values
    check_like(values, x, "model_input", (values, "model_input"))
    if values.dtype not in _DTYPES:
        raise TypeError(f"model_input must be float32, float16 or bfloat16, got {describe(values)}")
    check_like(grad, x, "grad", (values, "model_input"))
    if not torch.compiler.is_compiling() and x.numel() and begin_together(x, values):
        raise ValueError("model_input must not share its memory with x; make it with fastlip.ops.model_input")


#: What an operator takes where no model's input is to be written.
NOT_READ = Normalised()


def normalised(given: ModelInput, x: Tensor) -> Normalised:
    """``given`` as operators take it, for an ``x`` whose samples are dense."""
    values = given.values.detach()
    mean, std = ((0.0, part) if isinstance(part, Tensor) else (part, None) for part in (given.mean, given.std))
    fits = same_layout(values, x) and (len(x) <= 1 or sample_dense(values))
    for rows in (mean[1], std[1]):
        fits = fits and (rows is None or (rows.dim() == x.dim() and same_layout(rows, x)))
    if not fits:
        raise ValueError("x must have the shape and memory layout that model_input was made for")
    return Normalised(values, *mean, *std)

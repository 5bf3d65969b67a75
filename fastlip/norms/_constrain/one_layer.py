"""A parametrisation that keeps a layer's norm below a bound."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlip._arguments import integer, number
from fastlip.norms._constrain.choice import one_layer
from fastlip.norms._constrain.constraint import NormConstraint
from fastlip.norms._operators.modules import CONVS, TRANSPOSED, module_operator
from fastlip.norms._operators.operator import per_axis, require_floating
from fastlip.norms._options import NormKeywords, NormOptions, chosen_options


def constrain_norm(
    module: nn.Module,
    input_size: int | Sequence[int] = (),
    *,
    bound: float = 1.0,
    iterations: int = 1,
    options: NormOptions | None = None,
    **keywords: Unpack[NormKeywords],
) -> nn.Module:
    """Keep the norm of a Conv, ConvTranspose or Linear module below ``bound``, on inputs of one size.

    What torch's ``spectral_norm`` does for the reshaped kernel, this does for the convolution itself, by a
    parametrisation of ``weight`` (``torch.nn.utils.parametrize``), as :func:`constrain_norms` does it for the layers of
    a model, in training and in eval mode.

    The bound holds on inputs of ``input_size``. On any other size the norm of a convolution is another one, of which a
    warning says so, once for each module.

    Args:
        module: the module; changed in place and returned.
        input_size: spatial size of its input, one number or one per axis; nothing for Linear.
        bound: positive upper bound for the norm.
        iterations: Krylov steps for each forward in training.
        options: how to compute the certified upper side in eval mode.
        keywords: fields of :class:`NormOptions`, in place of ``options``.

    Raises:
        TypeError: ``module`` is of another kind, its weight no floating-point tensor, or an argument of the wrong type;
            the message names it.
        ValueError: ``bound`` is not positive, the size does not fit, or the weight is parametrised, pruned or not
            finite; the message names it.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> conv = fastlip.norms.constrain_norm(nn.Conv2d(3, 4, 3, padding=1), 8, bound=1.0)
        >>> print(fastlip.conv_norm(conv.eval(), 8).upper)  # at most 1, but for rtol
    """
    bound = positive_bound(bound)
    iterations = integer(iterations, "iterations")
    chosen = chosen_options("constrain_norm", options, keywords)
    if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)):
        raise TypeError(f"module must be a Conv, ConvTranspose or Linear, got {type(module).__name__}")
    name, weight = type(module).__name__, module.weight
    require_floating(weight)
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError(f"the {name}'s weight is parametrised already")
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"the {name}'s weight is no parameter of its own")
    if weight.numel() == 0:
        raise ValueError(f"the {name}'s weight must not be empty")
    axes = weight.dim() - 2
    if isinstance(input_size, Sequence) and not isinstance(input_size, str) and len(input_size) != axes:
        raise ValueError(f"input_size must have {axes} axes for {name}, got {input_size!r}")
    sizes = per_axis(input_size, "input_size", axes, 1)
    layer = one_layer(name, module, module_operator(module, (0, *sizes)), isinstance(module, TRANSPOSED))
    with torch.inference_mode(False):  # training changes the vectors
        vectors = layer.start_vectors(chosen.resolved([]).generator).clone()
    constraint = NormConstraint(name, layer.geometry, vectors, bound, iterations, chosen)
    constraint.train(module.training)
    # The check of what the parametrisation returns would take a step, or certify.
    parametrize.register_parametrization(module, "weight", constraint, unsafe=True)
    if axes:
        module.register_forward_pre_hook(SizeWatch(module, tuple(sizes)))
    return module


def positive_bound(bound: float) -> float:
    """The bound as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    bound = number(bound, "bound", "a positive number")
    if not 0.0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}")
    return bound


#: Attributes that a layer's linear map depends on, beside its weight and the size of its input.
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "transposed")


class SizeWatch:
    """A hook that warns once of an input on whose size the bound does not hold; a named layer refuses it in eval mode.

    So does a layer whose stride, padding or the like is another one than when it was constrained.

    Raises:
        ValueError: a named layer is in eval mode, and its input of another size, or its map another one.
    """

    def __init__(self, module: nn.Module, size: tuple[int, ...], name: str = "") -> None:
        self.size, self.name, self.geometry = size, name, _geometry(module)
        self.warned = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        refuses = self.name and not module.training
        if (self.warned and not refuses) or not args or not isinstance(args[0], Tensor):
            return
        size, called = tuple(args[0].shape[-len(self.size) :]), self.name or type(module).__name__
        if (changed := self._changed(module)) and refuses:
            raise ValueError(f"layer {called} is constrained {changed}; call unconstrain and constrain it again")
        if changed:
            self.warned = True
            warnings.warn(f"{called} is constrained {changed}: its norm may exceed the bound", stacklevel=3)
        if size != self.size and refuses:
            raise ValueError(
                f"layer {self.name} is constrained on inputs of size {list(self.size)}, and its norm on {list(size)} "
                "is not known to be below the bound"
            )
        if size != self.size:
            self.warned = True
            warnings.warn(
                f"{type(module).__name__} is constrained on inputs of size {list(self.size)}, but is used on "
                f"{list(size)}, where its norm may exceed the bound",
                stacklevel=3,
            )

    def _changed(self, module: nn.Module) -> str:
        """What is different about the layer, in words."""
        changed = [(k, v, getattr(module, k, None)) for k, v in self.geometry if getattr(module, k, None) != v]
        return " and ".join(f"with {name} {before!r}, and now has {now!r}" for name, before, now in changed)


def _geometry(module: nn.Module) -> list[tuple[str, object]]:
    return [(name, getattr(module, name)) for name in _GEOMETRY if hasattr(module, name)]

"""Observed stretch, the factor by which a network enlarges given perturbations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def observed_stretch(
    model: Callable[[Tensor], Tensor],
    perturbed: Tensor,  # [B, ...]
    inputs: Tensor,  # [B, ...]
) -> Tensor:
    """Stretch of each perturbation at the logits, ||f(x') - f(x)||_2 / ||x' - x||_2; [B] float64.

    Each stretch is a lower bound on the Lipschitz constant. It is NaN where an image was not perturbed. The model's
    mode is not changed, so put it in eval mode first.

    Args:
        model: maps inputs to outputs [B, ...].
        perturbed: perturbed images, [B, ...].
        inputs: the original images, like ``perturbed``.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> images = torch.rand(4, 3, 2, 2)
        >>> perturbed = images + 0.01 * torch.randn_like(images)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> print(fastlip.metrics.observed_stretch(model, perturbed, images))
    """
    _check(perturbed, inputs)
    with torch.no_grad():
        # Copies, since the model may work in place.
        return _ratio(model(perturbed.clone()), model(inputs.clone()), perturbed, inputs)


def layer_stretch(
    model: nn.Module,
    perturbed: Tensor,  # [B, ...]
    inputs: Tensor,  # [B, ...]
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Stretch of each perturbation from the input up to each named layer's output; name -> [B] float64.

    Args:
        model: the network; ``layers`` are names of its modules (``model.get_submodule``), "" is the network itself.
        perturbed: perturbed images, [B, ...].
        inputs: the original images, like ``perturbed``.
        layers: names of modules that return one tensor [B, ...] and are called once in a forward pass.

    Returns:
        ||phi(x') - phi(x)||_2 / ||x' - x||_2, where phi is the network up to the layer; NaN where an image was not
        perturbed.

    Raises:
        ValueError: the shapes differ, or a layer is missing, was not called, or was called more than once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> images = torch.rand(4, 3, 2, 2)
        >>> perturbed = images + 0.01 * torch.randn_like(images)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> print(fastlip.metrics.layer_stretch(model, perturbed, images, ["1", "3"]))
    """
    _check(perturbed, inputs)
    changed, original = layer_outputs(model, perturbed, layers), layer_outputs(model, inputs, layers)
    return {name: _ratio(changed[name], original[name], perturbed, inputs) for name in layers}


@torch.no_grad()
def layer_outputs(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Output of each named layer for the images ``x``, without gradients.

    Args:
        model: the network, run once; its mode is not changed.
        x: images, [B, ...].
        layers: names of modules, as in :func:`layer_stretch`.

    Returns:
        A copy of each layer's output, by name.

    Raises:
        ValueError: a layer is missing, was not called, was called more than once, or returned no tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> hidden = fastlip.metrics.layer_outputs(model, torch.rand(2, 12), ["1"])["1"]
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in outputs:
                raise ValueError(f"layers: {name!r} is called more than once in a forward pass")
            if not isinstance(output, Tensor):
                raise ValueError(f"layers: {name!r} returns {type(output).__name__}, not one tensor")
            # A copy, because the next module may work in place on this output.
            outputs[name] = output.clone()

        return hook

    handles = []
    try:
        for name in layers:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"layers: the model has no module {name!r}") from None
            handles.append(module.register_forward_hook(keep(name)))
        model(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in outputs:
            raise ValueError(f"layers: {name!r} is not called in a forward pass")
    return outputs


def _ratio(changed: Tensor, original: Tensor, perturbed: Tensor, inputs: Tensor) -> Tensor:
    out = _length(changed, original)
    moved = _length(perturbed, inputs)
    return torch.where(moved > 0, out / moved, torch.nan)


def _length(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), dim=1)


def _check(perturbed: Tensor, inputs: Tensor) -> None:
    if perturbed.shape != inputs.shape:
        raise ValueError(f"perturbed must have inputs' shape {list(inputs.shape)}, got {list(perturbed.shape)}")

"""Taps of convolutions that never touch their input, because it is smaller than they reach."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlip.models._calls import calls
from fastlip.norms._operators.modules import CONVS, keeps_forward


def live_taps(model: nn.Module, image_shape: Sequence[int]) -> dict[str, Tensor]:
    """Which taps of each convolution touch its input, padding apart, on images of one shape.

    A tap that lies in the padding at every position multiplies zeros alone: its weights have no effect and no gradient.

    Args:
        model: the network; it runs once and is left as it was.
        image_shape: [C, H, W] of one image.

    Returns:
        For each convolution that runs, by name, booleans ``[*kernel]``; true where a tap is live in any of its calls.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        >>> live = fastlip.models.live_taps(model, (3, 1, 1))
        >>> print(live["0"])  # around one pixel only the middle tap
    """
    found: dict[str, Tensor] = {}
    ran, _ = calls(model, image_shape)
    padded = {id(c.output): c.module.padding for c in ran if isinstance(c.module, nn.ZeroPad2d)}
    for call in ran:
        conv = call.module
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or call.input is None or call.output is None:
            continue
        if keeps_forward(conv, next(kind for kind in CONVS if isinstance(conv, kind))):
            around = padded.get(id(call.input), (0,) * 2 * len(conv.kernel_size))
            live = _reached(conv, call.input.shape[2:], call.output.shape[2:], around)
        else:
            live = _with_gradient(conv, call.input)
        found[call.name] = found[call.name] | live if call.name in found else live
    return found


def dead_share(live: dict[str, Tensor], model: nn.Module) -> float:
    """Share of all weights of the convolutions in ``live`` (:func:`live_taps`) that are of dead taps.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        >>> print(fastlip.models.dead_share(fastlip.models.live_taps(model, (3, 1, 1)), model))  # 8 of 9
    """
    total = dead = 0.0
    for name, taps in live.items():
        weights = model.get_submodule(name).weight
        assert isinstance(weights, Tensor)
        total += weights.numel()
        dead += weights.numel() * (1.0 - taps.double().mean().item())
    return dead / total if total else 0.0


def _reached(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Sequence[int], outputs: Sequence[int], around: Sequence[int]
) -> Tensor:
    """Taps that reach an input, of which ``around`` (left, right, top, bottom, ...) are zeros put there before."""
    live = torch.ones(conv.kernel_size, dtype=torch.bool)
    if conv.padding_mode != "zeros":
        return live  # what stands beyond the border are pixels too
    axes = len(conv.kernel_size)
    for axis, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        if conv.padding == "same":
            before = dilation * (kernel - 1) // 2
        else:
            before = 0 if isinstance(conv.padding, str) else conv.padding[axis]
        first, beyond = around[2 * (axes - 1 - axis)], n - around[2 * (axes - 1 - axis) + 1]
        taps, positions = torch.arange(kernel)[:, None], torch.arange(m)[None]
        places = positions * stride - before + taps * dilation  # [kernel, m]
        touched = ((places >= first) & (places < beyond)).any(1)
        live &= touched.reshape([-1 if i == axis else 1 for i in range(axes)])
    return live


def _with_gradient(conv: nn.Module, x: Tensor) -> Tensor:
    """Taps that the output of a convolution with a forward of its own depends on, where no pixel is zero."""
    weight = conv.get_parameter("weight").detach().clone().requires_grad_()
    pixels = 1.0 + torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    output = torch.func.functional_call(conv, {"weight": weight}, (pixels,))
    (slope,) = torch.autograd.grad(output.sum(), weight)
    return slope.abs().amax((0, 1)).cpu() > 0

"""From torch modules to the linear maps they apply."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.norms._operators.operator import Operator, conv_operator, require_finite

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def module_operator(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    output_scale: Tensor | None = None,  # [Cout]
    input_scale: Tensor | None = None,  # [Cin]
    output_size: Sequence[int] | None = None,
    finite: bool = True,
) -> Operator:
    """The linear map of a Conv, ConvTranspose or Linear module on inputs of one shape, without its bias.

    A transposed convolution is represented by its adjoint, which has the same norm.

    Args:
        module: the module; its weight may be parametrised, of any floating dtype and on any device.
        input_shape: shape of one input without the batch axis, ``[Cin, *spatial]`` or, for Linear, [..., features].
        output_scale: factors for the output channels, such as those of a folded BatchNorm.
        input_scale: factors for the input channels, such as those of a folded input normalisation.
        output_size: spatial size of a transposed convolution's output; by default the one that its settings imply.
        finite: whether to check that the weight is finite; if False, the caller must check it.

    Raises:
        TypeError: there is no such map for this module.
        ValueError: the weight holds NaN or infinite values, the shape does not fit, or the module has another
            ``forward`` than its class in torch, so that it may apply another map than its weight's.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> op = fastlip.norms.module_operator(nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 8, 8))
        >>> print(fastlip.norms.operator_norms([op])[0])
    """
    if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)):
        raise TypeError(f"module must be a Conv, ConvTranspose or Linear, got {type(module).__name__}")
    kind = next(cls for cls in (*CONVS, *TRANSPOSED, nn.Linear) if isinstance(module, cls))
    if not keeps_forward(module, kind):
        raise ValueError(
            f"{type(module).__name__} has another forward than {kind.__name__}, and may apply another map than its "
            "weight; describe that map with fastlip.norms.conv_operator"
        )
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        op = Operator(scaled(weight, output_scale, input_scale, 1))
        if finite:
            require_finite(op)
        return op
    geometry: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    geometry["finite"] = finite
    size = tuple(input_shape[1:])
    if isinstance(module, CONVS):
        weight = scaled(weight, output_scale, input_scale, module.groups)
        return conv_operator(weight, size, padding=module.padding, padding_mode=module.padding_mode, **geometry)
    # weight is [Cin, Cout / groups, *kernel]: the adjoint's output channels come first.
    weight = scaled(weight, input_scale, output_scale, module.groups)
    if output_size is None:
        axes = zip(
            size, module.stride, module.padding, module.dilation, module.kernel_size, module.output_padding, strict=True
        )
        output_size = tuple((n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in axes)
    return adjoint_of_transposed(weight, size, output_size, padding=module.padding, **geometry)


def adjoint_of_transposed(
    weight: Tensor, input_size: Sequence[int], output_size: Sequence[int], **geometry: Any
) -> Operator:
    """The convolution whose adjoint a transposed convolution is.

    Args:
        weight: [Cin, Cout / groups, *kernel].
        input_size: spatial size of the transposed convolution's input.
        output_size: spatial size of its output.
        geometry: padding, as numbers, and what else :func:`conv_operator` takes.
    """
    op = conv_operator(weight, output_size, **geometry)
    if op.output_size == tuple(input_size):
        return op
    # An output padding of a stride or more adds positions that the adjoint must not reach: it takes them from the
    # padding at the far end.
    ends = zip(input_size, op.input_size, op.stride, op.extent, op.padding, strict=True)
    return replace(op, padding=tuple((p, (n - 1) * s + e - m - p) for n, m, s, e, (p, _) in ends))


def scaled(weight: Tensor, first: Tensor | None, second: Tensor | None, groups: int) -> Tensor:
    """Scale, in float64, a weight's first axis, and its second one, which holds the channels of one group."""
    first, second = (None if t is None else t.to(weight.device, torch.float64) for t in (first, second))
    return scale_channels(weight, first, second, groups)


def scale_channels(weight: Tensor, first: Tensor | None, second: Tensor | None, groups: int) -> Tensor:
    """:func:`scaled` in the dtype of the factors."""
    ones = (1,) * (weight.dim() - 2)
    if first is not None:
        weight = weight * first.view(-1, 1, *ones)
    if second is not None:
        weight = (weight.unflatten(0, (groups, -1)) * second.view(groups, 1, -1, *ones)).flatten(0, 1)
    return weight


def keeps_forward(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module has the forward of ``cls``: neither its own class nor the module itself overrides ``forward``.

    Convolutions must not override ``_conv_forward`` either, which their ``forward`` calls.
    """
    return all(
        getattr(type(module), name, None) is getattr(cls, name, None) and name not in vars(module)
        for name in ("forward", "_conv_forward")
    )


def describe_module(module: nn.Module, input_shape: Sequence[int]) -> str:
    """A short description such as "Conv2d 64→64 3×3 /2 on 8×8"."""
    name = type(module).__name__.removeprefix("Parametrized")
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}→{module.out_features}"
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return describe_conv(
            name, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.groups, input_shape
        )
    return f"{name} {input_shape[0]}"


def describe_conv(
    name: str,
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    groups: int,
    input_shape: Sequence[int],
) -> str:
    """A short description of a convolution of this name; ``input_shape`` is [Cin, *spatial]."""
    parts = [name, f"{inputs}→{outputs}", "×".join(map(str, kernel))]
    if math.prod(stride) > 1:
        parts.append("/" + "×".join(map(str, stride)))
    if groups > 1:
        parts.append(f"{groups} groups")
    return " ".join([*parts, "on", "×".join(map(str, input_shape[1:]))])

"""Small networks on the CPU, several images to a vector: the wrapper of ``interleaved_layers_``."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

#: Targets whose weights lie side by side, and images in a block, as in csrc/kernels/api.h.
_TARGETS, _IMAGES = 8, 16
_KINDS = ("conv", "max_pool", "average_pool")


class LayerGeometry(NamedTuple):
    """A convolution of one group, padded with zeros, or a pool, with the ReLU behind it.

    The default is a linear layer, a convolution of maps of one pixel. An average counts the padding's zeros.

    Attributes:
        channels: of the input; of a linear layer, its elements.
        outputs: channels of the output.
        size: height and width of the input.
        kernel: rows and columns, as those below are.
        stride: likewise.
        dilation: likewise.
        padding: likewise, at each side.
        relu: whether a ReLU follows.
        kind: "conv", "max_pool" or "average_pool"; pools have as many outputs as channels.

    Example:
        >>> from fastlip import ops
        >>> layer = ops.LayerGeometry(3, 8, (32, 30), (3, 3), stride=(2, 2), padding=(1, 1), relu=True)
        >>> print(layer.output)  # (8, 16, 15)
    """

    channels: int
    outputs: int
    size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    relu: bool = False
    kind: Literal["conv", "max_pool", "average_pool"] = "conv"

    @property
    def output(self) -> tuple[int, int, int]:
        """The shape of the output for one image, [outputs, H', W']."""
        return self.outputs, self._side(0), self._side(1)

    def _side(self, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (self.size[axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1


class InterleavedLayers:
    """Convolutions, pools and linear layers that follow one another, each with its ReLU, in float32 on the CPU.

    It is made for networks of few channels, whose layers take less time than calling them does: registers hold an
    element of several images, and no map leaves the cache on its way through all layers. Each layer takes the maps that
    the one before it gives; or, if it is linear, their elements as one vector, channel by channel as
    ``torch.nn.Flatten`` has them.

    An image's result depends neither on the other images nor on the number of threads. A weight that is not finite may
    make NaN of pixels that meet padding. Of several elements that are the largest the first one gets the gradient, as
    in PyTorch. Not differentiable by autograd: :meth:`gradient` is the backward pass.

    Args:
        layers: what the layers are.
        weights: theirs, [outputs, channels, ...] float32 on the CPU; they are copied. None of pools.
        biases: theirs, [outputs], None for none.

    Raises:
        ValueError: there are not as many weights and biases as layers, or a weight is not [outputs, channels, h, w].
        RuntimeError: once called, a tensor is not float32 on the CPU or has a wrong shape; a layer does not take what
            the one before it gives; kernels have more than 16 taps a side, or maxima more than 255 in all; or stride,
            dilation or padding is larger than 64.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> layers = [ops.LayerGeometry(3, 8, (32, 32), (3, 3), relu=True), ops.LayerGeometry(8 * 30 * 30, 10)]
        >>> weights = torch.randn(8, 3, 3, 3), torch.randn(10, 7200)
        >>> network = ops.InterleavedLayers(layers, weights, [None, torch.randn(10)])
        >>> logits, active = network.product(torch.rand(5, 3, 32, 32), record=True)
        >>> grad = network.gradient(torch.ones(5, 10, 1, 1), active)  # of the input, [5, 3, 32, 32]
    """

    def __init__(
        self, layers: Sequence[LayerGeometry], weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]
    ) -> None:
        if not len(layers) == len(weights) == len(biases) > 0:
            raise ValueError("there must be a layer, and a weight and a bias (or None) for each")
        for layer, weight in zip(layers, weights, strict=True):
            if layer.kind not in _KINDS:
                raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {layer.kind!r}")
            if (weight is None) != (layer.kind != "conv"):
                raise ValueError(f"convolutions alone must have a weight, got {layer} with {weight is not None:d}")
            taps = layer.kernel[0] * layer.kernel[1]
            shape = (layer.outputs, layer.channels)
            if weight is not None and (weight.shape[:2] != shape or weight[0, 0].numel() != taps):
                raise ValueError(f"weight of {layer} must be [outputs, channels, h, w], got {list(weight.shape)}")
        self.layers = tuple(layers)
        none = torch.empty(0, device="cpu")
        self._forward = [none if weight is None else _packed(weight) for weight in weights]
        self._adjoint = [none if weight is None else _packed(weight.transpose(0, 1)) for weight in weights]
        self._biases = [none if bias is None else bias.detach().clone() for bias in biases]
        self._no_flags = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._geometry = flat_geometry(layers)
        first = layers[0]
        self._input, self._output = (first.channels, *first.size), layers[-1].output
        self._flags = sum(math.prod(layer.output) for layer in layers if layer.relu or layer.kind == "max_pool")

    def product(
        self,
        x: Tensor,  # [B, channels, H, W]
        *,
        record: bool = False,
        flat: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The last layer's output, [B, outputs, H', W'], or with ``flat`` [B, outputs H' W'].

        To ``record`` is to return what :meth:`gradient` has to know as well, [ceil(B / 16), elements, 16] uint8: where
        ReLUs pass elements on, positive or NaN, and which element of its window each maximum is, or 255 where a ReLU
        stops it. Those beyond the batch are of no meaning.
        """
        batch = x.shape[0]
        shape = (math.prod(self._output),) if flat else self._output
        out = torch.empty(batch, *shape, device="cpu", dtype=torch.float32)
        active = None
        if record:
            active = torch.empty(-(-batch // _IMAGES), self._flags, _IMAGES, dtype=torch.uint8, device="cpu")
        torch.ops.fastlip.interleaved_layers_(
            out, x.contiguous(), self._forward, self._biases, self._geometry,
            self._no_flags if active is None else active, False,
        )  # fmt: skip
        return out, active

    def gradient(
        self,
        grad: Tensor,  # [B, outputs, H', W'] or [B, outputs H' W']
        active: Tensor | None,  # what it returned with it
    ) -> Tensor:
        """The gradient of the input, [B, channels, H, W], where ``grad`` is that of the output."""
        out = torch.empty(grad.shape[0], *self._input, device="cpu", dtype=torch.float32)
        torch.ops.fastlip.interleaved_layers_(
            out, grad.contiguous(), self._adjoint, self._biases, self._geometry,
            self._no_flags if active is None else active, True,
        )  # fmt: skip
        return out


def flat_geometry(layers: Sequence[LayerGeometry]) -> list[int]:
    """Layers as the operator takes them: 14 numbers each."""
    flat: list[int] = []
    for layer in layers:
        flat += layer.channels, layer.outputs, *layer.size, *layer.kernel, *layer.stride, *layer.dilation
        flat += *layer.padding, int(layer.relu), _KINDS.index(layer.kind)
    return flat


def _packed(
    weight: Tensor,  # [targets, sources, ...]
) -> Tensor:
    """A weight as the operator reads it, [ceil(targets / 8), sources, taps, 8]."""
    targets, sources = weight.shape[:2]
    taps = weight.detach().reshape(targets, sources, -1)
    packed = taps.new_zeros(-(-targets // _TARGETS) * _TARGETS, sources, taps.shape[2])
    packed[:targets] = taps
    return packed.unflatten(0, (-1, _TARGETS)).permute(0, 2, 3, 1).contiguous()

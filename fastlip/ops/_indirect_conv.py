"""Convolutions on the CPU by tables of which pixels meet: the wrapper of ``indirect_convs_``."""

import torch
from torch import Tensor

#: Outputs of a panel of weights, as in csrc/kernels/api.h.
_LANES = 16


def packed_taps(
    weight: Tensor,  # [taps, channels, outputs]
) -> Tensor:
    """The matrices of a convolution's taps in the order in which :class:`IndirectConvs` reads them.

    Returns:
        [ceil(outputs / 16), taps * channels, 16].

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> weight = ops.packed_taps(torch.randn(2, 4, 5))  # 2 taps, from 4 channels to 5
    """
    taps, channels, outputs = weight.shape
    packed = weight.new_empty(-(-outputs // _LANES), taps, channels, _LANES)
    whole = outputs // _LANES
    packed[:whole] = weight[:, :, : whole * _LANES].unflatten(2, (whole, _LANES)).permute(2, 0, 1, 3)
    if rest := outputs % _LANES:
        packed[whole, :, :, :rest] = weight[:, :, whole * _LANES :]
        packed[whole, :, :, rest:] = 0.0
    return packed.flatten(1, 2)


def meeting_pixels(
    rows: Tensor,  # [H', h] int64
    columns: Tensor,  # [W', w] int64
    width: int,
) -> Tensor:
    """The table for :class:`IndirectConvs` to maps of H' x W' pixels by kernels of h x w taps.

    Args:
        rows: the source row that each target row meets at each tap of a column of the kernel, -1 for none.
        columns: the same for columns.
        width: of the sources' maps.

    Returns:
        [H' W', 1 + h w] int32: a target pixel and the source pixel that it meets at each tap, -1 for none. Pixels that
        meet the same taps are neighbours.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> rows = torch.tensor([[0]])  # one row, and a kernel of two columns on three pixels
        >>> table = ops.meeting_pixels(rows, torch.tensor([[0, 1], [1, 2]]), width=3)
        >>> print(table)
    """
    down, across = rows[:, None, :, None], columns[None, :, None, :]
    source = torch.where((down < 0) | (across < 0), -1, down * width + across).flatten(2).flatten(0, 1)
    _, kind = torch.unique(source >= 0, dim=0, return_inverse=True)
    order = kind.argsort(stable=True)
    return torch.cat([order[:, None], source[order]], 1).int()


class IndirectConvs:
    """Convolutions to be run one after the other, float32 on the CPU, each with what follows it elementwise.

    They are collected and run together, because Python is slow between two of them: by then each has replaced the
    cache's contents. The result of a convolution may be an operand of those added after it.

    For every row (target, source of tap 0, source of tap 1, ...) of its table, a convolution makes the channels of
    ``out`` at the pixel ``target``, counted row by row, the sum of those of ``x`` at ``source`` times ``weight[tap]``
    over the taps whose source is not -1, plus ``bias`` and ``other``. With ``relu``, negative elements then become 0,
    and ``active`` becomes True where the ReLU passes an element on, positive or NaN. Without, elements become 0 where
    ``active`` is False: the adjoint of the next layer gives the gradient before that ReLU.

    An image's result depends neither on the other images nor on the number of threads.

    Example:
        >>> import torch
        >>> from fastlip import ops
        >>> rows = torch.tensor([[0]])  # one row, and a kernel of two columns on three pixels
        >>> table = ops.meeting_pixels(rows, torch.tensor([[0, 1], [1, 2]]), width=3)
        >>> weight, x = ops.packed_taps(torch.randn(2, 4, 5)), torch.randn(1, 4, 1, 3)
        >>> out = torch.empty(1, 5, 1, 2, memory_format=torch.channels_last)
        >>> ops.IndirectConvs().add(out, x.contiguous(memory_format=torch.channels_last), weight, table, relu=True)
    """

    def __init__(self, most: int = 1) -> None:
        """``most``: how many convolutions are collected before they are run; operands live for as long."""
        self._most = most
        self._none = torch.empty(0, device="cpu")
        self._operands: list[tuple[Tensor | int, ...]] = []

    def add(
        self,
        out: Tensor,  # [B, outputs, H', W'], overwritten
        x: Tensor,  # [B, channels, H, W]
        weight: Tensor,  # [panels, taps * channels, 16]
        table: Tensor,  # [H' W', 1 + taps] int32
        *,
        adjoint: bool = False,
        bias: Tensor | None = None,  # [outputs]
        other: Tensor | None = None,  # [B, outputs, H', W']
        relu: bool = False,
        active: Tensor | None = None,  # [B, outputs, H', W'] bool, overwritten with relu
    ) -> None:
        """Add a convolution, and run those collected where they are as many as there may be.

        Args:
            out: overwritten, channels_last; may be ``other``, and shares no memory with the rest.
            x: what is convolved, channels_last.
            weight: from :func:`packed_taps`.
            table: from :func:`meeting_pixels`, each target once; its entries are not checked.
            adjoint: whether ``weight`` is that of the map whose adjoint this is, [panels, taps * outputs, 16]: each
                tap's matrix is transposed.
            bias: added to every pixel.
            other: added to the result; channels_last.
            relu: whether a ReLU follows the sums.
            active: where the ReLU passes elements on, or without ``relu`` where the result is kept; likewise.

        Raises:
            RuntimeError: a tensor is not channels_last or contiguous, float32 (the table int32, ``active`` bool), on
                the CPU or of the shape above; when the convolution is run.
        """
        none = self._none
        optional = (none if t is None else t for t in (bias, other, active))
        self._operands.append((out, x, weight, table, int(adjoint), *optional, int(relu)))
        if len(self._operands) >= self._most:
            self.run()

    def run(self) -> None:
        """Run the convolutions collected so far."""
        if self._operands:
            operands, self._operands = self._operands, []
            torch.ops.fastlip.indirect_convs_(*map(list, zip(*operands, strict=True)))

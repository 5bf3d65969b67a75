"""Plans of batched operator applications: the memory layout, and which tile computes what.

A plan describes one direction (A, or A^T) of any number of convolutions of any geometry. The kernels know no geometry:
stride, dilation, padding and its mode are in tables that list, for each target pixel, the source pixels that it reads
and the taps through which it reads them. Target pixels that read through the same taps form a gather group. A column is
a target pixel of one vector; a tile is a block of target channels by a run of the columns of a gather group.

Memory: vectors are [vectors, pixels, channels] (channels_last), one operator after the other. Weights are
[groups, blocks of at most 64 target channels, taps, source channels, lanes], where a block's channels are padded with
zeros to a multiple of 16. Weights of depthwise convolutions are [blocks, taps, lanes].

Plans for GPUs have wider tiles, merge small gather groups, and split tiles of many products into parts (split-K), whose
sums are added up at the end: a few small maps of many channels would leave most of a GPU idle.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlip._renamed import renamed_keywords
from fastlip.ops._gather_groups import GatherGroup, Ints, merge_gather_groups

#: Target channels of a full block, and what a block's channels are padded to a multiple of.
BLOCK, LANES = 64, 16
#: Columns of the plan's tables; the C++ and CUDA kernels read them by position.
PROBLEM = (
    "depthwise",
    "source_at",
    "target_at",
    "weight_at",
    "vector_at",
    "vectors",
    "groups",
    "taps",
    "source_channels",  # per group, as the next
    "target_channels",
    "source_pixels",
    "target_pixels",
    "tile_at",
    "tiles",
)
GATHER_GROUP = ("taps", "pixels", "taps_at", "targets_at", "sources_at")
TILE = ("problem", "gather_group", "group", "block", "column", "columns", "part", "parts", "slot")
#: Most columns of a tile that is split into parts; the sums of each part take 64 x 64 elements of scratch.
PART_COLUMNS = 64
#: Fewest products of a part, and the number of parts that each multiprocessor should get.
_LEAST_PRODUCTS, _PARTS_EACH = 512, 8
#: Former attributes of plans, each with its present name.
_RENAMED = {"chains": "vectors", "most_chains": "max_vectors", "bundles": "gather_groups"}


@dataclass(frozen=True)
class ConvGeometry:
    """The shape of a convolution, without its weight; without spatial axes it is a matrix.

    Attributes:
        in_channels: of the convolution's input.
        out_channels: of its output.
        groups: number of independent channel groups.
        kernel: taps per axis.
        input_size: pixels per axis.
        output_size: pixels per axis.
        stride: per axis.
        dilation: per axis.
        padding: (before, after) per axis; negative numbers crop.
        padding_mode: "zeros", "circular", "reflect" or "replicate".

    Example:
        >>> from fastlip import ops
        >>> sizes = {"kernel": (3,), "input_size": (10,), "output_size": (8,)}
        >>> geometry = ops.ConvGeometry(3, 8, **sizes, stride=(1,), dilation=(1,), padding=((0, 0),))
        >>> print(geometry.input, geometry.output)
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    input_size: tuple[int, ...] = ()
    output_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"

    @property
    def depthwise(self) -> bool:
        """Whether each channel is a group."""
        return self.groups == self.in_channels == self.out_channels > 1

    @property
    def input(self) -> tuple[int, int]:
        """Channels and pixels of the input."""
        return self.in_channels, math.prod(self.input_size)

    @property
    def output(self) -> tuple[int, int]:
        """Channels and pixels of the output."""
        return self.out_channels, math.prod(self.output_size)


@dataclass(frozen=True, eq=False)
class OperatorPlan:
    """One direction of a batch of operators, as :func:`fastlip.ops.operator_step_` takes it.

    Attributes:
        problems: [P, 14] int64, one row per operator, columns ``PROBLEM``; offsets count elements.
        tiles: [T, 9] int64, columns ``TILE``; the rows of one operator are contiguous, and so are the parts of one
            tile. ``slot`` numbers the rows that are parts of a tile, and is -1 for a whole tile.
        gather_groups: [N, 5] int64, columns ``GATHER_GROUP``; offsets into ``entries``.
        entries: int32: taps [taps]; target pixels [pixels]; source pixels [taps, pixels], -1 for none.
        source_size: elements of all source vectors.
        target_size: elements of all target vectors.
        weight_size: elements of all packed weights.
        vectors: number of vectors of all operators together.
        max_vectors: largest number of vectors of one operator.
        parts: number of rows of ``tiles`` that are parts of a tile.
    """

    problems: Tensor
    tiles: Tensor
    gather_groups: Tensor
    entries: Tensor
    source_size: int
    target_size: int
    weight_size: int
    vectors: int
    max_vectors: int
    parts: int

    if not TYPE_CHECKING:  # a type checker takes a class with __getattr__ to have every attribute

        def __getattr__(self, name: str) -> Any:
            if name not in _RENAMED:
                raise AttributeError(f"OperatorPlan has no attribute {name!r}")
            warnings.warn(f"OperatorPlan.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
            return getattr(self, _RENAMED[name])


@renamed_keywords(chains="vectors")
def operator_plan(
    geometries: Sequence[ConvGeometry],
    vectors: Sequence[int],
    *,
    adjoint: bool = False,
    device: torch.device | str = "cpu",
    tile_columns: int | None = None,
    merge: bool | None = None,
    part_products: int | None = None,
) -> OperatorPlan:
    """Plan the application of each operator to a number of vectors at once.

    Args:
        geometries: one for each operator.
        vectors: number of vectors of each operator, at least 1.
        adjoint: whether to plan A^T.
        device: device of the tables; the defaults of the arguments below suit its kernels.
        tile_columns: most columns of a tile; by default 48 on the CPU, 64 on a GPU.
        merge: whether gather groups are merged where that saves tiles; by default on a GPU only.
        part_products: about how many products of an element a part of a tile adds up; 0 leaves tiles whole. The default
            is 0 on the CPU, and on a GPU a number that gives every multiprocessor several parts. Needs ``tile_columns``
            of at most 64; the CPU library supports whole tiles only.

    Raises:
        ValueError: ``vectors``, ``tile_columns`` or ``part_products`` is wrong.

    Example:
        >>> from fastlip import ops
        >>> sizes = {"kernel": (3,), "input_size": (10,), "output_size": (8,)}
        >>> geometry = ops.ConvGeometry(3, 8, **sizes, stride=(1,), dilation=(1,), padding=((0, 0),))
        >>> plan = ops.operator_plan([geometry], [4])  # for four vectors
        >>> print(plan.source_size, plan.target_size)
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if len(vectors) != len(geometries) or any(c < 1 for c in vectors):
        raise ValueError(f"vectors must be {len(geometries)} numbers of at least 1, got {list(vectors)}")
    for g, b in zip(geometries, vectors, strict=True):
        if b * max(g.input[1], g.output[1]) >= 2**31:
            raise ValueError(f"vectors times pixels must be below 2**31, got {b} vectors of {g}")
    if tile_columns is None:
        tile_columns = 64 if on_gpu else 48
    if tile_columns < 1:
        raise ValueError(f"tile_columns must be at least 1, got {tile_columns}")
    if part_products is not None and part_products != 0 and not (part_products > 0 and tile_columns <= PART_COLUMNS):
        raise ValueError(
            f"part_products must be at least 0, and 0 where tile_columns is above {PART_COLUMNS}, got {part_products}"
        )
    if merge is None:
        merge = on_gpu
    problems: list[tuple[int, ...]] = []
    gather_groups: list[tuple[int, ...]] = []
    tiles: list[Ints] = []
    entries: list[Ints] = []
    known: dict[tuple[ConvGeometry, int], list[int]] = {}
    runs: list[list[_Run]] = []  # of each operator
    entry_at = 0
    for g, b in zip(geometries, vectors, strict=True):
        key = (g, b if merge else 0)
        if key not in known:
            known[key] = []
            found: Sequence[GatherGroup] = _gather_groups(g, adjoint)
            for taps, pixels, partners in merge_gather_groups(found, b, tile_columns) if merge else found:
                at = entry_at + np.cumsum([0, taps.size, pixels.size, partners.size])
                known[key].append(len(gather_groups))
                gather_groups.append((taps.size, pixels.size, at[0], at[1], at[2]))
                entries += [taps, pixels, partners.ravel()]
                entry_at = int(at[3])
        runs.append([_Run(i, gather_groups[i][1] * b, gather_groups[i][0] * _reduced(g, adjoint)) for i in known[key]])
    if part_products is None:
        cut = on_gpu and tile_columns <= PART_COLUMNS
        part_products = _part_products(geometries, runs, adjoint, device) if cut else 0
    source_at = target_at = weight_at = vector_at = tile_at = slot_at = 0
    for index, (g, b) in enumerate(zip(geometries, vectors, strict=True)):
        (sources, from_pixels), (targets, to_pixels) = (g.output, g.input) if adjoint else (g.input, g.output)
        groups, blocks = _blocks(g, adjoint)
        count = 0
        for group in range(groups):
            for block in range(blocks):  # tiles that need the same weights are neighbours
                for run in runs[index]:
                    rows = run.tiles((index, run.gather_group, group, block), tile_columns, part_products, slot_at)
                    slot_at = max(slot_at, int(rows[-1, -1]) + 1)
                    tiles.append(rows)
                    count += len(rows)
        channels = sources // groups, targets // groups
        place = (source_at, target_at, weight_at, vector_at, b, groups, math.prod(g.kernel), *channels)
        problems.append((int(g.depthwise), *place, from_pixels, to_pixels, tile_at, count))
        source_at += sources * from_pixels * b
        target_at += targets * to_pixels * b
        weight_at += packed_size((g.out_channels, g.in_channels // g.groups, *g.kernel), g.groups, adjoint)
        vector_at += b
        tile_at += count

    def table(rows: list[tuple[int, ...]], columns: int) -> Tensor:
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, columns)).to(device)

    all_tiles = np.concatenate([np.zeros((0, len(TILE)), dtype=np.int64), *tiles])
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *entries]).astype(np.int32)
    return OperatorPlan(
        table(problems, len(PROBLEM)),
        torch.from_numpy(all_tiles).to(device),
        table(gather_groups, len(GATHER_GROUP)),
        torch.from_numpy(flat).to(device),
        source_at,
        target_at,
        weight_at,
        vector_at,
        max(vectors, default=0),
        slot_at,
    )


@dataclass(frozen=True)
class _Run:
    """The columns of one gather group of an operator, and the number of products of each of their elements."""

    gather_group: int
    columns: int
    products: int

    def tiles(self, place: tuple[int, ...], width: int, part_products: int, slot: int) -> Ints:
        parts = max(1, round(self.products / part_products)) if part_products else 1
        starts = np.arange(0, self.columns, width)
        first, part = np.repeat(starts, parts), np.tile(np.arange(parts), starts.size)
        slots = slot + np.arange(first.size) if parts > 1 else np.full(first.size, -1)
        columns = np.minimum(width, self.columns - first)
        fixed = np.broadcast_to(place, (first.size, 4))
        return np.column_stack([fixed, first, columns, part, np.full(first.size, parts), slots])


def _blocks(g: ConvGeometry, adjoint: bool) -> tuple[int, int]:
    """Groups of the tile table (a depthwise kernel has one there), and blocks of each group."""
    groups = 1 if g.depthwise else g.groups
    return groups, -(-((g.in_channels if adjoint else g.out_channels) // groups) // BLOCK)


def _reduced(g: ConvGeometry, adjoint: bool) -> int:
    """Channels that an element adds up for each tap; 0 for depthwise kernels, whose tiles stay whole."""
    return 0 if g.depthwise else (g.out_channels if adjoint else g.in_channels) // g.groups


def _part_products(
    geometries: Sequence[ConvGeometry], runs: list[list[_Run]], adjoint: bool, device: torch.device
) -> int:
    """Products per part, such that each multiprocessor gets several parts."""
    work = sum(
        math.prod(_blocks(g, adjoint)) * -(-run.columns // PART_COLUMNS) * run.products
        for g, own in zip(geometries, runs, strict=True)
        for run in own
    )
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(_LEAST_PRODUCTS, work // (count * _PARTS_EACH))


def packed_size(shape: Sequence[int], groups: int, adjoint: bool) -> int:
    """Number of elements of a packed kernel of ``shape`` [Cout, Cin / groups, *kernel]."""
    taps = math.prod(shape[2:])
    if groups == shape[0] > 1 == shape[1]:  # depthwise
        return taps * _padded(groups)
    outputs, inputs = shape[0] // groups, shape[1]
    targets, sources = (inputs, outputs) if adjoint else (outputs, inputs)
    return groups * sources * taps * _padded(targets)


def _padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


@lru_cache(maxsize=256)
def _gather_groups(g: ConvGeometry, adjoint: bool) -> tuple[GatherGroup, ...]:
    """Gather groups of one direction, the largest first."""
    read = _read_pixels(g)  # [outputs, taps]
    if adjoint:
        taps, partners = _inverted(read, math.prod(g.input_size))
    else:
        present = np.argsort(read < 0, axis=1, kind="stable")  # padding last
        partners = np.take_along_axis(read, present, axis=1)
        taps = np.where(partners >= 0, present, -1)
    signatures, inverse = np.unique(taps, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    found = []
    for i, signature in enumerate(signatures):
        count = int((signature >= 0).sum())
        targets = np.flatnonzero(inverse == i)
        found.append(GatherGroup(signature[:count], targets, np.ascontiguousarray(partners[targets, :count].T)))
    return tuple(sorted(found, key=lambda group: -group.targets.size))


def _read_pixels(g: ConvGeometry) -> Ints:
    """The input pixel that each output pixel reads through each tap, [outputs, taps]; -1 for zero padding."""
    axes = len(g.kernel)
    read, inside = np.zeros((1,) * (2 * axes), dtype=np.int64), np.ones((1,) * (2 * axes), dtype=bool)
    for axis, (n, m, k) in enumerate(zip(g.input_size, g.output_size, g.kernel, strict=True)):
        left, _ = g.padding[axis]
        position = np.arange(m)[:, None] * g.stride[axis] + np.arange(k) * g.dilation[axis] - left
        ok = np.ones_like(position, dtype=bool)
        if g.padding_mode == "zeros":
            ok = (position >= 0) & (position < n)
            position = np.clip(position, 0, n - 1)
        elif g.padding_mode == "circular":
            position %= n
        elif g.padding_mode == "reflect":
            position = n - 1 - np.abs(n - 1 - np.abs(position))
        else:
            position = np.clip(position, 0, n - 1)
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = m, k
        read = read * n + position.reshape(shape)
        inside = inside & ok.reshape(shape)
    outputs, taps = math.prod(g.output_size), math.prod(g.kernel)
    return np.where(inside, read, -1).reshape(outputs, taps)


def _inverted(read: Ints, pixels: int) -> tuple[Ints, Ints]:
    """For each input pixel the taps through which it is read and the output pixels that read it, padded with -1."""
    outputs, taps = np.nonzero(read >= 0)
    pixel = read[outputs, taps]
    order = np.lexsort((outputs, taps, pixel))
    pixel, taps, outputs = pixel[order], taps[order], outputs[order]
    counts = np.bincount(pixel, minlength=pixels)
    place = np.arange(pixel.size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=0))
    tap_of, partner = np.full((pixels, width), -1), np.full((pixels, width), -1)
    tap_of[pixel, place], partner[pixel, place] = taps, outputs
    return tap_of, partner

"""operator_step_: one program for each row of the tile table, then one for each operator to add up its squared norms.

A tile's products are added up by ``tl.dot`` at full precision, a chunk of a tap's channels at a time. Parts of a tile
write their sums to scratch, which a second launch adds up in order, so results do not depend on scheduling.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlip.ops._operator_plan import BLOCK, GATHER_GROUP, PART_COLUMNS, PROBLEM, TILE
from fastlip.ops._triton.elements import (
    arithmetic,
    given,
    kernel,
    mask_of,
    nothing,
    on_device,
    takes_part,
)

_ROWS = tl.constexpr(BLOCK)
_COLUMNS = tl.constexpr(PART_COLUMNS)
_PROBLEM, _TILE, _GATHER_GROUP = (tl.constexpr(len(table)) for table in (PROBLEM, TILE, GATHER_GROUP))
_SUM_ROWS = tl.constexpr(128)


@triton.jit
def _dense_sums(
    x_ptr,
    weights,  # of the block
    entries_ptr,
    gather_group,
    source_at,
    source_row,
    first_source,
    pixel,
    inside,
    channels,
    lanes,
    part,
    parts,
    T: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sums [rows, columns] of one part: chunks of ``DEPTH`` channels, taps running faster."""
    taps = tl.load(gather_group)
    pixels = tl.load(gather_group + 1)
    taps_at = tl.load(gather_group + 2)
    sources_at = tl.load(gather_group + 4)
    lane = tl.arange(0, _ROWS)
    sums = tl.zeros((_ROWS, _COLUMNS), T)
    count = taps * ((channels + DEPTH - 1) // DEPTH)
    step = count * part // parts
    end = count * (part + 1) // parts
    while step < end:
        tap = step % taps
        channel = step // taps * DEPTH + tl.arange(0, DEPTH)
        known = channel < channels
        kernel_tap = tl.load(entries_ptr + taps_at + tap).to(tl.int64)
        source = tl.load(entries_ptr + sources_at + tap * pixels + pixel, inside, other=-1)
        met = source >= 0
        at = (kernel_tap * channels + channel)[None, :] * lanes + lane[:, None]
        weight = tl.load(weights + at, known[None, :] & (lane < lanes)[:, None], other=0.0)
        where = source_at + (first_source + source)[None, :] * source_row + channel[:, None]
        value = tl.load(x_ptr + where, met[None, :] & known[:, None], other=0.0)
        sums += tl.dot(weight, value, input_precision="ieee", out_dtype=T)
        step += 1
    return sums


@triton.jit
def _depthwise_sums(
    x_ptr,
    weights,
    entries_ptr,
    gather_group,
    source_at,
    source_row,
    first_source,
    pixel,
    inside,
    lanes,
    rows,
    T: tl.constexpr,
):
    """Sums [rows, columns] of a depthwise kernel."""
    taps = tl.load(gather_group)
    pixels = tl.load(gather_group + 1)
    taps_at = tl.load(gather_group + 2)
    sources_at = tl.load(gather_group + 4)
    lane = tl.arange(0, _ROWS)
    sums = tl.zeros((_ROWS, _COLUMNS), T)
    tap = tl.zeros((), tl.int64)
    while tap < taps:
        kernel_tap = tl.load(entries_ptr + taps_at + tap).to(tl.int64)
        source = tl.load(entries_ptr + sources_at + tap * pixels + pixel, inside, other=-1)
        met = source >= 0
        weight = tl.load(weights + kernel_tap * lanes + lane, lane < lanes, other=0.0)
        where = source_at + (first_source + source)[None, :] * source_row + lane[:, None]
        value = tl.load(x_ptr + where, met[None, :] & (lane < rows)[:, None], other=0.0)
        sums += weight[:, None] * value
        tap += 1
    return sums


@triton.jit
def _inverse(value):
    """1 / value, 0 for 0."""
    return tl.where(value > 0, 1 / tl.where(value > 0, value, 1.0), 0.0)


@kernel
def _operator_tile_kernel(
    out_ptr,
    x_ptr,
    x_square_ptr,
    previous_ptr,
    previous_square_ptr,
    weights_ptr,
    problems_ptr,
    tiles_ptr,
    gather_groups_ptr,
    entries_ptr,
    active_ptr,
    partial_ptr,
    sums_ptr,
    max_vectors,
    GATHER: tl.constexpr,
    T: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A whole tile, or the sums of a part of one; with ``GATHER`` the parts of each tile are added up."""
    tile_row = tl.program_id(0).to(tl.int64)
    tile = tiles_ptr + tile_row * _TILE
    problem_row = tl.load(tile)
    problem = problems_ptr + problem_row * _PROBLEM
    part = tl.load(tile + 6)
    parts = tl.load(tile + 7)
    serves = problem_row >= 0
    if GATHER:
        serves = (part == 0) & (parts > 1)
    serves = serves & takes_part(active_ptr, problem_row)
    if serves:
        gather_group = gather_groups_ptr + tl.load(tile + 1) * _GATHER_GROUP
        group = tl.load(tile + 2)
        block = tl.load(tile + 3)
        column = tl.load(tile + 4)
        columns = tl.load(tile + 5)
        slot = tl.load(tile + 8)
        depthwise = tl.load(problem)
        vectors = tl.load(problem + 5)
        groups = tl.load(problem + 6)
        kernel_taps = tl.load(problem + 7)
        channels = tl.load(problem + 8)
        targets = tl.load(problem + 9)
        source_pixels = tl.load(problem + 10)
        target_pixels = tl.load(problem + 11)
        vector_at = tl.load(problem + 4)
        padded = (targets + 15) // 16 * 16
        lanes = tl.minimum(padded - block * _ROWS, _ROWS)
        rows = tl.minimum(targets - block * _ROWS, _ROWS)
        products = kernel_taps * tl.where(depthwise != 0, 1, channels)
        weights = weights_ptr + tl.load(problem + 3) + products * (group * padded + block * _ROWS)
        source_at = tl.load(problem + 1) + group * channels + tl.where(depthwise != 0, block * _ROWS, 0)
        target_at = tl.load(problem + 2) + group * targets + block * _ROWS
        targets_at = tl.load(gather_group + 3)
        lane = tl.arange(0, _ROWS)
        # Each part has scratch for one tile.
        scratch = tl.multiple_of(sums_ptr + slot * _ROWS * _COLUMNS, 16)
        scratch += lane[:, None] * _COLUMNS + tl.arange(0, _COLUMNS)[None, :]

        first = tl.zeros((), tl.int64)
        while first < columns:
            run = tl.arange(0, _COLUMNS)
            inside = run < columns - first
            pixel = (column + first + run) // vectors
            vector = (column + first + run) % vectors
            if GATHER:
                sums = tl.zeros((_ROWS, _COLUMNS), T)
                one = tl.zeros((), tl.int64)
                while one < parts:
                    sums += tl.load(scratch + one * _ROWS * _COLUMNS)
                    one += 1
            elif depthwise != 0:
                sums = _depthwise_sums(
                    x_ptr,
                    weights,
                    entries_ptr,
                    gather_group,
                    source_at,
                    groups * channels,
                    vector * source_pixels,
                    pixel,
                    inside,
                    lanes,
                    rows,
                    T,
                )
            else:
                sums = _dense_sums(
                    x_ptr,
                    weights,
                    entries_ptr,
                    gather_group,
                    source_at,
                    groups * channels,
                    vector * source_pixels,
                    pixel,
                    inside,
                    channels,
                    lanes,
                    part,
                    parts,
                    T,
                    DEPTH,
                )
            if GATHER or parts == 1:
                target = tl.load(entries_ptr + targets_at + pixel, inside, other=0)
                at = target_at + (vector * target_pixels + target)[None, :] * (groups * targets) + lane[:, None]
                mask = inside[None, :] & (lane < rows)[:, None]
                if given(x_square_ptr):
                    length = tl.sqrt(tl.load(x_square_ptr + vector_at + vector))
                    sums *= _inverse(length).to(T)[None, :]
                    if given(previous_ptr):
                        other = tl.sqrt(tl.load(previous_square_ptr + vector_at + vector))
                        shift = (length * _inverse(other)).to(T)
                        sums -= shift[None, :] * tl.load(previous_ptr + at, mask, other=0.0)
                tl.store(out_ptr + at, sums, mask)
                wide = tl.where(mask, sums.to(tl.float64), 0.0)
                squares = tl.sum(wide * wide, 0)
                one = tl.zeros((), tl.int64)
                while one < vectors:
                    total = tl.sum(tl.where(vector == one, squares, 0.0))
                    to = partial_ptr + tile_row * max_vectors + one
                    if first > 0:
                        tl.debug_barrier()  # another thread may have stored it
                        total += tl.load(to)
                    tl.store(to, total)
                    one += 1
            else:
                tl.store(scratch, sums)
            first += _COLUMNS


@kernel
def _operator_squares_kernel(out_square_ptr, problems_ptr, tiles_ptr, active_ptr, partial_ptr, max_vectors):
    """One program per operator, which adds up the squared norms of its tiles in order."""
    problem_row = tl.program_id(0).to(tl.int64)
    problem = problems_ptr + problem_row * _PROBLEM
    if takes_part(active_ptr, problem_row):
        vector_at = tl.load(problem + 4)
        vectors = tl.load(problem + 5)
        tile_at = tl.load(problem + 12)
        tiles = tl.load(problem + 13)
        vector = tl.zeros((), tl.int64)
        while vector < vectors:
            total = tl.zeros((_SUM_ROWS,), tl.float64)
            first = tl.zeros((), tl.int64)
            while first < tiles:
                row = first + tl.arange(0, _SUM_ROWS)
                # A tile's squares are in the row of its first part.
                leads = (row < tiles) & (tl.load(tiles_ptr + (tile_at + row) * _TILE + 6, row < tiles, other=1) == 0)
                total += tl.load(partial_ptr + (tile_at + row) * max_vectors + vector, leads, other=0.0)
                first += _SUM_ROWS
            tl.store(out_square_ptr + vector_at + vector, tl.sum(total))
            vector += 1


def operator_step_(
    out: Tensor,
    out_square: Tensor,
    x: Tensor,
    x_square: Tensor | None,
    previous: Tensor | None,
    previous_square: Tensor | None,
    weights: Tensor,
    problems: Tensor,
    tiles: Tensor,
    gather_groups: Tensor,
    entries: Tensor,
    max_vectors: int,
    parts: int,
    matmul_precision: str,
    active: Tensor | None,
) -> None:
    if len(tiles) == 0:
        return
    partial = out_square.new_empty(len(tiles), max_vectors)
    sums = out.new_empty(max(1, parts), BLOCK * PART_COLUMNS)
    tables = (problems, tiles, gather_groups, entries)
    squares = nothing(out_square.dtype, out.device)
    mask = mask_of(active, out)
    with on_device(out):
        for gather in (False, True) if parts else (False,):
            _operator_tile_kernel[(len(tiles),)](
                out,
                x,
                squares if x_square is None else x_square,
                nothing(out.dtype, out.device) if previous is None else previous,
                squares if previous_square is None else previous_square,
                weights,
                *tables,
                mask,
                partial,
                sums,
                max_vectors,
                GATHER=gather,
                T=arithmetic(out),
                DEPTH=16 if out.dtype == torch.float64 else 32,
            )
        _operator_squares_kernel[(len(problems),)](out_square, problems, tiles, mask, partial, max_vectors)

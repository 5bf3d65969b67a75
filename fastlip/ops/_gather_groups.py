"""Gather groups of an operator: target pixels that read through the same taps, and groups merged where that pays."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: What fetching the weights of a tile costs on a GPU, in columns: it does not depend on the number of columns.
_WEIGHT_COST = 16
_LEAST_COLUMNS = 16


class GatherGroup(NamedTuple):
    """Target pixels that read source pixels through the same taps.

    Attributes:
        taps: [t], ascending; a tap that reads several source pixels for one target pixel occurs as often.
        targets: [m] target pixels.
        sources: [t, m] the source pixel that each target reads through each tap; -1 for none.
    """

    taps: Ints
    targets: Ints
    sources: Ints


def merge_gather_groups(groups: Sequence[GatherGroup], vectors: int, width: int) -> list[GatherGroup]:
    """Merge groups, given largest first, wherever the tiles saved outweigh the products with zeros that are added.

    A tile of up to ``width`` columns fetches its weights and computes 16, 32, 64, ... columns, whatever it needs. On a
    4 x 4 map one tile of 9 taps is cheaper than 9 tiles of 4, 6 and 9 taps; on a large map the inner pixels stay a
    group of their own.
    """
    if not groups:
        return []
    kernel = 1 + max(int(group.taps.max(initial=0)) for group in groups)
    counts: list[Ints] = []  # of each merged group: how often each tap occurs
    pixels: list[int] = []
    members: list[list[GatherGroup]] = []
    for group in groups:
        own, size = np.bincount(group.taps, minlength=kernel), group.targets.size
        best, where = _cost(own.sum(), size * vectors, width), -1
        if counts:
            merged_taps = np.maximum(np.stack(counts), own).sum(1)
            for i, taps in enumerate(merged_taps):
                before = _cost(counts[i].sum(), pixels[i] * vectors, width)
                added = _cost(taps, (pixels[i] + size) * vectors, width) - before
                if added < best:
                    best, where = added, i
        if where < 0:
            counts.append(own)
            pixels.append(size)
            members.append([group])
        else:
            counts[where] = np.maximum(counts[where], own)
            pixels[where] += size
            members[where].append(group)
    apart = sum(_cost(c.sum(), size * vectors, width) for c, size in zip(counts, pixels, strict=True))
    whole = np.max(counts, axis=0)
    # Merging all groups may pay even where no merger of two does.
    if _cost(whole.sum(), sum(pixels) * vectors, width) < apart:
        return [_union(list(groups), whole)]
    return [_union(parts, count) for parts, count in zip(members, counts, strict=True)]


def _cost(taps: int, columns: int, width: int) -> int:
    full, rest = divmod(columns, width)
    last = min(width, max(_LEAST_COLUMNS, 2 ** math.ceil(math.log2(rest)))) + _WEIGHT_COST if rest else 0
    return int(taps) * (full * (width + _WEIGHT_COST) + last)


def _union(parts: list[GatherGroup], counts: Ints) -> GatherGroup:
    """One group in place of ``parts``, in which each tap occurs ``counts`` times, [kernel]."""
    if len(parts) == 1:
        return parts[0]
    taps = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    columns = []
    for part in parts:
        sources = np.full((taps.size, part.targets.size), -1)
        # The k-th occurrence of a tap in a part becomes its k-th occurrence in the union.
        occurrence = np.arange(part.taps.size) - np.searchsorted(part.taps, part.taps)
        sources[first[part.taps] + occurrence] = part.sources
        columns.append(sources)
    targets = np.concatenate([part.targets for part in parts])
    order = np.argsort(targets)
    return GatherGroup(taps, targets[order], np.ascontiguousarray(np.concatenate(columns, axis=1)[:, order]))

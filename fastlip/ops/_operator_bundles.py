"""Bundles of an operator: its target pixels grouped by the taps they meet, and merged where larger tiles pay."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: Columns that a tile of a GPU costs beside its own: its weights are fetched for any number of columns.
_TILE_COST = 16
_LEAST_COLUMNS = 16


class Bundle(NamedTuple):
    """Pixels that meet the same taps.

    Attributes:
        taps: [t], ascending; a tap that meets a pixel several times stands there as often.
        targets: [m] target pixels.
        sources: [t, m] the source pixel that each target meets through each tap; -1 for none.
    """

    taps: Ints
    targets: Ints
    sources: Ints


def merged(bundles: Sequence[Bundle], chains: int, width: int) -> list[Bundle]:
    """Merge bundles, the largest first, wherever fewer tiles outweigh the products with zeros that it brings.

    A tile of up to ``width`` columns computes 16, 32, 64, ... of them whatever it needs, and fetches its weights. On a
    4 x 4 map one tile of 9 taps is cheaper than 9 tiles of 4, 6 and 9 taps; on a large map the inside stays by itself.
    """
    if not bundles:
        return []
    kernel = 1 + max(int(b.taps.max(initial=0)) for b in bundles)
    counts: list[Ints] = []  # per kept bundle, how often each tap stands in it
    pixels: list[int] = []
    members: list[list[Bundle]] = []
    for bundle in bundles:
        own, size = np.bincount(bundle.taps, minlength=kernel), bundle.targets.size
        best, where = _cost(own.sum(), size * chains, width), -1
        if counts:
            joined = np.maximum(np.stack(counts), own).sum(1)
            for i, taps in enumerate(joined):
                before = _cost(counts[i].sum(), pixels[i] * chains, width)
                added = _cost(taps, (pixels[i] + size) * chains, width) - before
                if added < best:
                    best, where = added, i
        if where < 0:
            counts.append(own)
            pixels.append(size)
            members.append([bundle])
        else:
            counts[where] = np.maximum(counts[where], own)
            pixels[where] += size
            members[where].append(bundle)
    apart = sum(_cost(c.sum(), size * chains, width) for c, size in zip(counts, pixels, strict=True))
    whole = np.max(counts, axis=0)
    if _cost(whole.sum(), sum(pixels) * chains, width) < apart:  # no single merger may pay where all of them do
        return [_joined(list(bundles), whole)]
    return [_joined(parts, count) for parts, count in zip(members, counts, strict=True)]


def _cost(taps: int, columns: int, width: int) -> int:
    full, rest = divmod(columns, width)
    last = min(width, max(_LEAST_COLUMNS, 2 ** math.ceil(math.log2(rest)))) + _TILE_COST if rest else 0
    return int(taps) * (full * (width + _TILE_COST) + last)


def _joined(parts: list[Bundle], counts: Ints) -> Bundle:
    if len(parts) == 1:
        return parts[0]
    taps = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    columns = []
    for part in parts:
        sources = np.full((taps.size, part.targets.size), -1)
        # A tap's k-th occurrence in a part takes its k-th place in the whole.
        again = np.arange(part.taps.size) - np.searchsorted(part.taps, part.taps)
        sources[first[part.taps] + again] = part.sources
        columns.append(sources)
    targets = np.concatenate([part.targets for part in parts])
    order = np.argsort(targets)
    return Bundle(taps, targets[order], np.ascontiguousarray(np.concatenate(columns, axis=1)[:, order]))

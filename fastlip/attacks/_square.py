"""The Square attack (Andriushchenko et al. 2020): random search with square-shaped updates, without gradients."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_call, count, number, radius, warn_of_wide
from fastlip.attacks._batch import Batch, new_batch, per_sample, take
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._distance import ORDER
from fastlip.attacks._loop import AttackLoop, BestTracker
from fastlip.attacks._model import Model, eval_mode
from fastlip.attacks._own_loss import AnyLoss
from fastlip.attacks._precision import Precision
from fastlip.attacks._prepare import network_of
from fastlip.attacks._quantize import grid_of
from fastlip.ops import Bounds, Judgement, Norm, PerSample

#: Iterations, of 10,000, at which the share of changed elements halves (section 4.1 of the paper).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: The power with which a bump decays from its centre.
_FALL_OFF = {"l2": 2.0, "l1": 4.0}
#: Queries of an image proposed together at most, and what a pass costs whatever its size, in images.
_TOGETHER, _COST = 16, 15
#: Queries after which all images wait for each other, and over which the share of accepted proposals is averaged.
_SPAN, _MEMORY = 50, 50
#: Tiles along an image's shorter side in the first iterate of "l2" and "l1".
_TILES = 5


def square(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    queries: int = 5000,
    share: float = 0.8,
    loss: AnyLoss = "margin",
    criterion: Criterion | None = None,
    restarts: int = 1,
    bounds: Bounds = (0.0, 1.0),
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
    fast: bool = False,
    precision: Precision = None,
    quantize: int | None = None,
) -> Tensor:
    """Adversarial images within ``eps`` of ``inputs`` by random search over squares; [B, ...] like ``inputs``.

    The attack needs the model's outputs alone. Images [B, C, H, W] get squares across all channels; signals [B, C, L]
    and vectors [B, N] get intervals; further axes are merged into H. Every image has windows and signs of its own from
    a counter-based generator, and stops at its first misclassified iterate. "linf" and "l2" follow the paper; "l1" is
    the paper's "l2" with lengths in L1 and bumps that decay faster, as in AutoAttack (Croce and Hein 2021).

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball in ``norm`` and the units of ``inputs``, float or [B], >= 0.
        queries: forward passes of each restart.
        share: the share of the pixels that the first squares cover.
        loss: "margin", "dlr", "ce" or a function, as in :func:`pgd`; an iterate is accepted where it increases.
        criterion: as in :func:`pgd`.
        restarts: number of runs; an image takes part in the next one only while it is robust.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        targets: classes to reach, [B] int64; only this decision is then a success.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, which determine the random draws together with the generator; 0 .. B-1 if None.
        generator: source of the draws, advanced by one for each query; the device's default generator if None.
        fast: as in :func:`pgd`.
        precision: as in :func:`pgd`.
        quantize: as in :func:`pgd`.

    Raises:
        ValueError: a value or shape is wrong, or inputs leave the bounds.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> adversarial = attacks.square(model, images, labels, eps=8 / 255, queries=100)
    """
    inputs, labels, targets, ids, bounds, norm = check_call(
        model, inputs, labels, targets, norm=norm, loss=loss, bounds=bounds, active=active, ids=ids,
        generator=generator, fast=fast, precision=precision,
    )  # fmt: skip
    queries, restarts = count(queries, "queries", 1), count(restarts, "restarts", 1)
    share = number(share, "share")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    check_criterion(criterion)
    grid = grid_of(quantize, inputs, bounds)
    eps = radius(eps, "eps", inputs, finite="for square, whose first steps reach the surface of the ball")
    warn_of_wide(eps, norm, inputs, bounds)
    with eval_mode(network_of(model, inputs, fast=fast, precision=precision)) as network, torch.no_grad():
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=0.0, bounds=bounds, ids=ids, active=active)
        loop = AttackLoop(network, inputs, norm=norm, loss=loss, grid=grid, criterion=criterion)
        batch = loop.without_misclassified(batch)
        for _ in range(restarts):
            if len(batch) == 0:
                break
            batch = _run(loop, batch, queries, share, generator)
    loop.warn("square", aimed=targets is not None or criterion is not None)
    return loop.result


def _run(loop: AttackLoop, batch: Batch, queries: int, share: float, generator: torch.Generator | None) -> Batch:
    """Query the model ``queries`` times and return the images that are still robust."""
    tracker = BestTracker(loop, batch, batch.x0)
    lowest = torch.full(batch.rows.shape, -torch.inf, dtype=torch.float64, device=batch.x0.device)
    climb = _Climb(loop, tracker, batch.x0, lowest)
    windows = list(_windows(batch.x0, queries, share))
    query, rate = 0, 1.0
    while query < queries:
        together = _together(len(tracker.now), rate, loop.network.largest)
        alike, most = 1, min(_SPAN, queries - query) if together > 1 else 1
        while alike < most and windows[query + alike] == windows[query]:
            alike += 1
        draws = [_Draws(tracker.now.batch, generator) for _ in range(alike)]
        if alike == 1:
            accepted = climb.query(windows[query], draws[0], first=query == 0)
        else:
            accepted = climb.query_together(windows[query], draws, together)
        if loop.network.largest > len(tracker.now):  # else there is no room, and a GPU is not to wait
            rate += min(alike / _MEMORY, 1.0) * (float(accepted.double().mean()) / alike - rate)
        query += alike
        unfinished = tracker.unfinished(query - 1 if alike == 1 else 0)
        if unfinished is not None:
            if len(unfinished) == 0:
                break
            tracker.drop(unfinished)
            climb.keep(unfinished)
    return tracker.finish()


def _together(images: int, rate: float, largest: int) -> int:
    """How many queries of so many images to propose together, in a batch no larger than the largest so far.

    Each saves what a pass costs whatever its size, and is proposed in vain where one before it is accepted, as happens
    at the given ``rate``.
    """
    room = largest // max(images, 1)
    if room < 2:
        return 1
    best = math.sqrt(2 * _COST / (max(images, 1) * max(rate, 1e-4)))
    return max(min(round(best), room, _TOGETHER), 1)


@dataclass
class _Climb:
    """The search's own iterate of each image, which is moved where that increases the loss."""

    loop: AttackLoop
    tracker: BestTracker
    x: Tensor  # [K, ...]
    loss: Tensor  # [K] float64

    def keep(self, kept: Tensor) -> None:
        """Go on with the images at positions ``kept``, [M] int64."""
        self.x, self.loss = take(self.x, kept), self.loss[kept]

    def query(self, window: tuple[int, int], draws: "_Draws", *, first: bool) -> Tensor:
        """Propose one change of each image, and return how many were accepted, [K]."""
        now = self.tracker.now
        now.x = self._proposed(now.batch, self.x, window, draws, first=first)
        return self._accept(self.loop.forward(now.batch, now.x, now.record, gradient=False)[2])

    def query_together(self, window: tuple[int, int], draws: list["_Draws"], together: int) -> Tensor:
        """The same for many queries, of which each pass takes the next few of every image; how many were accepted, [K].

        An image goes on after its first proposal that is accepted, so that what is found is what queries one after
        another find.
        """
        now, record = self.tracker.now, self.tracker.now.record
        uniform = torch.stack([d.uniform for d in draws])  # by query and image
        ahead = torch.arange(together, device=self.x.device)[:, None]
        # Of each image the query to go on with, and how many were accepted.
        at = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        count = torch.zeros_like(at)
        logits: Tensor | None = None
        while len(which := (at + ahead < len(draws)).nonzero()) > 0:
            rows = which[:, 1]
            queries, order = at[rows] + which[:, 0], torch.arange(len(rows), device=rows.device)
            part = now.batch.take(rows)
            x = self._proposed(part, take(self.x, rows), window, draws[0].replaced(uniform[queries, rows], part))
            _, found, judgement = self.loop.forward(part, x, gradient=False)
            good = judgement.loss.double() > self.loss[rows]
            if record is not None:
                known = record.succeeded if record.unconfirmed is None else record.succeeded | record.unconfirmed
                good |= judgement.adversarial & ~known[rows]
            # The first good proposal of each image; where there is none, its last one.
            first = torch.full_like(at, len(rows)).scatter_reduce(0, rows, order.masked_fill(~good, len(rows)), "amin")
            accepted = first < len(rows)
            chosen = torch.where(accepted, first, torch.zeros_like(at).scatter_reduce(0, rows, order, "amax"))
            tried = torch.zeros_like(accepted).index_fill(0, rows, True)
            logits = found[chosen] if logits is None else torch.where(tried[:, None], found[chosen], logits)
            now.x = torch.where(per_sample(tried, self.x), x[chosen], now.x)
            judgement = self.loop.judged(now.batch, logits, record)
            self._accept(judgement)
            count += accepted
            at = torch.where(tried, queries[chosen] + 1, at)
            if self.loop.network.exact:  # else the model has yet to be asked
                at.masked_fill_(accepted & judgement.adversarial, len(draws))
        return count

    def _accept(self, judgement: Judgement) -> Tensor:
        """Save and follow the proposals that are better, and return which are followed, [K] bool."""
        now = self.tracker.now
        self.tracker.save(judgement.better)
        losses = judgement.loss.double()
        accepted = losses > self.loss
        self.x = torch.where(per_sample(accepted, self.x), now.x, self.x)
        self.loss = torch.where(accepted, losses, self.loss)
        return accepted

    def _proposed(
        self, batch: Batch, x: Tensor, window: tuple[int, int], draws: "_Draws", *, first: bool = False
    ) -> Tensor:
        """``x`` with a change, within ball and box, [K, ...]."""
        norm = self.loop.norm
        if first:
            moved = _first(batch, norm, draws)
        elif norm == "linf":
            moved = _recoloured(batch, x, *window, draws)
        else:
            moved = _shifted(batch, x, *window, norm, draws)
        return ops.project_(moved, batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds)


def _windows(x0: Tensor, queries: int, share: float) -> Iterator[tuple[int, int]]:
    """Height and width of each query's windows."""
    _, height, width = _as_image(x0).shape[1:]
    for query in range(queries):
        at = query * 10_000 // queries
        now = share * 0.5 ** sum(at > h for h in _HALVINGS)
        if height == 1:
            yield 1, min(max(round(now * width), 1), width)
        else:
            side = max(round(math.sqrt(now * height * width)), 1)
            yield min(side, height), min(side, width)


def _as_image(x: Tensor) -> Tensor:
    """[B, ...] as [B, C, H, W]."""
    if x.dim() == 4:
        return x
    if x.dim() <= 2:
        return x.reshape(x.shape[0], 1, 1, -1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


class _Draws:
    """The random numbers of one query; those of an image do not depend on its batch."""

    def __init__(self, batch: Batch, generator: torch.Generator | None) -> None:
        self.batch = batch
        image = _as_image(batch.x0)
        self.channels, self.height, self.width = image.shape[1:]
        needed = 5 + self.channels * (max(self.width, _TILES**2) + 1)
        centre = torch.zeros(len(batch), needed, dtype=torch.float32, device=image.device)
        self.uniform = ops.random_start(
            centre, eps=1.0, bounds=(-math.inf, math.inf), ids=batch.ids, generator=generator
        )
        self.used = 0

    def replaced(self, uniform: Tensor, batch: Batch) -> "_Draws":
        """The same with other numbers, of which none was used, for ``batch``."""
        out = copy(self)
        out.batch, out.uniform = batch, uniform
        return out

    def next(self, count: int) -> Tensor:
        """The next ``count`` numbers in [-1, 1) for each image, [K, count]."""
        self.used += count
        return self.uniform[:, self.used - count : self.used]

    def signs(self, count: int) -> Tensor:
        """The next ``count`` signs for each image, [K, count]."""
        return torch.where(self.next(count) < 0, -1.0, 1.0).to(self.batch.x0.dtype)

    def corner(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows [K, height, 1] and columns [K, 1, width] of a window."""
        share = (self.next(2).double() + 1) / 2
        top = (share[:, 0] * (self.height - height + 1)).long()
        left = (share[:, 1] * (self.width - width + 1)).long()
        down = torch.arange(height, device=share.device)[:, None]
        right = torch.arange(width, device=share.device)[None]
        return top[:, None, None] + down, left[:, None, None] + right


def _radius(batch: Batch) -> Tensor | float:
    """The radius in a shape that multiplies [K, C, H, W]."""
    eps = batch.eps
    return eps.to(batch.x0.dtype).reshape(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps


def _first(batch: Batch, norm: Norm, draws: _Draws) -> Tensor:
    """The first iterate: vertical stripes in "linf", tiles of bumps otherwise."""
    image = _as_image(batch.x0)
    count, channels, height, width = image.shape
    if norm == "linf":
        move = draws.signs(channels * width).reshape(count, channels, 1, width).expand_as(image)
    else:
        move = torch.zeros(image.shape, dtype=image.dtype, device=image.device)
        rows, columns = min(_TILES, height), min(_TILES, width)
        tall, wide = height // rows, width // columns
        signs = draws.signs(channels * rows * columns).reshape(count, channels, rows, columns)
        tile = _bump(tall, wide, norm, image)
        tiled = torch.kron(torch.ones(rows, columns, dtype=tile.dtype, device=tile.device), tile)
        spread = signs.repeat_interleave(tall, 2).repeat_interleave(wide, 3)
        move[:, :, : rows * tall, : columns * wide] = spread * tiled
        move = move / _length(move.flatten(1), norm).reshape(-1, 1, 1, 1).clamp_min(1e-30)
    return (image + _radius(batch) * move).reshape(batch.x0.shape)


def _recoloured(batch: Batch, x: Tensor, height: int, width: int, draws: _Draws) -> Tensor:
    """``x`` with a window in which each channel lies at the upper or the lower end of its "linf" ball."""
    image, centre = _as_image(x).clone(), _as_image(batch.x0)
    rows, columns = draws.corner(height, width)
    sign = draws.signs(image.shape[1])[:, None, None, :]
    which = torch.arange(len(image), device=image.device)[:, None, None]
    radius = _radius(batch)
    image[which, :, rows, columns] = centre[which, :, rows, columns] + radius * sign
    return image.reshape(x.shape)


def _shifted(batch: Batch, x: Tensor, height: int, width: int, norm: Norm, draws: _Draws) -> Tensor:
    """``x`` with the perturbation of one window, and the slack of the ball, moved into another window."""
    height, width = (min(max(n, 3), most) for n, most in ((height, draws.height), (width, draws.width)))
    centre = _as_image(batch.x0)
    move = _as_image(x) - centre  # [K, C, H, W]
    order, radius = ORDER[norm], _radius(batch)
    which = torch.arange(len(move), device=move.device)[:, None, None]
    into, out = draws.corner(height, width), draws.corner(height, width)
    channels = move.shape[1]
    left = (radius**order - _length(move.flatten(1), norm).reshape(-1, 1, 1, 1) ** order).clamp_min(0)

    covered = torch.zeros(len(move), *move.shape[2:], dtype=torch.bool, device=move.device)
    covered[which, into[0], into[1]] = True
    covered[which, out[0], out[1]] = True
    held = (move * covered[:, None]).abs().pow(order).sum((2, 3))  # [K, C]
    there = (held + left.flatten(1) / channels).pow(1 / order)[:, None, None, :]

    old = move[which, :, into[0], into[1]]  # [K, height, width, C]
    old = old / _window_length(old, norm)
    bump = _bump(height, width, norm, move)
    turned = _bump(width, height, norm, move).T
    flip = draws.next(1)[:, :, None] < 0
    new = torch.where(flip, turned, bump)[..., None] * draws.signs(channels)[:, None, None, :] + old
    move[which, :, out[0], out[1]] = 0.0
    move[which, :, into[0], into[1]] = new / _window_length(new, norm) * there
    return (centre + move).reshape(x.shape)


def _length(rows: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(rows, ORDER[norm], dim=1)


def _window_length(window: Tensor, norm: Norm) -> Tensor:
    """Length of each channel of [K, h, w, C], [K, 1, 1, C]; 1 for a window of zeros."""
    length = torch.linalg.vector_norm(window, ORDER[norm], dim=(1, 2), keepdim=True)
    return torch.where(length > 0, length, 1)


def _bump(height: int, width: int, norm: Norm, like: Tensor) -> Tensor:
    """Two bumps of opposite sign side by side, of unit length, [height, width] (section 4.2 of the paper)."""
    half = width // 2
    halves = [_hill(height, w, _FALL_OFF[norm], like) for w in (half, width - half) if w]
    both = torch.cat([halves[0], -halves[1]], 1) if len(halves) == 2 else halves[0]
    return both / torch.linalg.vector_norm(both, ORDER[norm])


def _hill(height: int, width: int, fall_off: float, like: Tensor) -> Tensor:
    """Sum of 1 / (n + 1 - k)^fall_off over the k + 1 innermost of the rings around the centre, [height, width]."""
    n = max(height, width) // 2
    down = (torch.arange(height, device=like.device) - height // 2).abs()
    right = (torch.arange(width, device=like.device) - width // 2).abs()
    ring = torch.maximum(down[:, None], right[None])  # 0 .. n
    terms = torch.arange(1, n + 2, dtype=like.dtype, device=like.device).pow(-fall_off)
    outward = terms.flip(0).cumsum(0).flip(0)  # [m] = sum over r >= m of 1 / (r + 1)^fall_off
    return outward[ring]

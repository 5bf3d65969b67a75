"""The Square attack (Andriushchenko et al. 2020): random search with square-shaped updates, without gradients."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip import ops
from fastlip._precision import Precision
from fastlip.attacks._arguments import check_call, count, number, radius, warn_of_wide
from fastlip.attacks._batch import Batch, new_batch, per_sample, put_rows_, take
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._distance import ORDER
from fastlip.attacks._loop import AttackLoop, BestTracker
from fastlip.attacks._model import Model, eval_mode
from fastlip.attacks._own_loss import AnyLoss
from fastlip.attacks._prepare import network_of
from fastlip.attacks._quantize import grid_of
from fastlip.ops import Bounds, Judgement, Norm, PerSample

#: Iterations, of 10,000, at which the share of changed elements halves (section 4.1 of the paper).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: The power with which a bump decays from its centre.
_FALL_OFF = {"l2": 2.0, "l1": 4.0}
#: Queries of an image proposed together at most, and what a pass costs whatever its size, in images.
_TOGETHER, _COST = 16, 15
#: Queries that are drawn at once at most, after which all images wait for each other, and over which the share of
#: accepted proposals is averaged.
_SPAN = 50
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
        generator: source of the draws, advanced by one for up to 50 queries; the device's default generator if None.
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
    climb = _Climb(loop, batch)
    climb.ask(_first(batch, loop.norm, generator))
    left = climb.drop_fallen(0)[1]
    windows = list(_windows(batch.x0, queries, share))
    query, rate = 1, 1.0
    while query < queries and left:
        now = climb.tracker.now
        end = _end_of_span(windows, query)
        moves = _Moves.drawn(now.batch, end - query, windows[query], loop.norm, generator)
        # Without room for several queries nobody wants to know the rate, and a GPU is not to wait for it.
        room = loop.network.largest > len(now)
        together = _together(len(now), rate, loop.network.largest)
        if together > 1:
            accepted = float(climb.query_together(moves, together).double().mean())
            left = climb.drop_fallen(0)[1]
        else:
            accepted = 0.0
            for k in range(end - query):
                followed = climb.query(moves.at(k))
                accepted += float(followed.double().mean()) if room else 0.0
                kept, left = climb.drop_fallen(query + k)
                if not left:
                    break
                if kept is not None:
                    moves = moves.at((slice(None), kept))
        rate += (accepted - rate * (end - query)) / _SPAN
        query = end
    climb.tracker.finish()
    return loop.robust(batch)


def _end_of_span(windows: list[tuple[int, int]], query: int) -> int:
    """The end of the queries from ``query`` on that are drawn at once: their windows have one size."""
    end = query + 1
    while end < min(query + _SPAN, len(windows)) and windows[end] == windows[query]:
        end += 1
    return end


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


class _Climb:
    """The search's own iterate of each image, which is moved where that increases the loss."""

    def __init__(self, loop: AttackLoop, batch: Batch) -> None:
        self.loop = loop
        self.tracker = BestTracker(loop, batch, batch.x0.clone())
        self.x = batch.x0.clone()  # [K, ...]
        self.loss = torch.full(batch.rows.shape, -torch.inf, dtype=torch.float64, device=batch.x0.device)  # [K]
        # The lower and the upper end of each element's interval in ball and box, [2, K, ...].
        self.ends: Tensor | None = None
        if loop.norm == "linf":
            radius = _radius(batch, batch.x0.dim())
            self.ends = torch.stack([_projected(batch, batch.x0 + sign * radius, "linf") for sign in (-1, 1)])

    def drop_fallen(self, step: int) -> tuple[Tensor | None, bool]:
        """Go on without the images that have fallen: the positions that are kept, None for all, and if there is one."""
        kept = self.tracker.unfinished(step)
        if kept is None or len(kept) == 0:
            return kept, kept is None
        self.tracker.drop(kept)
        self.x, self.loss = take(self.x, kept), self.loss[kept]
        self.ends = None if self.ends is None else self.ends[:, kept]
        return kept, True

    def query(self, moves: "_Moves") -> Tensor:
        """Propose one change of each image, and return which were accepted, [K] bool."""
        everywhere = torch.arange(len(self.x), device=self.x.device)
        return self.ask(self._proposed(self.tracker.now.batch, self.x.clone(), everywhere, moves))

    def ask(
        self,
        x: Tensor,  # [K, ...]
    ) -> Tensor:
        """Follow the proposals ``x`` that are better, and return which are, [K] bool."""
        now = self.tracker.now
        now.x = x
        return self._accept(self.loop.forward(now.batch, x, now.record, gradient=False)[2])

    def query_together(self, moves: "_Moves", together: int) -> Tensor:
        """The same for many queries, of which each pass takes the next few of every image; how many were accepted, [K].

        An image goes on after its first proposal that is accepted, so that what is found is what queries one after
        another find.
        """
        now, record = self.tracker.now, self.tracker.now.record
        ahead = torch.arange(together, device=self.x.device)[:, None]
        # Of each image the query to go on with, and how many were accepted.
        at = torch.zeros(len(self.x), dtype=torch.int64, device=self.x.device)
        count = torch.zeros_like(at)
        logits: Tensor | None = None
        whole: Batch | None = None  # as most passes need it
        while len(which := (at + ahead < len(moves)).nonzero()) > 0:
            rows = which[:, 1]
            queries, order = at[rows] + which[:, 0], torch.arange(len(rows), device=rows.device)
            if len(rows) < together * len(at):
                part = now.batch.take(rows)
            else:
                part = whole = now.batch.take(rows) if whole is None else whole
            x = self._proposed(part, take(self.x, rows), rows, moves.at((queries, rows)))
            _, found, judgement = self.loop.forward(part, x, gradient=False)
            good = judgement.loss.double() > self.loss[rows]
            if record is not None:
                known = record.succeeded if record.unconfirmed is None else record.succeeded | record.unconfirmed
                good |= judgement.adversarial & ~known[rows]
            if self.loop.network.exact and not bool(good.any()):  # else the record learns of doubts, too
                at = (at + together).clamp_max(len(moves))
                continue
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
                at.masked_fill_(accepted & judgement.adversarial, len(moves))
        return count

    def _accept(self, judgement: Judgement) -> Tensor:
        """Save and follow the proposals that are better, and return which are followed, [K] bool."""
        now = self.tracker.now
        self.tracker.save(judgement.better)
        losses = judgement.loss.double()
        accepted = losses > self.loss
        put_rows_(self.x, now.x, accepted)
        self.loss = torch.where(accepted, losses, self.loss)
        return accepted

    def _proposed(
        self,
        batch: Batch,
        x: Tensor,  # [M, ...], changed
        rows: Tensor,  # [M] int64, the positions of ``batch`` among the images of the climb
        moves: "_Moves",
    ) -> Tensor:
        """``x`` with a change, within ball and box, [M, ...]."""
        if self.ends is None:
            return _projected(batch, _shifted(batch, x, self.loop.norm, moves), self.loop.norm)
        return _recoloured(self.ends, x, rows, moves)


def _projected(batch: Batch, x: Tensor, norm: Norm) -> Tensor:
    return ops.project_(x, batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds)


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


def _drawn(batch: Batch, count: int, generator: torch.Generator | None) -> Tensor:
    """So many numbers in [-1, 1) for each image, which do not depend on its batch, [K, count] float32."""
    centre = torch.zeros(len(batch), count, dtype=torch.float32, device=batch.x0.device)
    return ops.random_start(centre, eps=1.0, bounds=(-math.inf, math.inf), ids=batch.ids, generator=generator)


def _signs(drawn: Tensor) -> Tensor:
    return torch.where(drawn < 0, -1.0, 1.0)


@dataclass(frozen=True)
class _Moves:
    """What queries change, in windows of one size; or one query of each image, without the axis of queries."""

    bumps: Tensor  # [2, h, w], upright and turned; empty ones in "linf"
    size: tuple[int, int]  # h and w
    into: tuple[Tensor, Tensor]  # [queries, K] int64, first row and column of the window
    out: tuple[Tensor, Tensor]  # the same of the window that is emptied
    signs: Tensor  # [queries, K, C], -1 or 1
    turned: Tensor  # [queries, K] int64, the bump

    def __len__(self) -> int:
        return len(self.signs)

    @classmethod
    def drawn(
        cls, batch: Batch, queries: int, window: tuple[int, int], norm: Norm, generator: torch.Generator | None
    ) -> "_Moves":
        """Moves of so many queries, as one draw of the generator gives them."""
        image = _as_image(batch.x0)
        channels, *sides = image.shape[1:]
        height, width = window if norm == "linf" else (min(max(n, 3), m) for n, m in zip(window, sides, strict=True))
        bumps = image.new_empty(2, 0, 0)
        if norm != "linf":
            bumps = torch.stack([_bump(height, width, norm, image), _bump(width, height, norm, image).T])
        uniform = _drawn(batch, queries * (5 + channels), generator).reshape(len(batch), queries, -1).transpose(0, 1)
        room = torch.tensor([m - n + 1 for n, m in zip((height, width) * 2, sides * 2, strict=True)])
        top, left, *out = ((uniform[..., :4].double() + 1) / 2 * room.to(image.device)).long().unbind(-1)
        signs, turned = _signs(uniform[..., 5:]).to(image.dtype), (uniform[..., 4] < 0).long()
        return cls(bumps, (height, width), (top, left), (out[0], out[1]), signs, turned)

    def at(self, index: int | tuple[slice | Tensor, Tensor]) -> "_Moves":
        """Those of a query, of some images, or of pairs of a query and an image."""
        into, out = ((rows[index], columns[index]) for rows, columns in (self.into, self.out))
        return _Moves(self.bumps, self.size, into, out, self.signs[index], self.turned[index])

    def pixels(self, first: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows [K, 1, h, 1] and columns [K, 1, 1, w] of the windows that begin there, of one query of each image."""
        down, right = (torch.arange(n, device=first[0].device) for n in self.size)
        return first[0][:, None, None, None] + down[:, None], first[1][:, None, None, None] + right


def _radius(batch: Batch, dim: int) -> Tensor | float:
    """The radius in a shape that multiplies tensors of so many axes, the first of which is that of images."""
    eps = batch.eps
    return eps.to(batch.x0.dtype).reshape(-1, *[1] * (dim - 1)) if isinstance(eps, Tensor) else eps


def _first(batch: Batch, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """The first iterate, [K, ...]: vertical stripes in "linf", tiles of bumps otherwise."""
    image = _as_image(batch.x0)
    count, channels, height, width = image.shape
    if norm == "linf":
        signs = _signs(_drawn(batch, channels * width, generator)).to(image.dtype)
        move = signs.reshape(count, channels, 1, width).expand_as(image)
    else:
        move = torch.zeros(image.shape, dtype=image.dtype, device=image.device)
        rows, columns = min(_TILES, height), min(_TILES, width)
        tall, wide = height // rows, width // columns
        signs = _signs(_drawn(batch, channels * rows * columns, generator)).to(image.dtype)
        signs = signs.reshape(count, channels, rows, columns)
        tile = _bump(tall, wide, norm, image)
        tiled = torch.kron(torch.ones(rows, columns, dtype=tile.dtype, device=tile.device), tile)
        spread = signs.repeat_interleave(tall, 2).repeat_interleave(wide, 3)
        move[:, :, : rows * tall, : columns * wide] = spread * tiled
        move = move / _length(move.flatten(1), norm).reshape(-1, 1, 1, 1).clamp_min(1e-30)
    return _projected(batch, (image + _radius(batch, 4) * move).reshape(batch.x0.shape), norm)


def _recoloured(
    ends: Tensor,  # [2, K, ...]
    x: Tensor,  # [M, ...], changed
    rows: Tensor,  # [M] int64
    moves: _Moves,
) -> Tensor:
    """``x`` with a window in which each channel lies at the upper or the lower end of its interval, [M, ...]."""
    image = _as_image(x)
    channel = torch.arange(image.shape[1], device=image.device)[:, None, None]
    which = torch.arange(len(image), device=image.device)[:, None, None, None]
    window = moves.pixels(moves.into)
    upper = (moves.signs > 0).long()[:, :, None, None]
    both = ends.reshape(2, -1, *image.shape[1:])
    image[which, channel, window[0], window[1]] = both[upper, rows[:, None, None, None], channel, window[0], window[1]]
    return image.reshape(x.shape)


def _shifted(batch: Batch, x: Tensor, norm: Norm, moves: _Moves) -> Tensor:
    """``x``, which is changed, with the perturbation of one window, and the slack of the ball, moved into another."""
    centre = _as_image(batch.x0)
    move = _as_image(x).sub_(centre)  # [K, C, H, W]
    order, radius = ORDER[norm], _radius(batch, 4)
    channels = move.shape[1]
    channel = torch.arange(channels, device=move.device)[:, None, None]
    which = torch.arange(len(move), device=move.device)[:, None, None, None]
    into, out = moves.pixels(moves.into), moves.pixels(moves.out)

    old, gone = (move[which, channel, rows, columns] for rows, columns in (into, out))  # [K, C, h, w]
    # What the windows share counts once: rows and columns of the emptied one, counted from where the other begins.
    down, right = (side - first[:, None, None, None] for side, first in zip(out, moves.into, strict=True))
    shared = (down >= 0) & (down < moves.size[0]) & (right >= 0) & (right < moves.size[1])
    held = _power(old, norm) + _power(gone.masked_fill(shared, 0.0), norm)  # [K, C, 1, 1]
    left = (radius**order - _length(move.flatten(1), norm).reshape(-1, 1, 1, 1) ** order).clamp_min(0)
    there = (held + left / channels).pow(1 / order)

    old = old / _window_length(old, norm)
    new = moves.bumps[moves.turned][:, None] * moves.signs[:, :, None, None] + old
    move[which, channel, out[0], out[1]] = 0.0
    move[which, channel, into[0], into[1]] = new / _window_length(new, norm) * there
    return move.add_(centre).reshape(x.shape)


def _length(rows: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(rows, ORDER[norm], dim=1)


def _power(window: Tensor, norm: Norm) -> Tensor:
    """The sum of |z| ("l1") or z^2 ("l2") over each channel of [K, C, h, w], [K, C, 1, 1]."""
    return (window.square() if norm == "l2" else window.abs()).sum((2, 3), keepdim=True)


def _window_length(window: Tensor, norm: Norm) -> Tensor:
    """Length of each channel of [K, C, h, w], [K, C, 1, 1]; 1 for a window of zeros."""
    length = torch.linalg.vector_norm(window, ORDER[norm], dim=(2, 3), keepdim=True)
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

"""What gradient attacks share: looking at iterates, keeping the best, and leaving fallen images behind."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, check_classes, take
from fastlip.attacks._losses import Loss, attack_loss, succeeded, undecided
from fastlip.attacks._model import Network
from fastlip.ops import Norm

Keep = Literal["best", "last"]

#: Steps between looks at which images fell. Looking is free on the CPU and a synchronisation on a GPU.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 4
#: Steps of images, summed over those that seem to have fallen, after which the model is asked about them.
_PATIENCE = 12


class Climb:
    """One call's network, settings and results so far, on the caller's whole batch."""

    def __init__(
        self,
        network: Network,
        inputs: Tensor,  # [B, ...]
        *,
        norm: Norm,
        loss: Loss,
        keep: Keep = "best",
        early_stop: bool = True,
    ) -> None:
        self.network = network
        self.norm = norm
        self.loss = loss
        self.keep = keep
        self.early_stop = early_stop
        self.result = inputs.detach().clone()
        self.best_loss = torch.full(inputs.shape[:1], -torch.inf, dtype=torch.float64, device=inputs.device)
        self.lost_gradients = torch.zeros((), dtype=torch.bool, device=inputs.device)
        self._classes_checked = False

    def judge(self, batch: Batch, x: Tensor) -> Tensor:
        """The model's own logits [K, C], without a gradient."""
        with torch.no_grad():
            logits = self.network.judge(x)
        self._check_classes(batch, logits)
        return logits

    def without_fallen(self, batch: Batch) -> Batch:
        """Leave out the images that are misclassified before anything is done to them."""
        if len(batch) == 0:
            return batch
        x = batch.x0.to(self.result.dtype)
        if self.network.exact:
            fell = succeeded(self.judge(batch, x), batch.labels, batch.targets)
        else:
            _, hit, doubtful = self.losses(batch, x, gradient=False)
            fell = self.settled(batch, x, hit, doubtful)
        return batch.take(rows_where(~fell))

    def seen(self, batch: Batch, x: Tensor) -> Tensor:
        """The iterate in the inputs' dtype, still feasible: what the model judges and the caller gets."""
        if x.dtype == self.result.dtype:
            return x.clone()  # steps work in place, and the best may be this iterate
        low = x.to(self.result.dtype)
        return ops.project_(low, batch.x0.to(low.dtype), eps=batch.eps, norm=self.norm, bounds=batch.bounds)

    def losses(
        self,
        batch: Batch,
        seen: Tensor,  # [K, ...]
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses at ``seen`` [K], with a graph where a gradient is wanted, and what the faster copy says of decisions.

        That is who falls there and whose decision is in doubt, both [K] bool.
        """
        seen.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.network.ascend(seen)
            self._check_classes(batch, logits)
            losses = attack_loss(self.loss, logits, batch.labels, batch.targets, batch.toward)
        logits = logits.detach()
        return losses, succeeded(logits, batch.labels, batch.targets), undecided(logits, self.network.rounding)

    def look(
        self,
        batch: Batch,
        seen: Tensor,  # [K, ...]
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Losses at ``seen`` [K], with a graph where a gradient is wanted, and who falls there, by the model's word."""
        losses, hit, _ = self.losses(batch, seen, gradient=gradient)
        return losses, hit if self.network.exact else self.confirmed(batch, seen.detach(), hit, hit)

    def settled(
        self,
        batch: Batch,
        seen: Tensor,  # [K, ...]
        hit: Tensor,  # [K] bool
        doubtful: Tensor,  # [K] bool
    ) -> Tensor:
        """Who falls at ``seen``, [K] bool, by the model's word wherever the copy's might be another."""
        return hit if self.network.exact else self.confirmed(batch, seen, hit, hit | doubtful)

    def confirmed(
        self,
        batch: Batch,
        seen: Tensor,  # [K, ...]
        hit: Tensor,  # [K] bool
        asked: Tensor,  # [K] bool
    ) -> Tensor:
        """Who falls at ``seen``, [K] bool: ``hit``, and the model's word on those ``asked`` about."""
        rows = rows_where(asked)
        if len(rows) == 0:
            return hit
        part = batch.take(rows)
        fell = succeeded(self.judge(part, take(seen, rows)), part.labels, part.targets)
        return hit.index_put((rows,), fell)

    def gradient(
        self,
        losses: Tensor,  # [K]
        seen: Tensor,  # [K, ...]
        like: Tensor,  # [K, ...]
    ) -> Tensor:
        """Gradient of each image's loss, [K, ...] of like's dtype.

        Each loss depends on its own image alone, so one backward pass gives every image's gradient; parameters are not
        asked for, and theirs are not computed.
        """
        if not losses.requires_grad:
            raise ValueError("model's output must depend differentiably on its input for a gradient attack")
        (grad,) = torch.autograd.grad(losses.sum(), seen)
        grad = grad.to(like.dtype)
        self.lost_gradients |= ~grad.sum().isfinite()
        return grad

    def store(self, trail: "Trail") -> None:
        """Put what a run found into the results."""
        self.result[trail.batch.rows] = trail.best
        self.best_loss[trail.batch.rows] = trail.level

    def finish(self, trail: "Trail") -> Batch:
        """Store what a run found, and return the images that still stand."""
        trail.confirm(also=trail.doubtful)
        self.store(trail)
        return trail.batch.take(rows_where(~trail.hit))

    def _check_classes(self, batch: Batch, logits: Tensor) -> None:
        if not self._classes_checked:
            check_classes(logits, labels=batch.labels, targets=batch.targets)
            self._classes_checked = True


class Trail:
    """The best iterates so far of the images of one run.

    Where a faster copy is followed, an image that seems to have fallen is a claim until the model has confirmed it.
    Claims are gathered, because one image costs a forward pass nearly as much as several do.
    """

    def __init__(self, climb: Climb, batch: Batch) -> None:
        self.climb = climb
        self.batch = batch
        self.best = take(climb.result, batch.rows)
        self.level = climb.best_loss[batch.rows]
        self.hit = torch.zeros(len(batch), dtype=torch.bool, device=batch.x0.device)
        self.claimed = torch.zeros_like(self.hit)
        self.doubtful = torch.zeros_like(self.hit)
        self.look_every = _LOOK_EVERY.get(batch.x0.device.type, _LOOK_EVERY_ELSEWHERE)
        self.waited = 0

    def offer(
        self,
        seen: Tensor,  # [K, ...]
        losses: Tensor,  # [K]
        hit: Tensor,  # [K] bool
        doubtful: Tensor,  # [K] bool
    ) -> None:
        """Take in an iterate: the first that falls, or (not stopping early) the one of largest loss among those."""
        level = losses.detach().double()
        if self.climb.early_stop:
            better = ~self.hit & (hit | (level > self.level))
        else:
            better = (hit & ~self.hit) | ((hit == self.hit) & (level > self.level))
        self.best = torch.where(better.reshape(-1, *([1] * (seen.dim() - 1))), seen.detach(), self.best)
        self.level = torch.where(better, level, self.level)
        self._claim(better, hit, doubtful)

    def replace(self, seen: Tensor, hit: Tensor, doubtful: Tensor) -> None:
        """Keep this iterate, whatever came before."""
        self.best, self.hit = seen.detach(), hit
        self._claim(torch.ones_like(hit), hit, doubtful)

    def standing(self, step: int) -> Tensor | None:
        """Positions of the images that go on, [M] int64; None where all of them do or nobody looks."""
        stops = self.climb.early_stop and self.climb.keep == "best"
        if not stops or step % self.look_every or not bool(self.hit.any()):
            return None
        waiting = int(self.claimed.sum())
        self.waited += waiting
        if waiting and self.waited >= min(_PATIENCE, len(self.batch)):
            self.confirm()
        return fewer(~self.hit | self.claimed)

    def confirm(self, also: Tensor | None = None) -> None:
        """Ask the model about what the copy claims, and about the images ``also`` [K] bool that have not fallen."""
        if self.climb.network.exact:
            return
        asked = self.claimed if also is None else self.claimed | (also & ~self.hit)
        self.hit = self.climb.confirmed(self.batch, self.best, self.hit, asked)
        # The next iterate takes the place of one that was refuted.
        self.level = torch.where(self.claimed & ~self.hit, -torch.inf, self.level)
        self.claimed = torch.zeros_like(self.claimed)
        self.waited = 0

    def leave_behind(self, kept: Tensor) -> None:
        """Store what was found and go on with the images at ``kept``."""
        self.climb.store(self)
        self.batch, self.best = self.batch.take(kept), take(self.best, kept)
        self.level, self.hit = self.level[kept], self.hit[kept]
        self.claimed, self.doubtful = self.claimed[kept], self.doubtful[kept]

    def _claim(self, better: Tensor, hit: Tensor, doubtful: Tensor) -> None:
        if not self.climb.network.exact:
            self.claimed = torch.where(better, hit, self.claimed)
            self.doubtful = torch.where(better, doubtful, self.doubtful)
        self.hit = self.hit | hit


def walk(
    climb: Climb,
    batch: Batch,
    x: Tensor,  # [K, ...], changed
    steps: int,
    step: Callable[[Batch, Tensor, Tensor, Tensor], None],
    leave_behind: Callable[[Tensor], None] = lambda kept: None,
    *,
    from_inputs: bool = False,
) -> Batch:
    """Take ``steps`` from ``x``, keep the best of all iterates, and return the images that still stand.

    Args:
        climb: the network, the settings and the results.
        batch: images.
        x: where they begin.
        steps: gradient steps.
        step: called with the batch, x (to be moved in place), the gradients and the losses [K].
        leave_behind: called with the positions of the images that go on, [M] int64, where some do not.
        from_inputs: whether ``x`` are the images themselves. Those that are misclassified then go no further, except
            with ``keep="last"``: the first iterate tells them apart, and nobody has to look at the images before.
    """
    trail = Trail(climb, batch)
    for count in range(steps + 1):
        final = count == steps
        seen = climb.seen(trail.batch, x)
        losses, hit, doubtful = climb.losses(trail.batch, seen, gradient=not final)
        clean = from_inputs and count == 0 and climb.keep == "best"
        if clean:
            hit = climb.settled(trail.batch, seen.detach(), hit, doubtful)
        if climb.keep == "best":
            trail.offer(seen, losses, hit, doubtful)
        elif final:
            trail.replace(seen, hit, doubtful)
        kept = None if final else fewer(~hit) if clean else trail.standing(count)
        if final or (kept is not None and len(kept) == 0):
            break
        grad, losses = climb.gradient(losses, seen, x), losses.detach()
        if kept is not None:
            trail.leave_behind(kept)
            leave_behind(kept)
            x, grad, losses = take(x, kept), take(grad, kept), losses[kept]
        step(trail.batch, x, grad, losses)
    return climb.finish(trail)


def free_gradient(batch: Batch, x: Tensor, grad: Tensor) -> Tensor:
    """``grad`` without the elements that the box stops: a sparse step moves few, and spends none on those."""
    lo, hi = batch.bounds
    return torch.where((grad > 0) & (x >= hi) | (grad < 0) & (x <= lo), 0.0, grad)


def fewer(mask: Tensor) -> Tensor | None:
    """Positions of the true elements, [M] int64; None where all are."""
    kept = rows_where(mask)
    return kept if len(kept) < len(mask) else None


def rows_where(mask: Tensor) -> Tensor:
    """Positions of the true elements, [M] int64."""
    return mask.nonzero().squeeze(1)

"""What gradient attacks share: looking at iterates, keeping the best, and leaving fallen images behind."""

from typing import Literal

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, check_classes, take
from fastlip.attacks._losses import Loss, attack_loss, succeeded
from fastlip.attacks._model import Network
from fastlip.ops import Norm

Keep = Literal["best", "last"]

#: Steps between looks at which images fell. Looking is free on the CPU and a synchronisation on a GPU.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 4


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
        self.fell = torch.zeros(inputs.shape[:1], dtype=torch.bool, device=inputs.device)
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
        logits = self.judge(batch, batch.x0.to(self.result.dtype))
        return batch.take(rows_where(~succeeded(logits, batch.labels, batch.targets)))

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
    ) -> tuple[Tensor, Tensor]:
        """Losses at ``seen`` [K], with a graph where a gradient is wanted, and who seems to fall there [K] bool."""
        seen.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.network.ascend(seen)
            self._check_classes(batch, logits)
            losses = attack_loss(self.loss, logits, batch.labels, batch.targets, batch.toward)
        return losses, succeeded(logits.detach(), batch.labels, batch.targets)

    def look(
        self,
        batch: Batch,
        seen: Tensor,  # [K, ...]
        *,
        gradient: bool,
        settled: Tensor | None = None,  # [K] bool
    ) -> tuple[Tensor, Tensor]:
        """Losses at ``seen`` [K], with a graph where a gradient is wanted, and who falls there [K] bool.

        Successes against a faster copy are confirmed on the model itself, but for images ``settled`` already.
        """
        losses, hit = self.losses(batch, seen, gradient=gradient)
        if not self.network.exact and (self.keep == "best" or not gradient):
            hit = self._confirmed(batch, seen.detach(), hit if settled is None else hit & ~settled)
        return losses, hit

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
        self.fell[trail.batch.rows] = trail.hit

    def finish(self, trail: "Trail") -> Batch:
        """Store what a run found, and return the images that still stand."""
        if not self.network.exact and self.keep == "best":
            # A copy may think that an iterate is safe which is not.
            rows = rows_where(~trail.hit)
            if len(rows):
                part = trail.batch.take(rows)
                logits = self.judge(part, take(trail.best, rows))
                trail.hit[rows] = succeeded(logits, part.labels, part.targets)
        self.store(trail)
        return trail.batch.take(rows_where(~trail.hit))

    def _confirmed(self, batch: Batch, seen: Tensor, claimed: Tensor) -> Tensor:
        rows = rows_where(claimed)
        if len(rows):
            part = batch.take(rows)
            claimed[rows] = succeeded(self.judge(part, take(seen, rows)), part.labels, part.targets)
        return claimed

    def _check_classes(self, batch: Batch, logits: Tensor) -> None:
        if not self._classes_checked:
            check_classes(batch, logits)
            self._classes_checked = True


class Trail:
    """The best iterates so far of the images of one run."""

    def __init__(self, climb: Climb, batch: Batch) -> None:
        self.climb = climb
        self.batch = batch
        self.best = take(climb.result, batch.rows)
        self.level = climb.best_loss[batch.rows]
        self.hit = torch.zeros(len(batch), dtype=torch.bool, device=batch.x0.device)
        device = batch.x0.device.type
        self.look_every = _LOOK_EVERY.get(device, _LOOK_EVERY_ELSEWHERE) if climb.network.exact else 1

    def offer(
        self,
        seen: Tensor,  # [K, ...]
        losses: Tensor,  # [K]
        hit: Tensor,  # [K] bool
    ) -> None:
        """Take in an iterate: the first that falls, or (not stopping early) the one of largest loss among those."""
        level = losses.detach().double()
        if self.climb.early_stop:
            better = ~self.hit & (hit | (level > self.level))
        else:
            better = (hit & ~self.hit) | ((hit == self.hit) & (level > self.level))
        self.best = torch.where(better.reshape(-1, *([1] * (seen.dim() - 1))), seen.detach(), self.best)
        self.level = torch.where(better, level, self.level)
        self.hit = self.hit | hit

    def replace(self, seen: Tensor, hit: Tensor) -> None:
        """Keep this iterate, whatever came before."""
        self.best, self.hit = seen.detach(), hit

    def standing(self, step: int) -> Tensor | None:
        """Positions of the images that go on, [M] int64; None where all of them do or nobody looks."""
        stops = self.climb.early_stop and self.climb.keep == "best"
        if not stops or step % self.look_every or not bool(self.hit.any()):
            return None
        return rows_where(~self.hit)

    def leave_behind(self, kept: Tensor) -> None:
        """Store what was found and go on with the images at ``kept``."""
        self.climb.store(self)
        self.batch, self.best = self.batch.take(kept), take(self.best, kept)
        self.level, self.hit = self.level[kept], self.hit[kept]


def rows_where(mask: Tensor) -> Tensor:
    """Positions of the true elements, [M] int64."""
    return mask.nonzero().squeeze(1)

"""The attack loop: forward, judge, keep the best, backward, step. PGD and APGD run it; other attacks use its parts.

:meth:`AttackLoop.run` is the loop itself, and the methods after it stand in the order in which it calls them.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._batch import Batch, fewer, rows_where, take
from fastlip.attacks._losses import Loss, attack_loss, check_classes, in_doubt, is_adversarial
from fastlip.attacks._model import Network
from fastlip.ops import Norm

Keep = Literal["best", "last"]

#: Steps between checks for adversarial images. A check is free on the CPU and a synchronisation on a GPU.
_CHECK_EVERY = {"cpu": 1}
_CHECK_EVERY_ELSEWHERE = 4
#: Images times steps that unconfirmed images may wait for, in all, before the model is asked about them.
_PATIENCE = 12


class AttackLoop:
    """The network, the settings and the results of one call, for the caller's whole batch.

    Attributes:
        result: what the call returns: the best images so far, [N, ...] like the caller's inputs.
        best_loss: their losses, [N] float64.
        lost_gradients: whether an element of a gradient was not finite, [] bool; the steps take such elements for 0.
    """

    def __init__(
        self,
        network: Network,
        inputs: Tensor,  # [N, ...]
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

    def run(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...], changed
        steps: int,
        step: Callable[[Batch, Tensor, Tensor, Tensor], None],
        drop: Callable[[Tensor], None] = lambda kept: None,
        *,
        from_inputs: bool = False,
    ) -> Batch:
        """Take ``steps`` from ``x``, keep the best of all iterates, and return the images that are still robust.

        Args:
            batch: the images.
            x: the first iterates.
            steps: how many gradient steps to take.
            step: called with the batch, x (to be moved in place), the gradients and the losses [K].
            drop: called with the positions of the images that go on, [M] int64, whenever others are dropped.
            from_inputs: whether ``x`` are the images themselves. The first iterate then tells which images are
                misclassified, so that no forward pass has to precede the loop; except with ``keep="last"`` those images
                go no further.
        """
        best = BestTracker(self, batch)
        for k in range(steps + 1):
            # Forward and judge. The last iterate gets no gradient.
            image = self.feasible(best.batch, x)
            losses, adversarial, doubtful = self.forward(best.batch, image, gradient=k < steps)
            at_inputs = from_inputs and k == 0 and self.keep == "best"
            if at_inputs:
                adversarial = self.confirmed(best.batch, image.detach(), adversarial, doubtful)

            # Keep the best.
            if self.keep == "best":
                best.update(image, losses, adversarial, doubtful)
            elif k == steps:
                best.replace(image, adversarial, doubtful)
            if k == steps:
                break
            kept = fewer(~adversarial) if at_inputs else best.unfinished(k)
            if kept is not None and len(kept) == 0:
                break

            # Backward.
            grad, losses = self.backward(losses, image, x), losses.detach()
            if kept is not None:
                best.drop(kept)
                drop(kept)
                x, grad, losses = take(x, kept), take(grad, kept), losses[kept]

            # Step.
            step(best.batch, x, grad, losses)
        return best.finish()

    def feasible(self, batch: Batch, x: Tensor) -> Tensor:
        """The iterates in the dtype of the inputs, within ball and box: the images that are judged and returned."""
        if x.dtype == self.result.dtype:
            return x.clone()  # because the step changes x in place, and this may be the best image
        low = x.to(self.result.dtype)
        return ops.project_(low, batch.x0.to(low.dtype), eps=batch.eps, norm=self.norm, bounds=batch.bounds)

    def forward(
        self,
        batch: Batch,
        image: Tensor,  # [K, ...]
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The forward pass at ``image`` and what follows from its logits.

        Returns:
            The losses [K], with a graph where a ``gradient`` is wanted; which images are adversarial, [K] bool; and,
            where the logits are those of a faster copy, at which images the model itself might decide otherwise, [K]
            bool, else None.
        """
        image.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.network.ascend(image)
            if not self._classes_checked:
                check_classes(logits, labels=batch.labels, targets=batch.targets)
                self._classes_checked = True
            losses = attack_loss(self.loss, logits, batch.labels, batch.targets, batch.toward)
        logits = logits.detach()
        adversarial = is_adversarial(logits, batch.labels, batch.targets)
        return losses, adversarial, None if self.network.exact else in_doubt(logits, self.network.rounding)

    def backward(
        self,
        losses: Tensor,  # [K]
        image: Tensor,  # [K, ...]
        like: Tensor,  # [K, ...]
    ) -> Tensor:
        """The gradient of each image's loss, [K, ...] in the dtype of ``like``.

        A loss depends on its own image alone, so that one backward pass gives all gradients. Those of parameters are
        not asked for and not computed.
        """
        if not losses.requires_grad:
            raise ValueError("model's output must depend differentiably on its input for a gradient attack")
        (grad,) = torch.autograd.grad(losses.sum(), image)
        grad = grad.to(like.dtype)
        self.lost_gradients |= ~grad.sum().isfinite()
        return grad

    def confirmed(
        self,
        batch: Batch,
        image: Tensor,  # [K, ...]
        adversarial: Tensor,  # [K] bool
        doubtful: Tensor | None,  # [K] bool
    ) -> Tensor:
        """Which images are adversarial, [K] bool, by the model's own decision wherever that may differ."""
        return adversarial if doubtful is None else self.asked(batch, image, adversarial, adversarial | doubtful)

    def asked(
        self,
        batch: Batch,
        image: Tensor,  # [K, ...]
        adversarial: Tensor,  # [K] bool
        where: Tensor,  # [K] bool
    ) -> Tensor:
        """``adversarial`` [K] bool with the model's own decision on the images at which ``where`` is true."""
        rows = rows_where(where)
        if len(rows) == 0:
            return adversarial
        part = batch.take(rows)
        return adversarial.index_put((rows,), self.own_decision(part, take(image, rows)))

    def own_decision(
        self,
        batch: Batch,
        image: Tensor,  # [K, ...]
    ) -> Tensor:
        """Which images are adversarial by the model's own decision, [K] bool."""
        with torch.no_grad():
            logits = self.network.judge(image)
        return is_adversarial(logits, batch.labels, batch.targets)

    def without_misclassified(self, batch: Batch) -> Batch:
        """The images that are classified correctly, or not yet as their targets, before anything is done to them."""
        if len(batch.rows) == 0:
            return batch
        image = batch.x0.to(self.result.dtype)
        _, wrong, doubtful = self.forward(batch, image, gradient=False)
        return batch.where(~self.confirmed(batch, image, wrong, doubtful))

    def warn_of_lost_gradients(self, name: str) -> None:
        """Warn the caller of the attack ``name`` where elements of gradients were not finite."""
        if bool(self.lost_gradients):
            message = f"{name} met gradients that are not finite; those elements counted as 0"
            warnings.warn(message, stacklevel=3)


class BestTracker:
    """The best iterate so far of each image of one run, and which of them are adversarial.

    Where the gradients of a faster copy are followed, an image that the copy calls adversarial is unconfirmed until
    the model has been asked. Unconfirmed images are gathered, because a forward pass for one image costs nearly as
    much as one for several.
    """

    def __init__(self, loop: AttackLoop, batch: Batch) -> None:
        self.loop = loop
        self.batch = batch
        self.best = take(loop.result, batch.rows)
        self.best_loss = loop.best_loss[batch.rows]
        self.adversarial = torch.zeros(len(batch), dtype=torch.bool, device=batch.x0.device)
        self.unconfirmed = self.doubtful = self.adversarial  # replaced, never changed in place
        self.per_image = (-1, *[1] * (batch.x0.dim() - 1))  # [B] in this shape broadcasts to images
        self.check_every = _CHECK_EVERY.get(batch.x0.device.type, _CHECK_EVERY_ELSEWHERE)
        self.waited = 0

    def update(
        self,
        image: Tensor,  # [K, ...]
        losses: Tensor,  # [K]
        adversarial: Tensor,  # [K] bool
        doubtful: Tensor | None,  # [K] bool
    ) -> None:
        """Take the new iterate where it is better than the best so far.

        An adversarial iterate is better than one that is not, and a larger loss decides among two of a kind. With
        early stopping the first adversarial iterate stays the best.
        """
        loss = losses.detach().double()
        if self.loop.early_stop:
            better = ~self.adversarial & (adversarial | (loss > self.best_loss))
        else:
            same_kind = adversarial == self.adversarial
            better = (adversarial & ~self.adversarial) | (same_kind & (loss > self.best_loss))
        self.best = torch.where(better.view(self.per_image), image.detach(), self.best)
        self.best_loss = torch.where(better, loss, self.best_loss)
        if doubtful is not None:
            self.unconfirmed = torch.where(better, adversarial, self.unconfirmed)
            self.doubtful = torch.where(better, doubtful, self.doubtful)
        self.adversarial = self.adversarial | adversarial

    def replace(self, image: Tensor, adversarial: Tensor, doubtful: Tensor | None) -> None:
        """Take the new iterate, whatever came before."""
        self.best, self.adversarial = image.detach(), adversarial
        if doubtful is not None:
            self.unconfirmed, self.doubtful = adversarial, doubtful

    def unfinished(self, step: int) -> Tensor | None:
        """Positions of the images that go on, [M] int64; None where all do, or where this step does not check."""
        stops = self.loop.early_stop and self.loop.keep == "best"
        if not stops or step % self.check_every or not bool(self.adversarial.any()):
            return None
        if self.loop.network.exact:
            return fewer(~self.adversarial)
        waiting = int(self.unconfirmed.sum())
        self.waited += waiting
        if waiting and self.waited >= min(_PATIENCE, len(self.batch)):
            self.confirm(self.unconfirmed)
        return fewer(~self.adversarial | self.unconfirmed)

    def confirm(
        self,
        where: Tensor,  # [K] bool
    ) -> None:
        """Ask the model about the best iterates at which ``where`` is true."""
        self.adversarial = self.loop.asked(self.batch, self.best, self.adversarial, where)
        # The next iterate takes the place of one that the model does not find adversarial.
        self.best_loss = torch.where(self.unconfirmed & ~self.adversarial, -torch.inf, self.best_loss)
        self.unconfirmed = torch.zeros_like(self.unconfirmed)
        self.waited = 0

    def drop(
        self,
        kept: Tensor,  # [M] int64
    ) -> None:
        """Store the results and go on with the images at positions ``kept``."""
        self.store()
        self.batch, self.best = self.batch.take(kept), take(self.best, kept)
        self.best_loss, self.adversarial = self.best_loss[kept], self.adversarial[kept]
        if not self.loop.network.exact:
            self.unconfirmed, self.doubtful = self.unconfirmed[kept], self.doubtful[kept]

    def finish(self) -> Batch:
        """Store the results, confirmed by the model, and return the images that are still robust."""
        if not self.loop.network.exact:
            self.confirm(self.unconfirmed | (self.doubtful & ~self.adversarial))
        self.store()
        return self.batch.where(~self.adversarial)

    def store(self) -> None:
        """Put the best iterates into the results of the call."""
        self.loop.result[self.batch.rows] = self.best
        self.loop.best_loss[self.batch.rows] = self.best_loss


def start_points(
    batch: Batch,
    norm: Norm,
    random_start: bool,
    start: Tensor | None,  # [N, ...], for the caller's whole batch
    generator: torch.Generator | None,
) -> Tensor:
    """The first iterates of a run, [K, ...]."""
    if random_start:
        return ops.random_start(
            batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds, ids=batch.ids, generator=generator
        )
    if start is None:
        return batch.x0.clone()
    given = take(start.detach().to(batch.x0.dtype), batch.rows)
    return ops.project(given, batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds)


def unblocked_gradient(batch: Batch, x: Tensor, grad: Tensor) -> Tensor:
    """``grad`` without the elements whose step the box would undo: a sparse step moves few elements, and not those."""
    lo, hi = batch.bounds
    return torch.where((grad > 0) & (x >= hi) | (grad < 0) & (x <= lo), 0.0, grad)

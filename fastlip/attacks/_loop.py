"""The attack loop: forward, judge, backward, step. PGD and APGD run it; other attacks use its parts.

:meth:`AttackLoop.run` is the loop itself, and what it calls follows in the order in which it does.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_classes
from fastlip.attacks._batch import Batch, Iterates, fewer, put_rows_, rows_where, take, wide_dtype
from fastlip.attacks._criterion import Criterion, fooled, holds_within
from fastlip.attacks._diagnose import AttackWarning
from fastlip.attacks._graphs import Graph
from fastlip.attacks._model import Network, input_gradient
from fastlip.attacks._own_loss import AnyLoss, judged_by
from fastlip.attacks._quantize import Grid, rounded_images
from fastlip.ops import Judgement, Norm

Keep = Literal["best", "last"]
#: When the model is asked about images that a faster copy calls adversarial: once some of them have come together, at
#: each of them, or when all have left.
Asks = Literal["gathered", "at once", "afterwards"]

#: Steps between checks for adversarial images. A check is free on the CPU and a synchronisation on a GPU.
_CHECK_EVERY = {"cpu": 1}
_CHECK_EVERY_ELSEWHERE = 4
#: The largest difference of an image's logits between batches, relative to the largest of them, by the dtype of images.
_BATCH_ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
#: Images times steps that unconfirmed images may wait for, in all, before the model is asked about them.
_PATIENCE = 12

#: Fewer images may all be misclassified without a doubt about their labels.
FEW = 4


def misclassified_text(wrong: int, images: int) -> str:
    """Say that most images are misclassified to begin with, and what the reason may be."""
    return (
        f"{wrong} of {images} images are misclassified to begin with, and are left as they are: are these labels and "
        "preprocessing the model's?"
    )


@dataclass(frozen=True)
class Iteration:
    """What a callback hears of an iteration, before its step is taken.

    Attributes:
        run: how many runs (restarts, classes aimed at) there were before, in this call.
        step: how many steps of this run were taken before; the last iterate of a run has had all of them.
        rows: positions in the caller's batch of the images that still take part, [K] int64.
        images: what the model was given, [K, ...]; a callback must not change it.
        loss: the losses, [K].
        adversarial: whether the followed logits decide wrongly, [K] bool.
    """

    run: int
    step: int
    rows: Tensor
    images: Tensor
    loss: Tensor
    adversarial: Tensor


Callback = Callable[[Iteration], object]


class Step(Protocol):
    """A step of an attack, equal to others of the same settings; it keeps nothing between calls."""

    def __call__(self, now: Iterates, grad: Tensor, judgement: Judgement) -> None:
        """Save the iterate where it is better than the best so far, and move it by ``grad`` [B, ...]."""

    def __hash__(self) -> int: ...


class NewState(Protocol):
    """Makes what a step remembers of each image, at the first iterates."""

    def __call__(self, batch: Batch, x: Tensor) -> ops.APGDState: ...


class AttackLoop:
    """The network, the settings and the results of one call, for the caller's whole batch.

    Attributes:
        result: what the call returns: the best images so far, [N, ...] like the inputs, which they are at first.
        best_loss: their losses, [N] float64.
        adversarial: whether they are adversarial, [N] bool; the model's own decision.
        not_finite: whether an element of an image's gradient was not finite, [N] bool.
        classes_checked: whether logits have shown that all labels and targets are classes.
        misclassified: how many images the model classifies wrongly (with targets: as these) before anything is done.
    """

    def __init__(
        self,
        network: Network,
        inputs: Tensor,  # [N, ...]
        *,
        norm: Norm,
        loss: AnyLoss,
        keep: Keep = "best",
        early_stop: bool = True,
        grid: Grid | None = None,
        callback: Callback | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        self.network = network
        self.norm = norm
        self.loss, self.criterion = loss, criterion
        self.keep = keep
        self.early_stop = early_stop
        self.grid, self.callback, self.runs = grid, callback, -1
        self.dtype, self.wide = inputs.dtype, wide_dtype(inputs)
        self.result = inputs.detach().clone()
        self.best_loss = torch.full(inputs.shape[:1], -torch.inf, dtype=torch.float64, device=inputs.device)
        self.adversarial = torch.zeros(inputs.shape[:1], dtype=torch.bool, device=inputs.device)
        self.not_finite = torch.zeros_like(self.adversarial)
        self.classes_checked = False
        self.misclassified = 0

    def run(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...], changed
        steps: int,
        step: Step,
        new_state: NewState | None = None,
        *,
        from_inputs: bool = False,
        more: bool = True,
    ) -> Batch:
        """Take ``steps`` from ``x``, keep the best of all iterates, and return the images that are still robust.

        Where the gradients of a faster copy are followed on a CPU, images leave on the copy's word alone, and the model
        is asked about all of them at the end, because a forward pass for few images costs nearly as much as one for
        many. The images that it does not find adversarial take their run again, with the model asked at each iterate
        that the copy calls adversarial.

        Args:
            batch: the images.
            x: the first iterates.
            steps: how many gradient steps to take.
            step: the step.
            new_state: makes what the step remembers of each image.
            from_inputs: whether ``x`` are the images themselves. The first iterate then tells which images are
                misclassified, so that no forward pass has to precede the loop; except with ``keep="last"`` those images
                go no further.
            more: whether another run asks which images stand; else ``keep="last"`` does without the last forward pass.
        """
        self.runs += 1
        if not self._may_ask_afterwards(batch):
            self._follow(batch, x, steps, step, new_state, from_inputs=from_inputs, more=more)
        else:
            left = self._follow(batch, x.clone(), steps, step, new_state, from_inputs=from_inputs, asks="afterwards")
            if len(refuted := self._refuted(batch, left)) > 0:
                self._follow(batch.take(refuted), take(x, refuted), steps, step, new_state, asks="at once")
        return self.robust(batch)

    def robust(self, batch: Batch) -> Batch:
        """The images of a batch that no run of this call has made adversarial."""
        return batch.where(~self.adversarial[batch.rows])

    def _follow(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...], changed
        steps: int,
        step: Step,
        new_state: NewState | None,
        *,
        from_inputs: bool = False,
        more: bool = True,
        asks: Asks = "gathered",
    ) -> Tensor:
        """Take one run and store its results; arguments as for :meth:`run`.

        Returns:
            Positions in the caller's batch of the images about which the model has to be asked afterwards, [L] int64.
        """
        state = None if new_state is None else new_state(batch, x)
        tracker = BestTracker(self, batch, x, state, asks)
        del x, state  # they are the tracker's, and their memory goes as images fall
        for k in range(steps):
            at_inputs = from_inputs and k == 0 and self.keep == "best"
            if not at_inputs and tracker.replay(step, steps - k):
                unfinished = tracker.unfinished(k)
            else:
                # Forward and judge.
                now = tracker.now
                image, logits, judgement = self.forward(now.batch, now.x, now.record)
                if self.callback is not None:
                    self.tell(k, now, image, judgement)
                unfinished = tracker.unfinished(k, judgement, at_inputs=at_inputs)

                if unfinished is not None and len(unfinished) == 0:
                    tracker.save(judgement.better)  # as no step does
                else:
                    # Backward and step. The name keeps the gradient until the next one, whose memory would else go back
                    # to the system in between.
                    grad = self.backward(image, logits, judgement)
                    step(now, grad, judgement)

            # Go on with those that the model still classifies correctly.
            if unfinished is not None:
                if at_inputs:
                    self.misclassified += len(tracker.now) - len(unfinished)
                if len(unfinished) == 0:
                    tracker.trust()
                    break
                tracker.drop(unfinished)
        else:
            if more or steps == 0 or self.keep == "best" or self.callback is not None:
                tracker.take_last(steps)
            else:
                tracker.now.best = tracker.now.x
        tracker.finish()
        return torch.cat(tracker.trusted)

    def _may_ask_afterwards(self, batch: Batch) -> bool:
        network = self.network
        return (
            self.keep == "best"
            and self.early_stop
            and self.callback is None  # which hears of all iterates, once
            and network.faster is not None
            and network.draws == network.eot == 1
            and batch.x0.device.type == "cpu"
        )

    def _refuted(
        self,
        batch: Batch,
        rows: Tensor,  # [L] int64, in the caller's batch
    ) -> Tensor:
        """Ask the model about the results at ``rows``; positions in ``batch`` of those not adversarial, [M] int64."""
        positions = rows_where(torch.isin(batch.rows, rows))
        if len(positions) == 0:
            return positions
        part = batch.take(positions)
        self.adversarial[part.rows] = found = self.own_decision(part, self.result[part.rows])
        self.best_loss[part.rows[~found]] = -torch.inf  # any iterate takes the place of one that was refuted
        return positions[~found]

    def forward(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...]
        record: ops.BestRecord | None = None,
        *,
        gradient: bool = True,
        counted: bool = True,
    ) -> tuple[Tensor, Tensor, Judgement]:
        """The forward pass at ``x`` and what is read off its logits.

        Returns:
            The images that the model saw, [K, ...] in the dtype of the inputs; its logits [K, C], with a graph where a
            ``gradient`` is wanted; and their judgement, which brings the ``record`` up to date.
        """
        seen = self.image(batch, x) if self._may_be_kept(x) else x.detach()
        image = seen.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.network.ascend(image, counted=counted)
        return image, logits, self.judged(batch, logits, record)

    def _may_be_kept(self, x: Tensor) -> bool:
        """Whether what follows ``x`` may keep it, which the step changes, or has to be given another one."""
        return self.grid is not None or x.dtype != self.dtype or self.callback is not None or self.network.may_keep

    def judged(
        self,
        batch: Batch,
        logits: Tensor,  # [K, C]
        record: ops.BestRecord | None = None,
    ) -> Judgement:
        """What is read off logits that are followed; it brings the ``record`` up to date."""
        if not self.classes_checked:
            check_classes(logits, labels=batch.labels, targets=batch.targets)
            self.classes_checked = True
        rounding = 0.0 if self.network.exact else self.network.rounding
        if self.criterion is not None or not isinstance(self.loss, str):
            return judged_by(self.loss, self.criterion, logits, batch, rounding, record)
        return ops.judge(
            logits, batch.labels, targets=batch.targets, toward=batch.toward, loss=self.loss, rounding=rounding,
            record=record,
        )  # fmt: skip

    def tell(self, step: int, now: Iterates, image: Tensor, judgement: Judgement) -> None:
        """Call the callback, which must not see a graph."""
        if self.callback is not None:
            rows, loss = now.batch.rows, judgement.loss.detach()
            self.callback(Iteration(self.runs, step, rows, image.detach(), loss, judgement.adversarial))

    def image(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...]
    ) -> Tensor:
        """``x`` in the dtype of the inputs, within ball and box: what the model sees and the caller gets, [K, ...]."""
        if self.grid is not None:
            return rounded_images(self.grid, batch, x, self.norm, self.dtype)
        if x.dtype == self.dtype:
            return x.clone()  # a model may keep what it is given, and the step moves x in place
        low = x.to(self.dtype)
        return ops.project_(low, batch.x0.to(self.dtype), eps=batch.eps, norm=self.norm, bounds=batch.bounds)

    def backward(
        self,
        image: Tensor,  # [K, ...]
        logits: Tensor,  # [K, C]
        judgement: Judgement,
    ) -> Tensor:
        """The gradient of each image's loss, [K, ...] in the dtype of iterates.

        A loss depends on its own image alone, so that one backward pass gives all gradients. Those of parameters are
        not asked for and not computed.
        """
        return input_gradient(logits, image, judgement.grad).to(self.wide)

    def iterate(self, now: Iterates, step: Step, *, counted: bool = True) -> None:
        """One iteration without a look at what it found; the host waits for nothing."""
        image, logits, judgement = self.forward(now.batch, now.x, now.record, counted=counted)
        step(now, self.backward(image, logits, judgement), judgement)

    def advance(self, now: Iterates, step: Step, steps: int) -> Iterates:
        """The iterates after so many iterations without a look."""
        graph = self.graph(now, step, steps)
        for _ in range(steps):
            if graph is None:
                self.iterate(now, step)
            else:
                graph.replay()
                self.network.count_replayed(len(now))
        return now if graph is None else graph.now

    def graph(self, now: Iterates, step: Step, steps_left: int) -> Graph | None:
        """An iteration that is replayed, with ``now`` moved into its memory; None where it has to be carried out."""
        if self.network.graphs is None or not self.classes_checked or self.callback is not None:
            return None
        settings = (self.norm, self.loss, self.criterion, self.dtype, self.grid, step)
        return self.network.graphs.place(settings, lambda it: self.iterate(it, step, counted=False), now, steps_left)

    def asked(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...]
        adversarial: Tensor,  # [K] bool
        where: Tensor,  # [K] bool
        *,
        firm: bool = False,
    ) -> Tensor:
        """``adversarial`` [K] bool with the model's own decision on the iterates at which ``where`` is true."""
        rows = rows_where(where)
        if len(rows) == 0:
            return adversarial
        part = batch.take(rows)
        return adversarial.index_put((rows,), self.own_decision(part, self.image(part, take(x, rows)), firm=firm))

    def own_decision(
        self,
        batch: Batch,
        image: Tensor,  # [K, ...]
        *,
        firm: bool = False,
    ) -> Tensor:
        """Which images are adversarial by the model's own decision, [K] bool; with ``firm``, in any batch."""
        with torch.no_grad():
            logits = self.network.judge(image)
        return self.decision(batch, logits, firm=firm)

    def decision(
        self,
        batch: Batch,
        logits: Tensor,  # [K, C], the model's own
        *,
        firm: bool = False,
    ) -> Tensor:
        """Which logits decide adversarially, [K] bool; with ``firm``, those of the same images in any batch.

        Rounding differs between batches: a firm decision has a margin above it.
        """
        rounding = _BATCH_ROUNDING[self.dtype] * logits.abs().masked_fill(logits.isinf(), 0).amax(1)
        if self.criterion is not None:
            wrong = fooled(self.criterion, logits, batch.labels)
            # Two logits that err by half of it each are apart as the margin is.
            return wrong & holds_within(self.criterion, logits, batch.labels, wrong, rounding / 2) if firm else wrong
        judgement = ops.judge(logits, batch.labels, targets=batch.targets, loss="margin")
        return judgement.adversarial & (judgement.loss > rounding) if firm else judgement.adversarial

    def without_misclassified(self, batch: Batch) -> Batch:
        """The images that are classified correctly, or not yet as their targets, before anything is done to them."""
        if len(batch) == 0:
            return batch
        _, _, judgement = self.forward(batch, batch.x0, gradient=False)
        wrong = judgement.adversarial
        if not self.network.exact:
            wrong = self.asked(batch, batch.x0, wrong, wrong | judgement.doubtful)
        right = batch.where(~wrong)
        self.misclassified = len(batch) - len(right)
        return right

    def warn(self, name: str, *, aimed: bool = False, stacklevel: int = 3) -> None:
        """Warn the caller of the attack ``name`` of gradients that are not finite, and of labels that are not its.

        Args:
            name: of the attack.
            aimed: whether something else than a wrong decision is wanted, which says nothing of the labels.
            stacklevel: frames from here to the caller.
        """
        if bool(self.not_finite.any()):
            message = f"{name} met gradients that are not finite; those elements counted as 0"
            warnings.warn(message, stacklevel=stacklevel)
        if not aimed and self.misclassified > len(self.result) / 2 and len(self.result) >= FEW:
            message = f"{name}: {misclassified_text(self.misclassified, len(self.result))}"
            warnings.warn(message, AttackWarning, stacklevel=stacklevel)


class BestTracker:
    """The best iterate so far of each image of one run, and which of them are adversarial.

    Where the gradients of a faster copy are followed, an image that the copy calls adversarial is unconfirmed until
    the model has been asked, as ``asks`` says. Unconfirmed images are gathered, because a forward pass for one image
    costs nearly as much as one for several. Those to be asked about afterwards leave; ``trusted`` are their positions
    in the caller's batch.
    """

    def __init__(
        self,
        loop: AttackLoop,
        batch: Batch,
        x: Tensor,
        state: ops.APGDState | None = None,
        asks: Asks = "gathered",
    ) -> None:
        rows = batch.rows
        self.loop = loop
        self.asks, self.trusted = asks, [rows[:0]]
        self.now = Iterates(batch, x, loop.not_finite[rows], state=state)
        self.graph: Graph | None = None
        self.replays = True
        self.waited = 0
        self.check_every = _CHECK_EVERY.get(x.device.type, _CHECK_EVERY_ELSEWHERE)
        if loop.keep == "best":
            self.now.best = torch.empty_like(x).copy_(loop.result[rows])
            self.now.record = self._record(loop.best_loss[rows], torch.zeros_like(self.now.not_finite))

    def _record(self, loss: Tensor, succeeded: Tensor) -> ops.BestRecord:
        record = ops.BestRecord(loss, succeeded, early_stop=self.loop.early_stop)
        if not self.loop.network.exact:
            record.unconfirmed, record.doubtful = succeeded.clone(), torch.zeros_like(succeeded)
        return record

    def replay(self, step: Step, steps_left: int) -> bool:
        """Take a step by replaying a graph, if there is to be one for so many images."""
        if self.graph is None:
            # Before the first logits have shown the classes there is none yet; afterwards a refusal is final.
            replays = self.replays
            self.replays = not self.loop.classes_checked
            self.graph = self.loop.graph(self.now, step, steps_left) if replays else None
            if self.graph is None:
                return False
            self.now = self.graph.now
        self.graph.replay()
        self.loop.network.count_replayed(len(self.now))
        return True

    def unfinished(self, step: int, judgement: Judgement | None = None, *, at_inputs: bool = False) -> Tensor | None:
        """Positions of the images that go on, [M] int64; None where all do, or where this step does not check.

        Args:
            step: how many steps were taken before.
            judgement: that of iterates which have yet to be saved; None where they are saved already.
            at_inputs: whether the iterates are the images themselves.
        """
        record = self.now.record
        if record is None:
            return None
        if at_inputs:
            if judgement is not None and record.unconfirmed is not None:
                self.confirm(record, judgement.adversarial | judgement.doubtful)
            return fewer(~record.succeeded)
        if not self.loop.early_stop or step % self.check_every:
            return None
        if self.asks == "afterwards" and record.unconfirmed is not None:
            return fewer(~record.unconfirmed)
        if record.unconfirmed is None:
            return fewer(~record.succeeded) if bool(record.succeeded.any()) else None
        succeeded, waiting = torch.stack((record.succeeded, record.unconfirmed)).sum(1).tolist()
        if succeeded == 0:
            return None
        self.waited += waiting
        patience = min(_PATIENCE, len(self.now) - succeeded + waiting) if self.asks == "gathered" else 0
        if waiting and self.waited >= patience:
            if judgement is not None:
                self.save(judgement.better)
            self.confirm(record, record.unconfirmed)
        return fewer(~record.succeeded | record.unconfirmed)

    def save(
        self,
        better: Tensor,  # [K] bool
    ) -> None:
        """What a step does before it moves: take the iterate for the best where it is ``better``."""
        if self.now.best is not None:
            put_rows_(self.now.best, self.now.x, better)

    def confirm(
        self,
        record: ops.BestRecord,
        where: Tensor,  # [K] bool
    ) -> None:
        """Ask the model about the best iterates at which ``where`` is true."""
        if record.unconfirmed is None or self.now.best is None:
            return
        record.succeeded.copy_(self.loop.asked(self.now.batch, self.now.best, record.succeeded, where))
        # The next iterate takes the place of one that the model does not find adversarial.
        record.loss.masked_fill_(record.unconfirmed & ~record.succeeded, -torch.inf)
        record.unconfirmed.zero_()
        self.waited = 0

    def drop(
        self,
        kept: Tensor,  # [M] int64
    ) -> None:
        """Store the results and go on with the images at positions ``kept``."""
        if self.graph is not None and self.graph.fits(len(kept)):
            return  # the others change no more, and their rows cost little
        self.trust()
        self.store()
        self.now.keep(kept)
        self.graph, self.replays = None, True

    def trust(self) -> None:
        """Take the copy's word for the images that it calls adversarial, which leave."""
        record = self.now.record
        if self.asks != "afterwards":
            return
        assert record is not None  # as a copy is followed, and the best iterates are kept
        assert record.unconfirmed is not None
        assert record.doubtful is not None
        self.trusted.append(self.now.batch.rows[record.unconfirmed])
        record.doubtful &= ~record.unconfirmed
        record.unconfirmed.zero_()

    def take_last(self, steps: int) -> None:
        """Judge the iterates after the last step, which get no gradient, and take those that are the best."""
        now = self.now
        image, _, judgement = self.loop.forward(now.batch, now.x, now.record, gradient=False)
        self.loop.tell(steps, now, image, judgement)
        del image  # a whole batch
        if now.record is not None:
            self.save(judgement.better)
            return
        now.best, now.record = now.x, self._record(judgement.loss.double(), judgement.adversarial)
        now.record.doubtful = judgement.doubtful

    def finish(self) -> None:
        """Store the results, confirmed by the model."""
        record = self.now.record
        if record is not None and record.unconfirmed is not None and record.doubtful is not None:
            self.confirm(record, record.unconfirmed | (record.doubtful & ~record.succeeded))
        self.store()

    def store(self) -> None:
        """Put the best iterates into the results of the call."""
        now, loop, rows = self.now, self.loop, self.now.batch.rows
        loop.not_finite[rows] = now.not_finite
        if now.best is None:
            return
        found, at = loop.image(now.batch, now.best), rows
        if now.record is None:  # the last iterates of all, about which nothing more is asked
            loop.result[at] = found
            return
        if (now.best.dtype != loop.dtype or loop.grid is not None) and loop.keep == "best":
            # An image of an earlier run stays as it was judged: it need not be its own projection.
            new = now.record.succeeded | (now.record.loss != loop.best_loss[rows])
            found, at = found[new], rows[new]
        loop.result[at] = found
        loop.best_loss[rows] = now.record.loss
        loop.adversarial[rows] = now.record.succeeded


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
    # The next number on that side, in memory of its own, and whether the box lets x move there: 1 or 0.
    there = grad * torch.inf
    moves = torch.nextafter(x, there, out=there).clamp_(lo, hi).ne_(x)  # type: ignore[arg-type]  # two numbers or two tensors
    return moves.mul_(grad)

"""Auto-PGD (Croce and Hein 2020, 2021) over the fused step, in Linf, L2 and L1."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastlip import ops
from fastlip._precision import Precision
from fastlip.attacks._arguments import (
    check_call,
    check_callback,
    check_classes,
    check_settings,
    count,
    flag,
    length,
    radius,
    share,
    warn_of_wide,
)
from fastlip.attacks._batch import Batch, Iterates, new_batch, per_sample
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._loop import AttackLoop, Callback, Keep, start_points
from fastlip.attacks._model import Model, eval_mode
from fastlip.attacks._own_loss import AnyLoss
from fastlip.attacks._prepare import network_of
from fastlip.attacks._quantize import grid_of
from fastlip.ops import Bounds, Judgement, Norm, PerSample

#: Radii above eps, in multiples of it, and their shares of the steps in sparse APGD's schedule (Croce and Hein 2021,
#: section 3.2).
_RADII, _SHARES = (3.0, 2.0), (0.3, 0.3)
#: Columns of :attr:`fastlip.ops.APGDState.counters`.
_KEPT, _SUPPORT = 3, 4


def apgd(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    steps: int = 100,
    step_size: PerSample | None = None,
    loss: AnyLoss = "dlr",
    criterion: Criterion | None = None,
    target_classes: int = 0,
    random_start: bool = True,
    restarts: int = 1,
    keep: Keep = "best",
    early_stop: bool = True,
    momentum: float = 0.75,
    rho: float = 0.75,
    larger_eps: bool | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: Tensor | None = None,  # [B] int64
    start: Tensor | None = None,  # [B, ...]
    active: Tensor | None = None,  # [B] bool
    ids: Tensor | None = None,  # [B] int64
    generator: torch.Generator | None = None,
    fast: bool = False,
    precision: Precision = None,
    quantize: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Adversarial images within ``eps`` of ``inputs`` by Auto-PGD; [B, ...] like ``inputs``.

    Step sizes, restarts from the best iterate and, in "l1", the share of elements moved follow the published schedules
    (:func:`fastlip.ops.apgd_step_`), image by image. Two details differ in "l1": checkpoints are at least two steps
    apart, and a step of two elements is followed by one of a single element, which the published schedule never
    reaches because it rounds up. With
    ``target_classes=k`` the runs aim at each image's k most likely wrong classes in turn (APGD-T: 9 in AutoAttack, with
    ``loss="dlr"``), and any wrong decision is a success.

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball in ``norm`` and the units of ``inputs``, float or [B], >= 0.
        steps: gradient steps of each run.
        step_size: first step size, float or [B]; the published one if None: 2 eps, in "l1" eps.
        loss: "dlr", "margin" or "ce", as in :func:`pgd`; with ``target_classes`` the difference of two logits, over a
            spread of the largest four for "dlr" (Croce and Hein 2020, equation 7), or the class's cross-entropy; or a
            function of one's own, which gets the classes aimed at, and is decreased.
        criterion: as in :func:`pgd`.
        target_classes: how many wrong classes to aim at in turn; 0 aims at none in particular. At most C - 1 are used.
        random_start: begin at a uniform point of the ball; else at ``start``.
        restarts: number of runs (for each class aimed at); an image takes part in the next one only while it is robust.
        keep: "best" or "last", as in :func:`pgd`.
        early_stop: as in :func:`pgd`.
        momentum: weight of the step against the last update (alpha in the paper); unused in "l1".
        rho: share of steps that must increase the loss, or else the step size is halved; unused in "l1".
        larger_eps: spend the first 30% of the steps (rounded up) in the ball of radius 3 eps and the next 30% in that
            of 2 eps, as published for "l1"; only what is found in the ball of radius eps counts. If None, do so in "l1"
            where ``random_start`` is True and there are at least 10 steps.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        targets: classes to reach, [B] int64; only this decision is then a success.
        start: points to begin from when ``random_start`` is False, projected onto ball and box; ``inputs`` if None.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, which determine the random starts together with the generator; 0 .. B-1 if None.
        generator: source of random starts, one draw for each run; the device's default generator if None.
        fast: as in :func:`pgd`.
        precision: as in :func:`pgd`.
        quantize: as in :func:`pgd`.
        callback: as in :func:`pgd`; it hears nothing of steps in balls that are too large (``larger_eps``).

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or the model's output is not differentiable.
        TypeError: a type or dtype is wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> adversarial = attacks.apgd(model, images, labels, norm="l2", eps=0.5, steps=20)
    """
    inputs, labels, targets, ids, bounds, norm = check_call(
        model, inputs, labels, targets, norm=norm, loss=loss, bounds=bounds, active=active, ids=ids,
        generator=generator, fast=fast, precision=precision,
    )  # fmt: skip
    steps, restarts = check_settings(steps, restarts, keep, early_stop, random_start, start, inputs)
    finite = "where random_start is True, step_size is None or norm is 'l1'"
    eps = radius(eps, "eps", inputs, finite=finite if random_start or step_size is None or norm == "l1" else "")
    warn_of_wide(eps, norm, inputs, bounds)
    published = step_size is None
    step_size = 0.0 if step_size is None else length(step_size, "step_size", inputs)
    momentum, rho = share(momentum, "momentum"), share(rho, "rho")
    target_classes = count(target_classes, "target_classes")
    check_criterion(criterion)
    grid = grid_of(quantize, inputs, bounds)
    check_callback(callback)
    if target_classes and targets is not None:
        raise ValueError("give either targets or target_classes")
    if larger_eps is None:
        larger_eps = norm == "l1" and random_start and steps >= 10
    flag(larger_eps, "larger_eps")
    with eval_mode(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=step_size, bounds=bounds, ids=ids, active=active)
        loop = AttackLoop(
            network, inputs, norm=norm, loss=loss, keep=keep, early_stop=early_stop, grid=grid, callback=callback,
            criterion=criterion,
        )  # fmt: skip
        phases = _phases(steps, larger_eps)
        from_inputs = not random_start and start is None and len(phases) == 1
        run = _Run(loop, phases, ApgdStep(norm, momentum, rho), published=published, from_inputs=from_inputs)
        if keep == "best" and not from_inputs:
            batch = loop.without_misclassified(batch)
        for toward in _classes_aimed_at(loop, batch, target_classes):
            for _ in range(restarts):
                if len(batch) == 0:
                    break
                aimed = replace(batch, toward=None if toward is None else toward[batch.rows])
                batch = run(aimed, start_points(run.first_ball(aimed), norm, random_start, start, generator))
    loop.warn("apgd", aimed=targets is not None or criterion is not None)
    return loop.result


def _classes_aimed_at(loop: AttackLoop, batch: Batch, count: int) -> Iterator[Tensor | None]:
    """The wrong classes to aim at, one run after another, the likeliest first; each [N] int64 for all images."""
    if count == 0:
        yield None
        return
    if len(batch) == 0:
        return
    with torch.no_grad():
        logits = loop.network.judge(batch.x0.to(loop.dtype))
    check_classes(logits, labels=batch.labels)
    logits = logits.scatter(1, batch.labels[:, None], -torch.inf)
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    for k in range(min(count, logits.shape[1] - 1)):
        toward = torch.zeros(len(loop.result), dtype=torch.int64, device=logits.device)
        toward[batch.rows] = ranked[:, k]
        yield toward


def _phases(steps: int, larger_eps: bool) -> list[tuple[float, int]]:
    """The balls of a run, as multiples of eps, and the steps that it spends in each."""
    phases: list[tuple[float, int]] = []
    left = steps
    for multiple, part in zip(_RADII, _SHARES, strict=True) if larger_eps else ():
        # Shares are rounded up, so that a run of one or two steps has none left for the later balls.
        now = min(math.ceil(part * steps), left)
        left -= now
        if now:
            phases.append((multiple, now))
    return [*phases, (1.0, left)]


@dataclass(frozen=True)
class ApgdStep:
    """The step of APGD for :meth:`AttackLoop.run`."""

    norm: Norm
    momentum: float
    rho: float

    def __call__(self, now: Iterates, grad: Tensor, judgement: Judgement) -> None:
        batch, state = now.batch, now.state
        if state is None:
            raise TypeError("APGD's step needs a state")
        ops.apgd_step_(
            now.x, grad, judgement.loss, batch.x0, state, eps=batch.eps, norm=self.norm, bounds=batch.bounds,
            momentum=self.momentum, rho=self.rho, best=now.best,
            better=None if now.best is None else judgement.better, not_finite=now.not_finite,
        )  # fmt: skip
        if self.norm == "l1":
            # Two thirds of two are two once rounded up, and the schedule would never reach a single element.
            state.counters[:, _KEPT].clamp_max_(state.counters[:, _SUPPORT] - 1)


@dataclass(frozen=True)
class _Run:
    """The settings of a call's runs; calling it takes one run."""

    loop: AttackLoop
    phases: list[tuple[float, int]]
    step: ApgdStep
    published: bool
    from_inputs: bool

    def first_ball(self, batch: Batch) -> Batch:
        """The batch with the radius of the first phase, in which a run starts."""
        return replace(batch, eps=self.phases[0][0] * batch.eps)

    def __call__(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...], changed
    ) -> Batch:
        """Take the steps of all phases from ``x``, and return the images that are still robust."""
        for phase, (multiple, steps) in enumerate(self.phases):
            ball = replace(batch, eps=multiple * batch.eps)
            if phase:
                x = ops.project_(x, ball.x0, eps=ball.eps, norm=self.loop.norm, bounds=ball.bounds)
            new_state = partial(self._new_state, steps=steps, continued=phase > 0)
            if phase < len(self.phases) - 1:
                x = self._explore(ball, x, new_state(ball, x), steps)
        return self.loop.run(batch, x, steps, self.step, new_state, from_inputs=self.from_inputs)

    def _explore(self, batch: Batch, x: Tensor, state: ops.APGDState, steps: int) -> Tensor:
        """The iterate of largest loss in a ball that is too large, in which successes do not count."""
        now = self.loop.advance(Iterates(batch, x, self.loop.not_finite[batch.rows], state=state), self.step, steps)
        losses = self.loop.forward(now.batch, now.x, gradient=False)[2].loss
        self.loop.not_finite[batch.rows] = now.not_finite
        if now.state is None:
            raise TypeError("APGD's step needs a state")
        return torch.where(per_sample(losses > now.state.best_loss, now.x), now.x, now.state.x_best)

    def _new_state(self, batch: Batch, x: Tensor, steps: int, continued: bool) -> ops.APGDState:
        norm = self.loop.norm
        step_size = None if self.published else batch.step_size
        state = ops.apgd_state(x, steps=steps, eps=batch.eps, norm=norm, step_size=step_size)
        if norm == "l1":
            window = max(steps // 25, 2)
            at = torch.arange(steps, device=x.device)
            state.schedule = torch.where((at % window == 0) & (at > 0), window, 0).int()
        if norm == "l1" and continued:
            # As published, a phase continues with the support of the point at which it begins.
            support = (x != batch.x0).flatten(1).sum(1).clamp_min(1).int()
            state.counters[:, _SUPPORT] = support
            state.counters[:, _KEPT] = (2 * support + 2) // 3
        return state

"""Auto-PGD (Croce and Hein 2020, 2021) over the fused step, in Linf, L2 and L1."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import count, flag, length, radius, share
from fastlip.attacks._batch import Batch, new_batch, rows_of, within
from fastlip.attacks._climb import Climb, Keep, walk
from fastlip.attacks._distance import check_norm
from fastlip.attacks._losses import Loss, check_loss
from fastlip.attacks._model import Model, attacked
from fastlip.attacks._pgd import check_settings, first_iterate, warn_of_lost_gradients
from fastlip.attacks._prepare import network_of
from fastlip.ops import Bounds, Norm, PerSample

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
    loss: Loss = "dlr",
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
    precision: torch.dtype | None = None,
) -> Tensor:
    """Adversarial images within ``eps`` of ``inputs`` by Auto-PGD; [B, ...] like ``inputs``.

    Step sizes, restarts from the best iterate and, in "l1", the share of elements moved follow the published schedules
    (:func:`fastlip.ops.apgd_step_`), image by image. In "l1" checkpoints are two steps apart at least, and from two
    elements moved the next is one, at which the published schedule, rounding up at every step, never arrives. With
    ``target_classes=k`` the runs head for each image's k most likely wrong classes in turn (APGD-T: 9 in AutoAttack,
    with ``loss="dlr"``), any wrong decision being a success.

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball in ``norm`` and the units of ``inputs``, float or [B], >= 0.
        steps: gradient steps of each run.
        step_size: first step size, float or [B]; the published one if None: 2 eps, in "l1" eps.
        loss: "dlr", "margin" or "ce", as in :func:`pgd`; with ``target_classes`` the difference of two logits, over a
            spread of the largest four for "dlr" (Croce and Hein 2020, equation 7), or the class's cross-entropy.
        target_classes: how many wrong classes to head for in turn; 0 for none in particular. At most C - 1 are used.
        random_start: begin at a uniform point of the ball; else at ``start``.
        restarts: runs in all (for each class headed for); an image goes into the next one only while it stands.
        keep: "best" or "last", as in :func:`pgd`.
        early_stop: as in :func:`pgd`.
        momentum: weight of the step against the last update (alpha in the paper); unused in "l1".
        rho: share of steps that must increase the loss, or else the step size is halved; unused in "l1".
        larger_eps: spend the first 30% of the steps (rounded up) in the ball of radius 3 eps and the next 30% in that
            of 2 eps, as published for "l1"; what counts is found in that of radius eps alone. None: in "l1" where
            ``random_start`` is True and there are 10 steps at least.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        targets: classes to reach, [B] int64; success is then this decision, and no other.
        start: points to begin from when ``random_start`` is False, projected onto ball and box; ``inputs`` if None.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, from which a sample's random starts are drawn; 0 .. B-1 if None.
        generator: source of random starts, one draw for each run; the device's default generator if None.
        fast: as in :func:`pgd`.
        precision: as in :func:`pgd`.

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or the model's output is not differentiable.
        TypeError: a type or dtype is wrong.
    """
    bounds = within(inputs, bounds)
    steps, restarts = check_settings(steps, restarts, keep, early_stop, random_start, start, generator, inputs)
    check_loss(loss)
    check_norm(norm)
    target_classes = count(target_classes, "target_classes")
    momentum, rho = share(momentum, "momentum"), share(rho, "rho")
    if target_classes and targets is not None:
        raise ValueError("give either targets or target_classes")
    if larger_eps is None:
        larger_eps = norm == "l1" and random_start and steps >= 10
    flag(larger_eps, "larger_eps")
    finite = "where random_start is True, step_size is None or norm is 'l1'"
    eps = radius(eps, "eps", inputs, finite=finite if random_start or step_size is None or norm == "l1" else "")
    published = step_size is None
    step_size = 0.0 if step_size is None else length(step_size, "step_size", inputs)
    with attacked(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=step_size, bounds=bounds, ids=ids)
        climb = Climb(network, inputs, norm=norm, loss=loss, keep=keep, early_stop=early_stop)
        run = _Run(climb, steps, published=published, momentum=momentum, rho=rho, larger_eps=larger_eps)
        run.from_inputs = not random_start and start is None and len(run.phases) == 1
        standing = batch.take(rows_of(active, inputs))
        if keep == "best" and not run.from_inputs:
            standing = climb.without_fallen(standing)
        for toward in _headings(climb, standing, target_classes):
            for _ in range(restarts):
                if len(standing) == 0:
                    break
                headed = replace(standing, toward=None if toward is None else toward[standing.rows])
                begin = first_iterate(run.widest(headed), norm, random_start, start, generator)
                standing = run.climb(headed, begin)
    warn_of_lost_gradients("apgd", climb)
    return climb.result


def _headings(climb: Climb, batch: Batch, count: int) -> Iterator[Tensor | None]:
    """The wrong classes to head for, one run after another: the likeliest first, each [N] int64 for all images."""
    if count == 0:
        yield None
        return
    if len(batch) == 0:
        return
    logits = climb.judge(batch, batch.x0.to(climb.result.dtype))
    logits = logits.scatter(1, batch.labels[:, None], -torch.inf)
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    for k in range(min(count, logits.shape[1] - 1)):
        toward = torch.zeros(len(climb.result), dtype=torch.int64, device=logits.device)
        toward[batch.rows] = ranked[:, k]
        yield toward


class _Run:
    """The settings of a call's runs; ``from_inputs`` where they begin at the images themselves, in the ball proper."""

    def __init__(
        self, climb: Climb, steps: int, *, published: bool, momentum: float, rho: float, larger_eps: bool
    ) -> None:
        self.climber = climb
        self.published = published
        self.momentum = momentum
        self.rho = rho
        self.from_inputs = False
        self.phases: list[tuple[float, int]] = []
        left = steps
        for multiple, part in zip(_RADII, _SHARES, strict=True) if larger_eps else ():
            # Shares are rounded up: a run of one or two steps has none left for the later balls.
            now = min(math.ceil(part * steps), left)
            left -= now
            if now:
                self.phases.append((multiple, now))
        self.phases.append((1.0, left))

    def widest(self, batch: Batch) -> Batch:
        """The batch with the radius of the first phase, in which a run starts."""
        return replace(batch, eps=self.phases[0][0] * batch.eps)

    def climb(
        self,
        batch: Batch,
        x: Tensor,  # [K, ...], changed
    ) -> Batch:
        """Take the steps from ``x`` and return the images that still stand."""
        for phase, (multiple, steps) in enumerate(self.phases):
            ball = replace(batch, eps=multiple * batch.eps)
            if phase:
                x = ops.project_(x, ball.x0, eps=ball.eps, norm=self.climber.norm, bounds=ball.bounds)
            state = self._state(ball, x, steps, continued=phase > 0)
            if phase < len(self.phases) - 1:
                x = self._explore(ball, x, state, steps)
        return self._settle(batch, x, state, steps)

    def _explore(self, batch: Batch, x: Tensor, state: ops.APGDState, steps: int) -> Tensor:
        """The iterate of largest loss in a ball that is too large: nothing found there counts."""
        for _ in range(steps):
            seen = self.climber.seen(batch, x)
            losses = self.climber.losses(batch, seen, gradient=True)[0]
            self._step(batch, x, self.climber.gradient(losses, seen, x), losses, state)
        losses = self.climber.losses(batch, self.climber.seen(batch, x), gradient=False)[0]
        better = losses > state.best_loss
        return torch.where(better.reshape(-1, *([1] * (x.dim() - 1))), x, state.x_best)

    def _settle(self, batch: Batch, x: Tensor, state: ops.APGDState, steps: int) -> Batch:
        def step(batch: Batch, x: Tensor, grad: Tensor, losses: Tensor) -> None:
            self._step(batch, x, grad, losses, state)

        def leave_behind(kept: Tensor) -> None:
            nonlocal state
            state = state[kept]

        return walk(self.climber, batch, x, steps, step, leave_behind, from_inputs=self.from_inputs)

    def _state(self, batch: Batch, x: Tensor, steps: int, continued: bool) -> ops.APGDState:
        norm = self.climber.norm
        step_size = None if self.published else batch.step_size
        state = ops.apgd_state(x, steps=steps, eps=batch.eps, norm=norm, step_size=step_size)
        if norm == "l1":
            window = max(steps // 25, 2)
            at = torch.arange(steps, device=x.device)
            state.schedule = torch.where((at % window == 0) & (at > 0), window, 0).int()
        if norm == "l1" and continued:
            # As published: a phase goes on with the support of the point that it was given.
            support = (x != batch.x0).flatten(1).sum(1).clamp_min(1).int()
            state.counters[:, _SUPPORT] = support
            state.counters[:, _KEPT] = (2 * support + 2) // 3
        return state

    def _step(self, batch: Batch, x: Tensor, grad: Tensor, losses: Tensor, state: ops.APGDState) -> None:
        ops.apgd_step_(
            x,
            grad,
            losses.detach().to(state.best_loss.dtype),
            batch.x0,
            state,
            eps=batch.eps,
            norm=self.climber.norm,
            bounds=batch.bounds,
            momentum=self.momentum,
            rho=self.rho,
        )
        if self.climber.norm == "l1":
            # Rounded up, two thirds of two are two, and the schedule never becomes one-hot.
            kept = state.counters[:, _KEPT]
            kept -= ((kept == 2) & (state.counters[:, _SUPPORT] == 2)).int()

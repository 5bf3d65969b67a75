"""Projected gradient descent (Madry et al. 2018) over the fused step, in Linf, L2 and L1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlip import ops
from fastlip._precision import Precision
from fastlip.attacks._arguments import (
    check_call,
    check_callback,
    check_choice,
    check_settings,
    length,
    radius,
    share,
    warn_of_wide,
)
from fastlip.attacks._batch import Iterates, new_batch
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._loop import AttackLoop, Callback, Keep, start_points, unblocked_gradient
from fastlip.attacks._model import Model, eval_mode
from fastlip.attacks._own_loss import AnyLoss
from fastlip.attacks._prepare import network_of
from fastlip.attacks._quantize import grid_of
from fastlip.ops import Bounds, Judgement, Norm, PerSample


def pgd(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    steps: int = 20,
    step_size: PerSample | None = None,
    loss: AnyLoss = "dlr",
    criterion: Criterion | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep: Keep = "best",
    early_stop: bool = True,
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
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
    """Adversarial images within ``eps`` of ``inputs`` by projected gradient steps; [B, ...] like ``inputs``.

    Each step moves by ``step_size`` along the steepest direction of ``norm`` and projects exactly onto the ball and the
    box (:func:`fastlip.ops.pgd_step_`). With ``keep="best"`` the attack stops on an image as soon as it is
    misclassified, and goes on with the robust ones. An image that is misclassified to begin with comes back unchanged;
    one that stays robust comes back as the iterate of largest loss among the steps + 1 of every restart. With
    ``keep="last"`` every image takes every step and comes back as its last iterate, as in torchattacks and foolbox;
    this setting alone moves images that were misclassified to begin with.

    Args:
        model: maps inputs to logits [B, C], or what :func:`prepare` made of one.
        inputs: images, [B, ...], within ``bounds``.
        labels: true classes, [B] int64.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball in ``norm`` and the units of ``inputs``, float or [B], >= 0.
        steps: gradient steps of each restart.
        step_size: length of a step in ``norm``, float or [B]; 2.5 eps / steps if None (Madry et al. 2018).
        loss: "dlr" (margin over the spread of the three largest logits, Croce and Hein 2020; the margin below three
            classes and with ``targets``), "margin", or "ce" (cross-entropy, which saturates where logits are large).
            No loss is the strongest on every network: part of DLR's gradient goes into narrowing the spread, so that
            on small networks with small logits it can succeed on fewer images than "ce" in the same steps; a suite
            takes both. Or a function of one's own, which maps logits [B, C] and classes [B] to the losses to be
            increased, [B] (``torch.nn.CrossEntropyLoss(reduction="none")``); with ``targets`` it gets these, and is
            decreased.
        criterion: what counts as success: a function that maps logits [B, C] and labels [B] to whether the model is
            fooled, [B] bool. It decides in the place of a wrong decision (or the target's); ``loss`` is climbed all the
            same. An image that it is true of to begin with comes back unchanged.
        random_start: begin at a uniform point of the ball; else at ``start``.
        restarts: number of runs; an image takes part in the next one only while it is robust. More than one run needs
            ``random_start``.
        keep: "best" or "last".
        early_stop: with ``keep="best"``, stop on an image at its first misclassified iterate; if False it takes every
            step of the run and comes back as the misclassified iterate of largest loss, unless it was misclassified to
            begin with.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: share of elements that an "l1" step leaves alone.
        targets: classes to reach, [B] int64; only this decision is then a success. An image that is classified as its
            target already comes back unchanged, whatever its label.
        start: points to begin from when ``random_start`` is False, projected onto ball and box; ``inputs`` if None.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, which determine the random starts together with the generator; 0 .. B-1 if None.
        generator: source of random starts, one draw for each restart; the device's default generator if None.
        fast: follow the gradients of a copy made fast for evaluation (:func:`prepare`), which differ by rounding;
            every success is confirmed on ``model``.
        precision: torch.bfloat16 or torch.float16: follow gradients of that precision, every success confirmed on
            ``model``; iterates stay in float32. Where this machine computes it more slowly than float32, gradients are
            followed in float32, with a warning. "auto": the fastest precision on this machine. None: the model's own.
        quantize: bits of a value, 8 for images that are kept in files: all that the model is given and that comes back
            has values lo + k (hi - lo) / (2^bits - 1), in 0 to 1 where bounds are tensors, and so has ``inputs``.
        callback: called with an :class:`Iteration` before each step and at the end of each run.

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
        >>> adversarial = attacks.pgd(model, images, labels, norm="linf", eps=8 / 255)
        >>> print(model(adversarial).argmax(1) != labels)
    """
    inputs, labels, targets, ids, bounds, norm = check_call(
        model, inputs, labels, targets, norm=norm, loss=loss, bounds=bounds, active=active, ids=ids,
        generator=generator, fast=fast, precision=precision,
    )  # fmt: skip
    steps, restarts = check_settings(steps, restarts, keep, early_stop, random_start, start, inputs)
    check_criterion(criterion)
    grid = grid_of(quantize, inputs, bounds)
    check_callback(callback)
    finite = "where random_start is True or step_size is None" if random_start or step_size is None else ""
    eps = radius(eps, "eps", inputs, finite=finite)
    warn_of_wide(eps, norm, inputs, bounds)
    step = PgdStep(norm, share(sparsity, "sparsity"))
    step_size = default_step(eps, steps) if step_size is None else length(step_size, "step_size", inputs)
    with eval_mode(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=step_size, bounds=bounds, ids=ids, active=active)
        loop = AttackLoop(
            network, inputs, norm=norm, loss=loss, keep=keep, early_stop=early_stop, grid=grid, callback=callback,
            criterion=criterion,
        )  # fmt: skip
        from_inputs = not random_start and start is None
        if keep == "best" and not from_inputs:
            batch = loop.without_misclassified(batch)
        for left in reversed(range(restarts)):
            if len(batch) == 0:
                break
            x = start_points(batch, norm, random_start, start, generator)
            batch = loop.run(batch, x, steps, step, from_inputs=from_inputs, more=left > 0)
    loop.warn("pgd", aimed=targets is not None or criterion is not None)
    return loop.result


def fgsm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    loss: AnyLoss = "dlr",
    criterion: Criterion | None = None,
    keep: Keep = "best",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
    fast: bool = False,
    precision: Precision = None,
    quantize: int | None = None,
) -> Tensor:
    """One step of length ``eps`` from ``inputs`` (Goodfellow et al. 2015); arguments and errors as in :func:`pgd`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> adversarial = attacks.fgsm(model, images, labels, eps=8 / 255)
    """
    inputs, labels, targets, _, bounds, norm = check_call(
        model, inputs, labels, targets, norm=norm, loss=loss, bounds=bounds, active=active, fast=fast,
        precision=precision,
    )  # fmt: skip
    check_choice(keep, "keep", ("best", "last"))
    check_criterion(criterion)
    grid = grid_of(quantize, inputs, bounds)
    eps = radius(eps, "eps", inputs, finite="as the length of a step")
    warn_of_wide(eps, norm, inputs, bounds)
    step = PgdStep(norm, share(sparsity, "sparsity"))
    with eval_mode(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=eps, bounds=bounds, ids=None, active=active)
        loop = AttackLoop(network, inputs, norm=norm, loss=loss, keep=keep, grid=grid, criterion=criterion)
        if len(batch) > 0:
            loop.run(batch, batch.x0.clone(), 1, step, from_inputs=True, more=False)
    loop.warn("fgsm", aimed=targets is not None or criterion is not None)
    return loop.result


@dataclass(frozen=True)
class PgdStep:
    """The step of PGD for :meth:`AttackLoop.run`."""

    norm: Norm
    sparsity: float

    def __call__(self, now: Iterates, grad: Tensor, judgement: Judgement) -> None:
        batch = now.batch
        if self.norm == "l1":
            grad = unblocked_gradient(batch, now.x, grad)
        ops.pgd_step_(
            now.x, grad, batch.x0, step_size=batch.step_size, eps=batch.eps, norm=self.norm, bounds=batch.bounds,
            sparsity=self.sparsity, best=now.best, better=None if now.best is None else judgement.better,
            not_finite=now.not_finite,
        )  # fmt: skip


def default_step(eps: PerSample, steps: int) -> PerSample:
    """Length of a step where none is given (Madry et al. 2018)."""
    return 2.5 * eps / max(steps, 1)

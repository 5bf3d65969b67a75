"""Projected gradient descent (Madry et al. 2018) over the fused step, in Linf, L2 and L1."""

import warnings

import torch
from torch import Tensor

from fastlip import ops
from fastlip.attacks._arguments import check_choice, check_generator, check_images, count, flag, length, radius, share
from fastlip.attacks._batch import Batch, new_batch, rows_of, take, within
from fastlip.attacks._climb import Climb, Keep, free_gradient, walk
from fastlip.attacks._distance import check_norm
from fastlip.attacks._losses import Loss, check_loss
from fastlip.attacks._model import Model, attacked
from fastlip.attacks._prepare import network_of
from fastlip.ops import Bounds, Norm, PerSample


def pgd(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    steps: int = 20,
    step_size: PerSample | None = None,
    loss: Loss = "dlr",
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
    precision: torch.dtype | None = None,
) -> Tensor:
    """Adversarial images within ``eps`` of ``inputs`` by projected gradient steps; [B, ...] like ``inputs``.

    Each step moves by ``step_size`` along the steepest direction of ``norm`` and projects exactly onto the ball and the
    box (:func:`fastlip.ops.pgd_step_`). With ``keep="best"`` an image is given up as soon as it is misclassified, and
    only those still standing go on; one that is misclassified to begin with comes back unchanged, and one that never
    falls as the iterate of largest loss among the steps + 1 of every restart. With ``keep="last"`` every image takes
    every step and comes back as its last iterate, as in torchattacks and foolbox: there alone an image that was
    misclassified to begin with is moved.

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
            None is the strongest on every network: part of DLR's gradient goes into narrowing the spread, so that on
            small networks with small logits it can fell fewer images than "ce" in the same steps; a suite takes both.
        random_start: begin at a uniform point of the ball; else at ``start``.
        restarts: runs in all; an image goes into the next one only while it stands. Needs ``random_start`` above 1.
        keep: "best" or "last".
        early_stop: with ``keep="best"``, give an image up at its first misclassified iterate; if False it takes every
            step of the run and comes back as the misclassified iterate of largest loss, unless it was misclassified as
            it is.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``.
        sparsity: share of elements that an "l1" step leaves alone.
        targets: classes to reach, [B] int64; success is then this decision, and no other. An image that has it already
            comes back unchanged, whatever its label.
        start: points to begin from when ``random_start`` is False, projected onto ball and box; ``inputs`` if None.
        active: [B] bool; False returns an image unchanged.
        ids: [B] int64 sample ids, from which a sample's random starts are drawn; 0 .. B-1 if None.
        generator: source of random starts, one draw for each restart; the device's default generator if None.
        fast: follow the gradients of a copy made fast for evaluation (:func:`prepare`), which differ by rounding;
            every success is confirmed on ``model``.
        precision: torch.bfloat16 or torch.float16: follow gradients of that precision, every success confirmed on
            ``model``; iterates stay in float32. None: the model's own.

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or the model's output is not differentiable.
        TypeError: a type or dtype is wrong.
    """
    return _attack(
        "pgd", model, inputs, labels, norm=norm, eps=eps, steps=steps, step_size=step_size, loss=loss,
        random_start=random_start, restarts=restarts, keep=keep, early_stop=early_stop, bounds=bounds,
        sparsity=sparsity, targets=targets, start=start, active=active, ids=ids, generator=generator, fast=fast,
        precision=precision,
    )  # fmt: skip


def fgsm(
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm = "linf",
    eps: PerSample,
    loss: Loss = "dlr",
    keep: Keep = "best",
    bounds: Bounds = (0.0, 1.0),
    sparsity: float = 0.99,
    targets: Tensor | None = None,  # [B] int64
    active: Tensor | None = None,  # [B] bool
    fast: bool = False,
    precision: torch.dtype | None = None,
) -> Tensor:
    """One step of length ``eps`` from ``inputs`` (Goodfellow et al. 2015); arguments and errors as in :func:`pgd`."""
    return _attack(
        "fgsm", model, inputs, labels, norm=norm, eps=eps, steps=1, step_size=eps, loss=loss, random_start=False,
        restarts=1, keep=keep, early_stop=True, bounds=bounds, sparsity=sparsity, targets=targets, start=None,
        active=active, ids=None, generator=None, fast=fast, precision=precision,
    )  # fmt: skip


def _attack(
    name: str,
    model: Model,
    inputs: Tensor,  # [B, ...]
    labels: Tensor,  # [B] int64
    *,
    norm: Norm,
    eps: PerSample,
    steps: int,
    step_size: PerSample | None,
    loss: Loss,
    random_start: bool,
    restarts: int,
    keep: Keep,
    early_stop: bool,
    bounds: Bounds,
    sparsity: float,
    targets: Tensor | None,  # [B] int64
    start: Tensor | None,  # [B, ...]
    active: Tensor | None,  # [B] bool
    ids: Tensor | None,  # [B] int64
    generator: torch.Generator | None,
    fast: bool,
    precision: torch.dtype | None,
) -> Tensor:
    """The attack that the caller knows as ``name``, whose ``step_size`` is ``eps`` in "fgsm"."""
    bounds = within(inputs, bounds)
    steps, restarts = check_settings(steps, restarts, keep, early_stop, random_start, start, generator, inputs)
    check_loss(loss)
    check_norm(norm)
    sparsity = share(sparsity, "sparsity")
    finite = "where random_start is True or step_size is None" if random_start or step_size is None else ""
    eps = radius(eps, "eps", inputs, finite="as the length of a step" if name == "fgsm" else finite)
    if name == "fgsm":
        step_size = eps
    elif step_size is not None:
        step_size = length(step_size, "step_size", inputs)
    else:
        step_size = default_step(eps, steps)
    with attacked(network_of(model, inputs, fast=fast, precision=precision)) as network:
        batch = new_batch(inputs, labels, targets, eps=eps, step_size=step_size, bounds=bounds, ids=ids)
        climb = Climb(network, inputs, norm=norm, loss=loss, keep=keep, early_stop=early_stop)
        standing = batch.take(rows_of(active, inputs))
        if keep == "best" and (random_start or start is not None):
            standing = climb.without_fallen(standing)
        for _ in range(restarts):
            if len(standing) == 0:
                break
            begin = first_iterate(standing, norm, random_start, start, generator)
            standing = pgd_run(climb, standing, begin, steps, sparsity, from_inputs=not random_start and start is None)
    warn_of_lost_gradients(name, climb, stacklevel=4)
    return climb.result


def pgd_run(
    climb: Climb,
    batch: Batch,
    x: Tensor,  # [K, ...], changed
    steps: int,
    sparsity: float,
    *,
    from_inputs: bool,
) -> Batch:
    """One run of PGD from ``x``; returns the images that still stand. ``from_inputs`` as in :func:`walk`."""

    def step(batch: Batch, x: Tensor, grad: Tensor, losses: Tensor) -> None:
        if climb.norm == "l1":
            grad = free_gradient(batch, x, grad)
        ops.pgd_step_(
            x, grad, batch.x0, step_size=batch.step_size, eps=batch.eps, norm=climb.norm, bounds=batch.bounds,
            sparsity=sparsity,
        )  # fmt: skip

    return walk(climb, batch, x, steps, step, from_inputs=from_inputs)


def default_step(eps: PerSample, steps: int) -> PerSample:
    """Length of a step where none is given (Madry et al. 2018)."""
    return 2.5 * eps / max(steps, 1)


def check_settings(
    steps: int,
    restarts: int,
    keep: str,
    early_stop: bool,
    random_start: bool,
    start: Tensor | None,
    generator: torch.Generator | None,
    inputs: Tensor,
) -> tuple[int, int]:
    """``steps`` and ``restarts`` as ints; raise where the settings that gradient attacks share are wrong."""
    steps, restarts = count(steps, "steps"), count(restarts, "restarts", 1)
    check_choice(keep, "keep", ("best", "last"))
    check_generator(generator)
    flag(early_stop, "early_stop")
    flag(random_start, "random_start")
    if restarts > 1 and not random_start:
        raise ValueError("restarts above 1 need random_start=True: every run would be the same")
    if start is None:
        return steps, restarts
    if random_start:
        raise ValueError("start needs random_start=False")
    check_images(start, "start")
    if start.shape != inputs.shape or start.device != inputs.device:
        raise ValueError(
            f"start must have inputs' shape {list(inputs.shape)} and be on {inputs.device}, "
            f"got {list(start.shape)} on {start.device}"
        )
    if bool(start.isnan().any()):
        raise ValueError("start holds NaN")
    return steps, restarts


def first_iterate(
    batch: Batch,
    norm: Norm,
    random_start: bool,
    start: Tensor | None,  # [N, ...], the caller's whole batch
    generator: torch.Generator | None,
) -> Tensor:
    """Where a run begins, [K, ...]."""
    if random_start:
        return ops.random_start(
            batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds, ids=batch.ids, generator=generator
        )
    if start is None:
        return batch.x0.clone()
    begin = take(start.detach().to(batch.x0.dtype), batch.rows)
    return ops.project(begin, batch.x0, eps=batch.eps, norm=norm, bounds=batch.bounds)


def warn_of_lost_gradients(name: str, climb: Climb, stacklevel: int = 3) -> None:
    """Say so where gradient elements counted as 0 because they were not finite."""
    if bool(climb.lost_gradients):
        warnings.warn(f"{name} met gradients that are not finite; those elements counted as 0", stacklevel=stacklevel)

"""The worst case of each image over a suite of attacks."""

import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.attacks._batch import check_classes, check_inputs, check_radius, take
from fastlip.attacks._checks import AttackWarning, diagnose
from fastlip.attacks._climb import rows_where
from fastlip.attacks._distance import ORDER, distance
from fastlip.attacks._losses import succeeded
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, Network, attacked
from fastlip.attacks._passes import Passes, count_passes
from fastlip.attacks._prepare import prepare
from fastlip.attacks._progress import Progress, shower
from fastlip.attacks._suite import Attack, is_black_box
from fastlip.ops import Bounds, Norm

#: Values of :attr:`Evaluation.fell_to` for images that no attack felled.
STANDING, MISCLASSIFIED = -1, -2


@dataclass(frozen=True)
class Evaluation:
    """What a suite of attacks did to each of N images.

    Attributes:
        attacks: names of the attacks in the order in which they ran.
        clean: correctly classified as it is, [N] bool.
        robust: correctly classified, and so under every attack, [N] bool.
        fell_to: position in ``attacks`` of the attack that felled the image, [N] int64; -1: it stands, -2: it was
            misclassified to begin with.
        success: [A, N] bool; which attacks felled which image. Attacks after the first to succeed have not tried
            (unless ``every_attack``).
        adversarial: the image that felled it, else the image itself, [N, ...], on the CPU.
        passes: images that each attack sent through the model; empty where the model is no module.
        seconds: time of each attack.
        warnings: what may make the result worth less than it looks.
    """

    attacks: tuple[str, ...]
    clean: Tensor
    robust: Tensor
    fell_to: Tensor
    success: Tensor
    adversarial: Tensor
    passes: dict[str, Passes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly; NaN without images."""
        return self.clean.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Share of images that no attack felled; NaN without images."""
        return self.robust.double().mean().item()

    def accuracy_after(self, attack: str) -> float:
        """Share of images still standing once ``attack`` and all before it had run."""
        last = self.attacks.index(attack)
        fallen = self.success[: last + 1].any(0)
        return (self.clean & ~fallen).double().mean().item()

    def __str__(self) -> str:
        lines = [f"{len(self.clean)} images, clean accuracy {self.clean_accuracy:.2%}"]
        for name in self.attacks:
            line = f"after {name:<12} {self.accuracy_after(name):.2%}  {self.seconds[name]:.1f} s"
            if name in self.passes:
                passes = self.passes[name]
                line += f", {passes.forward} forward and {passes.backward} backward passes"
            lines.append(line)
        lines.append(f"robust accuracy {self.robust_accuracy:.2%}")
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def evaluate(
    model: Model,
    inputs: Tensor,  # [N, ...]
    labels: Tensor,  # [N] int64
    attacks: Mapping[str, Attack],
    *,
    norm: Norm | None = None,
    eps: float | None = None,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int = 256,
    every_attack: bool = False,
    ids: Tensor | None = None,  # [N] int64
    seed: int = 0,
    device: torch.device | str | None = None,
    fast: bool = False,
    precision: torch.dtype | None = None,
    check: bool = True,
    progress: bool | Progress = False,
) -> Evaluation:
    """Run the attacks one after another, each on the images that still stand, and judge what they return.

    An attack is called as ``attack(model, inputs, labels)`` and returns images, or a :class:`MinNormResult`; parameters
    ``ids``, ``generator``, ``fast`` and ``precision`` are passed where it has them (:func:`pgd`, :func:`apgd`,
    :func:`square`, ``functools.partial`` of them, an attack of one's own, another library's). What it returns is judged
    by the model itself in eval mode, and counts only inside the bounds and, where ``norm`` and ``eps`` are given, the
    ball. Images stay where they are until their batch is due; standing images are packed into full batches anew for
    each attack.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [N, ...], within ``bounds``, on any device.
        labels: true classes, [N] int64.
        attacks: by name, in the order in which they run; see :func:`suite`.
        norm: norm of the ball that successes are checked against; unchecked if None.
        eps: its radius.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to one image.
        batch_size: images at a time.
        every_attack: show every correctly classified image to every attack, so that each has an accuracy of its own.
        ids: [N] int64 sample ids, from which random draws follow; 0 .. N-1 if None.
        seed: of the generators: an image's draws follow from seed and id and do not depend on its batch.
        device: where the model is; that of its parameters if None, or of ``inputs``.
        fast: follow the gradients of a copy made fast for evaluation (:func:`prepare`).
        precision: as in :func:`pgd`.
        check: look for signs of unreliable results (:func:`diagnose`, and a black-box attack that fells what gradient
            attacks left standing) and warn of them.
        progress: show a bar on standard error, or a function to call with images done, images in all and the attack's
            name.

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or an attack returned something else.
        TypeError: a type or dtype is wrong.
    """
    _check_call(inputs, labels, attacks, norm, eps, ids, batch_size, bounds)
    where = torch.device(device) if device is not None else _device_of(model, inputs)
    run = _Evaluating(model, inputs, labels, where, bounds, batch_size, norm, eps, ids, seed)
    found: list[str] = []
    if check:
        few = slice(0, min(64, len(inputs)))
        found = diagnose(model, inputs[few].to(where), labels[few].to(where), bounds=bounds)
    network = model
    if fast or precision:
        network = prepare(model, inputs[:8].to(where), fast=fast, precision=precision)
    run.judge_clean()
    show = shower(progress)
    passes: dict[str, Passes] = {}
    seconds: dict[str, float] = {}
    white_box = False
    for position, (name, attack) in enumerate(attacks.items()):
        begin = time.perf_counter()
        before = int(run.robust.sum())
        counted = run.attack_all(network, attack, position, every_attack, partial(_named, show, name))
        if counted is not None:
            passes[name] = counted
        seconds[name] = time.perf_counter() - begin
        fell = before - int(run.robust.sum())
        if is_black_box(attack) and white_box and fell > _SURPRISE * len(labels):
            found.append(
                f"the black-box attack {name} felled {fell} images that the gradient attacks before it left standing: "
                "gradients may be masked"
            )
        white_box |= not is_black_box(attack)
        if run.outside:
            found.append(f"{run.outside} images that {name} returned lie outside the bounds or the ball; not counted")
    for sentence in found if check else []:
        warnings.warn(sentence, AttackWarning, stacklevel=2)
    return Evaluation(
        attacks=tuple(attacks),
        clean=run.clean,
        robust=run.robust,
        fell_to=run.fell_to,
        success=run.success[: len(attacks)],
        adversarial=run.adversarial,
        passes=passes,
        seconds=seconds,
        warnings=tuple(found),
    )


#: Share of all images that a black-box attack may fell after gradient attacks before it is worth a warning.
_SURPRISE = 0.002


class _Evaluating:
    """Images, and what became of them so far; everything that is kept stays on the CPU."""

    def __init__(
        self,
        model: Model,
        inputs: Tensor,
        labels: Tensor,
        device: torch.device,
        bounds: Bounds,
        batch_size: int,
        norm: Norm | None,
        eps: float | None,
        ids: Tensor | None,
        seed: int,
    ) -> None:
        count = len(inputs)
        self.network = prepare(model, inputs, fast=False)
        self.inputs, self.labels = inputs.detach(), labels.to(inputs.device)
        self.device, self.batch_size = device, batch_size
        self.lo, self.hi = (b.to(device) if isinstance(b, Tensor) else b for b in bounds)
        self.norm, self.eps, self.seed = norm, eps, seed
        self.ids = torch.arange(count) if ids is None else ids.cpu()
        self.clean = torch.zeros(count, dtype=torch.bool)
        self.robust = torch.zeros(count, dtype=torch.bool)
        self.fell_to = torch.full((count,), MISCLASSIFIED, dtype=torch.int64)
        self.success = torch.zeros(0, count, dtype=torch.bool)
        self.adversarial = self.inputs.cpu().clone()
        self.outside = 0

    def batches(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split(self.batch_size)) if len(rows) else []

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        there = rows.to(self.inputs.device)
        return take(self.inputs, there).to(self.device), self.labels[there].to(self.device)

    def judge_clean(self) -> None:
        for rows in self.batches(torch.arange(len(self.labels))):
            x, y = self.at(rows)
            wrong = self.wrong(x, y)
            self.clean[rows] = ~wrong.cpu()
        self.robust |= self.clean
        self.fell_to[self.clean] = STANDING

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the model decides wrongly, [K] bool."""
        with attacked(self.network), torch.no_grad():
            logits = self.network.judge(x)
            check_classes(logits, labels=y)
            return succeeded(logits, y, None)

    def attack_all(
        self, network: Model, attack: Attack, position: int, everyone: bool, show: Callable[[int, int], None]
    ) -> Passes | None:
        """Show the images to ``attack``, and count what it sent through the model."""
        self.outside = 0
        self.success = torch.cat([self.success, torch.zeros(1, len(self.labels), dtype=torch.bool)])
        todo = rows_where(self.clean if everyone else self.robust)
        counted = Passes()
        model = self.network.model
        show(0, len(todo))
        for done, rows in enumerate(self.batches(todo)):
            x, y = self.at(rows)
            generator = torch.Generator(self.device).manual_seed(self.seed + _STRIDE * position)
            offered = {"ids": self.ids[rows].to(self.device), "generator": generator}
            if isinstance(model, nn.Module):
                with count_passes(model) as passes:
                    found = _call(attack, network, x, y, offered)
                counted.forward += passes.forward
                counted.backward += passes.backward
            else:
                found = _call(attack, network, x, y, offered)
            self.take_in(rows, x, y, found, position)
            show(min((done + 1) * self.batch_size, len(todo)), len(todo))
        return counted if isinstance(model, nn.Module) else None

    def take_in(self, rows: Tensor, x: Tensor, y: Tensor, found: Tensor, position: int) -> None:
        """Judge what an attack returned for ``rows``."""
        wrong = self.wrong(found, y)
        inside = self.feasible(found, x)
        self.outside += int((wrong & ~inside).sum())
        fell = (wrong & inside).cpu()
        self.success[position, rows] = fell
        first = rows[fell & self.robust[rows]]
        self.fell_to[first] = position
        self.adversarial[first] = found[(fell & self.robust[rows]).to(found.device)].detach().to(self.adversarial)
        self.robust[rows[fell]] = False

    def feasible(self, found: Tensor, x: Tensor) -> Tensor:
        inside = ((found >= self.lo) & (found <= self.hi)).flatten(1).all(1)
        if self.norm is None or self.eps is None:
            return inside
        half_ulp = distance(torch.finfo(found.dtype).eps / 2 * found, torch.zeros_like(found), self.norm)
        return inside & (distance(found, x, self.norm) <= self.eps * (1 + 1e-5) + half_ulp)


def _named(show: Progress, name: str, done: int, total: int) -> None:
    show(done, total, name)


#: Between the seeds of an evaluation's attacks.
_STRIDE = 1_000_003


def _call(attack: Attack, network: Model, x: Tensor, y: Tensor, offered: dict[str, Any]) -> Tensor:
    try:
        known = inspect.signature(attack).parameters
    except (TypeError, ValueError):
        known = {}  # type: ignore[assignment]
    ours = "fast" in known and "precision" in known
    model = network if ours or not isinstance(network, Network) else network.model
    taken = {k: v for k, v in offered.items() if k in known}
    if isinstance(attack_keywords := getattr(attack, "keywords", None), dict):
        taken = {k: v for k, v in taken.items() if k not in attack_keywords}
    found = attack(model, x, y, **taken)
    images = found.adversarial if isinstance(found, MinNormResult) else found
    if not isinstance(images, Tensor) or images.shape != x.shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"an attack must return images of the shape {list(x.shape)}, got {got}")
    return images.detach()


def _device_of(model: Model, inputs: Tensor) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return inputs.device if first is None else first.device


def _check_call(
    inputs: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    norm: Norm | None,
    eps: float | None,
    ids: Tensor | None,
    batch_size: int,
    bounds: Bounds,
) -> None:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping from names to attacks, got {type(attacks).__name__}; see suite()")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(f"attacks must be callable, but {name!r} is of type {type(attack).__name__}")
    if (norm is None) != (eps is None):
        raise ValueError("give both norm and eps, or neither")
    if norm is not None and norm not in ORDER:
        raise ValueError(f"norm must be one of {', '.join(ORDER)}, got {norm!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_inputs(inputs, bounds)
    if isinstance(eps, Tensor):
        raise TypeError("eps must be one float for all images")
    if eps is not None:
        check_radius(eps, "eps", inputs)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise ValueError(f"labels must be an int64 tensor of shape [{len(inputs)}]")
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != labels.shape):
        raise ValueError(f"ids must be int64 of shape {list(labels.shape)}, got {ids.dtype} {list(ids.shape)}")

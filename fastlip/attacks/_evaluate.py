"""The worst case of each image over a suite of attacks."""

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip.attacks._arguments import check_images, check_model, count, flag, integer, number, radius, shown
from fastlip.attacks._batch import check_classes, differs_between_images, take, within
from fastlip.attacks._checks import AttackWarning, diagnose
from fastlip.attacks._climb import rows_where
from fastlip.attacks._distance import check_norm, distance
from fastlip.attacks._losses import succeeded
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, Network, attacked
from fastlip.attacks._passes import Passes, count_passes
from fastlip.attacks._prepare import check_precision, prepare
from fastlip.attacks._progress import Progress, shower
from fastlip.attacks._suite import Attack, is_black_box
from fastlip.ops import Bounds, Norm, PerSample

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
        """Share of images still standing once ``attack`` and all before it had run.

        Raises:
            ValueError: no attack has that name.
        """
        if attack not in self.attacks:
            raise ValueError(f"attack must be one of {', '.join(self.attacks)}, got {shown(attack)}")
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

    An attack is called as ``attack(model, inputs, labels)``, the model in eval mode, and returns images, or a
    :class:`MinNormResult`; parameters ``bounds``, ``ids``, ``generator``, ``fast`` and ``precision`` are passed where
    it has them and they are not given already (:func:`pgd`, :func:`apgd`, :func:`square`, ``functools.partial`` of
    them, an attack of one's own, another library's). Of bounds that differ between images the batch's are passed, also
    where a partial holds those of all N. What an attack is handed are copies: whatever it writes into them, its images
    are judged against the caller's.

    What it returns is brought into the dtype of ``inputs``, each element rounded towards the image's own so that no
    perturbation grows, and that is what the model itself judges in eval mode and what is kept. It counts only inside
    the bounds and, where ``norm`` and ``eps`` are given, the ball. Images stay where they are until their batch is due;
    standing images are packed into full batches anew for each attack.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [N, ...], within ``bounds``, on any device.
        labels: true classes, [N] int64.
        attacks: by name, in the order in which they run; see :func:`suite`.
        norm: norm of the ball that successes are checked against; unchecked if None.
        eps: its radius.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``, so for each image
            too.
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
    bounds = _check_call(model, inputs, labels, attacks, norm, eps, ids, bounds)
    batch_size, seed = count(batch_size, "batch_size", 1), integer(seed, "seed")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    for name, value in (("every_attack", every_attack), ("fast", fast), ("check", check)):
        flag(value, name)
    check_precision(precision)
    show = shower(progress)
    where = _device(device, model, inputs)
    run = _Evaluating(
        model, inputs, labels, where, bounds, batch_size, norm, None if eps is None else number(eps, "eps"), ids, seed
    )
    found: list[str] = []
    if check:
        few = torch.arange(min(64, len(inputs)))
        found = diagnose(model, *run.at(few), bounds=run.box(few))
    network = model
    if fast or precision:
        network = prepare(model, run.at(torch.arange(min(8, len(inputs))))[0], fast=fast, precision=precision)
    run.judge_clean()
    passes: dict[str, Passes] = {}
    seconds: dict[str, float] = {}
    white_box = False
    for position, (name, attack) in enumerate(attacks.items()):
        begin = time.perf_counter()
        before = int(run.robust.sum())
        counted = run.attack_all(network, name, attack, position, every_attack, partial(_named, show, name))
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
        self.bounds = bounds
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
        """Images and labels of ``rows``, copies where the model is."""
        there = rows.to(self.inputs.device)
        return take(self.inputs, there).to(self.device), self.labels[there].to(self.device)

    def box(self, rows: Tensor, bounds: Bounds | None = None) -> Bounds:
        """Those of ``bounds`` (the evaluation's if None) that belong to ``rows``, copies where the model is."""

        def of_rows(bound: PerSample) -> PerSample:
            if not isinstance(bound, Tensor):
                return bound
            if not differs_between_images(bound, len(self.inputs), self.inputs.dim()):
                return torch.empty_like(bound, device=self.device).copy_(bound)
            return bound[rows.to(bound.device)].to(self.device)

        lo, hi = self.bounds if bounds is None else bounds
        return of_rows(lo), of_rows(hi)

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
        self, network: Model, name: str, attack: Attack, position: int, everyone: bool, show: Callable[[int, int], None]
    ) -> Passes | None:
        """Show the images to ``attack``, and count what it sent through the model."""
        self.outside = 0
        self.success = torch.cat([self.success, torch.zeros(1, len(self.labels), dtype=torch.bool)])
        todo = rows_where(self.clean if everyone else self.robust)
        counted = Passes()
        model = self.network.model
        show(0, len(todo))
        for done, rows in enumerate(self.batches(todo)):
            if isinstance(model, nn.Module):
                with count_passes(model) as passes:
                    found = self.found_by(network, attack, rows, position)
                counted.forward += passes.forward
                counted.backward += passes.backward
            else:
                found = self.found_by(network, attack, rows, position)
            self.take_in(rows, found, name, position)
            show(min((done + 1) * self.batch_size, len(todo)), len(todo))
        return counted if isinstance(model, nn.Module) else None

    def found_by(self, network: Model, attack: Attack, rows: Tensor, position: int) -> object:
        """What ``attack`` returns for ``rows``."""
        try:
            known = inspect.signature(attack).parameters
        except (TypeError, ValueError):
            known = {}  # type: ignore[assignment]
        given = getattr(attack, "keywords", None)
        given = given if isinstance(given, dict) else {}
        offered: dict[str, Any] = {}
        if "ids" in known and "ids" not in given:
            offered["ids"] = self.ids[rows].to(self.device)
        if "generator" in known and "generator" not in given:
            offered["generator"] = torch.Generator(self.device).manual_seed(self.seed + _STRIDE * position)
        if "bounds" in known:
            bounds = given.get("bounds")
            if bounds is None or _is_pair(bounds):
                offered["bounds"] = self.box(rows, bounds)
        ours = "fast" in known and "precision" in known
        model = network if ours or not isinstance(network, Network) else network.model
        with attacked(self.network):
            return attack(model, *self.at(rows), **offered)

    def take_in(self, rows: Tensor, found: object, name: str, position: int) -> None:
        """Judge what an attack returned for ``rows``, beside images and labels that it has not had in its hands."""
        x, y = self.at(rows)
        kept = _rounded(_images_of(found, x, name), x)
        wrong = self.wrong(kept, y)
        inside = self.feasible(kept, x, self.box(rows))
        self.outside += int((wrong & ~inside).sum())
        fell = (wrong & inside).cpu()
        self.success[position, rows] = fell
        first = rows[fell & self.robust[rows]]
        self.fell_to[first] = position
        self.adversarial[first] = kept[(fell & self.robust[rows]).to(kept.device)].cpu()
        self.robust[rows[fell]] = False

    def feasible(self, found: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        lo, hi = bounds
        inside = ((found >= lo) & (found <= hi)).flatten(1).all(1)
        if self.norm is None or self.eps is None:
            return inside
        half_ulp = distance(torch.finfo(found.dtype).eps / 2 * found, torch.zeros_like(found), self.norm)
        return inside & (distance(found, x, self.norm) <= self.eps * (1 + 1e-5) + half_ulp)


def _is_pair(bounds: object) -> bool:
    """Whether these are bounds as fastlip has them, of which there may be a pair for each image."""
    return isinstance(bounds, Sequence) and len(bounds) == 2 and any(isinstance(b, Tensor) for b in bounds)


def _images_of(found: object, x: Tensor, name: str) -> Tensor:
    """The images that the attack ``name`` returned for ``x``."""
    images = found.adversarial if isinstance(found, MinNormResult) else found
    if not isinstance(images, Tensor) or images.shape != x.shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"attacks: {name!r} must return images of the shape {list(x.shape)}, got {got}")
    if not images.is_floating_point():
        raise ValueError(f"attacks: {name!r} must return images of floating-point numbers, got {images.dtype}")
    return images.detach().to(x.device)


def _rounded(found: Tensor, x: Tensor) -> Tensor:
    """``found`` in the dtype of ``x``, each element rounded towards x's, so that none leaves a ball or a box by it."""
    if found.dtype == x.dtype:
        return found
    near = found.to(x.dtype)
    beyond = (near.double() - x.double()).abs() > (found.double() - x.double()).abs()
    # On the CPU, where every dtype has it.
    return torch.where(beyond, torch.nextafter(near.cpu(), x.cpu()).to(x.device), near)


def _named(show: Progress, name: str, done: int, total: int) -> None:
    show(done, total, name)


#: Between the seeds of an evaluation's attacks.
_STRIDE = 1_000_003


def _device(device: torch.device | str | None, model: Model, inputs: Tensor) -> torch.device:
    """Where the model is."""
    if device is None:
        return _device_of(model.model if isinstance(model, Network) else model, inputs)
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device, its name or None, got {shown(device)}") from error


def _device_of(model: Model, inputs: Tensor) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return inputs.device if first is None else first.device


def _check_call(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    norm: Norm | None,
    eps: float | None,
    ids: Tensor | None,
    bounds: Bounds,
) -> Bounds:
    """The bounds, beside ``inputs``."""
    check_model(model)
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping from names to attacks, got {type(attacks).__name__}; see suite()")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(f"attacks must be callable, but {name!r} is of type {type(attack).__name__}")
    if (norm is None) != (eps is None):
        raise ValueError("give both norm and eps, or neither")
    check_images(inputs)
    if norm is not None:
        check_norm(norm)
    if isinstance(eps, Tensor) and eps.dim() > 0:
        raise TypeError("eps must be one float for all images")
    if eps is not None:
        radius(eps, "eps", inputs)
    for what, values in (("labels", labels), ("ids", ids)):
        if what == "labels" or values is not None:
            if not isinstance(values, Tensor) or values.dtype != torch.int64:
                raise TypeError(f"{what} must be a torch.int64 tensor of shape [{len(inputs)}], got {shown(values)}")
            if values.shape != inputs.shape[:1]:
                raise ValueError(f"{what} must be of shape [{len(inputs)}], got {list(values.shape)}")
    if isinstance(bounds, tuple) and len(bounds) == 2:
        lo, hi = (b.to(inputs.device) if isinstance(b, Tensor) else b for b in bounds)
        bounds = lo, hi
    return within(inputs, bounds)

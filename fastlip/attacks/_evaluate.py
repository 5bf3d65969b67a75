"""The worst case of each image over a suite of attacks."""

import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip import ops
from fastlip.attacks._arguments import (
    INTEGERS,
    check_classes,
    check_images,
    check_model,
    check_norm,
    check_precision,
    checked_inputs,
    count,
    flag,
    number,
    radius,
    shown,
)
from fastlip.attacks._batch import differs_between_images, rows_where, take
from fastlip.attacks._counts import PassCounts, can_be_counted, count_forward_backward
from fastlip.attacks._diagnose import AttackWarning, diagnose
from fastlip.attacks._distance import distance
from fastlip.attacks._evaluation_result import MISCLASSIFIED, ROBUST, EvaluationResult
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, Network, NotDifferentiable, eval_mode
from fastlip.attacks._precision import Precision
from fastlip.attacks._prepare import prepare
from fastlip.attacks._progress import Progress, progress_of
from fastlip.attacks._quantize import Grid, grid_of
from fastlip.attacks._saved import SavedState
from fastlip.attacks._suite import Attack, is_black_box, suite
from fastlip.ops import Bounds, Norm, PerSample


def evaluate(
    model: Model,
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]],  # [N, ...]
    labels: Tensor | None = None,  # [N] int64
    attacks: Mapping[str, Attack] | None = None,
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
    precision: Precision = None,
    draws: int = 1,
    eot: int = 1,
    quantize: int | None = None,
    check: bool = True,
    progress: bool | Progress = False,
    state: str | os.PathLike[str] | None = None,
) -> EvaluationResult:
    """Run the attacks one after another, each on the images that are still robust, and judge what they return.

    An attack is called as ``attack(model, inputs, labels)`` with the model in eval mode, and returns images or a
    :class:`MinNormResult`. It may be one of ours (:func:`pgd`, :func:`apgd`, :func:`square`, a ``functools.partial`` of
    them), an attack of one's own or another library's. Where it has parameters ``bounds``, ``ids`` or ``generator``
    that are not given already, they are passed. Of bounds that differ between images it gets those of its batch, even
    where a partial holds those of all N images. All its arguments are copies: whatever it writes into them, its images
    are judged against the caller's.

    The images that an attack returns are converted to the dtype of ``inputs``, each element rounded towards the
    original image so that no perturbation grows. These converted images are judged, by the model itself in eval mode,
    and kept. They count only inside the bounds and, where ``norm`` and ``eps`` are given, inside the ball. Images stay
    on their device until their batch is due, and the robust ones are packed into full batches again for each attack.

    An attack that needs gradients which the model does not have is left out, with a warning; if no other is left, its
    error is raised.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [N, ...], within ``bounds``, on any device; or, without ``labels``, batches of images and
            labels, such as a DataLoader has, which are gathered.
        labels: true classes, [N] int64.
        attacks: by name, in the order in which they run; see :func:`suite`, whose standard one it is if None.
        norm: norm of the ball that successes are checked against; no ball is checked if None.
        eps: radius of that ball.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``, which may differ
            between images.
        batch_size: number of images in a batch.
        every_attack: run every attack on every correctly classified image, so that each attack has an accuracy of its
            own.
        ids: [N] int64 sample ids, which determine the random draws together with the seed; 0 .. N-1 if None.
        seed: seed of the generators; an image's draws depend on seed and id and not on its batch.
        device: the device of the model; if None that of its parameters, or of ``inputs`` where it has none.
        fast: follow the gradients of a copy made fast for evaluation (:func:`prepare`).
        precision: as in :func:`pgd`.
        draws: passes whose mean probabilities decide, for a model with random outputs, as in :func:`prepare`.
        eot: passes whose mean gradients our attacks follow, as in :func:`prepare`.
        quantize: bits of a value, as in :func:`pgd`. Attacks that take it get it, what the others return is rounded
            within the ball (the box, if no ball is checked), and all is judged afterwards.
        check: look for signs of unreliable results (:func:`diagnose`, and a black-box attack that succeeds where
            gradient attacks failed) and warn of them.
        progress: True shows a bar for each attack on standard error (needs tqdm); a function is called with the images
            done, the images in all and the attack's name.
        state: a file that keeps the results after each attack, and once a minute while one runs. Where it exists the
            evaluation goes on from there; it is refused where it belongs to other images, attacks (by their names and
            the options of a ``functools.partial``), settings or, by its weights and its decisions on the images
            themselves, to another model.

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or an attack returned something else.
        TypeError: a type or dtype is wrong.
    """
    if not isinstance(inputs, Tensor) or labels is None:
        inputs, labels = _gathered(inputs, labels)
    if attacks is None and norm is not None and eps is not None:
        attacks = suite(norm=norm, eps=eps, bounds=bounds)
    attacks = _checked_attacks(attacks)
    inputs, labels, ids, bounds = _check_arguments(model, inputs, labels, norm, eps, ids, bounds)
    batch_size, seed = count(batch_size, "batch_size", 1), count(seed, "seed", -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    for name, value in (("every_attack", every_attack), ("fast", fast), ("check", check)):
        flag(value, name)
    check_precision(precision)
    draws, eot = count(draws, "draws", 1), count(eot, "eot", 1)
    grid = grid_of(quantize, inputs, bounds)
    show = progress_of(progress)
    where = _device(device, model, inputs)
    eps = None if eps is None else number(eps, "eps")
    judge = prepare(model, inputs, fast=False, draws=draws)
    run = _SuiteRun(judge, inputs, labels, where, bounds, batch_size, norm, eps, ids, seed, quantize, grid)
    saved = SavedState(
        state,
        (
            inputs,
            labels,
            run.ids,
            *bounds,
            batch_size,
            norm,
            eps,
            seed,
            draws,
            eot,
            quantize,
            every_attack,
            *map(_described, attacks.items()),
        ),
        judge.model,
    )
    few = run.batches(torch.arange(len(inputs)))[:1]
    run.judge_clean()
    network = judge
    if few and (fast or precision or eot > 1):
        network = prepare(
            model, run.at(few[0])[0], fast=fast, precision=precision, draws=draws, eot=eot, same_size=judge.same_size
        )
        network.largest = judge.largest
    if (known := saved.load()) is not None:
        run.restore(known)
    elif check and few:
        run.found = diagnose(judge, *run.at(few[0]), bounds=run.box(few[0]))
    for position, (name, attack) in enumerate(attacks.items()):
        if position < run.position:
            continue
        try:
            run.attack_all(network, name, attack, every_attack, partial(_named, show, name), saved)
        except NotDifferentiable:
            if position == len(attacks) - 1 and not run.ran:
                raise
            run.leave_out(name)
        else:
            run.finish(name, attack)
        saved.save(run.state, now=True)
    for sentence in run.found if check else []:
        warnings.warn(sentence, AttackWarning, stacklevel=2)
    return EvaluationResult(
        attacks=tuple(run.ran),
        clean=run.clean,
        robust=run.robust,
        first_success=run.first_success,
        success=run.success,
        adversarial=run.adversarial,
        counts=run.counts,
        seconds=run.seconds,
        warnings=tuple(run.found),
    )


#: Share of all images on which a black-box attack may succeed after gradient attacks without a warning.
_SURPRISE = 0.002


class _SuiteRun:
    """The images of an evaluation and the results so far; all results are kept on the CPU."""

    def __init__(
        self,
        network: Network,
        inputs: Tensor,
        labels: Tensor,
        device: torch.device,
        bounds: Bounds,
        batch_size: int,
        norm: Norm | None,
        eps: float | None,
        ids: Tensor | None,
        seed: int,
        quantize: int | None,
        grid: Grid | None,
    ) -> None:
        count = len(inputs)
        self.network = network
        self.inputs, self.labels = inputs.detach(), labels.to(inputs.device)
        self.device, self.batch_size = device, batch_size
        self.bounds = bounds
        self.norm, self.eps, self.seed = norm, eps, seed
        self.quantize, self.grid = quantize, grid
        self.ids = torch.arange(count) if ids is None else ids.cpu()
        self.clean = torch.zeros(count, dtype=torch.bool)
        self.robust = torch.zeros(count, dtype=torch.bool)
        self.first_success = torch.full((count,), MISCLASSIFIED, dtype=torch.int64)
        self.success = torch.zeros(0, count, dtype=torch.bool)
        self.adversarial = self.inputs.cpu().clone()
        self.ran: list[str] = []
        self.counts: dict[str, PassCounts] = {}
        self.seconds: dict[str, float] = {}
        self.found: list[str] = []
        self.white_box = False
        # Of the attack at hand: its position, the images that it is to try, how many it has, and what came of them.
        self.position = 0
        self.todo: Tensor | None = None
        self._begin_attack()

    def _begin_attack(self) -> None:
        self.todo, self.done = None, 0
        self.fallen = torch.zeros(len(self.labels), dtype=torch.bool)
        self.outside = self.successes = 0
        self.passes, self.took = PassCounts(), 0.0

    def state(self) -> dict[str, Any]:
        """All results so far, as :func:`torch.load` takes them."""
        kept = {name: getattr(self, name) for name in _STATE}
        counts = {name: (c.forward, c.backward) for name, c in self.counts.items()}
        return kept | {"counts": counts, "passes": (self.passes.forward, self.passes.backward)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over results of an earlier call on the same model.

        Raises:
            ValueError: the model decides differently on the images themselves.
        """
        if not torch.equal(state["clean"], self.clean):
            raise ValueError("state belongs to another model: it decides differently on some images")
        for name in _STATE:
            setattr(self, name, state[name])
        self.counts = {name: PassCounts(*counts) for name, counts in state["counts"].items()}
        self.passes = PassCounts(*state["passes"])

    def batches(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split(self.batch_size)) if len(rows) else []

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the images and labels of ``rows`` on the model's device."""
        there = rows.to(self.inputs.device)
        return take(self.inputs, there).to(self.device), self.labels[there].to(self.device)

    def box(self, rows: Tensor, bounds: Bounds | None = None) -> Bounds:
        """Copies of the ``bounds`` (the evaluation's if None) of ``rows`` on the model's device."""

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
        self.first_success[self.clean] = ROBUST

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the model decides wrongly, [K] bool."""
        with eval_mode(self.network), torch.no_grad():
            logits = self.network.judge(x)
            check_classes(logits, labels=y)
            return ops.judge(logits, y).adversarial

    def attack_all(
        self,
        network: Network,
        name: str,
        attack: Attack,
        everyone: bool,
        show: Callable[[int, int], None],
        saved: SavedState,
    ) -> None:
        """Run ``attack`` on the images that it has yet to try, and count those that it sends through the model."""
        begin = time.perf_counter() - self.took
        if self.todo is None:
            self.todo = rows_where(self.clean if everyone else self.robust)
        model, total = self.network.model, len(self.todo)
        watched = can_be_counted(model)
        show(0, total)
        for rows in self.batches(self.todo[self.done :]):
            if watched:
                with count_forward_backward(model) as counts:  # type: ignore[arg-type]  # it can be counted
                    found = self.found_by(network, attack, rows)
                self.passes.forward += counts.forward
                self.passes.backward += counts.backward
            else:
                found = self.found_by(network, attack, rows)
            self.record(rows, found, name)
            self.done += len(rows)
            self.took = time.perf_counter() - begin
            saved.save(self.state, now=False)
            show(self.done, total)

    def finish(self, name: str, attack: Attack) -> None:
        """Enter the results of an attack that has tried all its images."""
        self.success = torch.cat([self.success, self.fallen[None]])
        self.ran.append(name)
        self.seconds[name] = self.took
        if can_be_counted(self.network.model):
            self.counts[name] = self.passes
        if is_black_box(attack) and self.white_box and self.successes > _SURPRISE * len(self.labels):
            self.found.append(
                f"the black-box attack {name} succeeded on {self.successes} images that were robust to the gradient "
                "attacks before it: gradients may be masked"
            )
        self.white_box |= not is_black_box(attack)
        if self.outside:
            self.found.append(
                f"{self.outside} images that {name} returned lie outside the bounds or the ball; not counted"
            )
        self.position += 1
        self._begin_attack()

    def leave_out(self, name: str) -> None:
        """Go on without an attack that the model gives no gradients."""
        self.found.append(f"{name} was left out: it needs gradients, which the model does not have")
        self.position += 1
        self._begin_attack()

    def found_by(self, network: Network, attack: Attack, rows: Tensor) -> object:
        """The result of ``attack`` for ``rows``."""
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
            offered["generator"] = torch.Generator(self.device).manual_seed(self.seed + _STRIDE * self.position)
        if "bounds" in known:
            bounds = given.get("bounds")
            if bounds is None or _is_pair(bounds):
                offered["bounds"] = self.box(rows, bounds)
        if self.grid is not None and "quantize" in known and "quantize" not in given:
            offered["quantize"] = self.quantize
        ours = "fast" in known and "precision" in known
        model: Model = network if ours and _is_more_than_its_model(network) else network.model
        with eval_mode(self.network):
            return attack(model, *self.at(rows), **offered)

    def record(self, rows: Tensor, found: object, name: str) -> None:
        """Judge the result of an attack for ``rows`` against images and labels that it had no access to."""
        x, y = self.at(rows)
        kept = _rounded(_images_of(found, x, name), x)
        if self.grid is not None:
            eps, norm = self.eps, self.norm
            if eps is None or norm is None:
                eps, norm = torch.inf, "linf"
            kept = self.grid.rounded(kept, x, eps=eps, norm=norm, bounds=self.box(rows))
        wrong = self.wrong(kept, y)
        inside = self.feasible(kept, x, self.box(rows))
        self.outside += int((wrong & ~inside).sum())
        success = (wrong & inside).cpu()
        self.fallen[rows] = success
        is_first = success & self.robust[rows]
        self.successes += int(is_first.sum())
        self.first_success[rows[is_first]] = len(self.success)
        self.adversarial[rows[is_first]] = kept[is_first.to(kept.device)].cpu()
        self.robust[rows[success]] = False

    def feasible(self, found: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        lo, hi = bounds
        inside = ((found >= lo) & (found <= hi)).flatten(1).all(1)
        if self.norm is None or self.eps is None:
            return inside
        half_ulp = distance(torch.finfo(found.dtype).eps / 2 * found, torch.zeros_like(found), self.norm)
        return inside & (distance(found, x, self.norm) <= self.eps * (1 + 1e-5) + half_ulp)


#: What an evaluation keeps in a file, beside the counts.
_STATE = (
    "clean", "robust", "first_success", "success", "adversarial", "ran", "seconds", "found", "white_box", "position",
    "todo", "done", "fallen", "outside", "successes", "took",
)  # fmt: skip


def _described(entry: tuple[str, Attack]) -> tuple[Any, ...]:
    """What tells an attack from others, in another process too: its names, and the options of a partial."""
    name, attack = entry
    function = attack.func if isinstance(attack, partial) else attack
    options = attack.keywords if isinstance(attack, partial) else {}
    return name, getattr(function, "__qualname__", type(function).__qualname__), options


def _is_more_than_its_model(network: Network) -> bool:
    """Whether an attack of ours is to get the network, whatever copy it is told to make itself."""
    return not network.exact or network.same_size


def _is_pair(bounds: object) -> bool:
    """Whether these are bounds in fastlip's form with a tensor, which may hold a value for each image."""
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
    """``found`` in the dtype of ``x``, each element rounded towards x's, so that rounding leaves no ball or box."""
    if found.dtype == x.dtype:
        return found
    near = found.to(x.dtype)
    beyond = (near.double() - x.double()).abs() > (found.double() - x.double()).abs()
    # On the CPU, where nextafter exists for every dtype.
    return torch.where(beyond, torch.nextafter(near.cpu(), x.cpu()).to(x.device), near)


def _named(show: Progress, name: str, done: int, total: int) -> None:
    show(done, total, name)


#: Difference between the seeds of consecutive attacks.
_STRIDE = 1_000_003


def _device(device: torch.device | str | None, model: Model, inputs: Tensor) -> torch.device:
    """The model's device."""
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


def _check_arguments(
    model: Model,
    inputs: Tensor,
    labels: Tensor,
    norm: Norm | None,
    eps: float | None,
    ids: Tensor | None,
    bounds: Bounds,
) -> tuple[Tensor, Tensor, Tensor | None, Bounds]:
    """Raise where an argument is wrong; return images, labels, ids and bounds, these on the device of ``inputs``."""
    check_model(model)
    if (norm is None) != (eps is None):
        raise ValueError("give both norm and eps, or neither")
    check_images(inputs)
    if norm is not None:
        check_norm(norm)
    if isinstance(eps, Tensor) and eps.dim() > 0:
        raise TypeError("eps must be one float for all images")
    if eps is not None:
        radius(eps, "eps", inputs)
    labels = _of_all(labels, "labels", inputs)
    ids = None if ids is None else _of_all(ids, "ids", inputs)
    if isinstance(bounds, tuple) and len(bounds) == 2:
        lo, hi = (b.to(inputs.device) if isinstance(b, Tensor) else b for b in bounds)
        bounds = lo, hi
    inputs, bounds = checked_inputs(inputs, bounds)
    return inputs, labels, ids, bounds


def _checked_attacks(attacks: Any) -> Mapping[str, Attack]:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping from names to attacks, got {type(attacks).__name__}; see suite()")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(f"attacks must be callable, but {name!r} is of type {type(attack).__name__}")
    return attacks


def _gathered(batches: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """All images [N, ...] and labels [N] of a DataLoader or another source of batches, on the CPU."""
    if labels is not None:
        check_images(batches)
    if isinstance(batches, (Tensor, str)) or not isinstance(batches, Iterable):
        what = "labels must be given with" if isinstance(batches, Tensor) else "inputs must be a tensor or batches, not"
        raise TypeError(f"{what} {shown(batches)}")
    images, labels = [], []
    for batch in batches:
        if not isinstance(batch, Sequence) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch[:2]):
            raise TypeError("inputs must be batches (images, labels, ...) of tensors where no labels are given")
        images.append(batch[0].cpu())
        labels.append(batch[1].cpu())
    if not images:
        raise ValueError("inputs hold no batch")
    return torch.cat(images), torch.cat(labels)


def _of_all(values: Any, what: str, inputs: Tensor) -> Tensor:
    """``values`` as int64 on their own device, [N]."""
    if not isinstance(values, Tensor) or values.dtype not in INTEGERS:
        raise TypeError(f"{what} must be a tensor of integers of shape [{len(inputs)}], got {shown(values)}")
    if values.shape != inputs.shape[:1]:
        raise ValueError(f"{what} must be of shape [{len(inputs)}], got {list(values.shape)}")
    return values.long()

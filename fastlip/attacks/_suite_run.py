"""The attacks of an evaluation on images that fit into memory together, and what they find on all images."""

import contextlib
import inspect
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastlip.attacks._arguments import check_classes
from fastlip.attacks._batch import differs_between_images, rows_where, take
from fastlip.attacks._counts import PassCounts, can_be_counted, count_forward_backward
from fastlip.attacks._criterion import Criterion, fooled
from fastlip.attacks._distance import distance
from fastlip.attacks._evaluation_result import MISCLASSIFIED, ROBUST, EvaluationResult
from fastlip.attacks._min_norm import MinNormResult
from fastlip.attacks._model import Model, Network, NotDifferentiable, eval_mode
from fastlip.attacks._quantize import Grid
from fastlip.attacks._suite import Attack, is_black_box
from fastlip.ops import Bounds, Norm, PerSample

#: Difference between the seeds of consecutive attacks.
_STRIDE = 1_000_003
#: Share of all images on which a black-box attack may succeed after gradient attacks without a warning.
_SURPRISE = 0.002
#: Called with the images done and the images in all.
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class Images:
    """Images of an evaluation, with all that belongs to each of them."""

    inputs: Tensor  # [N, ...]
    labels: Tensor  # [N] int64
    ids: Tensor  # [N] int64
    bounds: Bounds  # floats, or tensors that broadcast to inputs
    grid: Grid | None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Rules:
    """How attacks run and what counts, whatever the images are."""

    device: torch.device
    batch_size: int
    norm: Norm | None
    eps: float | None
    seed: int
    quantize: int | None
    every_attack: bool
    criterion: Criterion | None


class SuiteRun:
    """The images of an evaluation that are in memory and what is known of them; all results are kept on the CPU.

    Attributes:
        clean: whether an image itself is classified correctly, [N] bool.
        robust: whether it remains so under every attack so far, [N] bool.
        first_success: position of the first attack that succeeded, [N] int64, as in :class:`EvaluationResult`, but
            among all attacks.
        success: which attacks succeeded, [A, N] bool.
        adversarial: the image of the first success, else the image itself, [N, ...].
        left_out: names of the attacks that need gradients which the model does not have.
        outside: images by the attack that brought them outside the bounds or the ball.
        broken: images that were robust by the attack that succeeded on them first.
        counts: images that each attack sent through the model.
        seconds: time that each attack took.
    """

    def __init__(self, network: Network, images: Images, rules: Rules, attacks: Mapping[str, Attack]) -> None:
        count = len(images)
        self.network, self.images, self.rules, self.attacks = network, images, rules, attacks
        self.inputs, self.labels = images.inputs.detach(), images.labels.to(images.inputs.device)
        self.ids = images.ids.cpu()
        self.clean = torch.zeros(count, dtype=torch.bool)
        self.robust = torch.zeros(count, dtype=torch.bool)
        self.first_success = torch.full((count,), MISCLASSIFIED, dtype=torch.int64)
        self.success = torch.zeros(len(attacks), count, dtype=torch.bool)
        self.adversarial = self.inputs.cpu().clone()
        self.left_out: list[str] = []
        self.outside: dict[str, int] = {}
        self.broken: dict[str, int] = {}
        self.counts: dict[str, PassCounts] = {}
        self.seconds: dict[str, float] = {}
        # Of the attack at hand: its position, the images that it is to try, and how many it has.
        self.position = 0
        self.todo: Tensor | None = None
        self.done = 0

    def state(self) -> dict[str, Any]:
        """All results so far, as :func:`torch.load` takes them."""
        return {name: getattr(self, name) for name in _STATE} | {"counts": _as_pairs(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over results of an earlier call on the same model.

        Raises:
            ValueError: the model decides differently on the images themselves, or there are other images.
        """
        if len(state["clean"]) != len(self.clean):
            raise ValueError("state belongs to other images: there are more of them, or fewer")
        check_same_decisions(state["clean"], self.clean)
        for name in _STATE:
            setattr(self, name, state[name])
        self.counts = _as_counts(state["counts"])

    def batches(self, rows: Tensor) -> list[Tensor]:
        """``rows`` in batches, each [K] int64."""
        return list(rows.split(self.rules.batch_size)) if len(rows) else []

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the images and labels of ``rows`` on the model's device."""
        there = rows.to(self.inputs.device)
        return take(self.inputs, there).to(self.rules.device), self.labels[there].to(self.rules.device)

    def box(self, rows: Tensor, bounds: Bounds | None = None) -> Bounds:
        """Copies of the ``bounds`` (the evaluation's if None) of ``rows`` on the model's device."""

        def of_rows(bound: PerSample) -> PerSample:
            if not isinstance(bound, Tensor):
                return bound
            if not differs_between_images(bound, len(self.inputs), self.inputs.dim()):
                return torch.empty_like(bound, device=self.rules.device).copy_(bound)
            return bound[rows.to(bound.device)].to(self.rules.device)

        lo, hi = self.images.bounds if bounds is None else bounds
        return of_rows(lo), of_rows(hi)

    def judge_clean(self) -> None:
        """Find out which images are classified correctly."""
        for rows in self.batches(torch.arange(len(self.labels))):
            x, y = self.at(rows)
            self.clean[rows] = ~self.wrong(x, y).cpu()
        self.robust |= self.clean
        self.first_success[self.clean] = ROBUST

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the model decides wrongly, or is fooled by the criterion, [K] bool."""
        with eval_mode(self.network), torch.no_grad():
            logits = self.network.judge(x)
            check_classes(logits, labels=y)
            return fooled(self.rules.criterion, logits, y)

    def run(self, network: Network, show: Callable[[int, int, str], None], save: Callable[[bool], None]) -> None:
        """Run the attacks that have not been run, and save what they find after each one.

        Args:
            network: what our own attacks are given.
            show: called with the images done, the images in all and the attack's name.
            save: called after each batch with False, and after each attack with True.

        Raises:
            NotDifferentiable: the model has no gradients, and no attack runs without them.
        """
        for position, (name, attack) in enumerate(self.attacks.items()):
            if position < self.position:
                continue
            try:
                self._attack_all(network, name, attack, partial(_named, show, name), save)
            except NotDifferentiable:
                if len(self.left_out) == len(self.attacks) - 1:
                    raise
                self.left_out.append(name)
            self.position, self.todo, self.done = position + 1, None, 0
            save(True)

    def _attack_all(
        self, network: Network, name: str, attack: Attack, show: Show, save: Callable[[bool], None]
    ) -> None:
        """Run ``attack`` on the images that it has yet to try, and count those that it sends through the model."""
        begin = time.perf_counter() - self.seconds.get(name, 0.0)
        if self.todo is None:
            self.todo = rows_where(self.clean if self.rules.every_attack else self.robust)
        model, total = self.network.model, len(self.todo)
        watched = model if can_be_counted(model) else None
        show(0, total)
        for rows in self.batches(self.todo[self.done :]):
            if watched is not None:
                with count_forward_backward(watched) as counts:
                    found = self._found_by(network, attack, rows)
                so_far = self.counts.setdefault(name, PassCounts())
                so_far.forward += counts.forward
                so_far.backward += counts.backward
            else:
                found = self._found_by(network, attack, rows)
            self._record(rows, found, name)
            self.done += len(rows)
            self.seconds[name] = time.perf_counter() - begin
            save(False)
            show(self.done, total)
        self.seconds[name] = time.perf_counter() - begin
        if watched is not None:
            self.counts.setdefault(name, PassCounts())

    def _found_by(self, network: Network, attack: Attack, rows: Tensor) -> object:
        """The result of ``attack`` for ``rows``."""
        known: Container[str] = ()
        with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
            known = inspect.signature(attack).parameters
        given = getattr(attack, "keywords", None)
        given = given if isinstance(given, dict) else {}
        rules = self.rules
        offered: dict[str, Any] = {}
        if "ids" in known and "ids" not in given:
            offered["ids"] = self.ids[rows].to(rules.device)
        if "generator" in known and "generator" not in given:
            offered["generator"] = torch.Generator(rules.device).manual_seed(rules.seed + _STRIDE * self.position)
        if "bounds" in known and (bounds := self._bounds_for(given.get("bounds"), rows)) is not None:
            offered["bounds"] = bounds
        if self.images.grid is not None and "quantize" in known and "quantize" not in given:
            offered["quantize"] = rules.quantize
        if rules.criterion is not None and "criterion" in known and "criterion" not in given:
            offered["criterion"] = rules.criterion
        ours = "fast" in known and "precision" in known
        # From the network Square learns how large a batch may be, unless it makes a network of its own.
        asks_much = is_black_box(attack) and not given.get("fast") and given.get("precision") is None
        model: Model = network if ours and (_is_more_than_its_model(network) or asks_much) else network.model
        with eval_mode(self.network):
            return attack(model, *self.at(rows), **offered)

    def _bounds_for(self, own: Any, rows: Tensor) -> Bounds | None:
        """The bounds of ``rows`` for an attack that has bounds of its own: what lies within both; None to leave it its.

        Only what lies within the evaluation's counts, so that an attack which went beyond would be a weaker one.
        """
        box = self.box(rows)
        if own is None:
            return box
        if not _is_pair(own):
            return None
        if not any(isinstance(b, Tensor) for b in (*own, *box)) and box[0] <= own[0] and own[1] <= box[1]:
            return None
        low, high = self.box(rows, own)
        return _of_both(box[0], low, max), _of_both(box[1], high, min)

    def _record(self, rows: Tensor, found: object, name: str) -> None:
        """Judge the result of an attack for ``rows`` against images and labels that it had no access to."""
        x, y = self.at(rows)
        kept = _rounded(_images_of(found, x, name), x)
        if self.images.grid is not None:
            eps, norm = self.rules.eps, self.rules.norm
            if eps is None or norm is None:
                eps, norm = torch.inf, "linf"
            kept = self.images.grid.rounded(kept, x, eps=eps, norm=norm, bounds=self.box(rows))
        wrong = self.wrong(kept, y)
        inside = self._feasible(kept, x, self.box(rows))
        success = (wrong & inside).cpu()
        is_first = success & self.robust[rows]
        self.outside[name] = self.outside.get(name, 0) + int((wrong & ~inside).sum())
        self.broken[name] = self.broken.get(name, 0) + int(is_first.sum())
        self.success[self.position, rows] = success
        self.first_success[rows[is_first]] = self.position
        self.adversarial[rows[is_first]] = kept[is_first.to(kept.device)].cpu()
        self.robust[rows[success]] = False

    def _feasible(self, found: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        lo, hi = bounds
        inside = ((found >= lo) & (found <= hi)).flatten(1).all(1)
        if self.rules.norm is None or self.rules.eps is None:
            return inside
        half_ulp = distance(torch.finfo(found.dtype).eps / 2 * found, torch.zeros_like(found), self.rules.norm)
        return inside & (distance(found, x, self.rules.norm) <= self.rules.eps * (1 + 1e-5) + half_ulp)


#: What a run keeps in a file, beside the counts.
_STATE = (
    "clean", "robust", "first_success", "success", "adversarial", "left_out", "outside", "broken", "seconds",
    "position", "todo", "done",
)  # fmt: skip
#: What is kept of the images of a run once all attacks are done with them.
_OF_IMAGES = ("clean", "robust", "first_success", "success")


class Totals:
    """Results of the images that all attacks are done with, one run after another."""

    def __init__(self, attacks: Mapping[str, Attack]) -> None:
        self.attacks = attacks
        self.parts: dict[str, list[Tensor]] = {name: [] for name in _OF_IMAGES}
        self.adversarial: Tensor | None = None
        self.left_out: set[str] = set()
        self.outside: dict[str, int] = dict.fromkeys(attacks, 0)
        self.broken: dict[str, int] = dict.fromkeys(attacks, 0)
        self.counts: dict[str, PassCounts] = {}
        self.seconds: dict[str, float] = dict.fromkeys(attacks, 0.0)
        self.found: list[str] = []

    def __len__(self) -> int:
        return sum(map(len, self.parts["clean"]))

    def add(self, run: SuiteRun, *, keep: bool) -> None:
        """Take over the results of ``run``, and its adversarial images where they are to be kept."""
        for name, parts in self.parts.items():
            parts.append(getattr(run, name))
        if keep:
            self.adversarial = run.adversarial
        self.left_out |= set(run.left_out)
        for name in self.attacks:
            self.outside[name] += run.outside.get(name, 0)
            self.broken[name] += run.broken.get(name, 0)
            self.seconds[name] += run.seconds.get(name, 0.0)
            if name in run.counts:
                total, more = self.counts.setdefault(name, PassCounts()), run.counts[name]
                total.forward += more.forward
                total.backward += more.backward

    def state(self) -> dict[str, Any]:
        """All results so far, as :func:`torch.load` takes them."""
        return {
            "parts": self._joined(), "adversarial": self.adversarial, "left_out": sorted(self.left_out),
            "outside": self.outside, "broken": self.broken, "seconds": self.seconds, "counts": _as_pairs(self.counts),
            "found": self.found,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the results of an earlier call."""
        for name, t in state["parts"].items():
            self.parts[name] = [t]
        self.counts, self.left_out = _as_counts(state["counts"]), set(state["left_out"])
        for name in ("adversarial", "outside", "broken", "seconds", "found"):
            setattr(self, name, state[name])

    def clean(self) -> Tensor:
        """Which images are classified correctly, [N] bool."""
        return self._joined().get("clean", torch.zeros(0, dtype=torch.bool))

    def _joined(self) -> dict[str, Tensor]:
        """The results of all images, by name."""
        if not self.parts["clean"]:
            return {}
        # The images are the last axis.
        return {name: torch.cat(parts, -1) for name, parts in self.parts.items()}

    def warnings(self) -> list[str]:
        """Reasons why the result may overestimate the robustness."""
        found, white_box = list(self.found), False
        for name, attack in self.attacks.items():
            if name in self.left_out:
                found.append(f"{name} was left out: it needs gradients, which the model does not have")
                continue
            if is_black_box(attack) and white_box and self.broken[name] > _SURPRISE * len(self):
                found.append(
                    f"the black-box attack {name} succeeded on {self.broken[name]} images that were robust to the "
                    "gradient attacks before it: gradients may be masked"
                )
            white_box |= not is_black_box(attack)
            if self.outside[name]:
                found.append(
                    f"{self.outside[name]} images that {name} returned lie outside the bounds or the ball; not counted"
                )
        return found

    def result(self) -> EvaluationResult:
        """The result of the evaluation; attacks that were left out have no place in it."""
        ran = [name for name in self.attacks if name not in self.left_out]
        rows = torch.tensor([i for i, name in enumerate(self.attacks) if name in ran], dtype=torch.int64)
        of_images = self._joined()
        first = of_images["first_success"]
        # A position among all attacks as one among those that ran.
        places = torch.cumsum(torch.tensor([name in ran for name in self.attacks] or [True]), 0) - 1
        return EvaluationResult(
            attacks=tuple(ran),
            clean=of_images["clean"],
            robust=of_images["robust"],
            first_success=torch.where(first >= 0, places[first.clamp_min(0)], first),
            success=of_images["success"][rows],
            adversarial=self.adversarial,
            counts={name: self.counts[name] for name in ran if name in self.counts},
            seconds={name: self.seconds[name] for name in ran},
            warnings=tuple(self.warnings()),
        )


def check_same_decisions(
    earlier: Tensor,  # [N] bool
    now: Tensor,  # [N] bool
) -> None:
    """Raise a ValueError where a model decides differently on the images themselves than that of an earlier call."""
    if not torch.equal(earlier, now):
        raise ValueError("state belongs to another model: it decides differently on some images")


def _as_pairs(counts: dict[str, PassCounts]) -> dict[str, tuple[int, int]]:
    return {name: (c.forward, c.backward) for name, c in counts.items()}


def _as_counts(pairs: dict[str, tuple[int, int]]) -> dict[str, PassCounts]:
    return {name: PassCounts(*pair) for name, pair in pairs.items()}


def _is_more_than_its_model(network: Network) -> bool:
    """Whether an attack of ours is to get the network, whatever copy it is told to make itself."""
    return not network.exact or network.same_size


def _is_pair(bounds: object) -> bool:
    """Whether these are bounds in fastlip's form."""
    return isinstance(bounds, Sequence) and len(bounds) == 2 and all(isinstance(b, (Tensor, Real)) for b in bounds)


def _of_both(one: PerSample, other: PerSample, choose: Callable[..., float]) -> PerSample:
    """The larger of two bounds, or the smaller, element by element."""
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return choose(one, other)
    if not isinstance(one, Tensor):
        one, other = other, one
    if isinstance(other, Tensor):
        other = other.to(one.device)  # type: ignore[union-attr]  # a tensor
    return torch.clamp(one, **{"min" if choose is max else "max": other})  # type: ignore[arg-type]  # one is a tensor


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


def _named(show: Callable[[int, int, str], None], name: str, done: int, total: int) -> None:
    show(done, total, name)

"""The worst case of each image over a suite of attacks."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip._precision import Precision
from fastlip.attacks._arguments import check_model, check_precision, count, flag, number, shown
from fastlip.attacks._criterion import Criterion, check_criterion
from fastlip.attacks._diagnose import AttackWarning, diagnose
from fastlip.attacks._evaluation_result import EvaluationResult
from fastlip.attacks._loop import FEW, misclassified_text
from fastlip.attacks._model import Model, Network, unwrapped
from fastlip.attacks._prepare import prepare
from fastlip.attacks._progress import Progress, progress_of
from fastlip.attacks._saved import SavedState
from fastlip.attacks._source import BoundsOf, Source
from fastlip.attacks._suite import Attack, suite
from fastlip.attacks._suite_run import Rules, SuiteRun, Totals, check_same_decisions
from fastlip.ops import Bounds, Norm
from fastlip.ops._checks import checked_norm

#: Called with positions [K] among all images and the adversarial images [K, ...].
Collect = Callable[[Tensor, Tensor], object]


def evaluate(
    model: Model,
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]],  # [N, ...]
    labels: Tensor | None = None,  # [N] int64
    attacks: Mapping[str, Attack] | None = None,
    *,
    norm: Norm | None = None,
    eps: float | None = None,
    criterion: Criterion | None = None,
    bounds: Bounds | BoundsOf = (0.0, 1.0),
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
    progress: bool | Progress | type[Any] = False,
    state: str | os.PathLike[str] | None = None,
    collect: Collect | None = None,
) -> EvaluationResult:
    """Run the attacks one after another, each on the images that are still robust, and judge what they return.

    An attack is called as ``attack(model, inputs, labels)`` with the model in eval mode, and returns images or a
    :class:`MinNormResult`. It may be one of ours (:func:`pgd`, :func:`apgd`, :func:`square`, a ``functools.partial`` of
    them), an attack of one's own or another library's. Where it has parameters ``bounds``, ``ids`` or ``generator``
    that are not given already, they are passed. Of bounds that differ between images it gets those of its batch, even
    where a partial holds those of all N images, and of bounds of its own what lies within the evaluation's. All its
    arguments are copies: whatever it writes into them, its images are judged against the caller's.

    The images that an attack returns are converted to the dtype of ``inputs``, each element rounded towards the
    original image so that no perturbation grows. These converted images are judged, by the model itself in eval mode,
    and kept. They count only inside the bounds and, where ``norm`` and ``eps`` are given, inside the ball. Images stay
    on their device until their batch is due, and the robust ones are packed into full batches again for each attack.

    Batches of images are attacked as they come, a few of the size ``batch_size`` at a time, and let go of: memory does
    not grow with their number, which need not be known. What an image's result is does not depend on how it came.

    An attack that needs gradients which the model does not have is left out, with a warning; if no other is left, its
    error is raised.

    Args:
        model: maps inputs to logits [B, C].
        inputs: images, [N, ...], within ``bounds``, on any device; or, without ``labels``, an iterable of batches
            (images, labels, ...), such as a DataLoader.
        labels: true classes, [N] int64.
        attacks: by name, in the order in which they run; see :func:`suite`, whose standard one it is if None.
        norm: norm of the ball that successes are checked against; no ball is checked if None.
        eps: radius of that ball.
        criterion: what counts as success, as in :func:`pgd`; attacks that take one get it, and what all others return
            is judged by it. An image counts as ``clean`` and ``robust`` where it is not true.
        bounds: lower and upper limit of valid inputs, floats or tensors that broadcast to ``inputs``, which may differ
            between images; or a function that maps images to such bounds, for example a partial of
            :func:`feature_box`. Those of batches must be the same for all images, or a function.
        batch_size: number of images in a batch.
        every_attack: run every attack on every correctly classified image, so that each attack has an accuracy of its
            own.
        ids: [N] int64 sample ids, which determine the random draws together with the seed; 0 .. N-1 if None.
        seed: seed of the generators; an image's draws depend on seed and id and not on its batch.
        device: the device of the model; if None that of its parameters, or of ``inputs`` where it has none.
        fast: follow the gradients of a copy made fast for evaluation (:func:`prepare`).
        precision: as in :func:`pgd`.
        draws: passes whose mean probabilities decide, for a model with random outputs, as in :func:`prepare`.
        eot: passes whose mean probabilities our attacks differentiate, as in :func:`prepare`.
        quantize: bits of a value, as in :func:`pgd`. Attacks that take it get it, what the others return is rounded
            within the ball (the box, if no ball is checked), and all is judged afterwards.
        check: look for signs of unreliable results (:func:`diagnose`, and a black-box attack that succeeds where
            gradient attacks failed) and warn of them.
        progress: True shows a bar for each attack on standard error, or in a notebook (needs tqdm), as one of tqdm's
            classes in its place does; a function is called with the images done, the images in all (-1 where that is
            unknown) and the attack's name.
        state: a file that keeps the results after each attack, and once a minute while one runs. Where it exists the
            evaluation goes on from there; it is refused where it belongs to other images, attacks (by the names of
            functions and what they are given), settings or, by its weights and its decisions on the images themselves,
            to another model. Batches are read again from the first one, and must be the same. A function that has no
            name, such as a lambda, needs an attribute ``state_name``.
        collect: called with positions [K] among all images and the adversarial images [K, ...] there, as in the result,
            whenever all attacks are done with some; not again for those of an earlier call (``state``).

    Raises:
        ValueError: a value or shape is wrong, inputs leave the bounds, or an attack returned something else.
        TypeError: a type or dtype is wrong.

    Returns:
        The result; of images that came in batches without the images themselves (see ``collect``).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> suite = attacks.suite("quick", norm="linf", eps=8 / 255)
        >>> result = attacks.evaluate(model, images, labels, suite, norm="linf", eps=8 / 255)
        >>> print(result.robust_accuracy)
    """
    check_model(model)
    batch_size, seed = count(batch_size, "batch_size", 1), count(seed, "seed", -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    for name, value in (("every_attack", every_attack), ("fast", fast), ("check", check)):
        flag(value, name)
    check_precision(precision)
    check_criterion(criterion)
    draws, eot = count(draws, "draws", 1), count(eot, "eot", 1)
    norm = None if norm is None else checked_norm(norm)
    eps = _checked_ball(norm, eps)
    show = progress_of(progress)
    if collect is not None and not callable(collect):
        raise TypeError(f"collect must be a function or None, got {shown(collect)}")
    if attacks is None and norm is not None and eps is not None:
        # Whatever the bounds are: an attack gets what lies within its own and the evaluation's.
        attacks = suite(norm=norm, eps=eps, bounds=(-torch.inf, torch.inf))
    attacks = _checked_attacks(attacks)
    rules = Rules(_device(device, model, inputs), batch_size, norm, eps, seed, quantize, every_attack, criterion)
    source = Source(
        inputs, labels, ids=ids, bounds=bounds, quantize=quantize, attacks=attacks.values(), batch_size=batch_size
    )
    settings = {
        "bounds": bounds, "ids": ids, "batch_size": batch_size, "norm": norm, "eps": eps, "seed": seed, "draws": draws,
        "eot": eot, "quantize": quantize, "every_attack": every_attack, "criterion": criterion,
        "attacks": [*attacks], **{f"attacks[{name!r}]": attack for name, attack in attacks.items()},
    }  # fmt: skip
    saved = SavedState(state, settings, unwrapped(model.model if isinstance(model, Network) else model))
    if state is not None:
        source.check_order()
    total = Totals(attacks)
    if saved.results is not None:
        total.restore(saved.results)
    known, finished = total.clean(), len(saved.finished)
    judge: Network | None = None
    network: Network | None = None
    first = 0
    for part, images in enumerate(source.parts(saved)):
        rows = slice(first, first + len(images))
        first = rows.stop
        if judge is None:
            judge = prepare(model, images.inputs, fast=False, draws=draws)
        run = SuiteRun(judge, images, rules, attacks)
        run.judge_clean()
        if part < finished:
            check_same_decisions(known[rows], run.clean)
            continue
        few = run.batches(torch.arange(len(images)))[:1]
        if network is None:
            network = judge
            if few and (fast or precision or eot > 1):
                x = run.at(few[0])[0]
                network = prepare(
                    model, x, fast=fast, precision=precision, draws=draws, eot=eot, same_size=judge.same_size
                )
                network.largest = judge.largest
        if saved.run is not None:
            run.restore(saved.run)
            saved.run = None
        elif check and few and part == 0:
            total.found = diagnose(judge, *run.at(few[0]), bounds=run.box(few[0]))
        run.run(
            network,
            partial(_told, show, source, rows.start, len(images)) if source.streams else show,
            partial(saved.save, total.state, run.state),
        )
        total.add(run, keep=not source.streams)
        if collect is not None:
            collect(torch.arange(rows.start, rows.stop), run.adversarial)
        saved.save(total.state, None, True)
        del run, images  # before the next ones are read
    wrong = int((~total.clean()).sum())
    if criterion is None and wrong > len(total) / 2 and len(total) >= FEW:
        total.found.append(misclassified_text(wrong, len(total)))
    found = total.result()
    for sentence in found.warnings if check else []:
        warnings.warn(sentence, AttackWarning, stacklevel=2)
    return found


def _told(show: Progress, source: Source, before: int, size: int, done: int, todo: int, name: str) -> None:
    """Tell the progress of an attack on a part of ``size`` images, of which it has ``todo`` to try, as one of all."""
    show(before + size - todo + done, source.total, name)


def _checked_ball(norm: Norm | None, eps: Any) -> float | None:
    """Raise where norm and radius make no ball; return the radius."""
    if (norm is None) != (eps is None):
        raise ValueError("give both norm and eps, or neither")
    if isinstance(eps, Tensor) and eps.dim() > 0:
        raise TypeError("eps must be one float for all images")
    if eps is None:
        return None
    eps = number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return eps


def _checked_attacks(attacks: Any) -> Mapping[str, Attack]:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping from names to attacks, got {type(attacks).__name__}; see suite()")
    for name, attack in attacks.items():
        if not callable(attack):
            raise TypeError(f"attacks must be callable, but {name!r} is of type {type(attack).__name__}")
    return attacks


def _device(device: torch.device | str | None, model: Model, inputs: Any) -> torch.device:
    """The model's device."""
    if device is None:
        return _device_of(model.model if isinstance(model, Network) else model, inputs)
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device, its name or None, got {shown(device)}") from error


def _device_of(model: Model, inputs: Any) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    if first is not None:
        return first.device
    return inputs.device if isinstance(inputs, Tensor) else torch.device("cpu")

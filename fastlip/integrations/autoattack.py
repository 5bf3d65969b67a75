"""AutoAttack's interface over :func:`fastlip.attacks.evaluate`.

    from fastlip.integrations.autoattack import AutoAttack
    adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
    adversarial = adversary.run_standard_evaluation(images, labels, bs=250)

The attacks are those of :func:`fastlip.attacks.suite`, in which FMN takes the place of FAB. Unlike AutoAttack's own
class, this one leaves the global random state alone, takes any bounds, and keeps the results per image in
``evaluation``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlip.attacks import Attack, EvaluationResult, Precision, evaluate, suite
from fastlip.attacks._criterion import Criterion
from fastlip.attacks._source import BoundsOf
from fastlip.integrations._decisions import decisions
from fastlip.integrations._names import named
from fastlip.integrations._settings import Settings, keywords_of
from fastlip.ops import Bounds, Norm

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
#: AutoAttack's names for fastlip's arguments.
_NAMES = {
    "inputs": "x_orig", "labels": "y_orig", "batch_size": "bs", "progress": "verbose", "suite": "version",
    "state": "state_path",
}  # fmt: skip
_APGD = {"n_iter": "steps", "n_restarts": "restarts", "rho": "rho", "use_largereps": "larger_eps", "eot_iter": "eot"}
#: AutoAttack's objects: the attack in our suite that tells their settings, and these settings' names there and here.
_OBJECTS: dict[str, tuple[str, dict[str, str]]] = {
    "apgd": ("apgd-ce", _APGD),
    "apgd_targeted": ("apgd-t", _APGD | {"n_target_classes": "target_classes"}),
    "fab": ("fmn", {"n_iter": "fmn_steps"}),
    "square": ("square", {"n_queries": "queries", "n_restarts": "restarts", "p_init": "share"}),
}
#: The object that each of our attacks belongs to.
_OBJECT_OF = {"apgd-ce": "apgd", "apgd-dlr": "apgd", "apgd-t": "apgd_targeted", "fmn": "fab", "square": "square"}
#: Passes that AutoAttack averages gradients over for models with random outputs.
_EOT = 20


class AutoAttack:
    """A standardised evaluation.

    Settings may be changed between runs, by AutoAttack's names: ``epsilon``, ``norm``, ``attacks_to_run``,
    ``apgd.n_restarts``. The dict ``attacks``, which may be changed too, is made from them, and anew once one of them
    has changed. To set what there is not is an error.

    Args:
        model: maps images to logits; a module or a function.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball.
        seed: seed of all random draws; drawn from the default generator if None.
        verbose: print the result, and show progress on standard error (which needs tqdm).
        attacks_to_run: names from "apgd-ce", "apgd-dlr", "apgd-t", "fmn" (also called "fab" and "fab-t") and
            "square", for ``version="custom"``; they may be assigned later.
        version: "standard", "rand" or "custom". In "rand" gradients are those of the mean over 20 passes.
        device: the device on which batches are attacked; that of the model if None.
        log_path: a file to which results are appended.
        bounds: limits of valid images, as in :func:`fastlip.attacks.evaluate`.
        fast: as in :func:`fastlip.attacks.pgd`.
        precision: as in :func:`fastlip.attacks.pgd`.
        draws: passes that judge an image together, as in :func:`fastlip.attacks.evaluate`.
        criterion: what counts as success, as in :func:`fastlip.attacks.evaluate`; a wrong decision if None.

    Attributes:
        evaluation: the result of the last run.
        apgd: settings of "apgd-ce" and "apgd-dlr": ``n_iter``, ``n_restarts``, ``rho``, ``use_largereps`` and
            ``eot_iter``, of which the larger of this and ``apgd_targeted``'s counts for all attacks.
        apgd_targeted: the same of "apgd-t", and ``n_target_classes``.
        fab: ``n_iter`` of "fmn".
        square: ``n_queries``, ``n_restarts`` and ``p_init`` of "square".
    """

    #: What the attacks are made from, and what else may be set.
    _MAKING = frozenset({"norm", "epsilon", "bounds", "version", "attacks_to_run"})
    _SETTABLE = _MAKING | {
        "model", "seed", "verbose", "device", "log_path", "fast", "precision", "draws", "criterion", "evaluation",
        "attacks",
    }  # fmt: skip

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        device: torch.device | str | None = None,
        log_path: str | os.PathLike[str] | None = None,
        bounds: Bounds | BoundsOf = (0.0, 1.0),
        fast: bool = False,
        precision: Precision = None,
        draws: int = 1,
        criterion: Criterion | None = None,
    ) -> None:
        if attacks_to_run and version != "custom":
            raise ValueError("attacks_to_run needs version='custom'")
        self.model = model
        self.norm, self.epsilon, self.bounds = norm, eps, bounds
        self.seed, self.verbose, self.device, self.log_path = seed, verbose, device, log_path
        self.fast, self.precision, self.draws, self.criterion = fast, precision, draws, criterion
        self.evaluation: EvaluationResult | None = None
        self._objects = {name: _Tuned(self, *_OBJECTS[name]) for name in _OBJECTS}
        self._made: dict[str, Attack] | None = None
        self.set_version(version)
        if version == "custom":
            self.attacks_to_run = list(attacks_to_run)
        if self.attacks_to_run:
            self._make()  # which checks all that it is made from

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks of a version."""
        self.version = version
        with named(_NAMES):  # suite() refuses strings that it does not know
            chosen = [] if version == "custom" else list(self._suite(version))
        self.attacks_to_run = chosen
        for name in ("apgd", "apgd_targeted"):
            self._objects[name].eot_iter = _EOT if version == "rand" else 1

    def __getattr__(self, name: str) -> Any:
        objects = self.__dict__.get("_objects", {})
        if name not in objects:
            raise AttributeError(f"AutoAttack has no attribute {name!r}")
        return objects[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._SETTABLE:
            known = ", ".join(sorted(self._SETTABLE))
            raise AttributeError(f"AutoAttack has no setting {name!r}; it has {known}")
        super().__setattr__(name, value)
        if name in self._MAKING:
            self._made = None

    @property
    def attacks(self) -> dict[str, Attack]:
        """The attacks by name, as :func:`fastlip.attacks.evaluate` takes them."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @attacks.setter
    def attacks(self, chosen: Mapping[str, Attack]) -> None:
        self._made = dict(chosen)

    def _suite(self, version: str) -> dict[str, Attack]:
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {self.norm!r}")
        bounds = (-torch.inf, torch.inf) if callable(self.bounds) else self.bounds  # evaluate has the narrower ones
        return suite(version, norm=_NORMS[self.norm], eps=self.epsilon, bounds=bounds)  # type: ignore[arg-type]  # suite checks it

    def _make(self) -> dict[str, Attack]:
        """The attacks to run, with the settings that their objects were given."""
        known = self._suite("rand") | self._suite("standard") | (self._suite("rand") if self.version == "rand" else {})
        chosen: dict[str, Attack] = {}
        for name in self.attacks_to_run:
            own = "fmn" if name in ("fab", "fab-t") else name
            if own not in known:
                raise ValueError(f"attacks_to_run must be names out of {', '.join(known)}, got {name!r}")
            given = {k: v for k, v in self._objects[_OBJECT_OF[own]].options.items() if k != "eot"}
            chosen[name] = partial(known[own], **given)
        if not chosen:
            raise ValueError("attacks_to_run must name attacks for version='custom'")
        return chosen

    def run_standard_evaluation(
        self,
        x_orig: Tensor,  # [N, ...]
        y_orig: Tensor,  # [N]
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """The worst case over the attacks: images [N, ...] like ``x_orig``, and the model's decisions if wanted.

        The file ``state_path`` keeps what there is so far, from which a later run goes on.
        """
        self.evaluation = self._evaluate(x_orig, y_orig, bs, self.attacks, state_path)
        adversarial = _images(self.evaluation, x_orig)
        if not return_labels:
            return adversarial
        return adversarial, self._decisions(adversarial, bs)

    def run_standard_evaluation_individual(
        self,
        x_orig: Tensor,  # [N, ...]
        y_orig: Tensor,  # [N]
        bs: int = 250,
        return_labels: bool = False,
    ) -> dict[str, Any]:
        """The results of each attack by itself on all images."""
        out = {}
        for name, attack in self.attacks.items():
            found = _images(self._evaluate(x_orig, y_orig, bs, {name: attack}), x_orig)
            out[name] = (found, self._decisions(found, bs)) if return_labels else found
        return out

    def clean_accuracy(
        self,
        x_orig: Tensor,  # [N, ...]
        y_orig: Tensor,  # [N]
        bs: int = 250,
    ) -> float:
        """Share of images classified correctly, or on which the criterion is not fulfilled to begin with."""
        if self.criterion is not None:
            with named(_NAMES):
                found = evaluate(
                    self.model, x_orig, y_orig, {}, criterion=self.criterion, bounds=self.bounds, batch_size=bs,
                    device=self.device, draws=self.draws, check=False,
                )  # fmt: skip
            return found.clean_accuracy
        return (self._decisions(x_orig, bs) == y_orig).double().mean().item()

    def _evaluate(
        self,
        x: Tensor,
        y: Tensor,
        bs: int,
        attacks: dict[str, Attack],
        state: str | os.PathLike[str] | None = None,
    ) -> EvaluationResult:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        eot = max(self._objects[name].options["eot"] for name in ("apgd", "apgd_targeted"))
        with named(_NAMES):
            found = evaluate(
                self.model, x, y, attacks, norm=_NORMS[self.norm], eps=self.epsilon, criterion=self.criterion,
                bounds=self.bounds, batch_size=bs, seed=seed, device=self.device, fast=self.fast,
                precision=self.precision, draws=self.draws, eot=eot, progress=self.verbose, state=state,
            )  # fmt: skip
        if self.verbose:
            print(found)
        if self.log_path is not None:
            with Path(self.log_path).open("a") as log:
                log.write(f"{found}\n")
        return found

    def _decisions(self, x: Tensor, bs: int) -> Tensor:
        return decisions(self.model, x, bs, self._device(x), self.draws)

    def _device(self, x: Tensor) -> torch.device | str:
        if self.device is not None:
            return self.device
        parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else iter(())
        return next((p.device for p in parameters), x.device)


def _images(found: EvaluationResult, x: Tensor) -> Tensor:
    """The adversarial images of an evaluation of ``x``, on its device."""
    if found.adversarial is None:
        raise TypeError("x_orig must be a tensor with labels y_orig; fastlip.attacks.evaluate takes a loader")
    return found.adversarial.to(x.device)


class _Tuned(Settings):
    """The settings of one of AutoAttack's attacks: those that were given, and what our suite has for the others."""

    def __init__(self, owner: AutoAttack, attack: str, names: Mapping[str, str]) -> None:
        self._owner, self._attack, self._settings = owner, attack, names
        self._begin({})

    def _takes(self) -> Mapping[str, Any]:
        return {}

    def _set_option(self, name: str, value: Any) -> None:
        super()._set_option(name, value)
        self._owner._made = None

    def __getattr__(self, name: str) -> Any:
        option = self._settings.get(name)
        if option is None or option in self.options:
            return super().__getattr__(name)
        reference: Any = self._owner._suite("standard")[self._attack]
        return reference.keywords.get(option, keywords_of(reference.func)[option].default)

"""Attacks as subclasses of :class:`torchattacks.Attack`, with its names and arguments and all options of fastlip's.

An existing script changes its import::

    from fastlip.integrations import torchattacks
    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adversarial = attack(images, labels)

Unlike torchattacks' own, the attacks stop on an image once it is misclassified (``keep="last"`` returns the last
iterate instead), leave frozen BatchNorm layers frozen, accept channels_last, and project exactly in L2. Settings may be
changed between calls (``attack.eps = 4 / 255``), and ``eps`` and ``alpha`` may be tensors with a value for each image;
to set what an attack does not have is an error. All attacks take a ``mask`` and a ``radius`` for each feature
(:func:`fastlip.attacks.feature_box`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlip import attacks
from fastlip.attacks._criterion import fooled
from fastlip.attacks._model import eval_mode
from fastlip.integrations._decisions import decisions
from fastlip.integrations._features import FEATURES, with_box
from fastlip.integrations._names import named
from fastlip.integrations._preprocessed import Preprocessed
from fastlip.integrations._require import require
from fastlip.integrations._settings import Settings, keywords_of
from fastlip.ops import Norm

_Base: Any = require("torchattacks.attack", "torchattacks").Attack
_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
#: Torchattacks' names for fastlip's arguments.
_NAMES = {
    "step_size": "alpha", "queries": "n_queries", "restarts": "n_restarts", "share": "p_init", "eot": "eot_iter",
}  # fmt: skip


class FastlipAttack(Settings, _Base):
    """Any of fastlip's attacks as a torchattacks attack.

    Args:
        attack: a function of :mod:`fastlip.attacks` that returns images.
        model: maps images to logits.
        seed: seed of the random draws of each call; they come from the default generator if None.
        options: keywords for ``attack``.
    """

    #: Whether images that the attack does not succeed on come back unchanged.
    _successes_alone = False

    def __init__(
        self, attack: Callable[..., Tensor], model: torch.nn.Module, *, seed: int | None = None, **options: Any
    ) -> None:
        self._made: Preprocessed | None = None
        super().__init__(type(self).__name__, model)
        self.supported_mode = ["default", "targeted"]
        self.function = attack
        self.seed = seed
        self._begin(options)

    def _takes(self) -> Mapping[str, Any]:
        return {**keywords_of(self.function), **dict.fromkeys(FEATURES)}

    def _set_option(self, name: str, value: Any) -> None:
        known = name == "norm" and isinstance(value, str) and value in _NORMS
        super()._set_option(name, _NORMS[value] if known else value)

    def forward(
        self,
        inputs: Tensor,  # [B, C, H, W]
        labels: Tensor,  # [B]
    ) -> Tensor:
        """Return adversarial images, [B, C, H, W]."""
        inputs = inputs.detach().clone().to(self.device)
        labels = labels.detach().clone().to(self.device)
        options = with_box({name: _per_image(value, inputs) for name, value in self.options.items()}, inputs)
        if self.targeted:
            options["targets"] = self.get_target_label(inputs, labels)
        if self.seed is not None:
            options["generator"] = torch.Generator(inputs.device).manual_seed(self.seed)
        with named({ours: theirs for ours, theirs in _NAMES.items() if self._settings.get(theirs) == ours}):
            network: Any = self._network()
            if (eot := options.pop("eot", 1)) != 1:
                how = {name: options[name] for name in ("fast", "precision") if name in options}
                network = attacks.prepare(network, inputs, **{"fast": False, **how}, eot=eot)
            found = self.function(network, inputs, labels, **options)
        if not self._successes_alone:
            return found
        success = self._success(network, found, labels, options)
        return torch.where(success.reshape(-1, *[1] * (found.dim() - 1)), found, inputs)

    def _success(self, network: Any, found: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """Whether the attack has succeeded, [B] bool."""
        if (criterion := options.get("criterion")) is not None:
            judge = attacks.prepare(network, found, fast=False)
            with eval_mode(judge), torch.no_grad():
                return fooled(criterion, judge.judge(found), labels)
        decided = decisions(network, found)
        return decided == options["targets"] if self.targeted else decided != labels

    def _network(self) -> torch.nn.Module:
        """The model, behind the normalisation that was set for it."""
        if self._normalization_applied is None:
            return self.model
        made = self._made
        if made is None or made.network is not self.model:
            mean, std = (self.normalization_used[k].to(self.device) for k in ("mean", "std"))
            made = self._made = Preprocessed(self.model, mean, std)
        return made

    def set_normalization_used(self, mean: Any, std: Any) -> None:
        """Like torchattacks.Attack.set_normalization_used."""
        super().set_normalization_used(mean, std)
        self._made = None

    # fastlip runs every module in eval mode and restores the mode of each one.
    def _change_model_mode(self, given_training: bool) -> None:
        if self._model_training:
            raise ValueError("fastlip's attacks run models in eval mode; do not set_model_training_mode(True)")

    def _recover_model_mode(self, given_training: bool) -> None:
        pass


class FGSM(FastlipAttack):
    """Like torchattacks.FGSM."""

    def __init__(self, model: torch.nn.Module, eps: float = 8 / 255, **options: Any) -> None:
        super().__init__(attacks.fgsm, model, **{"eps": eps, "loss": "ce", "keep": "last", **options})


class PGD(FastlipAttack):
    """Like torchattacks.PGD, in Linf."""

    _ball: Norm = "linf"
    _settings: Mapping[str, str] = {"alpha": "step_size"}

    def __init__(
        self,
        model: torch.nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "norm": self._ball,
            "eps": eps,
            "step_size": alpha,
            "steps": steps,
            "random_start": random_start,
        }
        super().__init__(attacks.pgd, model, **given | {"loss": "ce"} | options)


class PGDL2(PGD):
    """Like torchattacks.PGDL2; ``eps_for_division`` has no effect, because a zero gradient moves nothing here."""

    _ball = "l2"

    def __init__(
        self,
        model: torch.nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        **options: Any,
    ) -> None:
        self.eps_for_division = eps_for_division
        super().__init__(model, eps, alpha, steps, random_start, **options)


class PGDL1(PGD):
    """PGD in L1, which torchattacks lacks."""

    _ball = "l1"

    def __init__(
        self,
        model: torch.nn.Module,
        eps: float = 12.0,
        alpha: float = 1.0,
        steps: int = 10,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, **options)


class APGD(FastlipAttack):
    """Like torchattacks.APGD, and in L1; ``verbose`` prints nothing.

    With ``eot_iter`` above 1 gradients are those of the mean probabilities of so many passes.
    """

    _settings: Mapping[str, str] = {"n_restarts": "restarts", "eot_iter": "eot"}

    def __init__(
        self,
        model: torch.nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "norm": _norm(norm),
            "eps": eps,
            "steps": steps,
            "restarts": n_restarts,
            "loss": loss,
            "rho": rho,
            "eot": eot_iter,
        }
        self.verbose = verbose
        super().__init__(attacks.apgd, model, seed=seed, **given | options)


class APGDT(FastlipAttack):
    """Like torchattacks.APGDT, which aims at the likeliest wrong classes in turn, and in L1."""

    _settings: Mapping[str, str] = {"n_restarts": "restarts", "eot_iter": "eot"}

    def __init__(
        self,
        model: torch.nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"norm": _norm(norm), "eps": eps, "steps": steps, "restarts": n_restarts, "rho": rho}
        given |= {"loss": "dlr", "target_classes": _classes_aimed_at(n_classes), "eot": eot_iter}
        self.verbose = verbose
        super().__init__(attacks.apgd, model, seed=seed, **given | options)
        self.supported_mode = ["default"]

    @property
    def n_classes(self) -> int:
        """One more than the wrong classes that are aimed at."""
        return int(self.options["target_classes"]) + 1

    @n_classes.setter
    def n_classes(self, value: int) -> None:
        self.options["target_classes"] = _classes_aimed_at(value)


class Square(FastlipAttack):
    """Like torchattacks.Square, and in L1; the schedule is always rescaled to ``n_queries``.

    Images on which the search does not succeed come back unchanged.
    """

    _successes_alone = True

    _settings: Mapping[str, str] = {"n_queries": "queries", "n_restarts": "restarts", "p_init": "share"}

    def __init__(
        self,
        model: torch.nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int = 0,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "norm": _norm(norm),
            "eps": eps,
            "queries": n_queries,
            "restarts": n_restarts,
            "share": p_init,
        }
        self.verbose, self.resc_schedule = verbose, resc_schedule
        super().__init__(attacks.square, model, seed=seed, **given | {"loss": loss} | options)


def _norm(name: str) -> Norm:
    if name not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {name!r}")
    return _NORMS[name]


def _classes_aimed_at(n_classes: int) -> int:
    if not isinstance(n_classes, int) or n_classes < 2:
        raise ValueError(f"n_classes must be an int of at least 2, got {n_classes!r}")
    return n_classes - 1


def _per_image(value: Any, inputs: Tensor) -> Any:
    """``value`` as [B] on the images' device where it is a tensor [B, 1, ...] with a value for each of ``inputs``."""
    if not isinstance(value, Tensor) or value.shape[:1] != inputs.shape[:1] or value.numel() != len(inputs):
        return value
    return value.reshape(-1).to(inputs.device)

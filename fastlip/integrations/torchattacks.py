"""Attacks as subclasses of :class:`torchattacks.Attack`, with its names and arguments and all options of fastlip's.

An existing script changes its import::

    from fastlip.integrations import torchattacks
    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adversarial = attack(images, labels)

Unlike torchattacks' own, the attacks stop on an image once it is misclassified (``keep="last"`` returns the last
iterate instead), leave frozen BatchNorm layers frozen, accept channels_last, and project exactly in L2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlip import attacks
from fastlip.integrations._names import named
from fastlip.integrations._preprocessed import Preprocessed
from fastlip.integrations._require import require
from fastlip.ops import Norm

_Base: Any = require("torchattacks.attack", "torchattacks").Attack
_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
#: Torchattacks' names for fastlip's arguments.
_NAMES = {"step_size": "alpha", "queries": "n_queries", "restarts": "n_restarts", "share": "p_init"}


class FastlipAttack(_Base):
    """Any of fastlip's attacks as a torchattacks attack.

    Args:
        attack: a function of :mod:`fastlip.attacks` that returns images.
        model: maps images to logits.
        seed: seed of the random draws of each call; they come from the default generator if None.
        options: keywords for ``attack``.
    """

    #: Arguments that the class takes under torchattacks' names.
    _renamed: tuple[str, ...] = ()

    def __init__(
        self, attack: Callable[..., Tensor], model: torch.nn.Module, *, seed: int | None = None, **options: Any
    ) -> None:
        self._made: Preprocessed | None = None
        super().__init__(type(self).__name__, model)
        self.supported_mode = ["default", "targeted"]
        self.function = attack
        self.options = options
        self.seed = seed

    def forward(
        self,
        inputs: Tensor,  # [B, C, H, W]
        labels: Tensor,  # [B]
    ) -> Tensor:
        """Return adversarial images, [B, C, H, W]."""
        inputs = inputs.detach().clone().to(self.device)
        labels = labels.detach().clone().to(self.device)
        options = dict(self.options)
        if self.targeted:
            options["targets"] = self.get_target_label(inputs, labels)
        if self.seed is not None:
            options["generator"] = torch.Generator(inputs.device).manual_seed(self.seed)
        with named({ours: theirs for ours, theirs in _NAMES.items() if ours in self._renamed}):
            return self.function(self._network(), inputs, labels, **options)

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

    norm: Norm = "linf"
    _renamed = ("step_size",)

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
            "norm": self.norm,
            "eps": eps,
            "step_size": alpha,
            "steps": steps,
            "random_start": random_start,
        }
        super().__init__(attacks.pgd, model, **given | {"loss": "ce"} | options)


class PGDL2(PGD):
    """Like torchattacks.PGDL2; ``eps_for_division`` has no effect, because a zero gradient moves nothing here."""

    norm = "l2"

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
        super().__init__(model, eps, alpha, steps, random_start, **options)


class PGDL1(PGD):
    """PGD in L1, which torchattacks lacks."""

    norm = "l1"

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
    """Like torchattacks.APGD, and in L1; ``eot_iter`` has to be 1 and ``verbose`` prints nothing."""

    _renamed = ("restarts",)

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
        _only_once(eot_iter)
        given: dict[str, Any] = {
            "norm": _norm(norm),
            "eps": eps,
            "steps": steps,
            "restarts": n_restarts,
            "loss": loss,
            "rho": rho,
        }
        super().__init__(attacks.apgd, model, seed=seed, **given | options)


class APGDT(FastlipAttack):
    """Like torchattacks.APGDT, which aims at the likeliest wrong classes in turn, and in L1."""

    _renamed = ("restarts",)

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
        _only_once(eot_iter)
        if not isinstance(n_classes, int) or n_classes < 2:
            raise ValueError(f"n_classes must be an int of at least 2, got {n_classes!r}")
        given: dict[str, Any] = {"norm": _norm(norm), "eps": eps, "steps": steps, "restarts": n_restarts, "rho": rho}
        given |= {"loss": "dlr", "target_classes": n_classes - 1}
        super().__init__(attacks.apgd, model, seed=seed, **given | options)
        self.supported_mode = ["default"]


class Square(FastlipAttack):
    """Like torchattacks.Square, and in L1; the schedule is always rescaled to ``n_queries``."""

    _renamed = ("queries", "restarts", "share")

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
        super().__init__(attacks.square, model, seed=seed, **given | {"loss": loss} | options)


def _norm(name: str) -> Norm:
    if name not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {name!r}")
    return _NORMS[name]


def _only_once(eot_iter: int) -> None:
    if eot_iter != 1:
        raise ValueError("eot_iter must be 1: average gradients over random draws inside the model")

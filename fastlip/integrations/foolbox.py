"""Attacks as foolbox attacks, with foolbox's names and arguments and all options of fastlip's.

An existing script changes its import::

    from fastlip.integrations import foolbox as fast
    attack = fast.LinfPGD(steps=40)
    raw, clipped, success = attack(fmodel, images, labels, epsilons=8 / 255)

Images and model are PyTorch's (``foolbox.PyTorchModel``). Unlike foolbox's own, the attacks stop on an image once it
is misclassified, compute no gradients of weights, run the network in eval mode, and project exactly onto ball and box.
Settings may be changed between calls (``attack.steps = 100``); to set what an attack does not have is an error. All
attacks take a ``mask`` and a ``radius`` for each feature (:func:`fastlip.attacks.feature_box`), and a ``criterion``
(logits, labels) -> bool [B] that they look for; what foolbox returns as success is by its own.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastlip import attacks
from fastlip.integrations._features import FEATURES, with_box
from fastlip.integrations._names import named
from fastlip.integrations._preprocessed import Preprocessed
from fastlip.integrations._require import require
from fastlip.integrations._settings import Settings, keywords_of
from fastlip.ops import Norm

_foolbox = require("foolbox", "foolbox")
_Fixed: Any = require("foolbox.attacks.base", "foolbox").FixedEpsilonAttack
_Minimal: Any = require("foolbox.attacks.base", "foolbox").MinimizationAttack


class FixedEpsilon(Settings, _Fixed):
    """Any of fastlip's attacks within a ball as a foolbox attack.

    Args:
        attack: a function of :mod:`fastlip.attacks` that takes ``norm`` and ``eps`` and returns images.
        norm: "linf", "l2" or "l1".
        options: further keywords for ``attack``.
    """

    def __init__(self, attack: Callable[..., Tensor], norm: Norm, **options: Any) -> None:
        self.attack = attack
        self.norm = norm
        self._begin(options)

    def _takes(self) -> Mapping[str, Any]:
        return {**keywords_of(self.attack), **dict.fromkeys(FEATURES)}

    def _names(self) -> dict[str, str]:
        """Foolbox's names for the attack's arguments."""
        return {"eps": "epsilons", "labels": "criterion", "targets": "criterion"}

    @property
    def distance(self) -> Any:
        """Foolbox's distance for the norm."""
        return getattr(_foolbox.distances, self.norm)

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Return perturbed inputs within ``epsilon``."""
        _no_more(kwargs)
        images, restore, call = _torch_call(model, inputs, criterion)
        # Copies, because an attack may write into its arguments and foolbox judges by them.
        images, call = images.clone(), {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}
        with named(self._names()):
            options = with_box(call | self.at(epsilon), images)
            found = self.attack(_network(model), images, **options, norm=self.norm, eps=epsilon)
        return restore(found)

    def at(self, epsilon: float) -> dict[str, Any]:
        """Keywords for the attack at this radius."""
        return dict(self.options)


class _PGD(FixedEpsilon):
    """PGD with foolbox's arguments."""

    def __init__(
        self,
        norm: Norm,
        rel_stepsize: float,
        abs_stepsize: float | None,
        steps: int,
        random_start: bool,
        options: dict[str, Any],
    ) -> None:
        given = {"steps": steps, "random_start": random_start, "loss": "ce"}
        self.rel_stepsize = rel_stepsize
        self.abs_stepsize = abs_stepsize
        super().__init__(attacks.pgd, norm, **given | options)

    def _names(self) -> dict[str, str]:
        if "step_size" in self.options:
            return super()._names()
        return super()._names() | {"step_size": "rel_stepsize" if self.abs_stepsize is None else "abs_stepsize"}

    def at(self, epsilon: float) -> dict[str, Any]:
        step = self.abs_stepsize if self.abs_stepsize is not None else self.rel_stepsize * epsilon
        return {"step_size": step} | self.options


class LinfPGD(_PGD):
    """Like foolbox.attacks.LinfPGD."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.01 / 0.3,
        abs_stepsize: float | None = None,
        steps: int = 40,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__("linf", rel_stepsize, abs_stepsize, steps, random_start, options)


class L2PGD(_PGD):
    """Like foolbox.attacks.L2PGD."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.025,
        abs_stepsize: float | None = None,
        steps: int = 50,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__("l2", rel_stepsize, abs_stepsize, steps, random_start, options)


class L1PGD(_PGD):
    """Like foolbox.attacks.L1PGD, but with steps along the largest 1% of the gradient (``sparsity``)."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.025,
        abs_stepsize: float | None = None,
        steps: int = 50,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__("l1", rel_stepsize, abs_stepsize, steps, random_start, options)


class APGD(FixedEpsilon):
    """Auto-PGD, which foolbox lacks."""

    def __init__(self, norm: Norm = "linf", *, steps: int = 100, **options: Any) -> None:
        super().__init__(attacks.apgd, norm, **{"steps": steps} | options)


class Square(FixedEpsilon):
    """The Square attack, which foolbox lacks."""

    def __init__(self, norm: Norm = "linf", *, queries: int = 5000, **options: Any) -> None:
        super().__init__(attacks.square, norm, **{"queries": queries} | options)


class MinNorm(Settings, _Minimal):
    """:func:`fastlip.attacks.min_norm` in place of foolbox's DDN and FMN attacks.

    Args:
        norm: "linf", "l2" or "l1".
        options: further keywords for min_norm.
    """

    def __init__(self, norm: Norm = "l2", **options: Any) -> None:
        self.norm = norm
        self._begin(options)

    def _takes(self) -> Mapping[str, Any]:
        return {**keywords_of(attacks.min_norm), **dict.fromkeys(FEATURES)}

    @property
    def distance(self) -> Any:
        """Foolbox's distance for the norm."""
        return getattr(_foolbox.distances, self.norm)

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """Return the nearest misclassified inputs found."""
        _no_more(kwargs)
        images, restore, call = _torch_call(model, inputs, criterion)
        options = with_box(call | self.options, images)
        return restore(attacks.min_norm(_network(model), images, **options, norm=self.norm).adversarial)


def _no_more(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"attack got an unexpected keyword argument {next(iter(kwargs))!r}")


#: The modules made for foolbox models with preprocessing; they are kept so that their faster copies are.
_networks: WeakKeyDictionary[Any, Preprocessed] = WeakKeyDictionary()


def _network(model: Any) -> Any:
    """A foolbox.PyTorchModel as a module that can have a faster copy; any other model unchanged."""
    if type(model) is not _foolbox.PyTorchModel:
        return model
    network = inspect.getclosurevars(model._model).nonlocals.get("model")
    if not isinstance(network, nn.Module):
        return model
    mean, std, flip = model._preprocess_args
    if mean is None and std is None and flip is None:
        return network
    mean, std = (None if t is None else t.raw for t in (mean, std))
    made = _networks.get(model)
    # A foolbox model may be given other bounds, and with them another preprocessing.
    if made is None or made.network is not network or made.mean is not mean or made.std is not std or made.flip != flip:
        made = _networks[model] = Preprocessed(network, mean, std, flip)
    return made


def _torch_call(model: Any, inputs: Any, criterion: Any) -> tuple[Tensor, Callable[[Tensor], Any], dict[str, Any]]:
    """The images as torch tensors, a function that returns the caller's type, and the other arguments."""
    eagerpy = require("eagerpy", "eagerpy")
    images = inputs.raw if isinstance(inputs, eagerpy.Tensor) else inputs
    if not isinstance(images, Tensor):
        raise TypeError(f"fastlip attacks PyTorch models and tensors, got {type(images).__name__}")
    criteria = _foolbox.criteria
    call: dict[str, Any] = {"bounds": (float(model.bounds.lower), float(model.bounds.upper))}
    if isinstance(criterion, criteria.TargetedMisclassification):
        targets = criterion.target_classes.raw
        # With targets the true classes do not matter.
        call |= {"labels": torch.zeros_like(targets), "targets": targets}
    elif isinstance(criterion, criteria.Misclassification):
        call["labels"] = criterion.labels.raw
    elif isinstance(criterion, (Tensor, eagerpy.Tensor)):
        call["labels"] = criterion.raw if isinstance(criterion, eagerpy.Tensor) else criterion
    else:
        raise ValueError(
            f"criterion must be a (targeted) misclassification, got {criterion!r}; a function (logits, labels) -> bool "
            "is the attack's option criterion"
        )
    return images, (lambda x: eagerpy.astensor(x) if isinstance(inputs, eagerpy.Tensor) else x), call

"""AutoAttack's interface over :func:`fastlip.attacks.evaluate`.

    from fastlip.integrations.autoattack import AutoAttack
    adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
    adversarial = adversary.run_standard_evaluation(images, labels, bs=250)

The attacks are those of :func:`fastlip.attacks.suite`, in which FMN takes the place of FAB. Unlike AutoAttack's own
class, this one leaves the global random state alone, takes any bounds, and keeps the results per image in
``evaluation``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlip import attacks
from fastlip.attacks import EvaluationResult
from fastlip.integrations._names import named
from fastlip.ops import Bounds, Norm

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
#: AutoAttack's names for fastlip's arguments.
_NAMES = {"inputs": "x_orig", "labels": "y_orig", "batch_size": "bs", "progress": "verbose", "suite": "version"}


class AutoAttack:
    """A standardised evaluation.

    Args:
        model: maps images to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball.
        seed: seed of all random draws; drawn from the default generator if None.
        verbose: print the result, and show progress on standard error (which needs tqdm).
        attacks_to_run: names from "apgd-ce", "apgd-dlr", "apgd-t", "fmn" (also called "fab" and "fab-t") and
            "square", for ``version="custom"``.
        version: "standard", "rand" or "custom".
        device: the device on which batches are attacked; that of the model if None.
        bounds: limits of valid images.
        fast: as in :func:`fastlip.attacks.pgd`.
        precision: as in :func:`fastlip.attacks.pgd`.

    Attributes:
        evaluation: the result of the last run.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        device: torch.device | str | None = None,
        bounds: Bounds = (0.0, 1.0),
        fast: bool = False,
        precision: attacks.Precision = None,
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        if attacks_to_run and version != "custom":
            raise ValueError("attacks_to_run needs version='custom'")
        self.model = model
        self.norm, self.eps, self.bounds = norm, eps, bounds
        self.seed, self.verbose, self.device = seed, verbose, device
        self.fast, self.precision = fast, precision
        self.attacks = _attacks(version, attacks_to_run, _NORMS[norm], eps, bounds)
        self.evaluation: EvaluationResult | None = None

    def run_standard_evaluation(
        self,
        x_orig: Tensor,  # [N, ...]
        y_orig: Tensor,  # [N]
        bs: int = 250,
        return_labels: bool = False,
    ) -> Any:
        """The worst case over the attacks: images [N, ...] like ``x_orig``, and the model's decisions if wanted."""
        self.evaluation = self._evaluate(x_orig, y_orig, bs, self.attacks)
        adversarial = self.evaluation.adversarial.to(x_orig.device)
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
            found = self._evaluate(x_orig, y_orig, bs, {name: attack}).adversarial.to(x_orig.device)
            out[name] = (found, self._decisions(found, bs)) if return_labels else found
        return out

    def clean_accuracy(
        self,
        x_orig: Tensor,  # [N, ...]
        y_orig: Tensor,  # [N]
        bs: int = 250,
    ) -> float:
        """Share of images classified correctly."""
        return (self._decisions(x_orig, bs) == y_orig).double().mean().item()

    def _evaluate(self, x: Tensor, y: Tensor, bs: int, suite: dict[str, attacks.Attack]) -> EvaluationResult:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        with named(_NAMES):
            found = attacks.evaluate(
                self.model, x, y, suite, norm=_NORMS[self.norm], eps=self.eps, bounds=self.bounds, batch_size=bs,
                seed=seed, device=self.device, fast=self.fast, precision=self.precision, progress=self.verbose,
            )  # fmt: skip
        if self.verbose:
            print(found)
        return found

    def _decisions(self, x: Tensor, bs: int) -> Tensor:
        training = [m for m in self.model.modules() if m.training]
        device = self.device or next((p.device for p in self.model.parameters()), x.device)
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                return torch.cat([self.model(part.to(device)).argmax(1).to(x.device) for part in x.split(bs)])
        finally:
            for module in training:
                module.training = True


def _attacks(version: str, names: Sequence[str], norm: Norm, eps: float, bounds: Bounds) -> dict[str, attacks.Attack]:
    if version != "custom":
        with named(_NAMES):  # suite() refuses strings that it does not know
            return attacks.suite(version, norm=norm, eps=eps, bounds=bounds)  # type: ignore[arg-type]
    known = attacks.suite("standard", norm=norm, eps=eps, bounds=bounds)
    known["apgd-dlr"] = partial(attacks.apgd, loss="dlr", norm=norm, eps=eps, bounds=bounds)
    chosen: dict[str, attacks.Attack] = {}
    for name in names:
        own = "fmn" if name in ("fab", "fab-t") else name
        if own not in known:
            raise ValueError(f"attacks_to_run must be names out of {', '.join(known)}, got {name!r}")
        chosen[name] = known[own]
    if not chosen:
        raise ValueError("version='custom' needs attacks_to_run")
    return chosen

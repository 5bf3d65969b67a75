"""Attacks with the signature that AttackBench calls.

import attackbench
from fastlip import attacks
from fastlip.integrations.attackbench import as_attackbench
attack = as_attackbench(attacks.min_norm, method="fmn")
results = attackbench.run_attack(model, loader, attack, threat_model="l2")
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlip.attacks import MinNormResult

#: AttackBench's radii for attacks within a ball on CIFAR-10.
_EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}


def as_attackbench(attack: Callable[..., Tensor | MinNormResult], **options: Any) -> Callable[..., Tensor]:
    """``attack`` as ``f(model, inputs, labels, targets, targeted, threat_model, epsilon) -> images``.

    Args:
        attack: a function of :mod:`fastlip.attacks`.
        options: keywords for ``attack``. If it takes ``eps`` and none is given, the radius is the usual one on
            CIFAR-10: 8/255, 0.5 and 12. The ``epsilon`` that ``attackbench.run_attack`` is given takes precedence, and
            is the ``eps_max`` of an attack that looks for the smallest perturbation.

    Raises:
        TypeError: ``attack`` does not take a norm and bounds.
    """
    known = inspect.signature(attack).parameters
    if "norm" not in known or "bounds" not in known:
        raise TypeError(f"attack must take norm and bounds, which {getattr(attack, '__name__', attack)} does not")

    def run(
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        targeted: bool = False,
        threat_model: str = "linf",
        epsilon: float | None = None,
    ) -> Tensor:
        if threat_model not in _EPS:
            raise ValueError(f"threat_model must be one of {', '.join(_EPS)}, got {threat_model!r}")
        call: dict[str, Any] = {"norm": threat_model}
        if "eps" in known:
            call["eps"] = _EPS[threat_model]
        if targeted:
            call["targets"] = targets
        # Copies, because an attack may write into its arguments and AttackBench judges by them.
        limit = {} if epsilon is None else {"eps" if "eps" in known else "eps_max": epsilon}
        found = attack(model, inputs.clone(), labels.clone(), **call | options | limit)
        return found.adversarial if isinstance(found, MinNormResult) else found

    name = getattr(attack, "__name__", "attack")
    run.__name__ = name
    # AttackBench reads these attributes of the function.
    run._attackbench_name = name  # type: ignore[attr-defined]
    run._attackbench_lib = "fastlip"  # type: ignore[attr-defined]
    return run

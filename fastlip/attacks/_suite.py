"""Named suites of attacks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from fastlip.attacks._apgd import apgd
from fastlip.attacks._arguments import number, shown
from fastlip.attacks._min_norm import MinNormResult, min_norm
from fastlip.attacks._pgd import pgd
from fastlip.attacks._square import square
from fastlip.ops import Bounds, Norm
from fastlip.ops._checks import checked_norm

#: Called as attack(model, inputs, labels, ...), with those of ``bounds``, ``ids`` and ``generator`` that it takes.
Attack = Callable[..., Tensor | MinNormResult]
Suite = Literal["standard", "rand", "quick"]

#: Attacks that need the model's outputs alone.
BLACK_BOX: tuple[Callable[..., Any], ...] = (square,)


def suite(
    name: Suite = "standard",
    *,
    norm: Norm = "linf",
    eps: float,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, Attack]:
    """Attacks for :func:`evaluate`, weakest first, as in AutoAttack (Croce and Hein 2020, 2021).

    "standard" has APGD with cross-entropy (in "l1" 5 restarts), APGD-T on 9 classes (in "l1" on 5, with 300 steps), FMN
    as the minimum-norm attack in place of FAB (in "l1" with 400 steps), and Square with 5000 queries. The further steps
    in "l1" are fastlip's own: runs of 100 miss images by chance there. "rand", for models with random outputs, has APGD
    with cross-entropy and with DLR. "quick" has PGD with 20 steps and APGD-T on 3 classes with 50 steps.

    Raises:
        ValueError: the name or the norm is unknown, or the radius is below 0.
        TypeError: the radius is not a float.

    Example:
        >>> from fastlip import attacks
        >>> suite = attacks.suite("standard", norm="linf", eps=8 / 255)
        >>> print(list(suite))
    """
    norm = checked_norm(norm)
    eps = number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    ball: dict[str, Any] = {"norm": norm, "eps": eps, "bounds": bounds}
    restarts, classes, steps, fmn_steps = (5, 5, 300, 400) if norm == "l1" else (1, 9, 100, 100)
    if name == "standard":
        nearest = partial(min_norm, method="fmn", loss="margin", norm=norm, eps_max=eps, bounds=bounds)
        return {
            "apgd-ce": partial(apgd, loss="ce", restarts=restarts, **ball),
            "apgd-t": partial(apgd, loss="dlr", target_classes=classes, steps=steps, **ball),
            "fmn": partial(nearest, fmn_steps=fmn_steps),
            "square": partial(square, **ball),
        }
    if name == "rand":
        return {"apgd-ce": partial(apgd, loss="ce", **ball), "apgd-dlr": partial(apgd, loss="dlr", **ball)}
    if name == "quick":
        return {
            "pgd": partial(pgd, loss="ce", **ball),
            "apgd-t": partial(apgd, loss="dlr", target_classes=3, steps=50, **ball),
        }
    raise ValueError(f"suite must be standard, rand or quick, got {shown(name)}")


def is_black_box(attack: Attack) -> bool:
    """Whether ``attack`` needs outputs alone, by its ``black_box`` attribute or by the function that it wraps."""
    if hasattr(attack, "black_box"):
        return bool(attack.black_box)
    inner = attack.func if isinstance(attack, partial) else attack
    return inner in BLACK_BOX

"""What an evaluation found."""

import importlib
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlip._figures import axes_or_new
from fastlip._json import reading
from fastlip._pages import fragment_if_possible, page
from fastlip.attacks._arguments import shown
from fastlip.attacks._counts import PassCounts

#: Values of :attr:`EvaluationResult.first_success` for images on which no attack succeeded.
ROBUST, MISCLASSIFIED = -1, -2


@dataclass(frozen=True)
class EvaluationResult:
    """What a suite of attacks achieved on each of N images.

    Attributes:
        attacks: names of the attacks in the order in which they ran.
        clean: whether the image itself is classified correctly, [N] bool.
        robust: whether it is, and remains so under every attack, [N] bool.
        first_success: position in ``attacks`` of the first attack that succeeded on the image, [N] int64; -1 where the
            image is robust, -2 where it was misclassified to begin with.
        success: which attacks succeeded on which images, [A, N] bool. Attacks after the first success did not try the
            image (unless ``every_attack``).
        adversarial: the adversarial image of the first success, else the image itself, [N, ...], on the CPU; None where
            the images came in batches, which ``collect`` hands over instead.
        counts: images that each attack sent through the model; empty where the model is no module, or TorchScript.
        seconds: time that each attack took.
        warnings: reasons why the result may overestimate the robustness.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastlip import attacks
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
        >>> images = torch.rand(2, 3, 2, 2)
        >>> labels = model(images).argmax(1)
        >>> suite = attacks.suite("quick", norm="linf", eps=0.1)
        >>> found = attacks.evaluate(model, images, labels, suite, norm="linf", eps=0.1)
        >>> print(found.accuracy_after("pgd"), found.first_success)
        >>> again = attacks.EvaluationResult.from_json(found.to_json())
    """

    attacks: tuple[str, ...]
    clean: Tensor
    robust: Tensor
    first_success: Tensor
    success: Tensor
    adversarial: Tensor | None
    counts: dict[str, PassCounts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def passes(self) -> dict[str, PassCounts]:
        """The former name of :attr:`counts`."""
        _warn_of_renaming("passes", "counts")
        return self.counts

    @property
    def fell_to(self) -> Tensor:
        """The former name of :attr:`first_success`."""
        _warn_of_renaming("fell_to", "first_success")
        return self.first_success

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are classified correctly; NaN without images."""
        return self.clean.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are classified correctly under every attack; NaN without images."""
        return self.robust.double().mean().item()

    def accuracy_after(self, attack: str) -> float:
        """Share of images that are robust to ``attack`` and to all attacks before it.

        Raises:
            ValueError: no attack has that name.
        """
        if attack not in self.attacks:
            raise ValueError(f"attack must be one of {', '.join(self.attacks)}, got {shown(attack)}")
        last = self.attacks.index(attack)
        adversarial = self.success[: last + 1].any(0)
        return (self.clean & ~adversarial).double().mean().item()

    def to_dataframe(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each image; needs pandas.

        ``clean`` and ``robust`` are bools, ``first_success`` is the attack that succeeded first (None where none did),
        and each attack has a column ``success: NAME``.

        Raises:
            ImportError: pandas is missing.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from None
        first = [self.attacks[i] if i >= 0 else None for i in self.first_success.tolist()]
        columns = {"clean": self.clean.numpy(), "robust": self.robust.numpy(), "first_success": first}
        columns |= {f"success: {name}": row.numpy() for name, row in zip(self.attacks, self.success, strict=True)}
        return pandas.DataFrame(columns)

    def to_json(self) -> str:
        """All but the images as indented JSON, a number for each image."""
        data = {
            "attacks": list(self.attacks),
            "clean": self.clean.int().tolist(),
            "robust": self.robust.int().tolist(),
            "first_success": self.first_success.tolist(),
            "success": self.success.int().tolist(),
            "counts": {name: [counts.forward, counts.backward] for name, counts in self.counts.items()},
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationResult":
        """The result that :meth:`to_json` wrote, without the images.

        Raises:
            ValueError: ``text`` is no such result.
        """
        with reading(cls):
            data = json.loads(text)
            clean, robust = (torch.tensor(data[name], dtype=torch.bool) for name in ("clean", "robust"))
            return cls(
                tuple(data["attacks"]),
                clean,
                robust,
                torch.tensor(data["first_success"], dtype=torch.int64),
                torch.tensor(data["success"], dtype=torch.bool).reshape(len(data["attacks"]), len(clean)),
                None,
                {name: PassCounts(*pair) for name, pair in data["counts"].items()},
                dict(data["seconds"]),
                tuple(data["warnings"]),
            )

    def to_html(self, title: str = "Robust accuracy") -> str:
        """A self-contained page with this heading: accuracies, and a row for each attack.

        Raises:
            ImportError: Jinja2 is not installed.
        """
        return page("evaluation.html", title, **self._shown())

    def _repr_html_(self) -> str | None:
        return fragment_if_possible("evaluation.html", **self._shown())

    def _shown(self) -> dict[str, Any]:
        """The values of the template."""
        rows = []
        for at, name in enumerate(self.attacks):
            counts = self.counts.get(name)
            rows.append(
                {
                    "attack": name,
                    "accuracy": 100.0 * self.accuracy_after(name),
                    "fell": int((self.first_success == at).sum()),
                    "seconds": self.seconds[name],
                    "forward": "" if counts is None else counts.forward,
                    "backward": "" if counts is None else counts.backward,
                }
            )
        return {"result": self, "rows": rows}

    def plot(self, axes: Any = None) -> Any:
        """Draw the accuracy after each attack, and return matplotlib's axes.

        Args:
            axes: where to draw; a new figure if None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes = axes_or_new(axes, (5.0, 3.0))
        names = ["clean", *(f"after {name}" for name in self.attacks)]
        axes.bar(names, [self.clean_accuracy, *map(self.accuracy_after, self.attacks)])
        axes.set_ylabel("accuracy")
        axes.set_ylim(0.0, 1.0)
        return axes

    def __str__(self) -> str:
        lines = [f"{len(self.clean)} images, clean accuracy {self.clean_accuracy:.2%}"]
        for name in self.attacks:
            line = f"after {name:<12} {self.accuracy_after(name):.2%}  {self.seconds[name]:.1f} s"
            if name in self.counts:
                counts = self.counts[name]
                line += f", {counts.forward} forward and {counts.backward} backward passes"
            lines.append(line)
        lines.append(f"robust accuracy {self.robust_accuracy:.2%}")
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])


def _warn_of_renaming(old: str, new: str) -> None:
    warnings.warn(f"EvaluationResult.{old} is now {new}", DeprecationWarning, stacklevel=3)

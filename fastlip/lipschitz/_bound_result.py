"""What :func:`lipschitz_bound` returns: the bound, its parts, and how they are shown and kept."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastlip._figures import axes_or_new
from fastlip._json import reading
from fastlip._pages import fragment_if_possible, page
from fastlip.lipschitz._domain import Domain
from fastlip.lipschitz._log_arithmetic import exp10
from fastlip.norms import NormInterval


@dataclass(frozen=True)
class Part:
    """One factor of a bound.

    Attributes:
        name: qualified name of the module, or the place where a function is called.
        kind: class of the module, or name of the function.
        log10_factor: log10 of the factor that this part contributes.
        norm: interval of the layer's norm, for layers with weights.
        branches: for what combines several tensors, the parts of each branch since their common origin; for a "joint
            bound" of several steps, their own parts, whose product is larger.
        sizes: where the factor depends on how large the inputs are: the largest magnitude of an element of each, on the
            bound's domain.
    """

    name: str
    kind: str
    log10_factor: float
    norm: NormInterval | None = None
    branches: tuple[tuple["Part", ...], ...] = ()
    sizes: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The part as plain Python values."""
        result: dict[str, Any] = {"name": self.name, "kind": self.kind, "log10_factor": self.log10_factor}
        if self.norm is not None:
            result |= asdict(self.norm)
        if self.sizes:
            result["sizes"] = list(self.sizes)
        if self.branches:
            result["branches"] = [[part.to_dict() for part in branch] for branch in self.branches]
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Part":
        """The part that :meth:`to_dict` gave."""
        names = [f.name for f in fields(NormInterval)]
        return cls(
            data["name"],
            data["kind"],
            data["log10_factor"],
            NormInterval(*(data[name] for name in names)) if "upper" in data else None,
            tuple(tuple(map(cls.from_dict, branch)) for branch in data.get("branches", ())),
            tuple(data.get("sizes", ())),
        )


@dataclass(frozen=True)
class LipschitzBound:
    """Upper bound on a network's L2 Lipschitz constant from its input to its output, in eval mode.

    Attributes:
        log10_upper: log10 of the bound.
        confidence: probability that the bound holds, over the random start vectors; 1.0 if nothing is random.
        parts: the factors from input to output; their logarithms add up to ``log10_upper``.
        log10_product: log10 of the product of the layers' upper norms, with BatchNorm folded into them. It is often
            quoted, but it is not a bound for a network with skip connections.
        log10_margin: log10 of a bound for the difference of any two outputs, as margins need it: by the largest
            distance of two rows of the last layer if that is linear, otherwise sqrt(2) times the bound.
        log10_plain: log10 of the bound with skip + branch for every residual block.
        seed: seed of the random start vectors, None if none were drawn.
        domain: the set of inputs between which the bound holds.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> bound = fastlip.lipschitz_bound(model, (6,))
        >>> for part in bound.parts:
        ...     print(part.name, part.log10_factor)
        >>> again = fastlip.LipschitzBound.from_json(bound.to_json())
    """

    log10_upper: float
    confidence: float
    parts: tuple[Part, ...]
    log10_product: float
    log10_margin: float
    log10_plain: float
    seed: int | None
    domain: Domain

    @property
    def upper(self) -> float:
        """The bound itself; inf if it overflows a float."""
        return exp10(self.log10_upper)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON apart from an infinite ``upper``."""
        return {
            "upper": self.upper,
            "log10_upper": self.log10_upper,
            "confidence": self.confidence,
            "log10_product": self.log10_product,
            "log10_margin": self.log10_margin,
            "log10_plain": self.log10_plain,
            "seed": self.seed,
            "domain": self.domain.to_dict(),
            "parts": [part.to_dict() for part in self.parts],
        }

    def to_json(self) -> str:
        """``to_dict``, with the whole domain, as indented JSON."""
        return json.dumps(self.to_dict() | {"domain": self.domain.to_state()}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LipschitzBound":
        """The bound that :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is no such bound.
        """
        with reading(cls):
            data = json.loads(text)
            names = [f.name for f in fields(cls)]
            read: dict[str, Any] = {
                "parts": tuple(map(Part.from_dict, data["parts"])),
                "domain": Domain.from_state(data["domain"]),
            }
            return cls(**{name: read.get(name, data[name]) for name in names})

    def to_html(self, title: str = "Upper Lipschitz constant") -> str:
        """A self-contained page with this heading: the bound and a row for each of its parts.

        Raises:
            ImportError: Jinja2 is not installed.
        """
        return page("bound.html", title, **self._shown())

    def _repr_html_(self) -> str | None:
        return fragment_if_possible("bound.html", **self._shown())

    def _shown(self) -> dict[str, Any]:
        """The values of the template."""
        rows = list(_rows(self.parts, 0))
        longest = max((row["log10"] for row in rows if math.isfinite(row["log10"])), default=0.0)
        for row in rows:
            row["share"] = min(max(100.0 * row["log10"] / longest, 0.0), 100.0) if longest > 0.0 else 0.0
        return {"bound": self, "rows": rows, "shown": _show, "chance": self._chance}

    def plot(self, axes: Any = None) -> Any:
        """Draw log10 of the factors from input to output, and return matplotlib's axes.

        Args:
            axes: where to draw; a new figure if None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes = axes_or_new(axes, (7.0, 0.6 + 0.22 * max(len(self.parts), 3)))
        places = range(len(self.parts))
        axes.barh(places, [part.log10_factor for part in self.parts])
        axes.set_yticks(places, [f"{part.name} ({part.kind})" for part in self.parts])
        axes.invert_yaxis()
        axes.set_xlabel("log10 of the factor")
        return axes

    @property
    def _chance(self) -> str:
        return "certain" if self.confidence == 1.0 else f"confidence 1 - {1.0 - self.confidence:.2g}"

    def __str__(self) -> str:
        where = f" {self.domain}" if self.domain.restricted else ""
        head = f"L2 Lipschitz constant{where} at most {_show(self.log10_upper)} ({self._chance})"
        tail = f"skip + branch {_show(self.log10_plain)}; plain product of layer norms {_show(self.log10_product)}"
        return "\n".join([head, *_lines(self.parts, 1), tail])


def _rows(parts: tuple[Part, ...], depth: int) -> Iterator[dict[str, Any]]:
    """The lines of a table of parts: what each is, how deep it is nested, and log10 of its factor."""
    for part in parts:
        yield {"depth": depth, "name": part.name, "kind": part.kind, "log10": part.log10_factor}
        for branch in part.branches:
            total = sum(p.log10_factor for p in branch)
            yield {"depth": depth + 1, "name": "branch", "kind": "", "log10": total}
            yield from _rows(branch, depth + 2)


def _lines(parts: tuple[Part, ...], depth: int) -> Iterator[str]:
    for part in parts:
        of = f"; inputs at most {' and '.join(f'{size:.4g}' for size in part.sizes)}" if part.sizes else ""
        yield f"{'  ' * depth}× {_show(part.log10_factor)}  {part.name} ({part.kind}{of})"
        for branch in part.branches:
            yield f"{'  ' * (depth + 1)}branch {_show(sum(p.log10_factor for p in branch))}"
            yield from _lines(branch, depth + 2)


def _show(log10: float) -> str:
    return f"{exp10(log10):.4g}" if abs(log10) < 6 or log10 == -math.inf else f"10^{log10:.3f}"

"""The norms of a model's layers, as one object to read, compare and export."""

import csv
import importlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

from fastlip._figures import axes_or_new
from fastlip._json import reading
from fastlip._pages import fragment_if_possible, page
from fastlip.norms._interval import DID_NOT_RUN, NormInterval, confidence_text, width_text

#: Most weights of one reason that text names; ``left_out`` has all.
_NAMED = 6


@dataclass(frozen=True)
class NormReport(Mapping[str, NormInterval]):
    """Norm intervals of a model's layers by qualified name, in order of execution.

    Attributes:
        intervals: layer name to interval.
        descriptions: layer name to a short description of the layer.
        confidence: probability that all upper sides hold at once; 1.0 when all are deterministic.
        seed: seed of the random starts, None if nothing was drawn.
        left_out: the weights of the model that no layer of the report accounts for, by name (of what holds them or is
            given them, if that is no name of a tensor), each with the reason; there is no product unless they did not
            run.

    Example:
        >>> from torch import nn
        >>> import fastlip
        >>> report = fastlip.layer_norms(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (6,))
        >>> for name, interval in report.items():
        ...     print(name, interval.upper)
        >>> again = fastlip.NormReport.from_json(report.to_json())
    """

    intervals: dict[str, NormInterval]
    descriptions: dict[str, str]
    confidence: float
    seed: int | None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NormInterval:
        return self.intervals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    @property
    def log10_product_upper(self) -> float | None:
        """log10 of the product of the upper sides: a bound for these layers in sequence, without skips and pooling.

        None where weights that ran are left out: the product of the others says nothing of the model.
        """
        return None if self._unbounded else _log10_product(interval.upper for interval in self.values())

    @property
    def log10_product_lower(self) -> float | None:
        """log10 of the product of the lower sides, below which the product of the norms cannot be; None as above."""
        return None if self._unbounded else _log10_product(interval.lower for interval in self.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "confidence": self.confidence,
            "seed": self.seed,
            "log10_product_lower": self.log10_product_lower,
            "log10_product_upper": self.log10_product_upper,
            "layers": self._rows(),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out.items()],
        }

    def to_json(self) -> str:
        """``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "NormReport":
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is no such report.
        """
        with reading(cls):
            data = json.loads(text)
            rows = data["layers"]
            fields = [f.name for f in dataclass_fields(NormInterval)]
            return cls(
                {row["name"]: NormInterval(*(row[name] for name in fields)) for row in rows},
                {row["name"]: row["layer"] for row in rows},
                data["confidence"],
                data["seed"],
                {left["name"]: left["reason"] for left in data["left_out"]},
            )

    def to_html(self, title: str = "Operator norms") -> str:
        """A self-contained page with this heading: a row for each layer, and what is left out.

        Raises:
            ImportError: Jinja2 is not installed.
        """
        return page("norms.html", title, **self._shown())

    def _repr_html_(self) -> str | None:
        return fragment_if_possible("norms.html", **self._shown())

    def _shown(self) -> dict[str, Any]:
        """The values of the template."""
        longest = max((i.upper for i in self.values() if 0.0 < i.upper < math.inf), default=1.0)
        product = self.product()
        return {
            "report": self,
            "product": f"{product[0].upper()}{product[1:]}",
            "confidence": confidence_text(self.confidence),
            "share": lambda interval: min(100.0 * interval.upper / longest, 100.0),
            "width": width_text,
        }

    def plot(self, axes: Any = None) -> Any:
        """Draw the layers' intervals, in order of execution, and return matplotlib's axes.

        Args:
            axes: where to draw; a new figure if None.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes = axes_or_new(axes, (7.0, 0.6 + 0.22 * max(len(self), 3)))
        places = range(len(self))
        middles = [0.5 * (i.lower + i.upper) for i in self.values()]
        errors = [
            [m - i.lower for m, i in zip(middles, self.values(), strict=True)],
            [i.upper - m for m, i in zip(middles, self.values(), strict=True)],
        ]
        axes.errorbar(middles, places, xerr=errors, fmt="|", capsize=3)
        axes.set_yticks(places, list(self))
        axes.invert_yaxis()
        axes.set_xlabel("norm")
        return axes

    def to_csv(self) -> str:
        """One line per layer, with a header; weights that are left out have none."""
        out = io.StringIO()
        rows = self._rows()
        fields = rows[0] if rows else ("name",)
        writer = csv.DictWriter(out, fieldnames=list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` indexed by layer name, ``left_out`` in its ``attrs``; needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        frame = pandas.DataFrame(self._rows()).set_index("name")
        frame.attrs["left_out"] = dict(self.left_out)
        return frame

    @property
    def reasons(self) -> dict[str, list[str]]:
        """The weights that are left out, by the reason."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.left_out.items():
            found[reason].append(name)
        return dict(found)

    @property
    def _unbounded(self) -> int:
        """How many weights are left out although the model uses them."""
        return sum(reason != DID_NOT_RUN for reason in self.left_out.values())

    def product(self) -> str:
        """The product in words, or that there is none because weights are left out."""
        low, high = self.log10_product_lower, self.log10_product_upper
        layers = f"{len(self)} layer{'s' * (len(self) != 1)}"
        if low is None or high is None:
            missing = f"{self._unbounded} weight{'s are' if self._unbounded > 1 else ' is'}"
            return f"no product: {missing} left out beside these {layers}"
        sides = ("0" if power == -math.inf else f"10^{power:.3f}" for power in (low, high))
        return f"product of {layers}: {' to '.join(sides)}"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "layer": self.descriptions[name], **asdict(interval)}
            for name, interval in self.intervals.items()
        ]

    def __str__(self) -> str:
        head = ("layer", "", "lower", "upper", "width", "method", "steps")
        body = [
            (
                name,
                self.descriptions[name],
                f"{interval.lower:.5g}",
                f"{interval.upper:.5g}",
                width_text(interval),
                interval.method,
                str(interval.iterations) if interval.iterations else "",
            )
            for name, interval in self.intervals.items()
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        aligned = [
            "  ".join(
                cell.rjust(width) if 2 <= at <= 4 or at == 6 else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *body)
        ]
        rule = "-" * max(map(len, aligned))
        missing = [f"left out: {listed_names(names)}: {reason}" for reason, names in self.reasons.items()]
        return "\n".join(
            [
                aligned[0],
                rule,
                *aligned[1:],
                rule,
                f"{self.product()}, confidence {confidence_text(self.confidence)}",
                *missing,
            ]
        )


def listed_names(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _log10_product(norms: Iterable[float]) -> float:
    norms = list(norms)
    # 0 times what has no finite upper side is 0: the norm itself is finite.
    return sum(map(math.log10, norms)) if all(norms) else -math.inf

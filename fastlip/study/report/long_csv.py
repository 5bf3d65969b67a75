"""Every number of a run in one long CSV table."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from fastlip.study.storage.schema import Results

#: Columns of the table.
LONG = ("model", "arm", "seed", "measure", "attack", "norm", "strength", "n", "value", "low", "high", "confidence")


def long_csv(results: Results) -> str:
    """All numbers with their intervals, one in each row; the comparisons of arms with scratch are last."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(LONG)
    writer.writerows(_long(results))
    return out.getvalue()


def _long(results: Results) -> Iterator[tuple[Any, ...]]:
    for model in results["models"]:
        who = (model["name"], model["arm"], model["seed"])

        def row(measure: str, e: Any, attack: str = "", norm: str = "", strength: Any = "", who: Any = who) -> Any:
            return (*who, measure, attack, norm, strength, e["n"], e["value"], e["low"], e["high"], e["confidence"])

        yield row("clean accuracy", model["clean"])
        yield row("accuracy of attacked images", model["attacked_clean"])
        for a in model["attacks"]:
            which = (a["attack"], a["norm"] or "", a["strength"])
            yield row("accuracy", a["accuracy"], *which)
            if a["noise_accuracy"] is not None:
                yield row("accuracy under noise of the same norm", a["noise_accuracy"], *which)
            yield row("average distortion", a["distortion"], *which)
            yield row("mean stretch", a["stretch"]["mean"], *which)
        for s in model["strong"]:
            yield row("accuracy", s["accuracy"], "stronger suite", s["norm"], s["strength"])
        for smallest in (model["smallest_pgd"], model["smallest_gaussian"]):
            yield row("share with a smallest perturbation", smallest["found"], smallest["attack"], "l2")
            yield row("median smallest distortion", smallest["median"], smallest["attack"], "l2")
            yield row("mean smallest distortion", smallest["mean"], smallest["attack"], "l2")
        yield row("median ratio", model["ratio_median"])
        yield row("mean Jacobian norm", model["jacobian"]["mean"])
        bound = model["lipschitz"]
        single = {"n": None, "low": None, "high": None, "confidence": None}
        certified = single | {"value": bound["log10_upper"], "confidence": bound["confidence"]}
        yield row("log10 of the certified upper Lipschitz constant", certified)
        yield row("largest observed stretch", single | {"value": model["largest_stretch"]})
        yield row("mean accuracy under corruptions", model["corruptions"]["mean"])
        for c in model["corruptions"]["rows"]:
            yield row("accuracy", c["accuracy"], c["corruption"], "", c["severity"])
        for at in model["smoothing"]["certified"]:
            yield row("certified accuracy, smoothed", at["accuracy"], "", "l2", at["radius"])
    for comparison in results["comparisons"]:
        # A comparison is between two models, so that it has no model name.
        e = comparison["difference"]
        numbers = (e["n"], e["value"], e["low"], e["high"], e["confidence"])
        yield (
            "",
            comparison["arm"],
            comparison["seed"],
            f"{comparison['measure']}, minus scratch",
            "",
            "",
            "",
            *numbers,
        )

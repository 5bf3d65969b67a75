"""Table of the paired differences between arms that questions 1 to 3 are about."""

from dataclasses import dataclass

import numpy as np

from fastlip.study.analysis.statistics import over_seeds
from fastlip.study.report.arms import arm_name, over_bounds
from fastlip.study.report.number_format import factor, interval, title_prefix
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Comparison, Estimate, Results

#: The measures in words. The logarithmic ones are compared as factors, the others as differences.
MEASURES = {
    "log smallest distortion": "smallest distortion, as a factor",
    "relative accuracy under PGD": "accuracy under PGD over clean, difference",
    "log ratio": "ratio PGD / Gaussian, as a factor",
    "clean accuracy": "clean accuracy, difference",
}


@dataclass(frozen=True)
class Group:
    """The comparisons of two arms in one measure.

    Attributes:
        arm: name of the first arm.
        against: name of the second arm.
        measure: key of :data:`MEASURES`.
        seeds: one comparison for each seed.
        overall: over all seeds; None where there is one seed.
    """

    arm: str
    against: str
    measure: str
    seeds: list[Comparison]
    overall: Estimate | None

    @property
    def logarithmic(self) -> bool:
        return self.measure.startswith("log ")


def difference_table(results: Results) -> Table:
    """Paired differences: over seeds where there are several, then seed by seed."""
    rows: list[tuple[str, ...]] = []
    for group in grouped(results):
        who = f"{arm_name(results, group.arm)} against {arm_name(results, group.against)}"
        text = factor if group.logarithmic else interval
        if group.overall is not None:
            rows.append((who, MEASURES[group.measure], "all", text(group.overall)))
        rows += [(who, MEASURES[group.measure], str(c["seed"]), text(c["difference"])) for c in group.seeds]
    return Table(
        "differences",
        f"{title_prefix(results)}: paired differences on the same images",
        ("Arms", "Measure", "Seed", "Difference"),
        tuple(rows),
        "Distortions and ratios are compared image by image on the images that both models classify correctly: × 1.2 "
        "says that the first arm's are larger by a fifth. Intervals of one seed are over images, and say how two "
        "trained models differ. Of all seeds together: ratios and clean accuracy with each image once, with an "
        "interval over images; the others as the mean over seeds, with Student's t interval."
        f"{over_bounds(results)}",
        keys=3,
    )


def grouped(results: Results) -> list[Group]:
    """The comparisons of each pair of arms in each measure."""
    found: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in results["comparisons"]:
        found.setdefault((c["arm"], c["against"], c["measure"]), []).append(c)
    groups = []
    for key, some in found.items():
        seeds = [c for c in some if c["seed"] is not None]
        together = [c["difference"] for c in some if c["seed"] is None]
        overall = together[0] if together else _mean_over_seeds(seeds) if len(seeds) > 1 else None
        groups.append(Group(*key, seeds, overall))
    return groups


def _mean_over_seeds(seeds: list[Comparison]) -> Estimate:
    """The mean of the seeds' differences; it does not exist where one seed has none."""
    values = [c["difference"]["value"] for c in seeds]
    found = [v for v in values if v is not None]
    complete = np.array(found if len(found) == len(values) else [], dtype=float)
    return over_seeds(complete, seeds[0]["difference"]["confidence"])

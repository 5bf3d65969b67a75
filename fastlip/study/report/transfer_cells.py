"""Transfer between models as a cross table: of models where they are few, of arms where they are many."""

from dataclasses import dataclass

from fastlip.study.report.arms import arms_of, title
from fastlip.study.storage.schema import Results

#: Largest number of models that the cross table shows singly.
_SINGLY = 8


@dataclass(frozen=True)
class Cell:
    """Shares fooled under perturbations and under noise (None where no image can tell), and disjoint training sets."""

    fooled: float | None
    noise: float | None
    disjoint: bool


@dataclass(frozen=True)
class TransferCells:
    """The cross table.

    Attributes:
        names: of its rows and columns.
        strengths: L2 norms, pixels in [0, 1].
        cells: by strength, source and target.
        note: says what a cell is where it is no single pair; begins with a space if it is not empty.
    """

    names: list[str]
    strengths: list[float]
    cells: dict[tuple[float, str, str], Cell]
    note: str

    def at(self, strength: float, source: str, target: str) -> Cell | None:
        return self.cells.get((strength, source, target))


def transfer_cells(results: Results) -> TransferCells:
    """The cross table of a run; over the pairs of models of two arms where there are many models."""
    found = results["transfer"]
    involved = {name for t in found for name in (t["source"], t["target"])}
    singly = len(involved) <= _SINGLY
    names: dict[str, str] = {}
    for arm in arms_of(results):
        # Two checkpoints may have one title.
        names |= {m["name"]: (title(m) if singly else arm.name) for m in arm.models if m["name"] in involved}
    if singly and len(set(names.values())) < len(names):
        names = {name: name for name in names}
    pairs: dict[tuple[float, str, str], list[Cell]] = {}
    for t in found:
        # Over arms, the diagonal is about another seed of the arm.
        if singly or t["source"] != t["target"]:
            cell = Cell(t["fooled"]["value"], t["noise"]["value"], t["disjoint"])
            pairs.setdefault((t["strength"], names[t["source"]], names[t["target"]]), []).append(cell)
    note = "" if singly else " Means over all pairs of different models of the two arms."
    cells = {
        key: Cell(_mean([c.fooled for c in some]), _mean([c.noise for c in some]), all(c.disjoint for c in some))
        for key, some in pairs.items()
    }
    return TransferCells(list(dict.fromkeys(names.values())), sorted({t["strength"] for t in found}), cells, note)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

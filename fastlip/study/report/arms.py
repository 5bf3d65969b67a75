"""The arms of a run as readers see them: names, colours, line styles and markers."""

from dataclasses import dataclass, field
from typing import Any

from fastlip._text import printable
from fastlip.study.settings.training import ARMS
from fastlip.study.storage.schema import Model, Results

_NAMES = {
    "softmax": "softmax regression",
    "mlp": "two-layer perceptron",
    "convnet": "small ConvNet",
    "resnet18": "ResNet-18",
    "scratch": "from scratch",
    "disjoint": "scratch, disjoint images",
    "matched": "scratch, compute-matched",
    "constrained": "scratch, norms bounded",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
}

#: Colours on white and on black. Any two differ by a CIEDE2000 of at least 11 on either, also as deuteranopes and
#: protanopes see them; tests/study/report/test_study_colours.py measures it.
PALETTE = (
    ("#c2510a", "#ff9a5c"),
    ("#0a5cc2", "#6cb0ff"),
    ("#057970", "#00fee2"),
    ("#722731", "#f15770"),
    ("#f44494", "#f51f9e"),
    ("#4586de", "#3b7fff"),
    ("#75084c", "#ee8aa7"),
    ("#379aa3", "#1ad6dd"),
    ("#931a0c", "#ffb5a5"),
    ("#507750", "#9bff03"),
    ("#5f9b5d", "#4e9216"),
    ("#1f21a8", "#8c82b4"),
)

_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.3, 1.3)), (0, (6, 1.5, 1.3, 1.5)), (0, (9, 3)))

_MARKERS = "osD^vPX"

#: Places in the palette: scratch and fine-tuned networks are in most figures and have the first two; an arm that was
#: added later has the last one, so that the others keep theirs.
_FIRST, _LAST = ("scratch", "finetune"), ("constrained",)
_ORDER = (*_FIRST, *(arm for arm in ARMS if arm not in _FIRST + _LAST), *_LAST)


@dataclass(frozen=True)
class Arm:
    """One arm of a run.

    Attributes:
        key: its name in results.json.
        name: its name for readers.
        place: its place in the palette; places beyond the palette's end have its colours again with other dashes.
        models: its models, one for each seed.
    """

    key: str
    name: str
    place: int
    models: list[Model] = field(default_factory=list)

    @property
    def colour(self) -> str:
        """The colour on white, which a page replaces by :attr:`variable`."""
        return PALETTE[self.place % len(PALETTE)][0]

    @property
    def variable(self) -> str:
        """The CSS variable that holds the colour."""
        return f"arm{self.place % len(PALETTE)}"

    @property
    def dashes(self) -> Any:
        """Line style for matplotlib. Colour and line style together belong to one arm alone."""
        return _DASHES[(self.place + self.place // len(PALETTE)) % len(_DASHES)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.place % len(_MARKERS)]


def arms_of(results: Results) -> list[Arm]:
    """The arms of a run in its order."""
    found: dict[str, Arm] = {}
    # Checkpoints may have any name: they take the places in order.
    free = iter(range(len(results["models"]) + len(_ORDER)))
    taken = {_ORDER.index(m["arm"]) for m in results["models"] if m["arm"] in _ORDER}
    for model in results["models"]:
        key = model["arm"]
        if key not in found:
            place = _ORDER.index(key) if key in _ORDER else next(i for i in free if i not in taken)
            found[key] = Arm(key, arm_name(results, key), place)
        found[key].models.append(model)
    return list(found.values())


def arm_name(results: Results, key: str) -> str:
    """The name of an arm for readers; a checkpoint has its own, even where it is that of an arm."""
    given = any(m["arm"] == key and m["role"] == "checkpoint" for m in results["models"])
    return printable(key) if given else _NAMES.get(key, printable(key))


def title(model: Model) -> str:
    """The name of a model for readers."""
    return printable(model["title"])


def over_bounds(results: Results) -> str:
    """What is to be said beside means over seeds where the seeds of an arm differ in more than their draws."""
    if sum(m["arm"] == "constrained" for m in results["models"]) < 2:
        return ""
    return f" The seeds of “{_NAMES['constrained']}” have different bounds, and its means are over these too."


def several_seeds(results: Results) -> bool:
    """Whether any arm has more than one model, so that means and ranges over seeds exist."""
    return len({m["arm"] for m in results["models"]}) < len(results["models"])

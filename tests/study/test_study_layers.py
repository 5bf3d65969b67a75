"""Imports within the study go one way: every folder may import only those before it."""

import ast
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "fastlip" / "study"
#: From the ground up; training and measuring stand beside each other.
FLOORS = (
    ("errors", "json_types"),
    ("settings",),
    ("storage",),
    ("training", "measure"),
    ("analysis",),
    ("report",),
    ("pipeline",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path):
    """Modules of the study that a file imports, as paths within it, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, path
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("fastlip.study."):
                yield tuple(name.split(".")[2:])


def test_every_file_has_a_floor():
    rooms = {path.relative_to(STUDY).parts[0].removesuffix(".py") for path in STUDY.rglob("*.py")}
    assert rooms - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", sorted(STUDY.rglob("*.py")), ids=lambda path: str(path.relative_to(STUDY)))
def test_a_file_imports_its_own_room_or_lower_ones(path):
    room = path.relative_to(STUDY).parts[0].removesuffix(".py")
    if room == "__init__":
        assert {found[0] for found in imported(path)} == {"report"}
        return
    for other, *_ in imported(path):
        assert other == room or FLOOR[other] < FLOOR[room], f"{path.name} imports {other}"

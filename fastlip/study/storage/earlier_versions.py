"""Run directories of versions whose settings and results this version does not read."""

from pathlib import Path
from typing import Any

from fastlip.study.errors import StudyError
from fastlip.study.storage import digests

#: A setting that all runs of fastlip 0.1 have and later ones have not.
_EARLIER, _SETTING = "fastlip 0.1", "architecture"


def is_earlier(config: Any) -> bool:
    """Whether the contents of a config.json are those of a run of an earlier version."""
    settings = config.get("settings") if isinstance(config, dict) else None
    return isinstance(settings, dict) and _SETTING in settings


def require_readable(path: Path, config: Any) -> None:
    """Raise where the run at ``path`` is of an earlier version; nothing is changed.

    Args:
        path: the run directory.
        config: the contents of its config.json.

    Raises:
        StudyError: it is; the message names the version that reads it and what is there to be read without it.
    """
    if not is_earlier(config):
        return
    there = _complete(path)
    ready = f"; complete there, as that version wrote them: {there}" if there else ""
    raise StudyError(
        f"{path} is a run of {_EARLIER}, which alone resumes it, writes its report anew and compares it{ready}. "
        "Nothing was changed",
        status=2,
    )


def _complete(path: Path) -> str:
    """The files for people that have an end and their recorded digests, in words; empty if there are none."""
    ends = {"report.html": b"</html>", "results.json": b"}", "tables/results.csv": b""}
    found = []
    for name, end in ends.items():
        file = path / name
        if file.is_file() and file.read_bytes().rstrip().endswith(end) and digests.intact(path, file):
            found.append("the tables" if name.startswith("tables") else name)
    if any((path / "figures").glob("*.svg")):
        found.append("the figures")
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)

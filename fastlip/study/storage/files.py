"""Atomic writing, and reading that turns damage into one-line errors."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlip._files import replacing
from fastlip.study.errors import StudyError

#: Remedy for a damaged file that the study can produce again.
AGAIN = "delete it and run the study in its directory again, with the settings that it was begun with"


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final newline. NaN and infinities are refused, so that any JSON reader accepts it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a NumPy archive without pickled objects."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def damaged(path: Path, reason: object, remedy: str = AGAIN) -> StudyError:
    """The error to raise about a damaged file; ``remedy`` tells the user what to do."""
    return StudyError(f"{path} is damaged ({reason}); {remedy}")


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The contents of a JSON file, whose structure :func:`fastlip.study.storage.json_files.read` checks.

    Raises:
        StudyError: the file is missing or not strict JSON (NaN, infinities, lone surrogates and excessive nesting are
            refused, too).
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except IsADirectoryError:
        raise damaged(path, "it is a folder", remedy) from None
    except RecursionError:
        raise damaged(path, "nested too deep", remedy) from None
    except ValueError as error:
        raise damaged(path, error if path.stat().st_size else "empty", remedy) from None
    return value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive by name, each checked against its CRC-32.

    Raises:
        StudyError: the file is missing or is not an intact archive.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # NumPy would advise to load it unsafely
                raise ValueError("no archive")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("no archive")
            bad = None if archive.zip is None else archive.zip.testzip()
            if bad is not None:
                raise ValueError(f"wrong CRC-32 of {bad!r}")
            return {name: archive[name] for name in archive.files}
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except IsADirectoryError:
        raise damaged(path, "it is a folder") from None
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy's reader each raise errors of their own
        raise damaged(path, error or type(error).__name__) from None


def unobstructed(root: Path, paths: tuple[Path, ...]) -> None:
    """Raise where a file blocks a folder on the way to one of ``paths``, or a folder blocks one of ``paths`` itself.

    Raises:
        StudyError: something is in the way. Only paths below ``root`` are checked.
    """
    for path in paths:
        folders = [root / folder for folder in path.relative_to(root).parents]
        for place, kind, other in [*((folder, "folder", "file") for folder in folders), (path, "file", "folder")]:
            if place.exists() and place.is_dir() != (kind == "folder"):
                raise StudyError(
                    f"{place} is a {other} where the study keeps a {kind}; move it away and run the study in its "
                    "directory again, with the settings that it was begun with"
                )


def _missing(path: Path) -> StudyError:
    return StudyError(f"{path} is missing; run the study in this directory first")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")

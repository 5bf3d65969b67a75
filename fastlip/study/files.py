"""Files that are either there and complete or not there at all."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlip._files import replacing
from fastlip.study.errors import StudyError


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline; NaN and infinities are refused, so that any reader accepts it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A NumPy archive without pickled objects."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; run the study in this directory first") from None
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; run the study in this directory first") from None
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise StudyError(f"{path} is damaged ({error}); delete it and run the same command again") from None

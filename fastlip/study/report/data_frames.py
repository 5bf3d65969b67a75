"""The numbers of a run as pandas data frames."""

import math
import os
from pathlib import Path
from typing import Any

from fastlip.study.errors import StudyError
from fastlip.study.report.long_csv import LONG, TEXT
from fastlip.study.storage import digests
from fastlip.study.storage.earlier_versions import is_earlier, require_readable
from fastlip.study.storage.files import damaged, read_arrays, read_json


def frame(run: str | os.PathLike[str]) -> Any:
    """Every number of a run's results.json, as a ``pandas.DataFrame``.

    Args:
        run: run directory with ``tables/results.csv``.

    Returns:
        One row for each estimate or proportion with its interval and for each other number. "part" and "measure" say
        where in results.json it stands; "model", "arm", "attack", "item" and the other columns before "k" say what it
        is about, and are empty or NaN where they do not apply. A run of fastlip 0.1 has fewer columns.

    Raises:
        StudyError: the file is missing or damaged, or was never written by the earlier version that the run is of.
        ImportError: pandas is missing.

    Example:
        >>> import fastlip
        >>> try:
        ...     table = fastlip.study.frame("runs/demo")  # a run directory
        ... except fastlip.study.errors.StudyError as error:
        ...     print(error)
    """
    path, config_file = Path(run) / "tables" / "results.csv", Path(run) / "config.json"
    config = read_json(config_file) if config_file.is_file() else None
    if not path.is_file():
        require_readable(Path(run), config)
        raise StudyError(f"{path} is missing; python -m fastlip.study report {run} writes it")
    remedy = f"python -m fastlip.study report {run} writes it anew"
    if not digests.intact(Path(run), path):
        raise damaged(path, f"it is not what its SHA-256 in {digests.NAME} was taken of", remedy)
    try:
        # A checkpoint may be named "007" or "NA", which are not to be read as a number or as nothing.
        table = _pandas().read_csv(path, dtype=str, keep_default_na=False)
        for column in set(table if is_earlier(config) else LONG) - set(TEXT):
            table[column] = [float(text) if text else math.nan for text in table[column]]
        return table
    except (ValueError, KeyError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        raise damaged(path, error, remedy) from None


def image_frame(run: str | os.PathLike[str]) -> Any:
    """All images under all measurements, one in each row, as a ``pandas.DataFrame``.

    Args:
        run: run directory with ``images``.

    Returns:
        Columns "model", "measurement", "id" and all arrays with one number per image.

    Raises:
        StudyError: there are no per-image files, or one is damaged.
        ImportError: pandas is missing.

    Example:
        >>> import fastlip
        >>> try:
        ...     table = fastlip.study.image_frame("runs/demo")  # a run directory
        ... except fastlip.study.errors.StudyError as error:
        ...     print(error)
    """
    pandas = _pandas()
    parts = []
    for path in sorted((Path(run) / "images").glob("*/*.npz")):
        arrays = read_arrays(path)
        if "id" in arrays:
            columns = {name: v for name, v in arrays.items() if v.shape == arrays["id"].shape}
            parts.append(pandas.DataFrame({"model": path.parent.name, "measurement": path.stem, **columns}))
    if not parts:
        raise StudyError(f"{run} holds no per-image results")
    return pandas.concat(parts, ignore_index=True)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ImportError("data frames need pandas: pip install pandas") from None
    return pandas

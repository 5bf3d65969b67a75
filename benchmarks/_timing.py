"""Shared by the benchmarks: warm medians with percentiles, the machine's description, and files of results."""

import csv
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import torch

import fastlip


def times(
    run: Callable[[], Any],
    *,
    setup: Callable[[], Any] = lambda: None,
    seconds: float = 1.0,
    least: int = 15,
    warm: int = 3,
    flush: torch.Tensor | None = None,
) -> list[float]:
    """Milliseconds of each of at least ``least`` repetitions, after ``warm`` that do not count.

    ``setup`` runs before each, outside the time; ``flush`` (GPU) is overwritten before each to empty the L2.
    """
    for _ in range(warm):
        setup()
        run()
    out: list[float] = []
    stop = time.perf_counter() + seconds
    while len(out) < least or time.perf_counter() < stop:
        setup()
        if flush is not None:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            out.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            out.append((time.perf_counter() - begin) * 1e3)
    return out


def percentiles(ms: list[float]) -> tuple[float, float, float]:
    """Return the median, the 20th and the 80th percentile."""
    low, mid, high = (
        torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return mid, low, high


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


@cache
def driver_version() -> str:
    """Return the GPU driver's version as nvidia-smi gives it; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    out = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    return out.split("\n", 1)[0].strip()


def environment(device: str) -> dict[str, str]:
    """Columns that every row of a results file carries; on a GPU also the driver and CUDA versions."""
    info = fastlip.build_info()
    gpu = {"driver": driver_version(), "cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        "device": device_name(device),
        "isa": info.cpu_isa or "" if device == "cpu" else f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}",
        "backend": info.backends[device].name,
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "torch": torch.__version__,
        "fastlip": info.version,
    } | gpu


class Results:
    """A CSV file that holds every row as soon as it was measured, even if the process dies afterwards.

    A file of that name goes at once, so that rows of two runs never mix, unless columns are given (``keys``) by which a
    row can take the place of an earlier one. A row is put on the disk before the next is measured; where it brings a
    column of its own or takes a place, the whole file is written beside itself and takes the place of the other.

    Attributes:
        rows: as added, numbers unrounded; those of an earlier run as text.
    """

    def __init__(
        self, path: Path, shared: dict[str, Any] | None = None, digits: int = 4, keys: tuple[str, ...] = ()
    ) -> None:
        """``shared``: columns of every row, last in the file. Numbers keep so many significant ``digits``.

        ``keys``: columns that name a measurement. An earlier run's rows stay until one of the same name is added.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, list[dict[str, Any]]()
        self._shared, self._digits, self._keys = shared or {}, digits, keys
        self._columns: list[str] = []
        self._places: dict[tuple[str, ...], int] = {}
        if keys and path.exists():
            with path.open(newline="") as f:
                self.rows = [dict.fromkeys(self._shared, "") | row for row in csv.DictReader(f)]
            self._places = {self._name(row): i for i, row in enumerate(self.rows)}
            self.rewrite()
        else:
            path.unlink(missing_ok=True)

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row that measures the same as ``row``, by the keys."""
        place = self._places.get(self._name(row))
        return None if place is None else self.rows[place]

    def add(self, row: dict[str, Any]) -> None:
        """Write ``row``; where one measures the same, in its place."""
        name = self._name(row)
        if self._keys and name in self._places:
            self.rows[self._places[name]] = row
            self.rewrite()
            return
        self._places[name] = len(self.rows)
        self.rows.append(row)
        if any(column not in self._columns and column not in self._shared for column in row):
            self.rewrite()
        else:
            with self.path.open("a", newline="") as f:
                self._put(f, [row])

    def rewrite(self) -> None:
        """Write all of the file again, after rows were changed."""
        names = dict.fromkeys(name for row in self.rows for name in row if name not in self._shared)
        self._columns = list(names)
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="") as f:
            csv.writer(f).writerow([*self._columns, *self._shared])
            self._put(f, self.rows)
        part.replace(self.path)

    def _put(self, f: TextIO, rows: list[dict[str, Any]]) -> None:
        writer = csv.DictWriter(f, fieldnames=[*self._columns, *self._shared], restval="")
        for row in rows:
            writer.writerow({k: self._written(v) for k, v in (self._shared | row).items()})
        f.flush()
        os.fsync(f.fileno())

    def _written(self, value: Any) -> Any:
        return f"{value:.{self._digits}g}" if isinstance(value, float) else value

    def _name(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(self._written(row[key])) for key in self._keys)


class Session:
    """A benchmark's measurements one after the other; one that fails or takes too long does not affect the others."""

    def __init__(self, limit: float) -> None:
        """``limit``: seconds from now after which no further measurement is begun, nor one that would end later."""
        self._begun, self._limit = time.perf_counter(), limit
        self._left_out: list[str] = []
        self._failed: list[str] = []

    def attempt(self, name: str, measure: Callable[[], Any], seconds: float = 0.0) -> None:
        """Measure, unless the time is up, or would be by the end of the ``seconds`` that this takes at least."""
        if time.perf_counter() - self._begun + seconds > self._limit:
            self._left_out.append(name)
            return
        try:
            measure()
        except Exception as error:  # any error: the next measurement may succeed
            self._failed.append(name)
            print(f"{name} failed:", flush=True)
            traceback.print_exception(error, file=sys.stdout)

    def close(self) -> None:
        """Print which rows are missing; exit with status 1 if a measurement failed."""
        print(f"{time.perf_counter() - self._begun:.1f} s")
        if self._left_out:
            print(f"left out to end within {self._limit:g} s: {'; '.join(self._left_out)}")
        if self._failed:
            sys.exit(f"failed: {'; '.join(self._failed)}")

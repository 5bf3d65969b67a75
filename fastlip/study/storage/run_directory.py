"""The run directory: the paths of its files, its configuration, and checks of its contents."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from fastlip.study.errors import StudyError
from fastlip.study.settings import serialization
from fastlip.study.settings.machine import Machine
from fastlip.study.settings.training import TRANSFER, WITH_SNAPSHOTS
from fastlip.study.storage import digests, json_files, schema
from fastlip.study.storage.earlier_versions import require_readable
from fastlip.study.storage.files import AGAIN, damaged, read_json, unobstructed, write_json
from fastlip.study.storage.locks import mutex


class Config(TypedDict):
    """config.json; ``settings`` are those of :class:`fastlip.study.settings.settings.Settings`."""

    settings: dict[str, Any]
    rules: list[str]
    power: list[schema.Power]
    machine: Machine
    inputs: dict[str, str]
    seeds: list[int]
    command: str
    versions: dict[str, str]
    build: dict[str, Any]


#: Remedy for a damaged config.json, without which nobody can tell how the files beside it were made.
RESTORE = "put back a copy of it, or begin anew with another --out"

#: Remedy for damaged timings.
_FORGET = "delete it, which loses how long each stage took and nothing else, and run the same command again"


@dataclass(frozen=True)
class TrainedModel:
    """One model of a run: an arm with a seed, or a checkpoint, which is ``given`` and named by its arm.

    ``epoch`` is that of a snapshot, None at the end of training.
    """

    arm: str
    seed: int
    epoch: int | None = None
    given: bool = False

    @property
    def run_name(self) -> str:
        """Name of the training run that the model comes from."""
        return self.arm if self.given else f"{self.arm}-s{self.seed}"

    @property
    def name(self) -> str:
        return self.run_name if self.epoch is None else f"{self.run_name}-e{self.epoch}"


def gaussian_name(sigma: float) -> str:
    """File name of the measurement under Gaussian noise."""
    return f"gaussian-{sigma:g}"


def pgd_name(norm: str, strength: float) -> str:
    """File name of the measurement under PGD; Linf radii are in 255ths."""
    return f"pgd-{norm}-{strength:g}"


def strong_name(norm: str, strength: float) -> str:
    """File name of the measurement under the stronger suite."""
    return f"strong-{norm}-{strength:g}"


class RunDirectory:
    """The paths inside a run directory, and the configuration of its run.

    ``config.json`` holds the settings, the rules of the verdicts in words, fingerprints of the inputs, and the
    versions and the build in use. It is written before anything else and never changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = self.config_file
        require_readable(path, read_json(file, RESTORE))
        self.config: dict[str, Any] = json_files.read(file, Config, RESTORE)
        self.machine = Machine(**self.config["machine"])
        try:
            self.settings = serialization.from_json(self.config["settings"])
            torch.device(self.machine.device)
        except (StudyError, ValueError, RuntimeError) as error:
            raise damaged(file, str(error).partition("\n")[0], RESTORE) from None
        if self.machine.threads < 1:
            raise damaged(file, f"machine.threads is {self.machine.threads}", RESTORE)

    @property
    def models(self) -> list[TrainedModel]:
        """The models at the end of their training, or the checkpoints that are measured."""
        s = self.settings
        if s.checkpoints:
            return [TrainedModel(name, s.seed, given=True) for name in s.checkpoints]
        return [TrainedModel(arm, seed) for seed in s.all_seeds for arm in s.arms]

    @property
    def snapshots(self) -> list[TrainedModel]:
        """The snapshots taken during training, of the arms that question 4 is about."""
        return [
            TrainedModel(model.arm, model.seed, epoch)
            for model in self.models
            if model.arm in WITH_SNAPSHOTS and not model.given
            for epoch in sorted(self.settings.schedule(model.arm).snapshots)
        ]

    @property
    def sources(self) -> dict[str, int]:
        """The sources that the run trains itself, by the names of their files, and the seed of each."""
        s = self.settings
        if not s.pretrains:
            return {}
        return {"source": s.seed} if s.sources == "one" else {f"source-s{seed}": seed for seed in s.all_seeds}

    def source_of(self, model: TrainedModel) -> str | None:
        """The name among :attr:`sources` of that which ``model`` starts from; None where it starts from none."""
        if model.arm not in TRANSFER or not self.sources:
            return None
        return "source" if self.settings.sources == "one" else f"source-s{model.seed}"

    def clean_up(self) -> None:
        """Remove what a killed process left behind: partial files, and training states of models that are finished."""
        for path in self.path.rglob("*.part*"):
            path.unlink()
        for state in self.path.glob("checkpoints/*.unfinished.pt"):
            name = state.name.removesuffix(".unfinished.pt")
            if self.checkpoint(name).exists() and self.training(name).exists():
                state.unlink()

    @contextlib.contextmanager
    def recorded(self, *paths: Path) -> Iterator[None]:
        """Record the SHA-256 of what the block writes to ``paths``; see :mod:`fastlip.study.storage.digests`.

        Old records are removed first: a process killed at any moment leaves files without records, never wrong records.
        """
        with mutex(self.path):
            digests.record(self.path, list(paths), forget=True)
        yield
        with mutex(self.path):
            digests.record(self.path, list(paths))

    def require_intact(self, *paths: Path) -> None:
        """Raise where one of ``paths`` differs from its recorded digest.

        Raises:
            StudyError: it does, or the records themselves are damaged.
        """
        for path in paths:
            if not digests.intact(self.path, path):
                reason = f"it is not what its SHA-256 in {digests.NAME} was taken of"
                remedies = {self.config_file: RESTORE} | dict.fromkeys(self.written_by_report, self.rewrite)
                raise damaged(path, reason, remedies.get(path, AGAIN))

    def require_unobstructed(self, *paths: Path) -> None:
        """Raise where something blocks one of ``paths``, the report, its tables and figures, or the timings."""
        unobstructed(self.path, (*paths, *self.written_by_report, self.timings, self.figures / "growth.svg"))

    def read_results(self) -> schema.Results:
        """The checked contents of results.json."""
        found = json_files.read_results(self.results, [model.name for model in self.models])
        self.require_intact(self.results)
        return found

    def read_timings(self) -> dict[str, float]:
        """Seconds that each finished stage took."""
        found: dict[str, float] = {}
        return json_files.read(self.timings, dict[str, float], _FORGET) if self.timings.exists() else found

    def record_time(self, stage: str, seconds: float) -> None:
        """Record the seconds that a stage took, since its last resumption if it was interrupted."""
        with mutex(self.path):
            write_json(self.timings, self.read_timings() | {stage: round(seconds, 2)})

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.safetensors"

    def training_state(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.unfinished.pt"

    def training(self, name: str) -> Path:
        return self.path / "training" / f"{name}.json"

    def images(self, name: str, measurement: str) -> Path:
        return self.path / "images" / name / f"{measurement}.npz"

    def lipschitz(self, name: str) -> Path:
        return self.path / "lipschitz" / f"{name}.json"

    def spectra(self, name: str, kind: str) -> Path:
        return self.path / "spectra" / name / f"{kind}.npz"

    @property
    def timings(self) -> Path:
        return self.path / "timings.json"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def tables(self) -> Path:
        return self.path / "tables"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def written_by_report(self) -> tuple[Path, Path]:
        """The HTML report and the CSV of all numbers. Users may edit the other tables and the figures freely."""
        return self.report, self.tables / "results.csv"

    @property
    def rewrite(self) -> str:
        """Remedy for a damaged one of :attr:`written_by_report`."""
        return f"python -m fastlip.study report {shlex.quote(str(self.path))} writes it anew"

"""The run directory: what is where, its configuration, and the lock that keeps a second process out."""

import contextlib
import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

import fastlip
from fastlip.study.analysis import power
from fastlip.study.errors import StudyError
from fastlip.study.settings import rules, serialization
from fastlip.study.settings.settings import Settings
from fastlip.study.storage import digests, schema
from fastlip.study.storage.files import AGAIN, damaged, unobstructed, write_json

_PACKAGES = ("fastlip", "torch", "torchvision", "numpy", "scipy", "safetensors", "matplotlib", "jinja2")


@dataclass(frozen=True)
class Machine:
    """What "auto" stood for on the machine that the run was begun on."""

    device: str
    precision: Literal["float32", "bfloat16"]
    threads: int
    compiled: bool


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


#: What to do about a damaged config.json; without it nobody can say how what lies beside it was made.
_RESTORE = "put back a copy of it, or begin anew with another --out"

#: What to do about damaged timings.
_FORGET = "delete it, which loses how long each stage took and nothing else, and run the same command again"


@dataclass(frozen=True)
class Trained:
    """One model of a run: an arm with a seed; ``epoch`` is None at the end of training, else where it was kept."""

    arm: str
    seed: int
    epoch: int | None = None

    @property
    def run_name(self) -> str:
        """The training run that it comes from."""
        return f"{self.arm}-s{self.seed}"

    @property
    def name(self) -> str:
        return self.run_name if self.epoch is None else f"{self.run_name}-e{self.epoch}"


def gaussian_name(sigma: float) -> str:
    """File name of the measurement under Gaussian noise."""
    return f"gaussian-{sigma:g}"


def pgd_name(norm: str, strength: float) -> str:
    """File name of the measurement under PGD; Linf strengths are in 255ths."""
    return f"pgd-{norm}-{strength:g}"


def strong_name(norm: str, strength: float) -> str:
    """File name of the measurement under the stronger suite."""
    return f"strong-{norm}-{strength:g}"


class RunDirectory:
    """Paths inside a run directory and the configuration it was made with.

    ``config.json`` holds the settings, the rules of the verdicts in words, fingerprints of the inputs, and the
    versions and the build in use; it is written before anything else and never again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = self.config_file
        self.config: dict[str, Any] = schema.read(file, Config, _RESTORE)
        self.machine = Machine(**self.config["machine"])
        try:
            self.settings = serialization.from_json(self.config["settings"])
            torch.device(self.machine.device)
        except (StudyError, ValueError, RuntimeError) as error:
            raise damaged(file, str(error).partition("\n")[0], _RESTORE) from None
        if self.machine.threads < 1:
            raise damaged(file, f"machine.threads is {self.machine.threads}", _RESTORE)

    @property
    def models(self) -> list[Trained]:
        """The models at the end of their training."""
        return [Trained(arm, seed) for seed in self.settings.all_seeds for arm in self.settings.arms]

    @property
    def snapshots(self) -> list[Trained]:
        """The models on their way, of the arms that question 4 is about."""
        return [
            Trained(model.arm, model.seed, epoch)
            for model in self.models
            if model.arm != "reference"
            for epoch in sorted(self.settings.schedule(model.arm).snapshots)
        ]

    @property
    def pretrains(self) -> bool:
        """Whether the study trains the source itself."""
        return self.settings.transfers and self.settings.source in ("generated", "folder")

    def tidy(self) -> None:
        """Remove what a killed process left behind: half-written files, and states of runs that had just finished."""
        for path in self.path.rglob("*.part*"):
            path.unlink()
        for state in self.path.glob("checkpoints/*.unfinished.pt"):
            name = state.name.removesuffix(".unfinished.pt")
            if self.checkpoint(name).exists() and self.training(name).exists():
                state.unlink()

    @contextlib.contextmanager
    def recorded(self, *paths: Path) -> Iterator[None]:
        """Record the SHA-256 of what the block writes to ``paths``; see :mod:`fastlip.study.storage.digests`.

        Old records go first: killed at any moment, the process leaves a file without a record and never a false one.
        """
        with alone_for_a_moment(self.path):
            digests.note(self.path, list(paths), forget=True)
        yield
        with alone_for_a_moment(self.path):
            digests.note(self.path, list(paths))

    def require_intact(self, *paths: Path) -> None:
        """Raise where one of ``paths`` is not as recorded.

        Raises:
            StudyError: it is not, or the records themselves are damaged.
        """
        for path in paths:
            if not digests.intact(self.path, path):
                reason = f"it is not what its SHA-256 in {digests.NAME} was taken of"
                remedies = {self.config_file: _RESTORE} | dict.fromkeys(self.written_by_report, self.rewrite)
                raise damaged(path, reason, remedies.get(path, AGAIN))

    def require_unobstructed(self, *paths: Path) -> None:
        """Raise where one of ``paths``, or a table, figure or the timings, cannot be written for what stands there."""
        unobstructed(self.path, (*paths, *self.written_by_report, self.timings, self.figures / "growth.svg"))

    def read_results(self) -> schema.Results:
        """results.json."""
        found = schema.read_results(self.results, [model.name for model in self.models])
        self.require_intact(self.results)
        return found

    def read_timings(self) -> dict[str, float]:
        """Seconds by stage, of those done so far."""
        found: dict[str, float] = {}
        return schema.read(self.timings, dict[str, float], _FORGET) if self.timings.exists() else found

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
        """The page, and the table of every number; other tables and all figures are for people to change."""
        return self.report, self.tables / "results.csv"

    @property
    def rewrite(self) -> str:
        """What to do about a damaged file of these."""
        return f"python -m fastlip.study report {shlex.quote(str(self.path))} writes it anew"


def check(path: Path, settings: Settings, fingerprints: dict[str, str]) -> None:
    """Raise where ``path`` cannot become or go on as the directory of this run; nothing is written.

    Raises:
        StudyError: another configuration was begun there, other inputs were used, or it holds something else.
    """
    if path.exists() and not path.is_dir():
        raise StudyError(f"--out {path} is a file; name a directory", status=2)
    _require_device(settings.device)
    if not (path / "config.json").exists():
        if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise StudyError(f"--out {path} holds something that is not a run; name a new directory", status=2)
        return
    old = RunDirectory(path)
    before, now = serialization.names(old.settings), serialization.names(settings)
    different = [f"{name} ({before[name]} there, {now[name]} now)" for name in now if before[name] != now[name]]
    different += [
        f"{name} (other files)" for name, value in fingerprints.items() if old.config["inputs"].get(name) != value
    ]
    if old.config["rules"] != rules.rules_in_words(old.settings.rules):
        # They were fixed before any result existed, and hold for this run.
        different.append("rules of the verdicts (another version of fastlip)")
    if not digests.intact(path, old.config_file):
        reason = "; ".join(["it is not what its SHA-256 was taken of", *different])
        raise damaged(old.config_file, reason, _RESTORE)
    _require_device(old.machine.device)
    if different:
        raise StudyError(
            f"{path} holds a run with another configuration: {'; '.join(different)}. Use another --out, or the same "
            "settings to resume it",
            status=2,
        )


def open_or_create(path: Path, settings: Settings, fingerprints: dict[str, str], command: str) -> RunDirectory:
    """The run directory at ``path``, made if it is not there yet; call :func:`check` first, and this alone."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "config.json").exists():
        machine = _this_machine(settings)
        write_json(
            path / "config.json",
            {
                "settings": serialization.to_json(settings),
                "rules": rules.rules_in_words(settings.rules),
                "power": power.planned(settings.rules),
                "machine": vars(machine),
                "inputs": fingerprints,
                "seeds": list(settings.all_seeds),
                "command": command,
                "versions": _versions(),
                "build": fastlip.build_info().to_dict(),
            },
        )
        digests.note(path, [path / "config.json"])
    return RunDirectory(path)


class Lock:
    """A lock on a run directory; it goes with the process, however that ends.

    Attributes:
        alone: whether no other process held the directory when this one came.
    """

    def __init__(self, descriptor: int, alone: bool) -> None:
        self._descriptor = descriptor
        self.alone = alone

    def share(self) -> None:
        """Let in other processes that join."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def locked(path: Path, join: bool = False, patience: float = 10.0) -> Iterator[Lock]:
    """Hold the run directory against other processes.

    Args:
        path: the run directory, made if need be.
        join: whether to come in beside processes that share it; one that has just begun is waited for.
        patience: seconds to wait for it.

    Raises:
        StudyError: another process holds it and does not share it.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        until = time.monotonic() + patience
        alone = held = _lock(descriptor, fcntl.LOCK_EX)
        while join and not held and time.monotonic() < until:
            held = _lock(descriptor, fcntl.LOCK_SH)
            if not held:
                time.sleep(0.1)
        if not held:
            raise StudyError(
                f"another process is running the study in {path}; wait for it, use another --out, or start all of them "
                "with --join"
            )
        yield Lock(descriptor, alone)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_for_a_moment(path: Path) -> Iterator[None]:
    """Keep other processes that share the run directory from the same few lines; they wait."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / ".moment", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_machine(settings: Settings) -> Machine:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    fast: Literal["float32", "bfloat16"] = "bfloat16" if _fast_bfloat16(torch.device(device)) else "float32"
    return Machine(
        device=device,
        precision=fast if settings.precision == "auto" else settings.precision,
        threads=settings.threads or torch.get_num_threads(),
        compiled=settings.compile == "on" or (settings.compile == "auto" and torch.device(device).type == "cuda"),
    )


def _require_device(name: str) -> None:
    try:
        kind = "auto" if name == "auto" else torch.device(name).type
    except RuntimeError:
        raise StudyError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N", status=2) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"--device {name}: torch sees no CUDA device here", status=2)


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def command_line() -> str:
    return "python -m fastlip.study " + shlex.join(sys.argv[1:])

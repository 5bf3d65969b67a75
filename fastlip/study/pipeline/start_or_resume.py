"""Start a run in a new directory, or resume it in its own, where config.json must agree with the command."""

import contextlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastlip
from fastlip.study.analysis import power
from fastlip.study.errors import StudyError
from fastlip.study.settings import rules, serialization
from fastlip.study.settings.machine import require_device, this_machine
from fastlip.study.settings.settings import Settings
from fastlip.study.storage import digests, locks
from fastlip.study.storage.files import damaged, write_json
from fastlip.study.storage.run_directory import RESTORE, RunDirectory
from fastlip.study.training.precision import precision_of_training

_PACKAGES = ("fastlip", "torch", "torchvision", "numpy", "scipy", "safetensors", "matplotlib", "jinja2")


def require_resumable(path: Path, settings: Settings, fingerprints: dict[str, str]) -> None:
    """Raise where the run can neither be started nor resumed at ``path``; nothing is written.

    Raises:
        StudyError: ``path`` holds a run with another configuration or other inputs, or something else.
    """
    if path.exists() and not path.is_dir():
        raise StudyError(f"--out {path} is a file; name a directory", status=2)
    require_device(settings.device)
    if not (path / "config.json").exists():
        if path.exists() and any(entry.name[0] != "." and entry.name != "plan" for entry in path.iterdir()):
            raise StudyError(f"--out {path} holds something that is not a run; name a new directory", status=2)
        return
    old = RunDirectory(path)
    before, now = serialization.dotted_names(old.settings), serialization.dotted_names(settings)
    different = [f"{name} ({before[name]} there, {now[name]} now)" for name in now if before[name] != now[name]]
    different += [
        f"{name} (other files)" for name, value in fingerprints.items() if old.config["inputs"].get(name) != value
    ]
    if old.config["rules"] != rules.rules_in_words(old.settings.rules):
        # The rules of a run are those fixed before it had results.
        different.append("rules of the verdicts (another version of fastlip)")
    if not digests.intact(path, old.config_file):
        reason = "; ".join(["it is not what its SHA-256 was taken of", *different])
        raise damaged(old.config_file, reason, RESTORE)
    require_device(old.machine.device)
    if different:
        raise StudyError(
            f"{path} holds a run with another configuration: {'; '.join(different)}. Use another --out, or the same "
            "settings to resume it",
            status=2,
        )


@contextlib.contextmanager
def opened(
    path: Path, settings: Settings, fingerprints: dict[str, str], join: bool, notify: Callable[[str], None]
) -> Iterator[None]:
    """Hold the run directory at ``path`` with its configuration written, made if it is missing.

    Args:
        path: the run directory.
        settings: of the run.
        fingerprints: of its inputs.
        join: whether other processes may share the directory.
        notify: called with a message while another process may hold the directory.

    Raises:
        StudyError: another process holds the directory, it does not fit the settings, or it cannot be locked.
    """
    require_resumable(path, settings, fingerprints)
    locks.probe(path)
    with locks.directory_lock(path, join, notify=notify) as lock:
        with locks.mutex(path):
            # Checked again, because another process may have started a run with other settings meanwhile.
            require_resumable(path, settings, fingerprints)
            directory = open_or_create(path, settings, fingerprints, _command_line())
        if lock.alone:
            directory.clean_up()
        if join:
            lock.share()
        yield


def open_or_create(path: Path, settings: Settings, fingerprints: dict[str, str], command: str) -> RunDirectory:
    """The run directory at ``path``, made if it is missing; call :func:`require_resumable` first, in the mutex."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "config.json").exists():
        machine = this_machine(settings)
        machine = replace(machine, precision=precision_of_training(settings, machine))
        write_json(
            path / "config.json",
            {
                "settings": serialization.to_json(settings),
                "rules": rules.rules_in_words(settings.rules),
                "power": power.sample_sizes(settings),
                "machine": vars(machine),
                "inputs": fingerprints,
                "seeds": list(settings.all_seeds),
                "command": command,
                "versions": _versions(),
                "build": fastlip.build_info().to_dict(),
            },
        )
        digests.record(path, [path / "config.json"])
    return RunDirectory(path)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _command_line() -> str:
    return "python -m fastlip.study " + shlex.join(sys.argv[1:])

"""Locks between processes: on a run directory, on a critical section, and on single stages."""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fastlip.study.errors import StudyError


class StageLocks:
    """Locks on single stages. The operating system releases them when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: int | None = None

    def acquire(self, name: str) -> bool:
        """Lock the stage ``name``; False where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.held = descriptor
        return True

    def release(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None


class DirectoryLock:
    """A lock on a run directory, released when the process ends, however it ends.

    Attributes:
        alone: whether no other process held the directory when this one locked it.
    """

    def __init__(self, descriptor: int, alone: bool) -> None:
        self._descriptor = descriptor
        self.alone = alone

    def share(self) -> None:
        """Admit other processes that join."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def directory_lock(path: Path, join: bool = False, patience: float = 10.0) -> Iterator[DirectoryLock]:
    """Lock the run directory against other processes.

    Args:
        path: the run directory, made if it is missing.
        join: whether to share the directory with processes that join; one that has just begun is waited for.
        patience: seconds to wait for it.

    Raises:
        StudyError: another process holds the directory and does not share it.
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
        yield DirectoryLock(descriptor, alone)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def mutex(path: Path) -> Iterator[None]:
    """A critical section: other processes that share the run directory wait until the block ends."""
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

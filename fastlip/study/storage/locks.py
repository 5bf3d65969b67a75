"""Locks on a run directory and on single stages of a run, on any file system that several machines may share.

A lock is a file that is created exclusively, which local and network file systems do alike (``flock`` is missing on
some and does nothing on others). It names its host and process and is touched while it is held. Another process takes
it over at once where the holder has died on the same host, and otherwise once the file has stood still for
:data:`LEASE_SECONDS`. A process that is stopped for longer may therefore find its stage done twice; both write the same
bytes, each to temporary files of its own, so nothing is lost but time.
"""

import contextlib
import hashlib
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from fastlip.study.errors import StudyError

#: Seconds for which a lock must have stood still before a process on another host takes it over.
LEASE_SECONDS = 60.0

#: Folder of all locks inside a run directory.
FOLDER = ".locks"


def _lease(path: Path) -> SoftFileLease:
    path.parent.mkdir(parents=True, exist_ok=True)
    return SoftFileLease(
        path,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=LEASE_SECONDS / 12,
        poll_interval=0.05,
        is_singleton=False,
    )


def _taken(lease: SoftFileLease, seconds: float = 0.2) -> bool:
    """Whether this process could take the lock; the time allows for removing that of a dead process first."""
    try:
        lease.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def probe(path: Path) -> None:
    """Try out whether locks keep processes apart in ``path``, which is made if need be.

    Raises:
        OSError: files cannot be created there.
        StudyError: locks do not keep processes apart.
    """
    file = path / FOLDER / f"probe-{secrets.token_hex(8)}"
    first, second = _lease(file), _lease(file)
    with first:
        shut = not _taken(second, 0)
    opened = shut and _taken(second, 0)
    second.release(force=True)
    if not (shut and opened):
        raise StudyError(f"the file system of {path} does not keep locks; put --out on another one")


class StageLocks:
    """Locks on single stages; this process holds one of them at a time."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER / "stages"
        # Kept, because how long another host's lock has stood still is a matter of having watched it.
        self._leases: dict[str, SoftFileLease] = {}
        self._held: SoftFileLease | None = None

    def acquire(self, stage: str) -> bool:
        """Take the lock on the stage of that name; False where another process has it."""
        file = self._folder / hashlib.sha256(stage.encode()).hexdigest()[:16]
        lease = self._leases.setdefault(stage, _lease(file))
        if not _taken(lease):
            return False
        self._held = lease
        return True

    def release(self) -> None:
        """Give back the lock that is held, if any."""
        if self._held is not None:
            self._held.release()
            self._held = None


class DirectoryLock:
    """The lock of this process on a run directory.

    Attributes:
        alone: whether no other process held the directory when this one locked it.
    """

    def __init__(self, alone: bool, exclusive: SoftFileLease, shared: SoftFileLease) -> None:
        self.alone = alone
        self._exclusive, self._shared = exclusive, shared

    def share(self) -> None:
        """Admit other processes that join."""
        if not self._shared.is_locked:
            self._shared.acquire()
        self._exclusive.release()


class _Holders:
    """The locks of other processes, watched for signs of life."""

    def __init__(self) -> None:
        self._leases: dict[Path, SoftFileLease] = {}
        self._touched: dict[Path, int] = {}

    def holds(self, file: Path) -> bool:
        """Whether another process holds this lock; that of a dead process is removed."""
        lease = self._leases.setdefault(file, _lease(file))
        if not _taken(lease):
            return True
        lease.release()
        return False

    def may_be_dead(self, file: Path) -> bool:
        """Whether the holder is on another host and has not touched the file since it was first looked at here."""
        try:
            text, touched = file.read_text(), file.stat().st_mtime_ns
        except OSError:
            return False  # it has just been released
        here = socket.gethostname() in re.split(r"[\s=]", text)
        return not here and self._touched.setdefault(file, touched) == touched


@contextlib.contextmanager
def directory_lock(
    path: Path, join: bool = False, patience: float = 10.0, notify: Callable[[str], None] = lambda message: None
) -> Iterator[DirectoryLock]:
    """Hold the run directory against other processes.

    Args:
        path: the run directory, made if need be.
        join: whether to come in beside processes that share it; one that has just begun is waited for.
        patience: seconds to wait for it.
        notify: is told once if the holder's host may have died, which takes :data:`LEASE_SECONDS` to find out.

    Raises:
        StudyError: another process holds the directory and does not share it.
    """
    folder = path / FOLDER
    run, joined = folder / "run", folder / "joined"
    exclusive, shared = _lease(run), _lease(joined / secrets.token_hex(8))
    holders = _Holders()
    others: list[Path] = []
    told = False
    try:
        until = time.monotonic() + patience
        while True:
            with mutex(path):
                if _taken(exclusive):
                    others = [file for file in sorted(joined.iterdir()) if holders.holds(file)]
                    if join or not others:
                        break
                    exclusive.release()
                else:
                    others = [run]
            if any([holders.may_be_dead(file) for file in others]):
                if not told:
                    notify(
                        f"a process on another host holds {path}: waiting up to {LEASE_SECONDS:.0f} s for a sign of it"
                    )
                    told = True
            elif not join or time.monotonic() > until:
                raise StudyError(
                    f"another process is running the study in {path}; wait for it, use another --out, or start all of "
                    "them with --join"
                )
            time.sleep(0.1)
        if others:
            shared.acquire()
            exclusive.release()
        yield DirectoryLock(not others, exclusive, shared)
    finally:
        exclusive.release(force=True)
        shared.release(force=True)


@contextlib.contextmanager
def mutex(path: Path) -> Iterator[None]:
    """A critical section: other processes that share the run directory wait until the block ends."""
    with _lease(path / FOLDER / "mutex"):
        yield

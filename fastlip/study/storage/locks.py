"""Locks on a run directory and on single stages of a run, on any file system that several machines may share.

A lock is a file that is created exclusively, which local and network file systems do alike (``flock`` is missing on
some and does nothing on others). It names its host and process and is touched while it is held. Another process takes
it over at once if the holder has died on the same host, and otherwise once the file has not been touched for
:data:`LEASE_SECONDS`, or has been empty for :data:`EMPTY_SECONDS`. A process that was stopped for longer may therefore
find that another one has done its stage again; both write the same bytes, each to temporary files of its own, so only
time is lost.
"""

import contextlib
import hashlib
import os
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
#: Seconds for which a lock file must have stayed empty before it counts as one whose process died while creating it.
EMPTY_SECONDS = 10.0
#: What is then written to it.
_ABANDONED = "abandoned\n"

#: Folder of all locks inside a run directory.
FOLDER = ".locks"


class _Lock:
    """A lock file, which this process can take over from a dead one as described above."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lease = SoftFileLease(
            path,
            lease_duration=LEASE_SECONDS,
            heartbeat_interval=LEASE_SECONDS / 12,
            poll_interval=0.05,
            is_singleton=False,
        )
        self._empty: tuple[int, float] | None = None  # inode of an empty file, and when it was first seen

    @property
    def held(self) -> bool:
        return self._lease.is_locked

    def take(self, seconds: float = 0.2) -> bool:
        """Whether this process could take the lock; the time allows for removing that of a dead process first."""
        try:
            self._lease.acquire(timeout=seconds)
        except Timeout:
            self._mark_if_abandoned()
            return False
        return True

    def wait(self) -> None:
        """Take the lock, however long that takes."""
        while not self.take(1.0):
            pass

    def release(self, force: bool = False) -> None:
        self._lease.release(force=force)

    def _mark_if_abandoned(self) -> None:
        """Make filelock take over a file that has stayed empty: its process died before it wrote who holds the lock.

        filelock keeps empty files for good, but takes over what nobody can have written after two seconds.
        """
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        except OSError:
            return  # it has just been released
        try:
            status = os.fstat(descriptor)
            if status.st_size:
                self._empty = None
            elif self._empty is None or self._empty[0] != status.st_ino:
                self._empty = status.st_ino, time.monotonic()
            elif time.monotonic() - self._empty[1] >= EMPTY_SECONDS:
                os.write(descriptor, _ABANDONED.encode())
        finally:
            os.close(descriptor)


def probe(path: Path) -> None:
    """Try out whether locks keep processes apart in ``path``, which is made if need be.

    Raises:
        OSError: files cannot be created there.
        StudyError: locks do not keep processes apart.
    """
    file = path / FOLDER / f"probe-{secrets.token_hex(8)}"
    first, second = _Lock(file), _Lock(file)
    shut = first.take() and not second.take(0)
    first.release()
    opened = shut and second.take(0)
    second.release(force=True)
    if not (shut and opened):
        raise StudyError(f"the file system of {path} does not keep locks; put --out on another one")


class StageLocks:
    """Locks on single stages; this process holds one of them at a time."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER / "stages"
        # Kept, because only watching a lock shows for how long it has stood still.
        self._locks: dict[str, _Lock] = {}
        self._held: _Lock | None = None

    def acquire(self, stage: str) -> bool:
        """Take the lock on the stage of that name; False where another process has it."""
        file = self._folder / hashlib.sha256(stage.encode()).hexdigest()[:16]
        lock = self._locks.setdefault(stage, _Lock(file))
        if not lock.take():
            return False
        self._held = lock
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

    def __init__(self, alone: bool, exclusive: _Lock, shared: _Lock) -> None:
        self.alone = alone
        self._exclusive, self._shared = exclusive, shared

    def share(self) -> None:
        """Admit other processes that join."""
        if not self._shared.held:
            self._shared.wait()
        self._exclusive.release()


class _Holders:
    """The locks of other processes, watched for signs of life."""

    def __init__(self) -> None:
        self._locks: dict[Path, _Lock] = {}
        self._touched: dict[Path, int] = {}

    def holds(self, file: Path) -> bool:
        """Whether another process holds this lock; that of a dead process is removed."""
        lock = self._locks.setdefault(file, _Lock(file))
        if not lock.take():
            return True
        lock.release()
        return False

    def may_be_dead(self, file: Path) -> bool:
        """Whether the file has no holder's name, or one on another host who has not touched it since the first look."""
        try:
            text, touched = file.read_text(), file.stat().st_mtime_ns
        except OSError:
            return False  # it has just been released
        if text in ("", _ABANDONED):
            return True
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
        notify: called once with a message if the holder may have died, which takes up to :data:`LEASE_SECONDS` to find
            out.

    Raises:
        StudyError: another process holds the directory and does not share it.
    """
    folder = path / FOLDER
    run, joined = folder / "run", folder / "joined"
    exclusive, shared = _Lock(run), _Lock(joined / secrets.token_hex(8))
    holders = _Holders()
    others: list[Path] = []
    told = False
    try:
        until = time.monotonic() + patience
        while True:
            with mutex(path):
                if exclusive.take():
                    others = [file for file in sorted(joined.iterdir()) if holders.holds(file)]
                    if join or not others:
                        break
                    exclusive.release()
                else:
                    others = [run]
            if any([holders.may_be_dead(file) for file in others]):
                if not told:
                    notify(
                        f"a process on another host, or a dead one, holds {path}: waiting up to {LEASE_SECONDS:.0f} s "
                        "for a sign of it"
                    )
                    told = True
            elif not join or time.monotonic() > until:
                raise StudyError(
                    f"another process is running the study in {path}; wait for it, use another --out, or start all of "
                    "them with --join"
                )
            time.sleep(0.1)
        if others:
            shared.wait()
            exclusive.release()
        yield DirectoryLock(not others, exclusive, shared)
    finally:
        exclusive.release(force=True)
        shared.release(force=True)


@contextlib.contextmanager
def mutex(path: Path) -> Iterator[None]:
    """A critical section: other processes that share the run directory wait until the block ends."""
    lock = _Lock(path / FOLDER / "mutex")
    lock.wait()
    try:
        yield
    finally:
        lock.release()

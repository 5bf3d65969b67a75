"""Locks keep processes apart, are free once the process that held them is dead, and need no flock."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease

from fastlip._files import replacing
from fastlip.study.errors import StudyError
from fastlip.study.storage import locks
from fastlip.study.storage.locks import StageLocks, directory_lock, mutex, probe


@contextlib.contextmanager
def another_process(body: str, folder: Path, lease: float = locks.LEASE_SECONDS):
    """A process that runs `body` on `folder`, prints "ready", and keeps running."""
    code = "import sys, time\nfrom pathlib import Path\nfrom fastlip.study.storage import locks\n"
    code += f"locks.LEASE_SECONDS = {lease}\nfolder = Path(sys.argv[1])\n{body}"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


TAKES_A_STAGE = "stage_locks = locks.StageLocks(folder)\nassert stage_locks.acquire('a')\n"
STAYS = "print('ready', flush=True)\ntime.sleep(300)\n"


def lock_file(folder: Path) -> Path:
    (file,) = (folder / locks.FOLDER / "stages").iterdir()
    return file


def test_a_stage_has_one_holder_and_is_free_again_afterwards(tmp_path):
    first, second = StageLocks(tmp_path), StageLocks(tmp_path)
    assert first.acquire("a")
    assert not second.acquire("a")
    assert second.acquire("b")
    first.release()
    first.release()  # nothing is held
    assert StageLocks(tmp_path).acquire("a")


def test_a_killed_process_holds_nothing(tmp_path):
    held = (
        "stage_locks = locks.StageLocks(folder)\n"
        "with locks.directory_lock(folder) as lock:\n    assert stage_locks.acquire('a')\n    "
        + STAYS.replace("\n", "\n    ")
    )
    with another_process(held, tmp_path) as process:
        assert not StageLocks(tmp_path).acquire("a")
        with pytest.raises(StudyError, match="another process"), directory_lock(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        assert StageLocks(tmp_path).acquire("a")
        with directory_lock(tmp_path) as lock:
            assert lock.alone
        assert time.monotonic() - began < locks.LEASE_SECONDS / 4


def test_a_dead_host_loses_its_lock_once_it_has_stood_still(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    with another_process(TAKES_A_STAGE + STAYS, tmp_path, lease=1.0) as process:
        moved_to_another_host(lock_file(tmp_path))
        mine = StageLocks(tmp_path)
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            assert not mine.acquire("a")  # it is touched again and again
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not mine.acquire("a")
        until = time.monotonic() + 30
        while not mine.acquire("a"):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("kind", ["stage", "mutex", "directory", "joined"])
def test_a_process_that_died_before_it_wrote_its_name_holds_nothing(tmp_path, monkeypatch, kind):
    """Filelock leaves empty files alone; a job that was killed at that moment left one, and its successor hung."""
    monkeypatch.setattr(locks, "EMPTY_SECONDS", 1.0)
    mine = StageLocks(tmp_path)
    with mutex(tmp_path):
        pass
    assert mine.acquire("a")
    file = {"stage": lock_file(tmp_path), "mutex": tmp_path / locks.FOLDER / "mutex"}.get(kind)
    file = file or tmp_path / locks.FOLDER / ("run" if kind == "directory" else "joined/0123456789abcdef")
    mine.release()
    file.parent.mkdir(exist_ok=True)
    file.touch()
    began = time.monotonic()
    if kind == "stage":
        while not mine.acquire("a"):
            assert time.monotonic() - began < 30
            time.sleep(0.1)
    elif kind == "mutex":
        with mutex(tmp_path):
            pass
    else:
        with directory_lock(tmp_path) as lock:
            assert lock.alone
    assert time.monotonic() - began > 1.0


def moved_to_another_host(file: Path) -> None:
    """Who holds a lock can only be told by the file, which now names another host."""
    text = file.read_text()
    assert os.uname().nodename in text
    file.write_text(text.replace(os.uname().nodename, "elsewhere"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("join", [False, True])
def test_a_directory_is_free_again_where_its_holders_host_died(tmp_path, monkeypatch, shared, join):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.5)
    body = (
        f"with locks.directory_lock(folder, join={shared}) as lock:\n    {'lock.share()' if shared else 'pass'}\n    "
    )
    with another_process(body + STAYS.replace("\n", "\n    "), tmp_path, lease=1.5) as process:
        file = next((tmp_path / locks.FOLDER / "joined").iterdir()) if shared else tmp_path / locks.FOLDER / "run"
        moved_to_another_host(file)
        said: list[str] = []
        if not (shared and join):
            # It is touched within a moment, and so alive.
            with (
                pytest.raises(StudyError, match="another process"),
                directory_lock(tmp_path, join=join, patience=0.5, notify=said.append),
            ):
                pass
            assert len(said) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        with directory_lock(tmp_path, join=join, patience=0.5, notify=said.append) as lock:
            assert lock.alone or (shared and join)  # who joins beside one that may be dead does not wait for it
        if not (shared and join):
            assert time.monotonic() - began > 1.0
            assert len(said) == 2
            assert "another host" in said[1]


def test_only_processes_that_join_share_a_directory(tmp_path):
    with directory_lock(tmp_path, join=True) as first:
        assert first.alone
        with pytest.raises(StudyError, match="another process"), directory_lock(tmp_path, join=True, patience=0.2):
            pass  # the first has not let anybody in yet
        first.share()
        with directory_lock(tmp_path, join=True) as second:
            assert not second.alone
            second.share()
            with directory_lock(tmp_path, join=True) as third:
                assert not third.alone
        with pytest.raises(StudyError, match="--join"), directory_lock(tmp_path):
            pass
    with (
        directory_lock(tmp_path) as lock,
        pytest.raises(StudyError, match="another process"),
        directory_lock(tmp_path, join=True, patience=0.2),
    ):
        assert lock.alone


def test_a_process_that_stays_behind_keeps_its_share(tmp_path):
    with contextlib.ExitStack() as stack:
        with directory_lock(tmp_path, join=True) as first:
            first.share()
            second = stack.enter_context(directory_lock(tmp_path, join=True))
            second.share()
        with pytest.raises(StudyError, match="--join"), directory_lock(tmp_path):
            pass
        with directory_lock(tmp_path, join=True) as third:
            assert not third.alone


def test_the_mutex_lets_one_in(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    add = (
        "print('ready', flush=True)\nfor _ in range(50):\n  with locks.mutex(folder):\n    "
        "file = folder / 'counter'; n = int(file.read_text()); time.sleep(0.001); file.write_text(str(n + 1))\n"
    )
    with another_process(add, tmp_path) as process:
        for _ in range(50):
            with mutex(tmp_path):
                n = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(n + 1))
        assert process.wait(60) == 0
    assert counter.read_text() == "100"


def test_locks_need_no_flock(tmp_path):
    code = (
        "import sys, warnings\nsys.modules['fcntl'] = None\nwarnings.simplefilter('ignore')\nfrom pathlib import Path\n"
        "from fastlip.study.storage import locks\nfolder = Path(sys.argv[1])\nlocks.probe(folder)\n"
        "with locks.directory_lock(folder) as lock:\n  a, b = locks.StageLocks(folder), locks.StageLocks(folder)\n"
        "  assert a.acquire('x') and not b.acquire('x')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_file_system_that_keeps_no_locks_is_refused(tmp_path, monkeypatch):
    probe(tmp_path)
    assert not list((tmp_path / locks.FOLDER).iterdir())
    monkeypatch.setattr(SoftFileLease, "acquire", lambda self, timeout=None: contextlib.nullcontext())
    with pytest.raises(StudyError, match=r"does not keep locks; put --out on another"):
        probe(tmp_path)


def test_a_folder_that_cannot_hold_lock_files_is_refused(tmp_path):
    (tmp_path / locks.FOLDER).write_text("in the way")
    with pytest.raises(OSError, match=locks.FOLDER):  # the command line adds what to do
        probe(tmp_path)


def test_processes_that_write_one_file_leave_each_others_temporary_files_alone(tmp_path):
    path = tmp_path / "x.json"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
        with contextlib.suppress(RuntimeError), replacing(path) as third:
            third.write_text("third")
            raise RuntimeError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]

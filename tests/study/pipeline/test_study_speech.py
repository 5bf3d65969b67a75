"""What a run says in a log, where no terminal shows bars."""

import contextlib
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastlip.study.pipeline import execution
from fastlip.study.pipeline.stage import Stage
from fastlip.study.training.process_group import ProcessGroup
from fastlip.study.training.unfinished import RESUMING


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What a run of one stage says, which tells its progress at some seconds."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(execution, "numerics", lambda machine: contextlib.nullcontext())
    monkeypatch.setattr(execution, "require_sound", lambda directory, stages: None)
    directory = SimpleNamespace(
        settings=SimpleNamespace(dataset="cifar10"), machine=None, path=tmp_path, report=tmp_path / "report.html",
        recorded=lambda *outputs: contextlib.nullcontext(), record_time=lambda name, seconds: None,
    )  # fmt: skip

    def run(told, *, terminal=False):
        def work(progress):
            for seconds, done, note in told:
                now[0] = float(seconds)
                progress(done, 9, note)
            (tmp_path / "weights").touch()
            return "trained"

        stage = Stage("scratch", (tmp_path / "weights",), work)
        monkeypatch.setattr(execution, "stages", lambda *given: [stage])
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=200, highlight=False, color_system=None)
        execution.execute(directory, None, ProcessGroup(), None, (), console)
        return screen.getvalue()

    return run


def test_a_line_a_minute(said):
    lines = said([(20, 1, "epoch 1"), (65, 2, "epoch 1"), (70, 3, "epoch 1"), (130, 4, "")]).splitlines()
    assert lines[0] == "[1/1] scratch: 2 of 9, epoch 1"
    assert lines[1] == "[1/1] scratch: 4 of 9"
    assert lines[2].startswith("[1/1] scratch: trained (")
    assert len(lines) == 4


@pytest.mark.parametrize("terminal", [False, True])
def test_training_that_goes_on_says_from_where(said, terminal):
    assert "[1/1] scratch: resuming at step 5 of 9\n" in said([(1, 5, RESUMING), (2, 6, "epoch 1")], terminal=terminal)


def test_a_terminal_has_bars_instead(said):
    assert "scratch: 2 of 9" not in said([(65, 2, "epoch 1")], terminal=True)

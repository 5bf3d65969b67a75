"""One run from its command to its report, with progress on the terminal."""

import contextlib
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastlip.study.errors import StudyError
from fastlip.study.pipeline import start_or_resume
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stage import Stage
from fastlip.study.pipeline.stages import require_sound, stages
from fastlip.study.settings.input_paths import Places, resolve_source
from fastlip.study.settings.settings import Settings
from fastlip.study.storage import locks
from fastlip.study.storage.files import write_json
from fastlip.study.storage.locks import Claims
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import GENERATED
from fastlip.study.training.process_group import Team, joined

#: Seconds between looks at what other processes have finished.
_WAIT = 1.0


def run(
    settings: Settings, places: Places, out: Path, console: Console | None = None, join: bool = False
) -> RunDirectory:
    """Run or resume the study in ``out``.

    Args:
        settings: what to do.
        places: where files are.
        out: run directory.
        console: where progress is shown.
        join: whether other processes, here or on machines that share ``out``, may take stages of the same run.

    Raises:
        StudyError: something is missing, does not fit or is damaged; with status 2 nothing was written.
    """
    console = console or Console(highlight=False)
    with joined() as team:
        settings = resolve_source(settings, places)
        inputs = Inputs(settings, places)
        if not team.leads:
            # The leader has looked at everything and has written the configuration.
            team.agree(None)
            _execute(RunDirectory(out), inputs, team, None, Console(quiet=True))
            return RunDirectory(out)
        inputs.check()
        prints = inputs.fingerprints()
        start_or_resume.check(out, settings, prints)
        with locks.locked(out, join) as lock:
            with locks.alone_for_a_moment(out):
                # Once more: another process may have begun it with other settings meanwhile.
                start_or_resume.check(out, settings, prints)
                directory = start_or_resume.open_or_create(out, settings, prints, start_or_resume.command_line())
            if lock.alone:
                directory.tidy()
            if join:
                lock.share()
            team.agree(None)
            if settings.dataset == "generated":
                console.print(_banner())
            began = time.monotonic()
            _execute(directory, inputs, team, Claims(out / ".claims") if join else None, console)
            seconds = time.monotonic() - began
            console.print(f"{directory.report} ({seconds:.0f} s)", style="bold", markup=False, soft_wrap=True)
    return directory


def _execute(directory: RunDirectory, inputs: Inputs, team: Team, claims: Claims | None, console: Console) -> None:
    torch.set_num_threads(directory.machine.threads)
    work = stages(directory, inputs, team)
    if team.leads:
        require_sound(directory, work)
    finished = sum(stage.done for stage in work)
    if finished:
        console.print(
            f"resuming {directory.path}: {finished} of {len(work)} stages are done", markup=False, soft_wrap=True
        )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        whole = bars.add_task("stages", total=len(work), completed=finished, note="")
        while True:
            number = team.agree(_next(work, claims) if team.leads else None)
            if number is None:
                break
            stage = work[number]
            bar = bars.add_task(stage.name, total=None, note="")

            def advance(done: int, total: int, note: str, bar: TaskID = bar) -> None:
                bars.update(bar, completed=done, total=total, note=note)

            began = time.monotonic()
            with directory.recorded(*stage.outputs) if team.leads else contextlib.nullcontext():
                words = stage.run(advance) if team.leads or stage.together else ""
            seconds = time.monotonic() - began
            bars.remove_task(bar)
            if team.leads:
                _note_time(directory, stage.name, seconds)
                line = f"[{number + 1}/{len(work)}] {stage.name}: {words} ({seconds:.1f} s)"
                console.print(line, markup=False, soft_wrap=True)
                if claims is not None:
                    claims.release()
            bars.update(whole, completed=sum(stage.done for stage in work))


def _next(work: list[Stage], claims: Claims | None) -> int | None:
    """Number of the next stage for this process, claimed; None once all are done. Waits where others have them all."""
    while True:
        left = [number for number, stage in enumerate(work) if not stage.done]
        if not left:
            return None
        for number in left:
            if not work[number].ready:
                continue
            if claims is None:
                return number
            if claims.take(work[number].name):
                if not work[number].done:
                    return number
                claims.release()  # another process has just finished it
        if claims is None:
            raise StudyError(f"the stage {work[left[0]].name} cannot begin: what it needs was removed")
        time.sleep(_WAIT)


def _note_time(directory: RunDirectory, stage: str, seconds: float) -> None:
    """Wall-clock seconds per stage; of a stage that was interrupted, those since it was last resumed."""
    with locks.alone_for_a_moment(directory.path):
        write_json(directory.timings, directory.read_timings() | {stage: round(seconds, 2)})


def _banner() -> Panel:
    text = Text(justify="center", style="bold")
    text.append("\nG E N E R A T E D   I M A G E S\n\n", style="bold reverse")
    text.append(GENERATED + "\n")
    return Panel(text, border_style="bold red", padding=(0, 2))

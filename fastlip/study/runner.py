"""One run from its command to its report, with progress on the terminal."""

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

from fastlip.study import rundir
from fastlip.study.config import Settings
from fastlip.study.files import read_json, write_json
from fastlip.study.inputs import Inputs, Places, resolve_source
from fastlip.study.pipeline import Stage, stages
from fastlip.study.rundir import RunDirectory
from fastlip.study.schema import GENERATED


def run(settings: Settings, places: Places, out: Path, console: Console | None = None) -> RunDirectory:
    """Run or resume the study in ``out``.

    Raises:
        StudyError: something is missing, does not fit or is damaged; with status 2 nothing was written.
    """
    console = console or Console(highlight=False)
    settings = resolve_source(settings, places)
    inputs = Inputs(settings, places)
    inputs.check()
    prints = inputs.fingerprints()
    rundir.check(out, settings, prints)
    with rundir.locked(out):
        directory = rundir.open_or_create(out, settings, prints, rundir.command_line())
        directory.tidy()
        torch.set_num_threads(directory.machine.threads)
        if settings.dataset == "generated":
            console.print(_banner())
        work = stages(directory, inputs)
        finished = sum(stage.done for stage in work)
        if finished:
            console.print(f"resuming {out}: {finished} of {len(work)} stages are done", markup=False, soft_wrap=True)
        began = time.monotonic()
        _execute(directory, work, console)
        seconds = time.monotonic() - began
        console.print(f"{directory.report} ({seconds:.0f} s)", style="bold", markup=False, soft_wrap=True)
    return directory


def _execute(directory: RunDirectory, work: list[Stage], console: Console) -> None:
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
        whole = bars.add_task("stages", total=len(work), completed=0, note="")
        for number, stage in enumerate(work, start=1):
            if not stage.done:
                bar = bars.add_task(stage.name, total=None, note="")

                def advance(done: int, total: int, note: str, bar: TaskID = bar) -> None:
                    bars.update(bar, completed=done, total=total, note=note)

                began = time.monotonic()
                words = stage.run(advance)
                seconds = time.monotonic() - began
                bars.remove_task(bar)
                _note_time(directory, stage.name, seconds)
                line = f"[{number}/{len(work)}] {stage.name}: {words} ({seconds:.1f} s)"
                console.print(line, markup=False, soft_wrap=True)
            bars.update(whole, completed=number)


def _note_time(directory: RunDirectory, stage: str, seconds: float) -> None:
    """Wall-clock seconds per stage; of a stage that was interrupted, those since it was last resumed."""
    times = read_json(directory.timings) if directory.timings.exists() else {}
    write_json(directory.timings, times | {stage: round(seconds, 2)})


def _banner() -> Panel:
    text = Text(justify="center", style="bold")
    text.append("\nG E N E R A T E D   I M A G E S\n\n", style="bold reverse")
    text.append(GENERATED + "\n")
    return Panel(text, border_style="bold red", padding=(0, 2))

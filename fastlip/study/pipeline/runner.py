"""Execution of a run: locks, stages one after the other, and progress on the terminal."""

import contextlib
import fnmatch
import time
from collections.abc import Sequence
from functools import partial
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
from fastlip.study.settings.input_paths import InputPaths, resolve_source
from fastlip.study.settings.settings import Settings
from fastlip.study.storage import locks
from fastlip.study.storage.files import write_json
from fastlip.study.storage.locks import StageLocks
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import GENERATED
from fastlip.study.training.process_group import ProcessGroup, process_group

#: Seconds between checks for what other processes have finished.
_WAIT = 1.0


def run(
    settings: Settings,
    paths: InputPaths,
    out: Path,
    console: Console | None = None,
    join: bool = False,
    only: Sequence[str] = (),
) -> RunDirectory:
    """Run or resume the study in ``out``.

    Args:
        settings: of the run.
        paths: input files given on the command line.
        out: run directory.
        console: where progress is shown; the terminal by default.
        join: whether other processes, here or on machines that share ``out``, may carry out stages of the same run.
        only: patterns (``*`` and ``?``) of the names of the stages to carry out, where a scheduler distributes them;
            implies ``join``. All stages by default.

    Raises:
        StudyError: something is missing, does not fit or is damaged; nothing was written where its status is 2.
    """
    console = console or Console(highlight=False)
    join = join or bool(only)
    with process_group() as group:
        settings = resolve_source(settings, paths)
        inputs = Inputs(settings, paths)
        if not group.leads:
            # The leader broadcasts once it has checked everything and written the configuration.
            group.broadcast(None)
            _execute(RunDirectory(out), inputs, group, None, only, Console(quiet=True))
            return RunDirectory(out)
        inputs.require_available()
        prints = inputs.fingerprints()
        start_or_resume.require_resumable(out, settings, prints)
        locks.probe(out)
        notify = partial(console.print, markup=False, soft_wrap=True)
        with locks.directory_lock(out, join, notify=notify) as lock:
            with locks.mutex(out):
                # Checked again, because another process may have started a run with other settings meanwhile.
                start_or_resume.require_resumable(out, settings, prints)
                directory = start_or_resume.open_or_create(out, settings, prints, start_or_resume.command_line())
            if lock.alone:
                directory.clean_up()
            if join:
                lock.share()
            group.broadcast(None)
            if settings.dataset == "generated":
                console.print(_banner())
            began = time.monotonic()
            _execute(directory, inputs, group, StageLocks(out) if join else None, only, console)
            seconds = time.monotonic() - began
            made = directory.report if directory.report.exists() else directory.path
            console.print(f"{made} ({seconds:.0f} s)", style="bold", markup=False, soft_wrap=True)
    return directory


def _execute(
    directory: RunDirectory,
    inputs: Inputs,
    group: ProcessGroup,
    stage_locks: StageLocks | None,
    only: Sequence[str],
    console: Console,
) -> None:
    torch.set_num_threads(directory.machine.threads)
    all_stages = stages(directory, inputs, group)
    chosen = _chosen(all_stages, only)
    if group.leads:
        require_sound(directory, all_stages)
    finished = sum(stage.done for stage in all_stages)
    if finished:
        console.print(
            f"resuming {directory.path}: {finished} of {len(all_stages)} stages are done", markup=False, soft_wrap=True
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
        whole = bars.add_task("stages", total=len(all_stages), completed=finished, note="")
        while True:
            number = group.broadcast(_next(all_stages, chosen, stage_locks) if group.leads else None)
            if number is None:
                break
            stage = all_stages[number]
            bar = bars.add_task(stage.name, total=None, note="")

            def advance(done: int, total: int, note: str, bar: TaskID = bar) -> None:
                bars.update(bar, completed=done, total=total, note=note)

            began = time.monotonic()
            with directory.recorded(*stage.outputs) if group.leads else contextlib.nullcontext():
                words = stage.run(advance) if group.leads or stage.collective else ""
            seconds = time.monotonic() - began
            bars.remove_task(bar)
            if group.leads:
                _record_time(directory, stage.name, seconds)
                line = f"[{number + 1}/{len(all_stages)}] {stage.name}: {words} ({seconds:.1f} s)"
                console.print(line, markup=False, soft_wrap=True)
                if stage_locks is not None:
                    stage_locks.release()
            bars.update(whole, completed=sum(stage.done for stage in all_stages))


def _chosen(all_stages: list[Stage], only: Sequence[str]) -> list[int]:
    """Numbers of the stages whose names match one of the patterns; of all stages where there are none.

    Raises:
        StudyError: a pattern matches none.
    """
    names = [stage.name for stage in all_stages]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise StudyError(f"--only {pattern} matches no stage; they are: {'; '.join(names)}", status=2)
    return [n for n, name in enumerate(names) if not only or any(fnmatch.fnmatchcase(name, p) for p in only)]


def _next(all_stages: list[Stage], chosen: list[int], stage_locks: StageLocks | None) -> int | None:
    """Number of the next stage for this process, locked; None once all are done. Waits where others have them all.

    Raises:
        StudyError: what the stages need is missing and nothing here makes it.
    """
    while True:
        left = [number for number in chosen if not all_stages[number].done]
        if not left:
            return None
        for number in left:
            if not all_stages[number].ready:
                continue
            if stage_locks is None:
                return number
            if stage_locks.acquire(all_stages[number].name):
                if not all_stages[number].done:
                    return number
                stage_locks.release()  # another process has just finished it
        stuck = all_stages[left[0]]
        if stage_locks is None:
            raise StudyError(f"the stage {stuck.name} cannot begin: what it needs was removed")
        makers = {path: stage.name for n, stage in enumerate(all_stages) if n not in chosen for path in stage.outputs}
        missing = [makers[path] for path in stuck.needs if path in makers and not path.exists()]
        if missing and not any(all_stages[number].ready for number in left):
            raise StudyError(f"the stage {stuck.name} needs what the stage {missing[0]} makes; run that first")
        time.sleep(_WAIT)


def _record_time(directory: RunDirectory, stage: str, seconds: float) -> None:
    """Record the seconds that a stage took, since its last resumption where it was interrupted."""
    with locks.mutex(directory.path):
        write_json(directory.timings, directory.read_timings() | {stage: round(seconds, 2)})


def _banner() -> Panel:
    text = Text(justify="center", style="bold")
    text.append("\nG E N E R A T E D   I M A G E S\n\n", style="bold reverse")
    text.append(GENERATED + "\n")
    return Panel(text, border_style="bold red", padding=(0, 2))

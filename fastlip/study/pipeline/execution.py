"""Execution of the stages of a run one after the other, and progress on the terminal."""

import contextlib
import time
from collections.abc import Sequence
from functools import partial

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

from fastlip._spoken import Spoken
from fastlip.study.pipeline.finished_outputs import require_sound
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.next_stage import matching, next_stage
from fastlip.study.pipeline.numerics import numerics
from fastlip.study.pipeline.stages import stages
from fastlip.study.storage.locks import StageLocks
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import GENERATED
from fastlip.study.training.process_group import ProcessGroup
from fastlip.study.training.unfinished import RESUMING


def execute(
    directory: RunDirectory,
    inputs: Inputs,
    group: ProcessGroup,
    stage_locks: StageLocks | None,
    only: Sequence[str],
    console: Console,
) -> None:
    """Carry out the stages of a run that are not done yet.

    Args:
        directory: the run directory, locked by the leader.
        inputs: images and source weights.
        group: the processes that carry out stages together; only the leader prints.
        stage_locks: locks on single stages if other processes join, else None.
        only: patterns of the names of the stages to carry out; all stages if empty.
        console: where the leader shows progress.

    Raises:
        StudyError: a pattern matches no stage, an output of a finished stage is damaged, or a stage cannot begin.
    """
    began = time.monotonic()
    if not group.leads:
        console = Console(quiet=True)
    notify = partial(console.print, markup=False, soft_wrap=True)
    if directory.settings.dataset == "generated":
        console.print(_banner())
    all_stages = stages(directory, inputs, group)
    chosen = matching(all_stages, only)
    if group.leads:
        require_sound(directory, all_stages)
    finished = sum(stage.done for stage in all_stages)
    if finished:
        notify(f"resuming {directory.path}: {finished} of {len(all_stages)} stages are done")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    spoken = Spoken(notify, silent=console.is_terminal)
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with numerics(directory.machine), bars:
        whole = bars.add_task("stages", total=len(all_stages), completed=finished, note="")
        while True:
            number = group.broadcast(next_stage(all_stages, chosen, stage_locks, notify) if group.leads else None)
            if number is None:
                break
            stage = all_stages[number]
            bar = bars.add_task(stage.name, total=None, note="")

            def advance(done: int, total: int, note: str, bar: TaskID = bar, number: int = number) -> None:
                bars.update(bar, completed=done, total=total, note=note)
                title = f"[{number + 1}/{len(all_stages)}] {all_stages[number].name}"
                if note == RESUMING:
                    notify(f"{title}: resuming at step {done} of {total}")
                    spoken.said()
                else:
                    spoken(f"{title}: {done} of {total}{f', {note}' if note else ''}")

            stage_began = time.monotonic()
            with directory.recorded(*stage.outputs) if group.leads else contextlib.nullcontext():
                words = stage.run(advance) if group.leads or stage.collective else ""
            seconds = time.monotonic() - stage_began
            bars.remove_task(bar)
            if group.leads:
                directory.record_time(stage.name, seconds)
                notify(f"[{number + 1}/{len(all_stages)}] {stage.name}: {words} ({seconds:.1f} s)")
                spoken.said()
                if stage_locks is not None:
                    stage_locks.release()
            bars.update(whole, completed=sum(stage.done for stage in all_stages))
    if group.leads:
        made = directory.report if directory.report.exists() else directory.path
        notify(f"{made} ({time.monotonic() - began:.0f} s)", style="bold")


def _banner() -> Panel:
    text = Text(justify="center", style="bold")
    text.append("\nG E N E R A T E D   I M A G E S\n\n", style="bold reverse")
    text.append(GENERATED + "\n")
    return Panel(text, border_style="bold red", padding=(0, 2))

"""A run from its settings to its report: inputs, the run directory and its locks, then all stages."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from fastlip.study.pipeline.execution import execute
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.start_or_resume import opened
from fastlip.study.settings.input_paths import InputPaths, resolve_source
from fastlip.study.settings.settings import Settings
from fastlip.study.storage.locks import StageLocks
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.training.process_group import process_group


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
        StudyError: something is missing, does not fit or is damaged; nothing was written if its status is 2.
    """
    console = console or Console(highlight=False)
    join = join or bool(only)
    with process_group() as group, contextlib.ExitStack() as leading:
        settings = resolve_source(settings, paths)
        inputs = Inputs(settings, paths)
        if group.leads:
            inputs.require_available(begun=(out / "config.json").exists())
            notify = partial(console.print, markup=False, soft_wrap=True)
            for line in inputs.cautions:
                notify(f"Note: {line}.")
            leading.enter_context(opened(out, settings, inputs.fingerprints(), join, notify))
        # The leader broadcasts once it has checked everything and written the configuration.
        group.broadcast(None)
        directory = RunDirectory(out)
        execute(directory, inputs, group, StageLocks(out) if join else None, only, console)
    return directory

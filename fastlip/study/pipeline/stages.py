"""All stages of a run in order. Each writes its outputs atomically and is skipped where they exist already."""

from pathlib import Path

from fastlip.study.analysis import results
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.measurement_stages import measurement_stages
from fastlip.study.pipeline.networks import Networks, weights_at
from fastlip.study.pipeline.stage import Stage
from fastlip.study.pipeline.training_stages import training_stages
from fastlip.study.report import html_report
from fastlip.study.storage.files import damaged, read_arrays
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Lipschitz, TrainingRecord
from fastlip.study.training.process_group import ProcessGroup


def stages(run: RunDirectory, inputs: Inputs, group: ProcessGroup | None = None) -> list[Stage]:
    """All stages of the run; a stage comes after those whose outputs it needs."""
    group = group or ProcessGroup()
    networks = Networks(run, inputs, group.device(run.machine.device))
    found = training_stages(run, inputs, networks, group) + measurement_stages(run, inputs, networks, group)
    everything = tuple(path for stage in found for path in stage.outputs)
    name = inputs.source_name
    found.append(Stage("results", (run.results,), lambda progress: results.write(run, name), everything))
    found.append(Stage("report", run.written_by_report, lambda progress: html_report.write(run), (run.results,)))
    return found


def require_sound(run: RunDirectory, all_stages: list[Stage]) -> None:
    """Raise where a file would stop the run halfway, or where the output of a finished stage is damaged.

    Raises:
        StudyError: it names the first such file and what to do about it.
    """
    run.require_unobstructed(*(path for stage in all_stages for path in stage.outputs))
    run.read_timings()
    for stage in all_stages:
        for path in stage.outputs if stage.done else ():
            _require_readable(run, path)
            run.require_intact(path)


def _require_readable(run: RunDirectory, path: Path) -> None:
    """Raise where the output of a finished stage cannot be read."""
    if path == run.results:
        run.read_results()
    elif path in run.written_by_report:
        if not path.read_bytes().endswith(b"</html>" if path == run.report else b"\n"):
            raise damaged(path, "it has no end", run.rewrite)
    elif path.suffix == ".npz":
        read_arrays(path)
    elif path.suffix == ".safetensors":
        weights_at(path)
    else:
        read(path, Lipschitz if path.parent == run.lipschitz("").parent else TrainingRecord)

"""All stages of a run in order. Each writes its outputs atomically and is skipped where they exist already."""

from fastlip.study.analysis import results
from fastlip.study.measure.images import Progress
from fastlip.study.pipeline.checkpoint_stages import checkpoint_stages
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.measurement_stages import measurement_stages
from fastlip.study.pipeline.networks import Networks
from fastlip.study.pipeline.stage import Stage
from fastlip.study.pipeline.training_stages import training_stages
from fastlip.study.report import html_report
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.training.process_group import ProcessGroup


def stages(run: RunDirectory, inputs: Inputs, group: ProcessGroup | None = None) -> list[Stage]:
    """All stages of the run; a stage comes after those whose outputs it needs."""
    group = group or ProcessGroup()
    networks = Networks(run, inputs, group.device(run.machine.device))
    found = checkpoint_stages(run, inputs) + training_stages(run, inputs, networks, group)
    found += measurement_stages(run, inputs, networks, group)
    everything = tuple(path for stage in found for path in stage.outputs)
    name = inputs.source_name

    def write_results(progress: Progress) -> str:
        return results.write(run, name, inputs.target_attacked)

    found.append(Stage("results", (run.results,), write_results, everything))
    found.append(Stage("report", run.written_by_report, lambda progress: html_report.write(run), (run.results,)))
    return found

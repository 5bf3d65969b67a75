"""The stages of a run, in order; each writes its outputs atomically and is skipped where they are already there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastlip.study.analysis import results
from fastlip.study.measure.images import Progress
from fastlip.study.pipeline.actions import Work, probe_name, weights_at
from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.report import html_report
from fastlip.study.storage.files import damaged, read_arrays
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory, Trained
from fastlip.study.storage.schema import Lipschitz, TrainingRecord
from fastlip.study.training.process_group import Team


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique, as shown and timed.
        outputs: files that are all there once it is done.
        run: does it; returns a few words on what came out.
        needs: files that must be there before it can begin.
        together: whether all processes of a team take part; otherwise its leader does it alone.
    """

    name: str
    outputs: tuple[Path, ...]
    run: Callable[[Progress], str]
    needs: tuple[Path, ...] = ()
    together: bool = False

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.outputs)

    @property
    def ready(self) -> bool:
        return all(path.exists() for path in self.needs)


def stages(run: RunDirectory, inputs: Inputs, team: Team | None = None) -> list[Stage]:
    """All stages of the run; what one needs comes before it."""
    work = Work(run, inputs, team or Team())
    found: list[Stage] = []
    if run.pretrains:
        outputs = (run.checkpoint("source"), run.training("source"))
        found.append(Stage("source: pre-training", outputs, work.pretrain, together=True))
    for model in run.models:
        found += _training(run, work, model)
    for model in [*run.models, *run.snapshots]:
        found += _measuring(run, work, model)
    everything = tuple(path for stage in found for path in stage.outputs)
    name = inputs.source_name
    found.append(Stage("results", (run.results,), lambda progress: results.write(run, name), everything))
    found.append(Stage("report", run.written_by_report, lambda progress: html_report.write(run), (run.results,)))
    return found


def require_sound(run: RunDirectory, work: list[Stage]) -> None:
    """Raise where something would stop a run halfway, or where a stage counts as done whose output is damaged.

    Raises:
        StudyError: the first such file, and what to do about it.
    """
    run.require_unobstructed(*(path for stage in work for path in stage.outputs))
    run.read_timings()
    for stage in work:
        for path in stage.outputs if stage.done else ():
            _look_at(run, path)
            run.require_intact(path)


def _look_at(run: RunDirectory, path: Path) -> None:
    """Raise where a file that a stage has written cannot be read."""
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


def _training(run: RunDirectory, work: Work, model: Trained) -> list[Stage]:
    found = []
    needs: tuple[Path, ...] = (run.checkpoint("source"),) if run.pretrains and work.transfers(model) else ()
    outputs: tuple[Path, ...]
    if model.arm == "lpft":
        probe = probe_name(model)
        outputs = (run.checkpoint(probe), run.training(probe))
        found.append(
            Stage(f"{model.name}: training of the head", outputs, partial(work.probe, model), needs, together=True)
        )
        needs = outputs
    kept = tuple(run.checkpoint(m.name) for m in run.snapshots if m.run_name == model.name)
    outputs = (run.checkpoint(model.name), run.training(model.name), *kept)
    found.append(Stage(f"{model.name}: training", outputs, partial(work.train, model), needs, together=True))
    return found


def _measuring(run: RunDirectory, work: Work, model: Trained) -> list[Stage]:
    trained = (run.checkpoint(model.name),)
    found = []
    for name, measurement in work.measurements(model).items():
        needs = trained + tuple(run.images(model.name, other) for other in measurement.needs)
        stage = partial(work.measure, model, name, measurement)
        output = run.images(model.name, name)
        found.append(Stage(f"{model.name}: {name}", (output,), stage, needs, measurement.sharded))
    found.append(
        Stage(f"{model.name}: norms", (run.lipschitz(model.name),), partial(work.norms, model), trained),
    )
    if model.epoch is None:
        output = run.spectra(model.name, "weights")
        needs = trained + ((run.checkpoint("source"),) if run.pretrains and work.transfers(model) else ())
        found.append(Stage(f"{model.name}: weight spectra", (output,), partial(work.weight_spectra, model), needs))
        output = run.spectra(model.name, "features")
        found.append(Stage(f"{model.name}: feature spectra", (output,), partial(work.feature_spectra, model), trained))
    return found

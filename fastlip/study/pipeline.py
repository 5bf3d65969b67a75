"""The stages of a run, in order; each writes its outputs atomically and is skipped where they are already there."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastlip.study import analysis, report
from fastlip.study.inputs import Inputs
from fastlip.study.measure import Progress
from fastlip.study.rundir import RunDirectory, Trained
from fastlip.study.team import Team
from fastlip.study.work import Work, probe_name


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
    found.append(Stage("results", (run.results,), lambda progress: analysis.write(run, name), everything))
    found.append(Stage("report", (run.report,), lambda progress: report.write(run), (run.results,)))
    return found


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

"""A run as commands for an existing scheduler: files of shell commands, one file per phase; see the folder's README.

The commands of a file depend on those of the files before it only, so a scheduler may run them in any order, on any
machines that see the run directory and the inputs under the same paths. A command whose process died is run again as it
is: it continues where that one stopped, and does nothing if everything is done.
"""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastlip.study.pipeline.inputs import Inputs
from fastlip.study.pipeline.stage import Stage
from fastlip.study.pipeline.stages import stages
from fastlip.study.pipeline.start_or_resume import open_or_create, require_resumable
from fastlip.study.settings.input_paths import InputPaths, resolve_source
from fastlip.study.settings.settings import Settings
from fastlip.study.storage.files import write_text


def write_plan(settings: Settings, paths: InputPaths, out: Path, command: Sequence[str]) -> list[Path]:
    """Write the commands of a run.

    Inputs are checked, and downloaded if that is allowed, because the machines that run may have no network.

    Args:
        settings: of the run.
        paths: input files given on the command line.
        out: the run directory; the files go to its folder ``plan``.
        command: the command that starts the run, without ``--only``.

    Returns:
        The files, in the order in which they have to be run.

    Raises:
        StudyError: something is missing or does not fit; nothing was written.
    """
    settings = resolve_source(settings, paths)
    inputs = Inputs(settings, paths)
    inputs.require_available()
    fingerprints = inputs.fingerprints()
    # This machine need not have the devices of those that run the commands.
    here = replace(settings, device="cpu")
    require_resumable(out, here, fingerprints)
    with tempfile.TemporaryDirectory() as scratch:
        run = open_or_create(Path(scratch) / "run", here, fingerprints, "")
        found = phases(stages(run, inputs))
    files = []
    for number, (phase, jobs) in enumerate(found.items(), 1):
        files.append(out / "plan" / f"{number}-{phase}.txt")
        lines = [shlex.join([*command, *(word for pattern in job for word in ("--only", pattern))]) for job in jobs]
        write_text(files[-1], "\n".join(lines) + "\n")
    return files


def phases(all_stages: Sequence[Stage]) -> dict[str, list[list[str]]]:
    """The jobs of each phase, each job as patterns of the names of its stages.

    The training of a model is one job, all stages of its measurement are another, and its judgement of the adversarial
    images of all models, which depends on their measurement, is a third.
    """
    subjects: dict[str, dict[str, dict[str, None]]] = {}
    for stage in all_stages:
        subject, _, what = stage.name.partition(": ")
        phase, pattern = _phase(what)
        # The results and the report that reads them are one job.
        job = subject if what else "results"
        subjects.setdefault(phase, {}).setdefault(job, {})[f"{subject}: {pattern}" if what else subject] = None
    return {phase: [list(patterns) for patterns in jobs.values()] for phase, jobs in subjects.items()}


def _phase(what: str) -> tuple[str, str]:
    """The phase of a stage that does ``what``, and the pattern of it and its like there."""
    if not what or what == "transfer":
        return what or "results", what
    if what == "pre-training":
        return "source", what
    if what == "import":
        return "checkpoints", what
    if what.startswith("training"):
        return "training", "training*"
    return "measurement", what if what.startswith("t") else "[!t]*"

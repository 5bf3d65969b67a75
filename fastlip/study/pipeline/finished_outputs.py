"""Checks of the files of finished stages, before a run goes on from them."""

from pathlib import Path

from fastlip.study.pipeline.networks import weights_at
from fastlip.study.pipeline.stage import Stage
from fastlip.study.storage.files import damaged, read_arrays
from fastlip.study.storage.json_files import read
from fastlip.study.storage.run_directory import RunDirectory
from fastlip.study.storage.schema import Lipschitz, TrainingRecord


def require_sound(run: RunDirectory, all_stages: list[Stage]) -> None:
    """Raise if a file would stop the run halfway, or if the output of a finished stage is damaged.

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

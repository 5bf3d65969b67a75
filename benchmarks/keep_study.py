"""Keep a finished run of the study in the repository: ``python benchmarks/keep_study.py RUN [NAME]``.

Copies what the report is made of to ``benchmarks/results/study/NAME`` (that of the preset by default), without
checkpoints, without the paths that the run was given, and with no more stored images than the report shows; then builds
tables and report there. Where only tables or report have changed, ``python -m fastlip.study report
benchmarks/results/study/NAME`` is enough.
"""

import re
import shutil
import sys
from pathlib import Path

from fastlip.study.report import html_report
from fastlip.study.report.example_images import examples
from fastlip.study.storage.files import read_arrays, write_arrays, write_json
from fastlip.study.storage.run_directory import RunDirectory

RESULTS = Path(__file__).resolve().parent / "results" / "study"
#: Options of the command line that name files.
PATHS = ("data", "source-checkpoint", "source-data", "corruptions", "out")


def keep(run: RunDirectory, folder: Path) -> None:
    if run.path.resolve() == folder.resolve():
        raise SystemExit(f"{folder} is kept already")
    shutil.rmtree(folder, ignore_errors=True)
    command = re.sub(rf"--({'|'.join(PATHS)})[ =]\S+", lambda m: f"--{m[1]} {m[1].upper()}", run.config["command"])
    write_json(folder / "config.json", run.config | {"command": command})
    for path in (run.results, run.timings):
        shutil.copy(path, folder)
    kept = RunDirectory(folder)
    results = run.read_results()
    shown = examples(run, results)
    for rows in (8, 16, 32, 64):
        for model in run.models:
            for name in ("clean-attacked", "smallest-pgd", "smallest-gaussian"):
                arrays = read_arrays(run.images(model.name, name))
                cut = {"image": arrays["image"][:rows]} if model.seed == run.settings.seed else {}
                arrays.pop("image")
                write_arrays(kept.images(model.name, name), arrays | cut)
        if examples(kept, results) == shown:
            break
    html_report.write(kept)
    shutil.rmtree(kept.figures)  # the report contains them with their data


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    source = RunDirectory(Path(sys.argv[1]))
    keep(source, RESULTS / (sys.argv[2] if len(sys.argv) == 3 else source.settings.preset))

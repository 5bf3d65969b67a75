"""The command line of the study."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastlip._text import printable
from fastlip.study.errors import StudyError
from fastlip.study.settings import overrides, presets, serialization
from fastlip.study.settings.settings import Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _settings() -> str:
    """All settings with their values in each preset, for --help."""
    columns = [serialization.dotted_names(chosen) for chosen in presets.PRESETS.values()]
    lines = [f"**Settings** (`--set NAME=VALUE`; values of {' / '.join(presets.PRESETS)}):", ""]
    for name in columns[0]:
        if name not in overrides.FIXED:
            values = [",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (c[name] for c in columns)]
            lines.append(f"- `{name}`: {values[0] if len(set(values)) == 1 else ' / '.join(values)}")
    return "\n".join(lines)


Preset = Annotated[
    str | None,
    typer.Option(
        help="demo: generated images, no network. quick: CIFAR-10 on two cores. seeds: quick's training over six "
        "seeds, for questions 3 and 4. full: all arms, on a GPU."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run directory; runs/PRESET by default. Resumed if it exists.")]
Data = Annotated[Path | None, typer.Option(envvar="FASTLIP_DATA", help="Folder that holds cifar-10-batches-py.")]
Download = Annotated[bool, typer.Option(help="Whether missing data and ImageNet weights may be fetched.")]
SourceCheckpoint = Annotated[
    Path | None,
    typer.Option(
        help="Source weights under torchvision's names: safetensors, or a torch file, of which nothing is executed."
    ),
]
SourceData = Annotated[
    Path | None, typer.Option(help="Folder of images, one folder per class, to pre-train the source on.")
]
Corruptions = Annotated[
    Path | None,
    typer.Option(help="Folder with CIFAR-10-C's files; without it corruptions are made, and labelled so."),
]
Seed = Annotated[int | None, typer.Option(help="First seed.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; auto by default.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; see below. Repeatable.")
]


@app.callback(invoke_without_command=True, epilog=_settings())
def study(
    context: typer.Context,
    preset: Preset = None,
    out: Out = None,
    data: Data = None,
    download: Download = True,
    source_checkpoint: SourceCheckpoint = None,
    source_data: SourceData = None,
    corruptions: Corruptions = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="Share the run directory with other processes given the same, here or elsewhere."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Carry out only the stages of such names; see plan. Repeatable."),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
) -> None:
    """Does what Szegedy et al. (2013) found hold for bigger and for pre-trained models?

    Trains ResNet-50 from scratch and from a source, attacks both, bounds their Lipschitz constants and writes a run
    directory with results.json, tables, figures and report.html. The same command run again resumes an unfinished run.
    """
    if context.invoked_subcommand is not None:
        return
    chosen, data = _chosen(context, preset, data, seed, device, settings)
    try:
        # torch and matplotlib take seconds to import, and mistakes on the command line are reported before.
        from fastlip.study.pipeline import runner
        from fastlip.study.settings.input_paths import InputPaths

        paths = InputPaths(data, source_checkpoint, source_data, corruptions, download)
        runner.run(chosen, paths, _out(out, chosen), join=join, only=only or ())
    except KeyboardInterrupt:
        # Typer would exit without a message.
        raise StudyError("interrupted; run the same command again to go on", status=130) from None


@app.command()
def plan(
    context: typer.Context,
    preset: Preset = None,
    out: Out = None,
    data: Data = None,
    download: Download = True,
    source_checkpoint: SourceCheckpoint = None,
    source_data: SourceData = None,
    corruptions: Corruptions = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
) -> None:
    """Write a run as shell commands for an existing scheduler.

    Files `1-...txt`, `2-...txt`, ... in the folder `plan` of the run directory hold one command per line. The commands
    of one file run in any order and side by side, on machines that see the same paths, once those of the file before
    are done. A command whose process died is run again as it is. fastlip/study/README.md has an example for Slurm.

    With GNU parallel: `(for file in DIR/plan/*.txt; do parallel --halt soon,fail=1 -j 4 < $file || exit; done)`
    """
    chosen, data = _chosen(context, preset, data, seed, device, settings)
    from fastlip.study.pipeline.plan import write_plan
    from fastlip.study.settings.input_paths import InputPaths

    directory = _out(out, chosen).resolve()
    files = {"--data": data, "--source-checkpoint": source_checkpoint}
    files |= {"--source-data": source_data, "--corruptions": corruptions}
    command = [sys.executable, "-m", "fastlip.study", "--preset", str(preset), "--out", str(directory)]
    command += [word for option, path in files.items() if path for word in (option, str(path.resolve()))]
    command += [] if download else ["--no-download"]
    command += [] if seed is None else ["--seed", str(seed)]
    command += [] if device is None else ["--device", device]
    command += [word for assignment in settings or () for word in ("--set", assignment)]
    paths = InputPaths(data, source_checkpoint, source_data, corruptions, download)
    for file in write_plan(chosen, paths, directory, command):
        typer.echo(f"{file}: {len(file.read_text().splitlines())} commands")


def _chosen(
    context: typer.Context,
    preset: str | None,
    data: Path | None,
    seed: int | None,
    device: str | None,
    assignments: list[str] | None,
) -> tuple[Settings, Path | None]:
    """The settings that the command line asks for, and the folder of the data where these want it."""
    if preset is None:
        raise StudyError("name a preset: python -m fastlip.study --preset demo (or --help)", status=2)
    assignments = list(assignments or [])
    if seed is not None:
        assignments.append(f"seed={seed}")
    if device is not None:
        assignments.append(f"device={device}")
    chosen = overrides.override(presets.preset(preset), assignments)
    origin = context.get_parameter_source("data")
    if chosen.dataset == "generated" and origin is not None and origin.name == "ENVIRONMENT":
        data = None  # FASTLIP_DATA is set for other runs
    return chosen, data


def _out(out: Path | None, settings: Settings) -> Path:
    return out or Path("runs") / settings.preset


@app.command("report")
def rebuild(run: Annotated[Path, typer.Argument(help="Run directory with results.json.")]) -> None:
    """Rebuild tables, figures and report.html from stored results alone."""
    from fastlip.study.report import html_report
    from fastlip.study.storage.run_directory import RunDirectory

    typer.echo(html_report.write(RunDirectory(run)))


@app.command("compare")
def side_by_side(
    runs: Annotated[list[Path], typer.Argument(help="Run directories with results.json, two or more.")],
) -> None:
    """Set finished runs side by side: verdicts, models, settings that differ; as Markdown."""
    from fastlip.study.report.compare import compare

    for table in compare(runs):
        typer.echo("\n".join(map(printable, table.markdown().split("\n"))))


def main() -> None:
    """Run the command line. Errors that the user can fix end in one line on stderr and an exit status."""
    try:
        app()
    except StudyError as error:
        _fail(str(error), error.status)
    except OSError as error:
        # The disk is full, a permission is missing, or a file vanished: what was written before is still complete.
        _fail(f"{error}; mend that and run the same command again to go on", 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own class, which may not be imported yet
            raise
        _fail(
            f"{str(error).splitlines()[0]} Free the GPU and run the same command again to go on, or begin in another "
            "--out with smaller batches (--set, see --help).",
            1,
        )


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"error: {printable(' '.join(message.split()))}\n")
    sys.exit(status)

"""The command line of the study."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fastlip._text import printable
from fastlip.study.errors import StudyError
from fastlip.study.settings import overrides, presets, serialization
from fastlip.study.settings.input_paths import InputPaths, absolute
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
        help="demo: generated images, no network. quick: CIFAR-10 on two cores. seeds: quick's training over ten "
        "seeds, for question 3. overnight: all of CIFAR-10 on a CPU. full: all arms, on a GPU."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run directory; runs/PRESET by default. Resumed if it exists.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Network: torchvision:NAME, timm:NAME or package.module:function."),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGES",
        help="Images in place of the preset's: cifar10, cifar100, svhn, a folder (of train/CLASS and test/CLASS, or of "
        "classes, which are split), or hf:NAME with a data set of the Hugging Face Hub or the folder of one.",
    ),
]
Data = Annotated[
    Path | None, typer.Option(envvar="FASTLIP_DATA", help="Folder of the files of CIFAR-10, CIFAR-100 and SVHN.")
]
Download = Annotated[bool, typer.Option(help="Whether missing data and ImageNet weights may be fetched.")]
SourceCheckpoint = Annotated[
    Path | None,
    typer.Option(
        help="Source weights under the network's own names: safetensors, or a torch file, of which nothing is executed."
    ),
]
SourceData = Annotated[
    str | None, typer.Option(metavar="IMAGES", help="Images to pre-train the source on, named as for --target.")
]
Corruptions = Annotated[
    Path | None,
    typer.Option(help="Folder with CIFAR-10-C's files; without it corruptions are made, and labelled so."),
]
Join = Annotated[
    bool,
    typer.Option("--join", help="Share the run directory with other processes given the same, here or elsewhere."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Carry out only the stages of such names; see plan. Repeatable."),
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
    model: Model = None,
    target: Target = None,
    data: Data = None,
    download: Download = True,
    source_checkpoint: SourceCheckpoint = None,
    source_data: SourceData = None,
    corruptions: Corruptions = None,
    join: Join = False,
    only: Only = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
) -> None:
    """Does what Szegedy et al. (2013) found hold for bigger and for pre-trained models?

    Trains a large network from scratch and from a source, and small ones; attacks all, bounds their Lipschitz constants
    and writes a run directory with results.json, tables, figures and report.html. The same command run again resumes an
    unfinished run. `measure` does the same for checkpoints of your own, without training.
    """
    if context.invoked_subcommand is not None:
        return
    chosen = _chosen(preset, model, seed, device, settings)
    paths = InputPaths(
        data=_data(context, chosen, data),
        source_checkpoint=source_checkpoint,
        source_data=source_data,
        corruptions=corruptions,
        download=download,
        target=target,
    )
    _run(chosen, paths, _out(out, chosen), join, only)


@app.command()
def measure(
    context: typer.Context,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Weights to measure: safetensors, or a torch file, of which nothing is executed. Repeatable.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SPEC",
            help="Network of all checkpoints, or of the checkpoint NAME (repeatable): torchvision:NAME, timm:NAME or "
            "package.module:function, as they are there; --set stem and --set scale change them.",
        ),
    ] = None,
    target: Target = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="What the networks' inputs were normalised by: imagenet, cifar10, cifar100, svhn, none, or means and "
            "standard deviations as in 0.5,0.5,0.5/0.25,0.25,0.25. By default the target's where they are known, or "
            "else ImageNet's.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Whose images and measurements are taken; nothing is trained.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/measure by default. Resumed if it exists.")
    ] = None,
    data: Data = None,
    download: Download = True,
    corruptions: Corruptions = None,
    join: Join = False,
    only: Only = None,
    planned: Annotated[
        bool, typer.Option("--plan", help="Write the run as commands for a scheduler in place of running it; see plan.")
    ] = False,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
) -> None:
    """Measure checkpoints of your own without training: the whole report for any number of them.

    `python -m fastlip.study measure --checkpoint a=A.safetensors --checkpoint b=B.pth --model timm:resnet18`
    """
    files = _named(checkpoint or [], "--checkpoint", "NAME=FILE")
    if not files:
        raise StudyError("name the checkpoints: measure --checkpoint NAME=FILE --model SPEC (or --help)", status=2)
    assignments = [*(settings or []), *([] if normalize is None else [f"normalize={normalize}"])]
    chosen = _measuring(presets.preset(preset), tuple(files), model or [])
    chosen = _overridden(chosen, seed, device, assignments)
    directory = out or Path("runs") / "measure"
    paths = InputPaths(
        data=_data(context, chosen, data),
        corruptions=corruptions,
        download=download,
        target=target,
        checkpoints={name: Path(file) for name, file in files.items()},
    )
    if not planned:
        _run(chosen, paths, directory, join, only)
        return
    options: list[tuple[str, str | None]] = [("--preset", preset), ("--normalize", normalize)]
    options += [("--checkpoint", f"{name}={Path(file).resolve()}") for name, file in files.items()]
    options += [("--model", spec) for spec in model or []]
    _plan(chosen, paths, directory, ["measure"], options, seed, device, settings)


def _measuring(settings: Settings, names: tuple[str, ...], models: list[str]) -> Settings:
    """The settings of a run that measures the checkpoints ``names`` with the ``settings`` of a preset.

    Args:
        settings: of the preset.
        names: of the checkpoints.
        models: a network for all of them, or NAME=network for each.
    """
    own = _named([text for text in models if "=" in text], "--model", "NAME=SPEC")
    shared = [text for text in models if "=" not in text]
    if set(own) - set(names):
        raise StudyError(f"--model {min(set(own) - set(names))}=...: no --checkpoint has that name", status=2)
    if len(shared) > 1 or not (shared or set(own) == set(names)):
        raise StudyError("--model: name one SPEC for all checkpoints, or NAME=SPEC for each of them", status=2)
    rest = shared[0] if shared else settings.model
    each = tuple(own.get(name, rest) for name in names) if own else ()
    # A preset's stem and scale keep the shapes of all weights: they would turn a network into another unnoticed.
    settings = replace(settings, stem="imagenet", scale=1, seeds=1)
    return replace(settings, arms=(), checkpoints=names, model=rest, models=each)


def _named(texts: list[str], option: str, form: str) -> dict[str, str]:
    """The values of a repeatable option NAME=VALUE by their names."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise StudyError(f"{option} {text}: write it as {form}", status=2)
        if name in found:
            raise StudyError(f"{option} {name}=...: the name is given twice", status=2)
        found[name] = value
    return found


def _run(settings: Settings, paths: InputPaths, out: Path, join: bool, only: list[str] | None) -> None:
    _stay_offline(paths)
    try:
        # torchvision and matplotlib take seconds to import, and mistakes on the command line are reported before.
        from fastlip.study.pipeline import runner

        with _terminated_as_interrupted():
            runner.run(settings, paths, out, join=join, only=only or ())
    except _Terminated:
        raise StudyError("terminated; run the same command again to go on", status=143) from None
    except KeyboardInterrupt:
        # Typer would exit without a message.
        raise StudyError("interrupted; run the same command again to go on", status=130) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill."""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM end what runs as Ctrl-C does."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def plan(
    context: typer.Context,
    preset: Preset = None,
    out: Out = None,
    model: Model = None,
    target: Target = None,
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
    chosen = _chosen(preset, model, seed, device, settings)
    paths = InputPaths(
        data=_data(context, chosen, data),
        source_checkpoint=source_checkpoint,
        source_data=source_data,
        corruptions=corruptions,
        download=download,
        target=target,
    )
    options = [("--preset", preset), ("--model", model)]
    _plan(chosen, paths, _out(out, chosen), [], options, seed, device, settings)


def _plan(
    chosen: Settings,
    paths: InputPaths,
    out: Path,
    subcommand: list[str],
    options: list[tuple[str, str | None]],
    seed: int | None,
    device: str | None,
    assignments: list[str] | None,
) -> None:
    """Write a run as commands, which hold the ``options`` given and the inputs, all paths absolute."""
    _stay_offline(paths)
    from fastlip.study.pipeline.plan import write_plan

    directory = out.resolve()
    for option, value in (
        ("--out", directory),
        ("--target", paths.target),
        ("--data", paths.data),
        ("--source-checkpoint", paths.source_checkpoint),
        ("--source-data", paths.source_data),
        ("--corruptions", paths.corruptions),
    ):
        options.append((option, None if value is None else absolute(value)))
    options += [("--seed", None if seed is None else str(seed)), ("--device", device)]
    options += [("--set", assignment) for assignment in assignments or ()]
    command = [sys.executable, "-m", "fastlip.study", *subcommand]
    command += [word for option, value in options if value is not None for word in (option, value)]
    command += [] if paths.download else ["--no-download"]
    for file in write_plan(chosen, paths, directory, command):
        typer.echo(f"{file}: {len(file.read_text().splitlines())} commands")


def _chosen(
    preset: str | None, model: str | None, seed: int | None, device: str | None, assignments: list[str] | None
) -> Settings:
    """The settings that the command line asks for."""
    if preset is None:
        raise StudyError("name a preset: python -m fastlip.study --preset demo (or --help)", status=2)
    named = [] if model is None else [f"model={model}"]
    return _overridden(presets.preset(preset), seed, device, [*(assignments or []), *named])


def _overridden(settings: Settings, seed: int | None, device: str | None, assignments: list[str]) -> Settings:
    assignments = list(assignments)
    if seed is not None:
        assignments.append(f"seed={seed}")
    if device is not None:
        assignments.append(f"device={device}")
    return overrides.override(settings, assignments)


def _stay_offline(paths: InputPaths) -> None:
    """Tell the libraries of Hugging Face, which read it when they are imported, that nothing may be fetched."""
    if not paths.download:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _data(context: typer.Context, settings: Settings, data: Path | None) -> Path | None:
    """The folder of the data where the settings want it; the command line is told apart from FASTLIP_DATA."""
    origin = context.get_parameter_source("data")
    if settings.dataset == "generated" and origin is not None and origin.name == "ENVIRONMENT":
        return None  # FASTLIP_DATA is set for other runs
    return data


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

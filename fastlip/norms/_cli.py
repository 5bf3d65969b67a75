"""The command line of layer norms."""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from fastlip.norms._html import report_html
from fastlip.norms._interval import confidence_text
from fastlip.norms._layers import layer_norms
from fastlip.norms._report import NormReport
from fastlip.norms._solve import METHODS

# Characters of an error.
_LONGEST = 500

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def norms(
    model: Annotated[str, typer.Argument(help="A torchvision model such as resnet50, or package.module:function.")],
    shape: Annotated[str, typer.Option("--input", help="Shape of one input.", metavar="C,H,W")] = "3,224,224",
    checkpoint: Annotated[
        Path | None, typer.Option(help="State dict: safetensors, or a torch file, of which nothing is executed.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes of a torchvision model.")] = None,
    rtol: Annotated[float, typer.Option(help="Relative width of each interval.")] = 1e-2,
    confidence: Annotated[float, typer.Option(help="Joint over all layers.")] = 1.0 - 1e-6,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "auto",
    fold: Annotated[bool, typer.Option(help="Whether BatchNorm is folded into the layer before it.")] = True,
    seed: Annotated[int | None, typer.Option(help="Of the random starts; the operating system's by default.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON; - for standard output.", metavar="OUT")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write CSV; - for standard output.", metavar="OUT")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to read; - for standard output.")] = None,
) -> None:
    """Operator norms of every convolution and linear layer of MODEL, with certified upper sides."""
    try:
        network = _load_model(model, classes)
        if checkpoint is not None:
            network.load_state_dict(_load_state(checkpoint))
        report = _compute(network, _parse_shape(shape), rtol, confidence, method, fold, seed)
        page = f"{model} on {shape}"
        exports = ((json, report.to_json), (csv, report.to_csv), (html, lambda: report_html(report, page)))
        for path, export in exports:
            if path is not None and str(path) != "-":
                path.write_text(export(), encoding="utf-8")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What load_state_dict says is long, and of many lines.
        text = " ".join(str(error).split())
        print(f"error: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}", file=sys.stderr)
        raise typer.Exit(2) from None
    to_stdout = [export for path, export in exports if path is not None and str(path) == "-"]
    if to_stdout:
        for export in to_stdout:
            print(export(), end="")
    else:
        console = Console()
        console.print(_table(report, wide=console.width >= 100))


def _compute(
    network: nn.Module,
    shape: tuple[int, ...],
    rtol: float,
    confidence: float,
    method: str,
    fold: bool,
    seed: int | None,
) -> NormReport:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    columns = (TextColumn("operator norms"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("norms", total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return layer_norms(
            network,
            shape,
            fold_batchnorm=fold,
            rtol=rtol,
            confidence=confidence,
            method=method,
            generator=generator,
            progress=step,
        )


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--input must be numbers such as 3,32,32, got {text!r}") from None


def _load_model(name: str, classes: int | None) -> nn.Module:
    """A torchvision model without weights, or what a named function returns."""
    if ":" in name:
        if classes is not None:
            raise ValueError("--classes is for torchvision models; give MODEL a function that sets them")
        module, _, function = name.partition(":")
        found = getattr(importlib.import_module(module), function, None)
        network = found() if callable(found) and not isinstance(found, nn.Module) else found
        if not isinstance(network, nn.Module):
            got = type(network).__name__
            raise ValueError(f"{name} must be a torch module or a function that returns one, got {got}")
        return network
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        raise ImportError('named models need torchvision: pip install "fastlip[study]"') from None
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classification model {name!r}; give one of its names, or package.module:function"
        )
    network = models.get_model(name, weights=None, **options)
    assert isinstance(network, nn.Module)
    return network


def _load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from safetensors, or from a torch file, also one that holds them under "state_dict"."""
    if path.suffix == ".safetensors":
        try:
            library = importlib.import_module("safetensors.torch")
        except ImportError:
            raise ImportError('safetensors files need safetensors: pip install "fastlip[study]"') from None
        load, kind = library.load_file, "safetensors file"
    else:
        load, kind = partial(torch.load, map_location="cpu", weights_only=True), "state dict written by torch.save"
    try:
        state: Any = load(path)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is no such thing makes the readers raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no {kind}, or holds more than tensors ({reason})") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    # DataParallel writes every name behind "module.".
    return {name.removeprefix("module."): value for name, value in state.items()}


def _table(report: NormReport, wide: bool) -> Table:
    table = Table(box=None, header_style="bold", row_styles=["", "dim"])
    table.add_column("layer", no_wrap=True)
    if wide:  # in a narrow terminal the descriptions give way, never the numbers
        table.add_column("", overflow="ellipsis", no_wrap=True)
    table.add_column("at least", justify="right", no_wrap=True, min_width=8)
    table.add_column("at most", justify="right", style="bold", no_wrap=True, min_width=8)
    table.add_column("width", justify="right", no_wrap=True, min_width=6)
    table.add_column("method", no_wrap=True, min_width=11)
    for name, interval in report.items():
        width = "exact" if interval.width < 1e-6 else f"{100 * interval.width:.2g}%"
        method = f"{interval.method} {interval.iterations or ''}".rstrip()
        late = "" if interval.converged else "[yellow]"
        table.add_row(
            name,
            *([report.descriptions[name]] if wide else []),
            f"{interval.lower:.5g}",
            f"{interval.upper:.5g}",
            f"{late}{width}",
            method,
        )
    low, high = report.log10_product_lower, report.log10_product_upper
    table.caption = (
        f"Product of {len(report)} layers: 10^{low:.3f} to 10^{high:.3f}. "
        f"Joint confidence {confidence_text(report.confidence)}."
    )
    table.caption_justify = "left"
    return table

"""The command line of layer norms."""

import importlib
import importlib.util
import math
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fastlip._spoken import Spoken
from fastlip._text import printable
from fastlip.norms._interval import confidence_text, width_text
from fastlip.norms._layer_norms import layer_norms
from fastlip.norms._options import METHODS
from fastlip.norms._report.report import NormReport, listed_names

# Most characters of an error, and most names that one lists.
_LONGEST, _NAMED = 500, 3

# Escape sequences for colours, which torch puts into its messages.
_COLOURS = re.compile("\x1b\\[[0-9;]*m")

# Keys under which training scripts keep a state dict, the first that is there; EMA weights where there are no others.
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema")
# Prefixes of all names: of DataParallel and EMA, of torch.compile, and of the usual attribute of a Lightning module.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def norms(
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision model such as resnet50, timm:NAME, package.module:function or file.py:Class."
        ),
    ],
    shape: Annotated[str, typer.Option("--input", help="Shape of one input.", metavar="C,H,W")] = "3,224,224",
    checkpoint: Annotated[
        Path | None, typer.Option(help="State dict: safetensors, or a torch file, of which nothing is executed.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes of a model of torchvision or timm.")] = None,
    rtol: Annotated[float, typer.Option(help="Relative width of each interval.")] = 1e-2,
    confidence: Annotated[float, typer.Option(help="Joint over all layers.")] = 1.0 - 1e-6,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "auto",
    fold: Annotated[bool, typer.Option(help="Whether BatchNorm is folded into the layer before it.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a model of which a weight is left out.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the random starts; the operating system's by default.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write JSON; - for standard output.", metavar="OUT")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write CSV; - for standard output.", metavar="OUT")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to read; - for standard output.")] = None,
) -> None:
    """Operator norms of every linear map with weights in MODEL, with certified upper sides, and what is left out."""
    try:
        _check_options(classes, rtol, confidence, seed)
        sizes = _parse_shape(shape)
        network = _load_model(model, classes)
        if checkpoint is not None:
            _load_into(network, _load_state(checkpoint), checkpoint, model)
        report = _compute(network, sizes, rtol, confidence, method, fold, strict, seed)
        # JSON escapes control characters in names by itself, and so keeps the names.
        shown = _shown(report)
        title = printable(f"Operator norms of {model} on {shape}")
        exports = ((json, report.to_json), (csv, shown.to_csv), (html, lambda: shown.to_html(title)))
        to_stdout = [export() for path, export in exports if path is not None and str(path) == "-"]
        for path, export in exports:
            if path is not None and str(path) != "-":
                path.write_text(export(), encoding="utf-8")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # Errors of load_state_dict are long, have many lines, and contain names from the file.
        text = printable(" ".join(_COLOURS.sub("", str(error)).split()))
        print(f"error: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}", file=sys.stderr)
        raise typer.Exit(2) from None
    if to_stdout:
        print(*to_stdout, sep="", end="")
    else:
        console = Console()
        table = _table(shown, wide=True)
        unlimited = console.options.update_width(_LONGEST)
        if console.measure(table, options=unlimited).maximum > console.width:
            table = _table(shown, wide=False)
        console.print(table)
        for reason, names in shown.reasons.items():
            console.print(Text(f"Left out: {listed_names(names)}: {reason}."))


def _compute(
    network: nn.Module,
    shape: tuple[int, ...],
    rtol: float,
    confidence: float,
    method: str,
    fold: bool,
    strict: bool,
    seed: int | None,
) -> NormReport:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    columns = (TextColumn("operator norms"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("norms", total=None)
        spoken = Spoken(partial(print, file=sys.stderr, flush=True), silent=console.is_terminal)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            spoken(f"operator norms: {done} of {total}")

        return layer_norms(
            network,
            shape,
            fold_batchnorm=fold,
            strict=strict,
            rtol=rtol,
            confidence=confidence,
            method=method,
            generator=generator,
            progress=step,
        )


def _check_options(classes: int | None, rtol: float, confidence: float, seed: int | None) -> None:
    """Refuse wrong options by the names that they have on the command line, before anything is loaded."""
    if classes is not None and not 0 < classes < 2**31:
        raise ValueError(f"--classes must be a number of classes, got {classes}")
    if not 0.0 < rtol < math.inf:
        raise ValueError(f"--rtol must be above 0 and finite, got {rtol}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"--confidence must lie strictly between 0 and 1, got {confidence}")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must fit 64 bits, got {seed}")


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--input must be numbers such as 3,32,32, got {text!r}") from None
    if math.prod(max(size, 1) for size in sizes) >= 2**40:
        raise ValueError(f"--input {text} is larger than any memory")
    return sizes


def _load_model(name: str, classes: int | None) -> nn.Module:
    """A model of torchvision or timm without weights, or the model that a named function returns."""
    module, _, named = name.rpartition(":")
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if module == "timm":
        network = _timm_model(named, options)
    elif module in ("", "torchvision"):
        network = _torchvision_model(named, options)
    else:
        if classes is not None:
            raise ValueError("--classes is for models of torchvision and timm; give MODEL a function that sets them")
        holder = _imported(module)
        if not hasattr(holder, named):
            raise ValueError(f"{module} has no {named!r}; it defines {_defined(holder)}")
        found = getattr(holder, named)
        network = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(network, nn.Module):
        got = type(network).__name__
        raise ValueError(f"{name} must be a torch module or a function that returns one, got {got}")
    return network


def _torchvision_model(name: str, options: dict[str, Any]) -> Any:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError:
        raise ImportError('named models need torchvision: pip install "fastlip[study]"') from None
    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classification model {name!r}; give one of its names, timm:NAME, "
            "package.module:function or file.py:Class"
        )
    return models.get_model(name, weights=None, **options)


def _timm_model(name: str, options: dict[str, Any]) -> Any:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ImportError('timm\'s models need timm: pip install "fastlip[timm]"') from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    return timm.create_model(name, **options)


def _defined(module: ModuleType) -> str:
    """The names of a module's own functions and classes, the first of them."""
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return f"{', '.join(own[:_NAMED])}{' ...' if len(own) > _NAMED else ''}" or "no function and no class"


def _imported(module: str) -> ModuleType:
    """A module by its name or, where it ends in .py, from its file, which may import what lies beside it."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {module}")
    sys.path.insert(0, str(path.parent))
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # as classes of a module that pickles or inspects itself expect
    spec.loader.exec_module(found)
    return found


def _load_state(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors or torch file by name.

    They may lie under a key such as "state_dict", and behind prefixes that all names share, such as "module.".
    """
    if path.suffix == ".safetensors":
        try:
            library = importlib.import_module("safetensors.torch")
        except ImportError:
            raise ImportError('safetensors files need safetensors: pip install "fastlip[study]"') from None
        load, kind = library.load_file, "safetensors file"
    else:
        load, kind = partial(torch.load, map_location="cpu", weights_only=True), "state dict written by torch.save"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            state: Any = load(path)
    except OSError:
        raise
    except Exception as error:  # readers raise all kinds of errors for other files
        raise ValueError(f"{path} is no {kind}, or holds more than tensors ({_refusal(error)})") from None
    while isinstance(state, dict) and (key := next((k for k in _HOLDERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    for name in state:
        if not isinstance(name, str):
            raise ValueError(f"{path}: names must be strings, got {repr(name)[:60]} ({type(name).__name__})")
    # torch.optim.swa_utils.AveragedModel counts beside the model.
    if any(name.startswith("module.") for name in state):
        state = {name: value for name, value in state.items() if name != "n_averaged"}
    while state and (shared := next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), "")):
        state = {name.removeprefix(shared): value for name, value in state.items()}
    return state


def _bare(name: str) -> str:
    """``name`` without what wrappers put in front of it, and ``torch.compile`` in front of parts of it."""
    name = name.replace("_orig_mod.", "")
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(wrapper)
    return name


def _refusal(error: Exception) -> str:
    """The reason why a reader refused, in a few words; torch gives it in the middle of a page of advice."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    refused = text.partition("WeightsUnpickler error: ")[2] or text
    for advice in (" Please use ", " Please file ", " Check the documentation "):
        refused = refused.partition(advice)[0]
    return refused[: _LONGEST // 2]


def _load_into(network: nn.Module, given: dict[str, Any], path: Path, model: str) -> None:
    """Load a checkpoint whose names, values and shapes are those of ``network``.

    Raises:
        ValueError: they are not, or a value is complex or of whole numbers where the network's is real.
    """
    own = network.state_dict()
    wrapped = {_bare(name): name for name in own}
    state: dict[str, Any] = {}
    for name, value in given.items():
        bare = name if name in own else wrapped.get(_bare(name), name)
        if bare in state:
            raise ValueError(f"{path} has {bare!r} twice, once behind a prefix such as 'module.': keep one of them")
        state[bare] = value
        if bare.rpartition(".")[2] == "_extra_state":
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} must be a tensor, got {type(value).__name__}")
        if value.is_complex():
            raise ValueError(f"{path}: {name!r} is complex ({value.dtype}), and its imaginary part would be lost")
        wanted = own.get(bare)
        if isinstance(wanted, Tensor) and wanted.is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{path}: {name!r} holds {value.dtype} where the model has {wanted.dtype}: dequantise it")
    found = network.load_state_dict(state, strict=False)
    wrong = [
        f"{kind} key(s): {', '.join(map(repr, names[:_NAMED]))}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for kind, names in (("Missing", found.missing_keys), ("Unexpected", found.unexpected_keys))
        if names
    ]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of {model}. {'. '.join(wrong)}")


def _shown(report: NormReport) -> NormReport:
    """The report with names and descriptions that are safe to print.

    Raises:
        ValueError: two names cannot be told apart then.
    """
    shown = replace(
        report,
        intervals={printable(name): interval for name, interval in report.items()},
        descriptions={printable(name): printable(text) for name, text in report.descriptions.items()},
        left_out={printable(name): printable(reason) for name, reason in report.left_out.items()},
    )
    if len(shown) != len(report):
        raise ValueError("two layers have names that differ in how control characters are written; rename one")
    return shown


def _table(report: NormReport, wide: bool) -> Table:
    table = Table(box=None, header_style="bold", row_styles=["", "dim"])
    table.add_column("layer", no_wrap=True)
    if wide:  # a narrow terminal has no room for descriptions beside the numbers
        table.add_column("", overflow="ellipsis", no_wrap=True)
    table.add_column("at least", justify="right", no_wrap=True, min_width=8)
    table.add_column("at most", justify="right", style="bold", no_wrap=True, min_width=8)
    table.add_column("width", justify="right", no_wrap=True, min_width=6)
    table.add_column("method", no_wrap=True, min_width=11)
    for name, interval in report.items():
        method = f"{interval.method} {interval.iterations or ''}".rstrip()
        late = "" if interval.converged else "[yellow]"
        table.add_row(
            Text(name),  # a name may look like rich's markup
            *([Text(report.descriptions[name])] if wide else []),
            f"{interval.lower:.5g}",
            f"{interval.upper:.5g}",
            f"{late}{width_text(interval)}",
            method,
        )
    product = report.product()
    table.caption = f"{product[0].upper()}{product[1:]}. Joint confidence {confidence_text(report.confidence)}."
    table.caption_justify = "left"
    return table

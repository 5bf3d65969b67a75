"""Which of the networks that people use have a Lipschitz bound, what it is, and the largest stretch that was found.

    pip install timm transformers; pip install --no-deps robustbench geotorch torchdiffeq gdown beautifulsoup4
    python benchmarks/zoo.py --rules   # which are accepted, without computing norms
    python benchmarks/zoo.py           # with bounds

259 models in four families (_zoo_models.py says which), each with random weights from a fixed seed, in a process of its
own with limits of CPU time and memory. Inputs are small where the architecture allows it (``size``). Rows are put into
results/zoo.csv as they are measured, small networks first where earlier rows say how large they are; what is there is
not measured again, unless ``--again`` names its verdict. A library that is not installed is named and left out. At the
end results/zoo.md is made anew from the whole file.

Columns: ``mode`` is "rules" (:func:`fastlip.lipschitz.require_rules`) or "bound" (:func:`fastlip.lipschitz_bound`).
``verdict``: "accepted", "refused" (fastlip says why), "limit" (of time or memory), "does not run" (the library's own
model) or "failed" (an error that is none of these). ``missing`` lists in mode "rules" everything in the network that
has no rule, not only the first. ``log10_upper`` is the bound on inputs in ``domain``, ``log10_stretch`` that of the
largest ||f(x) - f(y)|| / ||x - y|| found in [0, 1]: in float64 (``found_in``) for networks of up to 8 M weights.
``seconds`` are CPU seconds of the bound alone on one thread, ``peak_mib`` the largest memory of the process.
"""

import argparse
import csv
import math
import multiprocessing
import resource
import signal
import subprocess
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _timing import Results, environment
from _zoo_models import FAMILIES, Entry, build, entries, logits, prepare
from torch import nn

import fastlip
from fastlip.lipschitz import _graph, require_rules
from fastlip.lipschitz._steps import Step

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "mode", "family", "name", "size", "weights", "verdict", "reason", "missing", "log10_upper", "domain", "confidence",
    "log10_stretch", "found_in", "seconds", "peak_mib", "version", "commit",
)  # fmt: skip
BOX = (0.0, 1.0)
#: Networks of up to so many weights are searched for stretches in float64.
_SMALL = 8 << 20


def missing_rules(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Everything in a network without a rule, each once: its trace goes on where a step has none."""
    found: dict[str, None] = {}
    step_of, check = _graph._step, _graph._require_batch_first

    def step(node: Any, graph_module: Any, made: Any, values: Any) -> Any:
        try:
            return step_of(node, graph_module, made, values)
        except ValueError as error:
            found[what_is_missing(str(error))] = None
            sources = [made.steps[source] for source in node.all_input_nodes if source in made.steps][:1]
            shapes = [values.shapes[node]] if node in values.shapes else [part.shape for part in values.bundles[node]]
            steps = [Step(node.name, "missing", sources, 1.0, tuple(shape[1:])) for shape in shapes]
            return steps[0] if node in values.shapes else steps

    def batch_first(node: Any, values: Any) -> None:
        try:
            check(node, values)
        except ValueError as error:
            found[what_is_missing(str(error))] = None

    _graph._step, _graph._require_batch_first = step, batch_first
    try:
        require_rules(model, shape, bounds=BOX)
    except Exception as error:
        # Once a step was replaced, later errors may only follow from that.
        if not found:
            found[what_is_missing(str(error))] = None
    finally:
        _graph._step, _graph._require_batch_first = step_of, check
    return list(found)


def what_is_missing(message: str) -> str:
    """What a refusal is about, without the place, so that refusals of several models can be counted together."""
    for start, end in (("no Lipschitz rule for the function ", " (at "), ("no Lipschitz rule for ", " (at ")):
        if start in message:
            return message.partition(start)[2].partition(end)[0]
    for phrase in ("has no global Lipschitz constant", "has no Lipschitz constant on this domain"):
        if phrase in message:
            return f"{message.partition(phrase)[0].rpartition(' (')[2].rstrip(') ')} {phrase}"
    if "nothing is known of how large" in message:
        return "size of " + message.partition(") gets there")[0].rpartition("(")[2]
    if "cannot be traced" in message:
        return "tracing: " + message.partition("(")[2].partition("); register")[0].partition("(")[2][:80]
    if "mixes the batch axis" in message:
        return "mixes the batch axis into others"
    return message.partition(";")[0].partition(". ")[0][-100:]


def stretch(model: nn.Module, shape: tuple[int, ...], rounds: int, points: int) -> float:
    """log10 of the largest stretch found between two inputs in [0, 1].

    Power iteration on the Jacobian at random points, with finite steps inside the box; and pairs far apart.
    """
    generator = torch.Generator().manual_seed(2)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.rand(points, *shape, generator=generator, dtype=torch.float64).to(dtype)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    ones = (-1, *(1,) * len(shape))
    # float32 leaves about four digits of the difference of two outputs this far apart.
    small = 1e-5 if dtype == torch.float64 else 1e-2
    best = 0.0
    for round_ in range(rounds):
        point = x.clone().requires_grad_()
        here = logits(model(point))
        v = v / torch.linalg.vector_norm(v.flatten(1), dim=1).clamp_min(1e-30).view(ones)
        length = torch.linalg.vector_norm(x.flatten(1), dim=1).view(ones)
        sizes = (small, 0.1, 1.0) if round_ in (0, rounds - 1) else (small,)
        direction = torch.zeros_like(here)
        for size in sizes:
            there = (x + size * length * v).clamp(0.0, 1.0)
            with torch.no_grad():
                moved = logits(model(there)) - here.detach()
            out = torch.linalg.vector_norm(moved.double().flatten(1), dim=1)
            apart = torch.linalg.vector_norm((there - x).double().flatten(1), dim=1)
            best = max(best, (out / apart).nan_to_num(0.0, 0.0).max().item())
            if size == small:
                direction = moved
        (v,) = torch.autograd.grad(here, point, direction / direction.abs().max().clamp_min(1e-30))
    return math.log10(best) if best > 0.0 else -math.inf


def measured(entry: Entry, mode: str) -> dict[str, Any]:
    """The row of one model, in this process."""
    row: dict[str, Any] = {}
    try:
        model, shape = build(entry), (3, entry.size, entry.size)
        row["weights"] = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            logits(model(torch.rand(2, *shape)))
    except Exception as error:
        return row | {"verdict": "does not run", "reason": f"{type(error).__name__}: {error}"[:300]}
    begun = time.process_time()
    try:
        if mode == "rules":
            require_rules(model, shape, bounds=BOX)
        else:
            bound = fastlip.lipschitz_bound(model, shape, bounds=BOX)
            row |= {"log10_upper": bound.log10_upper, "confidence": bound.confidence}
            row["domain"] = str(bound.domain)
    except ValueError as error:
        row |= {"verdict": "refused", "reason": str(error)[:300], "seconds": time.process_time() - begun}
        if mode == "rules":
            row["missing"] = "; ".join(missing_rules(model, shape))
        return row
    row |= {"verdict": "accepted", "seconds": time.process_time() - begun}
    if mode == "bound":
        small = row["weights"] <= _SMALL
        model = model.double() if small else model
        row["log10_stretch"] = stretch(model, shape, 12 if small else 4, 4 if small else 1)
        row["found_in"] = "float64" if small else "float32"
    return row


def _child(entry: Entry, mode: str, seconds: float, memory: float, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    try:
        row = measured(entry, mode)
    except MemoryError:
        row = {"verdict": "limit", "reason": f"more than {memory:g} GiB"}
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        beyond = "can't allocate memory" in text
        row = {"verdict": "limit" if beyond else "failed", "reason": text[:300]}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    pipe.send(row)
    pipe.close()


def in_process(entry: Entry, mode: str, seconds: float, memory: float) -> dict[str, Any]:
    """The row of one model, from a forked process that ends after so many seconds of CPU time."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(entry, mode, seconds, memory, send))
    child.start()
    send.close()
    try:
        row: dict[str, Any] = receive.recv()
    except EOFError:
        child.join()
        cut = child.exitcode == -signal.SIGXCPU
        row = {"verdict": "limit", "reason": f"more than {seconds:g} CPU-s" if cut else f"exit status {child.exitcode}"}
    child.join()
    return row


def counts(rows: Iterable[dict[str, Any]], mode: str) -> str:
    """Accepted and all models of each family, and what the others lack: models blocked, and blocked by it alone."""
    chosen = [row for row in rows if row["mode"] == mode]
    lines = []
    for family in dict.fromkeys(row["family"] for row in chosen):
        own = [row for row in chosen if row["family"] == family]
        verdicts = Counter(row["verdict"] for row in own)
        others = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items() if verdict != "accepted")
        lines.append(f"{family}: {verdicts['accepted']} of {len(own)} accepted{f' ({others})' if others else ''}")
    blocked: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in chosen:
        names = [name for name in (row.get("missing") or "").split("; ") if name]
        for name in names:
            blocked[name][0] += 1
            blocked[name][1] += len(names) == 1
    if blocked:
        lines.append("missing: models blocked (by it alone)")
        lines += [f"  {name}: {n} ({alone})" for name, (n, alone) in sorted(blocked.items(), key=lambda i: -i[1][0])]
    return "\n".join(lines)


def summary(rows: list[dict[str, str]]) -> str:
    """The results file as Markdown."""
    head = [
        "# Which networks have a Lipschitz bound", "",
        "Made by `python benchmarks/zoo.py` from `zoo.csv`; do not edit. That file says what the columns mean.", "",
        "| family | models | accepted by the rules | with a bound | bound not tried or cut off |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    by_mode = {mode: {(r["family"], r["name"]): r for r in rows if r["mode"] == mode} for mode in ("rules", "bound")}
    listed = entries()
    for family in FAMILIES:
        own = [(e.family, e.name) for e in listed if e.family == family]
        accepted = {m: sum(by_mode[m].get(k, {}).get("verdict") == "accepted" for k in own) for m in by_mode}
        open_ = sum(by_mode["bound"].get(k, {"verdict": "limit"})["verdict"] == "limit" for k in own)
        head.append(f"| {family} | {len(own)} | {accepted['rules']} | {accepted['bound']} | {open_} |")
    head += [
        "", "`log10 bound` holds on inputs in `domain`; `log10 stretch` is that of two inputs that were found.", "",
        "| family | model | input | weights (M) | log10 bound | domain | log10 stretch | s | MiB | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for entry in listed:
        rule, row = (by_mode[m].get((entry.family, entry.name)) for m in ("rules", "bound"))
        row = row or rule
        if row is None:
            continue
        said = [] if row["mode"] == "bound" else ["rules only"]
        if row["verdict"] != "accepted":
            said += [row["verdict"], (row["missing"] or row["reason"])[:120].replace("|", "\\|")]
        note = ": ".join(said)
        million = f"{int(row['weights']) / 1e6:.1f}" if row["weights"] else ""
        cells = (
            entry.family, entry.name, f"{entry.size}", million, row["log10_upper"], row["domain"],
            row["log10_stretch"], _short(row["seconds"]), _short(row["peak_mib"]), note,
        )  # fmt: skip
        head.append(f"| {' | '.join(cells)} |")
    return "\n".join(head) + "\n"


def _short(number: str) -> str:
    return f"{float(number):.3g}" if number and float(number) < 1e3 else number.partition(".")[0]


def commit() -> str:
    """The short hash of the code that ran, or nothing outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", action="store_true", help="look for rules alone, without norms")
    parser.add_argument("--family", choices=FAMILIES, nargs="*", default=FAMILIES)
    parser.add_argument("--name", nargs="*", help="only these models")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to measure again; 'all' for any")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of CPU time for one model")
    parser.add_argument("--memory", type=float, default=8.0, help="limit for one model in GiB")
    parser.add_argument("--total", type=float, default=math.inf, help="begin no model after so many seconds")
    parser.add_argument("--most-weights", type=float, default=math.inf, help="leave out larger models of mode rules")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mode = "rules" if args.rules else "bound"
    wanted = [e for e in entries() if e.family in args.family and (not args.name or e.name in args.name)]
    old = _read(args.out / "zoo.csv")
    weights = {(r["family"], r["name"]): float(r["weights"] or 0) for r in old}
    again = {(e.family, e.name) for e in wanted}
    kept = [
        r for r in old
        if r["mode"] != mode or (r["family"], r["name"]) not in again
        or not (r["verdict"] in args.again or "all" in args.again)
    ]  # fmt: skip
    done = {(r["family"], r["name"]) for r in kept if r["mode"] == mode}
    results = Results(args.out / "zoo.csv", environment("cpu") | {"commit": commit()}, digits=6)
    results.rows.extend(kept)
    results.rewrite()
    begun = time.perf_counter()
    for family in args.family:
        try:
            prepare(family)
        except ImportError as missing:
            print(f"{family}: left out, {missing} (pip install {family})", flush=True)
            continue
        version = __import__(family).__version__ if family != "robustbench" else _version(family)
        own = [e for e in wanted if e.family == family]
        for entry in sorted(own, key=lambda e: weights.get((e.family, e.name), 0.0)):
            key = (entry.family, entry.name)
            if key in done or time.perf_counter() - begun > args.total or weights.get(key, 0.0) > args.most_weights:
                continue
            row = in_process(entry, mode, args.seconds, args.memory)
            row |= {"mode": mode, "family": family, "name": entry.name, "size": entry.size, "version": version}
            results.add({c: row.get(c, "") for c in COLUMNS if c != "commit"})
            shown = f"{family:<13} {entry.name:<40} {row['verdict']:<9} {row.get('seconds', math.nan):7.1f} s"
            print(
                f"{shown} {row.get('log10_upper', '')} {row.get('missing') or row.get('reason', '')}"[:240], flush=True
            )
    written = _read(results.path)
    (args.out / "zoo.md").write_text(summary(written))
    print(counts(written, mode))
    wrong = [r["name"] for r in written if r["log10_stretch"] and float(r["log10_stretch"]) > float(r["log10_upper"])]
    if wrong:
        raise SystemExit(f"stretched by more than their bound: {'; '.join(wrong)}")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()

"""The benchmarks' tables as Markdown, from the committed CSV files."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    """The rows of one committed CSV file."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table, its first column aligned to the left and all others to the right."""
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_machine(rows: list[Row], table: Callable[[list[Row]], str]) -> str:
    """One table for each machine, instruction set and number of threads, under a line that names them."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("device", "isa", "threads", "torch", "fastlip")), []).append(row)
    parts = []
    for (device, isa, threads, torch, fastlip), chosen in groups.items():
        core = "one thread" if threads == "1" else f"{threads} threads"
        parts.append(f"**{device}, {isa}, {core}**, torch {torch}, fastlip {fastlip}\n\n{table(chosen)}")
    return "\n".join(parts)


def number(text: str) -> str:
    """A number of three digits; an empty field is a dash."""
    if not text:
        return "–"
    value = float(text)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _pgd_step(rows: list[Row]) -> str:
    shapes = sorted({r["shape"] for r in rows}, key=lambda s: -int(s.split("x")[0]))
    kinds = list(dict.fromkeys((r["norm"], r["what"]) for r in rows))
    found = {(r["shape"], r["norm"], r["what"]): r for r in rows}
    body = []
    for norm, what in kinds:
        line = [f"{norm}: {what}"]
        for shape in shapes:
            row = found.get((shape, norm, what))
            line += [number(row["ms"]), number(row["x_floor"])] if row else ["–", "–"]
        body.append(line)
    head = ["", *(title for shape in shapes for title in (f"{shape}, ms", "× floor"))]
    return markdown(head, body)


def _layer_norms(rows: list[Row]) -> str:
    body = [
        (
            f"{r['stem']} stem, {r['weights']} weights: {r['method']}, {r['setting']}",
            number(r["ms"]),
            number(r["x_torch_power"]),
            f"{100 * float(r['width']):.2g}%" if r["width"] else "one-sided",
            f"{100 * float(r['gap']):.2g}%" if r["gap"] else "–",
        )
        for r in rows
        if r["stem"] in ("cifar", "imagenet")
    ]
    return markdown(("", "ms", "× torch power", "widest interval", "worst gap"), body)


def _attacks(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}, {r['attack']}, {r['regime']}: {r['what']}",
            number(r["ms"]),
            number(r["x_fastest_peer"]),
            number(r["x_old"]) if r["x_old"] else "",
            f"{100 * float(r['robust_accuracy']):.0f}%",
        )
        for r in rows
    ]
    head = ("", "ms", "speed against the fastest peer", "against fastlip at 655219d", "robust accuracy")
    return markdown(head, body)


def _attack_memory(rows: list[Row]) -> str:
    body = [(f"{r['network']}: {r['what']}", number(r["memory_mb"]), number(r["old_mb"])) for r in rows]
    return markdown(("", "MB", "MB with fastlip at 655219d"), body)


def _ball(row: Row) -> str:
    eps = float(row["eps"])
    ball = f"Linf {eps * 255:.3g}/255" if row["norm"] == "linf" else f"{row['norm'].upper()} {eps:g}"
    return f"{row['network']}, {ball}"


def _beyond(rows: list[Row], key: str, most: float, name: Callable[[Row], str]) -> str:
    """How many rows have at most so much, and which have more."""
    more = [f"{name(r)} ({float(r[key]):.3f})" for r in rows if float(r[key]) > most]
    return f"{len(rows) - len(more)} of {len(rows)}" + (f"; more: {', '.join(more)}" if more else "")


def _strength_suites(rows: list[Row]) -> str:
    body = []
    for r in rows:
        body.append(
            (
                f"{_ball(r)}: {r['what']}",
                r["images"],
                r["clean"],
                r["robust"],
                r["missed"],
                r["fooled_alone"],
                number(r["cpu_s"]),
                number(r["x_cpu"]),
                number(r["x_wall"]),
            )
        )
    head = (
        "", "images", "correct", "robust", "only AutoAttack fools", "only this fools", "CPU s", "× AutoAttack's",
        "wall, × AutoAttack's",
    )  # fmt: skip
    said = []
    for way in dict.fromkeys(r["what"] for r in rows if r["what"] != "AutoAttack"):
        ours = [r for r in rows if r["what"] == way]
        images, missed = (sum(int(r[key]) for r in ours) for key in ("images", "missed"))
        said.append(
            f'"{way}": AutoAttack alone fools {missed} of {images} images; at most 0.5 of its CPU seconds in '
            f"{_beyond(ours, 'x_cpu', 0.5, _ball)}.\n\n"
        )
    return "".join(said) + markdown(head, body)


def _strength_norms(rows: list[Row]) -> str:
    order = {(r["network"], r["norm"], r["calls"]): i for i, r in reversed(list(enumerate(rows)))}
    ranked = sorted(rows, key=lambda r: (order[r["network"], r["norm"], r["calls"]], float(r["median"])))
    body = [
        (
            f"{r['network']}, {r['norm']}, {r['calls']} calls: {r['what']}",
            r["median"],
            r["mean"],
            f"{float(r['x_median']):.3f}",
            f"{r['wins']} of {r['images']}",
            f"{r['found']}",
            number(r["cpu_s"]),
        )
        for r in ranked
    ]
    ours = [r for r in rows if r["what"] == "fastlip fmn"]
    within = _beyond(ours, "x_median", 1.01, lambda r: f"{r['network']}, {r['norm']}, {r['calls']} calls")
    said = f'The median of "fastlip fmn" is at most 1.01 of the best peer\'s in {within}.\n\n'
    return said + markdown(("", "median", "mean", "median × best peer's", "least of all", "found", "CPU s"), body)


def _attackbench(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}, {r['norm']}: {r['what']}",
            f"{r['found']} of {r['images']}",
            r["median"],
            r["optimality"],
            f"{float(r['forward']):.0f} + {float(r['backward']):.0f}",
            number(r["cpu_s"]),
        )
        for r in rows
    ]
    return markdown(("", "found", "median", "optimality", "passes of an image", "CPU s"), body)


def _chain_bounds(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}: {r['method']}",
            r["value"],
            number(r["ratio"]),
            number(r["x_lipsdp"]),
            number(r["cpu_seconds"]),
            number(r["x_plain"]),
        )
        for r in rows
    ]
    head = ("", "constant", "× largest stretch", "× LipSDP, at least", "CPU s", "CPU time, × plain")
    return markdown(head, body)


def _joined_parts(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}, {r['size']} × {r['size']}",
            r["joins"],
            number(r["log10_independent"]),
            number(r["log10_upper"]),
            number(r["times_smaller"]),
        )
        for r in rows
    ]
    return markdown(("", "joins", "log10 bound, parts independent", "log10 bound", "times smaller"), body)


def _constrain(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}, batch {r['batch']}: {r['what']}",
            *(number(r[column]) for column in ("step_ms", "added_ms", "alone_ms", "alone_x_power", "alone_x_torch")),
            number(r["memory_mb"]),
        )
        for r in rows
    ]
    head = ("", "step, ms", "added, ms", "weights alone, ms", "× power iteration", "× torch", "memory added, MB")
    return markdown(head, body)


def _constrain_tracking(rows: list[Row]) -> str:
    body = []
    for rate in dict.fromkeys(r["rate"] for r in rows):
        run = [r for r in rows if r["rate"] == rate]
        below = [1 - float(r["x_upper"]) for r in run if r["x_upper"]]
        certified = max((r["upper"] for r in run if r["step"] == "certified"), key=float)
        within = sum(b <= 0.02 for b in below)
        body.append(
            (
                f"learning rate {rate}, {len({r['seed'] for r in run})} seeds",
                f"{within} of {len(below)}",
                f"{100 * max(below):.1f}%",
                number(certified),
            )
        )
    head = ("", "steps with every layer within 2%", "furthest below", "largest certified norm afterwards")
    return markdown(head, body)


def _local_bounds(rows: list[Row]) -> str:
    body = [
        (
            f"{r['network']}, {r['weights']}, {r['norm']} {r['radius']}: {r['method']}",
            r["images"],
            number(r["upper"]),
            number(r["over_lower"]),
            number(r["x_fastlip"]),
            number(r["cpu_s_100"]),
            number(r["x_cpu"]),
        )
        for r in rows
    ]
    head = ("", "images", "upper side", "× lower side", "× fastlip's", "CPU s for 100", "CPU, × both sides")
    return markdown(head, body)


def _small_networks(rows: list[Row]) -> str:
    ways = ("PyTorch", "separate", "one function", "floor")
    found = {(r["network"], r["images"], r["what"]): number(r["ms"]) for r in rows}
    body = [
        (f"{network}, {images}", *(found[network, images, way] for way in ways))
        for network, images in dict.fromkeys((r["network"], r["images"]) for r in rows)
    ]
    head = ("network, images", "PyTorch, ms", "layer by layer", "one function", "a product of matrices")
    return markdown(head, body)


def _lipschitz(rows: list[Row]) -> str:
    other = {(r["model"], r["size"]): r for r in rows if r["build"] == "other"}
    body = []
    for r in rows:
        if r["build"] != "this":
            continue
        before = other.get((r["model"], r["size"]), {})
        body.append(
            (
                f"{r['model']}, {r['size']}×{r['size']}, {r['domain']}",
                f"{float(r['log10_upper']):.2f}" if r["log10_upper"] else r["note"],
                number(r["cpu_seconds"]),
                number(r["MiB"]),
                number(r["model_MiB"]),
                number(before.get("cpu_seconds", "")),
                number(before.get("MiB", "")),
            )
        )
    head = ("", "log10 bound", "CPU s", "MiB beside the model", "MiB with the model", "CPU s before", "MiB before")
    return markdown(head, body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "pgd_step_cpu": _pgd_step,
    "layer_norms_cpu": _layer_norms,
    "attacks_cpu": _attacks,
    "attack_memory_cpu": _attack_memory,
    "small_networks_cpu": _small_networks,
    "strength_suites": _strength_suites,
    "strength_norms": _strength_norms,
    "attackbench_cpu": _attackbench,
    "chain_bounds_cpu": _chain_bounds,
    "joined_parts_cpu": _joined_parts,
    "constrain_cpu": _constrain,
    "constrain_tracking": _constrain_tracking,
    "local_bounds_cpu": _local_bounds,
    "lipschitz_cpu": _lipschitz,
}


def write(folder: Path) -> None:
    """Write each table to a file of its name in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in TABLES.items():
        (folder / f"{name}.md").write_text(by_machine(rows_of(name), table))
    for name in ("projections", "published_layers", "zoo"):
        (folder / f"{name}.md").write_text((RESULTS / f"{name}.md").read_text())

"""The results of gpu_check.sh beside their aims, from its CSVs.

    python benchmarks/gpu_summary.py benchmarks/results/gpu

Benchmarks that were stopped leave the rows measured so far; missing numbers are dashes.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]
Rows = list[Row]


def read(folder: Path, name: str) -> Rows:
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        # A row that a machine's end cut off has fewer cells.
        return [row for row in csv.DictReader(f) if None not in row.values()]


def labels(folder: Path, name: str, device: str) -> list[str]:
    """Of other builds that the same benchmark was run with."""
    prefix = f"{name}_{device}-"
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.csv"))


def one(rows: Rows, **wanted: str) -> Row | None:
    """The row whose columns equal, or begin with, the given values."""
    return next((r for r in rows if all(r.get(k, "").startswith(v) for k, v in wanted.items())), None)


def ratio(over: Row | None, under: Row | None, column: str = "ms") -> float | None:
    if over is None or under is None or not over.get(column) or not under.get(column):
        return None
    return float(over[column]) / float(under[column])


def share(row: Row | None, passes: int = 4) -> float | None:
    """Per cent of the measured copy bandwidth, for reads and writes of so many arrays; the floor's are four."""
    over = number(row, "x_floor")
    return None if over is None else 25.0 * passes / over


def number(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row is not None and row.get(column) else None


def results(folder: Path, device: str) -> list[tuple[str, str, float | None]]:
    """What, aim, measured."""
    files = (f"{name}_{device}" for name in ("pgd_step", "apgd_step", "gpu_norms", "gpu_attack", "study"))
    pgd, apgd, norms, attack, study = (read(folder, name) for name in files)
    small, large, batch = "8192x3x32x32", "512x3x224x224", "1024x3x32x32"

    def pgd_row(shape: str, norm: str, what: str) -> Row | None:
        return one(pgd, shape=shape, norm=norm, what=what)

    step = pgd_row(batch, "linf", "fastlip pgd_step_")
    calls = ratio(pgd_row(batch, "linf", "torchattacks compiled"), step, "ms_call")
    sort = ratio(pgd_row(batch, "l1", "sort projection eager"), pgd_row(batch, "l1", "fastlip project_"))
    eager = [
        ratio(one(apgd, shape=batch, norm=n, what="eager"), one(apgd, shape=batch, norm=n, what="fastlip"))
        for n in ("linf", "l2", "l1")
    ]
    mine = one(norms, what="fastlip", setting="one network")
    many = [
        next((r for r in norms if r["what"] == what and r["setting"].endswith("checkpoints")), None)
        for what in ("fastlip", "fastlip, 3xTF32")
    ]
    alone = one(norms, what="fastlip", setting="iteration alone")
    matrix = [one(norms, what="fastlip, 3xTF32", setting=s) for s in ("one network", "iteration alone")]
    peers = [r for r in norms if r["what"].startswith("Lanczos on torch") and r["setting"].startswith("iteration")]
    # On a GPU the peer is fastest in one graph, so the comparison needs that row.
    whole = device == "cpu" or any(r["setting"].endswith("one CUDA graph") for r in peers)
    strong = min(peers, key=lambda r: float(r["ms"])) if peers and whole else None
    power = one(norms, setting="100 steps, TF32 off")
    tf32 = one(norms, setting="100 steps, default TF32")
    fast = [v for r in attack if r["what"].startswith("fastlip, fast") if (v := number(r, "x_peer")) is not None]
    peer = attack[0]["peer"] if attack else "torchattacks"
    robust = [float(r["robust_accuracy"]) for r in attack]
    training = [
        one(study, what="training", kind="scratch", how="study", compiled=compiled) for compiled in ("False", "True")
    ]
    hours = [(r["kind"], r["missing"], number(r, "hours")) for r in study if r["what"] == "prediction"]
    constrain = read(folder, f"constrain_{device}")
    free = number(one(constrain, what="nothing"), "step_ms")
    added = number(one(constrain, what="constrain_norms"), "added_ms")
    share_added = 100.0 * added / free if free and added is not None else None
    builds = []
    for name, rows in (("pgd_step", pgd), ("apgd_step", apgd)):
        for label in labels(folder, name, device):
            for old in read(folder, f"{name}_{device}-{label}"):
                if old["what"] == f"fastlip {name}_":
                    new = one(rows, shape=old["shape"], norm=old["norm"], what=old["what"])
                    builds.append((f"{name}_ {old['norm']} {old['shape']}, x faster than {label}", "", ratio(old, new)))
    return [
        (f"pgd_step_ linf {small}, % of copy", ">= 90", share(pgd_row(small, "linf", "fastlip pgd_step_"))),
        (f"pgd_step_ linf {large}, % of copy", ">= 90", share(pgd_row(large, "linf", "fastlip pgd_step_"))),
        (f"pgd_step_ l2 {small}, % of copy", ">= 80", share(pgd_row(small, "l2", "fastlip pgd_step_"))),
        (f"pgd_step_ l2 {large}, % of copy", ">= 60", share(pgd_row(large, "l2", "fastlip pgd_step_"))),
        (f"pgd_step_ l1 {small}, % of copy", ">= 50", share(pgd_row(small, "l1", "fastlip pgd_step_"))),
        (f"pgd_step_ l1 {large}, % of copy", ">= 50", share(pgd_row(large, "l1", "fastlip pgd_step_"))),
        (f"project_ l1 {small}, % of copy", ">= 50", share(pgd_row(small, "l1", "fastlip project_"), 3)),
        (f"pgd_step_ linf {small}, float16 input, % of copy", "", share(pgd_row(small, "linf", "fastlip, float16"))),
        (f"pgd_step_ linf {batch}, x torch.compile, a call", ">= 3", calls),
        (f"project_ l1 {batch}, x sort", ">= 100", sort),
        *((f"apgd_step_ {n} {batch}, x eager", ">= 5", v) for n, v in zip(("linf", "l2", "l1"), eager, strict=True)),
        ("norms of one network, ms", "<= 10", number(mine, "ms")),
        ("norms of one network, x floor", "<= 4", number(mine, "x_floor")),
        ("norms of each checkpoint, x floor", "<= 1.7", number(many[0], "x_floor")),
        ("norms of one network by 3xTF32, x faster", "", ratio(mine, matrix[0])),
        ("iteration by 3xTF32, x faster", "", ratio(alone, matrix[1])),
        ("norms of each checkpoint by 3xTF32, x faster", "", ratio(*many)),
        ("norms, x faster than power iteration, TF32 off", ">= 30", ratio(power, mine)),
        ("norms, x faster than power iteration, default TF32", "", ratio(tf32, mine)),
        ("iteration, x faster than Lanczos on cuDNN", ">= 1.5", ratio(strong, alone)),
        (f"PGD-20 end to end, x {peer}", ">= 2", max(fast, default=None)),
        ("PGD-20, spread of robust accuracies", "0", max(robust) - min(robust) if len(robust) > 1 else None),
        ("study, images/s of training", "", number(training[0], "images_per_s")),
        ("study, images/s of training, compiled", "", number(training[1], "images_per_s")),
        ("study, training, x a plain loop", "", number(training[0], "x_plain")),
        ("study, training, x a plain loop, compiled", "", number(training[1], "x_plain")),
        ("study, share of a step that the device waits", "", number(training[0], "waits")),
        ("study, share that it waits, compiled", "", number(training[1], "waits")),
        ("constrain_norms, % that it adds to a ResNet-18 step", "<= 5", share_added),
        *(
            (f"study, predicted hours: {kind}{', kinds are missing' if missing else ''}", "", value)
            for kind, missing, value in hours
        ),
        *builds,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        print("a dry run: numbers of small problems on a CPU, which say that the parts fit together and nothing else")
    print(f"{'what':<56} {'aim':>7} {'measured':>9}")
    for what, aim, value in results(args.folder, args.device):
        print(f"{what:<56} {aim:>7} {'-' if value is None else f'{value:.3g}':>9}")


if __name__ == "__main__":
    main()

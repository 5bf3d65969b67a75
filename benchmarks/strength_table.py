"""Print the tables of ``bench_strength.py``'s committed results in Markdown."""

import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    """The rows of a file of results; none where there is no such file."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def threat(row: Row) -> str:
    """Norm and radius in words."""
    eps = float(row["eps"])
    return f"Linf {eps * 255:.3g}/255" if row["norm"] == "linf" else f"{row['norm'].upper()} {eps:g}"


def suites(rows: list[Row]) -> Iterator[str]:
    yield "| network, ball | images | correct | suite | robust | fools alone | wall s | CPU s | x wall | x CPU |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        yield (
            f"| {r['network']}, {threat(r)} | {r['images']} | {r['clean']} | {r['what']} | {r['robust']} | "
            f"{r['fooled_alone']} | {float(r['wall_s']):.0f} | {float(r['cpu_s']):.0f} | {float(r['x_wall']):.2f} | "
            f"{float(r['x_cpu']):.2f} |"
        )


def norms(rows: list[Row]) -> Iterator[str]:
    yield "| network, norm, calls | method | median | mean | found | lost alone | median / best peer's | CPU s |"
    yield "|---|---|---|---|---|---|---|---|"
    for _, group in groupby(rows, key=lambda r: (r["network"], r["norm"], r["calls"])):
        for r in sorted(group, key=lambda r: float(r["median"])):
            yield (
                f"| {r['network']}, {r['norm']}, {r['calls']} | {r['what']} | {float(r['median']):.4g} | "
                f"{float(r['mean']):.4g} | {r['found']} of {r['images']} | {r['lost']} | {float(r['x_median']):.3f} | "
                f"{float(r['cpu_s']):.1f} |"
            )


def main() -> None:
    for name, table in (("strength_suites.csv", suites), ("strength_norms.csv", norms)):
        if rows := rows_of(name):
            machine = rows[0]
            print(f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}\n")
            print("\n".join(table(rows)), end="\n\n")


if __name__ == "__main__":
    main()

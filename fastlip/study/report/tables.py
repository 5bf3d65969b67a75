"""Tables of a run: Markdown, LaTeX and CSV from the same rows."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from fastlip.study.storage.files import write_text


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        name: stem of its files.
        title: says what the table shows.
        header: names of the columns.
        rows: the cells of each row.
        notes: what a reader must know to understand the table.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: str

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n\n{self.notes}\n"

    def latex(self) -> str:
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.header, *self.rows)]
        return "\n".join(
            [
                f"% {self.title}",
                r"\begin{tabular}{" + "l" * len(self.header) + "}",
                r"\hline",
                lines[0],
                r"\hline",
                *lines[1:],
                r"\hline",
                r"\end{tabular}",
                *(f"% {line}" for line in self.notes.splitlines()),
                "",
            ]
        )

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return out.getvalue()


def write(folder: Path, tables: list[Table]) -> None:
    for table in tables:
        write_text(folder / f"{table.name}.md", table.markdown())
        write_text(folder / f"{table.name}.tex", table.latex())
        write_text(folder / f"{table.name}.csv", table.csv())


def _latex(cell: str) -> str:
    for old, new in (
        ("\\", r"\textbackslash{}"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("&", r"\&"),
        ("−", "$-$"),
        ("–", "--"),
        ("σ", r"$\sigma$"),
        ("ε", r"$\varepsilon$"),
        ("∞", r"$_\infty$"),
    ):
        cell = cell.replace(old, new)
    return cell

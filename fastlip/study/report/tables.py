"""Tables of a run: Markdown, LaTeX and CSV from the same rows."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from fastlip.study.report import latex
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
        keys: number of leading columns that name a row.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: str
    keys: int = 1

    def markdown(self) -> str:
        """The table with its title and notes; columns are aligned for those who read it as it is."""
        lines = [[_literal(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(3, *(len(line[c]) for line in lines)) for c in range(len(self.header))]
        lines.insert(1, ["-" * width for width in widths])
        body = "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )
        return f"**{_literal(self.title)}**\n\n{body}\n\n{_literal(self.notes)}\n"

    def latex(self) -> str:
        r"""The table with its notes for ``\input``; it needs no package."""
        return f"{latex.comment(self.title)}\n{latex.tabular(self.header, self.rows, self.keys, self.notes)}"

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


#: What Markdown would take for markup: a lone underscore between letters and a bracket alone are text to it.
_MARKUP = re.compile(
    r"[\\`*|$]|~(?=~)|(?<=~)~|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\[(?=[^\[\]]*\][\[(:])"
)


def _literal(text: str) -> str:
    """``text`` as Markdown that shows it as it is, in one line."""
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(text.split()))

"""LaTeX of tables: it compiles without packages, fits the line, and shows every character."""

import re
import shutil
import subprocess

import pytest

from fastlip.study.report import latex
from fastlip.study.report.html_report import all_tables
from fastlip.study.report.tables import Table

#: A character of every kind, and what LaTeX is to make of it.
CHARACTERS = {
    "\\": r"\textbackslash{}",
    "{}": r"\{\}",
    "$": r"\$",
    "50%": r"50\%",
    "a & b": r"a \& b",
    "#1": r"\#1",
    "a_b": r"a\_b",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "a<b>c": "a$<$b$>$c",
    "a|b": "a$|$b",
    "--": "-{}-",
    "---x": "-{}-{}-x",
    "−1 – 2": r"$-$1 \textendash{} 2",
    "L∞ ε = 1": r"L$_\infty$ $\varepsilon$ = 1",
    "√(Σ(x′−x)²/n) × 255": r"$\surd$($\Sigma$(x$'$$-$x)$^2$/n) $\times$ 255",
    "é Ž ç í ß": r"\'{e} \v{Z} \c{c} \'{\i} \ss{}",
    "模": "U+6A21",
    "🤖": "U+1F916",
    "ệ": "U+1EC7",
    "a\nb\tc": "a b c",
}


@pytest.mark.parametrize("text", CHARACTERS)
def test_characters(text):
    assert latex.escaped(text) == CHARACTERS[text]


def cells(tables):
    return [cell for t in tables for line in (t.header, *t.rows, (t.notes,)) for cell in line]


def test_nothing_is_left_that_pdflatex_lacks(world):
    for table in all_tables(world[1]):
        if table.rows:
            text = table.latex()
            assert all(c.isascii() for line in text.splitlines() if not line.startswith("%") for c in line), table.name
            assert text.startswith("% ")
    for cell in cells(all_tables(world[1])):
        # What remains after the commands that the escape writes itself: no character that is a command.
        bare = re.sub(
            r"\\hspace\{0pt\}|\\[a-zA-Z]+\{(\\[ij])?\}|\\[\"'`^~=.uvcHr]\{\\?[A-Za-z]?\}|\$[^$]*\$|\\[{}$%&#_]|-\{\}",
            "",
            latex.escaped(cell),
        )
        assert not set(bare) & set("\\{}$%&#_~^"), bare


def test_every_width_is_within_the_line(world):
    for table in all_tables(world[1]):
        if not table.rows:
            continue
        parts = re.findall(r"\\begin\{tabular\}\{@\{\}(.*)@\{\}\}", table.latex())
        assert parts
        for part in parts:
            widths = [float(w) for w in re.findall(r"p\{([0-9.]+)\\linewidth\}", part)]
            # Between two columns there are 6 points; a line of the class "article" has 345.
            assert sum(widths) + 6 / 345 * (len(widths) - 1) <= 1.0001
            assert min(widths) > 0.02


def test_a_wide_table_is_split_and_each_part_names_its_rows():
    header = ("Model", "Attack", *(f"Measure {i}" for i in range(20)))
    rows = tuple((f"model {r}", "PGD", *(f"{r}.{c:03d}value" for c in range(20))) for r in range(70))
    text = Table("t", "title", header, rows, "a note", keys=2).latex()
    parts = text.split(r"\begin{tabular}")[1:]
    assert len(parts) > 3
    for part in parts:
        lines = [line for line in part.splitlines() if "tabularnewline" in line]
        assert len(lines) <= 31
        assert lines[0].startswith(r"\raggedright Model & \raggedright Attack & ")
        assert all(re.match(r"\\raggedright model \d+ & \\raggedright PGD & ", line) for line in lines[1:])
    for r in range(70):
        for c in range(20):
            assert text.count(f"{r}.{c:03d}value ") == 1 if r >= 10 else f"{r}.{c:03d}value" in text
    assert text.rstrip().endswith("\\endgroup")
    assert "a note" in text.splitlines()[-2], "notes stand below, in the text"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here: the rules of escaping are tested alone")
def test_pdflatex_compiles_every_table_within_the_line(world, tmp_path):
    tables = [t for t in all_tables(world[1]) if t.rows]
    body = "\n".join(table.latex() for table in tables)
    document = "\\documentclass{article}\n\\begin{document}\n" + body + "\n\\end{document}\n"
    (tmp_path / "tables.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "tables.tex"],
        cwd=tmp_path,
        capture_output=True,
    )
    log = (tmp_path / "tables.log").read_text(errors="replace")
    assert done.returncode == 0, log[-3000:]
    # Within two points nobody sees it.
    assert [
        line for line in log.splitlines() if (w := re.match(r"Overfull \\hbox \(([0-9.]+)pt", line)) and float(w[1]) > 2
    ] == []
    assert "Missing character" not in log

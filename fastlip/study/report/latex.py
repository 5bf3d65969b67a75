r"""LaTeX for tables: cells in which nothing is a command, and columns that fit the line.

The code needs no package, so that it compiles in any document, and no more than pdflatex's own encoding.
"""

import re
import unicodedata
from collections.abc import Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "`": r"\`{}",
    "^": r"\textasciicircum{}",
    # In the fonts that LaTeX begins with these three are other characters.
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "−": "$-$",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "→": r"$\to$",
    "√": r"$\surd$",
    "∞": r"$_\infty$",
    "‖": r"$\|$",
    "′": r"$'$",
    "²": "$^2$",
    "†": r"$\dagger$",
    "Σ": r"$\Sigma$",
    "α": r"$\alpha$",
    "ε": r"$\varepsilon$",
    "σ": r"$\sigma$",
    "φ": r"$\varphi$",
    "₀": "$_0$",
    "\u00a0": "~",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
}

_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}

#: Digits of \footnotesize that fit a line of the class "article".
_LINE = 80

#: Digits that the space between two columns takes.
_GAP = 2

#: Longest part of a word that is not broken.
_UNBROKEN = 14

_ROWS = 30


def escaped(text: str) -> str:
    """``text`` for LaTeX, in one line; long words may break.

    Letters that LaTeX's own fonts lack are given by their code points, as in "U+4E2D".
    """
    return " ".join(_breakable(word) for word in re.split(r"[ \t\r\n\f\v]+", text.strip()))


def tabular(header: Sequence[str], rows: Sequence[Sequence[str]], keys: int, notes: str) -> str:
    """The table as LaTeX in one or more parts, each no wider than a line and no longer than a page.

    Args:
        header: names of the columns.
        rows: cells.
        keys: number of leading columns, which name a row; every part repeats them.
        notes: text under the table.
    """
    lines = [r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}\setlength{\parindent}{0pt}"]
    for columns in _parts(header, rows, keys):
        share = _shares([header[c] for c in columns], [[row[c] for c in columns] for row in rows])
        form = "".join(f"p{{{width:.3f}\\linewidth}}" for width in share)
        for start in range(0, len(rows), _ROWS):
            lines += [rf"\begin{{tabular}}{{@{{}}{form}@{{}}}}", r"\hline", _row(header, columns), r"\hline"]
            lines += [_row(row, columns) for row in rows[start : start + _ROWS]]
            lines += [r"\hline", r"\end{tabular}\par\medskip"]
    return "\n".join([*lines, r"\raggedright " + escaped(notes) + r"\par", r"\endgroup", ""])


def comment(text: str) -> str:
    """``text`` as one line of comment."""
    return "% " + " ".join(text.split())


def _row(cells: Sequence[str], columns: Sequence[int]) -> str:
    return " & ".join(rf"\raggedright {escaped(cells[c])}" for c in columns) + r" \tabularnewline"


def _breakable(word: str) -> str:
    # Two hyphens in a row would become a dash.
    pieces = (re.sub("-(?=-)", "-{}", "".join(map(_character, piece))) for piece in _pieces(word))
    return r"\hspace{0pt}".join(pieces)


def _pieces(word: str) -> list[str]:
    return [word[i : i + _UNBROKEN] for i in range(0, len(word), _UNBROKEN)]


def _character(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    if " " <= c <= "~":
        return c
    base, *marks = list(unicodedata.normalize("NFD", c))
    if len(marks) == 1 and marks[0] in _ACCENTS and base.isascii() and base.isalpha():
        letter = rf"\{base}" if base in "ij" else base  # an accent replaces the dot
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"U+{ord(c):04X}"


def _parts(header: Sequence[str], rows: Sequence[Sequence[str]], keys: int) -> list[list[int]]:
    """The columns of each part; all in one where they fit."""
    least = [_least([header[c], *(row[c] for row in rows)]) + _GAP for c in range(len(header))]
    first = list(range(keys))
    parts: list[list[int]] = []
    for c in range(keys, len(header)):
        if parts and sum(least[k] for k in (*parts[-1], c)) <= _LINE:
            parts[-1].append(c)
        else:
            parts.append([*first, c])
    return parts or [first]


def _shares(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[float]:
    """The width of each column, as a share of the line: what its longest word needs, and of the rest what it wants."""
    columns = [[h, *(row[c] for row in rows)] for c, h in enumerate(header)]
    least = [_least(cells) for cells in columns]
    wanted = [max(max(map(len, cells)) - short, 0) for cells, short in zip(columns, least, strict=True)]
    free = _LINE - _GAP * len(columns) - sum(least)
    given = min(1.0, free / max(sum(wanted), 1))
    widths = [short + max(given, 0) * more for short, more in zip(least, wanted, strict=True)]
    # Keys and one column may be wider than the line: narrower columns break their words.
    total = max(_LINE, sum(widths) + _GAP * len(columns))
    return [width / total for width in widths]


def _least(cells: Sequence[str]) -> float:
    words = (piece for cell in cells for word in cell.split() for piece in _pieces(word))
    return max((sum(map(_width, word)) for word in words), default=0.0) + 1


def _width(c: str) -> float:
    """The width of a character of a cell, as a multiple of a digit's."""
    if _character(c).startswith("U+"):
        return 9.0
    if c in "WM":
        return 2.0
    return 1.6 if c.isupper() or c in "mw@%&+=<>" or (not c.isascii() and unicodedata.category(c) == "Sm") else 1.0

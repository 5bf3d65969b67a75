"""The documentation's build: `sphinx-build -W docs docs/_build`."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import results_tables

import fastlip

project = "fastlip"
author = "The fastlip developers"
copyright = author
version = release = fastlip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastlip {version}"
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Without a network the links into other projects stay plain text.
intersphinx_mapping: dict[str, tuple[str, None]] = {}

results_tables.write(Path(__file__).parent / "_build" / "tables")


def _plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: the star of [B, *shape] is no emphasis, and the bars of |x| no substitution."""
    for at, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [re.sub(r"(?<!\*)(\*(?!\*)|\|)", r"\\\1", part) for part in parts[::2]]
        lines[at] = "".join(parts)


def _parsed(app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str) -> Any:
    """A default that a dataclass makes has no notation, and Sphinx shows a signature that it cannot parse raw."""
    return (signature.replace("<factory>", "..."), returned) if signature and "<factory>" in signature else None


def setup(app: Any) -> None:
    """Before napoleon, which makes markup of its own."""
    app.connect("autodoc-process-docstring", _plain, priority=400)
    app.connect("autodoc-process-signature", _parsed)

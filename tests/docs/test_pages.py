"""The Python of the documentation's pages and of the README, as it stands there."""

import re
from pathlib import Path

import pytest

import fastlip

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "docs").glob("**/*.md") if "_build" not in p.parts and "notebooks" not in p.parts)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in [ROOT / "README.md", *PAGES] if BLOCK.search(p.read_text())], ids=lambda p: p.stem
)
def test_the_python_of_a_page_runs_in_order(page):
    scope = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), scope)


def test_pages_link_to_what_the_reference_documents():
    for page in PAGES:
        for target in re.findall(r"\{py:\w+\}`(?:[^`<]*<)?~?(fastlip\.[\w.]+)>?`", page.read_text()):
            module, name = target.removeprefix("fastlip.").split(".")[:2]
            assert name in getattr(fastlip, module).__all__, f"{page.name}: {target}"

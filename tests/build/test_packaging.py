"""What packages are made of: one version, wheels without torch's libraries, and tests without heavy peers."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import fastlip

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(extra: str) -> set[str]:
    """The packages of an extra, those of the extras in it included."""
    found: set[str] = set()
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        name, nested = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        found |= set().union(*map(names, nested.split(","))) if name == "fastlip" else {name}
    return found


def test_one_version():
    version = PROJECT["project"]["version"]
    assert fastlip.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_heavy_peers_are_apart():
    heavy = {"attackbenchlib", "adversarial-robustness-toolbox", "foolbox", "torchattacks", "pyautoattack", "datasets"}
    assert not heavy & names("test")
    assert not {"attackbenchlib"} & names("integrations"), "it brings wandb"
    assert heavy <= names("peers") <= names("dev")


def test_source_packages_have_what_readme_docs_and_tests_read():
    excluded = PROJECT["tool"]["scikit-build"]["sdist"]["exclude"]
    linked = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "README.md").read_text())
    assert "benchmarks/results/layer_norms_cpu.png" in linked
    for path in (*linked, "benchmarks/results/study/quick/results.json", ".ci/matrix", "fastlip/_templates/norms.html"):
        assert (ROOT / path).exists()
        assert not any(f"{path}/".startswith(f"{folder}/") for folder in excluded), path


def test_the_tour_explains_every_extra():
    page = (ROOT / "docs" / "tour.md").read_text()
    table = page[page.index("| Extra | For |") :].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize(
    "library", ["libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.13"]
)
def test_wheels_leave_out_the_libraries_of_torch(library):
    command = PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    assert any(fnmatch.fnmatch(library, pattern) for pattern in re.findall(r'--exclude "([^"]+)"', command))


def test_wheels_are_for_all_pythons_that_are_tested():
    wheels = re.search(r"cp3\{([\d,]+)\}", PROJECT["tool"]["cibuildwheel"]["build"])[1].split(",")
    matrix = re.search(r"set -- (.*)$", (ROOT / ".ci" / "matrix").read_text(), re.MULTILINE)[1].split()
    assert {f"3.{minor}" for minor in wheels} == {pair for pair in matrix if ":" not in pair}
    oldest = re.search(r">=([\d.]+)", PROJECT["project"]["dependencies"][0])[1]
    assert f"{PROJECT['project']['requires-python'].removeprefix('>=')}:{oldest}" in matrix


def test_scripts_of_ci_are_sound_shell():
    for script in (ROOT / ".ci").iterdir():
        subprocess.run(["bash", "-n", str(script)], check=True)

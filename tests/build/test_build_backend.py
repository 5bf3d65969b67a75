"""What an isolated build keeps of the one before it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BACKEND = Path(__file__).parents[2] / "_build" / "backend.py"


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The backend as it runs where scikit-build-core is in ``tmp_path / "new"``, in a source tree of its own."""
    package, build = ModuleType("scikit_build_core"), ModuleType("scikit_build_core.build")
    package.__file__, package.build = str(tmp_path / "new" / "__init__.py"), build
    monkeypatch.setitem(sys.modules, "scikit_build_core", package)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", build)
    spec = importlib.util.spec_from_file_location("backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path / "source")
    return module


def earlier_build(source: Path, skbuild: Path) -> Path:
    """A build directory as scikit-build-core and CMake leave it."""
    folder = Path("build/cp311")
    for name in ("CMakeFiles/kernels.dir/a.o", "CMakeFiles/4.1.0/CMakeCXXCompiler.cmake", "CMakeFiles/rules.ninja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "CMakeCache.txt").touch()
    (folder / ".skbuild-info.json").write_text(json.dumps({"source_dir": str(source), "skbuild_path": str(skbuild)}))
    return folder


def test_another_environment_keeps_the_objects_and_nothing_that_was_found_there(backend, tmp_path):
    folder = earlier_build(Path.cwd(), tmp_path / "old")
    backend._keep_objects(Path("build"))
    assert (folder / "CMakeFiles/kernels.dir/a.o").exists()
    assert not (folder / "CMakeCache.txt").exists()
    assert not (folder / "CMakeFiles/4.1.0").exists()
    # Without this scikit-build-core would clear all of it.
    assert json.loads((folder / ".skbuild-info.json").read_text())["skbuild_path"] == str(tmp_path / "new")


@pytest.mark.parametrize("what", ["another tree", "the same environment", "a damaged file"])
def test_what_is_not_another_environments_build_of_this_tree_is_left_alone(backend, tmp_path, what):
    source = tmp_path / "elsewhere" if what == "another tree" else Path.cwd()
    folder = earlier_build(source, tmp_path / ("new" if what == "the same environment" else "old"))
    if what == "a damaged file":
        (folder / ".skbuild-info.json").write_text("{")
    before = (folder / ".skbuild-info.json").read_text()
    backend._keep_objects(Path("build"))
    assert (folder / "CMakeCache.txt").exists()
    assert (folder / ".skbuild-info.json").read_text() == before


def test_a_first_build_has_nothing_to_keep(backend):
    backend._keep_objects(Path("build"))
    assert not list(Path.cwd().iterdir())

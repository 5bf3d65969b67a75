"""A configuration of the whole study that takes seconds."""

import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastlip.study.pipeline import runner
from fastlip.study.settings import overrides, presets
from fastlip.study.settings.input_paths import InputPaths
from fastlip.study.settings.settings import Settings
from fastlip.study.storage.files import read_arrays
from fastlip.study.storage.run_directory import RunDirectory

MICRO = [
    "model=torchvision:resnet18",
    "arms=softmax,scratch,finetune",
    "evaluation.images=18",
    "evaluation.clean_images=24",
    "evaluation.batch_size=10",
    "pgd.linf_255=1,8",
    "pgd.l2=0.5",
    "pgd.l1=",
    "strong.linf_255=8",
    "strong.steps=2",
    "strong.targets=1",
    "strong.queries=3",
    "strong.l2=",
    "pgd.steps=2",
    "gaussian.sigmas=0.1",
    "smallest.steps=2",
    "smallest.searches=3",
    "smallest.directions=1",
    "smallest.levels=4",
    "smallest.halvings=1",
    "save_seconds=0",
    "examples=2",
    "evaluation.snapshot_images=12",
    "lipschitz.jacobian_images=3",
    "lipschitz.jacobian_steps=2",
    "features.images=12",
    "corruptions.images=12",
    "corruptions.severities=5",
    "transfer.images=12",
    "transfer.l2=1",
    "smoothing.images=3",
    "smoothing.selection=2",
    "smoothing.samples=12",
    "rules.resamples=50",
    "device=cpu",
    "threads=1",  # results depend on them, and processes of their own would take more than the tests do
    "scratch.snapshots=",
    "finetune.snapshots=",
] + [
    f"{arm}.{setting}"
    for arm in ("pretrain", "scratch", "finetune", "reference")
    for setting in ("images=48", f"epochs={2 if arm == 'scratch' else 1}", "batch_size=24")
]
MICRO.append("scratch.snapshots=1")


@pytest.fixture(scope="session")
def micro_arguments() -> list[str]:
    """The settings of :func:`micro` on the command line."""
    return ["--preset", "demo", *(f"--set={setting}" for setting in MICRO)]


@pytest.fixture(scope="session")
def micro() -> Settings:
    return overrides.override(presets.preset("demo"), MICRO)


@pytest.fixture(scope="session")
def finished(micro: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished micro run; tests leave it as it is."""
    return runner.run(micro, InputPaths(), tmp_path_factory.mktemp("study") / "run", Console(quiet=True))


@pytest.fixture(scope="session")
def ends_like_it(finished: RunDirectory) -> Callable[[Path], None]:
    """Asserts that another run directory holds the same results and images as the finished run, and no debris."""

    def compare(out: Path) -> None:
        assert (out / "results.json").read_bytes() == finished.results.read_bytes()
        paths = list(finished.path.glob("images/*/*.npz"))
        assert paths
        for path in paths:
            again = read_arrays(out / path.relative_to(finished.path))
            for name, values in read_arrays(path).items():
                np.testing.assert_array_equal(values, again[name], err_msg=f"{path.name}, {name}")
        assert not list(out.rglob("*.part*"))

    return compare


@pytest.fixture(scope="session")
def conforms():
    """Asserts that plain JSON has the shape of a type."""
    return _conforms


def _conforms(value, hint, where="results"):
    """Assert that plain JSON ``value`` has the shape of the type ``hint``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if typing.is_typeddict(hint):
        assert set(value) == set(typing.get_type_hints(hint)), where
        for name, inner in typing.get_type_hints(hint).items():
            _conforms(value[name], inner, f"{where}.{name}")
    elif origin is list:
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            _conforms(item, arguments[0], f"{where}[{i}]")
    elif origin is typing.Literal:
        assert value in arguments, where
    elif arguments:
        if value is not None:
            _conforms(value, next(a for a in arguments if a is not type(None)), where)
        else:
            assert type(None) in arguments, where
    elif hint is float:
        assert isinstance(value, int | float), where
        assert not isinstance(value, bool), where
    else:
        assert type(value) is hint, where

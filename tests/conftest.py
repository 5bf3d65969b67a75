"""What every test sees: one thread, random numbers of its own, the devices at hand, and a small trained network.

And how to run a few of each test, or all of them on other random numbers.
"""

import os
import random
import zlib
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastlip import _generators

Problem = tuple[nn.Module, Tensor, Tensor]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cover",
        type=int,
        metavar="N",
        help="of every parametrised test, run only so many cases that all combinations of values of any N of its "
        "parameters are there",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="draw the tests' random numbers anew; a test holds for any of them",
    )


def pytest_configure() -> None:
    """Keep pytest's own variable from the pytest that a test may run."""
    os.environ.pop("PYTEST_ADDOPTS", None)


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    together = config.getoption("cover")
    if together is None:
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {case.nodeid for cases in groups.values() for case in covering(cases, together)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def covering(cases: list[pytest.Item], together: int) -> list[pytest.Item]:
    """Few of one test's cases in which each combination of values of `together` parameters stands, chosen greedily."""

    def combinations_of(case: pytest.Item) -> set[tuple[tuple[str, str], ...]]:
        spec = getattr(case, "callspec", None)
        values = sorted((name, repr(value)) for name, value in spec.params.items()) if spec else []
        return set(combinations(values, min(together, len(values))))

    left = set().union(*map(combinations_of, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(combinations_of(case) & left))
        left -= combinations_of(best)
        chosen.append(best)
    return chosen


def _seed(config: pytest.Config, name: str) -> None:
    """Seed what draws from a name, so that a test's numbers do not depend on the tests before it, nor on chance."""
    seed = zlib.crc32(f"{config.getoption('seed')} {name}".encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # peers draw from it
    random.seed(seed)
    entropy = random.Random(f"entropy {seed}")
    _generators._entropy = lambda: entropy.getrandbits(53)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> Iterator[None]:
    _seed(request.config, f"{fixturedef.baseid}::{fixturedef.argname} {request.param_index}")
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _seed(item.config, item.nodeid)
    return (yield)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    import fastlip

    return str(fastlip.build_info())


@pytest.fixture(scope="session")
def trained_cnn() -> Problem:
    """A small convolutional network that has learnt ten noisy templates, and images that it classifies correctly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 25, 10),
        )
        templates = torch.rand(10, 3, 12, 12)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            labels = torch.randint(10, (64,))
            inputs = (0.6 * templates[labels] + 0.4 * torch.rand(64, 3, 12, 12)).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.eval().zero_grad()
    correct = (model(inputs).argmax(1) == labels).nonzero().squeeze(1)[:32]
    return model, inputs[correct], labels[correct]

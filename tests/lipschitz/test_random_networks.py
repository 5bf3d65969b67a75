"""Random networks as users write them: a bound holds or is refused, and the network is not changed."""

import functools
import math
import random

import pytest
import random_networks
import torch
from random_networks import (
    HOSTILE,
    UNCOVERED,
    Verdict,
    build,
    compare,
    differences,
    judge,
    random_network,
    state_of,
    stretch_of,
    summary,
)
from stretches import largest_stretch
from torch import Tensor, nn

from fastlip import lipschitz_bound

_CHUNK = 50
_QUICK = 250
_SLOW = 10_000


def _norm(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of a linear model's matrix."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    return torch.linalg.matrix_norm(
        torch.autograd.functional.jacobian(model, x).reshape(-1, math.prod(shape)), 2
    ).item()


@functools.cache
def _verdicts(start: int) -> list[Verdict]:
    return [judge(seed, effort=1) for seed in range(start, start + _CHUNK)]


def _report(verdicts: list[Verdict]) -> str:
    """Each verdict with the program it is about."""
    parts = [f"{len(verdicts)} networks"]
    for verdict in verdicts:
        network = random_network(verdict.seed)
        network.close()
        parts.append(f"{verdict}\n{network.text}")
    return "\n\n".join(parts)


# -- the search alone


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(20, 15), (20,)),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
        (nn.ConvTranspose1d(2, 3, 3, 2), (2, 7)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5)), (2, 6, 6)),
        (nn.AdaptiveAvgPool2d(7), (1, 3, 3)),
    ],
)
def test_the_search_attains_the_norm_of_what_is_linear(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = model.double().eval()
    assert largest_stretch(model, shape, effort=1) == pytest.approx(_norm(model, shape), rel=1e-4)


@pytest.mark.parametrize(
    ("pool", "shape", "true"),
    [
        (nn.MaxPool2d(3, 2), (2, 7, 7), 2.0),
        (nn.MaxPool2d(3, 1), (2, 7, 7), 3.0),
        (nn.MaxPool1d(3, 1), (7,), math.sqrt(3.0)),
        (nn.MaxPool2d(3, 1), (6, 6), 3.0),
        (nn.AdaptiveMaxPool2d(6), (1, 2, 2), 3.0),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 1)), (2, 6, 6), 3.0),
    ],
)
def test_the_search_finds_the_peaks_of_max_pools(pool: nn.Module, shape: tuple[int, ...], true: float) -> None:
    for module in pool.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    assert largest_stretch(pool.double(), shape, effort=1) > 0.99 * true


@pytest.mark.parametrize(
    ("activation", "true"),
    [
        (nn.GELU(), 1.12904),
        (nn.SiLU(), 1.09984),
        (nn.Mish(), 1.08849),
        (nn.Hardswish(), 1.5),
        (nn.LeakyReLU(-4.0), 4.0),
        (nn.SELU(), 1.75809),
        (nn.Softplus(), 1.0),
        (nn.Sigmoid(), 0.25),
    ],
)
def test_the_search_finds_the_steepest_slopes(activation: nn.Module, true: float) -> None:
    found = largest_stretch(activation, (5,))
    assert 0.99 * true < found < true * (1 + 1e-5)


@pytest.mark.parametrize("threshold", [-3.0, 0.1, 1.0, 5.0])
def test_the_search_finds_jumps(threshold: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softplus(threshold=threshold)).double()
    assert largest_stretch(model, (4,)) > 100


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_the_search_comes_near_the_truth_of_small_networks(seed: int) -> None:
    """The truth is the largest norm over all ReLU patterns that occur in a region that is not too small."""
    optimize = pytest.importorskip("scipy.optimize")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    first, bias, second = model[0].weight.detach(), model[0].bias.detach(), model[2].weight.detach()
    true = 0.0
    for pattern in range(64):
        on = torch.tensor([pattern >> i & 1 for i in range(6)], dtype=torch.float64)
        sign = 2 * on - 1
        # The widest margin with which every unit is on its side, at most 1.
        rows = torch.cat([-sign[:, None] * first, torch.ones(6, 1, dtype=torch.float64)], 1)
        limits = [(None, None)] * 3 + [(0, 1)]
        inside = optimize.linprog([0, 0, 0, -1], A_ub=rows.numpy(), b_ub=(sign * bias).numpy(), bounds=limits)
        if inside.status == 0 and -inside.fun > 0.01:
            true = max(true, torch.linalg.matrix_norm(second @ on.diag() @ first, 2).item())
    assert 0.97 * true < largest_stretch(model, (3,)) < 1.01 * true


class _Of(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "true"),
    [
        (lambda x: x * x.size(0), 64.0),
        (lambda x: x + x.mean(0), 2.0),
        (lambda x: x.cumsum(0), 1 / (2 * math.sin(math.pi / 258))),
        (lambda x: x.transpose(0, 1), 1.0),
        (lambda x: x * (7.0 if x.shape[0] == 3 else 1.0), 7.0),
        (lambda x: x * (9.0 if x.shape[0] == 7 else 1.0), 9.0),
        (lambda x: x + (x[:1] if len(x) > 2 else 0), math.sqrt(65 / 2 + 1 + math.sqrt((65 / 2 + 1) ** 2 - 1))),
    ],
)
def test_the_search_looks_at_whole_batches(function, true: float) -> None:
    assert largest_stretch(_Of(function), (3,)) == pytest.approx(true, rel=1e-2)


def test_what_gives_two_outputs_for_one_input_has_no_constant() -> None:
    assert largest_stretch(_Of(lambda x: x + torch.randn(3)), (3,)) == math.inf
    calls = iter(range(10**6))
    assert largest_stretch(_Of(lambda x: x * (1.0 if next(calls) < 60 else 2.0)), (3,)) == math.inf


def test_the_search_looks_at_both_modes_of_gradients() -> None:
    assert largest_stretch(_Of(lambda x: x * (5.0 if torch.is_grad_enabled() else 1.0)), (3,)) == pytest.approx(5.0)
    assert largest_stretch(_Of(lambda x: x * (1.0 if torch.is_grad_enabled() else 5.0)), (3,)) == pytest.approx(5.0)


def test_differences_see_what_a_call_may_change() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    changes = [
        lambda: model[0].weight.data.mul_(2.0),
        lambda: model[1](torch.randn(4, 3)),
        lambda: model[2].eval(),
        lambda: setattr(model, "features", 1),
        lambda: model[2].register_forward_hook(lambda m, i, o: None),
        lambda: torch.rand(1),
        lambda: random.random(),
        lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
        lambda: setattr(model[0].weight, "grad", torch.ones(3, 3)),
        lambda: setattr(model[0], "bias", None),
    ]
    for change in changes:
        before = state_of(model)
        assert differences(before, state_of(model)) == []
        change()
        assert differences(before, state_of(model)) != []


# -- the networks


def test_networks_are_what_their_seeds_say() -> None:
    """Equal seeds give equal programs, shapes, weights and outputs, and leave the global random state alone."""
    before = torch.get_rng_state(), random.getstate()
    for seed in range(40):
        one, other = random_network(seed), random_network(seed)
        one.close(), other.close()
        assert one.program == other.program
        assert one.input_shape == other.input_shape
        pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_networks_are_of_all_kinds() -> None:
    traits: set[str] = set()
    hostile = 0
    for seed in range(300):
        network = random_network(seed)
        network.close()
        traits.update(network.traits)
        hostile += network.hostile
    assert 0.25 < hostile / 300 < 0.4
    assert len(HOSTILE & traits) > 0.6 * len(HOSTILE)
    named = {trait for _, trait, _ in random_networks._PLAIN} | {wrap.trait for wrap in random_networks._HARMLESS}
    assert len(named & traits) > 0.8 * len(named)


def test_a_wrong_bound_would_show() -> None:
    """On networks whose layers and activations attain their constants, the search attains sound bounds."""
    program = (
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.c(F.relu(self.b(F.relu(self.a(x)))))\n"
        "net = Net()\nfill(net, 'dirac', 3)\n"
    )
    network = build(program, (4,))
    network.close()
    bound = lipschitz_bound(network.model, (4,)).upper
    stretch = stretch_of(network)
    assert stretch is not None
    assert 0.99 * bound < stretch <= bound * (1 + 1e-6)


def test_a_comparison_lists_what_was_lost() -> None:
    """Sound bounds that became refusals are losses, unsound ones are not."""
    sound = {"traits": ["relu"], "hostile": False, "stretch": 1.0}
    earlier = [
        Verdict(1, outcome="accepted", bound=2.0, **sound),
        Verdict(2, outcome="accepted", bound=2.0, **sound),
        Verdict(3, outcome="accepted", bound=0.5, **sound),
        Verdict(4, outcome="refused", **sound),
    ]
    refused = {"outcome": "refused", "reason": "no rule for conv1 (at a.b)"}
    now = [
        Verdict(1, **refused, **sound),
        Verdict(2, outcome="accepted", bound=2.5, **sound),
        Verdict(3, **refused, **sound),
        Verdict(4, outcome="accepted", bound=2.0, **sound),
    ]
    text = compare(earlier, now)
    assert "accepted and sound before: 2, of which accepted now: 1" in text
    assert "unsound before: 1, now: 0" in text
    assert "newly accepted and sound: 1" in text
    assert "more than 2% larger than before: 1: 2 (1.250)" in text
    assert "1  no rule for … (at …)" in text
    assert "seed 1: benign: bound was 2" in text
    assert "seed 3:" not in text
    assert "all: 4; {'refused': 2, 'accepted': 2}; unsound 0" in summary(now)


# -- the judgement


@pytest.mark.parametrize("start", range(0, _QUICK, _CHUNK))
def test_bounds_hold_or_are_refused(start: int) -> None:
    unsound = [v for v in _verdicts(start) if v.unsound]
    assert not unsound, _report(unsound)


@pytest.mark.parametrize("start", range(0, _QUICK, _CHUNK))
def test_refusals_are_value_errors(start: int) -> None:
    crashed = [v for v in _verdicts(start) if v.outcome == "crashed"]
    assert not crashed, _report(crashed)


@pytest.mark.parametrize("start", range(0, _QUICK, _CHUNK))
def test_networks_are_left_as_found(start: int) -> None:
    """Weights, modes, attributes, hooks and random states, whether the bound was refused or not."""
    changed = [v for v in _verdicts(start) if v.changed]
    assert not changed, _report(changed)


def test_most_tame_networks_are_bounded() -> None:
    """The tests would prove nothing if no network were accepted."""
    verdicts = [v for start in range(0, _QUICK, _CHUNK) for v in _verdicts(start)]
    tame = [v for v in verdicts if not v.hostile and UNCOVERED.isdisjoint(v.traits)]
    refused = [v for v in tame if v.outcome != "accepted"]
    assert len(tame) > _QUICK / 2
    assert len(refused) < 0.1 * len(tame), _report(refused)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_ten_thousand_networks(record_property, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole judgement at once, printed; ``random_networks.py --seeds a:b`` does it in parts."""
    verdicts = [judge(seed) for seed in range(_SLOW)]
    text = summary(verdicts)
    with capsys.disabled():
        print(f"\n{text}")
    for outcome in ("accepted", "refused", "crashed"):
        record_property(outcome, sum(v.outcome == outcome for v in verdicts))
    wrong = [v for v in verdicts if v.unsound or v.outcome == "crashed" or v.changed]
    record_property("wrong", len(wrong))
    assert not wrong, _report(wrong[:20])

"""Random operators of every kind: no interval misses, nothing undocumented is raised, and every call returns."""

import math

import pytest
import torch
from random_operators import LIMIT, Tally, check, fault_of, random_case

from fastlip.norms import NormOptions, operator_norms, spectral_norm_value


def assert_clean(tally: Tally) -> None:
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.slowest[0] <= LIMIT


def test_random_operators_hold_by_every_method() -> None:
    tally = check(range(400))
    assert_clean(tally)
    assert set(tally.methods) == {"closed form", "svd", "lanczos", "power", "ring", "gram", "cholesky"}
    assert min(tally.methods.values()) > 10
    # Most are answered, also those that are zero; and what is refused is refused for a reason that was written down.
    assert sum(tally.refusals.values()) < 0.1 * tally.number
    assert tally.exact_zeros > 20


@pytest.mark.parametrize("method", ["auto", "lanczos", "power", "svd"])
def test_random_operators_of_all_magnitudes_hold_in_one_call(method: str) -> None:
    cases = [random_case(seed) for seed in range(20_000, 20_120)]
    generator = torch.Generator().manual_seed(0)
    settings = {"method": method, "rtol": 1e-3, "max_steps": 40}
    found = operator_norms([case.operator() for case in cases], NormOptions(**settings, generator=generator))
    for case, interval in zip(cases, found, strict=True):
        case.settings = settings
        assert not fault_of(case, interval, *case.truth()), f"{case}: {interval!r}"


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(20))
def test_twenty_thousand_random_operators_hold(thousand: int) -> None:
    assert_clean(check(range(1000 * thousand, 1000 * (thousand + 1))))


def test_the_cases_are_as_various_as_they_claim() -> None:
    cases = [random_case(seed) for seed in range(600)]
    for name in ("float16", "bfloat16", "float32", "float64"):
        assert sum(case.weight.dtype == getattr(torch, name) for case in cases) > 50
    assert {case.kind for case in cases} == {"conv", "transposed", "operator"}
    assert {len(case.size) for case in cases} == {1, 2, 3}
    assert {case.geometry.get("padding_mode") for case in cases} >= {"zeros", "circular", "reflect", "replicate"}
    assert {case.given for case in cases if isinstance(case.given, str)} == {"same", "valid"}
    assert any(min(min(pair) for pair in case.padding) < 0 for case in cases)
    assert any(max(case.geometry.get("output_padding", (0,))) > 0 for case in cases)
    beyond = [any(d > n for d, n in zip(case.geometry["dilation"], case.size, strict=True)) for case in cases]
    wide = [any(left > k for k, (left, _) in zip(case.weight.shape[2:], case.padding, strict=True)) for case in cases]
    assert sum(beyond) > 20
    assert sum(wide) > 20
    largest = [case.weight.double().abs().max().item() for case in cases]
    assert any(0.0 < value < 1e-40 for value in largest)
    assert any(value > 1e28 for value in largest)


def test_a_wrong_interval_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval that misses the truth by a ten-thousandth on either side is found."""
    seed = next(s for s in range(100) if random_case(s).truth()[0] > 0.0)
    truth = random_case(seed).truth()[0]
    kind = type(random_case(seed).interval())
    for lower, upper in ((1.0001, 1.0002), (0.9998, 0.9999)):
        wrong = kind(truth * lower, truth * upper, 1.0, "svd", 0, False)
        monkeypatch.setattr("random_operators.Case.interval", lambda self, wrong=wrong: wrong)
        assert len(check([seed]).faults) == 1


def test_values_to_differentiate_are_near_the_norm_on_random_operators() -> None:
    """At every magnitude of float32: never above the norm, seldom far below, equal to its gradient times the weight."""
    shares = []
    for seed in range(240):
        case = random_case(seed)
        if case.kind != "conv" or case.weight.dtype not in (torch.float32, torch.float64):
            continue
        truth, error = case.truth()
        if truth > 0.5 * torch.finfo(case.weight.dtype).max:
            continue
        weight = case.weight.clone().requires_grad_()
        names = ("stride", "dilation", "groups", "padding_mode")
        generator = torch.Generator().manual_seed(seed)
        value = spectral_norm_value(
            weight, case.size, padding=case.given, generator=generator, **{name: case.geometry[name] for name in names}
        )
        value.backward()
        assert weight.grad is not None
        if truth < 1e-36 and case.weight.dtype == torch.float32:  # where products are denormal numbers
            assert 0.0 <= value.item() <= truth * 1.01 + 1e-43
            continue
        along = (weight.grad.double() * case.weight.double()).sum().item()
        rounding = 1e-5 * truth + error
        if case.geometry["padding_mode"] != "zeros":
            rounding += 1e-6 * case.weight.double().abs().sum().item()  # entries may cancel
        assert 0.0 <= value.item() <= truth + rounding
        assert along == pytest.approx(value.item(), rel=1e-4, abs=rounding)
        if truth > rounding:
            shares.append(value.item() / truth)
    assert len(shares) > 50
    assert min(shares) > 0.5
    assert math.fsum(share > 0.995 for share in shares) > 0.9 * len(shares)

"""NormOptions: equivalent to keywords in every function that has them, and never together with them."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

import fastlip
from fastlip import lipschitz_bound, norms
from fastlip.norms import NormOptions, constrain_norm, conv_norm, conv_operator, operator_norms, spectral_norm_value
from fastlip.norms._options import NormKeywords, ResolvedOptions

WEIGHT = torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0))
MODEL = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
with torch.no_grad():
    MODEL[0].weight.copy_(WEIGHT)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def certified_upper(**given: Any) -> float:
    conv = nn.Conv2d(16, 24, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(WEIGHT)
    weight = constrain_norm(conv, 8, bound=1e-3, **given).eval().weight
    return (WEIGHT.norm() / weight.norm()).item()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "conv_norm": lambda **given: conv_norm(WEIGHT, 8, padding=1, **given),
    "layer_norms": lambda **given: fastlip.layer_norms(MODEL, (16, 8, 8), **given).intervals,
    "operator_norms": lambda **given: operator_norms([conv_operator(WEIGHT, 8, padding=1)], **given),
    "lipschitz_bound": lambda **given: lipschitz_bound(MODEL, (16, 8, 8), **given).to_dict(),
    "constrain_norm": certified_upper,
}
#: A value of each field that changes the result; generators and callbacks differ in each call.
VALUES: dict[str, Any] = {
    "rtol": 0.3,
    "confidence": 0.5,
    "method": "svd",
    "starts": 9,
    "max_steps": 5,
    "dtype": torch.float64,
    "max_memory": 1,
    "generator": None,
    "progress": None,
}


def test_every_field_is_a_keyword() -> None:
    names = [field.name for field in fields(NormOptions)]
    assert list(NormKeywords.__annotations__) == names == list(VALUES)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_keyword_is_as_good_as_the_option(function: str, name: str) -> None:
    call, common = FUNCTIONS[function], {"method": "lanczos", "rtol": 1e-3, "generator": seeded()}
    if name == "progress":
        seen: list[list[tuple[int, int]]] = [[], []]
        call(**common, progress=lambda *done: seen[0].append(done))
        call(options=NormOptions(**common, progress=lambda *done: seen[1].append(done)))
        assert seen[0] == seen[1] == [(1, 1)]
        return
    if name == "generator":
        found = [
            call(method="lanczos", generator=seeded()),
            call(options=NormOptions(method="lanczos", generator=seeded())),
        ]
        assert found[0] == found[1] != call(method="lanczos", generator=torch.Generator().manual_seed(4))
        return
    given = common | {name: VALUES[name]}
    usual = call(**common)
    by_keyword = call(**given | {"generator": seeded()})
    by_option = call(options=NormOptions(**given | {"generator": seeded()}))
    assert by_keyword == by_option != usual


def test_defaults_are_the_same() -> None:
    for function, call in FUNCTIONS.items():
        torch.manual_seed(0)
        explicit = call(options=NormOptions(generator=seeded()))
        assert call(generator=seeded()) == explicit, function


def test_a_value_uses_three_of_them() -> None:
    def value(**given: Any) -> float:
        return spectral_norm_value(WEIGHT, 8, padding=1, **given).item()

    for given in ({"rtol": 0.3}, {"max_steps": 2}, {"rtol": 1e-6, "max_steps": 40}):
        options = NormOptions(**{"rtol": 1e-3, "generator": seeded(), **given})
        assert value(**given, generator=seeded()) == value(options=options) != value(generator=seeded())
    long = NormOptions(rtol=1e-3, generator=seeded())
    assert value(generator=seeded()) == value(max_steps=300, generator=seeded()) == value(options=long)


@pytest.mark.parametrize("function", [*FUNCTIONS, "spectral_norm_value"])
def test_both_refuse_and_unknown_names_refuse(function: str) -> None:
    call = FUNCTIONS.get(function, lambda **given: spectral_norm_value(WEIGHT, 8, **given))
    both = rf"{function}\(\) takes options or keywords, not both: rtol, generator belong into options"
    with pytest.raises(TypeError, match=both):
        call(options=NormOptions(), rtol=0.1, generator=None)
    for given in ({"tolerance": 0.1}, {"tolerance": 0.1, "options": NormOptions()}):
        with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument 'tolerance'"):
            call(**given)
    with pytest.raises(TypeError, match="options must be a NormOptions or None, got dict"):
        call(options={"rtol": 0.1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerance'"):
        NormOptions(tolerance=0.1)  # type: ignore[call-arg]  # what is refused


def test_a_value_has_no_certificate_to_ask_for() -> None:
    with pytest.raises(TypeError, match=r"spectral_norm_value\(\) got an unexpected keyword argument 'confidence'"):
        spectral_norm_value(WEIGHT, 8, confidence=0.9)  # type: ignore[call-arg]  # what is refused


def test_options_are_values() -> None:
    options = NormOptions(rtol=0.1, starts=5)
    with pytest.raises(AttributeError):
        options.rtol = 0.2  # type: ignore[misc]  # what is refused
    assert options == NormOptions(rtol=0.1, starts=5) == pickle.loads(pickle.dumps(options))
    assert replace(options, rtol=0.2).starts == 5
    conv = constrain_norm(nn.Conv2d(1, 1, 3), 4, options=options)
    assert copy.deepcopy(conv).parametrizations.weight[0].options == options


def test_nothing_is_left_open_for_solvers() -> None:
    options = NormOptions(rtol=0.1)
    resolved = options.resolved([WEIGHT])
    assert isinstance(resolved, ResolvedOptions)
    assert resolved.max_memory == norms.memory_for(None, [WEIGHT]) == 2**31
    assert isinstance(resolved.generator, torch.Generator)
    assert resolved.rtol == 0.1
    assert options == NormOptions(rtol=0.1)  # is left as it was
    given = NormOptions(max_memory=77, generator=seeded())
    assert given.resolved([]).max_memory == 77
    assert given.resolved([]).generator is given.generator


def test_the_former_keyword_warns() -> None:
    op = norms.conv_operator(WEIGHT, 8)
    with pytest.warns(DeprecationWarning, match=r"operator_norms\(settings=\) is now options=") as caught:
        former = norms.operator_norms([op], settings=NormOptions(method="svd"))  # type: ignore[call-arg]  # its former name
    assert caught[0].filename == __file__
    assert former == norms.operator_norms([op], NormOptions(method="svd"))
    with pytest.raises(TypeError, match="got both 'options' and its former name 'settings'"):
        norms.operator_norms([op], options=NormOptions(), settings=NormOptions())  # type: ignore[call-arg]  # both names


def test_the_old_name_warns() -> None:
    with pytest.warns(DeprecationWarning, match="fastlip.norms.Settings is called NormOptions"):
        assert norms.Settings is NormOptions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastlip.NormOptions is norms.NormOptions is NormOptions
    with pytest.raises(AttributeError, match="has no attribute 'Setting'"):
        norms.Setting  # noqa: B018

"""Precisions that a machine computes more slowly than float32 are not used, and "auto" takes the fastest one."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from fastlip import _precision, attacks
from fastlip.attacks import _prepare

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forgotten():
    """What was found out about the machine, and warned of, is found out and warned of again."""
    _precision.is_fast.cache_clear()
    _precision._warn.cache_clear()
    yield
    _precision.is_fast.cache_clear()
    _precision._warn.cache_clear()


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 5)
        ).eval()


@pytest.fixture
def inputs():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def machine(monkeypatch, capabilities, faster=True):
    """A machine with these instructions, which PyTorch uses or does not use."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | capabilities)
    asked = []
    monkeypatch.setattr(_precision, "least_seconds", lambda runs, rounds: asked.append(rounds) or [2.0 - faster, 1.5])
    return asked


def dtypes_of(network):
    """The dtypes of the copy's weights."""
    copy = network.faster
    while not isinstance(copy, nn.Module):
        copy = copy.model
    return {t.dtype for t in copy.state_dict().values()}


@pytest.mark.parametrize(
    ("capabilities", "faster", "wanted"),
    [
        ({}, True, (False, False)),
        ({"avx2": True, "avx512_f": True}, True, (False, False)),
        ({"avx512_bf16": True}, True, (True, False)),
        ({"amx_bf16": True, "amx_fp16": True}, True, (True, True)),
        ({"avx512_bf16": False, "avx512_fp16": True}, True, (False, True)),
        ({"avx512_bf16": True, "avx512_fp16": True}, False, (False, False)),
        ({"architecture": "aarch64"}, True, (True, True)),
        ({"architecture": "aarch64"}, False, (False, False)),
    ],
)
def test_a_cpu_is_fast_where_it_has_instructions_that_are_used(monkeypatch, capabilities, faster, wanted):
    asked = machine(monkeypatch, capabilities, faster)
    assert tuple(_precision.is_fast(dtype, "cpu") for dtype in LOW) == wanted
    assert tuple(_precision.is_fast(dtype, "cpu") for dtype in LOW) == wanted
    assert len(asked) <= 2, "asked once for each dtype"


def test_gpus_and_other_devices(monkeypatch):
    for supported in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        _precision.is_fast.cache_clear()
        assert tuple(_precision.is_fast(dtype, "cuda") for dtype in LOW) == (supported, True)
        wanted = torch.bfloat16 if supported else None
        assert _precision.precision_for("auto", torch.device("cuda")) == wanted
    assert not any(_precision.is_fast(dtype, "meta") for dtype in LOW)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("precision", LOW)
def test_a_slow_precision_is_replaced_by_float32_with_one_warning(monkeypatch, model, inputs, precision, fast):
    machine(monkeypatch, {})
    with pytest.warns(UserWarning, match=f"precision={precision} is slower than float32 on this CPU"):
        network = attacks.prepare(model, inputs, fast=fast, precision=precision)
    assert network.exact != fast
    assert not fast or dtypes_of(network) == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = model(inputs).argmax(1)
        attacks.pgd(model, inputs, labels, eps=0.1, steps=2, fast=fast, precision=precision)


def test_a_precision_that_was_asked_for_and_is_fast_is_used(monkeypatch, model, inputs):
    machine(monkeypatch, {"avx512_bf16": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.bfloat16 in dtypes_of(attacks.prepare(model, inputs, precision=torch.bfloat16))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("low_is_faster", [False, True])
def test_auto_is_the_faster_of_two_copies(monkeypatch, model, inputs, fast, low_is_faster):
    machine(monkeypatch, {"avx512_bf16": True})
    timed = []

    def least_seconds(runs, rounds):
        for run in runs:
            timed.append(run().dtype)
        return [1.0, 2.0] if low_is_faster else [2.0, 1.0]

    monkeypatch.setattr(_prepare, "least_seconds", least_seconds)
    network = attacks.prepare(model, inputs, fast=fast, precision="auto")
    assert timed == [torch.bfloat16, torch.float32]
    if low_is_faster and not fast:
        assert isinstance(network.faster, _prepare._Autocast)
    elif low_is_faster:
        assert torch.bfloat16 in dtypes_of(network)
    else:
        assert network.exact != fast
        assert not fast or dtypes_of(network) == {torch.float32}
    again = attacks.prepare(model, inputs, fast=fast, precision="auto")
    assert not fast or again.faster is network.faster, "timed once"


def test_auto_is_float32_without_a_warning_on_a_slow_machine(monkeypatch, model, inputs):
    machine(monkeypatch, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dtypes_of(attacks.prepare(model, inputs, precision="auto")) == {torch.float32}
        assert attacks.prepare(model, inputs, fast=False, precision="auto").exact
        assert attacks.prepare(lambda x: model(x), inputs, precision="auto").exact


def test_auto_confirms_successes_like_any_other(model, inputs):
    labels = model(inputs).argmax(1)
    for attack in (attacks.pgd, attacks.apgd, attacks.square):
        steps = {"queries": 20} if attack is attacks.square else {"steps": 5}
        found = attack(model, inputs, labels, eps=0.1, fast=True, precision="auto", **steps)
        assert ((found - inputs).abs() <= 0.1 + 1e-6).all()
    pgd = partial(attacks.pgd, eps=0.1)
    report = attacks.evaluate(model, inputs, labels, {"pgd": pgd}, norm="linf", eps=0.1, precision="auto", check=False)
    assert report.robust.shape == labels.shape


@pytest.mark.parametrize("precision", ["bfloat16", "Auto", ["auto"], torch.float64])
def test_other_precisions_are_refused(model, inputs, precision):
    with pytest.raises(ValueError, match=r'precision must be None, torch\.bfloat16, torch\.float16 or "auto"'):
        attacks.prepare(model, inputs, precision=precision)


def test_the_least_time_of_turns_but_the_first(monkeypatch):
    clock = iter([0, 1, 100, 105, 105, 106, 110, 113, 120, 122])
    monkeypatch.setattr(_precision.time, "perf_counter", lambda: next(clock))
    calls = []
    seconds = _precision.least_seconds([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)
    monkeypatch.undo()
    assert calls == ["a", "b"] * 3
    assert seconds == [3, 1]

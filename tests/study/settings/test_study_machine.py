"""What the study takes of a machine: as many threads as are free, and no precision that it only emulates."""

import os

import pytest
import torch

from fastlip import _precision
from fastlip.study.settings import machine, presets

DEMO = presets.preset("demo")


@pytest.fixture
def groups(tmp_path):
    """Writes control groups of either version; their limit for a process in /a/b."""

    def limit(files, process="0::/a/b\n"):
        (tmp_path / "process").write_text(process)
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return machine._quota(tmp_path / "process", tmp_path / "root")

    return limit


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"a/b/cpu.max": "max 100000\n"}, None),
        ({"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ({"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "400000 100000\n"}, 1.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    ],
)
def test_the_limit_of_a_control_group_is_the_tightest_around_it(groups, files, limit):
    assert groups(files) == limit


def test_a_machine_without_control_groups_has_no_limit(tmp_path):
    assert machine._quota(tmp_path / "none", tmp_path / "root") is None


@pytest.mark.parametrize(
    ("torchs", "free", "quota", "threads"), [(8, 4, None, 4), (8, 8, 2.5, 2), (2, 8, 5, 2), (8, 8, 0.5, 1)]
)
def test_threads_are_those_that_are_free(monkeypatch, torchs, free, quota, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(free)), raising=False)
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    assert machine.this_machine(DEMO).threads == threads


@pytest.mark.parametrize("fast", [False, True])
def test_auto_takes_bfloat16_only_where_it_is_faster(monkeypatch, fast):
    """A CPU may name the instructions and yet be slower, as with an instruction set that the environment limits."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": True})
    monkeypatch.setattr(_precision, "least_seconds", lambda runs, rounds: [1.0, 2.0] if fast else [2.0, 1.0])
    _precision.is_fast.cache_clear()
    try:
        assert machine.this_machine(DEMO).precision == ("bfloat16" if fast else "float32")
    finally:
        _precision.is_fast.cache_clear()

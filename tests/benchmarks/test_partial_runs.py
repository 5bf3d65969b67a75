"""Benchmarks that are stopped, fail in part or come to their limit keep what they have measured."""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import bench_apgd_step
import bench_gpu_attack
import bench_gpu_norms
import bench_pgd_step
import gpu_summary
import pytest
import torch
from _timing import Results, Session

BENCHMARKS = Path(bench_pgd_step.__file__).parent
SMALL = ["--shape", "4x3x8x8", "--seconds", "0", "--no-compile"]


def read(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(autouse=True)
def switches():
    """Benchmarks set these for a process of their own."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_rows_are_on_the_disk_as_they_are_added(tmp_path):
    path = tmp_path / "new" / "a.csv"
    results = Results(path, {"device": "x"})
    assert not path.exists()
    results.add({"what": "one, two", "ms": 1.23456})
    assert path.read_text() == 'what,ms,device\n"one, two",1.235,x\n'
    results.add({"what": "three", "ms": 2.0})
    assert [row["what"] for row in read(path)] == ["one, two", "three"]
    before = path.stat().st_ino
    results.add({"what": "four", "ms": 3.0, "more": 7})  # a column of its own
    assert path.stat().st_ino != before  # another file took its place
    assert path.read_text().splitlines()[::3] == ["what,ms,more,device", "four,3,7,x"]
    assert [row["more"] for row in read(path)] == ["", "", "7"]
    results.rows[0]["ms"] = 9.0
    results.rewrite()
    assert [row["ms"] for row in read(path)] == ["9", "2", "3"]
    Results(path)
    assert not path.exists()


def test_a_failure_or_the_limit_costs_no_other_row(capsys):
    done = []
    session = Session(1e9)
    session.attempt("first", lambda: done.append(1))
    session.attempt("second", lambda: 1 / 0)
    session.attempt("third", lambda: done.append(3))
    session.attempt("long", lambda: done.append(4), seconds=1e10)
    with pytest.raises(SystemExit, match="failed: second"):
        session.close()
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said
    assert "left out to end within 1e+09 s: long" in said
    assert done == [1, 3]
    late = Session(0.0)
    time.sleep(0.01)
    late.attempt("late", lambda: done.append(5))
    late.close()  # to leave something out is no failure
    assert done == [1, 3]
    assert "left out to end within 0 s: late" in capsys.readouterr().out


def test_a_killed_benchmark_leaves_its_rows(tmp_path):
    path = tmp_path / "pgd_step_cpu.csv"
    path.write_text("shape,what\n1x1,of an earlier run\n")
    command = [sys.executable, BENCHMARKS / "bench_pgd_step.py", *SMALL, "--seconds", "0.3", "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while not (path.exists() and path.read_text().count("fastlip pgd_step_") and len(read(path)) >= 3):
            assert time.monotonic() < until
            assert process.poll() is None, "it was to be killed while it runs"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    rows = read(path)
    assert len(rows) < 19
    assert [row["what"] for row in rows[:2]] == ["floor", "fastlip pgd_step_"]
    assert all(set(row) == set(rows[0]) and None not in row.values() and float(row["ms"]) > 0 for row in rows)
    found = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu")}
    assert found
    assert set(found.values()) == {None}  # none of them is about this shape


@torch.no_grad()
def test_two_builds_are_told_apart(tmp_path, capsys):
    shape = "8192x3x32x32"
    options = ["--shape", shape, "--seconds", "0", "--norms", "linf", "--only", "fastlip pgd_step_"]
    bench_pgd_step.main([*options, "--out", str(tmp_path)])
    bench_pgd_step.main([*options, "--out", str(tmp_path), "--label", "old"])
    new, old = read(tmp_path / "pgd_step_cpu.csv"), read(tmp_path / "pgd_step_cpu-old.csv")
    assert [row["what"] for row in new] == [row["what"] for row in old] == ["floor", "fastlip pgd_step_"]
    assert ([row["label"] for row in new], [row["label"] for row in old]) == ([""] * 2, ["old"] * 2)
    found = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu")}
    assert found[f"pgd_step_ linf {shape}, x faster than old"] == float(old[1]["ms"]) / float(new[1]["ms"])
    assert found[f"pgd_step_ linf {shape}, % of copy"] == pytest.approx(100 / float(new[1]["x_floor"]))


@torch.no_grad()
def test_steps_on_a_cpu(tmp_path, capsys):
    bench_pgd_step.main([*SMALL, "--out", str(tmp_path)])
    rows = read(tmp_path / "pgd_step_cpu.csv")
    assert [row["what"] for row in rows if row["norm"] == "l1"] == [
        "floor", "fastlip pgd_step_", "fastlip, float16 model input", "fastlip, converted eagerly", "fastlip project_",
        "SLIDE step, sort projection eager", "sort projection eager",
    ]  # fmt: skip
    bench_apgd_step.main([*SMALL, "--out", str(tmp_path)])
    steps = read(tmp_path / "apgd_step_cpu.csv")
    assert [row["what"] for row in steps] == ["floor", "fastlip apgd_step_", "eager"] * 3
    for row in [*rows, *steps]:
        assert float(row["x_floor"]) > 0
        assert row["what"] != "floor" or row["x_floor"] == "1"


def test_on_a_gpu_every_step_comes_before_any_peer():
    data = bench_pgd_step.Data("cpu", (8, 3, 4, 4))
    batch = bench_pgd_step.BATCH_SHAPES[0]
    found = [m for norm in ("linf", "l2", "l1") for m in bench_pgd_step.measurements("cuda", batch, data, norm)]
    found.sort(key=lambda m: m.phase)
    assert {m.what for m in found[:6]} == {"floor", "fastlip pgd_step_"}
    assert [m.what.endswith("compiled") for m in found] == [False] * (len(found) - 3) + [True] * 3
    large = list(bench_pgd_step.measurements("cuda", bench_pgd_step.LARGE_SHAPES[0], data, "linf"))
    assert not any("compiled" in m.what for m in large)


def test_the_share_of_a_step_that_a_constraint_takes(tmp_path):
    (tmp_path / "constrain_cpu.csv").write_text("what,step_ms,added_ms\nnothing,50,0\nconstrain_norms,52,2\n")
    found = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu") if value is not None}
    assert found == {"constrain_norms, % that it adds to a ResNet-18 step": pytest.approx(4.0)}


@torch.no_grad()
def test_norms_of_a_tiny_network_and_what_their_summary_says(tmp_path, capsys):
    bench_gpu_norms.main(["--device", "cpu", "--tiny", "--checkpoints", "2", "--seconds", "0", "--out", str(tmp_path)])
    rows = read(tmp_path / "gpu_norms_cpu.csv")
    assert (rows[0]["what"], rows[0]["setting"]) == ("fastlip", "one network")
    assert [row["what"] for row in rows].index("torch power iteration") == len(rows) - 1
    whole = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu")}
    measured = [what for what, value in whole.items() if value is not None]
    assert len(measured) == 8
    # Of a file cut anywhere, what is still there says the same.
    text = (tmp_path / "gpu_norms_cpu.csv").read_text()
    for end in range(0, len(text), 97):
        (tmp_path / "gpu_norms_cpu.csv").write_text(text[:end])
        part = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu")}
        assert all(part[what] in (None, value) for what, value in whole.items())
    gpu_summary.main([str(tmp_path), "--device", "cpu"])
    assert "norms of one network, ms" in capsys.readouterr().out


def test_attacks_say_what_they_are_compared_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)  # as if it were not installed
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3)).eval()
    images, args = torch.rand(6, 3, 8, 8), argparse.Namespace(batch=4, eps=4.0)
    labels = model(images).argmax(1)
    table = bench_gpu_attack.Table(Results(tmp_path / "gpu_attack_cpu.csv"), model, images, labels, args)
    ways = bench_gpu_attack.candidates(model, 4 / 255)
    peer = next(iter(ways))
    assert peer == "a loop like torchattacks'"
    for _ in range(2):
        for name, attack in ways.items():
            table.add(name, attack, peer, 1.0)
    rows = read(tmp_path / "gpu_attack_cpu.csv")
    assert [(row["what"], row["peer"], row["runs"]) for row in rows] == [(name, peer, "2") for name in ways]
    fast = max(float(row["x_peer"]) for row in rows if row["what"].startswith("fastlip, fast"))
    assert {w: v for w, _, v in gpu_summary.results(tmp_path, "cpu")}[f"PGD-20 end to end, x {peer}"] == fast
    with pytest.raises(AssertionError, match="left the ball"):
        table.add("too far", lambda x, y: x + 0.1, peer, 1.0)
    assert len(read(tmp_path / "gpu_attack_cpu.csv")) == len(ways)


def test_a_peer_without_its_best_row_is_not_compared_with(tmp_path):
    results = Results(tmp_path / "gpu_norms_cuda.csv")
    results.add({"what": "fastlip", "setting": "iteration alone, 24 steps", "ms": 1.0})
    what, peer = "iteration, x faster than Lanczos on cuDNN", "Lanczos on torch's convolutions"
    results.add({"what": peer, "setting": "iteration alone, 24 steps", "ms": 9.0})
    assert {w: v for w, _, v in gpu_summary.results(tmp_path, "cuda")}[what] is None
    results.add({"what": peer, "setting": "iteration alone, 24 steps, one CUDA graph", "ms": 2.0})
    assert {w: v for w, _, v in gpu_summary.results(tmp_path, "cuda")}[what] == 2.0

"""The benchmark of attacks' strength: rows that stay, and what is compared."""

import csv

import bench_strength
import torch
from _timing import Results


def read(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_rows_of_an_earlier_run_stay_until_they_are_measured_again(tmp_path):
    path = tmp_path / "a.csv"
    first = Results(path, {"device": "x"}, keys=("norm", "eps"))
    first.add({"norm": "l1", "eps": 1 / 3, "ms": 1.0})
    first.add({"norm": "l2", "eps": 0.5, "ms": 2.0})
    again = Results(path, {"device": "y", "torch": "3"}, keys=("norm", "eps"))
    assert again.find({"norm": "l1", "eps": 1 / 3})["ms"] == "1"  # as written
    assert again.find({"norm": "l1", "eps": 0.5}) is None
    again.add({"norm": "l1", "eps": 1 / 3, "ms": 7.0})
    again.add({"norm": "linf", "eps": 1.0, "ms": 3.0, "more": 4})
    found = [(r["norm"], r["eps"], r["ms"], r["more"], r["device"], r["torch"]) for r in read(path)]
    assert found == [
        ("l1", "0.3333", "7", "", "y", "3"), ("l2", "0.5", "2", "", "x", ""), ("linf", "1", "3", "4", "y", "3"),
    ]  # fmt: skip


def test_the_median_of_an_even_number_lies_between_two():
    assert bench_strength.median(torch.tensor([4.0, 1.0, 2.0, torch.inf])) == 3.0
    assert bench_strength.median(torch.tensor([4.0, 1.0, 2.0])) == 2.0
    assert bench_strength.median(torch.tensor([1.0, torch.inf, torch.inf, 2.0])) == torch.inf

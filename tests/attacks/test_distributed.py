import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastlip import attacks

needs_gloo = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@needs_gloo
def test_attacks_do_not_communicate(cnn_problem, one_process):
    """Processes take different numbers of steps, so that a collective in the forward pass would not be answered."""
    model, inputs, labels = cnn_problem
    wrapped = DistributedDataParallel(model)
    calls = []
    wrapped.register_forward_pre_hook(lambda module, args: calls.append(module))
    found = attacks.pgd(wrapped, inputs, labels, eps=0.05, random_start=False)
    assert torch.equal(found, attacks.pgd(model, inputs, labels, eps=0.05, random_start=False))
    assert not calls
    wrapped(inputs).sum().backward()
    assert calls


def problem():
    """A network with BatchNorm, whose buffers a wrapped forward pass would broadcast, and 16 images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    inputs = torch.rand(16, 3, 8, 8)
    for _ in range(3):
        model(inputs)
    return model.eval(), inputs, model(inputs).argmax(1).detach()


#: Each fells some images and not others, at different steps.
ATTACKS = {
    "pgd": (attacks.pgd, {"eps": 0.01, "steps": 12, "restarts": 2}),
    "fast": (attacks.pgd, {"eps": 0.01, "steps": 12, "fast": True}),
    "apgd": (attacks.apgd, {"eps": 0.01, "steps": 12}),
    "square": (attacks.square, {"eps": 0.03, "queries": 20}),
}


def attacked_rows(model, inputs, labels, rows):
    """What each attack returns for ``rows``, whose random draws follow from their ids, and a suite of two."""
    suite = {name: partial(ATTACKS[name][0], **ATTACKS[name][1]) for name in ("pgd", "square")}
    found = attacks.evaluate(model, inputs[rows], labels[rows], suite, ids=rows, batch_size=3)
    out = {"evaluate": found.adversarial}
    for name, (attack, options) in ATTACKS.items():
        generator = torch.Generator().manual_seed(1)
        out[name] = attack(model, inputs[rows], labels[rows], ids=rows, generator=generator, **options)
    return out


def main(rank, folder):
    """One of two processes: attack every other image through DistributedDataParallel, then train a step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, inputs, labels = problem()
    wrapped = DistributedDataParallel(model)
    rows = torch.arange(rank, 16, 2)
    torch.save(attacked_rows(wrapped, inputs, labels, rows), folder / f"{rank}.pt")
    nn.functional.cross_entropy(wrapped.train()(inputs[rows]), labels[rows]).backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters())
    (folder / f"{rank}.json").write_text(json.dumps({"gradient": norm}))
    # Neither may end while the other still talks to it, nor its threads outlive the group: torch aborts then, at exit.
    distributed.barrier()
    del wrapped
    gc.collect()
    distributed.destroy_process_group()


@needs_gloo
def test_two_processes_find_what_one_finds(tmp_path):
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    model, inputs, labels = problem()
    for rank in (0, 1):
        rows = torch.arange(rank, 16, 2)
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, want in attacked_rows(model, inputs, labels, rows).items():
            assert torch.equal(found[name], want), (rank, name)
            fell = model(want).argmax(1) != labels[rows]
            assert 0 < fell.sum() < 8, f"{name}: the comparison needs images on both sides"
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["gradient"] == said[1]["gradient"] > 0, "training goes on in step"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

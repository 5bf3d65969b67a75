"""Two gloo processes give the results of one: evaluation bit for bit, training up to rounding."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlip.models import load_checkpoint
from fastlip.study.errors import StudyError
from fastlip.study.measure.images import merged
from fastlip.study.storage.files import read_arrays, read_json
from fastlip.study.training.batch_norm import synchronised
from fastlip.study.training.process_group import ProcessGroup

TRAIN = """
import json, sys
import torch
from torch import nn
from pathlib import Path
from fastlip.study.settings.training import Schedule
from fastlip.study.training.process_group import process_group
from fastlip.study.training.train import train

torch.set_num_threads(1)
out = Path(sys.argv[1])
with process_group() as group:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 4
    images = torch.randint(0, 60, (40, 3, 16, 16), generator=generator) + 30 * labels[:, None, None, None]
    kept = []
    history = train(
        model, images.to(torch.uint8), labels,
        Schedule(images=40, epochs=3, max_lr=0.1, batch_size=16, snapshots=(2,)),
        seed=5, precision=torch.float32, state_path=out / "state.pt", save_seconds=0,
        progress=lambda *a: None, group=group, keep=kept.append, compiled="compiled" in sys.argv,
        norm_bound=0.6 if "bounded" in sys.argv else None,
    )
    if group.leads:
        state = {k: v.tolist() for k, v in model.state_dict().items()}
        (out / "found.json").write_text(json.dumps([state, history.loss, history.accuracy, kept, group.size]))
"""


def launched(processes, *arguments, timeout=300):
    """A command under torchrun, or without it for one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def trained(tmp_path, processes, *arguments):
    """Weights, loss, accuracy, snapshots and the size of the group."""
    (tmp_path / "train.py").write_text(TRAIN)
    out = tmp_path / f"{processes}"
    out.mkdir()
    done = launched(processes, str(tmp_path / "train.py"), str(out), *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "found.json").read_text())


def are_the_same(one, two):
    (weights, loss, accuracy, kept, _), (weights2, loss2, accuracy2, kept2, size) = one, two
    assert size == 2
    assert kept == kept2 == [2]
    assert accuracy == accuracy2
    assert loss2 == pytest.approx(loss, rel=1e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(weights2[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("how", [[], ["bounded"]], ids=["free", "bounded"])
def test_two_processes_train_the_same_network_as_one(tmp_path, how):
    are_the_same(trained(tmp_path, 1, *how), trained(tmp_path, 2, *how))


@pytest.mark.slow
def test_two_processes_train_a_compiled_network(tmp_path):
    are_the_same(trained(tmp_path, 1), trained(tmp_path, 2, "compiled"))


@pytest.mark.slow
def test_two_processes_run_the_study_as_one(micro_arguments, tmp_path):
    # In bfloat16 the rounding of the gradients depends on how a batch is split, and hides what is compared.
    arguments = [*micro_arguments, "--set=precision=float32"]
    alone, out = tmp_path / "alone", tmp_path / "run"
    assert launched(1, "-m", "fastlip.study", "--out", str(alone), *arguments, timeout=600).returncode == 0
    done = launched(2, "-m", "fastlip.study", "--out", str(out), *arguments, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 2  # the leader alone speaks
    for name in ("source", "scratch-s0", "finetune-s0"):
        assert read_json(out / "training" / f"{name}.json")["processes"] == 2
        one, two = (load_checkpoint(path / "checkpoints" / f"{name}.safetensors")[0] for path in (alone, out))
        a, b = (torch.cat([v.double().flatten() for v in state.values()]) for state in (one, two))
        assert (a - b).norm() < 1e-3 * a.norm()
    # Evaluation alone, on the same weights, is the same to the last bit.
    for path in (out / "checkpoints").glob("*.safetensors"):
        path.write_bytes((alone / "checkpoints" / path.name).read_bytes())
    for path in [*out.glob("images/*/*.npz"), out / "results.json"]:
        path.unlink()
    again = launched(2, "-m", "fastlip.study", "--out", str(out), *arguments, timeout=600)
    assert again.returncode == 0, again.stderr
    paths = list(alone.glob("images/*/*.npz"))
    assert paths
    for path in paths:
        expected, found = read_arrays(path), read_arrays(out / path.relative_to(alone))
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values, err_msg=f"{path.name}, {key}")


def test_a_batch_that_cannot_be_split_is_one_line(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN.replace("batch_size=16", "batch_size=15"))
    done = launched(2, str(tmp_path / "train.py"), str(tmp_path))
    assert done.returncode != 0
    assert "batches of 15 images cannot be split evenly over 2 processes" in done.stderr


def test_batch_norm_on_gpus_is_torchs_and_shares_all_tensors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model[1].eval()
    network = synchronised(model, torch.device("cuda"))
    assert [type(m) for m in model.modules()].count(nn.BatchNorm2d) == 2
    norms = [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert [m.training for m in norms] == [False, True]
    ours, theirs = model.state_dict(keep_vars=True), network.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is tensor for name, tensor in ours.items())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in synchronised(model, torch.device("cpu")).modules())


def test_parts_are_merged_in_the_order_of_their_ids():
    parts = [
        {"id": np.array([0, 1, 4]), "x": np.array([10, 11, 14]), "image": np.array([[0], [1]])},
        {"id": np.array([2, 3]), "x": np.array([12, 13]), "image": np.array([[2]])},
        {},
    ]
    found = merged(parts)
    assert found["id"].tolist() == [0, 1, 2, 3, 4]
    assert found["x"].tolist() == [10, 11, 12, 13, 14]
    assert found["image"].ravel().tolist() == [0, 1, 2]


def test_every_operation_of_a_single_process_is_a_no_op():
    group = ProcessGroup()
    x = torch.ones(2)
    assert group.leads
    assert group.broadcast("a") == "a"
    assert group.gather(3) == [3]
    assert group.sum_(x) is x
    assert group.device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (nn.BatchNorm1d, (8, 5), {}),
        (nn.BatchNorm1d, (8, 5, 3), {"affine": False}),
        (nn.BatchNorm2d, (8, 5, 3, 3), {}),
        (nn.BatchNorm3d, (4, 5, 2, 3, 3), {"track_running_stats": False}),
    ],
)
def test_every_batchnorm_is_shared_on_a_cpu(tmp_path, kind, shape, options, momentum):
    generator = torch.Generator().manual_seed(0)
    own, other = (nn.Sequential(kind(5, momentum=momentum, **options)) for _ in range(2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        shared = synchronised(other, torch.device("cpu"))
        assert not isinstance(shared[0], kind)
        for _ in range(2):
            x = torch.randn(shape, generator=generator)
            torch.testing.assert_close(shared(x), own(x))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(other.state_dict(), own.state_dict())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batchnorm_that_does_more_is_refused(device):
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(StudyError, match=r"0 is a BatchNorm of its own kind \(WithActivation\)"):
        synchronised(nn.Sequential(WithActivation(3)), torch.device(device))

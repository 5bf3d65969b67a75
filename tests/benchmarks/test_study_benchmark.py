"""What bench_study.py says of a preset, by way of one small enough for a CPU, and how it watches a loop on a GPU."""

import csv
import math

import bench_study
import gpu_summary
import pytest
import torch

from fastlip.study.settings.presets import PRESETS

SMALL = [
    "arms=softmax,scratch,constrained,lpft", "model=torchvision:resnet18", "reference.batch_size=8",
    "scratch.batch_size=4", "scratch.snapshots=1", "finetune.batch_size=4", "finetune.snapshots=",
    "scale=1", "gaussian.sigmas=0.1",
    "pgd.linf_255=0.25,1", "pgd.l2=", "pgd.l1=1", "pgd.steps=1", "strong.linf_255=1",
    "strong.l2=", "strong.targets=1", "smallest.steps=1", "smallest.searches=2", "smallest.levels=2",
    "smallest.halvings=1", "lipschitz.jacobian_images=1", "lipschitz.jacobian_steps=1", "corruptions.severities=1",
    "threads=1",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FASTLIP_DATA", raising=False)
    options = [text for setting in SMALL for text in ("--set", setting)]
    sizes = ["--images", "24", "--attacked", "2", "--seconds", "0", "--warm", "1", "--device", "cpu"]
    before = torch.get_num_threads()
    bench_study.main([*options, *sizes, "--out", str(tmp_path)])
    torch.set_num_threads(before)
    assert "left out" not in capsys.readouterr().out
    with (tmp_path / "study_cpu.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_a_preset_is_predicted_from_its_own_stages(rows, tmp_path):
    training = {(r["kind"], r["how"]): r for r in rows if r["what"] == "training"}
    study, plain = training["scratch", "study"], training["scratch", "plain"]
    assert float(study["x_plain"]) == pytest.approx(float(plain["ms"]) / float(study["ms"]), rel=2e-3)
    assert float(study["images_per_s"]) == pytest.approx(4e3 / float(study["ms"]), rel=2e-3)
    assert (study["batch"], study["device_ms"], study["compiled"]) == ("4", "", "False")

    full = PRESETS["full"]
    scratch, head = (training[arm, "study"] for arm in ("scratch", "linear"))
    save = float(training["scratch", "study, saving after every step"]["save_s"])
    seconds = 0.0
    softmax = training["softmax", "study"]
    bounded = training["constrained", "study"]
    trained = [(full.scratch.epochs, 4, arm) for arm in (scratch, bounded)]
    trained += [(full.finetune.epochs, 4, scratch), (full.finetune.epochs, 4, head)]
    # From scratch, the second half of LP-FT, and its first.
    for epochs, size, arm in (*trained, (full.reference.epochs, 8, softmax)):
        spent = full.seeds * epochs * (50_000 // size) * float(arm["ms"]) / 1e3
        seconds += spent + save * spent / full.save_seconds
    predicted = {r["kind"]: r for r in rows if r["what"] == "prediction"}
    assert float(predicted["training"]["stage_s"]) == pytest.approx(seconds, rel=0.01)

    measured = {r["kind"]: float(r["stage_s"]) for r in rows if r["what"] == "evaluation" and r["stage_s"]}
    once = {"clean", "clean-attacked", "gaussian", "strong", "smallest-pgd", "smallest-gaussian", "norms", "smoothing"}
    once |= {"gaussian-of-same-norm", "jacobian", "corruptions", "weight spectra", "feature spectra"}
    once |= {"transfer images", "transfer"}
    snapshot = {"snapshot clean-attacked", "snapshot pgd", "snapshot smallest-pgd", "snapshot norms"}
    assert set(measured) == once | {"pgd"} | snapshot
    # Three arms, and softmax regression at its share of their cost; snapshots of one arm.
    share = (float(training["softmax", "study"]["ms"]) / 8) / (float(scratch["ms"]) / 4)
    whole = (3 + share) * full.seeds * (3 * measured["pgd"] + sum(measured[kind] for kind in once))
    whole += full.seeds * sum(measured[kind] for kind in snapshot)
    assert float(predicted["evaluation"]["stage_s"]) == pytest.approx(whole, rel=0.01)
    assert float(predicted["whole"]["hours"]) == pytest.approx((seconds + whole) / 3600, rel=0.01)
    assert {r["missing"] for r in predicted.values()} == {""}
    found = {what: value for what, _, value in gpu_summary.results(tmp_path, "cpu")}
    assert found["study, predicted hours: whole"] == float(predicted["whole"]["hours"])
    assert found["study, images/s of training"] == float(study["images_per_s"])


def test_what_was_left_out_is_missing_from_the_prediction(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FASTLIP_DATA", raising=False)
    monkeypatch.setattr(bench_study.Bench, "measurements", lambda self: [])
    options = [text for setting in SMALL for text in ("--set", setting)]
    sizes = ["--images", "24", "--attacked", "2", "--seconds", "0", "--warm", "1", "--device", "cpu"]
    monkeypatch.setattr(bench_study.Bench, "train", lambda *args, **options: 1 / 0)
    with pytest.raises(SystemExit, match="failed: scratch; softmax; linear; constrained; saving"):
        bench_study.main([*options, *sizes, "--out", str(tmp_path)])
    with (tmp_path / "study_cpu.csv").open(newline="") as f:
        predicted = {r["kind"]: r["missing"] for r in csv.DictReader(f) if r["what"] == "prediction"}
    assert predicted["training"] == "training:softmax training:scratch training:constrained training:linear"
    assert predicted["evaluation"].split()[:3] == ["clean", "clean-attacked", "gaussian"]
    assert len(predicted["whole"].split()) == 4 + 16 + 4


def test_kinds_of_measurements():
    names = {"pgd-linf-0.25": "pgd", "strong-l2-1e-05": "strong", "gaussian-0.02": "gaussian", "norms": "norms"}
    names |= {"gaussian-of-same-norm": "gaussian-of-same-norm", "smallest-pgd": "smallest-pgd"}
    assert {name: bench_study.kind_of(name) for name in names} == names


class Device:
    """A GPU whose steps take 3 ms and whose host takes 5 ms to launch one, as torch.cuda shows it."""

    def __init__(self) -> None:
        self.host = self.free = 0.0  # when the host is there; when the device has done what it was given

    def Event(self, enable_timing):
        return Event(self)

    def synchronize(self):
        self.host = self.free = max(self.host, self.free)

    def _sleep(self, cycles):
        self.free = max(self.host, self.free) + cycles / 2e6

    def step(self):
        # In two halves: the device may begin with the first while the second is launched.
        for _ in range(2):
            self.host += 2.5
            self.free = max(self.host, self.free) + 1.5


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.host, self.device.free)

    def elapsed_time(self, other):
        return other.at - self.at


def test_a_device_that_waits_for_its_host_is_seen(monkeypatch):
    device = Device()
    for name in ("Event", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name), raising=False)
    monkeypatch.setattr(bench_study.time, "perf_counter", lambda: device.host / 1e3)
    clock = bench_study.Clock("cuda", 0.2, warm=3)

    def loop():
        while True:
            device.step()
            clock()

    with pytest.raises(bench_study.Enough):
        loop()
    assert clock.ms == pytest.approx(5.0, rel=0.02)  # the host's
    assert clock.device_ms == pytest.approx(3.0)
    assert clock.worst == pytest.approx(1.0, rel=0.02)
    assert clock.steps == 40
    assert len(clock.alone) == 9
    assert math.isclose(clock.first_s, 6.5e-3)

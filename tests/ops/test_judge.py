"""judge against its definition on every backend, against autograd of the attacks' losses, and its record by a model."""

import copy
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields

import pytest
import torch
from _torch_losses import attack_loss, in_doubt, is_adversarial
from op_inputs import DEVICES, INTERPRETED
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import ops
from fastlip.ops import reference

on_devices = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)
losses = pytest.mark.parametrize("loss", ["dlr", "ce", "margin"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NATIVE = ops.backends["cpu"].name == "native"
#: Cross-entropy is torch's own on the CPU; elsewhere, test_cuda_source.py included, it is computed in double.
OWN_CROSS_ENTROPY = INTERPRETED or "host_cuda_plugin" in sys.modules
#: Around the sizes of vectors, warps and blocks.
CLASSES = [2, 3, 4, 1025] if INTERPRETED else [2, 3, 4, 5, 10, 31, 32, 33, 100, 257, 1000, 8200]
NAN, INF = math.nan, math.inf


@dataclass
class Case:
    """What a call is given, but for the loss."""

    logits: Tensor
    labels: Tensor
    targets: Tensor | None
    toward: Tensor | None
    rounding: float
    record: ops.BestRecord | None

    def on(self, device: str) -> "Case":
        moved = {
            f.name: v.to(device) if isinstance(v := getattr(self, f.name), Tensor) else v
            for f in fields(self)
            if f.name != "record"
        }
        return Case(**moved, record=copied(self.record, device))


def copied(record: ops.BestRecord | None, device: str) -> ops.BestRecord | None:
    if record is None:
        return None
    values = (getattr(record, f.name) for f in fields(record))
    return ops.BestRecord(*(v.clone().to(device) if isinstance(v, Tensor) else v for v in values))


def some_logits(kind: str, batch: int, classes: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    z = torch.randn(batch, classes, generator=g, dtype=torch.float64)
    if kind == "plain":
        return (3 * z).to(dtype)
    if kind == "tied":
        return (1.5 * z).round().to(dtype)
    for value, share in ((-INF, 0.3), (-INF, 0.9), (INF, 0.5), (NAN, 0.1)):  # each in some rows, at some classes
        rows = torch.rand(batch, 1, generator=g) < 0.3
        z = torch.where(rows & (torch.rand(batch, classes, generator=g) < share), value, z)
    z[::5] = -INF
    z[1::7, 1:] = -INF
    z[2::7, 0] = -INF
    return z.to(dtype)


def some_record(kind: str, batch: int, g: torch.Generator) -> ops.BestRecord | None:
    if kind == "none":
        return None
    loss = torch.randn(batch, generator=g, dtype=torch.float64)
    loss[::4] = -INF
    succeeded, unconfirmed, doubtful = torch.rand(3, batch, generator=g) < 0.5
    return ops.BestRecord(
        loss,
        succeeded.clone(),
        unconfirmed.clone() if kind in ("full", "confirming") else None,
        doubtful.clone() if kind in ("full", "doubting") else None,
        early_stop=bool(torch.rand((), generator=g) < 0.5),
    )


def cases(classes: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every way to aim, kind of logits and kind of record."""
    g = torch.Generator().manual_seed(classes)
    batch = 4 if INTERPRETED else 24 if classes <= 1000 else 8
    records = ("full", "none", "bare", "confirming", "doubting")
    for aim in ("away", "targets", "toward"):
        for at, kind in enumerate(("plain", "tied", "extreme")):
            for record in records[at : at + 1] if INTERPRETED else records:
                one, other = torch.randint(classes, (2, batch), generator=g)
                if kind == "extreme":
                    one[::6], other[3::6] = -1, classes
                    one[1::6] = 2**32 + 1  # a class if cut to 32 bits
                rounding = float(torch.rand((), generator=g)) * 0.1
                yield Case(
                    some_logits(kind, batch, classes, dtype, g),
                    one,
                    other if aim == "targets" else None,
                    other if aim == "toward" else None,
                    rounding,
                    some_record(record, batch, g),
                )


def judged(case: Case, loss: str) -> ops.Judgement:
    return ops.judge(
        case.logits,
        case.labels,
        targets=case.targets,
        toward=case.toward,
        loss=loss,
        rounding=case.rounding,
        record=case.record,
    )


def expected(case: Case, loss: str) -> ops.Judgement:
    kept = [] if case.record is None else [getattr(case.record, f.name) for f in fields(case.record)]
    given = (case.labels, case.targets, case.toward, loss, case.rounding)
    return ops.Judgement(*reference.judge(case.logits, *given, *kept))


def assert_same(got: ops.Judgement, want: ops.Judgement, loss: str, device: str) -> None:
    exact = loss != "ce" or not (device == "cuda" or OWN_CROSS_ENTROPY)
    tolerance = {"rtol": 0, "atol": 0} if exact else CROSS_ENTROPY[want.loss.dtype]
    for name, one, other in zip(want._fields, got, want, strict=True):
        assert one.device.type == device
        close = tolerance if one.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            one.cpu(), other, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


#: Of an element computed in double, from torch's in the logits' dtype: a few units in its last place.
CROSS_ENTROPY = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-13, "atol": 1e-14}}


@on_devices
@losses
@dtypes
@pytest.mark.parametrize("classes", CLASSES)
def test_matches_reference(device, classes, dtype, loss):
    for case in cases(classes, dtype):
        moved = case.on(device)
        got = judged(moved, loss)
        want = expected(case, loss)
        assert_same(got, want, loss, device)
        if case.record is not None:
            for f in fields(case.record):
                one, other = getattr(moved.record, f.name), getattr(case.record, f.name)
                if f.name == "loss":
                    close = CROSS_ENTROPY[dtype] if loss == "ce" else {"rtol": 0, "atol": 0}
                    torch.testing.assert_close(one.cpu(), other, **close)
                elif isinstance(other, Tensor):
                    assert torch.equal(one.cpu(), other), f.name


@on_devices
@losses
@pytest.mark.parametrize("classes", [2, 3, 4, 10, 300])
def test_agrees_with_autograd(device, classes, loss):
    """Of the losses as attacks write them, on logits without ties, in float64."""
    g = torch.Generator().manual_seed(classes)
    batch = 5 if INTERPRETED else 40
    logits = 4 * torch.randn(batch, classes, generator=g, dtype=torch.float64)
    labels, wanted = torch.randint(classes, (2, batch), generator=g)
    for aim in ("away", "targets", "toward"):
        targets, toward = (wanted if aim == name else None for name in ("targets", "toward"))
        z = logits.clone().requires_grad_()
        want = attack_loss(loss, z, labels, targets, toward)
        (grad,) = torch.autograd.grad(want.sum(), z)
        moved = Case(logits, labels, targets, toward, 0.01, None).on(device)
        got = judged(moved, loss)
        torch.testing.assert_close(got.loss.cpu(), want.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got.grad.cpu(), grad, rtol=1e-12, atol=1e-13)
        assert torch.equal(got.adversarial.cpu(), is_adversarial(logits, labels, targets))
        assert torch.equal(got.doubtful.cpu(), in_doubt(logits, 0.01))
        assert bool(got.better.all())
    assert 0 < int(in_doubt(logits, 0.01).sum()) < batch or INTERPRETED or classes == 2


@pytest.mark.skipif(OWN_CROSS_ENTROPY, reason="computed in double there")
@dtypes
@pytest.mark.parametrize(("batch", "classes"), [(64, 10), (7, 1000), (1, 2), (3, 17)])
def test_cross_entropy_is_torchs_bit_for_bit(batch, classes, dtype):
    g = torch.Generator().manual_seed(batch)
    for scale in (1e-3, 1.0, 30.0, 1e4):
        logits = (scale * torch.randn(batch, classes, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
        labels = torch.randint(classes, (batch,), generator=g)
        want = functional.cross_entropy(logits, labels, reduction="none")
        (grad,) = torch.autograd.grad(want.sum(), logits)
        got = ops.judge(logits, labels, loss="ce")
        assert torch.equal(got.loss, want)
        assert torch.equal(got.grad, grad)
        reached = ops.judge(logits, labels, targets=labels, loss="ce")
        assert torch.equal(reached.loss, -want)
        assert torch.equal(reached.grad, -grad)


@on_devices
@losses
def test_cross_entropy_far_from_one_is_exact(device, loss):
    """Float32 results are those of float64, rounded once; on the CPU those of torch's cross-entropy are coarser."""
    if loss == "ce" and device == "cpu" and not OWN_CROSS_ENTROPY:
        pytest.skip("on the CPU cross-entropy is computed by torch, whose float32 results are coarser")
    g = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(8, 37, generator=g)
    labels = torch.randint(37, (8,), generator=g)
    got = judged(Case(logits, labels, None, None, 0.0, None).on(device), loss)
    want = expected(Case(logits.double(), labels, None, None, 0.0, None), loss)
    torch.testing.assert_close(got.loss.cpu(), want.loss.float(), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(got.grad.cpu(), want.grad.float(), rtol=1.2e-7, atol=1e-45)


@on_devices
def test_of_equal_logits_the_lower_class_ranks_first(device):
    z = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]], device=device)

    def about(label: int, **aim) -> ops.Judgement:
        return ops.judge(z, torch.tensor([label], device=device), loss="margin", **aim)

    assert about(1).adversarial.tolist() == [False]
    assert about(1).grad.tolist() == [[0, -1, 1, 0, 0]]
    for label in (0, 2, 3, 4):
        assert about(label).adversarial.tolist() == [True], label
        assert about(label).grad.argmax() == 1, label
    assert about(0, targets=torch.tensor([2], device=device)).adversarial.tolist() == [False]
    assert about(0, targets=torch.tensor([1], device=device)).adversarial.tolist() == [True]
    dlr = ops.judge(z, torch.tensor([0], device=device))  # the three largest are equal: nothing to divide by
    assert dlr.loss.tolist() == [2]
    spread = ops.judge(torch.tensor([[2.0, 1.0, 4.0, 1.0]], device=device), torch.tensor([0], device=device))
    assert spread.loss.tolist() == [pytest.approx(2 / 3)]
    # (z_2 - z_0) / (z_2 - z_1): the lower of the two third logits is the one of the spread.
    assert spread.grad.tolist() == [pytest.approx([-1 / 3, 2 / 9, 1 / 3 - 2 / 9, 0])]


@on_devices
@losses
def test_classes_that_do_not_exist_are_not_read(device, loss):
    z = torch.tensor([[1.0, 2.0, 4.0]] * 6, device=device)
    wrong = torch.tensor([-1, 3, 2**31, 2**32, -(2**62), 2**62], device=device)
    right = torch.zeros(6, dtype=torch.int64, device=device)
    for given in ({"labels": wrong}, {"labels": right, "targets": wrong}, {"labels": right, "toward": wrong}):
        record = some_record("full", 6, torch.Generator().manual_seed(0))
        before, record = record, copied(record, device)
        got = ops.judge(z, **given, loss=loss, record=record)
        assert got.loss.isnan().all()
        assert got.grad.isnan().all()
        assert not got.adversarial.any()
        assert not got.better.any()
        for f in fields(record):
            if f.name != "early_stop":
                assert torch.equal(getattr(record, f.name).cpu(), getattr(before, f.name)), f.name
    # Labels say nothing where targets are given.
    assert ops.judge(z, wrong, targets=right, loss=loss).loss.isfinite().all()


@on_devices
@losses
def test_logits_with_a_nan_make_no_decision(device, loss):
    z = torch.tensor([[1.0, NAN, 4.0], [NAN, NAN, NAN], [1.0, 2.0, 4.0]], device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    for aim in ({}, {"targets": labels + 2}, {"toward": labels + 2}):
        got = ops.judge(z, labels, loss=loss, **aim)
        assert got.adversarial.tolist() == [False, False, True]
        assert got.doubtful.tolist() == [True, True, False]
        assert got.loss.isnan().tolist() == [True, True, False]
        assert got.grad.isnan().all(1).tolist() == got.grad.isnan().any(1).tolist() == [True, True, False]


@on_devices
def test_excluded_classes_count_in_no_spread(device):
    z = torch.tensor([[5.0, -INF, 1.0, 3.0, -INF], [5.0, -INF, -INF, 3.0, -INF], [-INF] * 5], device=device)
    labels = torch.tensor([0, 0, 0], device=device)
    got = ops.judge(z, labels, rounding=0.3)
    assert got.loss[:2].tolist() == [-0.5, -2]  # over the three that are left; two have no third
    assert got.doubtful.tolist() == [True, False, True]
    assert ops.judge(z, labels, rounding=0.2).doubtful.tolist() == [False, False, True]
    assert got.adversarial.tolist() == [False, False, False]  # of equal logits the lower class
    assert ops.judge(z, labels + 1).adversarial.tolist() == [True, True, True]
    one = torch.tensor([[-INF, 2.0, -INF], [2.0, -INF, -INF]], device=device)
    alone = ops.judge(one, torch.tensor([1, 0], device=device), loss="margin")
    assert alone.loss.tolist() == [-INF, -INF]
    assert alone.grad.tolist() == [[1, -1, 0], [-1, 1, 0]]


@on_devices
@pytest.mark.parametrize("rounding", [0.0, 0.125, 0.25, 1e30, INF])
def test_doubt_begins_at_twice_the_rounding(device, rounding):
    z = torch.tensor([[4.0, 3.0, 0.0], [4.0, 2.0, 0.0], [4.0, 0.0, 0.0], [4.0, 4.0, 0.0]], device=device)
    got = ops.judge(z, torch.zeros(4, dtype=torch.int64, device=device), rounding=rounding)
    assert got.doubtful.tolist() == [not lead > 2 * rounding * 4 for lead in (1, 2, 4, 0)]


@on_devices
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("aim", ["away", "targets", "toward"])
def test_records_follow_their_iterates(device, aim, early_stop):
    """By a model of one image at a time, over iterates among which losses repeat, are NaN and infinite."""
    g = torch.Generator().manual_seed(3)
    batch = 8 if INTERPRETED else 60
    labels, wanted = torch.randint(4, (2, batch), generator=g)
    none = torch.zeros(batch, dtype=torch.bool)
    start = torch.full((batch,), -INF, dtype=torch.float64)
    record = ops.BestRecord(start, none, none.clone(), none.clone(), early_stop)
    record = copied(record, device)
    best: list[tuple[bool, float] | None] = [None] * batch
    flags = [(False, False)] * batch
    for _ in range(12):
        z = torch.randn(batch, 4, generator=g).mul(1.2).round()
        z[torch.rand(batch, 4, generator=g) < 0.06] = INF
        z[torch.rand(batch, generator=g) < 0.1, 0] = NAN
        targets, toward = (wanted if aim == name else None for name in ("targets", "toward"))
        case = Case(z, labels, targets, toward, 0.1, None)
        got = judged(Case(**{**vars(case.on(device)), "record": record}), "dlr")
        better = []
        for i in range(batch):
            value = float(got.loss[i])
            here = (bool(got.adversarial[i]), -INF if math.isnan(value) else value)
            known = best[i]
            # Adversarial first, then the loss; the first iterate is as good as none where its loss is -inf.
            wins = here > (known or (False, -INF))
            if early_stop and known is not None and known[0]:
                wins = False
            better.append(wins)
            if wins:
                best[i], flags[i] = here, (here[0], bool(got.doubtful[i]))
        assert got.better.tolist() == better
        assert record.loss.tolist() == [-INF if b is None else b[1] for b in best]
        assert record.succeeded.tolist() == [b is not None and b[0] for b in best]
        assert record.unconfirmed.tolist() == [f[0] for f in flags]
        assert record.doubtful.tolist() == [f[1] for f in flags]
    assert 0 < int(record.succeeded.sum())


@on_devices
def test_the_loss_that_is_returned_decides(device):
    """Rounded to the logits' dtype: a rest below it makes no iterate better."""
    z = torch.tensor([[1.0, 3.0, 0.0, 7.0]], device=device)
    label = torch.tensor([3], device=device)
    record = ops.BestRecord(torch.tensor([-INF], dtype=torch.float64, device=device), (label < 0).clone())
    first = ops.judge(z, label, record=record)
    assert first.better.tolist() == [True]
    assert float(record.loss) == float(first.loss) != -4 / 6
    assert ops.judge(z, label, record=record).better.tolist() == [False]


@on_devices
@losses
def test_empty_batches(device, loss):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    flags = none.bool()
    record = ops.BestRecord(none.double(), flags, flags.clone(), flags.clone())
    got = ops.judge(torch.zeros(0, 10, device=device), none, targets=none, loss=loss, record=record)
    assert [tuple(t.shape) for t in got] == [(0,), (0, 10), (0,), (0,), (0,)]
    assert [t.dtype for t in got] == [torch.float32] * 2 + [torch.bool] * 3


@on_devices
@losses
@pytest.mark.parametrize("classes", [10, 2000])
def test_an_image_does_not_depend_on_the_others(device, loss, classes):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(9, classes, generator=g).to(device)
    labels = torch.randint(classes, (9,), generator=g).to(device)
    together = ops.judge(logits, labels, loss=loss, rounding=0.01)
    for i in (0, 4, 8):
        alone = ops.judge(logits[i : i + 1], labels[i : i + 1], loss=loss, rounding=0.01)
        for one, every in zip(alone, together, strict=True):
            assert torch.equal(one, every[i : i + 1])


@pytest.mark.skipif(not NATIVE, reason="others have no threads of their own")
@losses
def test_threads_do_not_change_the_result(loss):
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(101, 2000, generator=g), torch.randint(2000, (101,), generator=g)
    one = ops.judge(logits, labels, loss=loss)
    torch.set_num_threads(2)
    try:
        two = ops.judge(logits, labels, loss=loss)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@on_devices
@losses
def test_any_layout(device, loss):
    g = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(6, 10, generator=g).to(device), torch.arange(6).to(device)
    want = ops.judge(logits, labels, targets=labels, loss=loss)
    spread = torch.stack([labels, labels], 1)[:, 0]
    for z in (logits.t().contiguous().t(), logits.repeat_interleave(2, 0)[::2], logits.repeat(1, 2)[:, :10]):
        got = ops.judge(z, spread, targets=spread, loss=loss)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got.grad.is_contiguous()


@on_devices
@losses
def test_logits_are_taken_as_a_constant(device, loss):
    """Whether they require grad or not, and without a word from autograd."""
    x = torch.ones(3, 4, device=device, requires_grad=True)
    logits = x * torch.arange(4, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    record = ops.BestRecord(torch.zeros(3, dtype=torch.float64, device=device), labels.bool())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.judge(logits, labels, loss=loss, record=record)
        assert not any(t.requires_grad for t in (*got, record.loss))
        (grad,) = torch.autograd.grad(logits, x, got.grad)
    assert torch.equal(grad, got.grad * torch.arange(4, device=device))
    assert torch.is_grad_enabled()


@on_devices
@losses
def test_one_call_of_the_dispatcher(device, loss):
    """Is all that a step of an attack pays for it, whether logits require grad or not."""
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    record = copied(some_record("full", 3, torch.Generator().manual_seed(0)), device)
    calls = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    for logits in (torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device, requires_grad=True)):
        with Counting():
            ops.judge(logits, labels, targets=labels, loss=loss, record=record)
    assert calls == ["fastlip.judge.default"] * 2


FLAGS = torch.zeros(3, dtype=torch.bool)


def fresh(**changes) -> ops.BestRecord:
    kept = {"loss": torch.zeros(3, dtype=torch.float64)}
    kept |= {name: torch.zeros(3, dtype=torch.bool) for name in ("succeeded", "unconfirmed", "doubtful")}
    return ops.BestRecord(**(kept | changes))


WRONG = {
    "logits are a list": ({"logits": [[1.0, 2.0]]}, TypeError, "logits must be a float32 or float64 tensor, got list"),
    "logits are float16": (
        {"logits": torch.zeros(3, 4).half()},
        TypeError,
        "logits must be a float32 or float64 tensor, got [3, 4] float16 on cpu",
    ),
    "logits are integers": ({"logits": torch.zeros(3, 4).long()}, TypeError, "logits must be a float32 or float64"),
    "logits are one row": (
        {"logits": torch.zeros(3)},
        ValueError,
        "logits must be [B, C] with at least 2 classes, got [3]",
    ),
    "one class": ({"logits": torch.zeros(3, 1)}, ValueError, "at least 2 classes, got [3, 1]"),
    "no class": ({"logits": torch.zeros(3, 0)}, ValueError, "at least 2 classes, got [3, 0]"),
    "labels are a list": ({"labels": [0, 1, 2]}, TypeError, "labels must be a tensor of int64, got list"),
    "labels are int32": (
        {"labels": torch.zeros(3).int()},
        TypeError,
        "labels must be a tensor of int64, got [3] int32 on cpu",
    ),
    "labels are fewer": (
        {"labels": torch.zeros(2).long()},
        ValueError,
        "labels must have shape [3] on cpu, got [2] int64 on cpu",
    ),
    "labels are a column": ({"labels": torch.zeros(3, 1).long()}, ValueError, "labels must have shape [3] on cpu"),
    "labels are elsewhere": (
        {"labels": torch.zeros(3, device="meta").long()},
        ValueError,
        "labels must have shape [3] on cpu, got [3] int64 on meta",
    ),
    "targets are floats": ({"targets": torch.zeros(3)}, TypeError, "targets must be a tensor of int64"),
    "targets are fewer": ({"targets": torch.zeros(1).long()}, ValueError, "targets must have shape [3] on cpu"),
    "toward is bool": ({"toward": FLAGS}, TypeError, "toward must be a tensor of int64"),
    "toward is elsewhere": (
        {"toward": torch.zeros(3, device="meta").long()},
        ValueError,
        "toward must have shape [3] on cpu",
    ),
    "both aims": (
        {"targets": torch.zeros(3).long(), "toward": torch.zeros(3).long()},
        ValueError,
        "give either targets or toward",
    ),
    "loss is unknown": ({"loss": "hinge"}, ValueError, "loss must be one of dlr, ce, margin, got 'hinge'"),
    "loss is a number": ({"loss": 3}, ValueError, "loss must be one of dlr, ce, margin, got 3"),
    "rounding is negative": ({"rounding": -1e-9}, ValueError, "rounding must be at least 0, got -1e-09"),
    "rounding is a word": ({"rounding": "1e-3"}, TypeError, "rounding must be a float, got str"),
    "rounding is NaN": ({"rounding": NAN}, ValueError, "rounding must be at least 0, got nan"),
    "record is a tuple": ({"record": (1, 2)}, TypeError, "record must be a BestRecord or None, got tuple"),
    "record has no loss": (
        {"record": fresh(loss=None)},
        TypeError,
        "record.loss must be a tensor of float64, got NoneType",
    ),
    "record says nothing": (
        {"record": fresh(loss=None, succeeded=None, unconfirmed=None, doubtful=None)},
        TypeError,
        "record.loss must be a tensor of float64",
    ),
    "record has no success": (
        {"record": fresh(succeeded=None)},
        TypeError,
        "record.succeeded must be a tensor of bool",
    ),
    "record's loss is float32": (
        {"record": fresh(loss=torch.zeros(3))},
        TypeError,
        "record.loss must be a tensor of float64, got [3] float32 on cpu",
    ),
    "record's loss is spread": (
        {"record": fresh(loss=torch.zeros(6, dtype=torch.float64)[::2])},
        ValueError,
        "record.loss must be contiguous, because it is changed in place",
    ),
    "record's success is uint8": (
        {"record": fresh(succeeded=torch.zeros(3, dtype=torch.uint8))},
        TypeError,
        "record.succeeded must be a tensor of bool",
    ),
    "record is shorter": (
        {"record": fresh(unconfirmed=torch.zeros(2, dtype=torch.bool))},
        ValueError,
        "record.unconfirmed must have shape [3] on cpu",
    ),
    "record is elsewhere": (
        {"record": fresh(doubtful=torch.zeros(3, dtype=torch.bool, device="meta"))},
        ValueError,
        "record.doubtful must have shape [3] on cpu",
    ),
    "record's doubts are spread": (
        {"record": fresh(doubtful=torch.zeros(6, dtype=torch.bool)[::2])},
        ValueError,
        "record.doubtful must be contiguous",
    ),
    "flags are one": (
        {"record": fresh(succeeded=FLAGS, unconfirmed=FLAGS)},
        ValueError,
        "record.unconfirmed must not share its memory with record.succeeded",
    ),
    "other flags are one": (
        {"record": fresh(unconfirmed=FLAGS, doubtful=FLAGS)},
        ValueError,
        "record.doubtful must not share its memory with record.unconfirmed",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_argument(wrong, error, message):
    """And nothing was written."""
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    record = fresh(loss=torch.full((3,), -INF, dtype=torch.float64))
    given = {"logits": z, "labels": torch.zeros(3, dtype=torch.int64), "record": record} | wrong
    before = copy.deepcopy(given["record"])
    with pytest.raises(error) as raised:
        ops.judge(given.pop("logits"), given.pop("labels"), **given)
    assert message in str(raised.value)
    if isinstance(before, ops.BestRecord):
        for f in fields(before):
            one, other = getattr(given["record"], f.name), getattr(before, f.name)
            assert one is other or one.is_meta or torch.equal(one, other), f.name


@pytest.mark.skipif(not NATIVE, reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, "logits must be [B, C] with at least 2 classes"),
        ({0: torch.zeros(3, 1)}, "logits must be [B, C] with at least 2 classes"),
        ({0: torch.zeros(3, 4).half()}, "logits must be float32 or float64"),
        ({0: torch.zeros(3, 4).long()}, "logits must be float32"),
        ({0: torch.zeros(4, 3).t()}, "logits must be contiguous"),
        ({1: torch.zeros(2).long()}, "labels must be contiguous [B] on logits' device, int64"),
        ({1: torch.zeros(3).int()}, "labels must be contiguous [B] on logits' device, int64"),
        ({1: torch.zeros(6).long()[::2]}, "labels must be contiguous [B] on logits' device, int64"),
        ({2: torch.zeros(4).long()}, "targets must be contiguous [B] on logits' device, int64"),
        ({2: None, 3: torch.zeros(3, 1).long()}, "toward must be contiguous [B] on logits' device, int64"),
        ({3: torch.zeros(3).long()}, "give either targets or toward"),
        ({4: "hinge"}, "loss must be one of dlr, ce, margin, got hinge"),
        ({5: -1.0}, "rounding must be at least 0"),
        ({5: NAN}, "rounding must be at least 0"),
        ({6: torch.zeros(3)}, "best_loss must be contiguous [B] on logits' device, float64"),
        ({6: None}, "best_loss and succeeded go together"),
        ({7: None}, "best_loss and succeeded go together"),
        ({6: None, 7: None}, "unconfirmed and best_doubtful need best_loss and succeeded"),
        ({7: torch.zeros(3).to(torch.uint8)}, "succeeded must be contiguous [B] on logits' device, bool"),
        ({8: torch.zeros(2).bool()}, "unconfirmed must be contiguous [B] on logits' device, bool"),
        ({9: torch.zeros(3, 1).bool()}, "best_doubtful must be contiguous [B] on logits' device, bool"),
        ({8: FLAGS, 9: FLAGS}, "must not share their memory"),
        ({7: FLAGS, 9: FLAGS}, "must not share their memory"),
    ],
)
def test_direct_calls_are_checked_too(change, message):
    kept = [torch.full((3,), -INF, dtype=torch.float64), *(torch.zeros(3, dtype=torch.bool) for _ in range(3))]
    labels = torch.zeros(3, dtype=torch.int64)
    arguments = [torch.rand(3, 4), labels, labels + 1, None, "dlr", 0.0, *kept, True]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError) as raised:
        torch.ops.fastlip.judge(*arguments)
    assert message in str(raised.value)
    assert kept[0].isneginf().all()


@on_devices
def test_opcheck(device):
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2], device=device)
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(3, 5, generator=g, dtype=torch.float64).to(dtype).to(device)
        record = copied(some_record("full", 3, g), device)
        kept = [getattr(record, f.name) for f in fields(record)]
        judge = torch.ops.fastlip.judge.default
        torch.library.opcheck(judge, (logits, labels, None, None, "dlr", 1e-3, *kept))
        torch.library.opcheck(judge, (logits, labels, labels + 1, None, "ce", 0.0, *kept[:2], None, None, False))
        torch.library.opcheck(judge, (logits.requires_grad_(), labels, None, labels + 1, "margin", 0.0))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@losses
def test_calls_can_be_traced(mode, loss):
    """And what is traced takes other batches, and updates the record that it is given."""

    def step(logits: Tensor, labels: Tensor, best_loss: Tensor, succeeded: Tensor) -> tuple[Tensor, ...]:
        record = ops.BestRecord(best_loss, succeeded, early_stop=False)
        return tuple(ops.judge(logits, labels, loss=loss, rounding=0.1, record=record))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(batch)
        labels = torch.randint(5, (batch,), generator=g)
        start = torch.zeros(batch, dtype=torch.float64)
        return torch.randn(5, batch, generator=g).t(), labels, start, torch.zeros(batch, dtype=torch.bool)

    traced = make_fx(step, tracing_mode=mode)(*inputs(3))
    for batch in (3, 7) if mode == "symbolic" else (3,):
        given, others = inputs(batch), inputs(batch)
        for one, other in zip(traced(*given), step(*others), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(given, others, strict=True):
            assert torch.equal(one, other)


@on_devices
@losses
def test_torch_compile_keeps_it_in_one_graph(device, loss):
    """With the model before it and its backward pass after; another batch size compiles nothing anew."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=g).to(device)

    def step(x: Tensor, labels: Tensor, best_loss: Tensor, succeeded: Tensor) -> tuple[Tensor, ...]:
        logits = x @ weight
        got = ops.judge(logits, labels, loss=loss, record=ops.BestRecord(best_loss, succeeded))
        return (*got, got.grad @ weight.t())

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for batch in (3, 8, 5):
        x = torch.randn(batch, 6, generator=g).to(device).requires_grad_()
        labels = torch.randint(5, (batch,), generator=g).to(device)
        kept = [
            (torch.zeros(batch, dtype=torch.float64, device=device), torch.zeros_like(labels, dtype=torch.bool))
            for _ in range(2)
        ]
        for one, other in zip(compiled(x, labels, *kept[0]), step(x, labels, *kept[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert torch.equal(kept[0][1], kept[1][1])
        torch.testing.assert_close(kept[0][0], kept[1][0], rtol=1e-6, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@losses
@pytest.mark.parametrize("classes", [10, 2000])
def test_nothing_synchronises_and_a_graph_replays_it(classes, loss):
    g = torch.Generator().manual_seed(0)
    iterates = torch.randn(5, 33, classes, generator=g).cuda()
    labels = torch.randint(classes, (33,), generator=g).cuda()
    fresh_record = some_record("full", 33, g)
    eager, captured = copied(fresh_record, "cuda"), copied(fresh_record, "cuda")
    z = iterates[0].clone()
    ops.judge(z, labels, loss=loss, record=copied(fresh_record, "cuda"))  # what is compiled or loaded on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.judge(z, labels, loss=loss, rounding=0.01, record=captured)
    for iterate in iterates:
        z.copy_(iterate)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = ops.judge(iterate, labels, loss=loss, rounding=0.01, record=eager)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
        for f in fields(eager):
            if f.name != "early_stop":
                assert torch.equal(getattr(captured, f.name), getattr(eager, f.name)), f.name

import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastlip.study.errors import StudyError
from fastlip.study.settings.training import Schedule
from fastlip.study.training.train import _augment, _cut_out, train
from fastlip.study.training.unfinished import RESUMING

SCHEDULE = Schedule(images=40, epochs=3, max_lr=0.1, batch_size=16)
#: The same with all that a recipe may add.
RECIPE = replace(SCHEDULE, label_smoothing=0.1, cutout=6, averaging=0.8)


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )


def data():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 4
    images = torch.randint(0, 60, (40, 3, 16, 16), generator=generator) + 60 * labels[:, None, None, None] // 2
    return images.to(torch.uint8), labels


def run(
    model,
    path,
    *,
    schedule=SCHEDULE,
    stop_at=None,
    precision=torch.float32,
    seed=5,
    compiled=False,
    see=None,
    told=None,
    **more,
):
    def progress(done, total, note):
        if told is not None:
            told.append((done, note))
        if see is not None:
            see(done)
        if done == stop_at:
            raise KeyboardInterrupt

    return train(
        model,
        *data(),
        schedule,
        seed=seed,
        precision=precision,
        state_path=path,
        save_seconds=0,
        progress=progress,
        compiled=compiled,
        **more,
    )


@pytest.mark.parametrize("schedule", [SCHEDULE, RECIPE])
@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_resuming_ends_in_the_same_weights_bit_for_bit(tmp_path, stop_at, schedule):
    whole, parts = tiny(), tiny()
    expected = run(whole, tmp_path / "a.pt", schedule=schedule)
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "b.pt", stop_at=stop_at, schedule=schedule)
    parts = tiny()  # a new process knows nothing but the file
    assert run(parts, tmp_path / "b.pt", schedule=schedule) == expected
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_that_goes_on_tells_from_which_step(tmp_path):
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "state.pt", stop_at=3, told=first)
    run(tiny(), tmp_path / "state.pt", told=second)
    assert first[0][0] == 1
    assert second[:2] == [(2, RESUMING), first[2]]
    assert RESUMING not in [note for _, note in first + second[1:]]


def test_what_a_network_draws_depends_on_the_seed_alone(tmp_path):
    """Neither on what else the process has drawn, nor on interruptions."""

    def dropping():
        return nn.Sequential(*tiny()[:-1], nn.Dropout(0.5), tiny()[-1])

    whole, parts, other = dropping(), dropping(), dropping()
    before = torch.get_rng_state()
    run(whole, tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.rand(7)
        with pytest.raises(KeyboardInterrupt):
            run(parts, tmp_path / "b.pt", stop_at=3)
        torch.rand(5)
        parts = dropping()
        run(parts, tmp_path / "b.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    run(other, tmp_path / "c.pt", seed=6)
    assert not torch.equal(whole[-1].weight, other[-1].weight)


def copied(model):
    return {k: v.detach().double().clone() for k, v in model.state_dict().items() if v.is_floating_point()}


def test_the_result_and_the_snapshots_are_averages_of_weights_and_statistics(tmp_path):
    schedule = Schedule(images=40, epochs=4, max_lr=0.1, batch_size=10, averaging=0.5, snapshots=(2,))
    model, plain = tiny(), tiny()
    seen, kept = [], []
    run(
        model, tmp_path / "a.pt", schedule=schedule, see=lambda done: seen.append(copied(model)),
        keep=lambda epoch: kept.append((epoch, copied(model))),
    )  # fmt: skip
    averages = [seen[0]]
    for t, now in enumerate(seen[1:], 1):
        decay = min(0.5, t / (t + 9))
        averages.append({k: decay * averages[-1][k] + (1 - decay) * v for k, v in now.items()})
    ((epoch, snapshot),) = kept
    assert (epoch, len(seen)) == (2, 16)
    for name, value in copied(model).items():
        torch.testing.assert_close(value, averages[15][name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(snapshot[name], averages[7][name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, seen[-1][name])
    # The average takes no part in the training itself.
    run(plain, tmp_path / "b.pt", schedule=replace(schedule, averaging=0.0))
    assert all(torch.equal(seen[-1][name], value) for name, value in copied(plain).items())


def test_an_average_leaves_what_is_not_trained_as_it_is(tmp_path):
    model, before = tiny(), tiny().state_dict()
    run(model, tmp_path / "a.pt", schedule=RECIPE, parts=[model[-1]])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"5.weight", "5.bias"}


def test_the_head_may_be_any_module(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Flatten()]
    model = nn.Sequential(*parts)
    before = copied(model)
    schedule = Schedule(images=40, epochs=1, max_lr=0.1, head_lr=1e-6, weight_decay=0.0, batch_size=8)
    run(model, tmp_path / "a.pt", schedule=schedule, head=model[3])
    moved = {name: (value - before[name]).abs().max().item() for name, value in copied(model).items()}
    assert max(moved["3.weight"], moved["3.bias"]) < 1e-5
    assert min(moved["0.weight"], moved["0.bias"]) > 1e-4


class Traffic(TorchFunctionMode):
    """Counts operations that make the host wait for a GPU: values read on the host, and copies to and from it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        waits = name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "cuda", "nonzero")
        self.count += waits or (name == "to" and any(isinstance(a, torch.device | str) for a in args))
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_make_the_host_wait(tmp_path):
    schedule = Schedule(images=40, epochs=30, max_lr=0.1, batch_size=10, cutout=4, averaging=0.9)
    seen = []
    with Traffic() as traffic:
        train(
            tiny(), *data(), schedule, seed=5, precision=torch.float32, state_path=tmp_path / "a.pt", save_seconds=1e9,
            progress=lambda done, total, note: seen.append(traffic.count),
        )  # fmt: skip
    steps = {done: b - a for done, (a, b) in enumerate(pairwise(seen), 2)}
    # But for the first and the last step of an epoch, and a look at the loss from time to time.
    assert {done for done, count in steps.items() if count} == {d for d in steps if d % 4 in (0, 1) or d == 50}
    assert len(seen) == 120


def test_training_learns_and_depends_on_its_seed(tmp_path):
    schedule = Schedule(images=40, epochs=20, max_lr=0.3, head_lr=1.0, batch_size=20, crop=1)
    first, second = tiny(), tiny()
    history = run(first, tmp_path / "a.pt", schedule=schedule)
    assert history.accuracy[-1] > 0.8
    assert len(history.loss) == 20
    assert not first.training
    run(second, tmp_path / "b.pt", schedule=schedule, seed=6)
    assert not torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 9])
def test_runs_of_a_few_steps_have_a_schedule(tmp_path, steps):
    schedule = Schedule(images=2 * steps, epochs=1, max_lr=0.1, batch_size=2)
    pixels, labels = data()
    seen = []
    train(
        tiny(),
        pixels[: 2 * steps],
        labels[: 2 * steps],
        schedule,
        seed=0,
        precision=torch.float32,
        state_path=tmp_path / "a.pt",
        save_seconds=60,
        progress=lambda done, total, note: seen.append((done, total)),
    )
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_bfloat16_trains_float32_weights(tmp_path):
    model = tiny()
    run(model, tmp_path / "a.pt", precision=torch.bfloat16)
    assert model[0].weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_compiled_network_trains_like_the_same_network_and_resumes(tmp_path, precision):
    plain, compiled, parts = tiny(), tiny(), tiny()
    expected = run(plain, tmp_path / "a.pt", precision=precision)
    found = run(compiled, tmp_path / "b.pt", precision=precision, compiled=True)
    # Eager operations round each result to bfloat16; a compiled one rounds less often.
    assert found.loss == pytest.approx(expected.loss, rel=1e-4 if precision == torch.float32 else 2e-2)
    a, b = (torch.cat([v.double().flatten() for v in m.state_dict().values()]) for m in (plain, compiled))
    assert (a - b).norm() < (1e-4 if precision == torch.float32 else 2e-2) * a.norm()
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "c.pt", precision=precision, compiled=True, stop_at=3)
    parts = tiny()
    assert run(parts, tmp_path / "c.pt", precision=precision, compiled=True) == found
    for (name, x), y in zip(compiled.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    schedule = Schedule(images=40, epochs=1, max_lr=1e30, batch_size=8, warmup=0.1)
    with pytest.raises(StudyError, match="not finite"):
        run(tiny(), tmp_path / "a.pt", schedule=schedule)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b"\x80\x02K\x01."])
def test_a_damaged_state_is_one_line_and_stays(tmp_path, damage):
    path = tmp_path / "a.pt"
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), path, stop_at=3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StudyError, match=r"a\.pt is damaged.*delete it"):
        run(tiny(), path)
    assert path.exists()


def test_any_changed_byte_of_a_state_is_found(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), path, stop_at=3)
    whole = path.read_bytes()
    weight = whole.rindex(b"fastlip.study") + 200
    for at in (*range(weight, len(whole), len(whole) // 50), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StudyError, match=r"a\.pt is damaged.*SHA-256.*delete it and run the same command again"):
            run(tiny(), path)
    path.unlink()
    assert run(tiny(), path) == run(tiny(), tmp_path / "b.pt")


def test_a_state_of_an_earlier_version_goes_on(tmp_path):
    expected = run(tiny(), tmp_path / "a.pt")
    path = tmp_path / "b.pt"
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), path, stop_at=3)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"PK") :])
    assert set(torch.load(path, weights_only=True)) >= {"model", "done"}
    assert run(tiny(), path) == expected
    # Of these, what is not a state is found all the same.
    for change in ({"done": 10**6}, {"loss": [1.0] * 5}, {"done": "x"}, {"totals": torch.zeros(7)}):
        torch.save(torch.load(io.BytesIO(data[data.index(b"PK") :]), weights_only=True) | change, path)
        with pytest.raises(StudyError, match=r"b\.pt is damaged.*delete it"):
            run(tiny(), path)


def test_augmentation_shifts_and_flips_each_image_as_told():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    shift = torch.tensor([[0, 1], [0, -1]])
    found = _augment(x, shift, torch.tensor([True, False]))
    assert torch.equal(found[0], x[0].flip(2))
    # One row down and one column to the left, mirrored at the border without repeating it.
    assert torch.equal(found[1], x[1][:, [1, 2, 3, 2]][:, :, [1, 0, 1, 2]])


@pytest.mark.parametrize(("side", "rows", "columns"), [(2, (0, 1), (4, 6)), (3, (0, 2), (4, 7)), (4, (0, 2), (3, 7))])
def test_cutout_greys_a_square_as_far_as_it_lies_inside(side, rows, columns):
    x = torch.full((2, 3, 6, 8), 7, dtype=torch.uint8)
    found = _cut_out(x, torch.tensor([[0, 3], [5, 3]]), side)
    expected = x.clone()
    expected[0, :, slice(*rows), slice(*columns)] = 128
    assert torch.equal(found[0], expected[0])
    assert int((found[1] == 128).sum()) == 3 * side * side


def test_cutout_changes_nothing_but_the_pixels(tmp_path):
    """The order of the images, shifts and flips are those of training without cutout."""
    plain, cut = tiny(), tiny()
    run(plain, tmp_path / "a.pt", schedule=replace(SCHEDULE, epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastlip.study.training.train._cut_out", lambda x, centre, side: x)
        run(cut, tmp_path / "b.pt", schedule=replace(SCHEDULE, epochs=1, cutout=4))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), cut.state_dict().values(), strict=True))

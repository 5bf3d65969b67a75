"""Networks whose layers' norms are kept below a bound in training."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlip import layer_norms, lipschitz_bound
from fastlip.study.settings.training import Schedule
from fastlip.study.training.norm_bound import NormBound
from fastlip.study.training.train import train

SHAPE = (3, 16, 16)
BOUND = 0.6
#: Relative width of certified intervals.
RTOL = 1e-2

SCHEDULE = Schedule(images=40, epochs=3, max_lr=0.1, batch_size=16)
AVERAGED = replace(SCHEDULE, label_smoothing=0.1, averaging=0.8)


def seeded(*modules):
    """The modules that functions return, drawn from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(make() for make in modules))


def tiny():
    layers = [lambda: nn.Conv2d(3, 8, 3, 2), lambda: nn.BatchNorm2d(8), nn.ReLU, lambda: nn.Conv2d(8, 8, 3)]
    return seeded(*layers, nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(8, 4))


def before_the_layer():
    """A BatchNorm behind a ReLU, which is folded into no layer."""
    layers = [lambda: nn.Conv2d(3, 8, 3, 2), nn.ReLU, lambda: nn.BatchNorm2d(8), lambda: nn.Conv2d(8, 8, 3)]
    return seeded(*layers, nn.ReLU, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(8, 4))


def run(model, path, *, schedule=SCHEDULE, stop_at=None, norm_bound=BOUND):
    labels = torch.arange(40) % 4
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 60, (40, *SHAPE), generator=generator) + 30 * labels[:, None, None, None]

    def progress(done, total, note):
        if done == stop_at:
            raise KeyboardInterrupt

    return train(
        model,
        images.to(torch.uint8),
        labels,
        schedule,
        seed=5,
        precision=torch.float32,
        state_path=path,
        save_seconds=0,
        progress=progress,
        norm_bound=norm_bound,
    )


@pytest.mark.parametrize("schedule", [SCHEDULE, AVERAGED])
@pytest.mark.parametrize("network", [tiny, before_the_layer])
def test_every_layer_ends_within_the_bound_alone_and_with_its_batchnorm(tmp_path, network, schedule):
    model, free = network(), network()
    run(model, tmp_path / "a.pt", schedule=schedule)
    run(free, tmp_path / "b.pt", schedule=schedule, norm_bound=None)
    for folded in (True, False):
        norms = layer_norms(model, SHAPE, fold_batchnorm=folded)
        bounds = {name: 1.0 if isinstance(model.get_submodule(name), nn.BatchNorm2d) else BOUND for name in norms}
        assert all(interval.upper <= bounds[name] * (1 + RTOL) for name, interval in norms.items()), norms
        assert any(interval.lower > BOUND for interval in layer_norms(free, SHAPE, fold_batchnorm=folded).values())
    assert lipschitz_bound(model, SHAPE).log10_upper < lipschitz_bound(free, SHAPE).log10_upper


def test_a_batchnorm_is_brought_to_the_bound_by_its_own_factors(tmp_path):
    """Without that it would undo whatever is done to the layer in front of it."""
    model = tiny()
    model[1].weight.data.fill_(50.0)
    run(model, tmp_path / "a.pt")
    factors = model[1].weight.abs() / (model[1].running_var + model[1].eps).sqrt()
    assert 0.5 < factors.max() <= 1 + 1e-6
    # Their signs are kept.
    model = tiny()
    model[1].weight.data.fill_(-50.0)
    run(model, tmp_path / "b.pt")
    assert (model[1].weight < 0).all()


def test_the_weights_are_left_plain(tmp_path):
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    run(model, tmp_path / "a.pt")
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert [type(m) for m in model.modules()][1:] == [type(m) for m in tiny().modules()][1:]
    assert not model.training


def test_a_bound_that_no_layer_reaches_changes_nothing(tmp_path):
    model, free = (nn.Sequential(*(m for m in tiny() if not isinstance(m, nn.BatchNorm2d))) for _ in range(2))
    run(model, tmp_path / "a.pt", norm_bound=1e6)
    run(free, tmp_path / "b.pt", norm_bound=None)
    torch.testing.assert_close(model.state_dict(), free.state_dict())


@pytest.mark.parametrize("schedule", [SCHEDULE, AVERAGED])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_resuming_ends_in_the_same_weights_bit_for_bit(tmp_path, stop_at, schedule):
    whole, parts = tiny(), tiny()
    expected = run(whole, tmp_path / "a.pt", schedule=schedule)
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "b.pt", stop_at=stop_at, schedule=schedule)
    parts = tiny()  # a new process knows nothing but the file
    assert run(parts, tmp_path / "b.pt", schedule=schedule) == expected
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_started_constraint_depends_on_its_state_alone():
    """As that of a new process does, which knows the state dict and nothing else."""
    x = torch.rand(4, *SHAPE)
    one, other = tiny(), tiny()
    kept, again = (NormBound(model, SHAPE, BOUND, seed) for model, seed in ((one, 0), (other, 1)))
    for _ in range(3):
        kept.restart(one.train())
        one(x).sum().backward()
        with torch.no_grad():
            for p in one.parameters():
                p -= 0.1 * p.grad
        kept.project()
    other.load_state_dict(one.state_dict())
    for model, constraint in ((one, kept), (other, again)):
        constraint.restart(model.train())
    assert torch.equal(one(x), other(x))
    for name, a in one.state_dict().items():
        assert torch.equal(a, other.state_dict()[name]), name

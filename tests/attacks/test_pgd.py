import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks._batch import new_batch
from fastlip.attacks._loop import AttackLoop
from fastlip.attacks._pgd import PgdStep

NORMS = ["linf", "l2", "l1"]
#: Radii at which about half of the images of ``cnn_problem`` fall.
EPS = {"linf": 0.065, "l2": 1.0, "l1": 6.7}
ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def length(d, norm):
    return torch.linalg.vector_norm(d.double().flatten(1), ORDER[norm], dim=1)


class Counting(nn.Module):
    """Counts the images that pass through."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x):
        self.images += len(x)
        return self.model(x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["dlr", "margin", "ce"])
def test_reaches_the_optimum_of_a_linear_model(linear_problem, norm, loss):
    model, inputs, labels = linear_problem(classes=2)
    with torch.no_grad():
        away = model.weight[1 - labels] - model.weight[labels]
        dual = torch.linalg.vector_norm(away.double(), {"linf": 1, "l2": 2, "l1": torch.inf}[norm], dim=1)
        before = (inputs.flatten(1) * away).sum(1).double()
        # Radii at which no decision changes yet, and far from the box.
        eps = torch.minimum(0.9 * -before / dual, torch.tensor(0.3, dtype=torch.float64))
        call = {"norm": norm, "eps": eps, "step_size": eps / 4, "steps": 40, "loss": loss, "sparsity": 1.0}
        found = attacks.pgd(model, inputs, labels, generator=gen(), **call)
        gained = (found.flatten(1).double() * away).sum(1) - before
    torch.testing.assert_close(gained, eps * dual, rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stays_in_ball_and_box(cnn_problem, norm, dtype):
    model, inputs, _ = cnn_problem
    model, inputs = model.to(dtype), inputs.to(dtype)
    labels = model(inputs).argmax(1)
    eps = torch.linspace(0, 3, len(inputs)) * EPS[norm]
    found = attacks.pgd(model, inputs, labels, norm=norm, eps=eps, steps=5, restarts=2, generator=gen())
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (length(found.double() - inputs.double(), norm) <= eps.double() * (1 + 1e-6) + 1e-5).all()
    assert torch.equal(found[0], inputs[0])


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_are_nested(cnn_problem, norm):
    model, inputs, labels = cnn_problem
    fallen, losses = [], []
    for restarts in (1, 2, 4):
        found = attacks.pgd(
            model, inputs, labels, norm=norm, eps=EPS[norm], steps=6, restarts=restarts, generator=gen()
        )
        logits = model(found).detach()
        fallen.append(logits.argmax(1) != labels)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        top = logits.topk(3, dim=1).values
        losses.append((logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own) / (top[:, 0] - top[:, 2]))
    for fewer, more in ((0, 1), (1, 2)):
        assert (fallen[more] | ~fallen[fewer]).all()
        standing = ~fallen[more]
        assert (losses[more][standing] >= losses[fewer][standing] - 1e-5).all()
    assert not fallen[-1].all(), "the comparison needs images that stand"
    assert fallen[-1].any(), "and images that fall"


def test_default_loss_ignores_the_scale_of_logits(cnn_problem):
    model, inputs, labels = cnn_problem
    small = attacks.pgd(model, inputs, labels, norm="l2", eps=0.8, generator=gen())
    large = attacks.pgd(lambda x: 64 * model(x), inputs, labels, norm="l2", eps=0.8, generator=gen())
    assert torch.equal(small, large)
    assert not torch.equal(small, inputs)


def test_loss_is_the_margin_below_three_classes(linear_problem):
    model, inputs, labels = linear_problem(classes=2)
    one = attacks.pgd(model, inputs, labels, eps=0.01, generator=gen())
    other = attacks.pgd(model, inputs, labels, eps=0.01, loss="margin", generator=gen())
    assert torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
def test_result_does_not_depend_on_the_batch(linear_problem, norm):
    model, inputs, labels = linear_problem()
    ids = torch.arange(100, 108)
    call = {"norm": norm, "eps": EPS[norm] / 4, "steps": 5, "restarts": 2}
    together = attacks.pgd(model, inputs, labels, ids=ids, generator=gen(), **call)
    order = torch.tensor([5, 2, 7])
    apart = attacks.pgd(model, inputs[order], labels[order], ids=ids[order], generator=gen(), **call)
    assert torch.equal(together[order], apart)
    other = attacks.pgd(model, inputs, labels, ids=ids + 1, generator=gen(), **call)
    assert not torch.equal(together, other)


def test_leaves_the_model_as_it_was(cnn_problem):
    model, inputs, labels = cnn_problem
    model.train()
    model[1].eval()  # a frozen batch normalisation in a model that trains
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    attacks.pgd(model, inputs, labels, eps=0.02, restarts=2, generator=gen())
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[-1].weight.grad is None


def test_modes_come_back_after_an_error(cnn_problem):
    model, inputs, labels = cnn_problem
    model.train()
    with pytest.raises(RuntimeError):
        attacks.pgd(model, inputs[:, :2], labels, eps=0.1)
    assert all(m.training for m in model.modules())


def test_without_generator_only_keys_are_drawn(cnn_problem):
    model, inputs, labels = cnn_problem
    torch.manual_seed(0)
    attacks.pgd(model, inputs, labels, eps=1e-4, restarts=3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        torch.randint(2**63 - 1, (1,))
    assert torch.equal(torch.get_rng_state(), after)


def test_misclassified_and_inactive_images_come_back_unchanged(cnn_problem):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:4] = (labels[:4] + 1) % 10
    active = torch.arange(32) % 2 == 0
    found = attacks.pgd(model, inputs, labels, eps=0.1, active=active, generator=gen())
    same = (found == inputs).flatten(1).all(1)
    assert torch.equal(same, ~active | (torch.arange(32) < 4))


def test_only_standing_images_go_on(cnn_problem):
    model, inputs, labels = cnn_problem
    counting = Counting(model)
    found = attacks.pgd(counting, inputs, labels, eps=0.3, steps=20, random_start=False)
    assert (model(found).argmax(1) != labels).all()
    assert counting.images < 0.5 * 21 * 32
    counting.images = 0
    attacks.pgd(counting, inputs, labels, eps=0.3, steps=20, random_start=False, keep="last")
    assert counting.images == 20 * 32, "nobody asks about the last iterates"


def test_looking_less_often_changes_nothing(linear_problem, monkeypatch):
    model, inputs, labels = linear_problem()
    often = attacks.pgd(model, inputs, labels, eps=0.02, generator=gen())
    monkeypatch.setattr("fastlip.attacks._loop._CHECK_EVERY", {"cpu": 7})
    seldom = attacks.pgd(model, inputs, labels, eps=0.02, generator=gen())
    assert torch.equal(often, seldom)


def test_targets_are_reached(cnn_problem):
    model, inputs, labels = cnn_problem
    targets = (labels + 3) % 10
    found = attacks.pgd(model, inputs, labels, eps=0.3, steps=40, targets=targets, generator=gen())
    assert (model(found).argmax(1) == targets).float().mean() > 0.8
    already = attacks.pgd(model, inputs, (labels + 1) % 10, eps=0.3, targets=labels, generator=gen())
    assert torch.equal(already, inputs)


def test_best_is_no_weaker_than_last(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.06, "steps": 4, "step_size": 0.05, "random_start": False}
    best = attacks.pgd(model, inputs, labels, **call)
    last = attacks.pgd(model, inputs, labels, keep="last", **call)
    fell = [(model(x).argmax(1) != labels) for x in (best, last)]
    assert (fell[0] | ~fell[1]).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(cnn_problem, context):
    model, inputs, labels = cnn_problem
    plain = attacks.pgd(model, inputs, labels, eps=0.02, generator=gen())
    with context():
        found = attacks.pgd(model, inputs.clone(), labels.clone(), eps=0.02, generator=gen())
    assert torch.equal(plain, found)


@pytest.mark.parametrize("shape", [(9,), (3, 4), (2, 3, 4, 5)])
def test_takes_inputs_of_any_rank(linear_problem, shape):
    model, inputs, labels = linear_problem(shape=shape)
    found = attacks.pgd(model, inputs, labels, eps=0.3, generator=gen())
    assert (model(found).argmax(1) != labels).all()


def test_keeps_channels_last(cnn_problem):
    model, inputs, labels = cnn_problem
    seen = []
    model.register_forward_pre_hook(lambda m, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last)))
    found = attacks.pgd(model, inputs.to(memory_format=torch.channels_last), labels, eps=0.05, generator=gen())
    assert all(seen)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_per_image_bounds(cnn_problem):
    model, inputs, labels = cnn_problem
    lo, hi = (inputs - 0.01).clamp_min(0), inputs + torch.linspace(0, 0.02, 32).reshape(-1, 1, 1, 1)
    found = attacks.pgd(model, inputs, labels, eps=0.1, bounds=(lo, hi), generator=gen())
    assert (found >= lo).all()
    assert (found <= hi).all()


def test_empty_batch(cnn_problem):
    model, inputs, labels = cnn_problem
    assert attacks.pgd(model, inputs[:0], labels[:0], eps=0.1).shape == (0, 3, 12, 12)


def test_zero_steps_is_the_random_start(linear_problem):
    model, inputs, labels = linear_problem()
    found = attacks.pgd(model, inputs, labels, eps=1e-3, steps=0, generator=gen())
    assert (found - inputs).abs().max() > 5e-4


def test_start_is_projected_and_used(linear_problem):
    model, inputs, labels = linear_problem()
    found = attacks.pgd(model, inputs, labels, eps=1e-3, steps=0, random_start=False, start=torch.ones_like(inputs))
    torch.testing.assert_close(found, inputs + 1e-3)


def test_gradients_that_are_not_finite_are_reported(linear_problem):
    model, inputs, labels = linear_problem()
    # sqrt has an infinite slope at 0, which meets the zero slope of the factor: 0 * inf.
    with pytest.warns(UserWarning, match="not finite"):
        found = attacks.pgd(lambda x: model(x) + 0 * (x - x).abs().sqrt().sum(), inputs, labels, eps=0.1)
    assert found.isfinite().all()


def test_undecided_models_are_no_success(linear_problem):
    model, inputs, labels = linear_problem()
    found = attacks.pgd(
        lambda x: torch.where((x == inputs).all(), model(x), torch.nan), inputs, labels, eps=0.1, random_start=False
    )
    assert torch.equal(found, inputs)


def test_fgsm_is_one_step_of_length_eps(linear_problem):
    model, inputs, labels = linear_problem(classes=2)
    found = attacks.fgsm(model, inputs, labels, eps=0.003)
    direction = (model.weight[1 - labels] - model.weight[labels]).sign().reshape(inputs.shape)
    torch.testing.assert_close(found, inputs + 0.003 * direction)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": 2.0}, ValueError, "inputs must lie within bounds"),
        ({"inputs": torch.nan}, ValueError, "inputs hold NaN"),
        ({"bounds": (0.0,)}, TypeError, "bounds must be a pair"),
        ({"labels": 10}, ValueError, r"labels must lie in \[0, 10\)"),
        ({"labels": 0.5}, TypeError, "labels must be a torch.int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"active": torch.zeros(32)}, TypeError, "active must be a torch.bool"),
        ({"ids": torch.zeros(32)}, TypeError, "ids must be a torch.int64"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"norm": "l0"}, ValueError, "norm must be one of"),
        ({"keep": "first"}, ValueError, "keep must be"),
        ({"steps": -1}, ValueError, "steps must be"),
        ({"restarts": 0}, ValueError, "restarts must be"),
        ({"restarts": 2, "random_start": False}, ValueError, "restarts above 1"),
        ({"start": torch.zeros(32, 3, 12, 12)}, ValueError, "start needs"),
        ({"start": torch.zeros(3), "random_start": False}, ValueError, "start must have"),
        ({"eps": -0.1}, ValueError, "eps must be"),
        ({"eps": torch.ones(3)}, ValueError, "eps must have"),
        ({"eps": torch.full((32,), -0.1)}, ValueError, "eps must be at least 0"),
        ({"eps": torch.full((32,), torch.nan)}, ValueError, "eps must be at least 0"),
        ({"eps": None}, TypeError, "eps must be a float"),
        ({"eps": [0.1]}, TypeError, "eps must be a float"),
        ({"generator": 0}, TypeError, "generator must be"),
    ],
)
def test_errors_name_the_argument(cnn_problem, change, error, message):
    model, inputs, labels = cnn_problem
    call = {"inputs": inputs, "labels": labels, "eps": 0.01} | change
    if not isinstance(call["inputs"], torch.Tensor):
        call["inputs"] = torch.full_like(inputs, call["inputs"])
    if not isinstance(call["labels"], torch.Tensor):
        call["labels"] = torch.full((32,), call["labels"])
    with pytest.raises(error, match=message):
        attacks.pgd(model, **call)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.flatten(1).sum(), "logits"),
        (lambda x: {"scores": x.flatten(1)}, "logits"),
        (lambda x: x.flatten(1)[:, :0], "at least 2 classes"),
        (lambda x: (x.flatten(1)[:, :4] > 0.5).float(), "differentiably"),
    ],
)
def test_models_that_cannot_be_attacked(model, message):
    with pytest.raises(ValueError, match=message):
        attacks.pgd(model, torch.full((2, 8), 0.4), torch.zeros(2, dtype=torch.int64), eps=0.01)


class Overwrites(nn.Module):
    def forward(self, x):
        return x.sub_(0.5).flatten(1)


@pytest.mark.parametrize("attack", [
    lambda *a: attacks.pgd(*a, eps=0.1), lambda *a: attacks.square(*a, eps=0.1, queries=5), attacks.min_sigma,
    lambda *a: attacks.evaluate(*a, {}, check=False),
])  # fmt: skip
def test_models_that_overwrite_their_input_are_refused(attack):
    with pytest.raises(ValueError, match="must not change its input in place"):
        attack(Overwrites(), torch.rand(4, 5), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", NORMS)
def test_feasible_over_a_million_inputs(norm, attack):
    generator = gen(5)
    inputs = torch.rand(1_000_000, 6, generator=generator)
    inputs[::7] = inputs[::7].round()
    eps = 2 * torch.rand(len(inputs), generator=generator) ** 4
    weight = torch.randn(6, 3, generator=generator)
    labels = (inputs @ weight).argmax(1)
    options = {"step_size": 1.0, "sparsity": 0.5} if attack == "pgd" else {}
    found = getattr(attacks, attack)(
        lambda x: x @ weight, inputs, labels, norm=norm, eps=eps, steps=2, loss="margin", generator=gen(), **options
    )
    assert found.min() >= 0
    assert found.max() <= 1
    half_ulp = length(torch.finfo(torch.float32).eps / 2 * found, norm)
    assert (length(found.double() - inputs.double(), norm) <= eps.double() * (1 + 1e-6) + half_ulp).all()
    assert (found != inputs).any(1).float().mean() > 0.9


def test_without_early_stop_the_loss_goes_on_rising(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.1, "steps": 15, "loss": "margin", "random_start": False}
    margins = []
    for early_stop in (True, False):
        logits = model(attacks.pgd(model, inputs, labels, early_stop=early_stop, **call))
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margins.append((logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own).detach())
    assert (margins[1] >= margins[0] - 1e-5).all()
    assert torch.equal(margins[0] > 0, margins[1] > 0)
    assert (margins[1] > margins[0] + 0.1).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_16_bits_stay_as_they_were_judged(dtype, norm, monkeypatch):
    """A run that finds nothing better leaves them alone, and does not project them once more."""
    image = AttackLoop.image
    monkeypatch.setattr(AttackLoop, "image", lambda loop, b, x: image(loop, b, x).nextafter(b.x0.to(dtype)))
    generator = torch.Generator().manual_seed(0)
    inputs = (10 ** (-6 * torch.rand(64, 12, generator=generator))).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(12, 3)
    labels = model(inputs.float()).argmax(1)
    loop = AttackLoop(attacks.Network(lambda x: model(x.float())), inputs, norm=norm, loss="ce")
    eps = {"linf": 0.3, "l2": 0.7, "l1": 1.5}[norm]
    batch = new_batch(
        inputs, labels, None, eps=eps, step_size=eps / 3, bounds=(0.0, 1.0), ids=None, active=torch.arange(64) % 2 == 0
    )
    batch = loop.run(batch, batch.x0.clone(), 5, PgdStep(norm, 0.9))
    found = loop.result.clone()
    assert (found[::2] != inputs[::2]).any()
    assert torch.equal(found[1::2], inputs[1::2])
    standing = loop.run(batch, batch.x0.clone(), 5, PgdStep(norm, 0.9))
    assert len(standing) == len(batch) > 0
    assert torch.equal(loop.result, found)


def test_a_further_run_goes_on_with_those_that_stand_after_the_last_step(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"eps": 0.05, "steps": 4, "keep": "last"}
    once = attacks.pgd(model, inputs, labels, **call, generator=gen())
    fell = model(once).argmax(1) != labels
    assert 0 < fell.sum() < 32
    counting = Counting(model)
    twice = attacks.pgd(counting, inputs, labels, **call, restarts=2, generator=gen())
    assert torch.equal(twice[fell], once[fell])
    assert (twice[~fell] != once[~fell]).flatten(1).any(1).all()
    assert counting.images == 5 * 32 + 4 * int((~fell).sum())

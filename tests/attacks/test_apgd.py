import pytest
import torch

from fastlip import attacks

NORMS = ["linf", "l2", "l1"]
#: Radii at which about half of the images of ``cnn_problem`` fall.
EPS = {"linf": 0.065, "l2": 1.0, "l1": 6.7}
ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def fell(model, found, labels):
    return model(found).argmax(1) != labels


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["dlr", "margin", "ce"])
def test_reaches_the_optimum_of_a_linear_model(linear_problem, norm, loss):
    model, inputs, labels = linear_problem(classes=2)
    with torch.no_grad():
        away = model.weight[1 - labels] - model.weight[labels]
        dual = torch.linalg.vector_norm(away.double(), DUAL[norm], dim=1)
        before = (inputs.flatten(1) * away).sum(1).double()
        # Radii at which no decision changes yet; a third of that in L1, whose first phases have three times the radius.
        share = 0.3 if norm == "l1" else 0.9
        eps = torch.minimum(share * -before / dual, torch.tensor(0.1, dtype=torch.float64))
        found = attacks.apgd(model, inputs, labels, norm=norm, eps=eps, loss=loss, generator=gen())
        gained = (found.flatten(1).double() * away).sum(1) - before
    torch.testing.assert_close(gained, eps * dual, rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stays_in_ball_and_box(cnn_problem, norm, dtype):
    model, inputs, _ = cnn_problem
    model, inputs = model.to(dtype), inputs.to(dtype)
    labels = model(inputs).argmax(1)
    eps = torch.linspace(0, 2, len(inputs)) * EPS[norm]
    found = attacks.apgd(model, inputs, labels, norm=norm, eps=eps, steps=12, generator=gen())
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() <= 1
    length = torch.linalg.vector_norm((found.double() - inputs.double()).flatten(1), ORDER[norm], dim=1)
    assert (length <= eps.double() * (1 + 1e-6) + 1e-5).all()
    assert torch.equal(found[0], inputs[0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target_classes", [0, 2])
def test_result_does_not_depend_on_the_batch(linear_problem, norm, target_classes):
    model, inputs, labels = linear_problem()
    ids = torch.arange(100, 108)
    call = {"norm": norm, "eps": EPS[norm] / 8, "steps": 12, "restarts": 2, "target_classes": target_classes}
    together = attacks.apgd(model, inputs, labels, ids=ids, generator=gen(), **call)
    order = torch.tensor([5, 2, 7])
    apart = attacks.apgd(model, inputs[order], labels[order], ids=ids[order], generator=gen(), **call)
    assert torch.equal(together[order], apart)
    assert not torch.equal(together, inputs)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_and_targets_only_add(cnn_problem, norm):
    model, inputs, labels = cnn_problem
    call = {"norm": norm, "eps": EPS[norm], "steps": 20}
    once = fell(model, attacks.apgd(model, inputs, labels, generator=gen(), **call), labels)
    more = fell(model, attacks.apgd(model, inputs, labels, restarts=3, generator=gen(), **call), labels)
    assert (more | ~once).all()
    few = fell(model, attacks.apgd(model, inputs, labels, target_classes=1, generator=gen(), **call), labels)
    many = fell(model, attacks.apgd(model, inputs, labels, target_classes=4, generator=gen(), **call), labels)
    assert (many | ~few).all()
    assert many.any()
    assert not many.all()


@pytest.mark.parametrize("loss", ["dlr", "margin", "ce"])
def test_any_wrong_class_is_a_success_of_target_classes(cnn_problem, loss):
    model, inputs, labels = cnn_problem
    found = attacks.apgd(
        model, inputs, labels, eps=0.3, steps=30, loss=loss, target_classes=100, random_start=False, restarts=1
    )
    assert fell(model, found, labels).all()


def test_targets_are_reached(cnn_problem):
    model, inputs, labels = cnn_problem
    targets = (labels + 3) % 10
    found = attacks.apgd(model, inputs, labels, eps=0.3, steps=40, targets=targets, generator=gen())
    assert (model(found).argmax(1) == targets).float().mean() > 0.9


def test_is_the_op_step_by_step(cnn_problem):
    """keep="last" is the op's own iteration, written out."""
    from fastlip import ops

    model, inputs, labels = cnn_problem
    found = attacks.apgd(model, inputs, labels, norm="l2", eps=0.5, steps=7, loss="ce", random_start=False, keep="last")
    x, state = inputs.clone(), ops.apgd_state(inputs, steps=7, eps=0.5, norm="l2")
    for _ in range(7):
        seen = x.clone().requires_grad_()
        losses = torch.nn.functional.cross_entropy(model(seen), labels, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), seen)
        ops.apgd_step_(x, grad, losses.detach(), inputs, state, eps=0.5, norm="l2")
    assert torch.equal(found, x)


def test_budget_of_the_sparse_schedule(cnn_problem):
    model, inputs, labels = cnn_problem
    with attacks.count_forward_backward(model) as counts:
        attacks.apgd(model, inputs, labels, norm="l1", eps=1e-3, steps=20, generator=gen())
    assert counts.backward == 20 * 32
    assert counts.forward == (1 + 20 + 2 + 1) * 32  # clean; each step; the ends of two phases; the last iterate


def test_misclassified_images_come_back_unchanged(cnn_problem):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[:4] = (labels[:4] + 1) % 10
    for target_classes in (0, 2):
        found = attacks.apgd(model, inputs, labels, eps=0.1, steps=5, target_classes=target_classes, generator=gen())
        same = (found == inputs).flatten(1).all(1)
        assert torch.equal(same, torch.arange(32) < 4)


@pytest.mark.parametrize("shape", [(9,), (3, 4), (2, 3, 4, 5)])
def test_takes_inputs_of_any_rank(linear_problem, shape):
    model, inputs, labels = linear_problem(shape=shape)
    found = attacks.apgd(model, inputs, labels, eps=0.3, steps=20, generator=gen())
    assert fell(model, found, labels).all()


def test_works_where_gradients_are_off_and_on_empty_batches(cnn_problem):
    model, inputs, labels = cnn_problem
    plain = attacks.apgd(model, inputs, labels, eps=0.03, steps=5, generator=gen())
    with torch.inference_mode():
        again = attacks.apgd(model, inputs.clone(), labels.clone(), eps=0.03, steps=5, generator=gen())
    assert torch.equal(plain, again)
    assert attacks.apgd(model, inputs[:0], labels[:0], eps=0.1, target_classes=3).shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_classes": -1}, "target_classes must be"),
        ({"target_classes": 2, "targets": torch.zeros(32, dtype=torch.int64)}, "either targets or"),
        ({"steps": -1}, "steps must be"),
        ({"restarts": 0}, "restarts must be"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"momentum": 2.0}, "momentum must lie"),
        ({"rho": -0.5}, "rho must lie"),
        ({"precision": torch.int8}, "precision must be"),
    ],
)
def test_errors_name_the_argument(cnn_problem, change, message):
    model, inputs, labels = cnn_problem
    with pytest.raises(ValueError, match=message):
        attacks.apgd(model, inputs, labels, **{"eps": 0.01} | change)

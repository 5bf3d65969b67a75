import pytest
import torch

from fastlip import attacks

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
SPARSITY = 1.0


def closed_form(model, inputs, labels, norm):
    """Distance of each input to the nearest decision boundary of a linear model in an unbounded box."""
    logits = model(inputs)
    gap = logits.gather(1, labels[:, None]) - logits
    away = model.weight[None] - model.weight[labels][:, None]
    slope = torch.linalg.vector_norm(away.double(), DUAL[norm], dim=2)
    return (gap.double() / slope).masked_fill(slope == 0, torch.inf).amin(1).detach()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("classes", [2, 4])
def test_distance_of_a_linear_model(linear_problem, norm, classes):
    model, inputs, labels = linear_problem(classes=classes, batch=16)
    found = attacks.min_norm(model, inputs, labels, norm=norm, method="search", bounds=(-5.0, 5.0), sparsity=SPARSITY)
    truth = closed_form(model, inputs, labels, norm)
    assert found.found.all()
    assert (found.distance >= truth * (1 - 1e-5)).all()
    assert (found.distance <= truth * 1.03).all()
    assert (model(found.adversarial).argmax(1) != labels).all()
    moved = torch.linalg.vector_norm((found.adversarial - inputs).double().flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(moved, found.distance)


@pytest.mark.parametrize("method", ["fmn", "search"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_finds_every_image_of_a_network(cnn_problem, norm, method):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[3] = (labels[3] + 1) % 10
    found = attacks.min_norm(model, inputs, labels, norm=norm, method=method)
    assert found.found.all()
    assert found.distance[3] == 0
    assert torch.equal(found.adversarial[3], inputs[3])
    assert found.adversarial.min() >= 0
    assert found.adversarial.max() <= 1
    assert (model(found.adversarial).argmax(1) != labels).all()
    # No smaller ball holds what a plain attack can find there.
    inside = attacks.pgd(
        model, inputs, labels, norm=norm, eps=0.8 * found.distance, steps=20, generator=torch.Generator().manual_seed(0)
    )
    fell = (model(inside).argmax(1) != labels) & (found.distance > 0)
    assert fell.float().mean() < 0.15


def test_what_is_not_found_is_censored(linear_problem):
    model, inputs, labels = linear_problem()
    truth = closed_form(model, inputs, labels, "l2")
    limit = truth.median()
    found = attacks.min_norm(model, inputs, labels, eps_max=float(limit) * 1.001, bounds=(-5.0, 5.0))
    assert torch.equal(found.found, truth <= limit)
    assert found.distance[~found.found].isinf().all()
    assert torch.equal(found.adversarial[~found.found], inputs[~found.found])


def test_inactive_images_are_left_out(linear_problem):
    model, inputs, labels = linear_problem()
    active = torch.arange(8) < 3
    found = attacks.min_norm(model, inputs, labels, active=active)
    assert torch.equal(found.found, active)


def test_targets_are_reached(linear_problem):
    model, inputs, labels = linear_problem()
    targets = (labels + 1) % 4
    found = attacks.min_norm(model, inputs, labels, targets=targets, bounds=(-5.0, 5.0))
    assert (model(found.adversarial).argmax(1) == targets).all()
    free = attacks.min_norm(model, inputs, labels, bounds=(-5.0, 5.0))
    assert (found.distance >= free.distance * 0.98).all()


def test_works_where_gradients_are_off_and_leaves_modes(cnn_problem):
    model, inputs, labels = cnn_problem
    plain = attacks.min_norm(model, inputs, labels, method="search", search_steps=3)
    model.train()
    with torch.inference_mode():
        found = attacks.min_norm(model, inputs.clone(), labels.clone(), method="search", search_steps=3)
    assert torch.equal(plain.distance, found.distance)
    assert all(m.training for m in model.modules())


def test_errors_name_the_argument(linear_problem):
    with pytest.raises(ValueError, match="search_steps"):
        attacks.min_norm(*linear_problem(), method="search", search_steps=0)
    with pytest.raises(ValueError, match="norm must be"):
        attacks.min_norm(*linear_problem(), norm="l0")
    with pytest.raises(ValueError, match="eps_max must have"):
        attacks.min_norm(*linear_problem(), eps_max=torch.ones(3))
    with pytest.raises(ValueError, match="eps_max must be at least 0"):
        attacks.min_norm(*linear_problem(), eps_max=-1.0)


def test_empty_batch(linear_problem):
    model, inputs, labels = linear_problem()
    for search in (attacks.min_norm, attacks.min_sigma):
        found = search(model, inputs[:0], labels[:0])
        assert (found.adversarial.shape, found.distance.shape) == (inputs[:0].shape, (0,))


@pytest.mark.parametrize("method", ["fmn", "both"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_other_methods_on_a_linear_model(linear_problem, norm, method):
    model, inputs, labels = linear_problem(batch=16)
    found = attacks.min_norm(
        model, inputs, labels, norm=norm, method=method, bounds=(-5.0, 5.0), sparsity=SPARSITY, loss="margin"
    )
    truth = closed_form(model, inputs, labels, norm)
    assert found.found.all()
    assert (found.distance >= truth * (1 - 1e-5)).all()
    assert (found.distance <= truth * 1.03).all()
    assert (model(found.adversarial).argmax(1) != labels).all()


def test_both_is_no_worse_than_fmn_alone(cnn_problem):
    model, inputs, labels = cnn_problem
    call = {"norm": "l1", "fmn_steps": 30}
    alone = attacks.min_norm(model, inputs, labels, method="fmn", **call)
    both = attacks.min_norm(model, inputs, labels, method="both", **call)
    assert (both.distance <= alone.distance).all()


def test_fmn_is_censored_at_eps_max(cnn_problem):
    model, inputs, labels = cnn_problem
    labels = labels.clone()
    labels[3] = (labels[3] + 1) % 10
    found = attacks.min_norm(model, inputs, labels, method="fmn", eps_max=1.0)
    assert found.distance[3] == 0
    assert (found.distance[found.found] <= 1 + 1e-5).all()
    assert torch.equal(found.adversarial[~found.found], inputs[~found.found])
    assert found.found.any()
    assert not found.found.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "ddn"}, "method must be"), ({"fmn_steps": 0}, "fmn_steps"), ({"steps": -1}, "steps must be")],
)
def test_errors_of_methods(linear_problem, change, message):
    with pytest.raises(ValueError, match=message):
        attacks.min_norm(*linear_problem(), **{"method": "search"} | change)


@pytest.mark.parametrize("method", ["search", "fmn"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_is_found_holds_in_any_batch(cnn_problem, norm, method):
    """With logits whose last digits depend on the batch, as those of any network do; here by more, to be seen."""
    model, inputs, labels = cnn_problem

    class Rounds(torch.nn.Module):
        def forward(self, x):
            logits = model(x)
            rounding = 8e-6 * (torch.rand(logits.shape, generator=torch.Generator().manual_seed(len(x))) - 0.5)
            return logits + rounding * logits.abs().amax(1, keepdim=True)

    network = Rounds().eval()
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    found = attacks.min_norm(
        network, inputs, labels, norm=norm, method=method, steps=8, search_steps=14, tolerance=1e-5
    )
    assert found.found.all()
    for size in (1, 3, 7):
        with torch.no_grad():
            again = torch.cat([network(part).argmax(1) for part in found.adversarial.split(size)])
        assert (again != labels).all()
    length = torch.linalg.vector_norm((found.adversarial - inputs).double().flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(length, found.distance)


@pytest.mark.parametrize("method", ["search", "fmn", "both"])
def test_how_far_the_search_got(cnn_problem, method):
    model, inputs, labels = cnn_problem
    found = attacks.min_norm(model, inputs, labels, method=method, eps_max=1e-3)
    assert not found.found.any()
    assert found.searched.tolist() == [0.0 if method == "fmn" else 1e-3] * len(inputs)
    found = attacks.min_norm(model, inputs, labels, method=method)
    assert found.found.all()
    assert (found.searched <= found.distance).all()
    noisy = attacks.min_sigma(model, inputs, labels, directions=1, sigma_max=0.01, levels=2)
    assert (~noisy.found).any()
    assert (noisy.searched[~noisy.found] == 0.01).all()
    assert (noisy.searched[noisy.found] < noisy.distance[noisy.found]).all()

"""What makes FMN find small perturbations: the smooth margin that it follows."""

import pytest
import torch
from torch import nn

from fastlip import attacks


class DeadEnd(nn.Module):
    """Class 1 is the nearest at first and comes no nearer than a tenth; class 2 is reached along the other axis."""

    def forward(self, x):
        first = -0.1 - (0.3 - x[:, 0]).relu()
        second = 2 * x[:, 1] - 1.2
        return torch.stack([torch.zeros_like(first), first, second], 1)


class Scaled(nn.Module):
    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.scale * self.model(x)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_goes_on_where_the_nearest_class_is_a_dead_end(norm, loss):
    inputs, labels = torch.full((4, 2), 0.1), torch.zeros(4, dtype=torch.int64)
    found = attacks.min_norm(DeadEnd(), inputs, labels, norm=norm, method="fmn", loss=loss)
    assert found.found.all()
    torch.testing.assert_close(found.distance, torch.full((4,), 0.5, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**8])
def test_the_scale_of_the_logits_does_not_matter(cnn_problem, scale):
    model, inputs, labels = cnn_problem
    plain = attacks.min_norm(model, inputs, labels, method="fmn", fmn_steps=20)
    scaled = attacks.min_norm(Scaled(model, scale), inputs, labels, method="fmn", fmn_steps=20)
    assert torch.equal(plain.adversarial, scaled.adversarial)


def test_an_excluded_class_has_no_part_in_the_smooth_margin(linear_problem):
    model, inputs, labels = linear_problem(classes=4)

    class Masked(nn.Module):
        def forward(self, x):
            logits = model(x)
            return torch.cat([logits, torch.full_like(logits[:, :2], -torch.inf)], 1)

    plain = attacks.min_norm(model, inputs, labels, method="fmn", bounds=(-5.0, 5.0))
    masked = attacks.min_norm(Masked(), inputs, labels, method="fmn", bounds=(-5.0, 5.0))
    assert torch.equal(plain.distance, masked.distance)


def test_targets_are_reached_against_a_near_class(linear_problem):
    model, inputs, labels = linear_problem(classes=4)
    targets = (labels + 2) % 4
    found = attacks.min_norm(model, inputs, labels, targets=targets, method="fmn", bounds=(-5.0, 5.0))
    assert (model(found.adversarial).argmax(1) == targets).all()


def test_a_decision_that_is_too_close_does_not_hide_the_next_level():
    """Level 10 decides by less than the rounding of logits, and a perturbation that is a little longer is the same."""

    class Close(nn.Module):
        def forward(self, x):
            margin = 255 * x[:, 0] - 10 + 1e-3
            return torch.stack([torch.full_like(margin, 100.0), 100 + margin], 1)

    inputs, labels = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    found = attacks.min_norm(Close(), inputs, labels, norm="linf", method="fmn", quantize=8)
    torch.testing.assert_close(found.distance * 255, torch.full((3,), 11.0, dtype=torch.float64))


class TwoWays(nn.Module):
    """Class 2 has the larger logit at the image, but its boundary lies three times as far away as that of class 1."""

    def forward(self, x):
        near = 6 * x[:, 1] - 3.0
        far = x[:, 0] - 1.5
        return torch.stack([torch.zeros_like(near), near, far], 1)


@pytest.mark.parametrize(("steps", "length"), [(199, 1.5), (400, 0.5), (1001, 0.5)])
def test_many_steps_are_shared_among_runs_that_end_at_different_classes(steps, length):
    inputs, labels = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    model = TwoWays()
    with attacks.count_forward_backward(model) as passes:
        found = attacks.min_norm(model, inputs, labels, method="fmn", fmn_steps=steps, bounds=(-2.0, 2.0))
    assert passes.backward == len(inputs) * (steps + 1)
    torch.testing.assert_close(found.distance, torch.full((2,), length, dtype=torch.float64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_default_is_the_strongest_method(cnn_problem, norm):
    """In no more passes than the search has, whose perturbations are longer."""
    model, inputs, labels = cnn_problem
    with attacks.count_forward_backward(model) as passes:
        found = attacks.min_norm(model, inputs, labels, norm=norm)
    assert torch.equal(found.adversarial, attacks.min_norm(model, inputs, labels, norm=norm, method="fmn").adversarial)
    with attacks.count_forward_backward(model) as more:
        search = attacks.min_norm(model, inputs, labels, norm=norm, method="search")
    assert passes.forward + passes.backward < more.forward + more.backward
    assert found.distance.median() < search.distance.median()


def test_a_warning_is_attributed_to_the_caller():
    class Bent(nn.Module):
        def forward(self, x):
            return torch.cat([x.sqrt() - 0.5, 0 * x], 1)  # whose slope at 0 is infinite

    inputs = torch.tensor([[0.0], [0.04]])
    with pytest.warns(UserWarning, match="min_norm met gradients that are not finite") as caught:
        attacks.min_norm(Bent(), inputs, torch.ones(2, dtype=torch.int64))
    assert caught[0].filename == __file__

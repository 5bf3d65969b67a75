import pytest
import torch
from torch import nn

from fastlip import metrics


def test_average_distortion_of_a_constant_shift_is_the_shift():
    inputs = torch.rand(5, 3, 32, 32)
    shift = torch.linspace(0, 0.4, 5)
    torch.testing.assert_close(
        metrics.average_distortion(inputs + shift.reshape(-1, 1, 1, 1), inputs), shift.double(), rtol=1e-5, atol=1e-9
    )


def test_average_distortion_is_the_norm_over_root_n():
    a, b = torch.rand(4, 3, 7, 5), torch.rand(4, 3, 7, 5)
    expected = (a - b).double().flatten(1).norm(dim=1) / (3 * 7 * 5) ** 0.5
    torch.testing.assert_close(metrics.average_distortion(a, b), expected)
    assert metrics.average_distortion(a[:0], b[:0]).shape == (0,)
    with pytest.raises(ValueError, match="one shape"):
        metrics.average_distortion(a, b[:2])


def test_accuracy_of_each_image_in_any_batch_size():
    logits = torch.randn(23, 4)
    labels = logits.argmax(1)
    labels[::3] = (labels[::3] + 1) % 4
    logits[1] = torch.nan
    expected = torch.arange(23) % 3 != 0
    expected[1] = False
    for size in (1, 5, 23, 100):
        found = metrics.accuracy(nn.Identity(), logits, labels, batch_size=size)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="labels must have"):
        metrics.accuracy(nn.Identity(), logits, labels[:3])
    with pytest.raises(ValueError, match="batch_size"):
        metrics.accuracy(nn.Identity(), logits, labels, batch_size=0)


class TwoStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def test_stretch_of_each_layer():
    model = TwoStage()
    inputs, moved = torch.randn(8, 6), torch.randn(8, 6)
    length = (moved - inputs).norm(dim=1)
    first = (moved - inputs) @ model.first.weight.T
    found = metrics.layer_stretch(model, moved, inputs, ["first", "act", ""])
    # The in-place ReLU after "first" must not reach what was recorded of it.
    torch.testing.assert_close(found["first"], (first.norm(dim=1) / length).double(), rtol=1e-4, atol=1e-6)
    assert (found["act"] <= found["first"] + 1e-6).all()
    torch.testing.assert_close(found[""], metrics.observed_stretch(model, moved, inputs))
    expected = ((model(moved) - model(inputs)).norm(dim=1) / length).double().detach()
    torch.testing.assert_close(found[""], expected, rtol=1e-4, atol=1e-6)
    assert not model.first._forward_hooks


def test_stretch_of_a_linear_model_is_at_most_its_norm_and_reaches_it():
    model = nn.Linear(6, 4, bias=False).double()
    _, sigma, right = torch.linalg.svd(model.weight.detach())
    inputs = torch.zeros(3, 6, dtype=torch.float64)
    moved = torch.stack([right[0], right[1], torch.ones(6, dtype=torch.float64)])
    found = metrics.observed_stretch(model, moved, inputs)
    torch.testing.assert_close(found[:2], sigma[:2])
    assert found[2] <= sigma[0]


def test_models_that_work_in_place_leave_the_images_alone():
    class Overwrites(nn.Module):
        def forward(self, x):
            return x.sub_(0.5).mul_(3.0)

    model = nn.Sequential(Overwrites())
    inputs, moved = torch.rand(4, 5), torch.rand(4, 5)
    copies = inputs.clone(), moved.clone()
    three = torch.full((4,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(metrics.observed_stretch(model, moved, inputs), three)
    torch.testing.assert_close(metrics.layer_stretch(model, moved, inputs, ["0"])["0"], three)
    metrics.accuracy(model, inputs, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(inputs, copies[0])
    assert torch.equal(moved, copies[1])


def test_stretch_of_nothing_is_not_a_number():
    inputs = torch.rand(2, 3)
    assert metrics.observed_stretch(nn.Identity(), inputs, inputs).isnan().all()


@pytest.mark.parametrize(("layer", "message"), [("third", "no module 'third'"), ("spare", "not called")])
def test_stretch_errors(layer, message):
    model = TwoStage()
    model.spare = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        metrics.layer_stretch(model, torch.rand(2, 6), torch.rand(2, 6), ["first", layer])
    assert not model.first._forward_hooks
    with pytest.raises(ValueError, match="perturbed must have"):
        metrics.observed_stretch(model, torch.rand(2, 6), torch.rand(3, 6))


def test_a_layer_called_twice_is_an_error():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    with pytest.raises(ValueError, match="more than once"):
        metrics.layer_stretch(model, torch.rand(2, 4), torch.rand(2, 4), ["0"])

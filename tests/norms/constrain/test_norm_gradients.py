"""The operation that all layers' norms and gradients come from, and the penalty that is made of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.norms import Operator, conv_operator, operator_norms, spectral_penalty
from fastlip.norms._constrain.norm_gradients import NormGradient, encode, norm_gradients
from fastlip.norms._operators.torch_operator import TorchOperator

#: Geometries that take every way through the operation.
OPERATORS = {
    "matrix": Operator(torch.randn(5, 7)),
    "matrix in groups": Operator(torch.randn(6, 3), groups=2),
    "unfolded, whole": conv_operator(torch.randn(4, 3, 3, 3), 6, padding=1),
    "unfolded, in factors": conv_operator(torch.randn(24, 16, 3, 3), 2, padding=1),
    "strided, dilated": conv_operator(torch.randn(4, 3, 3, 2), (9, 8), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    "one axis": conv_operator(torch.randn(4, 3, 3), 7, padding=1),
    "three axes": conv_operator(torch.randn(2, 2, 2, 2, 2), 3),
    "groups": conv_operator(torch.randn(4, 2, 3, 3), 5, padding=1, groups=2),
    "circular": conv_operator(torch.randn(4, 3, 3, 3), 5, padding=1, padding_mode="circular"),
    "uneven": conv_operator(torch.randn(4, 3, 2, 2), 5, padding="same"),
}


def start(op: Operator) -> Tensor:
    drawn = torch.randn(math.prod(op.input_shape), 2, dtype=op.weight.dtype)
    return torch.linalg.qr(drawn)[0].mT.reshape(2, *op.input_shape)


@pytest.mark.parametrize("name", OPERATORS)
def test_norm_vector_and_gradient(name: str) -> None:
    op = OPERATORS[name]
    op = op.with_weight(torch.rand_like(op.weight, dtype=torch.float64))  # whose first singular value lies apart
    v, norms, left, right = norm_gradients([op.weight], [start(op)], encode(op), 60)
    gradient = NormGradient(left, right)
    truth = operator_norms([op], rtol=1e-8, method="svd")[0].upper
    assert gradient.norm_of(op.weight).item() == pytest.approx(truth, rel=1e-7)
    assert norms[1].item() == pytest.approx(truth, rel=1e-7)
    assert norms[0] < norms[1]
    weight = op.weight.clone().requires_grad_()
    images = TorchOperator(op, weight).forward(v[:1]).reshape(op.groups, -1)
    image = images[images.norm(dim=1).argmax()]  # the norm is that of one group
    (expected,) = torch.autograd.grad((image * (image / image.norm()).detach()).sum(), weight)
    given = torch.randn_like(weight)
    for bound in (0.5 * truth, 2.0 * truth):
        # The norm's gradient is held fixed, so that the norm is linear.
        norm = (expected * weight).sum()
        (wanted,) = torch.autograd.grad(weight * (bound / norm), weight, given)
        scaled = (weight * (bound / truth)).detach()
        found = gradient.through_scale(given, scaled, truth, bound)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        unread = gradient.through_scale(given, scaled, torch.tensor(truth, dtype=torch.float64), bound)
        torch.testing.assert_close(unread, wanted if bound < truth else given, rtol=1e-6, atol=1e-7)
    assert bool(right.numel()) == (name in ("matrix", "unfolded, in factors"))


def test_through_the_scale_on_another_device() -> None:
    """Where no number is read, and the operation of the CPU is not to be had."""
    grad = torch.empty(4, 3, 2, 2, device="meta")
    for sizes in (((4, 12), (0,)), ((4, 2), (2, 12))):
        gradient = NormGradient(*(torch.empty(size, device="meta") for size in sizes))
        for norm in (2.0, torch.empty((), device="meta")):
            found = gradient.through_scale(grad, grad, norm, 1.0)
            assert found.device == grad.device
            assert found.shape == grad.shape


def test_all_layers_at_once_are_each_by_itself() -> None:
    ops = list(OPERATORS.values())
    weights, vectors = [op.weight for op in ops], [start(op) for op in ops]
    together = norm_gradients(weights, vectors, [number for op in ops for number in encode(op)], 2)
    for place, op in enumerate(ops):
        alone = norm_gradients([op.weight], [vectors[place]], encode(op), 2)
        for one, other in zip(alone, together[4 * place : 4 * place + 4], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["matrix", "unfolded, in factors", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(name: str, dtype: torch.dtype) -> None:
    op = OPERATORS[name]
    torch.library.opcheck(
        torch.ops.fastlip.norm_gradients,
        ([op.weight.to(dtype)], [start(op)], list(encode(op)), 1),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("spoilt", [0.0, float("nan"), float("inf")])
def test_weights_without_a_norm_leave_the_vector(spoilt: float) -> None:
    op = OPERATORS["unfolded, whole"]
    v = start(op)
    found, _, left, _ = norm_gradients([torch.full_like(op.weight, spoilt)], [v], encode(op), 2)
    assert torch.equal(found, v)
    assert left.isfinite().all()


def test_the_penalty_and_its_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(48, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().mul_(2.0)
    penalty = spectral_penalty(model, (2, 4, 4), bound=0.5, iterations=40)
    ops = [conv_operator(model[0].weight, 4, padding=1), Operator(model[2].weight.detach())]
    truth = [interval.upper for interval in operator_norms(ops, rtol=1e-8, method="svd")]
    assert list(penalty.norms()) == ["0", "2"]
    value = penalty()
    assert value.item() == pytest.approx(sum((norm - 0.5) ** 2 for norm in truth), rel=1e-6)
    for weight in (model[0].weight, model[2].weight):
        (gradient,) = torch.autograd.grad(penalty(), weight)
        direction = F.normalize(torch.randn_like(weight).flatten(), dim=0).view_as(weight)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight.add_(step * direction)
                ends.append(penalty().item())
                weight.sub_(step * direction)
        assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)
    (pulled,) = torch.autograd.grad(spectral_penalty(model, (2, 4, 4), bound=100.0)(), model[0].weight)
    assert not pulled.any()
    assert spectral_penalty(model, (2, 4, 4), layers=[])().item() == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_lowers_all_norms_in_training(seed: int) -> None:
    """Nothing else moves the weights, which stand still whenever the norms that are found are within the bound."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight.mul_(5.0)
    penalty = spectral_penalty(model, (6,), bound=0.8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    before = torch.linalg.matrix_norm(model[0].weight, 2).item()
    for _ in range(800):
        optimiser.zero_grad()
        penalty().backward()
        optimiser.step()
    assert max(torch.linalg.matrix_norm(model[i].weight, 2).item() for i in (0, 2)) <= 0.82
    assert before > 2.0


def test_the_arguments_of_a_penalty_are_checked() -> None:
    with pytest.raises(ValueError, match="bound must be positive"):
        spectral_penalty(nn.Linear(3, 3), (3,), bound=-1.0)
    with pytest.raises(ValueError, match="layers must be names of Conv"):
        spectral_penalty(nn.Linear(3, 3), (3,), layers=["missing"])

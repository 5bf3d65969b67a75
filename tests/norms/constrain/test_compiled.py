"""Constrained networks under torch.compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlip
from fastlip.norms import NormOptions, constrain_norms, layer_norms
from fastlip.norms._constrain import constraint as constraint_module
from fastlip.norms._constrain.certificates import certified_uppers
from fastlip.norms._constrain.constraint import NormConstraint
from fastlip.norms._constrain.whole_model import constrained_layers
from fastlip.norms._operators.operator import Operator

SHAPE = (3, 8, 8)


def constrained() -> nn.Sequential:
    """A small network whose norms are well above the bound of 0.5."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    constrain_norms(model, SHAPE, bound=0.5)
    return model


def test_compiled_whole() -> None:
    model, x = constrained(), torch.rand(4, *SHAPE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    weight, other = (m[0].parametrizations.weight.original for m in (model, compiled._orig_mod))
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(other.grad, weight.grad, rtol=1e-2, atol=1e-2 * float(weight.grad.abs().max()))
    before = compiled._orig_mod[0].parametrizations.weight[0].v.clone()
    with torch.no_grad():
        other.copy_(torch.rand_like(other))
        for _ in range(25):
            compiled(x)
    constraint, _ = constrained_layers(compiled._orig_mod)[0]
    assert not torch.equal(before, constraint.v)
    assert _reaches_the_norm(constraint, other)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_eval_certifies_all_layers_together(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = constrained().eval()
    solved: list[int] = []

    def noted(ops: list[Operator], options: NormOptions) -> list[float]:
        solved.append(len(ops))
        return certified_uppers(ops, options)

    monkeypatch.setattr(constraint_module, "certified_uppers", noted)
    x, layers = torch.rand(4, *SHAPE), len(constrained_layers(model))
    own = copy.deepcopy(model)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        found = [compiled(x), compiled(x)]
        assert solved == [layers]
        with torch.no_grad():
            constrained_layers(own)[0][1].mul_(1.5)
        found.append(compiled(x))
        assert solved == [layers, layers]
        torch.testing.assert_close(found[0], model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert max(norm.lower for norm in layer_norms(own, SHAPE).values()) <= 0.5
    assert all(constraint.tracking.scale is None for constraint, _ in constrained_layers(own))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_parts_of_a_model_follow_its_weights(grad: bool) -> None:
    """Outside of the model's own forward as well: one layer, or a function that calls some."""
    model = constrained().eval()
    x = torch.rand(4, *SHAPE)
    first = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    some = torch.compile(lambda x: model[2](model[0](x).relu()), fullgraph=True, backend="aot_eager")
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for factor in (1.0, 50.0, 0.1):
            with torch.no_grad():
                for _, weight in constrained_layers(model):
                    weight.mul_(factor)
            torch.testing.assert_close(first(x), model[0](x))
            torch.testing.assert_close(some(x), model[2](model[0](x).relu()))
            torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first(x), model[0](x))


def _reaches_the_norm(constraint: NormConstraint, weight: Tensor) -> bool:
    op = constraint.operator(weight.detach())
    image = F.conv2d(constraint.v[:1], op.weight, padding=1)
    return image.norm().item() >= 0.98 * fastlip.norms.operator_norms([op])[0].lower

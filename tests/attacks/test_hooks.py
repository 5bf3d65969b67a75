"""Modules with hooks, or a forward of their own, in faster copies: what they change is what the model computes."""

import pytest
import torch
from torch import nn

from fastlip import attacks


@pytest.mark.parametrize("channels", [6, 20])
@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_layers_with_hooks_are_not_replaced(hook, place, channels):
    """A hook may act on other images than those that were compared."""
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * channels, 5),
    ]  # fmt: skip
    model, inputs = nn.Sequential(*body).eval(), torch.rand(4, 3, 8, 8)
    calls = []
    limit = 0.3 if place == 0 else 1.5  # of inputs that are scaled by 4
    changes = {
        "register_forward_hook": lambda module, given, out: calls.append(1) or torch.where(out > limit, 2 * out, out),
        "register_forward_pre_hook": lambda module, given: calls.append(1) or torch.where(given[0] > 2, 0.5, given[0]),
        "register_full_backward_hook": lambda module, grads, out: calls.append(1) or (2 * grads[0].clamp(min=0),),
    }
    getattr(model[place], hook)(changes[hook])
    made = attacks.prepare(model, inputs, fast=True).faster
    assert made is not None
    images = 4 * torch.rand(6, 3, 8, 8)
    found = []
    for network in (model, made):
        calls.clear()
        logits = network(x := images.clone().requires_grad_())
        found.append((logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]))
        assert calls
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("patched", [False, True])
def test_parts_of_models_with_hooks_run_as_they_are(patched):
    """A hook gets tensors, in each pass; and what else the model does is in the graph."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), part, nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    inputs, seen = torch.rand(4, 3, 8, 8), []
    if patched:
        body = part.forward
        part.forward = lambda x: seen.append(x) or body(x).clamp(max=0.5)
    else:
        part.register_forward_hook(lambda module, given, out: seen.append(out) or out.clamp(max=0.5))
    made = attacks.prepare(model, inputs, fast=True).faster
    assert all(type(t) is torch.Tensor for t in seen)
    seen.clear()
    images = 5 * torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(made(images), model(images), atol=1e-4, rtol=1e-4)
    assert [len(t) for t in seen] == [6, 6]
    assert made.model.graph.find_nodes(op="call_module", target="2")

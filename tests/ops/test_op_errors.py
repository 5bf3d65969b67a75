"""Every check of the wrappers and of the bindings, each with the argument it names."""

import functools

import pytest
import torch
from op_inputs import make
from torch.fx.experimental.proxy_tensor import make_fx

from fastlip import ops

WRONG = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a tensor"),
    "x is integer": ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x must be float32"),
    "x is a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have a batch dimension"),
    "x requires grad": ({"x": torch.zeros(3, 4, requires_grad=True)}, RuntimeError, "x requires grad"),
    "grad has another shape": ({"grad": torch.zeros(3, 5)}, ValueError, "grad must have x's shape"),
    "grad has another dtype": ({"grad": torch.zeros(3, 4).double()}, TypeError, "grad must have x's dtype"),
    "grad is None": ({"grad": None}, TypeError, "grad must be a tensor"),
    "x0 has another device": ({"x0": torch.zeros(3, 4, device="meta")}, ValueError, "x0 must be on x's device"),
    "eps is negative": ({"eps": -0.1}, ValueError, "eps must be at least 0"),
    "eps is NaN": ({"eps": float("nan")}, ValueError, "eps must be at least 0"),
    "eps has another length": ({"eps": torch.ones(2)}, ValueError, "eps must be a float or have shape"),
    "eps is a string": ({"eps": "8/255"}, TypeError, "eps must be a float"),
    "step_size is infinite": ({"step_size": float("inf")}, ValueError, "step_size must be finite"),
    "step_size has another shape": ({"step_size": torch.ones(3, 1)}, ValueError, "step_size must be a float or have"),
    "norm is unknown": ({"norm": "l3"}, ValueError, "norm must be one of"),
    "bounds are reversed": ({"bounds": (1.0, 0.0)}, ValueError, "bounds must satisfy"),
    "bounds are one number": ({"bounds": 1.0}, TypeError, "bounds must be a pair"),
    "bounds are strings": ({"bounds": ("0", "1")}, TypeError, "bounds must be floats or tensors"),
    "bounds do not broadcast": ({"bounds": (torch.zeros(5), 1.0)}, ValueError, "bounds must broadcast"),
    "bounds are elsewhere": ({"bounds": (torch.zeros(4, device="meta"), 1.0)}, ValueError, "bounds must be on x's"),
    "sparsity is above one": ({"sparsity": 1.5}, ValueError, "sparsity must lie in"),
    "active is no bool": ({"active": torch.ones(3)}, TypeError, "active must be a bool tensor"),
    "active has another length": ({"active": torch.ones(2, dtype=torch.bool)}, ValueError, "active must have shape"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_pgd_step_names_the_argument(wrong, error, message):
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    arguments = {"x": x, "grad": grad, "x0": x0, "step_size": 0.1, "eps": 0.1} | wrong
    before = x.clone()
    with pytest.raises(error, match=message):
        ops.pgd_step_(arguments.pop("x"), arguments.pop("grad"), arguments.pop("x0"), **arguments)
    assert torch.equal(x, before)


def test_the_centre_must_not_move_with_the_iterate():
    x = torch.rand(3, 4)
    for x0 in (x, x.detach(), x[:1].expand(3, 4)):
        with pytest.raises(ValueError, match="x0 must not share its memory with x"):
            ops.pgd_step_(x, torch.randn(3, 4), x0, step_size=0.1, eps=0.1, norm="l2")
        with pytest.raises(ValueError, match="x0 must not share its memory with x"):
            ops.project_(x, x0, eps=0.1)
    with pytest.raises(ValueError, match="x0 must not share its memory with x"):
        ops.apgd_step_(x, x.clone(), torch.zeros(3), x, ops.apgd_state(x, steps=3, eps=0.1), eps=0.1)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids must be an int64 tensor"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "ids must have shape"),
        ({"eps": float("inf")}, ValueError, "eps must be finite"),
        ({"x0": torch.tensor(1.0)}, ValueError, "x0 must have a batch dimension"),
        ({"x0": torch.zeros(3, dtype=torch.int32)}, TypeError, "x0 must be float32"),
    ],
)
def test_random_start_names_the_argument(wrong, error, message):
    arguments = {"x0": torch.zeros(3, 4), "eps": 0.1} | wrong
    with pytest.raises(error, match=message):
        ops.random_start(arguments.pop("x0"), **arguments)


def test_an_x_that_requires_grad_is_fine_without_gradients():
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    x.requires_grad_()
    with torch.no_grad():
        assert ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.1) is x
    out = ops.pgd_step(x, grad, x0.requires_grad_(), step_size=0.1, eps=0.1)
    assert not out.requires_grad


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 8)[:, ::2]}, "every sample of x must be dense"),
        ({0: torch.zeros(1, 4).expand(3, 4)}, "samples of x overlap"),
        ({0: torch.zeros(3, 4, dtype=torch.int32)}, "x must be float32"),
        ({1: torch.zeros(4, 4)}, "grad must have x's shape"),
        ({2: torch.zeros(3, 4).double()}, "x0 must have x's dtype"),
        ({4: torch.zeros(2)}, "step_size_tensor must be contiguous"),
        ({6: torch.zeros(3, dtype=torch.float64)}, "eps_tensor must be contiguous"),
        ({7: "l7"}, "norm must be one of"),
        ({9: torch.zeros(2, 4)}, "lo_tensor must be"),
        ({11: torch.zeros(3, 8)[:, :4]}, "hi_tensor must have packed samples"),
        ({12: 2.0}, "sparsity must lie in"),
        ({13: torch.ones(3)}, "active must be a contiguous bool"),
    ],
)
def test_direct_calls_are_checked_too(change, message):
    arguments = [*make((3, 4), torch.float32, "cpu"), 0.1, None, 0.1, None, "l2", 0.0, None, 1.0, None, 0.99, None]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.pgd_step_(*arguments)


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 2, 4, 5).permute(0, 2, 3, 1)}, "x0 must be contiguous or channels_last"),
        ({8: torch.zeros(3)}, "ids must be a contiguous int64"),
        ({9: torch.zeros(2, dtype=torch.int64)}, "key must be one int64"),
    ],
)
def test_direct_random_starts_are_checked_too(change, message):
    arguments = [torch.zeros(3, 4, 5, 2), 0.1, None, "l2", 0.0, None, 1.0, None, torch.arange(3), torch.tensor([1])]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.random_start(*arguments)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_checks_can_be_traced(mode):
    """They look at no memory: tracers hand over tensors that have none."""
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    step = functools.partial(ops.pgd_step, step_size=0.1, eps=0.1)
    traced = make_fx(step, tracing_mode=mode)(x, grad, x0)
    torch.testing.assert_close(traced(x, grad, x0), step(x, grad, x0), rtol=0, atol=0)
    whole = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x, grad, x0), step(x, grad, x0), rtol=0, atol=0)

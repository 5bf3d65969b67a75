"""Every check of the wrappers and of the bindings, each with the argument it names."""

import functools
from dataclasses import fields

import pytest
import torch
from op_inputs import make
from torch.fx.experimental.proxy_tensor import make_fx

from fastlip import ops
from fastlip.ops import _bindings

X = torch.zeros(3, 4)
YES = torch.ones(3, dtype=torch.bool)
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
        ({3: float("inf")}, "step_size must be finite"),
        ({5: -0.1}, "eps must be at least 0"),
        ({5: float("nan")}, "eps must be at least 0"),
        ({8: 2.0}, "bounds must satisfy lower <= upper"),
        ({0: X, 2: X[:]}, "x must not share its memory with x0"),
        ({2: X.to("meta")}, "all tensors must be on cpu, got one on meta"),
        ({19: X}, "best and better go together"),
        ({20: YES}, "best and better go together"),
        ({19: X.double(), 20: YES}, "best must have x's dtype"),
        ({19: torch.zeros(4, 3).T, 20: YES}, "best must have x's shape and memory layout"),
        ({19: X[:1].expand(3, 4), 20: YES}, "samples of best overlap"),
        ({19: X, 20: YES[:2]}, "better must be a contiguous bool"),
        ({0: X, 19: X[:], 20: YES}, "best must not share its memory with x"),
        ({1: X, 19: X[:], 20: YES}, "best must not share its memory with grad"),
        ({2: X, 19: X[:], 20: YES}, "best must not share its memory with x0"),
        ({14: X, 19: X[:], 20: YES}, "best must not share its memory with model_input"),
        ({0: X, 14: X[:]}, "model_input must not share its memory with x"),
        ({21: torch.zeros(3)}, "not_finite must be a contiguous bool"),
        ({13: YES, 21: YES[:]}, "not_finite must not share its memory with active"),
        ({19: X, 20: YES, 21: YES[:]}, "not_finite must not share its memory with better"),
    ],
)
def test_direct_calls_are_checked_too(change, message):
    arguments = [*make((3, 4), torch.float32, "cpu"), 0.1, None, 0.1, None, "l2", 0.0, None, 1.0, None, 0.99, None]
    arguments += [None, 0.0, None, 1.0, None, None, None, None]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.pgd_step_(*arguments)


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize("buffer", ["x_prev", "x_best", "grad_best"])
def test_direct_calls_of_apgd_are_checked_too(buffer):
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    state = ops.apgd_state(x, steps=3, eps=0.1)
    tensors = (x, grad, torch.zeros(3), x0, *(getattr(state, f.name) for f in fields(state)))
    rest = (0.75, 0.75, None, None, 0.0, None, 1.0, None)
    saved = (getattr(state, buffer), YES, None)
    with pytest.raises(RuntimeError, match=f"{buffer} must not share its memory with best"):
        torch.ops.fastlip.apgd_step_(*tensors, 0.1, None, "linf", 0.0, None, 1.0, None, *rest, *saved)
    with pytest.raises(RuntimeError, match="eps must be finite for norm l1"):
        torch.ops.fastlip.apgd_step_(*tensors, float("inf"), None, "l1", 0.0, None, 1.0, None, *rest)


@pytest.mark.parametrize("name", ["grad", "eps", "active"])
def test_what_bindings_refuse_is_brought_into_order(name):
    """Wrappers try an operator on its arguments as they are, and bring them into order where that is refused."""
    x, grad, x0 = make((3, 2, 4, 5), torch.float32, "cpu")
    given = {"grad": grad, "eps": torch.full((3,), 0.3), "active": torch.tensor([True, False, True])}
    otherwise = {
        "grad": grad.to(memory_format=torch.channels_last),
        "eps": given["eps"].double(),
        "active": given["active"].repeat_interleave(2)[::2],
    }
    want = ops.pgd_step(x, x0=x0, step_size=0.1, **given)
    got = ops.pgd_step(x, x0=x0, step_size=0.1, **given | {name: otherwise[name]})
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_errors_of_a_device_are_not_refusals():
    """What was launched may have run: it is not to be tried again."""

    def fail(*arguments):
        raise RuntimeError("fastlip: CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _bindings.tried(fail)


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

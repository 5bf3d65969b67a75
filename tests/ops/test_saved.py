"""What steps save: the iterate that they leave where it is better, and whether its gradient is finite.

Beside that a step is to do what it does without: compared bit for bit, on every backend and instruction set.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from op_inputs import DEVICES, DTYPES, INTERPRETED, NORMS, SHAPES, make
from torch import Tensor

from fastlip import ops
from fastlip.ops import reference
from fastlip.ops._schemas import Saved

pytestmark = [
    pytest.mark.parametrize(
        "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
    )
]
STEPS = ["pgd", "apgd"]
READ = [torch.float32, torch.float16, torch.bfloat16]
#: Beyond what a block of a GPU has on chip, where what models read makes no difference to what is saved.
LARGE = [] if INTERPRETED else [(2, 3, 112, 113)]


def spoil(grad: Tensor) -> tuple[Tensor, Tensor]:
    """``grad`` with one element of most samples not finite, the others as large as can be; and which samples, [B]."""
    grad = grad.clone()
    flat = grad.view(len(grad), -1)
    size = flat.shape[1]
    flat[:, 0] = torch.finfo(grad.dtype).max
    for i in range(len(flat)):
        if i % 4:
            place = (0, size - 1, size // 2, 7919 * i % size)[(i + size) % 4]
            flat[i, place] = (math.nan, math.inf, -math.inf)[i % 4 - 1]
    return grad, torch.arange(len(flat), device=grad.device) % 4 > 0


def masks(batch: int, device: str) -> list[Tensor]:
    every = torch.ones(batch, dtype=torch.bool, device=device)
    return [every, ~every, torch.arange(batch, device=device) % 2 == 0]


def step(which: str, x: Tensor, grad: Tensor, x0: Tensor, norm: str, state: ops.APGDState | None = None, **options):
    """One step of either attack on a copy of x, from a copy of ``state``; both after it."""
    x = x.clone(memory_format=torch.preserve_format) if x._base is None else x
    if which == "pgd":
        return ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.3, norm=norm, **options), None
    state = begun(x, norm) if state is None else copied(state)
    loss = torch.linspace(-1.0, 1.0, len(x), device=x.device)
    return ops.apgd_step_(x, grad, loss, x0, state, eps=0.3, norm=norm, **options), state


def begun(x: Tensor, norm: str) -> ops.APGDState:
    """At a checkpoint: samples whose loss is below that of a best iterate, which lies elsewhere, restart from it."""
    state = ops.apgd_state(x, steps=10, eps=0.3, norm=norm)
    state.x_best.copy_(x.flip(0))
    state.grad_best.fill_(0.5)
    state.x_prev.copy_(x * 0.5)
    state.schedule[3] = 3
    state.counters[:, 0] = 3
    state.counters[:, 4] = 2 * state.counters[:, 4] + 2
    return state


def copied(state: ops.APGDState) -> ops.APGDState:
    return replace(state, **{f.name: getattr(state, f.name).clone() for f in fields(state)})


def assert_saves(which: str, x: Tensor, grad: Tensor, x0: Tensor, norm: str, lost: Tensor, best: Tensor, **options):
    """For each mask of better and active samples; ``best`` is filled anew for each."""
    active_or_not = [None, *masks(len(x), x.device)]
    read = options.get("model_input")
    for active in active_or_not:
        want, after = step(which, x, grad, x0, norm, active=active, **options)
        want, fed = want.clone(), None if read is None else read.values.clone()
        on = masks(len(x), x.device)[0] if active is None else active
        for better in masks(len(x), x.device):
            before = torch.arange(x.numel(), device=x.device).reshape(x.shape).to(x.dtype)
            best.copy_(before)
            flags = masks(len(x), x.device)[2].roll(1)  # some are set already
            not_finite, given = flags.clone(), better.clone()
            saved = {"best": best, "better": given, "not_finite": not_finite}
            got, state = step(which, x, grad, x0, norm, active=active, **saved, **options)
            assert_equal(got, want)
            assert_equal(best, torch.where((better & on).view(-1, *[1] * (x.dim() - 1)), x, before))
            assert_equal(not_finite, flags | (lost & on))
            assert_equal(given, better)
            for f in fields(state) if state else ():
                assert_equal(getattr(state, f.name), getattr(after, f.name))
            if read is not None:
                assert_equal(read.values, fed)


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("which", STEPS)
def test_best_and_gradients_that_are_not_finite(device, which, shape, dtype, norm):
    x, grad, x0 = make(shape, dtype, device)
    grad, lost = spoil(grad)
    assert_saves(which, x, grad, x0, norm, lost, torch.empty_like(x))

"""What steps save: the iterate that they leave where it is better, and whether its gradient is finite.

Beside that a step is to do what it does without: compared bit for bit, on every backend and instruction set.
"""

import math
from dataclasses import fields

import pytest
import torch
from op_inputs import DEVICES, DTYPES, INTERPRETED, NORMS, SHAPES, make
from torch import Tensor

from fastlip import ops

pytestmark = [
    pytest.mark.parametrize(
        "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
    )
]
STEPS = ["pgd", "apgd"]
READ = [torch.float32, torch.float16, torch.bfloat16]
#: Beyond what a block of a GPU has on chip.
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


def masks(batch: int, device: str) -> list[tuple[Tensor | None, Tensor]]:
    """Pairs of active and better samples: all, none, and some of each."""
    every = torch.ones(batch, dtype=torch.bool, device=device)
    some = torch.arange(batch, device=device) % 2 == 0
    others = torch.arange(batch, device=device) % 3 > 0
    if INTERPRETED:
        return [(None, some), (others, every)]
    return [(None, every), (None, ~every), (some, every), (~every, every), (others, some)]


def step(which: str, x: Tensor, grad: Tensor, x0: Tensor, norm: str, **options) -> ops.APGDState | None:
    """One step of either attack on x, in place; APGD's state after it."""
    if which == "pgd":
        assert ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.3, norm=norm, **options) is x
        return None
    state = begun(x, norm)
    loss = torch.linspace(-1.0, 1.0, len(x), device=x.device)
    assert ops.apgd_step_(x, grad, loss, x0, state, eps=0.3, norm=norm, **options) is x
    return state


def begun(x: Tensor, norm: str) -> ops.APGDState:
    """At a checkpoint where each sample whose loss is at most 0 restarts from a best iterate that lies elsewhere."""
    state = ops.apgd_state(x, steps=10, eps=0.3, norm=norm)
    state.x_best.copy_(x.flip(0) * 0.5)
    state.grad_best.fill_(0.5)
    state.x_prev.copy_(x * 0.5)
    state.schedule[3] = 3
    state.counters[:, 0] = 3
    state.counters[:, 4] = 2 * state.counters[:, 4] + 2
    return state


def assert_equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def kept(t: Tensor) -> Tensor:
    """A copy with the strides of t."""
    copy = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device=t.device)
    return copy.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def assert_saves(
    which: str, x: Tensor, grad: Tensor, x0: Tensor, norm: str, lost: Tensor, best: Tensor | None = None, read=None
) -> None:
    """For masks of all kinds; ``best``: what is to be written, in any layout."""
    best = torch.empty_like(x) if best is None else best
    before = torch.arange(x.numel(), device=x.device).reshape(x.shape).to(x.dtype)
    fed = {} if read is None else {"model_input": read}
    for active, better in masks(len(x), x.device):
        want = kept(x)
        after = step(which, want, grad, x0, norm, active=active, **fed)
        want_read = None if read is None else read.values.clone()
        best.copy_(before)
        marked = torch.arange(len(x), device=x.device) % 5 == 2  # some are set already
        flags, given, got = marked.clone(), better.clone(), kept(x)
        state = step(which, got, grad, x0, norm, active=active, best=best, better=given, not_finite=flags, **fed)
        assert_equal(got, want)
        on = torch.ones_like(better) if active is None else active
        assert_equal(best, torch.where((better & on).reshape(-1, *[1] * (x.dim() - 1)), x, before))
        assert_equal(flags, marked | (lost & on))
        assert_equal(given, better)
        for f in fields(state) if state else ():
            assert_equal(getattr(state, f.name), getattr(after, f.name))
        if read is not None:
            assert_equal(read.values, want_read)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("which", STEPS)
def test_saved_matches(device, which, shape, dtype, norm):
    x, grad, x0 = make(shape, dtype, device)
    grad, lost = spoil(grad)
    assert_saves(which, x, grad, x0, norm, lost)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", READ, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 7), *LARGE], ids=str)
@pytest.mark.parametrize("which", STEPS)
def test_saved_matches_with_what_the_model_reads(device, which, shape, dtype, norm):
    """The gradient is looked at before it is divided by a standard deviation, which takes large elements beyond any."""
    x, grad, x0 = make(shape, torch.float32, device)
    grad, lost = spoil(grad.to(dtype))
    read = ops.model_input(x, mean=0.25, std=torch.full(shape[1:], 0.25, device=device), dtype=dtype)
    assert_saves(which, x, grad, x0, norm, lost, read=read)
    assert_saves(which, x, grad, x0, norm, lost, read=ops.model_input(x, mean=0.5, std=0.5, dtype=dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", STEPS)
def test_saved_matches_in_any_layout(device, which, dtype, norm):
    """Beside strides of a batch of its own for each: x, its gradient, the centre and the best."""
    x, grad, x0 = make((6, 3, 8, 10), dtype, device)
    grad, lost = spoil(grad)
    last = {"memory_format": torch.channels_last}
    rows = torch.zeros(12, 3, 8, 10, dtype=dtype, device=device)
    odd = torch.zeros(6, 241, dtype=dtype, device=device)[:, 1:].view(6, 3, 8, 10)
    layouts = {
        "channels_last": [*(t.to(**last) for t in (x, grad, x0)), torch.empty_like(x, **last)],
        "mixed": [x.to(**last), grad, x0, torch.empty_like(x, **last)],
        "best by other strides": [x, grad, x0, rows[::2]],
        "best that vectors do not cover": [x, grad, x0, odd],
        "x by other strides": [x.repeat_interleave(2, 0)[::2], grad, x0, torch.empty_like(x)],
        "x and best by other strides": [x.repeat_interleave(2, 0)[::2], grad, x0, rows[1::2]],
        "x not dense": [x.repeat_interleave(2, 3)[..., ::2], grad, x0, torch.empty_like(x)],
        "one centre": [x, grad, x0[:1].expand_as(x), torch.empty_like(x)],
    }
    for a, g, c, best in layouts.values():
        assert_saves(which, a, g, c, norm, lost, best)
    assert_equal(rows[::2], rows[1::2])  # each wrote its own rows, to the same


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", [0, 1, 2500, 5001, 5002])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", STEPS)
def test_one_element_is_enough(device, which, value, place, norm):
    x, grad, x0 = make((2, 5003), torch.float32, device)
    grad[1, place] = value
    flags = torch.zeros(2, dtype=torch.bool, device=device)
    step(which, x, grad, x0, norm, not_finite=flags)
    assert flags.tolist() == [False, True]


@pytest.mark.parametrize("which", STEPS)
@pytest.mark.parametrize("what", ["best", "not_finite"])
def test_each_is_saved_without_the_other(device, which, what):
    x, grad, x0 = make((4, 3, 5, 5), torch.float32, device)
    grad, lost = spoil(grad)
    before = x.clone()
    if what == "best":
        best, better = torch.zeros_like(x), torch.arange(4, device=device) < 2
        step(which, x, grad, x0, "l2", best=best, better=better)
        assert_equal(best, torch.where(better.reshape(4, 1, 1, 1), before, 0.0))
    else:
        flags = torch.zeros_like(lost)
        step(which, x, grad, x0, "l2", not_finite=flags)
        assert_equal(flags, lost)


def test_best_of_the_attack_is_not_that_of_the_largest_loss(device):
    """APGD restarts from the latter; the former is what an attack returns."""
    x, grad, x0 = make((3, 20), torch.float32, device)
    state, best = ops.apgd_state(x, steps=10, eps=0.3), torch.zeros_like(x)
    better = torch.tensor([True, False, True], device=device)
    first = x.clone()
    ops.apgd_step_(x, grad, torch.ones(3, device=device), x0, state, eps=0.3, best=best, better=better)
    second = x.clone()
    ops.apgd_step_(x, grad, torch.zeros(3, device=device), x0, state, eps=0.3, best=best, better=~better)
    assert_equal(state.x_best, first)
    assert_equal(best, torch.where(better[:, None], first, second))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("which", STEPS)
def test_empty(device, which, shape):
    x = torch.empty(shape, device=device)
    flags, better = (torch.zeros(len(x), dtype=torch.bool, device=device) for _ in range(2))
    step(which, x, x.clone(), x.clone(), "l2", best=x.clone(), better=better, not_finite=flags)
    assert not flags.any()


X = torch.zeros(3, 4)
YES = torch.ones(3, dtype=torch.bool)
WRONG = {
    "best alone": ({"best": X.clone()}, ValueError, "best and better go together"),
    "better alone": ({"better": YES}, ValueError, "best and better go together"),
    "best is a list": ({"best": [1.0], "better": YES}, TypeError, "best must be a tensor"),
    "best has another shape": ({"best": X[:, :2], "better": YES}, ValueError, "best must have x's shape"),
    "best has another dtype": ({"best": X.double(), "better": YES}, TypeError, "best must have x's dtype"),
    "best is elsewhere": ({"best": X.to("meta"), "better": YES}, ValueError, "best must be on x's device"),
    "best is transposed": (
        {"best": torch.zeros(4, 3).T, "better": YES},
        ValueError,
        "best must be dense in x's memory",
    ),
    "best is expanded": ({"best": X[:1].expand(3, 4), "better": YES}, ValueError, "best must be dense in x's memory"),
    "better is no bool": ({"best": X.clone(), "better": torch.ones(3)}, TypeError, "better must be a bool tensor"),
    "better is short": ({"best": X.clone(), "better": YES[:2]}, ValueError, "better must have shape"),
    "better is elsewhere": ({"best": X.clone(), "better": YES.to("meta")}, ValueError, "better must have shape"),
    "not_finite is no bool": ({"not_finite": torch.ones(3)}, TypeError, "not_finite must be a bool tensor"),
    "not_finite is long": ({"not_finite": YES.repeat(2)}, ValueError, "not_finite must have shape"),
    "not_finite is not contiguous": (
        {"not_finite": YES.repeat_interleave(2)[::2]},
        ValueError,
        "not_finite must be contiguous",
    ),
}


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("which", STEPS)
def test_saved_names_the_argument(device, which, wrong, error, message):
    moved = {name: t.to(device) if isinstance(t, Tensor) and t.device.type == "cpu" else t for name, t in wrong.items()}
    x, grad, x0 = make((3, 4), torch.float32, device)
    before = x.clone()
    with pytest.raises(error, match=message):
        step(which, x, grad, x0, "linf", **moved)
    assert torch.equal(x, before)


@pytest.mark.parametrize("other", ["active", "better"])
@pytest.mark.parametrize("which", STEPS)
def test_flags_are_in_memory_of_their_own(device, which, other):
    x, grad, x0 = make((3, 4), torch.float32, device)
    flags = torch.zeros(3, dtype=torch.bool, device=device)
    options = {"best": torch.zeros_like(x), "better": ~flags} | {other: flags[:], "not_finite": flags}
    with pytest.raises(ValueError, match=f"not_finite must not share its memory with {other}"):
        step(which, x, grad, x0, "linf", **options)


@pytest.mark.parametrize("other", ["x", "x0", "grad", "model_input", "x_prev", "x_best", "grad_best"])
def test_best_is_in_memory_of_its_own(device, other):
    x, grad, x0 = make((3, 4), torch.float32, device)
    state, read = ops.apgd_state(x, steps=3, eps=0.1), ops.model_input(x)
    best = {"x": x, "x0": x0, "grad": grad, "model_input": read.values}.get(other, getattr(state, other, None))
    options = {"eps": 0.1, "model_input": read, "best": best, "better": torch.ones(3, dtype=torch.bool, device=device)}
    with pytest.raises(ValueError, match=f"best must not share its memory with {other}"):
        ops.apgd_step_(x, grad, torch.zeros(3, device=device), x0, state, **options)
    if not hasattr(state, other):
        with pytest.raises(ValueError, match=f"best must not share its memory with {other}"):
            ops.pgd_step_(x, grad, x0, step_size=0.1, **options)


def test_opcheck(device):
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, x0 = make((3, 2, 4, 4), dtype, device)
        better = torch.arange(3, device=device) > 0
        saved = (torch.zeros_like(x), better, torch.zeros_like(better))
        state = ops.apgd_state(x, steps=5, eps=0.3)
        rows = [getattr(state, f.name) for f in fields(state)]
        read = (None, 0.0, None, 1.0, None)
        for norm in NORMS:
            ball = (0.3, None, norm, 0.0, None, 1.0, None)
            arguments = (x, grad, x0, 0.1, None, *ball, 0.99, None, *read, *saved)
            torch.library.opcheck(torch.ops.fastlip.pgd_step_.default, arguments)
            arguments = (x, grad, torch.zeros_like(state.best_loss), x0, *rows, *ball, 0.75, 0.75, None, *read, *saved)
            torch.library.opcheck(torch.ops.fastlip.apgd_step_.default, arguments)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", STEPS)
def test_saving_compiles_without_a_graph_break(device, which, norm):
    x, grad, x0 = make((4, 2, 4, 4), torch.float32, device)
    grad, _ = spoil(grad)

    def attack_step(x: Tensor, grad: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        x, best, flags = x.clone(), torch.zeros_like(x), torch.zeros(4, dtype=torch.bool, device=x.device)
        step(which, x, grad * 2, x0, norm, best=best, better=x.flatten(1).sum(1) > 15, not_finite=flags)
        return x, best, flags

    compiled = torch.compile(attack_step, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x, grad, x0), attack_step(x, grad, x0), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)

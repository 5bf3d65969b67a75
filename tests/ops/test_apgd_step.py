"""apgd_step_ against its definition on every backend, and against Auto-PGD written from the papers."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from op_inputs import ATOL, DEVICES, DTYPES, INTERPRETED, NORMS, SHAPES, make, overshoot
from torch import Tensor

from fastlip import ops
from fastlip.ops import reference

on_devices = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)
PER_ELEMENT = ("x_prev", "x_best", "grad_best")


def some_state(x: Tensor, x0: Tensor, steps: int, eps, norm: str, seed: int = 0) -> ops.APGDState:
    """State in the middle of an attack: samples at the start, before, at and after a checkpoint, in each case of it."""
    g = torch.Generator().manual_seed(seed)
    batch = len(x)
    state = ops.apgd_state(x, steps=steps, eps=eps, norm=norm)
    for name in PER_ELEMENT:
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64) * 0.1
        value = noise if name == "grad_best" else (x0.cpu().double() + noise).clamp(0, 1)
        if norm == "l1" and name == "x_best":  # sparse, as an L1 attack's is
            value = torch.where(torch.rand(x.shape, generator=g) < 0.3, value, x0.cpu().double())
        getattr(state, name).copy_(value)
    for rows in (state.best_loss, state.past_loss):
        rows.copy_(torch.randn(rows.shape, generator=g))
    state.past_loss[::3, 1] = state.best_loss[::3]  # no progress
    checkpoints = [k for k, w in enumerate(ops.apgd_schedule(steps, norm)) if w]
    kinds = torch.tensor([0, checkpoints[0], checkpoints[0], checkpoints[1], 1, steps + 5])
    state.counters[:, 0] = kinds[torch.arange(batch) % len(kinds)]
    state.counters[:, 1] = torch.randint(0, steps // 4, (batch,), generator=g)
    state.counters[:, 2] = torch.randint(0, 2, (batch,), generator=g)
    if norm == "l1":
        size = x[0].numel()
        state.counters[:, 3] = torch.randint(1, size + 1, (batch,), generator=g)
        state.counters[::2, 4] = size // 4
    return state


def expected(x, grad, loss, x0, state, eps, norm, bounds=(0.0, 1.0), active=None) -> tuple[Tensor, ops.APGDState]:
    x, state = x.clone(), copy.deepcopy(state)
    arithmetic = reference.compute_dtype(x.dtype)
    split = [(0.0, v) if isinstance(v, Tensor) else (v, None) for v in (eps, *bounds)]
    (radius, radii), (lo, los), (hi, his) = split
    radii = None if radii is None else radii.to(arithmetic)
    los, his = (None if t is None else t.to(arithmetic).expand(x.shape) for t in (los, his))
    values = [getattr(state, n) for n in (*PER_ELEMENT, "best_loss", "past_loss", "step_size", "counters", "schedule")]
    reference.apgd_step_(
        x, grad, loss.to(arithmetic), x0, *values, radius, radii, norm, lo, los, hi, his, 0.75, 0.75, active
    )  # fmt: skip
    return x, state


def assert_same(got: tuple[Tensor, ops.APGDState], want: tuple[Tensor, ops.APGDState], norm: str) -> None:
    assert_close = torch.testing.assert_close
    assert_close(got[0], want[0], rtol=0, atol=0 if norm == "linf" else 2 * ATOL[want[0].dtype], equal_nan=True)
    for name in (*PER_ELEMENT, "best_loss", "past_loss", "counters"):
        assert_close(getattr(got[1], name), getattr(want[1], name), rtol=0, atol=0, equal_nan=True)
    assert_close(got[1].step_size, want[1].step_size, rtol=2e-7, atol=0, equal_nan=True)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12,), (2, 67), (1, 2053)] if INTERPRETED else [(7, 1), (12,), *SHAPES], ids=str)
def test_step_matches_reference(device, shape, dtype, norm):
    x, grad, x0 = make(shape, dtype, device)
    for seed, eps in enumerate((0.4,) if INTERPRETED else (0.4, 3.0)):
        loss = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).to(device)
        state = some_state(x, x0, 20, eps, norm, seed)
        want = expected(x, grad, loss, x0, state, eps, norm)
        got = x.clone()
        assert ops.apgd_step_(got, grad, loss, x0, state, eps=eps, norm=norm) is got
        assert_same((got, state), want, norm)


@pytest.mark.skipif(INTERPRETED, reason="too large for Triton's interpreter")
@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_samples_match_reference(device, dtype, norm):
    """Beyond what one block of a GPU holds on chip, and on a CPU beyond the L2 cache."""
    x, grad, x0 = make((3, 3, 224, 224), dtype, device)
    eps = {"linf": 0.03, "l2": 3.0, "l1": 500.0}[norm]
    loss = torch.tensor([0.5, 2.0, -3.0], device=device)
    state = some_state(x, x0, 20, eps, norm)
    want = expected(x, grad, loss, x0, state, eps, norm)
    got = ops.apgd_step_(x.clone(), grad, loss, x0, state, eps=eps, norm=norm)
    assert_same((got, state), want, norm)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_per_sample(device, dtype, norm):
    x, grad, x0 = make((12, 3, 5, 7), dtype, device)
    eps = torch.tensor([0.0, 0.1, 0.5, -1.0, math.nan, 2.0], device=device).repeat(2)
    active = (torch.arange(12, device=device) % 5) != 2
    channel = torch.tensor([0.0, 0.125, 0.25], device=device).reshape(3, 1, 1)
    sample = torch.linspace(0.75, 1.0, 12, device=device).to(dtype).float().reshape(12, 1, 1, 1)
    loss = torch.randn(12, generator=torch.Generator().manual_seed(1)).to(device)
    loss[3], loss[4], loss[5] = math.nan, math.inf, -math.inf
    boxes = [(0.0, 1.0), (0.25, 0.75), (channel, 1.0), (channel, sample), (-0.5, sample.expand(12, 3, 5, 7))]
    for bounds in boxes[:: 2 if INTERPRETED else 1]:
        low, high = (torch.as_tensor(b, device=device) for b in bounds)
        centre = torch.minimum(torch.maximum(x0.float(), low), high).to(dtype)
        state = some_state(x, centre, 20, 0.3, norm)
        state.step_size[7] = math.nan
        before = copy.deepcopy(state)
        want = expected(x, grad, loss, centre, state, eps, norm, bounds, active)
        got = ops.apgd_step_(x.clone(), grad, loss, centre, state, eps=eps, norm=norm, bounds=bounds, active=active)
        assert_same((got, state), want, norm)
        assert torch.equal(got[2], x[2])
        for name in (*PER_ELEMENT, "best_loss", "past_loss", "step_size", "counters"):
            assert torch.equal(getattr(state, name)[2], getattr(before, name)[2]), name


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_layouts(device, norm):
    x, grad, x0 = make((6, 3, 9, 6), torch.float32, device)
    loss = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(device)
    want = expected(x, grad, loss, x0, some_state(x, x0, 20, 0.3, norm), 0.3, norm)
    last = {"memory_format": torch.channels_last}
    layouts = {
        "channels_last": [t.to(**last) for t in (x, grad, x0)],
        "mixed": [x.to(**last), grad, x0],
        "every other sample": [t.repeat_interleave(2, 0)[::2] for t in (x, grad, x0)],
        "every other column": [t.repeat_interleave(2, 3)[..., ::2] for t in (x, grad, x0)],
        "offset": [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in (x, grad, x0)],
    }
    for a, g, c in layouts.values():
        a = a.clone() if a.is_contiguous(memory_format=torch.channels_last) else a
        state = some_state(a, x0, 20, 0.3, norm)
        got = ops.apgd_step_(a, g, loss, c, state, eps=0.3, norm=norm)
        assert got is a
        assert_same((got, state), want, norm)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(device, norm):
    x, grad, x0 = make((6, 3, 8, 8), torch.float32, device)
    loss = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(device)
    state = some_state(x, x0, 20, 0.3, norm)
    alone = [state[i : i + 1] for i in range(6)]
    alone = [copy.deepcopy(s) for s in alone]
    whole = ops.apgd_step_(x.clone(), grad, loss, x0, state, eps=0.3, norm=norm)
    for i, one in enumerate(alone):
        at = slice(i, i + 1)
        got = ops.apgd_step_(x[at].clone(), grad[at], loss[at], x0[at], one, eps=0.3, norm=norm)
        assert torch.equal(got, whole[at])
        for name in (*PER_ELEMENT, "best_loss", "past_loss", "step_size", "counters"):
            assert torch.equal(getattr(one, name), getattr(state, name)[at]), name


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iterates_are_feasible(device, norm, dtype):
    eps = 0.3
    _, _, x0 = make((8, 301), dtype, device)
    x0[0], x0[1], x0[2, ::2] = 0.0, 1.0, 0.0
    x = ops.random_start(x0, eps=eps, norm=norm)
    state = ops.apgd_state(x, steps=10, eps=eps, norm=norm)
    g = torch.Generator().manual_seed(0)
    for _ in range(3 if INTERPRETED else 10):
        grad, loss = torch.randn(x.shape, generator=g).to(x), torch.randn(8, generator=g).to(device)
        ops.apgd_step_(x, grad, loss, x0, state, eps=eps, norm=norm)
        for t in (x, state.x_best):
            assert t.min() >= 0
            assert t.max() <= 1
            assert overshoot(t, x0, eps, norm).max() <= 0


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_empty(norm, shape):
    x = torch.empty(shape)
    state = ops.apgd_state(x, steps=3, eps=0.1, norm=norm)
    assert ops.apgd_step_(x, x, torch.zeros(shape[0]), x, state, eps=0.1, norm=norm) is x


@on_devices
def test_opcheck(device):
    x, grad, x0 = make((3, 2, 4, 4), torch.float32, device)
    radii, row = torch.full((3,), 0.2, device=device), torch.zeros(1, 2, 4, 4, device=device)
    active = torch.tensor([True, False, True], device=device)
    for norm in NORMS:
        s = some_state(x, x0, 20, 0.2, norm)
        buffers = (s.x_prev, s.x_best, s.grad_best, s.best_loss, s.past_loss, s.step_size, s.counters, s.schedule)
        box = (0.0, row, 1.0, None)
        arguments = (x, grad, torch.ones(3, device=device), x0, *buffers, 0.0, radii, norm, *box, 0.75, 0.75, active)
        torch.library.opcheck(torch.ops.fastlip.apgd_step_.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (3, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_one_captured_step_serves_a_whole_attack(norm, shape):
    """No synchronisation, and nothing of the step's number in the launch."""
    eps = {"linf": 0.03, "l2": 1.0, "l1": 20.0}[norm]
    _, _, x0 = make(shape, torch.float32, "cuda")
    target = torch.rand_like(x0)

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.sin(20 * x) - target
        return d.square().flatten(1).sum(1), 2 * d * torch.cos(20 * x)

    def run(captured: bool) -> tuple[Tensor, ops.APGDState]:
        x, state = x0.clone(), ops.apgd_state(x0, steps=15, eps=eps, norm=norm)

        def step() -> None:
            loss, grad = gradient(x)
            ops.apgd_step_(x, grad, loss, x0, state, eps=eps, norm=norm)

        if captured:
            fresh = copy.deepcopy(state)
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            x.copy_(x0)
            for f in dataclasses.fields(state):
                getattr(state, f.name).copy_(getattr(fresh, f.name))
        for _ in range(15):
            graph.replay() if captured else step()
        return x, state

    assert_same(run(True), run(False), "linf")


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 8)[:, ::2]}, "every sample of x must be dense"),
        ({1: torch.zeros(4, 4)}, "grad must have x's shape"),
        ({2: torch.zeros(3, dtype=torch.float64)}, "loss must be contiguous"),
        ({3: torch.zeros(3, 4).double()}, "x0 must have x's dtype"),
        ({4: torch.zeros(1, 4).expand(3, 4)}, "samples of x_prev overlap"),
        ({5: torch.zeros(3, 5)}, "x_best must have x's shape"),
        ({6: torch.zeros(3, 4).half()}, "grad_best must have x's dtype"),
        ({7: torch.zeros(2)}, "best_loss must be contiguous"),
        ({8: torch.zeros(3)}, "past_loss must be contiguous"),
        ({9: torch.zeros(6)[::2]}, "step_size must be contiguous"),
        ({10: torch.zeros(3, 6)}, "counters must be contiguous"),
        ({11: torch.zeros(5)}, "schedule must be contiguous"),
        ({14: "l7"}, "norm must be one of"),
        ({19: 2.0}, "momentum must lie in"),
        ({20: -1.0}, "rho must lie in"),
        ({21: torch.ones(3)}, "active must be a contiguous bool"),
    ],
)
def test_direct_calls_are_checked_too(change, message):
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    s = ops.apgd_state(x, steps=5, eps=0.1)
    arguments = [x, grad, torch.zeros(3), x0, s.x_prev, s.x_best, s.grad_best, s.best_loss, s.past_loss, s.step_size]
    arguments += [s.counters, s.schedule, 0.1, None, "l2", 0.0, None, 1.0, None, 0.75, 0.75, None]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.apgd_step_(*arguments)


def test_rows_of_a_state():
    """Finished samples may be left out: the others go on as they would have."""
    x, grad, x0 = make((6, 3, 8, 8), torch.float32, "cpu")
    loss = torch.arange(6.0)
    state = some_state(x, x0, 20, 0.3, "linf")
    left = torch.tensor([True, False, True, True, False, True])
    some = state[left]
    whole = ops.apgd_step_(x.clone(), grad, loss, x0, state, eps=0.3)
    got = ops.apgd_step_(x[left], grad[left], loss[left], x0[left], some, eps=0.3)
    assert_same((got, some), (whole[left], state[left]), "linf")


# --- Auto-PGD as published -------------------------------------------------------------------------------------------
def published_schedule(steps: int) -> list[int]:
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(p * steps, 9)) for p in shares]


def one_projection(v: Tensor, x0: Tensor, eps: float, norm: str) -> Tensor:
    """Of one sample, by bisection over the multiplier; every other part of this test is independent of the op too."""
    d, lower, upper = v - x0, -x0, 1 - x0

    def kept(m: float) -> Tensor:
        shrunk = d / (1 + m) if norm == "l2" else d.sign() * (d.abs() - m).clamp_min(0)
        return torch.minimum(torch.maximum(shrunk, lower), upper)

    if norm == "linf":
        return (x0 + d.clamp(-eps, eps)).clamp(0, 1)
    p = 2 if norm == "l2" else 1
    low, high = 0.0, 1e6
    if kept(0.0).norm(p=p) <= eps:
        return x0 + kept(0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle).norm(p=p) <= eps else (middle, high)
    return x0 + kept(high)


def published(
    loss_and_grad, x0: Tensor, start: Tensor, eps: float, norm: str, steps: int
) -> tuple[Tensor, float, list]:
    """Algorithm 1 of Croce and Hein 2020, of 2021 for "l1", on one sample: the best point, its loss, step sizes."""

    def step(x: Tensor, grad: Tensor, length: float, kept: int) -> Tensor:
        if norm == "linf":
            way = grad.sign()
        elif norm == "l2":
            way = grad / grad.norm()
        else:
            top = grad.abs().flatten().argsort(descending=True)[:kept]
            way = torch.zeros_like(grad).flatten()
            way[top] = grad.flatten()[top].sign() / kept
            way = way.view_as(grad)
        return one_projection(x + length * way, x0, eps, norm)

    n = x0.numel()
    length = eps if norm == "l1" else 2 * eps
    kept, support = math.ceil(0.2 * n), n
    losses, lengths, bests = [], [], []
    checks = published_schedule(steps)
    last_check = 0
    best, previous = (-math.inf, start, start), start
    xs = [start]
    for k in range(steps + 1):
        x = xs[-1]
        loss, grad = loss_and_grad(x)
        losses.append(loss)
        if loss > best[0]:
            best = (loss, x, grad)
        bests.append(best[0])
        if k == steps:
            break
        window = max(steps // 25, 1)
        if norm == "l1" and k and k % window == 0:
            now = int((best[1] != x0).sum())
            kept = math.ceil(now / 1.5)
            if now / support < 0.95:
                length = eps
                x, grad = best[1:]
            else:
                length = max(length / 1.5, eps / 10)
            support = now
        elif norm != "l1" and k in checks[1:]:
            rises = sum(losses[i + 1] > losses[i] for i in range(last_check, k))
            same = bests[last_check] == bests[k] and (last_check == 0 or lengths[last_check] == lengths[last_check - 1])
            if rises < 0.75 * (k - last_check) or same:
                length /= 2
                x, grad = best[1:]
                losses[k] = best[0]
            last_check = k
        lengths.append(length)
        z = step(x, grad, length, kept)
        if norm != "l1" and k:
            z = one_projection(x + 0.75 * (z - x) + 0.25 * (x - previous), x0, eps, norm)
        previous = x
        xs.append(z)
    return best[1], best[0], lengths


@pytest.mark.parametrize("norm", NORMS)
def test_attack_is_the_published_one(norm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4)).double()
    batch, steps = (4, 24) if INTERPRETED else (24, 40)
    eps = {"linf": 0.3, "l2": 1.0, "l1": 3.0}[norm]
    x0 = torch.rand(batch, 20, dtype=torch.float64)
    labels = torch.arange(batch) % 4

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(4 * torch.sin(2 * model(x)), y, reduction="none")
        # In steps that rounding does not reach: it must not decide which of two losses is the larger.
        return (loss.detach() * 2**20).round() / 2**20, torch.autograd.grad(loss.sum(), x)[0]

    start = ops.random_start(x0, eps=eps, norm=norm)
    x, state = start.clone(), ops.apgd_state(start, steps=steps, eps=eps, norm=norm)
    lengths = []
    for _ in range(steps):
        loss, grad = losses(x, labels)
        ops.apgd_step_(x, grad, loss, x0, state, eps=eps, norm=norm)
        lengths.append(state.step_size.clone())
    loss, _ = losses(x, labels)
    best = torch.where(loss > state.best_loss, loss, state.best_loss)
    where = torch.where((loss > state.best_loss)[:, None], x, state.x_best)
    restarts = 0
    for i in range(batch):
        one = slice(i, i + 1)

        def single(x: Tensor, one: slice = one) -> tuple[float, Tensor]:
            loss, grad = losses(x, labels[one])
            return loss.item(), grad

        point, value, steps_taken = published(single, x0[one], start[one], eps, norm, steps)
        assert steps_taken == pytest.approx([length[i].item() for length in lengths], rel=1e-12)
        assert best[i].item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(where[one], point, rtol=0, atol=1e-6)
        restarts += sum(a != b for a, b in itertools.pairwise(steps_taken))
    assert restarts >= 1 + batch // 8, "the checkpoints are to be exercised"


@pytest.mark.parametrize("steps", [0, 1, 3, 10, 20, 40, 50, 75, 100, 1000])
def test_schedule(steps):
    out = ops.apgd_schedule(steps)
    want = sorted({w for w in published_schedule(steps)[1:] if w < steps})
    assert [k for k, w in enumerate(out) if w] == want
    assert sum(out) == (want[-1] if want else 0)
    if steps == 100:
        assert want == [22, 41, 57, 70, 80, 87, 93, 99]
    sparse = ops.apgd_schedule(steps, "l1")
    assert all(w in (0, max(steps // 25, 1)) for w in sparse)
    assert len(sparse) == steps
    assert not any(sparse[:1])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"state": None}, TypeError, "state must be an APGDState"),
        ({"loss": 1.0}, TypeError, "loss must be a tensor"),
        ({"loss": torch.zeros(3, dtype=torch.int64)}, TypeError, "loss must be float32"),
        ({"loss": torch.zeros(2)}, ValueError, "loss must be a float or have shape"),
        ({"grad": torch.zeros(3, 5)}, ValueError, "grad must have x's shape"),
        ({"x0": torch.zeros(3, 4).double()}, TypeError, "x0 must have x's dtype"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"eps": math.inf, "norm": "l1"}, ValueError, "eps must be finite"),
        ({"norm": "l0"}, ValueError, "norm must be one of"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds must satisfy"),
        ({"momentum": 1.5}, ValueError, "momentum must lie in"),
        ({"rho": -0.1}, ValueError, "rho must lie in"),
        ({"active": torch.ones(3)}, TypeError, "active must be a bool tensor"),
        ({"state": ops.apgd_state(torch.zeros(2, 4), steps=5, eps=0.1)}, ValueError, "x_prev must have x's shape"),
        ({"state": ops.apgd_state(torch.zeros(3, 4).double(), steps=5, eps=0.1)}, TypeError, "x_prev must have x's dt"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, message):
    x, grad, x0 = make((3, 4), torch.float32, "cpu")
    state = ops.apgd_state(x, steps=5, eps=0.1)
    arguments = {"grad": grad, "loss": torch.zeros(3), "x0": x0, "state": state, "eps": 0.1} | wrong
    before = x.clone()
    with pytest.raises(error, match=message):
        ops.apgd_step_(x, **arguments)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"eps": -0.1}, ValueError, "eps must be at least 0"),
        ({"norm": "l3"}, ValueError, "norm must be one of"),
        ({"step_size": math.inf}, ValueError, "step_size must be finite"),
    ],
)
def test_wrong_states_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        ops.apgd_state(torch.zeros(3, 4), **({"steps": 5, "eps": 0.1} | wrong))


def test_state_of_another_layout_or_dtype_is_refused():
    x, grad, x0 = make((3, 4, 5, 5), torch.float32, "cpu")
    state = ops.apgd_state(x.to(memory_format=torch.channels_last), steps=5, eps=0.1)
    with pytest.raises(ValueError, match="memory layout that state was made for"):
        ops.apgd_step_(x, grad, torch.zeros(3), x0, state, eps=0.1)
    state = ops.apgd_state(x, steps=5, eps=0.1)
    state.counters = state.counters.long()
    with pytest.raises(ValueError, match=r"state.counters must be contiguous, \[3, 6\] int32"):
        ops.apgd_step_(x, grad, torch.zeros(3), x0, state, eps=0.1)

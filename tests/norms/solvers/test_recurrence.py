"""The recurrence meets the conditions of CUDA graphs, checked without a GPU, and graphs change no result."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip.norms import Composed, NormInterval, Operator, conv_norm, conv_operator
from fastlip.norms._solvers import cuda_graphs
from fastlip.norms._solvers.batched_operator import batched_operator
from fastlip.norms._solvers.iteration_config import DEVICE_LIMITS, IterationConfig
from fastlip.norms._solvers.power import _Steps
from fastlip.norms._solvers.recurrence import Reading, Recurrence
from fastlip.norms._solvers.start_vectors import on_device
from fastlip.norms._solvers.tridiagonal import normal_equations

VECTORS = 3
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")


def on(device: str, op: Operator) -> Operator:
    return op.with_weight(op.weight.to(device))


def convolutions(device: str = "cpu") -> list[Operator]:
    g = torch.Generator().manual_seed(0)
    shapes = ([6, 4, 3, 3], [5, 3, 3, 3], [7, 1, 3, 3])
    weights = [torch.randn(shape, generator=g) for shape in shapes]
    ops = [
        conv_operator(weights[0], (9, 7), padding=1),
        conv_operator(weights[1], (5, 5), stride=2),
        conv_operator(weights[2], (6, 5), padding=1, groups=7),
    ]
    return [on(device, op) for op in ops]


def composed(device: str = "cpu") -> list[Composed]:
    g = torch.Generator().manual_seed(1)

    def layer() -> Operator:
        return on(device, conv_operator(torch.randn(4, 4, 3, 3, generator=g) / 6, (6, 6), padding=1))

    return [Composed((layer(), layer()), (3.0, 3.0), 0.5, 1.0), Composed((layer(), layer()), (3.0, 3.0))]


KINDS = {"convolutions": convolutions, "composed": composed}


def begun(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Recurrence:
    operators = batched_operator(KINDS[kind](), VECTORS, dtype)
    g = torch.Generator().manual_seed(2)
    starts = []
    for place in operators.domain:
        v = torch.randn(VECTORS, (place.stop - place.start) // VECTORS, generator=g, dtype=torch.float64)
        starts.append((v / torch.linalg.vector_norm(v, dim=1, keepdim=True)).to(dtype).flatten())
    if device != "cpu":
        operators = batched_operator(KINDS[kind](device), VECTORS, dtype)
    return Recurrence(operators, torch.cat(starts).to(device))


def plain(step: Callable[[], None]) -> None:
    step()


class Watch(TorchDispatchMode):
    """Fails on an operation that would make the host wait for a device; notes where operator_step_ works in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITING, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), "a boolean index waits for the device"
        if name == "operator_step_":
            self.steps.append(tuple(a.data_ptr() for a in args if isinstance(a, Tensor)))
        return func(*args, **(kwargs or {}))


def test_the_watch_notices() -> None:
    for read in (lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool(t.any()), torch.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), Watch():
            read(torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [False, True])
def test_a_chunk_reads_nothing_on_the_host(kind: str, pairs: bool) -> None:
    run = begun(kind)
    if pairs:
        run.work_in_pairs(plain)
    run.advance(4)
    fixed = run.active.data_ptr(), run._u.data_ptr()
    with Watch() as watch:
        run.active.copy_(torch.tensor([True] + [False] * (len(run.active) - 1)))
        run.advance(14)
    assert (run.active.data_ptr(), run._u.data_ptr()) == fixed
    assert run.steps == 18
    parts = 2 if kind == "composed" else 1
    assert len(watch.steps) == 14 * 2 * parts
    # Every tensor but the current x, target and squares of a plain step stays where it is; in pairs all do.
    pair = 4 * parts
    again = [watch.steps[i : i + pair] for i in range(0, len(watch.steps), pair)]
    if pairs:
        assert all(other == again[0] for other in again)
    assert len({step[-1] for step in watch.steps}) == 1  # the mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_runs_where_there_are_no_numbers_to_read(kind: str) -> None:
    operators = batched_operator(KINDS[kind]("meta"), VECTORS, torch.float32)
    start = torch.empty(operators.domain[-1].stop, device="meta")
    for pairs in (False, True):
        run = Recurrence(operators, start)
        if pairs:
            run.work_in_pairs(plain)
        run.advance(6)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
            run.coefficients(6)
    steps = _Steps(batched_operator(KINDS[kind]("meta"), VECTORS, torch.float64), start.double())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        steps.advance(10)  # its read comes last
    steps._chunk(10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_on_fixed_memory_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    one, two = begun(kind, dtype), begun(kind, dtype)
    two.work_in_pairs(plain)
    for run in (one, two):
        run.advance(10)
        run.active[-1] = False
        run.advance(12)
    for a, b in zip(one.coefficients(22), two.coefficients(22), strict=True):
        on = slice(0, VECTORS * (len(one.active) - 1))
        np.testing.assert_array_equal(a[on], b[on])
        np.testing.assert_array_equal(a[:, :10], b[:, :10])
    for a, b in zip(one.basis(slice(0, 1), 23), two.basis(slice(0, 1), 23), strict=True):
        assert torch.equal(a, b)
    two.advance(3)
    assert two.steps == 26  # whole pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_begin_at_sixteen_bytes(dtype: torch.dtype) -> None:
    run = begun("convolutions", dtype)  # 3 * (4 * 63 + 3 * 25 + 7 * 30) is odd
    run.advance(2)
    assert run._vector(0).numel() % 2 == 1
    assert all(run._vector(i).data_ptr() % 16 == run._vector(0).data_ptr() % 16 == 0 for i in range(3))


def test_memory_goes_with_its_last_reference() -> None:
    run = begun("convolutions")
    run.work_in_pairs(plain)
    run.advance(4)
    steps = _Steps(
        batched_operator(convolutions(), VECTORS, torch.float64), torch.ones(run._vector(0).numel()).double()
    )
    steps._runner = plain
    steps.advance(10)
    gone = [weakref.ref(t) for t in (run._blocks[0].vectors, run._pair.vectors, run._u, steps._u)]
    gc.disable()
    try:
        del run, steps
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()


def test_an_exhausted_chain_ends_at_zero() -> None:
    run = begun("convolutions")
    run._start.zero_()
    run.advance(3)
    alpha, beta = run.coefficients(3)
    assert (alpha == 0.0).all()
    assert (beta == 0.0).all()


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_one_read_a_chunk(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"chunks": 0, "steps": 0, "reads": 0}
    owner = Recurrence if method == "lanczos" else _Steps
    advance, matrices, coefficients = owner.advance, Recurrence.matrices, Recurrence.coefficients

    def counted(self: Recurrence, count: int) -> object:
        counts["chunks"] += count > 0
        counts["steps"] += count
        with Watch():
            return advance(self, count)

    def noted(read: Callable) -> Callable:
        def noting(*args: object) -> object:
            counts["reads"] += 1
            return read(*args)

        return noting

    monkeypatch.setattr(owner, "advance", counted)
    monkeypatch.setattr(Recurrence, "matrices", noted(matrices))
    monkeypatch.setattr(Recurrence, "coefficients", noted(coefficients))
    conv_norm(torch.randn(8, 4, 3, 3), 12, padding=1, method=method, generator=torch.Generator().manual_seed(0))
    assert counts["chunks"] < counts["steps"]
    if method == "lanczos":
        assert counts["reads"] == counts["chunks"] + 1  # and one for the certificate


@pytest.mark.parametrize("pairs", [False, True])
def test_matrices_are_those_of_the_coefficients(pairs: bool) -> None:
    run = begun("convolutions")
    if pairs:
        run.work_in_pairs(plain)
    run.advance(20)
    for count in (1, 6, 16, 17, 20):
        alpha, beta = run.coefficients(count)
        for operators in ([0, 1, 2], [2], [0, 2]):
            own = np.concatenate([np.arange(VECTORS * i, VECTORS * (i + 1)) for i in operators])
            found = run.matrices(count, np.array(operators)).wait().numpy()
            np.testing.assert_allclose(found, normal_equations(alpha[own], beta[own]), rtol=1e-15)


def test_the_device_goes_on_while_the_host_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, events = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)), []

    def norms() -> list[NormInterval]:
        g = torch.Generator().manual_seed(1)
        options = ({"rtol": 1e-4}, {"max_steps": 9}, {"rtol": 0.5})
        return [conv_norm(weight, 12, padding=1, method="lanczos", generator=g, **chosen) for chosen in options]

    def noted(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def noting(*args: object) -> object:
            events.append(name)
            return function(*args)

        monkeypatch.setattr(owner, name, noting)

    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DEVICE_LIMITS["cuda"]._replace(ahead=0))
    expected = norms()
    monkeypatch.setitem(DEVICE_LIMITS, "cpu", DEVICE_LIMITS["cuda"])
    for owner, name in ((Recurrence, "advance"), (Recurrence, "matrices"), (Reading, "wait")):
        noted(owner, name)
    assert norms() == expected
    assert events[:9] == ["wait", *["advance", "matrices", "advance", "wait"] * 2]  # for the starts first


def test_the_same_norms_from_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def norm(**kwargs: object):
        g = torch.Generator().manual_seed(1)
        return conv_norm(weight, 12, padding=1, method="lanczos", generator=g, **kwargs)

    before, limited = norm(rtol=1e-4), norm(max_steps=9)
    begin = Recurrence.__init__

    def in_pairs(self: Recurrence, *args: object) -> None:
        begin(self, *args)
        self.work_in_pairs(plain)

    monkeypatch.setattr(Recurrence, "__init__", in_pairs)
    after, again = norm(rtol=1e-4), norm(max_steps=9)
    assert again == limited  # though ten steps ran
    assert after.converged
    assert before.lower <= after.upper
    assert after.lower <= before.upper
    assert abs(after.iterations - before.iterations) <= 1


def test_starts_are_drawn_on_the_device_of_the_operators() -> None:
    plan = IterationConfig(1e-6, 4, 1e-2, 10, torch.float32, torch.Generator().manual_seed(0))
    assert on_device(plan, torch.device("cpu")) is plan
    if torch.cuda.is_available():
        seeds = {on_device(plan, torch.device("cuda")).generator.initial_seed() for _ in range(3)}
        assert len(seeds) == 3  # every run has draws of its own


def test_a_failed_capture_warns_once_and_goes_on() -> None:
    if torch.cuda.is_available():
        pytest.skip("capture works where there is a GPU")
    calls = []
    runner = cuda_graphs.Replayed(torch.device("cuda"))
    runner(lambda: calls.append(1))
    with pytest.warns(UserWarning, match="CUDA graph capture failed"):
        runner(lambda: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(lambda: calls.append(1))
    assert len(calls) == 3


def test_a_step_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replays = [], []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    monkeypatch.setattr(cuda_graphs, "_captured", lambda step, device: Graph())
    runner = cuda_graphs.Replayed(torch.device("cuda"))
    for _ in range(4):
        runner(lambda: calls.append(1))
    assert (len(calls), len(replays)) == (1, 3)


def test_where_graphs_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.backends, "cuda", type(cuda_graphs.backends["cpu"])("native", ""))
    assert cuda_graphs.worthwhile(torch.device("cuda"), 1 << 20)
    assert not cuda_graphs.worthwhile(torch.device("cuda"), 1 << 30)
    assert not cuda_graphs.worthwhile(torch.device("cpu"), 1 << 20)
    monkeypatch.setitem(cuda_graphs.backends, "cuda", type(cuda_graphs.backends["cpu"])("reference", ""))
    assert not cuda_graphs.worthwhile(torch.device("cuda"), 1 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_same_bits_and_never_wait(kind: str) -> None:
    one, two = (begun(kind, device="cuda") for _ in range(2))
    one._pair = None
    runner = cuda_graphs.Replayed(two.device)
    two.work_in_pairs(runner)
    for run in (one, two):
        run.advance(4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        readings = []
        for run in (one, two):
            run.advance(10)
            readings.append(run.matrices(14, np.arange(len(run.active) - 1)))
            run.advance(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*(reading.wait() for reading in readings))
    for a, b in zip(one.coefficients(22), two.coefficients(22), strict=True):
        np.testing.assert_array_equal(a, b)
    if cuda_graphs.backends["cuda"].name != "reference":
        assert runner._graph is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("method", "rtol"), [("lanczos", 1e-3), ("power", 2e-2)])
def test_norms_on_the_device_hold(method: str, rtol: float) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))

    def norm(seed: int) -> NormInterval:
        g = torch.Generator().manual_seed(seed)
        return conv_norm(weight.to("cuda"), 14, padding=1, method=method, rtol=rtol, generator=g)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps are launched one by one")
        found, again = norm(3), norm(3)
    assert found == again
    truth = conv_norm(weight, 14, padding=1, method="svd")
    assert found.converged
    assert found.lower <= truth.upper
    assert found.upper >= truth.lower
    assert math.isclose(found.upper, truth.upper, rel_tol=rtol)

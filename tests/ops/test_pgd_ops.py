"""pgd_step_, project_ and random_start against their definition, on every backend and instruction set.

The backend is the one that FASTLIP_BACKEND and FASTLIP_CPU_ISA choose; .ci/run runs this folder under each.
"""

import math

import pytest
import torch
from op_inputs import ATOL, DEVICES, DTYPES, INTERPRETED, NORMS, SHAPES, make, overshoot, ulp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlip import ops
from fastlip.ops import reference

pytestmark = [
    pytest.mark.parametrize(
        "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
    )
]


def expected(
    x: Tensor, grad: Tensor | None, x0: Tensor, step_size, eps, norm, bounds=(0.0, 1.0), active=None
) -> Tensor:
    """The reference, which takes a value as a float and a tensor."""
    x = x.clone()
    split = [(0.0, v) if isinstance(v, Tensor) else (v, None) for v in (step_size, eps, *bounds)]
    (step, steps), (radius, radii), (lo, los), (hi, his) = split
    arithmetic = reference.compute_dtype(x.dtype)
    steps, radii = (None if t is None else t.to(arithmetic) for t in (steps, radii))
    los, his = (None if t is None else t.to(arithmetic).expand(x.shape) for t in (los, his))
    if grad is None:
        reference.project_(x, x0, radius, radii, norm, lo, los, hi, his, active)
    else:
        reference.pgd_step_(x, grad, x0, step, steps, radius, radii, norm, lo, los, hi, his, 0.99, active)
    return x


def assert_same(got: Tensor, want: Tensor, norm: str) -> None:
    if norm == "linf":
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL[got.dtype])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.5, math.inf] if INTERPRETED else [0.5, 0.03, 1e-4, math.inf])
def test_step_and_projection_match_reference(device, shape, dtype, norm, eps):
    x, grad, x0 = make(shape, dtype, device)
    got = ops.pgd_step_(x.clone(), grad, x0, step_size=0.1, eps=eps, norm=norm)
    assert_same(got, expected(x, grad, x0, 0.1, eps, norm), norm)
    assert_same(ops.project_(x.clone(), x0, eps=eps, norm=norm), expected(x, None, x0, 0.0, eps, norm), norm)


@pytest.mark.skipif(INTERPRETED, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 112, 113), (2, 3, 224, 224)], ids=str)
def test_large_samples_match_reference(device, shape, dtype, norm):
    """Beyond what one block of a GPU holds on chip, and on a CPU beyond the L2 cache."""
    x, grad, x0 = make(shape, dtype, device)
    eps = {"linf": 0.03, "l2": 3.0, "l1": 500.0}[norm]
    got = ops.pgd_step_(x.clone(), grad, x0, step_size=eps / 4, eps=eps, norm=norm)
    assert_same(got, expected(x, grad, x0, eps / 4, eps, norm), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_descending_step(device, norm):
    x, grad, x0 = make((3, 40), torch.float32, device)
    got = ops.pgd_step(x, grad, x0, step_size=-0.2, eps=0.4, norm=norm)
    assert_same(got, expected(x, grad, x0, -0.2, 0.4, norm), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_per_sample(device, dtype, norm):
    x, grad, x0 = make((6, 3, 5, 7), dtype, device)
    eps = torch.tensor([0.0, 0.1, 0.5, -1.0, math.nan, math.inf], device=device)
    step = torch.tensor([0.1, 0.0, 0.3, 0.1, 0.1, math.nan], device=device)
    active = torch.tensor([True, True, False, True, True, True], device=device)
    channel = torch.tensor([0.0, 0.1, 0.2], device=device).reshape(3, 1, 1)
    sample = torch.linspace(0.8, 1.0, 6, device=device).reshape(6, 1, 1, 1)
    for bounds in [(0.0, 1.0), (channel, 1.0), (channel, sample), (-0.5, sample.expand(6, 3, 5, 7))]:
        # x0 inside the box, as the contract asks
        low, high = (torch.as_tensor(b, device=device) for b in bounds)
        centre = torch.minimum(torch.maximum(x0.float(), low), high).to(dtype)
        if dtype in (torch.float16, torch.bfloat16):  # limits that the storage can represent
            bounds = tuple(b.to(dtype).float() if isinstance(b, Tensor) else b for b in bounds)
        got = ops.pgd_step(x, grad, centre, step_size=step, eps=eps, norm=norm, bounds=bounds, active=active)
        assert_same(got, expected(x, grad, centre, step, eps, norm, bounds, active), norm)
        assert torch.equal(got[2], x[2])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, dtype, norm):
    x, grad, x0 = make((4, 3, 9, 6), dtype, device)
    want = expected(x, grad, x0, 0.1, 0.3, norm)
    last = {"memory_format": torch.channels_last}
    layouts = {
        "channels_last": [t.to(**last) for t in (x, grad, x0)],
        "mixed": [x.to(**last), grad, x0],
        "every other sample": [t.repeat_interleave(2, 0)[::2] for t in (x, grad, x0)],
        "every other column": [t.repeat_interleave(2, 3)[..., ::2] for t in (x, grad, x0)],
        "permuted": [t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for t in (x, grad, x0)],
    }
    for name, (a, g, c) in layouts.items():
        a = a.clone(memory_format=torch.preserve_format) if name == "channels_last" else a
        pointer, strides = a.data_ptr(), a.stride()
        got = ops.pgd_step_(a, g, c, step_size=0.1, eps=0.3, norm=norm)
        assert got is a
        assert (got.data_ptr(), got.stride()) == (pointer, strides)
        assert_same(got, want, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_one_centre_for_many_samples(device, norm):
    x, grad, x0 = make((4, 3, 5, 5), torch.float32, device)
    one = x0[:1].expand_as(x)
    assert_same(
        ops.pgd_step(x, grad, one, step_size=0.1, eps=0.3, norm=norm), expected(x, grad, one, 0.1, 0.3, norm), norm
    )


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", NORMS)
def test_no_hidden_copy(device, norm, memory_format):
    x, grad, x0 = (t.to(memory_format=memory_format) for t in make((4, 3, 6, 6), torch.float32, device))
    if memory_format == torch.channels_last:
        x0 = x0[:1].expand_as(x)
    eps = torch.full((4,), 0.3, device=device)
    with _Recorded() as record:
        ops.pgd_step_(x, grad, x0, step_size=0.1, eps=eps, norm=norm)
        ops.project_(x, x0, eps=eps, norm=norm)
    moved = [c for c in record.called if "detach" not in c and "alias" not in c]
    assert moved == ["fastlip.pgd_step_.default", "fastlip.project_.default"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_zero_returns_centre(device, norm, dtype):
    x, grad, x0 = make((3, 77), dtype, device)
    assert torch.equal(ops.pgd_step(x, grad, x0, step_size=0.5, eps=0.0, norm=norm), x0)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_moves_nothing(device, norm):
    _, grad, x0 = make((3, 77), torch.float32, device)
    got = ops.pgd_step(x0, torch.zeros_like(grad), x0, step_size=0.5, eps=1.0, norm=norm)
    assert torch.equal(got, x0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_elements_that_are_not_finite_count_as_zero(device, norm, dtype):
    x, grad, x0 = make((3, 130), dtype, device)
    bad = grad.clone()
    bad[:, ::7], bad[:, 1::7], bad[:, 2::7] = math.nan, math.inf, -math.inf
    clean = torch.where(bad.isfinite(), bad, torch.zeros_like(bad))
    kwargs = {"step_size": 0.2, "eps": 0.5, "norm": norm}
    got = ops.pgd_step(x, bad, x0, **kwargs)
    assert_same(got, expected(x, clean, x0, 0.2, 0.5, norm), norm)
    only = torch.full_like(grad, math.nan)
    assert torch.equal(ops.pgd_step(x0, only, x0, **kwargs), x0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e38])
@pytest.mark.parametrize("spread", ["even", "mixed"])
def test_l2_length_of_tiny_and_huge_gradients(device, scale, spread):
    _, grad, x0 = make((3, 1027), torch.float32, device)
    unit = grad / grad.abs().amax()
    if spread == "mixed":
        unit[:, ::2] *= 1e-3
    grad = (unit.double() * scale).float()
    x0 = torch.full_like(x0, 0.5)
    got = ops.pgd_step(x0, grad, x0, step_size=0.25, eps=1.0, norm="l2")
    assert_same(got, expected(x0, grad, x0, 0.25, 1.0, "l2"), "l2")
    torch.testing.assert_close((got - x0).norm(dim=1), torch.full((3,), 0.25, device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", ["x", "x0"])
def test_nan_stays_in_its_sample(device, norm, which):
    x, grad, x0 = make((3, 100), torch.float32, device)
    want = ops.pgd_step(x, grad, x0, step_size=0.1, eps=0.3, norm=norm)
    spoiled = {"x": x.clone(), "x0": x0.clone()}
    spoiled[which][1, 50] = math.nan
    got = ops.pgd_step(spoiled["x"], grad, spoiled["x0"], step_size=0.1, eps=0.3, norm=norm)
    assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_feasible(device, norm, dtype):
    n = 301
    for seed in range(2 if INTERPRETED else 8):
        for eps in (0.3, 1e-6) if INTERPRETED else (2.0, 0.3, 1e-3, 1e-6):
            x, grad, x0 = make((8, n), dtype, device, seed, spread=10.0 ** (-seed % 4))
            x0[0], x0[1], x0[2, ::2] = 0.0, 1.0, 0.0
            for got in (
                ops.pgd_step(x, grad, x0, step_size=eps, eps=eps, norm=norm),
                ops.random_start(x0, eps=eps, norm=norm),
            ):
                assert got.min() >= 0
                assert got.max() <= 1
                assert overshoot(got, x0, eps, norm).max() <= 0


def displacements(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Four rows whose sums go wrong when too many terms meet in float32: [4, n], of any scale."""
    if kind == "equal":  # every addition rounds alike
        return torch.tensor([1.0, 1 / 3, 0.7001953, 0.9999]).reshape(4, 1).expand(4, n)
    if kind == "falling":  # what comes late is below half a unit of what came before
        return torch.logspace(0, -7, n).expand(4, n) * torch.tensor([1.0, 0.3, 7.0, 1.9]).reshape(4, 1)
    if kind == "peaks":  # few hold half of the sum, in each part of it
        peaks = torch.rand(4, n, generator=generator) < 1e-3
        return torch.where(peaks, 1e3 * torch.rand(4, n, generator=generator), torch.rand(4, n, generator=generator))
    return 10 ** (-8 * torch.rand(4, n, generator=generator))


@pytest.mark.skipif(INTERPRETED, reason="too large for Triton's interpreter")
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("kind", ["equal", "falling", "peaks", "mixed"])
@pytest.mark.parametrize("n", [3 * 224 * 224, 3 * 512 * 512 + 5])
def test_sums_of_large_samples_keep_the_ball(device, n, kind, norm):
    """Around 0, where no rounding of x hides an error of a sum, and with the box in the way of some elements."""
    size = displacements(kind, n, torch.Generator().manual_seed(n))
    sign = 1 - 2 * (torch.arange(n) % 2)
    p = 2 if norm == "l2" else 1
    z, x0 = (size * sign).to(device), torch.zeros(4, n, device=device)
    for most in (1e4, size.median().item()):
        kept = z.clamp(-most, most).double().norm(p=p, dim=1).min().item()
        for share in (0.999, 0.9, 0.3):
            eps = kept * share
            got = ops.project(z, x0, eps=eps, norm=norm, bounds=(-most, most))
            assert overshoot(got, x0, eps, norm).max() <= 0
            used = got.double().norm(p=p, dim=1) / eps
            assert (used > 1 - 2e-6).all()


@pytest.mark.skipif(INTERPRETED, reason="too many for Triton's interpreter")
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_many_random_projections_keep_and_use_the_ball(device, norm):
    """Sizes on either side of a block of a sum, magnitudes from 1e-8 to 1e8, elements in and out of the box."""
    p = 2 if norm == "l2" else 1
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 6000, (1,), generator=g))
        scale = 10 ** (16 * torch.rand(8, 1, generator=g, dtype=torch.float64) - 8)
        spread = 10 ** (-6 * torch.rand(8, 1, generator=g) * torch.rand(8, n, generator=g))
        z = (torch.randn(8, n, generator=g) * spread * scale).float()
        low, high = (z.double() * (2 * torch.rand(8, n, generator=g))).aminmax(dim=1, keepdim=True)
        bounds = tuple(t.clamp(*at).float().to(device) for t, at in ((low, (None, 0)), (high, (0, None))))
        inside = torch.minimum(torch.maximum(z, bounds[0].cpu()), bounds[1].cpu()).double().norm(p=p, dim=1)
        eps = (inside * torch.rand(8, generator=g)).float().to(device)
        x0 = torch.zeros(8, n, device=device)
        got = ops.project(z.to(device), x0, eps=eps, norm=norm, bounds=bounds)
        assert (overshoot(got / eps[:, None].double(), x0.double(), 1.0, norm) <= 0).all(), seed
        used = got.double().norm(p=p, dim=1).cpu() / eps.double().cpu()
        assert (used > 1 - 3e-6).all(), seed


def at_extremes(dtype: torch.dtype, seed: int, n: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """x0, which is 0 or tiny, displacements of about `scale` (or far beyond in places), directions, and `scale`."""
    g = torch.Generator().manual_seed(seed)
    low, high = (-6.5, 4.0) if dtype == torch.float16 else (-38.0, 30.0)
    scale = 10 ** (low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item())
    x0 = torch.zeros(4, n, dtype=torch.float64)
    x0[2:] = torch.randn(2, n, generator=g, dtype=torch.float64) * scale / n
    d = torch.randn(4, n, generator=g, dtype=torch.float64) * scale
    if seed % 3 == 1:  # some hardly count
        d *= 10 ** (-6 * torch.rand(4, n, generator=g, dtype=torch.float64))
    if seed % 3 == 2 and dtype != torch.float16:  # some are far beyond
        d *= torch.where(torch.rand(4, n, generator=g) < 0.1, 10 ** ((high - math.log10(scale)) / 2), 1.0)
    grad = torch.randn(4, n, generator=g, dtype=torch.float64)
    return x0.to(dtype), d, grad, scale


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ball_holds_at_any_magnitude(device, dtype, norm):
    """Where squares of float32 are zero or infinite, too; against the reference, which computes in float64."""
    p = 2 if norm == "l2" else 1
    for seed in range(6 if INTERPRETED else 150):
        n = [1, 7, 50, 333, 1500][seed % 5] if INTERPRETED else [1, 7, 50, 333, 5003][seed % 5]
        x0, d, grad, scale = (t.to(device) if isinstance(t, Tensor) else t for t in at_extremes(dtype, seed, n))
        x = (x0.double() + d).to(dtype)
        arithmetic = reference.compute_dtype(dtype)
        lengths = (x.double() - x0.double()).norm(p=p, dim=1)
        eps = (lengths * torch.tensor([0.3, 0.9, 3.0, 1e-3], device=device)).to(arithmetic)
        rounding = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}[dtype]
        least = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-45)  # the unit of subnormal numbers
        for bounds in ((-4 * scale, 4 * scale), (-1e37, 1e37)):
            step = eps / 4
            for got, want in (
                (ops.project(x, x0, eps=eps, norm=norm, bounds=bounds), expected(x, None, x0, 0.0, eps, norm, bounds)),
                (
                    ops.pgd_step(x, grad.to(dtype), x0, step_size=step, eps=eps, norm=norm, bounds=bounds),
                    expected(x, grad.to(dtype), x0, step, eps, norm, bounds),
                ),
            ):
                context = (seed, scale, bounds)
                slack = (ulp(got) / 2 if dtype in (torch.float32, torch.float64) else torch.zeros_like(d)).norm(
                    p=p, dim=1
                )
                used = (got.double() - x0.double()).norm(p=p, dim=1)
                assert (used - slack <= eps.double() * (1 + 1e-6)).all(), context
                size = torch.maximum(want.double().abs(), x0.double().abs()) + eps.double()[:, None]
                assert ((got.double() - want.double()).abs() <= rounding * size + 4 * least).all(), context


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_ball_holds_at_the_ends_of_the_range(device, dtype, norm):
    """The smallest and largest numbers, of eps and displacements, together and apart."""
    info = torch.finfo(dtype)
    tiny, huge = info.smallest_normal, min(info.max / 4, 1e298)  # sums of the l1 norm stay in float64's range
    for eps in (tiny, tiny**0.5, 1.0, huge**0.5, huge):
        for size in (tiny, 1.0, huge):
            x0 = torch.zeros(2, 37, dtype=dtype, device=device)
            x = torch.full_like(x0, size / 8)
            x[1] *= -0.5
            bounds = (-math.inf, math.inf)
            got = ops.project(x, x0, eps=eps, norm=norm, bounds=bounds)
            p = 2 if norm == "l2" else 1
            assert ((got.double() / eps).norm(p=p, dim=1) <= 1 + 1e-5).all()
            if norm == "l1" and size > 1e6 * eps:
                continue  # no threshold in float64 tells how much of a size to leave
            scaled = x.double() / max(size, eps)  # whose squares stay in the range of float64, or do not count
            length = scaled.norm(p=p, dim=1, keepdim=True)
            want = torch.where(length > eps / max(size, eps), scaled / length * eps, x.double())
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=4 * tiny * info.eps)


@pytest.mark.parametrize(
    ("dtype", "size", "eps"), [(torch.float32, 1e38, 2e37), (torch.float64, 1e305, 2e303)], ids=str
)
def test_the_l1_ball_holds_where_sums_would_overflow(device, dtype, size, eps):
    """Searches cut such displacements: what is left of them fits into the ball, but they do not."""
    x0 = torch.zeros(2, 2, dtype=dtype, device=device)
    got = ops.project(torch.full_like(x0, size), x0, eps=eps, norm="l1", bounds=(-math.inf, math.inf))
    assert ((got.double() / eps).sum(dim=1) <= 1 + 1e-6).all()
    assert (got > 0).all()


@pytest.mark.parametrize("step", [1e-37, 1e-30, 1e30])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-13, 1.0, 1e15, 1e37])
@pytest.mark.parametrize("n", [1, 1027])
def test_l2_steps_have_their_length_at_any_magnitude(device, n, size, step):
    generator = torch.Generator().manual_seed(0)
    grad = ((1 - 2 * torch.rand(3, n, generator=generator, dtype=torch.float64)) * size).float().to(device)
    x0 = torch.zeros(3, n, device=device)
    bounds = (-math.inf, math.inf)
    got = ops.pgd_step(x0, grad, x0, step_size=step, eps=3e38, norm="l2", bounds=bounds).double()
    want = torch.where((grad != 0).any(dim=1), step, 0.0).double()
    torch.testing.assert_close(got.norm(dim=1), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_is_the_nearest_point(device, norm):
    """The variational inequality <z - Pz, y - Pz> <= 0 for all feasible y characterises the projection."""
    z, _, x0 = make((8 if INTERPRETED else 64, 50), torch.float64, device, spread=0.7)
    eps = 1.5 if norm == "l2" else 6.0
    p = ops.project(z, x0, eps=eps, norm=norm)
    used = (p - x0).norm(p=2 if norm == "l2" else 1, dim=1)
    assert (used > eps * (1 - 1e-9)).all()  # the ball is active here, so all of it must be used
    generator = torch.Generator(device=device).manual_seed(1)
    for _ in range(10 if INTERPRETED else 200):
        y = ops.random_start(x0, eps=eps, norm=norm, generator=generator)
        assert (((z - p) * (y - p)).sum(1) <= 1e-9).all()
    # Towards each coordinate as well: random points rarely probe the corners of an L1 ball.
    for i in range(0, 50, 10 if INTERPRETED else 1):
        y = p.clone()
        y[:, i] += 0.1 * (z - p)[:, i].sign()
        y = ops.project(y, x0, eps=eps, norm=norm)
        assert (((z - p) * (y - p)).sum(1) <= 1e-9).all()


def test_l1_step_moves_the_top_elements(device):
    x0 = torch.full((2, 200), 0.5, device=device)
    grad = torch.zeros_like(x0)
    grad[0] = torch.arange(1.0, 201.0, device=device) * 0.01
    grad[1, :3] = torch.tensor([-2.0, 2.0, 1.0], device=device)  # a tie at the threshold
    got = ops.pgd_step(x0, grad, x0, step_size=0.1, eps=1.0, norm="l1", sparsity=0.99) - x0
    assert got[0].nonzero().flatten().tolist() == [198, 199]
    torch.testing.assert_close(got[1, :3].cpu(), torch.tensor([-0.05, 0.05, 0.0]))
    one = ops.pgd_step(x0[:1], grad[:1], x0[:1], step_size=0.1, eps=1.0, norm="l1", sparsity=1.0) - x0[:1]
    assert one.nonzero()[:, 1].tolist() == [199]
    every = ops.pgd_step(x0, grad, x0, step_size=0.1, eps=1.0, norm="l1", sparsity=0.0) - x0
    assert (every != 0).sum(1).tolist() == [200, 3]
    tied = ops.pgd_step(x0, torch.ones_like(x0), x0, step_size=0.1, eps=1.0, norm="l1") - x0
    torch.testing.assert_close(tied, torch.full_like(tied, 0.1 / 200), rtol=0, atol=6e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 1001)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(device, norm, shape):
    x, grad, x0 = make(shape, torch.float32, device)
    whole = ops.pgd_step(x, grad, x0, step_size=0.1, eps=0.3, norm=norm)
    ids = torch.arange(len(x), device=device) * 1000 - 7
    starts = ops.random_start(x0, eps=0.3, norm=norm, ids=ids, generator=torch.Generator().manual_seed(3))
    for i in range(len(x)):
        one = slice(i, i + 1)
        assert torch.equal(ops.pgd_step(x[one], grad[one], x0[one], step_size=0.1, eps=0.3, norm=norm), whole[one])
        generator = torch.Generator().manual_seed(3)
        start = ops.random_start(x0[one], eps=0.3, norm=norm, ids=ids[one], generator=generator)
        assert torch.equal(start, starts[one])


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_place_twins_leave_their_input(device, norm):
    x, grad, x0 = make((2, 3, 4, 4), torch.float32, device)
    x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    for got in (
        ops.pgd_step(x, grad, x0, step_size=0.1, eps=0.3, norm=norm),
        ops.project(x, x0, eps=0.3, norm=norm),
    ):
        assert got.stride() == x.stride()
        assert not torch.equal(got, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_empty(device, norm, shape):
    x = torch.empty(shape, device=device)
    assert ops.pgd_step(x, x, x, step_size=0.1, eps=0.1, norm=norm).shape == x.shape
    assert ops.project(x, x, eps=0.1, norm=norm).shape == x.shape
    assert ops.random_start(x, eps=0.1, norm=norm).shape == x.shape


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_with_bounds_of_its_own_shape(device, norm, shape):
    x = torch.empty(shape, device=device)
    for bounds in ((x.clone(), x.clone()), (x.clone(), 1.0), (0.0, x[:1].clone())):
        assert ops.pgd_step(x, x, x, step_size=0.1, eps=0.1, norm=norm, bounds=bounds).shape == x.shape
        assert ops.project(x, x, eps=0.1, norm=norm, bounds=bounds).shape == x.shape
        assert ops.random_start(x, eps=0.1, norm=norm, bounds=bounds).shape == x.shape
        state = ops.apgd_state(x, steps=3, eps=0.1, norm=norm)
        ops.apgd_step_(x.clone(), x, torch.zeros(len(x), device=device), x, state, eps=0.1, norm=norm, bounds=bounds)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_box_wins_where_the_centre_is_outside(device, norm, dtype):
    x, grad, x0 = make((6, 50), dtype, device)
    got = ops.pgd_step(x, grad, x0 + 3, step_size=0.1, eps=0.3, norm=norm)
    assert torch.equal(got, torch.ones_like(got))


@pytest.mark.parametrize("norm", NORMS)
def test_large_displacements_stay_exact(device, norm):
    x0 = torch.rand(3, 257, generator=torch.Generator().manual_seed(0)).to(device)
    z = x0 + 1e30 * torch.randn(3, 257, generator=torch.Generator().manual_seed(1)).to(device)
    bounds = (-1e36, 1e36)
    got = ops.project(z, x0, eps=2.0, norm=norm, bounds=bounds)
    assert overshoot(got, x0, 2.0, norm).max() <= 0
    torch.testing.assert_close(got, expected(z, None, x0, 0.0, 2.0, norm, bounds), rtol=1e-5, atol=1e-6)


def test_opcheck(device):
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, x0 = make((3, 2, 4, 4), dtype, device)
        radii = torch.full((3,), 0.2, device=device)
        row = torch.zeros(1, 2, 4, 4, device=device)
        active = torch.tensor([True, False, True], device=device)
        key, ids = torch.tensor([7], device=device), torch.arange(3, device=device)
        for norm in NORMS:
            box = (0.0, row, 1.0, None)
            torch.library.opcheck(
                torch.ops.fastlip.pgd_step_.default, (x, grad, x0, 0.1, None, 0.0, radii, norm, *box, 0.99, active)
            )
            torch.library.opcheck(torch.ops.fastlip.project_.default, (x, x0, 0.1, None, norm, *box, None))
            torch.library.opcheck(torch.ops.fastlip.random_start.default, (x0, 0.1, None, norm, *box, ids, key))


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_a_graph_break(device, norm):
    def attack_step(x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        x = ops.random_start(x0, eps=0.3, norm=norm) * 0 + x
        x = ops.pgd_step(x, grad * 2, x0, step_size=0.1, eps=0.3, norm=norm)
        return ops.project_(x, x0, eps=0.2, norm=norm, active=x.flatten(1).sum(1) > 0) + 1

    inputs = make((3, 2, 4, 4), torch.float32, device)
    want = attack_step(*inputs)
    got = torch.compile(attack_step, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)

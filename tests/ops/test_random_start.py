"""Random starts: the law, the counters, and Philox itself."""

import pytest
import torch
from op_inputs import DEVICES, INTERPRETED, NORMS
from scipy import stats

from fastlip import ops
from fastlip.ops import reference

pytestmark = [
    pytest.mark.parametrize(
        "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
    )
]


def centre(batch: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((batch, *shape), 0.5, device=device, dtype=dtype)


def start(x0: torch.Tensor, norm: str, seed: int = 0, **kwargs) -> torch.Tensor:
    return ops.random_start(x0, eps=0.25, norm=norm, generator=torch.Generator().manual_seed(seed), **kwargs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 4), (1, 1), (4,), (2, 130)], ids=str)
def test_matches_reference(device, norm, dtype, shape):
    x0 = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    ids = torch.tensor([0, 2**40 + 5, -3, 7], device=device)[: shape[0]]
    got = start(x0, norm, ids=ids)
    key = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(0)).to(device)
    want = reference.random_start(x0, 0.25, None, norm, 0.0, None, 1.0, None, ids, key)
    atol = {torch.float32: 3e-7, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else atol)


def test_philox_known_answers(device):
    """Salmon et al.'s published test vectors for Philox4x32-10."""
    zero = reference.philox(torch.tensor([0]), torch.tensor([0]), 0, torch.tensor([0]))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = reference.philox(torch.tensor([-1]), torch.tensor([0xFFFFFFFF]), 0xFFFFFFFF, torch.tensor([-1]))
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_laws_of_uniform_balls(device, dtype):
    batch, n = 80 if INTERPRETED else 400, 5
    x0 = centre(batch, n, device=device, dtype=dtype)
    unit = {p: ((start(x0, p, seed=11) - x0) / 0.25).double().cpu() for p in NORMS}
    assert stats.kstest(unit["linf"].flatten(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    radius = {"linf": unit["linf"].abs().amax(1), "l2": unit["l2"].norm(dim=1), "l1": unit["l1"].abs().sum(1)}
    for p in NORMS:  # in each norm's own ball of dimension n the radius to the n is uniform
        assert stats.kstest(radius[p] ** n, "uniform").pvalue > 1e-3, p
    # One coordinate of a uniform L2 direction squared is Beta(1/2, (n-1)/2); the size of an L1 one is Beta(1, n-1).
    two = unit["l2"] / radius["l2"][:, None]
    assert stats.kstest(two[:, 3] ** 2, stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 1e-3
    one = unit["l1"].abs() / radius["l1"][:, None]
    assert stats.kstest(one[:, 4], stats.beta(1, n - 1).cdf).pvalue > 1e-3
    for p in NORMS:
        assert abs(float((unit[p] > 0).double().mean()) - 0.5) < 0.1, p


@pytest.mark.parametrize("norm", NORMS)
def test_memory_format_does_not_matter(device, norm):
    x0 = centre(2, 3, 4, 5, device=device)
    want = start(x0, norm)
    last = start(x0.to(memory_format=torch.channels_last), norm)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, want)
    assert torch.equal(start(x0.transpose(1, 3).contiguous().transpose(1, 3), norm), want)


@pytest.mark.parametrize("norm", NORMS)
def test_keys_and_ids_change_the_start(device, norm):
    x0 = centre(2, 50, device=device)
    first = start(x0, norm)
    assert torch.equal(first, start(x0, norm))
    assert not torch.equal(first, start(x0, norm, seed=1))
    assert not torch.equal(first[0], first[1])
    same = start(x0, norm, ids=torch.tensor([4, 4], device=device))
    assert torch.equal(same[0], same[1])


def test_a_generator_leaves_global_random_state_alone(device):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    start(centre(2, 5, device=device), "l2")
    assert torch.equal(torch.get_rng_state(), before)
    ops.random_start(centre(2, 5, device="cpu"), eps=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_default_generator_is_reproducible(device):
    torch.manual_seed(5)
    first = ops.random_start(centre(2, 5, device=device), eps=0.1)
    second = ops.random_start(centre(2, 5, device=device), eps=0.1)
    torch.manual_seed(5)
    assert torch.equal(ops.random_start(centre(2, 5, device=device), eps=0.1), first)
    assert not torch.equal(first, second)

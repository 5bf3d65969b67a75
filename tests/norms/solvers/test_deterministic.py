"""The bounds that hold with certainty, against dense singular values and closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn

from fastlip.norms import conv_norm, conv_operator, trim
from fastlip.norms._operators.dense import dense_matrix
from fastlip.norms._solvers.deterministic import cholesky_bound, gram_bound


def true_norm(conv: nn.Module, size: tuple[int, ...]) -> float:
    conv = conv.double()
    units = torch.eye(conv.in_channels * math.prod(size), dtype=torch.float64)
    with torch.no_grad():
        return torch.linalg.matrix_norm(conv(units.reshape(-1, conv.in_channels, *size)).flatten(1), 2).item()


def settings(conv: nn.Module) -> dict[str, object]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


GRID = list(itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2], [0, 1, 2], [1, 2]))


@pytest.mark.parametrize("method", ["ring", "gram", "cholesky"])
def test_upper_sides_hold_without_chance(method: str) -> None:
    torch.manual_seed(0)
    for kernel, stride, dilation, padding, groups in GRID:
        conv = nn.Conv2d(2, 4, (kernel, 3), stride, padding, dilation, groups, bias=False)
        size = (7, 6)
        interval = conv_norm(conv.weight, size, method=method, **settings(conv))
        truth = true_norm(conv, size)
        assert interval.confidence == 1.0
        assert interval.method == method
        assert interval.lower <= truth * (1 + 1e-11)
        assert truth * (1 - 1e-11) <= interval.upper <= truth * (1.003 if method == "cholesky" else 3.2)


@pytest.mark.parametrize("method", ["ring", "gram"])
@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(method: str, axes: int) -> None:
    torch.manual_seed(axes)
    size = (9,) if axes == 1 else (4, 5, 3)
    conv = (nn.Conv1d if axes == 1 else nn.Conv3d)(2, 3, 3, stride=2, padding=1, bias=False)
    interval = conv_norm(conv.weight, size, method=method, **settings(conv))
    truth = true_norm(conv, size)
    assert truth <= interval.upper <= 2.0 * truth


@pytest.mark.parametrize("method", ["ring", "gram"])
def test_circular_padding_is_exact(method: str) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular", bias=False)
    interval = conv_norm(conv.weight, 8, method=method, rtol=1e-3, **settings(conv))
    truth = true_norm(conv, (8, 8))
    assert truth * (1 - 1e-12) <= interval.upper <= truth * 1.0005


def test_ring_of_a_second_difference_is_its_symbol() -> None:
    # On n points with zeros around them 4 sin^2(n pi / 2(n+1)); on the even one of the two rings the symbol peaks at 4.
    weight = torch.tensor([[[-1.0, 2.0, -1.0]]])
    even = conv_norm(weight, 7, padding=1, method="ring", rtol=1e-4)
    odd = conv_norm(weight, 6, padding=1, method="ring", rtol=1e-4)
    assert even.lower == pytest.approx(4 * math.sin(7 * math.pi / 16) ** 2, rel=1e-3)
    # Rings 8 and 9; 7 and 8: an odd ring misses the peak at pi.
    assert even.upper == pytest.approx(4 * math.sin(4 * math.pi / 9) ** 2, rel=1e-4)
    assert odd.upper == pytest.approx(4 * math.sin(3 * math.pi / 7) ** 2, rel=1e-4)


def test_kernel_without_its_zero_frequency_has_no_nan() -> None:
    weight = torch.tensor([[[1.0, -1.0]]])
    interval = conv_norm(weight, 8, padding=1, method="gram")
    assert 2 * math.cos(math.pi / 18) <= interval.upper <= 2.01


def test_factorisation_and_iteration_agree_with_eigenvalues() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 12, 20, dtype=torch.complex128)
    grams = x @ x.mH
    grams[3] = 0.0
    root = torch.linalg.eigvalsh(grams).max().sqrt().item()
    for bound in (cholesky_bound(grams, 0.0, 0.3 * root, 1e-3), gram_bound(grams, 0.0, 1e-3)):
        assert root <= bound <= root * (1 + 1e-3)


@pytest.mark.parametrize("start", [0.0, -1.0, 5e-324, 1e-12, 0.5, 1e6, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("rtol", [5e-324, 1e-17, 1e-3, 10.0, 1e300])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e120])
def test_the_search_ends_from_any_start_at_any_width(start: float, rtol: float, scale: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 12, 20, dtype=torch.complex128)
    grams = x @ x.mH
    root = torch.linalg.eigvalsh(grams).max().sqrt().item() * math.sqrt(scale)
    bounds = {cholesky_bound(grams * scale, 0.0, start, rtol)}
    if scale == 1.0:
        bounds.add(gram_bound(grams, 0.0, rtol))
    for bound in bounds:
        # No looser than the trace, whatever was asked for; starts that say nothing change nothing.
        assert root * (1 - 1e-13) <= bound <= root * min(1.0 + 1.01 * rtol + 1e-11, math.sqrt(12.0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 5)])
def test_blocks_of_zeros_have_the_norm_of_their_error(shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape, dtype=torch.complex128)
    assert cholesky_bound(zeros, 0.0, 0.0, 1e-3) == gram_bound(zeros, 0.0, 1e-3) == 0.0
    assert 1e-10 <= cholesky_bound(zeros, 1e-20, 0.0, 1e-3) < 1e-9


#: Geometries whose taps never meet the input.
NEVER = [
    ((1, 1, 4, 1), (2, 2), {"padding": (6, 3), "dilation": (4, 3)}),
    ((16, 16, 2, 2), (10, 10), {"padding": 20, "dilation": 40}),
    ((64, 64, 4, 1), (2, 2), {"padding": (6, 3), "dilation": (4, 3)}),
    ((4, 1, 2), (3,), {"padding": 10, "dilation": 21, "groups": 4}),
    ((2, 2, 2, 2, 2), (1, 3, 3), {"padding": (1, 0, 0), "dilation": (2, 1, 1)}),
]


@pytest.mark.parametrize("method", ["auto", "lanczos", "power", "ring", "gram", "cholesky", "svd"])
@pytest.mark.parametrize("rtol", [1e-2, 1e-17])
@pytest.mark.parametrize(("shape", "size", "geometry"), NEVER)
def test_taps_that_never_meet_the_input_have_the_norm_zero(
    shape: tuple[int, ...], size: tuple[int, ...], geometry: dict, rtol: float, method: str
) -> None:
    interval = conv_norm(torch.full(shape, 1e30), size, method=method, rtol=rtol, **geometry)
    assert (interval.lower, interval.upper, interval.confidence) == (0.0, 0.0, 1.0)
    assert interval.converged


@pytest.mark.parametrize("method", ["auto", "lanczos", "power", "ring", "gram", "cholesky", "svd"])
def test_taps_that_never_meet_the_input_do_not_set_the_scale(method: str) -> None:
    """Neither the outer ones, nor those that a stride wider than the input leaves out in between."""
    tap = torch.tensor([[3e-20, 0.0], [0.0, 1e-20]])
    # Windows begin at -6, 0 and 6: taps 6 and 0 meet the one pixel there is, and then the middle tap alone does.
    apart, middle = torch.full((2, 2, 7), 1e30), torch.full((2, 2, 3), 1e30)
    apart[..., 0], apart[..., 6], middle[..., 1] = tap, tap / 3, tap
    found = [conv_norm(apart, 1, padding=6, stride=6, method=method), conv_norm(middle, 1, padding=1, method=method)]
    for interval, truth in zip(found, (3e-20 * math.hypot(1.0, 1 / 3), 3e-20), strict=True):
        assert truth * 0.98 <= interval.lower <= truth * (1 + 1e-6)
        # On a ring the neighbours of the one window that meets the pixel meet it too.
        loose = 4 / 3 if method in ("ring", "gram") else 1.0
        assert truth * (1 - 1e-6) <= interval.upper <= truth * 1.02 * loose


def test_trimming_changes_no_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, kernel, stride, padding, dilation in itertools.product(
        (1, 2, 5), (1, 2, 4, 7), (1, 3, 6), (0, 2, 7), (1, 2, 6)
    ):
        if n + 2 * padding < dilation * (kernel - 1) + 1:
            continue
        weight = torch.randn(2, 3, kernel, generator=generator)
        op = conv_operator(weight, n, stride=stride, padding=padding, dilation=dilation)
        trimmed = trim(op)
        assert torch.equal(dense_matrix(trimmed), dense_matrix(op))
        # Every tap that is left is an entry of the matrix, unless it is 0.
        held = dense_matrix(op).abs().amax().item()
        assert held == trimmed.weight.abs().amax().item()
        assert trimmed.output_size == op.output_size


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "ring", "padding": 1, "padding_mode": "reflect"}, "'ring' needs zero padding"),
        ({"method": "gram", "padding": 1, "stride": 3, "padding_mode": "circular"}, "'gram' needs zero padding"),
        ({"method": "ring", "max_memory": 100}, "raise max_memory"),
        ({"method": "cholesky", "max_memory": 100}, "raise max_memory"),
    ],
)
def test_methods_that_do_not_apply_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_norm(torch.ones(2, 2, 3, 3), 8, **kwargs)

"""pack_weights: every element where the kernels look for it, on every backend."""

import itertools
import math

import pytest
import torch
from op_inputs import DEVICES
from torch import Tensor

from fastlip import ops

pytestmark = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)
#: Channels around the widths of blocks (64) and lanes (16), of several groups, and depthwise.
SHAPES = [
    ((1, 1), 1),
    ((5, 3), 1),
    ((64, 16, 3, 3), 1),
    ((65, 17, 3, 1), 1),
    ((130, 7, 5), 1),
    ((16, 64, 1, 1), 1),
    ((63, 129, 2), 1),
    ((12, 5, 3, 3), 3),
    ((150, 33, 3), 2),
    ((140, 1, 3, 3), 2),
    ((7, 1, 3, 3), 7),
    ((200, 1, 3), 200),
    ((1, 1, 2, 2, 2), 1),
    ((6, 1), 6),
]


def where(shape: tuple[int, ...], groups: int, adjoint: bool) -> list[tuple[int, int, int] | None]:
    """Output channel, input channel of its group and tap of each packed element; None for padding."""
    taps = math.prod(shape[2:])
    outputs, inputs = shape[0] // groups, shape[1]
    if groups == shape[0] > 1 == shape[1]:
        lanes = -(-groups // 64) * 64
        blocks = [range(a, min(a + 64, groups)) for a in range(0, lanes, 64) if a < groups]
        return [
            (block[lane], 0, tap) if lane < len(block) else None
            for block in blocks
            for tap in range(taps)
            for lane in range(-(-len(block) // 16) * 16)
        ]
    targets, sources = (inputs, outputs) if adjoint else (outputs, inputs)
    found: list[tuple[int, int, int] | None] = []
    for group, first in itertools.product(range(groups), range(0, targets, 64)):
        count = min(64, targets - first)
        for tap, source, lane in itertools.product(range(taps), range(sources), range(-(-count // 16) * 16)):
            target = first + lane
            if lane >= count:
                found.append(None)
            elif adjoint:
                found.append((group * outputs + source, target, tap))
            else:
                found.append((group * outputs + target, source, tap))
    return found


def expected(weight: Tensor, groups: int, adjoint: bool) -> Tensor:
    flat = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    zero = weight.new_zeros(())
    return torch.stack([zero if at is None else flat[at] for at in where(tuple(weight.shape), groups, adjoint)])


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.float64], repeat=2)), ids=str)
def test_elements_are_where_they_should_be(device, dtypes, adjoint):
    stored, dtype = dtypes
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator).to(stored) for shape, _ in SHAPES]
    groups = [count for _, count in SHAPES]
    got = ops.pack_weights([w.to(device) for w in weights], groups, adjoint=adjoint, dtype=dtype)
    want = torch.cat([expected(w.to(dtype), g, adjoint) for w, g in zip(weights, groups, strict=True)])
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)


def test_many_of_all_kinds(device):
    """More than travel with one launch, in an order of their own."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randint(len(SHAPES), (200,), generator=generator).tolist()
    weights = [torch.randn(SHAPES[i][0], generator=generator).to(device) for i in order]
    groups = [SHAPES[i][1] for i in order]
    got = ops.pack_weights(weights, groups)
    parts = [ops.pack_weights([w], [g]) for w, g in zip(weights, groups, strict=True)]
    assert torch.equal(got, torch.cat(parts))


def test_any_dtype_and_layout(device):
    weight = torch.randn(20, 6, 3, 3, generator=torch.Generator().manual_seed(2)).to(device)
    want = ops.pack_weights([weight, weight], [1, 2])
    last = weight.to(memory_format=torch.channels_last)
    wide = torch.stack([weight, weight], -1)[..., 0]
    assert torch.equal(ops.pack_weights([last, wide], [1, 2]), want)
    half = weight.half()
    assert torch.equal(ops.pack_weights([half], [1]), ops.pack_weights([half.float()], [1]))
    parameter = torch.nn.Parameter(weight)
    assert not ops.pack_weights([parameter], [1]).requires_grad


def test_nothing(device):
    assert ops.pack_weights([], []).shape == (0,)


def test_opcheck(device):
    weights = [torch.randn(5, 3, 2, device=device), torch.randn(4, 1, device=device).double()]
    size = len(ops.pack_weights(weights, [1, 4]))
    out = torch.empty(size, device=device)
    torch.library.opcheck(torch.ops.fastlip.pack_weights_.default, (out, weights, [1, 4], False))


@pytest.mark.parametrize(
    ("weights", "groups", "options", "error", "message"),
    [
        ([torch.zeros(2, 2)], [1, 1], {}, ValueError, "groups must be as many as weights"),
        ([torch.zeros(2)], [1], {}, ValueError, r"weights must be \[Cout, Cin / groups"),
        ([torch.zeros(2, 0)], [1], {}, ValueError, r"weights must be \[Cout, Cin / groups"),
        ([torch.zeros(3, 2)], [2], {}, ValueError, "groups that divide Cout"),
        ([torch.zeros(3, 2)], [0], {}, ValueError, "groups that divide Cout"),
        ([torch.zeros(2, 2, dtype=torch.int64)], [1], {}, TypeError, "weights must be floating-point"),
        ([[1.0]], [1], {}, TypeError, "weights must be floating-point"),
        ([torch.zeros(2, 2)], [1], {"dtype": torch.float16}, TypeError, "dtype must be torch.float32"),
        (
            [torch.zeros(2, 2), torch.zeros(2, 2, device="meta")],
            [1, 1],
            {},
            ValueError,
            "weights must be on one device",
        ),
    ],
)
def test_names_the_argument(device, weights, groups, options, error, message):
    with pytest.raises(error, match=message):
        ops.pack_weights(weights, groups, **options)


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(31)}, "out must have 32 elements"),
        ({0: torch.zeros(32).half()}, "out must be flat"),
        ({0: torch.zeros(64)[::2]}, "out must be flat"),
        ({1: [torch.zeros(2, 2).half()]}, "weights must be contiguous"),
        ({1: [torch.zeros(2, 3).T]}, "weights must be contiguous"),
        ({1: [torch.zeros(4)]}, "weights must be contiguous"),
        ({2: [3]}, "groups must divide"),
        ({2: [0]}, "groups must divide"),
        ({2: [1, 1]}, "groups must be as many"),
    ],
)
def test_direct_calls_are_checked_too(device, change, message):
    arguments = [torch.zeros(32), [torch.zeros(2, 2)], [1], False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.pack_weights_(*arguments)

"""operator_step_ against torch's convolutions in float64: geometries, directions, recurrence, masks, errors."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_inputs import DEVICES, INTERPRETED
from torch import Tensor

import fastlip
from fastlip import ops
from fastlip.ops import ConvGeometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float64]
#: Whether test_cuda_source.py runs these tests on the CUDA library's source.
HOST_CUDA = "FASTLIP_HOST_ORDER" in os.environ
#: Rounding of sums of a few thousand products: of one of them, and of all together. TF32 would lose 3e-4 of all.
RTOL = {torch.float32: 2e-5, torch.float64: 1e-12}
LOST = {torch.float32: 3e-6, torch.float64: 1e-13}


def on_each(*precisions: str) -> pytest.MarkDecorator:
    """On each device, each of ``precisions`` that differs from the others there."""
    found = []
    for device in DEVICES:
        native = HOST_CUDA or (device == "cuda" and ops.backends[device].name == "native")
        for one in precisions if native else precisions[:1]:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            found.append(pytest.param(device, one, marks=marks, id=f"{device}-{one}"))
    return pytest.mark.parametrize(("device", "precision"), found)


on_each_kernel = on_each("float32", "3xtf32")


def geometry(
    cin: int,
    cout: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    stride: int = 1,
    padding: int | tuple[tuple[int, int], ...] = 0,
    dilation: int = 1,
    groups: int = 1,
    mode: str = "zeros",
) -> ConvGeometry:
    axes = len(kernel)
    pads = ((padding, padding),) * axes if isinstance(padding, int) else padding
    out = tuple(
        (n + sum(pad) - dilation * (k - 1) - 1) // stride + 1 for n, k, pad in zip(size, kernel, pads, strict=True)
    )
    return ConvGeometry(cin, cout, groups, kernel, size, out, (stride,) * axes, (dilation,) * axes, pads, mode)


#: Channels around the blocks of 64 and 16, one of each border, crops, padding modes, depthwise and grouped kernels.
GEOMETRIES = {
    "matrix": ConvGeometry(37, 70),
    "grouped matrix": ConvGeometry(12, 20, 4),
    "3x3": geometry(5, 7, (3, 3), (6, 9), padding=1),
    "3x3 wide": geometry(65, 131, (3, 3), (5, 4), padding=1),
    "strided": geometry(16, 48, (3, 3), (8, 7), stride=2, padding=1),
    "7x7 stem": geometry(3, 64, (7, 7), (13, 13), stride=2, padding=3),
    "1x1 strided": geometry(6, 9, (1, 1), (5, 6), stride=2),
    "gaps": geometry(4, 4, (2, 2), (11, 10), stride=3),
    "dilated": geometry(8, 3, (3, 2), (9, 9), padding=2, dilation=2),
    "all padding": geometry(2, 3, (3, 3), (1, 1), padding=1),
    "one axis": geometry(9, 17, (5,), (23,), padding=2),
    "three axes": geometry(3, 4, (2, 3, 3), (4, 5, 3), padding=1),
    "crop": geometry(3, 5, (3, 3), (7, 7), padding=((-1, 2), (0, -2))),
    "circular": geometry(4, 6, (3, 3), (5, 6), padding=1, mode="circular"),
    "circular strided": geometry(4, 6, (5, 5), (7, 8), stride=2, padding=2, mode="circular"),
    "reflect": geometry(5, 4, (3, 3), (4, 5), padding=1, mode="reflect"),
    "replicate": geometry(5, 4, (5, 3), (4, 5), padding=2, mode="replicate"),
    "grouped": geometry(12, 8, (3, 3), (6, 5), padding=1, groups=4),
    "depthwise": geometry(70, 70, (3, 3), (6, 5), padding=1, groups=70),
    "depthwise strided": geometry(33, 33, (3, 3), (7, 7), stride=2, padding=1, groups=33),
    "multiplier": geometry(6, 12, (3, 3), (5, 5), padding=1, groups=6),
}


if INTERPRETED:
    GEOMETRIES = {
        name: g
        for name, g in GEOMETRIES.items()
        if name not in ("3x3 wide", "7x7 stem", "three axes", "circular strided", "multiplier", "gaps", "one axis")
    }


def apply(weight: Tensor, x: Tensor, g: ConvGeometry) -> Tensor:
    """The convolution by torch: [b, Cin, *input_size] to [b, Cout, *output_size]."""
    if not g.kernel:
        blocks = weight.reshape(g.groups, -1, weight.shape[1])
        return torch.einsum("bgi,goi->bgo", x.reshape(len(x), g.groups, -1), blocks).flatten(1)
    pads = [p for pair in reversed(g.padding) for p in pair]
    mode = "constant" if g.padding_mode == "zeros" else g.padding_mode
    return _CONV[len(g.kernel)](F.pad(x, pads, mode=mode), weight, None, g.stride, 0, g.dilation, g.groups)


def transpose(weight: Tensor, y: Tensor, g: ConvGeometry) -> Tensor:
    """Its adjoint, by autograd."""
    x = torch.zeros(len(y), g.in_channels, *g.input_size, dtype=y.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply(weight, x, g), x, y)
    return gradient


def to_flat(x: Tensor) -> Tensor:
    """[b, C, *size] as [b, pixels, C], flat."""
    return x.flatten(2).permute(0, 2, 1).flatten() if x.dim() > 2 else x.flatten()


def case(
    geometries: list[ConvGeometry], vectors: list[int], adjoint: bool, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """Sources, images and previous vectors per operator in float64, and packed weights, sources and previous."""
    rng = torch.Generator().manual_seed(seed)
    sources, images, earlier, packed = [], [], [], []
    for g, b in zip(geometries, vectors, strict=True):
        weight = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel, generator=rng, dtype=torch.float64)
        weight = weight.to(dtype).double()
        of_input, of_output = (b, g.in_channels, *g.input_size), (b, g.out_channels, *g.output_size)
        x = torch.randn(of_output if adjoint else of_input, generator=rng, dtype=torch.float64).to(dtype).double()
        images.append(transpose(weight, x, g) if adjoint else apply(weight, x, g))
        sources.append(x)
        earlier.append(torch.randn(images[-1].shape, generator=rng, dtype=torch.float64).to(dtype).double())
        packed.append(weight.to(device))
    joined = [torch.cat([to_flat(t) for t in part]).to(dtype).to(device) for part in (sources, earlier)]
    weights = ops.pack_weights(packed, [g.groups for g in geometries], adjoint=adjoint, dtype=dtype)
    return sources, images, earlier, weights, *joined


def squares(vectors: list[Tensor]) -> Tensor:
    return torch.cat([v.flatten(1).square().sum(1) for v in vectors])


def check(got: Tensor, want: list[Tensor], dtype: torch.dtype) -> None:
    at = 0
    for w in want:
        part = got[at : at + w.numel()].cpu().double()
        at += w.numel()
        scale = max(w.abs().max().item(), 1e-30) if w.numel() else 1.0
        error = part - to_flat(w)
        assert error.abs().max().item() <= RTOL[dtype] * scale * 8
        assert error.norm() <= LOST[dtype] * max(w.norm().item(), 1e-30)
    assert at == got.numel()


@on_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_operator(name, adjoint, dtype, device, precision):
    if dtype == torch.float64 and precision != "float32":
        pytest.skip("float64 has one way")
    g, b = GEOMETRIES[name], 3
    sources, images, earlier, weights, x, previous = case([g], [b], adjoint, dtype, device)
    plan = ops.operator_plan([g], [b], adjoint=adjoint, device=device)
    out = torch.full((plan.target_size,), 7.0, dtype=dtype, device=device)
    found = torch.full((b,), 7.0, dtype=torch.float64, device=device)
    ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision)
    check(out, images, dtype)
    want = squares(images)
    assert torch.allclose(found.cpu(), want, rtol=20 * RTOL[dtype], atol=1e-30)

    # A half step of the recurrence.
    x_square, previous_square = squares(sources).to(device), squares(earlier).to(device)
    length, other = squares(sources).sqrt(), squares(earlier).sqrt()
    rows = (b, *(1 for _ in images[0].shape[1:]))
    step = [images[0] / length.view(rows) - (length / other).view(rows) * earlier[0]]
    history = {"x_square": x_square, "previous": previous, "previous_square": previous_square}
    ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision, **history)
    check(out, step, dtype)
    assert torch.allclose(found.cpu(), squares(step), rtol=20 * RTOL[dtype])
    ops.operator_step_(out, found, x, weights, plan, x_square=x_square, matmul_precision=precision)
    check(out, [images[0] / length.view(rows)], dtype)


@on_each_kernel
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_all_at_once_with_a_mask(adjoint, device, precision):
    """Operators of all geometries, each with its own number of vectors; inactive ones are left alone."""
    names = ["3x3", "depthwise", "reflect", "matrix", "3x3"] if INTERPRETED else [*GEOMETRIES, "3x3", "strided"]
    geometries = [GEOMETRIES[name] for name in names]
    vectors = [1 + i % 5 for i in range(len(names))]
    _, images, _, weights, x, _ = case(geometries, vectors, adjoint, torch.float32, device)
    plan = ops.operator_plan(geometries, vectors, adjoint=adjoint, device=device)
    active = torch.arange(len(names), device=device) % 3 != 1
    out = torch.full((plan.target_size,), 7.0, device=device)
    found = torch.full((plan.vectors,), 7.0, dtype=torch.float64, device=device)
    ops.operator_step_(out, found, x, weights, plan, active=active, matmul_precision=precision)
    kept = [im if on else torch.full_like(im, 7.0) for im, on in zip(images, active.tolist(), strict=True)]
    check(out, kept, torch.float32)
    want = [
        squares([im]) if on else torch.full((len(im),), 7.0) for im, on in zip(images, active.tolist(), strict=True)
    ]
    assert torch.allclose(found.cpu(), torch.cat(want).double(), rtol=1e-4)


@on_each_kernel
def test_tiles_of_any_width_give_the_same(device, precision):
    g = GEOMETRIES["3x3"]
    _, images, _, weights, x, _ = case([g], [3], False, torch.float32, device)
    for width in (64, 10_000) if INTERPRETED else (1, 5, 64, 10_000):
        plan = ops.operator_plan([g], [3], device=device, tile_columns=width)
        out, found = torch.zeros(plan.target_size, device=device), torch.zeros(3, dtype=torch.float64, device=device)
        check(ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision), images, torch.float32)
        assert torch.allclose(found.cpu(), squares(images), rtol=1e-4)


@on_each_kernel
def test_a_vector_of_zeros_gives_zeros(device, precision):
    g = GEOMETRIES["3x3"]
    sources, images, earlier, weights, _, _ = case([g], [2], False, torch.float32, device)
    sources[0][1], earlier[0][1] = 0.0, 0.0
    x, previous = (to_flat(t[0]).float().to(device) for t in (sources, earlier))
    plan = ops.operator_plan([g], [2], device=device)
    out, found = torch.full((plan.target_size,), 7.0, device=device), torch.ones(2, dtype=torch.float64, device=device)
    x_square, previous_square = squares(sources).to(device), squares(earlier).to(device)
    history = {"x_square": x_square, "previous": previous, "previous_square": previous_square}
    ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision, **history)
    images[0] /= sources[0].norm()
    images[0][0] -= sources[0].norm() / earlier[0].norm() * earlier[0][0]
    images[0][1] = 0.0
    check(out, images, torch.float32)
    assert found[1] == 0.0


def test_an_empty_plan_does_nothing():
    plan = ops.operator_plan([], [])
    out, none = torch.zeros(0), torch.zeros(0, dtype=torch.float64)
    assert ops.operator_step_(out, none, torch.zeros(0), torch.zeros(0), plan) is out
    assert plan.target_size == plan.vectors == len(plan.tiles) == 0


def random_geometries(count: int, seed: int) -> list[ConvGeometry]:
    """Kernels 1 to 5, strides, dilations, uneven padding, modes and groups drawn at random."""
    rng = random.Random(seed)
    geometries: list[ConvGeometry] = []
    while len(geometries) < count:
        axes, mode = rng.choice([1, 2, 2, 3]), rng.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        kernel = tuple(rng.randint(1, 5) for _ in range(axes))
        size = tuple(rng.randint(2, 9) for _ in range(axes))
        least = -1 if mode == "zeros" else 0
        pads = tuple((rng.randint(least, 1), rng.randint(least, 1)) for _ in range(axes))
        groups = rng.choice([1, 1, 1, 2, 3])
        cin, cout = groups * rng.randint(1, 9), groups * rng.randint(1, 9)
        g = geometry(cin, cout, kernel, size, rng.randint(1, 3), pads, rng.randint(1, 2), groups, mode)
        if min(g.output_size) >= 1:
            geometries.append(g)
    return geometries


def takes_parts(device: str) -> bool:
    """Whether the backend in use takes plans with tiles in parts: all but the CPU library."""
    return fastlip.build_info().backends[device].name != "native" or device == "cuda" or HOST_CUDA


@on_each_kernel
@pytest.mark.parametrize("layout", ["plain", "merged"])
def test_random_geometries(layout, device, precision):
    """Merged: with merged gather groups, and with tiles split into parts where the backend supports them."""
    dtype = torch.float64 if precision == "float32" else torch.float32
    geometries = random_geometries(2 if INTERPRETED else 150, 0)
    vectors = [1 + i % 4 for i in range(len(geometries))]
    options = {"tile_columns": 13, "merge": False, "part_products": 0}
    if layout == "merged":
        options = {"tile_columns": 64, "merge": True, "part_products": 12 if takes_parts(device) else 0}
    for adjoint in (False, True):
        sources, images, _, weights, x, _ = case(geometries, vectors, adjoint, dtype, device)
        plan = ops.operator_plan(geometries, vectors, adjoint=adjoint, device=device, **options)
        assert (plan.parts > 0) == (options["part_products"] > 0)
        out = torch.full((plan.target_size,), 7.0, dtype=dtype, device=device)
        found = torch.zeros(plan.vectors, dtype=torch.float64, device=device)
        ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision)
        check(out, images, dtype)
        assert torch.allclose(found.cpu(), squares(images), rtol=10 * RTOL[dtype], atol=1e-30)
        assert len(sources) == len(geometries)


@on_each_kernel
def test_operands_at_odd_addresses(device, precision):
    """Views that start one element into their storage rule wide accesses out, whatever the channels."""
    g = GEOMETRIES["strided"]
    sources, images, earlier, weights, x, previous = case([g], [3], False, torch.float32, device)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t[:1], t])[1:]

    x_square, previous_square = squares(sources).to(device), squares(earlier).to(device)
    length, other = (squares(t).sqrt().view(-1, 1, 1, 1) for t in (sources, earlier))
    plan = ops.operator_plan([g], [3], device=device)
    out = shifted(torch.zeros(plan.target_size, device=device))
    found = torch.zeros(3, dtype=torch.float64, device=device)
    history = {"x_square": x_square, "previous": shifted(previous), "previous_square": previous_square}
    ops.operator_step_(out, found, shifted(x), shifted(weights), plan, matmul_precision=precision, **history)
    check(out, [images[0] / length - length / other * earlier[0]], torch.float32)


@on_each_kernel
def test_sums_of_many_products_lose_little(device, precision):
    """float32 against float64 on 4,608 products per element: every unit of rounding makes certificates wider."""
    g = geometry(64 if INTERPRETED else 512, 64, (3, 3), (4, 4), padding=1)
    _, images, _, weights, x, _ = case([g], [4], False, torch.float32, device)
    plan = ops.operator_plan([g], [4], device=device)
    out, found = torch.zeros(plan.target_size, device=device), torch.zeros(4, dtype=torch.float64, device=device)
    ops.operator_step_(out, found, x, weights, plan, matmul_precision=precision)
    want = to_flat(images[0])
    error = (out.cpu().double() - want).norm() / want.norm()
    assert error < (4e-7 if device == "cuda" or HOST_CUDA else 1e-6)  # blocked sums, as the CUDA source has them


def test_the_cpu_library_refuses_parts():
    if takes_parts("cpu"):
        pytest.skip("this backend takes parts")
    g = GEOMETRIES["3x3"]
    plan = ops.operator_plan([g], [1], part_products=8)
    out, found = torch.zeros(plan.target_size), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="part_products must be 0"):
        ops.operator_step_(out, found, torch.zeros(plan.source_size), torch.zeros(plan.weight_size), plan)


@on_each_kernel
def test_opcheck(device, precision):
    names = ["3x3", "depthwise"]
    geometries = [GEOMETRIES[name] for name in names]
    _, _, _, weights, x, previous = case(geometries, [2, 1], False, torch.float32, device)
    plan = ops.operator_plan(geometries, [2, 1], device=device)
    out = torch.zeros(plan.target_size, device=device)
    ones = torch.ones(plan.vectors, dtype=torch.float64, device=device)
    tables = (plan.problems, plan.tiles, plan.gather_groups, plan.entries, plan.max_vectors, plan.parts)
    for rest in ((None, None, None), (ones.clone(), previous, ones.clone())):
        active = torch.tensor([True, False], device=device)
        arguments = (out, ones.clone(), x, *rest, weights, *tables, precision, active)
        torch.library.opcheck(torch.ops.fastlip.operator_step_.default, arguments)


@pytest.mark.parametrize("layout", ["plain", "merged"])
def test_the_plan_covers_every_target_once(layout):
    options = {"merge": layout == "merged", "part_products": 30 if layout == "merged" else 0}
    for name, g in GEOMETRIES.items():
        for adjoint in (False, True):
            plan = ops.operator_plan([g], [2], adjoint=adjoint, tile_columns=7, **options)
            entries, gather_groups = plan.entries.numpy(), plan.gather_groups.numpy()
            lanes = (g.in_channels if adjoint else g.out_channels) // (1 if g.depthwise else g.groups)
            pixels = plan.target_size // 2 // (g.in_channels if adjoint else g.out_channels)
            groups = 1 if g.depthwise else g.groups
            seen = np.zeros((pixels, 2, groups, -(-lanes // 64)))
            slots = []
            for problem, gather_group, group, block, column, columns, part, parts, slot in plan.tiles.tolist():
                _, m, _, targets_at, _ = gather_groups[gather_group]
                run = np.arange(column, column + columns)
                np.add.at(seen, (entries[targets_at + run // 2], run % 2, group, block), 1 / parts)
                assert problem == 0
                assert column + columns <= 2 * m
                assert 0 <= part < parts
                slots += [slot] if parts > 1 else []
            assert np.allclose(seen, 1), name
            assert slots == list(range(plan.parts)), name


def test_merging_saves_tiles_and_keeps_large_gather_groups():
    """A padded 3x3 on 4x4 pixels and 4 vectors becomes one tile; on 32x32 the inside keeps its nine taps to itself."""
    small, large = (geometry(64, 64, (3, 3), (n, n), padding=1) for n in (4, 32))
    merge = {"tile_columns": 64, "part_products": 0, "merge": True}
    assert len(ops.operator_plan([small], [4], **merge).tiles) == 1
    assert len(ops.operator_plan([small], [4], **merge | {"merge": False}).tiles) == 9
    plan = ops.operator_plan([large], [4], **merge)
    assert plan.gather_groups[0, :2].tolist() == [9, 900]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ops.MATMUL_PRECISIONS)
def test_captured_steps_and_devices_agree(precision):
    """Two half steps in a CUDA graph: no synchronisation, the same bits each time, and the CPU's result."""
    names = ["3x3 wide", "depthwise", "7x7 stem", "matrix", "strided"]
    geometries, vectors = [*(GEOMETRIES[name] for name in names), *random_geometries(40, 1)], [4] * 45
    kernels = [torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel) for g in geometries]
    results = []
    for device in ("cpu", "cuda"):
        plans = [ops.operator_plan(geometries, vectors, adjoint=adjoint, device=device) for adjoint in (False, True)]
        groups = [g.groups for g in geometries]
        weights = [ops.pack_weights([k.to(device) for k in kernels], groups, adjoint=a) for a in (False, True)]
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(plans[0].source_size, generator=generator).to(device)
        u, w = torch.zeros(plans[0].target_size, device=device), torch.zeros_like(v)
        alpha, beta = (torch.ones(plans[0].vectors, dtype=torch.float64, device=device) for _ in range(2))
        active = torch.ones(len(geometries), dtype=torch.bool, device=device)

        def steps(u=u, w=w, v=v, alpha=alpha, beta=beta, plans=plans, weights=weights, active=active) -> None:
            ops.operator_step_(u, alpha, v, weights[0], plans[0], active=active, matmul_precision=precision)
            history = {"x_square": alpha, "previous": v, "previous_square": torch.ones_like(alpha)}
            ops.operator_step_(w, beta, u, weights[1], plans[1], active=active, matmul_precision=precision, **history)

        steps()
        results.append((u.clone(), w.clone(), alpha.clone(), beta.clone()))
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                steps()
            for _ in range(20):
                for t in (u, w, alpha, beta):
                    t.fill_(float("nan"))
                graph.replay()
                for got, want in zip((u, w, alpha, beta), results[-1], strict=True):
                    assert torch.equal(got, want)
            active.zero_()
            u.fill_(7.0)
            graph.replay()
            assert (u == 7.0).all()
    for got, want in zip(results[1], results[0], strict=True):
        assert (got.cpu() - want).norm() <= 1e-5 * want.norm()


def _arguments() -> tuple[dict[str, object], ConvGeometry]:
    g = GEOMETRIES["3x3"]
    plan = ops.operator_plan([g], [2])
    return {
        "out": torch.zeros(plan.target_size),
        "out_square": torch.zeros(2, dtype=torch.float64),
        "x": torch.zeros(plan.source_size),
        "weights": torch.zeros(plan.weight_size),
        "plan": plan,
    }, g


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.zeros(3)}, ValueError, "out must be contiguous of shape"),
        ({"out": torch.zeros(3, dtype=torch.float16)}, TypeError, "out must be float32 or float64"),
        ({"x": torch.zeros(3)}, ValueError, "x must be contiguous of shape"),
        ({"x": torch.zeros(540, dtype=torch.float64)}, TypeError, "x must have out's dtype"),
        ({"weights": torch.zeros(3)}, ValueError, "weights must be contiguous of shape"),
        ({"out_square": torch.zeros(2)}, TypeError, "out_square must be float64"),
        ({"x_square": torch.zeros(3, dtype=torch.float64)}, ValueError, "x_square must be contiguous of shape"),
        ({"previous": torch.zeros(756)}, ValueError, "previous needs x_square"),
        ({"previous_square": torch.zeros(2, dtype=torch.float64)}, ValueError, "previous_square needs previous"),
        ({"active": torch.zeros(1)}, TypeError, "active must be bool"),
        ({"active": torch.zeros(2, dtype=torch.bool)}, ValueError, "active must be contiguous of shape"),
        ({"x": torch.zeros(1080)[::2]}, ValueError, "x must be contiguous"),
        ({"x": torch.zeros(540, device="meta")}, ValueError, "x must be on the plan's device"),
        ({"matmul_precision": "tf32"}, ValueError, "matmul_precision must be one of float32, 3xtf32, got 'tf32'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments, _ = _arguments()
    arguments |= change
    with pytest.raises(error, match=message):
        ops.operator_step_(**arguments)


def test_in_place_on_the_source_is_an_error():
    g = geometry(4, 4, (3, 3), (5, 5), padding=1)
    plan = ops.operator_plan([g], [1])
    x = torch.zeros(plan.source_size)
    square = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="out must be another tensor"):
        ops.operator_step_(x, square, x, torch.zeros(plan.weight_size), plan)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ([0], {}, "vectors"),
        ([1, 1], {}, "vectors"),
        ([2**26], {}, "vectors times pixels"),
        ([1], {"tile_columns": 0}, "tile_columns"),
        ([1], {"part_products": -1}, "part_products"),
        ([1], {"tile_columns": 65, "part_products": 1}, "part_products"),
    ],
)
def test_a_wrong_plan_is_an_error(vectors, options, message):
    with pytest.raises(ValueError, match=message):
        ops.operator_plan([GEOMETRIES["3x3"]], vectors, **options)

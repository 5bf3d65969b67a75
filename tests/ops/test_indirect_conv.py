"""Indirect convolutions against their definition, on every instruction set."""

import itertools

import pytest
import torch
from instruction_sets import every_isa, run_with_isa

from fastlip import ops
from fastlip.ops import reference

needs_native = pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")


def maps(rows):
    """[B, pixels, channels] as maps of one column, [B, channels, pixels, 1], channels_last."""
    return rows.mT[..., None]


def operands(batch, sources, targets, taps, channels, outputs, seed=0):
    """A table of any pixels whatever, some of which meet nothing at a tap."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    table = torch.randint(-sources // 2, sources, (targets, 1 + taps), generator=generator).clamp_min(-1)
    table[:, 0] = torch.randperm(targets, generator=generator)
    weight = ops.packed_taps(random(taps, channels, outputs))
    other, active = (maps(random(batch, targets, outputs)) for _ in range(2))
    extra = {"bias": random(outputs), "other": other, "active": active > 0}
    return (maps(random(batch, sources, channels)), weight, table.int()), extra


def transposed(weight, taps, channels, outputs):
    """Packed weights as those of the other map, of which this one is the adjoint."""
    rows = weight.transpose(0, 1).flatten(1)[:, :outputs].unflatten(0, (taps, channels))
    return ops.packed_taps(rows.mT)


def both(arguments, extra, names, relu, adjoint=False):
    """What the operator gives with the extra operands of these ``names``, and what it should."""
    got, want = torch.full_like(extra["other"], torch.nan), torch.full_like(extra["other"], torch.nan)
    chosen = {name: tensor.clone() if name in names else None for name, tensor in extra.items()}
    ops.IndirectConvs().add(got, *arguments, **chosen, relu=relu, adjoint=adjoint)
    if "active" in names:
        assert torch.equal(chosen["active"], got > 0 if relu else extra["active"])
    optional = [torch.empty(0) if t is None else t.clone() for t in chosen.values()]
    reference.indirect_convs_(*([t] for t in (want, *arguments, int(adjoint), *optional, int(relu))))
    if "active" in names:
        assert torch.equal(optional[-1], want > 0 if relu else extra["active"])
    return got, want


SIZES = [
    # sources, targets, taps, channels, outputs
    (1, 1, 1, 1, 1),
    (4, 3, 2, 5, 7),
    (4, 4, 9, 16, 16),
    (9, 30, 4, 17, 33),
    (30, 9, 3, 33, 48),
    (16, 16, 9, 3, 70),
    (700, 650, 2, 4, 5),
    (5, 5, 25, 300, 20),
]


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_definition(sizes, batch):
    arguments, extra = operands(batch, *sizes)
    names = tuple(extra)
    atol = 1e-5 * (1 + sizes[2] * sizes[3]) ** 0.5
    for relu, count in itertools.product((False, True), range(len(names) + 1)):
        for chosen in itertools.combinations(names, count):
            got, want = both(arguments, extra, chosen, relu)
            torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)
            if "active" in chosen and not relu:
                assert (got[~extra["active"]] == 0).all()
            assert not relu or (got >= 0).all()


@pytest.mark.parametrize("batch", [1, 2, 5, 19, 33, 40])
@pytest.mark.parametrize("sizes", [*SIZES, (4, 4, 9, 65, 130), (1, 1, 1, 40, 0), (1, 1, 1, 0, 40)])
def test_the_adjoint_definition(sizes, batch):
    """The same sums from the other map's weights: natively the same multiply-adds, one after the other."""
    (x, weight, table), extra = operands(batch, *sizes)
    arguments = (x, transposed(weight, *sizes[2:]), table)
    atol = 1e-5 * (1 + sizes[2] * sizes[3]) ** 0.5
    for relu, names in itertools.product((False, True), ((), ("bias",), ("other", "active"), tuple(extra))):
        got, want = both(arguments, extra, names, relu, adjoint=True)
        torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)
        same, _ = both((x, weight, table), extra, names, relu)
        assert torch.equal(got, same)


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_result_may_take_the_place_of_other(adjoint):
    for sizes in SIZES:
        (x, weight, table), extra = operands(5, *sizes)
        weight = transposed(weight, *sizes[2:]) if adjoint else weight
        want, out = torch.empty_like(extra["other"]), extra["other"].clone()
        ops.IndirectConvs().add(want, x, weight, table, adjoint=adjoint, **extra)
        ops.IndirectConvs().add(out, x, weight, table, adjoint=adjoint, **{**extra, "other": out})
        assert torch.equal(out, want)


def test_nothing_to_do():
    arguments, _ = operands(2, 3, 4, 2, 5, 6)
    x, weight, table = arguments
    memory = maps(torch.full((2, 4, 6), 1.0))
    ops.IndirectConvs().add(memory[:0], x[:0], weight, table)
    ops.IndirectConvs().add(memory[:, :, :0], x, weight, table[:0])
    ops.IndirectConvs().run()
    assert (memory == 1).all()


def test_nan_and_infinity_stay():
    x = maps(torch.tensor([[[torch.nan], [torch.inf], [-1.0]]]))
    active = maps(torch.tensor([[[False], [False], [True]]]))
    table = torch.tensor([[0, 0], [1, 1], [2, 2]], dtype=torch.int32)
    out = torch.empty(1, 1, 3, 1)
    ops.IndirectConvs().add(out, x, ops.packed_taps(torch.ones(1, 1, 1)), table, relu=True, active=active)
    assert out[0, 0, 0].isnan()
    assert out[0, 0, 1:].flatten().tolist() == [torch.inf, 0.0]
    assert active.flatten().tolist() == [True, True, False]
    active = maps(torch.tensor([[[False], [False], [True]]]))
    ops.IndirectConvs().add(out, x, ops.packed_taps(torch.ones(1, 1, 1)), table, active=active)
    assert out.flatten().tolist() == [0.0, 0.0, -1.0]


@pytest.mark.parametrize("outputs", [1, 5, 16, 17, 47])
def test_where_the_relu_is_active(outputs):
    """Where torch passes a gradient on: not at 0 of either sign, and at NaN."""
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]).view(1, 1, -1, 1)
    count = x.shape[2]
    table = torch.arange(count, dtype=torch.int32)[:, None].repeat(1, 2)
    out, active = maps(torch.empty(1, count, outputs)), maps(torch.zeros(1, count, outputs, dtype=torch.bool))
    weight = ops.packed_taps(torch.ones(1, 1, outputs))
    ops.IndirectConvs().add(out, x, weight, table, relu=True, active=active)
    sums = x.expand_as(out).clone().requires_grad_()
    (passed,) = torch.autograd.grad(sums.relu().sum(), sums)
    assert torch.equal(active, passed == 1)


@needs_native
@pytest.mark.parametrize("adjoint", [False, True])
def test_an_image_depends_on_neither_its_batch_nor_the_threads(adjoint):
    arguments, extra = operands(40, 64, 64, 9, 40, 72)
    x, weight, table = arguments
    weight = transposed(weight, 9, 40, 72) if adjoint else weight
    extra["adjoint"] = adjoint
    whole = maps(torch.empty(40, 64, 72))
    ops.IndirectConvs().add(whole, x, weight, table, **extra)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        part = torch.empty_like(whole[rows])
        ops.IndirectConvs().add(
            part, x[rows], weight, table, **{k: v if k in ("bias", "adjoint") else v[rows] for k, v in extra.items()}
        )
        assert torch.equal(part, whole[rows])
    threads = torch.get_num_threads()
    for batch, count in itertools.product((40, 1), (2, 3, 7)):
        torch.set_num_threads(count)
        try:
            again = torch.full_like(whole[:batch], torch.nan)
            more = {name: t if name in ("bias", "adjoint") else t[:batch] for name, t in extra.items()}
            ops.IndirectConvs().add(again, x[:batch], weight, table, **more)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again, whole[:batch])


@every_isa
def test_every_instruction_set(isa):
    run_with_isa(isa, __file__, "definition")


def test_opcheck():
    (x, weight, table), extra = operands(2, 3, 4, 2, 5, 6)
    arguments = [[t, t] for t in (x, weight, table, 0, *extra.values(), 1)]
    torch.library.opcheck(
        torch.ops.fastlip.indirect_convs_.default, ([maps(torch.zeros(2, 4, 6)) for _ in range(2)], *arguments)
    )


def test_convolutions_are_collected_and_run_in_order():
    """Each reads the result of the one before; the third one runs all of them."""
    x = maps(torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(0)))
    weight = ops.packed_taps(2.0 * torch.eye(16)[None])
    table = torch.arange(4, dtype=torch.int32)[:, None].repeat(1, 2)
    values = [x, *(torch.full_like(x, torch.nan) for _ in range(5))]
    convs = ops.IndirectConvs(most=3)
    for i in range(5):
        convs.add(values[i + 1], values[i], weight, table)
        assert values[1].isnan().all() == (i < 2)
    torch.testing.assert_close(values[3], 8.0 * x)
    assert values[4].isnan().all()
    convs.run()
    convs.run()
    torch.testing.assert_close(values[5], 32.0 * x)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: maps(torch.zeros(2, 4, 6)).double()}, "out must be float32"),
        ({0: torch.zeros(2, 6, 4, 1)}, "out must be float32 on the CPU, channels_last"),
        ({0: maps(torch.zeros(2, 4, 12))[:, ::2]}, "out must be float32 on the CPU, channels_last"),
        ({0: maps(torch.zeros(3, 4, 6))}, "x must be"),
        ({0: maps(torch.zeros(2, 5, 6))}, "table must be"),
        ({0: maps(torch.zeros(2, 4, 17))}, "weight must be"),
        ({1: maps(torch.zeros(2, 3, 5)).half()}, "x must be float32"),
        ({1: torch.zeros(2, 5, 3, 1)}, "x must be float32 on the CPU, channels_last"),
        ({1: torch.zeros(2, 3, 5)}, "x must be"),
        ({1: maps(torch.zeros(2, 3, 4))}, "weight must be"),
        ({2: torch.zeros(1, 10, 16).double()}, "weight must be contiguous float32"),
        ({2: torch.zeros(1, 10, 8)}, "weight must be"),
        ({3: torch.zeros(4, 3, dtype=torch.int64)}, "table must be"),
        ({3: torch.zeros(4, 4, dtype=torch.int32)}, "weight must be"),
        ({3: torch.zeros(4, 0, dtype=torch.int32)}, "table must be"),
        ({4: 1}, "weight must be .*taps . outputs"),
        ({5: torch.zeros(5)}, "bias must have"),
        ({6: maps(torch.zeros(2, 4, 5))}, "other must be float32 on the CPU with out's shape"),
        ({6: torch.zeros(2, 6, 4, 1)}, "other must be float32 on the CPU with out's shape and memory format"),
        ({7: torch.zeros(2, 4, dtype=torch.bool)}, "active must be bool on the CPU with out's shape"),
        ({7: maps(torch.zeros(2, 4, 6))}, "active must be bool"),
        ({7: torch.zeros(2, 6, 4, 1, dtype=torch.bool)}, "active must be bool .*memory format"),
    ],
)
def test_direct_calls_are_checked(change, message):
    (x, weight, table), extra = operands(2, 3, 4, 2, 5, 6)
    arguments = [maps(torch.zeros(2, 4, 6)), x, weight, table, 0, *extra.values(), False]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.indirect_convs_(*([argument] for argument in arguments))
    with pytest.raises(RuntimeError, match="all lists must be as long as out"):
        torch.ops.fastlip.indirect_convs_(*([argument] for argument in arguments[:-1]), [])


def test_tensors_without_memory_are_refused():
    """Beside others, in any list."""
    (x, weight, table), extra = operands(2, 3, 4, 2, 5, 6)
    arguments = [maps(torch.zeros(2, 4, 6)), x, weight, table, 0, *extra.values(), 1]
    for i in (0, 1, 2, 3, 5, 6, 7):
        changed = [*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match="all tensors must be on"):
            torch.ops.fastlip.indirect_convs_(*([argument] for argument in changed))

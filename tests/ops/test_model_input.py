"""What a step writes for the model, (x - mean) / std in a dtype of its own, on every backend."""

import copy
import math

import pytest
import torch
from op_inputs import ATOL, DEVICES, INTERPRETED, NORMS, make
from test_apgd_step import PER_ELEMENT, some_state
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.transforms.functional import normalize

from fastlip import ops
from fastlip.ops import reference

on_devices = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES]
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5,), (2, 3, 5, 5), (2, 67), (1, 2053)]
if not INTERPRETED:
    SHAPES += [(4, 3, 11, 13), (1, 3, 32, 32), (2, 5003), (2, 3, 112, 113)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def statistics(shape: tuple[int, ...], kind: str, device: str) -> dict:
    """Mean and standard deviation: a number each, or one a channel."""
    if kind == "numbers":
        return {"mean": 0.45, "std": 0.225}
    if kind == "none":
        return {}
    channels = shape[1] if len(shape) > 1 else 1
    values = [torch.tensor([v[i % 3] for i in range(channels)], device=device) for v in (MEAN, STD)]
    mean, std = (v.reshape(-1, *([1] * (len(shape) - 2))) if len(shape) > 1 else v.reshape(()) for v in values)
    return {"mean": mean, "std": 0.225 if kind == "mixed" else std}


def arguments(z: ops.ModelInput) -> tuple:
    split = [(0.0, v) if isinstance(v, Tensor) else (v, None) for v in (z.mean, z.std)]
    return (z.values, *split[0], *split[1])


def fed(z: ops.ModelInput) -> ops.ModelInput:
    return ops.ModelInput(z.values.clone(), z.mean, z.std)


def assert_fed(z: ops.ModelInput, x: Tensor, mean=0.0, std=1.0) -> None:
    """Exactly what PyTorch makes of x."""
    torch.testing.assert_close(z.values, ((x - mean) / std).to(z.values.dtype), rtol=0, atol=0)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_matches_reference(device, shape, dtype, norm):
    x, grad, x0 = make(shape, torch.float32, device)
    grad = grad.to(dtype)
    for kind in ("channels",) if INTERPRETED else ("none", "numbers", "mixed", "channels"):
        normalization = statistics(shape, kind, device)
        z = ops.model_input(x, dtype=dtype, **normalization)
        assert_fed(z, x, **normalization)
        want, want_z = x.clone(), fed(z)
        reference.pgd_step_(
            want, grad, x0, 0.1, None, 0.5, None, norm, 0.0, None, 1.0, None, 0.99, None, *arguments(want_z)
        )
        got = x.clone()
        assert ops.pgd_step_(got, grad, x0, step_size=0.1, eps=0.5, norm=norm, model_input=z) is got
        torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else ATOL[torch.float32])
        assert_fed(z, got, **normalization)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12,), (12, 3, 5, 7), *([] if INTERPRETED else [(7, 3, 112, 113)])], ids=str)
def test_apgd_step_matches_reference(device, shape, dtype, norm):
    x, grad, x0 = make(shape, torch.float32, device)
    grad = grad.to(dtype)
    loss = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    active = (torch.arange(len(x), device=device) % 5) != 2
    normalization = statistics(shape, "channels", device)
    z = ops.model_input(x, dtype=dtype, **normalization)
    before = z.values.clone()
    state = some_state(x, x0, 20, 0.4, norm)
    want, want_state, want_z = x.clone(), copy.deepcopy(state), fed(z)
    names = (*PER_ELEMENT, "best_loss", "past_loss", "step_size", "counters", "schedule")
    rows = [getattr(want_state, name) for name in names]
    box = (0.0, None, 1.0, None)
    reference.apgd_step_(want, grad, loss, x0, *rows, 0.4, None, norm, *box, 0.75, 0.75, active, *arguments(want_z))
    got = x.clone()
    ops.apgd_step_(got, grad, loss, x0, state, eps=0.4, norm=norm, active=active, model_input=z)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 2 * ATOL[torch.float32])
    for name in (*PER_ELEMENT, "best_loss", "past_loss", "counters"):
        torch.testing.assert_close(getattr(state, name), getattr(want_state, name), rtol=0, atol=0)
    assert_fed(z[active], got[active], **normalization)
    assert torch.equal(z.values[~active], before[~active])


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_follows_the_chain_rule(device, norm):
    """As a step on the gradient with respect to x itself."""
    _, _, x0 = make((4, 3, 6, 5), torch.float32, device)
    x = x0.clone()
    std = torch.tensor([1.0, 0.5, 4.0], device=device).reshape(3, 1, 1)  # quotients that are exact
    z = ops.model_input(x, std=std)
    weight = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(2)).to(device)
    step = {"step_size": 0.3, "eps": 1.0, "norm": norm, "sparsity": 0.9}
    seen = x.clone().requires_grad_()
    (direct,) = torch.autograd.grad(((seen / std) * weight).sum(), seen)
    want = ops.pgd_step(x, direct, x0, **step)
    values = z.values.requires_grad_()
    (grad,) = torch.autograd.grad((values * weight).sum(), values)
    got = ops.pgd_step_(x.clone(), grad, x0, **step, model_input=z)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    if norm != "linf":  # whose signs no standard deviation changes
        plain = ops.pgd_step(x, grad, x0, **step)
        assert (plain - want).abs().max() > 1e-3
    assert z.values is values  # a leaf that the next pass reads


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_values_per_sample_and_inactive_samples(device, norm):
    x, grad, x0 = make((6, 3, 5, 7), torch.float32, device)
    eps = torch.tensor([0.0, 0.1, 0.5, -1.0, math.nan, math.inf], device=device)
    active = torch.tensor([True, True, False, True, True, True], device=device)
    normalization = statistics(x.shape, "channels", device)
    z = ops.model_input(x, dtype=torch.float16, **normalization)
    z.values.fill_(9.0)
    arrived = grad.half().float() / normalization["std"]
    want = ops.pgd_step(x, arrived, x0, step_size=0.1, eps=eps, norm=norm, active=active)
    got = ops.pgd_step_(x.clone(), grad.half(), x0, step_size=0.1, eps=eps, norm=norm, active=active, model_input=z)
    assert torch.equal(got, want)
    assert_fed(z[active], got[active], **normalization)
    assert (z.values[2] == 9).all()
    assert torch.equal(z[1:3].values, z.values[1:3])


@on_devices
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(device, dtype, norm):
    x, grad, x0 = make((4, 3, 9, 6), torch.float32, device)
    grad = grad.to(dtype)
    normalization = statistics(x.shape, "channels", device)
    want = ops.pgd_step(x, grad.float() / normalization["std"], x0, step_size=0.1, eps=0.3, norm=norm)
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
        z = ops.model_input(a, dtype=dtype, **normalization)
        got = ops.pgd_step_(a, g, c, step_size=0.1, eps=0.3, norm=norm, model_input=z)
        torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else ATOL[torch.float32])
        assert_fed(z, want if norm == "linf" else got, **normalization)
    wide = torch.empty(8, 3, 9, 6, dtype=dtype, device=device)  # samples of it far apart, and at odd addresses
    z = ops.model_input(x, dtype=dtype, **normalization)
    z = ops.ModelInput(wide[1::2], z.mean, z.std)
    got = ops.pgd_step_(x.clone(), grad, x0, step_size=0.1, eps=0.3, norm=norm, model_input=z)
    assert_fed(z, got, **normalization)


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_odd_addresses(device, norm):
    """Memory that allows single elements alone, and operands of which only some do."""
    for size in (37, 64):
        x, grad, x0 = make((3, size), torch.float32, device)
        want = ops.pgd_step(x, grad.half().float() / 0.5, x0, step_size=0.1, eps=0.3, norm=norm)
        room = torch.empty(3 * size + 1, dtype=torch.float16, device=device)
        for values, low in (
            (room[1:].view(3, size), grad.half()),
            (room[:-1].view(3, size), torch.cat([room[:1], grad.half().flatten()])[1:].view(3, size)),
        ):
            z = ops.ModelInput(values, 0.5, 0.5)
            got = ops.pgd_step_(x.clone(), low, x0, step_size=0.1, eps=0.3, norm=norm, model_input=z)
            torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else ATOL[torch.float32])
            assert_fed(z, got, 0.5, 0.5)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_to_nearest(device, dtype):
    """Every kind of float: ties, numbers around the smallest and largest of 16 bits, zeros of either sign."""
    low = torch.arange(0, 2**16, 37, dtype=torch.int32).to(torch.int16)
    near = [low.view(d).float() for d in (torch.float16, torch.bfloat16)]
    near = [t[t.isfinite()] for t in near]
    bits = torch.cat(near).view(torch.int32)
    offsets = torch.tensor([0, 1, -1, 2**12, 2**12 - 1, 2**12 + 1, 2**15, 2**15 - 1, 2**15 + 1], dtype=torch.int32)
    x = (bits[:, None] + offsets).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, 65504, 65519, 65520, -65520, 1e38, 3e-8, 2.98e-8])])
    x = x[: 2000 if INTERPRETED else None].to(device)[None]
    z = ops.model_input(x, dtype=dtype)
    want = z.values.clone()
    z.values.fill_(-1)
    free = {"step_size": 0.0, "eps": math.inf, "bounds": (-math.inf, math.inf)}
    kept = ops.pgd_step_(x.clone(), torch.zeros_like(want), torch.zeros_like(x), model_input=z, **free)
    assert torch.equal(kept, x)
    torch.testing.assert_close(z.values, want, rtol=0, atol=0)
    assert torch.equal(z.values.signbit(), kept.signbit())


@on_devices
def test_is_the_normalization_of_torchvision(device):
    x, grad, x0 = make((3, 3, 16, 16), torch.float32, device)
    z = ops.model_input(x, **statistics(x.shape, "channels", device))
    assert torch.equal(z.values, normalize(x, MEAN, STD))
    ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.3, model_input=z)
    assert torch.equal(z.values, normalize(x, MEAN, STD))


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_small_steps_add_up_in_x(device, norm):
    """Twenty steps of which the model's dtype sees none are one that it does see."""
    x0 = torch.full((2, 64), 0.75, device=device)
    x = x0.clone()
    z = ops.model_input(x, dtype=torch.bfloat16)
    grad = torch.ones_like(z.values)
    step = {"linf": 2.0**-12, "l2": 2.0**-12 * 8, "l1": 2.0**-12 * 64}[norm]  # 2^-12 an element
    ops.pgd_step_(x, grad, x0, step_size=step, eps=1e3, norm=norm, model_input=z)
    assert (z.values == 0.75).all()
    for _ in range(19):
        ops.pgd_step_(x, grad, x0, step_size=step, eps=1e3, norm=norm, model_input=z)
    assert (z.values > 0.75).all()


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_elements_that_are_not_finite_count_as_zero(device, norm):
    x, grad, x0 = make((3, 130), torch.float32, device)
    grad = grad.half()
    bad, clean = grad.clone(), grad.clone()
    bad[:, ::7], bad[:, 1::7], bad[:, 2::7] = math.nan, math.inf, -math.inf
    clean[~bad.isfinite()] = 0
    steps = []
    for g in (bad, clean):
        z = ops.model_input(x, mean=0.5, std=0.25, dtype=torch.float16)
        steps.append(ops.pgd_step_(x.clone(), g, x0, step_size=0.2, eps=0.5, norm=norm, model_input=z))
        assert_fed(z, steps[-1], 0.5, 0.25)
    assert torch.equal(*steps)


@on_devices
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (3, 0), (2, 0, 5)], ids=str)
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    z = ops.model_input(x, dtype=torch.float16)
    for norm in NORMS:
        got = ops.pgd_step_(x, z.values.clone(), x.clone(), step_size=0.1, eps=0.1, norm=norm, model_input=z)
        assert got.shape == z.values.shape == shape


@on_devices
def test_opcheck(device):
    x, grad, x0 = make((3, 2, 4, 4), torch.float32, device)
    z = ops.model_input(x, mean=torch.rand(2, 1, 1, device=device), std=0.5, dtype=torch.bfloat16)
    for norm in NORMS:
        step = (x, grad.bfloat16(), x0, 0.1, None, 0.2, None, norm, 0.0, None, 1.0, None, 0.99, None, *arguments(z))
        torch.library.opcheck(torch.ops.fastlip.pgd_step_.default, step)
        state = some_state(x, x0, 20, 0.4, norm)
        names = (*PER_ELEMENT, "best_loss", "past_loss", "step_size", "counters", "schedule")
        rows, box = [getattr(state, name) for name in names], (0.0, None, 1.0, None)
        loss = torch.zeros(3, device=device)
        step = (x, grad.bfloat16(), loss, x0, *rows, 0.4, None, norm, *box, 0.75, 0.75, None, *arguments(z))
        torch.library.opcheck(torch.ops.fastlip.apgd_step_.default, step)


@on_devices
def test_can_be_traced_and_compiled(device):
    def attack_step(x: Tensor, grad: Tensor, x0: Tensor, values: Tensor) -> Tensor:
        x, z = x.clone(), ops.ModelInput(values.clone(), 0.5, 0.25)
        ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.3, model_input=z)
        return z.values * 2

    x, grad, x0 = make((3, 2, 4, 4), torch.float32, device)
    inputs = (x, grad.half(), x0, ops.model_input(x, mean=0.5, std=0.25, dtype=torch.float16).values)
    want = attack_step(*inputs)
    compiled = torch.compile(attack_step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), want, rtol=0, atol=0)
    traced = make_fx(attack_step, tracing_mode="fake")(*inputs)
    torch.testing.assert_close(traced(*inputs), want, rtol=0, atol=0)


def attack(x0: Tensor, weight: Tensor, norm: str, steps: int, graphed: bool) -> tuple[Tensor, Tensor]:
    """Steps on a convolution in float16, whose input the step before wrote."""
    normalization = statistics(x0.shape, "channels", x0.device.type)
    x = x0.clone()
    z = ops.model_input(x, dtype=torch.float16, **normalization)
    values = z.values.requires_grad_()

    def step() -> None:
        loss = torch.nn.functional.conv2d(values, weight, padding=1).float().square().sum()
        (grad,) = torch.autograd.grad(loss, values)
        ops.pgd_step_(x, grad, x0, step_size=0.05, eps=0.3, norm=norm, sparsity=0.5, model_input=z)

    step()
    if graphed:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for _ in range(steps - 1):
        if graphed:
            graph.replay()
        else:
            step()
    return x, values.detach()


@on_devices
@pytest.mark.parametrize("norm", NORMS)
def test_a_loop_sees_what_it_wrote(device, norm):
    """On a GPU as a CUDA graph, too: forward pass, backward pass and step are one replay."""
    generator = torch.Generator().manual_seed(4)
    x0 = torch.rand(4, 3, 8, 8, generator=generator).to(device)
    weight = torch.randn(4, 3, 3, 3, generator=generator).half().to(device)
    x, values = attack(x0, weight, norm, 5, graphed=False)
    normalization = statistics(x0.shape, "channels", device)
    torch.testing.assert_close(values, ((x - normalization["mean"]) / normalization["std"]).half(), rtol=0, atol=0)
    assert ops.project(x, x0, eps=0.3, norm=norm).sub(x).abs().max() < 1e-6
    assert (x - x0).flatten(1).norm(p={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1).min() > 0.15
    if device == "cuda":
        again, replayed = attack(x0, weight, norm, 5, graphed=True)
        torch.testing.assert_close(again, x, rtol=0, atol=1e-3)
        torch.testing.assert_close(replayed.float(), values.float(), rtol=0, atol=1e-2)


def channel(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).double()}, TypeError, "x must be float32"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.float32, torch.float16 or torch.bfloat16"),
        ({"std": 0.0}, ValueError, "std must be above 0"),
        ({"std": channel(1, -1, 1)}, ValueError, "std must be above 0"),
        ({"std": math.nan}, ValueError, "std must be finite"),
        ({"std": channel(1, math.nan, 1)}, ValueError, "std must be above 0"),
        ({"mean": math.inf}, ValueError, "mean must be finite"),
        ({"mean": "imagenet"}, TypeError, "mean must be floats or tensors"),
        ({"mean": channel(1, 2)}, ValueError, "mean must broadcast to x's shape"),
        ({"mean": torch.zeros(2, 1, 1, 1)}, ValueError, "mean must broadcast to a sample of x"),
        ({"mean": torch.zeros(1, device="meta")}, ValueError, "mean must be on x's device"),
    ],
)
def test_model_input_names_the_argument(wrong, error, message):
    given = {"x": torch.zeros(2, 3, 4, 4)} | wrong
    with pytest.raises(error, match=message):
        ops.model_input(given.pop("x"), **given)


LOW = torch.zeros(3, 4).half()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model_input": LOW}, TypeError, "model_input must be a ModelInput or None"),
        ({"model_input": ops.ModelInput(LOW[:2], 0.0, 1.0)}, ValueError, "model_input must have x's shape"),
        ({"model_input": ops.ModelInput(LOW.double(), 0.0, 1.0)}, TypeError, "model_input must be float32, float16"),
        ({"model_input": ops.ModelInput(LOW.to("meta"), 0.0, 1.0)}, ValueError, "model_input must be on x's device"),
        ({"model_input": ops.ModelInput(torch.zeros(4, 3).half().T, 0.0, 1.0)}, ValueError, "memory layout"),
        ({"model_input": ops.ModelInput(LOW[:1].expand(3, 4), 0.0, 1.0)}, ValueError, "memory layout"),
        ({"model_input": ops.ModelInput(LOW, torch.zeros(4), 1.0)}, ValueError, "memory layout"),
        ({"grad": torch.zeros(3, 4)}, TypeError, "grad must have model_input's dtype"),
        ({"grad": LOW.bfloat16()}, TypeError, "grad must have model_input's dtype"),
        ({"grad": LOW[:, :2]}, ValueError, "grad must have x's shape"),
        ({"x": torch.zeros(3, 4).double(), "x0": torch.zeros(3, 4).double()}, TypeError, "x must be float32 where"),
    ],
)
def test_steps_name_the_argument(wrong, error, message):
    given = {"x": torch.zeros(3, 4), "grad": LOW.clone(), "x0": torch.zeros(3, 4)}
    given |= {"model_input": ops.ModelInput(LOW.clone(), 0.0, 1.0)} | wrong
    x, grad, x0, z = (given[name] for name in ("x", "grad", "x0", "model_input"))
    with pytest.raises(error, match=message):
        ops.pgd_step_(x, grad, x0, step_size=0.1, eps=0.1, model_input=z)
    state = ops.apgd_state(x, steps=5, eps=0.1)
    with pytest.raises(error, match=message):
        ops.apgd_step_(x, grad, torch.zeros(3), x0, state, eps=0.1, model_input=z)


def test_the_iterate_is_not_what_the_model_reads():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="model_input must not share its memory with x"):
        ops.pgd_step_(x, x + 1, x + 0, step_size=0.1, eps=0.1, model_input=ops.ModelInput(x, 0.0, 1.0))


@pytest.mark.skipif(ops.backends["cpu"].name != "native", reason="checks of the compiled bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 4).double(), 2: torch.zeros(3, 4).double()}, "x must be float32 and model_input"),
        ({1: torch.zeros(3, 4)}, "grad must have model_input's dtype"),
        ({1: LOW.repeat(1, 2)}, "grad must have x's shape"),
        ({14: LOW.double()}, "x must be float32 and model_input"),
        ({14: torch.zeros(3, 4, dtype=torch.int32)}, "model_input must be float32"),
        ({14: LOW.repeat(1, 2)[:, ::2]}, "model_input must have x's shape and memory layout"),
        ({14: LOW[:1].expand(3, 4)}, "samples of model_input overlap"),
        ({16: torch.zeros(3, 4)}, "mean_tensor and std_tensor must be"),
        ({18: LOW[:1]}, "std_tensor must be"),
        ({14: None}, "grad must have x's dtype"),
    ],
)
def test_direct_calls_are_checked_too(change, message):
    given = [torch.zeros(3, 4), LOW.clone(), torch.zeros(3, 4), 0.1, None, 0.1, None, "l2", 0.0, None, 1.0, None, 0.99]
    given += [None, LOW.clone(), 0.0, None, 1.0, None]
    for position, value in change.items():
        given[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastlip.pgd_step_(*given)

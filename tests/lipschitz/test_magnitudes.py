"""Constants that depend on how large tensors are: on boxes, on balls and everywhere, against searched stretches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastlip.lipschitz import Interval, Ranged, _magnitudes, _registry, lipschitz_bound, require_rules, rule
from fastlip.lipschitz._combinations import Weighted
from fastlip.lipschitz._domain import domain_of
from fastlip.lipschitz._graph import trace
from fastlip.lipschitz._rules.normalisation import least_variance
from fastlip.lipschitz._steps import in_graph, in_sample
from fastlip.norms import Operator

Shape = tuple[int, ...]


class Fn(nn.Module):
    """A function of the input and of modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module, **numbers: float) -> None:
        super().__init__()
        self.function, self.parts, self.numbers = function, nn.ModuleList(parts), numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts, **self.numbers)


class Draw:
    """Random sizes and numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def int(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def float(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def weights(self, model: nn.Module) -> nn.Module:
        """The model in eval mode with random parameters and statistics."""
        scale = self.float(0.3, 1.2)
        for name, t in model.state_dict().items():
            if not t.is_floating_point():
                continue
            noise = torch.randn(t.shape, generator=self.generator)
            t.copy_(
                0.2 + noise.square() if name.endswith("running_var") else scale * noise / max(t[0].numel(), 1) ** 0.5
            )
        return model.eval()


def _gate(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) * torch.sigmoid(b(x))


def _squeeze_excite(x: Tensor, squeeze: nn.Module, excite: nn.Module) -> Tensor:
    return x * torch.sigmoid(excite(F.relu(squeeze(F.adaptive_avg_pool2d(x, 1)))))


class SelfAttention(nn.Module):
    """Softmax attention of a few heads, written out or by torch's function."""

    def __init__(self, d: int, heads: int, written: bool, mask: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.written, self.mask = heads, written, mask
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.written:
            scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
            y = (scores if self.mask is None else scores + self.mask).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, self.mask)
        return self.out(y.transpose(1, 2).reshape(b, n, d))


class Transformer(nn.Module):
    """A pre-norm block."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class ConvNeXt(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(d, d, 3, padding=1, groups=d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.scale = nn.Parameter(torch.ones(d, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.scale * y


class ShuffleNet(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(d, d, 1), nn.BatchNorm2d(d), nn.ReLU(), nn.Conv2d(d, d, 3, padding=1, groups=d), nn.BatchNorm2d(d)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        y = torch.cat((kept, self.branch(changed)), dim=1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class MBConv(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(d, 2 * d, 1), nn.BatchNorm2d(2 * d), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(2 * d, 2 * d, 3, padding=1, groups=2 * d), nn.BatchNorm2d(2 * d))
        self.squeeze, self.excite = nn.Conv2d(2 * d, 1, 1), nn.Conv2d(1, 2 * d, 1)
        self.project = nn.Sequential(nn.Conv2d(2 * d, d, 1), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.depthwise(self.expand(x)))
        s = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return x + self.project(y * s.sigmoid())


class SwinWindows(nn.Module):
    """Attention in shifted windows, which fold the batch axis into another."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        kind = swin.ShiftedWindowAttentionV2 if second else swin.ShiftedWindowAttention
        self.norm, self.attention = nn.LayerNorm(4), kind(4, [2, 2], [1, 1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))


def _vector(draw: Draw) -> Shape:
    return (draw.int(1, 5),)


def _tokens(draw: Draw, d: int) -> Shape:
    return (draw.int(1, 4), d)


#: By name: makes a model and the shape of its input; whether it has a constant everywhere.
CASES: dict[str, tuple[Callable[[Draw], tuple[nn.Module, Shape]], bool]] = {
    "gate": (lambda r: (Fn(_gate, nn.Linear(3, 4), nn.Linear(3, 4)), (3,)), False),
    "broadcast": (lambda r: (Fn(lambda x, a: x[:, :1] * a(x).flip(2), nn.Conv1d(2, r.int(1, 3), 1)), (2, 3)), False),
    "square": (lambda r: (Fn(lambda x, a: a(x) * a(x), nn.Linear(3, 3)), (3,)), False),
    "power": (lambda r: (Fn(lambda x, a, k: a(x) ** k, nn.Linear(3, 2), k=r.int(2, 4)), (3,)), False),
    "quotient": (lambda r: (Fn(lambda x, a, c: a(x) / (x.abs() + c), nn.Linear(3, 3), c=r.float(0.3, 2)), (3,)), False),
    "matrices": (lambda r: (Fn(lambda x, a: x @ a(x).transpose(1, 2), nn.Linear(3, 3)), (r.int(1, 3), 3)), False),
    "squeeze-excite": (
        lambda r: (Fn(_squeeze_excite, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)), (4, r.int(1, 3), 2)), False
    ),
    "sharing attention": (lambda r: (Fn(lambda x: (x @ x.mT).softmax(-1) @ x), _tokens(r, 3)), False),
    "exponential": (lambda r: (Fn(lambda x, a: torch.exp(a(x)) + a(x).sin(), nn.Linear(3, 2)), (3,)), False),
    "roots": (
        lambda r: (Fn(lambda x, c: (x.square() + c).sqrt() + (x.abs() + c).log(), c=r.float(0.2, 1)), (3,)), False
    ),
    "largest": (lambda r: (Fn(lambda x, a: torch.maximum(a(x), x), nn.Linear(3, 3)), (3,)), True),
    "clamped": (
        lambda r: (Fn(lambda x, a, c: a(x).clamp(-0.5, c).abs().neg(), nn.Linear(3, 3), c=r.float(0, 1)), (3,)), True
    ),
    "softmax": (lambda r: (Fn(lambda x, a: a(x).softmax(-1), nn.Linear(3, r.int(1, 4))), (2, 3)), True),
    "log-softmax": (lambda r: (Fn(lambda x, a: F.log_softmax(a(x), 1), nn.Linear(3, r.int(1, 4))), (3,)), True),
    "layer norm": (lambda r: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, r.float(0.01, 1))), (2, 3)), True),
    "group norm": (lambda r: (nn.GroupNorm(2, 4, r.float(0.01, 1)), (4, r.int(1, 3), 2)), True),
    "instance norm": (lambda r: (nn.InstanceNorm1d(2, r.float(0.01, 1), affine=True), (2, 3)), True),
    "RMS norm": (lambda r: (nn.RMSNorm(4, r.float(0.01, 1)), (2, 4)), True),
    "direction": (lambda r: (Fn(lambda x, e: F.normalize(x, dim=1, eps=e), e=r.float(0.05, 1)), (3, 2)), True),
    "length": (lambda r: (Fn(lambda x, a: a(x) * x.norm(dim=1, keepdim=True), nn.Linear(3, 2)), (3,)), False),
    "swish": (lambda r: (Fn(lambda x, c: x * torch.sigmoid(c * x), c=r.float(0.5, 2)), (4,)), True),
    "attention": (lambda r: (SelfAttention(4, 2, written=True), _tokens(r, 4)), True),
    "torch's attention": (lambda r: (SelfAttention(4, r.int(1, 2), written=False), _tokens(r, 4)), True),
    "masked attention": (
        lambda r: (SelfAttention(4, 2, r.int(0, 1) == 1, torch.tensor([[0.0, -math.inf], [1.0, 0.5]])), (2, 4)), True
    ),
    "transformer": (lambda r: (Transformer(4, 2), _tokens(r, 4)), True),
    "encoder layer": (
        lambda r: (nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (3, 4)), False
    ),
    "ConvNeXt": (lambda r: (ConvNeXt(3), (3, r.int(2, 3), 3)), True),
    "ShuffleNet": (lambda r: (ShuffleNet(2), (4, 3, r.int(2, 3))), True),
    "MBConv": (lambda r: (MBConv(2), (2, 3, r.int(2, 3))), False),
    "Swin": (lambda r: (SwinWindows(False), (3, r.int(3, 4), 4)), True),
}  # fmt: skip


def stretch(model: nn.Module, shape: Shape, inside: Callable[[Tensor], Tensor], scale: float, seed: int) -> float:
    """The largest stretch between points of a set that ascent in both of them finds, in float64."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(24, *shape, generator=generator, dtype=torch.float64)
    x = inside(x)
    y = inside(x + 1e-3 * scale * torch.randn(x.shape, generator=generator, dtype=torch.float64))
    best = 0.0
    for round_ in range(16):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        near = (x - y).flatten(1).norm(dim=1)
        ratio = (model(x) - model(y)).flatten(1).norm(dim=1) / near.clamp_min(1e-300)
        found = torch.where(near > 1e-8 * scale, ratio, 0.0)
        best = max(best, found.max().item())
        gradients = torch.autograd.grad(found.clamp_min(1e-30).log().sum(), (x, y))
        with torch.no_grad():
            step = scale * 0.1 / (1 + 0.3 * round_)
            units = [
                g.nan_to_num() / g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * len(shape))
                for g in gradients
            ]
            x, y = inside(x + step * units[0]), inside(y + step * units[1])
            if round_ % 4 == 3:  # closer again
                y = inside(x + (y - x) * 0.01)
    return best


def _domains(draw: Draw, shape: Shape) -> list[tuple[dict[str, Any], Callable[[Tensor], Tensor], float]]:
    """A box and a ball, as arguments and as what brings points into them, with a scale."""
    low, width = draw.float(-1, 0.5), draw.float(0.2, 2)
    centre = torch.randn(shape, generator=draw.generator)
    radius = draw.float(0.01, 0.5)

    def to_ball(x: Tensor) -> Tensor:
        away = x - centre.double()
        length = away.flatten(1).norm(dim=1).view(-1, *[1] * len(shape)).clamp_min(1e-300)
        return centre.double() + away * (radius / length).clamp_max(1.0)

    return [
        ({"bounds": (low, low + width)}, lambda x: x.clamp(low, low + width), 1.0),
        ({"around": centre, "radius": radius}, to_ball, 1.0),
    ]


@pytest.mark.parametrize("case", CASES)
def test_bounds_are_above_the_largest_stretch_found(case: str) -> None:
    build, everywhere = CASES[case]
    draw = Draw(sorted(CASES).index(case))
    model, shape = build(draw)
    draw.weights(model)
    bounds = []
    for keywords, inside, scale in _domains(draw, shape):
        bound = lipschitz_bound(model.float(), shape, check="bounds" in keywords, **keywords)
        bounds.append(bound.upper)
        assert math.isfinite(bound.upper)
        assert bound.domain.restricted
        assert stretch(model, shape, inside, scale, 1) <= bound.upper * (1 + 1e-9)
    if everywhere:
        whole = lipschitz_bound(model.float(), shape, check=False).upper
        assert max(bounds) <= whole * (1 + 1e-6)
        for scale in (1.0, 30.0, 1e3):
            assert stretch(model, shape, lambda x: x, scale, 2) <= whole * (1 + 1e-9)
    else:
        for function in (lipschitz_bound, require_rules):
            with pytest.raises(ValueError, match=r"has no global Lipschitz constant.*bounds="):
                function(model.float(), shape)


@pytest.mark.parametrize("case", CASES)
def test_values_lie_within_the_intervals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step of the graph, for inputs of the domain."""
    draw = Draw(100 + sorted(CASES).index(case))
    model, shape = CASES[case][0](draw)
    draw.weights(model)
    known: list[tuple[str, Interval]] = []
    keep = _magnitudes._Follow._keep

    def record(self: Any, step: Any, interval: Interval, total: float) -> Interval:
        result = keep(self, step, interval, total)
        known.append((step.name, result))
        return result

    monkeypatch.setattr(_magnitudes._Follow, "_keep", record)
    for keywords, inside, _ in _domains(draw, shape):
        known.clear()
        lipschitz_bound(model.float(), shape, check=False, tight_residuals=False, **keywords)
        assert known or not any(isinstance(s.factor, Weighted) for s in trace(model, shape).steps.values())
        traced = trace(model.double(), shape)
        for x in inside(2.0 * torch.randn(6, *shape, generator=draw.generator, dtype=torch.float64)):
            values = iter(_values(traced, x[None]))
            for name, interval in known:
                value = next(value for step, value in values if step.name == name)
                slack = 1e-9 * (1.0 + value.abs().max().item())
                assert bool((interval.lower[:1] - slack <= value).all()), name
                assert bool((value <= interval.upper[:1] + slack).all()), name
                assert value.norm().item() <= interval.norm[0].item() * (1 + 1e-9) + slack, name


def _values(traced: Any, x: Tensor) -> list[tuple[Any, Tensor]]:
    """What each step gives for one sample, [1, *shape], in the order of the graph."""
    values: dict[fx.Node, Any] = {}
    found: list[tuple[Any, Tensor]] = []
    with torch.no_grad():
        for node in traced.graph_module.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            step, bundle = traced.steps.get(node), traced.bundles.get(node)
            if node.op == "output":
                break
            if step is not None and not step.inputs:
                values[node] = in_graph(x, step, traced.batch)
            elif traced.takes_part(node):
                values[node] = args[0][args[1]]
            elif bundle is not None:
                values[node] = tuple(None if part is None else part.apply(*args, **kwargs) for part in bundle)
                found += [(part, in_sample(v, part)) for part, v in zip(bundle, values[node], strict=True)]
            elif step is not None:
                values[node] = step.apply(*args, **kwargs)
            else:
                constant = traced.values.constants[node]
                floats = isinstance(constant, Tensor) and constant.is_floating_point()
                values[node] = constant.double() if floats else constant
            if step is not None and not traced.takes_part(node):
                found.append((step, in_sample(values[node], step)))
    return found


def _uniform(x: Tensor) -> Tensor:
    """Attention over two opposite keys, at a query between them."""
    rows = torch.cat([x, x], 1)
    key = torch.tensor([[2.0], [-2.0]]).to(x)
    value = torch.tensor([[3.0], [-3.0]]).to(x)
    return F.scaled_dot_product_attention(rows, rows * 0.0 + key, rows * 0.0 + value, scale=1.0)


def _keys(x: Tensor) -> Tensor:
    """Attention of one query over two opposite keys."""
    query, value = torch.tensor([[2.0]]).to(x), torch.tensor([[3.0], [-3.0]]).to(x)
    return F.scaled_dot_product_attention(0.0 * x + query, torch.cat([x, -x], 1), 0.0 * x + value, scale=1.0)


TIGHT: dict[str, tuple[nn.Module, Shape, dict[str, Any], float]] = {
    "square": (Fn(lambda x: x * x), (2,), {"bounds": (-1.0, 3.0)}, 6.0),
    # One factor in nine places.
    "broadcast": (Fn(lambda x: x[:, :1] * (1.0 + 1e-6 * x)), (9,), {"bounds": (0.0, 1.0)}, 3.0),
    "broadcast of the other": (Fn(lambda x: (1.0 + 1e-6 * x) * x[:, :1]), (9,), {"bounds": (0.0, 1.0)}, 3.0),
    "inverse": (Fn(lambda x: (2.0 + 0.0 * x) / x), (1,), {"bounds": (0.5, 4.0)}, 8.0),
    "numerator": (Fn(lambda x: x / (0.5 + 1e-7 * x)), (2,), {"bounds": (0.0, 1.0)}, 2.0),
    "left matrix": (Fn(lambda x: x @ (1.0 + 1e-7 * x)), (2, 2), {"bounds": (0.0, 1.0)}, 2.0),
    "right matrix": (Fn(lambda x: (1.0 + 1e-7 * x) @ x), (2, 2), {"bounds": (0.0, 1.0)}, 2.0),
    "softmax": (Fn(lambda x: x.softmax(1)), (2,), {}, 0.5),
    "log-softmax": (Fn(lambda x: x.log_softmax(1)), (3,), {}, math.sqrt(3.0)),
    "LayerNorm": (nn.LayerNorm(2, 0.25, elementwise_affine=False), (2,), {}, 2.0),
    "RMSNorm": (nn.RMSNorm(3, 0.25, elementwise_affine=False), (3,), {}, 2.0),
    "direction": (Fn(lambda x: F.normalize(x, dim=1, eps=0.1)), (2,), {}, 10.0),
    "direction of long vectors": (Fn(lambda x: F.normalize(x, dim=1)), (2,), {"bounds": (1.0, 2.0)}, 0.5**0.5),
    "exponential": (Fn(torch.exp), (1,), {"bounds": (0.0, 2.0)}, math.exp(2.0)),
    "logarithm": (Fn(torch.log), (1,), {"bounds": (0.25, 2.0)}, 4.0),
    "maximum": (Fn(lambda x: torch.maximum(x, 0.5 * x)), (1,), {}, 1.0),
    "sum with broadcasting": (Fn(lambda x: x[:, :1] + x), (2,), {}, 2.2882456),
    "key": (Fn(_keys), (1, 1), {"bounds": (-0.01, 0.01)}, 6.0),
    "values": (Fn(lambda x: F.scaled_dot_product_attention(0.0 * x, 0.0 * x, x)), (3, 2), {"bounds": (0.0, 1.0)}, 1.0),
    "one value for all": (
        Fn(lambda x: F.scaled_dot_product_attention(0.0 * x, 0.0 * x, x, torch.tensor([[True, False, False]] * 3))),
        (3, 2), {"bounds": (0.0, 1.0)}, math.sqrt(3.0),
    ),
    "query": (Fn(_uniform), (1, 1), {"bounds": (-0.01, 0.01)}, 6.0 * math.sqrt(2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TIGHT)
def test_bounds_that_are_attained(name: str) -> None:
    model, shape, keywords, truth = TIGHT[name]
    upper = lipschitz_bound(model.float(), shape, **keywords).upper
    low, high = keywords.get("bounds", (-50.0, 50.0))
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-3, 2, 300).view(-1, *[1] * len(shape))
    points = scales * torch.randn(300, *shape, generator=generator, dtype=torch.float64)
    points[::3] = torch.where(points[::3] > 0, high, low)
    jacobians = torch.func.vmap(torch.func.jacrev(model.double()))(points.clamp(low, high)[:, None])
    found = torch.linalg.matrix_norm(jacobians.reshape(300, -1, math.prod(shape)), 2).max().item()
    assert found == pytest.approx(truth, rel=0.05)
    assert truth * (1 - 1e-6) <= upper <= truth * 1.2


FAULTY = {"product": "gate", "quotient": "quotient", "matrix product": "matrices", "slope": "power",
          "normalisation": "RMS norm", "direction": "direction", "attention": "torch's attention"}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_rules_that_are_too_small_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(3)
    model, shape = CASES[FAULTY[name]][0](draw)
    draw.weights(model)
    lipschitz_bound(model, shape, bounds=(0, 1))
    (kind,) = [cls for cls in _all_kinds(Weighted) if getattr(cls, "name", "") == name]
    weights = kind.weights
    monkeypatch.setattr(kind, "weights", lambda self, given: [1e-6 * weight for weight in weights(self, given)])
    with pytest.raises(ValueError, match="the bound does not hold"):
        lipschitz_bound(model, shape, bounds=(0, 1))


def _all_kinds(cls: type) -> set[type]:
    return {cls} | {kind for inner in cls.__subclasses__() for kind in _all_kinds(inner)}


class Bell(nn.Module):
    """A gate with values between 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp2(-x * x)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x * x


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    monkeypatch.setattr(_registry, "_FUNCTION_RULES", dict(_registry._FUNCTION_RULES))


@pytest.mark.usefixtures("own_rules")
def test_a_rule_says_how_large_values_are() -> None:
    """The example of :func:`fastlip.lipschitz.rule`, and one whose constant depends on its input."""

    @rule(Bell)
    def _(module: Bell, input_shape: Shape) -> Ranged:
        return Ranged(factor=0.73, values=(0.0, 1.0))

    gated = Fn(lambda x, a, bell: a(x) * bell(a(x)), nn.Linear(2, 2), Bell())
    Draw(1).weights(gated)
    upper = lipschitz_bound(gated, (2,), bounds=(-1, 1)).upper
    assert stretch(gated, (2,), lambda x: x.clamp(-1, 1), 1.0, 1) <= upper
    rule(Bell)(lambda module, shape: Ranged(factor=0.73, values=lambda x: Interval(0.0 * x.lower, 1.0 + 0.0 * x.lower)))
    assert lipschitz_bound(gated.float(), (2,), bounds=(-1, 1)).upper == pytest.approx(upper)
    rule(Bell)(lambda module, shape: 0.73)  # so that the distance from the value at the centre is all that is known
    assert upper <= lipschitz_bound(gated.float(), (2,), bounds=(-1, 1)).upper < math.inf

    @rule(Cube)
    def _(module: Cube, input_shape: Shape) -> Ranged:
        return Ranged(
            factor=lambda x: 3.0 * x.magnitude().max().item() ** 2, values=lambda x: Interval(x.lower**3, x.upper**3)
        )

    cubed = nn.Sequential(nn.Linear(2, 3), Cube(), Cube(), nn.Linear(3, 1))
    Draw(2).weights(cubed)
    bound = lipschitz_bound(cubed, (2,), around=torch.ones(2), radius=0.1)
    assert [len(part.sizes) for part in bound.parts] == [0, 1, 1, 0]
    assert (
        stretch(
            cubed, (2,), lambda x: 1.0 + (x - 1.0) * (0.1 / (x - 1.0).norm(dim=1, keepdim=True).clamp_min(0.1)), 1.0, 1
        )
        <= bound.upper
    )
    with pytest.raises(ValueError, match=r"1 .Cube. has no global Lipschitz constant"):
        lipschitz_bound(cubed.float(), (2,))


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Ranged(1.0, (1.0, 0.0)), "values that are no bounds"),
        (Ranged(1.0, (0.0, torch.zeros(5))), "values that are no bounds"),
        (Ranged(1.0, 3.0), "values that are no bounds"),  # type: ignore[arg-type]
        (Ranged(lambda x: -1.0), "is -1.0, not a number >= 0"),
        (Ranged(lambda x: math.nan), "is nan, not a number >= 0"),
        (Ranged(-1.0), "not a finite bound >= 0"),
        (Ranged("x"), "returned str"),  # type: ignore[arg-type]
        (Ranged(0.001), "the bound does not hold|outside of the bounds"),
        (Ranged(3.0, (0.0, 1e-2)), "outside of the bounds"),
    ],
)
def test_rules_that_say_something_wrong(result: Ranged, message: str) -> None:
    rule(Cube)(lambda module, shape: result)
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(Fn(lambda x, cube: cube(x) * x, Cube()), (2,), bounds=(0, 1))


def test_the_domain_is_shown_and_searched_alone() -> None:
    model = Fn(lambda x: x * x)
    bound = lipschitz_bound(model, (2,), bounds=(0, 1))
    assert str(bound).startswith("L2 Lipschitz constant within [0, 1] at most 2 ")
    assert bound.to_dict()["domain"] == {"kind": "box", "lower": 0.0, "upper": 1.0}
    assert "inputs at most 1 and 1" in str(bound)
    assert bound.to_dict()["parts"][0]["sizes"] == [1.0, 1.0]
    # Around 0.5, and within the box too: values at most 0.6 and at most 0.55.
    ball = lipschitz_bound(model, (2,), around=torch.tensor([0.5, 0.5]), radius=0.1)
    assert ball.upper == pytest.approx(1.2)
    assert ball.to_dict()["domain"] == {"kind": "ball", "radius": 0.1}
    both = lipschitz_bound(model, (2,), around=torch.tensor([[0.5, 0.5]]), radius=0.1, bounds=(0.0, 0.55))
    assert both.upper == pytest.approx(1.1)
    assert "within [0, 0.55], and within an L2 distance of 0.1" in str(both)
    channels = lipschitz_bound(model, (2,), bounds=(torch.tensor([0.0, -3.0]), torch.tensor([1.0, 0.0])))
    assert channels.upper == pytest.approx(6.0)
    linear = lipschitz_bound(nn.ReLU(), (2,))
    assert linear.domain.to_dict() == {"kind": "everywhere"}
    assert str(linear.domain) == "everywhere"
    assert lipschitz_bound(nn.ReLU(), (2,), bounds=(0, math.inf)).upper == 1.0
    assert lipschitz_bound(model, (2,), around=torch.ones(2), radius=0.0).upper == pytest.approx(2.0)


def test_points_of_a_domain_lie_in_it() -> None:
    x = 5.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centre = torch.tensor([0.1, 0.9, 0.5])
    for domain in (
        domain_of((3,), (0.0, 1.0), None, None),
        domain_of((3,), (-math.inf, 1.0), None, None),
        domain_of((3,), None, centre, 0.3),
        domain_of((3,), (0.0, 1.0), centre, 0.3),
    ):
        box = domain.interval(torch.device("cpu"))
        for points in (domain.sample(x, seed=1), domain.project(x)):
            assert bool(((points >= domain.lower) & (points <= domain.upper)).all())
            assert bool(((points >= box.lower[0]) & (points <= box.upper[0])).all())
            assert points.std(0).min() > 0.01
            if domain.radius is not None:
                assert (points - domain.centre).norm(dim=1).max() <= domain.radius
            if domain.bounded:
                assert (points - domain.centre).norm(dim=1).max() <= domain.reach


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"bounds": (1.0, 0.0)}, "lower <= upper"),
        ({"bounds": (0.0, math.nan)}, "NaN"),
        ({"bounds": 1.0}, "pair"),
        ({"bounds": (torch.zeros(4), 1.0)}, "do not broadcast"),
        ({"around": torch.zeros(2)}, "together"),
        ({"radius": 1.0}, "together"),
        ({"around": torch.zeros(3), "radius": 1.0}, r"shape \[2\], got \[3\]"),
        ({"around": [0.0, 0.0], "radius": 1.0}, "got list"),
        ({"around": torch.zeros(2), "radius": -1.0}, "radius"),
        ({"around": torch.zeros(2), "radius": math.inf}, "radius"),
        ({"around": torch.tensor([0.0, math.nan]), "radius": 1.0}, "finite"),
        ({"around": torch.full((2,), 2.0), "radius": 1.0, "bounds": (0, 1)}, "within bounds"),
    ],
)
def test_what_is_no_domain_is_refused(keywords: dict[str, Any], message: str) -> None:
    for function in (lipschitz_bound, require_rules):
        with pytest.raises(ValueError, match=message):
            function(nn.ReLU(), (2,), **keywords)


def test_the_refusal_names_what_is_not_known() -> None:
    model = Fn(lambda x: torch.log(x) * x)
    with pytest.raises(ValueError, match=r"log \(log\) has no bound on this domain: its slope"):
        lipschitz_bound(model, (2,), bounds=(0, 1))
    assert lipschitz_bound(model, (2,), bounds=(0.5, 1)).upper < 5.0


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda x: x * torch.sigmoid(x), 1.0999),
        (lambda x: torch.sigmoid(1.702 * x) * x, 1.0999),
        (lambda x: 2.0 * x * F.hardsigmoid(-3.0 * x), 3.0),
        (lambda x: x * (F.relu6(x + 3.0) / 6.0), 1.5),
        (lambda x: x * F.relu6(x + 3) / 6, 1.5),
        (lambda x: x * torch.tanh(F.softplus(x)), 1.0885),
        (lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))), 1.129),
        (lambda x: x * 0.5 * (1.0 + torch.erf(0.3 * x)), 1.129),
    ],
)
def test_activations_written_out(function: Callable[[Tensor], Tensor], constant: float) -> None:
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    (slope,) = torch.autograd.grad(function(x.requires_grad_()).sum(), x)
    largest = slope.abs().max().item()
    bound = lipschitz_bound(Fn(function), (2,))
    assert bound.upper == pytest.approx(constant)
    # Torch rounds the sixth in these to float32.
    assert largest * (1 - 1e-7) <= bound.upper <= largest * 1.001
    # Others are products of two, without a constant everywhere.
    for other in (lambda x: x * torch.sigmoid(x + 1.0), lambda x: x * F.relu6(x + 2.0), lambda x: x * torch.tanh(x)):
        with pytest.raises(ValueError, match="no global"):
            lipschitz_bound(Fn(other), (2,))


def test_the_least_variance_is_below_that_of_all_points() -> None:
    generator = torch.Generator().manual_seed(1)
    for centred in (True, False):
        for d in (1, 2, 3, 7):
            middle = torch.randn(20, d, generator=generator, dtype=torch.float64)
            radius = torch.rand(20, d, generator=generator, dtype=torch.float64) * 0.7
            for i in range(20):
                least = least_variance(middle[i] - radius[i], middle[i] + radius[i], centred)
                points = middle[i] + radius[i] * (
                    2.0 * torch.rand(3000, d, generator=generator, dtype=torch.float64) - 1
                )
                corners = middle[i] + radius[i] * torch.randn(3000, d, generator=generator, dtype=torch.float64).sign()
                mean = points.mean(1, keepdim=True) if centred else torch.zeros(1, 1, dtype=torch.float64)
                pulled = torch.minimum(torch.maximum(mean, middle[i] - radius[i]), middle[i] + radius[i])
                for candidates in (points, corners, pulled):
                    variance = candidates.var(1, correction=0) if centred else candidates.square().mean(1)
                    assert least <= variance.min().item() + 1e-12
                assert least >= (1 - 1e-6) * variance.min().item() - 1e-2


class Scaled(nn.Module):
    """A linear map with a rule of its own, which runs in the dtype of its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + 1.0


@pytest.mark.usefixtures("own_rules")
def test_a_model_that_is_too_large_for_a_copy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rule(Scaled)(lambda module, shape: Operator(module.weight.detach()))
    model = Fn(lambda x, a: a(x) * torch.sigmoid(a(x)) + x, Scaled())
    wide = lipschitz_bound(model, (2,), bounds=(0, 1)).upper
    monkeypatch.setattr("fastlip.lipschitz._replay.MOST_COPIED", 1)
    assert lipschitz_bound(model, (2,), bounds=(0, 1)).upper >= wide * (1 - 1e-6)

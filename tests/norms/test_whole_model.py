"""layer_norms speaks of all of a model's weights: the maps that it applies in any way, and what it leaves out."""

import copy
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlip
from fastlip.norms import NormReport, layer_norms, layer_operator
from fastlip.norms._models import collect


class Holder(nn.Module):
    """Applies a function to its input and to tensors of its own."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, t in tensors.items():
            setattr(self, name, nn.Parameter(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def jacobian_norm(function: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of an affine map's matrix, in float64."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda x: function(x), x)
    return torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()), 2).item()


class Same(nn.Conv2d):
    """Pads as TensorFlow does, by its input's size."""

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, k, d in zip(x.shape[-2:], self.stride, self.kernel_size, self.dilation, strict=True)
        ]
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Applies its weight without the mean, by its deviation, times a gain."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # sizes and settings
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.gain * w / w.std((1, 2, 3), keepdim=True), self.bias)


class PlainLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _random_map(rng: random.Random, form: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A module that applies one linear map with weights in one of many ways, and the shape of its input."""
    a, b, n, k = (rng.randint(1, 5) for _ in range(4))
    c, g, s, d = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 2)
    h, w = rng.randint(5, 8), rng.randint(5, 8)
    image, kernel = (2 * c, h, w), torch.randn(2 * c, 2 * c // g, 3, 2)
    sides = [rng.randint(0, 2) for _ in range(4)]
    match form:
        case "F.linear":
            return Holder(F.linear, weight=torch.randn(a, b), bias=torch.randn(a)), (n, b)
        case "matmul":
            return Holder(lambda x, w: x @ w, w=torch.randn(b, a)), (n, b)
        case "matmul from the left":
            return Holder(lambda x, w: torch.matmul(w, x), w=torch.randn(a, b)), (b, n)
        case "addmm":
            return Holder(lambda x, w, v: torch.addmm(v, x, w), w=torch.randn(b, a), v=torch.randn(a)), (b,)
        case "einsum":
            return Holder(lambda x, w: torch.einsum("bnd,dhk->bhnk", x, w), w=torch.randn(b, a, k)), (n, b)
        case "einsum of many axes":
            return Holder(lambda x, w: torch.einsum("dhk, ...hkn -> ...dn", w, x), w=torch.randn(a, b, k)), (b, k, n)
        case "rows":
            return Holder(lambda x, w: F.linear(x, w[1 : a + 1]), w=torch.randn(a + 2, b)), (n, b)
        case "of two":
            return Holder(lambda x, u, v: F.linear(x, u @ v), u=torch.randn(a, n), v=torch.randn(n, b)), (b,)
        case "F.conv2d":
            settings = {"stride": s, "padding": sides[:2], "dilation": d, "groups": g}
            return Holder(lambda x, w: F.conv2d(x, w, None, **settings), w=kernel), image
        case "F.conv1d same":
            return Holder(lambda x, w: F.conv1d(x, w, padding="same"), w=torch.randn(a, b, 4)), (b, h)
        case "pad":
            return Holder(lambda x, w: F.conv2d(F.pad(x, sides), w, None, s, sides[0], 1, g), w=kernel), image
        case "crop":
            return Holder(lambda x, w: F.conv2d(F.pad(x, (-1, 0, 1, 0)), w, None, s, 0, 1, g), w=kernel), image
        case "pad with values":
            mode = rng.choice(["reflect", "replicate", "circular"])
            return Holder(lambda x, w: F.conv2d(F.pad(x, sides, mode), w, None, s, 0, 1, g), w=kernel), image
        case "F.conv_transpose2d":
            settings = {"stride": s + 1, "padding": 1, "output_padding": s - 1, "groups": g, "dilation": d}
            return Holder(lambda x, w: F.conv_transpose2d(x, w, None, **settings), w=kernel), (2 * c, 3, 4)
        case "a layer's weight":
            layer = nn.Conv2d(2 * c, a, 3, padding=2)
            return nn.Sequential(layer, Holder(lambda x: x)), image
        case "factors":
            return Holder(lambda x, w: x * w, w=torch.randn(b, 1)), (b, n)
        case "factors and terms":
            return Holder(lambda x, w, v: torch.addcmul(v, w, x), w=torch.randn(b), v=torch.randn(b)), (n, b)
        case "divisors":
            return Holder(lambda x, w: x / w, w=torch.randn(b)), (n, b)
        case "Linear":
            return PlainLinear(b, a), (n, b)
        case "Same":
            return Same(2 * c, 2 * c, (3, 2), stride=s, dilation=d, groups=g), image
        case _:
            return Standardised(2 * c, 4, 3, stride=s, padding=1, groups=g), image


FORMS = [
    *("F.linear", "matmul", "matmul from the left", "addmm", "einsum", "einsum of many axes", "rows", "of two"),
    *("F.conv2d", "F.conv1d same", "pad", "crop", "pad with values", "F.conv_transpose2d", "a layer's weight"),
    *("factors", "factors and terms", "divisors", "Linear", "Same", "Standardised"),
]


@pytest.mark.parametrize("form", FORMS)
def test_the_map_that_is_applied_is_reported(form: str) -> None:
    rng = random.Random(form)
    for seed in range(4):
        torch.manual_seed(seed)
        model, shape = _random_map(rng, form)
        model.double()
        report = layer_norms(model, shape, method="svd", strict=True)
        (interval,) = report.values()
        truth = jacobian_norm(model, shape)
        assert interval.lower <= truth * (1 + 1e-9), (seed, model)
        assert interval.upper >= truth * (1 - 1e-9), (seed, model)
        assert interval.width < 1e-6
        assert not report.left_out


def test_names_are_those_of_the_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.randn(6, 3))
            self.one, self.two = nn.Linear(3, 3), nn.Conv1d(3, 3, 1)
            self.low = Holder(lambda x, u, v: F.linear(x, u @ v), u=torch.randn(3, 1), v=torch.randn(1, 3))
            self.scale = nn.Parameter(torch.randn(3))
            self.shift = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.packed[:3]) + F.linear(x, self.packed[3:])
            x = F.linear(x, self.one.weight, self.one.bias).relu()
            x = self.one(x).relu()
            x = self.two.forward(x.mT).mT
            return self.low(x) * self.scale + self.shift

    report = layer_norms(Net(), (5, 3), strict=True)
    assert list(report) == ["packed[0:3]", "packed[3:6]", "one", "one#2", "two", "low", "scale"]
    assert report["one"] == report["one#2"]
    assert report.descriptions["two"] == "conv1d 3→3 1 on 5"


def test_one_weight_used_alike_is_listed_once_and_else_with_each_use() -> None:
    kernel = torch.randn(2, 2, 3, 3)
    twice = Holder(lambda x, w: F.conv2d(F.conv2d(x, w, padding=1).relu(), w, padding=1), w=kernel)
    assert list(layer_norms(twice, (2, 6, 6))) == ["w"]
    other = Holder(lambda x, w: F.conv2d(F.conv2d(x, w, padding=1).relu(), w, stride=2), w=kernel)
    report = layer_norms(other, (2, 6, 6), method="svd")
    for name, padding, stride in (("w", 1, 1), ("w#2", 0, 2)):
        assert report[name].upper == pytest.approx(fastlip.conv_norm(kernel, 6, padding=padding, stride=stride).upper)
    computed = Holder(lambda x, w: F.linear(F.linear(x, w + 0), w * 3), w=torch.randn(2, 2))
    report = layer_norms(computed, (2,))
    assert report["w#2"].upper == pytest.approx(3 * report["w"].upper)


class Attention(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **settings)  # type: ignore[arg-type]  # sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., : self.attn.kdim], x[..., : self.attn.vdim])[0]


def test_attention_has_four_matrices() -> None:
    model = Attention()
    report = layer_norms(model, (5, 8), strict=True)
    assert list(report) == [*(f"attn.in_proj_weight[{part}]" for part in "qkv"), "attn.out_proj"]
    for part, weight in zip("qkv", model.attn.in_proj_weight.chunk(3), strict=True):
        upper = report[f"attn.in_proj_weight[{part}]"].upper
        assert upper == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-6)
    separate = layer_norms(Attention(kdim=3, vdim=4, add_bias_kv=True), (5, 8), strict=True)
    assert list(separate) == [*(f"attn.{part}_proj_weight" for part in "qkv"), "attn.out_proj"]


def test_a_transformer_is_seen_where_torch_has_one_function_for_all_of_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = layer_norms(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), (5, 8))
    assert len(report) == 2 * 6
    assert set(report.left_out) == {f"layers.{i}.norm{j}.weight" for i in range(2) for j in (1, 2)}
    assert all("deviation" in reason for reason in report.left_out.values())


def test_a_mask_of_attention_is_added_and_a_learnt_query_is_not() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.table = nn.Parameter(torch.randn(1, 2, 4)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x, x, x, self.table[:1])
            return F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), x, x, attn_mask=self.table)

    report = layer_norms(Pool(), (3, 4))
    assert list(report.left_out) == ["query"]
    assert "scaled_dot_product_attention" in report.left_out["query"]


def test_windows_of_a_swin_transformer() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    model = swin.SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3)
    report = layer_norms(model, (3, 8, 8))
    attention = {f"features.1.{block}.attn.{part}" for block in range(2) for part in ("qkv", "proj")}
    assert attention <= set(report)
    assert {name.split(".")[-2] for name in report.left_out} <= {"norm", "norm1", "norm2", "2"}
    assert all("deviation" in reason for reason in report.left_out.values())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Dynamic(nn.Module):
    """Its weight depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner * x.mean())


class Hidden(torch.autograd.Function):
    """Does what no function of torch is seen to do."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() @ weight.numpy())


LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), ["inner.weight_ih_l0", "inner.weight_hh_l0"], "lstm applies it at each step"),
    "GRU": (lambda: Recurrent(nn.GRU), ["inner.weight_ih_l0", "inner.weight_hh_l0"], "gru applies it at each step"),
    "RNN": (lambda: Recurrent(nn.RNN), ["inner.weight_ih_l0", "inner.weight_hh_l0"], "rnn_tanh applies it"),
    "Bilinear": (lambda: _Wrapped(nn.Bilinear(4, 4, 4), lambda m, x: m(x, x)), ["inner.weight"], "two inputs"),
    "LayerNorm": (lambda: _Wrapped(nn.LayerNorm(4)), ["inner.weight"], "divides by a deviation"),
    "PReLU": (lambda: _Wrapped(nn.PReLU(3)), ["inner.weight"], "slope of an activation"),
    "Embedding": (
        lambda: _Wrapped(nn.Embedding(9, 4), lambda m, x: m(x[..., 0].abs().long() % 9)),
        ["inner.weight"],
        "by whole numbers",
    ),
    "not run": (lambda: _Wrapped(nn.Linear(4, 4), lambda m, x: x), ["inner.weight"], "did not run"),
    "a product with the input": (lambda: Holder(lambda x, inner: inner / x, inner=torch.ones(4)), ["inner"], "in div"),
    "larger output": (lambda: Holder(lambda x, inner: x * inner, inner=torch.ones(2, 1, 3, 4)), ["inner"], "in mul"),
    "not a function of torch": (
        lambda: Holder(lambda x, inner: Hidden.apply(x, inner), inner=torch.randn(4, 4)),
        ["inner"],
        "no use of it",
    ),
    "a sequence of matrices": (
        lambda: Holder(lambda x, inner: x[:, None] @ inner, inner=torch.randn(2, 4, 4)),
        ["inner"],
        "in matmul",
    ),
    "torch.func": (
        lambda: Holder(lambda x, inner: torch.vmap(lambda row: row @ inner)(x), inner=torch.randn(4, 4)),
        ["inner"],
        "transform of torch.func",
    ),
    "of a list": (
        lambda: _Wrapped(nn.ParameterList([torch.randn(4, 4)]), lambda m, x: x * m[0].amax().item()),
        ["inner.0"],
        "no use of it",
    ),
    "BatchNorm of the batch": (
        lambda: _Wrapped(nn.BatchNorm1d(3, track_running_stats=False)),
        ["inner.weight"],
        "without running statistics",
    ),
}


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_said_with_the_reason(case: str) -> None:
    build, names, reason = LEFT_OUT[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), build(), nn.Flatten())
    report = layer_norms(model, (3, 4))
    names = [f"1.{name}" for name in names]
    assert list(report) == ["0"]
    assert sorted(report.left_out) == sorted(names)
    assert all(reason in text for text in report.left_out.values())
    assert json.loads(report.to_json())["left_out"] == [{"name": n, "reason": r} for n, r in report.left_out.items()]
    number = f"o product: {len(names)} weight{'s are' if len(names) > 1 else ' is'} left out beside these 1 layer"
    if case == "not run":
        number = "roduct of 1 layer: "
    assert (report.log10_product_lower is report.log10_product_upper is None) == (case != "not run")
    for shown in (str(report), report.to_html("net")):
        assert all(name in shown for name in names)
        assert reason in shown
        assert number in shown
    if case != "not run":
        with pytest.raises(ValueError, match=rf"weight 1\.{names[0][2:]} would be left out: "):
            layer_norms(model, (3, 4), strict=True)
    else:
        layer_norms(model, (3, 4), strict=True)


def of_a_list() -> nn.Module:
    model = Holder(lambda x, shift: F.linear(x, model.matrices[0]) + shift, shift=torch.randn(5))
    model.matrices = [torch.randn(5, 4)]
    return model


def of_an_array() -> nn.Module:
    kernel = np.random.default_rng(0).standard_normal((2, 3, 1), dtype=np.float32)
    return _Wrapped(nn.Identity(), lambda m, x: F.conv1d(x, torch.from_numpy(kernel)))


@pytest.mark.parametrize(
    ("build", "function"),
    [(of_a_list, "linear()"), (of_an_array, "conv1d()"), (Dynamic, "linear()")],
    ids=["of a list", "of an array", "of the input"],
)
def test_weights_that_no_module_holds_are_left_out(build: Callable[[], nn.Module], function: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), build())
    report = layer_norms(model, (3, 4))
    assert list(report) == ["0"]
    assert "not made of tensors of the model's modules" in report.left_out[function]
    assert set(report.left_out) == {function} | ({"1.inner"} if build is Dynamic else set())
    assert report.log10_product_upper is None
    with pytest.raises(ValueError, match="would be left out"):
        layer_norms(model, (3, 4), strict=True)


def quantised(model: nn.Module, x: Tensor) -> nn.Module:
    """Model with its convolutions quantised, by what the input showed."""
    model = model.eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    model[-1].qconfig = None
    prepared = torch.ao.quantization.prepare(model)
    prepared(x)
    return torch.ao.quantization.convert(prepared)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
@pytest.mark.parametrize("kind", ["dynamic", "static", "whole"])
def test_quantised_layers_are_left_out_by_name(kind: str) -> None:
    ao = torch.ao.quantization
    if kind == "static":
        layers = [ao.QuantStub(), nn.Conv2d(3, 4, 3), ao.DeQuantStub(), nn.Flatten(), nn.Linear(16, 5)]
        model, shape = quantised(nn.Sequential(*layers), torch.rand(4, 3, 4, 4)), (3, 4, 4)
    else:
        inner = ao.quantize_dynamic(nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval(), {nn.Linear})
        model, shape = (
            nn.Sequential(nn.Linear(6, 5), inner) if kind == "dynamic" else inner[0],
            (6 - (kind == "whole"),),
        )
    report = layer_norms(model, shape)
    left = {"dynamic": "1.0", "static": "1", "whole": type(model).__name__}[kind]
    assert dict.fromkeys(report.left_out, "quantised") == {left: "quantised"}
    assert "packed for quantised arithmetic" in report.left_out[left]
    assert list(report) == {"dynamic": ["0"], "static": ["4"], "whole": []}[kind]
    assert report.log10_product_upper is None
    with pytest.raises(ValueError, match=f"weight {left} would be left out"):
        layer_norms(model, shape, strict=True)


class PlusShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class Wide(nn.Module):
    """Attention with a residual connection, factors and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.gamma = nn.LayerNorm(4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.gamma * self.attn(y, y, y)[0]


#: Blocks from [3, 4] to [3, 4], the layers that a report has of them, and the weights that it leaves out.
BLOCKS: list[tuple[Callable[[], nn.Module], list[str], list[str]]] = [
    (lambda: nn.Linear(4, 4), [""], []),
    (lambda: PlainLinear(4, 4), [""], []),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), [""], []),
    (lambda: nn.Conv1d(3, 3, 3, padding=1), [""], []),
    (lambda: nn.BatchNorm1d(3), [""], []),
    (lambda: Holder(F.linear, weight=torch.randn(4, 4)), [".weight"], []),
    (lambda: Holder(lambda x, w: w @ x, w=torch.randn(3, 3)), [".w"], []),
    (lambda: Holder(lambda x, w: F.conv1d(F.pad(x, (1, 1)), w), w=torch.randn(3, 3, 3)), [".w"], []),
    (PlusShift, [], []),
    (lambda: Recurrent(nn.GRU), [], [".inner.weight_ih_l0", ".inner.weight_hh_l0"]),
    (Wide, [*(f".attn.in_proj_weight[{p}]" for p in "qkv"), ".attn.out_proj", ".gamma"], [".norm.weight"]),
    (lambda: _Wrapped(nn.Bilinear(4, 4, 4), lambda m, x: m(x, x)), [], [".inner.weight"]),
    (lambda: Gated(4, 4), [], [".weight"]),
    (lambda: _doubled(nn.Linear(4, 4)), [], [".weight"]),
    (lambda: _Wrapped(nn.Linear(4, 4), lambda m, x: x.sin()), [], [".inner.weight"]),
]


@pytest.mark.parametrize("seed", range(8))
def test_every_weight_of_random_models_is_listed_or_left_out(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    picked = rng.choices(BLOCKS, k=6)
    blocks = [build() for build, *_ in picked]
    model = nn.Sequential(*(module for block in blocks for module in (block, nn.Tanh())))
    report = layer_norms(model, (3, 4), method="svd")
    assert list(report) == [f"{2 * i}{name}" for i, (_, listed, _) in enumerate(picked) for name in listed]
    assert sorted(report.left_out) == sorted(f"{2 * i}{name}" for i, (*_, left) in enumerate(picked) for name in left)
    for name, interval in report.items():
        assert interval.converged, name


def test_a_report_that_leaves_nothing_out_says_nothing() -> None:
    report = layer_norms(nn.Sequential(nn.Linear(4, 4)), (4,))
    assert "left out" not in str(report) + report.to_html("net")
    assert report.to_dict()["left_out"] == []


def test_data_frames_have_what_is_left_out() -> None:
    pytest.importorskip("pandas")
    report = layer_norms(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,))
    assert list(report.to_pandas().attrs["left_out"]) == ["1.weight"]


def test_many_names_of_one_reason_are_counted() -> None:
    report = layer_norms(nn.Sequential(*(nn.LayerNorm(4) for _ in range(9))), (4,))
    assert len(report.left_out) == 9
    assert "0.weight, 1.weight, 2.weight, 3.weight, 4.weight, 5.weight and 3 more: layer_norm divides" in str(report)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Clipped(nn.Linear):
    """Does what its class does for inputs as large as images, and otherwise not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clamp(-20, 20), self.weight, self.bias)


class Flattening(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight)


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * F.linear(x, self.weight).sigmoid()


def _hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "does more": (lambda: Doubled(3, 3, 1), "Doubled does not apply the map"),
    "does more with other inputs": (lambda: Clipped(4, 4), "Clipped does not apply the map"),
    "another shape": (lambda: Flattening(48, 2), "takes another shape than its input's"),
    "two maps": (lambda: Gated(4, 4), "2 linear maps of weights are seen"),
    "no map": (lambda: _forward_of(nn.Linear(4, 4), lambda x: x), "no linear map of a weight is seen"),
    "hook": (_hooked, "Linear does not apply the map"),
    "two results": (lambda: _forward_of(nn.Linear(4, 4), lambda x: (x, x)), "something else than one tensor"),
}


def _forward_of(module: nn.Module, forward: Callable[[Tensor], object]) -> nn.Module:
    module.forward = forward  # type: ignore[method-assign]  # as users do
    return module


def _doubled(layer: nn.Linear) -> nn.Module:
    return _forward_of(layer, lambda x: 2 * F.linear(x, layer.weight))


@pytest.mark.parametrize("case", ODD)
def test_an_odd_layer_does_not_stop_the_report_of_the_others(case: str) -> None:
    build, reason = ODD[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), build())
    report = layer_norms(model, (3, 4, 4))
    assert list(report) == ["0"]
    assert list(report.left_out) == ["2.weight"]
    assert reason in report.left_out["2.weight"]
    with pytest.raises(ValueError, match=r"weight 2\.weight would be left out"):
        layer_norms(model, (3, 4, 4), strict=True)


def test_a_layer_that_the_batch_changes_does_not_stop_the_report_of_the_others() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), _Wrapped(nn.Conv2d(1, 1, 3, padding=1), _as_one_image))
    report = layer_norms(model, (1, 4, 4))
    assert list(report) == ["0"]
    assert "in a batch of two" in report.left_out["1.inner.weight"]
    assert list(layer_norms(model, (1, 4, 4), check=False)) == ["0", "1.inner"]


class Hyper(nn.Module):
    """Makes its layer's weight from its input."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.make, self.layer, self.way = nn.Linear(4, 16), nn.Linear(4, 4), way
        if way == "attribute":
            del self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x)[0].view(4, 4)
        match self.way:
            case "attribute":
                self.layer.weight = weight
            case "data":
                self.layer.weight.data = weight
            case "values":
                self.layer.weight.copy_(weight)
            case _:
                return torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        return self.layer(x)


@pytest.mark.parametrize("way", ["attribute", "data", "values", "call"])
def test_a_layer_whose_weight_is_made_from_the_input_has_no_norm(way: str) -> None:
    torch.manual_seed(0)
    report = layer_norms(Hyper(way), (4,))
    assert list(report) == ["make"]
    assert report.left_out["layer" if way == "attribute" else "layer.weight"]


def test_a_weight_that_is_normalised_again_in_each_run_is_the_same_but_for_rounding() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(50, 40)

        def forward(self, x: Tensor) -> Tensor:
            self.fc.weight.data = F.normalize(self.fc.weight, dim=1)
            return self.fc(x)

    torch.manual_seed(0)
    model = Normalising()
    report = layer_norms(model, (50,), strict=True)
    upper = torch.linalg.matrix_norm(F.normalize(model.fc.weight, dim=1).double(), 2).item()
    assert report["fc"].upper == pytest.approx(upper, rel=1e-5)


def _as_one_image(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.reshape(1, 1, -1, x.shape[-1])).reshape(x.shape)


class Frozen(nn.Module):
    """A BatchNorm of constants, written out as detection libraries do."""

    def __init__(self, module: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = module.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(module, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(-1, 1, 1)
        return x * scale + (self.bias.view(-1, 1, 1) - self.running_mean.view(-1, 1, 1) * scale)


class Activated(nn.BatchNorm2d):
    """A BatchNorm and an activation in one."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return y.relu()


class OtherEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 0.7)


class Squared(nn.BatchNorm2d):
    """Its factors are squared."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight**2 / (self.running_var + self.eps)).view(-1, 1, 1)


class Unclear(nn.BatchNorm2d):
    """By a function that is not understood, and so nothing is folded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,c->bchw", x, self.weight * (self.running_var + self.eps).rsqrt())


class InOne(nn.BatchNorm2d):
    """A product and a sum by one function."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return torch.addcmul((self.bias - scale * self.running_mean).view(-1, 1, 1), x, scale.view(-1, 1, 1))


def _normalised(kind: str) -> tuple[nn.Sequential, list[Tensor]]:
    """A convolution and a normalisation, and the factors [3] of the latter."""
    torch.manual_seed(3)
    plain = nn.BatchNorm2d(3)
    nn.init.normal_(plain.weight)
    nn.init.uniform_(plain.running_var, 0.2, 2.0)
    plain.running_mean.normal_()
    classes = {"activated": Activated, "other eps": OtherEps, "squared": Squared, "unclear": Unclear, "in one": InOne}
    if kind == "frozen":
        norm: nn.Module = Frozen(plain)
    elif kind == "torchvision":
        norm = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(3)
        norm.load_state_dict({k: v for k, v in plain.state_dict().items() if "num" not in k})
    else:
        norm = classes[kind](3)
        norm.load_state_dict(plain.state_dict())
    scale = plain.weight.double() * (plain.running_var.double() + (0.7 if kind == "other eps" else plain.eps)).rsqrt()
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm).eval(), [scale**2 if kind == "squared" else scale]


@pytest.mark.parametrize("kind", ["frozen", "torchvision", "activated", "other eps", "squared", "in one"])
def test_batchnorms_of_other_classes_are_folded_by_what_they_compute(kind: str) -> None:
    model, (scale,) = _normalised(kind)
    report = layer_norms(model, (2, 5, 5), method="svd", strict=True)
    kernel = scale.view(-1, 1, 1, 1) * model[0].weight.double()
    assert list(report) == ["0"]
    assert report["0"].upper == pytest.approx(fastlip.conv_norm(kernel, 5, method="svd").upper, rel=1e-6)
    assert report.descriptions["0"].endswith("+ BN")
    alone = layer_norms(model, (2, 5, 5), fold_batchnorm=False, strict=True)
    assert list(alone) == ["0", "1"]
    assert alone["1"].upper == pytest.approx(scale.abs().max().item(), rel=1e-6)


def test_a_batchnorm_that_is_not_understood_is_not_folded() -> None:
    model, _ = _normalised("unclear")
    report = layer_norms(model, (2, 5, 5), method="svd")
    assert list(report) == ["0"]
    assert report["0"].upper == pytest.approx(fastlip.conv_norm(model[0].weight, 5, method="svd").upper, rel=1e-6)
    assert "einsum" in report.left_out["1.weight"]
    assert "einsum" in report.left_out["1.running_var"]


class Mixer(nn.Module):
    """Every source of a weight: whole, transposed, rows, and of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.scale = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 1))
        self.flipped = nn.Parameter(torch.randn(4, 8))
        self.head = PlainLinear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 4]
        x = F.linear(x, self.packed[4:]) @ self.flipped
        x = self.head(x)
        return F.linear(self.attn(x, x, x)[0], self.packed.mT) * self.scale.mT


class OnlyComputed(nn.Module):
    """Its weights are computed in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.w = Standardised(2, 3, 3), nn.Parameter(torch.randn(9, 9))
        with torch.no_grad():
            self.conv.gain.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.conv(x).flatten(2), self.w.exp())


@pytest.mark.parametrize(("kind", "shape", "runs"), [(Mixer, (3, 4), 1), (OnlyComputed, (2, 5, 5), 3)])
def test_each_checkpoint_has_its_own_numbers(
    kind: type[nn.Module], shape: tuple[int, ...], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    models = [kind() for _ in range(3)]
    want = [layer_norms(model, shape, method="svd") for model in models]
    ran: list[nn.Module] = []
    run_for_layers = collect._run_for_layers
    monkeypatch.setattr(collect, "_run_for_layers", lambda m, *rest: ran.append(m) or run_for_layers(m, *rest))
    for got, report in zip(layer_norms(models, shape, method="svd"), want, strict=True):
        assert got.left_out == report.left_out == {}
        assert {name: interval.upper for name, interval in got.items()} == pytest.approx(
            {name: interval.upper for name, interval in report.items()}, rel=1e-6
        )
    assert len(ran) == runs
    uppers = [[interval.upper for interval in report.values()] for report in want]
    assert all(a != b for a, b in zip(uppers[0], uppers[1], strict=True))


def test_what_is_computed_from_constants_alone_is_a_weight_and_what_the_input_was_written_into_is_not() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.zeros(4, 4)
            weight[:2] = self.w[:2]
            room = torch.zeros(4, 4)
            room[0].copy_(x[0])
            return F.linear(x, weight) + F.linear(x, self.v * room)

    report = layer_norms(Written(), (4,), method="svd")
    assert list(report) == ["w", "v"]
    assert report.descriptions["v"] == "factors 16"  # of something that depends on the input


class Circulant(nn.Module):
    """A convolution by a way of its own."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.kernel, self.bias, self.factor = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6)), factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.factor * x
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.kernel), 6) + self.bias


def test_a_users_layer_may_have_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlip.norms._operators.registry._OPERATORS", {})
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), Circulant())
    before = layer_norms(model, (1, 6))
    assert list(before) == ["0"]
    assert list(before.left_out) == ["1.kernel"]

    @layer_operator(Circulant)
    def _(module: Circulant, input_shape: tuple[int, ...]) -> fastlip.norms.Operator:
        shifts = [module.kernel.detach().roll(i) for i in range(input_shape[-1])]
        return fastlip.norms.Operator(torch.stack(shifts, 1))

    report = layer_norms(model, (1, 6), strict=True)
    assert list(report) == ["0", "1"]
    assert report["1"].upper == pytest.approx(jacobian_norm(copy.deepcopy(model[1]).double(), (1, 6)), rel=1e-6)
    assert list(layer_norms([model, model], (1, 6))[1]) == ["0", "1"]
    assert fastlip.lipschitz_bound(model[1], (6,)).upper == pytest.approx(report["1"].upper, rel=1e-6)
    wrong = layer_norms(nn.Sequential(nn.Linear(6, 6), Circulant(2.0)), (1, 6))
    assert list(wrong) == ["0"]
    assert "Circulant does not apply the map" in wrong.left_out["1.kernel"]
    layer_operator(Circulant)(lambda module, input_shape: 1.0)
    assert "returned float" in layer_norms(model, (1, 6)).left_out["1.kernel"]
    with pytest.raises(TypeError, match="module classes, got 3"):
        layer_operator(3)  # type: ignore[arg-type]  # what is refused


def test_a_rule_that_is_a_number_stops_no_report() -> None:
    class Own(Standardised):
        pass

    fastlip.lipschitz.rule(Own)(lambda module, shape: 9.0)
    report: NormReport = layer_norms(nn.Sequential(Own(2, 2, 3)), (2, 5, 5), strict=True)
    assert list(report) == ["0"]


class _Spectral(nn.Module):
    """A filter in the frequency domain, as Fourier layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.filter = nn.Parameter(torch.full((5,), 3.0 + 0.0j))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.filter, n=8))


class _ComplexLayer(nn.Module):
    def __init__(self, layer: nn.Module, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.layer, self.weight, self.last = layer, weight, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.cfloat)
        z = self.layer(z) if self.weight is None else z @ self.weight.T
        return self.last(z.abs().flatten(2).mean(2) if z.dim() > 2 else z.abs())


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("model", "shape", "left"),
    [
        (_Spectral(), (8,), "filter"),
        (_ComplexLayer(nn.Linear(8, 4, dtype=torch.cfloat)), (8,), "layer.weight"),
        (_ComplexLayer(nn.Conv1d(2, 4, 3, dtype=torch.cfloat)), (2, 8), "layer.weight"),
        (_ComplexLayer(nn.Identity(), nn.Parameter(torch.randn(4, 8, dtype=torch.cfloat))), (8,), "weight"),
    ],
    ids=["fourier", "linear", "conv", "product"],
)
def test_complex_weights_are_left_out_by_name(model: nn.Module, shape: tuple[int, ...], left: str, check: bool) -> None:
    report = layer_norms(model.eval(), shape, check=check)
    assert list(report.left_out) == [left]
    assert "last" in report
    assert report.log10_product_upper is None
    with pytest.raises(ValueError, match=f"weight {left} would be left out"):
        layer_norms(model, shape, strict=True, check=check)

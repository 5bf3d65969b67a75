"""How a model becomes a graph: forwards that ask for shapes, batch axes anywhere, torch.export, forms of outputs."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz import lipschitz_bound, local_lipschitz
from fastlip.lipschitz._export import export_graph
from fastlip.lipschitz._trace import Untraceable


class By(nn.Module):
    """Applies a function, and has some layers."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def true_norm(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Norm of a model that is affine."""
    with torch.no_grad():
        eye = torch.eye(math.prod(shape)).view(-1, *shape)
        rows = model(eye) - model(torch.zeros_like(eye))
    return torch.linalg.matrix_norm(rows.flatten(1).double(), 2).item()


def checked(model: By, x: Tensor) -> Tensor:
    batch, channels, *size = x.shape
    if channels != 3 or len(x.shape) != 4 or x.size(-1) != 6 or not isinstance(x, Tensor):
        raise ValueError("images of three channels, 6 pixels wide, are needed")
    assert x.numel() == len(x) * 3 * math.prod(size)
    assert x.dim() == x.ndim == 4
    assert x.is_floating_point()
    y = model.layer(x).flatten(2)
    token = model.token.weight.expand(batch, -1, -1).transpose(1, 2)
    return torch.cat([token, y, x.new_zeros(batch, 4, 1)], 2).view(batch, -1).to(x.dtype)


def parts(model: By, x: Tensor) -> Tensor:
    total = x.new_zeros(len(x), 2)
    for weight, part in zip((1.0, 2.0, 3.0), x.chunk(3, 1), strict=True):
        total = total + weight * part
    first, second = total.T
    return torch.stack((first, second), 1)


def windows(model: By, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
    y = model.layer(y + y.mean(1, keepdim=True))
    return y.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


def heads(model: By, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = model.layer(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
    return (q - 2.0 * k + v).transpose(1, 2).reshape(b, n, c)


def folded_convolution(model: By, x: Tensor) -> Tensor:
    frames = model.norm(model.layer(x.flatten(0, 1)))
    return frames.view(len(x), -1, *frames.shape[1:]).mean(1)


def written(model: By, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 4, 6, 6)
    y[:, :, 1:] = model.norm(model.layer(x))[:, :, 1:]
    return y


LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "shape checks": (lambda: By(checked, layer=nn.Conv2d(3, 4, 3), token=nn.Embedding(1, 4)), (3, 6, 6)),
    "loop over chunks": (lambda: By(parts), (6,)),
    "windows": (lambda: By(windows, layer=nn.Linear(3, 5)), (3, 4, 6)),
    "heads": (lambda: By(heads, layer=nn.Linear(4, 12)), (5, 4)),
    "frames": (lambda: By(folded_convolution, layer=nn.Conv2d(2, 3, 3), norm=random_norm(3)), (4, 2, 5, 5)),
    "assignment to a part": (lambda: By(written, layer=nn.Conv2d(3, 4, 3, padding=1), norm=random_norm(4)), (3, 6, 6)),
}


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    norm.running_var.uniform_(0.5, 2.0)
    norm.running_mean.normal_()
    return norm.eval()


@pytest.mark.parametrize("case", LINEAR)
def test_affine_forwards_of_every_kind_are_bounded_and_not_by_much(case: str) -> None:
    torch.manual_seed(0)
    build, shape = LINEAR[case]
    model = build().eval()
    bound, true = lipschitz_bound(model, shape).upper, true_norm(model, shape)
    assert true <= bound * (1.0 + 1e-5)
    # Parts of one tensor count as if each could change as much as all.
    assert bound <= true * {"windows": 2.2, "heads": 3.5, "frames": 2.2, "loop over chunks": 2.5}.get(case, 1.5)


def test_a_layer_on_folded_samples_has_its_own_norm() -> None:
    layer = nn.Linear(3, 5)
    model = By(lambda model, x: model.layer(x.view(-1, 3)).view(len(x), 4, 5), layer=layer)
    bound = lipschitz_bound(model, (4, 3), tight_chains=False)
    assert bound.upper == pytest.approx(torch.linalg.matrix_norm(layer.weight, 2).item(), rel=1e-4)
    assert [part.name for part in bound.parts] == ["layer"]


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: x.view(-1, 3).roll(1, 0).view(x.shape),
        lambda model, x: x.view(-1, 3).cumsum(0).view(x.shape) if len(x) > 1 else x,
        lambda model, x: x.permute(1, 0, 2).reshape(x.shape),
        lambda model, x: x + x.flip(0),
        lambda model, x: x * len(x),
    ],
    ids=["roll of windows", "sums over windows", "batch behind", "flip", "size"],
)
def test_samples_that_depend_on_one_another_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="depends on the others in its batch"):
        lipschitz_bound(By(function), (4, 3))


def test_magnitudes_follow_tensors_whose_batch_axis_is_anywhere() -> None:
    """A product of what windows hold, on a box: above every Jacobian there."""
    torch.manual_seed(0)

    def product(model: By, x: Tensor) -> Tensor:
        y = model.layer(x.view(len(x), 2, 2, 4).permute(2, 0, 1, 3).flatten(1, 2))
        y = y * torch.stack([y[0], y[1].flip(0)[: len(y[0])].flip(0)])
        return y.unflatten(1, (len(x), 2)).permute(1, 0, 2, 3).flatten(1)

    model = By(product, layer=nn.Linear(4, 3)).double()
    bound = lipschitz_bound(model, (16,), bounds=(-1.0, 2.0))
    corners = torch.randint(0, 2, (64, 16)).double() * 3.0 - 1.0
    largest = local_lipschitz(model, corners).max().item()
    assert largest <= bound.upper <= 8.0 * largest


def test_the_exported_graph_has_the_parameters_of_now_and_their_names() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    model = By(written, layer=layer, norm=random_norm(4)).eval()
    first = lipschitz_bound(model, (3, 6, 6), tight_chains=False)
    assert first.parts[0].name == "layer"
    assert first.parts[0].kind == "Conv2d + scale"  # the BatchNorm is part of it
    with torch.no_grad():
        layer.weight.mul_(3.0)
    assert lipschitz_bound(model, (3, 6, 6), tight_chains=False).upper == pytest.approx(3.0 * first.upper, rel=1e-3)


def test_hooks_on_layers_of_an_exported_model_are_seen() -> None:
    model = By(written, layer=nn.Conv2d(3, 4, 3, padding=1), norm=random_norm(4)).eval()
    model.layer.register_forward_hook(lambda module, args, output: 5.0 * output)
    with pytest.raises(ValueError, match=r"does something else than its traced graph: .* at layer \(Conv2d\)"):
        lipschitz_bound(model, (3, 6, 6))


def test_what_neither_way_can_trace_says_why_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def branching(model: By, x: Tensor) -> Tensor:
        for _ in range(3):
            if (torch.tanh(x) - x).norm() < 1e-5:  # of which torch.export prints graphs
                break
        return x if x.sum() > 0.0 else 2.0 * x

    message = (
        r"^By cannot be traced by torch\.fx \(.*\); By cannot be exported by torch\.export \([^\n]*\); register [^\n]*$"
    )
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(By(branching), (3,))
    assert capfd.readouterr() == ("", "")


def test_tracing_leaves_no_trace_in_the_process() -> None:
    """torch.fx notes in a table of the process which functions graphs hold as wrapped, and trips over others."""
    torchvision = pytest.importorskip("torchvision")
    lipschitz_bound(
        By(lambda model, x: torchvision.ops.stochastic_depth(torch.cat([x, x], 1), 0.5, "row", False)), (3,)
    )
    assert lipschitz_bound(nn.ReLU(), (3,)).upper == 1.0


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


def test_a_failing_export_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of torch 2.11 does."""

    def export(*args: Any, **kwargs: Any) -> None:
        nn.modules.module.register_module_buffer_registration_hook(lambda module, name, buffer: None)
        raise RuntimeError("no")

    own = nn.modules.module.register_module_buffer_registration_hook(lambda module, name, buffer: None)
    try:
        before = dict(nn.modules.module._global_buffer_registration_hooks)
        monkeypatch.setattr(torch.export, "export", export)
        with pytest.raises(Untraceable):
            export_graph(nn.Linear(2, 2), torch.zeros(1, 2))
        assert dict(nn.modules.module._global_buffer_registration_hooks) == before
    finally:
        own.remove()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y.sum()),
        lambda y: [y],
        lambda y: {"logits": y, "loss": None},
        lambda y: Output(y, y),
    ],
    ids=["tuple", "list", "dict", "class"],
)
def test_outputs_in_other_forms_hold_the_logits(wrap: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = By(lambda model, x: wrap(model.layer(F.relu(x))), layer=nn.Linear(4, 3))
    plain = nn.Sequential(nn.ReLU(), model.layer)
    x = torch.rand(5, 4) + 0.1
    assert lipschitz_bound(model, (4,)).upper == pytest.approx(lipschitz_bound(plain, (4,)).upper, rel=1e-3)
    assert torch.allclose(local_lipschitz(model, x), local_lipschitz(plain, x), rtol=1e-2)


def test_other_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="must return one tensor"):
        lipschitz_bound(By(lambda model, x: {"features": x}), (4,))


class _Written(nn.Module):
    """Gives what depends on the input to code of torch's that is written in C and asks for tensors."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.shift, self.table = how, nn.Parameter(torch.ones(6)), torch.randn(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data":
            self.shift.data = x.mean(0).detach()
        elif self.how == "grad":
            torch.zeros(6).grad = x[0]
        elif self.how == "index":
            return self.table[x[:, 0].argsort()] + x
        elif self.how == "parameter":
            return nn.Parameter(x) + 1
        elif self.how == "numbers":
            return x + torch.tensor([x[0, 0], x[0, 1]])[:1]
        return x + self.shift


@pytest.mark.parametrize("how", ["data", "grad", "index", "parameter", "numbers"])
def test_no_proxy_passes_for_a_tensor_in_c(how: str) -> None:
    """Where C code takes one for a tensor, the process ends."""
    with contextlib.suppress(ValueError):
        assert lipschitz_bound(_Written(how), (6,)).upper >= 1.0
    assert not isinstance(object(), Tensor)
    assert isinstance.__self__.__name__ == "builtins"  # as it was


class _Gathered(nn.Module):
    """Writes its result into a buffer first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("out", torch.zeros(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out[: x.size(0)]
        y.copy_(self.fc(x))
        y *= 3.0
        return y.clone()


def test_a_buffer_that_is_written_with_gradients_is_left_without_any() -> None:
    model = _Gathered().eval()
    with contextlib.suppress(ValueError):
        bound = lipschitz_bound(model, (4,)).upper
        assert bound >= 3.0 * torch.linalg.matrix_norm(model.fc.weight.double(), 2).item() * (1.0 - 1e-6)
    assert model.out.is_leaf
    assert not model.out.requires_grad
    assert not model.out.any()

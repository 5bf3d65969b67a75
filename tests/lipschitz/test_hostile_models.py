"""Models made to get a bound that is none: results that nothing reads, overridden activations, odd constants."""

import math

import pytest
import torch
from applied import Applied
from torch import Tensor, nn

from fastlip.lipschitz import _balls, lipschitz_bound, local_lipschitz, local_lipschitz_bounds, rule
from fastlip.lipschitz._export import export_graph
from fastlip.lipschitz._replay import _set_moved
from fastlip.lipschitz._steps import Step
from fastlip.norms import layer_norms


def stretch(model: nn.Module, x: Tensor) -> float:
    """The largest norm of a Jacobian at some inputs."""
    jacobians = [torch.autograd.functional.jacobian(lambda t: model(t[None])[0], row) for row in x]
    return max(torch.linalg.matrix_norm(j.reshape(-1, x[0].numel()), 2).item() for j in jacobians)


def inputs(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


class UnreadLayer(nn.Module):
    """A BatchNorm whose only reader is a layer that leads nowhere."""

    def __init__(self):
        super().__init__()
        self.norm, self.unread = nn.BatchNorm1d(4), nn.Linear(4, 2)
        nn.init.constant_(self.norm.weight, 50.0)

    def forward(self, x):
        y = self.norm(x)
        self.unread(y)
        return y


class UnreadNorm(nn.Module):
    """A last layer whose only reader is a BatchNorm that leads nowhere."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unread = nn.Linear(4, 6), nn.Linear(6, 3), nn.BatchNorm1d(3)
        nn.init.constant_(self.unread.weight, 0.01)

    def forward(self, x):
        y = self.last(torch.relu(self.first(x)))
        self.unread(y)
        return y


def test_factors_are_not_folded_into_what_nothing_reads():
    model = UnreadLayer().double().eval()
    bound = lipschitz_bound(model, (4,), check=False)
    assert stretch(model, inputs(1, 4)) <= bound.upper * (1.0 + 1e-12)
    assert lipschitz_bound(model, (4,)).upper == bound.upper


def test_masked_norms_are_not_scaled_by_what_nothing_reads(monkeypatch):
    monkeypatch.setattr(_balls, "_MOST_ELEMENTS", 0)
    torch.manual_seed(0)
    bounds = local_lipschitz_bounds(UnreadNorm().double().eval(), inputs(3, 4), 0.01)
    assert bool((bounds.lower <= bounds.upper).all())


class Steeper(nn.ReLU):
    def forward(self, x):
        return 3.0 * x.relu()


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_local_bounds_leave_an_activation_with_a_forward_of_its_own_to_its_rule(monkeypatch, most):
    from fastlip.lipschitz import _registry

    monkeypatch.setattr(_registry, "_RULES", dict(_registry._RULES))
    monkeypatch.setattr(_balls, "_MOST_ELEMENTS", most)
    rule(Steeper)(lambda module, shape: 3.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Steeper(), nn.Linear(6, 3)).double().eval()
    bounds = local_lipschitz_bounds(model, inputs(3, 4), 0.01)
    assert bool((bounds.lower <= bounds.upper).all())


@pytest.mark.parametrize("correction", [0.5, 1.9])
@pytest.mark.parametrize("name", ["std", "var"])
def test_corrections_that_are_no_whole_numbers(name, correction):
    model = Applied(lambda x: getattr(x, name)(1, correction=correction))
    bound = lipschitz_bound(model, (3,), bounds=(-0.5, 0.5), check=False).upper
    # The variance is steepest at the ends of the box.
    x = torch.cat([inputs(4, 3), 0.5 * inputs(8, 3).sign()])
    assert stretch(model, x[[bool(row.std() > 0.0) for row in x]]) <= bound * (1.0 + 1e-9)
    assert lipschitz_bound(model, (3,), bounds=(-0.5, 0.5)).upper == bound


@pytest.mark.parametrize("name", ["expand_as", "view_as", "reshape_as", "type_as"])
def test_constants_in_the_shape_of_what_is_traced(name):
    # Its elements are no larger than the norm of the input, which is no bound of its norm.
    matrix = torch.full((1, 4, 4), 1.5)
    model = Applied(lambda x: x @ getattr(matrix, name)(x))
    bound = lipschitz_bound(model, (4, 4), bounds=(-0.5, 0.5), check=False).upper
    assert 6.0 <= bound <= 6.0 * (1.0 + 1e-9)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def test_a_layer_that_rounds_under_autocast_is_refused():
    with pytest.raises(ValueError, match="layer: Linear rounds to"):
        lipschitz_bound(Autocast(), (4,))


class InHalf(nn.Module):
    """Takes float32, and computes in its own dtype, which may be the input's."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)

    def forward(self, x):
        return self.inner(x.to(self.inner[0].weight.dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_that_rounds_its_input_is_refused(dtype):
    model = InHalf(dtype).eval()
    gap = torch.finfo(dtype).eps / 2
    x, y = (torch.full((1, 4), 1.0 + gap * (1.0 + side * 2.0**-6)) for side in (-1, 1))  # which it rounds apart
    stretch = (model(x) - model(y)).norm() / (x - y).norm()
    assert stretch > 10.0 * lipschitz_bound(model.inner, (4,)).upper  # which takes its own dtype alone
    with pytest.raises(ValueError, match=rf"to rounds to {dtype}, and has no Lipschitz constant"):
        lipschitz_bound(model, (4,))
    with pytest.raises(ValueError, match=rf"to rounds to {dtype}"):
        local_lipschitz_bounds(model, torch.ones(1, 4), radius=0.01)
    assert list(layer_norms(model, (4,))) == ["inner.0", "inner.2"]
    assert lipschitz_bound(InHalf(torch.float32), (4,)).upper > 0.0


@pytest.mark.parametrize(("offset", "least"), [(0.0, 3.0), (1e10, 0.0)])
def test_distances_in_a_replay_are_known_but_for_the_rounding_of_what_differs(offset, least):
    first = torch.tensor([[offset, -1e9]], dtype=torch.float64)
    step = Step("mask", "masked_fill", [], 1.0, (2,))
    _set_moved(step, [first, first + torch.tensor([3.0, 0.0])])
    lower, upper = step.moved.tolist()
    assert lower == pytest.approx(least, rel=1e-6)
    assert upper >= 3.0 + 1e-9 * offset


def test_products_of_one_number_for_each_sample():
    model = Applied(lambda x: (x[:, 0] * x[:, 1])[:, None])
    assert math.sqrt(2.0) <= lipschitz_bound(model, (2,), bounds=(-1.0, 1.0)).upper <= 2.0 * (1.0 + 1e-9)


def test_a_module_that_follows_its_own_output_is_exported_as_two_calls():
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    graph_module, _ = export_graph(nn.Sequential(layer, layer, norm).eval(), torch.zeros(1, 4))
    calls = graph_module.graph.find_nodes(op="call_module")
    called = [graph_module.get_submodule(str(node.target)) for node in calls]
    assert len(called) == 3
    assert called[0] is called[1] is layer
    assert called[2] is norm


class _ZeroState(nn.Module):
    """A recurrence whose first state is 0, so that a layer is called on a constant first."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        h = torch.zeros_like(u)
        for _ in range(3):
            h = torch.tanh(u + self.outer(h))
        return h


class _Baseline(nn.Module):
    """The same layers on the input and on inputs that are held."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.register_buffer("held", torch.rand(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) @ self.layers(self.held).mT - self.layers(self.held).sum()


class _ConstantAndMore(_ZeroState):
    """Beside the call on a constant another one, on the input, that tracing does not see."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__(True)
        self.differentiable = differentiable

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, torch.fx.Proxy) and (x.requires_grad or not self.differentiable):
            self.outer(self.inner(x))
        return super().forward(x)


@pytest.mark.parametrize("model", [_ZeroState(True), _ZeroState(False), _Baseline()], ids=["bias", "none", "held"])
def test_layers_that_are_also_called_on_constants(model: nn.Module) -> None:
    x = torch.randn(200, 6, dtype=torch.float64)
    model.double().eval()
    bound = lipschitz_bound(model, (6,)).upper
    found = local_lipschitz(model, x)
    assert found.max().item() <= bound * (1.0 + 1e-9)
    assert found.max().item() >= bound / 30.0
    balls = local_lipschitz_bounds(model, x[:4], 0.1)
    assert (balls.lower <= balls.upper * (1.0 + 1e-9)).all()


@pytest.mark.parametrize("differentiable", [True, False])
def test_other_calls_beside_those_on_constants_are_seen(differentiable: bool) -> None:
    with pytest.raises(ValueError, match="does something else than its traced graph"):
        lipschitz_bound(_ConstantAndMore(differentiable).eval(), (6,))


class _KeptFromTheFirstCall(nn.Module):
    """Multiplies by a number that the size of the first batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(3, 4), None

    def forward(self, x: Tensor) -> Tensor:
        if self.gain is None:
            self.gain = 1.0 + len(x)
        return self.gain * self.fc(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_hooks_compute_is_kept_and_nothing_else() -> None:
    """The run that has a hook compute a weight must not be the first one that the model remembers."""
    model = _KeptFromTheFirstCall().eval()
    nn.utils.weight_norm(model.fc)
    with pytest.raises(ValueError, match="depends on the others in its batch, on what ran before"):
        lipschitz_bound(model, (3,))
    assert model.gain is None
    layer = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4))).eval()
    with torch.no_grad():
        layer[0].weight_g.mul_(3.0)  # which the weight does not show before the next run
    truth = torch.linalg.matrix_norm(torch._weight_norm(layer[0].weight_v, layer[0].weight_g, 0), 2).item()
    assert lipschitz_bound(layer, (3,)).upper == pytest.approx(truth, rel=1e-5)


def test_a_module_that_takes_a_list() -> None:
    model = nn.Sequential(Applied(lambda x: [2.0 * x]), nn.Identity())
    assert lipschitz_bound(model, (3,)).upper == pytest.approx(2.0)

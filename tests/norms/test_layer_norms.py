"""layer_norms: which layers a report holds, on which sizes, and that each interval is right."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from fastlip.norms import NormReport, conv_norm, layer_norms
from fastlip.norms._operators.operator import Operator
from fastlip.norms._solvers.exact import is_small


def jacobian_norm(function: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of an affine map's matrix, in float64."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(function.double().eval(), x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


def assert_contains(report: NormReport, name: str, truth: float) -> None:
    assert report[name].lower <= truth * (1 + 1e-11), name
    assert report[name].upper >= truth * (1 - 1e-11), name
    assert report[name].width < 1.1e-2, name


class Net(nn.Module):
    """Layers in odd places: reused, grouped, transposed, unused, with BatchNorm before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1)
        self.up_bn = nn.BatchNorm2d(2)
        self.late = nn.BatchNorm2d(2)
        self.unused = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(2 * 8 * 8, 5)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_var.uniform_(0.1, 2.0)
                    module.weight.uniform_(-2.0, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(self.pre(x))))
        x = self.twice(torch.relu(self.twice(x)))
        x = torch.relu_(self.up_bn(self.up(x)))
        return self.fc(self.late(x).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_every_layer_that_ran_and_no_other(net: Net) -> None:
    report = layer_norms(net, (3, 10, 10))
    assert list(report) == ["pre", "conv", "twice", "twice#2", "up", "late", "fc"]
    assert_contains(report, "conv", jacobian_norm(nn.Sequential(net.conv, net.bn), (3, 10, 10)))
    assert_contains(report, "twice", jacobian_norm(net.twice, (4, 10, 10)))
    assert_contains(report, "twice#2", jacobian_norm(net.twice, (4, 5, 5)))
    assert_contains(report, "up", jacobian_norm(nn.Sequential(net.up, net.up_bn), (4, 3, 3)))
    assert_contains(report, "pre", jacobian_norm(net.pre, (3, 10, 10)))
    assert_contains(report, "late", jacobian_norm(net.late, (2, 8, 8)))
    assert_contains(report, "fc", torch.linalg.matrix_norm(net.fc.weight.double(), 2).item())


def test_without_folding_every_batchnorm_stands_alone(net: Net) -> None:
    report = layer_norms(net, (3, 10, 10), fold_batchnorm=False)
    assert list(report) == ["pre", "conv", "bn", "twice", "twice#2", "up", "up_bn", "late", "fc"]
    assert_contains(report, "conv", jacobian_norm(net.conv, (3, 10, 10)))
    assert_contains(report, "bn", jacobian_norm(net.bn, (4, 10, 10)))


def test_batchnorm_after_an_in_place_relu_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(2))
    assert list(layer_norms(model, (1, 4, 4))) == ["0", "2"]


def test_a_shared_layer_appears_with_each_batchnorm_that_follows_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            with torch.no_grad():
                self.bn.weight.fill_(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))))

    torch.manual_seed(0)
    model = Shared()
    report = layer_norms(model, (2, 5, 5))
    assert list(report) == ["conv", "conv#2"]
    assert_contains(report, "conv", jacobian_norm(nn.Sequential(model.conv, model.bn), (2, 5, 5)))
    assert_contains(report, "conv#2", jacobian_norm(model.conv, (2, 5, 5)))


def test_synchronised_batchnorm_is_batchnorm(net: Net) -> None:
    plain = layer_norms(net, (3, 10, 10))
    assert dict(layer_norms(nn.SyncBatchNorm.convert_sync_batchnorm(net), (3, 10, 10))) == dict(plain)


def test_batchnorm_of_other_axes_than_a_linear_layers_features_is_not_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    report = layer_norms(model, (5, 4))
    assert list(report) == ["0", "1"]
    assert_contains(report, "0", torch.linalg.matrix_norm(model[0].weight.double(), 2).item())
    assert report["1"].upper == pytest.approx(5.0, rel=1e-4)
    assert list(layer_norms(model, (4,))) == ["0"]
    assert list(layer_norms(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)), (3, 4))) == ["0", "1"]


def test_model_is_left_as_it_was(net: Net) -> None:
    net.train()
    net.bn.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    layer_norms(net, (3, 10, 10))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_many_checkpoints_share_one_confidence() -> None:
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)]
    reports = layer_norms(models, (4, 20, 20), confidence=0.999)
    assert len(reports) == 3
    assert all(report.confidence == 0.999 for report in reports)
    assert all(
        interval.confidence == pytest.approx(1 - 0.001 / 6) for report in reports for interval in report.values()
    )
    single = conv_norm(models[2][1].weight, 20, padding=1, rtol=1e-3, dtype=torch.float64)
    assert reports[2]["1"].lower <= single.upper
    assert single.lower <= reports[2]["1"].upper


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_dtypes_and_parametrised_weights(dtype: torch.dtype) -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding="same"))
    report = layer_norms(nn.Sequential(layer).to(dtype), (2, 5, 5))
    plain = conv_norm(layer.weight, 5, padding="same")
    assert report["0"].upper == pytest.approx(plain.upper, rel=1e-9)


def test_products_and_exports(net: Net) -> None:
    report = layer_norms(net, (3, 10, 10), generator=torch.Generator().manual_seed(5), method="lanczos")
    upper = sum(math.log10(i.upper) for i in report.values())
    assert report.log10_product_upper == pytest.approx(upper)
    assert report.log10_product_lower <= report.log10_product_upper
    assert report.seed == 5
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert [row["name"] for row in data["layers"]] == list(report)
    assert data["layers"][1]["upper"] == report["conv"].upper
    lines = report.to_csv().splitlines()
    assert lines[0].startswith("name,layer,lower,upper,confidence")
    assert len(lines) == 1 + len(report)
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert frame.loc["fc", "upper"] == report["fc"].upper
    text = str(report)
    assert all(name in text for name in report)
    assert "confidence 1 - 1e-06" in text


def test_report_without_layers() -> None:
    report = layer_norms(nn.Sequential(nn.ReLU()), (3,))
    assert len(report) == 0
    assert report.confidence == 1.0
    assert report.to_csv() == "name\n"
    assert "0 layers" in str(report)


def test_errors_name_the_layer(net: Net) -> None:
    with torch.no_grad():
        net.twice.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer twice: weight holds NaN"):
        layer_norms(net, (3, 10, 10))
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    assert list(layer_norms(model, (1, 4, 4))) == ["0"]
    with pytest.raises(ValueError, match=r"weight 1\.weight would be left out: BatchNorm without running statistics"):
        layer_norms(model, (1, 4, 4), strict=True)
    with pytest.raises(ValueError, match="input_shape must be"):
        layer_norms(net, (3, 0, 4))


def test_a_layer_whose_forward_was_replaced_is_left_out() -> None:
    patched = nn.Conv2d(1, 2, 3)
    patched.forward = lambda x: 2.0 * nn.Conv2d.forward(patched, x)  # type: ignore[method-assign]  # as users do
    report = layer_norms(patched, (1, 4, 4))
    assert not report
    assert "Conv2d does not apply the map" in report.left_out["weight"]
    with pytest.raises(ValueError, match="weight weight would be left out: Conv2d does not apply the map"):
        layer_norms(patched, (1, 4, 4), strict=True)


def test_a_layer_may_be_given_its_input_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=self.conv(input=x))

    assert list(layer_norms(Named(), (1, 4, 4))) == ["conv"]


def test_a_transposed_convolution_has_the_size_it_was_told() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[16, 16])

    torch.manual_seed(0)
    model = Up()
    assert_contains(layer_norms(model, (3, 8, 8)), "up", jacobian_norm(model, (3, 8, 8)))


@pytest.mark.parametrize("method", ["auto", "lanczos", "ring"])
def test_output_padding_may_exceed_the_stride(method: str) -> None:
    # torch allows it where the dilation is larger.
    torch.manual_seed(4)
    model = nn.ConvTranspose2d(2, 1, (2, 3), (3, 1), (2, 1), output_padding=(0, 1), dilation=2)
    report = layer_norms(model, (2, 3, 4), method=method)
    truth = jacobian_norm(model, (2, 3, 4))
    interval = report["ConvTranspose2d"]
    assert interval.lower <= truth * (1 + 1e-11)
    assert interval.upper >= truth * (1 - 1e-11)


def test_wrappers_are_looked_through(net: Net) -> None:
    plain = layer_norms(net, (3, 10, 10))
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        assert dict(layer_norms(wrapped, (3, 10, 10))) == dict(plain)
    with torch.inference_mode():
        assert dict(layer_norms(net, (3, 10, 10))) == dict(plain)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        layer_norms(lambda x: x, (3,))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="input_shape must be positive integers"):
        layer_norms(nn.Linear(3, 3), 3)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match=r"^Linear does not run on an input of shape \[4\], without the batch axis"):
        layer_norms(nn.Linear(3, 3), (4,))
    exhausted = nn.ReLU()
    exhausted.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        layer_norms(exhausted, (3,))
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"TorchScript \(at 1\)"):
        layer_norms(nn.Sequential(nn.ReLU(), scripted), (3,))


def test_resnet50_at_cifar_resolution() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    report = layer_norms(torchvision.models.resnet50(num_classes=10), (3, 32, 32))
    assert len(report) == 54
    assert report.confidence == 1 - 1e-6
    assert all(interval.converged and interval.width <= 1e-2 for interval in report.values())
    assert sum(interval.confidence == 1.0 for interval in report.values()) >= 38


def test_a_layer_without_weights_has_norm_zero() -> None:
    assert layer_norms(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)), (3,))["0"].upper == 0.0


@pytest.mark.parametrize(("side", "rtol", "device", "small"), [
    (512, 1e-2, "cpu", True), (513, 1e-2, "cpu", False), (1024, 1e-3, "cpu", True), (1025, 1e-3, "cpu", False),
    (32, 1e-3, "meta", True), (33, 1e-2, "meta", False),
])  # fmt: skip
def test_matrices_are_factorised_where_that_is_cheaper(side: int, rtol: float, device: str, small: bool) -> None:
    # "meta" stands for any device but the CPU.
    assert is_small(Operator(torch.empty(side, 2 * side, device=device)), rtol) is small

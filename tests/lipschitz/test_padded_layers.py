"""Padding in front of a layer is bounded together with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.lipschitz import lipschitz_bound

MODES = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Padded(nn.Module):
    """Pads by a function."""

    def __init__(self, pad: list[int], mode: str, conv: nn.Module) -> None:
        super().__init__()
        self.pad, self.mode, self.conv = pad, mode, conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad, mode=self.mode))


def jacobian(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    x = torch.zeros(1, *shape, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda t: model.double()(t), x)
    return matrix.reshape(-1, x.numel())


def draw(axes: int, mode: str, seed: int) -> tuple[list[int], nn.Module, tuple[int, ...]]:
    """Amounts of padding, a convolution, and the shape of an input."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    pad = [number(0, 2) for _ in range(2 * axes)]
    groups = number(1, 2)
    kernel, stride, dilation = ([number(1, most) for _ in range(axes)] for most in (3, 2, 2))
    size = tuple(number(5, 6 if axes < 3 else 5) for _ in range(axes))
    own = number(0, 1) if mode == "constant" else 0
    conv = CONVS[axes - 1](2, 4, kernel, stride, own, dilation, groups, bias=bool(number(0, 1)))
    for parameter in conv.parameters():
        parameter.data.normal_(generator=g)
    return pad, conv, (2, *size)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_bound_is_the_norm_of_both_together(mode: str, axes: int) -> None:
    for seed in range(8):
        pad, conv, shape = draw(axes, mode, seed)
        module = MODES[mode][axes - 1](pad, *([0.0] if mode == "constant" else []))
        for model in (nn.Sequential(module, conv), Padded(pad, mode, conv)):
            want = torch.linalg.matrix_norm(jacobian(model, shape), 2).item()
            model.float()
            large = lipschitz_bound(model, shape, tight_chains=False).upper
            small = lipschitz_bound(model, shape).upper
            assert want * (1.0 - 1e-6) <= small <= large * (1.0 + 1e-9)
            if mode != "constant":  # zeros make no norm larger
                assert large <= want * (1.0 + 1e-2)


@pytest.mark.parametrize("tight_chains", [False, True])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_network_has_the_bound_of_one_whose_layers_pad(mode: str, tight_chains: bool) -> None:
    torch.manual_seed(0)
    own = [nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode)]
    apart = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)]
    for first, second in zip(own, apart, strict=True):
        second.load_state_dict(first.state_dict())
    norm = nn.BatchNorm2d(4)
    norm.running_var.uniform_(0.5, 2.0)
    tail = [nn.Flatten(), nn.Linear(3 * 36, 5)]
    pad = MODES[mode][1]
    bounds = [
        lipschitz_bound(nn.Sequential(*layers, *tail), (2, 6, 6), tight_chains=tight_chains).upper
        for layers in (
            [own[0], norm, nn.ReLU(), own[1], nn.ReLU()],
            [pad(1), apart[0], norm, nn.ReLU(), Padded([1, 1, 1, 1], mode, apart[1]), nn.ReLU()],
        )
    ]
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-3)


def test_what_is_padded_with_other_values_or_read_twice() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            wide = F.pad(x, (1, 1, 1, 1), mode="reflect")
            return self.conv(wide) + wide[:, :, 1:-1, 1:-1]

    for model in (Twice(), Padded([1, 1, 1, 1], "constant", conv), nn.Sequential(nn.ConstantPad2d(1, 3.0), conv)):
        want = torch.linalg.matrix_norm(jacobian(model, (2, 5, 5)), 2).item()
        model.float()
        for tight_chains in (False, True):
            assert lipschitz_bound(model, (2, 5, 5), tight_chains=tight_chains).upper >= want * (1.0 - 1e-6)

"""layer_norms of exported programs, which are made of ATen's operators in place of modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip.norms import layer_norms

MODELS = {
    "1d": ([nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(9, 5)], (3, 9)),
    "2d": (
        [nn.Conv2d(4, 6, (3, 2), 2, (1, 0), groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(72, 3)],
        (4, 8, 6),
    ),
    "3d": ([nn.Conv3d(2, 3, 2, dilation=2), nn.Tanh(), nn.Conv3d(3, 2, 1, bias=False)], (2, 4, 5, 4)),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2)], (4, 4, 5)),
}
REFLECTED = {"reflected": ([nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.ReLU()], (2, 6, 5))}


class WrittenOut(nn.Module):
    """A layer, and products with matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.second, self.third = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(torch.ones(2), F.relu(F.relu(self.first(x)) @ self.second), self.third)


def exported(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The program of a model in eval mode for batches of any size."""
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return torch.export.export(model.eval(), (torch.rand(2, *shape),), dynamic_shapes=dynamic)


@pytest.mark.parametrize(
    ("case", "decomposed"),
    [
        *[(case, decomposed) for case in (*MODELS, "written out") for decomposed in (False, True)],
        ("reflected", False),  # decomposed, what pads is no function of its own
    ],
)
def test_an_exported_program_has_the_norms_of_its_model(case: str, decomposed: bool) -> None:
    torch.manual_seed(0)
    layers, shape = copy.deepcopy((MODELS | REFLECTED).get(case, ([WrittenOut()], (5,))))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 2.0)
    program = exported(model, shape)
    if decomposed:
        program = program.run_decompositions()
    folds = not decomposed  # a decomposed BatchNorm returns a tuple, of which nothing is known
    own, found = (layer_norms(m, shape, fold_batchnorm=folds, method="svd") for m in (model, program.module()))
    norms = [own[name].upper for name in own if "BatchNorm" not in own.descriptions[name]]
    assert [interval.upper for interval in found.values()] == pytest.approx(norms, rel=1e-9)
    assert not own.left_out
    assert all("batch_norm" in reason for reason in found.left_out.values())
    assert bool(found.left_out) == (decomposed and "norm" in str(model).lower())


def test_a_program_for_one_input_is_refused_with_the_reason() -> None:
    model = nn.Linear(4, 3).eval()
    program = torch.export.export(model, (torch.rand(1, 4),)).module()
    with pytest.raises(ValueError, match=r"runs on one input of shape \[4\].*not on several at once.*dynamic_shapes"):
        layer_norms(program, (4,))
    with pytest.raises(ValueError, match=r"does not run on an input of shape \[5\]"):
        layer_norms(program, (5,))

    class Images(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.min() < 0.0:
                raise RuntimeError("values below 0")
            return super().forward(x)

    with pytest.raises(ValueError, match=r"does not run on an input of shape .*: values below 0"):
        layer_norms(Images(4, 3), (4,))
    assert layer_norms(program, (4,), check=False)["weight"].upper == pytest.approx(
        torch.linalg.matrix_norm(model.weight.double(), 2).item()
    )

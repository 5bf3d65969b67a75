"""torch.addcmul with constants is a diagonal map."""

import pytest
import torch
from torch import nn

from fastlip.lipschitz import lipschitz_bound

SHAPE = (4, 3, 5)


class Affine(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


CASES = {
    "channels": (lambda x, w, b: torch.addcmul(b, w, x), (4, 1, 1)),
    "first": (lambda x, w, b: torch.addcmul(b, x, w, value=-3.0), (1, 4, 1, 1)),
    "repeated": (lambda x, w, b: torch.addcmul(b, w, x.mean(3, keepdim=True)), (1, 1, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_constant_is_the_norm_of_the_matrix(name):
    function, shape = CASES[name]
    model = Affine(function, *shape).double()
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel()), 2).item()
    bound = lipschitz_bound(model, SHAPE).upper
    assert norm <= bound * (1.0 + 1e-12)
    assert bound == pytest.approx(norm, rel=1e-9)


def test_values_are_known_for_a_product_that_follows():
    function, shape = CASES["channels"]
    inner = Affine(function, *shape).double()

    class Squared(nn.Module):
        def forward(self, x):
            y = inner(x)
            return y * y

    bound = lipschitz_bound(Squared(), SHAPE, bounds=(0.0, 1.0)).upper
    jacobians = (
        torch.autograd.functional.jacobian(Squared(), torch.full((1, *SHAPE), v, dtype=torch.float64))
        for v in (0.0, 1.0)
    )
    found = max(torch.linalg.matrix_norm(j.reshape(-1, j.numel() // 60), 2).item() for j in jacobians)
    assert found <= bound <= 2.5 * found

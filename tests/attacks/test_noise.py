import math

import pytest
import torch
from scipy import stats

from fastlip import attacks

WIDE = (-math.inf, math.inf)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal(dtype):
    noise = attacks.gaussian_noise(torch.zeros(8, 3, 50, 50, dtype=dtype), sigma=1.0, bounds=WIDE, generator=gen())
    assert noise.dtype == dtype
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 1e-3
    rows = noise.flatten(1).double()
    assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 5 / math.sqrt(rows.shape[1])


def test_sigma_scales_each_image_and_bounds_clip():
    inputs = torch.full((3, 4000), 0.5)
    noisy = attacks.gaussian_noise(inputs, sigma=torch.tensor([0.0, 0.05, 10.0]), generator=gen())
    assert torch.equal(noisy[0], inputs[0])
    assert abs(noisy[1].std().item() - 0.05) < 0.003
    assert noisy.min() == 0
    assert noisy.max() == 1


@pytest.mark.parametrize("inputs", [torch.full((4, 300), 0.5), torch.rand(4, 3, 10, 10, generator=gen(1)).round()])
def test_norm_is_met_after_clipping(inputs):
    norm = torch.tensor([0.0, 0.3, 1.0, 5.0])
    noisy = attacks.gaussian_noise(inputs, norm=norm, generator=gen())
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    torch.testing.assert_close((noisy - inputs).flatten(1).norm(dim=1), norm, rtol=1e-5, atol=1e-6)


def test_norm_beyond_the_box_fills_it():
    inputs = torch.full((1, 100), 0.5)
    noisy = attacks.gaussian_noise(inputs, norm=1e3, generator=gen())
    assert torch.equal((noisy - inputs).abs(), torch.full_like(inputs, 0.5))


def test_noise_follows_the_id():
    inputs, ids = torch.rand(6, 3, 5, 5), torch.tensor([3, 1, 4, 15, 9, 2])
    together = attacks.gaussian_noise(inputs, sigma=0.1, ids=ids, generator=gen())
    apart = attacks.gaussian_noise(inputs[2:4], sigma=0.1, ids=ids[2:4], generator=gen())
    assert torch.equal(together[2:4], apart)
    assert not torch.equal(together, attacks.gaussian_noise(inputs, sigma=0.1, ids=ids, generator=gen(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "either sigma or norm"),
        ({"sigma": 0.1, "norm": 1.0}, "either sigma or norm"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"sigma": torch.tensor([-1.0, 1.0])}, "sigma must be"),
        ({"sigma": torch.ones(3)}, "sigma must have shape"),
        ({"sigma": torch.full((2,), torch.nan)}, "sigma must be"),
        ({"norm": -1.0}, "norm must be at least 0"),
        ({"norm": torch.tensor([-1.0, 1.0])}, "norm must be at least 0"),
        ({"sigma": 0.1, "bounds": (0.9, 1.0)}, "inputs must lie within bounds"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        attacks.gaussian_noise(torch.full((2, 3), 0.5), **change)


def test_min_sigma_of_a_linear_model(linear_problem):
    model, inputs, labels = linear_problem(batch=12, classes=2)
    ids = torch.arange(40, 52)
    generator, again = gen(), gen()
    found = attacks.min_sigma(
        model, inputs, labels, directions=5, halvings=12, bounds=WIDE, ids=ids, generator=generator
    )
    away = model.weight[1 - labels] - model.weight[labels]
    margin = -(inputs.flatten(1) * away).sum(1)
    gains = torch.stack(
        [
            (
                attacks.gaussian_noise(
                    torch.zeros_like(inputs), sigma=1.0, bounds=WIDE, ids=ids, generator=again
                ).flatten(1)
                * away
            ).sum(1)
            for _ in range(5)
        ]
    )
    crossing = torch.where(gains > 0, margin / gains, torch.inf).amin(0).double().detach()
    crossing = torch.where(crossing <= 4.0, crossing, torch.inf)
    assert torch.equal(found.found, crossing.isfinite())
    torch.testing.assert_close(found.distance, crossing, rtol=2e-3, atol=0)
    assert (model(found.adversarial).argmax(1) != labels)[found.found].all()


def test_min_sigma_drops_out_as_it_should(linear_problem):
    model, inputs, labels = linear_problem()
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % 4
    active = torch.arange(8) != 1
    found = attacks.min_sigma(model, inputs, labels, sigma_max=1e-3, sigma_min=1e-4, active=active, generator=gen())
    assert found.distance[0] == 0
    assert found.found.tolist() == [True] + [False] * 7
    assert found.distance[1:].isinf().all()
    assert torch.equal(found.adversarial, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": 0}, "directions must be"),
        ({"levels": 1}, "levels must be"),
        ({"halvings": -1}, "halvings must be"),
        ({"sigma_min": 5.0}, "sigma_min and sigma_max"),
        ({"sigma_max": torch.inf}, "sigma_min and sigma_max"),
        ({"labels": torch.full((8,), 4)}, r"labels must lie in \[0, 4\)"),
    ],
)
def test_min_sigma_errors(linear_problem, change, message):
    model, inputs, labels = linear_problem()
    with pytest.raises(ValueError, match=message):
        attacks.min_sigma(model, inputs, **({"labels": labels} | change))


def test_min_sigma_works_in_inference_mode(linear_problem):
    model, inputs, labels = linear_problem()
    plain = attacks.min_sigma(model, inputs, labels, bounds=WIDE, generator=gen())
    with torch.inference_mode():
        found = attacks.min_sigma(model, inputs.clone(), labels.clone(), bounds=WIDE, generator=gen())
    assert torch.equal(plain.distance, found.distance)
    assert found.found.any()

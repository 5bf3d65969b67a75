"""Masks and radii for each feature, against their definition."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fastlip import attacks

EPS = 0.17


def radii(inputs, generator=None):
    generator = torch.Generator().manual_seed(1)
    return EPS * torch.rand(inputs.shape[1:], generator=generator)


def mask_of(inputs):
    mask = torch.zeros(inputs.shape[1:], dtype=torch.bool)
    mask[..., 2:10, 2:10] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_box_is_the_definition_s(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(200, 40, generator=generator).to(dtype)
    radius = 10 ** (-6 * torch.rand(40, generator=generator, dtype=torch.float64))
    radius[0], radius[1] = 0.0, math.inf
    mask = torch.rand(200, 40, generator=generator) < 0.7
    lo, hi = attacks.feature_box(inputs, radius=radius, mask=mask, bounds=(0.0, 1.0))
    assert lo.dtype == hi.dtype == dtype
    assert ((lo >= 0) & (hi <= 1) & (lo <= inputs) & (inputs <= hi)).all()
    assert torch.equal(lo[~mask], inputs[~mask])
    assert torch.equal(hi[~mask], inputs[~mask])
    allowed = torch.where(mask, radius, 0.0)
    slack = 2**-52 if dtype == torch.float64 else 0.0  # the differences below are rounded themselves
    for limit, edge in ((lo, torch.full_like(lo, 0.0)), (hi, torch.full_like(hi, 1.0))):
        assert ((limit.double() - inputs.double()).abs() <= allowed + slack).all()
        # And the next number beyond is outside of radius or bounds.
        away = torch.nextafter(limit, torch.where(edge == 0, -math.inf, math.inf).to(dtype))
        outside = ((away.double() - inputs.double()).abs() > allowed - slack) | (limit == edge)
        assert outside.all()


def test_it_is_that_of_all_features_without_radius_and_mask():
    inputs = torch.rand(3, 2, 2)
    for options in ({}, {"mask": torch.ones(2)}, {"radius": 2.0}):
        lo, hi = attacks.feature_box(inputs, **options, bounds=(torch.full((2,), -0.5), 1.0))
        assert torch.equal(lo, torch.full_like(inputs, -0.5))
        assert torch.equal(hi, torch.ones_like(inputs))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": -1.0}, ValueError, "radius must be at least 0"),
        ({"radius": torch.tensor([0.1, math.nan])}, ValueError, "radius must be at least 0"),
        ({"radius": torch.ones(3)}, ValueError, "radius must broadcast to inputs' shape"),
        ({"radius": "0.1"}, TypeError, "radius must be a float or a tensor"),
        ({"radius": True}, TypeError, "radius must be a float or a tensor"),
        ({"mask": [1, 0]}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(5, 3, 2, 2)}, ValueError, "mask must broadcast"),
        ({"bounds": (0.9, 1.0)}, ValueError, "inputs must lie within bounds"),
    ],
)
def test_what_makes_no_box(options, error, message):
    with pytest.raises(error, match=message):
        attacks.feature_box(torch.full((3, 2, 2), 0.5), **options)


CALLS = {
    "pgd": lambda *m, **o: attacks.pgd(*m, eps=EPS, steps=5, **o),
    "apgd": lambda *m, **o: attacks.apgd(*m, eps=EPS, steps=8, **o),
    "square": lambda *m, **o: attacks.square(*m, eps=EPS, queries=40, **o),
    "fmn": lambda *m, **o: attacks.min_norm(*m, norm="linf", method="fmn", fmn_steps=20, **o).adversarial,
    "search": lambda *m, **o: (
        attacks.min_norm(*m, norm="l2", method="search", steps=4, search_steps=5, **o).adversarial
    ),
    "l1": lambda *m, **o: attacks.pgd(*m, norm="l1", eps=5.0, steps=8, **o),
}


@pytest.mark.parametrize("attack", list(CALLS))
def test_attacks_stay_in_it(cnn_problem, attack):
    model, inputs, labels = cnn_problem
    radius, mask = radii(inputs), mask_of(inputs)
    box = attacks.feature_box(inputs, radius=radius, mask=mask)
    found = CALLS[attack](model, inputs, labels, bounds=box)
    moved = (found.double() - inputs.double()).abs()
    assert (moved <= torch.where(mask, radius, 0.0)).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert moved.sum() > 0


def test_the_best_corner_of_a_linear_model(linear_problem):
    """Of all images in the box the one that PGD ends at has the largest margin, which is known in closed form."""
    model, inputs, labels = linear_problem(classes=2)
    radius = 0.02 * torch.rand(inputs.shape[1:], generator=torch.Generator().manual_seed(0))
    mask = torch.arange(radius.numel()).reshape(radius.shape) % 3 > 0
    box = attacks.feature_box(inputs, radius=radius, mask=mask)
    found = attacks.pgd(
        model, inputs, labels, eps=float(radius.max()), steps=20, bounds=box, keep="last", loss="margin"
    )
    slope = (model.weight[1] - model.weight[0]).detach().reshape(radius.shape)
    sign = torch.where(labels == 0, 1.0, -1.0).reshape(-1, 1, 1, 1)
    want = inputs + sign * slope.sign() * torch.where(mask, radius, 0.0)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def images_judged(model, found, inputs, labels, radius, mask):
    moved = (found.adversarial.double() - inputs.double()).abs()
    assert (moved <= torch.where(mask, radius, 0.0)).all()
    assert torch.equal(found.robust, model(found.adversarial).argmax(1) == labels)


@pytest.mark.parametrize("given", ["box", "function"])
def test_evaluate_keeps_its_attacks_in_it(cnn_problem, given):
    """Also a suite, whose attacks have wider bounds of their own: outside of the box they would find nothing valid."""
    model, inputs, labels = cnn_problem
    radius, mask = radii(inputs), mask_of(inputs)
    options = {"radius": radius, "mask": mask}
    bounds = partial(attacks.feature_box, **options) if given == "function" else attacks.feature_box(inputs, **options)
    for own in ({}, {"bounds": (0.0, 1.0)}, {"bounds": (torch.zeros(3, 1, 1), 1.0)}):
        suite = {"apgd": partial(attacks.apgd, eps=EPS, steps=8, **own)}
        found = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=EPS, bounds=bounds, batch_size=9)
        assert not found.warnings, "nothing lies outside"
        images_judged(model, found, inputs, labels, radius, mask)
        assert 0 < found.robust.sum() < 32
    narrow = {"apgd": partial(attacks.apgd, eps=EPS, steps=8, bounds=(0.3, 0.7))}
    middle = inputs.clamp(0.3, 0.7)
    found = attacks.evaluate(model, middle, labels, narrow, norm="linf", eps=EPS, batch_size=9)
    assert found.adversarial.min() >= 0.3 - 1e-6, "an attack's own bounds are kept where they are narrower"


def test_evaluate_finds_the_bounds_of_batches(cnn_problem, tmp_path):
    model, inputs, labels = cnn_problem
    radius, mask = radii(inputs), mask_of(inputs)
    suite = {"apgd": partial(attacks.apgd, eps=EPS, steps=8)}
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=5)
    options = {"norm": "linf", "eps": EPS, "batch_size": 2}
    want = attacks.evaluate(
        model, inputs, labels, suite, **options, bounds=attacks.feature_box(inputs, radius=radius, mask=mask)
    )
    options |= {"attacks": suite, "state": tmp_path / "state"}
    for _ in range(2):
        found = attacks.evaluate(
            model, loader, **options, bounds=partial(attacks.feature_box, radius=radius, mask=mask)
        )
        assert torch.equal(found.success, want.success)
    other = partial(attacks.feature_box, radius=radius / 2, mask=mask)
    with pytest.raises(ValueError, match="state belongs to other images, attacks or settings"):
        attacks.evaluate(model, loader, **options, bounds=other)


def test_the_standard_suite_takes_bounds_of_images(cnn_problem, monkeypatch):
    model, inputs, labels = cnn_problem
    seen = []

    def watching(model, x, y, *, bounds):
        seen.append(bounds)
        return x

    def quick(norm, eps, bounds):
        return {"watching": partial(watching, bounds=bounds)}

    monkeypatch.setattr("fastlip.attacks._evaluate.suite", quick)
    box = attacks.feature_box(inputs, mask=mask_of(inputs))
    attacks.evaluate(model, inputs, labels, norm="linf", eps=EPS, bounds=box, batch_size=20)
    assert torch.equal(torch.cat([lo for lo, _ in seen]), box[0])
    assert torch.equal(torch.cat([hi for _, hi in seen]), box[1])

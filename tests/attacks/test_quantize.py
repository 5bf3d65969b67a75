"""Perturbations that survive being rounded to 8 bits."""

from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastlip import attacks
from fastlip.attacks._quantize import Grid, grid_of

ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
EPS = {"linf": 16.4 / 255, "l2": 0.8, "l1": 5.0}


@pytest.fixture
def problem(cnn_problem):
    """Images of 8 bits."""
    model, inputs, _ = cnn_problem
    pixels = (inputs * 255).round() / 255
    return model, pixels, model(pixels).argmax(1)


def lengths(found, inputs, norm):
    return torch.linalg.vector_norm((found - inputs).double().flatten(1), ORDER[norm], dim=1)


def in_a_file(images):
    return (images * 255).round().clamp(0, 255).byte().float() / 255


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "fgsm", "last"])
def test_what_comes_back_is_what_a_file_holds(problem, norm, name):
    model, inputs, labels = problem
    call = partial(attacks.square, queries=50) if name == "square" else getattr(attacks, name, attacks.pgd)
    options = {"steps": 8} if name in ("pgd", "apgd", "last") else {}
    options |= {"keep": "last"} if name == "last" else {}
    found = call(model, inputs, labels, norm=norm, eps=EPS[norm], quantize=8, **options)
    assert torch.equal(found, in_a_file(found))
    assert (lengths(found, inputs, norm) <= EPS[norm] * (1 + 1e-6)).all()
    assert (found != inputs).flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("method", ["search", "fmn", "both"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_smallest_perturbations_that_survive(problem, norm, method):
    model, inputs, labels = problem
    free = attacks.min_norm(model, inputs, labels, norm=norm, method=method)
    lost = (model(in_a_file(free.adversarial)).argmax(1) == labels).sum()
    assert lost > 1, "the comparison needs images that rounding brings back"
    found = attacks.min_norm(model, inputs, labels, norm=norm, method=method, quantize=8)
    assert found.found.all()
    assert torch.equal(found.adversarial, in_a_file(found.adversarial))
    assert (model(found.adversarial).argmax(1) != labels).all()
    torch.testing.assert_close(lengths(found.adversarial, inputs, norm), found.distance)
    assert found.distance.median() < free.distance.median() * 1.05


def test_linf_lengths_are_whole_levels(problem):
    model, inputs, labels = problem
    found = attacks.min_norm(model, inputs, labels, norm="linf", quantize=8)
    levels = found.distance * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_a_whole_evaluation(problem):
    """Attacks that know nothing of levels are rounded within the ball, and judged after it."""
    model, inputs, labels = problem
    free = partial(attacks.pgd, eps=EPS["linf"], steps=6, keep="last")
    suite = {
        "other": lambda model, x, y: free(model, x, y),
        "pgd": partial(attacks.pgd, eps=EPS["linf"], steps=6),
        "fmn": partial(attacks.min_norm, norm="linf", method="fmn", eps_max=EPS["linf"]),
    }
    found = attacks.evaluate(model, inputs, labels, suite, norm="linf", eps=EPS["linf"], quantize=8, every_attack=True)
    assert torch.equal(found.adversarial, in_a_file(found.adversarial))
    fallen = ~found.robust
    assert 0 < fallen.sum() < 32
    assert (model(found.adversarial[fallen]).argmax(1) != labels[fallen]).all()
    assert (lengths(found.adversarial, inputs, "linf") <= 16 / 255 + 1e-6).all()
    assert found.success.any(1).all()
    boxless = attacks.evaluate(model, inputs, labels, {"other": suite["other"]}, quantize=8)
    assert torch.equal(boxless.adversarial, in_a_file(boxless.adversarial))
    assert not boxless.robust.all()


def test_masks_and_other_scales(problem):
    model, inputs, labels = problem
    mask = torch.zeros_like(inputs, dtype=torch.bool)
    mask[..., 3:9, 3:9] = True
    box = (torch.where(mask, 0.0, inputs), torch.where(mask, 1.0, inputs))
    found = attacks.pgd(model, inputs, labels, eps=0.2, bounds=box, quantize=8)
    assert torch.equal(found[~mask], inputs[~mask])
    assert (found[mask] != inputs[mask]).any()
    assert torch.equal(found, in_a_file(found))
    wide = lambda x: model(x / 255)  # noqa: E731
    pixels = (inputs * 255).round()
    found = attacks.pgd(wide, pixels, labels, eps=9.7, bounds=(0.0, 255.0), quantize=8)
    assert torch.equal(found, found.round())
    assert (found - pixels).abs().max() == 9


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounding_stays_in_ball_and_box_and_changes_nothing_twice(norm):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (64, 30), generator=generator) / 255
    x = (x0 + 0.02 * torch.randn(64, 30, generator=generator)).clamp(0, 1)
    eps = lengths(x, x0, norm) * torch.linspace(1, 1.5, 64)
    grid = Grid(0.0, 1.0, 255)
    once = grid.rounded(x, x0, eps=eps, norm=norm, bounds=(0.0, 1.0))
    assert (lengths(once, x0, norm) <= eps * (1 + 1e-5) + 1e-7).all()
    assert once.min() >= 0
    assert once.max() <= 1
    assert torch.equal(once, in_a_file(once))
    assert torch.equal(grid.rounded(once, x0, eps=eps, norm=norm, bounds=(0.0, 1.0)), once)
    assert ((once - x).abs() <= 1 / 255 + 1e-6).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.0039), ("linf", 0.0235), ("l2", 0.0039), ("l1", 0.0039)])
def test_a_level_just_beyond_the_ball_is_outside(norm, eps):
    """0.0039 is less than 1/255, and 0.0235 than 6/255, by less than a hundredth of a level."""
    x0 = torch.tensor([[100.0, 7.0, 30.0]]) / 255
    x = x0 + eps * torch.tensor([[1.0, 0.0, -1.0 if norm == "linf" else 0.0]])
    found = Grid(0.0, 1.0, 255).rounded(x, x0, eps=eps, norm=norm, bounds=(0.0, 1.0))
    assert (lengths(found, x0, norm) <= eps * (1 + 1e-5)).all()
    exact = round(eps * 255) / 255
    found = Grid(0.0, 1.0, 255).rounded(x, x0, eps=exact, norm=norm, bounds=(0.0, 1.0))
    assert (found != x0).any()


def test_a_bound_between_levels_is_kept_to():
    x0, hi = torch.tensor([[0.0]]), 0.995 / 255
    found = Grid(0.0, 1.0, 255).rounded(x0 + 0.1, x0, eps=1.0, norm="linf", bounds=(0.0, torch.tensor([[hi]])))
    assert (found <= hi).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rounding_copies_no_number_to_the_device(norm):
    """A copy from the host makes a GPU wait and cannot be part of a CUDA graph."""

    class Copies(TorchFunctionMode):
        names = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names += (getattr(function, "__name__", ""),)
            return function(*args, **(kwargs or {}))

    x0 = torch.zeros(2, 3)
    with Copies() as copies:
        Grid(0.0, 1.0, 255).rounded(x0 + 0.1, x0, eps=0.05, norm=norm, bounds=(0.0, 1.0))
    assert not {"as_tensor", "tensor", "item", "tolist", "__bool__"} & set(copies.names)


def test_errors(problem):
    model, inputs, labels = problem
    for change, message in (
        ({"inputs": inputs + 0.3 / 255, "bounds": (0.0, 2.0)}, "quantize needs inputs that have 8 bits"),
        ({"bounds": (-torch.inf, torch.inf)}, "quantize needs bounds that are finite"),
        ({"inputs": inputs.bfloat16()}, "quantize needs inputs in float32 or float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attacks.pgd(model, **{"inputs": inputs, "labels": labels} | change, eps=0.1, quantize=8)
    assert grid_of(None, inputs, (0.0, 1.0)) is None

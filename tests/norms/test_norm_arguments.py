"""Wrong arguments are reported by name before torch sees them, and numbers of NumPy are accepted."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fastlip import lipschitz_bound
from fastlip.norms import (
    Composed,
    NormOptions,
    Operator,
    constrain_norm,
    conv_norm,
    conv_operator,
    layer_norms,
    operator_norms,
    spectral_norm_value,
)

WEIGHT = torch.ones(4, 2, 3, 3)

#: Field of NormOptions, a wrong value, and what the message says after the name.
WRONG_OPTIONS = [
    *(("rtol", value, "a positive number") for value in ("0.1", None, True, 1j, [0.1], torch.tensor(0.1))),
    *(("rtol", value, "positive and finite") for value in (0, -1e-3, math.nan, math.inf)),
    ("rtol", 10**400, "a positive number"),
    *(("confidence", value, "a number strictly") for value in ("0.9", None, True, (0.9,))),
    *(("confidence", value, "lie strictly between 0 and 1") for value in (0, 1, 1.5, -0.1, math.nan, math.inf)),
    *(("method", value, "one of auto, lanczos") for value in ("Auto", None, 3, ("auto",), np.array(["auto"]))),
    *(("starts", value, "an integer >= 1") for value in ("4", None, 4.0, True, np.bool_(True), [4], 0, -1)),
    *(("max_steps", value, "an integer >= 1") for value in ("4", 4.0, False, [4], 0, np.float64(3))),
    *(("dtype", value, "torch.float32 or torch.float64") for value in ("float32", None, np.float32, torch.int32)),
    *(("max_memory", value, "an integer >= 1") for value in ("1e9", 1e9, True, 0, -5)),
    *(("generator", value, "a torch.Generator or None") for value in (0, "seed", np.random.default_rng(0))),
]

#: The same for the geometry of a convolution.
WRONG_GEOMETRY = [
    *(("input_size", value, "an integer >= 1") for value in ("8", "88", None, 8.0, True, (8,), (8, 8.0), (8, True), 0)),
    *(
        ("input_size", value, "an integer >= 1")
        for value in (torch.tensor(8), np.array([8.0, 8.0]), np.array([[8, 8]]))
    ),
    *(("stride", value, "an integer >= 1") for value in ("2", None, 2.0, True, (1, 2, 3), (0, 1), (None, 1), {1: 2})),
    *(("dilation", value, "an integer >= 1") for value in ("2", None, 1.5, True, (1,), (1, -1))),
    *(("padding", value, "an integer >= 0") for value in (None, 1.0, True, (1, 1.0), -1, ((1, 1), (1, 1)), b"same")),
    *(("padding", value, "numbers, 'same' or 'valid'") for value in ("full", "", "1")),
    *(("groups", value, "an integer >= 1") for value in ("2", None, 2.0, True, (2,), 0, -2)),
    ("groups", 3, "divide the 4 output channels"),
    *(("padding_mode", value, "one of zeros") for value in ("zero", None, 0, ["zeros"], np.array(["zeros", "x"]))),
]

#: Weights that are none, or that have no norm.
WRONG_WEIGHTS = [
    *((value, TypeError, "weight must be a floating-point tensor") for value in (None, "w", 3.0, [[[1.0]]])),
    (np.ones((4, 2, 3, 3)), TypeError, "floating-point tensor, got ndarray"),
    *(
        (WEIGHT.to(dtype), TypeError, f"float64, got {dtype}")
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.complex128, torch.float8_e4m3fn)
    ),
    (WEIGHT.to_sparse(), TypeError, "dense floating-point tensor, got torch.sparse_coo"),
    (WEIGHT.to("meta"), TypeError, "the meta device"),
    (torch.ones(4, 2), ValueError, "1 to 3 kernel axes"),
    (torch.ones(4, 2, 1, 1, 1, 1), ValueError, "1 to 3 kernel axes"),
    (torch.tensor(1.0), ValueError, "1 to 3 kernel axes"),
    *((torch.ones(shape), ValueError, "must not be empty") for shape in ((0, 2, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3))),
    *((WEIGHT * value, ValueError, "NaN or infinite") for value in (math.nan, math.inf, -math.inf)),
]


def named(name: str, expected: str) -> str:
    return f"^{name} must .*{expected}"


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_OPTIONS)
def test_options_name_the_field(name: str, value: object, expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named(name, expected)):
        NormOptions(**{name: value})
    with pytest.raises((TypeError, ValueError), match=named(name, expected)):
        conv_norm(WEIGHT, 8, groups=2, **{name: value})


@pytest.mark.parametrize(("name", "value", "expected"), [case for case in WRONG_OPTIONS if case[0] != "generator"])
def test_norms_of_models_name_the_field(name: str, value: object, expected: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    for function in (layer_norms, lipschitz_bound):
        with pytest.raises((TypeError, ValueError), match=named(name, expected)):
            function(model, (1, 6, 6), **{name: value})


def test_progress_is_something_to_call() -> None:
    with pytest.raises(TypeError, match="progress must be callable or None, got int"):
        NormOptions(progress=3)  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_GEOMETRY)
def test_geometry_names_the_argument(name: str, value: object, expected: str) -> None:
    options = {"input_size": 8, "groups": 2, name: value}
    size = options.pop("input_size")
    for function in (conv_norm, conv_operator, spectral_norm_value):
        with pytest.raises((TypeError, ValueError), match=named(name, expected)):
            function(WEIGHT, size, **options)


@pytest.mark.parametrize(("weight", "error", "message"), WRONG_WEIGHTS)
def test_weights_without_a_norm_are_refused(weight: object, error: type[Exception], message: str) -> None:
    for function in (conv_norm, conv_operator):
        with pytest.raises(error, match=message):
            function(weight, 8, groups=2)
    if error is ValueError:
        with pytest.raises(error, match=message):
            spectral_norm_value(weight, 8, groups=2)
    else:
        with pytest.raises(TypeError, match="weight must be a"):
            spectral_norm_value(weight, 8, groups=2)


@pytest.mark.parametrize("value", [0, None, 3.0, True, "3"])
def test_steps_of_a_value_are_counted(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="max_steps must be an integer >= 1"):
        spectral_norm_value(WEIGHT, 8, groups=2, max_steps=value)  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("bound", value, "a positive number") for value in ("1", None, True, [1.0], torch.tensor(1.0))),
        *(("bound", value, "positive and finite") for value in (0, -1.0, math.nan, math.inf)),
        *(("iterations", value, "an integer >= 1") for value in ("1", None, 1.0, True, 0)),
        *(("input_size", value, "an integer >= 1") for value in ("8", None, 8.0, True, 0, (8, 8.0))),
        ("input_size", (8, 8, 8), "have 2 axes for Conv2d"),
        *((name, value, expected) for name, value, expected in WRONG_OPTIONS if name in ("rtol", "confidence")),
    ],
)
def test_constraints_name_the_argument(name: str, value: object, expected: str) -> None:
    options = {"input_size": 8, name: value}
    conv = nn.Conv2d(1, 2, 3)
    with pytest.raises((TypeError, ValueError), match=named(name, expected)):
        constrain_norm(conv, **options)
    assert type(conv) is nn.Conv2d  # not parametrised by half


@pytest.mark.parametrize("module", [None, "conv", nn.Conv2d, nn.ReLU(), torch.ones(2, 2, 3, 3)])
def test_constraints_take_layers_alone(module: object) -> None:
    with pytest.raises(TypeError, match="module must be a Conv, ConvTranspose or Linear"):
        constrain_norm(module, 8)  # type: ignore[arg-type]  # what is refused


def test_a_layer_of_complex_numbers_has_no_constraint() -> None:
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        constrain_norm(nn.Linear(3, 3, dtype=torch.complex64))


def test_operators_are_checked() -> None:
    op = Operator(torch.eye(3))
    for ops in (op, None, [None], [op, torch.eye(3)], "op"):
        with pytest.raises(TypeError, match="ops must be a sequence of Operator, Composed and Masked"):
            operator_norms(ops, NormOptions())
    with pytest.raises(TypeError, match="options must be a NormOptions or None, got dict"):
        operator_norms([op], {"rtol": 0.1})  # type: ignore[arg-type]  # what is refused
    broken = Operator(torch.full((3, 3), math.nan))
    for ops in ([op, broken], [Composed((op, broken), (1.0, 1.0))]):
        with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
            operator_norms(ops, NormOptions())
    assert operator_norms([], NormOptions()) == []


def test_numbers_of_numpy_are_taken_and_become_pythons() -> None:
    given = NormOptions(
        rtol=np.float32(0.5),
        confidence=Fraction(99, 100),  # type: ignore[arg-type]  # as good a number as any
        starts=np.int64(3),
        max_steps=np.int32(7),
        max_memory=np.uint64(2**40),
    )
    assert given == NormOptions(rtol=0.5, confidence=0.99, starts=3, max_steps=7, max_memory=2**40)
    assert {type(value) for value in (given.starts, given.max_steps, given.max_memory)} == {int}
    assert type(given.rtol) is type(given.confidence) is float
    two = np.int64(2)
    options = {"stride": np.array([1, 2]), "padding": (two, 1), "dilation": np.int8(1), "groups": two}
    plain = {"stride": (1, 2), "padding": (2, 1), "dilation": 1, "groups": 2}
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    size = np.array([6, 5], dtype=np.int16)
    assert conv_norm(weight, size, **options) == conv_norm(weight, (6, 5), **plain)
    sizes = (np.array(6), torch.Size((6, 6)), [6, np.uint8(6)])
    assert len({conv_norm(weight, each, groups=2) for each in sizes}) == 1
    conv = constrain_norm(nn.Conv2d(2, 2, 3), np.int64(6), bound=np.float32(0.5), iterations=np.int64(2)).eval()
    assert conv_norm(conv.weight, 6).lower <= 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rtol", [5e-324, 1e-300, 1e-17, 1e300])
@pytest.mark.parametrize("method", ["auto", "lanczos", "power", "ring", "gram", "cholesky", "svd"])
def test_any_positive_width_may_be_asked_for(method: str, rtol: float) -> None:
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    fine = conv_norm(weight, 5, padding=1, method="svd", rtol=1e-9)
    interval = conv_norm(weight, 5, padding=1, method=method, rtol=rtol, max_steps=40)
    assert interval.lower <= fine.upper
    assert interval.upper >= fine.lower


@pytest.mark.parametrize("confidence", [5e-324, 1e-9, 1.0 - 2.0**-53])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_any_confidence_may_be_asked_for(method: str, confidence: float) -> None:
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    options = {"confidence": confidence, "dtype": torch.float64, "max_steps": 60}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        interval = conv_norm(weight, 5, padding=1, method=method, generator=generator, **options)
        assert 0.0 < interval.lower <= interval.upper
        assert not interval.converged or interval.upper < math.inf
        assert interval.upper < math.inf or confidence < 0.5

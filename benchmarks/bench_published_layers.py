"""The Lipschitz constants of published 1-Lipschitz and orthogonal layers, measured and certified.

    pip install deel-torchlip orthogonium einops geotorch monotonicnetworks monotonenorm
    python benchmarks/bench_published_layers.py

Every layer is built as its documentation says, put into eval mode and measured; then trained for 20 steps of Adam (mean
squared error to random targets three times as large as normal ones) and measured again, anew for each of two learning
rates, 0.01 and an excessive 0.3; and after the first one as the library exports it, if it does. A library that is not
installed is named and left out; a layer that cannot be built here has a row that says why. About three minutes on one
core.

Columns: ``promised`` is the constant that the documentation states, in the words of ``stated``, from l_p to l_q as
``norms`` says; ``tolerance`` what it allows itself. ``lower`` and ``upper`` are fastlip's: of
:func:`fastlip.layer_norms` where the layer is one linear map that it accepts, of :func:`fastlip.lipschitz_bound` (upper
only) where that has a rule for every part, else of the dense matrix. ``attained`` is the stretch of the layer itself
between two inputs, found in float64 (``how``), and ``pair`` that of the same two inputs through the layer in its own
dtype. ``smallest`` is the smallest singular value. Verdicts are those of :func:`_stretch.verdict`; "exceeds" rests on
``attained`` and ``pair`` alone, so it needs no trust in a bound.
"""

import argparse
import csv
import importlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _stretch import Stretch, frozen, stretch, verdict
from _timing import Results
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastlip

RESULTS = Path(__file__).parent / "results"
ROUNDING = 1e-5  # of float32 weights, where a library states no tolerance
STEPS = 20


@dataclass(frozen=True)
class Case:
    """A layer, the constant that its documentation promises, and where.

    Attributes:
        library: its name for pip.
        layer: class or function.
        arguments: as given.
        build: makes it.
        shape: of one input.
        promised: the Lipschitz constant; NaN where the documentation gives none.
        tolerance: relative, documented, or rounding.
        stated: where and how the promise is made.
        orthogonal: whether all singular values are promised to be ``promised``.
        norms: (p, q), the norms of inputs and outputs.
        export: what makes the plain layer of it, where the library offers that.
    """

    library: str
    layer: str
    arguments: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    promised: float = 1.0
    tolerance: float = ROUNDING
    stated: str = ""
    orthogonal: bool = False
    norms: tuple[float, float] = (2.0, 2.0)
    export: Callable[[nn.Module], nn.Module] | None = None


def call(make: Callable[..., nn.Module], *args: Any, **options: Any) -> tuple[str, Callable[[], nn.Module]]:
    """The arguments as text, and the call."""
    shown = [str(a) for a in args] + [f"{k}={v!r}" for k, v in options.items()]
    return ", ".join(shown), lambda: make(*args, **options)


def torch_cases() -> Iterator[Case]:
    orthogonal = {
        "stated": "docstring: the parametrised matrix is orthogonal, a kernel as a matrix of [out, rest]",
        "orthogonal": True,
    }
    spectral = "docstring: divided by its spectral norm from power iteration, a kernel as a matrix of [out, rest]"
    for i, o in ((16, 16), (32, 16), (16, 32)):
        for kind in ("matrix_exp", "cayley", "householder"):
            yield Case(
                "torch", "parametrizations.orthogonal", f"Linear({i}, {o}), {kind!r}",
                lambda i=i, o=o, kind=kind: parametrizations.orthogonal(nn.Linear(i, o), orthogonal_map=kind), (i,),
                **orthogonal,
            )  # fmt: skip
        yield Case(
            "torch", "parametrizations.spectral_norm", f"Linear({i}, {o})",
            lambda i=i, o=o: parametrizations.spectral_norm(nn.Linear(i, o)), (i,), tolerance=1e-3, stated=spectral,
        )  # fmt: skip
    for name, wrap in (("orthogonal", parametrizations.orthogonal), ("spectral_norm", parametrizations.spectral_norm)):
        yield Case(
            "torch", f"parametrizations.{name}", "Conv2d(8, 8, 3, padding=1)",
            lambda wrap=wrap: wrap(nn.Conv2d(8, 8, 3, padding=1)), (8, 8, 8), promised=math.nan,
            stated=f"{spectral if name == 'spectral_norm' else orthogonal['stated']}; none for the convolution",
        )  # fmt: skip


def torchlip_cases() -> Iterator[Case]:
    lip = importlib.import_module("deel.torchlip")
    library = "deel-torchlip"
    eps = 1e-3  # eps_spectral and eps_bjorck, the documented stopping criteria
    spectral = {
        "tolerance": eps,
        "stated": "docstring: all singular values of the kernel are 1; k_coef_lip is the Lipschitz constant to ensure",
    }

    def export(layer: nn.Module) -> nn.Module:
        return layer.vanilla_export().eval()

    for i, o in ((16, 16), (32, 16), (16, 32), (256, 10)):
        text, build = call(lip.SpectralLinear, i, o)
        yield Case(library, "SpectralLinear", text, build, (i,), **spectral, orthogonal=True, export=export)
        text, build = call(lip.SpectralLinear, i, o, eps_bjorck=None)
        yield Case(library, "SpectralLinear", text, build, (i,), **spectral, export=export)
        text, build = call(lip.FrobeniusLinear, i, o, disjoint_neurons=False)
        frobenius = "docstring: the weight's Frobenius norm is 1"
        yield Case(library, "FrobeniusLinear", text, build, (i,), stated=frobenius, export=export)
    text, build = call(lip.SpectralLinear, 16, 16, k_coef_lip=2.0)
    yield Case(library, "SpectralLinear", text, build, (16,), 2.0, **spectral, orthogonal=True, export=export)
    text, build = call(lip.FrobeniusLinear, 16, 1)
    stated = "docstring: with one output neuron equivalent to SpectralLinear"
    yield Case(library, "FrobeniusLinear", text, build, (16,), stated=stated, export=export)
    text, build = call(lip.FrobeniusLinear, 16, 16)
    stated = "docstring: independent 1-Lipschitz neurons; none for the layer"
    yield Case(library, "FrobeniusLinear", text, build, (16,), math.nan, stated=stated, export=export)

    for i, o, k, s, p, mode in [
        (8, 8, 3, 1, 1, "zeros"), (4, 8, 3, 1, 1, "zeros"), (8, 4, 3, 1, 1, "zeros"), (8, 8, 3, 1, 0, "zeros"),
        (8, 8, 3, 1, 1, "circular"), (8, 8, 3, 1, 1, "reflect"), (8, 8, 3, 1, 1, "replicate"),
        (8, 8, 3, 1, 1, "symmetric"), (8, 8, 5, 1, 2, "zeros"), (8, 8, 5, 1, 2, "reflect"),
        (8, 8, 5, 1, 2, "replicate"), (8, 8, 5, 1, 2, "symmetric"), (8, 8, 5, 1, 2, "circular"),
        (8, 8, 3, 1, 2, "zeros"), (8, 8, 3, 2, 1, "zeros"), (8, 8, 3, 2, 1, "circular"), (8, 8, 3, 2, 1, "reflect"),
        (8, 8, 2, 2, 0, "zeros"), (8, 16, 2, 2, 0, "zeros"), (8, 8, 4, 3, 1, "zeros"), (8, 8, 1, 2, 0, "zeros"),
    ]:  # fmt: skip
        options = {"stride": s, "padding": p, "padding_mode": mode}
        text, build = call(lip.SpectralConv2d, i, o, k, **options)
        yield Case(library, "SpectralConv2d", text, build, (i, 8, 8), **spectral, export=export)
    text, build = call(lip.SpectralConv2d, 32, 32, 3, padding=1)
    yield Case(library, "SpectralConv2d", text, build, (32, 24, 24), **spectral, export=export)
    text, build = call(lip.SpectralConv2d, 8, 8, 3, padding=1, k_coef_lip=3.0)
    yield Case(library, "SpectralConv2d", text, build, (8, 8, 8), 3.0, **spectral, export=export)
    text, build = call(lip.SpectralConv2d, 8, 8, 3, padding=1, eps_bjorck=None)
    yield Case(library, "SpectralConv2d", text, build, (8, 8, 8), **spectral, export=export)
    for options in ({}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "symmetric", "padding": 2}):
        text, build = call(lip.SpectralConv1d, 8, 8, 5, **({"padding": 2} | options))
        yield Case(library, "SpectralConv1d", text, build, (8, 32), **spectral, export=export)
    for mode in ("zeros", "circular", "reflect"):
        text, build = call(lip.FrobeniusConv2d, 8, 1, 3, padding=1, padding_mode=mode)
        stated = "docstring: SpectralConv2d in the case of a single output"
        yield Case(library, "FrobeniusConv2d", text, build, (8, 8, 8), stated=stated, export=export)
    for i, o, k, options in (
        (8, 8, 3, {}), (8, 4, 3, {"padding": 1}), (4, 8, 3, {"padding": 1}), (8, 8, 2, {"stride": 2}),
        (8, 8, 4, {"stride": 2, "padding": 1}), (8, 8, 3, {"stride": 2}), (8, 8, 2, {"stride": 3}),
    ):  # fmt: skip
        text, build = call(lip.SpectralConvTranspose2d, i, o, k, **options)
        yield Case(library, "SpectralConvTranspose2d", text, build, (i, 6, 6), **spectral, export=export)

    ensures = "docstring: k_coef_lip is the Lipschitz factor to ensure"
    for k_coef in (1.0, 0.5):
        given = {} if k_coef == 1.0 else {"k_coef_lip": k_coef}
        for name, args, options, shape in (
            ("ScaledAvgPool2d", (2,), {}, (4, 8, 8)), ("ScaledAvgPool2d", (3,), {}, (4, 8, 8)),
            ("ScaledAvgPool2d", ((2, 4),), {}, (4, 8, 8)), ("ScaledAvgPool2d", (3,), {"ceil_mode": True}, (4, 8, 8)),
            ("ScaledAvgPool2d", (2,), {"divisor_override": 1}, (4, 8, 8)),
            ("ScaledAdaptiveAvgPool2d", ((1, 1),), {}, (4, 6, 7)),
            ("ScaledL2NormPool2d", (2,), {}, (4, 8, 8)), ("ScaledL2NormPool2d", (3,), {"ceil_mode": True}, (4, 8, 8)),
            ("ScaledAdaptativeL2NormPool2d", (), {}, (4, 6, 6)),
            ("InvertibleDownSampling", (2,), {}, (4, 8, 8)), ("InvertibleUpSampling", (2,), {}, (8, 4, 4)),
            ("MaxMin", (), {}, (8, 4, 4)), ("GroupSort", (4,), {}, (8, 4, 4)), ("GroupSort2", (), {}, (8,)),
            ("FullSort", (), {}, (12,)), ("LPReLU", (), {}, (8,)), ("LPReLU", (), {"init": -3.0}, (8,)),
            ("HouseHolder", (8,), {}, (8, 4, 4)),
        ):  # fmt: skip
            text, build = call(getattr(lip, name), *args, **options, **given)
            yield Case(library, name, text, build, shape, k_coef, stated=ensures, export=export)
    one = "docstring: this layer is 1-Lipschitz"
    text, build = call(lip.LayerCentering, 4)
    yield Case(library, "LayerCentering", text, build, (4, 6, 6), stated=one)
    text, build = call(lip.BatchCentering, 4)
    yield Case(library, "BatchCentering", text, build, (4, 6, 6), stated=one, export=export)
    text, build = call(lip.BatchLipNorm, 4)
    stated = "docstring: not 1-Lipschitz; 1 / the largest standard deviation, through a SharedLipFactory"
    yield Case(library, "BatchLipNorm", text, build, (4, 6, 6), math.nan, stated=stated, export=export)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.sum = lip.SpectralLinear(16, 16), lip.LipResidual()

        def forward(self, x: Tensor) -> Tensor:
            return self.sum(x, self.branch(x))

    stated = "docstring: a 1-Lipschitz residual connection"
    yield Case(library, "LipResidual", "SpectralLinear(16, 16)", Residual, (16,), tolerance=eps, stated=stated)
    whole = "docstring: k_coef_lip is the Lipschitz coefficient to ensure globally on the model"
    for text, promised, build in (
        (
            "SpectralConv2d(3, 8, 3, padding=1), GroupSort2, ScaledL2NormPool2d(2), Flatten, SpectralLinear(128, 4)",
            1.0,
            lambda: lip.Sequential(
                lip.SpectralConv2d(3, 8, 3, padding=1), lip.GroupSort2(), lip.ScaledL2NormPool2d(2), nn.Flatten(),
                lip.SpectralLinear(128, 4),
            ),
        ),
        (
            "SpectralLinear(8, 8, k_coef_lip=2.0), GroupSort2(), SpectralLinear(8, 8, k_coef_lip=2.0), k_coef_lip=1.0",
            1.0,
            lambda: lip.Sequential(
                lip.SpectralLinear(8, 8, k_coef_lip=2.0), lip.GroupSort2(), lip.SpectralLinear(8, 8, k_coef_lip=2.0)
            ),
        ),
        (
            "SpectralLinear(8, 8), FullSort(), SpectralLinear(8, 8), k_coef_lip=5.0",
            5.0,
            lambda: lip.Sequential(
                lip.SpectralLinear(8, 8), lip.FullSort(), lip.SpectralLinear(8, 8), k_coef_lip=5.0
            ),
        ),
        (
            "SpectralLinear(8, 8), LPReLU(), SpectralLinear(8, 8), k_coef_lip=0.5",
            0.5,
            lambda: lip.Sequential(lip.SpectralLinear(8, 8), lip.LPReLU(), lip.SpectralLinear(8, 8), k_coef_lip=0.5),
        ),
    ):  # fmt: skip
        shape = (3, 8, 8) if "Conv" in text else (8,)
        yield Case(library, "Sequential", text, build, shape, promised, 3 * eps, whole, export=export)


def orthogonium_cases() -> Iterator[Case]:
    aoc = importlib.import_module("orthogonium.layers.conv.AOC")
    aol = importlib.import_module("orthogonium.layers.conv.AOL")
    sll = importlib.import_module("orthogonium.layers.conv.SLL")
    soc = importlib.import_module("orthogonium.layers.conv.adaptiveSOC")
    layers = importlib.import_module("orthogonium.layers")
    activations = importlib.import_module("orthogonium.layers.custom_activations")
    residual = importlib.import_module("orthogonium.layers.residual")
    params = importlib.import_module("orthogonium.reparametrizers")
    library = "orthogonium"
    tight = {"tolerance": 1e-4, "stated": "docstring: orthogonal, unit tests validated for a tolerance of 1e-4"}
    maps = {name: getattr(params, f"{name}_ORTHO_PARAMS") for name in ("DEFAULT", "EXP", "QR", "CHOLESKY")}
    for i, o in ((16, 16), (32, 16), (16, 32), (256, 10)):
        for name, value in maps.items():
            stated = "docstring: an orthogonal linear layer"
            # The docstring of CHOLESKY_ORTHO_PARAMS says that the layer may be 1.05 Lipschitz.
            tolerance = 5e-2 if name == "CHOLESKY" else 1e-4
            yield Case(
                library, "OrthoLinear", f"{i}, {o}, ortho_params={name}",
                lambda i=i, o=o, value=value: layers.OrthoLinear(i, o, ortho_params=value), (i,),
                tolerance=tolerance, stated=stated, orthogonal=True,
            )  # fmt: skip
    text, build = call(layers.UnitNormLinear, 16, 16)
    stated = "docstring: more than 1-Lipschitz as a whole; each output is 1-Lipschitz"
    yield Case(library, "UnitNormLinear", text, build, (16,), math.nan, stated=stated)
    yield Case(library, "UnitNormLinear", text, build, (16,), 1.0, stated=stated, norms=(2.0, math.inf))

    settings = [
        (8, 8, 3, {}), (4, 8, 3, {}), (8, 4, 3, {}), (8, 8, 4, {}), (8, 8, 5, {}), (8, 8, 1, {}),
        (8, 8, 3, {"padding": 1, "padding_mode": "zeros"}), (8, 8, 3, {"padding": 0, "padding_mode": "zeros"}),
        (8, 8, 3, {"padding": 1, "padding_mode": "reflect"}), (8, 8, 3, {"padding": 1, "padding_mode": "replicate"}),
        (4, 16, 2, {"stride": 2, "padding": 0}), (8, 8, 2, {"stride": 2, "padding": 0}),
        (8, 8, 3, {"stride": 2, "padding": 1}), (4, 8, 3, {"stride": 2, "padding": 1}),
        (8, 4, 4, {"stride": 2, "padding": 1}), (8, 8, 3, {"groups": 2}), (8, 8, 3, {"dilation": 2}),
        (8, 8, 3, {"stride": 2, "padding": 1, "groups": 2}),
    ]  # fmt: skip
    for i, o, k, options in settings:
        # Strides that leave fewer outputs than inputs, and zero padding, cannot keep all singular values at 1.
        square = options.get("padding_mode", "circular") == "circular" and (k != 4 or "stride" in options)
        text, build = call(aoc.AdaptiveOrthoConv2d, i, o, k, **options)
        yield Case(library, "AdaptiveOrthoConv2d", text, build, (i, 8, 8), **tight, orthogonal=square)
        text, build = call(soc.AdaptiveSOCConv2d, i, o, k, **options)
        stated = "docstring: orthogonal, can be expected to be 1.08 Lipschitz"
        yield Case(library, "AdaptiveSOCConv2d", text, build, (i, 8, 8), tolerance=8e-2, stated=stated)
        plain = {"padding": (k // 2 if "stride" not in options else 0)} | options
        text, build = call(aol.AOLConv2D, i, o, k, **plain)
        stated = "docstring: the Lipschitz constant is guaranteed to be less than 1"
        yield Case(library, "AOLConv2D", text, build, (i, 8, 8), stated=stated)
    for name in ("EXP", "QR", "CHOLESKY"):
        for i, o, k, s in ((8, 8, 3, 1), (4, 8, 3, 2)):
            yield Case(
                library, "AdaptiveOrthoConv2d", f"{i}, {o}, {k}, stride={s}, padding=1, ortho_params={name}",
                lambda i=i, o=o, k=k, s=s, name=name: aoc.AdaptiveOrthoConv2d(
                    i, o, k, stride=s, padding=1, ortho_params=maps[name]
                ),
                (i, 8, 8), stated=tight["stated"], tolerance=5e-2 if name == "CHOLESKY" else 1e-4,
            )  # fmt: skip
    text, build = call(aoc.AdaptiveOrthoConv2d, 32, 32, 3)
    yield Case(library, "AdaptiveOrthoConv2d", text, build, (32, 24, 24), **tight)
    for niter in (2, 4):
        for options in ({"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 1, "padding_mode": "reflect"}):
            text, build = call(aol.AOLConv2D, 8, 8, 3, **options, niter=niter)
            yield Case(library, "AOLConv2D", text, build, (8, 8, 8), stated=stated)
    for i, o, k, options in (
        (8, 8, 3, {}), (8, 4, 3, {"padding": 1}), (4, 8, 3, {"padding": 1}), (8, 8, 2, {"stride": 2}),
        (8, 8, 4, {"stride": 2, "padding": 1}), (8, 4, 3, {"stride": 2, "padding": 1}), (8, 8, 3, {"groups": 2}),
        (8, 8, 3, {"dilation": 2}),
    ):  # fmt: skip
        text, build = call(aoc.AdaptiveOrthoConvTranspose2d, i, o, k, **options)
        yield Case(library, "AdaptiveOrthoConvTranspose2d", text, build, (i, 6, 6), **tight)
        text, build = call(soc.AdaptiveSOCConvTranspose2d, i, o, k, **options)
        said = "docstring: orthogonal, can be expected to be 1.08 Lipschitz"
        yield Case(library, "AdaptiveSOCConvTranspose2d", text, build, (i, 6, 6), tolerance=8e-2, stated=said)
        text, build = call(aol.AOLConvTranspose2D, i, o, k, **options)
        yield Case(library, "AOLConvTranspose2D", text, build, (i, 6, 6), stated=stated)

    block = "docstring: 1-Lipschitz convolutional residual block"
    for inner, options in (1, {}), (2, {"kernel_size": 5}), (2, {"groups": 2}):
        text, build = call(sll.SDPBasedLipschitzResBlock, 8, inner, **options)
        yield Case(library, "SDPBasedLipschitzResBlock", text, build, (8, 6, 6), stated=block)
    for i, o, inner in ((16, 16, 16), (16, 16, 32), (16, 16, 8)):
        text, build = call(sll.SDPBasedLipschitzDense, i, o, inner)
        stated = "docstring: a 1-Lipschitz fully connected layer"
        yield Case(library, "SDPBasedLipschitzDense", text, build, (i,), stated=stated)
    for outputs, inner, options in ((8, 1, {}), (16, 1, {}), (4, 2, {"kernel_size": 5}), (8, 2, {"groups": 2})):
        text, build = call(sll.SLLxAOCLipschitzResBlock, 8, outputs, inner, **options)
        stated = "docstring: preserves the 1-Lipschitz property"
        yield Case(library, "SLLxAOCLipschitzResBlock", text, build, (8, 8, 8), tolerance=1e-4, stated=stated)
    for mode in ("circular", "zeros"):
        text, build = call(sll.AOCLipschitzResBlock, 8, 1, 3, padding_mode=mode)
        stated = "docstring: preserves 1-Lipschitz (or lower) behaviour"
        yield Case(library, "AOCLipschitzResBlock", text, build, (8, 8, 8), tolerance=1e-4, stated=stated)

    one = "README: custom activations for 1-Lipschitz networks"
    text, build = call(layers.Abs)
    yield Case(library, "Abs", text, build, (8, 4, 4), stated=one)
    text, build = call(activations.SoftHuber)
    yield Case(library, "SoftHuber", text, build, (8, 4, 4), stated="comment: a Lipschitz constant of 1")
    text, build = call(layers.MaxMin)
    yield Case(library, "MaxMin", text, build, (8, 4, 4), stated=one)
    for name in ("HouseHolder", "HouseHolder_Order_2"):
        text, build = call(getattr(layers, name), 8)
        stated = "docstring: corrected with a factor 1 / sqrt(2) to be 1-Lipschitz"
        yield Case(library, name, text, build, (8, 4, 4), stated=stated)
    text, build = call(layers.ChannelShuffle, 2, 4)
    yield Case(library, "ChannelShuffle", text, build, (8, 4, 4), stated="README: mixes channels", orthogonal=True)
    norm = "README: centering for 1-Lipschitz networks"
    text, build = call(layers.LayerCentering2D, 8)
    yield Case(library, "LayerCentering2D", text, build, (8, 4, 4), stated=norm)
    text, build = call(layers.BatchCentering2D, 8)
    yield Case(library, "BatchCentering2D", text, build, (8, 4, 4), stated=norm)
    skip = "none; the code weighs the branches so that the sum of their constants is 1"
    for name in ("ConcatResidual", "L2NormResidual", "AdditiveResidual", "PrescaledAdditiveResidual"):
        width = 8 if name == "ConcatResidual" else 16
        yield Case(
            library, name, f"OrthoLinear({width}, {width})",
            lambda name=name, width=width: getattr(residual, name)(layers.OrthoLinear(width, width)), (16,),
            tolerance=1e-4, stated=skip,
        )  # fmt: skip
    legacy = "README: original code of BCOP, SOC, Cayley, listed as orthogonal"
    bcop = importlib.import_module("orthogonium.legacy.block_ortho_conv")
    cayley = importlib.import_module("orthogonium.legacy.cayley_ortho_conv")
    skew = importlib.import_module("orthogonium.legacy.skew_ortho_conv")
    for i, o, k, s in ((8, 8, 3, 1), (8, 4, 3, 1), (4, 8, 3, 1), (8, 8, 3, 2)):
        text, build = call(bcop.BCOP, i, o, k, stride=s, bias=False)
        yield Case(library, "legacy BCOP", text, build, (i, 8, 8), tolerance=1e-3, stated=legacy)
        text, build = call(cayley.Cayley, i, o, k, stride=s, padding=k // 2)
        yield Case(library, "legacy Cayley", text, build, (i, 8, 8), tolerance=1e-3, stated=legacy)
    text, build = call(cayley.CayleyLinear, 16, 16)
    yield Case(library, "legacy CayleyLinear", text, build, (16,), tolerance=1e-3, stated=legacy)
    text, build = call(skew.SOC, 8, 8, bias=False)
    yield Case(library, "legacy SOC", text, build, (8, 8, 8), tolerance=1e-3, stated=legacy)


def geotorch_cases() -> Iterator[Case]:
    geotorch = importlib.import_module("geotorch")
    stated = "docstring: X^T X = I"
    for i, o in ((16, 16), (32, 16), (16, 32)):
        for triv in ("expm", "cayley"):
            yield Case(
                "geotorch", "orthogonal", f"Linear({i}, {o}), triv={triv!r}",
                lambda i=i, o=o, triv=triv: _wrapped(geotorch.orthogonal, nn.Linear(i, o), triv=triv), (i,),
                stated=stated, orthogonal=True,
            )  # fmt: skip
        yield Case(
            "geotorch", "grassmannian", f"Linear({i}, {o})",
            lambda i=i, o=o: _wrapped(geotorch.grassmannian, nn.Linear(i, o)), (i,), stated=stated, orthogonal=True,
        )  # fmt: skip
        for lam in (0.1, 0.5):
            yield Case(
                "geotorch", "almost_orthogonal", f"Linear({i}, {o}), lam={lam}",
                lambda i=i, o=o, lam=lam: _wrapped(geotorch.almost_orthogonal, nn.Linear(i, o), lam=lam), (i,),
                1.0 + lam, stated="docstring: singular values in (1 - lam, 1 + lam)",
            )  # fmt: skip
    yield Case(
        "geotorch", "sphere", "Linear(16, 1)", lambda: _wrapped(geotorch.sphere, nn.Linear(16, 1)), (16,),
        stated="docstring: the vector has norm radius",
    )  # fmt: skip
    yield Case(
        "geotorch", "orthogonal", "Conv2d(8, 8, 3, padding=1)",
        lambda: _wrapped(geotorch.orthogonal, nn.Conv2d(8, 8, 3, padding=1)), (8, 8, 8), math.nan,
        stated="docstring: make the kernels orthogonal, each k x k matrix; none for the convolution",
    )  # fmt: skip


def _wrapped(wrap: Callable[..., Any], layer: nn.Module, **options: Any) -> nn.Module:
    wrap(layer, "weight", **options)
    return layer


#: The norms that the kinds of constraint of monotonicnetworks and monotonenorm are operator norms for.
KINDS = {"one": (1.0, 1.0), "inf": (math.inf, math.inf), "one-inf": (1.0, math.inf), "two-inf": (2.0, math.inf)}


def monotonic_cases() -> Iterator[Case]:
    library = "monotonicnetworks"
    networks = importlib.import_module(library)
    for kind, norms in KINDS.items():
        for i, o in ((16, 16), (16, 4), (4, 16)):
            for constant in (1.0, 2.0):
                options = {"kind": kind, "lipschitz_const": constant}
                stated = "docstring: a linear layer with a Lipschitz constraint; lipschitz_const is its constant"
                text, build = call(networks.LipschitzLinear, i, o, **options)
                yield Case(library, "LipschitzLinear", text, build, (i,), constant, stated=stated, norms=norms)
                text, build = call(networks.MonotonicLayer, i, o, **options)
                yield Case(library, "MonotonicLayer", text, build, (i,), constant, stated=stated, norms=norms)
                if kind != "one-inf":
                    weaker = f"{stated}; read as that of each output, in l1"
                    norms_of_one = (1.0, math.inf)
                    yield Case(
                        library, "MonotonicLayer", text, build, (i,), constant, stated=weaker, norms=norms_of_one
                    )  # fmt: skip
        stated = "docstring: a module which is monotonic and Lipschitz with constant lipschitz_const"
        yield Case(
            library, "MonotonicWrapper", f"LipschitzLinear(16, 1, kind={kind!r}), lipschitz_const=1.0",
            lambda kind=kind: networks.MonotonicWrapper(networks.LipschitzLinear(16, 1, kind=kind)), (16,),
            stated=stated, norms=norms,
        )  # fmt: skip
    text, build = call(networks.GroupSort, 4)
    yield Case(library, "GroupSort", text, build, (16,), stated="a permutation, so 1 in every norm")


def monotonenorm_cases() -> Iterator[Case]:
    library = "monotonenorm"
    norm = importlib.import_module(library)
    for name in ("direct_norm", "project_norm"):
        for kind, norms in KINDS.items():
            for vectorwise in (True, False):
                yield Case(
                    library, name, f"Linear(16, 8), kind={kind!r}, max_norm=1.5, vectorwise={vectorwise}",
                    lambda name=name, kind=kind, vectorwise=vectorwise: getattr(norm, name)(
                        nn.Linear(16, 8), kind=kind, max_norm=1.5, vectorwise=vectorwise
                    ),
                    (16,), 1.5, stated="docstring: max_norm is the maximum norm of the weights", norms=norms,
                )  # fmt: skip
    yield Case(
        library, "SigmaNet", "direct_norm(Linear(16, 1), 'one', max_norm=2.0), sigma=2.0",
        lambda: norm.SigmaNet(norm.direct_norm(nn.Linear(16, 1), kind="one", max_norm=2.0), sigma=2.0), (16,), 2.0,
        stated="docstring: a monotone network with a sigma Lipschitz constraint", norms=(1.0, 1.0),
    )  # fmt: skip


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "torch": torch_cases,
    "deel-torchlip": torchlip_cases,
    "orthogonium": orthogonium_cases,
    "geotorch": geotorch_cases,
    "monotonicnetworks": monotonic_cases,
    "monotonenorm": monotonenorm_cases,
}


def train(layer: nn.Module, shape: tuple[int, ...], rate: float) -> None:
    """A few steps of Adam towards random targets, in training mode; eval mode afterwards."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    layer.train()
    for _ in range(STEPS):
        x = torch.randn(16, *shape, generator=generator)
        y = layer(x)
        loss = (y - 3.0 * torch.randn(y.shape, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()


def first_line(error: Exception) -> str:
    """The beginning of an error's message, as a note."""
    return str(error).strip().split("\n")[0][:160]


def certified(layer: nn.Module, case: Case, found: Stretch) -> dict[str, Any]:
    """Fastlip's lower and upper side for the layer, or those of its dense matrix, and the method."""
    if case.norms != (2.0, 2.0):
        return {"lower": found.attained, "upper": found.attained, "method": "dense matrix, closed form", "note": ""}
    generator = torch.Generator().manual_seed(0)
    plain = frozen(layer).float()
    note = ""
    if isinstance(plain, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
        try:
            report = fastlip.layer_norms(plain, case.shape, generator=generator, rtol=1e-3, strict=True)
            (interval,) = report.values()
            return {"lower": interval.lower, "upper": interval.upper, "method": f"layer_norms, {interval.method}"} | {
                "note": ""
            }
        except ValueError as refused:
            note = f"layer_norms refuses: {first_line(refused)}"
    try:
        upper = fastlip.lipschitz_bound(plain, case.shape, generator=generator, rtol=1e-3).upper
        return {"lower": found.attained, "upper": upper, "method": "lipschitz_bound", "note": note}
    except (ValueError, TypeError) as refused:
        note = note or f"lipschitz_bound refuses: {first_line(refused)}"
    dense = found.method == "dense matrix"
    return {
        "lower": found.attained,
        "upper": found.attained * (1.0 + 1e-12) if dense else math.nan,
        "method": "dense matrix" if dense else f"{found.method}, lower side only",
        "note": note,
    }


def measure(layer: nn.Module, case: Case, when: str) -> dict[str, Any]:
    """One row: what the layer attains, what is certified of it, and how that compares with the promise."""
    found = stretch(layer, case.shape, *case.norms)
    sides = certified(layer, case, found)
    # The float64 copy holds the very weights that were certified, but for roundings of float32 inside the layer.
    missed = found.method == "dense matrix" and found.attained < sides["lower"] * (1.0 - 1e-5)
    if missed or found.attained > sides["upper"] * (1.0 + 1e-5):
        sides["note"] = f"FASTLIP DISAGREES with the {found.method}; {sides['note']}"
    known = not math.isnan(case.promised)
    judged = verdict(found, case.promised, case.tolerance, case.orthogonal) if known else "nothing promised"
    return {
        "when": when, "promised": case.promised, "norms": f"{case.norms[0]:g} to {case.norms[1]:g}", **sides,
        "attained": found.attained, "pair": found.pair, "smallest": found.smallest, "how": found.method,
        "tolerance": case.tolerance, "verdict": judged,
    }  # fmt: skip


def rows_of(case: Case) -> list[dict[str, Any]]:
    """All rows of one layer; a single row with the reason if it cannot be built or run."""
    head = {"library": case.library, "version": importlib.metadata.version(case.library), "layer": case.layer}
    head |= {"arguments": case.arguments, "input": "x".join(map(str, case.shape))}
    rows: list[dict[str, Any]] = []

    def add(when: str, make: Callable[[], nn.Module]) -> nn.Module | None:
        try:
            layer = make()
            rows.append(head | measure(layer, case, when))
        except Exception as failed:  # whatever a library raises is the result
            note = f"{type(failed).__name__}: {first_line(failed)}"
            rows.append(head | {"when": when, "verdict": "does not run", "note": note})
            return None
        return layer

    def trained(rate: float) -> nn.Module:
        torch.manual_seed(0)
        layer = case.build()
        train(layer, case.shape, rate)
        if hasattr(layer, "buffer_weight"):  # BCOP's cache is no leaf and cannot be copied; it is made again
            layer.buffer_weight = None
        return layer

    torch.manual_seed(0)
    layer = add("initial", lambda: case.build().eval())
    if layer is not None and any(p.requires_grad for p in layer.parameters()):
        add("trained, 0.3", lambda: trained(0.3))
        layer = add("trained, 0.01", lambda: trained(0.01))
    if layer is not None and case.export is not None:
        add("exported", lambda: case.export(layer))
    return [row | {"stated": case.stated} for row in rows]


COLUMNS = (
    "library", "version", "layer", "arguments", "input", "when", "promised", "norms", "lower", "upper", "method",
    "attained", "pair", "how", "smallest", "tolerance", "verdict", "stated", "note",
)  # fmt: skip


def summary(rows: list[dict[str, str]]) -> str:
    """The results file as Markdown: counts for each library, and the worst row of each layer that exceeds.

    "certified" counts the rows whose certified upper side keeps the promise, tolerance included.
    """
    lines = [
        "# What published 1-Lipschitz and orthogonal layers really are", "",
        "Made by `python benchmarks/bench_published_layers.py` from `published_layers.csv`; do not edit.", "",
        "Where it holds or is loose, no pair of inputs was found that exceeds the promise; where a certified upper",
        "bound keeps to the promise too, the row counts under \"certified\".", "",
    ]  # fmt: skip
    verdicts = ("holds", "loose", "below", "exceeds", "not finite", "nothing promised", "does not run")
    lines += [f"| library | version | rows | {' | '.join(verdicts)} | certified |", "|---" * (len(verdicts) + 4) + "|"]
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library]
        counts = [sum(row["verdict"].startswith(v) for row in own) for v in verdicts]
        counts.append(sum(_certified(row) for row in own))
        lines.append(f"| {library} | {own[0]['version']} | {len(own)} | {' | '.join(map(str, counts))} |")
    lines += [
        "", "Layers that exceed their promise, attained by a pair of inputs, the worst row of each:", "",
        "| library | layer | arguments | when | promised | attained | norms | exceeding rows |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    exceeding = [row for row in rows if row["verdict"].startswith("exceeds")]
    for name in dict.fromkeys((row["library"], row["layer"]) for row in exceeding):
        own = [row for row in exceeding if (row["library"], row["layer"]) == name]
        worst = max(own, key=lambda row: _attained(row) / float(row["promised"]))
        total = sum((row["library"], row["layer"]) == name for row in rows)
        cells = [*name, worst["arguments"], worst["when"], worst["promised"], f"{_attained(worst):.4g}", worst["norms"]]
        lines.append(f"| {' | '.join(cells)} | {len(own)} of {total} |")
    return "\n".join(lines) + "\n"


def _attained(row: dict[str, str]) -> float:
    return min(float(row["attained"]), float(row["pair"]))


def _certified(row: dict[str, str]) -> bool:
    if not row["verdict"].startswith(("holds", "loose", "below")):
        return False
    return float(row["upper"]) <= float(row["promised"]) * (1.0 + float(row["tolerance"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=list(LIBRARIES), nargs="*", default=list(LIBRARIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shared = {"torch": torch.__version__, "fastlip": fastlip.__version__}
    results = Results(args.out / "published_layers.csv", shared, digits=6)
    for library in args.library:
        try:
            importlib.metadata.version(library)
            cases = list(LIBRARIES[library]())
        except ImportError as missing:
            print(f"{library}: left out, {missing} (pip install {library})", flush=True)
            continue
        for case in cases:
            for row in rows_of(case):
                results.add({c: row.get(c, "") for c in COLUMNS})
                name = f"{library:<18} {case.layer:<28} {case.arguments[:60]:<60} {row['when']:<13}"
                print(f"{name} {row.get('attained', math.nan):>8.5f} {row['verdict']} {row['note'][:60]}", flush=True)
    with results.path.open(newline="") as f:
        (args.out / "published_layers.md").write_text(summary(list(csv.DictReader(f))))
    wrong = [row for row in results.rows if row["note"].startswith("FASTLIP")]
    if wrong:
        raise SystemExit(f"fastlip and the layers themselves disagree: {wrong}")


if __name__ == "__main__":
    main()

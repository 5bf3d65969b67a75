"""Colours and line styles of arms are told apart by everyone, on white and on black."""

from itertools import combinations

import numpy as np
import pytest

from fastlip.study.report.arms import PALETTE, arms_of
from fastlip.study.settings.training import ARMS

#: What reds, greens and blues become for protanopes and deuteranopes, in linear RGB: Machado, Oliveira and Fernandes,
#: "A physiologically-based model for simulation of color vision deficiency" (2009), severity 1.0.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}

#: The least CIEDE2000 between two arms; about 1 is just noticeable side by side.
APART = 11.0

#: Linear sRGB to XYZ under D65.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour):
    """Linear RGB of a colour such as "#c2510a"."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB."""
    x = XYZ @ rgb / XYZ.sum(1)
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one, two):
    """CIEDE2000 between two colours in CIELAB (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = one, two
    c = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    a1, a2 = (a * (1.5 - 0.5 * np.sqrt(c**7 / (c**7 + 25.0**7))) for a in (a1, a2))
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    h = (h1 + turn / 2) % 360
    t = 1 - 0.17 * cosine(h - 30) + 0.24 * cosine(2 * h) + 0.32 * cosine(3 * h + 6) - 0.2 * cosine(4 * h - 63)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = (
        -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((h - 275) / 25) ** 2))))
    )
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


def cosine(degrees):
    return np.cos(np.radians(degrees))


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [  # from the published test data of Sharma, Wu and Dalal
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ],
)
def test_the_difference_is_ciede2000(one, two, difference):
    assert ciede2000(one, two) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("background", ["white", "black"])
def test_any_two_colours_are_told_apart(background, vision):
    seen = [lab(np.clip(VISIONS[vision] @ linear(pair[background == "black"]), 0, 1)) for pair in PALETTE]
    assert len(seen) >= 7
    assert min(ciede2000(one, two) for one, two in combinations(seen, 2)) >= APART


def test_every_colour_stands_out_from_its_background():
    for colours, backgrounds in zip(
        zip(*PALETTE, strict=True), (("#ffffff", "#f6f8fa"), ("#0d1117", "#161b22")), strict=True
    ):
        for colour in colours:
            for background in backgrounds:
                darker, lighter = sorted(float(XYZ[1] @ linear(c)) for c in (colour, background))
                assert (lighter + 0.05) / (darker + 0.05) >= 3, "WCAG 2.1 asks for 3:1 of graphics"


def test_no_two_arms_have_one_colour_and_one_line_style(synthetic):
    trained = ARMS
    for names in (trained, tuple(f"checkpoint {i}" for i in range(40)), ("scratch", "x", "y", "z")):
        arms = arms_of(synthetic(0, names).results())
        assert len({(arm.colour, str(arm.dashes)) for arm in arms}) == len(names)
        some = [arm.colour for arm in arms[: len(PALETTE)]]
        assert len(set(some)) == len(some)


def test_an_arm_keeps_its_colour_whatever_is_beside_it(synthetic):
    alone = arms_of(synthetic(0, ("finetune",)).results())[0]
    beside = arms_of(synthetic(0, ("softmax", "scratch", "finetune")).results())[2]
    assert (alone.colour, alone.dashes, alone.marker) == (beside.colour, beside.dashes, beside.marker)
    # Reports of earlier runs are drawn as they were: an arm that is added takes no other arm's place.
    earlier = ("scratch", "finetune", "softmax", "mlp", "convnet", "resnet18", "disjoint", "matched", "linear")
    assert [arm.place for arm in arms_of(synthetic(0, earlier).results())] == list(range(len(earlier)))

"""Text for numbers, intervals, attacks and balls."""

import math
from collections.abc import Sequence

import numpy as np

from fastlip.study.storage.schema import AttackSummary, Estimate, Proportion, Results, Smallest


def title_prefix(results: Results) -> str:
    """The beginning of a title, which says what the images are."""
    return f"{'GENERATED IMAGES. ' if results['generated'] else ''}{results['dataset']}"


def brackets(results: Results) -> str:
    return f"Brackets: {100 * results['models'][0]['clean']['confidence']:g}% intervals."


def attack_name(attack: AttackSummary) -> str:
    if attack["norm"] is None:
        return f"Gaussian σ = {attack['strength']:g}"
    return f"PGD {ball_name(attack['norm'], attack['strength'])}"


def percent(p: Proportion) -> str:
    if p["value"] is None:
        return "none (n = 0)"
    return f"{p['value']:.1%} [{p['low']:.1%}, {p['high']:.1%}] (n = {p['n']})"


def share(value: float | None) -> str:
    """A share in per cent without decimals; a dash where it does not exist."""
    return "–" if value is None else f"{value:.0%}"


def distortion(estimate: Estimate) -> str:
    """A distortion, scaled to pixel values from 0 to 255, with its interval."""
    return interval(estimate, 255.0)


def factor(estimate: Estimate) -> str:
    """The factor whose natural logarithm ``estimate`` is, as in "× 1.23 [1.10, 1.38] (n = 96)"."""
    times = Estimate(
        n=estimate["n"],
        value=_exp(estimate["value"]),
        low=_exp(estimate["low"]),
        high=_exp(estimate["high"]),
        confidence=estimate["confidence"],
    )
    text = interval(times)
    return text if estimate["value"] is None else f"× {text}"


def interval(estimate: Estimate, scale: float = 1.0) -> str:
    value, low, high = (estimate["value"], estimate["low"], estimate["high"])
    if value is None:
        return f"does not exist (n = {estimate['n']})"
    limits = "" if low is None and high is None else f"[{number(low, scale)}, {number(high, scale)}] "
    return f"{number(value, scale)} {limits}(n = {estimate['n']})"


def number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits; a dash stands for a censored or missing value."""
    if value is None:
        return "–"
    value *= scale
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 6 and abs(value) < 1e7 else f"{value:.2e}"


def span(values: Sequence[float]) -> str:
    """The least and the largest of several numbers, as in "0.86–1.76"; a dash where there are none."""
    if not len(values):
        return "–"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}–{high}"


def stretch_at_logits(several: Sequence[Smallest | AttackSummary]) -> str:
    """Mean and largest stretch at the logits; over several models, the mean of means and the largest of all."""
    means = [s["stretch"]["mean"]["value"] for s in several]
    largest = [s["stretch"]["largest"] for s in several]
    known = [v for v in means if v is not None]
    mean = sum(known) / len(known) if known and len(known) == len(means) else None
    return f"{number(mean)}, largest {number(max((v for v in largest if v is not None), default=None))}"


def stretch_at_features(several: Sequence[Smallest | AttackSummary]) -> str:
    """The stretch up to the feature maps: least to largest mean among the depths, and the largest of all."""
    depths = [s["depth"] for s in several]
    if any(len(d["mean"]) != len(depths[0]["mean"]) for d in depths) or not depths[0]["mean"]:
        return "–"
    means = np.mean([d["mean"] for d in depths], 0).tolist()
    return f"{span(means)}, largest {number(max(v for d in depths for v in d['largest']))}"


def power(log10: float) -> str:
    """10^log10, rounded up in its last digit."""
    exponent = math.floor(log10)
    if -3 <= exponent < 4:
        return f"{math.ceil(10**log10 * 10 ** (2 - exponent)) / 10 ** (2 - exponent):g}"
    mantissa = math.ceil(10 ** (log10 - exponent) * 100) / 100
    return f"{mantissa:.2f}e{exponent:+d}"


def confidence(value: float) -> str:
    """The confidence by the probability of error, which is rounded up, as in "1 − 2e-07"."""
    if value == 1.0:
        return "1"
    risk = 1 - value
    digit = 10.0 ** math.floor(math.log10(risk))
    # 1 - value has a rounding error, which must not become a whole digit.
    return f"1 − {math.ceil(risk / digit - 1e-6) * digit:.0e}"


def count(value: int) -> str:
    """A number of things, as in "30,730" and "23.5 million"."""
    return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:.3g} million"


def ball_name(norm: str, eps: float) -> str:
    return f"L∞ ε = {eps * 255:g}/255" if norm == "linf" else f"{norm.upper()} ε = {eps:g}"


def _exp(value: float | None) -> float | None:
    """exp(value), infinite where it would overflow."""
    if value is None:
        return None
    return math.exp(value) if value < 700 else math.inf

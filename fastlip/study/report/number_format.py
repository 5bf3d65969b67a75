"""Text for numbers, intervals, attacks and balls."""

import math

from fastlip.study.storage.schema import AttackSummary, Estimate, Proportion, Results


def title_prefix(results: Results) -> str:
    """The beginning of a title, which says what the images are."""
    return f"{'GENERATED IMAGES. ' if results['generated'] else ''}{results['dataset']}"


def brackets(results: Results) -> str:
    return f"Brackets: {100 * results['models'][0]['clean']['confidence']:g}% intervals."


def attack_name(attack: AttackSummary) -> str:
    if attack["norm"] is None:
        return f"Gaussian σ = {attack['strength']:g}"
    if attack["norm"] == "linf":
        return f"PGD L∞ ε = {attack['strength'] * 255:g}/255"
    return f"PGD {attack['norm'].upper()} ε = {attack['strength']:g}"


def percent(p: Proportion) -> str:
    if p["value"] is None:
        return "none (n = 0)"
    return f"{p['value']:.1%} [{p['low']:.1%}, {p['high']:.1%}] (n = {p['n']})"


def distortion(estimate: Estimate) -> str:
    """A distortion, scaled to pixel values from 0 to 255, with its interval."""
    return interval(estimate, 255.0)


def interval(estimate: Estimate, scale: float = 1.0) -> str:
    value, low, high = (estimate["value"], estimate["low"], estimate["high"])
    if value is None:
        return f"does not exist (n = {estimate['n']})"
    if low is None or high is None:
        limits = f"[{number(low, scale)}, {number(high, scale)}] " if (low, high) != (None, None) else ""
        return f"{number(value, scale)} {limits}(n = {estimate['n']})"
    return f"{number(value, scale)} [{number(low, scale)}, {number(high, scale)}] (n = {estimate['n']})"


def number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits; a dash stands for a censored or missing value."""
    if value is None:
        return "–"
    value *= scale
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"


def power(log10: float) -> str:
    """10^log10, rounded up in its last digit."""
    exponent = math.floor(log10)
    if 0 <= exponent < 4:
        return f"{math.ceil(10**log10 * 10 ** (2 - exponent)) / 10 ** (2 - exponent):g}"
    mantissa = math.ceil(10 ** (log10 - exponent) * 100) / 100
    return f"{mantissa:.2f}e{exponent:+d}"


def confidence(value: float) -> str:
    return "1" if value == 1.0 else f"1 − {1 - value:.0e}"


def ball_name(norm: str, eps: float) -> str:
    return f"L∞ ε = {eps * 255:g}/255" if norm == "linf" else f"{norm.upper()} ε = {eps:g}"

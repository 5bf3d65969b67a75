"""Measures (accuracy, distortion, observed stretch) and their confidence intervals."""

from fastlip.metrics._accuracy import accuracy
from fastlip.metrics._distortion import average_distortion
from fastlip.metrics._flat_boundary import flat_boundary_ratio
from fastlip.metrics._intervals import (
    CensoredMedian,
    Interval,
    Rate,
    censored_median,
    clopper_pearson,
    paired_bootstrap,
)
from fastlip.metrics._stretch import layer_outputs, layer_stretch, observed_stretch

__all__ = [
    "CensoredMedian",
    "Interval",
    "Rate",
    "accuracy",
    "average_distortion",
    "censored_median",
    "clopper_pearson",
    "flat_boundary_ratio",
    "layer_outputs",
    "layer_stretch",
    "observed_stretch",
    "paired_bootstrap",
]

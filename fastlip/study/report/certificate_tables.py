"""Tables of Lipschitz constants and of certified radii."""

from fastlip.study.report.arms import title
from fastlip.study.report.number_format import brackets, confidence, interval, number, percent, power, title_prefix
from fastlip.study.report.tables import Table
from fastlip.study.storage.schema import Results


def lipschitz_table(results: Results) -> Table:
    """Certified and observed Lipschitz constants."""
    rows = []
    for model in results["models"]:
        bound = model["lipschitz"]
        rows.append(
            (
                title(model),
                power(bound["log10_upper"]),
                confidence(bound["confidence"]),
                "0" if bound["log10_layer_product"] is None else power(bound["log10_layer_product"]),
                number(model["largest_stretch"]),
                number(model["smallest_pgd"]["stretch"]["mean"]["value"]),
                number(model["smallest_gaussian"]["stretch"]["mean"]["value"]),
                f"{interval(model['jacobian']['mean'])}, {number(model['jacobian']['largest'])}",
            )
        )
    return Table(
        "lipschitz",
        f"{title_prefix(results)}: Lipschitz constants",
        (
            "Model",
            "Certified Upper Constant",
            "Confidence",
            "Product of Layer Norms",
            "Largest Observed Stretch",
            "Mean Stretch, Smallest PGD",
            "Mean Stretch, Smallest Gaussian",
            "Jacobian Norm at Images: Mean, Largest",
        ),
        tuple(rows),
        "The true constant lies between the largest observed stretch and the certified upper constant. The product of "
        "the layers' upper norms leaves out pooling and residual sums, so it bounds nothing by itself. Norms of the "
        f"Jacobian of the logits are from below. {brackets(results)}",
    )


_SMOOTH = (
    "From margins: the clean margin over the certified bound on the difference of two logits. Smoothed: the share of "
    "images whose class under Gaussian noise is right and certified within the radius (Cohen et al. 2019), each "
    "certificate wrong with probability at most α. It speaks about the smoothed classifier."
)


def certificate_table(results: Results) -> Table:
    rows = []
    for model in results["models"]:
        log10 = model["margins"]["log10_radius"]
        radius = "none" if log10 is None else f"median radius 10^{log10:.1f}"
        rows += [
            (title(model), f"margin over bound ({radius})", f"{c['radius']:g}", percent(c["accuracy"]))
            for c in model["margins"]["certified"]
        ]
        s = model["smoothing"]
        how = f"smoothed, σ = {s['sigma']:g}, {s['samples']} draws, α = {s['alpha']:g}"
        rows += [(title(model), how, f"{c['radius']:g}", percent(c["accuracy"])) for c in s["certified"]]
    header = ("Model", "Certificate", "L2 Radius", "Certified Accuracy")
    return Table(
        "certificates",
        f"{title_prefix(results)}: certified accuracy",
        header,
        tuple(rows),
        f"{_SMOOTH} {brackets(results)}",
        keys=2,
    )

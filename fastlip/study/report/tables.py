"""Tables of a run: Markdown, LaTeX and CSV from the same rows."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from fastlip.study.storage.files import write_text
from fastlip.study.storage.schema import Attack, Estimate, Rate, Results

ARM_NAMES = {
    "scratch": "scratch",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
    "reference": "small reference, scratch",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        name: stem of its files.
        title: what it shows.
        header: names of the columns.
        rows: cells.
        notes: what a reader must know beside it.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: str

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n\n{self.notes}\n"

    def latex(self) -> str:
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.header, *self.rows)]
        return "\n".join(
            [
                f"% {self.title}",
                r"\begin{tabular}{" + "l" * len(self.header) + "}",
                r"\hline",
                lines[0],
                r"\hline",
                *lines[1:],
                r"\hline",
                r"\end{tabular}",
                *(f"% {line}" for line in self.notes.splitlines()),
                "",
            ]
        )

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return out.getvalue()


def write(folder: Path, tables: list[Table]) -> None:
    for table in tables:
        write_text(folder / f"{table.name}.md", table.markdown())
        write_text(folder / f"{table.name}.tex", table.latex())
        write_text(folder / f"{table.name}.csv", table.csv())


def all_tables(results: Results) -> list[Table]:
    return [seed_table(results), attack_table(results), lipschitz_table(results)]


def of(results: Results) -> str:
    """What a title begins with: whose images these are."""
    return f"{'GENERATED IMAGES. ' if results['generated'] else ''}{results['dataset']}"


def brackets(results: Results) -> str:
    return f"Brackets: {100 * results['models'][0]['clean']['confidence']:g}% intervals."


def seed_table(results: Results) -> Table:
    """The table in the shape of the slide deck behind this project, ours first and the deck's rows below."""
    rows = []
    for model in results["models"]:
        who = f"{model['architecture']}, {ARM_NAMES[model['arm']]} (seed {model['seed']})"
        bound = model["lipschitz"]
        upper = f"{power(bound['log10_upper'])} (confidence {confidence(bound['confidence'])})"
        for name, smallest in (("Gaussian", model["smallest_gaussian"]), ("PGD", model["smallest_pgd"])):
            rows.append((who, name, distortion(smallest["mean"]), upper, percent(model["clean"])))
    for deck in results["seed_deck"]:
        rows.append(
            (
                f"{deck['model']} (seed deck)",
                deck["attack"],
                f"{deck['average_distortion']:.2f} (n = {deck['clean_accuracy']['n']})",
                f"{deck['upper_lipschitz_constant']:.2f}",
                percent(deck["clean_accuracy"]),
            )
        )
    return Table(
        "seed",
        f"{of(results)}: smallest perturbations, certified constants, clean accuracy",
        ("Model", "Attack", "Average Distortion", "Upper Lipschitz Constant", "Clean Accuracy"),
        tuple(rows),
        "Average distortion: mean over images of √(Σ(x′−x)²/n) × 255 for the smallest perturbation found that changes "
        "the decision (L2 search by PGD; search over σ along drawn Gaussian directions), over images classified "
        "correctly on which one was found. Upper Lipschitz constant: certified L2 bound of the whole network, the "
        f"same for both attacks. {brackets(results)} The seed deck states neither the scale of its distortions "
        "nor what its constants bound; they are shown for reference alone.",
    )


def attack_table(results: Results) -> Table:
    """Accuracy, distortion and stretch at each fixed strength."""
    rows = [
        (
            model["name"],
            attack_name(attack),
            percent(attack["accuracy"]),
            distortion(attack["distortion"]),
            number(attack["stretch"]["mean"]["value"]),
            number(attack["stretch"]["largest"]),
        )
        for model in results["models"]
        for attack in model["attacks"]
    ]
    return Table(
        "attacks",
        f"{of(results)}: attacks at fixed strength",
        ("Model", "Attack", "Accuracy", "Average Distortion", "Mean Stretch", "Largest Stretch"),
        tuple(rows),
        "Accuracy over all attacked images; distortion (× 255) and stretch at the logits over those classified "
        "correctly when clean. PGD stops at the first iterate that is misclassified, so its distortion can stay below "
        f"its budget. {brackets(results)}",
    )


def lipschitz_table(results: Results) -> Table:
    """Certified and observed constants side by side."""
    rows = []
    for model in results["models"]:
        bound = model["lipschitz"]
        rows.append(
            (
                model["name"],
                power(bound["log10_upper"]),
                confidence(bound["confidence"]),
                power(bound["log10_layer_product"]),
                number(model["largest_stretch"]),
                number(model["smallest_pgd"]["stretch"]["mean"]["value"]),
                number(model["smallest_gaussian"]["stretch"]["mean"]["value"]),
                f"{interval(model['jacobian']['mean'])}, {number(model['jacobian']['largest'])}",
            )
        )
    return Table(
        "lipschitz",
        f"{of(results)}: Lipschitz constants",
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


def attack_name(attack: Attack) -> str:
    if attack["norm"] is None:
        return f"Gaussian σ = {attack['strength']:g}"
    if attack["norm"] == "linf":
        return f"PGD L∞ ε = {attack['strength'] * 255:g}/255"
    return f"PGD {attack['norm'].upper()} ε = {attack['strength']:g}"


def percent(rate: Rate) -> str:
    if rate["value"] is None:
        return "none (n = 0)"
    return f"{rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}] (n = {rate['n']})"


def distortion(estimate: Estimate) -> str:
    """A distortion in units of pixel values from 0 to 255."""
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
    """Three significant digits; an infinite (censored) or missing value is a dash."""
    if value is None:
        return "–"
    value *= scale
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.2e}"


def power(log10: float) -> str:
    """10^log10, rounded upwards in its last digit."""
    exponent = math.floor(log10)
    if 0 <= exponent < 4:
        return f"{math.ceil(10**log10 * 10 ** (2 - exponent)) / 10 ** (2 - exponent):g}"
    mantissa = math.ceil(10 ** (log10 - exponent) * 100) / 100
    return f"{mantissa:.2f}e{exponent:+d}"


def confidence(value: float) -> str:
    return "1" if value == 1.0 else f"1 − {1 - value:.0e}"


def _latex(cell: str) -> str:
    for old, new in (
        ("\\", r"\textbackslash{}"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("&", r"\&"),
        ("−", "$-$"),
        ("–", "--"),
        ("σ", r"$\sigma$"),
        ("ε", r"$\varepsilon$"),
        ("∞", r"$_\infty$"),
    ):
        cell = cell.replace(old, new)
    return cell

"""Figure of training: accuracy by epoch."""

from typing import Any

from fastlip.study.report.arms import arms_of
from fastlip.study.report.drawing import (
    Figure,
    Rows,
    band_in_words,
    counts_across,
    curves,
    draw_figure,
    shares_upward,
)
from fastlip.study.storage.schema import Results


def training_figure(results: Results) -> Figure | None:
    """Training accuracy by epoch; None where the study trained nothing."""
    rows: Rows = []
    trained = [arm for arm in arms_of(results) if all(m["training"] for m in arm.models)]
    if not trained:
        return None

    def draw(panels: Any) -> None:
        axes = panels[0, 0]
        for arm in trained:
            records = [m["training"] for m in arm.models if m["training"]]
            epochs = min(len(r["accuracy"]) for r in records)
            curves(axes, arm, range(1, epochs + 1), [r["accuracy"][:epochs] for r in records], marker=arm.marker)
            rows.extend(
                (m["name"], e, a, loss)
                for m, r in zip(arm.models, records, strict=True)
                for e, (a, loss) in enumerate(zip(r["accuracy"], r["loss"], strict=True), 1)
            )
        shares_upward(axes)
        counts_across(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training accuracy")

    caption = f"Accuracy on augmented training images by epoch.{band_in_words(results)}"
    return draw_figure(results, "training", caption, draw, rows, ("model", "epoch", "accuracy", "loss"))

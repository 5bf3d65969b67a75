"""Labels of the figures lie within them, and those along an axis do not run into each other."""

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fastlip.study.report import drawing, html_report
from fastlip.study.storage.run_directory import RunDirectory

QUICK = Path(__file__).parents[3] / "benchmarks" / "results" / "study" / "quick"


class Watched(drawing.Canvas):
    """A figure that keeps what is wrong with its labels once it has been drawn."""

    faults: list[str]

    def savefig(self, *arguments, **options):
        super().savefig(*arguments, **options)
        FigureCanvasAgg(self).draw()
        whole, across = self.get_window_extent(), []
        for axes in self.axes:
            for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
                box = text.get_window_extent()
                if text.get_text() and not (whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1):
                    self.faults.append(f"{text.get_text()} is cut off at a side")
                if text.get_text() and not (whole.y0 <= box.y0 and box.y1 <= whole.y1 + 1):
                    self.faults.append(f"{text.get_text()} is cut off above or below")
            low, high = sorted(axes.get_xlim())
            for tick in axes.xaxis.get_major_ticks():
                if tick.label1.get_visible() and tick.label1.get_text() and low <= tick.get_loc() <= high:
                    across.append(tick.label1)
        for one, other in combinations(across, 2):
            if one.get_window_extent().overlaps(other.get_window_extent()):
                self.faults.append(f"{one.get_text()} and {other.get_text()} overlap")


@pytest.fixture
def faults(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(Watched, "faults", found, raising=False)
    monkeypatch.setattr(drawing, "Canvas", Watched)
    return found


def test_labels_of_the_committed_run_fit(faults):
    run = RunDirectory(QUICK)
    results = run.read_results()
    html_report.all_figures(results, html_report._distortions(run, results))
    assert faults == []

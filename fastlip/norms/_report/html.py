"""A report of layer norms as one self-contained page."""

import math
from html import escape

from fastlip.norms._interval import confidence_text
from fastlip.norms._report.report import NormReport

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; }
p { margin: .3rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .6rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #999; }
.n { text-align: right; }
.d { color: #666; }
.bar { width: 9rem; }
.bar div { height: .7rem; background: #4c72b0; border-radius: 2px; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd; } th { background: #16181c; } th, td { border-color: #33363c; }
}
"""


def report_html(report: NormReport, title: str) -> str:
    """The page: what the report says in one line, then a row per layer with a bar for its upper side.

    Args:
        report: the norms.
        title: heading of the page.
    """
    finite = [i.upper for i in report.values() if 0.0 < i.upper < math.inf]
    longest = max(finite, default=1.0)
    rows = []
    for name, interval in report.items():
        share = min(100.0 * interval.upper / longest, 100.0)
        width = "exact" if interval.width < 1e-6 else f"{100 * interval.width:.2g}%"
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="d">{escape(report.descriptions[name])}</td>'
            f'<td class="n">{interval.lower:.5g}</td><td class="n"><b>{interval.upper:.5g}</b></td>'
            f'<td class="n">{width}</td><td class="bar"><div style="width:{share:.1f}%"></div></td>'
            f"<td>{escape(interval.method)}</td></tr>"
        )
    low, high = report.log10_product_lower, report.log10_product_upper
    summary = (
        f"{len(report)} layers; the product of their norms lies between 10<sup>{low:.3f}</sup> and "
        f"10<sup>{high:.3f}</sup>. All upper sides hold at once with confidence {confidence_text(report.confidence)}"
    )
    seed = "." if report.seed is None else f" (seed of the random starts {report.seed})."
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Operator norms of {escape(title)}</h1>\n<p>{summary}{seed}</p>\n"
        '<table><thead><tr><th>layer</th><th></th><th class="n">at least</th><th class="n">at most</th>'
        '<th class="n">width</th><th></th><th>method</th></tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table>"
        "</body></html>\n"
    )

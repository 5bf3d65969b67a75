"""A report of layer norms as one self-contained HTML page."""

import math

from fastlip.norms._interval import NormInterval, confidence_text, width_text
from fastlip.norms._report.report import NormReport


def report_html(report: NormReport, title: str) -> str:
    """The page: what the report says in one line, a row per layer with a bar for its upper side, and what is left out.

    Args:
        report: the norms.
        title: heading of the page.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ImportError('HTML reports need Jinja2: pip install "fastlip[study]"') from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlip.norms._report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    longest = max((i.upper for i in report.values() if 0.0 < i.upper < math.inf), default=1.0)

    def share(interval: NormInterval) -> float:
        return min(100.0 * interval.upper / longest, 100.0)

    environment.filters |= {"share": share, "width": width_text}
    return environment.get_template("report.html").render(
        report=report,
        title=title,
        confidence=confidence_text(report.confidence),
        low=report.log10_product_lower,
        high=report.log10_product_upper,
    )

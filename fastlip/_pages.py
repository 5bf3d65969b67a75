"""Results as HTML, by the templates in ``_templates``: a fragment for notebooks, or a self-contained page."""

from typing import Any


def fragment(name: str, **values: Any) -> str:
    """The template ``name`` with ``values``.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    return _render(name, values)


def page(name: str, title: str, **values: Any) -> str:
    """The template ``name`` with ``values`` as a page with this heading.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    return _render("page.html", values | {"name": name, "title": title})


def fragment_if_possible(name: str, **values: Any) -> str | None:
    """As :func:`fragment`; None, for which notebooks show the text, where Jinja2 is not installed."""
    try:
        return fragment(name, **values)
    except ImportError:
        return None


def _render(name: str, values: dict[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise ImportError('HTML reports need Jinja2: pip install "fastlip[study]"') from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlip", "_templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(values)

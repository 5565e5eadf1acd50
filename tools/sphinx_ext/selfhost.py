"""Add the book's style sheet, serve MathJax from the site itself, drop script tags that come twice."""

from __future__ import annotations

import os
from typing import Any


def _add(app: Any) -> None:
    # Appended here, after Jupyter Book has scanned: it would put every script of a static folder on every page.
    app.config.html_static_path.append(os.path.join(app.srcdir, "book", "_static"))
    app.add_css_file("book.css")
    vendor = os.environ.get("NBLIB_VENDOR")
    if vendor:
        app.config.html_static_path.append(vendor)
        app.config.mathjax_path = "vendor/mathjax/tex-chtml.js"


def _once(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Two script tags that differ only in an absent or empty name are the same one."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for script in context.get("script_files", []):
        key = (getattr(script, "filename", script) or "", tuple(sorted(getattr(script, "attributes", {}).items())))
        if key not in seen:
            seen.add(key)
            kept.append(script)
    context["script_files"] = kept


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", _add)
    app.connect("html-page-context", _once, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

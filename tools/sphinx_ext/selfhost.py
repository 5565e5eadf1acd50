"""Add the book's style sheet, serve MathJax and widgets from the site itself, mend what extensions write wrongly."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
# to_jshtml asks a public server for icons that the theme has, and names neither its picture nor its slider.
ICONS = re.compile(r"<link [^>]*font-awesome[^>]*>\s*")
ANIMATION = (
    (re.compile(r'<img id="(_anim_img\w+)"(?! alt)'), r'<img id="\1" alt="Animation: use the buttons below"'),
    (re.compile(r'<input id="(_anim_slider\w+)"(?! aria)'), r'<input id="\1" aria-label="Frame"'),
)

# What the extensions write wrongly, on every page: HTML that is not valid or that a screen reader cannot tell.
MENDS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r'(<summary) aria-label="Toggle hidden content"'), r"\1"),  # MyST-NB: not the text that is shown
    (re.compile(r"<summary>(?=<span class=\"toctree-toggle)"), '<summary aria-label="Pages of this part">'),  # theme
    (re.compile(r'(<i class="theme-switch [^>]*?) title="[^"]*"'), r"\1"),  # theme: three names for one button
    (re.compile(r'(<button class="btn search-button-field[^>]*?) aria-label="Search"'), r"\1"),  # theme: shows "Ctrl+K"
    (re.compile(r' role="doc-biblioentry"'), ' role="listitem"'),  # docutils: deprecated, and not what a list may hold
    (re.compile(r'class="proof admonition" id="proof"'), 'class="proof admonition nb-proof"'),  # sphinx-proof: many
    (re.compile(r' id="(?:proof|exercise|solution)-content"'), ""),  # sphinx-proof, sphinx-exercise: the same id again
    (  # Sphinx: a list of definitions without a term, for the parameters of a long signature
        re.compile(r'<dl>\n((?:<dd><em class="sig-param">.*</em>,?</dd>\n)+)</dl>'),
        lambda m: m[1].replace("<dd>", '<span class="nb-param">').replace("</dd>", "</span>"),
    ),
)


def _widgets(app: Any, config: Any) -> None:
    # Set before MyST-NB reads it, when the builder is made: instead of require.js and a manager from public servers.
    if os.environ.get("NBLIB_VENDOR"):
        config.nb_ipywidgets_js = {"widgets.js": {}, "vendor/html-manager/embed.js": {}}


def _add(app: Any) -> None:
    # Appended here, after Jupyter Book has scanned: it would put every script of a static folder on every page.
    app.config.html_static_path.append(os.path.join(app.srcdir, "book", "_static"))
    app.add_css_file("book.css")
    vendor = os.environ.get("NBLIB_VENDOR")
    if vendor:
        app.config.html_static_path += [vendor, os.path.join(HERE, "widgets.js")]
        app.config.mathjax_path = "vendor/mathjax/tex-chtml.js"


def _animations(app: Any, doctree: Any) -> None:
    from docutils import nodes

    for node in doctree.findall(nodes.raw):
        if node.get("format") == "html" and "_anim_" in node.astext():
            text = ICONS.sub("", node.astext())
            for pattern, named in ANIMATION:
                text = pattern.sub(named, text)
            node.children = [nodes.Text(text)]
            node.rawsource = text


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


def _mend(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            text = mended = path.read_text()
            for pattern, right in MENDS:
                mended = pattern.sub(right, mended)
            if mended != text:
                path.write_text(mended)


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", _widgets)
    app.connect("builder-inited", _add)
    app.connect("doctree-read", _animations)
    app.connect("html-page-context", _once, priority=900)
    app.connect("build-finished", _mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What ties the pages together: equations to code and back, neighbours with their promises, links to notebooks."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode

from tools import api, book

CLAIMS = ("thm", "prop", "lem", "cor", "def", "alg")


def cite_labels(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Labels of the book in a docstring become links."""

    def link(match: re.Match[str]) -> str:
        role = "eq" if match[0].startswith("eq-") else "prf:ref" if match[0].split("-")[0] in CLAIMS else "ref"
        return f":{role}:`{match[0]}`"

    lines[:] = [api.LABEL.sub(link, line) for line in lines]


def find_python_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A name in a signature or docstring: ours by its last part where that is unique, else plain text."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if not target.startswith("nblib"):
        objects = env.get_domain("py").objects
        ours = [name for name in objects if name.startswith("nblib.") and name.split(".")[-1] == target.split(".")[-1]]
        if "." in target or len(ours) != 1:
            return contnode
        target = ours[0]
    target = api.home(target)
    entry = env.get_domain("py").objects.get(target)
    if entry is None:
        return None if node["reftype"] == "obj" else contnode  # a link written by hand must lead somewhere
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, target)


def link_code(app: Any, doctree: Any, docname: str) -> None:
    """Below an equation or a theorem that the package implements, a small line names the functions."""
    if not docname.startswith("book/"):
        return
    objects = app.env.get_domain("py").objects
    for node in list(doctree.findall(nodes.Element)):
        label = node.get("label")
        if not isinstance(label, str) or label not in app.env.nb_symbols or node.tagname == "pending_xref":
            continue
        line = nodes.paragraph(classes=["nb-code"])
        for name in app.env.nb_symbols[label]:
            entry = objects.get(name)
            if entry is not None:
                text = nodes.literal(text=name)
                line += [nodes.Text(" "), make_refnode(app.builder, docname, entry.docname, entry.node_id, text, name)]
        if len(line):
            where = node.parent
            # A page shows each label once: the line goes below the block that carries it.
            where.insert(where.index(node) + 1, line)


def link_names(app: Any, doctree: Any, docname: str) -> None:
    """A public name of the package, set as code in the text of a chapter, leads to its page in the reference."""
    if docname.startswith("book/api/"):
        return
    objects = app.env.get_domain("py").objects
    for literal in list(doctree.findall(nodes.literal)):
        name = re.sub(r"\(.*", "", literal.astext())
        if isinstance(literal.parent, nodes.reference) or not re.fullmatch(r"[A-Za-z_][\w.]*\.\w+", name):
            continue
        target = api.home("nblib." + name.removeprefix("nblib.").removeprefix("nb."))
        ours = [target] if target in objects else [known for known in objects if known.endswith(f".{name}")]
        if len(ours) == 1:
            entry = objects[ours[0]]
            link = make_refnode(app.builder, docname, entry.docname, entry.node_id, literal.deepcopy(), ours[0])
            literal.replace_self(link)


def polish(app: Any, doctree: Any, docname: str) -> None:
    """Mark passed checks; keep a full stop on the line of its formula."""
    for block in doctree.findall(nodes.literal_block):
        if block.astext().startswith("✓ "):
            block["classes"].append("nb-check")
    for formula in list(doctree.findall(nodes.math)):
        after = formula.next_node(siblings=True, descend=False)
        if isinstance(after, nodes.Text) and (mark := re.match(r"[.,;:!?)’]+", str(after))):
            parent = formula.parent
            at = parent.index(formula)
            parent[at : at + 2] = [
                nodes.inline("", "", formula, nodes.Text(mark[0]), classes=["nb-nowrap"]),
                nodes.Text(str(after)[mark.end() :]),
            ]


@functools.cache  # a page is the neighbour of two
def promise(app: Any, docname: str) -> str | None:
    """The sentence in italics below the title of a page."""
    doctree = app.env.get_doctree(docname)
    for title in doctree.findall(nodes.title):
        following = title.next_node(nodes.paragraph, siblings=True, descend=False)
        if following is not None and len(following) == 1 and isinstance(following[0], nodes.emphasis):
            return str(following.astext()).replace("\n", " ")
        break
    return None


# A table of eight columns or more scrolls sideways: by keyboard only if it can have the focus.
WIDE_TABLE = re.compile(
    r'<table class="table"(>\s*<thead>\s*<tr[^>]*>(?:(?!</tr>).)*?(?:<th\b(?:(?!</tr>).)*?){8})', flags=re.S
)


def page_context(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Promises of the neighbours; notebook buttons that lead to the copies made for readers."""
    context["body"] = WIDE_TABLE.sub(r'<table class="table" tabindex="0"\1', context.get("body", ""))
    relations = app.env.collect_relations().get(page, [None, None, None])
    context["promises"] = {
        context[side]["link"]: promise(app, target)
        for side, target in (("prev", relations[1]), ("next", relations[2]))
        if context.get(side) and target
    }
    chapter = page.removeprefix("book/")
    if Path(str(app.env.doc2path(page))).suffix != ".ipynb":
        return
    repository = context.get("theme_repository_url")
    up = "../" * page.count("/")
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                button["url"] = book.colab(repository, chapter)
            elif button.get("text") == ".ipynb":
                button["url"] = f"{up}notebooks/{chapter}.ipynb"


def collect_symbols(app: Any) -> None:
    app.env.nb_symbols = api.by_label()


def setup(app: Any) -> dict[str, bool]:
    app.config.templates_path.append(str(Path(__file__).parent / "templates"))
    app.connect("builder-inited", collect_symbols)
    app.connect("autodoc-process-docstring", cite_labels)
    app.connect("missing-reference", find_python_name)
    app.connect("doctree-resolved", link_code)
    app.connect("doctree-resolved", link_names)
    app.connect("doctree-resolved", polish)
    app.connect("html-page-context", page_context, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The coverage of the sources: what book/coverage.yml claims, whether it is so, and the index of methods made from it.

python -m tools.coverage
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from itertools import groupby
from typing import Any

import yaml

from tools import api, book

Entry = dict[str, Any]
FILE = book.ROOT / "book" / "coverage.yml"
FAMILIES = {
    "foundations": "Foundations",
    "vae": "Latent variables",
    "autoregressive": "Autoregressive models",
    "flows": "Flows",
    "energy": "Energy and score",
    "diffusion": "Diffusion",
    "flow_matching": "Flow matching",
    "gan": "Adversarial learning",
    "evaluation": "Evaluation",
}
IMPORTANCES = ("core", "standard", "mention-only")
# What an entry of each status must name, as alternatives of which one is enough. A planned one may name none of them.
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "planned": (),
    "mentioned": (),
    "derived": (("anchor",), ("check",)),
    "implemented": (("anchor",), ("check",), ("symbol",)),
    "demonstrated": (("symbol",), ("anchor", "check")),
    "reproduced": (("where",), ("anchor", "check")),
}
KEYS = ("id", "name", "family", "chapter", "importance", "status")
EVIDENCE = ("anchor", "symbol", "check", "where")
ID = re.compile(r"(?:2[0-6]|N\d\d|S\d\d)-\d\d\d?")
ROLES = {
    "prf:ref": re.compile(r"\{prf:\w+\}[^\n]*\n:label: (\S+)$", flags=re.M),
    "eq": re.compile(r"\$\$ \(([\w-]+)\)"),
    "ref": re.compile(r"\{exercise\}[^\n]*\n:label: (\S+)$|^\(([\w-]+)\)=$", flags=re.M),
}
CHECK = re.compile(r"nb\.check\w*\(\s*f?[\"']([\w-]+)[\"']")


def load() -> list[Entry]:
    """The entries, in the order of the file, which is that of the book."""
    entries: list[Entry] = yaml.load(FILE.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return entries


def chapters() -> list[str]:
    """The pages under book/ that are in the table of contents, as an entry names them."""
    return [page.removeprefix("book/") for page in book.pages() if page.startswith("book/")]


def _source(chapter: str) -> tuple[str, str]:
    """The Markdown and the code of a page."""
    if not book.source(chapter).is_file():
        path = book.ROOT / "book" / f"{chapter}.md"
        return path.read_text() if path.is_file() else "", ""
    cells = json.loads(book.source(chapter).read_text())["cells"]
    prose, code = (
        "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)
        for kind in ("markdown", "code")
    )
    return prose, code


def roles(chapter: str) -> dict[str, str]:
    """The labels of a page, each with the role that refers to it."""
    prose = _source(chapter)[0]
    return {
        next(filter(None, match.groups())): role for role, pattern in ROLES.items() for match in pattern.finditer(prose)
    }


def labels(chapter: str) -> set[str]:
    return set(roles(chapter))


def checks(chapter: str) -> set[str]:
    """The labels that the code of a page passes to ``nb.check`` and its kin."""
    return set(CHECK.findall(_source(chapter)[1]))


def _symbol(path: str) -> str:
    """Why a dotted name is no public symbol of nblib; empty where it is one."""
    first, *rest = path.split(".")
    if first != "nblib" or not rest or any(part.startswith("_") for part in rest):
        return "is not a public name of nblib"
    thing: Any = importlib.import_module("nblib")
    for depth, part in enumerate(rest, 2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            try:
                thing = importlib.import_module(".".join(path.split(".")[:depth]))
            except ImportError:
                return "cannot be imported"
    return "" if getattr(thing, "__doc__", None) else "has no docstring, so that the reference leaves it out"


def _fields(entry: Entry) -> list[str]:
    """What is wrong with an entry, whatever the book may hold."""
    if missing := [key for key in KEYS if not entry.get(key)]:
        return [f"lacks {', '.join(missing)}"]
    found = [f"has the unknown key {key}" for key in entry if key not in KEYS + EVIDENCE]
    found += [f"has the empty key {key}" for key in EVIDENCE if key in entry and not entry[key]]
    if not isinstance(entry["id"], list):
        found.append("has an id that is no list")
    else:
        found += [f"has the malformed id {name}" for name in entry["id"] if not ID.fullmatch(str(name))]
    if entry["family"] not in FAMILIES:
        found.append(f"has the unknown family {entry['family']}")
    if entry["chapter"].split("/")[0] != entry["family"]:
        found.append(f"is of family {entry['family']}, its chapter {entry['chapter']} is not")
    if entry["importance"] not in IMPORTANCES:
        found.append(f"has the unknown importance {entry['importance']}")
    if entry["status"] not in REQUIRED:
        return [*found, f"has the unknown status {entry['status']}"]
    if entry["status"] == "planned":
        return [*found, *(f"is planned, and names its {key}" for key in EVIDENCE if key in entry)]
    for either in REQUIRED[entry["status"]]:
        if not any(entry.get(key) for key in either):
            found.append(f"is {entry['status']}, and names no {' or '.join(either)}")
    return found


def problems(entries: list[Entry] | None = None) -> list[str]:
    """Where the file is malformed, says something twice, or claims more than the book and the package hold."""
    entries = load() if entries is None else entries
    found = []
    known = set(chapters())
    pages = {str(entry.get("chapter")) for entry in entries if entry.get("status") != "planned"} & known
    label_of = {page: labels(page) for page in pages}
    checked = {page: checks(page) for page in pages}
    for entry in entries:
        title = f"{entry.get('id')} {entry.get('name')}"
        wrong = _fields(entry)
        if not wrong and entry["status"] != "planned":
            page, anchor, check, symbol = (entry.get(key) for key in ("chapter", "anchor", "check", "symbol"))
            if page not in known:
                wrong.append(f"is {entry['status']} in {page}, which is not in the table of contents")
            else:
                if anchor and anchor not in label_of[page]:
                    wrong.append(f"names the anchor {anchor}, which {page} does not have")
                if check and check not in checked[page]:
                    wrong.append(f"names the check {check}, which {page} does not call")
            if symbol and (reason := _symbol(symbol)):
                wrong.append(f"names the symbol {symbol}, which {reason}")
        found += [f"{title}: {what}" for what in wrong]
    ids = Counter(name for entry in entries for name in entry.get("id") or [])
    found += [f"{name} is in {count} entries" for name, count in ids.items() if count > 1]
    names = Counter((entry.get("chapter"), str(entry.get("name")).casefold()) for entry in entries)
    found += [f"{page} has {count} entries of the name {name}" for (page, name), count in names.items() if count > 1]
    return found


# --- what is done ----------------------------------------------------------------------------------------


def done(entry: Entry) -> bool:
    return bool(entry["status"] != "planned")


def totals(entries: list[Entry]) -> dict[str, list[tuple[int, int]]]:
    """By family, and for ``all``: done and total of each importance, and of all of them."""
    found = {}
    for family in (*FAMILIES, "all"):
        own = [entry for entry in entries if family in ("all", entry["family"])]
        columns = [[entry for entry in own if entry["importance"] == level] for level in IMPORTANCES]
        found[family] = [(sum(map(done, column)), len(column)) for column in (*columns, own)]
    return found


def table(entries: list[Entry]) -> str:
    """The totals, for a terminal."""
    lines = [f"{'done / total':16}" + "".join(f"{name:>15}" for name in (*IMPORTANCES, "all"))]
    for family, row in totals(entries).items():
        lines.append(f"{family:16}" + "".join(f"{f'{some} / {every}':>15}" for some, every in row))
    return "\n".join(lines)


# --- the index of methods --------------------------------------------------------------------------------


def _name(entry: Entry) -> str:
    return f"**{entry['name']}**" if entry["importance"] == "core" else str(entry["name"])


def _line(entry: Entry, role: dict[str, str]) -> str:
    """What the book has of an entry: its name, where it stands, its symbol, how far it goes, its ids."""
    parts = [_name(entry)]
    label = entry.get("anchor") or entry.get("check")
    if label in role:
        parts.append(f"{{{role[label]}}}`{label}`")
    if symbol := entry.get("symbol"):
        parts.append(f"{{py:obj}}`{symbol.removeprefix('nblib.')} <{api.home(symbol)}>`")
    parts.append(entry["status"] + (f" ({entry['where']})" if "where" in entry else ""))
    return f'- {", ".join(parts)} <span class="nb-ids">{", ".join(entry["id"])}</span>'


def _planned(entries: list[Entry]) -> list[str]:
    """A folded list of what is planned, a line for each chapter."""
    lines = [f"::::{{dropdown}} Planned: {len(entries)}", ""]
    for chapter, group in groupby(entries, key=lambda entry: str(entry["chapter"])):
        lines.append(f"- *{chapter.split('/')[1].replace('-', ' ')}*: {'; '.join(map(_name, group))}")
    return [*lines, "", "::::"]


def methods_page() -> str:
    """The index of methods as Markdown: the totals, then by family what the book has and, folded, what is planned.

    The names of core entries are bold.
    """
    entries = load()
    lines = [f"| done / total | {' | '.join((*IMPORTANCES, 'all'))} |", "| --- |" + " ---: |" * 4]
    for family, row in totals(entries).items():
        title = FAMILIES.get(family, "**All**")
        lines.append(f"| {title} | {' | '.join(f'{some}/{every}' for some, every in row)} |")
    for family, title in FAMILIES.items():
        own = [entry for entry in entries if entry["family"] == family]
        lines += ["", f"## {title}"]
        for chapter, group in groupby(filter(done, own), key=lambda entry: str(entry["chapter"])):
            role = roles(chapter)
            lines += ["", f"*In* {{doc}}`/book/{chapter}`:", "", *(_line(entry, role) for entry in group)]
        if planned := [entry for entry in own if not done(entry)]:
            lines += ["", *_planned(planned)]
    return "\n".join(lines)


def main() -> None:
    found = problems()
    print(table(load()))
    if found:
        sys.exit("\n".join(["", "Problems:", *found]))


if __name__ == "__main__":
    main()

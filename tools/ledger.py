"""The ledger: every claim of the book with its checks, their tolerance and what was measured.

python -m tools.ledger --profile cpu
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from typing import Any, NamedTuple

from tools import api, book

CHECKS = ("check", "check_mc", "check_bound", "check_erratum")


def _name(node: ast.expr) -> str:
    """``check`` of ``nb.check`` and of ``check``; empty for what has no name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _expects_failure(item: ast.withitem) -> bool:
    call = item.context_expr
    if not (isinstance(call, ast.Call) and _name(call.func) == "raises" and call.args):
        return False
    return _name(call.args[0]) == "CheckFailed"


def broken_variants() -> dict[str, str]:
    """The labels of which a test shows that a broken variant is caught, with the place of the first such check.

    Counted are checks with a literal label inside ``with pytest.raises(CheckFailed, ...)`` in a test function, and
    calls with a literal label of a function of the same file that does this with its first parameter.
    """
    found: dict[str, str] = {}
    for path in sorted((book.ROOT / "tests").rglob("test_*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        tests = [f for f in functions if f.name.startswith("test_")]
        helpers = {f.name for f in functions if f.args.args and f.args.args[0].arg in map(_label, _caught(f))}
        calls = [call for test in tests for call in _caught(test)]
        calls += [call for test in tests for call in _calls(test) if _name(call.func) in helpers]
        for call in sorted(calls, key=lambda node: node.lineno):
            if isinstance(call.args[0], ast.Constant):
                found.setdefault(str(_label(call)), f"{path.relative_to(book.ROOT).as_posix()}:{call.lineno}")
    return found


def _calls(node: ast.AST) -> list[ast.Call]:
    return [part for part in ast.walk(node) if isinstance(part, ast.Call) and part.args]


def _caught(function: ast.FunctionDef) -> list[ast.Call]:
    """The checks whose failure a function expects."""
    blocks = [
        node for node in ast.walk(function) if isinstance(node, ast.With) and any(map(_expects_failure, node.items))
    ]
    return [call for block in blocks for part in block.body for call in _calls(part) if _name(call.func) in CHECKS]


def _label(call: ast.Call) -> str | None:
    """The first argument: a literal, or the name of a variable."""
    first = call.args[0]
    return str(first.value) if isinstance(first, ast.Constant) else first.id if isinstance(first, ast.Name) else None


class Claim(NamedTuple):
    """Something that a page asserts under a label: a theorem by its title, an equation by its formula."""

    label: str
    kind: str
    statement: str


THEOREMS = ("theorem", "proposition", "lemma", "corollary")
THEOREM = re.compile(rf"\{{prf:({'|'.join(THEOREMS)})\}}([^\n]*)\n:label: (\S+)")
EQUATION = re.compile(r"^\$\$\s*(.+?)\s*\$\$ \((eq-[\w-]+)\)", flags=re.M | re.S)
EXERCISE = re.compile(r"\{exercise\}([^\n]*)\n:label: (\S+)")
ERRATUM = re.compile(r"^\((err-[\w-]+)\)=\n#+ (.+)$", flags=re.M)
BLOCK = re.compile(r"^(:{3,})\{prf:\w+\}[^\n]*\n:label: (\S+)\n(.*?)^\1$", flags=re.M | re.S)


def prose(chapter: str) -> str:
    """The Markdown of a chapter."""
    cells = book.read(book.source(chapter)).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def claims(chapter: str) -> list[Claim]:
    """The labelled theorems, equations, exercises and errata of a chapter."""
    text = prose(chapter)
    # Displays without a label may stand before the one that has it.
    formulas = ((formula.split("$$")[-1], label) for formula, label in EQUATION.findall(text))
    return [
        *(Claim(label, kind, title.strip()) for kind, title, label in THEOREM.findall(text)),
        *(Claim(label, "equation", f"${' '.join(formula.split())}$") for formula, label in formulas),
        *(Claim(label, "exercise", title.strip()) for title, label in EXERCISE.findall(text)),
        *(Claim(label, "erratum", title.strip()) for label, title in ERRATUM.findall(text)),
    ]


def checks(chapter: str, profile: str) -> dict[str, list[dict[str, Any]]]:
    """The checks of a chapter's last run, by label."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(book.record(chapter, profile).read_text())["checks"]:
        found.setdefault(entry["label"], []).append(entry)
    return found


def missing(profile: str) -> list[str]:
    """What the ledger cannot account for: claims without a check or a broken variant, checks of what nobody claims."""
    found, broken, implemented = [], broken_variants(), api.by_label()
    known = {claim.label for chapter in book.notebooks() for claim in claims(chapter)}
    for chapter in book.notebooks():
        run = checks(chapter, profile)
        # A formula inside a theorem is what the theorem's own check compares.
        blocks = BLOCK.findall(prose(chapter))
        within = {label: block for _, block, body in blocks for _, label in EQUATION.findall(body)}
        for claim in claims(chapter):
            covered = claim.label in run or within.get(claim.label) in run
            if claim.kind == "equation" and claim.label in implemented and not covered:
                found.append(f"{chapter}: {claim.label}, which {implemented[claim.label][0]} implements, has no check")
            if claim.kind not in ("equation", "exercise") and claim.label not in run:
                found.append(f"{chapter}: {claim.kind} {claim.label} has no check")
            if claim.kind in THEOREMS and claim.label not in broken:
                found.append(f"{chapter}: no test breaks {claim.kind} {claim.label}")
        found += [f"{chapter}: {label} is checked, and no page has this label" for label in run if label not in known]
    return found


UNITS = {"equal": "difference", "mean": "standard errors", "bound": "inequality", "erratum": "difference"}


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3g}"


def row(claim: Claim, entries: list[dict[str, Any]]) -> list[str]:
    """The line of a claim: of several checks, the one that came nearest to failing."""
    worst = max(entries, key=lambda entry: entry["measured"] / (entry["tolerance"] or 1e-12))
    role = {"equation": "eq", "exercise": "ref"}.get(claim.kind, "prf:ref")
    number = f", {len(entries)} checks" if len(entries) > 1 else ""
    return [
        f"{{ref}}`erratum <{claim.label}>`" if claim.kind == "erratum" else f"{{{role}}}`{claim.label}`",
        claim.statement.replace("|", "\\vert "),
        UNITS[worst["kind"]] + number,
        _number(worst["tolerance"]),
        _number(worst["measured"]),
        f"{sum(entry['seconds'] for entry in entries):.1f}",
    ]


def page(profile: str) -> str:
    """The ledger as Markdown: a table for each chapter that was run."""
    everything = {claim.label: claim for chapter in book.notebooks() for claim in claims(chapter)}
    head = [
        "| claim | statement | check | tolerance | measured | seconds |",
        "| --- | --- | --- " + "| ---: " * 3 + "|",
    ]
    parts, total = [], 0
    for chapter in book.notebooks():
        if not book.record(chapter, profile).is_file():
            continue
        run = checks(chapter, profile)
        rows = [row(everything[label], entries) for label, entries in run.items()]
        title = re.search(r"^# (.+)$", prose(chapter), flags=re.M)
        assert title is not None
        lines = (f"| {' | '.join(cells)} |" for cells in rows)
        parts += ["", f"## {title[1]}", "", ":::{container} nb-wide nb-ledger", *head, *lines, ":::"]
        total += sum(map(len, run.values()))
    theorems = sum(claim.kind in THEOREMS for claim in everything.values())
    summary = (
        f"This build: **{total} checks** passed. Theorem-like claims: {theorems}, each with a test that breaks it."
    )
    return "\n".join([summary, *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    profile = parser.parse_args().profile
    for chapter in book.notebooks():
        run = checks(chapter, profile)
        print(f"{chapter}: {len(run)} labels, {sum(map(len, run.values()))} checks")
    if gaps := missing(profile):
        sys.exit("\n".join(gaps))
    print("Every claim has a check, and a test that breaks it.")


if __name__ == "__main__":
    main()

"""Reader's copies of the chapters, with and without solutions: plain Markdown, ready for Colab and JupyterLab.

python -m tools.export --profile cpu --out _build/notebooks

OUT/<chapter>.ipynb is the whole chapter, OUT/student/<chapter>.ipynb leaves the answers to the reader. Numbers of
theorems, exercises and equations are those of the built site, numbers in the prose those of the run's record.
"""

from __future__ import annotations

import argparse
import ast
import functools
import html
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pybtex.database import BibliographyData, parse_file  # type: ignore[import-untyped]
from pybtex.plugin import find_plugin  # type: ignore[import-untyped]

from tools import book, site

Macros = Mapping[str, tuple[str, int]]
CLAIM = r"(?:prf:)(?:theorem|proposition|lemma|corollary|definition|algorithm|example|remark|assumption|conjecture)"
BOXES = ("admonition", "note", "tip", "hint", "important", "warning", "caution", "attention", "seealso", "margin")
FENCE = re.compile(r"(?P<marks>:{3,}|`{3,})\{(?P<name>[\w:-]+)\}[ ]*(?P<title>.*)")
TOKEN = re.compile(
    r"\{(?P<role>[a-z][\w:-]*)\}`(?P<target>[^`]+)`"
    r"|(?P<code>^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)|(?P<ticks>`+)(?:(?!\n\n).)+?(?P=ticks)(?!`))"
    r"|\$\$(?P<display>.+?)\$\$(?:[ ]\((?P<label>[\w-]+)\))?"
    r"|(?<!\\)\$(?P<inline>(?!\s)(?:\\.|(?!\n\n)[^$\\])+?(?<!\s))\$(?!\d)",
    flags=re.S | re.M,
)
BAR = re.compile(r"(?<!\\)\\\|")
MYST = re.compile(r":{3,}|`{3,}\{|\{[a-z][\w:-]*\}`|^:[a-z-]+:|^\([\w-]+\)=|\$\$ \(", flags=re.M)


# --- mathematics -----------------------------------------------------------------------------------------------


def macros(config: Mapping[str, Any]) -> Macros:
    """The macros of the site's MathJax: name -> (text, number of arguments)."""
    found = config["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
    return {name: (text, 0) if isinstance(text, str) else (text[0], text[1]) for name, text in found.items()}


def _argument(math: str, at: int) -> tuple[str, int]:
    """The TeX argument that begins at or after ``at``, without its braces, and where it ends."""
    at += len(math[at:]) - len(math[at:].lstrip())
    if math[at : at + 1] != "{":
        token = re.compile(r"\\[A-Za-z]+|\\?.", flags=re.S).match(math, at)
        if token is None:
            raise SystemExit(f"A macro lacks an argument: {math}")
        return token[0], token.end()
    depth = 0
    for i in range(at, len(math)):
        escaped = math[i - 1 : i] == "\\"
        depth += (math[i] == "{" and not escaped) - (math[i] == "}" and not escaped)
        if depth == 0:
            return math[at + 1 : i], i + 1
    raise SystemExit(f"Braces do not balance: {math}")


def expand(math: str, known: Macros) -> str:
    """``math`` with the macros written out, arguments included."""
    out, at = "", 0
    for call in re.finditer(r"\\([A-Za-z]+)", math):
        if call.start() < at or call[1] not in known:
            continue
        text, arguments = known[call[1]]
        out, at = out + math[at : call.start()], call.end()
        for n in range(1, arguments + 1):
            value, at = _argument(math, at)
            text = text.replace(f"#{n}", expand(value, known))
        out += f"{{{text}}}" if out.rstrip().endswith(("^", "_")) else text
    return out + math[at:]


# --- what a chapter refers to ----------------------------------------------------------------------------------


def numbers(folder: Path) -> dict[str, str]:
    """Label -> what the built site calls it: ``Theorem 2.1``, ``Exercise 2.3``, ``Eq. 2.3``."""
    found = {}
    for page in sorted(folder.rglob("*.html")):
        text = page.read_text()
        for label, name in re.findall(r'id="([\w-]+)">\s*(?:<[^>]+>\s*)*?<span class="caption-number">([^<]+)<', text):
            found[label] = html.unescape(name).strip()
        for number, label in re.findall(
            r'class="eqno">\(([\d.]+)\)<a class="headerlink" href="#equation-([\w-]+)"', text
        ):
            found[label] = f"Eq. {number}"
    return found


def names(text: str) -> dict[str, str]:
    """Label -> kind and title, from the source of a page: for want of a number."""
    found = {label: f"Eq. {label.removeprefix('eq-')}" for label in re.findall(r"\$\$ \(([\w-]+)\)", text)}
    for kind, title, label in re.findall(r"\{(?:prf:)?(\w+)\}[ ]*([^\n]*)\n:label: (\S+)", text):
        named = f"{kind.capitalize()} ({title or label})"
        found[label] = f"Eq. {label.removeprefix('eq-')}" if kind == "math" else named
    return found


def sections(text: str) -> dict[str, str]:
    """Label -> heading, from the source of a page."""
    return dict(re.findall(r"^\(([\w-]+)\)=\n+#+ (.+)$", text, flags=re.M))


@dataclass
class Lookup:
    """What the references of a page are resolved with."""

    numbers: Mapping[str, str]  # label -> "Theorem 2.1", as on the site
    names: Mapping[str, str] = field(default_factory=dict)  # label -> "Theorem (Title)", where there is no number
    pages: Mapping[str, str] = field(default_factory=dict)  # label -> its page
    titles: Mapping[str, str] = field(default_factory=dict)  # page -> its title
    values: Mapping[str, Any] = field(default_factory=dict)  # name -> number of the run
    macros: Macros = field(default_factory=dict)
    bibliography: BibliographyData = field(default_factory=BibliographyData)
    url: str | None = None  # of the site

    def name(self, label: str) -> str:
        """What ``label`` is called."""
        if label not in self.numbers and label not in self.names:
            raise SystemExit(f"No page of the book defines {label}.")
        return self.numbers.get(label) or self.names[label]


@functools.cache
def _source(page: str) -> str:
    """The Markdown of a page; nothing for one that only the build of the site writes."""
    path = book.ROOT / f"{page}.ipynb"
    if path.is_file():
        return "\n\n".join(cell.source for cell in book.read(path).cells if cell.cell_type == "markdown")
    path = path.with_suffix(".md")
    return path.read_text() if path.is_file() else ""


def lookup(values: Mapping[str, Any], folder: Path | None, url: str | None = None) -> Lookup:
    """Everything that the pages of this book refer to; ``folder`` is the built site, if there is one."""
    config = yaml.safe_load((book.ROOT / "_config.yml").read_text())
    texts = {page: _source(page) for page in book.pages()}
    return Lookup(
        numbers=numbers(folder) if folder else {},
        names={label: name for text in texts.values() for label, name in (names(text) | sections(text)).items()},
        pages={label: page for page, text in texts.items() for label in names(text) | sections(text)},
        titles={page: m[1] for page, text in texts.items() if (m := re.search(r"^# (.+)$", text, flags=re.M))},
        values=values,
        macros=macros(config),
        bibliography=parse_file(str(book.ROOT / config["bibtex_bibfiles"][0])),
        url=(url or config.get("html", {}).get("baseurl") or "").rstrip("/") or None,
    )


# --- Markdown --------------------------------------------------------------------------------------------------


def _one_line(match: re.Match[str]) -> str:
    return " ".join(match[0].split()) if match["display"] or match["inline"] else match[0]


def quote(text: str) -> str:
    """``text`` as a block quote; formulas go on one line, since Jupyter would read the marks as part of them."""
    return "\n".join(f"> {line}".rstrip() for line in TOKEN.sub(_one_line, text).splitlines())


def details(summary: str, text: str, shown: bool = False) -> str:
    """A block that unfolds; the blank lines make Markdown and mathematics inside of it work."""
    return f"<details{' open' * shown}>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def lead(head: str, text: str) -> str:
    """``text`` after a bold head, on the same line if it begins with a sentence."""
    return f"**{head}.**" + ("\n\n" if re.match(r"[-*+>|<] ?|\d+\. |\$\$|```", text) else " ") + text


class Page:
    """Turns the MyST of one page into plain Markdown, cell after cell, and notes what the page cites."""

    def __init__(self, look: Lookup, page: str = "", student: bool = False) -> None:
        self.look, self.page, self.student = look, page, student
        self.cited: set[str] = set()
        self.exercise: str | None = None  # whose solution we are in
        self.folded = False

    def markdown(self, text: str) -> str:
        """The Markdown of the next cell; a solution that began in an earlier one may go on in it."""
        out = "\n\n".join(self._blocks(site.fill(text, dict(self.look.values), self.page)))
        if left := MYST.search(TOKEN.sub(lambda m: "" if m["code"] else m[0], out)):
            raise SystemExit(f"{self.page}: this cannot be exported: {out[left.start() :][:80]!r}")
        return out

    def _blocks(self, text: str) -> Iterator[str]:
        """The converted blocks of ``text``: directives one by one, everything between them in one."""
        lines, plain, at, code = text.splitlines(), list[str](), 0, ""
        while at < len(lines):
            line = lines[at]
            opening = None if code else FENCE.fullmatch(line)
            if opening is None:
                fence = re.match(r"`{3,}|~{3,}", line)
                code = ("" if line.startswith(code) else code) if code else (fence[0] if fence else "")
                plain.append(line)
                at += 1
                continue
            yield from self._plain(plain)
            plain, end = [], at + 1
            closing = re.compile(rf"{opening['marks'][0]}{{{len(opening['marks'])},}}\s*")
            while end < len(lines) and not closing.fullmatch(lines[end]):
                end += 1
            if end == len(lines):
                raise SystemExit(f"{self.page}: this directive does not end: {line}")
            body, options = lines[at + 1 : end], {}
            while body and (option := re.fullmatch(r":([\w-]+):\s*(.*)", body[0])):
                options[option[1]] = option[2]
                body = body[1:]
            yield from self._directive(opening["name"], opening["title"].strip(), options, "\n".join(body).strip())
            at = end + 1
        yield from self._plain(plain)

    def _plain(self, lines: list[str]) -> Iterator[str]:
        text = re.sub(r"^\([\w-]+\)=\n", "", "\n".join(lines), flags=re.M).strip("\n")
        if text.strip() and not (self.student and self.exercise):
            yield TOKEN.sub(self._token, text)

    def _directive(self, name: str, title: str, options: dict[str, str], body: str) -> Iterator[str]:
        if name in ("solution", "solution-start"):
            self.exercise = title
            if not self.student:
                yield f"**Solution of {self.look.name(title)}.**"
            yield from self._blocks(body)
            if name == "solution":
                self.exercise = None
            return
        if name == "solution-end":
            self.exercise = None
            return
        if self.student and self.exercise:
            return
        if name == "math":
            yield self._display(f"\n{body}\n", options.get("label"))
            return
        folded, self.folded = self.folded, name == "dropdown"
        text, title = "\n\n".join(self._blocks(body)), TOKEN.sub(self._token, title)
        self.folded = folded
        if name == "dropdown":
            yield details(title, text)
        elif name == "prf:proof":
            yield text if folded else details("Proof", text, shown=True)
        elif name == "exercise" or re.fullmatch(CLAIM, name):
            kind = self.look.numbers.get(options.get("label", ""), name.split(":")[-1].capitalize())
            yield quote(lead(kind + f" ({title})" * bool(title), text))
        elif name in BOXES:
            head = title or ("" if name == "margin" else name.capitalize())
            yield quote(f"**{head}**\n\n{text}" if head else text)
        else:
            raise SystemExit(f"{self.page}: the directive {name} cannot be exported.")

    def _token(self, match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        if match["display"]:
            return self._display(match["display"], match["label"])
        if match["inline"]:
            # In the cell of a table a bar, even an escaped one, would end the cell.
            return f"${BAR.sub(lambda _: chr(92) + 'Vert ', expand(match['inline'], self.look.macros))}$"
        return self._role(match["role"], match["target"])

    def _display(self, math: str, label: str | None) -> str:
        math = expand(math, self.look.macros)
        if label is None:
            return f"$${math}$$"
        body = math.rstrip()
        tag = self.look.name(label).removeprefix("Eq. ")
        return f"$${body} \\tag{{{tag}}}{math[len(body) :]}$$"

    def _role(self, role: str, target: str) -> str:
        if role in ("cite", "cite:p", "cite:t"):
            keys = [key.strip() for key in target.split(",")]
            self.cited |= set(keys)
            return cite(self.look.bibliography, keys, in_text=role == "cite:t")
        explicit = re.fullmatch(r"(.*?)\s*<(.+)>", target, flags=re.S)
        text, target = (explicit[1], explicit[2]) if explicit else ("", target)
        if role == "doc":
            page = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), target)).lstrip("/")
            return self._link(page, "", text or f"*{self.look.titles.get(page, page)}*")
        if role not in ("eq", "ref", "numref", "prf:ref"):
            raise SystemExit(f"{self.page}: the role {role} cannot be exported.")
        name, page = self.look.name(target), self.look.pages.get(target, self.page)
        if page == self.page:
            return text or name
        anchor = f"#equation-{target}" if name.startswith("Eq. ") else f"#{target}"
        return self._link(page, anchor, text or name + f" of *{self.look.titles[page]}*" * (self.look.url is None))

    def _link(self, page: str, anchor: str, text: str) -> str:
        return f"[{text}]({self.look.url}/{page}.html{anchor})" if self.look.url else text


# --- citations -------------------------------------------------------------------------------------------------


def cite(data: BibliographyData, keys: Sequence[str], in_text: bool) -> str:
    """``Kingma and Welling (2014)``, or in brackets ``(Kingma & Welling, 2014)``."""
    found = []
    for key in keys:
        if key not in data.entries:
            raise SystemExit(f"The bibliography has no entry {key}.")
        entry = data.entries[key]
        people = entry.persons.get("author") or entry.persons["editor"]
        authors = [" ".join(map(str, p.rich_prelast_names + p.rich_last_names)) for p in people]
        joined = (" and " if in_text else " & ").join(authors) if len(authors) < 3 else f"{authors[0]} et al."
        found.append(f"{joined} ({entry.fields['year']})" if in_text else f"{joined}, {entry.fields['year']}")
    return ", ".join(found) if in_text else f"({'; '.join(found)})"


def references(data: BibliographyData, keys: set[str]) -> str:
    """The cited entries as a Markdown list under a heading."""
    style = find_plugin("pybtex.style.formatting", "plain")(sorting="author_year_title")
    entries = style.format_bibliography(data, sorted(keys))
    texts = (re.sub(r"\\([.()!-])", r"\1", entry.text.render_as("markdown")) for entry in entries)  # needless escapes
    return "## References\n\n" + "\n".join(f"- {' '.join(text.split())}" for text in texts)


# --- code ------------------------------------------------------------------------------------------------------


def install(address: str | None) -> str:
    """The one cell that a reader in Colab needs."""
    if address is None:
        return "# This copy knows no repository: pip install the wheel of nblib (dist/nblib-*.whl) before you run it."
    return f'import sys\n\nif "google.colab" in sys.modules:\n    %pip install -q "nblib @ git+{address}"'


def parts(source: str) -> dict[str, str]:
    """The parts of a solution's code by their markers: given (optional), answer, check."""
    pieces = re.split(r"^# (given|answer|check)$\n?", source, flags=re.M)
    found = {name: text.strip("\n") for name, text in zip(pieces[1::2], pieces[2::2])}
    if list(found) not in (["answer", "check"], ["given", "answer", "check"]) or pieces[0].strip():
        raise SystemExit(f"A solution's code needs the lines '# answer' and '# check' in it:\n{source}")
    return found


def _stored(tree: ast.AST) -> Iterator[str]:
    """Names that code assigns or defines in its own scope, in order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            yield from _stored(node)


def unanswered(source: str, exercise: str) -> str:
    """A solution's code without its answer: a line for each name that the check needs."""
    part = parts(source)
    used = {node.id for node in ast.walk(ast.parse(part["check"])) if isinstance(node, ast.Name)}
    wanted = [name for name in dict.fromkeys(_stored(ast.parse(part["answer"]))) if name in used]
    if not wanted:
        raise SystemExit(f"{exercise}: the check uses no name of the answer.")
    about = re.match(r"(?:#[^\n]*\n)*", part["answer"])
    head = f"# {exercise}: define the names, then run this cell\n" + (about[0] if about else "")
    holes = "\n".join(f"{name} = ...  # your answer" for name in wanted)
    given = part.get("given", "") + ("\n\n\n" if part.get("given", "\n").splitlines()[-1].startswith(" ") else "\n\n")
    between = "\n\n\n" if part["check"].startswith(("def ", "class ")) else "\n\n"
    return head + (f"\n{given}" if given.strip() else "") + holes + between + part["check"]


# --- notebooks -------------------------------------------------------------------------------------------------


def convert(notebook: book.Notebook, page: Page, address: str | None) -> book.Notebook:
    """The reader's copy of a chapter."""
    cells: list[book.Notebook] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if text := page.markdown(cell.source):
                cells.append(nbformat.v4.new_markdown_cell(text, id=cell.id))
            continue
        tags, source, metadata = set(cell.metadata.get("tags", [])), cell.source, dict[str, Any]()
        if "google.colab" in source:
            continue  # a guard of the source, with an address that it cannot know
        if not any(made.cell_type == "code" for made in cells):
            cells.append(nbformat.v4.new_code_cell(install(address), id="install"))
        if kept := tags & {"parameters"}:
            metadata["tags"] = sorted(kept)
        if "hide-input" in tags:
            metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
        if page.exercise:
            open_question = unanswered(source, page.look.name(page.exercise))  # so that every copy asks for the markers
            if page.student:
                source, metadata["tags"] = open_question, ["raises-exception"]
        cells.append(nbformat.v4.new_code_cell(source, id=cell.id, metadata=metadata))
    if page.cited:
        cells.append(nbformat.v4.new_markdown_cell(references(page.look.bibliography, page.cited), id="references"))
    kernel = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata={**kernel, "colab": {"provenance": []}})


def export(chapter: str, look: Lookup, address: str | None) -> dict[str, book.Notebook]:
    """The copies of a notebook by their paths below the output folder; only chapters have one for students."""
    source = book.read(book.source(chapter))
    make: Callable[[bool], Page] = functools.partial(Page, look, f"book/{chapter}")
    return {
        f"{folder}{chapter}.ipynb": convert(source, make(student), address)
        for folder, student in (("", False), ("student/", True))
        if not student or chapter in book.chapters()
    }


def write(profile: str, out: Path, site_folder: Path | None, url: str | None = None) -> int:
    """Write the copies of every chapter that was executed in ``profile``; their number."""
    look, address, written = lookup({}, site_folder, url), book.repository(), 0
    missing = {label for page in book.pages() for label in names(_source(page))} - set(look.numbers)
    if site_folder and missing:
        raise SystemExit(f"The site in {site_folder} is older than the book, it lacks {', '.join(sorted(missing))}.")
    for chapter in book.notebooks():
        record = book.record(chapter, profile)
        if not record.is_file():
            print(f"{chapter} was not executed in profile {profile}: it has no copy.")
            continue
        look.values = json.loads(record.read_text())["values"]
        for name, notebook in export(chapter, look, address).items():
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, target)
            written += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--out", type=Path, default=book.BUILD / "notebooks")
    parser.add_argument("--site", type=Path, default=book.BUILD / "html", help="the built site, for its numbers")
    parser.add_argument("--url", help="where the site is published, for links to other chapters")
    args = parser.parse_args()
    folder = args.site if args.site.is_dir() else None
    written = write(args.profile, args.out, folder, args.url)
    unnumbered = "" if folder else f"; without numbers, since {args.site} does not exist"
    print(f"{written} notebooks in {args.out}{unnumbered}")


if __name__ == "__main__":
    main()

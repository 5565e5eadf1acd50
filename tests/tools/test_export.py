"""Reader's copies: every piece of MyST becomes plain Markdown, and a student's cell fails until it is answered."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import symtable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from pybtex.database import parse_string

import nblib as nb
from nblib.errors import CheckFailed
from tools import book, export, site

CHAPTERS = book.chapters()
COPIES = [(name, student) for name in book.notebooks() for student in (False, True) if not student or name in CHAPTERS]
SITE = book.BUILD / "html"
BIB = r"""
@inproceedings{vae, author = {Kingma, Diederik P. and Welling, Max}, title = {Auto-Encoding Variational {Bayes}},
  booktitle = {ICLR}, year = {2014}}
@article{three, author = {van den Oord, A{\"a}ron and B, C. and D, E.}, title = {T}, journal = {J}, year = {2020}}
@book{alone, author = {Glasserman, Paul}, title = {Monte Carlo}, publisher = {Springer}, year = {2003}}
"""
LOOK = export.Lookup(
    numbers={
        "thm-a": "Theorem 2.1",
        "eq-a": "Eq. 2.3",
        "ex-a": "Exercise 2.4",
        "eq-far": "Eq. 1.7",
        "fig-a": "Fig. 2.1",
    },
    pages={"eq-far": "book/part/far", "thm-a": "book/part/near"},
    titles={"book/part/far": "Far away", "index": "The book"},
    values={"gap": 0.126, "data": "digits"},
    macros={"R": (r"\mathbb{R}", 0), "E": (r"\mathbb{E}", 0), "KL": (r"D\left(#1\,\middle\|\,#2\right)", 2)},
    bibliography=parse_string(BIB, "bibtex"),
)


def convert(text: str, *, student: bool = False, look: export.Lookup = LOOK) -> str:
    return export.Page(look, "book/part/near", student).markdown(text)


# --- mathematics and numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("math", "expanded"),
    [
        (r"\R^D", r"\mathbb{R}^D"),
        (r"\E_q[f]+\Re x+\Rx", r"\mathbb{E}_q[f]+\Re x+\Rx"),
        (r"\KL{q}{p}", r"D\left(q\,\middle\|\,p\right)"),
        (
            r"\KL{q_{\R}(z\mid x)}{\frac{a}{\E_{p}[b]}}",
            r"D\left(q_{\mathbb{R}}(z\mid x)\,\middle\|\,\frac{a}{\mathbb{E}_{p}[b]}\right)",
        ),
        (r"\KL q{p\}}", r"D\left(q\,\middle\|\,p\}\right)"),
        (r"x^\R y_\E", r"x^{\mathbb{R}} y_{\mathbb{E}}"),
        (r"\KL{\KL{a}{b}}{c}", r"D\left(D\left(a\,\middle\|\,b\right)\,\middle\|\,c\right)"),
    ],
)
def test_macros_are_written_out(math: str, expanded: str) -> None:
    assert export.expand(math, LOOK.macros) == expanded


def test_macros_come_from_the_configuration_and_bad_braces_are_refused() -> None:
    known = export.lookup({}, None).macros
    assert known["R"] == (r"\mathbb{R}", 0)
    assert known["KL"][1] == 2
    with pytest.raises(SystemExit, match="Braces"):
        export.expand(r"\KL{q}{p", known)
    with pytest.raises(SystemExit, match="lacks an argument"):
        export.expand(r"\KL{q}", known)


def test_equations_get_the_number_of_the_site_as_a_tag() -> None:
    assert convert("so\n\n$$ x\\in\\R . $$ (eq-a)\n\nand") == "so\n\n$$ x\\in\\mathbb{R} . \\tag{2.3} $$\n\nand"
    assert convert("$$\nx\n$$ (eq-a)") == "$$\nx \\tag{2.3}\n$$"
    assert convert("$$\nx\n$$") == "$$\nx\n$$"
    assert convert("```{math}\n:label: eq-a\nx\n```") == "$$\nx \\tag{2.3}\n$$"


def test_references_become_text_and_link_only_where_the_site_is_known() -> None:
    text = "{eq}`eq-a`, {prf:ref}`thm-a`, {ref}`ex-a`, {numref}`fig-a`, {eq}`eq-far`, {doc}`/book/part/far`, {doc}`far`"
    here = "Eq. 2.3, Theorem 2.1, Exercise 2.4, Fig. 2.1, "
    assert convert(text) == here + "Eq. 1.7 of *Far away*, *Far away*, *Far away*"
    look = export.Lookup(**{**LOOK.__dict__, "url": "https://x.org"})
    page = "https://x.org/book/part/far.html"
    assert convert(text, look=look) == here + f"[Eq. 1.7]({page}#equation-eq-far), " + ", ".join(
        [f"[*Far away*]({page})"] * 2
    )
    assert convert("{doc}`the start </index>` and {ref}`that <ex-a>`") == "the start and that"
    with pytest.raises(SystemExit, match="defines thm-b"):
        convert("{prf:ref}`thm-b`")


def test_without_a_site_labels_are_called_by_their_titles() -> None:
    source = ":::{prf:theorem} Pythagoras\n:label: thm-p\nx\n:::\n\n$$ a $$ (eq-b)\n\n(here)=\n## A section\n"
    look = export.Lookup({}, export.names(source) | export.sections(source))
    assert look.names == {"thm-p": "Theorem (Pythagoras)", "eq-b": "Eq. b", "here": "A section"}
    assert convert("{prf:ref}`thm-p`, {eq}`eq-b`, {ref}`here`", look=look) == "Theorem (Pythagoras), Eq. b, A section"
    assert convert(source, look=look) == "> **Theorem (Pythagoras).** x\n\n$$ a \\tag{b} $$\n\n## A section"


def test_numbers_are_read_from_the_html_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text(
        '<span class="eqno">(2.3)<a class="headerlink" href="#equation-eq-a" title="x">#</a></span>'
        '<div class="proof theorem admonition" id="thm-a">\n<p class="admonition-title">'
        '<span class="caption-number">Theorem 2.1 </span> (T)</p>'
    )
    assert export.numbers(tmp_path) == {"eq-a": "Eq. 2.3", "thm-a": "Theorem 2.1"}


# --- blocks ---------------------------------------------------------------------------------------------------


def test_a_theorem_becomes_a_quote_with_its_formula_on_one_line() -> None:
    text = ":::{prf:theorem} A *title*\n:label: thm-a\n\nFor $x\\in\\R$\n\n$$\nx\n=x\n$$ (eq-a)\n:::\n\nAfter."
    expected = "> **Theorem 2.1 (A *title*).** For $x\\in\\mathbb{R}$\n>\n> $$ x =x \\tag{2.3} $$\n\nAfter."
    assert convert(text) == expected
    assert convert(":::{prf:algorithm} A\n1. one\n:::") == "> **Algorithm (A).**\n>\n> 1. one"


def test_proofs_and_dropdowns_unfold_and_keep_the_blank_lines_that_mathematics_needs() -> None:
    inner = ":::{prf:proof}\nBecause $x$.\n:::"
    assert convert(inner) == "<details open>\n<summary>Proof</summary>\n\nBecause $x$.\n\n</details>"
    folded = "<details>\n<summary>Proof, step by step</summary>\n\nBecause $x$.\n\n</details>"
    assert convert(f"::::{{dropdown}} Proof, step by step\n{inner}\n::::") == folded


def test_admonitions_and_margins_become_quotes() -> None:
    assert convert(":::{admonition} Goals\n:class: tip\n- a\n- b\n:::") == "> **Goals**\n>\n> - a\n> - b"
    assert convert("```{note}\nMind.\n```") == "> **Note**\n>\n> Mind."
    assert convert(":::{margin}\nAside.\n:::") == "> Aside."


def test_a_gated_solution_spans_cells_and_is_left_out_for_students() -> None:
    first = ":::{exercise}\n:label: ex-a\nDo.\n:::\n\n```{solution-start} ex-a\n:class: dropdown\n```\n\nThus."
    last = "So.\n\n```{solution-end}\n```\n\n## Next"
    whole, student = export.Page(LOOK), export.Page(LOOK, student=True)
    assert whole.markdown(first) == "> **Exercise 2.4.** Do.\n\n**Solution of Exercise 2.4.**\n\nThus."
    assert whole.exercise == "ex-a"
    assert whole.markdown(last) == "So.\n\n## Next"
    assert student.markdown(first) == "> **Exercise 2.4.** Do."
    assert student.markdown("More.") == ""
    assert student.markdown(last) == "## Next"
    block = "A.\n\n:::{solution} ex-a\n:class: dropdown\nThus.\n:::\n\nB."
    assert convert(block) == "A.\n\n**Solution of Exercise 2.4.**\n\nThus.\n\nB."
    assert convert(block, student=True) == "A.\n\nB."


def test_numbers_of_the_run_and_code_are_kept_as_they_are() -> None:
    assert convert("{nbval}`gap:.2f` on {nbval}`data`") == "0.13 on digits"
    code = "Run `a $ b` or\n\n```python\nx = '$$'  # :::{note}\n```\n\nfor $\\R$; `$\\R$`."
    assert convert(code) == code.replace("for $\\R$", "for $\\mathbb{R}$")


def test_a_bar_in_a_formula_does_not_end_the_cell_of_a_table() -> None:
    assert convert("| a | $\\KL{q}{p}$ |") == "| a | $D\\left(q\\,\\middle\\Vert \\,p\\right)$ |"


@pytest.mark.parametrize(
    "text", ["{sub}`x`", ":::{figure} a.png\n:::", ":::{note}\nopen", "a {nbval}`unknown`", "{cite:p}`nobody`", ":::"]
)
def test_what_cannot_be_exported_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        convert(text)


def test_citations_and_the_list_of_those_cited() -> None:
    page = export.Page(LOOK)
    assert page.markdown("{cite:t}`vae` {cite:p}`vae,three`; {cite:t}`alone`") == (
        "Kingma and Welling (2014) (Kingma & Welling, 2014; van den Oord et al., 2020); Glasserman (2003)"
    )
    assert page.cited == {"vae", "three", "alone"}
    listed = export.references(LOOK.bibliography, {"vae", "alone"}).splitlines()
    assert listed[0] == "## References"
    assert [line[:20] for line in listed[2:]] == ["- Paul Glasserman. *", "- Diederik P. Kingma"]
    assert "Auto-encoding variational Bayes" in listed[3]


# --- the address of the repository ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("git@github.com:owner/repo.git", "https://github.com/owner/repo"),
        ("ssh://git@host.org:2222/group/sub/repo.git", "https://host.org/group/sub/repo"),
        ("https://user:token@github.com/owner/repo.git", "https://github.com/owner/repo"),
        ("https://x-access-token:abc@github.com/owner/repo", "https://github.com/owner/repo"),
        ("http://github.com/owner/repo/", "https://github.com/owner/repo"),
        ("/srv/git/repo.git", None),
        ("file:///srv/git/repo.git", None),
        (None, None),
    ],
)
def test_the_repository_is_its_own_remote_without_credentials(
    origin: str | None, address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    monkeypatch.setattr(book, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if origin:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", origin], check=True)
    assert book.repository() == address
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/fork")
    assert book.repository() == "https://github.com/someone/fork"


def test_the_install_cell_runs_pip_only_in_colab() -> None:
    assert export.install("https://x.org/o/r").splitlines() == [
        "import sys",
        "",
        'if "google.colab" in sys.modules:',
        '    %pip install -q "nblib @ git+https://x.org/o/r"',
    ]
    assert export.install(None).startswith("# ")
    assert "wheel" in export.install(None)


# --- solutions ------------------------------------------------------------------------------------------------

SOLUTION = """\
# given
import math
y = 2
# answer
# of y: the square, and its half
square = y**2
unused = square
def half(x):
    inner = x / 2
    return inner
# check
nb.check("ex-a", half(square), 2.0)"""


def test_a_students_cell_has_a_hole_for_every_name_that_the_check_needs() -> None:
    assert export.unanswered(SOLUTION, "Exercise 2.4").splitlines() == [
        "# Exercise 2.4: define the names, then run this cell",
        "# of y: the square, and its half",
        "",
        "import math",
        "y = 2",
        "",
        "square = ...  # your answer",
        "half = ...  # your answer",
        "",
        'nb.check("ex-a", half(square), 2.0)',
    ]


@pytest.mark.parametrize("source", ["x = 1", "# check\nx", "# answer\nx = 1", "y = 1\n# answer\nx = 1\n# check\nx"])
def test_a_solution_without_its_markers_is_refused(source: str) -> None:
    with pytest.raises(SystemExit, match="'# answer'"):
        export.unanswered(source, "Exercise 2.4")


def test_a_check_that_ignores_the_answer_is_refused() -> None:
    with pytest.raises(SystemExit, match="no name of the answer"):
        export.unanswered("# answer\nx = 1\n# check\nnb.check('ex-a', 1, 1)", "Exercise 2.4")


@pytest.mark.parametrize("check", [nb.check, nb.check_mc, nb.check_bound])
def test_an_ellipsis_never_passes_a_check(check: Any) -> None:
    values = torch.zeros(5)
    for got, expected in ((..., values), (values, ...), (..., ...), ([..., 1.0], values[:2])):
        with pytest.raises((TypeError, RuntimeError, ValueError, CheckFailed)):
            check("ex-a", got, expected)


# --- the chapters ---------------------------------------------------------------------------------------------


@functools.cache
def look(chapter: str) -> export.Lookup:
    """The lookup for a chapter, with stand-ins for what was not built or run in this checkout."""
    text = "\n".join(cell.source for cell in book.read(book.source(chapter)).cells)
    return export.lookup({name: "0" for name, _ in site.VALUE.findall(text)}, SITE if SITE.is_dir() else None)


def solutions(chapter: str) -> dict[str, str]:
    """The code of the solutions by cell."""
    page, found = export.Page(look(chapter)), {}
    for cell in book.read(book.source(chapter)).cells:
        if cell.cell_type == "markdown":
            page.markdown(cell.source)
        elif page.exercise:
            found[cell.id] = cell.source
    return found


@pytest.mark.parametrize(("chapter", "student"), COPIES)
def test_no_myst_remains_in_any_chapter(chapter: str, student: bool) -> None:
    source = book.read(book.source(chapter))
    copies = export.export(chapter, look(chapter), "https://x.org/o/r")
    copy = copies[f"{'student/' * student}{chapter}.ipynb"]
    nbformat.validate(copy)
    for cell in copy.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            continue
        text = re.sub(r"^```.*?^```", "", cell.source, flags=re.S | re.M)
        for bad in (
            "{eq}",
            "{prf:",
            "{cite",
            "{doc}",
            "{ref}",
            "{numref}",
            ":::",
            "{nbval}",
            "```{",
            ":label:",
            ":class:",
        ):
            assert bad not in text, bad
        assert not re.search(r"\$\$ \(|\\(R|E|KL|N|Var)(?![A-Za-z])", text)
        assert text.count("$$") % 2 == 0
        assert text.count("<details") == text.count("</details>")
    installs = [cell.source for cell in copy.cells if "%pip" in cell.source]
    assert installs == [export.install("https://x.org/o/r")]
    assert [cell.source for cell in copy.cells if cell.metadata.get("tags") == ["parameters"]] == ["profile = None"]
    assert copy.cells[-1].source.startswith("## References")
    code = [cell.id for cell in source.cells if cell.cell_type == "code" and "%pip" not in cell.source]
    assert [cell.id for cell in copy.cells if cell.cell_type == "code"] == ["install", *code]
    tags = {tag for cell in copy.cells for tag in cell.metadata.get("tags", [])}
    assert tags == {"parameters"} | ({"raises-exception"} if student else set())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_students_see_every_check_and_no_answer(chapter: str) -> None:
    raw = "\n\n".join(cell.source for cell in book.read(book.source(chapter)).cells if cell.cell_type == "markdown")
    copy = export.export(chapter, look(chapter), None)[f"student/{chapter}.ipynb"]
    prose = "\n".join(cell.source for cell in copy.cells if cell.cell_type == "markdown")
    code = {cell.id: cell.source for cell in copy.cells if cell.cell_type == "code"}
    gated = re.findall(r"```\{solution-start\} \S+\n:class: dropdown\n```\n(.*?)```\{solution-end\}", raw, flags=re.S)
    boxed = re.findall(r":::\{solution\} \S+\n:class: dropdown\n(.*?)\n:::", raw, flags=re.S)
    assert len(gated) + len(boxed) == raw.count("{exercise}") == prose.count("> **Exercise")
    assert "Solution" not in prose
    for text in gated + boxed:
        # What is free of mathematics and roles would appear as it is.
        for piece in re.findall(r"[\w ,;:'-]{40,}", text):
            assert piece not in prose, piece
    for name, source in solutions(chapter).items():
        part, shown = export.parts(source), code[name].splitlines()
        assert any("nb.check" in line for line in part["check"].splitlines()), name
        assert set(part["check"].splitlines()) <= set(shown)
        assert set(part.get("given", "").splitlines()) <= set(shown)
        answer = {line for line in part["answer"].splitlines() if line.strip() and not line.startswith("#")}
        assert not answer & set(shown) - set(part["check"].splitlines()) - set(part.get("given", "").splitlines()), name
        assert shown[0].endswith(": define the names, then run this cell")


def needed(source: str) -> tuple[set[str], set[str]]:
    """Names that code takes from cells above, and names that it defines."""
    table = symtable.symtable(source, "cell", "exec")
    stored = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {s.get_name() for s in table.get_symbols() if s.is_referenced()}

    def inner(scope: symtable.SymbolTable) -> Iterator[str]:
        for child in scope.get_children():
            yield from (s.get_name() for s in child.get_symbols() if s.is_global() and s.is_referenced())
            yield from inner(child)

    return (used | set(inner(table))) - stored, stored


@pytest.fixture
def double() -> Iterator[None]:
    """The default dtype afterwards is that before."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_unanswered_cells_fail_and_answered_cells_pass(chapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        cell for cell in book.read(book.source(chapter)).cells if cell.cell_type == "code" and "%pip" not in cell.source
    ]
    code, wanted, before = solutions(chapter), set[str](), list[str]()
    for cell in reversed(cells):
        takes, makes = needed(cell.source)
        if cell.id in code:
            wanted |= takes
        elif wanted & makes or "nb.profile(" in cell.source:
            wanted = wanted - makes | takes
            before.insert(0, cell.source)
    space: dict[str, Any] = {}
    nb.profile("smoke")
    for source in before:
        exec(compile(source, "cell", "exec"), space)
    for name, source in code.items():
        with pytest.raises((TypeError, AttributeError, RuntimeError, ValueError, CheckFailed)):
            exec(compile(export.unanswered(source, name), "student", "exec"), space)
        part = export.parts(source)
        holes = re.compile(r"(?:^\w+ = \.\.\.  # your answer\n?)+", flags=re.M)
        answered = holes.sub(lambda _, answer=part["answer"]: answer + "\n", export.unanswered(source, name))
        capsys.readouterr()
        exec(compile(answered, "student", "exec"), space)
        assert "✓" in capsys.readouterr().out, name


def test_the_command_writes_both_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for chapter in book.notebooks():
        record = tmp_path / "records" / "cpu" / f"{chapter}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"values": dict(look(chapter).values)}))
    monkeypatch.setattr(book, "BUILD", tmp_path)
    monkeypatch.setattr("sys.argv", ["export", "--out", str(tmp_path / "out"), "--site", str(tmp_path / "none")])
    export.main()
    assert "without numbers" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.ipynb")}
    assert written == {f"{'student/' * student}{chapter}.ipynb" for chapter, student in COPIES}

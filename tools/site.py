"""Stage the executed chapters and build the site with Jupyter Book, warnings as errors.

python -m tools.site --profile cpu --out _build/html
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import yaml

from tools import api, book, coverage, ledger, vendor

VALUE = re.compile(r"\{nbval\}`([A-Za-z_]\w*)(?::([^`]*))?`")


def fill(text: str, values: dict[str, Any], where: str) -> str:
    """Replace ``{nbval}`name:.2f` `` by the recorded number."""

    def one(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise SystemExit(f"{where}: the prose quotes {match[1]!r}, which the run did not record.")
        value = values[match[1]]
        return value if isinstance(value, str) else format(value, match[2] or "g")

    return VALUE.sub(one, text)


def footer(record: dict[str, Any]) -> str:
    """The line that says how this page was made."""
    checks = len(record["checks"])
    return (
        "---\n\n"
        '<div class="nb-record">\n\n'
        f"This page was executed on {record['date']} in profile `{record['profile']}`: {record['seconds']:.0f} s on"
        f" one thread ({record['machine'].split(',')[0]}), {checks} check{'s' * (checks != 1)} passed, peak memory"
        f" {record['peak_mb']:.0f} MB, Python {record['python']}, torch {record['torch']}, nblib {record['nblib']}.\n\n"
        "</div>"
    )


def ways(chapter: str, repository: str | None) -> str:
    """The line below the title: the chapter as a notebook, solved and unsolved, here and on Colab."""
    up = "../" * (chapter.count("/") + 1)
    copies = {"": chapter}
    if chapter in book.chapters():
        copies[" without solutions"] = f"student/{chapter}"
    links = [f'<a href="{up}notebooks/{copy}.ipynb" download>download{what}</a>' for what, copy in copies.items()]
    links += [
        f'<a href="{address}">Colab{what}</a>'
        for what, copy in copies.items()
        if (address := book.colab(repository, copy))
    ]
    return f'<p class="nb-ways">This page as a notebook: {", ".join(links)}.</p>'


def graft(chapter: str, profile: str) -> book.Notebook:
    """The source notebook with the outputs of its executed copy, as it is published."""
    notebook = book.read(book.source(chapter))
    made = book.read(book.executed(chapter, profile))
    run = {cell.id: cell for cell in made.cells}
    record = json.loads(book.record(chapter, profile).read_text())
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = run[cell.id].outputs
            cell.execution_count = run[cell.id].execution_count
        else:
            cell.source = fill(cell.source, record["values"], chapter)
    if widgets := made.metadata.get("widgets"):
        notebook.metadata["widgets"] = widgets
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(ways(chapter, book.repository()), id="ways"))
    notebook.cells.append(nbformat.v4.new_markdown_cell(footer(record), id="run-record"))
    return notebook


def config(repository: str | None) -> dict[str, Any]:
    """The settings of the site, with the links to the repository that it is built from; without one, no such links."""
    settings: dict[str, Any] = yaml.safe_load((book.ROOT / "_config.yml").read_text())
    if repository:
        settings["repository"]["url"] = repository
    else:
        del settings["repository"], settings["launch_buttons"]
        settings["html"] |= {"use_issues_button": False, "use_repository_button": False}
    return settings


def stage(profile: str, folder: Path, allow_unexecuted: bool) -> None:
    """A copy of the book, made anew, in which every chapter carries its outputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("_toc.yml", "index.md"):
        shutil.copy(book.ROOT / name, folder)
    (folder / "_config.yml").write_text(yaml.safe_dump(config(book.repository())))
    shutil.copytree(book.ROOT / "tools" / "sphinx_ext", folder / "_ext")
    shutil.copytree(book.ROOT / "book", folder / "book", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for chapter in book.notebooks():
        if book.executed(chapter, profile).is_file() and book.record(chapter, profile).is_file():
            nbformat.write(graft(chapter, profile), folder / "book" / f"{chapter}.ipynb")
        elif not allow_unexecuted:
            raise SystemExit(f"{chapter} was not executed in profile {profile}: run python -m tools.execute first.")
    made = (("api/index", api.index()), ("appendix/ledger", ledger.page(profile)))
    for name, text in (*made, ("appendix/methods", coverage.methods_page())):
        path = folder / "book" / f"{name}.md"
        path.write_text(path.read_text().replace("<!-- made by the build -->", text))
    for name in api.MODULES:
        (folder / "book" / "api" / f"{name}.md").write_text(api.page(name))


def build(folder: Path) -> Path:
    """The HTML of a staged book, built with warnings as errors."""
    command = [Path(sys.executable).parent / "jupyter-book", "build", "-q", "-W", "-n", "--keep-going", "--all", folder]
    env = {**os.environ, "PYTHONPATH": str(book.ROOT)}
    if found := vendor.fetch():
        env["NBLIB_VENDOR"] = str(found)
    built = subprocess.run(list(map(str, command)), cwd=book.ROOT, env=env, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"The site did not build:\n{built.stdout[-6000:]}\n{built.stderr[-6000:]}")
    return folder / "_build" / "html"


def missing(out: Path) -> list[str]:
    """Pages of the table of contents that have no HTML."""
    return [page for page in book.pages() if not (out / f"{page}.html").is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--out", type=Path, default=book.BUILD / "html")
    parser.add_argument("--allow-unexecuted", action="store_true", help="show chapters without outputs")
    args = parser.parse_args()
    started = time.perf_counter()
    folder = book.BUILD / "stage" / args.profile
    stage(args.profile, folder, args.allow_unexecuted)
    built = build(folder)
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(built, args.out)
    (args.out / ".nojekyll").touch()
    from tools import export  # it needs this module

    export.write(args.profile, args.out / "notebooks", args.out)
    if absent := missing(args.out):
        sys.exit(f"Pages without HTML: {', '.join(absent)}")
    seconds = time.perf_counter() - started
    (args.out / "build.json").write_text(json.dumps({"pages": len(book.pages()), "seconds": round(seconds, 1)}))
    print(f"{len(book.pages())} pages in {args.out}, {seconds:.1f} s")


if __name__ == "__main__":
    main()

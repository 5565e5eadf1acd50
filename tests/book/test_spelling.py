"""Spelling of everything that is read: pages, chapters (text and code), docstrings, comments, tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools import book


def misspelt(*paths: Path) -> list[str]:
    # The words of the field that it may not correct are in pyproject.toml.
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare", *map(str, paths)]
    done = subprocess.run(command, cwd=book.ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 65), done.stderr
    return done.stdout.splitlines()


def test_there_is_no_misspelt_word(tmp_path: Path) -> None:
    for chapter in book.notebooks():
        text = "\n\n".join(cell.source for cell in book.read(book.source(chapter)).cells)
        (tmp_path / f"{chapter.replace('/', '-')}.txt").write_text(text)
    pages = [
        *book.ROOT.glob("*.md"),
        *(p for f in ("book", "data", "benchmarks") for p in (book.ROOT / f).rglob("*.md")),
    ]
    found = misspelt(tmp_path, *pages, *(book.ROOT / name for name in ("nblib", "tools", "benchmarks", "Makefile")))
    assert found == []


def test_a_misspelt_word_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Teh log-lik of the encoder.\n")
    assert len(misspelt(tmp_path)) == 1

"""What the tools know about the book: where its parts are, which pages it has, what a page depends on."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml

import nblib

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
Notebook = Any


def pages() -> list[str]:
    """Every page of the table of contents, in order, without extension."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    found = [toc["root"]]

    def walk(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if "file" in entry:
                found.append(entry["file"])
            for below in ("chapters", "sections", "parts"):
                walk(entry.get(below, []))

    walk([{k: v for k, v in toc.items() if k in ("parts", "chapters")}])
    return found


def notebooks() -> list[str]:
    """The chapters that are executed, as ``vae/variational-autoencoder``."""
    return [page[len("book/") :] for page in pages() if (ROOT / f"{page}.ipynb").is_file()]


def chapters() -> list[str]:
    """The notebooks that are chapters: all but those of the appendix."""
    return [name for name in notebooks() if not name.startswith("appendix/")]


def source(chapter: str) -> Path:
    return ROOT / "book" / f"{chapter}.ipynb"


def executed(chapter: str, profile: str) -> Path:
    return BUILD / "executed" / profile / f"{chapter}.ipynb"


def record(chapter: str, profile: str) -> Path:
    return BUILD / "records" / profile / f"{chapter}.json"


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


# --- what a chapter's outputs depend on ------------------------------------------------------------------


def module_files() -> dict[str, Path]:
    """Every module of nblib by dotted name."""
    found = {}
    for path in sorted((ROOT / "nblib").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(tree: ast.AST) -> set[str]:
    """Dotted names that a module or notebook imports from nblib, function-level imports included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "nblib"}


def _attributes(tree: ast.AST) -> set[str] | None:
    """What is used as ``nb.<name>``; None where ``nb`` is used in another way, so that it cannot be told."""
    used, plain, inside = set(), 0, 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nb":
            used.add(node.attr)
            inside += 1
        elif isinstance(node, ast.Name) and node.id == "nb":
            plain += 1
    return used if plain == inside else None


def dependencies(notebook: Notebook) -> list[str]:
    """The modules of nblib that a notebook can reach, by its imports and theirs; all of them if it cannot be told."""
    files = module_files()
    code = "\n".join(
        "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for cell in notebook.cells
        if cell.cell_type == "code" and "remove-cell" not in cell.metadata.get("tags", [])
    )
    tree = ast.parse(code)
    used = _attributes(tree)
    if used is None:
        return sorted(files)
    todo = {f"nblib.{nblib._NAMES.get(name, name)}" for name in used} | _imports(tree) | {"nblib.page", "nblib.errors"}
    reached: set[str] = {"nblib"}
    while todo:
        name = todo.pop()
        parts = name.split(".")
        for depth in range(len(parts), 1, -1):
            module = ".".join(parts[:depth])
            if module in files and module not in reached:
                reached.add(module)
                todo |= _imports(ast.parse(files[module].read_text()))
    return sorted(reached)


def key(chapter: str, profile: str) -> str:
    """A hash of everything that the outputs of a chapter depend on."""
    notebook = read(source(chapter))
    files = module_files()
    digest = hashlib.sha256()
    digest.update(f"{profile} {sys.version_info[:2]} {os.environ.get('NBLIB_DATA')}".encode())
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(json.dumps([cell.id, cell.source, cell.metadata], sort_keys=True).encode())
    reached = dependencies(notebook)
    for name in reached:
        digest.update(name.encode() + files[name].read_bytes())
    digest.update((ROOT / "requirements.lock").read_bytes())
    if {"nblib.data", "nblib.zoo"} & set(reached):
        for path in sorted((ROOT / "data").rglob("*")):
            if path.is_file() and "whole" not in path.relative_to(ROOT / "data").parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        from nblib.data.sets import SYSTEM

        digest.update(str([str(folder) for folder in SYSTEM.values() if folder.is_dir()]).encode())
    return digest.hexdigest()


def colab(repository: str | None, copy: str) -> str | None:
    """Where Colab opens a reader's copy, ``vae/x`` or ``student/vae/x``: it reads branches of GitHub only."""
    if not repository or not repository.startswith("https://github.com/"):
        return None
    home = repository.replace("https://github.com", "https://colab.research.google.com/github")
    return f"{home}/blob/notebooks/{copy}.ipynb"


def repository() -> str | None:
    """The repository's address as https and without credentials: that of GitHub's runner, else of the remote origin."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return f"https://github.com/{name}"
    try:
        found = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    address = re.fullmatch(
        r"(?:(?:https?|ssh|git)://(?:[^@/]+@)?([^/:]+)(?::\d+)?/|[^@/:]+@([^/:]+):)(.+?)(?:\.git)?/?",
        found.stdout.strip(),
    )
    return f"https://{address[1] or address[2]}/{address[3]}" if address else None

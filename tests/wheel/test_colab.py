"""A reader's copies run with the built wheel alone, in an empty folder, as they would in Colab."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from tools import book, export, site

EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
path = sys.argv[1]
notebook = nbformat.read(path, 4)
NotebookClient(notebook, timeout=300).execute(cwd=sys.argv[2])
nbformat.write(notebook, path)
"""
# The package is that of the wheel, and nothing else was imported from the checkout.
PROOF = """
import sys, nblib
from pathlib import Path

assert Path(nblib.__file__).is_relative_to({wheel!r}), nblib.__file__
files = [Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
mine = [f for f in files if f.is_relative_to({root!r}) and not f.is_relative_to(sys.prefix)]
assert not [f for f in mine if not f.is_relative_to({wheel!r})], mine
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the wheel in it, without its dependencies."""
    built, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(book.ROOT)]
    for command in (build, [*pip, "install", "--no-deps", "--target", str(folder)]):
        files = [str(path) for path in built.glob("nblib-*.whl")] if command is not build else []
        done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=built)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def errors(notebook: book.Notebook) -> set[str]:
    """The cells that failed."""
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    return {cell.id for cell in code if any(output.output_type == "error" for output in cell.outputs)}


def test_every_copy_runs_with_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    proof = PROOF.format(wheel=str(wheel), root=str(book.ROOT))
    env = {
        **os.environ,
        "PYTHONPATH": str(wheel),
        "NBLIB_PROFILE": "smoke",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }

    def run(item: tuple[str, book.Notebook]) -> str:
        """Why a copy fails, or nothing."""
        name, notebook = item
        path, empty = tmp_path / name, tmp_path / "empty" / name
        for folder in (path.parent, empty):
            folder.mkdir(parents=True, exist_ok=True)
        notebook.cells.insert(2, nbformat.v4.new_code_cell(proof, id="proof-first"))
        notebook.cells.append(nbformat.v4.new_code_cell(proof, id="proof-last"))
        nbformat.write(notebook, path)
        command = [sys.executable, "-c", EXECUTE, str(path), str(empty)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=empty)
        if done.returncode:
            return f"{name}: {done.stderr[-3000:]}"
        open_questions = {cell.id for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", [])}
        failed = errors(nbformat.read(path, 4))
        return "" if failed == open_questions else f"{name}: {failed ^ open_questions} are not as they should be"

    copies: dict[str, book.Notebook] = {}
    for chapter in book.notebooks():
        text = "\n".join(cell.source for cell in book.read(book.source(chapter)).cells)
        values = {name: "0" for name, _ in site.VALUE.findall(text)}
        copies |= export.export(chapter, export.lookup(values, None), None)
    with ThreadPoolExecutor(2) as pool:
        assert [why for why in pool.map(run, copies.items()) if why] == []

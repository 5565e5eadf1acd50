"""What a chapter depends on, when it is executed again, and how its numbers reach the prose."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import book, execute, site


def notebook(*sources: str) -> book.Notebook:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_notebook_depends_on_what_it_uses_and_on_what_that_imports() -> None:
    reached = book.dependencies(notebook("import nblib as nb", "nb.probability.gaussian_kl"))
    assert "nblib.probability" in reached
    assert "nblib.errors" in reached  # imported by probability
    assert "nblib.page" in reached  # every page records
    assert not {"nblib.vae.model", "nblib.zoo", "nblib.cli", "nblib.data.sets"} & set(reached)


def test_names_that_nblib_forwards_are_followed_to_their_module() -> None:
    reached = book.dependencies(notebook("import nblib as nb", "nb.fit"))
    assert {"nblib.train.loop", "nblib.train.checkpoint", "nblib.data.sets"} <= set(reached)
    assert "nblib.vae.model" not in reached


def test_imports_inside_functions_count() -> None:
    reached = book.dependencies(notebook("import nblib as nb", "nb.recipes.RECIPES"))
    assert "nblib.vae.model" in reached


def test_from_imports_count() -> None:
    assert "nblib.vae.model" in book.dependencies(notebook("from nblib.vae import VAE"))
    assert "nblib.viz" in book.dependencies(notebook("from nblib import viz"))


def test_everything_is_assumed_where_it_cannot_be_told() -> None:
    assert book.dependencies(notebook("import nblib as nb", "getattr(nb, name)")) == sorted(book.module_files())


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small book of its own: one chapter that uses probability and no data."""
    for name in ("nblib", "data"):
        (tmp_path / name).symlink_to(book.ROOT / name)
    (tmp_path / "book" / "part").mkdir(parents=True)
    nbformat.write(notebook("import nblib as nb", "nb.probability"), tmp_path / "book" / "part" / "one.ipynb")
    (tmp_path / "requirements.lock").write_text("torch==2.15.0\n")
    (tmp_path / "nblib").unlink()
    (tmp_path / "nblib").mkdir()
    for path in (book.ROOT / "nblib").rglob("*.py"):
        target = tmp_path / path.relative_to(book.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "BUILD", tmp_path / "_build")
    return tmp_path


def test_only_a_change_that_matters_executes_a_chapter_again(copy: Path) -> None:
    before = book.key("part/one", "cpu")
    assert book.key("part/one", "cpu") == before
    (copy / "nblib" / "vae" / "model.py").write_text("changed = True\n")
    assert book.key("part/one", "cpu") == before, "the chapter does not use the VAE"
    source = copy / "book" / "part" / "one.ipynb"
    changed = notebook("import nblib as nb", "nb.probability")
    changed.cells.append(nbformat.v4.new_markdown_cell("Prose."))
    nbformat.write(changed, source)
    assert book.key("part/one", "cpu") == before, "prose is not executed"
    assert book.key("part/one", "smoke") != before

    for path in ("nblib/probability.py", "requirements.lock"):
        text = (copy / path).read_text()
        (copy / path).write_text(text + "\n# changed\n")
        assert book.key("part/one", "cpu") != before, path
        (copy / path).write_text(text)
        assert book.key("part/one", "cpu") == before
    nbformat.write(notebook("import nblib as nb", "nb.probability.gaussian_kl"), source)
    assert book.key("part/one", "cpu") != before


def test_a_chapter_is_fresh_only_with_its_outputs_and_its_record(copy: Path) -> None:
    key = book.key("part/one", "cpu")
    assert not execute.fresh("part/one", "cpu", key)
    record, executed = book.record("part/one", "cpu"), book.executed("part/one", "cpu")
    for path in (record, executed):
        path.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"key": key}))
    assert not execute.fresh("part/one", "cpu", key)
    executed.write_text("{}")
    assert execute.fresh("part/one", "cpu", key)
    assert not execute.fresh("part/one", "cpu", "another")


def test_prose_takes_its_numbers_from_the_record() -> None:
    text = "The gap is {nbval}`gap:.2f` nats on {nbval}`name`; {nbval}`gap`."
    assert site.fill(text, {"gap": 0.126, "name": "digits"}, "x") == "The gap is 0.13 nats on digits; 0.126."
    with pytest.raises(SystemExit, match="'other', which the run did not record"):
        site.fill("{nbval}`other:.2f`", {}, "x")


def test_an_unexecuted_chapter_stops_the_site(copy: Path) -> None:
    (copy / "_toc.yml").write_text(yaml.safe_dump({"root": "index", "chapters": [{"file": "book/part/one"}]}))
    (copy / "_config.yml").write_text("{repository: {}, launch_buttons: {}, html: {}}")
    (copy / "index.md").write_text("")
    (copy / "tools" / "sphinx_ext").mkdir(parents=True)
    with pytest.raises(SystemExit, match="part/one was not executed"):
        site.stage("cpu", copy / "stage", allow_unexecuted=False)


def test_environment_file_installs_the_lock_and_the_package() -> None:
    environment = yaml.safe_load((book.ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "jupyterlab-myst", "."]  # Binder shows the sources
    assert "python=3.12" in environment["dependencies"]


def test_the_lock_pins_everything_and_names_no_host() -> None:
    lines = (book.ROOT / "requirements.lock").read_text().splitlines()
    assert all("==" in line.split(";")[0] for line in lines if line and not line.lstrip().startswith("#"))
    assert not any("://" in line for line in lines)

"""ipywidgets on a built page: the manager comes from the site, a linked slider and Play work without a kernel."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
import yaml
from built import CI, needs_chromium
from conftest import Quiet, open_page

from tools import book, site, vendor

pytestmark = needs_chromium
WIDGETS = """
import io, ipywidgets as w, matplotlib.pyplot as plt, numpy as np
from IPython.display import display

def png(grey):
    file = io.BytesIO()
    plt.imsave(file, np.full((20, 20), grey), format="png", cmap="gray", vmin=0, vmax=8)
    return file.getvalue()

stack = w.Stack([w.Image(value=png(k), format="png", width=40, height=40) for k in range(8)], selected_index=0)
slider = w.IntSlider(min=0, max=7, description="frame")
play = w.Play(min=0, max=7, interval=150)
w.jslink((slider, "value"), (stack, "selected_index"))
w.jslink((play, "value"), (slider, "value"))
display(w.VBox([w.HBox([play, slider]), stack]))
"""


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A book of one page with linked widgets, built as the book is."""
    from nbclient import NotebookClient

    if vendor.fetch() is None:
        assert not CI, "CI must serve the widget manager itself"
        pytest.skip("the widget manager cannot be fetched")
    folder = tmp_path_factory.mktemp("widgets")
    (folder / "_config.yml").write_text(yaml.safe_dump(site.config(None)))
    (folder / "_toc.yml").write_text("{format: jb-book, root: index}")
    shutil.copytree(book.ROOT / "tools" / "sphinx_ext", folder / "_ext")
    (folder / "book" / "_static").mkdir(parents=True)
    shutil.copy(book.ROOT / "book" / "_static" / "book.css", folder / "book" / "_static")
    (folder / "book" / "references.bib").write_text("")
    cells = [nbformat.v4.new_markdown_cell("# Widgets"), nbformat.v4.new_code_cell(WIDGETS)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p"}})
    nbformat.write(NotebookClient(notebook, timeout=60).execute(), folder / "index.ipynb")
    handler = functools.partial(Quiet, directory=str(site.build(folder)))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}/"
    opened = open_page(browser, base)
    opened.goto(base + "index.html")
    opened.wait_for_selector(".noUi-handle")
    yield opened
    opened.close()
    server.shutdown()
    server.server_close()
    thread.join()


def picture(page: Any) -> str:
    """The address of the frame that is seen."""
    seen = "[...document.querySelectorAll('img.widget-image')].filter((image) => image.offsetParent).map((i) => i.src)"
    (address,) = page.evaluate(seen)
    return str(address)


def test_a_linked_slider_moves_the_picture(page: Any) -> None:
    before = picture(page)
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    assert page.locator(".widget-readout").inner_text() == "1"
    assert picture(page) != before


def test_play_moves_the_picture_and_stops(page: Any) -> None:
    button, before = page.locator(".widget-play button").first, picture(page)
    assert button.get_attribute("aria-label") == "Play"
    button.click()
    page.wait_for_function("Number(document.querySelector('.widget-readout').textContent) >= 3", timeout=5000)
    assert button.get_attribute("aria-label") == "Pause"
    button.click()
    page.wait_for_timeout(200)
    held, frame = page.locator(".widget-readout").inner_text(), picture(page)
    assert frame != before
    page.wait_for_timeout(500)
    assert page.locator(".widget-readout").inner_text() == held
    assert picture(page) == frame


def test_the_widgets_ask_nobody_else_and_have_names(page: Any) -> None:
    assert page.trouble == []
    assert page.locator(".noUi-handle").get_attribute("aria-label") == "frame"

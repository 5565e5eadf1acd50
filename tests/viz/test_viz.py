"""Figures are drawn without touching the session's settings; sliders are complete and escaped HTML."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import nblib as nb
from nblib import viz
from nblib.errors import DataError
from nblib.train import History

BOARD = nb.data.toy.make("checkerboard")
LIMITS = (-4.0, 4.0, -3.0, 3.0)


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


def history() -> History:
    rows = [{"step": float(s), "loss": 1.0 / s, "kl": float(s)} for s in (1, 2, 3)]
    return History(rows=rows, evals=[{"step": 3.0, "loss": 0.5}])


def draw_line(figure: Figure, value: float) -> None:
    figure.subplots().plot([0, 1], [0, value])


DRAWINGS: dict[str, Callable[..., None]] = {
    "image_grid": lambda **k: viz.image_grid(torch.rand(7, 1, 5, 6), columns=3, **k),
    "density": lambda **k: viz.density(BOARD.log_prob, LIMITS, points=20, **k),
    "field": lambda **k: viz.field(nb.data.toy.make("two-moons").score, LIMITS, points=8, **k),
    "field of zeros": lambda **k: viz.field(BOARD.score, LIMITS, points=8, **k),
    "field of nothing": lambda **k: viz.field(lambda x: x * torch.nan, LIMITS, points=8, **k),
    "latent_scatter": lambda **k: viz.latent_scatter(
        torch.randn(30, 2), torch.arange(30) % 3, ("a", "b", "c", "none of these"), **k
    ),
    "curves": lambda **k: viz.curves(history(), **k),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_is_drawn_on_new_or_given_axes(name: str) -> None:
    assert mpl.get_backend().lower() == "agg"
    DRAWINGS[name]()
    assert len(plt.get_fignums()) == 1
    figure, ax = plt.subplots()
    DRAWINGS[name](ax=ax)
    assert len(plt.get_fignums()) == 2
    assert ax.has_data() or name == "field of nothing"
    figure.canvas.draw()


@pytest.mark.parametrize("name", sorted(set(DRAWINGS) - {"curves"}))
def test_a_title_is_written(name: str) -> None:
    _, ax = plt.subplots()
    DRAWINGS[name](ax=ax, title="here")
    assert ax.get_title() == "here"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_holds_every_image_in_its_place(channels: int) -> None:
    images = torch.rand(5, channels, 4, 6)
    _, ax = plt.subplots()
    viz.image_grid(images, columns=3, ax=ax, labels=["one", "two"])
    canvas = np.asarray(ax.images[0].get_array()).reshape(9, 20, channels)
    for i, image in enumerate(images):
        top, left = i // 3 * 5, i % 3 * 7
        part = canvas[top : top + 4, left : left + 6]
        assert np.allclose(part, image.permute(1, 2, 0).numpy())
    assert canvas[5:, 14:].min() == 1
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]


def test_the_grid_clips_to_the_unit_interval() -> None:
    _, ax = plt.subplots()
    viz.image_grid(torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1), columns=2, ax=ax)
    assert np.asarray(ax.images[0].get_array()).ravel()[[0, -1]].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (3, 2, 4, 4), (0, 1, 4, 4)], ids=str)
def test_the_grid_refuses_what_is_not_a_batch_of_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=re.escape(f"got {shape}")):
        viz.image_grid(torch.zeros(shape))


def test_the_grid_refuses_no_columns() -> None:
    with pytest.raises(DataError, match="at least one column, got 0"):
        viz.image_grid(torch.zeros(2, 1, 4, 4), columns=0)


def test_the_density_is_the_exponential_of_the_log_density_at_its_place() -> None:
    _, ax = plt.subplots()
    viz.density(lambda x: x[:, 0] + 10 * x[:, 1], (0.0, 1.0, 0.0, 2.0), points=3, ax=ax)
    values = np.asarray(ax.collections[0].get_array()).reshape(3, 3)
    assert np.allclose(np.log(values), [[0, 0.5, 1], [10, 10.5, 11], [20, 20.5, 21]])


def test_arrows_that_are_not_finite_are_left_out() -> None:
    _, ax = plt.subplots()
    viz.field(BOARD.score, LIMITS, points=8, ax=ax)
    assert 0 < ax.collections[0].N < 64


def test_the_scatter_names_the_classes_that_occur() -> None:
    _, ax = plt.subplots()
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    viz.latent_scatter(z, torch.tensor([0, 1, 1]), ("shoe", "bag", "coat"), limit=5, ax=ax)
    assert {t.get_text(): tuple(t.xy) for t in ax.texts} == {"shoe": (0, 0), "bag": (2, 3)}
    assert ax.get_xlim() == ax.get_ylim() == (-5, 5)


def test_curves_draw_the_asked_columns_only() -> None:
    _, ax = plt.subplots()
    viz.curves(history(), "kl", "eval/loss", ax=ax)
    assert [line.get_label() for line in ax.lines] == ["kl", "eval/loss"]
    with pytest.raises(DataError, match="Did you mean 'loss'"):
        viz.curves(history(), "los", ax=ax)


def test_the_style_is_set_only_on_request() -> None:
    with mpl.rc_context():
        viz.use_style()
        assert mpl.rcParams["axes.spines.top"] is False
        assert set(viz.CYCLE) <= set(viz.COLORS.values())


# --- sliders -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the text of the script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def first(self, name: str) -> dict[str, str | None]:
        return next(attributes for tag, attributes in self.tags if tag == name)


def make_slider(values: Any = (1, 2, 3), **settings: Any) -> viz.Slider:
    return viz.slider(draw_line, values, **{"label": "height", "alt": "A line.", "size": (2, 1), **settings})


def frames(text: str) -> list[bytes]:
    found = re.search(r"frames = (\[.*?\])", text)
    assert found is not None
    return [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in json.loads(found[1])]


def test_a_slider_holds_every_frame_in_order() -> None:
    slider = make_slider()
    page = Page(slider._repr_html_())
    assert frames(page.text) == slider.frames
    assert len(set(slider.frames)) == 3
    assert all(frame.startswith(b"\x89PNG") for frame in slider.frames)
    control = page.first("input")
    assert (control["min"], control["max"], control["value"]) == ("0", "2", "0")
    assert page.first("img")["alt"] == "A line."
    # Or JupyterLab takes the arrow keys, for the headings of the notebook.
    assert "data-lm-suppress-shortcuts" in control
    assert "data-lm-suppress-shortcuts" in page.first("button")
    assert "height" in page.text
    assert "3 frames" in repr(slider)


def test_a_slider_starts_where_it_is_told() -> None:
    slider = make_slider(start=2, text=lambda v: f"{v} m")
    page = Page(slider._repr_html_())
    assert page.first("input")["value"] == "2"
    assert page.first("input")["aria-valuetext"] == "3 m"
    src = page.first("img")["src"]
    assert src is not None
    assert base64.b64decode(src.split(",")[1]) == slider.frames[2]
    assert '["1 m", "2 m", "3 m"]' in page.text


NASTY = "a <b>\"quote\" & 'tick' {brace} </script><i>"


def test_labels_are_escaped_everywhere() -> None:
    text = make_slider(label=NASTY, alt=NASTY, text=lambda v: f"{NASTY}{v}")._repr_html_()
    page = Page(text)
    assert page.first("img")["alt"] == NASTY
    assert page.first("input")["aria-valuetext"] == f"{NASTY}1"
    assert text.count("</script>") == 1
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(make_slider()._repr_html_()).tags]
    found = re.search(r"texts = (\[.*\]);", page.text)
    assert found is not None
    assert json.loads(found[1]) == [f"{NASTY}{v}" for v in (1, 2, 3)]
    assert html.escape(NASTY) in text


def test_the_identity_of_a_slider_is_that_of_its_frames() -> None:
    one, two, other = make_slider(), make_slider(), make_slider((1, 2, 4))
    assert one._repr_html_() == two._repr_html_()
    identities = [Page(s._repr_html_()).first("figure")["id"] for s in (one, other)]
    assert identities[0] != identities[1]
    assert f'getElementById("{identities[0]}")' in one._repr_html_()


@pytest.mark.parametrize("values", [[], [1], list(range(61))], ids=len)
def test_a_slider_needs_two_to_sixty_values(values: list[int]) -> None:
    with pytest.raises(DataError, match=f"2 to 60 values, got {len(values)}"):
        make_slider(values)


@pytest.mark.parametrize("start", [-1, 3])
def test_a_slider_cannot_start_outside_its_values(start: int) -> None:
    with pytest.raises(DataError, match=f"0 to 2, got {start}"):
        make_slider(start=start)


def test_sliders_leave_no_figures_open() -> None:
    make_slider()
    assert plt.get_fignums() == []


# --- live controls -------------------------------------------------------------------------------------


def test_a_page_in_the_making_shows_the_precomputed_slider(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = make_slider()
    assert viz.live(lambda a: None, fallback, a=(0, 3)) is fallback
    monkeypatch.delenv("NBLIB_PROGRESS")
    monkeypatch.setenv("NBLIB_RECORD", "somewhere")
    assert viz.live(lambda a: None, fallback, a=(0, 3)) is fallback


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_live_session_shows_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    import ipywidgets

    monkeypatch.setenv("NBLIB_PROGRESS", "1")
    shown = viz.live(lambda a: a, make_slider(), a=(0, 6))
    assert isinstance(shown, ipywidgets.interactive)
    assert [(c.description, c.min, c.max) for c in shown.children[:-1]] == [("a", 0, 6)]

"""Figures of the book in one visual language, and sliders that need no kernel.

Every function draws on the given axes, or on a new figure that the notebook then shows.
Colours are from the Okabe-Ito palette: data, model and truth look the same on every page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nblib.errors import DataError

if TYPE_CHECKING:
    from nblib.train.history import History

__all__ = [
    "COLORS",
    "STYLE",
    "Slider",
    "curves",
    "density",
    "field",
    "image_grid",
    "latent_scatter",
    "live",
    "slider",
    "use_style",
]

COLORS = {"data": "#0072B2", "model": "#D55E00", "truth": "#222222", "noise": "#999999", "extra": "#009E73",
          "second": "#CC79A7", "third": "#E69F00", "light": "#56B4E9"}  # fmt: skip
CYCLE = [COLORS[k] for k in ("data", "model", "extra", "second", "third", "light")]
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "image.cmap": "viridis",
    "axes.prop_cycle": cycler(color=CYCLE),
}


def use_style() -> None:
    """Make the book's style the default of this session (importing nblib does not)."""
    plt.rcParams.update(STYLE)


def _axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.2)) -> Axes:
    return ax if ax is not None else plt.subplots(figsize=size)[1]


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def image_grid(
    images: Tensor,
    *,
    columns: int = 10,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: float = 0.75,
    ax: Axes | None = None,
) -> None:
    """Images ``(N, C, H, W)`` in [0, 1] as one grid, row by row; C is 1 or 3.

    Args:
        labels: one per row, written at the left.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise DataError(f"image_grid needs images of shape (N, 1 or 3, H, W), got {tuple(images.shape)}.")
    if columns < 1:
        raise DataError(f"image_grid needs at least one column, got {columns}.")
    x = _array(images.float().clamp(0, 1))
    n, c, h, w = x.shape
    rows = math.ceil(n / columns)
    pad = max(1, h // 14)
    canvas = np.ones((c, rows * (h + pad) - pad, columns * (w + pad) - pad))
    for i in range(n):
        top, left = i // columns * (h + pad), i % columns * (w + pad)
        canvas[:, top : top + h, left : left + w] = x[i]
    ax = _axes(ax, (columns * scale, rows * scale + (0.3 if title else 0)))
    ax.imshow(canvas[0] if c == 1 else canvas.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([h / 2 + r * (h + pad) for r in range(len(labels))] if labels else [], labels or [])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        ax.set_title(title)


def _mesh(limits: tuple[float, float, float, float], points: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    a = np.linspace(limits[0], limits[1], points)
    b = np.linspace(limits[2], limits[3], points)
    grid = np.stack(np.meshgrid(a, b), -1).reshape(-1, 2)
    return a, b, torch.from_numpy(grid)


def density(
    log_prob: Callable[[Tensor], Tensor],
    limits: tuple[float, float, float, float],
    *,
    points: int = 120,
    title: str | None = None,
    ax: Axes | None = None,
) -> None:
    """A two-dimensional density on ``limits = (x0, x1, y0, y1)``, from a log-density ``(M, 2) -> (M,)``."""
    ax = _axes(ax, (3.6, 3.4))
    a, b, grid = _mesh(limits, points)
    values = np.exp(_array(log_prob(grid))).reshape(points, points)
    ax.pcolormesh(a, b, values, cmap="Blues", shading="auto", rasterized=True)
    ax.set_aspect("equal")
    ax.grid(False)
    if title:
        ax.set_title(title)


def field(
    vectors: Callable[[Tensor], Tensor],
    limits: tuple[float, float, float, float],
    *,
    points: int = 20,
    color: str = COLORS["model"],
    title: str | None = None,
    ax: Axes | None = None,
) -> None:
    """Arrows of a vector field ``(M, 2) -> (M, 2)`` on a grid; non-finite arrows are left out."""
    ax = _axes(ax, (3.6, 3.4))
    _, _, grid = _mesh(limits, points)
    v, at = _array(vectors(grid)), _array(grid)
    ok = np.isfinite(v).all(1)
    scale = None if v[ok].any() else 1.0  # arrows of length zero alone have no scale of their own
    ax.quiver(at[ok, 0], at[ok, 1], v[ok, 0], v[ok, 1], color=color, width=0.004, scale=scale)
    ax.set_aspect("equal")
    if title:
        ax.set_title(title)


def latent_scatter(
    means: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> None:
    """Codes ``(N, 2)`` coloured by class, with the class names at their medians."""
    ax = _axes(ax, (5.4, 4.8))
    z, y = _array(means), _array(labels)
    colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for k, name in enumerate(classes):
        own = z[y == k]
        ax.scatter(own[:, 0], own[:, 1], s=3, alpha=0.35, color=colors[k % 10], linewidths=0, rasterized=True)
        if len(own):
            box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": colors[k % 10], "lw": 1.2}
            ax.annotate(name, np.median(own, 0), ha="center", va="center", fontsize=8.5, bbox=box)
    if limit:
        ax.set_xlim(-limit, limit)
        ax.set_ylim(-limit, limit)
    ax.set_aspect("equal")
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    if title:
        ax.set_title(title)


def curves(history: History, *names: str, ax: Axes | None = None) -> None:
    """Columns of a training history against the step: lines for training, dots for evaluation."""
    ax = _axes(ax)
    for i, name in enumerate(names or [n for n in history.names() if n.split("/")[-1] != "step"]):
        mark = "o-" if name.startswith("eval/") else "-"
        ax.plot(history.steps(name), history[name], mark, ms=3.5, label=name, color=CYCLE[i % len(CYCLE)])
    ax.set_xlabel("training step")
    ax.set_ylabel("nats per example")
    ax.legend()


# --- sliders -------------------------------------------------------------------------------------------------


# The data attribute keeps JupyterLab from taking the arrow keys for itself.
_SLIDER = """<figure class="nb-slider" id="{id}" style="margin:0 0 1em 0">
<img alt="{alt}" src="{first}" style="max-width:100%;height:auto;background:white">
<div style="display:flex;gap:.6em;align-items:center;flex-wrap:wrap;max-width:{width}px">
<button type="button" class="nb-play" data-lm-suppress-shortcuts="true"
 aria-pressed="false" style="min-width:4.5em;padding:.2em .6em">Play</button>
<label style="flex:1;display:flex;gap:.6em;align-items:center;min-width:12em">{label}
<input type="range" data-lm-suppress-shortcuts="true"
 min="0" max="{last}" value="{start}" step="1" style="flex:1;min-width:8em"
 aria-valuetext="{text}"></label>
<output style="min-width:4em;font-variant-numeric:tabular-nums">{text}</output></div>
<script>(function () {{
  const root = document.getElementById("{id}"), frames = {frames}, texts = {texts};
  const img = root.querySelector("img"), input = root.querySelector("input");
  const out = root.querySelector("output"), play = root.querySelector("button");
  let timer = null;
  function show() {{
    img.src = frames[+input.value]; out.textContent = texts[+input.value];
    input.setAttribute("aria-valuetext", texts[+input.value]);
  }}
  function stop() {{
    clearInterval(timer); timer = null;
    play.textContent = "Play"; play.setAttribute("aria-pressed", "false");
  }}
  input.addEventListener("input", function () {{ stop(); show(); }});
  play.addEventListener("click", function () {{
    if (timer) {{ stop(); return; }}
    play.textContent = "Pause"; play.setAttribute("aria-pressed", "true");
    timer = setInterval(function () {{ input.value = (+input.value + 1) % frames.length; show(); }}, {interval});
  }});
}})();</script></figure>"""


class Slider:
    """A figure with a slider and a Play button made of precomputed frames: plain HTML, no kernel, no library.

    It works on a static page, in JupyterLab and on Colab.
    """

    def __init__(self, frames: list[bytes], texts: list[str], label: str, alt: str, start: int, interval: int) -> None:
        self.frames, self.texts, self.label, self.alt = frames, texts, label, alt
        self.start, self.interval = start, interval

    def __repr__(self) -> str:
        return f"Slider({self.label!r}, {len(self.frames)} frames, {sum(map(len, self.frames)) // 1000} kB)"

    def _repr_html_(self) -> str:
        urls = [f"data:image/png;base64,{base64.b64encode(f).decode()}" for f in self.frames]
        width = int.from_bytes(self.frames[0][16:20], "big")
        return _SLIDER.format(
            id="nb-" + hashlib.sha256(b"".join([self.label.encode(), *self.frames])).hexdigest()[:12],
            alt=html.escape(self.alt, quote=True),
            label=html.escape(self.label),
            first=urls[self.start],
            last=len(urls) - 1,
            start=self.start,
            text=html.escape(self.texts[self.start], quote=True),
            width=max(width, 320),
            frames=json.dumps(urls),
            texts=json.dumps(self.texts).replace("</", "<\\/"),  # "</script>" would end the script
            interval=self.interval,
        )


def slider(
    draw: Callable[[Figure, Any], None],
    values: Sequence[Any],
    *,
    label: str,
    alt: str,
    text: Callable[[Any], str] = str,
    start: int = 0,
    size: tuple[float, float] = (5.0, 3.2),
    dpi: int = 72,
    interval: int = 250,
) -> Slider:
    """Draw one frame per value and show them under a slider that works without a kernel.

    Args:
        draw: ``(figure, value)``; draws the frame on an empty figure.
        values: at most 60, so that the page stays light.
        label: what the slider changes. alt: what the picture shows, for readers who cannot see it.
        text: the value as it is shown beside the slider. interval: milliseconds per frame while playing.
    """
    values = list(values)
    if not 2 <= len(values) <= 60:
        raise DataError(f"slider needs 2 to 60 values, got {len(values)}.")
    if not 0 <= start < len(values):
        raise DataError(f"slider starts at one of its {len(values)} values, 0 to {len(values) - 1}, got {start}.")
    frames = []
    with plt.rc_context(STYLE):
        for value in values:
            figure = Figure(figsize=size, dpi=dpi, layout="constrained")
            draw(figure, value)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
            frames.append(buffer.getvalue())
    return Slider(frames, [text(v) for v in values], label, alt, start, interval)


def live(function: Callable[..., Any], fallback: Slider, /, **controls: Any) -> Any:
    """``ipywidgets`` controls where a live kernel runs, the precomputed ``fallback`` where a page is being made.

    Args:
        function: called with the values of the controls; draws with pyplot.
        controls: as in ``ipywidgets.interactive``: ranges, lists, or widgets.
    """
    if os.environ.get("NBLIB_RECORD") or os.environ.get("NBLIB_PROGRESS") == "0":
        return fallback
    from ipywidgets import interactive

    return interactive(function, **controls)

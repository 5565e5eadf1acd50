"""What happened during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from nblib.errors import DataError, unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["History"]


@dataclass(repr=False)
class History:
    """Rows of training and evaluation figures, with the trained model.

    ``history["loss"]`` and ``history["eval/kl"]`` are arrays; ``history.steps("eval/kl")`` are their steps.

    Attributes:
        rows: training rows: ``step``, ``loss`` and the model's logs, averaged since the row before.
        evals: evaluation rows: the same names, averaged over the evaluation set.
        seconds: time spent in the loop, evaluation included.
        model: the model that was trained, in place. ema: its moving average, where one was asked for.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    step: int = 0
    examples: int = 0
    model: nn.Module | None = None
    ema: nn.Module | None = None

    def __repr__(self) -> str:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.last.items() if k != "step") if self.rows else "no rows"
        kind = "evaluation" if self.evals else "training"
        return f"History({self.step:,} steps, {self.seconds:.1f} s; last {kind}: {figures})"

    def _table(self, name: str) -> tuple[list[dict[str, float]], str]:
        rows, key = (self.evals, name[5:]) if name.startswith("eval/") else (self.rows, name)
        if not rows or key not in rows[0]:
            raise DataError(unknown("history column", name, self.names()))
        return rows, key

    def names(self) -> list[str]:
        """The columns that ``history[...]`` knows."""
        return [*(self.rows[0] if self.rows else ()), *(f"eval/{k}" for k in (self.evals[0] if self.evals else ()))]

    def __getitem__(self, name: str) -> np.ndarray:
        rows, key = self._table(name)
        return np.array([row[key] for row in rows])

    def steps(self, name: str = "loss") -> np.ndarray:
        """The training steps at which column ``name`` was recorded."""
        rows, _ = self._table(name)
        return np.array([int(row["step"]) for row in rows])

    @property
    def last(self) -> dict[str, float]:
        """The last evaluation row, or the last training row where nothing was evaluated."""
        return (self.evals or self.rows)[-1]

    def plot(self, *names: str, ax: Axes | None = None) -> None:
        """Draw columns against the step; by default every logged figure, training and evaluation."""
        from nblib import viz

        viz.curves(self, *names, ax=ax)

    def to_json(self) -> dict[str, Any]:
        """Everything but the modules."""
        return {name: getattr(self, name) for name in ("rows", "evals", "seconds", "step", "examples")}

"""What a page of the book uses: its profile, its budget, its checks, its record, its source listings."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nblib.errors import CheckFailed, DataError, unknown

__all__ = [
    "PROFILES",
    "Source",
    "Table",
    "budget",
    "check",
    "check_bound",
    "check_erratum",
    "check_mc",
    "profile",
    "record",
    "show",
    "table",
]

PROFILES = ("smoke", "cpu", "gpu")
T = TypeVar("T")
_state: dict[str, Any] = {"profile": None, "checks": [], "values": {}, "seen": time.perf_counter(), "timed": False}


def profile(name: str | None = None) -> str:
    """Resolve and remember the profile: the given name, else ``$NBLIB_PROFILE``, else ``"cpu"``.

    Raises:
        DataError: unknown profile.
    """
    name = name or _state["profile"] or os.environ.get("NBLIB_PROFILE") or "cpu"
    if name not in PROFILES:
        raise DataError(unknown("profile", name, PROFILES))
    _state["profile"] = name
    _time_cells()
    return name


def _time_cells() -> None:
    """In a notebook, count the seconds of a check from the start of its cell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and not _state["timed"]:
        shell.events.register("pre_run_cell", lambda *_: _state.update(seen=time.perf_counter()))
        _state["timed"] = True


def budget(*, smoke: T, cpu: T, gpu: T) -> T:
    """The value that belongs to the current profile."""
    return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[profile()]


# --- claims and checks -------------------------------------------------------------------------------------


def _log(label: str, kind: str, measured: float, tolerance: float) -> None:
    now = time.perf_counter()
    entry = {
        "label": label,
        "kind": kind,
        "measured": measured,
        "tolerance": tolerance,
        "seconds": now - _state["seen"],
    }
    _state["checks"].append(entry)
    _state["seen"] = now
    _write()


def _write() -> None:
    """The record of this page, where the executor asked for one."""
    target = os.environ.get("NBLIB_RECORD")
    if target:
        content = {"profile": profile(), "checks": _state["checks"], "values": _state["values"]}
        aside = Path(f"{target}.tmp")
        aside.write_text(json.dumps(content, indent=1))
        aside.replace(target)


def _brief(value: Tensor) -> str:
    flat = [f"{v:.6g}" for v in value.flatten()[:4].tolist()]
    return flat[0] if value.ndim == 0 else f"[{', '.join(flat)}{', ...' if value.numel() > 4 else ''}]"


def _double(value: Any) -> Tensor:
    """In float64 on the CPU; a Python number does not pass through float32."""
    return value.detach().cpu().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def check(label: str, got: Any, expected: Any, *, atol: float = 1e-6, rtol: float = 0.0) -> None:
    """Claim ``label`` of the book says that two things are equal: compare them, say so, record the difference.

    Args:
        label: of a theorem, equation or figure of the book.
        got, expected: numbers, arrays or tensors of broadcastable shapes.
        atol, rtol: the largest allowed difference is ``atol + rtol * max|expected|``.

    Raises:
        CheckFailed: with both values, the difference and the tolerance.
    """
    a, b = _double(got), _double(expected)
    tolerance = atol + rtol * float(b.abs().max())
    difference = float((a - b).abs().max())
    if not difference <= tolerance < math.inf:
        raise CheckFailed(f"{label}: got {_brief(a)}, expected {_brief(b)}: |Δ| = {difference:.3g} > {tolerance:.3g}.")
    _log(label, "equal", difference, tolerance)
    print(f"✓ {label}  |Δ| ≤ {tolerance:.0e}")


def check_mc(label: str, samples: Any, expected: Any, *, z: float = 4.0) -> None:
    """Claim ``label`` says that samples have this expectation: compare their mean within ``z`` standard errors.

    Args:
        samples: ``(n, ...)``, independent along the first axis. expected: broadcastable to the mean.

    Raises:
        CheckFailed: the mean is further away than ``z`` standard errors (in any component).
    """
    s, e = _double(samples), _double(expected)
    if len(s) < 2:
        raise DataError(f"{label}: check_mc needs at least 2 samples, got {len(s)}.")
    error = s.std(0) / math.sqrt(len(s))
    # A component without spread must agree to rounding.
    scores = (s.mean(0) - e).abs() / torch.maximum(error, 1e-12 * (1 + e.abs()))
    worst = float(scores.max())
    if not worst <= z:
        raise CheckFailed(
            f"{label}: mean {_brief(s.mean(0))} ± {_brief(error)} over {len(s):,} samples, expected {_brief(e)}:"
            f" {worst:.1f} standard errors > {z:g}."
        )
    _log(label, "mean", worst, z)
    print(f"✓ {label}  mean of {len(s):,} samples within {z:g} standard errors")


def check_bound(label: str, lower: Any, upper: Any, *, slack: float = 0.0) -> None:
    """Claim ``label`` says ``lower <= upper`` in every component, up to ``slack``.

    Raises:
        CheckFailed: with the largest violation.
    """
    a, b = _double(lower), _double(upper)
    worst = float((a - b).max())
    if not worst <= slack:
        raise CheckFailed(f"{label}: {_brief(a)} ≤ {_brief(b)} is violated by {worst:.3g} > {slack:.3g}.")
    _log(label, "bound", worst, slack)
    print(f"✓ {label}  lower ≤ upper" + (f" + {slack:.0e}" if slack else ""))


def check_erratum(label: str, truth: Any, *, correct: Any, printed: Any, atol: float = 1e-9) -> None:
    """Entry ``label`` of the errata: the correct form gives ``truth``, the printed one does not.

    Args:
        truth: from a route that uses neither form: enumeration, quadrature, automatic differentiation.
        correct, printed: what the two forms give; of shapes broadcastable to that of ``truth``.
        atol: the correct form must be this close in every component; the printed one must be ten times as far off,
            in some component (an infinite or undefined value is off).

    Raises:
        CheckFailed: the correct form is off, or the printed form is right after all.
    """
    t, right, wrong = _double(truth), _double(correct), _double(printed)
    difference = float((right - t).abs().max())
    if not difference <= atol < math.inf:
        raise CheckFailed(
            f"{label}: the correct form gives {_brief(right)}, the truth is {_brief(t)}: |Δ| > {atol:.3g}."
        )
    gap = float((wrong - t).abs().max())
    if gap <= 10 * atol:
        raise CheckFailed(f"{label}: the printed form gives {_brief(wrong)}, the truth is {_brief(t)}: it is right.")
    _log(label, "erratum", difference, atol)
    off = "undefined" if math.isnan(gap) else f"off by {gap:.2g}"
    print(f"✓ {label}  correct form |Δ| ≤ {atol:.0e}, printed form {off}")


def record(**values: float | int | str) -> None:
    """Note numbers of this run under a name; the prose of the page quotes them from the record."""
    for name, value in values.items():
        _state["values"][name] = value if isinstance(value, str) else float(value)
    _write()


# --- the page's code is the package's code --------------------------------------------------------------------


def _without_docstring(text: str) -> str:
    """The source of a function or class without its own docstring, where there is one above other code."""
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    if ast.get_docstring(node) is None or len(node.body) == 1:
        return text
    doc, lines = node.body[0], text.splitlines()
    return "\n".join(lines[: doc.lineno - 1] + lines[doc.end_lineno :])


class Source:
    """The source of a function or class, shown as a code block wherever Markdown or plain text is shown."""

    def __init__(self, thing: Callable[..., Any] | type, *, docstring: bool = True) -> None:
        self.name = f"{thing.__module__}.{thing.__qualname__}"
        text = inspect.cleandoc("\n" + inspect.getsource(thing))
        if not docstring:
            text = _without_docstring(text)
        self.text = text.rstrip() + "\n"

    def __repr__(self) -> str:
        return f"# {self.name}\n{self.text}"

    def _repr_markdown_(self) -> str:
        return f"```python\n# {self.name}\n{self.text}```"


def show(thing: Callable[..., Any] | type, *, docstring: bool = False) -> Source:
    """The source of ``thing`` as it is in the package, for display: page and package cannot differ."""
    return Source(thing, docstring=docstring)


class Table:
    """A small table, shown as Markdown on a page and as aligned text elsewhere."""

    def __init__(self, header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
        if any(len(row) != len(header) for row in rows):
            raise DataError(f"Every row needs {len(header)} cells, got rows of {sorted({len(row) for row in rows})}.")
        self.lines = [[str(cell) for cell in row] for row in (header, *rows)]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.lines)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in self.lines)

    def _repr_markdown_(self) -> str:
        head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in self.lines)
        return "\n".join([head, "|" + " --- |" * len(self.lines[0]), *body])


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Table:
    """``rows`` under ``header`` as a table; cells are shown as ``str`` shows them.

    Raises:
        DataError: a row has another number of cells than the header.
    """
    return Table(header, rows)

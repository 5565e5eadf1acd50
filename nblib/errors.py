"""What goes wrong, said so that it can be mended: the message names the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckFailed", "CheckpointError", "DataError", "NblibError", "NonFiniteLoss", "unknown"]


class NblibError(Exception):
    """Base class of the errors that nblib raises on purpose."""


class DataError(NblibError, ValueError):
    """A data set, file or batch cannot be used as it is."""


class CheckpointError(NblibError, RuntimeError):
    """A checkpoint cannot be written or does not fit."""


class NonFiniteLoss(NblibError, FloatingPointError):
    """The training loss became NaN or infinite."""


class CheckFailed(NblibError, AssertionError):
    """A claim of the book did not hold numerically."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(map(repr, known))}."

"""The reference of nblib: a page per module from its docstrings, and which of its symbols belong to which label."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import nblib

MODULES = (*(name for name in nblib._MODULES if name != "cli"), "data.toy", "cli")
LABEL = re.compile(r"(?<![\w-])(?:eq|thm|prop|lem|cor|def|alg|ex)-[a-z][\w-]*\w")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"nblib.{name}")


@functools.cache
def documented(name: str) -> dict[str, Any]:
    """What the page of a module documents: its public names, less those that have their home in another module."""
    found, own = {}, module(name)
    for symbol in own.__all__:
        thing = getattr(own, symbol)
        home = getattr(thing, "__module__", None) if inspect.isclass(thing) or inspect.isroutine(thing) else None
        if isinstance(thing, ModuleType) or (home and not f"{home}.".startswith(f"nblib.{name}.")):
            continue
        found[symbol] = thing
    return found


def home(path: str) -> str:
    """The documented name of a symbol that may be a second way to it: ``nblib.fit`` is ``nblib.train.fit``."""
    first = path.removeprefix("nblib.").split(".")[0]
    if first in nblib._NAMES:
        return home(f"nblib.{nblib._NAMES[first]}.{path.removeprefix('nblib.')}")
    for name in sorted(MODULES, key=len, reverse=True):
        if path.startswith(f"nblib.{name}."):
            symbol, _, attribute = path.removeprefix(f"nblib.{name}.").partition(".")
            for other in (name, *MODULES):
                if symbol in documented(other):
                    return f"nblib.{other}.{symbol}" + (f".{attribute}" if attribute else "")
    return path


def by_label() -> dict[str, list[str]]:
    """For each label of the book, the public functions, classes and methods whose docstrings cite it."""
    found: dict[str, list[str]] = {}

    def note(path: str, text: str | None) -> None:
        for label in sorted(set(LABEL.findall(text or ""))):
            found.setdefault(label, []).append(path)

    for name in MODULES:
        for symbol, thing in documented(name).items():
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            note(f"nblib.{name}.{symbol}", thing.__doc__)
            if inspect.isclass(thing):
                for attribute, member in vars(thing).items():
                    if inspect.isroutine(member) and not attribute.startswith("_"):
                        note(f"nblib.{name}.{symbol}.{attribute}", member.__doc__)
    return found


def page(name: str) -> str:
    """The reference page of a module."""
    things = documented(name)
    data = {symbol: thing for symbol, thing in things.items() if not callable(thing)}
    lines = [f"# nblib.{name}", "", "```{eval-rst}", f".. automodule:: nblib.{name}", "   :members:"]
    if hidden := [s for s in module(name).__all__ if s not in things or s in data]:
        lines += [f"   :exclude-members: {', '.join(hidden)}"]
    for symbol, thing in data.items():
        if len(value := repr(thing)) < 200:
            lines += ["", f".. py:data:: nblib.{name}.{symbol}", f"   :value: {value}"]
    lines += ["```"]
    again = [
        s for s in module(name).__all__ if s not in things and not isinstance(getattr(module(name), s), ModuleType)
    ]
    if again:
        links = ", ".join(f"{{py:obj}}`~{home(f'nblib.{name}.{symbol}')}`" for symbol in again)
        lines += ["", f"Also under this name: {links}."]
    if name == "cli":
        for command in ("", "train", "sample", "data"):
            shown = subprocess.run(
                [sys.executable, "-m", "nblib", *command.split(), "--help"],
                capture_output=True,
                text=True,
                env={**os.environ, "COLUMNS": "88"},
            )
            lines += ["", f"## python -m nblib {command}".rstrip(), "", "```text", shown.stdout.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def index() -> str:
    """The list of modules and of the names at the top level, for the page ``book/api/index``."""
    lines = ["| module | what it holds |", "| --- | --- |"]
    for name in MODULES:
        doc = (module(name).__doc__ or "").strip().splitlines()[0].replace("``", "`")
        doc = doc.replace("|", "\\|")
        lines.append(f"| {{doc}}`nblib.{name} <{name}>` | {doc} |")
    names = ", ".join(f"{{py:obj}}`nblib.{name} <{home(f'nblib.{name}')}>`" for name in nblib._NAMES)
    return "\n".join([*lines, "", f"At the top level: {names}."])

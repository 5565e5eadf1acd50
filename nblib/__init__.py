"""nblib: the models, objectives, samplers and training loop of *Deep Generative Models, Derived and Run*.

``import nblib as nb`` costs a few milliseconds: every part is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = (
    "cli",
    "data",
    "diffusion",
    "dynamics",
    "energy",
    "errors",
    "field",
    "flow_matching",
    "nets",
    "networks",
    "page",
    "paths",
    "probability",
    "recipes",
    "train",
    "vae",
    "viz",
    "zoo",
)
_NAMES = {
    "fit": "train",
    "History": "train",
    "budget": "page",
    "check": "page",
    "check_bound": "page",
    "check_erratum": "page",
    "check_mc": "page",
    "profile": "page",
    "record": "page",
    "show": "page",
    "table": "page",
}
__all__ = [*_MODULES, *_NAMES, "__version__"]

if TYPE_CHECKING:
    from nblib import (
        cli,
        data,
        diffusion,
        dynamics,
        energy,
        errors,
        field,
        flow_matching,
        nets,
        networks,
        page,
        paths,
        probability,
        recipes,
        train,
        vae,
        viz,
        zoo,
    )
    from nblib.page import budget, check, check_bound, check_erratum, check_mc, profile, record, show, table
    from nblib.train import History, fit


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nblib.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"nblib.{_NAMES[name]}"), name)
    from nblib.errors import unknown

    raise AttributeError(unknown("nblib attribute", name, __all__))


def __dir__() -> list[str]:
    return sorted(__all__)

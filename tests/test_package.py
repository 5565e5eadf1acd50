"""The package as a whole: what importing it costs and changes, and what it makes public."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nblib as nb
from nblib.errors import CheckFailed, CheckpointError, DataError, NblibError, NonFiniteLoss, unknown

MODULES = sorted(m.name for m in pkgutil.walk_packages(nb.__path__, "nblib.") if not m.name.endswith("__main__"))
HEAVY = ("ipykernel", "IPython", "ipywidgets", "papermill", "nbformat", "matplotlib", "sklearn")

IMPORTS = f"""
import json, random, sys, time
import numpy as np
import torch
first = time.perf_counter()
import nblib
seconds = time.perf_counter() - first
loaded = sorted({{name.split(".")[0] for name in sys.modules}})

import matplotlib
def state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), repr(random.getstate())
before, settings, default = state(), dict(matplotlib.rcParams), torch.get_default_dtype()
threads = torch.get_num_threads()
import importlib
for name in {MODULES!r}:
    importlib.import_module(name)
print(json.dumps({{
    "seconds": seconds,
    "loaded": loaded,
    "random": before == state(),
    "rc": settings == dict(matplotlib.rcParams),
    "torch": default == torch.get_default_dtype() and threads == torch.get_num_threads(),
    "all": sorted({{name.split(".")[0] for name in sys.modules}}),
}}))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_importing_the_package_is_quick(imports: dict[str, Any]) -> None:
    assert imports["seconds"] < 0.3


def test_importing_the_package_loads_nothing_heavy(imports: dict[str, Any]) -> None:
    assert set(imports["loaded"]).isdisjoint(HEAVY)
    assert "nblib" in imports["loaded"]


def test_no_module_needs_a_notebook(imports: dict[str, Any]) -> None:
    assert set(imports["all"]).isdisjoint({"ipykernel", "papermill", "nbformat", "sklearn"})


def test_importing_every_module_leaves_the_random_states_alone(imports: dict[str, Any]) -> None:
    assert imports["random"]


def test_importing_every_module_leaves_matplotlib_and_torch_alone(imports: dict[str, Any]) -> None:
    assert imports["rc"]
    assert imports["torch"]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(nb.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["nblib", *MODULES])
def test_every_module_has_a_docstring_and_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert sorted(set(module.__all__)) == sorted(module.__all__)


@pytest.mark.parametrize("name", ["nblib", *MODULES])
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
            assert thing.__doc__, f"{name}.{public}"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_method_of_a_module_is_documented_where_it_stands(name: str) -> None:
    module = importlib.import_module(name)
    for key, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == name and not key.startswith("_"):
            assert thing.__doc__, f"{name}.{key}"


def test_the_short_names_are_those_of_their_modules() -> None:
    assert nb.fit is nb.train.fit
    assert nb.check is nb.page.check
    assert set(nb.__all__) <= set(dir(nb))


@pytest.mark.parametrize(("wrong", "near"), [("fti", "fit"), ("chekc", "check"), ("zo", "zoo"), ("history", "History")])
def test_an_unknown_attribute_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(AttributeError, match=rf"nblib attribute '{wrong}'. Did you mean '{near}'\?"):
        getattr(nb, wrong)


def test_the_errors_are_of_the_kinds_that_one_would_catch() -> None:
    kinds = {DataError: ValueError, CheckpointError: RuntimeError, NonFiniteLoss: FloatingPointError}
    for kind, base in {**kinds, CheckFailed: AssertionError}.items():
        assert issubclass(kind, base)
        assert issubclass(kind, NblibError)


def test_a_name_like_no_other_gets_the_list_without_a_guess() -> None:
    assert unknown("thing", "zzzz", ("one", "two")) == "Unknown thing 'zzzz'. Known: 'one', 'two'."
    assert unknown("thing", "ONE", ("one", "Two")) == "Unknown thing 'ONE'. Did you mean 'one'? Known: 'one', 'Two'."
    assert "Did you mean 'Two'?" in unknown("thing", "two", ("one", "Two"))
    assert unknown("thing", 3, ("one",)).startswith("Unknown thing 3.")

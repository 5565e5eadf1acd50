"""Every test starts from the same state: one thread, no bars, no environment of its own, no figures left open."""

from __future__ import annotations

import time
from collections.abc import Iterator

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

from nblib import page

settings.register_profile("unit", deadline=None, max_examples=20, derandomize=True, database=None)
settings.load_profile("unit")
torch.set_num_threads(1)
mpl.use("Agg")


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NBLIB_DATA", "NBLIB_PROFILE", "NBLIB_RECORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NBLIB_PROGRESS", "0")
    monkeypatch.setattr(page, "_state", {"profile": None, "checks": [], "values": {}, "seen": time.perf_counter()})
    torch.manual_seed(0)
    yield
    import matplotlib.pyplot as plt

    plt.close("all")

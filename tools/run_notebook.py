"""Execute one chapter with papermill in this process and write its run record (called by tools.execute)."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import papermill
import psutil

from tools import book


class CellCounter(logging.Handler):
    """Tell the caller which cell is running."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.done, self.total = 0, total

    def emit(self, event: logging.LogRecord) -> None:
        if event.getMessage().startswith("Ending Cell"):
            self.done += 1
            print(f"cell {self.done} {self.total}", flush=True)


def watch(peak: list[int], stop: threading.Event) -> None:
    """The largest memory of the kernel, sampled five times a second."""
    me = psutil.Process()
    while not stop.wait(0.2):
        total = 0
        for child in me.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], total)


def main() -> None:
    chapter, profile, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out, record = book.executed(chapter, profile), Path(os.environ["NBLIB_RECORD"])
    known = papermill.inspect_notebook(str(book.source(chapter)))
    if set(known) != {"profile"}:
        sys.exit(f"{chapter}: its parameters cell must define profile and nothing else, it defines {sorted(known)}.")
    counter = CellCounter(len(book.read(book.source(chapter)).cells) + 1)
    logger = logging.getLogger("papermill")
    logger.addHandler(counter)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    peak, stop = [0], threading.Event()
    threading.Thread(target=watch, args=(peak, stop), daemon=True).start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        notebook = papermill.execute_notebook(
            str(book.source(chapter)),
            str(out),
            parameters={"profile": profile},
            progress_bar=False,
            log_output=True,
            execution_timeout=limit,
            cwd=empty,
        )
    stop.set()
    content = json.loads(record.read_text()) if record.is_file() else {"checks": [], "values": {}}
    content |= {
        "profile": profile,
        "seconds": time.perf_counter() - started,
        "cell_seconds": {cell.id: cell.metadata.papermill.get("duration") for cell in notebook.cells},
        "peak_mb": peak[0] / 2**20,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "nblib": version("nblib"),
        "machine": f"{platform.machine()}, 1 thread",
    }
    record.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

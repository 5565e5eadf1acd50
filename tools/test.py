"""Everything that must hold, in one command: python -m tools.test

Lint and format, types, unit tests, a smoke run of every chapter, strict nbval on the executed chapters,
a site built from that run and the tests of the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

from tools import book
from tools.execute import environment

SITE = book.BUILD / "site-smoke"
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def nbval() -> list[str]:
    """Strict comparison of every text output of the executed chapters with a second run."""
    files = [str(book.executed(chapter, "smoke")) for chapter in book.notebooks()]
    for chapter, file in zip(book.notebooks(), files, strict=True):
        # On a notebook without outputs nbval compares nothing and passes.
        run = [cell for cell in book.read(book.executed(chapter, "smoke")).cells if cell.cell_type == "code"]
        if not all(cell.execution_count for cell in run if cell.source):
            sys.exit(f"{file} holds cells that were not executed.")
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "120"]
    sanitize = ["--nbval-sanitize-with", str(book.ROOT / "tests/book/sanitize.cfg")]
    return ["pytest", *options, *sanitize, "-n", "2", "--dist", "loadfile", "-W", "default", *files]


def main() -> None:
    steps = {
        "lint": lambda: ["ruff", "check", "."],
        "format": lambda: ["ruff", "format", "--check", "."],
        "types": lambda: ["mypy"],
        "unit tests": lambda: ["pytest", "tests", "--ignore", "tests/site", "--ignore", "tests/wheel", "-n", "2"],
        "smoke run": lambda: ["tools.execute", "--profile", "smoke"],
        "ledger": lambda: ["tools.ledger", "--profile", "smoke"],
        "nbval": nbval,
        "wheel": lambda: ["pytest", "tests/wheel"],
        "smoke site": lambda: ["tools.site", "--profile", "smoke", "--out", str(SITE)],
        "site tests": lambda: ["pytest", "tests/site", "-n", "2", "--dist", "loadfile"],
    }
    passed = failed = skipped = 0
    summary = []
    for name, command in steps.items():
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", *command()],
            cwd=book.ROOT,
            env={**environment(), "NBLIB_SITE": str(SITE), "CI": os.environ.get("CI", "")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(process.stdout, end="", flush=True)
        counts = {what.rstrip("s"): int(n) for n, what in COUNT.findall(process.stdout[-400:])}
        is_pytest = command()[0] == "pytest"
        bad = counts.get("failed", 0) + counts.get("error", 0) if is_pytest else 0
        passed += counts.get("passed", 0) if is_pytest else int(process.returncode == 0)
        failed += max(bad, int(process.returncode != 0))
        skipped += counts.get("skipped", 0) if is_pytest else 0
        result = "ok" if process.returncode == 0 else "FAILED"
        summary.append(f"{name:12s} {result:7s} {time.perf_counter() - started:6.1f} s")
    print("\n" + "\n".join(summary))
    if skipped and not shutil.which("chromium"):
        print("The browser tests were skipped: install Chromium to run them (Debian, Ubuntu: apt install chromium).")
    if skipped and not shutil.which("java"):
        print(
            "The validation of the HTML was skipped: install Java (Debian, Ubuntu: apt install default-jre-headless)."
        )
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

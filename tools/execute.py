"""Execute chapters with papermill, two at a time, and only where something that they depend on has changed.

python -m tools.execute --profile cpu [CHAPTER ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nblib.errors import unknown
from nblib.page import PROFILES
from tools import book

CELL_SECONDS = {"smoke": 60, "cpu": 240, "gpu": 3600}
BUDGET_SECONDS = {"smoke": 60, "cpu": 90, "gpu": 3600}
NOTEBOOK_SECONDS = {"smoke": 120, "cpu": 600, "gpu": 4 * 3600}


def fresh(chapter: str, profile: str, key: str) -> bool:
    """Whether the executed copy and its record belong to the present state."""
    path = book.record(chapter, profile)
    return (
        path.is_file() and book.executed(chapter, profile).is_file() and json.loads(path.read_text()).get("key") == key
    )


def environment(record: Path | None = None) -> dict[str, str]:
    """The environment of a chapter's kernel: one thread each, no bars in the outputs, quiet kernel start."""
    quiet = book.BUILD / "ipython"
    config = quiet / "profile_default" / "ipython_kernel_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("c.IPKernelApp.log_level = 40\n")
    env = {
        **os.environ,
        "NBLIB_PROGRESS": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "IPYTHONDIR": str(quiet),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    env.pop("NBLIB_PROFILE", None)
    if record is not None:
        env["NBLIB_RECORD"] = str(record)
    return env


def run(chapter: str, profile: str, key: str, bar: tqdm[None]) -> str | None:
    """Execute one chapter in a process of its own; None, or why it failed."""
    out, record = book.executed(chapter, profile), book.record(chapter, profile)
    for path in (out, record):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.run_notebook", chapter, profile, str(CELL_SECONDS[profile])]
    process = subprocess.Popen(
        command,
        cwd=book.ROOT,
        env=environment(record),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(NOTEBOOK_SECONDS[profile], lambda: os.killpg(process.pid, 9))
    limit.start()
    tail: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("cell "):
            done, total = map(int, line.split()[1:])
            bar.total = total
            bar.update(done - bar.n)
        else:
            tail = [*tail[-60:], line]
    code = process.wait()
    killed = not limit.is_alive()
    limit.cancel()
    if code:
        reason = f"it ran past {NOTEBOOK_SECONDS[profile]} s" if killed else f"exit status {code}"
        return f"{chapter}: {reason}\n{''.join(tail)}"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({"key": key, "chapter": chapter, **content}, indent=1))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "chapters", nargs="*", metavar="CHAPTER", help="e.g. vae/variational-autoencoder; all by default"
    )
    parser.add_argument("--profile", default="cpu", choices=PROFILES)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = book.notebooks()
    for name in args.chapters:
        if name not in known:
            sys.exit(unknown("chapter", name, known))

    keys = {chapter: book.key(chapter, args.profile) for chapter in args.chapters or known}
    todo = [chapter for chapter, key in keys.items() if not fresh(chapter, args.profile, key)]
    for chapter in keys:
        if chapter not in todo:
            print(f"unchanged  {chapter}")
    started, failures = time.perf_counter(), []
    interactive = sys.stderr.isatty()
    with tqdm(total=len(todo), desc="chapters", unit="chapter", position=0, disable=not interactive) as overall:

        def work(item: tuple[int, str]) -> None:
            position, chapter = item
            begin = time.perf_counter()
            with tqdm(desc=chapter, unit="cell", position=1 + position, leave=False, disable=not interactive) as bar:
                reason = run(chapter, args.profile, keys[chapter], bar)
            overall.update()
            if reason:
                failures.append(reason)
            seconds = time.perf_counter() - begin
            budget = BUDGET_SECONDS[args.profile]
            late = f"  over its budget of {budget} s" if seconds > budget else ""
            tqdm.write(f"{'FAILED  ' if reason else 'executed'}   {chapter}  {seconds:.1f} s{late}")

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, enumerate(todo)))
    for reason in failures:
        print(reason, file=sys.stderr)
    print(f"{len(todo)} executed, {len(keys) - len(todo)} unchanged, {time.perf_counter() - started:.1f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

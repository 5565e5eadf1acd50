"""What ``import nblib`` costs after ``import torch``, in fresh processes: median of ten.

python benchmarks/imports.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, torch
a = time.perf_counter()
import nblib as nb
b = time.perf_counter()
nb.fit, nb.vae.VAE
c = time.perf_counter()
print(b - a, c - a)
"""


def main() -> None:
    runs = [
        [float(v) for v in subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout.split()]
        for _ in range(10)
    ]
    bare, used = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"import nblib after torch: {bare * 1000:.1f} ms; with fit and the VAE: {used * 1000:.1f} ms")


if __name__ == "__main__":
    main()

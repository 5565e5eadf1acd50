"""Image data sets: where they are looked for, how they are checked, what ``load`` returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nblib.data.idx import read_idx
from nblib.errors import DataError, unknown

__all__ = ["NAMES", "Split", "load"]

NAMES = ("fashion-mnist", "mnist", "digits")
PARTS = ("auto", "whole", "bundled")

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")

# SHA-256 of the uncompressed files: a copy that somebody compressed anew is still the same data.
WHOLE = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
BUNDLED = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "ed2e37ed5a3a57d212141a69fe0a0de5a7126ffba14ac3f7e76f5f52cc04b1f0",
        "train-labels-idx1-ubyte.gz": "a69f2dad024ca220a8c4d85f621fdf929042d40c444abde2868903e9220ad517",
        "t10k-images-idx3-ubyte.gz": "862035b0a96959b614c9574f4c2b0ae9584ca234813e8d6d7adb7838b12ca46b",
        "t10k-labels-idx1-ubyte.gz": "aa3f574d30afaf0d4d9da084a6f8541771e20693d6a97fae6e9a4953fca8f078",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "57cc05c587eb89ce11216d3ce30bd3cc072b293cf58040c61baed47242f34fe6",
        "train-labels-idx1-ubyte.gz": "1598fd38e5a6b0e8c00daf6e922c7a4eb1f601fb52898e35d354126248d2e319",
        "t10k-images-idx3-ubyte.gz": "1311050d63fd605c7d48a729a00cfe2575e7d59c24a0433871d0199f8b7dc191",
        "t10k-labels-idx1-ubyte.gz": "ed0a7c091b81c6d7541e7e48ff1d4fda174fd5f769977ad62fa0755b3764bb89",
    },
}
MIRRORS = {
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
}
SYSTEM = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}


@dataclass(frozen=True)
class Split:
    """Images in memory, with where they came from.

    Attributes:
        x: ``uint8`` images of shape ``(N, C, H, W)`` with values in ``{0, ..., levels - 1}``.
        y: ``int64`` labels of shape ``(N,)``.
    """

    name: str
    split: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    levels: int
    whole: int
    source: str

    def __len__(self) -> int:
        return len(self.x)

    @property
    def images(self) -> Tensor:
        """The images as ``float32`` in ``[0, 1]``: ``x / (levels - 1)``."""
        return self.x.float().div_(self.levels - 1)

    @property
    def is_subset(self) -> bool:
        """Whether this is a bundled subset rather than the whole set."""
        return len(self) < self.whole

    @property
    def title(self) -> str:
        """How a table or a caption should name the data."""
        part = f"bundled subset, {len(self):,} of {self.whole:,}" if self.is_subset else f"all {len(self):,}"
        return f"{self.name} {self.split} ({part} images)"

    def __repr__(self) -> str:
        shape = "x".join(str(s) for s in self.x.shape[1:])
        return f"{self.title}, {shape}, from {self.source}"


def load(name: str, split: str = "train", *, part: str = "auto", quiet: bool = False) -> Split:
    """Load a data set into memory and say which copy was used.

    Whole sets are looked for in this order: the folder ``$NBLIB_DATA/<name>`` (or ``$NBLIB_DATA``
    itself), ``data/whole/<name>`` of a checkout, the user's cache, a system copy (Debian's package
    ``dataset-fashion-mnist``), then a download. Every file is verified by SHA-256.

    Args:
        name: ``"fashion-mnist"``, ``"mnist"`` (28x28, 256 levels) or ``"digits"`` (scikit-learn's
            1,797 images of 8x8, 17 levels; the last 360 are the test split).
        split: ``"train"`` or ``"test"``.
        part: ``"whole"`` insists on the whole set; ``"bundled"`` takes the subset that nblib ships;
            ``"auto"`` takes the whole set where one is found or can be downloaded, else the subset.
        quiet: do not print the line that names the copy.

    Raises:
        DataError: unknown name, split or part; a damaged file; no whole set and no network.
    """
    if name not in NAMES:
        raise DataError(unknown("data set", name, NAMES))
    if split not in ("train", "test"):
        raise DataError(unknown("split", split, ("train", "test")))
    if part not in PARTS:
        raise DataError(unknown("part", part, PARTS))
    data = _digits(split) if name == "digits" else _idx_set(name, split, part)
    if not quiet:
        print(data)
    return data


def _digits(split: str) -> Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    part = slice(None, -360) if split == "train" else slice(-360, None)
    return Split("digits", split, x[part], y[part], DIGITS, 17, len(x[part]), "scikit-learn")


def _idx_set(name: str, split: str, part: str) -> Split:
    found = None if part == "bundled" else _find_whole(name, must=part == "whole")
    if found is None:
        folder, table, source = bundled_folder() / name, BUNDLED[name], "nblib's bundled subset"
    else:
        (folder, source), table = found, WHOLE[name]
    prefix = "train" if split == "train" else "t10k"
    arrays = [
        torch.from_numpy(read_idx(folder / file, table[file]).copy())
        for file in (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    ]
    classes = CLOTHES if name == "fashion-mnist" else DIGITS
    whole = 60_000 if split == "train" else 10_000
    return Split(name, split, arrays[0].unsqueeze(1), arrays[1].long(), classes, 256, whole, source)


def bundled_folder() -> Path:
    """``data/`` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "data", package / "_data"):
        if (folder / "fashion-mnist").is_dir():
            return folder
    raise DataError(f"nblib's bundled data are missing beside {package}: install nblib again.")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nblib"


def _find_whole(name: str, *, must: bool) -> tuple[Path, str] | None:
    own = os.environ.get("NBLIB_DATA")
    places = [(Path(own) / name, "$NBLIB_DATA"), (Path(own), "$NBLIB_DATA")] if own else []
    checkout = Path(__file__).resolve().parents[2] / "data" / "whole" / name
    places += [(checkout, "the checkout's data/whole"), (_cache() / name, "the user cache")]
    if name in SYSTEM:
        places.append((SYSTEM[name], "the system's copy"))
    for folder, source in places:
        if all((folder / file).is_file() for file in WHOLE[name]):
            return folder, source
    try:
        return _download(name), "a download"
    except DataError as error:
        if must:
            raise
        print(error)
        return None


def _download(name: str) -> Path:
    import pooch

    folder, reason = _cache() / name, ""
    quiet = pooch.get_logger()
    level = quiet.level
    quiet.setLevel("ERROR")
    try:
        for mirror in MIRRORS[name]:
            try:
                for file, sha256 in WHOLE[name].items():
                    fetch = pooch.HTTPDownloader(timeout=20)
                    path = pooch.retrieve(mirror + file, known_hash=None, fname=file, path=folder, downloader=fetch)
                    try:
                        read_idx(path, sha256)
                    except DataError:
                        Path(path).unlink()
                        raise
                return folder
            except (OSError, ValueError) as error:
                reason = f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        quiet.setLevel(level)
    raise DataError(
        f"No whole copy of {name!r} was found and none could be downloaded ({reason}). Put the four IDX files"
        f" into a folder and set NBLIB_DATA to it, or ask for part='bundled', the subset that nblib ships."
    )

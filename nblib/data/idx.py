"""The IDX format of the MNIST family: big-endian header, then raw bytes, usually gzipped."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from nblib.errors import DataError

__all__ = ["read_idx"]


def read_idx(path: str | Path, sha256: str | None = None) -> np.ndarray:
    """Read a (gzipped) IDX file of unsigned bytes.

    Args:
        path: the file; gunzipped when its name ends in ``.gz``.
        sha256: expected SHA-256 of the *uncompressed* bytes, so that a copy that somebody
            compressed anew is still accepted.

    Returns:
        A read-only ``uint8`` array of the shape that the header states.

    Raises:
        DataError: the file is truncated, corrupted, of another type, or has another checksum.
    """
    path = Path(path)
    remedy = "delete it and load again, or point NBLIB_DATA to a folder with a good copy"
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or corrupted ({error}): {remedy}.") from None
    if sha256 is not None and (got := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(
            f"{path} is not the expected file: SHA-256 of its content is {got}, expected {sha256}; {remedy}."
        )
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: {remedy}.")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != (size := int(np.prod(shape))):
        raise DataError(f"{path} is truncated: {len(raw) - start:,} bytes for {size:,} values; {remedy}.")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)

"""Data sets: where they are looked for, how they are named, and what happens to damaged and missing files."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nblib.data import NAMES, Split, load, sets
from nblib.data.idx import read_idx
from nblib.errors import DataError

NAME = "fashion-mnist"
FILES = tuple(sets.WHOLE[NAME])
REAL = sets.bundled_folder()


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes()


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture(scope="session")
def contents() -> dict[str, bytes]:
    """A whole set in miniature: 6 training and 4 test images of 3x2."""
    random = np.random.default_rng(0)
    shapes = ((6, 3, 2), (6,), (4, 3, 2), (4,))
    return {
        file: idx(random.integers(0, 256, shape, dtype=np.uint8)) for file, shape in zip(FILES, shapes, strict=True)
    }


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, raw in contents.items():
        (folder / file).write_bytes(gzip.compress(raw, 1))
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A checkout, a cache and a system of their own, without a network; the bundled subset is the real one."""
    checkout = tmp_path / "checkout"
    (checkout / "data").mkdir(parents=True)
    for name in ("fashion-mnist", "mnist"):
        (checkout / "data" / name).symlink_to(REAL / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
    monkeypatch.setattr(sets, "__file__", str(checkout / "nblib" / "data" / "sets.py"))
    monkeypatch.setattr(sets, "MIRRORS", {"fashion-mnist": (closed,), "mnist": (closed,)})
    monkeypatch.setattr(sets, "SYSTEM", {NAME: tmp_path / "system"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return {
        "own": tmp_path / "own",
        "checkout": checkout / "data" / "whole" / NAME,
        "bundled": checkout / "data" / NAME,
        "cache": tmp_path / "cache" / "nblib" / NAME,
        "system": tmp_path / "system",
    }


@pytest.fixture
def miniature(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setitem(sets.WHOLE, NAME, {file: digest(raw) for file, raw in contents.items()})
    return contents


# --- what is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_the_bundled_files_have_the_checksums_of_the_table(name: str) -> None:
    for file, sha256 in sets.BUNDLED[name].items():
        assert digest(gzip.decompress((REAL / name / file).read_bytes())) == sha256, file


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_the_bundled_subset_is_named_as_such(name: str, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = load(name, split, part="bundled")
    assert data.x.dtype == torch.uint8
    assert data.x.shape == (len(data), 1, 28, 28)
    assert data.y.dtype == torch.int64
    assert data.y.unique().tolist() == list(range(10))
    assert len(data.y) == len(data) < data.whole
    assert data.is_subset
    assert f"bundled subset, {len(data):,} of {data.whole:,}" in data.title
    assert repr(data).startswith(data.title)
    assert capsys.readouterr().out == f"{data!r}\n"
    assert data.whole == {"train": 60_000, "test": 10_000}[split]


def test_a_whole_set_is_named_as_such() -> None:
    x = torch.zeros(60_000, 1, 1, 1, dtype=torch.uint8)
    data = Split("mnist", "train", x, torch.zeros(60_000), (), 256, 60_000, "here")
    assert not data.is_subset
    assert data.title == "mnist train (all 60,000 images)"
    assert repr(data) == "mnist train (all 60,000 images), 1x1x1, from here"


def test_digits_are_split_without_loss() -> None:
    from sklearn.datasets import load_digits

    train, test = load("digits"), load("digits", "test")
    both = torch.cat([train.x, test.x]).squeeze(1)
    assert np.array_equal(both.numpy(), load_digits().images)
    assert torch.equal(torch.cat([train.y, test.y]), torch.from_numpy(load_digits().target).long())
    assert len(test) == 360
    assert train.levels == 17
    assert int(both.max()) == 16
    assert not train.is_subset


def test_images_are_scaled_to_the_unit_interval_and_leave_the_bytes_alone() -> None:
    data = load("digits", quiet=True)
    before = data.x.clone()
    assert data.images.dtype == torch.float32
    assert torch.equal(data.images, before.float() / 16)
    assert torch.equal(data.x, before)


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load("digits", quiet=True)
    load("mnist", "test", part="bundled", quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: load("fashion-mnits"), r"data set 'fashion-mnits'. Did you mean 'fashion-mnist'\?"),
        (lambda: load("digits", "tset"), r"split 'tset'. Did you mean 'test'\?"),
        (lambda: load("digits", part="hole"), r"part 'hole'. Did you mean 'whole'\?"),
    ],
    ids=["name", "split", "part"],
)
def test_unknown_words_name_the_nearest(call: Callable[[], Split], said: str) -> None:
    with pytest.raises(DataError, match=said):
        call()


def test_every_name_can_be_loaded() -> None:
    assert {load(name, "test", part="bundled", quiet=True).name for name in NAMES} == set(NAMES)


# --- where it is looked for ----------------------------------------------------------------------------


def test_places_are_searched_in_the_documented_order(
    places: dict[str, Path], miniature: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBLIB_DATA", str(places["own"]))
    order = [
        (places["own"] / NAME, "$NBLIB_DATA"),
        (places["own"], "$NBLIB_DATA"),
        (places["checkout"], "the checkout's data/whole"),
        (places["cache"], "the user cache"),
        (places["system"], "the system's copy"),
    ]
    for folder, _ in order:
        write(folder, miniature)
    for folder, source in order:
        assert sets._find_whole(NAME, must=True) == (folder, source)
        data = load(NAME, "test", part="whole", quiet=True)
        assert data.source == source
        assert torch.equal(data.x.flatten(), torch.frombuffer(bytearray(miniature[FILES[2]][16:]), dtype=torch.uint8))
        for file in FILES:
            (folder / file).unlink()
    with pytest.raises(DataError, match="set NBLIB_DATA"):
        load(NAME, part="whole")


def test_a_folder_that_lacks_a_file_is_passed_over(places: dict[str, Path], miniature: dict[str, bytes]) -> None:
    (write(places["cache"], miniature) / FILES[0]).unlink()
    write(places["system"], miniature)
    assert load(NAME, part="whole", quiet=True).source == "the system's copy"


def test_bundled_does_not_look_elsewhere(places: dict[str, Path], miniature: dict[str, bytes]) -> None:
    write(places["cache"], miniature)
    assert load(NAME, "test", part="bundled", quiet=True).source == "nblib's bundled subset"
    assert load(NAME, "test", part="auto", quiet=True).source == "the user cache"


def test_without_a_cache_variable_the_home_directory_has_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sets._cache() == Path.home() / ".cache" / "nblib"


def test_missing_bundled_data_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "__file__", str(tmp_path / "nblib" / "data" / "sets.py"))
    with pytest.raises(DataError, match="install nblib again"):
        load("mnist", part="bundled")


# --- damaged files -------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[len(raw) // 2] ^= 1
    path.write_bytes(gzip.compress(bytes(raw)))


def flipped_outside(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "truncated or corrupted"),
    "cut in the middle": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated or corrupted"),
    "empty": (lambda p: p.write_bytes(b""), "truncated|not the expected file"),
    "not gzip": (lambda p: p.write_bytes(b"<html>404</html>"), "truncated or corrupted"),
    "byte flipped inside": (flipped, "not the expected file: SHA-256"),
    "byte flipped outside": (flipped_outside, "truncated or corrupted|not the expected file"),
    "another file": (lambda p: p.write_bytes(gzip.compress(b"hello")), "not the expected file"),
}


@pytest.mark.parametrize("part", ["whole", "auto"])
@pytest.mark.parametrize("file", [FILES[2], FILES[3]], ids=["images", "labels"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_a_remedy(
    damage: str, file: str, part: str, places: dict[str, Path], miniature: dict[str, bytes]
) -> None:
    harm, said = DAMAGE[damage]
    path = write(places["cache"], miniature) / file
    harm(path)
    with pytest.raises(DataError, match=said) as caught:
        load(NAME, "test", part=part)
    assert str(path) in str(caught.value)
    assert "NBLIB_DATA" in str(caught.value)


def test_a_damaged_bundled_file_is_named_with_a_remedy(places: dict[str, Path]) -> None:
    places["bundled"].unlink()
    shutil.copytree(REAL / NAME, places["bundled"])
    flipped(places["bundled"] / FILES[3])
    with pytest.raises(DataError, match=r"t10k-labels.*SHA-256.*NBLIB_DATA"):
        load(NAME, "test", part="bundled")


def test_a_file_compressed_anew_is_the_same_data(tmp_path: Path) -> None:
    raw = idx(np.arange(6, dtype=np.uint8))
    for level in (0, 9):
        path = tmp_path / f"{level}.gz"
        path.write_bytes(gzip.compress(raw, level))
        assert read_idx(path, digest(raw)).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_idx_file_is_read_with_and_without_compression(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "packed.gz"):
        got = read_idx(tmp_path / name)
        assert np.array_equal(got, array)
        assert not got.flags.writeable


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not an IDX file"),
        (b"\0\0", "not an IDX file"),
        (b"PNG!1234", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (idx(np.arange(6, dtype=np.uint8))[:-1], "5 bytes for 6 values"),
        (idx(np.arange(6, dtype=np.uint8)) + b"!", "7 bytes for 6 values"),
        (idx(np.zeros((2, 2), np.uint8))[:9], "truncated"),
        (b"\0\0\x08\x03", "truncated"),
    ],
    ids=["empty", "short", "text", "floats", "too few", "too many", "cut header", "no sizes"],
)
def test_what_is_no_idx_file_of_bytes_is_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=said) as caught:
        read_idx(path)
    assert "NBLIB_DATA" in str(caught.value)


# --- the network ---------------------------------------------------------------------------------------


def test_without_a_network_the_whole_set_is_an_error_with_a_remedy(places: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"none could be downloaded \(ConnectionError.*NBLIB_DATA.*part='bundled'"):
        load(NAME, part="whole")
    assert not list(places["cache"].glob("*"))


def test_without_a_network_auto_falls_back_and_says_so(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(NAME, "test")
    assert data.is_subset
    first, second = capsys.readouterr().out.splitlines()
    assert "No whole copy of 'fashion-mnist' was found" in first
    assert "bundled subset" in second


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> Iterator[Path]:
    """The folder of a mirror that answers; the one before it in the list does not."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        mirrors = (*sets.MIRRORS[NAME], f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setitem(sets.MIRRORS, NAME, mirrors)
        yield folder
        server.shutdown()
        thread.join()


def test_a_download_is_verified_and_kept_for_the_next_time(
    mirror: Path, places: dict[str, Path], miniature: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write(mirror, miniature)
    data = load(NAME, "train", part="whole")
    assert data.source == "a download"
    assert data.x.shape == (6, 1, 3, 2)
    assert "from a download" in capsys.readouterr().out
    shutil.rmtree(mirror)
    again = load(NAME, "train")
    assert again.source == "the user cache"
    assert torch.equal(again.x, data.x)


@pytest.mark.parametrize("harm", [flipped, flipped_outside, lambda p: p.write_bytes(p.read_bytes()[:-5])])
def test_a_corrupted_download_is_rejected_and_not_kept(
    harm: Callable[[Path], Any], mirror: Path, places: dict[str, Path], miniature: dict[str, bytes]
) -> None:
    write(mirror, miniature)
    harm(mirror / FILES[1])
    with pytest.raises(DataError, match=rf"none could be downloaded \(DataError: .*{FILES[1][:5]}"):
        load(NAME, part="whole")
    assert not (places["cache"] / FILES[1]).exists()
    write(mirror, miniature)
    assert load(NAME, part="whole", quiet=True).source == "a download"


def test_a_mirror_without_the_files_is_an_error_with_a_remedy(mirror: Path, places: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"HTTPError: 404.*part='bundled'"):
        load(NAME, part="whole")

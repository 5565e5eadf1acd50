"""The coverage file claims nothing that the book and the package do not have, and says nothing twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tools import coverage

# How many rows the inventory of the sources has, by the part of its ids before the hyphen.
INVENTORY = {
    "20": 59, "21": 120, "22": 45, "23": 122, "24": 98, "25": 121, "26": 165,
    "N00": 23, "N01": 26, "N02": 22, "N03": 28, "N04": 20, "N05": 18, "N06": 25, "N07": 21, "N08": 11, "N09": 19,
    "N10": 20, "N11": 23, "N12": 35, "N13": 35, "S01": 25, "S02": 23, "S04": 53,
}  # fmt: skip


@pytest.fixture(scope="module")
def entries() -> list[coverage.Entry]:
    return coverage.load()


def test_the_file_has_no_problems(entries: list[coverage.Entry]) -> None:
    assert coverage.problems(entries) == []


def test_every_row_of_the_inventory_is_in_one_entry(entries: list[coverage.Entry]) -> None:
    ids = [name for entry in entries for name in entry["id"]]
    assert len(ids) == len(set(ids)) == sum(INVENTORY.values()) == 1157
    for prefix, rows in INVENTORY.items():
        own = {int(name.split("-")[1]) for name in ids if name.split("-")[0] == prefix}
        assert own == set(range(1, rows + 1)), prefix


def test_a_chapter_stands_in_one_place_and_its_entries_in_the_order_of_their_ids(entries: list[coverage.Entry]) -> None:
    order = [entry["chapter"] for entry in entries]
    assert [page for i, page in enumerate(order) if not i or page != order[i - 1]] == list(dict.fromkeys(order))
    assert list(dict.fromkeys(entry["family"] for entry in entries)) == list(coverage.FAMILIES)

    def place(name: str) -> tuple[int, str, int]:
        prefix, number = name.split("-")
        return not prefix.isdigit(), prefix, int(number)

    for page in set(order):
        first = [place(entry["id"][0]) for entry in entries if entry["chapter"] == page]
        assert first == sorted(first), page
    assert all(entry["id"] == sorted(entry["id"], key=place) for entry in entries)


SOUND: dict[str, Any] = {
    "id": ["21-09", "N10-06"],
    "name": "KL divergence between Gaussians",
    "family": "vae",
    "chapter": "vae/variational-autoencoder",
    "importance": "core",
    "status": "implemented",
    "anchor": "prop-gaussian-kl",
    "symbol": "nblib.vae.gaussian_kl",
    "check": "prop-gaussian-kl",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": "prop-gaussian-kk"}, "anchor prop-gaussian-kk, which vae/variational-autoencoder does not have"),
        ({"anchor": "thm-pathwise"}, "anchor thm-pathwise"),  # of another chapter
        ({"symbol": "nblib.vae.gaussian_k"}, "nblib.vae.gaussian_k, which cannot be imported"),
        ({"symbol": "nblib.va.gaussian_kl"}, "cannot be imported"),
        ({"symbol": "nblib.vae.VAE._terms"}, "is not a public name"),
        ({"symbol": "torch.nn.Module"}, "is not a public name"),
        ({"check": "eq-gaussian-kl"}, "check eq-gaussian-kl, which vae/variational-autoencoder does not call"),
        ({"chapter": "vae/priors"}, "not in the table of contents"),
        ({"family": "gan"}, "is of family gan"),
        ({"family": "vaes"}, "unknown family vaes"),
        ({"status": "done"}, "unknown status done"),
        ({"status": "planned"}, "is planned, and names its anchor"),
        ({"status": "reproduced"}, "is reproduced, and names no where"),
        ({"symbol": None}, "names no symbol"),
        ({"check": None}, "names no check"),
        ({"anchor": None, "check": None, "status": "demonstrated"}, "names no anchor or check"),
        ({"importance": "vital"}, "unknown importance vital"),
        ({"page": 3}, "unknown key page"),
        ({"where": ""}, "empty key where"),
        ({"name": None}, "lacks name"),
        ({"id": "21-09"}, "no list"),
        ({"id": ["27-01"]}, "malformed id 27-01"),
    ],
)
def test_an_entry_that_claims_too_much_is_reported(change: dict[str, Any], message: str) -> None:
    assert coverage.problems([SOUND]) == []
    broken = {key: value for key, value in {**SOUND, **change}.items() if value is not None}
    assert any(message in problem for problem in coverage.problems([broken]))


def test_what_is_said_twice_is_reported() -> None:
    other = {**SOUND, "id": ["N10-06"]}
    found = coverage.problems([SOUND, other])
    assert "N10-06 is in 2 entries" in found
    assert any("2 entries of the name kl divergence between gaussians" in problem for problem in found)


def test_labels_of_a_page_and_the_roles_that_refer_to_them() -> None:
    roles = coverage.roles("vae/variational-autoencoder")
    assert {"thm-elbo-identity": "prf:ref", "eq-elbo": "eq", "ex-vae-1": "ref"}.items() <= roles.items()
    assert set(roles) == coverage.labels("vae/variational-autoencoder")
    assert coverage.labels("vae/no-such-page") == set()


def test_the_totals_are_those_of_the_file(
    entries: list[coverage.Entry], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = coverage.totals(entries)
    every = Counter((entry["family"], entry["importance"]) for entry in entries)
    some = Counter((entry["family"], entry["importance"]) for entry in entries if entry["status"] != "planned")
    for family in coverage.FAMILIES:
        keys = [(family, level) for level in coverage.IMPORTANCES]
        assert totals[family][:3] == [(some[key], every[key]) for key in keys]
        assert totals[family][3] == (sum(some[key] for key in keys), sum(every[key] for key in keys))
    assert totals["all"][3] == (sum(some.values()), len(entries))
    monkeypatch.setattr(coverage, "problems", list)
    coverage.main()
    assert f"{sum(some.values())} / {len(entries)}" in capsys.readouterr().out
    monkeypatch.setattr(coverage, "problems", lambda: ["one of them"])
    with pytest.raises(SystemExit, match="Problems:\none of them"):
        coverage.main()


def test_the_index_has_every_entry_and_is_not_heavy(entries: list[coverage.Entry]) -> None:
    page = coverage.methods_page()
    for entry in entries:
        assert entry["name"] in page
    for entry in filter(coverage.done, entries):
        assert ", ".join(entry["id"]) in page
    assert len(page.encode()) < 100_000
    assert "<!-- made by the build -->" in (coverage.book.ROOT / "book" / "appendix" / "methods.md").read_text()

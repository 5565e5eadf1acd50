"""Every claim of the book has a broken variant that its check is shown to catch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import book, ledger


def claims(chapter: str) -> set[str]:
    return {claim.label for claim in ledger.claims(chapter) if claim.kind in ledger.THEOREMS}


@pytest.mark.parametrize("chapter", book.chapters())
def test_every_claim_has_a_broken_variant_that_is_caught(chapter: str) -> None:
    assert claims(chapter)
    assert claims(chapter) - set(ledger.broken_variants()) == set()


def test_the_place_of_a_broken_variant_is_that_of_its_check() -> None:
    for label, place in ledger.broken_variants().items():
        file, line = place.split(":")
        text = (book.ROOT / file).read_text().splitlines()
        assert any(f'"{label}"' in part for part in text[int(line) - 1 : int(line) + 1]), place


def test_what_counts_as_a_broken_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        """
def fails(label, got):
    with pytest.raises(CheckFailed, match=label):
        nb.check(label, got, 0)

def passes(label, got):
    nb.check(label, got, 0)

def test_one():
    nb.check("thm-passing", 0, 0)
    passes("thm-helped", 0)
    fails("thm-caught", 1)
    for name in ("thm-variable",):
        fails(name, 1)
    with pytest.raises(CheckFailed, match="thm-direct"):
        nb.check("thm-direct", 1, 0)
    with pytest.raises(ValueError):
        nb.check("thm-other", 1, 0)
"""
    )
    monkeypatch.setattr(ledger.book, "ROOT", tmp_path)
    assert set(ledger.broken_variants()) == {"thm-caught", "thm-direct"}

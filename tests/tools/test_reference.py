"""The reference of the package and the ledger of claims, as the tools make them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tools import api, book, ledger, site


def test_every_public_symbol_is_documented_on_one_page_only() -> None:
    seen: dict[int, str] = {}
    for name in api.MODULES:
        for symbol, thing in api.documented(name).items():
            if inspect.isclass(thing) or inspect.isroutine(thing):
                assert inspect.getdoc(thing), f"nblib.{name}.{symbol} has no docstring"
                assert seen.setdefault(id(thing), name) == name, f"{symbol} is in {name} and in {seen[id(thing)]}"


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("nblib.fit", "nblib.train.fit"),
        ("nblib.check_mc", "nblib.page.check_mc"),
        ("nblib.vae.gaussian_kl", "nblib.probability.gaussian_kl"),
        ("nblib.vae.VAE.bound", "nblib.vae.VAE.bound"),
        ("nblib.data.toy.GaussianMixture.score", "nblib.data.toy.GaussianMixture.score"),
    ],
)
def test_a_name_has_one_home(path: str, home: str) -> None:
    assert api.home(path) == home


def test_labels_lead_to_the_code_that_cites_them() -> None:
    found = api.by_label()
    assert "nblib.probability.gaussian_kl" in found["eq-gaussian-kl"]
    assert "nblib.vae.VAE" in found["eq-elbo"]
    assert not [label for label in found if label.startswith("eq-no-such")]


def test_a_module_page_documents_and_names_what_it_passes_on() -> None:
    text = api.page("vae")
    assert ".. automodule:: nblib.vae" in text
    assert "nblib.probability.gaussian_kl`" in text.split("Also under this name")[1]


PAGE = """# A page

:::{prf:theorem} First
:label: thm-first

$$
a=b
$$ (eq-inside)
:::

:::{prf:lemma}
:label: lem-second
:::

$$ c=d $$ (eq-free)
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A book of one page, with the checks that a test puts into ``run``."""
    run: dict[str, Any] = {}
    monkeypatch.setattr(book, "notebooks", lambda: ["part/one"])
    monkeypatch.setattr(ledger, "prose", lambda chapter: PAGE)
    monkeypatch.setattr(ledger, "checks", lambda chapter, profile: run)
    monkeypatch.setattr(ledger, "broken_variants", lambda: {"thm-first": "x", "lem-second": "x"})
    monkeypatch.setattr(api, "by_label", lambda: {"eq-inside": ["nblib.f"], "eq-free": ["nblib.g"]})
    return run


def test_claims_of_a_page(small: dict[str, Any]) -> None:
    assert [(claim.label, claim.kind) for claim in ledger.claims("part/one")] == [
        ("thm-first", "theorem"),
        ("lem-second", "lemma"),
        ("eq-inside", "equation"),
        ("eq-free", "equation"),
    ]


def test_the_ledger_accepts_a_page_whose_claims_are_all_checked(small: dict[str, Any]) -> None:
    small.update({"thm-first": [], "lem-second": [], "eq-free": []})
    assert ledger.missing("cpu") == []


@pytest.mark.parametrize(
    ("checked", "said"),
    [
        (("thm-first", "eq-free"), "lemma lem-second has no check"),
        (("thm-first", "lem-second"), "eq-free, which nblib.g implements, has no check"),
        (("lem-second", "eq-free"), "eq-inside, which nblib.f implements, has no check"),
        (("thm-first", "lem-second", "eq-free", "eq-other"), "eq-other is checked, and no page has this label"),
    ],
)
def test_the_ledger_finds_what_is_missing(small: dict[str, Any], checked: tuple[str, ...], said: str) -> None:
    small.update({label: [] for label in checked})
    assert any(said in problem for problem in ledger.missing("cpu"))


def test_the_ledger_wants_a_broken_variant(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small.update({"thm-first": [], "lem-second": [], "eq-free": []})
    monkeypatch.setattr(ledger, "broken_variants", lambda: {"thm-first": "x"})
    assert ledger.missing("cpu") == ["part/one: no test breaks lemma lem-second"]


def test_the_ledger_shows_the_check_that_came_nearest_to_failing() -> None:
    entries = [
        {"kind": "equal", "measured": 1e-12, "tolerance": 1e-6, "seconds": 0.1},
        {"kind": "mean", "measured": 3.0, "tolerance": 4.0, "seconds": 0.2},
    ]
    row = ledger.row(ledger.Claim("thm-first", "theorem", "First"), entries)
    assert row == ["{prf:ref}`thm-first`", "First", "standard errors, 2 checks", "4", "3", "0.3"]


def test_links_to_the_repository_are_its_own() -> None:
    settings = site.config("https://github.com/someone/fork")
    assert settings["repository"]["url"] == "https://github.com/someone/fork"
    assert settings["launch_buttons"]["colab_url"]
    without = site.config(None)
    assert "repository" not in without
    assert "launch_buttons" not in without


def test_the_line_of_links_below_the_title() -> None:
    line = site.ways("vae/variational-autoencoder", "https://github.com/someone/fork")
    colab = "https://colab.research.google.com/github/someone/fork/blob/notebooks/student/vae/variational-autoencoder"
    assert f'href="{colab}.ipynb"' in line
    assert 'href="../../notebooks/vae/variational-autoencoder.ipynb"' in line
    assert "colab" not in site.ways("vae/variational-autoencoder", "https://gitlab.com/someone/fork")
    assert "student" not in site.ways("appendix/errata", None)

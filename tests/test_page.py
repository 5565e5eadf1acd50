"""What a page uses: checks that pass and fail, the record, the profile, and listings of the package's own source."""

from __future__ import annotations

import ast
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nblib as nb
from nblib import nets, page, probability
from nblib.errors import CheckFailed, DataError
from nblib.train import LossOut
from nblib.vae import VAE

# --- check ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1.0, 1.0 + 5e-7),
        (torch.ones(3, requires_grad=True), 1.0),
        (np.ones((2, 3)), [1.0, 1.0, 1.0]),
        (torch.tensor([1, 2]), [1, 2]),
        (True, 1),
    ],
)
def test_check_passes_within_the_tolerance(got: Any, expected: Any) -> None:
    nb.check("eq-x", got, expected)


@pytest.mark.parametrize("got", [1.0 + 2e-6, math.nan, math.inf, [1.0, 1.0, 0.9], [1.0, math.nan]])
def test_check_fails_beyond_the_tolerance(got: Any) -> None:
    with pytest.raises(CheckFailed, match=r"eq-x: got .*, expected 1: \|Δ\| = .* > 1e-06"):
        nb.check("eq-x", got, 1.0)


@pytest.mark.parametrize("expected", [math.nan, math.inf, [1.0, math.inf]])
def test_check_against_what_is_not_finite_never_passes(expected: Any) -> None:
    with pytest.raises(CheckFailed):
        nb.check("eq-x", 1.0, expected, rtol=0.1)


def test_check_keeps_python_numbers_in_double_precision() -> None:
    nb.check("log 2", torch.tensor(math.log(2), dtype=torch.float64), math.log(2), atol=0.0)
    with pytest.raises(CheckFailed):
        nb.check("log 2", math.log(2) + 1e-10, math.log(2), atol=1e-12)


def test_the_relative_tolerance_is_that_of_the_largest_expected_value() -> None:
    nb.check("relative", [1.0, 100.9], [0.1, 100.0], atol=0.0, rtol=0.01)
    with pytest.raises(CheckFailed):
        nb.check("relative", [1.0, 101.1], [1.0, 100.0], atol=0.0, rtol=0.01)


def test_a_failed_check_says_both_values_the_difference_and_the_tolerance() -> None:
    with pytest.raises(CheckFailed) as caught:
        nb.check("thm-x", [1.0, 2.0, 3.0, 4.0, 5.0], 1.5, atol=0.1)
    assert str(caught.value) == "thm-x: got [1, 2, 3, 4, ...], expected 1.5: |Δ| = 3.5 > 0.1."


@pytest.mark.parametrize("noise", [0.0, 1e-9, 9e-7])
def test_the_line_of_a_check_does_not_depend_on_the_difference(
    noise: float, capsys: pytest.CaptureFixture[str]
) -> None:
    nb.check("eq-x", 1.0 + noise, 1.0)
    nb.check_mc("eq-y", torch.tensor([0.0, 1.0, 2.0]) + noise, 1.0)
    nb.check_bound("eq-z", noise, 1.0)
    nb.check_bound("eq-z", noise, 0.0, slack=1e-3)
    assert capsys.readouterr().out.splitlines() == [
        "✓ eq-x  |Δ| ≤ 1e-06",
        "✓ eq-y  mean of 3 samples within 4 standard errors",
        "✓ eq-z  lower ≤ upper",
        "✓ eq-z  lower ≤ upper + 1e-03",
    ]


def test_a_failed_check_prints_and_records_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckFailed):
        nb.check("eq-x", 1.0, 2.0)
    assert capsys.readouterr().out == ""
    assert page._state["checks"] == []


# --- check_mc and check_bound --------------------------------------------------------------------------


def test_check_mc_measures_in_standard_errors() -> None:
    n, offset = 400, 0.3
    samples = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)]) + offset
    error = math.sqrt(n / (n - 1)) / math.sqrt(n)
    nb.check_mc("mean", samples, 0.0, z=1.001 * offset / error)
    with pytest.raises(CheckFailed, match=r"over 400 samples, expected 0: 6\.0 standard errors > 5\.9"):
        nb.check_mc("mean", samples, 0.0, z=5.9)


def test_check_mc_rarely_rejects_a_true_mean_and_always_a_wrong_one() -> None:
    rejected = 0
    for seed in range(300):
        samples = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        try:
            nb.check_mc("mean", samples, 0.0, z=2.0)
        except CheckFailed:
            rejected += 1
        with pytest.raises(CheckFailed):
            nb.check_mc("mean", samples, 0.5)
    assert 2 <= rejected <= 30  # 4.6 % of 300, and six standard deviations of that number


def test_check_mc_looks_at_every_component() -> None:
    samples = torch.randn(100, 3, 2)
    samples[:, 1, 1] += 3
    with pytest.raises(CheckFailed):
        nb.check_mc("mean", samples, 0.0)


def test_check_mc_asks_samples_without_spread_to_agree_to_rounding() -> None:
    nb.check_mc("constant", torch.full((10,), 0.1, dtype=torch.float64), 0.1)
    with pytest.raises(CheckFailed):
        nb.check_mc("constant", torch.full((10,), 0.1, dtype=torch.float64), 0.1 + 1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_mc_fails_on_samples_that_are_not_finite(bad: float) -> None:
    with pytest.raises(CheckFailed):
        nb.check_mc("mean", [0.0, 1.0, bad], 0.5)


def test_check_mc_needs_two_samples() -> None:
    with pytest.raises(DataError, match="eq-x: check_mc needs at least 2 samples, got 1"):
        nb.check_mc("eq-x", [1.0], 1.0)


@pytest.mark.parametrize(
    ("lower", "upper", "slack"),
    [(1.0, 1.0, 0.0), ([1.0, 2.0], [1.5, 2.0], 0.0), (1.05, 1.0, 0.1), (-math.inf, 0.0, 0.0)],
)
def test_check_bound_passes_where_every_component_holds(lower: Any, upper: Any, slack: float) -> None:
    nb.check_bound("bound", lower, upper, slack=slack)


@pytest.mark.parametrize(
    ("lower", "upper", "slack"),
    [(1.1, 1.0, 0.0), ([1.0, 2.1], [1.5, 2.0], 0.05), (math.nan, 1.0, 0.0), (0.0, math.nan, 0.0), (math.inf, 1.0, 0.0)],
)
def test_check_bound_fails_where_one_component_does(lower: Any, upper: Any, slack: float) -> None:
    with pytest.raises(CheckFailed, match="is violated by"):
        nb.check_bound("bound", lower, upper, slack=slack)


# --- record --------------------------------------------------------------------------------------------


def test_checks_and_values_go_to_the_record_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setenv("NBLIB_RECORD", str(path))
    nb.profile("smoke")
    nb.check("größe", 1.25, 1.0, atol=0.5)
    nb.check_mc("mean", [0.0, 2.0], 1.0)
    nb.check_bound("bound", 0.0, 1.0)
    nb.record(loss=torch.tensor(1.5), steps=3, where="here")
    nb.record(loss=2.5)
    found = json.loads(path.read_text())
    assert found["profile"] == "smoke"
    assert [c["label"] for c in found["checks"]] == ["größe", "mean", "bound"]
    assert [c["kind"] for c in found["checks"]] == ["equal", "mean", "bound"]
    assert [c["measured"] for c in found["checks"]] == [0.25, 0.0, -1.0]
    assert [c["tolerance"] for c in found["checks"]] == [0.5, 4.0, 0.0]
    assert all(c["seconds"] >= 0 for c in found["checks"])
    assert found["values"] == {"loss": 2.5, "steps": 3.0, "where": "here"}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_without_the_variable_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nb.check("eq-x", 1.0, 1.0)
    nb.record(loss=1.0)
    assert list(tmp_path.iterdir()) == []


# --- profile -------------------------------------------------------------------------------------------


def test_the_profile_is_the_argument_then_what_was_said_before_then_the_environment_then_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert nb.profile() == "cpu"
    page._state["profile"] = None
    monkeypatch.setenv("NBLIB_PROFILE", "gpu")
    assert nb.profile() == "gpu"
    monkeypatch.setenv("NBLIB_PROFILE", "cpu")
    assert nb.profile() == "gpu"
    assert nb.profile("smoke") == "smoke"
    assert nb.profile() == "smoke"


def test_an_unknown_profile_names_the_nearest_and_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"profile 'smok'. Did you mean 'smoke'\?"):
        nb.profile("smok")
    assert nb.profile() == "cpu"
    page._state["profile"] = None
    monkeypatch.setenv("NBLIB_PROFILE", "gpus")
    with pytest.raises(DataError, match=r"'gpus'. Did you mean 'gpu'\?"):
        nb.profile()


@pytest.mark.parametrize(("name", "steps"), [("smoke", 1), ("cpu", 20), ("gpu", 300)])
def test_the_budget_follows_the_profile(name: str, steps: int) -> None:
    nb.profile(name)
    assert nb.budget(smoke=1, cpu=20, gpu=300) == steps


# --- table ---------------------------------------------------------------------------------------------


def test_a_table_is_shown_as_aligned_text_and_as_markdown() -> None:
    shown = nb.table(["name", "n"], [["a", 1], ["longer", 22.5]])
    assert repr(shown).splitlines() == ["name    n", "a       1", "longer  22.5"]
    assert shown._repr_markdown_().splitlines() == ["| name | n |", "| --- | --- |", "| a | 1 |", "| longer | 22.5 |"]


def test_a_table_without_rows_is_its_header() -> None:
    assert repr(nb.table(["a", "b"], [])) == "a  b"
    assert nb.table(["a"], [])._repr_markdown_() == "| a |\n| --- |"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"needs 2 cells, got rows of \[1, 2\]"):
        nb.table(["a", "b"], [[1, 2], [3]])


# --- show ----------------------------------------------------------------------------------------------


def stripped(source: str) -> ast.AST:
    """The syntax tree of a function or class without its own docstring."""
    node = ast.parse(inspect.cleandoc("\n" + source)).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        node.body = node.body[1:]
    return node


def undocumented(a: int, b: str = '"""') -> str:
    return b * a


def documented_with_single_quotes(a: int) -> str:
    'One line.'  # fmt: skip
    return """not a docstring""" * a


class WithoutDocstring(nets.MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stays."""
        return super().forward(x)


THINGS: list[Callable[..., Any] | type] = [
    probability.gaussian_kl,
    probability.gumbel_softmax,
    nets.randn_rows,
    nets.activation,
    nets.ResidualBlock,
    nb.data.toy.LinearGaussian,
    nb.vae.std_from_raw,
    VAE,
    VAE.bound,
    VAE.forward,
    VAE._terms,
    LossOut,
    undocumented,
    documented_with_single_quotes,
    WithoutDocstring,
    WithoutDocstring.forward,
]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__qualname__)
def test_what_is_shown_is_the_source_without_the_docstring(thing: Any) -> None:
    source = inspect.getsource(thing)
    shown = nb.show(thing)
    assert ast.dump(ast.parse(shown.text).body[0]) == ast.dump(stripped(source))
    lines = [line.strip() for line in source.splitlines()]
    assert all(line.strip() in lines for line in shown.text.splitlines())
    assert shown.text.endswith("\n")
    assert not shown.text.startswith(" ")


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__qualname__)
def test_with_its_docstring_the_source_is_complete(thing: Any) -> None:
    shown = nb.show(thing, docstring=True)
    assert shown.text.split() == inspect.getsource(thing).split()


def test_a_raw_docstring_leaves_nothing_behind() -> None:
    assert inspect.getsource(probability.gaussian_kl).count('r"""') == 1
    text = nb.show(probability.gaussian_kl).text
    assert '"""' not in text
    assert text.splitlines()[0].startswith("def gaussian_kl(")
    assert text.splitlines()[1] == "    prior_std = torch.as_tensor(prior_std, dtype=std.dtype, device=std.device)"


def test_a_class_keeps_the_docstrings_of_its_methods() -> None:
    text = nb.show(VAE).text
    assert "Variational autoencoder with a standard normal prior" not in text
    assert "The training loss in nats per image" in text


def test_a_listing_is_shown_as_text_and_as_markdown() -> None:
    shown = nb.show(nets.activation)
    assert repr(shown) == f"# nblib.nets.activation\n{shown.text}"
    assert shown._repr_markdown_() == f"```python\n{shown!r}```"

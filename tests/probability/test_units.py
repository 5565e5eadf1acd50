"""Dequantization, the logit map and bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nblib as nb
from nblib.errors import CheckFailed, DataError
from nblib.probability import bits_per_dim, dequantize, logit_transform


def levels_image(levels: int, n: int = 200) -> Tensor:
    return torch.randint(levels, (n, 1, 20, 20), dtype=torch.int64)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantized_values_lie_in_the_half_open_interval(levels: int) -> None:
    y, _ = dequantize(levels_image(levels), levels)
    assert y.dtype == torch.float32
    assert float(y.min()) >= 0
    assert float(y.max()) < 1


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2.0**-24], ids=["lowest", "middle", "highest"])
@pytest.mark.parametrize("levels", [2, 3, 17, 100, 256, 1000])
def test_floor_inverts_dequantization_for_every_level_and_noise(
    levels: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, noise))
    x = torch.arange(levels).unsqueeze(-1)
    y, _ = dequantize(x, levels)
    assert torch.equal((y * levels).floor().long(), x)
    if noise > 0.9:
        assert not torch.equal((y * levels).round().long(), x)


def test_floor_inverts_dequantization_of_uint8_images() -> None:
    x = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8)
    y, _ = dequantize(x)
    assert torch.equal((y * 256).floor().to(torch.uint8), x)


def test_dequantization_noise_is_uniform() -> None:
    y, _ = dequantize(torch.full((50_000, 1), 100), 256)
    u = y.double() * 256 - 100
    nb.check_mc("mean", u, 1 / 2)
    nb.check_mc("square", u**2, 1 / 3)


def test_dequantization_counts_one_log_level_per_dimension() -> None:
    assert dequantize(levels_image(17), 17)[1] == pytest.approx(-400 * math.log(17))


def test_dequantization_is_a_function_of_the_generator() -> None:
    x = levels_image(256)
    one, two, other = (dequantize(x, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_dequantization_refuses_floats() -> None:
    with pytest.raises(DataError, match=r"integers in 0\.\.255, got dtype torch\.float32"):
        dequantize(torch.rand(2, 3))


@pytest.mark.parametrize(("values", "said"), [([0, 17], r"got 0\.\.17"), ([-1, 3], r"got -1\.\.3")])
def test_dequantization_refuses_values_out_of_range(values: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        dequantize(torch.tensor([values]), 17)


# --- the logit map -------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=5), st.floats(0, 0.2))
def test_the_logit_log_det_is_that_of_the_jacobian(values: list[float], alpha: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    y, log_det = logit_transform(x.unsqueeze(0), alpha)
    jacobian = torch.func.jacrev(lambda v: logit_transform(v.unsqueeze(0), alpha)[0][0])(x)
    nb.check("value", y[0], torch.logit(alpha + (1 - 2 * alpha) * x), atol=1e-9)
    nb.check("log_det", log_det[0], torch.linalg.slogdet(jacobian)[1], atol=1e-8)


def test_a_logit_log_det_without_the_squeezing_fails_the_check() -> None:
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    _, log_det = logit_transform(x, 0.1)
    assert log_det.shape == (3,)
    with pytest.raises(CheckFailed):
        nb.check("log_det", log_det - 4 * math.log(1 - 0.2), log_det)


def test_the_logit_of_the_end_points_is_finite() -> None:
    y, log_det = logit_transform(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert bool(y.isfinite().all())
    assert bool(log_det.isfinite().all())
    nb.check("symmetric", y[0, 0], -y[0, 1], atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 0.5, 0.7, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(DataError, match=rf"alpha must lie in \[0, 0\.5\), got {alpha}"):
        logit_transform(torch.rand(2, 3), alpha)


# --- bits per dimension --------------------------------------------------------------------------------


def test_a_uniform_model_over_256_levels_costs_8_bits() -> None:
    y, log_det = dequantize(levels_image(256))
    log_density = torch.distributions.Uniform(0.0, 1.0).log_prob(y).flatten(1).sum(1)
    nb.check("uniform", bits_per_dim(log_density, 400, log_det), 8.0, atol=1e-5)
    with pytest.raises(CheckFailed):
        nb.check("uniform", bits_per_dim(log_density, 400, -log_det), 8.0, atol=1e-5)
    with pytest.raises(CheckFailed):
        nb.check("uniform", bits_per_dim(log_density, 400), 8.0, atol=1e-5)


def test_a_uniform_model_stays_at_8_bits_behind_the_logit() -> None:
    """The logit of a uniform variable is a standard logistic one: its density is known independently."""
    y, log_det = dequantize(levels_image(256))
    z, more = logit_transform(y.double(), 0.0)
    logistic = (-z - 2 * F.softplus(-z)).flatten(1).sum(1)
    nb.check("logistic", bits_per_dim(logistic, 400, log_det + more), 8.0, atol=1e-6)
    with pytest.raises(CheckFailed):
        nb.check("logistic", bits_per_dim(logistic, 400, log_det), 8.0, atol=1e-2)


def test_the_dequantized_bound_holds_for_a_known_model() -> None:
    """Two levels with the density 2t on [0, 1): P(0) = 1/4 and P(1) = 3/4 exactly, and the bound lies below."""
    x = torch.tensor([[0], [1]]).repeat(50_000, 1)
    y, log_det = dequantize(x, 2)
    terms = ((2 * y).log().squeeze(-1) + log_det).reshape(-1, 2)
    exact = torch.tensor([math.log(1 / 4), math.log(3 / 4)])
    error = terms.std(0) / math.sqrt(len(terms))
    nb.check_bound("Jensen", terms.mean(0) + 4 * error, exact)


def test_bits_per_dim_keeps_the_shape() -> None:
    assert bits_per_dim(torch.zeros(3, 5), 10, torch.ones(5)).shape == (3, 5)

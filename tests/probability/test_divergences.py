"""Divergences against torch.distributions, quadrature and enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal, kl_divergence

import nblib as nb
from nblib.errors import CheckFailed
from nblib.probability import bernoulli_kl, gaussian_kl, gaussian_kl_full, gaussian_log_prob, monte_carlo_kl

centre, spread, probability = st.floats(-3, 3), st.floats(0.1, 4), st.floats(0.01, 0.99)
rows = st.lists(st.tuples(centre, spread, centre, spread), min_size=1, max_size=4)


def columns(values: list[tuple[float, ...]]) -> list[Tensor]:
    return list(torch.tensor(values, dtype=torch.float64).T)


def covariance(seed: int, dim: int) -> Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def vector(seed: int, dim: int) -> Tensor:
    return torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- diagonal Gaussians --------------------------------------------------------------------------------


@given(rows)
def test_gaussian_kl_equals_torch_distributions(values: list[tuple[float, ...]]) -> None:
    mean, std, prior_mean, prior_std = columns(values)
    expected = kl_divergence(Normal(mean, std), Normal(prior_mean, prior_std)).sum()
    nb.check("kl", gaussian_kl(mean, std, prior_mean, prior_std), expected, atol=1e-9, rtol=1e-9)


@given(centre, spread, centre, spread)
def test_gaussian_kl_equals_its_integral(mean: float, std: float, prior_mean: float, prior_std: float) -> None:
    q, p = norm(mean, std), norm(prior_mean, prior_std)
    low, high = mean - 12 * std, mean + 12 * std
    expected = quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), low, high, points=[mean], limit=200)[0]
    got = gaussian_kl(*(torch.tensor([v], dtype=torch.float64) for v in (mean, std, prior_mean, prior_std)))
    nb.check("kl", got, expected, atol=1e-7, rtol=1e-7)


def test_gaussian_kl_has_the_standard_normal_as_default_prior() -> None:
    mean, std = vector(1, 5), vector(2, 5).exp()
    prior = Normal(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    nb.check("kl", gaussian_kl(mean, std), kl_divergence(Normal(mean, std), prior).sum(), atol=1e-12)


def test_gaussian_kl_sums_over_the_last_axis_only() -> None:
    mean, std = torch.randn(3, 4, 5), torch.rand(3, 4, 5) + 0.1
    assert gaussian_kl(mean, std).shape == (3, 4)
    nb.check("rows", gaussian_kl(mean, std)[1, 2], gaussian_kl(mean[1, 2], std[1, 2]))


@given(rows)
def test_kl_is_zero_only_where_q_equals_p(values: list[tuple[float, ...]]) -> None:
    mean, std, _, _ = columns(values)
    nb.check("zero", gaussian_kl(mean, std, mean, std), 0.0, atol=1e-12)
    assert gaussian_kl(mean, std, mean + 0.1, std) > 1e-5
    assert gaussian_kl(mean, std, mean, 1.1 * std) > 1e-5


def test_gaussian_kl_is_not_symmetric() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert abs(gaussian_kl(one, one, 0.0, two) - gaussian_kl(0 * one, two, one, one)) > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, s: 0.5 * (s**2 + m**2 - 1 + 2 * s.log()).sum(),
        lambda m, s: 0.5 * (s**2 - m**2 - 1 - 2 * s.log()).sum(),
        lambda m, s: 0.5 * (s**2 + m**2 - 1 - s.log()).sum(),
        lambda m, s: 0.5 * (s + m**2 - 1 - s.log()).sum(),
        lambda m, s: (s**2 + m**2 - 1 - 2 * s.log()).sum(),
        lambda m, s: 0.5 * (s**2 + m**2 - 1 - 2 * s.log()).mean(),
    ],
    ids=["sign of log", "sign of mean", "factor of log", "variance for std", "no half", "mean for sum"],
)
def test_a_wrong_gaussian_kl_fails_the_check(wrong) -> None:
    mean, std = vector(1, 5), vector(2, 5).exp()
    with pytest.raises(CheckFailed):
        nb.check("kl", wrong(mean, std), gaussian_kl(mean, std), atol=1e-6)


# --- full covariances ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_gaussian_kl_full_equals_torch_distributions(seed: int, dim: int) -> None:
    q = vector(seed, dim), covariance(seed + 1, dim)
    p = vector(seed + 2, dim), covariance(seed + 3, dim)
    expected = kl_divergence(MultivariateNormal(*q), MultivariateNormal(*p))
    nb.check("kl", gaussian_kl_full(*q, *p), expected, atol=1e-8, rtol=1e-8)


@given(rows)
def test_gaussian_kl_full_of_diagonal_covariances_is_the_diagonal_formula(values: list[tuple[float, ...]]) -> None:
    mean, std, prior_mean, prior_std = columns(values)
    got = gaussian_kl_full(mean, torch.diag(std**2), prior_mean, torch.diag(prior_std**2))
    nb.check("kl", got, gaussian_kl(mean, std, prior_mean, prior_std), atol=1e-9, rtol=1e-9)


@given(st.integers(0, 10_000))
def test_gaussian_kl_full_does_not_change_under_an_affine_map_of_both(seed: int) -> None:
    mean, cov, prior_mean, prior_cov = (
        vector(seed, 3), covariance(seed + 1, 3), vector(seed + 2, 3), covariance(seed + 3, 3)
    )  # fmt: skip
    a, b = covariance(seed + 4, 3), vector(seed + 5, 3)
    before = gaussian_kl_full(mean, cov, prior_mean, prior_cov)
    after = gaussian_kl_full(a @ mean + b, a @ cov @ a.T, a @ prior_mean + b, a @ prior_cov @ a.T)
    nb.check("affine", after, before, atol=1e-6, rtol=1e-6)
    with pytest.raises(CheckFailed):
        nb.check("affine", gaussian_kl_full(a @ mean, cov, a @ prior_mean, prior_cov), before, atol=1e-6, rtol=1e-6)


def test_gaussian_kl_full_takes_one_covariance_for_many_means() -> None:
    means, cov, prior = torch.randn(7, 3, dtype=torch.float64), covariance(0, 3), (vector(1, 3), covariance(2, 3))
    expected = torch.stack([gaussian_kl_full(mean, cov, *prior) for mean in means])
    nb.check("batch", gaussian_kl_full(means, cov, *prior), expected, atol=1e-12)


def test_gaussian_kl_full_refuses_a_covariance_that_is_not_positive() -> None:
    eye, zero = torch.eye(2), torch.zeros(2)
    with pytest.raises(torch.linalg.LinAlgError):
        gaussian_kl_full(zero, -eye, zero, eye)


# --- Bernoulli -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(probability, probability), min_size=1, max_size=4))
def test_bernoulli_kl_equals_the_sum_over_all_outcomes(values: list[tuple[float, ...]]) -> None:
    probs, prior = columns(values)
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=len(probs)):
        q = math.prod(r if x else 1 - r for x, r in zip(outcome, probs.tolist(), strict=True))
        p = math.prod(r if x else 1 - r for x, r in zip(outcome, prior.tolist(), strict=True))
        expected += q * math.log(q / p)
    nb.check("kl", bernoulli_kl(probs, prior), expected, atol=1e-10)
    with pytest.raises(CheckFailed):
        nb.check("kl", -bernoulli_kl(probs, prior + 0.005), expected + 1, atol=1e-10)


def test_bernoulli_kl_drops_the_terms_of_probability_zero() -> None:
    probs, prior = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.3], dtype=torch.float64)
    nb.check("edges", bernoulli_kl(probs, prior), -math.log(0.7) - math.log(0.3), atol=1e-12)


def test_bernoulli_kl_of_equal_edges_is_zero() -> None:
    edges = torch.tensor([0.0, 1.0])
    assert bernoulli_kl(edges, edges) == 0


@pytest.mark.parametrize(("q", "p"), [(0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_bernoulli_kl_is_infinite_where_p_excludes_what_q_allows(q: float, p: float) -> None:
    assert bernoulli_kl(torch.tensor([q]), torch.tensor([p])) == math.inf


# --- by sampling ---------------------------------------------------------------------------------------


def test_monte_carlo_kl_has_the_exact_mean() -> None:
    q, p = Normal(torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.5])), Normal(torch.zeros(2), torch.ones(2))
    terms = monte_carlo_kl(q, p, 20_000)
    assert terms.shape == (20_000, 2)
    nb.check_mc("kl", terms, kl_divergence(q, p))
    with pytest.raises(CheckFailed):
        nb.check_mc("kl", monte_carlo_kl(p, q, 20_000), kl_divergence(q, p))


def test_monte_carlo_kl_works_without_a_reparameterization() -> None:
    q, p = Categorical(torch.tensor([0.2, 0.3, 0.5])), Categorical(torch.tensor([0.6, 0.3, 0.1]))
    nb.check_mc("kl", monte_carlo_kl(q, p, 20_000), kl_divergence(q, p))
    bits = Bernoulli(torch.tensor([0.2, 0.9])), Bernoulli(torch.tensor([0.5, 0.5]))
    nb.check_mc("kl", monte_carlo_kl(*bits, 20_000), kl_divergence(*bits))


def test_monte_carlo_kl_of_equal_distributions_has_no_spread() -> None:
    q = Normal(torch.zeros(3), torch.ones(3))
    assert monte_carlo_kl(q, q, 10).abs().max() == 0


# --- the Gaussian log-density --------------------------------------------------------------------------


@given(centre, spread)
def test_gaussian_density_integrates_to_one(mean: float, std: float) -> None:
    def density(x: float) -> float:
        return float(gaussian_log_prob(torch.tensor(x, dtype=torch.float64), torch.tensor(mean), std).exp())

    nb.check("mass", quad(density, mean - 10 * std, mean + 10 * std)[0], 1.0, atol=1e-6)
    with pytest.raises(CheckFailed):
        nb.check("mass", quad(lambda x: density(x) * 1.01, mean - 10 * std, mean + 10 * std)[0], 1.0, atol=1e-6)


def test_gaussian_log_prob_equals_torch_and_is_not_summed() -> None:
    x, mean = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    std = torch.rand(4, 1, dtype=torch.float64) + 0.1
    assert gaussian_log_prob(x, mean, std).shape == (4, 3)
    nb.check("log_prob", gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x), atol=1e-9)
    nb.check("number", gaussian_log_prob(x, mean, 0.3), Normal(mean, 0.3).log_prob(x), atol=1e-9)
    with pytest.raises(CheckFailed):
        nb.check("variance", gaussian_log_prob(x, mean, std**2), Normal(mean, std).log_prob(x), atol=1e-3)

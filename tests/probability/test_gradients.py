"""Gradients of expectations: unbiased where the chapter says so, with the variances that it derives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib.errors import CheckFailed, DataError
from nblib.probability import gumbel_softmax, optimal_baseline, pathwise_gradient, score_function_gradient

MU, SIGMA = 1.0, 0.5
PARAMS = torch.tensor([MU, SIGMA], dtype=torch.float64)
N = 100_000
Function = Callable[[np.ndarray], np.ndarray]


def square(z: Tensor) -> Tensor:
    return z**2


def log_prob(z: Tensor, params: Tensor) -> Tensor:
    return -0.5 * ((z - params[0]) / params[1]) ** 2 - params[1].log() - 0.5 * math.log(2 * math.pi)


def transform(noise: Tensor, params: Tensor) -> Tensor:
    return params[0] + params[1] * noise


def noise(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expectation(g: Function) -> np.ndarray:
    """E[g(e)] for a standard normal e, by the trapezoid rule, which converges faster than any power here."""
    e = np.linspace(-12, 12, 200_001)
    return np.atleast_2d(g(e)) @ (np.exp(-(e**2) / 2) / math.sqrt(2 * math.pi)) * (e[1] - e[0])


def moments(g: Function) -> tuple[np.ndarray, np.ndarray]:
    mean = expectation(g)
    return mean, expectation(lambda e: (g(e) - mean[:, None]) ** 2)


def score_terms(f: Function, mu: float, sigma: float, baseline: float = 0.0) -> Function:
    return lambda e: (f(mu + sigma * e) - baseline) * np.stack([e / sigma, (e**2 - 1) / sigma])


def pathwise_terms(slope: Function, mu: float, sigma: float) -> Function:
    return lambda e: slope(mu + sigma * e) * np.stack([np.ones_like(e), e])


SCORE = moments(score_terms(np.square, MU, SIGMA))
PATHWISE = moments(pathwise_terms(lambda z: 2 * z, MU, SIGMA))


@pytest.fixture(scope="module")
def by_score() -> Tensor:
    return score_function_gradient(square, log_prob, PARAMS, transform(noise(0), PARAMS))


@pytest.fixture(scope="module")
def by_path() -> Tensor:
    return pathwise_gradient(square, transform, PARAMS, noise(1))


def test_the_quadrature_gives_the_exact_gradient() -> None:
    nb.check("score", SCORE[0], [2 * MU, 2 * SIGMA], atol=1e-9)
    nb.check("path", PATHWISE[0], [2 * MU, 2 * SIGMA], atol=1e-9)


def test_the_score_function_estimate_is_unbiased(by_score: Tensor) -> None:
    assert by_score.shape == (N, 2)
    nb.check_mc("score", by_score, [2 * MU, 2 * SIGMA])
    with pytest.raises(CheckFailed):
        nb.check_mc("score", -by_score, [2 * MU, 2 * SIGMA])
    with pytest.raises(CheckFailed):
        nb.check_mc("score", by_score, [2 * MU, SIGMA])


def test_the_pathwise_estimate_is_unbiased(by_path: Tensor) -> None:
    assert by_path.shape == (N, 2)
    nb.check_mc("path", by_path, [2 * MU, 2 * SIGMA])
    with pytest.raises(CheckFailed):
        nb.check_mc("path", by_path / 2, [2 * MU, 2 * SIGMA])


def test_the_variances_are_those_of_the_quadrature(by_score: Tensor, by_path: Tensor) -> None:
    exact = torch.tensor([2 * MU, 2 * SIGMA], dtype=torch.float64)
    nb.check_mc("score", (by_score - exact) ** 2, SCORE[1])
    nb.check_mc("path", (by_path - exact) ** 2, PATHWISE[1])
    with pytest.raises(CheckFailed):
        nb.check_mc("swapped", (by_path - exact) ** 2, SCORE[1])


def test_the_pathwise_variance_of_a_square_is_the_smaller_one() -> None:
    assert (PATHWISE[1] < SCORE[1]).all()


def test_the_pathwise_variance_of_a_fast_wave_is_the_larger_one() -> None:
    rate = 20.0
    f, slope = (lambda z: np.cos(rate * z)), (lambda z: -rate * np.sin(rate * z))
    params = torch.tensor([0.3, 0.5], dtype=torch.float64)
    mean, score = moments(score_terms(f, 0.3, 0.5))
    same, path = moments(pathwise_terms(slope, 0.3, 0.5))
    nb.check("one gradient", mean, same, atol=1e-8)
    assert (path > 10 * score).all()
    estimates = pathwise_gradient(lambda z: torch.cos(rate * z), transform, params, noise(2))
    nb.check_mc("path", (estimates - torch.from_numpy(same)) ** 2, path)
    estimates = score_function_gradient(lambda z: torch.cos(rate * z), log_prob, params, transform(noise(3), params))
    nb.check_mc("score", (estimates - torch.from_numpy(mean)) ** 2, score)
    # The order turns round where sigma is small against the wavelength.
    small = 0.01
    assert moments(pathwise_terms(slope, 0.3, small))[1][0] < moments(score_terms(f, 0.3, small))[1][0]


def test_a_step_function_has_no_pathwise_gradient_but_a_score_function_one() -> None:
    def step(z: Tensor) -> Tensor:
        return (z > 0).to(z)

    density = math.exp(-((MU / SIGMA) ** 2) / 2) / math.sqrt(2 * math.pi)
    exact = [density / SIGMA, -MU * density / SIGMA**2]
    assert pathwise_gradient(step, transform, PARAMS, noise(4, 100)).abs().max() == 0
    nb.check_mc("step", score_function_gradient(step, log_prob, PARAMS, transform(noise(5), PARAMS)), exact)
    with pytest.raises(CheckFailed):
        nb.check_mc("step", pathwise_gradient(step, transform, PARAMS, noise(4, 100)), exact)


# --- baselines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [3.0, torch.tensor([1.0, -2.0], dtype=torch.float64)], ids=["number", "vector"])
def test_a_constant_baseline_keeps_the_mean(baseline: float | Tensor) -> None:
    samples = transform(noise(6), PARAMS)
    estimates = score_function_gradient(square, log_prob, PARAMS, samples, baseline=baseline)
    nb.check_mc("baseline", estimates, [2 * MU, 2 * SIGMA])


def test_a_vector_baseline_holds_one_number_per_parameter() -> None:
    samples = transform(noise(6, 50), PARAMS)
    both = score_function_gradient(
        square, log_prob, PARAMS, samples, baseline=torch.tensor([1.0, -2.0], dtype=torch.float64)
    )
    one, two = (score_function_gradient(square, log_prob, PARAMS, samples, baseline=b) for b in (1.0, -2.0))
    nb.check("columns", both, torch.stack([one[:, 0], two[:, 1]], -1), atol=1e-12)


def test_the_leave_one_out_baseline_keeps_the_mean_exactly() -> None:
    """Over all samples of three coins the expectation is a finite sum: no tolerance for noise is needed."""

    def f(z: Tensor) -> Tensor:
        return (z - 0.45) ** 2

    def coin(z: Tensor, params: Tensor) -> Tensor:
        return z * params[0].log() + (1 - z) * torch.log1p(-params[0])

    prob, n = 0.3, 3
    params = torch.tensor([prob], dtype=torch.float64)
    exact = (1 - 0.45) ** 2 - 0.45**2
    mean, biased = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        samples = torch.tensor(outcome, dtype=torch.float64)
        weight = math.prod(prob if z else 1 - prob for z in outcome)
        mean += weight * score_function_gradient(f, coin, params, samples, baseline="loo").mean(0)
        with_own = float(f(samples).mean())
        biased += weight * score_function_gradient(f, coin, params, samples, baseline=with_own).mean(0)
    nb.check("loo", mean, exact, atol=1e-12)
    nb.check("own value in the baseline", biased, exact * (n - 1) / n, atol=1e-12)
    with pytest.raises(CheckFailed):
        nb.check("own value in the baseline", biased, exact, atol=1e-6)


def test_the_leave_one_out_baseline_lowers_the_variance(by_score: Tensor) -> None:
    estimates = score_function_gradient(square, log_prob, PARAMS, transform(noise(0), PARAMS), baseline="loo")
    assert (estimates.var(0) < by_score.var(0)).all()


def test_leave_one_out_needs_two_samples() -> None:
    with pytest.raises(DataError, match="at least 2 samples, got 1"):
        score_function_gradient(square, log_prob, PARAMS, noise(0, 1), baseline="loo")


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(DataError, match=r"'lou'.*Did you mean 'loo'"):
        score_function_gradient(square, log_prob, PARAMS, noise(0, 5), baseline="lou")


def test_the_optimal_baseline_is_the_ratio_of_moments() -> None:
    scores = score_terms(np.ones_like, MU, SIGMA)
    top = expectation(lambda e: (MU + SIGMA * e) ** 2 * scores(e) ** 2)
    exact = torch.from_numpy(top / expectation(lambda e: scores(e) ** 2))
    z = transform(noise(7), PARAMS)
    s = torch.from_numpy(scores(noise(7).numpy()).T.copy())
    # Of a ratio of means: the standard error of the delta method.
    error = ((z**2).unsqueeze(-1) - exact).mul(s**2).std(0) / math.sqrt(N) / (s**2).mean(0)
    got = optimal_baseline(square, log_prob, PARAMS, z)
    nb.check("standard errors", ((got - exact) / error).abs().clamp_min(4.0), 4.0)
    plain = (z**2).mean().expand(2)
    with pytest.raises(CheckFailed):
        nb.check("standard errors", ((plain - exact) / error).abs().clamp_min(4.0), 4.0)


@pytest.mark.parametrize("component", [0, 1])
def test_the_optimal_baseline_minimises_the_variance(component: int) -> None:
    best = float(optimal_baseline(square, log_prob, PARAMS, transform(noise(8), PARAMS))[component])

    def variance(b: float) -> float:
        return float(moments(score_terms(np.square, MU, SIGMA, b))[1][component])

    assert variance(best) < min(variance(best - 0.1), variance(best + 0.1))
    assert variance(best) < variance(0.0)


# --- the Gumbel softmax --------------------------------------------------------------------------------


LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def test_hard_samples_follow_the_softmax() -> None:
    samples = gumbel_softmax(LOGITS.expand(N, 4), 0.7, hard=True)
    nb.check_mc("frequencies", samples, LOGITS.softmax(-1))
    with pytest.raises(CheckFailed):
        nb.check_mc("frequencies", samples, (LOGITS / 0.7).softmax(-1))


def test_hard_samples_are_exactly_one_hot() -> None:
    samples = gumbel_softmax(torch.randn(10_000, 5), 0.7, hard=True)
    assert bool(((samples == 0) | (samples == 1)).all())
    assert bool((samples.sum(-1) == 1).all())


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_relaxed_samples_lie_on_the_simplex(temperature: float) -> None:
    samples = gumbel_softmax(LOGITS.expand(1000, 4), temperature)
    assert float(samples.min()) >= 0
    nb.check("sum", samples.sum(-1), 1.0, atol=1e-12)


def test_a_low_temperature_gives_the_hard_sample() -> None:
    def draw(temperature: float, hard: bool) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return gumbel_softmax(LOGITS.expand(1000, 4), temperature, hard=hard, generator=generator)

    far = [float((draw(t, False) - draw(1.0, True)).abs().mean()) for t in (1.0, 0.1, 0.01, 1e-6)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-4 < far[0]


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_is_that_of_the_relaxation(hard: bool) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    def gradient(hard: bool) -> Tensor:
        logits = LOGITS.clone().requires_grad_()
        sample = gumbel_softmax(logits, 0.7, hard=hard, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad((sample * weight).sum(), logits)[0]

    assert float(gradient(hard).abs().min()) > 0
    nb.check("straight-through", gradient(hard), gradient(False), atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match=f"positive, got {temperature}"):
        gumbel_softmax(LOGITS, temperature)

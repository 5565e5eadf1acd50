"""Every claim of the chapters on variational autoencoders: its check passes on it and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import nblib as nb
from nblib.errors import CheckFailed
from nblib.probability import gaussian_log_prob

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_model(latent: int, dim: int, generator: torch.Generator) -> nb.data.toy.LinearGaussian:
    weight = torch.randn(dim, latent, dtype=DOUBLE, generator=generator) / math.sqrt(latent)
    return nb.data.toy.LinearGaussian(weight, torch.zeros(dim, dtype=DOUBLE), 0.3)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def conditional_kl(p: Tensor, q: Tensor, axis: int) -> Tensor:
    return (p * (p / p.sum(axis, keepdim=True) / (q / q.sum(axis, keepdim=True))).log()).sum()


def tables() -> tuple[Tensor, Tensor]:
    """Joint tables p(x, z) and q(x, z): 6 values of x, 4 of z."""
    p, q = torch.rand(2, 6, 4, dtype=DOUBLE, generator=seeded()) + 0.05
    return p / p.sum(), q / q.sum()


def test_thm_elbo_identity() -> None:
    """The gap of the other sign or halved, the divergence reversed or to the prior; a wrong q that reaches equality."""
    rng = seeded()
    model = linear_model(3, 6, rng)
    x = model.sample(5, generator=rng)
    mean, cov = model.posterior(x)
    cov = cov.expand(5, 3, 3)
    wrong_mean = mean + 0.3 * torch.randn(5, 3, dtype=DOUBLE, generator=rng)
    root = torch.randn(3, 3, dtype=DOUBLE, generator=rng) / 3
    wrong_cov = cov + root @ root.T
    elbo, evidence = model.elbo(x, wrong_mean, wrong_cov), model.log_prob(x)
    gap = nb.vae.gaussian_kl_full(wrong_mean, wrong_cov, mean, cov)
    nb.check("thm-elbo-identity", elbo + gap, evidence, atol=1e-9)
    nb.check("thm-elbo-identity", model.elbo(x, mean, cov), evidence, atol=1e-9)
    reverse = nb.vae.gaussian_kl_full(mean, cov, wrong_mean, wrong_cov)
    prior = nb.vae.gaussian_kl_full(wrong_mean, wrong_cov, 0 * mean, torch.eye(3, dtype=DOUBLE).expand(5, 3, 3))
    for bad in (-gap, gap / 2, 0 * gap, reverse, prior):
        with pytest.raises(CheckFailed, match="thm-elbo-identity"):
            nb.check("thm-elbo-identity", elbo + bad, evidence, atol=1e-9)
    for q in ((wrong_mean, cov), (mean, wrong_cov), (mean, torch.diag_embed(cov.diagonal(dim1=1, dim2=2)))):
        nb.check_bound("thm-elbo-identity", model.elbo(x, *q), evidence)
        with pytest.raises(CheckFailed, match="thm-elbo-identity"):  # equality only for the posterior
            nb.check("thm-elbo-identity", model.elbo(x, *q), evidence, atol=1e-9)

    p, joint = tables()
    encoder, posterior = (t / t.sum(1, keepdim=True) for t in (joint, p))
    bound, log_p = (encoder * (p / encoder).log()).sum(1), p.sum(1).log()
    nb.check("thm-elbo-identity", bound + (encoder * (encoder / posterior).log()).sum(1), log_p, atol=1e-12)
    nb.check_bound("thm-elbo-identity", bound, log_p)
    reverse = (posterior * (posterior / encoder).log()).sum(1)
    with pytest.raises(CheckFailed, match="thm-elbo-identity"):
        nb.check("thm-elbo-identity", bound + reverse, log_p, atol=1e-12)
    wrong_sign = (encoder * (p / p.sum(0)).log()).sum(1) + (encoder * (encoder / p.sum(0)).log()).sum(1)
    with pytest.raises(CheckFailed, match="thm-elbo-identity"):  # reconstruction *plus* the KL to the prior
        nb.check_bound("thm-elbo-identity", wrong_sign, log_p)


def test_thm_elbo_augmented() -> None:
    """The constant lost or added, the divergence reversed, a conditional term lost, swapped or weighted by p."""
    p, q = tables()
    data, encoder = q.sum(1), q / q.sum(1, keepdim=True)
    elbo = (data * (encoder * (p / encoder).log()).sum(1)).sum()
    constant = (data * data.log()).sum()
    nb.check("thm-elbo-augmented", elbo - constant, -kl(q, p), atol=1e-12)
    for wrong in (elbo, elbo + constant, constant - elbo, (encoder * (p / encoder).log()).sum(1).mean() - constant):
        with pytest.raises(CheckFailed, match="thm-elbo-augmented"):
            nb.check("thm-elbo-augmented", wrong, -kl(q, p), atol=1e-12)
    with pytest.raises(CheckFailed, match="thm-elbo-augmented"):
        nb.check("thm-elbo-augmented", elbo - constant, -kl(p, q), atol=1e-12)

    for axis in (1, 0):  # the second line, the third
        marginal, inside = kl(q.sum(axis), p.sum(axis)), conditional_kl(q, p, axis)
        nb.check("thm-elbo-augmented", -kl(q, p), -marginal - inside, atol=1e-12)
        by_p = (q / q.sum(axis, keepdim=True) * p.sum(axis, keepdim=True)).flatten()
        by_p = conditional_kl(by_p.view_as(p), p, axis)
        for wrong in (
            -marginal,
            -inside,
            inside - marginal,
            -marginal - by_p,
            -marginal - conditional_kl(q, p, 1 - axis),
            -marginal - conditional_kl(p, q, axis),
            -kl(p.sum(axis), q.sum(axis)) - inside,
        ):
            with pytest.raises(CheckFailed, match="thm-elbo-augmented"):
                nb.check("thm-elbo-augmented", -kl(q, p), wrong, atol=1e-12)
        nb.check_bound("thm-elbo-augmented", marginal, kl(q, p))
        with pytest.raises(CheckFailed, match="thm-elbo-augmented"):
            nb.check_bound("thm-elbo-augmented", kl(q, p), marginal)


def test_prop_gaussian_kl() -> None:
    """Signs, a lost 1/2, 1 or L, a std for a variance, r for r², arguments, means or determinants exchanged."""
    rng = seeded()
    mean, raw, m, other = torch.randn(4, 4, dtype=DOUBLE, generator=rng)
    std, r = raw.exp(), (other / 2).exp()
    z = mean + std * torch.randn(200_000, 4, dtype=DOUBLE, generator=rng)
    log_q = Normal(mean, std).log_prob(z).sum(-1)
    to_normal = log_q - Normal(0.0, 1.0).log_prob(z).sum(-1)
    nb.check_mc("prop-gaussian-kl", to_normal, nb.vae.gaussian_kl(mean, std))
    closed = 0.5 * (std**2 + mean**2 - 1 - 2 * std.log())
    for terms in (
        -closed,
        2 * closed,
        closed + 0.5,
        0.5 * (std**2 + mean**2 - 1 + 2 * std.log()),
        0.5 * (std**2 + mean**2 - 1 - std.log()),
        0.5 * (std + mean**2 - 1 - std.log()),  # exp(log σ) for the variance
        0.5 * (std**2 - mean**2 - 1 - 2 * std.log()),
    ):
        with pytest.raises(CheckFailed, match="prop-gaussian-kl"):
            nb.check_mc("prop-gaussian-kl", to_normal, terms.sum())

    to_other = log_q - Normal(m, r).log_prob(z).sum(-1)
    nb.check_mc("prop-gaussian-kl", to_other, nb.vae.gaussian_kl(mean, std, m, r))
    square = (std**2 + (mean - m) ** 2) / r**2
    nb.check_mc("prop-gaussian-kl", to_other, 0.5 * (square - 1 - (std**2 / r**2).log()).sum())
    for terms in (
        square - 1 + (std**2 / r**2).log(),
        (std**2 + (mean + m) ** 2) / r**2 - 1 - (std**2 / r**2).log(),
        std**2 / r**2 + (mean - m) ** 2 - 1 - (std**2 / r**2).log(),
        (std**2 + (mean - m) ** 2) / r - 1 - (std**2 / r).log(),
        (r**2 + (mean - m) ** 2) / std**2 - 1 - (r**2 / std**2).log(),
    ):
        with pytest.raises(CheckFailed, match="prop-gaussian-kl"):
            nb.check_mc("prop-gaussian-kl", to_other, 0.5 * terms.sum())

    # Well-conditioned, or the spread of the log-ratio hides a lost L behind four standard errors.
    factor = 0.4 * torch.randn(2, 4, 4, dtype=DOUBLE, generator=rng).tril()
    factor.diagonal(dim1=-2, dim2=-1).copy_(torch.tensor([[0.6], [1.1]], dtype=DOUBLE))
    q, p = (MultivariateNormal(c, scale_tril=t) for c, t in zip((mean / 2, -mean / 2), factor))
    log_ratio = nb.probability.monte_carlo_kl(q, p, 200_000)
    exact = nb.vae.gaussian_kl_full(q.loc, q.covariance_matrix, p.loc, p.covariance_matrix)
    nb.check_mc("prop-gaussian-kl", log_ratio, exact)
    gap, log_det = p.loc - q.loc, p.covariance_matrix.logdet() - q.covariance_matrix.logdet()
    trace = (p.precision_matrix @ q.covariance_matrix).trace()
    form, wrong_form = gap @ p.precision_matrix @ gap, gap @ q.precision_matrix @ gap
    nb.check("prop-gaussian-kl", 0.5 * (trace + form - 4 + log_det), exact, atol=1e-9)
    backwards = (q.precision_matrix @ p.covariance_matrix).trace()
    for total in (
        trace + form - 4 - log_det,
        trace + form - 4 + log_det / 2,
        trace + form + log_det,
        trace - 4 + log_det,
        trace + wrong_form - 4 + log_det,
        backwards + form - 4 + log_det,
        backwards + wrong_form - 4 - log_det,
    ):
        with pytest.raises(CheckFailed, match="prop-gaussian-kl"):
            nb.check_mc("prop-gaussian-kl", log_ratio, 0.5 * total)

    # The diagonal formula, exactly: a special case of the full one.
    full = nb.vae.gaussian_kl_full(mean, (std**2).diag(), m, (r**2).diag())
    nb.check("prop-gaussian-kl", nb.vae.gaussian_kl(mean, std, m, r), full, atol=1e-9)
    with pytest.raises(CheckFailed, match="prop-gaussian-kl"):
        nb.check("prop-gaussian-kl", nb.vae.gaussian_kl(mean, std, -m, r), full, atol=1e-9)


def test_prop_optimal_variance() -> None:
    """The printed loss without its 1/2; the sum over pixels, the standard deviation, twice or half the error."""
    scales = torch.linspace(0.1, 0.5, 10, dtype=DOUBLE)
    residual = scales * torch.randn(2000, 10, dtype=DOUBLE, generator=seeded())
    mse = float((residual**2).sum(1).mean() / 10)

    def minimizer(half: float) -> float:
        log_std = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [log_std], max_iter=100, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            nll = -gaussian_log_prob(residual / math.sqrt(0.5 / half), torch.zeros((), dtype=DOUBLE), log_std.exp())
            loss = nll.sum(1).mean() / 10
            loss.backward()
            return loss

        optimizer.step(closure)
        return float((2 * log_std.detach()).exp())

    variance = minimizer(0.5)
    nb.check("prop-optimal-variance", variance, mse, atol=1e-6)
    for wrong in (10 * mse, math.sqrt(mse), 2 * mse, mse / 2, float((residual.abs().mean()) ** 2)):
        with pytest.raises(CheckFailed, match="prop-optimal-variance"):
            nb.check("prop-optimal-variance", variance, wrong, atol=1e-6)
    printed = minimizer(1.0)
    nb.check("prop-optimal-variance", printed, 2 * mse, atol=1e-6)
    with pytest.raises(CheckFailed, match="prop-optimal-variance"):
        nb.check("prop-optimal-variance", printed, mse, atol=1e-6)


def test_prop_blur() -> None:
    """Weights that are not q(x|z): normalized over the codes, over nothing, or equal; the median of absolute errors."""
    rng = seeded()
    images = torch.rand(8, 1, 4, 4, dtype=DOUBLE, generator=rng)
    overlap = torch.randn(8, 2, dtype=DOUBLE, generator=rng).softmax(-1)  # q(code | image)

    def learned(power: int) -> Tensor:
        table = torch.zeros(2, 1, 4, 4, dtype=DOUBLE, requires_grad=True)
        optimizer = torch.optim.SGD([table], lr=0.4)
        for _ in range(200):
            optimizer.zero_grad()
            distance = (images[:, None] - table).abs() ** power
            (overlap[:, :, None, None, None] * distance).sum().div(2).backward()
            optimizer.step()
        return table.detach()

    def average(weights: Tensor) -> Tensor:
        return torch.einsum("nk,nchw->kchw", weights, images)

    table = learned(2)
    nb.check("prop-blur", table, average(overlap / overlap.sum(0)), atol=1e-5)
    for weights in (overlap, overlap / 8, torch.full((8, 2), 1 / 8, dtype=DOUBLE), overlap.softmax(0)):
        with pytest.raises(CheckFailed, match="prop-blur"):
            nb.check("prop-blur", table, average(weights), atol=1e-5)
    with pytest.raises(CheckFailed, match="prop-blur"):
        nb.check("prop-blur", learned(1), average(overlap / overlap.sum(0)), atol=1e-5)


def test_prop_average_kl() -> None:
    """The mutual information lost, subtracted or reversed; the mismatch of the population reversed."""
    grid = torch.linspace(-8, 8, 6401, dtype=DOUBLE)
    log_prior = Normal(0.0, 1.0).log_prob(grid)
    means = torch.tensor([-1.5, -0.6, 0.0, 0.7, 1.6], dtype=DOUBLE)
    stds = torch.tensor([0.3, 0.5, 0.4, 0.35, 0.6], dtype=DOUBLE)
    step = grid[1] - grid[0]
    log_q = gaussian_log_prob(grid, means[:, None], stds[:, None])
    log_mix = log_q.logsumexp(0) - math.log(5)
    average = nb.vae.gaussian_kl(means[:, None], stds[:, None]).mean()
    information = (log_q.exp() * (log_q - log_mix)).sum(1).mean() * step
    marginal = (log_mix.exp() * (log_mix - log_prior)).sum() * step
    nb.check("prop-average-kl", information + marginal, average, atol=1e-8)
    reverse_information = (log_mix.exp() * (log_mix - log_q)).sum(1).mean() * step
    reverse_marginal = (log_prior.exp() * (log_prior - log_mix)).sum() * step
    for wrong in (
        marginal,
        information,
        marginal - information,
        information - marginal,
        reverse_information + marginal,
        information + reverse_marginal,
        5 * information + marginal,  # the sum over the data for their mean
        information + math.log(5) + marginal,  # a mixture without its 1/N
    ):
        with pytest.raises(CheckFailed, match="prop-average-kl"):
            nb.check("prop-average-kl", wrong, average, atol=1e-8)


def test_thm_importance_bound() -> None:
    """log k lost, likelihoods averaged and the KL subtracted, logs averaged, the order reversed, a q that has gaps."""
    rng = seeded()
    model = linear_model(1, 3, rng)
    x = model.sample(20, generator=rng)
    log_p, (mean, cov) = model.log_prob(x), model.posterior(x)
    center, std = mean + 0.3 * cov[0].sqrt(), 1.5 * cov[0].sqrt()  # wider than the posterior: bounded weights
    z = center + std * torch.randn(5000, 20, 1, dtype=DOUBLE, generator=rng)
    log_lik = gaussian_log_prob(x, z @ model.weight.T + model.bias, model.std).sum(-1)
    log_w = log_lik + (gaussian_log_prob(z, 0 * mean, 1.0) - gaussian_log_prob(z, center, std)).sum(-1)

    def bounds(values: Tensor) -> list[Tensor]:
        return [(values.reshape(-1, k, 20).logsumexp(1) - math.log(k)).mean(0) for k in ks]

    ks = [1, 5, 50, 500, 5000]
    estimates = bounds(log_w)
    for fewer, more in pairwise(estimates):
        nb.check_bound("thm-importance-bound", fewer, more)
        with pytest.raises(CheckFailed, match="thm-importance-bound"):
            nb.check_bound("thm-importance-bound", more, fewer)
    nb.check_bound("thm-importance-bound", estimates[-1].mean(), log_p.mean(), slack=0.05)
    nb.check("thm-importance-bound", estimates[-1].mean(), log_p.mean(), atol=0.05)
    unnormalized = estimates[-1] + math.log(5000)
    likelihoods = bounds(log_lik)[-1] - nb.vae.gaussian_kl(center, std)
    for wrong in (unnormalized, likelihoods):
        with pytest.raises(CheckFailed, match="thm-importance-bound"):
            nb.check_bound("thm-importance-bound", wrong.mean(), log_p.mean(), slack=0.05)
    with pytest.raises(CheckFailed, match="thm-importance-bound"):  # logs averaged: no limit at the evidence
        nb.check("thm-importance-bound", log_w.mean(0).mean(), log_p.mean(), atol=0.05)
    half = bounds(torch.where(z[..., 0] > mean[:, 0], log_w, -math.inf))[-1]
    with pytest.raises(CheckFailed, match="thm-importance-bound"):  # q is zero where p(x, z) is not
        nb.check("thm-importance-bound", half.mean(), log_p.mean(), atol=0.05)

    # Two codes: the expectation is a finite sum over how many of the k draws are the first.
    joint, q = torch.tensor([0.12, 0.03], dtype=DOUBLE), torch.tensor([0.4, 0.6], dtype=DOUBLE)

    def exact(k: int, w: Tensor) -> Tensor:
        j = torch.arange(k + 1, dtype=DOUBLE)
        draws = torch.distributions.Binomial(k, q[0]).log_prob(j).exp()
        return (draws * ((j * w[0] + (k - j) * w[1]) / k).log()).sum()

    evidence = joint.sum().log()
    values = torch.stack([exact(k, joint / q) for k in (*range(1, 10), 1000)])
    elbo = (q * (joint / q).log()).sum()
    nb.check("thm-importance-bound", values[0], elbo, atol=1e-12)
    nb.check_bound("thm-importance-bound", values[:-1], values[1:])
    nb.check_bound("thm-importance-bound", values, evidence)
    nb.check("thm-importance-bound", values[-1], evidence, atol=1e-3)
    with pytest.raises(CheckFailed, match="thm-importance-bound"):
        nb.check("thm-importance-bound", elbo, evidence, atol=1e-3)
    posterior = torch.stack([exact(k, torch.full((2,), 0.15, dtype=DOUBLE)) for k in (1, 2, 3)])
    with pytest.raises(CheckFailed, match="thm-importance-bound"):  # "strictly tighter", at the posterior
        nb.check_bound("thm-importance-bound", posterior[:-1] + 1e-9, posterior[1:])

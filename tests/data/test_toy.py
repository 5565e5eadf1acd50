"""Exact targets: their densities integrate to one, their scores are gradients, their samples have their moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib.data.toy import Checkerboard, GaussianMixture, LinearGaussian, make
from nblib.errors import CheckFailed, DataError

MIXTURES = ("eight-gaussians", "twenty-five-gaussians", "two-moons", "spirals")
N = 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skewed() -> GaussianMixture:
    means = torch.tensor([[0.0, 1.0], [-2.0, 0.5], [1.5, -1.0]], dtype=torch.float64)
    root = torch.randn(3, 2, 2, dtype=torch.float64, generator=seeded(5))
    covs = root @ root.mT + 0.2 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(means, covs, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))


def linear() -> LinearGaussian:
    weight = torch.randn(3, 2, dtype=torch.float64, generator=seeded(6))
    return LinearGaussian(weight, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), 0.4)


def mixture(name: str) -> GaussianMixture:
    target = skewed() if name == "skewed" else make(name)
    assert isinstance(target, GaussianMixture)
    return target


def mass(target: GaussianMixture, half: float, step: float) -> Tensor:
    line = torch.arange(-half, half, step, dtype=torch.float64)
    return target.log_prob(torch.cartesian_prod(line, line)).exp().sum() * step**2


def check_moments(samples: Tensor, mean: Tensor, cov: Tensor) -> None:
    nb.check_mc("mean", samples, mean)
    centred = samples.double() - mean
    nb.check_mc("covariance", centred.unsqueeze(-1) * centred.unsqueeze(-2), cov)


# --- mixtures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_the_density_of_a_mixture_integrates_to_one(name: str) -> None:
    nb.check("mass", mass(mixture(name), 4.0, 0.04), 1.0, atol=1e-6)


def test_a_density_with_wrong_weights_fails_the_check() -> None:
    target = skewed()
    nb.check("mass", mass(target, 14.0, 0.1), 1.0, atol=1e-6)
    object.__setattr__(target, "weights", target.weights * 1.1)
    with pytest.raises(CheckFailed):
        nb.check("mass", mass(target, 14.0, 0.1), 1.0, atol=1e-6)


def test_the_log_density_of_a_mixture_is_torchs() -> None:
    target, x = skewed(), torch.randn(4, 5, 2, dtype=torch.float64)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(target.weights),
        torch.distributions.MultivariateNormal(target.means, target.covs),
    )
    nb.check("log_prob", target.log_prob(x), reference.log_prob(x), atol=1e-10)
    assert target.log_prob(x).shape == (4, 5)


@pytest.mark.parametrize("name", [*MIXTURES, "skewed"])
def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density(name: str) -> None:
    target = mixture(name)
    x = (target.sample(50, generator=seeded()) + 0.1).requires_grad_()
    gradient = torch.autograd.grad(target.log_prob(x).sum(), x)[0]
    nb.check("score", target.score(x), gradient, atol=1e-6)
    assert target.score(x).shape == (50, 2)
    with pytest.raises(CheckFailed):
        nb.check("score", -target.score(x), gradient, atol=1e-6)


@pytest.mark.parametrize("name", [*MIXTURES, "skewed"])
def test_samples_of_a_mixture_have_its_mean_and_covariance(name: str) -> None:
    target = mixture(name)
    samples = target.sample(N, generator=seeded(1))
    check_moments(samples, target.mean, target.cov)
    with pytest.raises(CheckFailed):
        check_moments(samples, target.mean, target.cov - 0.1 * torch.eye(2, dtype=torch.float64))


def test_the_ring_has_the_moments_of_its_definition() -> None:
    ring = mixture("eight-gaussians")
    nb.check("mean", ring.mean, 0.0, atol=1e-12)
    nb.check("covariance", ring.cov, (2.0**2 / 2 + 0.2**2) * torch.eye(2, dtype=torch.float64), atol=1e-12)


def test_covariances_may_be_given_as_standard_deviations() -> None:
    means, stds = torch.randn(3, 2), torch.tensor([0.1, 0.2, 0.3])
    nb.check("covs", GaussianMixture(means, stds).covs, torch.stack([s**2 * torch.eye(2) for s in stds]), atol=1e-7)
    nb.check("weights", GaussianMixture(means, stds).weights, 1 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("covs", "weights", "said"),
    [
        (torch.ones(2), None, r"shape \(3,\) or \(3, 2, 2\), got \(2,\)"),
        (torch.ones(3, 2), None, r"got \(3, 2\)"),
        (torch.ones(3), torch.tensor([0.5, 0.5]), "3 positive numbers"),
        (torch.ones(3), torch.tensor([0.5, 0.5, 0.5]), r"\[0\.5, 0\.5, 0\.5\]"),
        (torch.ones(3), torch.tensor([1.5, -1.0, 0.5]), r"-1\.0"),
    ],
)
def test_a_mixture_that_is_no_distribution_is_refused(covs: Tensor, weights: Tensor | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        GaussianMixture(torch.zeros(3, 2), covs, weights)


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"toy target 'two-moon'. Did you mean 'two-moons'\?"):
        make("two-moon")


# --- the checkerboard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("board", [make("checkerboard"), Checkerboard(2, 1.0), Checkerboard(6, 3.0)], ids=str)
def test_the_checkerboard_has_mass_one_on_half_of_its_area(board: Checkerboard) -> None:
    step = board.size / 60
    line = torch.arange(-1.5 * board.size + step / 2, 1.5 * board.size, step, dtype=torch.float64)
    density = board.log_prob(torch.cartesian_prod(line, line)).exp()
    nb.check("mass", density.sum() * step**2, 1.0, atol=1e-9)
    inside = 4 * board.size**2 / step**2
    nb.check("area", (density > 0).sum(), inside / 2)


def test_neighbouring_squares_have_different_colours() -> None:
    board = Checkerboard()
    x = torch.tensor([[-3.0, -3.0], [-1.0, -3.0], [-1.0, -1.0], [3.0, 3.0], [5.0, 5.0]])
    assert board.log_prob(x).isfinite().tolist() == [True, False, True, True, False]
    nb.check("density", board.log_prob(x[0]), -math.log(32), atol=1e-6)


@pytest.mark.parametrize("cells", [2, 4, 6])
def test_checkerboard_samples_are_uniform_on_the_dark_squares(cells: int) -> None:
    board = Checkerboard(cells)
    samples = board.sample(N, generator=seeded(2))
    assert bool(board.log_prob(samples).isfinite().all())
    square = ((samples + board.size) / (2 * board.size / cells)).floor().long()
    hits = torch.nn.functional.one_hot(square[:, 0] * cells + square[:, 1], cells**2).double()
    dark = torch.tensor([(i + j) % 2 == 0 for i in range(cells) for j in range(cells)])
    nb.check_mc("frequencies", hits, dark.double() * 2 / cells**2)
    within = ((samples + board.size) / (2 * board.size / cells)) % 1
    nb.check_mc("position", within, 0.5)


def test_the_checkerboard_score_is_zero_inside_and_nan_outside() -> None:
    score = Checkerboard().score(torch.tensor([[-3.0, -3.0], [-1.0, -3.0]]))
    assert score[0].tolist() == [0.0, 0.0]
    assert bool(score[1].isnan().all())


@pytest.mark.parametrize("cells", [0, 1, 3, -2])
def test_a_board_with_odd_cells_is_refused(cells: int) -> None:
    with pytest.raises(DataError, match=f"even number of at least 2, got {cells}"):
        Checkerboard(cells)


# --- the linear model ----------------------------------------------------------------------------------


def test_the_linear_score_is_the_gradient_of_the_log_evidence() -> None:
    target = linear()
    x = target.sample(20, generator=seeded()).requires_grad_()
    gradient = torch.autograd.grad(target.log_prob(x).sum(), x)[0]
    nb.check("score", target.score(x), gradient, atol=1e-9)


def test_linear_samples_have_the_mean_and_covariance_of_the_marginal() -> None:
    target = linear()
    cov = target.weight @ target.weight.T + 0.16 * torch.eye(3, dtype=torch.float64)
    check_moments(target.sample(N, generator=seeded(3)), target.bias, cov)
    with pytest.raises(CheckFailed):
        check_moments(target.sample(N, generator=seeded(3)), target.bias, target.weight @ target.weight.T)


def test_the_linear_evidence_is_that_of_sampled_latents() -> None:
    target = linear()
    x = target.sample(1, generator=seeded())[0]
    z = torch.randn(N, 2, dtype=torch.float64, generator=seeded(4))
    likelihood = torch.distributions.Normal(z @ target.weight.T + target.bias, target.std).log_prob(x).sum(-1).exp()
    nb.check_mc("evidence", likelihood, target.log_prob(x).exp())

"""Likelihoods against torch.distributions, enumeration and the naive formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

import nblib as nb
from nblib.errors import CheckFailed, DataError
from nblib.vae import LIKELIHOODS, Bernoulli, DiscretizedLogistic, Gaussian, Likelihood, make_likelihood

N = 20_000


def images(outputs: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(5, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, outputs, 3, 4, 4, dtype=torch.float64)


# --- what all share ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_has_one_number_per_image_and_images_of_one_shape(name: str) -> None:
    likelihood = make_likelihood(name)
    x, params = images(likelihood.outputs)
    assert likelihood.log_prob(x, params).shape == (2, 5)
    assert likelihood.mean(params).shape == (2, 5, 3, 4, 4)
    assert likelihood.sample(params).shape == (2, 5, 3, 4, 4)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_mean_lies_in_the_unit_interval_even_at_extremes(name: str) -> None:
    likelihood = make_likelihood(name)
    mean = likelihood.mean(100 * torch.randn(50, likelihood.outputs, 1, 4, 4))
    assert float(mean.min()) >= 0
    assert float(mean.max()) <= 1


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_sample_is_a_function_of_the_generator(name: str) -> None:
    likelihood = make_likelihood(name)
    params = torch.randn(3, likelihood.outputs, 1, 4, 4)
    one, two, other = (likelihood.sample(params, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "near"), [("bernouli", "bernoulli"), ("gauss", "gaussian"), ("logistics", "logistic")]
)
def test_an_unknown_likelihood_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(DataError, match=rf"Unknown likelihood '{wrong}'. Did you mean '{near}'\?"):
        make_likelihood(wrong)


def test_the_interface_itself_computes_nothing() -> None:
    x, params = images()
    for call in (
        lambda: Likelihood().log_prob(x, params),
        lambda: Likelihood().mean(params),
        lambda: Likelihood().sample(params),
    ):
        with pytest.raises(TypeError, match="use Bernoulli, Gaussian or DiscretizedLogistic"):
            call()


# --- Bernoulli -----------------------------------------------------------------------------------------


def test_bernoulli_probabilities_of_all_16_images_sum_to_one() -> None:
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).reshape(16, 1, 2, 2)
    logits = 3 * torch.randn(1, 1, 2, 2, dtype=torch.float64)
    nb.check("mass", Bernoulli().log_prob(x, logits).exp().sum(), 1.0, atol=1e-12)
    with pytest.raises(CheckFailed):
        nb.check("mean for sum", (Bernoulli().log_prob(x, logits) / 4).exp().sum(), 1.0)


def test_bernoulli_is_minus_the_cross_entropy_from_logits() -> None:
    x, params = images()
    logits = params.squeeze(-4)
    entropy = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum((-1, -2, -3))
    nb.check("bce", Bernoulli().log_prob(x, params), -entropy, atol=1e-10)
    with pytest.raises(CheckFailed):
        nb.check("bce", Bernoulli().log_prob(x, params), entropy)


def test_the_best_value_of_a_soft_target_is_minus_its_entropy() -> None:
    target = torch.tensor([0.1, 0.35, 0.5, 0.9], dtype=torch.float64).reshape(1, 2, 2)
    logits = torch.logit(target).unsqueeze(0).requires_grad_()
    best = Bernoulli().log_prob(target, logits)
    entropy = torch.distributions.Bernoulli(target).entropy().sum()
    nb.check("entropy", best, -entropy, atol=1e-10)
    nb.check("stationary", torch.autograd.grad(best, logits)[0], 0.0, atol=1e-12)
    others = logits.detach() + torch.randn(200, 1, 1, 2, 2, dtype=torch.float64)
    assert bool((Bernoulli().log_prob(target, others) < best).all())
    assert best < -0.1


def test_a_soft_target_is_the_expectation_over_binary_images() -> None:
    target, logits = torch.rand(1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        x = torch.tensor(bits, dtype=torch.float64).reshape(1, 2, 2)
        weight = torch.where(x > 0, target, 1 - target).prod()
        expected += weight * Bernoulli().log_prob(x, logits)
    nb.check("expectation", Bernoulli().log_prob(target, logits), expected, atol=1e-12)


def test_bernoulli_samples_are_bits_with_the_right_mean() -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0, 5.0]).reshape(1, 1, 2, 2)
    draws = Bernoulli().sample(logits.expand(N, 1, 1, 2, 2))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    nb.check_mc("mean", draws, Bernoulli().mean(logits))


# --- Gaussian ------------------------------------------------------------------------------------------


def test_a_fixed_standard_deviation_gives_torchs_normal() -> None:
    x, params = images()
    expected = Normal(params[:, :, 0].sigmoid(), 0.4).log_prob(x).sum((-1, -2, -3))
    nb.check("fixed", Gaussian(0.4).log_prob(x, params), expected, atol=1e-9)
    with pytest.raises(CheckFailed):
        nb.check("variance for std", Gaussian(0.4**2).log_prob(x, params), expected)
    assert not list(Gaussian(0.4).parameters())


def test_a_shared_standard_deviation_gives_torchs_normal_and_is_learned() -> None:
    x, params = images()
    likelihood = Gaussian("shared").double()
    expected = Normal(params[:, :, 0].sigmoid(), likelihood.log_std.exp()).log_prob(x).sum((-1, -2, -3))
    got = likelihood.log_prob(x, params)
    nb.check("shared", got, expected, atol=1e-9)
    got.sum().backward()
    assert likelihood.log_std.grad is not None
    assert likelihood.log_std.grad != 0


def test_a_standard_deviation_per_pixel_gives_torchs_normal() -> None:
    x, params = images(2)
    expected = Normal(params[:, :, 0].sigmoid(), params[:, :, 1].exp()).log_prob(x).sum((-1, -2, -3))
    nb.check("pixel", Gaussian("pixel").log_prob(x, params), expected, atol=1e-9)
    swapped = params.flip(2)
    with pytest.raises(CheckFailed):
        nb.check("swapped", Gaussian("pixel").log_prob(x, swapped), expected)


def test_learned_standard_deviations_stay_above_their_floor() -> None:
    _, params = images(2)
    assert float(Gaussian("pixel", min_std=0.2).std(params - 50).min()) == pytest.approx(0.2)
    shared = Gaussian("shared", min_std=0.2)
    torch.nn.init.constant_(shared.log_std, -50.0)
    assert float(shared.std(params).detach()) == pytest.approx(0.2)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_a_standard_deviation_that_is_not_positive_is_refused(std: float) -> None:
    with pytest.raises(DataError, match=f"positive, got {std}"):
        Gaussian(std)


def test_an_unknown_kind_of_standard_deviation_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'pixels'. Did you mean 'pixel'\?"):
        Gaussian("pixels")


def test_gaussian_samples_have_the_right_mean_and_spread() -> None:
    params = torch.tensor([[-1.0, 2.0], [math.log(0.1), math.log(0.5)]]).reshape(2, 1, 1, 2)
    likelihood = Gaussian("pixel")
    draws = likelihood.sample(params.expand(N, 2, 1, 1, 2))
    mean = likelihood.mean(params)
    nb.check_mc("mean", draws, mean)
    nb.check_mc("variance", (draws - mean) ** 2, likelihood.std(params) ** 2)


# --- the discretized logistic --------------------------------------------------------------------------


EXTREMES = torch.cartesian_prod(
    torch.tensor([-40.0, -3.0, 0.0, 0.7, 3.0, 40.0]), torch.tensor([-60.0, -7.0, -4.0, -2.0, 0.0, 2.0, 60.0])
)


def all_levels(levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every level against every pair of location and scale: ``(levels, 1, 1, 1, 1)`` and ``(P, 2, 1, 1, 1)``."""
    x = torch.arange(levels, dtype=dtype) / (levels - 1)
    return x.reshape(-1, 1, 1, 1, 1), EXTREMES.to(dtype).reshape(-1, 2, 1, 1, 1)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_probabilities_of_all_levels_sum_to_one(levels: int, dtype: torch.dtype, atol: float) -> None:
    log_mass = DiscretizedLogistic(levels).log_prob(*all_levels(levels, dtype))
    nb.check("mass", log_mass.double().exp().sum(0), 1.0, atol=atol)
    with pytest.raises(CheckFailed):
        nb.check("without one end", log_mass[:-1].double().exp().sum(0), 1.0, atol=atol)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_probabilities_are_differences_of_sigmoids(levels: int) -> None:
    x, params = all_levels(levels, torch.float64)
    mean, scale = params[:, 0].sigmoid(), params[:, 1].clamp(-7, 2).exp()
    half = 0.5 / (levels - 1)
    upper = torch.where(x > 1 - half, math.inf, x + half)
    lower = torch.where(x < half, -math.inf, x - half)
    naive = (((upper - mean) / scale).sigmoid() - ((lower - mean) / scale).sigmoid()).squeeze((-1, -2, -3))
    got = DiscretizedLogistic(levels).log_prob(x, params)
    nb.check("naive", got.exp(), naive, atol=1e-12)
    large = naive > 1e-6
    nb.check("naive log", got[large], naive[large].log(), atol=1e-8)
    unclosed = ((x + half - mean) / scale).sigmoid() - ((x - half - mean) / scale).sigmoid()
    with pytest.raises(CheckFailed):
        nb.check("without open ends", got.exp(), unclosed.squeeze((-1, -2, -3)), atol=1e-3)


def test_logistic_values_and_gradients_are_finite_at_extremes() -> None:
    x, params = all_levels(256, torch.float32)
    params = params.clone().requires_grad_()
    value = DiscretizedLogistic(256).log_prob(x, params)
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert params.grad is not None
    assert bool(params.grad.isfinite().all())


def test_logistic_sums_over_pixels() -> None:
    levels = torch.randint(256, (5, 3, 4, 4)) / 255
    params = torch.randn(5, 2, 3, 4, 4)
    one = DiscretizedLogistic()
    single = [
        one.log_prob(levels[:, c : c + 1, i : i + 1, j : j + 1], params[:, :, c : c + 1, i : i + 1, j : j + 1])
        for c in range(3) for i in range(4) for j in range(4)
    ]  # fmt: skip
    nb.check("sum", one.log_prob(levels, params), torch.stack(single).sum(0), rtol=1e-5)


def test_logistic_samples_are_levels_with_the_right_frequencies() -> None:
    likelihood = DiscretizedLogistic(5)
    params = torch.tensor([0.4, -1.5]).reshape(2, 1, 1, 1)
    draws = likelihood.sample(params.expand(N, 2, 1, 1, 1)).reshape(N, 1)
    x = torch.arange(5) / 4
    nb.check("grid", (draws - x).abs().min(1).values, 0.0)
    expected = likelihood.log_prob(x.reshape(5, 1, 1, 1), params).exp()
    nb.check_mc("frequencies", ((draws - x).abs() < 1e-6).double(), expected)
    with pytest.raises(CheckFailed):
        nb.check_mc("frequencies", ((draws - x).abs() < 1e-6).double(), expected.flip(0))


def test_fewer_than_two_levels_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2, got 1"):
        DiscretizedLogistic(1)

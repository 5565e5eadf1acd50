"""The variational autoencoder: its bound against quadrature, its loss against its definition, its refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import nblib as nb
from nblib.data.toy import LinearGaussian
from nblib.errors import CheckFailed, DataError
from nblib.nets import MLP
from nblib.probability import gaussian_kl, gaussian_kl_full
from nblib.vae import VAE, Latent, latent_statistics, std_from_raw

SHAPE = (1, 4, 4)
N = 20_000


def small(**settings: object) -> VAE:
    torch.manual_seed(1)
    return VAE(SHAPE, **{"latent": 2, "hidden": (8,), **settings})  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, *SHAPE)


# --- the standard deviation ----------------------------------------------------------------------------


S = torch.linspace(-8, 8, 33, dtype=torch.float64)


def derivative(kind: str, s: Tensor = S) -> Tensor:
    s = s.clone().requires_grad_()
    return torch.autograd.grad(std_from_raw(s, kind).sum(), s)[0]


def kl_slope(kind: str, *at: float) -> list[float]:
    """dKL/ds at mean zero."""
    s = torch.tensor(at, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    std = std_from_raw(s, kind)
    return torch.autograd.grad(gaussian_kl(torch.zeros_like(std), std).sum(), s)[0].squeeze(-1).tolist()


def test_the_parameterizations_have_their_values() -> None:
    nb.check("log-variance", std_from_raw(S, "log-variance") ** 2, S.exp(), rtol=1e-12)
    nb.check("softplus", std_from_raw(S, "softplus"), (1 + S.exp()).log() + 1e-6, atol=1e-12)
    nb.check("bounded", std_from_raw(S, "bounded", 3.0), 3 / (1 + (-S).exp()) + 1e-6, atol=1e-12)


def test_the_slope_of_the_log_variance_is_half_the_standard_deviation() -> None:
    nb.check("slope", derivative("log-variance"), std_from_raw(S, "log-variance") / 2, rtol=1e-12)
    with pytest.raises(CheckFailed):
        nb.check("slope", derivative("log-variance"), std_from_raw(S, "log-variance"))


def test_the_slope_of_softplus_is_the_sigmoid_and_below_one() -> None:
    nb.check("slope", derivative("softplus"), 1 / (1 + (-S).exp()), atol=1e-12)
    assert float(derivative("softplus").min()) > 0
    assert float(derivative("softplus").max()) < 1


def test_the_slope_of_the_bounded_form_is_at_most_a_quarter_of_the_bound() -> None:
    nb.check("maximum", derivative("bounded").max(), 10 / 4, atol=1e-12)
    assert float(S[derivative("bounded").argmax()]) == 0
    assert float(std_from_raw(torch.tensor(100.0), "bounded")) == pytest.approx(10, abs=1e-5)


def test_the_kl_pulls_a_small_log_variance_half_as_hard_as_the_others() -> None:
    """With (s - 1/s) s': s'/s is 1/2 for the log-variance and tends to 1 for the others, until epsilon takes over."""
    nb.check("log-variance", kl_slope("log-variance", -30.0), [-0.5], atol=1e-9)
    nb.check("softplus", kl_slope("softplus", -8.0), [-1.0], atol=0.01)
    nb.check("bounded", kl_slope("bounded", -9.0), [-1.0], atol=0.01)
    with pytest.raises(CheckFailed):
        nb.check("softplus", kl_slope("softplus", -8.0), [-0.5], atol=0.01)


def test_the_kl_pushes_a_large_log_variance_exponentially_softplus_linearly_and_the_bounded_form_not_at_all() -> None:
    nb.check("log-variance", kl_slope("log-variance", 10.0, 20.0), [(math.exp(s) - 1) / 2 for s in (10, 20)], rtol=1e-9)
    nb.check("softplus", kl_slope("softplus", 20.0, 40.0), [20 - 1 / 20, 40 - 1 / 40], atol=1e-3)
    nb.check("bounded", kl_slope("bounded", 20.0, 40.0), [0.0, 0.0], atol=1e-5)


@pytest.mark.parametrize("kind", ["softplus", "bounded"])
def test_epsilon_keeps_the_standard_deviation_and_the_kl_finite(kind: str) -> None:
    std = std_from_raw(torch.tensor([-1000.0, 1000.0]), kind)
    assert float(std.min()) == pytest.approx(1e-6, rel=1e-3)
    assert bool(gaussian_kl(torch.zeros(2), std).isfinite().all())


def test_an_unknown_parameterization_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'softplos'. Did you mean 'softplus'\?"):
        std_from_raw(S, "softplos")


def test_latent_samples_have_the_mean_and_spread_of_q() -> None:
    q = Latent(torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([[0.5, 2.0]], dtype=torch.float64))
    z = q.sample(N, seeded())
    assert z.shape == (N, 1, 2)
    nb.check_mc("mean", z, q.mean)
    nb.check_mc("variance", (z - q.mean) ** 2, q.std**2)
    nb.check("log_prob", q.log_prob(z), Normal(q.mean, q.std).log_prob(z).sum(-1), atol=1e-9)


# --- the loss ------------------------------------------------------------------------------------------


def test_the_default_network_has_the_parameters_of_its_layers() -> None:
    layers = [(784, 512), (512, 4), (2, 512), (512, 784)]
    assert sum(p.numel() for p in VAE().parameters()) == sum(a * b + b for a, b in layers)
    assert "parameters=807,700" in repr(VAE())


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_the_loss_is_the_reconstruction_plus_beta_times_the_kl(beta: float, x: Tensor) -> None:
    loss, logs = small(beta=beta)(x, generator=seeded())
    nb.check("loss", loss, logs["reconstruction"] + beta * logs["kl"], atol=1e-5)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in logs.values())
    with pytest.raises(CheckFailed):
        nb.check("loss", loss, logs["reconstruction"] + (beta + 0.5) * logs["kl"], atol=1e-5)


def test_the_loss_is_minus_the_bound_averaged_over_the_batch(x: Tensor) -> None:
    model = small()
    nb.check("loss", model(x, generator=seeded()).loss, -model.bound(x, generator=seeded()).mean(), atol=1e-5)


def test_the_loss_sums_over_pixels_and_averages_over_the_batch(x: Tensor) -> None:
    """A decoder that answers zero gives log 2 per pixel, whatever the noise."""
    model = small(beta=1.0)
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    logs = model(x).logs
    nb.check("pixels", logs["reconstruction"], 16 * math.log(2), atol=1e-5)
    q = model.encode(x)
    nb.check("kl", logs["kl"], gaussian_kl(q.mean, q.std).mean(), atol=1e-6)
    nb.check("replicated batch", model(x.repeat(3, 1, 1, 1)).loss, model(x).loss, atol=1e-5)
    with pytest.raises(CheckFailed):
        nb.check("mean for sum", logs["reconstruction"] / 16, 16 * math.log(2))


def test_the_loss_reaches_every_parameter(x: Tensor) -> None:
    model = small(likelihood="gaussian", activation="gelu")
    model(x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("likelihood", nb.vae.LIKELIHOODS)
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_every_combination_has_a_finite_loss_and_gradient(k: int, likelihood: str, kl: str, x: Tensor) -> None:
    model = small(k=k, likelihood=likelihood, kl=kl)
    loss, logs = model(x)
    loss.backward()
    assert loss.ndim == 0
    assert set(logs) == {"reconstruction", "kl"}
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_analytic_and_the_sampled_kl_agree_in_the_mean() -> None:
    model, other = small().double(), small(kl="sampled").double()
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        _, exact = model._terms(x, 1, seeded())
        _, sampled = other._terms(x.expand(N, *SHAPE), 1, seeded())
    assert float(sampled.std()) > 0
    nb.check_mc("kl", sampled, exact)
    with pytest.raises(CheckFailed):
        nb.check_mc("kl", -sampled, exact)


def test_the_weight_of_the_kl_rises_linearly_with_the_training_steps(x: Tensor) -> None:
    model = small(beta=2.0, beta_warmup=4)

    def weight() -> float:
        loss, logs = model(x)
        return float((loss.detach() - logs["reconstruction"]) / logs["kl"])

    model.eval()
    nb.check("eval", weight(), 2.0, atol=1e-4)
    model.train()
    nb.check("warm-up", [weight() for _ in range(6)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], atol=1e-4)
    model.eval()
    assert int(model.steps) == 6
    nb.check("eval", weight(), 2.0, atol=1e-4)
    assert int(model.steps) == 6


def test_without_kl_and_noise_the_loss_is_an_autoencoders(x: Tensor) -> None:
    model = small(beta=0.0, std="log-variance")
    last = model.encoder[-1]
    with torch.no_grad():
        last.weight[2:] = 0
        last.bias[2:] = -80
    code = model.encoder(x)[:, :2]
    expected = -model.likelihood.log_prob(x, model.decoder(code).reshape(-1, 1, *SHAPE)).mean()
    nb.check("autoencoder", model(x).loss, expected, atol=1e-5)
    with torch.no_grad():
        last.bias[2:] = 1
    with pytest.raises(CheckFailed):
        nb.check("with noise", model(x).loss, expected, atol=1e-5)


# --- the bound -----------------------------------------------------------------------------------------


def test_more_samples_leave_the_expectation_of_the_bound_and_divide_its_variance() -> None:
    model = small(latent=2, likelihood="gaussian").double()
    with torch.no_grad():
        x = torch.rand(1, *SHAPE, dtype=torch.float64).expand(N, *SHAPE)
        one, eight = model.bound(x, 1, generator=seeded(1)), model.bound(x, 8, generator=seeded(2))
    assert one.shape == (N,)
    difference = one - eight
    nb.check_mc("one expectation", difference, 0.0)
    nb.check("variance", eight.var() / one.var(), 1 / 8, atol=0.02)


def test_the_bound_does_not_depend_on_beta(x: Tensor) -> None:
    one, two = (small(beta=b).bound(x, 2, generator=seeded()) for b in (1.0, 5.0))
    nb.check("beta", one, two)


class Grid:
    """A VAE of one latent and binary images of 2x2, with everything about it by enumeration and quadrature."""

    def __init__(self, *, wide: bool = False, **settings: object) -> None:
        torch.manual_seed(3)
        self.model = VAE((1, 2, 2), 1, hidden=(5,), **settings).double()  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(3)
            if wide:  # a q that is wider than the prior, so that the importance weights are bounded
                last = self.model.encoder[-1]
                last.weight.mul_(torch.tensor([[0.1], [0.0]]))
                last.bias[1] = 2.0
        self.images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
        self.images = self.images.reshape(16, 1, 2, 2)
        self.z = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
        self.dz = float(self.z[1] - self.z[0])
        self.log_prior = Normal(0.0, 1.0).log_prob(self.z)
        with torch.no_grad():
            logits = self.model.decoder(self.z.unsqueeze(-1))
            flat = self.images.reshape(16, 1, 4)
            self.log_likelihood = torch.distributions.Bernoulli(logits=logits).log_prob(flat).sum(-1)
            self.log_evidence = (self.log_likelihood + self.log_prior).logsumexp(-1) + math.log(self.dz)
            q = self.model.encode(self.images)
            self.log_q = Normal(q.mean, q.std).log_prob(self.z)

    def expect(self, values: Tensor) -> Tensor:
        """E_q of values on the grid."""
        return (self.log_q.exp() * values).sum(-1) * self.dz

    @property
    def elbo(self) -> Tensor:
        return self.expect(self.log_likelihood + self.log_prior - self.log_q)

    @property
    def gap(self) -> Tensor:
        log_posterior = self.log_likelihood + self.log_prior - self.log_evidence.unsqueeze(-1)
        return self.expect(self.log_q - log_posterior)


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid()


def test_the_probabilities_of_all_images_sum_to_one(grid: Grid) -> None:
    nb.check("evidence", grid.log_evidence.exp().sum(), 1.0, atol=1e-9)
    nb.check("q", grid.expect(torch.ones_like(grid.log_q)), 1.0, atol=1e-9)


def test_the_bound_lies_below_the_evidence_by_the_kl_to_the_posterior(grid: Grid) -> None:
    assert float(grid.gap.min()) > 0.01
    nb.check_bound("bound", grid.elbo, grid.log_evidence)
    nb.check("gap", grid.log_evidence - grid.elbo, grid.gap, atol=1e-9)
    with pytest.raises(CheckFailed):
        nb.check("gap", grid.log_evidence + grid.elbo, grid.gap)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_the_estimate_of_the_bound_has_the_bound_as_its_mean(kl: str, grid: Grid) -> None:
    grid = grid if kl == "analytic" else Grid(kl=kl)
    with torch.no_grad():
        batch = grid.images.repeat(4000, 1, 1, 1)
        estimates = grid.model.bound(batch, generator=seeded()).reshape(4000, 16)
    nb.check_mc("bound", estimates, grid.elbo)
    with pytest.raises(CheckFailed):
        nb.check_mc("evidence", estimates, grid.log_evidence)


# --- importance weights --------------------------------------------------------------------------------


WEIGHTS = 20_000


@pytest.fixture(scope="module")
def wide() -> Grid:
    return Grid(wide=True)


@pytest.fixture(scope="module")
def log_weights(wide: Grid) -> Tensor:
    with torch.no_grad():
        return wide.model.log_weights(wide.images, WEIGHTS, generator=seeded())


def test_the_mean_of_the_weights_is_the_evidence_and_that_of_their_logs_the_bound(
    wide: Grid, log_weights: Tensor
) -> None:
    assert log_weights.shape == (WEIGHTS, 16)
    nb.check_mc("weights", log_weights.exp(), wide.log_evidence.exp())
    nb.check_mc("logs", log_weights, wide.elbo)
    with pytest.raises(CheckFailed):
        nb.check_mc("logs", log_weights, wide.log_evidence)
    with pytest.raises(CheckFailed):
        nb.check_mc("weights", log_weights.exp(), wide.elbo.exp())


def test_the_importance_bound_rises_from_the_bound_to_the_evidence(wide: Grid) -> None:
    with torch.no_grad():
        batch = wide.images.repeat(3000, 1, 1, 1)
        one, five = (wide.model.importance_bound(batch, k, generator=seeded(k)).reshape(3000, 16) for k in (1, 5))
        many = wide.model.importance_bound(wide.images, WEIGHTS, chunk=5000, generator=seeded(9))
    nb.check_mc("bound", one, wide.elbo)
    gain, missing = five - wide.elbo, wide.log_evidence - five
    for name, above in {"above the bound": gain, "below the evidence": missing}.items():
        nb.check_bound(name, 0.0, above.mean(0) - 4 * above.std(0) / math.sqrt(3000))
    nb.check("evidence", many, wide.log_evidence, atol=0.05)
    with pytest.raises(CheckFailed):
        nb.check("evidence", five.mean(0), wide.log_evidence, atol=0.05)


def test_the_importance_bound_of_one_weight_is_an_estimate_of_the_bound(grid: Grid) -> None:
    with torch.no_grad():
        one = grid.model.importance_bound(grid.images, 1, generator=seeded())
        nb.check("one", one, grid.model.log_weights(grid.images, 1, generator=seeded())[0], atol=1e-12)
        sampled = Grid(kl="sampled").model.bound(grid.images, generator=seeded())
    nb.check("bound", one, sampled, atol=1e-9)


@pytest.mark.parametrize(("k", "chunk"), [(1, 1), (10, 64), (64, 10), (64, 64), (65, 64)])
def test_chunks_add_up_to_all_weights(k: int, chunk: int, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = small(), []

    def constant(x: Tensor, k: int, **_: object) -> Tensor:
        sizes.append(k)
        return torch.full((k, len(x)), -3.0)

    monkeypatch.setattr(model, "log_weights", constant)
    nb.check("mean of equal weights", model.importance_bound(x, k, chunk=chunk), -3.0, atol=1e-5)
    assert sum(sizes) == k
    assert max(sizes) <= chunk


@pytest.mark.parametrize(("k", "chunk"), [(0, 64), (-1, 64), (5, 0)])
def test_no_weights_are_refused(k: int, chunk: int, x: Tensor) -> None:
    with pytest.raises(DataError, match=f"k={k}, chunk={chunk}"):
        small().importance_bound(x, k, chunk=chunk)


# --- the linear model, where all is known --------------------------------------------------------------


@pytest.fixture
def linear() -> LinearGaussian:
    weight = torch.randn(4, 2, dtype=torch.float64)
    return LinearGaussian(weight, torch.randn(4, dtype=torch.float64), 0.5)


def test_the_linear_elbo_is_the_evidence_minus_the_kl_to_the_posterior(linear: LinearGaussian) -> None:
    points = linear.sample(7)
    posterior = linear.posterior(points)
    root = torch.randn(2, 2, dtype=torch.float64)
    mean, cov = posterior[0] + 0.3, root @ root.T + 0.1 * torch.eye(2, dtype=torch.float64)
    gap = gaussian_kl_full(mean, cov, *posterior)
    nb.check("gap", linear.elbo(points, mean, cov), linear.log_prob(points) - gap, atol=1e-9)
    with pytest.raises(CheckFailed):
        nb.check("gap", linear.elbo(points, mean, cov), linear.log_prob(points) + gap, atol=1e-9)


def test_the_linear_elbo_is_the_evidence_at_the_exact_posterior_only(linear: LinearGaussian) -> None:
    points = linear.sample(7)
    mean, cov = linear.posterior(points)
    nb.check("tight", linear.elbo(points, mean, cov), linear.log_prob(points), atol=1e-9)
    assert bool((linear.elbo(points, mean, 1.1 * cov) < linear.log_prob(points) - 1e-4).all())


def test_the_linear_elbo_is_its_own_expectation(linear: LinearGaussian) -> None:
    point, mean = linear.sample(1)[0], torch.tensor([0.3, -0.2], dtype=torch.float64)
    cov = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
    q = MultivariateNormal(mean, cov)
    z = q.sample((N,))
    likelihood = Normal(z @ linear.weight.T + linear.bias, linear.std).log_prob(point).sum(-1)
    terms = likelihood + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z)
    nb.check_mc("elbo", terms, linear.elbo(point, mean, cov))


def test_the_linear_posterior_and_evidence_are_those_of_brute_force(linear: LinearGaussian) -> None:
    point = linear.sample(1)[0]
    line = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_joint = Normal(z @ linear.weight.T + linear.bias, linear.std).log_prob(point).sum(-1)
    log_joint = log_joint + Normal(0.0, 1.0).log_prob(z).sum(-1)
    area = float(line[1] - line[0]) ** 2
    nb.check("evidence", linear.log_prob(point), log_joint.logsumexp(0) + math.log(area), atol=1e-7)
    weights = log_joint.softmax(0)
    mean, cov = linear.posterior(point)
    centred = z - weights @ z
    nb.check("mean", mean, weights @ z, atol=1e-7)
    nb.check("covariance", cov, (weights.unsqueeze(-1) * centred).T @ centred, atol=1e-7)


# --- what one does with the model ----------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_image_i_does_not_depend_on_how_many_are_drawn(likelihood: str, noise: bool) -> None:
    model = small(likelihood=likelihood)
    few, many = (model.sample(n, generator=seeded(), noise=noise) for n in (3, 12))
    assert few.shape == (3, *SHAPE)
    nb.check("image i", few, many[:3], atol=1e-6)
    other = model.sample(3, generator=seeded(1), noise=noise)
    with pytest.raises(CheckFailed):
        nb.check("another seed", few, other, atol=1e-6)


@pytest.mark.parametrize("noise", [False, True])
def test_no_samples_are_an_empty_batch(noise: bool) -> None:
    assert small().sample(0, noise=noise).shape == (0, *SHAPE)


def test_samples_are_decoded_draws_of_the_prior() -> None:
    model = small()
    z = nb.nets.randn_rows(5, (2,), torch.zeros(()), seeded())
    nb.check("prior", model.sample(5, generator=seeded()), model.decode(z), atol=1e-6)


def test_a_noisy_sample_of_bits_is_binary_and_has_the_mean_of_the_plain_ones() -> None:
    model = small()
    torch.nn.init.zeros_(model.decoder[1].weight)  # every z has one image
    noisy, plain = model.sample(3000, noise=True), model.sample(1)
    assert set(noisy.unique().tolist()) == {0.0, 1.0}
    nb.check_mc("mean", noisy, plain[0])


def test_decode_takes_any_number_of_leading_axes() -> None:
    model, z = small(), torch.randn(2, 3, 2)
    assert model.decode(z).shape == (2, 3, *SHAPE)
    nb.check("rows", model.decode(z)[1, 2], model.decode(z[1, 2]), atol=1e-6)


def test_an_interpolation_ends_at_the_reconstructions(x: Tensor) -> None:
    model = small()
    path = model.interpolate(x[0], x[1], steps=5)
    assert path.shape == (5, *SHAPE)
    nb.check("ends", path[[0, -1]], model.reconstruct(x[:2]), atol=1e-6)
    middle = model.encode(x[:2]).mean.mean(0)
    nb.check("middle", path[2], model.decode(middle), atol=1e-6)


def test_a_reconstruction_decodes_the_mean_code(x: Tensor) -> None:
    model = small()
    nb.check("mean", model.reconstruct(x), model.decode(model.encode(x).mean), atol=1e-6)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian-pixel", "logistic"])
def test_the_convolutional_model_runs(likelihood: str) -> None:
    model = VAE((3, 12, 10), 4, network="conv", width=4, likelihood=likelihood)
    batch = torch.rand(2, 3, 12, 10)
    model(batch).loss.backward()
    assert model.sample(2, noise=True).shape == (2, 3, 12, 10)
    assert model.bound(batch, 3).shape == (2,)


def test_own_networks_take_the_place_of_the_built_ones(x: Tensor) -> None:
    encoder, decoder = MLP([16, 4]), MLP([2, 16])
    model = VAE(SHAPE, 2, encoder=encoder, decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    assert bool(model(x).loss.isfinite())


def test_the_model_offers_what_the_protocols_ask_for() -> None:
    model = small()
    for protocol in (nb.train.Model, nb.train.HasBound, nb.train.HasLatent):
        assert isinstance(model, protocol)
    assert not isinstance(model, nb.train.HasLogProb)


def test_the_statistics_add_up_and_count_the_units_in_use() -> None:
    model = small(latent=3)
    with torch.no_grad():  # dimension 1 copies the prior, the others do not
        last = model.encoder[-1]
        last.weight.mul_(5)
        last.weight[[1, 4]] = 0
        last.bias[1], last.bias[4] = 0, math.log(math.e - 1)
    x = torch.rand(50, *SHAPE)
    found, again = latent_statistics(model, x), latent_statistics(model, x, batch_size=7)
    q = model.encode(x)
    nb.check("sum", found["kl_per_dim"].sum(), gaussian_kl(q.mean, q.std).mean(), atol=1e-4)
    nb.check("prior", found["kl_per_dim"][1], 0.0, atol=1e-5)
    nb.check("batches", again["kl_per_dim"], found["kl_per_dim"], atol=1e-5)
    nb.check("spread", found["variance_of_mean"], q.mean.var(0), atol=1e-5)
    assert found["active_kl"] == int((found["kl_per_dim"] > 0.1).sum())
    assert found["active_units"] == 2
    assert found["means"].shape == found["stds"].shape == (50, 3)


# --- refusals ------------------------------------------------------------------------------------------


def bad_images() -> Iterator[tuple[str, Tensor, str]]:
    good = torch.rand(2, *SHAPE)
    yield "other size", torch.rand(2, 1, 5, 4), r"shape \(B, 1, 4, 4\), got \(2, 1, 5, 4\)"
    yield "no channel", torch.rand(2, 4, 4), r"got \(2, 4, 4\)"
    yield "no batch", torch.rand(1, 4, 4), r"got \(1, 4, 4\)"
    yield "no image", torch.rand(0, *SHAPE), r"got \(0, 1, 4, 4\)"
    yield "number", torch.tensor(1.0), r"got \(\)"
    yield "uint8", (good * 255).to(torch.uint8), r"got dtype torch\.uint8: divide uint8 by 255"
    yield "range", good * 255, r"in \[0, 1\], got values from .* to 2\d\d.*divide by 255"
    yield "negative", good - 0.5, r"got values from -0\."
    yield "NaN", good.clone().fill_(math.nan), "got NaN"


@pytest.mark.parametrize("method", ["encode", "bound", "importance_bound", "reconstruct", "check"])
@pytest.mark.parametrize(("batch", "said"), [c[1:] for c in bad_images()], ids=[c[0] for c in bad_images()])
def test_bad_images_are_refused_by_value(batch: Tensor, said: str, method: str) -> None:
    with pytest.raises(DataError, match=said):
        getattr(small(), method)(batch)


def test_the_training_loss_refuses_a_wrong_shape_and_dtype() -> None:
    with pytest.raises(DataError, match=r"got \(2, 1, 5, 4\)"):
        small()(torch.rand(2, 1, 5, 4))
    with pytest.raises(DataError, match="divide uint8 by 255"):
        small()(torch.zeros(2, *SHAPE, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"likelihood": "bernouli"}, r"likelihood 'bernouli'. Did you mean 'bernoulli'\?"),
        ({"std": "log-varience"}, r"'log-varience'. Did you mean 'log-variance'\?"),
        ({"kl": "analytical"}, r"'analytical'. Did you mean 'analytic'\?"),
        ({"network": "cnv"}, r"'cnv'. Did you mean 'conv'\?"),
        ({"activation": "thanh"}, r"'thanh'. Did you mean 'tanh'\?"),
        ({"latent": 0}, "latent=0"),
        ({"k": 0}, "k=0"),
        ({"beta": -1.0}, r"beta=-1\.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"beta_warmup": -5}, "beta_warmup=-5"),
        ({"bound": 0.0}, r"bound=0\.0"),
        ({"width": 0}, "width=0"),
        ({"hidden": (0,)}, r"got \[16, 0, 4\]"),
        ({"likelihood": "gaussian-fixed", "decoder_std": 0.0}, r"positive, got 0\.0"),
        ({"likelihood": "logistic", "levels": 1}, "at least 2, got 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_value(settings: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        small(**settings)


def test_a_shape_without_channels_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape=\(28, 28\)"):
        VAE((28, 28))


def test_a_condition_is_refused() -> None:
    with pytest.raises(DataError, match="condition=None"):
        small().sample(3, condition=torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, -2])
def test_a_bound_of_no_samples_is_refused(k: int, x: Tensor) -> None:
    with pytest.raises(DataError, match=f"at least 1, got {k}"):
        small().bound(x, k)

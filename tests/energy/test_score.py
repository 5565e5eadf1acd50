"""Score matching losses against closed forms, autograd and enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib.data.toy import GaussianMixture
from nblib.energy import (
    OBJECTIVES,
    DenoisingAutoencoder,
    ScoreModel,
    denoising,
    directions,
    explicit,
    implicit,
    score_of,
    sliced,
)
from nblib.errors import DataError
from nblib.nets import MLP

DOUBLE = torch.float64
SHAPES = [(5, 3), (4, 1, 2, 2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


class Field(nn.Module):
    """A random smooth field on examples of any shape."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = MLP([size, 7, size]).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view_as(x)


def jacobians(field: nn.Module, x: Tensor) -> Tensor:
    rows = [torch.autograd.functional.jacobian(lambda y: field(y[None])[0].flatten(), row) for row in x]
    return torch.stack([r.reshape(r.shape[0], -1) for r in rows])


# --- score_of ----------------------------------------------------------------------------------------------


def test_score_of_is_minus_the_gradient_whatever_the_constant() -> None:
    mixture = GaussianMixture(normal(3, 2), torch.tensor([0.5, 0.7, 1.1], dtype=DOUBLE))
    x = normal(6, 2, seed=1)
    for constant in (0.0, 7.5):
        got = score_of(lambda y, c=constant: c - mixture.log_prob(y))(x)
        torch.testing.assert_close(got, mixture.score(x), atol=1e-12, rtol=0)


def test_score_of_is_differentiable_in_the_parameters_and_keeps_no_graph_without_gradients() -> None:
    scale = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    score = score_of(lambda y: scale * (y**2).sum(1) / 2)
    x = normal(4, 3)
    (slope,) = torch.autograd.grad(score(x).sum(), scale)
    torch.testing.assert_close(slope, -x.sum())
    with torch.no_grad():
        assert not score(x).requires_grad
    torch.testing.assert_close(score(x).detach(), -2 * x)


# --- the losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_equal_their_formulas_with_dense_jacobians(shape: tuple[int, ...]) -> None:
    x, v = normal(*shape), normal(*shape, seed=1)
    field = Field(x[0].numel())
    s, J = field(x).flatten(1), jacobians(field, x)
    w = v.flatten(1)
    quadratic = torch.einsum("bi,bij,bj->b", w, J, w)
    trace = J.diagonal(dim1=1, dim2=2).sum(1)
    half = (s**2).sum(1) / 2
    torch.testing.assert_close(implicit(field, x), half + trace)
    torch.testing.assert_close(implicit(field, x, v), half + quadratic)
    torch.testing.assert_close(sliced(field, x, v), (w * s).sum(1) ** 2 / 2 + quadratic)
    torch.testing.assert_close(explicit(field, x, lambda y: 3 * y), ((s - 3 * x.flatten(1)) ** 2).sum(1) / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_all_signs_is_exact(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    field, size = Field(x[0].numel()), x[0].numel()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=DOUBLE).view(-1, *shape[1:])
    for loss in (sliced, implicit):
        mean = torch.stack([loss(field, x, v.expand_as(x)) for v in signs]).mean(0)
        torch.testing.assert_close(mean, implicit(field, x))


def test_denoising_is_half_the_squared_distance_to_the_target() -> None:
    x, z, sigma = normal(5, 3), normal(5, 3, seed=1), torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0], dtype=DOUBLE)
    field = Field(3)
    by_hand = ((field(x + sigma[:, None] * z) + z / sigma[:, None]) ** 2).sum(1) / 2
    torch.testing.assert_close(denoising(field, x, sigma, z), by_hand)
    torch.testing.assert_close(denoising(field, x, 0.5, z)[1], by_hand[1])
    control = (z * field(x)).sum(1) / sigma + ((z**2).sum(1) - 3) / (2 * sigma**2)
    torch.testing.assert_close(denoising(field, x, sigma, z, control=True), by_hand - control)
    torch.testing.assert_close(denoising(field, x, 0.5, z, control=True)[1], (by_hand - control)[1])


def test_denoising_of_images_takes_one_sigma_per_image() -> None:
    x, z = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=DOUBLE)
    flat = Field(4)
    expected = denoising(flat, x.flatten(1), sigma, z.flatten(1), control=True)
    torch.testing.assert_close(denoising(flat, x, sigma, z, control=True), expected)


def test_losses_have_gradients_for_the_parameters_and_none_without() -> None:
    x, v = normal(5, 3), normal(5, 3, seed=1)
    field = Field(3)
    for loss in (lambda: implicit(field, x), lambda: sliced(field, x, v), lambda: denoising(field, x, 0.3, v)):
        grads = torch.autograd.grad(loss().sum(), list(field.parameters()))
        assert all(bool(g.abs().sum() > 0) for g in grads[:-1])
        with torch.no_grad():
            assert not loss().requires_grad
            torch.testing.assert_close(loss(), loss())


def test_the_implicit_loss_of_a_gaussian_family_is_least_at_the_sample_moments() -> None:
    x = normal(50, 3) @ normal(3, 3, seed=1) + 0.5
    mean, cov = x.mean(0).requires_grad_(), torch.cov(x.T, correction=0)
    precision = torch.linalg.inv(cov).requires_grad_()
    loss = implicit(lambda y: (mean - y) @ precision, x).mean()
    for slope in torch.autograd.grad(loss, [mean, precision]):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sphere"])
def test_directions_have_the_identity_as_second_moment(kind: str) -> None:
    v = directions(torch.empty(200_000, 1, 3, dtype=DOUBLE), kind, generator=seeded()).flatten(1)
    nb.check_mc("directions", v[:, :, None] * v[:, None, :], torch.eye(3), z=4.5)
    if kind != "gaussian":
        torch.testing.assert_close((v**2).sum(1), torch.full((200_000,), 3.0, dtype=DOUBLE))
    assert v.dtype == DOUBLE


# --- the models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_the_autoencoder_s_loss_is_the_denoising_loss(scaled: bool) -> None:
    model = DenoisingAutoencoder(3, 5, 0.4, scaled=scaled, spread=2.0).double()
    assert ("scale" in dict(model.named_parameters())) == scaled
    assert float(model.scale[0].detach()) == (0.25 if scaled else 1)
    x = normal(6, 3)
    loss, logs = model(x, generator=seeded(3))
    noise = torch.randn(x.shape, generator=seeded(3), dtype=DOUBLE)
    torch.testing.assert_close(loss, denoising(model.score, x, 0.4, noise).mean())
    torch.testing.assert_close(logs["squared_error"], 2 * 0.4**4 * loss.detach())
    torch.testing.assert_close(score_of(model.energy)(x), model.score(x))
    torch.testing.assert_close(model.reconstruct(x), x + 0.4**2 * model.score(x))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("energy", [False, True])
def test_every_objective_trains_the_noisy_score_of_a_gaussian(objective: str, energy: bool) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.precision = nn.Parameter(torch.full((), 0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.precision * (x**2).sum(1, keepdim=True) / 2 if energy else -self.precision * x

    torch.manual_seed(0)
    model = ScoreModel(Linear(), 0.5, objective=objective, energy=energy)
    data = torch.randn(20_000, 2, generator=seeded())
    nb.fit(model, data, steps=300, batch_size=2000, lr=0.02, schedule="cosine", device="cpu")
    assert float(model.network.precision.detach()) == pytest.approx(1 / 1.25, abs=0.03)
    x = data[:3]
    torch.testing.assert_close(model.score(x).detach(), -model.network.precision.detach() * x)


def test_objectives_agree_in_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 2, generator=seeded())
    network = MLP([2, 8, 2])
    losses = {
        name: torch.stack(
            [ScoreModel(network, 0.7, objective=name)(x, generator=seeded(k)).loss.detach() for k in range(40)]
        )
        for name in OBJECTIVES
    }
    q = 1 + 0.7**2
    constant = 0.5 * 2 / q  # half the mean squared score of the noisy data
    for name in ("hutchinson", "sliced"):
        assert float((losses[name] - losses["implicit"]).mean()) == pytest.approx(0, abs=0.02)
    floor = 2 / (2 * 0.7**2) - constant
    assert float((losses["denoising"] - losses["implicit"]).mean()) == pytest.approx(floor + constant, abs=0.05)


def test_langevin_samples_have_the_variance_of_the_discretized_chain() -> None:
    model = ScoreModel(nn.Linear(1, 1, bias=False).double(), 0.6)
    with torch.no_grad():
        model.network.weight.fill_(-2.0)
    start = torch.zeros(1, 1, dtype=DOUBLE)
    x = model.sample(50_000, start=start, steps=80, step=0.18, generator=seeded())
    nb.check_mc("langevin", x**2, 0.5 / (1 - 0.36 / 2))
    assert x.shape == (50_000, 1)
    again = model.sample(50_000, start=start, steps=80, step=0.18, generator=seeded())
    assert torch.equal(x, again)


# --- errors ------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    x = normal(4, 3)
    with pytest.raises(DataError, match=r"v must have the shape of x, \(4, 3\), got \(3,\)"):
        sliced(lambda y: -y, x, torch.ones(3, dtype=DOUBLE))
    with pytest.raises(DataError, match=r"the score must have the shape of x"):
        implicit(lambda y: y.sum(1), x)
    with pytest.raises(DataError, match=r"noise must have the shape of x"):
        denoising(lambda y: -y, x, 0.1, x[:2])
    with pytest.raises(DataError, match=r"sigma > 0, got 0"):
        denoising(lambda y: -y, x, 0, x)
    with pytest.raises(DataError, match=r"gaussian"):
        directions(x, "gausian")
    with pytest.raises(DataError, match=r"hutchinson"):
        ScoreModel(MLP([3, 3]), 0.1, objective="hutchinsn")
    with pytest.raises(DataError, match=r"sigma=0"):
        ScoreModel(MLP([3, 3]), 0)
    with pytest.raises(DataError, match=r"energy=True"):
        ScoreModel(MLP([3, 3]), 0.1).energy(x.float())
    for arguments in ((0, 2, 0.1), (2, 0, 0.1), (2, 2, 0.0), (2, 2, math.inf)):
        with pytest.raises(DataError, match="sigma > 0"):
            DenoisingAutoencoder(*arguments)

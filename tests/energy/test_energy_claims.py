"""Every claim of the chapter on score matching: its check passes on it and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib.data.toy import GaussianMixture
from nblib.energy import DenoisingAutoencoder, Score, denoising, explicit, implicit, score_of, sliced
from nblib.errors import CheckFailed

DOUBLE = torch.float64


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hermite(order: int) -> tuple[Tensor, Tensor]:
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten()


def smooth(mixture: GaussianMixture, sigma: float) -> GaussianMixture:
    covs = mixture.covs + sigma**2 * torch.eye(mixture.dim, dtype=DOUBLE)
    return GaussianMixture(mixture.means, covs, mixture.weights)


def random_field() -> nn.Module:
    torch.manual_seed(0)
    return nb.nets.MLP([2, 12, 2]).double()


AXIS = torch.linspace(-7, 7, 141, dtype=DOUBLE)
GRID = torch.cartesian_prod(AXIS, AXIS)
TRUTH = GaussianMixture(tensor([-1.2, -0.4], [0.9, 1.0], [0.6, -1.2]), tensor(0.6, 0.5, 0.8))
PAIR = GaussianMixture(tensor([-1.0], [1.5]), tensor(0.5, 0.9))
NETWORK = random_field()
SIGMA = 0.5
CLEAN = tensor([-1.2, 0.3], [-0.6, -0.8], [0.1, 0.9], [0.8, -0.2], [1.3, 0.7])
PARZEN = GaussianMixture(CLEAN, torch.full((5,), SIGMA, dtype=DOUBLE))


def on_grid(mixture: GaussianMixture) -> Tensor:
    return mixture.log_prob(GRID).exp() * (AXIS[1] - AXIS[0]) ** 2


def nodes(mixture: GaussianMixture, order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of quadrature under a mixture."""
    z, w = hermite(order)
    roots = torch.linalg.cholesky(mixture.covs)
    x = torch.cat([m + z @ root.T for m, root in zip(mixture.means, roots)])
    return x, torch.cat([share * w for share in mixture.weights])


def noisy_pairs(order: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Clean points, noise and weights of the five points with noise."""
    z, w = hermite(order)
    return CLEAN.repeat_interleave(len(z), 0), z.repeat(5, 1), w.repeat(5) / 5


def gradient(loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(NETWORK.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


def jacobian(field: Score, x: Tensor) -> Tensor:
    out: Tensor = torch.func.vmap(torch.func.jacrev(lambda y: field(y[None])[0]))(x)
    return out.detach()


def test_prop_score_determines() -> None:
    """The score of another density, a score off by a factor, no normalization; other shapes inside the pieces."""
    line = torch.linspace(-8, 8, 16_001, dtype=DOUBLE)
    exact = PAIR.log_prob(line[1:, None]).exp()

    def rebuilt(slope: Tensor, normalize: bool = True) -> Tensor:
        density = torch.cumulative_trapezoid(slope, line).exp()
        return density / torch.trapezoid(density, line[1:]) if normalize else density

    slope = PAIR.score(line[:, None])[:, 0]
    nb.check("prop-score-determines", rebuilt(slope), exact, atol=1e-6)
    other = GaussianMixture(PAIR.means, tensor(0.5, 0.9), tensor(0.6, 0.4)).score(line[:, None])[:, 0]
    for wrong in (rebuilt(-slope), rebuilt(slope / 2), rebuilt(other), rebuilt(slope, False)):
        with pytest.raises(CheckFailed, match="prop-score-determines"):
            nb.check("prop-score-determines", wrong, exact, atol=1e-6)

    def slopes(weight: float, power: int, gap: float = 1.5) -> Tensor:
        x = torch.cat([torch.linspace(-1.9, -1.1, 50), torch.linspace(1.1, 1.9, 50)]).double()[:, None]

        def bumps(y: Tensor) -> Tensor:
            shape = (math.pi * (y.abs() - 1.5)).cos() ** power + (0 if gap else 0.1)
            return shape * torch.where(y < 0, weight, 1 - weight)

        return score_of(lambda y: -bumps(y[:, 0]).log())(x)

    nb.check("prop-score-determines", slopes(0.5, 2), slopes(0.99, 2), atol=1e-9)
    with pytest.raises(CheckFailed, match="prop-score-determines"):
        nb.check("prop-score-determines", slopes(0.5, 2), slopes(0.5, 4), atol=1e-9)
    # Overlapping pieces do tell the weights.
    mixtures = [GaussianMixture(tensor([-1.0], [1.0]), tensor(0.5, 0.5), tensor(w, 1 - w)) for w in (0.5, 0.9)]
    a, b = (m.score(line[:, None]) for m in mixtures)
    with pytest.raises(CheckFailed, match="prop-score-determines"):
        nb.check("prop-score-determines", a, b, atol=1e-9)


def test_thm_ism() -> None:
    """Half or minus the trace, twice the square, the constant lost or doubled; the energy with the other sign."""
    mass, field = on_grid(TRUTH), NETWORK
    esm = mass @ explicit(field, GRID, TRUTH.score)
    square = mass @ (field(GRID) ** 2).sum(1) / 2
    trace = mass @ implicit(field, GRID) - square
    constant = mass @ (TRUTH.score(GRID) ** 2).sum(1) / 2
    nb.check("thm-ism", square + trace + constant, esm, atol=1e-9)
    nb.check("thm-ism", gradient(square + trace), gradient(esm), atol=1e-9)
    for wrong in (square + trace / 2, square - trace, 2 * square + trace, square):
        with pytest.raises(CheckFailed, match="thm-ism"):
            nb.check("thm-ism", wrong + constant, esm, atol=1e-9)
        with pytest.raises(CheckFailed, match="thm-ism"):
            nb.check("thm-ism", gradient(wrong), gradient(esm), atol=1e-9)
    for c in (0.0, 2.0):
        with pytest.raises(CheckFailed, match="thm-ism"):
            nb.check("thm-ism", square + trace + c * constant, esm, atol=1e-9)

    potential: Callable[[Tensor], Tensor] = lambda y: field(y).sum(-1)  # noqa: E731
    score = score_of(potential)
    x = GRID[::50]
    hessian = torch.stack([torch.autograd.functional.hessian(lambda y: potential(y[None]).sum(), row) for row in x])
    laplacian = hessian.diagonal(dim1=1, dim2=2).sum(1)
    half = (score(x) ** 2).sum(1) / 2
    nb.check("thm-ism", implicit(score, x), half - laplacian, atol=1e-9)
    for by_energy in (half + laplacian, half - laplacian / 2, 2 * half - laplacian):
        with pytest.raises(CheckFailed, match="thm-ism"):
            nb.check("thm-ism", implicit(score, x), by_energy, atol=1e-9)


def test_prop_boundary() -> None:
    """The edge forgotten, with the other sign or halved, on the exponential and on the uniform density."""

    def terms(log_p: Callable[[Tensor], Tensor], score: Score, a: float, b: float) -> tuple[Tensor, ...]:
        y = torch.linspace(a, b, 40_001, dtype=DOUBLE)[:, None]
        p, slope = log_p(y).exp()[:, 0], score_of(lambda u: -log_p(u).sum(-1))
        values = explicit(score, y, slope), implicit(score, y), slope(y)[:, 0] ** 2 / 2
        flux = p * score(y)[:, 0]
        return (*(torch.trapezoid(p * v, y[:, 0]).detach() for v in values), (flux[-1] - flux[0]).detach())

    for log_p, a, b, family in (
        (lambda y: -y, 0.0, 40.0, lambda y: 0 * y - 1),
        (lambda y: 0 * y - math.log(2), -1.0, 1.0, lambda y: -y),
    ):
        fisher, loss, constant, edge = terms(log_p, lambda y, f=family: 1.3 * f(y) + 0.2 * y.sin(), a, b)
        nb.check("prop-boundary", loss + constant - edge, fisher, atol=1e-4)
        for wrong in (0 * edge, -edge, edge / 2):
            with pytest.raises(CheckFailed, match="prop-boundary"):
                nb.check("prop-boundary", loss + constant - wrong, fisher, atol=1e-4)


def test_thm_sliced() -> None:
    """The printed plus for the energy, the sum of squares for the square of the sum, directions with another moment."""
    mass, data = on_grid(TRUTH), TRUTH.score(GRID)
    constant, esm = mass @ (data**2).sum(1) / 2, mass @ explicit(NETWORK, GRID, TRUTH.score)
    v = tensor(1.0, 0.5)
    left = mass @ ((NETWORK(GRID) - data) @ v) ** 2 / 2
    right = mass @ sliced(NETWORK, GRID, v.expand_as(GRID)) + mass @ (data @ v) ** 2 / 2
    nb.check("thm-sliced", right, left, atol=1e-9)
    square = mass @ (NETWORK(GRID) @ v) ** 2 / 2
    second = mass @ sliced(NETWORK, GRID, v.expand_as(GRID)) - square
    separate = mass @ ((NETWORK(GRID) * v) ** 2).sum(1) / 2
    for wrong in (square - second, separate + second, square + second / 2, 2 * square + second):
        with pytest.raises(CheckFailed, match="thm-sliced"):
            nb.check("thm-sliced", wrong + mass @ (data @ v) ** 2 / 2, left, atol=1e-9)

    signs = tensor([1.0, 1.0], [1.0, -1.0])
    for loss in (sliced, implicit):
        mean = torch.stack([loss(NETWORK, GRID, s.expand_as(GRID)) for s in signs]).mean(0)
        nb.check("thm-sliced", mass @ mean + constant, esm, atol=1e-9)
        for bad in (signs[:1], 2 * signs, tensor([1.0, 0.0], [0.0, 1.0])):
            mean = torch.stack([loss(NETWORK, GRID, s.expand_as(GRID)) for s in bad]).mean(0)
            with pytest.raises(CheckFailed, match="thm-sliced"):
                nb.check("thm-sliced", mass @ mean + constant, esm, atol=1e-9)


def test_prop_sliced_noise() -> None:
    """The diagonal kept for signs or lost for normal directions, the factor 2 or the half before the product lost."""
    signs = tensor([1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0])
    x = GRID[::500]
    J, s = jacobian(NETWORK, x), NETWORK(x).detach()
    A = (J + J.mT) / 2
    outer = s[:, :, None] * s[:, None, :]
    z, w = hermite(8)
    for loss, matrix in ((implicit, A), (sliced, A + outer / 2)):
        off, every = 2 * matrix[:, 0, 1] ** 2, (matrix**2).sum((1, 2))
        by_signs = torch.stack([loss(NETWORK, x, v.expand_as(x)) for v in signs]).var(0, correction=0)
        values = torch.stack([loss(NETWORK, x, v.expand_as(x)) for v in z])
        by_normal = w @ values**2 - (w @ values) ** 2
        nb.check("prop-sliced-noise", by_signs, 2 * off, atol=1e-9)
        nb.check("prop-sliced-noise", by_normal, 2 * every, atol=1e-9)
        for got, wrongs in ((by_signs, (off, 2 * every)), (by_normal, (every, 2 * off))):
            for wrong in wrongs:
                with pytest.raises(CheckFailed, match="prop-sliced-noise"):
                    nb.check("prop-sliced-noise", got, wrong, atol=1e-9)
    plain = torch.stack([sliced(NETWORK, x, v.expand_as(x)) for v in signs]).var(0, correction=0)
    for matrix in (A, A + outer, A - outer / 2, J + outer / 2):
        with pytest.raises(CheckFailed, match="prop-sliced-noise"):
            nb.check("prop-sliced-noise", plain, 4 * matrix[:, 0, 1] ** 2, atol=1e-9)

    # The example: 4 rho^2 and 1 + 2 rho^2.
    rho = 0.9
    P = tensor([1.0, rho], [rho, 1.0])
    x, w = hermite(8)
    x = x @ torch.linalg.cholesky(P.inverse()).T
    means = [
        w @ torch.stack([loss(lambda y: -y @ P, x, v.expand_as(x)) for v in signs]).var(0, correction=0)
        for loss in (implicit, sliced)
    ]
    nb.check("prop-sliced-noise", torch.stack(means), [4 * rho**2, 1 + 2 * rho**2], atol=1e-9)
    with pytest.raises(CheckFailed, match="prop-sliced-noise"):  # "the reduced form is never noisier"
        nb.check_bound("prop-sliced-noise", means[0], means[1])


def test_thm_dsm() -> None:
    """The floor lost, the target with the other sign or scaled by sigma, the score of the clean data."""
    x, z, w = noisy_pairs()
    mass = on_grid(PARZEN)
    floor = 2 / (2 * SIGMA**2) - mass @ (PARZEN.score(GRID) ** 2).sum(1) / 2
    esm = mass @ explicit(NETWORK, GRID, PARZEN.score)
    dsm = w @ denoising(NETWORK, x, SIGMA, z)
    nb.check("thm-dsm", esm + floor, dsm, atol=1e-9)
    s = NETWORK(x + SIGMA * z)
    for target in (z / SIGMA, -z, -z / SIGMA**2):
        wrong = w @ ((s - target) ** 2).sum(1) / 2
        with pytest.raises(CheckFailed, match="thm-dsm"):
            nb.check("thm-dsm", esm + floor, wrong, atol=1e-9)
    for constant in (0 * floor, 2 / (2 * SIGMA**2), 1 / (2 * SIGMA**2) + floor):
        with pytest.raises(CheckFailed, match="thm-dsm"):
            nb.check("thm-dsm", esm + constant, dsm, atol=1e-9)
    narrow = GaussianMixture(CLEAN, torch.full((5,), 0.45, dtype=DOUBLE))
    with pytest.raises(CheckFailed, match="thm-dsm"):
        nb.check("thm-dsm", mass @ explicit(NETWORK, GRID, narrow.score) + floor, dsm, atol=1e-9)

    # As for the trained networks: the excess over the exact score on the same draws.
    rows, noise = torch.randint(5, (20_000,), generator=seeded(8)), torch.randn(20_000, 2, generator=seeded(9)).double()
    draws = CLEAN[rows]
    half: Score = lambda y: PARZEN.score(y) / 2 + NETWORK(y) / 4  # noqa: E731
    error, best = mass @ explicit(half, GRID, PARZEN.score), denoising(PARZEN.score, draws, SIGMA, noise)
    excess = denoising(half, draws, SIGMA, noise) - best
    nb.check_mc("thm-dsm", excess, error)
    flipped = ((half(draws + SIGMA * noise) - noise / SIGMA) ** 2).sum(1) / 2
    for wrong, divergence in (
        (excess, error / 2),
        (excess, 2 * error),
        (excess + best, error),
        (flipped - best, error),
    ):
        with pytest.raises(CheckFailed, match="thm-dsm"):
            nb.check_mc("thm-dsm", wrong, divergence)


def test_prop_tweedie() -> None:
    """Sigma for its square, the other sign, the covariance without the identity; a floor without its second term."""
    noisy = PARZEN.sample(6, generator=seeded())
    weights = (-(torch.cdist(noisy, CLEAN) ** 2) / (2 * SIGMA**2)).softmax(1)
    mean = weights @ CLEAN
    gap = CLEAN - mean[:, None]
    cov = torch.einsum("bk,bki,bkj->bij", weights, gap, gap)
    s, J, eye = PARZEN.score(noisy), torch.func.vmap(torch.func.jacrev(PARZEN.score))(noisy), torch.eye(2, dtype=DOUBLE)
    nb.check("prop-tweedie", noisy + SIGMA**2 * s, mean, atol=1e-12)
    nb.check("prop-tweedie", SIGMA**2 * (eye + SIGMA**2 * J), cov, atol=1e-12)
    for wrong in (noisy + SIGMA * s, noisy - SIGMA**2 * s, SIGMA**2 * s):
        with pytest.raises(CheckFailed, match="prop-tweedie"):
            nb.check("prop-tweedie", wrong, mean, atol=1e-12)
    for wrong in (SIGMA**4 * J, SIGMA**2 * (eye - SIGMA**2 * J), eye + SIGMA**2 * J, SIGMA**2 * (eye + J)):
        with pytest.raises(CheckFailed, match="prop-tweedie"):
            nb.check("prop-tweedie", wrong, cov, atol=1e-12)
    x, z, w = noisy_pairs()
    half = on_grid(PARZEN) @ (PARZEN.score(GRID) ** 2).sum(1) / 2
    reached = w @ denoising(PARZEN.score, x, SIGMA, z)
    nb.check("prop-tweedie", reached, 1 / SIGMA**2 - half, atol=1e-5)
    for floor in (1 / SIGMA**2, 1 / SIGMA**2 - 2 * half, 0.5 / SIGMA**2 - half):
        with pytest.raises(CheckFailed, match="prop-tweedie"):
            nb.check("prop-tweedie", reached, floor, atol=1e-5)
    posterior = (-(torch.cdist(GRID, CLEAN) ** 2) / (2 * SIGMA**2)).softmax(1)
    trace = posterior @ (CLEAN**2).sum(1) - ((posterior @ CLEAN) ** 2).sum(1)
    floor = on_grid(PARZEN) @ trace / (2 * SIGMA**4)
    nb.check("prop-tweedie", floor, 1 / SIGMA**2 - half, atol=1e-9)
    prior = CLEAN.var(0, correction=0).sum() / (2 * SIGMA**4)
    uncentred = on_grid(PARZEN) @ (posterior @ (CLEAN**2).sum(1)) / (2 * SIGMA**4)
    for wrong in (2 * floor, SIGMA**2 * floor, SIGMA**4 * floor, prior, uncentred):
        with pytest.raises(CheckFailed, match="prop-tweedie"):
            nb.check("prop-tweedie", wrong, 1 / SIGMA**2 - half, atol=1e-9)


def test_thm_chain() -> None:
    """Links at different noise, a reconstruction of the noisy point, sigma^2 for sigma^4, clean points on one side."""
    x, z, w = noisy_pairs()
    mass = on_grid(PARZEN)
    expected = gradient(mass @ explicit(NETWORK, GRID, PARZEN.score))
    noisy = x + SIGMA * z
    error = ((noisy + SIGMA**2 * NETWORK(noisy) - x) ** 2).sum(1)
    nb.check("thm-chain", error / (2 * SIGMA**4), denoising(NETWORK, x, SIGMA, z), atol=1e-10)
    links = mass @ implicit(NETWORK, GRID), w @ denoising(NETWORK, x, SIGMA, z), w @ error / (2 * SIGMA**4)
    for loss in links:
        nb.check("thm-chain", gradient(loss), expected, atol=1e-9)
    clean = PARZEN.__class__(CLEAN, torch.full((5,), 0.4, dtype=DOUBLE))
    wrongs = (
        w @ error / (2 * SIGMA**2),
        w @ error / SIGMA**4,
        w @ ((SIGMA**2 * NETWORK(noisy)) ** 2).sum(1) / (2 * SIGMA**4),  # back to the noisy point
        w @ denoising(NETWORK, x, 0.4, z),
        on_grid(clean) @ implicit(NETWORK, GRID),
        (implicit(NETWORK, CLEAN)).mean(),  # without noise
    )
    for loss in wrongs:
        with pytest.raises(CheckFailed, match="thm-chain"):
            nb.check("thm-chain", gradient(loss), expected, atol=1e-9)
    with pytest.raises(CheckFailed, match="thm-chain"):
        nb.check("thm-chain", error / (2 * SIGMA**2), denoising(NETWORK, x, SIGMA, z), atol=1e-10)


def test_thm_dae_energy() -> None:
    """The wrong sign of the whole or of one term, a lost half or offset, the sigmoid for the softplus."""
    torch.manual_seed(3)
    tied = DenoisingAutoencoder(2, 6, 0.7).double()
    with torch.no_grad():
        tied.bias.normal_()
        tied.offset.normal_()
    x = TRUTH.sample(8, generator=seeded())
    score = tied.score(x)
    nb.check("thm-dae-energy", score_of(tied.energy)(x), score, atol=1e-12)
    inner: Callable[[Tensor], Tensor] = lambda y: y @ tied.weight.T + tied.bias  # noqa: E731
    soft: Callable[[Tensor], Tensor] = lambda y: torch.nn.functional.softplus(inner(y)).sum(1)  # noqa: E731
    linear: Callable[[Tensor], Tensor] = lambda y: y @ tied.offset  # noqa: E731
    square: Callable[[Tensor], Tensor] = lambda y: (y**2).sum(1) / 2  # noqa: E731
    v = tied.sigma**2
    for energy in (
        lambda y: -tied.energy(y),
        lambda y: -(linear(y) - 2 * square(y) + soft(y)) / v,
        lambda y: -(soft(y) - square(y)) / v,
        lambda y: -(linear(y) + square(y) + soft(y)) / v,
        lambda y: -(linear(y) - square(y) + inner(y).sigmoid().sum(1)) / v,
        lambda y: -(linear(y) - square(y) + soft(y)) / tied.sigma,
        lambda y: -(linear(y) - square(y) + soft(y)),
    ):
        with pytest.raises(CheckFailed, match="thm-dae-energy"):
            nb.check("thm-dae-energy", score_of(energy)(x), score, atol=1e-12)

    hidden = torch.cartesian_prod(*[tensor(0.0, 1.0)] * 6)
    joint = linear(x) - square(x) + (inner(x) @ hidden.T).logsumexp(1)
    nb.check("thm-dae-energy", -tied.energy(x) * v, joint, atol=1e-12)
    spins = 2 * hidden - 1
    for wrong in (joint + square(x), linear(x) - square(x) + (inner(x) @ spins.T).logsumexp(1), -joint):
        with pytest.raises(CheckFailed, match="thm-dae-energy"):
            nb.check("thm-dae-energy", -tied.energy(x) * v, wrong, atol=1e-12)


def test_prop_curl() -> None:
    """Free weights have no energy; an energy without the factors; the curl with the other sign or summed."""
    torch.manual_seed(3)
    W, b, c = torch.randn(6, 2).double(), torch.randn(6).double(), torch.randn(2).double()
    d, free = tensor(0.4, 2.0, -1.1, 0.5, 1.0, 3.0), torch.randn(2, 6).double()
    t = torch.arange(2000, dtype=DOUBLE) * (2 * math.pi / 2000)
    loop, tangent = torch.stack([t.cos(), t.sin()], 1), torch.stack([-t.sin(), t.cos()], 1)
    radius = ((torch.arange(200, dtype=DOUBLE) + 0.5) / 200)[:, None, None]
    disk, area = (radius * loop[::20]).reshape(-1, 2), (radius.flatten() / 200 * 2 * math.pi / 100)
    area = area.repeat_interleave(100)

    def field(U: Tensor) -> Score:
        return lambda y: (y @ W.T + b).sigmoid() @ U.T + c - y

    def work(U: Tensor) -> Tensor:
        return (field(U)(loop) * tangent).sum() * 2 * math.pi / 2000

    J = jacobian(field(free), disk)
    nb.check("prop-curl", work(free), area @ (J[:, 1, 0] - J[:, 0, 1]), atol=1e-4)
    for curl in (J[:, 0, 1] - J[:, 1, 0], J[:, 1, 0] + J[:, 0, 1], J[:, 0, 0] + J[:, 1, 1]):
        with pytest.raises(CheckFailed, match="prop-curl"):
            nb.check("prop-curl", work(free), area @ curl, atol=1e-4)
    for U in (W.T, W.T * d):
        nb.check("prop-curl", work(U), 0.0, atol=1e-9)
    nearly = W.T * torch.stack([d, d + 0.1])  # another factor for each output is not enough
    for U in (free, nearly, W.T.flip(1)):
        with pytest.raises(CheckFailed, match="prop-curl"):
            nb.check("prop-curl", work(U), 0.0, atol=1e-9)
    softplus, x = torch.nn.functional.softplus, TRUTH.sample(8, generator=seeded())
    for factors, holds in ((d, True), (torch.ones_like(d), False), (d**2, False)):
        energy = lambda y, f=factors: (y**2).sum(1) / 2 - y @ c - softplus(y @ W.T + b) @ f  # noqa: E731
        if holds:
            nb.check("prop-curl", score_of(energy)(x), field(W.T * d)(x), atol=1e-12)
        else:
            with pytest.raises(CheckFailed, match="prop-curl"):
                nb.check("prop-curl", score_of(energy)(x), field(W.T * d)(x), atol=1e-12)
    best = torch.func.vmap(torch.func.jacrev(PARZEN.score))(x)
    nb.check("prop-curl", best - best.mT, 0.0, atol=1e-12)
    with pytest.raises(CheckFailed, match="prop-curl"):
        nb.check("prop-curl", J - J.mT, 0.0, atol=1e-12)


def test_prop_inconsistent() -> None:
    """Denoising does not give the clean covariance, nor one with sigma or half of its square added."""

    def minimize(loss_of: Callable[[Score], Tensor]) -> tuple[Tensor, Tensor]:
        mu, precision = torch.zeros(2, dtype=DOUBLE, requires_grad=True), torch.eye(2, dtype=DOUBLE).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [mu, precision], max_iter=200, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(lambda y: (mu - y) @ precision.T)
            loss.backward()
            return loss

        optimizer.step(closure)
        return mu.detach(), precision.detach().inverse()

    z, w = hermite(3)
    x, p = nodes(TRUTH, 3)
    X, Z, P = x.repeat_interleave(9, 0), z.repeat(27, 1), p.repeat_interleave(9) * w.repeat(27)
    mu, clean = minimize(lambda s: p @ implicit(s, x))
    nb.check("prop-inconsistent", mu, TRUTH.mean, atol=1e-6)
    nb.check("prop-inconsistent", clean, TRUTH.cov, atol=1e-6)
    sigma, eye = 0.8, torch.eye(2, dtype=DOUBLE)
    mu, noisy = minimize(lambda s: P @ denoising(s, X, sigma, Z))
    nb.check("prop-inconsistent", mu, TRUTH.mean, atol=1e-6)
    nb.check("prop-inconsistent", noisy, TRUTH.cov + sigma**2 * eye, atol=1e-6)
    for extra in (0.0, sigma, sigma**2 / 2, -(sigma**2)):
        with pytest.raises(CheckFailed, match="prop-inconsistent"):
            nb.check("prop-inconsistent", noisy, TRUTH.cov + extra * eye, atol=1e-6)
    with pytest.raises(CheckFailed, match="prop-inconsistent"):
        nb.check("prop-inconsistent", clean, TRUTH.cov.inverse(), atol=1e-6)
    half = minimize(lambda s: p @ (implicit(s, x) + (s(x) ** 2).sum(1) / 2) / 2)[1]  # half of the trace
    with pytest.raises(CheckFailed, match="prop-inconsistent"):
        nb.check("prop-inconsistent", half, TRUTH.cov, atol=1e-6)


def test_prop_small_noise() -> None:
    """A control at the noisy point, of the other sign or size, with a lost D; the printed leading terms as limit."""
    z, w = hermite(12)
    x, p = nodes(TRUTH, 12)
    X, Z = x.repeat_interleave(144, 0), z.repeat(432, 1)
    P = p.repeat_interleave(144) * w.repeat(432)
    inner = (Z * NETWORK(X)).sum(1)
    for sigma in (0.1, 1.0):
        plain, controlled = (denoising(NETWORK, X, sigma, Z, control=c) for c in (False, True))
        nb.check("prop-small-noise", P @ controlled, P @ plain, atol=1e-9)
        at_noisy = (Z * NETWORK(X + sigma * Z)).sum(1)
        square = (Z**2).sum(1) / (2 * sigma**2)
        for wrong in (plain - at_noisy / sigma, plain - square, plain - inner / sigma - square + 1 / (2 * sigma**2)):
            with pytest.raises(CheckFailed, match="prop-small-noise"):
                nb.check("prop-small-noise", P @ wrong, P @ plain, atol=1e-9)

    tiny = 1e-5
    limit = denoising(NETWORK, X, tiny, Z, control=True) - 2 / (2 * tiny**2)
    nb.check("prop-small-noise", limit, implicit(NETWORK, X, Z), atol=2e-3)
    half = (NETWORK(X) ** 2).sum(1) / 2
    second = implicit(NETWORK, X, Z) - half
    nearly = half + 0.99 * second
    for wrong in (half, half - second, half + second / 2, nearly, sliced(NETWORK, X, Z), implicit(NETWORK, X)):
        with pytest.raises(CheckFailed, match="prop-small-noise"):
            nb.check("prop-small-noise", limit, wrong, atol=2e-3)
    with pytest.raises(CheckFailed, match="prop-small-noise"):  # without the control
        nb.check("prop-small-noise", denoising(NETWORK, X, tiny, Z), implicit(NETWORK, X, Z), atol=2e-3)

    c = torch.ones(len(X), 1, dtype=DOUBLE, requires_grad=True)
    loss = denoising(lambda y: c * TRUTH.score(y), X, 1e-3, Z)
    (slope,) = torch.autograd.grad(loss.sum(), c)
    variance = (P @ slope[:, 0] ** 2 - (P @ slope[:, 0]) ** 2) * 1e-6
    moment = p @ (TRUTH.score(x) ** 2).sum(1)
    nb.check("prop-small-noise", variance, moment, rtol=1e-3)
    for wrong in (moment / 2, 2 * moment, moment**2, moment / 1e-3):
        with pytest.raises(CheckFailed, match="prop-small-noise"):
            nb.check("prop-small-noise", variance, wrong, rtol=1e-3)


def test_prop_blind() -> None:
    """A faster rate, the odds upside down without kappa, KL for Fisher's; a factor or a power lost in a step."""

    def mixture(weight: float, m: float) -> GaussianMixture:
        return GaussianMixture(tensor([m], [-m]), tensor(1.0, 1.0), tensor(weight, 1 - weight))

    def divergences(m: float, w: float = 0.8, other: float = 0.5) -> tuple[float, float, float]:
        y = torch.linspace(-m - 9, m + 9, 8001, dtype=DOUBLE)[:, None]
        p, q = mixture(w, m), mixture(other, m)
        density = p.log_prob(y).exp()
        ratio = other * (1 - w) / (w * (1 - other))
        bound = (max(ratio, 1 / ratio) - 1) ** 2 * math.sqrt(w * (1 - w)) * m**2 * math.exp(-(m**2) / 2) / 4
        fisher = torch.trapezoid(density * explicit(q.score, y, p.score), y[:, 0])
        kl = torch.trapezoid(density * (p.log_prob(y) - q.log_prob(y)), y[:, 0])
        return float(fisher), bound, float(kl)

    halves = torch.linspace(0.5, 6, 23, dtype=DOUBLE)
    fisher, bound, kl = tensor(*[divergences(float(m)) for m in halves]).T
    nb.check_bound("prop-blind", fisher, bound)
    for wrong in (bound * (-(halves**2) / 2).exp(), bound / 9 * (-(halves**2) / 8).exp(), bound / 100):
        with pytest.raises(CheckFailed, match="prop-blind"):
            nb.check_bound("prop-blind", fisher, wrong)
    with pytest.raises(CheckFailed, match="prop-blind"):  # a KL divergence is not blind
        nb.check_bound("prop-blind", kl, bound)

    # The steps of the proof, each with its constants.
    y, w, other = torch.linspace(-16, 16, 16_001, dtype=DOUBLE), 0.8, 0.5
    odds = other * (1 - w) / (w * (1 - other))
    normal = (-(y**2) / 2).exp() / math.sqrt(2 * math.pi)
    for m in (0.5, 2.0, 4.0):
        density, exact = mixture(w, m).log_prob(y[:, None]).exp(), divergences(m)[0]
        right, changed = (torch.sigmoid(2 * m * y + math.log(v / (1 - v))) for v in (w, other))
        integral = torch.trapezoid(density * (right - changed) ** 2, y)
        nb.check("prop-blind", 2 * m**2 * integral, exact, atol=1e-9)
        powers = () if m == 2 else (m**3 * integral, 8 * integral, m**4 / 2 * integral)
        for bad in (m**2 * integral, 4 * m**2 * integral, *powers):
            with pytest.raises(CheckFailed, match="prop-blind"):
                nb.check("prop-blind", bad, exact, atol=1e-9)
        product = right * (1 - right)
        nb.check("prop-blind", changed - right, (odds - 1) * product / (1 - right + odds * right), atol=1e-12)
        for bad in (
            (1 - odds) * product / (1 - right + odds * right),
            (odds - 1) * product / (right + odds * (1 - right)),
            (odds - 1) * product,
            (1 / odds - 1) * product / (1 - right + right / odds),
        ):
            with pytest.raises(CheckFailed, match="prop-blind"):
                nb.check("prop-blind", changed - right, bad, atol=1e-12)
        half_root = 0.5 * math.sqrt(w * (1 - w)) * math.exp(-(m**2) / 2) * normal
        nb.check_bound("prop-blind", density * product, half_root, slack=1e-15)
        nb.check("prop-blind", (density * product / half_root).max(), 1.0, atol=1e-4)
        for factor in (0.5, 0.9, math.sqrt(w * (1 - w)), math.exp(-(m**2) / 2)):
            with pytest.raises(CheckFailed, match="prop-blind"):
                nb.check_bound("prop-blind", density * product, factor * half_root, slack=1e-15)
        for factor in (0.5, 1.1, 2.0, math.exp(m**2 / 4)):
            with pytest.raises(CheckFailed, match="prop-blind"):
                nb.check("prop-blind", (density * product / (factor * half_root)).max(), 1.0, atol=1e-4)
    limit = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    nb.check("prop-blind", kl[-1], limit, atol=1e-6)
    for wrong_limit in (0.0, 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), -limit):
        with pytest.raises(CheckFailed, match="prop-blind"):
            nb.check("prop-blind", kl[-1], wrong_limit, atol=1e-6)


def test_thm_debruijn() -> None:
    """The printed half, no sign, the roles exchanged; the integral of half the divergence."""
    p0 = GaussianMixture(tensor([-0.5], [0.8]), tensor(0.9, 0.6))
    y = torch.linspace(-14, 14, 14_001, dtype=DOUBLE)[:, None]

    def at_noise(t: float, swap: bool = False) -> Tensor:
        q, p = smooth(PAIR, math.sqrt(t)), smooth(p0, math.sqrt(t))
        density = (p if swap else q).log_prob(y).exp()
        terms = q.log_prob(y) - p.log_prob(y), explicit(p.score, y, q.score)
        return torch.stack([torch.trapezoid(density * v, y[:, 0]) for v in terms])

    for t in (0.1, 1.0):
        change, fisher = (at_noise(t + 1e-4)[0] - at_noise(t - 1e-4)[0]) / 2e-4, at_noise(t)[1]
        nb.check("thm-debruijn", change, -fisher, atol=1e-6)
        for wrong in (-fisher / 2, fisher, -2 * fisher, -at_noise(t, swap=True)[1]):
            with pytest.raises(CheckFailed, match="thm-debruijn"):
                nb.check("thm-debruijn", change, wrong, atol=1e-6)
    levels = torch.linspace(0, 2, 81, dtype=DOUBLE)
    kls, fishers = torch.stack([at_noise(float(t)) for t in levels]).T
    simpson = tensor(1.0, *[4.0, 2.0] * 39, 4.0, 1.0) * 0.025 / 3
    nb.check("thm-debruijn", simpson @ fishers, kls[0] - kls[-1], atol=1e-4)
    for wrong in (simpson @ fishers / 2, -simpson @ fishers, simpson @ fishers + kls[-1]):
        with pytest.raises(CheckFailed, match="thm-debruijn"):
            nb.check("thm-debruijn", wrong, kls[0] - kls[-1], atol=1e-4)


def test_thm_langevin_cd() -> None:
    """The printed plus, a chain that starts at the model, a step uphill, noise of another size."""
    energy: Callable[[Tensor], Tensor] = lambda u: (u**2).sum(1) / 2 + NETWORK(u).sum(1)  # noqa: E731
    z, w = hermite(5)
    x, p = nodes(TRUTH, 12)
    starts, Z, P = x.repeat_interleave(25, 0), z.repeat(432, 1), p.repeat_interleave(25) * w.repeat(432)
    expected = gradient(on_grid(TRUTH) @ explicit(score_of(energy), GRID, TRUTH.score))
    drift = score_of(energy)(starts).detach()

    def update(epsilon: float, uphill: bool = False, noise: float = 1.0) -> Tensor:
        after = starts + (-1 if uphill else 1) * epsilon**2 / 2 * drift + noise * epsilon * Z
        return gradient(P @ energy(after) - p @ energy(x)) / (epsilon**2 / 2)

    for epsilon in (0.05, 0.02):
        step = update(epsilon)
        nb.check("thm-langevin-cd", step, -expected, atol=0.2 * epsilon**2)
        for got in (-step, step / 2, 1.02 * step, update(epsilon, uphill=True), update(epsilon, noise=2**0.5)):
            with pytest.raises(CheckFailed, match="thm-langevin-cd"):
                nb.check("thm-langevin-cd", got, -expected, atol=0.2 * epsilon**2)
    model = torch.softmax(-energy(GRID).detach(), 0)
    slope = score_of(energy)(GRID).detach()
    start = gradient(model @ energy(GRID + 2e-4 * slope) - on_grid(TRUTH) @ energy(GRID)) / 2e-4
    with pytest.raises(CheckFailed, match="thm-langevin-cd"):
        nb.check("thm-langevin-cd", start, -expected, atol=0.2 * 0.02**2)


def test_eq_stein() -> None:
    """The score of other noise, half of it, the clean points' weights changed, the other sign."""
    mass = on_grid(PARZEN)

    def ratio(score: Score) -> Tensor:
        return -(mass @ (GRID * score(GRID)).sum(1)) / 2

    nb.check("eq-stein", ratio(PARZEN.score), 1.0, atol=1e-6)
    nb.check("eq-stein", mass @ PARZEN.score(GRID), 0.0, atol=1e-6)
    other = GaussianMixture(CLEAN, torch.full((5,), 0.45, dtype=DOUBLE))
    moved = GaussianMixture(CLEAN, PARZEN.covs, tensor(0.4, 0.3, 0.1, 0.1, 0.1))
    for score in (other.score, moved.score, lambda y: PARZEN.score(y) / 2, lambda y: -PARZEN.score(y)):
        with pytest.raises(CheckFailed, match="eq-stein"):
            nb.check("eq-stein", ratio(score), 1.0, atol=1e-6)
    with pytest.raises(CheckFailed, match="eq-stein"):
        nb.check("eq-stein", mass @ moved.score(GRID), 0.0, atol=1e-6)

"""Every claim of the chapter on score SDEs: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.autograd.functional import jvp

import nblib as nb
from nblib import dynamics, paths
from nblib.data.toy import GaussianMixture
from nblib.diffusion import inpaint
from nblib.errors import CheckFailed
from nblib.field import FieldModel
from nblib.paths import Path

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


VP, VE, SUB = paths.vp(), paths.ve(0.05, 8.0), paths.sub_vp()
TARGET = GaussianMixture(
    tensor([[-1.0, -1.2], [0.4, 1.2], [1.2, -0.3]]),
    tensor([[[0.1, 0.06], [0.06, 0.2]], [[0.3, -0.15], [-0.15, 0.15]], [[0.05, 0.0], [0.0, 0.3]]]),
    tensor([0.3, 0.4, 0.3]),
)
POINTS = 1.5 * torch.randn(100, 2, dtype=DOUBLE, generator=seeded())


def beta(tau: float) -> float:
    return 0.1 + 19.9 * tau


def integral(tau: float) -> float:
    return 0.1 * tau + 19.9 * tau**2 / 2


RATE = 2 * math.log(8.0 / 0.05)
TABLE: dict[str, tuple[Path, Callable[[float], float], Callable[[float], float]]] = {
    "VE": (VE, lambda s: 0.0, lambda s: RATE * 0.05**2 * math.exp(RATE * s)),
    "VP": (VP, lambda s: -beta(s) / 2, beta),
    "sub-VP": (SUB, lambda s: -beta(s) / 2, lambda s: beta(s) * -math.expm1(-2 * integral(s))),
}


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(f(x).sum(), x, retain_graph=True, create_graph=True)[0]


def residual(
    log_p: Callable[..., Tensor], drift: Callable[[Tensor], Tensor], strength: float, x: Tensor, t: float
) -> Tensor:
    rate = jvp(lambda s: log_p(x, s), tensor(t))[1]
    x = x.detach().requires_grad_()
    score, flow = gradient(lambda y: log_p(y, t), x), drift(x)

    def trace(vectors: Tensor) -> Tensor:
        return torch.stack([gradient(lambda _, c=c: c, x)[:, j] for j, c in enumerate(vectors.unbind(1))]).sum(0)

    spread = strength / 2 * (trace(score) + score.square().sum(1))
    return (rate + trace(flow) + (flow * score).sum(1) - spread).detach()


def broken(label: str, got: object, expected: object, *, atol: float = 1e-8, rtol: float = 0.0) -> None:
    with pytest.raises(CheckFailed, match=label):
        nb.check(label, got, expected, atol=atol, rtol=rtol)


# --- Langevin dynamics between far modes --------------------------------------------------------------------------


def test_prop_crossing() -> None:
    """The masses or the density for its reciprocal; the weights forgotten; too small a part of the desert."""
    pair = GaussianMixture(tensor([[-3.0], [3.0]]), tensor([0.5, 0.5]), tensor([0.8, 0.2]))

    def spectral_gap(p: GaussianMixture, reach: float, n: int = 1500) -> float:
        y = torch.linspace(-reach, reach, n, dtype=DOUBLE)
        half, rate = p.log_prob(y[:, None]) / 2, 1 / (y[1] - y[0]) ** 2
        up, down = rate * half.diff().exp(), rate * (-half.diff()).exp()
        out = torch.nn.functional.pad(up, (0, 1)) + torch.nn.functional.pad(down, (1, 0))
        off = -rate * torch.ones(n - 1, dtype=DOUBLE)
        return float(eigh_tridiagonal(out, off, select="i", select_range=(1, 1))[0][0])

    for sigma in (0.25, 1.0, 4.0):
        p = GaussianMixture(pair.means, pair.covs + sigma**2, pair.weights)
        y = torch.linspace(-2, 2, 4001, dtype=DOUBLE)[:, None]
        tail = torch.linspace(2, 40, 20_001, dtype=DOUBLE)[:, None]
        left, right = (torch.trapezoid(p.log_prob(s * tail).exp(), tail[:, 0]) for s in (-1, 1))
        desert = torch.trapezoid(1 / p.log_prob(y).exp(), y[:, 0])
        gap = spectral_gap(p, 3 + 6 * (0.25 + sigma**2) ** 0.5)
        nb.check_bound("prop-crossing", gap, 1 / (left * right * desert))
        if sigma < 1:
            nb.check_bound("prop-crossing", 1 / (left * right * desert), 1.5 * gap)
            for bad in (1 / (left + right) / desert, left * right / desert, 1 / (4 * left * right * desert)):
                with pytest.raises(CheckFailed, match="prop-crossing"):
                    nb.check_bound("prop-crossing", gap, bad)
    # a walk on the grid with a known answer: N(0, v) has the gap 1 / v
    normal = GaussianMixture(torch.zeros(1, 1, dtype=DOUBLE), tensor([1.5]))
    assert abs(spectral_gap(normal, 12.0) - 1 / 2.25) < 1e-4


# --- chains and differential equations ----------------------------------------------------------------------------


def test_thm_sde_limit() -> None:
    """Another constant or sign in the error of the chain; steps of σ for those of σ²."""
    sizes = [100, 1000, 10_000, 100_000]
    chain = [torch.log1p(-(0.1 + 19.9 * torch.arange(1, k + 1, dtype=DOUBLE) / k) / k).sum() for k in sizes]
    error = torch.stack(chain) + integral(1.0)
    square = 0.1**2 + 0.1 * 19.9 + 19.9**2 / 3
    nb.check("thm-sde-limit", sizes[-1] * error[-1], -(19.9 + square) / 2, rtol=1e-3)
    nb.check("thm-sde-limit", torch.log10(error.abs()).diff()[-1], -1.0, atol=1e-2)
    for constant in ((19.9 + square) / 2, -square / 2, -19.9 / 2, -(square - 19.9) / 2, -(19.9 + square)):
        broken("thm-sde-limit", sizes[-1] * error[-1], constant, rtol=1e-3)
    broken("thm-sde-limit", torch.log10(error.abs()).diff()[-1], -2.0, atol=1e-2)
    levels = VE.b(1 - torch.arange(21, dtype=DOUBLE) / 20)
    fine = torch.linspace(0, 1, 20_001, dtype=DOUBLE)
    strength = RATE * 0.05**2 * torch.exp(RATE * fine)
    from_sde = torch.cumulative_trapezoid(strength, fine)[999::1000]
    nb.check("thm-sde-limit", (levels**2).diff().cumsum(0), from_sde, rtol=1e-6)
    for wrong in (levels.diff().square().cumsum(0), levels[1:] ** 2, levels.diff().cumsum(0)):
        broken("thm-sde-limit", wrong, from_sde, rtol=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_prop_linear_sde(name: str) -> None:
    """β for ½β, another g, a variance for a standard deviation, the drift of the variance halved."""
    path, f, g2 = TABLE[name]

    def moments(f: Callable[[float], float], g2: Callable[[float], float], double: float = 2.0) -> Tensor:
        def rates(state: Tensor, s: float) -> Tensor:
            return torch.stack([f(s) * state[:, 0], double * f(s) * state[:, 1] + g2(s)], 1)

        start = tensor([[1.0, float(path.b(tensor(1.0))) ** 2]])
        return dynamics.ode(rates, start, dynamics.times(200, end=0.3), method="rk4")[0]

    claimed = torch.stack([path.a(tensor(0.7)), path.b(tensor(0.7)) ** 2])
    nb.check("prop-linear-sde", moments(f, g2), claimed, rtol=1e-7)
    nb.check("prop-linear-sde", path.diffusion(0.7) ** 2, g2(0.3), rtol=1e-9)
    wrong = [moments(f, lambda s: 2 * g2(s)), moments(f, lambda s: g2(1 - s)), moments(f, lambda s: g2(s) ** 0.5)]
    if name != "VE":
        wrong += [moments(lambda s: 2 * f(s), g2), moments(lambda s: -f(s), g2), moments(f, g2, 1.0)]
    wrong.append(moments(f, beta if name == "sub-VP" else lambda s: g2(s) * -math.expm1(-2 * integral(s))))
    for bad in wrong:
        broken("prop-linear-sde", bad, claimed, rtol=1e-7)
    broken("prop-linear-sde", path.diffusion(0.7), g2(0.3), rtol=1e-9)


@pytest.mark.parametrize("name", TABLE)
def test_thm_fokker_planck(name: str) -> None:
    """Noise without the half, with the wrong sign or twice; no divergence; the drift in the other direction."""
    path, f, g2 = TABLE[name]
    t = 0.6

    def log_p(x: Tensor, s: Tensor | float) -> Tensor:
        return paths.marginal(TARGET, path, s).log_prob(x)

    def noising(x: Tensor) -> Tensor:
        return -f(1 - t) * x

    nb.check("thm-fokker-planck", residual(log_p, noising, -g2(1 - t), POINTS, t), 0.0, atol=1e-8)
    for strength in (0.0, g2(1 - t), -2 * g2(1 - t), -g2(1 - t) / 2, -(g2(1 - t) ** 0.5)):
        broken("thm-fokker-planck", residual(log_p, noising, strength, POINTS, t), 0.0)
    shifts: list[Callable[[Tensor], Tensor]] = [lambda x: noising(x) + 0.01 * x, lambda x: noising(x) + 0.1]
    if name != "VE":
        shifts += [lambda x: -noising(x), lambda x: 0 * x, lambda x: 2 * noising(x)]
    for shift in shifts:
        broken("thm-fokker-planck", residual(log_p, shift, -g2(1 - t), POINTS, t), 0.0)


def slope_of_drift(p: Path, t: float, kappa: float, std: float) -> float:
    a, b, da, db = (float(c) for c in p.coefficients(t, torch.ones(1, dtype=DOUBLE)))
    var = a**2 * std**2 + b**2
    return (a * da * std**2 + b * db) / var - kappa**2 * float(p.diffusion(t)) ** 2 / 2 / var


def variance(p: Path, t: float, std: float) -> float:
    return float(p.a(tensor(t)) ** 2 * std**2 + p.b(tensor(t)) ** 2)


@pytest.mark.parametrize("name", TABLE)
def test_thm_same_marginals(name: str) -> None:
    """The whole score correction or none, κ for κ², the ODE taken for the reversal, κ = 1 for another κ."""
    p = TABLE[name][0]
    t = 0.6

    def log_p(x: Tensor, s: Tensor | float) -> Tensor:
        return paths.marginal(TARGET, p, s).log_prob(x)

    def drift(x: Tensor, factor: float) -> Tensor:
        u, s = (paths.posterior_mean(TARGET, p, x, t, to=to) for to in ("velocity", "score"))
        return u + factor * p.diffusion(t) ** 2 * s

    for kappa in (0.0, 1.0, 2.0):
        strength = kappa**2 * float(p.diffusion(t)) ** 2
        gap = residual(log_p, partial(drift, factor=kappa**2 / 2), strength, POINTS, t)
        nb.check("thm-same-marginals", gap, 0.0, atol=1e-8)
        for factor in (kappa**2, kappa / 2 + 0.1, -(kappa**2) / 2 - 0.1):
            if factor != kappa**2 / 2:
                broken("thm-same-marginals", residual(log_p, partial(drift, factor=factor), strength, POINTS, t), 0.0)
    early, late, cov = 0.4, 0.9, {}
    for kappa in (0.0, 0.7, 1.0, 1.5):

        def flow(c: Tensor, s: float, kappa: float = kappa) -> Tensor:
            return slope_of_drift(p, s, kappa, 0.5) * c

        grid = dynamics.times(40, start=early, end=late)
        cov[kappa] = dynamics.ode(flow, tensor([[variance(p, early, 0.5)]]), grid, method="rk4")
    forward = float(p.a(tensor(early)) / p.a(tensor(late))) * variance(p, late, 0.5)
    nb.check("thm-same-marginals", cov[1.0], forward, rtol=1e-6)
    correlated = math.sqrt(variance(p, early, 0.5) * variance(p, late, 0.5))
    nb.check("thm-same-marginals", cov[0.0], correlated, rtol=1e-6)
    for kappa in (0.0, 0.7, 1.5):
        broken("thm-same-marginals", cov[kappa], forward, rtol=1e-6)


# --- likelihood ---------------------------------------------------------------------------------------------------


def test_thm_likelihood_weighting() -> None:
    """A factor 1 or ¼, g for g², no weight, the average under the other density; a bound for the ODE."""
    first = GaussianMixture(tensor([[-1.5], [1.5]]), tensor([0.3, 0.3]), tensor([0.6, 0.4]))
    second = GaussianMixture(tensor([[-0.8], [1.2]]), tensor([0.5, 0.4]), tensor([0.3, 0.7]))
    axis = torch.linspace(-9, 9, 3001, dtype=DOUBLE)[:, None]

    def kl_and_errors(p: Path, t: float) -> Tensor:
        f, g = (paths.marginal(data, p, t) for data in (first, second))
        error = (f.score(axis) - g.score(axis)).square().sum(1)
        terms = (
            f.log_prob(axis).exp() * (f.log_prob(axis) - g.log_prob(axis)),
            f.log_prob(axis).exp() * error,
            g.log_prob(axis).exp() * error,
        )
        return torch.stack([torch.trapezoid(v, axis[:, 0]) for v in terms])

    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(30))
    for p in (VP, SUB):
        clock, weight = 0.01 + (nodes + 1) * 0.47, weights * 0.47
        errors = torch.stack([kl_and_errors(p, t) for t in clock.tolist()])
        gain = kl_and_errors(p, 0.95)[0] - kl_and_errors(p, 0.01)[0]
        g = p.diffusion(clock)
        right = weight @ (g**2 * errors[:, 1]) / 2
        nb.check("thm-likelihood-weighting", right, gain, atol=1e-6)
        for bad in (2 * right, right / 2, weight @ (g * errors[:, 1]) / 2, weight @ errors[:, 1] / 2):
            broken("thm-likelihood-weighting", bad, gain, atol=1e-6)
        broken("thm-likelihood-weighting", weight @ (g**2 * errors[:, 2]) / 2, gain, atol=1e-6)

    def linear_model(kappa: float, wrong: float = 0.7, std: float = 0.5, end: float = 0.95) -> tuple[float, float]:
        def rates(state: Tensor, t: float) -> Tensor:
            var, g2 = variance(VP, t, std), beta(1 - t)
            drift = g2 / 2 - (1 + kappa**2) * g2 / 2 / (wrong * var)
            grow = 2 * drift * state[:, 0] + kappa**2 * g2
            return torch.stack([grow, 0 * grow + g2 * (1 - 1 / wrong) ** 2 / var], 1)

        start = tensor([[variance(VP, 0.0, std), 0.0]])
        q, total = dynamics.ode(rates, start, dynamics.times(100, end=end), method="rk4")[0]
        ratio = variance(VP, end, std) / q
        return float((ratio - 1 - ratio.log()) / 2), float(total)

    for kappa in (0.4, 1.0, 2.0):
        kl, total = linear_model(kappa)
        nb.check_bound("thm-likelihood-weighting", kl, (1 + kappa**2) ** 2 / (8 * kappa**2) * total)
    kl, total = linear_model(0.1)
    nb.check_bound("thm-likelihood-weighting", kl, 1.01**2 / 0.08 * total)
    for kappa in (0.0, 0.1):  # the bound of the reverse SDE does not hold near the ODE
        kl, total = linear_model(kappa)
        with pytest.raises(CheckFailed, match="thm-likelihood-weighting"):
            nb.check_bound("thm-likelihood-weighting", kl, total / 2)


# --- control ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_prop_guidance(name: str) -> None:
    """The two weights confused, the classifier of clean data, no source, its sign, its factor."""
    p, t = TABLE[name][0], 0.6
    parts = [GaussianMixture(m[None], c[None]) for m, c in zip(TARGET.means, TARGET.covs)]

    def log_class(x: Tensor, t: Tensor | float) -> Tensor:
        joint = torch.stack([paths.marginal(d, p, t).log_prob(x) for d in parts], 1) + TARGET.weights.log()
        return joint[:, 1] - joint.logsumexp(1)

    def guided(x: Tensor, w: float, to: str = "score") -> Tensor:
        free, bound = (paths.posterior_mean(d, p, x, t, to=to) for d in (TARGET, parts[1]))
        return free + w * (bound - free)

    def tilted(x: Tensor, s: Tensor | float, w: float) -> Tensor:
        return paths.marginal(TARGET, p, s).log_prob(x) + w * log_class(x, s)

    at = POINTS.clone().requires_grad_()
    pull = gradient(lambda x: log_class(x, t), at).detach()
    clean = gradient(lambda x: log_class(x, 0.99), at).detach()
    plain = paths.marginal(TARGET, p, t).score(POINTS)
    for w in (0.0, 1.0, 3.0):
        nb.check("prop-guidance", guided(POINTS, w), plain + w * pull, atol=1e-9)
        broken("prop-guidance", guided(POINTS, 1 + w), plain + w * pull)
        broken("prop-guidance", guided(POINTS, w), plain - (w + 0.1) * pull)
        if w:
            broken("prop-guidance", guided(POINTS, w), plain + w * clean)
        found = residual(partial(tilted, w=w), partial(guided, w=w, to="velocity"), 0.0, POINTS, t)
        unit = p.diffusion(t) ** 2 / 2 * pull.square().sum(1)
        nb.check("prop-guidance", found, w * (w - 1) * unit, atol=1e-8)
        for factor in (-w * (w - 1) - 0.1, w**2 + 0.1, w * (w + 1) + 0.1, w * (w - 1) / 2 + 0.1):
            broken("prop-guidance", found, factor * unit)
    broken("prop-guidance", found, 0.0)  # w = 3: the tilted densities are not transported


class Exact(nn.Module):
    def __init__(self, data: GaussianMixture) -> None:
        super().__init__()
        self.data, self.anchor = data, nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return paths.posterior_mean(self.data, VP, x, t, to="noise") + self.anchor


def test_prop_inverse_bias() -> None:
    """Replacement taken for exact, powers of a; DPS for the likelihood, its covariance with b² or 1/a lost."""
    rho, seen = 0.9, 1.0
    normal = GaussianMixture(torch.zeros(1, 2, dtype=DOUBLE), tensor([[[1.0, rho], [rho, 1.0]]]))
    S = normal.covs[0]

    def filled_mean(steps: int) -> float:
        t, m = torch.tensor(dynamics.times(steps), dtype=DOUBLE), 0.0
        a, b = VP.a(t), VP.b(t)
        for i in range(steps):
            on_seen, on_self = (
                a[i] * S[0, 1:].new_tensor([rho, 1.0]) @ paths.marginal(normal, VP, t[i]).covs[0].inverse()
            )
            added = b[i] ** 2 - (a[i] / a[i + 1] * b[i + 1]) ** 2
            predicted = on_self * m + on_seen * a[i] * seen
            m = float(a[i] / a[i + 1] * (b[i + 1] / b[i]) ** 2 * m + a[i + 1] * added / b[i] ** 2 * predicted)
        return m

    def limit(power: int = 3, below: int = 4) -> float:
        def rate(m: Tensor, t: float) -> Tensor:
            a = float(VP.a(tensor(t)))
            return beta(1 - t) / 2 * (m - 2 * (m - a**power * rho * seen) / (1 - a**below * rho**2))

        return float(dynamics.ode(rate, torch.zeros(1, 1, dtype=DOUBLE), dynamics.times(300), method="rk4"))

    extrapolated = 2 * filled_mean(400) - filled_mean(200)
    nb.check("prop-inverse-bias", extrapolated, limit(), atol=2e-3)
    for bad in (rho * seen, limit(2), limit(1), limit(3, 2), 0.0):
        broken("prop-inverse-bias", extrapolated, bad, atol=2e-3)
    nb.check_bound("prop-inverse-bias", limit(), 0.95 * rho * seen)
    known = tensor([[seen, 0.0]]).repeat(2000, 1)
    model = FieldModel(Exact(normal), VP, shape=(2,), predict="noise")
    filled = inpaint(model, known, torch.tensor([True, False]), steps=50, generator=seeded())
    nb.check_mc("prop-inverse-bias", filled[:, 1], filled_mean(50))
    with pytest.raises(CheckFailed, match="prop-inverse-bias"):
        nb.check_mc("prop-inverse-bias", filled[:, 1], rho * seen)

    A, value, sigma, t = tensor([[0.6, -0.8]]), tensor([0.7]), 0.3, 0.6
    at = POINTS[:20].clone().requires_grad_()
    a, b = (float(c) for c in VP.coefficients(t, torch.ones(1, dtype=DOUBLE))[:2])
    both = torch.cat([a * torch.eye(2, dtype=DOUBLE), A])
    cov = both @ S @ both.T + torch.diag(tensor([b**2, b**2, sigma**2]))
    joint = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=DOUBLE), cov)
    alone = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), cov[:2, :2])
    with_value = torch.cat([at, value.expand(20, 1)], 1)
    pull = gradient(lambda x: joint.log_prob(with_value) - alone.log_prob(x), at).detach()
    denoise = partial(paths.posterior_mean, normal, VP, t=t)
    J = torch.autograd.functional.jacobian(lambda x: denoise(x)[0], torch.zeros(1, 2, dtype=DOUBLE))[:, 0]

    def claimed(C: Tensor) -> Tensor:
        return (value - denoise(at.detach()) @ A.T) / (sigma**2 + A @ C @ A.T) @ A @ J

    nb.check("prop-inverse-bias", claimed(b**2 / a * J), pull, atol=1e-9)
    for C in (0 * J, b**2 * J, J, b / a * J, b**2 / a * torch.eye(2, dtype=DOUBLE)):
        broken("prop-inverse-bias", claimed(C), pull, atol=1e-9)

"""Every claim of the chapter on denoising diffusion: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib import paths
from nblib.data.toy import GaussianMixture
from nblib.diffusion import Chain
from nblib.errors import CheckFailed

DOUBLE = torch.float64
PATH = paths.vp()
LINE = torch.linspace(-7, 7, 1401, dtype=DOUBLE)
DX = float(LINE[1] - LINE[0])
EULER = 0.57721566490153286


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


TRUTH = GaussianMixture(tensor([[-1.05], [0.1], [1.05]]) + 0.0275, tensor([0.15, 0.3, 0.2]), tensor([0.4, 0.25, 0.35]))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (-0.5 * (x - mean) ** 2 / variance).exp() / (2 * math.pi * variance) ** 0.5


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))


def hermite(n: int) -> tuple[Tensor, Tensor]:
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(n))
    return nodes, weights / weights.sum()


def one_gaussian(std: float, mean: float = 0.0) -> GaussianMixture:
    return GaussianMixture(tensor([[mean]]), tensor([std]))


def test_prop_diffusion_kernel() -> None:
    """The bars lost; the signal not shrunk; variances that add up without being shrunk."""
    for name in ("vp", "vp-cosine", "vp-sigmoid"):
        c = Chain(paths.make(name), 200)
        mean, variance = [tensor(1.0)], [tensor(0.0)]
        for alpha, beta in zip(c.alpha[1:], c.beta[1:]):
            mean.append(alpha.sqrt() * mean[-1])
            variance.append(alpha * variance[-1] + beta)
        both = torch.stack([torch.stack(mean), torch.stack(variance)])
        nb.check("prop-diffusion-kernel", both, torch.stack([c.a, c.b**2]), atol=1e-12)
        for broken in (
            torch.stack([c.alpha.sqrt(), 1 - c.alpha]),
            torch.stack([torch.ones_like(c.a), c.b**2]),
            torch.stack([c.a, c.beta.cumsum(0)]),
            torch.stack([c.a**2, c.b**2]),
        ):
            with pytest.raises(CheckFailed, match="prop-diffusion-kernel"):
                nb.check("prop-diffusion-kernel", both, broken, atol=1e-12)


def test_thm_forward_posterior() -> None:
    """Factors exchanged, the sign of the cross term, the forward variance, the next level of noise."""
    c = Chain(PATH, 100)
    found: dict[str, list[Tensor]] = {name: [] for name in ("right", "swapped", "sign", "forward", "level")}
    brute = []
    for k in (2, 10, 60, 100):
        for x, z in ((0.7, -0.4), (-1.2, 1.5)):
            prior = normal(LINE, c.a[k - 1] * x, c.b[k - 1] ** 2)
            joint = prior * normal(tensor(z), c.alpha[k].sqrt() * LINE, c.beta[k])
            joint = joint / joint.sum()
            mean = (joint * LINE).sum()
            brute.append(torch.stack([mean, (joint * (LINE - mean) ** 2).sum()]))
            m, v = (u.squeeze() for u in c.posterior(tensor([[x]]), tensor([[z]]), k))
            share = (c.b[k - 1] / c.b[k]) ** 2
            on_z, on_x = share * c.alpha[k].sqrt(), c.a[k - 1] * c.beta[k] / c.b[k] ** 2
            found["right"].append(torch.stack([m, v]))
            found["swapped"].append(torch.stack([on_x * z + on_z * x, v]))
            found["sign"].append(torch.stack([-m, v]))
            found["forward"].append(torch.stack([m, c.beta[k]]))
            found["level"].append(torch.stack([c.a[k] / c.a[k - 1] * on_x * x + on_z * z, v]))
    truth = torch.stack(brute)
    nb.check("thm-forward-posterior", torch.stack(found.pop("right")), truth, atol=1e-8)
    for broken in found.values():
        with pytest.raises(CheckFailed, match="thm-forward-posterior"):
            nb.check("thm-forward-posterior", torch.stack(broken), truth, atol=1e-8)


def gaussian_bound(
    x: Tensor, variance: Callable[[Chain, Tensor, int], Tensor], *, exact_prior: bool = True, first: int = 2
) -> Tensor:
    """Minus the three terms for N(m, s^2) data with the exact denoiser, by quadrature: (M,)."""
    m, s = 0.4, 0.7
    c = Chain(PATH, 20)
    a, b, v = c.a, c.b, c.a**2 * s**2 + c.b**2
    nodes, w = hermite(20)
    total = torch.zeros_like(x)
    for k in range(first, 21):
        z = (a[k] * x[:, None] + b[k] * nodes)[..., None]
        d = (b[k] ** 2 * m + a[k] * s**2 * z) / v[k]
        (mean, _), (q_mean, q_var) = c.posterior(d, z, k), c.posterior(x[:, None, None], z, k)
        kl = nb.probability.gaussian_kl(q_mean, q_var.sqrt(), mean, variance(c, v, k).sqrt())
        total = total + kl @ w
    z = a[1] * x[:, None] + b[1] * nodes
    d = (b[1] ** 2 * m + a[1] * s**2 * z) / v[1]
    last = -log_normal(x[:, None], d, c.beta[1] * s**2 / v[1]) @ w
    mean, std = (a[20] * m, v[20].sqrt()) if exact_prior else (tensor(0.5), tensor(1.0))
    prior = nb.probability.gaussian_kl((a[20] * x)[:, None], b[20], mean, std)
    return -(prior + total + last)


def test_thm_ddpm_bound() -> None:
    """With the exact reversal it is the log-density; another variance or prior, or a lost term, is not."""
    x = torch.linspace(-2, 3, 7, dtype=DOUBLE)
    truth = log_normal(x, tensor(0.4), tensor(0.49))

    def best(c: Chain, v: Tensor, k: int) -> Tensor:
        return c.beta[k] * v[k - 1] / v[k]

    nb.check("thm-ddpm-bound", gaussian_bound(x, best), truth, atol=1e-9)
    for broken in (
        gaussian_bound(x, lambda c, v, k: c.beta[k]),
        gaussian_bound(x, lambda c, v, k: c.variance(k)),
        gaussian_bound(x, best, exact_prior=False),
        gaussian_bound(x, best, first=3),
    ):
        with pytest.raises(CheckFailed, match="thm-ddpm-bound"):
            nb.check("thm-ddpm-bound", broken, truth, atol=1e-9)


def test_prop_noise_mean() -> None:
    """The printed root without the bar, the wrong prefactor, the sign of the noise."""
    c, x, e = Chain(PATH, 50), noise(20, 5), noise(20, 5, seed=1)
    for k in (2, 17, 50):
        z = c.sample(x, e, k)
        mean, root = c.posterior(x, z, k)[0], c.alpha[k].sqrt()
        nb.check("prop-noise-mean", (z - c.beta[k] / c.b[k] * e) / root, mean, atol=1e-9)
        for broken in (
            (z - c.beta[k] / c.beta[k].sqrt() * e) / root,
            (z - c.beta[k] / c.b[k] * e) / c.a[k],
            (z + c.beta[k] / c.b[k] * e) / root,
        ):
            with pytest.raises(CheckFailed, match="prop-noise-mean"):
                nb.check("prop-noise-mean", broken, mean, atol=1e-9)


def test_prop_noise_weight() -> None:
    """Without the bar, without the half, the constant lost (forward variance), ratios of SNR turned round."""
    c, x, e, guess = Chain(PATH, 50), noise(20, 5), noise(20, 5, seed=1), noise(20, 5, seed=2)
    ratio_snr = (c.a / c.b) ** 2
    for k in (2, 17, 50):
        z = c.sample(x, e, k)
        q_mean, q_var = c.posterior(x, z, k)
        data = PATH.convert(guess, z, float(c.time[k]), source="noise", target="data")
        mean, error = c.posterior(data, z, k)[0], (guess - e).square().sum(1)
        for kind in ("posterior", "forward"):
            variance = c.variance(k, kind)
            kl = nb.probability.gaussian_kl(q_mean, q_var.sqrt(), mean, variance.sqrt())
            r = q_var.squeeze() / variance
            weight = c.beta[k] ** 2 / (2 * variance * c.alpha[k] * c.b[k] ** 2)
            constant = 5 / 2 * (r - 1 - r.log())
            nb.check("prop-noise-weight", constant + weight * error, kl, atol=1e-9)
            wrong = [constant + weight * c.b[k] ** 2 / c.beta[k] * error, constant + 2 * weight * error]
            if kind == "forward" and k < 50:  # at k = 50 both variances are nearly the same
                wrong.append(weight * error)
            if kind == "posterior":
                by_data = (x - data).square().sum(1)
                nb.check("prop-noise-weight", (ratio_snr[k - 1] - ratio_snr[k]) / 2 * by_data, kl, atol=1e-9)
                wrong.append((ratio_snr[k] - ratio_snr[k - 1]) / 2 * by_data)
            for broken in wrong:
                with pytest.raises(CheckFailed, match="prop-noise-weight"):
                    nb.check("prop-noise-weight", broken, kl, atol=1e-9)


def spread(c: Chain, k: int, data: GaussianMixture = TRUTH) -> Tensor:
    z, t = LINE[:, None].clone().requires_grad_(), float(c.time[k])
    (slope,) = torch.autograd.grad(paths.posterior_mean(data, PATH, z, t).sum(), z)
    weight = paths.marginal(data, PATH, t).log_prob(LINE[:, None]).exp() * DX
    return (weight * slope[:, 0]).sum() * c.b[k] ** 2 / c.a[k]


def test_thm_reverse_variance() -> None:
    """The spread of the data forgotten or not squared; either extreme taken for the truth; wide data within beta."""
    c = Chain(PATH, 30)

    def best(k: int, data: GaussianMixture = TRUTH, power: int = 2) -> Tensor:
        return c.variance(k) + (c.a[k - 1] * c.beta[k] / c.b[k] ** 2) ** power * spread(c, k, data)

    for k in (3, 8, 16):
        before = paths.marginal(TRUTH, PATH, c.time[k - 1]).log_prob(LINE[:, None]).exp()
        joint = normal(LINE[:, None], c.alpha[k].sqrt() * LINE, c.beta[k]) * before * DX**2
        mean = joint @ LINE / joint.sum(1).clamp_min(1e-300)
        brute = joint.sum(0) @ LINE**2 - joint.sum(1) @ mean**2
        nb.check("thm-reverse-variance", best(k), brute, atol=1e-6)
        for broken in (best(k, power=1), c.variance(k), c.beta[k]):
            with pytest.raises(CheckFailed, match="thm-reverse-variance"):
                nb.check("thm-reverse-variance", broken, brute, atol=1e-6)
        nb.check("thm-reverse-variance", best(k, one_gaussian(1.0)), c.beta[k], atol=1e-8)
        nb.check_bound("thm-reverse-variance", best(k), c.beta[k])
        with pytest.raises(CheckFailed, match="thm-reverse-variance"):
            nb.check_bound("thm-reverse-variance", best(k, one_gaussian(2.0)), c.beta[k])


def test_prop_posterior_price() -> None:
    """Twice the price; few steps; a chain that stops short of the data pays nothing."""
    s, steps = 0.5, 400_000

    def cost(c: Chain, kind: str) -> float:
        k = torch.arange(c.last + 1, c.steps + 1)
        ratio_snr = (c.a / c.b) ** 2
        r = (1 + s**2 * ratio_snr[k - 1]) / (1 + s**2 * ratio_snr[k])
        low = (c.b[k - 1] / c.b[k]) ** 2 * c.beta[k]
        ratio = r * low / (low if kind == "posterior" else c.beta[k])
        return float((ratio - 1 - ratio.log()).sum() / 2)

    whole = Chain(paths.vp("cosine"), steps, start=0.001)
    costs = [cost(whole, kind) for kind in ("posterior", "forward")]
    nb.check("prop-posterior-price", costs, [EULER / 2, 0.0], atol=2e-3)
    schedule = paths.LearnedSchedule(-7.0, 7.0, hidden=8).double()
    short = cost(Chain(paths.vp(schedule), 4000), "posterior")
    few = cost(Chain(paths.vp("cosine"), 5, start=0.001), "forward")
    for got, expected in ((costs[0], EULER), (costs[1], EULER / 2), (short, EULER / 2), (few, 0.0)):
        with pytest.raises(CheckFailed, match="prop-posterior-price"):
            nb.check("prop-posterior-price", got, expected, atol=2e-3)
    nb.check("prop-posterior-price", short, 0.0, atol=2e-2)


def test_thm_schedule_invariance() -> None:
    """Other ends; the weight without the derivative; the printed sign; a sum at the cleaner end, which rises."""
    t = torch.linspace(0, 1, 100_001, dtype=DOUBLE)
    value = 0.5 * math.log((1 + math.exp(6)) / (1 + math.exp(-6)))

    def loss(log_snr: Tensor) -> Tensor:
        ratio = log_snr.exp()
        return (ratio.diff() / (1 + (ratio[1:] + ratio[:-1]) / 2)).sum() / 2

    torch.manual_seed(3)
    learned = paths.LearnedSchedule(-6.0, 6.0, hidden=32).double()
    with torch.no_grad():
        shapes = [12 * t - 6, 12 * (3 * t**2 - 2 * t**3) - 6, learned(t)]
    for log_snr in shapes:
        nb.check("thm-schedule-invariance", loss(log_snr), value, atol=1e-5)
        for broken in (loss(log_snr * 1.05), loss(-log_snr), (1 / (1 + log_snr.exp())).mean() / 2):
            with pytest.raises(CheckFailed, match="thm-schedule-invariance"):
                nb.check("thm-schedule-invariance", broken, value, atol=1e-5)
    upper, lower = [], []
    for steps in (5, 10, 20, 40):
        c = Chain(paths.vp(learned), steps)
        ratio = (c.a / c.b) ** 2
        jump = ratio[:-1] - ratio[1:]
        upper.append(float((jump / (1 + ratio[1:])).sum() / 2))
        lower.append(float((jump / (1 + ratio[:-1])).sum() / 2))
    nb.check_bound("thm-schedule-invariance", [*upper[1:], value], upper)
    with pytest.raises(CheckFailed, match="thm-schedule-invariance"):
        nb.check_bound("thm-schedule-invariance", [*lower[1:], value], lower)


def test_prop_low_discrepancy() -> None:
    """Independent times; a grid without offset; offsets drawn anew in each cell (stratified)."""
    n, m = 16, 20_000
    generator = torch.Generator().manual_seed(0)
    predicted = (math.exp(3) - 1) ** 2 / (12 * n**2)
    truth = (math.exp(3) - 1) / 3

    def ratio(u: Tensor) -> Tensor:
        return (((3 * u).exp().mean(1) - truth).square() / predicted).mean()

    cells = torch.arange(n, dtype=DOUBLE) / n
    one = torch.rand(m, 1, dtype=DOUBLE, generator=generator)
    nb.check("prop-low-discrepancy", ratio((one + cells) % 1), 1.0, atol=0.03)
    each = torch.rand(m, n, dtype=DOUBLE, generator=generator)
    for broken in (each, (0 * one + cells) % 1, cells + each / n):
        with pytest.raises(CheckFailed, match="prop-low-discrepancy"):
            nb.check("prop-low-discrepancy", ratio(broken), 1.0, atol=0.03)


def test_prop_flat_schedule() -> None:
    """The rate proportional to the inverse of M itself, to its root, or constant, does not reach the bound."""
    level = torch.linspace(-6, 6, 4001, dtype=DOUBLE)
    moment = 0.75 * (1 + (-level).exp()) ** -2 * (1 + 0.5 * level.cos())  # any positive function
    least = torch.trapezoid(moment.sqrt(), level) ** 2

    def second_moment(rate: Tensor) -> Tensor:
        """E f^2 = integral of rate * M over the levels, the rate scaled so that the time is one in all."""
        rate = rate * torch.trapezoid(1 / rate, level)
        return torch.trapezoid(rate * moment, level)

    nb.check("prop-flat-schedule", second_moment(moment**-0.5), least, rtol=1e-9)
    for power in (0.0, -1.0, 0.5, -0.4):
        nb.check_bound("prop-flat-schedule", least, second_moment(moment**power))
        with pytest.raises(CheckFailed, match="prop-flat-schedule"):
            nb.check("prop-flat-schedule", second_moment(moment**power), least, rtol=2e-3)

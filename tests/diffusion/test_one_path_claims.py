"""Every claim of the chapter on one path: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import diffusion, dynamics, flow_matching, paths
from nblib.errors import CheckFailed
from nblib.field import FieldModel
from nblib.networks import TimeMLP
from nblib.paths import Path

DOUBLE = torch.float64
Field = Callable[[Tensor, float], Tensor]
EVERY = [paths.linear(), paths.vp(), paths.ve(), paths.sub_vp(), paths.trigonometric()]
VP, LINEAR = paths.vp(), paths.linear()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


TARGET = nb.data.toy.GaussianMixture(2 * noise(4, 2, seed=5), tensor([0.4, 0.3, 0.5, 0.6]))
SPOT = nb.data.toy.GaussianMixture(tensor([[1.0, -0.5]]), tensor([0.0]))
POINTS = 1.5 * noise(200, 2)


def ab(path: Path, t: float) -> tuple[float, float]:
    return float(path.a(tensor(t))), float(path.b(tensor(t)))


def mean_of(path: Path, data: nb.data.toy.GaussianMixture = TARGET) -> Field:
    return lambda x, t: paths.posterior_mean(data, path, x, t)


def field_of(path: Path) -> Field:
    return lambda x, t: paths.posterior_mean(TARGET, path, x, t, to="velocity")


def exact_four(path: Path, x: Tensor, t: float) -> dict[str, Tensor]:
    four = {k: paths.posterior_mean(TARGET, path, x, t, to=k) for k in paths.PREDICTIONS}
    y = x.detach().requires_grad_()
    score = torch.autograd.grad(paths.marginal(TARGET, path, t).log_prob(y).sum(), y)[0]
    return four | {"score": score}


def between(path: Path, low: float, high: float, steps: int, kind: str = "log-snr") -> list[float]:
    start, end = (float(path.time_of_log_snr(v)) for v in (low, high))
    return dynamics.times(steps, kind, path=path, start=start, end=end)


def fails(label: str, got: object, expected: object, **how: float) -> None:
    with pytest.raises(CheckFailed, match=label):
        nb.check(label, got, expected, **how)


def test_eq_one_loss() -> None:
    """The index of DDPM off by one, its bars lost; the weight of NCSN; the direction of a flow."""
    torch.manual_seed(0)
    batch = TARGET.sample(256, generator=torch.Generator().manual_seed(1))

    def draws(m: FieldModel) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(3)
        eps = torch.randn(batch.shape, dtype=DOUBLE, generator=g)
        return eps, m.times.draw(len(batch), m.path, m.span, like=batch, generator=g)

    def ours(m: FieldModel) -> Tensor:
        return m(batch, generator=torch.Generator().manual_seed(3)).loss.detach()

    def fresh() -> TimeMLP:
        net = TimeMLP(2, hidden=16, layers=1)
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
        return net

    ddpm = diffusion.ddpm(fresh(), (2,)).double()

    def simple(shift: int = 0, bars: bool = True) -> Tensor:
        eps, t = draws(ddpm)
        k = paths.ddpm_index(t, 1000)
        assert isinstance(k, Tensor)
        betas = paths.ddpm_betas(ddpm.path, 1000)
        bar = ((1 - betas).cumprod(0) if bars else 1 - betas)[(k - 1 + shift).clamp(0, 999), None]
        return (eps - ddpm.network(bar.sqrt() * batch + (1 - bar).sqrt() * eps, t)).square().sum(1).mean().detach()

    nb.check("eq-one-loss", ours(ddpm), simple(), rtol=1e-9)
    for bad in (simple(shift=-1), simple(bars=False)):
        fails("eq-one-loss", ours(ddpm), bad, rtol=1e-9)
    ncsn = diffusion.ncsn(fresh(), (2,)).double()
    eps, t = draws(ncsn)
    sigma = 0.01 ** t[:, None]
    for power, right in ((1, True), (0, False), (2, False)):
        error = sigma**power * (ncsn.network(batch + sigma * eps, t) + eps / sigma)
        theirs = error.square().sum(1).mean().detach()
        if right:
            nb.check("eq-one-loss", ours(ncsn), theirs, rtol=1e-9)
        else:
            fails("eq-one-loss", ours(ncsn), theirs, rtol=1e-9)
    flow = flow_matching.cfm(fresh(), (2,)).double()
    eps, t = draws(flow)
    s = t[:, None]
    for aim, start, right in ((batch - eps, s, True), (eps - batch, s, False), (batch - eps, 1 - s, False)):
        error = aim - flow.network(start * batch + (1 - start) * eps, t)
        theirs = error.square().sum(1).mean().detach()
        if right:
            nb.check("eq-one-loss", ours(flow), theirs, rtol=1e-9)
        else:
            fails("eq-one-loss", ours(flow), theirs, rtol=1e-9)


def test_eq_two_clocks() -> None:
    """Every sign of a rate turned; the score and the noise are not to be turned."""
    t, tau = 0.3, tensor(0.7)
    four, beta = exact_four(VP, POINTS, t), 0.1 + 19.9 * tau
    drift = -0.5 * beta * (POINTS + four["score"])
    nb.check("eq-two-clocks", drift, -four["velocity"], atol=1e-9, rtol=1e-9)
    for bad in (four["velocity"], -0.5 * four["velocity"]):
        fails("eq-two-clocks", drift, bad, atol=1e-9, rtol=1e-9)
    fails("eq-two-clocks", -0.5 * beta * (POINTS - four["score"]), -four["velocity"], atol=1e-9, rtol=1e-9)
    trig = paths.trigonometric()
    data, eps = noise(5, 2, seed=1), noise(5, 2, seed=2)
    a, b = ab(trig, t)
    right = -2 / math.pi * trig.velocity(data, eps, t)
    nb.check("eq-two-clocks", a * eps - b * data, right, atol=1e-9)
    for bad in (b * eps - a * data, b * data - a * eps, a * eps + b * data):
        fails("eq-two-clocks", bad, right, atol=1e-9)
    nb.check("eq-two-clocks", eps - data, -LINEAR.velocity(data, eps, t), atol=1e-9)
    fails("eq-two-clocks", eps - data, LINEAR.velocity(data, eps, t), atol=1e-9)


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.name)
def test_prop_conversions(path: Path) -> None:
    """Signs, b for b², a and b exchanged, the rates exchanged, the determinant lost."""
    x, t = POINTS, 0.45
    four = exact_four(path, x, t)
    a, b, da, db = (float(c) for c in path.coefficients(t, x))
    delta = da * b - a * db
    d, e, s, v = (four[k] for k in paths.PREDICTIONS)
    right = {
        "data": ((x - b * e) / a, (x + b**2 * s) / a, (b * v - db * x) / delta),
        "noise": ((x - a * d) / b, -b * s, (da * x - a * v) / delta),
        "score": (-e / b,),
        "velocity": ((db * x + delta * d) / b, (da * x - delta * e) / a, (da * x + b * delta * s) / a),
    }
    wrong = {
        "data": ((x + b * e) / a, (x - b**2 * s) / a, (x + 2 * b**2 * s) / a, (db * x - b * v) / delta),
        "noise": ((x + a * d) / b, b * s, (a * v - da * x) / delta),
        "score": (e / b, -e / b / 2),
        "velocity": ((db * x - delta * d) / b, (da * x + delta * e) / a, (da * x - b * delta * s) / a),
    }
    if abs(delta - 1) > 1e-6:
        wrong["data"] += (b * v - db * x,)
    for kind, values in right.items():
        for value in values:
            nb.check("prop-conversions", value, four[kind], atol=1e-9, rtol=1e-9)
        for value in wrong[kind]:
            fails("prop-conversions", value, four[kind], atol=1e-9, rtol=1e-9)
    for source, goal in itertools.product(paths.PREDICTIONS, repeat=2):
        value = path.convert(four[source], x, t, source=source, target=goal)
        nb.check("prop-conversions", value, four[goal], atol=1e-9, rtol=1e-9)


class Reading(nn.Module):
    def __init__(self, network: nn.Module, path: Path, to: str) -> None:
        super().__init__()
        self.network, self.path, self.to = network, path, to

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.path.convert(self.network(x, t, condition), x, t, source="noise", target=self.to)


def test_thm_error_units() -> None:
    """A unit not squared, upside down, of another prediction; another network."""
    torch.manual_seed(0)
    net = TimeMLP(2, hidden=16, layers=1).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    batch = TARGET.sample(200, generator=torch.Generator().manual_seed(1))

    def loss(kind: str, weight: str | Callable[[Tensor], Tensor], network: nn.Module = net) -> Tensor:
        model = FieldModel(Reading(network, VP, kind), VP, shape=(2,), predict=kind, weight=weight, span=(0.05, 0.95))
        return model(batch, generator=torch.Generator().manual_seed(0)).loss.detach()

    def units(t: Tensor) -> dict[str, Tensor]:
        a, b, da, db = VP.coefficients(t, t)
        return {"data": b, "noise": a, "score": a / b, "velocity": da * b - a * db}

    for own, kind in itertools.product(paths.PREDICTIONS, repeat=2):
        first = loss("noise", own)
        nb.check("thm-error-units", loss(kind, own), first, atol=0, rtol=1e-9)
        by_hand = loss(kind, lambda t, p=own, q=kind: (units(t)[p] / units(t)[q]) ** 2)
        nb.check("thm-error-units", by_hand, first, atol=0, rtol=1e-9)
        if own != kind:
            for power in (0, 1, -2):
                bad = loss(kind, lambda t, p=own, q=kind, k=power: (units(t)[p] / units(t)[q]) ** k)
                fails("thm-error-units", bad, first, atol=0, rtol=1e-9)
    other = TimeMLP(2, hidden=16, layers=1).double()
    fails("thm-error-units", loss("data", "data", other), loss("noise", "data"), atol=0, rtol=1e-9)


@pytest.mark.parametrize("there", EVERY, ids=lambda p: p.name)
def test_thm_one_path(there: Path) -> None:
    """The scale forgotten or inverted, equal times for equal ratios, a field only rescaled, its clock lost."""
    s = 0.6
    t = float(VP.time_of_log_snr(there.log_snr(s)))
    a, b, da, db = (float(v) for v in VP.coefficients(t, POINTS))
    p, q, dp, dq = (float(v) for v in there.coefficients(s, POINTS))
    c, clock = q / b, (dp / p - dq / q) / (da / a - db / b)
    here, found = exact_four(VP, POINTS, t), exact_four(there, c * POINTS, s)
    rate = dq / b - q * db * clock / b**2

    def same(claim: dict[str, Tensor], truth: dict[str, Tensor] = found) -> tuple[Tensor, Tensor]:
        return torch.stack([claim[k] for k in paths.PREDICTIONS]), torch.stack([truth[k] for k in paths.PREDICTIONS])

    right = here | {"score": here["score"] / c, "velocity": rate * POINTS + c * clock * here["velocity"]}
    nb.check("thm-one-path", *same(right), atol=1e-9, rtol=1e-9)
    if there.name == "vp":  # onto itself: nothing to get wrong
        return
    wrong = [
        right | {"velocity": rate * POINTS + c * here["velocity"]},
        right | {"velocity": here["velocity"]},
    ]
    if abs(c - 1) > 1e-6:  # the quarter circle has the scale of VP
        wrong += [right | {"score": here["score"]}, right | {"score": here["score"] * c}]
        wrong += [right | {"velocity": c * clock * here["velocity"]}]
        fails("thm-one-path", *same(right, exact_four(there, POINTS, s)), atol=1e-9, rtol=1e-9)
    for bad in wrong:
        fails("thm-one-path", *same(bad), atol=1e-9, rtol=1e-9)
    fails("thm-one-path", exact_four(VP, POINTS, s)["data"], found["data"], atol=1e-9, rtol=1e-9)


def test_thm_one_path_trajectories() -> None:
    """The flows of all paths send a noise to one point; from the same state, unscaled, they do not."""
    z = noise(20, 2, seed=3)

    def land(path: Path, scaled: bool) -> Tensor:
        grid = between(path, -7, 7, 60)
        start = ab(path, grid[0])[1] * z if scaled else z
        return dynamics.ode(field_of(path), start, grid, method="rk4") / ab(path, grid[-1])[0]

    truth = land(VP, True)
    for path in (LINEAR, paths.ve(), paths.sub_vp()):
        nb.check("thm-one-path", land(path, True), truth, atol=1e-3)
    fails("thm-one-path", land(paths.ve(), False), truth, atol=1e-3)


def test_thm_chord() -> None:
    """Euler in t on VP or VE; the clock t for σ; the score for the noise; a grid of other ratios."""
    start, grid = noise(50, 2), between(VP, -6, 6, 8, "uniform")
    straight = [float(LINEAR.time_of_log_snr(VP.log_snr(s))) for s in grid]
    by_ddim = dynamics.ddim(VP, mean_of(VP), start, grid)
    (a, _), (a1, _), (c, _) = ab(VP, grid[0]), ab(VP, grid[-1]), ab(LINEAR, straight[0])

    def in_sigma(to: str = "noise", clock: bool = True) -> Tensor:
        y = start / a
        for s, end in itertools.pairwise(grid):
            (p, q), (p1, q1) = ab(VP, s), ab(VP, end)
            y = y + (q1 / p1 - q / p if clock else end - s) * paths.posterior_mean(TARGET, VP, p * y, s, to=to)
        return a1 * y

    nb.check("thm-chord", in_sigma(), by_ddim, atol=1e-10)
    by_euler = dynamics.ode(field_of(LINEAR), c / a * start, straight)
    nb.check("thm-chord", a1 / straight[-1] * by_euler, by_ddim, atol=1e-10)
    nb.check("thm-chord", dynamics.multistep(VP, mean_of(VP), start, grid, 1), by_ddim, atol=1e-10)
    uniform = dynamics.times(8, start=straight[0], end=straight[-1])
    for bad in (
        dynamics.ode(field_of(VP), start, grid),
        in_sigma("score"),
        in_sigma(clock=False),
        a1 / straight[-1] * dynamics.ode(field_of(LINEAR), c / a * start, uniform),
        dynamics.multistep(VP, mean_of(VP), start, grid, 2),
    ):
        fails("thm-chord", bad, by_ddim, atol=1e-10)


def test_thm_variation() -> None:
    """The clock log ρ or b/a, the velocity for the mean; a leap that is not exact; the order of the sum of errors."""
    middle, width, z = 1.5, 0.4, noise(20, 1)
    nodes, node_weights = map(torch.tensor, np.polynomial.legendre.leggauss(60))
    for path in EVERY:
        ends = torch.stack([path.time_of_log_snr(v) for v in (-3.0, 4.0)])
        a, b = path.a(ends), path.b(ends)
        r = torch.sqrt((a * width) ** 2 + b**2)
        low, high = (a / b).tolist()
        rho = (low + high) / 2 + (high - low) / 2 * nodes
        d = middle + rho * width**2 / torch.sqrt(rho**2 * width**2 + 1) * z
        change = ((a * middle + r * z) / b).diff()[:, 0]
        step = (high - low) / 2 * node_weights
        nb.check("thm-variation", change, (d * step).sum(1), atol=1e-9)
        for bad in ((d / rho * step).sum(1), (d * step / rho**2).sum(1), (middle * step).sum() + 0 * z[:, 0]):
            fails("thm-variation", change, bad, atol=1e-9)
    x1, x0 = SPOT.means.expand(50, -1), noise(50, 2, seed=2)
    at = VP.sample(x1, x0, 0.1)
    nb.check("thm-variation", dynamics.ddim(VP, mean_of(VP, SPOT), at, [0.1, 0.7]), VP.sample(x1, x0, 0.7), atol=1e-12)
    tangent = dynamics.ode(lambda x, t: paths.posterior_mean(SPOT, VP, x, t, to="velocity"), at, [0.1, 0.7])
    fails("thm-variation", tangent, VP.sample(x1, x0, 0.7), atol=1e-12)
    nb.check("thm-variation", order_of(1), 1, atol=0.2)
    fails("thm-variation", order_of(2), 1, atol=0.2)


@functools.cache
def reference() -> tuple[Tensor, Tensor]:
    start = noise(30, 2)
    return start, dynamics.ode(field_of(VP), start, between(VP, -4, 4, 200), method="rk4")


def order_of(order: int, guess: Callable[[Tensor, Tensor | None, float], Tensor] | None = None) -> float:
    """The measured order of the package's multistep method, or of one with another extrapolation."""
    start, truth = reference()
    errors = []
    for steps in (60, 120):
        grid = between(VP, -4, 4, steps)
        if guess is None:
            x = dynamics.multistep(VP, mean_of(VP), start, grid, order)
        else:
            x, before = start, None
            for s, end in itertools.pairwise(grid):
                (a, b), (a1, b1) = ab(VP, s), ab(VP, end)
                now = mean_of(VP)(x, s)
                x, before = b1 / b * x + (a1 - a * b1 / b) * guess(now, before, 1.0), now
        errors.append(float((x - truth).square().mean().sqrt()))
    return math.log2(errors[0] / errors[1])


def test_prop_multistep() -> None:
    """Order 1; a whole step of extrapolation, none, or backwards."""
    nb.check("prop-multistep", order_of(2), 2, atol=0.2)

    def by(factor: float) -> Callable[[Tensor, Tensor | None, float], Tensor]:
        return lambda now, before, _: now if before is None else now + factor * (now - before)

    nb.check("prop-multistep", order_of(2, by(0.5)), 2, atol=0.2)
    for factor in (0.0, 1.0, -0.5):
        fails("prop-multistep", order_of(2, by(factor)), 2, atol=0.2)


def test_thm_ddim_family() -> None:
    """Variances not taken out of the old noise, of the noising step for that of the posterior; a wrong chain."""
    t0, t1 = 0.4, 0.55
    (a, b), (a1, b1) = ab(VP, t0), ab(VP, t1)
    r = a / a1
    joint = tensor([[b1**2, r * b1**2], [r * b1**2, b**2]])
    slope, variance = joint[0, 1] / joint[1, 1], torch.linalg.det(joint) / joint[1, 1]
    beta = b**2 - (a * b1 / a1) ** 2
    s = b1 / b * math.sqrt(beta)
    nb.check("thm-ddim-family", variance, s**2, atol=1e-12)
    nb.check("thm-ddim-family", slope, math.sqrt(b1**2 - s**2) / b, atol=1e-12)
    for bad in (beta, s, b1**2 / b**2 * (b**2 - b1**2)):
        fails("thm-ddim-family", variance, bad, atol=1e-12)
    for bad in (b1 / b, math.sqrt(b1**2 - beta) / b):
        fails("thm-ddim-family", slope, bad, atol=1e-12)
    grid, n = dynamics.times(6, start=0.2, end=0.95), 5000
    origin = SPOT.means.expand(n, -1)

    def moments(states: list[Tensor], i: int) -> tuple[Tensor, Tensor]:
        gap = states[i] - ab(VP, grid[i])[0] * SPOT.means
        return torch.cat([gap, gap**2], 1), tensor([0.0, 0, 1, 1]) * ab(VP, grid[i])[1] ** 2

    for eta in (0.0, 0.5, 1.0):
        states = [VP.sample(origin, noise(n, 2, seed=4), 0.2)]
        g = torch.Generator().manual_seed(1)
        dynamics.ddim(
            VP,
            mean_of(VP, SPOT),
            states[0],
            grid,
            eta=eta,
            generator=g,
            callback=lambda i, t, x, kept=states: kept.append(x),
        )
        nb.check_mc("thm-ddim-family", *moments(states, 4))
    states = [VP.sample(origin, noise(n, 2, seed=4), 0.2)]
    for i, (t, end) in enumerate(itertools.pairwise(grid[:5])):  # all of the old noise, and the new on top
        (a, b), (a1, b1) = ab(VP, t), ab(VP, end)
        s = b1 / b * math.sqrt(b**2 - (a * b1 / a1) ** 2)
        old = (states[-1] - a * SPOT.means) / b
        states.append(a1 * SPOT.means + b1 * old + s * noise(n, 2, seed=10 + i))
    with pytest.raises(CheckFailed, match="thm-ddim-family"):
        nb.check_mc("thm-ddim-family", *moments(states, 4))


def test_prop_ddim_objective() -> None:
    """The factor ½, the variance for the standard deviation, the weight of the data's error, that of DDPM's mean."""
    (a, b), (a1, b1) = ab(VP, 0.4), ab(VP, 0.55)
    x1, x0, guess = (noise(40, 2, seed=k) for k in (1, 2, 3))
    x = a * x1 + b * x0
    error = (x0 - (x - a * guess) / b).square().sum(1)
    for s in (0.05, 0.2, 0.9 * b1):
        k = math.sqrt(b1**2 - s**2)
        mean, other = (a1 * d + k * (x - a * d) / b for d in (x1, guess))
        kl = nb.probability.gaussian_kl(mean, torch.full_like(x, s), other, s)
        gamma = (a1 * b / a - k) ** 2 / (2 * s**2)
        nb.check("prop-ddim-objective", kl, gamma * error, rtol=1e-10)
        for bad in (
            2 * gamma * error,
            gamma * s * error,
            gamma * (x1 - guess).square().sum(1),
            (a1 * b / a - b1) ** 2 / (2 * s**2) * error,
        ):
            fails("prop-ddim-objective", kl, bad, rtol=1e-10)


def test_prop_reverse_mixture() -> None:
    """One Gaussian, prior weights, the variance of the noising step, the ratio inverted; and the number of modes."""
    two = nb.data.toy.GaussianMixture(tensor([[-1.0], [1.0]]), tensor([0.25, 0.25]))
    line = torch.linspace(-9, 9, 3601, dtype=DOUBLE)
    m, var = two.means[:, 0], two.covs[:, 0, 0]
    modes = []
    for t, end in ((0.45, 0.5), (0.45, 0.6), (0.45, 0.95)):
        (a, b), (a1, b1) = ab(VP, t), ab(VP, end)
        wide, narrow, r = a**2 * var + b**2, a1**2 * var + b1**2, a / a1
        beta = b**2 - (r * b1) ** 2
        bayes = paths.marginal(two, VP, end).log_prob(line[:, None]) - (0.1 - r * line) ** 2 / (2 * beta)
        bayes = bayes.exp() / (bayes.exp().sum() * (line[1] - line[0]))
        share = (two.weights.log() - 0.5 * (0.1 - a * m) ** 2 / wide - 0.5 * wide.log()).softmax(0)
        means, variance = a1 * m + r * narrow / wide * (0.1 - a * m), narrow - (r * narrow) ** 2 / wide

        def density(w: Tensor, mean: Tensor, v: Tensor) -> Tensor:
            each = nb.probability.gaussian_log_prob(line[:, None], mean, v.sqrt())
            return (w * each.exp()).sum(1)

        right = density(share, means, variance)
        nb.check("prop-reverse-mixture", right, bayes, atol=1e-9)
        mean = (share * means).sum()
        spread = (share * (variance + (means - mean) ** 2)).sum()
        for bad in (
            density(torch.ones(1, dtype=DOUBLE), mean[None], spread[None]),
            density(two.weights, means, variance),
            density(share, means, narrow - r * narrow**2 / wide),
            density(share, a1 * m + narrow / wide * (0.1 - a * m), variance),
            density(share, means, torch.full_like(variance, beta)),
        ):
            fails("prop-reverse-mixture", bad, bayes, atol=1e-9)
        modes.append(int(((right[1:-1] > right[:-2]) & (right[1:-1] > right[2:])).sum()))
    nb.check("eq-reverse-step", modes, [1, 1, 2])
    fails("eq-reverse-step", modes, [1, 1, 1])

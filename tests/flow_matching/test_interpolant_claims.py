"""Every claim of the chapter on stochastic interpolants: its check passes on the claim, fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

import nblib as nb
from nblib import dynamics, paths
from nblib.data.toy import GaussianMixture
from nblib.errors import CheckFailed
from nblib.paths import Path

DOUBLE = torch.float64
Field = Callable[[Tensor, float], Tensor]
LINE, ARC = paths.linear(), paths.trigonometric()
HALF = math.pi / 2


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def mix(means: list[float], stds: list[float], weights: list[float]) -> GaussianMixture:
    return GaussianMixture(tensor(means)[:, None], tensor(stds), tensor(weights))


LEFT = mix([-1.5, 1.0], [0.6, 0.4], [0.4, 0.6])
RIGHT = mix([-2.5, 0.0, 2.0], [0.4, 0.5, 0.3], [0.3, 0.3, 0.4])
UNIT, BROAD = mix([0.0], [1.0], [1.0]), mix([0.0], [3.0], [1.0])
POINTS = 1.5 * noise(200, 2)
TILTED = tensor([[[1.0, 0.6], [0.6, 0.5]], [[0.2, 0.0], [0.0, 1.5]]])
SLANT = GaussianMixture(tensor([[-1.5, 1.0], [1.0, -0.5]]), TILTED, tensor([0.3, 0.7]))
RING = nb.data.toy.make("eight-gaussians")
assert isinstance(RING, GaussianMixture)
TIMES, WEIGHTS = ((torch.tensor(v) + s) / 2 for v, s in zip(np.polynomial.legendre.leggauss(40), (1.0, 0.0)))


def silent(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def bridge(t: Tensor) -> Tensor:
    return (2 * t * (1 - t)).sqrt()


def density(p0: GaussianMixture, p1: GaussianMixture, path: Path, t: Tensor, gamma: object = silent) -> GaussianMixture:
    a, b, *_ = path.coefficients(t, tensor([1.0]))
    g = gamma(t)  # type: ignore[operator]
    means = a * p1.means + b * p0.means[:, None]
    covs = a**2 * p1.covs + b**2 * p0.covs[:, None] + g**2 * torch.eye(p0.dim, dtype=DOUBLE)
    return GaussianMixture(means.flatten(0, 1), covs.flatten(0, 1), (p0.weights[:, None] * p1.weights).flatten())


def velocity(
    x: Tensor,
    t: float | Tensor,
    p0: GaussianMixture = SLANT,
    p1: GaussianMixture = RING,
    path: Path = LINE,
    gamma: Callable[[Tensor], Tensor] = silent,
    broken: str = "",
) -> Tensor:
    now = torch.as_tensor(t, dtype=DOUBLE)
    a, b, da, db = path.coefficients(now, tensor([1.0]))
    g, dg = jvp(gamma, now, create_graph=True)
    law = density(p0, p1, path, now, gamma)
    rates = (da * p1.means + db * p0.means[:, None]).flatten(0, 1)
    half = (a * da * p1.covs + b * db * p0.covs[:, None]).flatten(0, 1)
    if broken == "rates of the variance":
        half = (da**2 * p1.covs + db**2 * p0.covs[:, None]).flatten(0, 1)
    if broken != "noise at rest":
        half = half + g * dg * torch.eye(p0.dim, dtype=DOUBLE)
    gap = x[:, None] - law.means
    pull = torch.linalg.solve(law.covs, gap[..., None])[..., 0]
    joint = law.weights.log() - 0.5 * ((gap * pull).sum(-1) + torch.logdet(law.covs))
    if broken == "prior weights":
        joint = law.weights.log().expand_as(joint)
    inside = rates + (0 if broken == "means only" else 1) * torch.einsum("kij,mkj->mki", half, pull)
    return (joint.softmax(1)[..., None] * inside).sum(1)


def residual(log_p: Callable[[Tensor, Tensor], Tensor], u: Callable[..., Tensor], x: Tensor, t: float) -> Tensor:
    now = tensor(t)
    rate = jvp(lambda s: log_p(x, s), now)[1]
    x = x.detach().requires_grad_()
    v = u(x, now)
    (score,) = torch.autograd.grad(log_p(x, now).sum(), x)
    rows = [torch.autograd.grad(c.sum(), x, retain_graph=True)[0] for c in v.unbind(-1)]
    return rate + torch.stack([row[:, j] for j, row in enumerate(rows)]).sum(0) + (v * score).sum(-1)


@pytest.mark.parametrize("path", [LINE, ARC], ids=["line", "arc"])
def test_prop_mixture_pairs(path: Path) -> None:
    """Weights before x is seen, no spread, rates squared instead of halved, the path of the other interpolant."""

    def log_p(x: Tensor, t: Tensor) -> Tensor:
        return density(SLANT, RING, path, t).log_prob(x)

    right = partial(velocity, path=path)
    nb.check("prop-mixture-pairs", residual(log_p, right, POINTS, 0.4), 0.0, atol=1e-9)
    other = ARC if path is LINE else LINE
    wrong = [partial(right, broken=b) for b in ("prior weights", "means only", "rates of the variance")]
    wrong += [partial(velocity, path=other), partial(velocity, path=path, p0=RING, p1=SLANT)]
    for bad in wrong:
        with pytest.raises(CheckFailed, match="prop-mixture-pairs"):
            nb.check("prop-mixture-pairs", residual(log_p, bad, POINTS, 0.4), 0.0, atol=1e-9)


NODES = torch.linspace(-6, 5, 1001, dtype=DOUBLE)
MASS = LEFT.log_prob(NODES[:, None]).exp() * (NODES[1] - NODES[0])


def bent(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    return (1 - t) * x0 + t * (1 + 0.8 * (1 - t) * x0.tanh()) * x1


def bent_rate(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    return -x0 + (1 + 0.8 * (1 - 2 * t) * x0.tanh()) * x1


def bent_law(
    x: Tensor, t: Tensor | float, rate: Callable[..., Tensor] = bent_rate, jacobian: bool = True
) -> tuple[Tensor, Tensor]:
    slope = t * (1 + 0.8 * (1 - t) * NODES.tanh())
    x1 = (x - (1 - t) * NODES) / slope
    weight = MASS * RIGHT.log_prob(x1[..., None]).exp() / (slope if jacobian else 1)
    return weight.sum(1), (weight * rate(NODES, x1, t)).sum(1)


def test_thm_interpolant_current() -> None:
    """The displacement for the rate, the density without its Jacobian, another coupling; and particles that arrive."""
    line = torch.linspace(-2.5, 2.0, 60, dtype=DOUBLE)[:, None]

    def log_p(x: Tensor, t: Tensor, **how: object) -> Tensor:
        return bent_law(x, t, **how)[0].log()  # type: ignore[arg-type]

    def field(x: Tensor, t: Tensor, **how: object) -> Tensor:
        p, current = bent_law(x, t, **how)  # type: ignore[arg-type]
        return (current / p)[:, None]

    nb.check("thm-interpolant-current", residual(log_p, field, line, 0.3), 0.0, atol=1e-8)
    displacement = partial(field, rate=lambda x0, x1, t: x1 - x0)
    forgotten = partial(field, rate=lambda x0, x1, t: -x0 + (1 + 0.8 * (1 - t) * x0.tanh()) * x1)
    for bad in (displacement, forgotten, partial(field, jacobian=False)):
        with pytest.raises(CheckFailed, match="thm-interpolant-current"):
            nb.check("thm-interpolant-current", residual(log_p, bad, line, 0.3), 0.0, atol=1e-8)
    gap = residual(partial(log_p, jacobian=False), field, line, 0.3)
    with pytest.raises(CheckFailed, match="thm-interpolant-current"):
        nb.check("thm-interpolant-current", gap, 0.0, atol=1e-8)
    start = SLANT.sample(800, generator=torch.Generator().manual_seed(1))
    for u, holds in ((velocity, True), (partial(velocity, broken="prior weights"), False)):
        x = dynamics.ode(u, start, dynamics.times(20), method="rk4")
        squares = torch.stack([x[:, 0] * x[:, 1], x[:, 0] ** 2], 1)
        if holds:
            nb.check_mc("thm-interpolant-current", squares, RING.cov[0].flip(0))
        else:
            with pytest.raises(CheckFailed, match="thm-interpolant-current"):
                nb.check_mc("thm-interpolant-current", squares, RING.cov[0].flip(0))


def test_thm_quadratic_objective() -> None:
    """The factor 2, its sign, the regression constant added, the distance to another velocity."""
    torch.manual_seed(3)
    net, t = nb.nets.MLP([1, 16, 16, 1], "silu").double(), 0.5
    ends = torch.linspace(-6, 5, 300, dtype=DOUBLE)
    h = ends[1] - ends[0]
    mass = LEFT.log_prob(ends[:, None]).exp()[:, None] * RIGHT.log_prob(ends[:, None]).exp() * h**2
    with torch.no_grad():
        x, rate = bent(ends[:, None], ends, t), bent_rate(ends[:, None], ends, t)
        out = net(x.reshape(-1, 1)).view(x.shape)
        wide = torch.linspace(-9, 9, 1200, dtype=DOUBLE)[:, None]
        p, current = bent_law(wide, t)
        v, weight, w = current / p.clamp_min(1e-200), p * (wide[1] - wide[0]), net(wide)[:, 0]
    square, cross, constant = ((mass * term).sum() for term in (out**2, rate * out, rate**2))
    distance, least = (weight * (w - v) ** 2).sum(), (weight * v**2).sum()
    nb.check("thm-quadratic-objective", square - 2 * cross, distance - least, atol=1e-7)
    for bad in (square - cross, square + 2 * cross, square - 2 * cross + constant):
        with pytest.raises(CheckFailed, match="thm-quadratic-objective"):
            nb.check("thm-quadratic-objective", bad, distance - least, atol=1e-7)
    for bad in (distance + least, distance, (weight * (w - v / 2) ** 2).sum() - least):
        with pytest.raises(CheckFailed, match="thm-quadratic-objective"):
            nb.check("thm-quadratic-objective", square - 2 * cross, bad, atol=1e-7)


def action(path: Path, m0: Tensor, cov0: Tensor, m1: Tensor, cov1: Tensor) -> Tensor:
    a, b, da, db = (c[:, None, None] for c in path.coefficients(TIMES, TIMES))
    cov, half = b**2 * cov0 + a**2 * cov1, b * db * cov0 + a * da * cov1
    turn = torch.linalg.solve(cov, half)
    mean = da[..., 0] * m1 + db[..., 0] * m0
    return (WEIGHTS * (mean.square().sum(1) + torch.einsum("tij,tij->t", turn, cov @ turn))).sum()


def test_prop_two_actions() -> None:
    """The optimal cost for the line's, a dimension lost, the arc's means without their product, line for arc."""
    m0, m1, eye = tensor([1.0, -0.5, 0.2]), tensor([-0.7, 2.0, 1.0]), torch.eye(3, dtype=DOUBLE)
    s0, s1 = 0.5, 2.0
    shift, squares = (m1 - m0).square().sum(), m0.square().sum() + m1.square().sum()
    scale, product = 3 * (s1 - s0) ** 2, 3 * s0 * s1
    by_line, by_arc = (action(p, m0, s0**2 * eye, m1, s1**2 * eye) for p in (LINE, ARC))
    line = shift + scale + (2 - HALF) * product
    arc = HALF**2 / 2 * (squares + scale) - HALF * m0 @ m1
    nb.check("prop-two-actions", by_line, line, rtol=1e-9)
    nb.check("prop-two-actions", by_arc, arc, rtol=1e-9)
    for claim in (shift + scale, shift + scale + (2 - HALF) * product / 3, shift + scale + 2 * product, arc):
        with pytest.raises(CheckFailed, match="prop-two-actions"):
            nb.check("prop-two-actions", by_line, claim, rtol=1e-9)
    for claim in (HALF**2 / 2 * (squares + scale), HALF**2 / 2 * (shift + scale), HALF**2 * (squares + scale), line):
        with pytest.raises(CheckFailed, match="prop-two-actions"):
            nb.check("prop-two-actions", by_arc, claim, rtol=1e-9)
    nb.check("prop-two-actions", density(SLANT, SLANT, ARC, tensor(0.3)).cov, SLANT.cov, atol=1e-12)
    with pytest.raises(CheckFailed, match="prop-two-actions"):
        nb.check("prop-two-actions", density(SLANT, SLANT, LINE, tensor(0.3)).cov, SLANT.cov, atol=1e-12)


def test_prop_interpolant_score() -> None:
    """The tangent, no point beside the score, the angle without its half; another limit at the start."""
    t = 0.35
    v = paths.posterior_mean(RING, ARC, POINTS, t, to="velocity")
    x = POINTS.clone().requires_grad_()
    (score,) = torch.autograd.grad(paths.marginal(RING, ARC, t).log_prob(x).sum(), x)
    tangent = math.tan(HALF * t)
    nb.check("prop-interpolant-score", v, HALF / tangent * (POINTS + score), atol=1e-9)
    for bad in (
        HALF * tangent * (POINTS + score),
        HALF / tangent * score,
        HALF / tangent * (POINTS - score),
        HALF / math.tan(math.pi * t) * (POINTS + score),
        1 / tangent * (POINTS + score),
    ):
        with pytest.raises(CheckFailed, match="prop-interpolant-score"):
            nb.check("prop-interpolant-score", v, bad, atol=1e-9)
    plain = GaussianMixture(torch.zeros(1, 2, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE))
    off = GaussianMixture(RING.means + 1, RING.covs)
    early = velocity(POINTS, 1e-7, plain, off, ARC)
    nb.check("prop-interpolant-score", early, HALF * off.mean, atol=1e-5)
    for bad in (off.mean, HALF * (off.mean - POINTS), 0.0):
        with pytest.raises(CheckFailed, match="prop-interpolant-score"):
            nb.check("prop-interpolant-score", early, bad, atol=1e-5)


def test_prop_latent_score() -> None:
    """The noise without its rate, a density without the noise, the sign and the scale of the score."""

    def log_p(x: Tensor, t: Tensor, gamma: Callable[[Tensor], Tensor] = bridge) -> Tensor:
        return density(SLANT, RING, ARC, t, gamma).log_prob(x)

    right = partial(velocity, path=ARC, gamma=bridge)
    nb.check("prop-latent-score", residual(log_p, right, POINTS, 0.6), 0.0, atol=1e-9)
    for bad in (partial(right, broken="noise at rest"), partial(velocity, path=ARC)):
        with pytest.raises(CheckFailed, match="prop-latent-score"):
            nb.check("prop-latent-score", residual(log_p, bad, POINTS, 0.6), 0.0, atol=1e-9)
    rng = torch.Generator().manual_seed(2)
    x0, x1 = SLANT.sample(50_000, generator=rng), RING.sample(50_000, generator=rng)
    z, g = torch.randn(50_000, 2, dtype=DOUBLE, generator=rng), float(bridge(tensor(0.6)))
    x = ARC.sample(x1, x0, 0.6) + g * z
    law = density(SLANT, RING, ARC, tensor(0.6), bridge)
    tests = torch.cat([x.sin(), x.prod(1, keepdim=True).cos(), x / (1 + x**2)], 1)[:, None]
    nb.check_mc("prop-latent-score", (law.score(x) + z / g)[:, :, None] * tests, 0.0)
    for bad in (law.score(x) - z / g, law.score(x) + z, density(SLANT, RING, ARC, tensor(0.6)).score(x) + z / g):
        with pytest.raises(CheckFailed, match="prop-latent-score"):
            nb.check_mc("prop-latent-score", bad[:, :, None] * tests, 0.0)


def test_thm_wasserstein_bound() -> None:
    """No growth, the growth of the wrong side, an error without its root, a smaller constant than the best."""
    grid = dynamics.times(200)
    clock = tensor(grid)
    z = torch.linspace(-6, 6, 601, dtype=DOUBLE)
    weights = (-0.5 * z**2).exp() / (-0.5 * z**2).exp().sum()

    def running(values: Tensor) -> Tensor:
        return torch.cat([values[:1] * 0, torch.cumulative_trapezoid(values, clock)])

    def trace(u: Field) -> Tensor:
        states = [z[:, None]]
        dynamics.ode(u, z[:, None], grid, method="rk4", callback=lambda i, t, y: states.append(y))
        return torch.stack(states)[..., 0]

    def rate(t: float) -> float:  # of N(0, 1) to N(0, 9) on the arc
        return 8 * HALF * math.sin(HALF * t) * math.cos(HALF * t) / (1 + 8 * math.sin(HALF * t) ** 2)

    def true(x: Tensor, t: float) -> Tensor:
        return rate(t) * x

    truth = trace(true)
    for wrong, factor in ((lambda x, t: rate(t) * x + 0.2, 1.0), (lambda x, t: 1.05 * rate(t) * x, 1.05)):
        eps = torch.stack([(weights * (wrong(x, t) - true(x, t)) ** 2).sum() for x, t in zip(truth, grid)])
        distance = (weights * (trace(wrong) - truth) ** 2).sum(1).sqrt()
        growth = running(tensor([factor * rate(t) for t in grid]))
        bound = running((-growth).exp() * eps.sqrt()) * growth.exp()
        nb.check_bound("thm-wasserstein-bound", distance, bound, slack=1e-3)
        nb.check("thm-wasserstein-bound", distance, bound, atol=1e-3)  # attained: one direction, linear fields
        for bad in (running(eps.sqrt()), bound * (-growth).exp(), running((-growth).exp() * eps) * growth.exp()):
            with pytest.raises(CheckFailed, match="thm-wasserstein-bound"):
                nb.check_bound("thm-wasserstein-bound", distance, bad, slack=1e-3)
    k, c = 1.3, 0.7
    apart = (trace(lambda x, t: k * x + c * math.exp(k * (1 - t)))[-1] - trace(lambda x, t: k * x)[-1]).square().mean()
    best = math.expm1(2 * k) / (2 * k)
    gap = c**2 * best
    nb.check("thm-wasserstein-bound", apart, best * gap, rtol=1e-5)
    nb.check_bound("thm-wasserstein-bound", apart, math.exp(1 + 2 * k) * gap)
    for constant in (0.99 * best, 1.0, math.exp(k), math.expm1(k) / k):
        with pytest.raises(CheckFailed, match="thm-wasserstein-bound"):
            nb.check_bound("thm-wasserstein-bound", apart, constant * gap, slack=1e-3)


def test_thm_interpolant_bb() -> None:
    """Arcs in the data's own coordinates, another pair of coefficients, a cost that no path can have."""

    def phi0(z: Tensor) -> Tensor:
        return 0.8 * z - 1.5

    def phi1(z: Tensor) -> Tensor:
        return z + 1.5 * (3 * z).tanh()

    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    z, y, now = nodes[:, None], nodes[None], tensor(0.7)

    def mean_rate(angle: float) -> Tensor:
        """E[dI/dt | z_t] when z_t turns by angle * t; the ends are right for a quarter of a circle only."""
        cos, sin = math.cos(angle * 0.7), math.sin(angle * 0.7)
        z0, z1 = cos * z - sin * y, sin * z + cos * y

        def best(s: Tensor) -> Tensor:
            inner = (HALF * s).cos() * z0 + (HALF * s).sin() * z1
            return (1 - s) * phi0(inner) + s * phi1(inner)

        return (weights * jvp(best, now)[1]).sum(1)

    optimal = (phi1(z) - phi0(z))[:, 0]
    nb.check("thm-interpolant-bb", mean_rate(HALF), optimal, atol=1e-9)
    with pytest.raises(CheckFailed, match="thm-interpolant-bb"):  # not the law of the pair given x_t
        nb.check("thm-interpolant-bb", mean_rate(1.0), optimal, atol=1e-9)

    def straight(s: Tensor) -> Tensor:  # lines in z: the cloud of z_t shrinks, its velocity is not zero
        inner = (1 - s) * z0 + s * z1
        return (1 - s) * phi0(inner) + s * phi1(inner)

    var = 0.3**2 + 0.7**2
    z0 = 0.3 / var * z + 0.7 / math.sqrt(var) * y
    z1 = 0.7 / var * z - 0.3 / math.sqrt(var) * y
    with pytest.raises(CheckFailed, match="thm-interpolant-bb"):
        nb.check("thm-interpolant-bb", (weights * jvp(straight, now)[1]).sum(1), optimal, atol=1e-9)
    zero, two, mean = tensor([0.0, 0.0]), torch.eye(2, dtype=DOUBLE), tensor([2.0, 0.0])
    ideal = Path("even", a=lambda t: ((2 - (2 * t - 1) ** 2).sqrt() + 2 * t - 1) / 2,
                 b=lambda t: ((2 - (2 * t - 1) ** 2).sqrt() - 2 * t + 1) / 2)  # fmt: skip
    nb.check("thm-interpolant-bb", action(ideal, -mean, two, mean, two), 16.0, atol=1e-9)
    for path in (LINE, ARC, ideal):
        nb.check_bound("thm-interpolant-bb", 16.0, action(path, -mean, two, mean, two), slack=1e-9)
        nb.check_bound("thm-interpolant-bb", 8.0, action(path, zero, two, zero, 9 * two), slack=1e-9)
        with pytest.raises(CheckFailed, match="thm-interpolant-bb"):  # the sum of the variances is no lower bound
            nb.check_bound("thm-interpolant-bb", 20.0, action(path, zero, two, zero, 9 * two), slack=1e-9)
    for path in (LINE, ARC):
        with pytest.raises(CheckFailed, match="thm-interpolant-bb"):
            nb.check("thm-interpolant-bb", action(path, -mean, two, mean, two), 16.0, atol=1e-9)

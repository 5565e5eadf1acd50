"""Every claim of the chapter on flow matching: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

import nblib as nb
from nblib import dynamics, paths
from nblib.errors import CheckFailed

DOUBLE = torch.float64
Field = Callable[[Tensor, float], Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


POINTS = 1.5 * noise(200, 2)
TURN = tensor([[0.0, -1.0], [1.0, 0.0]])
TARGET = nb.data.toy.GaussianMixture(2 * noise(4, 2, seed=5), tensor([0.4, 0.3, 0.5, 0.6]))


def divergence(u: Field, x: Tensor, t: float) -> Tensor:
    x = x.detach().requires_grad_()
    columns = u(x, t).unbind(-1)
    rows = [torch.autograd.grad(c.sum(), x, retain_graph=True)[0] for c in columns]
    return torch.stack([row[:, j] for j, row in enumerate(rows)]).sum(0)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def residual(log_p: Callable[..., Tensor], u: Field, x: Tensor, t: float) -> Tensor:
    now = tensor(t)
    rate = jvp(lambda s: log_p(x, s), now)[1]
    score = gradient(lambda y: log_p(y, now), x)
    return rate + divergence(u, x, t) + (u(x, t) * score).sum(-1)


def test_thm_continuity() -> None:
    """The sign of the field, time reversed, a transposed matrix, the divergence or the transport term lost."""
    path, matrix = paths.linear(), tensor([[0.3, -1.2], [0.5, -0.4]])

    def log_linear(x: Tensor, t: Tensor) -> Tensor:
        root = torch.linalg.matrix_exp(t * matrix)
        return -0.5 * torch.linalg.solve(root, x.T).T.square().sum(-1) - math.log(2 * math.pi) - torch.logdet(root)

    def log_mixture(x: Tensor, t: Tensor) -> Tensor:
        return paths.marginal(TARGET, path, t).log_prob(x)

    def exact(x: Tensor, t: float) -> Tensor:
        return paths.posterior_mean(TARGET, path, x, t, to="velocity")

    for log_p, u in ((log_linear, lambda x, t: x @ matrix.T), (log_mixture, exact)):
        nb.check("thm-continuity", residual(log_p, u, POINTS, 0.4), 0.0, atol=1e-9)
        wrong: list[Field] = [lambda x, t, u=u: -u(x, t), lambda x, t, u=u: u(x, t) + 0.01 * x]
        if log_p is log_linear:
            wrong.append(lambda x, t: x @ matrix)
        else:
            wrong.append(lambda x, t: exact(x, 1 - t))
        for bad in wrong:
            with pytest.raises(CheckFailed, match="thm-continuity"):
                nb.check("thm-continuity", residual(log_p, bad, POINTS, 0.4), 0.0, atol=1e-9)
        score = gradient(lambda y, log_p=log_p: log_p(y, tensor(0.4)), POINTS)
        for lost in (divergence(u, POINTS, 0.4), (u(POINTS, 0.4) * score).sum(-1)):
            with pytest.raises(CheckFailed, match="thm-continuity"):
                nb.check("thm-continuity", residual(log_p, u, POINTS, 0.4) - lost, 0.0, atol=1e-9)


PLACES = tensor([[2, 1], [-1, 2], [-2, -1], [1, -2], [0.5, 0.3]])
SHARES = tensor([0.1, 0.3, 0.2, 0.15, 0.25])
SIGMA_MIN = 0.1


def log_pieces(x: Tensor, t: Tensor | float) -> Tensor:
    std = torch.as_tensor(1 - (1 - SIGMA_MIN) * t, dtype=DOUBLE)
    squares = ((x[:, None] - t * PLACES) ** 2).sum(-1)
    return SHARES.log() - squares / (2 * std**2) - math.log(2 * math.pi) - 2 * std.log()


def pulls(x: Tensor, t: float) -> Tensor:
    return (PLACES - (1 - SIGMA_MIN) * x[:, None]) / (1 - (1 - SIGMA_MIN) * t)


def test_thm_marginal_field() -> None:
    """Weights of the prior, of the likelihood alone, tempered; the nearest data point; the end for the velocity."""

    def weighted(weights: Callable[[Tensor, float], Tensor], pull: Callable[[Tensor, float], Tensor] = pulls) -> Field:
        return lambda x, t: (weights(x, t)[..., None] * pull(x, t)).sum(1)

    def log_marginal(x: Tensor, t: Tensor) -> Tensor:
        return log_pieces(x, t).logsumexp(1)

    def counts(u: Field) -> Tensor:
        end = dynamics.ode(u, noise(4000, 2, seed=1), dynamics.times(60), method="rk4")
        return ((end[:, None] - PLACES).square().sum(-1).argmin(1)[:, None] == torch.arange(5)).double()

    right = weighted(lambda x, t: log_pieces(x, t).softmax(1))
    nb.check("thm-marginal-field", residual(log_marginal, right, POINTS, 0.5), 0.0, atol=1e-8)
    nb.check_mc("thm-marginal-field", counts(right), SHARES)
    prior = weighted(lambda x, t: SHARES.expand(len(x), -1))
    alone = weighted(lambda x, t: (log_pieces(x, t) - SHARES.log()).softmax(1))
    tempered = weighted(lambda x, t: (2 * log_pieces(x, t)).softmax(1))
    nearest = weighted(lambda x, t: (50 * log_pieces(x, t)).softmax(1))
    data = weighted(lambda x, t: log_pieces(x, t).softmax(1), lambda x, t: PLACES.expand(len(x), -1, -1))
    for bad in (prior, alone, tempered, nearest, data):
        with pytest.raises(CheckFailed, match="thm-marginal-field"):
            nb.check("thm-marginal-field", residual(log_marginal, bad, POINTS, 0.5), 0.0, atol=1e-8)
    for bad in (prior, alone):
        with pytest.raises(CheckFailed, match="thm-marginal-field"):
            nb.check_mc("thm-marginal-field", counts(bad), SHARES)


def test_thm_cfm_gradient() -> None:
    """Another target (the data, another noise), other weights, a constant lost or halved, another source of points."""
    spots, odds, slope = tensor([-1.0, 0.4, 1.5]), tensor([0.5, 0.2, 0.3]), 0.7
    torch.manual_seed(1)
    net = nb.nets.MLP([2, 16, 16, 1], "silu").double()
    times, time_weights = map(torch.tensor, np.polynomial.legendre.leggauss(12))
    times, time_weights = (times + 1) / 2, time_weights / 2
    nodes, node_weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(60))
    node_weights = node_weights / node_weights.sum()
    line = torch.linspace(-8, 8, 4001, dtype=DOUBLE)
    step = line[1] - line[0]

    def value(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x, t.expand_as(x)], -1))[:, 0]

    def pieces(t: Tensor) -> tuple[Tensor, Tensor]:
        std = 1 - slope * t
        density = (-0.5 * ((line[:, None] - t * spots) / std) ** 2).exp() / (std * math.sqrt(2 * math.pi))
        return odds * density, (spots - slope * line[:, None]) / std

    def fm(prior: bool = False) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for t, w in zip(times, time_weights):
            joint, pull = pieces(t)
            share = odds if prior else joint / joint.sum(1, keepdim=True).clamp_min(1e-300)
            u = (share * pull).sum(1)
            total = total + w * (joint.sum(1) * (value(line, t) - u) ** 2).sum() * step
        return total

    def cfm(target: Callable[[Tensor, Tensor], Tensor] | None = None, weights: Tensor = odds) -> Tensor:
        total = torch.zeros((), dtype=DOUBLE)
        for t, w in zip(times, time_weights):
            for k, x1 in enumerate(spots):
                x = t * x1 + (1 - slope * t) * nodes
                aim = x1 - slope * nodes if target is None else target(x1, nodes)
                total = total + w * weights[k] * (node_weights * (value(x, t) - aim) ** 2).sum()
        return total

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    constant = torch.zeros((), dtype=DOUBLE)
    for t, w in zip(times, time_weights):
        joint, pull = pieces(t)
        share = joint / joint.sum(1, keepdim=True).clamp_min(1e-300)
        variance = (share * pull**2).sum(1) - (share * pull).sum(1) ** 2
        constant = constant + w * (joint.sum(1) * variance).sum() * step
    nb.check("thm-cfm-gradient", cfm() - fm(), constant, atol=1e-8)
    nb.check("thm-cfm-gradient", flat(cfm()), flat(fm()), atol=1e-8)
    for factor in (0.0, 0.5, 2.0):
        with pytest.raises(CheckFailed, match="thm-cfm-gradient"):
            nb.check("thm-cfm-gradient", cfm() - fm(), factor * constant, atol=1e-8)
    wrong = (
        cfm(lambda x1, x0: x1 + 0 * x0),  # the derivative of sigma forgotten
        cfm(lambda x1, x0: x1 + slope * x0),  # its sign
        cfm(lambda x1, x0: x1 - x0),  # sigma_min forgotten in the target only
        cfm(weights=torch.full((3,), 1 / 3, dtype=DOUBLE)),
    )
    for bad in wrong:
        with pytest.raises(CheckFailed, match="thm-cfm-gradient"):
            nb.check("thm-cfm-gradient", flat(bad), flat(fm()), atol=1e-8)
    with pytest.raises(CheckFailed, match="thm-cfm-gradient"):
        nb.check("thm-cfm-gradient", flat(cfm()), flat(fm(prior=True)), atol=1e-8)


def test_thm_gaussian_field() -> None:
    """The signs, the derivative of σ² for that of σ, no motion of the mean; a swirl is no field of the map."""
    middle, t = tensor([0.5, -0.3]), 0.6

    def log_one(x: Tensor, s: Tensor) -> Tensor:
        return nb.probability.gaussian_log_prob(x, middle * s, 1 - 0.8 * s).sum(-1)

    def u(
        x: Tensor, s: float, *, rate: float = 1.0, drift: float = 1.0, omega: float = 0.0, swirl: Tensor = TURN
    ) -> Tensor:
        std, gap = 1 - 0.8 * s, x - middle * s
        return -0.8 * rate / std * gap + drift * middle - omega * gap @ swirl.T / std**2

    nb.check("thm-gaussian-field", residual(log_one, u, POINTS, t), 0.0, atol=1e-10)
    nb.check("thm-gaussian-field", residual(log_one, lambda x, s: u(x, s, omega=3.0), POINTS, t), 0.0, atol=1e-10)
    symmetric = tensor([[0.0, 1.0], [1.0, 0.0]])
    broken: tuple[Field, ...] = (
        lambda x, s: u(x, s, rate=-1.0),
        lambda x, s: u(x, s, rate=2 * (1 - 0.8 * s)),
        lambda x, s: u(x, s, drift=0.0),
        lambda x, s: u(x, s, drift=-1.0),
        lambda x, s: u(x, s, omega=3.0, swirl=symmetric),  # not antisymmetric
        lambda x, s: u(x, s) + 3.0 * x.roll(1, -1),  # turns about no centre of the Gaussian
    )
    for bad in broken:
        with pytest.raises(CheckFailed, match="thm-gaussian-field"):
            nb.check("thm-gaussian-field", residual(log_one, bad, POINTS, t), 0.0, atol=1e-10)
    x, velocity = jvp(lambda s: middle * s + (1 - 0.8 * s) * noise(100, 2), tensor(t))
    nb.check("thm-gaussian-field", u(x, t), velocity, atol=1e-12)
    with pytest.raises(CheckFailed, match="thm-gaussian-field"):  # the same path, and not the field of the map
        nb.check("thm-gaussian-field", u(x, t, omega=3.0), velocity, atol=1e-12)


@pytest.mark.parametrize("name", paths.PATHS)
def test_prop_field_score(name: str) -> None:
    """The factor ½ or 2 of g², its sign, the SDE's drift for the ODE's, the score of the data; b² or no b, no sign."""
    path, t = paths.make(name), 0.35
    a, b, da, db = (float(c) for c in path.coefficients(t, POINTS[0]))
    score = gradient(paths.marginal(TARGET, path, t).log_prob, POINTS)
    velocity = paths.posterior_mean(TARGET, path, POINTS, t, to="velocity")
    mean = paths.posterior_mean(TARGET, path, POINTS, t, to="noise")
    nb.check("prop-field-score", -mean / b, score, atol=1e-9, rtol=1e-9)
    for bad in (mean / b, -mean / b**2, -mean, -mean / a, -POINTS / b):
        with pytest.raises(CheckFailed, match="prop-field-score"):
            nb.check("prop-field-score", bad, score, atol=1e-9, rtol=1e-9)
    half_g2 = da / a * b**2 - b * db
    nb.check("prop-field-score", velocity, da / a * POINTS + half_g2 * score, atol=1e-9, rtol=1e-9)
    wrong = [da / a * POINTS + factor * half_g2 * score for factor in (0.0, 0.5, 2.0, -1.0)]
    wrong += [da / a * POINTS + (half_g2 + b * db) * score, da / a * POINTS + half_g2 * TARGET.score(POINTS)]
    if name != "ve":  # where a is constant nothing is lost
        wrong.append(half_g2 * score)
    for bad in wrong:
        with pytest.raises(CheckFailed, match="prop-field-score"):
            nb.check("prop-field-score", velocity, bad, atol=1e-9, rtol=1e-9)


def test_prop_hutchinson_trace() -> None:
    """One variance for the other, the matrix for its symmetric part, a factor; entries that are not independent."""
    matrix = noise(6, 6, seed=2)
    part = (matrix + matrix.T) / 2
    signs = torch.cartesian_prod(*[tensor([-1.0, 1.0])] * 6)
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(5))
    normals = torch.cartesian_prod(*[nodes] * 6)
    normal_weights = torch.cartesian_prod(*[weights / weights.sum()] * 6).prod(1)
    off = part.square().sum() - part.diagonal().square().sum()
    both = (off, part.square().sum())
    raw = matrix.square().sum()
    for v, w, own in ((signs, torch.full((64,), 1 / 64, dtype=DOUBLE), 0), (normals, normal_weights, 1)):
        estimate = torch.einsum("ni,ij,nj->n", v, matrix, v)
        mean = (w * estimate).sum()
        variance = (w * (estimate - mean) ** 2).sum()
        nb.check("prop-hutchinson-trace", mean, matrix.trace(), atol=1e-9)
        nb.check("prop-hutchinson-trace", variance, 2 * both[own], atol=1e-9)
        for bad in (2 * both[1 - own], both[own], 4 * both[own], 2 * raw, 2 * (raw - matrix.diagonal().square().sum())):
            with pytest.raises(CheckFailed, match="prop-hutchinson-trace"):
                nb.check("prop-hutchinson-trace", variance, bad, atol=1e-9)
        correlated = torch.einsum("ni,ij,nj->n", v[:, :1].expand(-1, 6), matrix, v[:, :1].expand(-1, 6))
        for bad in ((w * correlated).sum(), 2 * mean, (w * estimate).sum() / 6):
            with pytest.raises(CheckFailed, match="prop-hutchinson-trace"):
                nb.check("prop-hutchinson-trace", bad, matrix.trace(), atol=1e-9)


def test_prop_hutchinson_trace_along_a_trajectory() -> None:
    """The two values on the plane lie about the exact integral: not for the sum, half of it, or entries 0 and 2."""
    path, x, grid = paths.linear(), TARGET.sample(20, generator=torch.Generator().manual_seed(1)), dynamics.times(6)

    def exact(x: Tensor, t: float) -> Tensor:
        return paths.posterior_mean(TARGET, path, x, t, to="velocity")

    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        whole = dynamics.log_prob(exact, x, grid)
        every = [dynamics.log_prob(exact, x, grid, divergence="rademacher", generator=rng) for _ in range(10)]
        normal = [dynamics.log_prob(exact, x, grid, divergence="gaussian", generator=rng) for _ in range(10)]
        start = dynamics.ode(exact, x, grid[::-1], method="euler")
    low, high = torch.stack(every).amin(0), torch.stack(every).amax(0)
    both = high - low > 1e-9
    assert both.double().mean() > 0.9
    nb.check("prop-hutchinson-trace", ((low + high) / 2)[both], whole[both], atol=1e-9)
    other_low, other_high = torch.stack(normal).amin(0), torch.stack(normal).amax(0)
    prior = nb.probability.gaussian_log_prob(start, 0.0, 1.0).sum(-1)
    for bad in (low, high, low + high, (other_low + other_high) / 2, prior):
        with pytest.raises(CheckFailed, match="prop-hutchinson-trace"):
            nb.check("prop-hutchinson-trace", bad[both], whole[both], atol=1e-9)


def test_eq_flow_ode() -> None:
    """The closed form of a linear flow sees what there and back does not: twice the field, minus it, its transpose."""
    matrix, grid = tensor([[0.3, -1.2], [0.5, -0.4]]), dynamics.times(50)
    expected = POINTS @ torch.linalg.matrix_exp(matrix).T
    for field, right in ((matrix, True), (2 * matrix, False), (-matrix, False), (matrix.T, False)):
        end = dynamics.ode(lambda x, t, m=field: x @ m.T, POINTS, grid, method="rk4")
        back = dynamics.ode(lambda x, t, m=field: x @ m.T, end, grid[::-1], method="rk4")
        nb.check("eq-flow-ode", back, POINTS, atol=1e-4)
        if right:
            nb.check("eq-flow-ode", end, expected, atol=1e-6)
        else:
            with pytest.raises(CheckFailed, match="eq-flow-ode"):
                nb.check("eq-flow-ode", end, expected, atol=1e-6)


def test_eq_path_velocity_two_paths_are_one() -> None:
    """On grids of equal signal-to-noise the exponential integrator agrees; not on other grids or starts, nor Euler."""
    straight, vp = paths.linear(), paths.vp()
    first, last = (float(straight.time_of_log_snr(vp.log_snr(t))) for t in (0.0, 0.999))
    grid = dynamics.times(8, start=first, end=last)
    same = [float(vp.time_of_log_snr(straight.log_snr(t))) for t in grid]

    def run(p: paths.Path, clock: list[float], scale: float | None = None) -> Tensor:
        start = POINTS * (p.b(torch.tensor(clock[0]).double()) if scale is None else scale)
        mean: Field = lambda x, t: paths.posterior_mean(TARGET, p, x, t, to="data")  # noqa: E731
        return dynamics.ddim(p, mean, start, clock) / p.a(torch.tensor(clock[-1]).double())

    def euler(p: paths.Path, clock: list[float]) -> Tensor:
        field: Field = lambda x, t: paths.posterior_mean(TARGET, p, x, t, to="velocity")  # noqa: E731
        end = dynamics.ode(field, POINTS * p.b(torch.tensor(clock[0]).double()), clock, method="euler")
        return end / p.a(torch.tensor(clock[-1]).double())

    nb.check("eq-path-velocity", run(straight, grid), run(vp, same), atol=1e-6)
    nb.check("eq-path-velocity", euler(straight, grid), run(straight, grid), atol=1e-6)  # Euler is ddim there
    for bad in (
        run(vp, dynamics.times(8, end=0.999)),
        run(vp, same, 0.9),
        run(vp, same) * vp.a(torch.tensor(0.9).double()),
        euler(vp, same),
    ):
        with pytest.raises(CheckFailed, match="eq-path-velocity"):
            nb.check("eq-path-velocity", run(straight, grid), bad, atol=1e-6)


def test_eq_board_mean() -> None:
    """The light squares, square centres for truncated means, no weights, the mean for a x_1: against quadrature."""
    edges, dark = torch.arange(4, dtype=DOUBLE) * 2 - 4, (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    gauss, gauss_w = map(torch.tensor, np.polynomial.legendre.leggauss(60))
    side, side_w = (edges[:, None] + 1 + gauss).flatten(), gauss_w.repeat(4)
    on = dark.repeat_interleave(60, 0).repeat_interleave(60, 1).flatten()
    nodes, log_w = torch.cartesian_prod(side, side)[on], torch.outer(side_w, side_w).flatten()[on].log()
    x = tensor([[0.8, -0.5], [-1.5, 2.0], [0.1, 0.2], [3.0, -1.5]])
    normal = torch.distributions.Normal(tensor(0.0), tensor(1.0))

    def closed(a: float, b: float, light: bool = False, centres: bool = False, even: bool = False) -> Tensor:
        low, high = (a * edges - x[..., None]) / b, (a * (edges + 2) - x[..., None]) / b  # (M, 2, 4)
        mass = (normal.cdf(high) - normal.cdf(low)).clamp_min(1e-300)
        mean = x[..., None] / a + b / a * (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / mass
        mean = (edges + 1).expand_as(mean) if centres else mean
        weight = (torch.ones_like(mass) if even else mass)[:, 0, :, None] * mass[:, 1, None] * (dark ^ light)
        weight = weight / weight.sum((1, 2), keepdim=True)
        return torch.stack([(weight.sum(2) * mean[:, 0]).sum(1), (weight.sum(1) * mean[:, 1]).sum(1)], 1)

    for path in (paths.linear(), paths.vp()):
        for t in (0.5, 0.7):
            a, b = (float(c) for c in path.coefficients(t, x[0])[:2])
            mean = (log_w - (x[:, None] - a * nodes).square().sum(-1) / (2 * b**2)).softmax(1) @ nodes
            nb.check("eq-board-mean", closed(a, b), mean, atol=1e-9)
            for bad in (closed(a, b, True), closed(a, b, False, True), closed(a, b, even=True), a * closed(a, b)):
                with pytest.raises(CheckFailed, match="eq-board-mean"):
                    nb.check("eq-board-mean", bad, mean, atol=1e-9)


def test_ex_fm_5() -> None:
    """The energy of the swirl adds up; not with a matrix that is not antisymmetric, nor with half of it."""
    axis, path = torch.linspace(-9, 9, 361, dtype=DOUBLE), paths.linear()
    x = torch.cartesian_prod(axis, axis)
    for t in (0.3, 0.6):
        w = paths.marginal(TARGET, path, t).log_prob(x).exp() * (axis[1] - axis[0]) ** 2
        score = paths.posterior_mean(TARGET, path, x, t, to="score")
        exact = paths.posterior_mean(TARGET, path, x, t, to="velocity")
        own = w @ score.square().sum(1)
        for matrix, factor in ((TURN, 1.0), (TURN.abs(), 1.0), (torch.eye(2, dtype=DOUBLE), 1.0), (TURN, 0.5)):
            added = w @ ((exact + score @ matrix.T).square() - exact.square()).sum(1)
            if factor == 1 and matrix is TURN:
                nb.check("ex-fm-5", added, own)
            else:
                with pytest.raises(CheckFailed, match="ex-fm-5"):
                    nb.check("ex-fm-5", added, factor * own)

"""Every claim of the chapter on rectified flow: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib import dynamics
from nblib.data.toy import GaussianMixture
from nblib.errors import CheckFailed
from nblib.flow_matching import optimal_transport

DOUBLE = torch.float64
Field = Callable[[Tensor, float], Tensor]
STEPS = 40
CLOCK = torch.linspace(0, 1, STEPS + 1, dtype=DOUBLE)
SIMPSON = torch.ones(STEPS + 1, dtype=DOUBLE)
SIMPSON[1:-1:2], SIMPSON[2:-1:2] = 4, 2
SIMPSON = SIMPSON / SIMPSON.sum()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def sides(joint: GaussianMixture, t: float) -> tuple[Tensor, Tensor]:
    eye = torch.eye(joint.dim // 2, dtype=DOUBLE)
    return torch.cat([(1 - t) * eye, t * eye], 1), torch.cat([-eye, eye], 1)


def law(joint: GaussianMixture, t: float) -> GaussianMixture:
    to_point, _ = sides(joint, t)
    return GaussianMixture(joint.means @ to_point.T, to_point @ joint.covs @ to_point.T, joint.weights)


def field_of(joint: GaussianMixture, *, prior_weights: bool = False, no_regression: bool = False) -> Field:
    """The exact field of a coupling; broken with weights that ignore x, or without the regression in a component."""

    def u(x: Tensor, t: float) -> Tensor:
        to_point, to_velocity = sides(joint, t)
        now = law(joint, t)
        inverse = torch.linalg.inv(now.covs)
        gap = x[:, None] - now.means
        pull = torch.einsum("kij,nkj->nki", inverse, gap)
        log_share = joint.weights.log() + torch.logdet(inverse) / 2 - (gap * pull).sum(-1) / 2
        if prior_weights:
            log_share = joint.weights.log().expand(len(x), -1)
        slope = to_velocity @ joint.covs @ to_point.T
        mean = joint.means @ to_velocity.T + (0 if no_regression else torch.einsum("kij,nkj->nki", slope, pull))
        return (log_share.softmax(-1)[..., None] * mean).sum(1)

    return u


def trace(velocity: Field, x: Tensor, steps: int = STEPS) -> Tensor:
    states = [x]
    dynamics.ode(velocity, x, dynamics.times(steps), method="rk4", callback=lambda i, t, y: states.append(y))
    return torch.stack(states)


FACTOR = noise(3, 4, 4, seed=1)
TANGLE = GaussianMixture(
    1.5 * noise(3, 4, seed=2), 0.2 * FACTOR @ FACTOR.mT + 0.15 * torch.eye(4).double(), tensor([0.5, 0.3, 0.2])
)
BROKEN_FIELDS: tuple[Field, ...] = (
    field_of(TANGLE, prior_weights=True),
    field_of(TANGLE, no_regression=True),
    lambda x, t: -field_of(TANGLE)(x, t),
    lambda x, t: field_of(TANGLE)(x, 1 - t),
)


def square(d: Tensor) -> Tensor:
    return d.square().sum(-1)


def test_eq_rectified_field() -> None:
    x, t = tensor([0.5, -0.3]), 0.4
    side = torch.linspace(-9, 9, 361, dtype=DOUBLE)
    grid = torch.cartesian_prod(side, side)
    partner = (x - (1 - t) * grid) / t
    share = TANGLE.log_prob(torch.cat([grid, partner], 1)).softmax(0)[:, None]
    brute = (share * (partner - grid)).sum(0)
    nb.check("eq-rectified-field", field_of(TANGLE)(x[None], t)[0], brute, atol=1e-6)
    for bad in BROKEN_FIELDS:
        with pytest.raises(CheckFailed, match="eq-rectified-field"):
            nb.check("eq-rectified-field", bad(x[None], t)[0], brute, atol=1e-6)
    at = tensor([[0.3, 0.4]])  # eq-distill: at t = 0 the field leads to the mean of x1 given x0
    one_step = (TANGLE.log_prob(torch.cat([at.expand(len(grid), -1), grid], 1)).softmax(0)[:, None] * grid).sum(0)
    nb.check("eq-distill", (at + field_of(TANGLE)(at, 0.0))[0], one_step, atol=1e-6)
    for wrong in (field_of(TANGLE)(at, 0.0), at - field_of(TANGLE)(at, 0.0), at + field_of(TANGLE)(at, 1.0)):
        with pytest.raises(CheckFailed, match="eq-distill"):
            nb.check("eq-distill", wrong[0], one_step, atol=1e-6)


def test_thm_rectified_marginals() -> None:
    """Wrong weights, no regression, a sign, time reversed; the density without its change along the flow."""
    t = 0.7
    at = law(TANGLE, t).sample(12, generator=seeded(3))
    start = law(TANGLE, 0.0)

    def carried(u: Field) -> Tensor:
        with torch.no_grad():
            return dynamics.log_prob(u, at, dynamics.times(30, end=t), base=start.log_prob)

    nb.check("thm-rectified-marginals", carried(field_of(TANGLE)), law(TANGLE, t).log_prob(at), atol=1e-4)
    for bad in BROKEN_FIELDS:
        with pytest.raises(CheckFailed, match="thm-rectified-marginals"):
            nb.check("thm-rectified-marginals", carried(bad), law(TANGLE, t).log_prob(at), atol=1e-4)
    with pytest.raises(CheckFailed, match="thm-rectified-marginals"):
        nb.check("thm-rectified-marginals", start.log_prob(at), law(TANGLE, t).log_prob(at), atol=1e-4)
    p = law(TANGLE, t)
    second = p.cov + torch.outer(p.mean, p.mean)

    def products(u: Field) -> Tensor:
        z = trace(u, start.sample(1000, generator=seeded(4)))[round(t * STEPS)]
        return z[:, :, None] * z[:, None]

    nb.check_mc("thm-rectified-marginals", products(field_of(TANGLE)), second)
    for bad in BROKEN_FIELDS:
        with pytest.raises(CheckFailed, match="thm-rectified-marginals"):
            nb.check_mc("thm-rectified-marginals", products(bad), second)


def linear_part(joint: GaussianMixture, t: float) -> Tensor:
    (to_point, to_velocity), cov = sides(joint, t), joint.covs[0]
    return to_velocity @ cov @ to_point.T @ torch.linalg.inv(to_point @ cov @ to_point.T)


def flow_map(joint: GaussianMixture, steps: int = 100, skew: float = 0.0) -> Tensor:
    """M_t; with a skew part added to the field, relative to the covariance, the same marginals by another motion."""
    d = joint.dim // 2
    quarter = torch.zeros(d, d, dtype=DOUBLE)
    quarter[0, 1], quarter[1, 0] = -skew, skew

    def velocity(m: Tensor, t: float) -> Tensor:
        return (linear_part(joint, t) + quarter @ torch.linalg.inv(law(joint, t).covs[0])) @ m

    return trace(velocity, torch.eye(d, dtype=DOUBLE)[None], steps)[:, 0]


def gaussian_pair(cov: Tensor) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, len(cov), dtype=DOUBLE), cov[None])


def excess(pair: GaussianMixture, m: Tensor) -> Tensor:
    """Eigenvalues of the covariance of x1 - x0 minus that of z1 - z0."""
    d = pair.dim // 2
    move, to_velocity = m - torch.eye(d, dtype=DOUBLE), sides(pair, 0.0)[1]
    return torch.linalg.eigvalsh(to_velocity @ pair.covs[0] @ to_velocity.T - move @ pair.covs[0, :d, :d] @ move.T)


def test_thm_convex_cost() -> None:
    """A swirl that keeps all marginals, the map turned afterwards, a cost that is not convex."""
    for seed in range(5):
        root = noise(6, 6, seed=10 + seed)
        pair = gaussian_pair(root @ root.T)
        nb.check_bound("thm-convex-cost", 0.0, excess(pair, flow_map(pair)[-1]), slack=1e-6)
    eye = torch.eye(2, dtype=DOUBLE)
    pair = gaussian_pair(torch.eye(4, dtype=DOUBLE))
    swirled = flow_map(pair, skew=1.5)[-1]
    nb.check("thm-rectified-marginals", swirled @ swirled.T, eye, atol=1e-5)  # the marginal is right
    for bad in (swirled, -eye):
        with pytest.raises(CheckFailed, match="thm-convex-cost"):
            nb.check_bound("thm-convex-cost", 0.0, excess(pair, bad), slack=1e-6)
    x0, x1 = TANGLE.sample(2000, generator=seeded(5)).chunk(2, 1)
    end = trace(field_of(TANGLE), x0)[-1]
    on_line = torch.stack([field_of(TANGLE)(x0 + t * (x1 - x0), float(t)) for t in CLOCK])

    def drops(c: Callable[[Tensor], Tensor], end: Tensor) -> Tensor:
        three = [c(end - x0), torch.einsum("t,tn->n", SIMPSON, c(on_line)), c(x1 - x0)]
        gap = torch.stack([high - low for low, high in itertools.pairwise(three)])
        return gap.mean(1) + 4 * gap.std(1) / math.sqrt(len(x0))

    costs: list[Callable[[Tensor], Tensor]] = [
        square,
        lambda d: d.norm(dim=-1),
        lambda d: square(d) ** 2,
        lambda d: d.abs().amax(-1),
        lambda d: (d[..., 0] - 0.5).clamp_min(0),
        lambda d: d[..., 1].exp(),
    ]
    for c in costs:
        nb.check_bound("thm-convex-cost", 0.0, drops(c, end))
    shuffled = end[torch.randperm(len(end), generator=seeded(6))]
    for c, where in ((costs[0], shuffled), (costs[1], shuffled), (lambda d: -square(d), end)):
        with pytest.raises(CheckFailed, match="thm-convex-cost"):
            nb.check_bound("thm-convex-cost", 0.0, drops(c, where))


def test_eq_nonconvex() -> None:
    """For a convex cost the order is the other one."""
    line = torch.linspace(-10, 18, 200_001, dtype=DOUBLE)
    density = torch.exp(-((line - 4) ** 2) / 4) / math.sqrt(4 * math.pi)
    nb.check_bound("eq-nonconvex", torch.trapezoid(line.abs().sqrt() * density, line), 2.0 - 0.01)
    with pytest.raises(CheckFailed, match="eq-nonconvex"):
        nb.check_bound("eq-nonconvex", torch.trapezoid(line.abs() * density, line), 4.0 - 0.01)


def test_prop_ledger() -> None:
    """An entry forgotten, doubled or with the wrong chord; a field that is not the conditional mean."""
    x0, x1 = TANGLE.sample(2000, generator=seeded(7)).chunk(2, 1)

    def entries(u: Field) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = trace(u, x0)
        after = run[-1] - x0
        bend = square(torch.stack([u(z, float(t)) for z, t in zip(run, CLOCK)]) - after)
        cross = square(torch.stack([u(x0 + t * (x1 - x0), float(t)) for t in CLOCK]) - (x1 - x0))
        bend, cross = (torch.einsum("t,tn->n", SIMPSON, v) for v in (bend, cross))
        return square(x1 - x0), square(after), bend, cross

    before, after, bend, cross = entries(field_of(TANGLE))
    nb.check_mc("prop-ledger", before - after - bend - cross, 0.0)
    for bad in (
        before - after - bend,
        before - after - cross,
        before - after - 2 * bend - cross,
        before - bend - cross,
    ):
        with pytest.raises(CheckFailed, match="prop-ledger"):
            nb.check_mc("prop-ledger", bad, 0.0)
    for field in BROKEN_FIELDS:
        before, after, bend, cross = entries(field)
        with pytest.raises(CheckFailed, match="prop-ledger"):
            nb.check_mc("prop-ledger", before - after - bend - cross, 0.0)


def rotation(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return tensor([[c, -s], [s, c]])


def turned(degrees: float, rho: float) -> GaussianMixture:
    eye, cross = torch.eye(2, dtype=DOUBLE), rho * rotation(degrees).T
    return gaussian_pair(torch.cat([torch.cat([eye, cross], 1), torch.cat([cross.T, eye], 1)]))


def defects(pair: GaussianMixture) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """V, S, the error of one Euler step, the fall of the cost, and the cost before."""
    cov, d, maps = pair.covs[0], pair.dim // 2, flow_map(pair, STEPS)
    start, to_velocity = cov[:d, :d], sides(pair, 0.0)[1]
    slopes = torch.stack([linear_part(pair, float(t)) for t in CLOCK])
    eye = torch.eye(d, dtype=DOUBLE)
    chord = maps[-1] - eye

    def size(m: Tensor) -> Tensor:
        return torch.einsum("...ij,jk,...ik->...", m, start, m)

    cost = (to_velocity @ cov @ to_velocity.T).trace()
    covs = torch.stack([law(pair, float(t)).covs[0] for t in CLOCK])
    cross = cost - SIMPSON @ torch.einsum("tij,tjk,tik->t", slopes, covs, slopes)
    return cross, SIMPSON @ size(slopes @ maps - chord), size(slopes[0] + eye - maps[-1]), cost - size(chord), cost


def test_thm_straight() -> None:
    """All four vanish together, only without randomness; a straight pair that is not optimal is still straight."""
    *four, cost = defects(turned(100, 1.0))
    nb.check("thm-straight", torch.stack(four), 0.0, atol=1e-6)
    assert cost > 1  # and yet the identity would cost nothing
    for rho in (0.0, 0.5, 0.99):
        *four, _ = defects(turned(100, rho))
        nb.check_bound("thm-straight", 1e-4, torch.stack(four))
        for each in four:
            with pytest.raises(CheckFailed, match="thm-straight"):
                nb.check("thm-straight", each, 0.0, atol=1e-6)
    *four, _ = defects(turned(100, 1.0))
    for each in four:
        with pytest.raises(CheckFailed, match="thm-straight"):
            nb.check_bound("thm-straight", 1e-4, each)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def test_thm_rectified_gaussian() -> None:
    """The factors exchanged, the symmetric optimal map in their place, no root; commuting against not commuting."""

    def case(degrees: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        cov0 = torch.diag(tensor([2.0, 0.1]))
        cov1 = rotation(degrees) @ torch.diag(tensor([0.3, 1.5])) @ rotation(degrees).T
        m = flow_map(gaussian_pair(torch.block_diag(cov0, cov1)), 300)[-1]
        move = m - torch.eye(2, dtype=DOUBLE)
        least = (cov0 + cov1).trace() - 2 * torch.linalg.svdvals(root(cov1) @ root(cov0)).sum()
        return cov0, cov1, m, (move @ cov0 @ move.T).trace(), least

    cov0, cov1, m, cost, least = case(60)
    square_of = cov1 @ cov0.inverse()
    nb.check("thm-rectified-gaussian", m @ m, square_of, atol=1e-4)
    nb.check_bound("thm-rectified-gaussian", 1e-6, torch.linalg.eigvals(m).real)
    nb.check_bound("thm-rectified-gaussian", least + 0.01, cost)
    r = root(cov0)
    optimal = r.inverse() @ root(r @ cov1 @ r) @ r.inverse()
    nb.check("thm-rectified-gaussian", optimal @ cov0 @ optimal, cov1, atol=1e-6)
    for bad, truth in ((m.T @ m.T, square_of), (optimal @ optimal, square_of), (m @ m, cov0.inverse() @ cov1)):
        with pytest.raises(CheckFailed, match="thm-rectified-gaussian"):
            nb.check("thm-rectified-gaussian", bad, truth, atol=1e-4)
    with pytest.raises(CheckFailed, match="thm-rectified-gaussian"):
        nb.check_bound("thm-rectified-gaussian", 1e-6, torch.linalg.eigvals(-m).real)
    with pytest.raises(CheckFailed, match="thm-rectified-gaussian"):
        nb.check("thm-rectified-gaussian", cost, least, atol=1e-6)
    *_, cost, least = case(90)  # the axes agree: the covariances commute
    nb.check("thm-rectified-gaussian", cost, least, atol=1e-6)
    with pytest.raises(CheckFailed, match="thm-rectified-gaussian"):
        nb.check_bound("thm-rectified-gaussian", least + 0.01, cost)


def test_thm_reflow_rate() -> None:
    """S or V alone, a round left out, reflow with the pairs lost, the rate of another power."""

    def rounds(lose: bool) -> tuple[list[float], list[float], list[float]]:
        pair, costs, bends, crossings = turned(150, 0.8), [], [], []
        for _ in range(4):
            cross, bend, _, _, cost = defects(pair)
            costs.append(float(cost))
            bends.append(float(bend))
            crossings.append(float(cross))
            m, cov0 = flow_map(pair, 150)[-1], pair.covs[0, :2, :2]
            cross_cov = torch.zeros_like(cov0) if lose else cov0 @ m.T
            rows = torch.cat([cov0, cross_cov], 1), torch.cat([cross_cov.T, m @ cov0 @ m.T], 1)
            pair = gaussian_pair(torch.cat(rows))
        return costs, bends, crossings

    costs, bends, crossings = rounds(lose=False)
    bills = [b + v for b, v in zip(bends, crossings)]
    for k in (1, 2, 3):
        nb.check("thm-reflow-rate", sum(bills[:k]), costs[0] - costs[k], atol=1e-3)
        nb.check_bound("thm-reflow-rate", min(bills[:k]), (costs[0] - costs[k]) / k, slack=1e-3)
        for bad in (sum(bends[:k]), sum(crossings[:k]), sum(bills[1:k])):
            with pytest.raises(CheckFailed, match="thm-reflow-rate"):
                nb.check("thm-reflow-rate", bad, costs[0] - costs[k], atol=1e-3)
    with pytest.raises(CheckFailed, match="thm-reflow-rate"):
        nb.check_bound("thm-reflow-rate", bills[0], (costs[0] - costs[2]) / 2, slack=1e-3)
    costs, bends, crossings = rounds(lose=True)
    with pytest.raises(CheckFailed, match="thm-reflow-rate"):
        nb.check("thm-reflow-rate", sum(bends[:3]) + sum(crossings[:3]), costs[0] - costs[3], atol=1e-3)


def test_eq_no_crossing() -> None:
    """The criterion with the sign of the eigenvalues, or with the determinant of the map alone."""
    wild = noise(500, 2, 2, seed=8)
    clock = torch.linspace(0, 1, 2001, dtype=DOUBLE)[:, None, None, None]
    lowest = torch.linalg.det((1 - clock) * torch.eye(2, dtype=DOUBLE) + clock * wild).amin(0)
    clear = lowest.abs() > 1e-3
    values = torch.linalg.eigvals(wild)
    real = values.imag.abs() < 1e-12
    right = (real & (values.real <= 0)).any(-1)
    nb.check("eq-no-crossing", (lowest < 0)[clear].double(), right[clear].double())
    for bad in ((real & (values.real >= 0)).any(-1), (values.real <= 0).any(-1), torch.linalg.det(wild) < 0):
        with pytest.raises(CheckFailed, match="eq-no-crossing"):
            nb.check("eq-no-crossing", (lowest < 0)[clear].double(), bad[clear].double())


def least(x0: Tensor, x1: Tensor) -> float:
    return float(square(optimal_transport(x0, x1) - x1).mean())


def test_prop_minibatch() -> None:
    """A matching that is not optimal, subsets of one side only, a marginal spoiled by choosing pairs by their cost."""
    for size in (3, 6):
        x0, x1 = noise(size + 1, 3, seed=20), noise(size + 1, 3, seed=21) + 1
        keep = [[j for j in range(size + 1) if j != i] for i in range(size + 1)]
        smaller = sum(least(x0[k], x1[k]) for k in keep) / (size + 1)
        nb.check_bound("prop-minibatch", least(x0, x1), smaller, slack=1e-12)
        every = [float(square(x0[list(p)] - x1).mean()) for p in itertools.permutations(range(size + 1))]
        nb.check("prop-minibatch", least(x0, x1), min(every), atol=1e-12)
        greedy = x0.clone()
        left = list(range(size + 1))
        for i in range(size + 1):
            best = min(left, key=lambda j: float(square(x0[j] - x1[i])))
            greedy[i] = x0[best]
            left.remove(best)
        for bad in (float(square(greedy - x1).mean()), sum(every) / len(every)):
            with pytest.raises(CheckFailed, match="prop-minibatch"):
                nb.check("prop-minibatch", bad, min(every), atol=1e-12)
        with pytest.raises(CheckFailed, match="prop-minibatch"):
            nb.check_bound("prop-minibatch", sum(every) / len(every), smaller, slack=1e-12)
    target = nb.data.toy.make("eight-gaussians")
    generator = seeded(22)
    batches = [(torch.randn(8, 2, dtype=DOUBLE, generator=generator), target.sample(8, generator=generator))
               for _ in range(800)]  # fmt: skip
    paired = [(optimal_transport(*b), b[1]) for b in batches]

    def products(x: Tensor) -> Tensor:
        return x[:, :, None] * x[:, None]

    eye = torch.eye(2)
    nb.check_mc("prop-minibatch", products(torch.stack([x0[0] for x0, _ in paired])), eye)
    cheapest = torch.stack([x0[square(x0 - x1).argmin()] for x0, x1 in paired])
    nearest = torch.stack([x0[square(x0 - x1[0]).argmin()] for x0, x1 in batches])
    for bad_pairs in (cheapest, nearest):
        with pytest.raises(CheckFailed, match="prop-minibatch"):
            nb.check_mc("prop-minibatch", products(bad_pairs), eye)
    value = torch.tensor([least(noise(16, 2, seed=s), noise(16, 2, seed=s + 1000) / 2) for s in range(60)])
    above = float(value.mean() + 4 * value.std() / math.sqrt(60))
    nb.check_bound("prop-minibatch", 2 / 4, above)
    with pytest.raises(CheckFailed, match="prop-minibatch"):  # the cost of independent pairs is no lower bound
        nb.check_bound("prop-minibatch", 2 * 5 / 4, above)

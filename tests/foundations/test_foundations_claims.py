"""Every claim of the chapter on gradients of expectations: its check passes on the claim and fails on a broken variant.

The two sides are computed as on the page, with its tolerance; what is broken is a mistake that is easily made.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import nblib as nb
from nblib.errors import CheckFailed
from nblib.probability import gaussian_kl, gaussian_log_prob, gumbel_softmax, pathwise_gradient, score_function_gradient

DOUBLE = torch.float64
N = 20_000  # draws, as in the smoke profile: at more of them the checks are sharper
NODES, WEIGHTS = map(torch.tensor, np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
PHI = torch.tensor([1.5, 0.7], dtype=DOUBLE)
MU, SIGMA = PHI.tolist()
AT = MU + SIGMA * NODES
EXACT = 2 * PHI


def expect(values: Tensor) -> Tensor:
    return torch.tensordot(WEIGHTS, values, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def f(z: Tensor) -> Tensor:
    return z**2


def log_q(z: Tensor, params: Tensor) -> Tensor:
    return gaussian_log_prob(z, params[0], params[1])


def transform(e: Tensor, params: Tensor) -> Tensor:
    return params[0] + params[1] * e


def score(z: Tensor) -> Tensor:
    return vmap(grad(log_q, 1), (0, None))(z, PHI)


def test_thm_score_function() -> None:
    """The sign, the logarithm, the factor 1/σ of the score; a fixed support; the weights of a discrete q."""
    values, s, density = f(AT)[:, None], score(AT), log_q(AT, PHI).exp()[:, None]
    nb.check("thm-score-function", expect(score_function_gradient(f, log_q, PHI, AT)), EXACT, atol=1e-10)
    unscaled = torch.stack([NODES, NODES**2 - 1], 1)
    for wrong in (-values * s, values * s * density, values * unscaled, 2 * AT[:, None] * s):
        with pytest.raises(CheckFailed, match="thm-score-function"):
            nb.check("thm-score-function", expect(wrong), EXACT, atol=1e-10)

    z = MU + SIGMA * noise(N)
    nb.check_mc("thm-score-function", f(z)[:, None] * score(z), EXACT)
    with pytest.raises(CheckFailed, match="thm-score-function"):
        nb.check_mc("thm-score-function", f(z)[:, None] * score(noise(N)), EXACT)  # draws of another q

    top = 2.0  # uniform on (0, top): the score is -1/top, and the support moves
    z = top * torch.rand(N, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckFailed, match="thm-score-function"):
        nb.check_mc("thm-score-function", f(z) * (-1 / top), 2 * top / 3)

    logits = torch.tensor([0.5, 0.0, -0.5, -1.0], dtype=DOUBLE)
    pi, corners = logits.softmax(-1), torch.eye(4, dtype=DOUBLE)
    values = (torch.arange(4.0, dtype=DOUBLE) - 1) ** 3
    exact = pi * (values - pi @ values)
    g = values[:, None] * (corners - pi)
    nb.check("thm-score-function", pi @ g, exact, atol=1e-10)
    for unfair in (g.mean(0), pi @ (values[:, None] * corners)):  # not weighted by π; log-softmax not normalized
        with pytest.raises(CheckFailed, match="thm-score-function"):
            nb.check("thm-score-function", unfair, exact, atol=1e-10)


def test_lem_score_zero() -> None:
    """The score at draws of another q, the derivative of q for that of log q, a support that moves."""
    nb.check("lem-score-zero", expect(score(AT)), 0.0, atol=1e-10)
    density = log_q(AT, PHI).exp()[:, None]
    for wrong in (expect(score(AT + 0.1)), expect(density * score(AT)), torch.tensor(-1 / 2.0)):
        with pytest.raises(CheckFailed, match="lem-score-zero"):
            nb.check("lem-score-zero", wrong, 0.0, atol=1e-10)


def test_thm_baseline() -> None:
    """The mean of f as the best baseline, a wrong price for missing it, a baseline that knows the draw."""
    values, s = f(AT)[:, None], score(AT)
    price, mean = expect(s**2), expect(values)
    best = expect(values * s**2) / price
    assert torch.allclose(best, MU**2 + torch.tensor([3.0, 5.0], dtype=DOUBLE) * SIGMA**2)

    def second(b: Tensor | float) -> Tensor:
        return expect(((values - b) * s) ** 2)

    for b in (0.0, 2.0, 5.0):
        nb.check("thm-baseline", second(b), second(best) + (b - best) ** 2 * price, atol=1e-9)
        for center, factor in ((mean, price), (best, 1.0), (best, price / 2), (expect(values * s.abs()), price)):
            with pytest.raises(CheckFailed, match="thm-baseline"):
                nb.check("thm-baseline", second(b), second(center) + (b - center) ** 2 * factor, atol=1e-9)

    z = MU + SIGMA * noise(N)
    for b in (best, 5 * noise(N, 1, seed=1)):  # the best number, and a random one independent of z
        nb.check_mc("thm-baseline", (f(z)[:, None] - b) * score(z), EXACT)
    for b in (z, f(z) / 2):
        with pytest.raises(CheckFailed, match="thm-baseline"):
            nb.check_mc("thm-baseline", (f(z) - b)[:, None] * score(z), EXACT)


def test_prop_loo() -> None:
    """The mean with the own draw, the neighbour left out instead, and the factor n/(n-1): missing, inverted, off."""
    n = 10
    z = (MU + SIGMA * noise(N)).view(-1, n)
    values, s = f(z)[..., None], vmap(score)(z)
    total, average = values.sum(1, keepdim=True), values.mean(1, keepdim=True)
    loo, own = (values - (total - values) / (n - 1)) * s, (values - average) * s
    nb.check_mc("prop-loo", loo.mean(1), EXACT)
    nb.check_mc("prop-loo", loo, EXACT)  # every term
    nb.check_mc("prop-loo", own.mean(1), (n - 1) / n * EXACT)
    neighbour = (values - (total - values.roll(1, 1)) / (n - 1)) * s
    for wrong, expected in ((own, EXACT), (neighbour, EXACT), (loo, (n - 1) / n * EXACT), (own, n / (n - 1) * EXACT)):
        with pytest.raises(CheckFailed, match="prop-loo"):
            nb.check_mc("prop-loo", wrong.mean(1), expected)

    nb.check("prop-loo", loo.mean(1), n / (n - 1) * own.mean(1), atol=1e-9)
    for factor in (1.0, (n - 1) / n, (n + 1) / n):
        with pytest.raises(CheckFailed, match="prop-loo"):
            nb.check("prop-loo", loo.mean(1), factor * own.mean(1), atol=1e-9)
    unbiased_too = (values - (total - values) / n) * s  # 1/n for 1/(n-1): only the identity notices
    with pytest.raises(CheckFailed, match="prop-loo"):
        nb.check("prop-loo", unbiased_too.mean(1), n / (n - 1) * own.mean(1), atol=1e-9)


def test_thm_pathwise() -> None:
    """The velocity ∂T/∂φ lost, a T that samples another q, the slope at the noise; a jump; a KL the wrong way round."""
    nb.check("thm-pathwise", expect(pathwise_gradient(f, transform, PHI, NODES)), EXACT, atol=1e-10)
    velocity = torch.stack([torch.ones(80, dtype=DOUBLE), NODES], 1)
    nb.check("thm-pathwise", expect(2 * AT[:, None] * velocity), EXACT, atol=1e-10)  # the second form
    another = pathwise_gradient(f, lambda e, p: p[0] + p[1] ** 2 * e, PHI, NODES)  # a variance for the std
    for wrong in (2 * AT[:, None].expand(-1, 2), 2 * NODES[:, None] * velocity, -2 * AT[:, None] * velocity, another):
        with pytest.raises(CheckFailed, match="thm-pathwise"):
            nb.check("thm-pathwise", expect(wrong), EXACT, atol=1e-10)

    nb.check_mc("thm-pathwise", pathwise_gradient(f, transform, PHI, noise(N)), EXACT)
    edge = log_q(torch.tensor(0.0, dtype=DOUBLE), PHI).exp()  # the slope for μ of P(z > 0), where f has no Lipschitz C
    jump = pathwise_gradient(lambda z: 1.0 * (z > 0), transform, PHI, noise(N))
    with pytest.raises(CheckFailed, match="thm-pathwise"):
        nb.check_mc("thm-pathwise", jump[:, 0], edge)

    def log_ratio(e: Tensor, p: Tensor) -> Tensor:
        z = transform(e, p)
        return log_q(z, p) - gaussian_log_prob(z, torch.zeros((), dtype=DOUBLE), 1.0)

    g = vmap(grad(log_ratio, 1), (0, None))(noise(N), PHI)
    one = torch.ones(1, dtype=DOUBLE)
    nb.check_mc("thm-pathwise", g, grad(lambda p: gaussian_kl(p[:1], p[1:]))(PHI))
    with pytest.raises(CheckFailed, match="thm-pathwise"):
        nb.check_mc("thm-pathwise", g, grad(lambda p: gaussian_kl(0 * one, one, p[:1], p[1:]))(PHI))


def test_prop_quadratic_variance() -> None:
    """Each of the seventeen coefficients of the table off by one; a second moment for a variance."""
    # Rows: score function, with E f, with the best baseline, pathwise; columns μ, σ; of μ⁴/σ², μ², σ².
    table = torch.tensor(
        [
            [[1, 14, 15], [2, 60, 74]],
            [[0, 8, 10], [0, 40, 56]],
            [[0, 8, 6], [0, 40, 24]],
            [[0, 0, 4], [0, 4, 8]],
        ],
        dtype=DOUBLE,
    )

    def measured(mu: float, sigma: float) -> Tensor:
        p = torch.tensor([mu, sigma], dtype=DOUBLE)
        best = mu**2 + torch.tensor([3.0, 5.0], dtype=DOUBLE) * sigma**2
        z = transform(NODES, p)
        rows = [score_function_gradient(f, log_q, p, z, baseline=b) for b in (0.0, mu**2 + sigma**2, best)]
        rows.append(pathwise_gradient(f, transform, p, NODES))
        return torch.stack([expect((g - 2 * p) ** 2) for g in rows])

    points = ((1.5, 0.7), (-0.3, 2.0), (4.0, 0.1))
    got = torch.stack([measured(mu, sigma) for mu, sigma in points])
    powers = torch.tensor([[m**4 / s**2, m**2, s**2] for m, s in points], dtype=DOUBLE)
    nb.check("prop-quadratic-variance", got, torch.einsum("ijk,pk->pij", table, powers), atol=1e-6)
    assert int((table > 0).sum()) == 17
    for where in table.nonzero().tolist():
        wrong = table.clone()
        wrong[tuple(where)] += 1
        with pytest.raises(CheckFailed, match="prop-quadratic-variance"):
            nb.check("prop-quadratic-variance", got, torch.einsum("ijk,pk->pij", wrong, powers), atol=1e-6)
    uncentred = table + torch.tensor([[0, 4, 0], [0, 0, 4]], dtype=DOUBLE)
    with pytest.raises(CheckFailed, match="prop-quadratic-variance"):
        nb.check("prop-quadratic-variance", got, torch.einsum("ijk,pk->pij", uncentred, powers), atol=1e-6)


def test_prop_jump() -> None:
    """The boundary term: lost, of the wrong sign, without height, velocity or 1/σ, with the velocity elsewhere."""
    c = torch.tensor(1.0, dtype=DOUBLE)
    edge = log_q(c, PHI).exp()
    velocity = torch.stack([torch.ones((), dtype=DOUBLE), (c - MU) / SIGMA])
    mass_above = grad(lambda p: torch.special.ndtr((p[0] - c) / p[1]))(PHI)
    nb.check("prop-jump", edge * velocity, mass_above, atol=1e-12)
    elsewhere = torch.tensor([1.0, 1.0 / SIGMA], dtype=DOUBLE)
    for wrong in (-edge * velocity, edge * torch.ones(2), edge * SIGMA * velocity, edge * elsewhere):
        with pytest.raises(CheckFailed, match="prop-jump"):
            nb.check("prop-jump", wrong, mass_above, atol=1e-12)

    def stair(z: Tensor) -> Tensor:
        return z**2 + 3.0 * (z > 1.0)

    g = score_function_gradient(stair, log_q, PHI, MU + SIGMA * noise(N))
    nb.check_mc("prop-jump", g, EXACT + 3.0 * edge * velocity)
    for wrong in (EXACT, EXACT - 3.0 * edge * velocity, EXACT + edge * velocity, 3.0 * edge * velocity):
        with pytest.raises(CheckFailed, match="prop-jump"):
            nb.check_mc("prop-jump", g, wrong)

    # Two jumps, one of them down, and a curved T: z = exp(μ + σε), of velocity z·(1, ε).
    cuts, heights = torch.tensor([3.0, 6.0], dtype=DOUBLE), torch.tensor([3.0, -2.0], dtype=DOUBLE)
    at = (cuts.log() - MU) / SIGMA
    density = gaussian_log_prob(at, torch.zeros_like(at), 1.0).exp() / (SIGMA * cuts)
    speed = cuts * torch.stack([torch.ones_like(at), at])
    exact = grad(lambda p: heights @ torch.special.ndtr((p[0] - cuts.log()) / p[1]))(PHI)
    nb.check("prop-jump", speed @ (heights * density), exact, atol=1e-12)
    flat = torch.stack([torch.ones_like(at), at])
    for wrong in (speed @ (heights.abs() * density), speed @ density, flat @ (heights * density)):
        with pytest.raises(CheckFailed, match="prop-jump"):
            nb.check("prop-jump", wrong, exact, atol=1e-12)


def test_prop_oscillation() -> None:
    """Slips in the exponents, the sine for the cosine, a lost 1/2, 4 or σ², and r not at the double frequency."""
    w = torch.tensor([0.5, 1.0, 3.0], dtype=DOUBLE)
    a = w * SIGMA
    z = w * AT[:, None]
    path, score_function = w * z.cos(), z.sin() * NODES[:, None] / SIGMA
    assert torch.allclose(path[:, 2], pathwise_gradient(lambda v: torch.sin(3 * v), transform, PHI, NODES)[:, 0])

    slope = w * (-(a**2) / 2).exp() * (w * MU).cos()
    for g in (path, score_function):
        nb.check("prop-oscillation", expect(g), slope, atol=1e-9)
        for wrong in (-slope, slope / w, w * (-(a**2)).exp() * (w * MU).cos(), slope * (w * MU).tan()):
            with pytest.raises(CheckFailed, match="prop-oscillation"):
                nb.check("prop-oscillation", expect(g), wrong, atol=1e-9)

    def second_moments(double: float = 2.0, four: float = 4.0) -> tuple[Tensor, Tensor]:
        r = (-double * a**2).exp() * (double * w * MU).cos()
        return w**2 / 2 * (1 + r), (1 - (1 - four * a**2) * r) / (2 * SIGMA**2)

    right = second_moments()
    for g, moment in zip((path, score_function), right, strict=True):
        nb.check("prop-oscillation", expect(g**2), moment, atol=1e-9)
        for wrong in (moment - slope**2, 2 * moment, moment / w**2, moment * SIGMA**2):
            with pytest.raises(CheckFailed, match="prop-oscillation"):
                nb.check("prop-oscillation", expect(g**2), wrong, atol=1e-9)
    for g, wrong in (
        (path, w**2 - right[0]),  # 1 - r for 1 + r
        (path, second_moments(double=1.0)[0]),
        (score_function, second_moments(double=1.0)[1]),
        (score_function, second_moments(four=1.0)[1]),
        (score_function, second_moments(four=-4.0)[1]),
    ):
        with pytest.raises(CheckFailed, match="prop-oscillation"):
            nb.check("prop-oscillation", expect(g**2), wrong, atol=1e-9)


def test_thm_gumbel_max() -> None:
    """Noise of the other sign, with one logarithm, Gaussian or shared by the categories; probabilities for logits."""
    logits = torch.tensor([0.5, 0.0, -0.5, -1.0], dtype=DOUBLE)
    pi = logits.softmax(-1)
    u = torch.rand(N, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    g = -(-u.log()).log()

    def winners(scores: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(scores.argmax(-1), 4)

    nb.check_mc("thm-gumbel-max", winners(logits + g), pi)
    drawn = gumbel_softmax(logits.expand(N, 4), 0.3, hard=True, generator=torch.Generator().manual_seed(0))
    nb.check_mc("thm-gumbel-max", drawn, pi)  # as on the page; the temperature does not matter to the winner
    for scores in (logits - g, logits - u.log(), logits + noise(N, 4), logits + g[:, :1], pi + g, logits / 0.3 + g):
        with pytest.raises(CheckFailed, match="thm-gumbel-max"):
            nb.check_mc("thm-gumbel-max", winners(scores), pi)


def test_prop_low_temperature() -> None:
    """Straight-through as if it were exact, the midpoint for the trapezoid, a lost 1/2, 1 - π or sign."""
    t = torch.linspace(-60, 60, 40_001, dtype=DOUBLE)

    def logistic(x: Tensor) -> Tensor:
        return x.sigmoid() * (-x).sigmoid()

    def two_categories(tau: float, slope: Tensor) -> Tensor:
        return torch.trapezoid(logistic(tau * t - 0.5) * logistic(t) * slope, t)

    weight = logistic(torch.tensor(0.5, dtype=DOUBLE))
    slopes = 3 * t.sigmoid() ** 2, 3.0 * (t > 0)  # f(y) = y1³
    means = torch.stack([two_categories(1e-4, slope) for slope in slopes])
    nb.check("prop-low-temperature", means, weight * torch.tensor([1.0, 1.5]), atol=1e-3)
    first = torch.tensor(0.5, dtype=DOUBLE).sigmoid()
    for wrong in ([1.0, 1.0], [1.0, 0.75], [1.0, 3.0], [0.5, 1.5], [-1.0, -1.5], [1.5, 1.5]):
        with pytest.raises(CheckFailed, match="prop-low-temperature"):
            nb.check("prop-low-temperature", means, weight * torch.tensor(wrong), atol=1e-3)
    with pytest.raises(CheckFailed, match="prop-low-temperature"):
        nb.check("prop-low-temperature", means, first * torch.tensor([1.0, 1.5]), atol=1e-3)

    both = torch.stack([two_categories(1e-4, slope) for slope in (2 * t.sigmoid(), 2.0 * (t > 0))])
    nb.check("prop-low-temperature", both, weight, atol=1e-3)  # f(y) = y1²: exact for both
    for hard in (False, True):  # the integrals are those of the package's samples
        leaf = torch.tensor([0.5, 0.0], dtype=DOUBLE).expand(N, 2).clone().requires_grad_()
        y = gumbel_softmax(leaf, 0.1, hard=hard, generator=torch.Generator().manual_seed(0))
        (y[:, 0] ** 3).sum().backward()
        assert leaf.grad is not None
        nb.check_mc("prop-low-temperature", leaf.grad[:, 0], two_categories(0.1, slopes[hard]))
        with pytest.raises(CheckFailed, match="prop-low-temperature"):
            nb.check_mc("prop-low-temperature", leaf.grad[:, 0], two_categories(0.1, slopes[not hard]))

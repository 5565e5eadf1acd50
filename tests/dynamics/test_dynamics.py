"""Samplers and likelihoods against closed forms: linear equations, Gaussians, exact mixtures of Gaussians."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import nblib as nb
from nblib import dynamics, paths
from nblib.data.toy import GaussianMixture
from nblib.errors import CheckFailed, DataError

D = torch.float64
Field = Callable[[Tensor, float], Tensor]


def tensor(value: object) -> Tensor:
    return torch.tensor(value, dtype=D)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=seeded(seed))


MIXTURE = GaussianMixture(
    tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -1.0]]),
    tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.2]]]),
    tensor([0.5, 0.3, 0.2]),
)
POINT = tensor([[0.7, -1.2]])
VARIANCE = tensor([0.25, 2.0])
VP = paths.vp()
GAUSSIAN = GaussianMixture(POINT, torch.diag(VARIANCE).unsqueeze(0))


def field(path: paths.Path, to: str, mixture: GaussianMixture = MIXTURE) -> Field:
    return lambda x, t: paths.posterior_mean(mixture, path, x, t, to)


def slopes(steps: Sequence[int], errors: Sequence[float]) -> list[float]:
    """Of the logarithm of the error against that of the number of steps, from each to the next."""
    pairs = itertools.pairwise(zip(steps, errors, strict=True))
    return [math.log(e / f) / math.log(n / m) for (m, e), (n, f) in pairs]


# --- grids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", dynamics.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_a_grid_increases_and_has_exact_ends(kind: str, steps: int) -> None:
    grid = dynamics.times(steps, kind, path=paths.vp(), start=0.01, end=0.97)
    assert len(grid) == steps + 1
    assert grid[0] == 0.01
    assert grid[-1] == 0.97
    assert all(isinstance(t, float) for t in grid)
    assert all(s < t for s, t in itertools.pairwise(grid))


def test_the_grids_are_even_in_what_they_are_named_after() -> None:
    path = paths.vp()
    uniform, quadratic = (tensor(dynamics.times(10, kind)) for kind in ("uniform", "quadratic"))
    nb.check("uniform", uniform.diff(), 0.1, atol=1e-12)
    nb.check("quadratic", (1 - quadratic).sqrt().diff(), -0.1, atol=1e-12)
    even = tensor(dynamics.times(10, "log-snr", path=path, end=0.99))
    steps = path.log_snr(even).diff()
    nb.check("log-snr", steps, steps.mean(), atol=1e-8)
    for rho in (1.0, 7.0):
        edm = tensor(dynamics.times(10, "edm", path=path, end=0.99, rho=rho))
        steps = ((path.b(edm) / path.a(edm)) ** (1 / rho)).diff()
        nb.check("edm", steps, steps.mean(), atol=1e-8)


def test_the_edm_grid_is_that_of_its_paper() -> None:
    path, n, rho = paths.ve(0.002, 80.0), 17, 7.0
    sigma = [(80 ** (1 / rho) + i / n * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n + 1)]
    nb.check("sigma", path.b(tensor(dynamics.times(n, "edm", path=path))), sigma, rtol=1e-9)


def test_the_edm_grid_reaches_noise_zero() -> None:
    grid = dynamics.times(8, "edm", path=paths.vp())
    assert grid[-1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 4, "start": 0.5, "end": 0.5}, "start=0.5, end=0.5"),
        ({"steps": 4, "end": 1.5}, "end=1.5"),
        ({"steps": 4, "start": -0.1}, "start=-0.1"),
        ({"steps": 4, "rho": 0.0}, "rho=0"),
        ({"steps": 4, "kind": "unifrom"}, "Did you mean 'uniform'"),
        ({"steps": 4, "kind": "edm"}, "give path"),
        ({"steps": 4, "kind": "edm", "path": paths.linear()}, "Choose start > 0"),
        ({"steps": 4, "kind": "log-snr", "path": paths.vp()}, "end < 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dynamics.times(**arguments)


# --- ordinary differential equations ---------------------------------------------------------------------

MATRIX = tensor([[-1.0, 2.0], [-1.5, 0.3]])


def linear_velocity(x: Tensor, t: float) -> Tensor:
    return x @ MATRIX.T + 2 * t * x


def linear_solution(x: Tensor) -> Tensor:
    return x @ torch.linalg.matrix_exp(MATRIX + torch.eye(2, dtype=D)).T


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_a_fixed_step_method_has_its_order(method: str, order: int) -> None:
    x, steps = normal(5, 2), (20, 40, 80, 160)
    errors = [
        float((dynamics.ode(linear_velocity, x, dynamics.times(n), method=method) - linear_solution(x)).norm())
        for n in steps
    ]
    nb.check("order", slopes(steps, errors)[-1], order, atol=0.1)


@pytest.mark.parametrize("method", dynamics.METHODS)
def test_an_ode_is_undone_by_decreasing_times(method: str) -> None:
    x, grid = normal(5, 2), dynamics.times(3 if method == "dopri5" else 300)
    there = dynamics.ode(linear_velocity, x, grid, method=method, rtol=1e-8, atol=1e-8)
    back = dynamics.ode(linear_velocity, there, grid[::-1], method=method, rtol=1e-8, atol=1e-8)
    nb.check("back", back, x, atol=0.1 if method == "euler" else 1e-3)


@pytest.mark.parametrize("grid", [[0.0, 1.0], [0.0, 0.2, 0.9, 1.0]])
def test_dopri5_keeps_its_tolerance(grid: list[float]) -> None:
    x = normal(5, 2)
    exact = linear_solution(x)
    for tol in (1e-5, 1e-7, 1e-10):
        error = (dynamics.ode(linear_velocity, x, grid, method="dopri5", rtol=tol, atol=tol) - exact).abs()
        assert (error <= tol * (1 + exact.abs().max())).all()
        assert error.max() > 1e-3 * tol


def test_dopri5_asks_for_no_time_outside_its_interval() -> None:
    seen: list[float] = []

    def slow(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return 1e-6 * x

    dynamics.ode(slow, normal(3, 2), [0.0, 1.0], method="dopri5")
    dynamics.ode(slow, normal(3, 2), [1.0, 0.0], method="dopri5")
    assert min(seen) >= 0
    assert max(seen) <= 1


@pytest.mark.parametrize(
    ("velocity", "rtol"),
    [
        (lambda x, t: x / abs(t - 0.5 + 1e-30) ** 1.5, 1e-6),
        (lambda x, t: x * math.nan, 1e-6),
        (lambda x, t: x**3 * 1e4, 1e-6),
        (lambda x, t: (1e6 * x).sin(), 1e-16),
    ],
    ids=["singular", "nan", "blows up", "too strict"],
)
def test_dopri5_without_a_small_enough_step_says_so(
    velocity: Field, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamics, "MAX_STEPS", 500)
    x = torch.ones(2, 2, dtype=D)
    with pytest.raises(DataError, match=r"dopri5 found no step small enough between t=0 and t=1 .* loosen"):
        dynamics.ode(velocity, x, [0.0, 1.0], method="dopri5", rtol=rtol, atol=rtol)


def test_a_step_of_dopri5_below_rounding_is_named() -> None:
    with pytest.raises(DataError, match=r"underflow in dt .* use float64"):
        dynamics.ode(lambda x, t: x * math.nan, torch.ones(2, 2), [0.0, 1.0], method="dopri5")


def test_an_assertion_of_the_field_passes_through_dopri5() -> None:
    def broken(x: Tensor, t: float) -> Tensor:
        raise CheckFailed("mine")

    with pytest.raises(CheckFailed, match="mine"):
        dynamics.ode(broken, normal(2, 2), [0.0, 1.0], method="dopri5")


# --- exponential integrators -----------------------------------------------------------------------------


def gaussian_flow(path: paths.Path, x: Tensor, start: float, end: float) -> Tensor:
    """The probability-flow ODE of Gaussian data: the affine map between the marginals."""
    (a, b), (c, d) = ((path.a(tensor(t)), path.b(tensor(t))) for t in (start, end))
    scale = ((c**2 * VARIANCE + d**2) / (a**2 * VARIANCE + b**2)).sqrt()
    return c * POINT + scale * (x - a * POINT)


@pytest.mark.parametrize("name", sorted(paths.PATHS))
@pytest.mark.parametrize("steps", [1, 3])
def test_ddim_is_exact_for_one_data_point(name: str, steps: int) -> None:
    path = paths.make(name)
    x0 = normal(6, 2)
    grid = dynamics.times(steps, end=0.9)
    a, b = path.a(tensor(grid)), path.b(tensor(grid))
    start = a[0] * POINT + b[0] * x0

    def data(x: Tensor, t: float) -> Tensor:
        return POINT.expand_as(x)

    expected = a[-1] * POINT + b[-1] * x0
    nb.check("ddim", dynamics.ddim(path, data, start, grid), expected, atol=1e-10)
    nb.check("multistep", dynamics.multistep(path, data, start, grid), expected, atol=1e-10)
    if float(a[0]) > 0:
        nb.check("edm", dynamics.edm(path, data, start, grid), expected, atol=1e-10)
    clean = dynamics.ddim(path, data, start, dynamics.times(steps))
    nb.check("data", clean, path.a(tensor(1.0)) * POINT + path.b(tensor(1.0)) * x0, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "vp", "vp-cosine", "sub-vp", "ve", "trigonometric"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("multistep", 2), ("edm", 2), ("heun", 2)])
def test_a_deterministic_sampler_has_its_order_on_gaussian_data(name: str, sampler: str, order: int) -> None:
    path, steps, start, end = paths.make(name), (80, 160, 320), 0.02, 0.99
    x = path.prior_std * normal(8, 2)
    errors = []
    for n in steps:
        grid = dynamics.times(n, "log-snr", path=path, start=start, end=end)
        if sampler == "ddim":
            got = dynamics.ddim(path, field(path, "data", GAUSSIAN), x, grid)
        elif sampler == "multistep":
            got = dynamics.multistep(path, field(path, "data", GAUSSIAN), x, grid)
        elif sampler == "edm":
            got = dynamics.edm(path, field(path, "data", GAUSSIAN), x, grid)
        else:
            got = dynamics.ode(field(path, "velocity", GAUSSIAN), x, grid, method="heun")
        errors.append(float((got - gaussian_flow(path, x, start, end)).norm()))
    nb.check("order", slopes(steps, errors)[-1], order, atol=0.25)


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_the_errors_on_a_mixture_fall_with_the_steps(name: str) -> None:
    path = paths.make(name)
    x, end, steps = normal(64, 2), 0.99, (40, 80, 160)
    velocity, data = field(path, "velocity"), field(path, "data")
    exact = dynamics.ode(velocity, x, dynamics.times(500, end=end), method="rk4")
    samplers: list[tuple[int, Callable[[list[float]], Tensor]]] = [
        (1, lambda grid: dynamics.ode(velocity, x, grid)),
        (1, lambda grid: dynamics.ddim(path, data, x, grid)),
        (2, lambda grid: dynamics.multistep(path, data, x, grid)),
        (2, lambda grid: dynamics.ode(velocity, x, grid, method="heun")),
    ]
    for order, sampler in samplers:
        # The median: a trajectory near the border of two modes may change sides.
        errors = [float((sampler(dynamics.times(n, end=end)) - exact).norm(dim=1).median()) for n in steps]
        assert errors[0] > errors[1] > errors[2]
        nb.check("order", slopes(steps, errors)[-1], order, atol=0.3)


def test_on_the_straight_path_ddim_is_eulers_method() -> None:
    path, x, grid = paths.linear(), normal(32, 2), dynamics.times(9)
    euler = dynamics.ode(field(path, "velocity"), x, grid)
    nb.check("ddim", dynamics.ddim(path, field(path, "data"), x, grid), euler, atol=1e-10)


def test_multistep_of_order_one_is_ddim() -> None:
    path, x, grid = paths.vp(), normal(32, 2), dynamics.times(9)
    ddim = dynamics.ddim(path, field(path, "data"), x, grid)
    nb.check("order 1", dynamics.multistep(path, field(path, "data"), x, grid, 1), ddim, atol=1e-10)
    assert (dynamics.multistep(path, field(path, "data"), x, grid) - ddim).abs().max() > 1e-2


@pytest.mark.parametrize("name", sorted(paths.PATHS))
def test_multistep_is_finite_from_pure_noise_to_data(name: str) -> None:
    path = paths.make(name)
    for n in (1, 2, 3, 10):
        x = path.prior_std * normal(16, 2)
        got = dynamics.multistep(path, field(path, "data"), x, dynamics.times(n))
        assert got.isfinite().all()
        assert got.abs().max() < 6


def test_edm_is_heun_in_the_noise_level_and_sees_no_path() -> None:
    """On the grid of one path, and on the times of another with the same noise levels."""
    ve, vp = paths.ve(0.01, 10.0), paths.vp()
    grid = dynamics.times(12, "edm", path=ve)
    sigma, x = ve.b(tensor(grid)), 10 * normal(64, 2)

    def slope(level: Tensor, y: Tensor) -> Tensor:
        blurred = GaussianMixture(MIXTURE.means, MIXTURE.covs + level**2 * torch.eye(2, dtype=D), MIXTURE.weights)
        return -level * blurred.score(y)

    expected = x
    for now, after in itertools.pairwise(sigma[:-1]):
        guess = expected + (after - now) * slope(now, expected)
        expected = expected + (after - now) / 2 * (slope(now, expected) + slope(after, guess))
    expected = expected + (sigma[-1] - sigma[-2]) * slope(sigma[-2], expected)
    nb.check("by hand", dynamics.edm(ve, field(ve, "data"), x, grid), expected, atol=1e-9)
    other = vp.time_of_log_snr(-2 * sigma.log())
    start = vp.a(other[0]) * x
    last = dynamics.edm(vp, field(vp, "data"), start, [*other.tolist()])
    euler_at_the_end = dynamics.edm(ve, field(ve, "data"), x, grid[:-1])
    moved = dynamics.edm(vp, field(vp, "data"), start, other.tolist()[:-1])
    nb.check("path", moved / vp.a(other[-2]), euler_at_the_end, atol=1e-6)
    assert (last / vp.a(other[-1]) - expected).abs().max() > 1e-9  # Heun there, for t < 1


def test_churn_adds_the_noise_that_its_paper_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For data of one point at the origin a step from raised noise shrinks y by the ratio of the noise levels."""
    path, grid = paths.ve(0.01, 10.0), [0.0, 0.2, 0.4, 0.6]
    sigma = path.b(tensor(grid))
    z = [normal(5, 2, seed=i) for i in range(3)]
    monkeypatch.setattr(dynamics, "_noise", lambda *_: lambda i: z[i])
    y = x = normal(5, 2, seed=9)
    for i, gamma in enumerate([0.0, 0.1, 0.1]):  # none at the start, which has no more noise to give
        high = (1 + gamma) * sigma[i]
        y = (y + (high**2 - sigma[i] ** 2).sqrt() * z[i]) * sigma[i + 1] / high
    got = dynamics.edm(path, lambda x, t: 0 * x, x, grid, churn=0.3)
    nb.check("churn", got, y, atol=1e-9)
    plain = dynamics.edm(path, lambda x, t: 0 * x, x, grid, churn=0.3, between=(20.0, 30.0))
    nb.check("outside", plain, x * sigma[3] / sigma[0], atol=1e-9)
    most = dynamics.edm(path, lambda x, t: 0 * x, x, grid, churn=1e6)
    least = dynamics.edm(path, lambda x, t: 0 * x, x, grid, churn=3 * (math.sqrt(2) - 1))
    nb.check("capped", most, least, atol=1e-9)


# --- stochastic samplers against the target --------------------------------------------------------------


def check_law(samples: Tensor, target: GaussianMixture) -> None:
    """Mean, second moments, mean log-density and a bounded statistic, all within four standard errors."""
    nb.check_mc("mean", samples, target.mean)
    second = target.cov + target.mean.unsqueeze(-1) * target.mean
    nb.check_mc("second", samples.unsqueeze(-1) * samples.unsqueeze(-2), second)
    known = target.sample(100_000, generator=seeded(99))
    for statistic in (target.log_prob, lambda x: (x * tensor([1.3, -2.1])).sum(-1).cos()):
        got, expected = statistic(samples), statistic(known)
        error = math.sqrt(float(got.var()) / len(got) + float(expected.var()) / len(expected))
        assert abs(float(got.mean() - expected.mean())) < 4 * error


def start(path: paths.Path, n: int, t: float = 0.0) -> Tensor:
    return paths.marginal(MIXTURE, path, t).sample(n, generator=seeded(1))


COUNT = 2000
Sampler = Callable[[paths.Path, Tensor, list[float], torch.Generator | None], Tensor]
SAMPLERS: dict[str, Sampler] = {
    "euler": lambda p, x, grid, g: dynamics.ode(field(p, "velocity"), x, grid),
    "midpoint": lambda p, x, grid, g: dynamics.ode(field(p, "velocity"), x, grid, method="midpoint"),
    "multistep": lambda p, x, grid, g: dynamics.multistep(p, field(p, "data"), x, grid),
    "edm": lambda p, x, grid, g: dynamics.edm(p, field(p, "data"), x, grid),
    "churn": lambda p, x, grid, g: dynamics.edm(p, field(p, "data"), x, grid, churn=40.0, generator=g),
    "ddim": lambda p, x, grid, g: dynamics.ddim(p, field(p, "data"), x, grid),
    "ddim half": lambda p, x, grid, g: dynamics.ddim(p, field(p, "data"), x, grid, eta=0.5, generator=g),
    "ddim one": lambda p, x, grid, g: dynamics.ddim(p, field(p, "data"), x, grid, eta=1.0, generator=g),
    "ancestral": lambda p, x, grid, g: dynamics.ancestral(p, field(p, "data"), x, grid, generator=g),
    "forward": lambda p, x, grid, g: dynamics.ancestral(p, field(p, "data"), x, grid, generator=g, variance="forward"),
    "sde half": lambda p, x, grid, g: dynamics.sde(
        p, field(p, "score"), field(p, "velocity"), x, grid, noise=0.5, generator=g
    ),
    "sde": lambda p, x, grid, g: dynamics.sde(p, field(p, "score"), field(p, "velocity"), x, grid, generator=g),
    "predictor-corrector": lambda p, x, grid, g: dynamics.predictor_corrector(
        p, field(p, "score"), x, grid, generator=g
    ),
}


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_with_the_exact_field_reaches_the_target(name: str, sampler: str) -> None:
    path = paths.ve(0.01, 10.0) if name == "ve" else paths.make(name)
    # Where a is near 0 Euler's method needs steps short beside a / da.
    begin = 0.05 if name == "linear" and "sde" in sampler else 1e-3
    grid = dynamics.times(250, "edm" if name == "ve" else "quadratic", path=path, start=begin)
    samples = SAMPLERS[sampler](path, start(path, COUNT, begin), grid, seeded(2))
    check_law(samples, MIXTURE)


def test_a_law_that_is_not_the_target_fails() -> None:
    path = paths.vp()
    samples = SAMPLERS["sde"](path, start(path, COUNT), dynamics.times(8), seeded(2))
    with pytest.raises((CheckFailed, AssertionError)):
        check_law(samples, MIXTURE)
    with pytest.raises((CheckFailed, AssertionError)):
        check_law(1.05 * MIXTURE.sample(COUNT, generator=seeded(3)), MIXTURE)


@pytest.mark.parametrize("name", ["linear", "vp", "vp-cosine", "ve", "sub-vp", "trigonometric"])
def test_ddim_with_eta_one_is_ancestral_sampling_step_by_step(name: str) -> None:
    path = paths.make(name)
    x, grid = path.prior_std * normal(50, 2), dynamics.times(12)
    one: list[Tensor] = []
    two: list[Tensor] = []
    dynamics.ddim(
        path, field(path, "data"), x, grid, eta=1.0, generator=seeded(4), callback=lambda i, t, y: one.append(y)
    )
    dynamics.ancestral(path, field(path, "data"), x, grid, generator=seeded(4), callback=lambda i, t, y: two.append(y))
    nb.check("steps", torch.stack(one), torch.stack(two), atol=1e-9, rtol=1e-9)
    forward = dynamics.ancestral(path, field(path, "data"), x, grid, generator=seeded(4), variance="forward")
    assert (forward - two[-1]).abs().max() > 1e-3


def test_one_ancestral_step_has_ddpms_mean_and_variances() -> None:
    path, steps, k = paths.vp(), 20, 8
    betas = paths.ddpm_betas(path, steps)
    bars = (1 - betas).cumprod(0)
    beta, bar, before = betas[k - 1], bars[k - 1], bars[k - 2]
    x, d = torch.full((40_000, 1), 0.8, dtype=D), 0.3
    mean = before.sqrt() * beta / (1 - bar) * d + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x[0]
    grid = [1 - k / steps, 1 - (k - 1) / steps, 1 - (k - 2) / steps]
    for variance, expected in (("posterior", (1 - before) / (1 - bar) * beta), ("forward", beta)):
        seen: list[Tensor] = []
        dynamics.ancestral(
            path,
            lambda y, t: torch.full_like(y, d),
            x,
            grid,
            variance=variance,
            callback=lambda i, t, y, seen=seen: seen.append(y),
        )
        nb.check_mc("mean", seen[0], mean)
        nb.check_mc("variance", (seen[0] - mean) ** 2, expected)


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
def test_the_sde_without_noise_is_eulers_method_step_by_step(name: str) -> None:
    path = paths.make(name)
    x, grid = path.prior_std * normal(50, 2), dynamics.times(12, start=0.01)
    one: list[Tensor] = []
    two: list[Tensor] = []
    velocity, score = field(path, "velocity"), field(path, "score")
    dynamics.sde(path, score, velocity, x, grid, noise=0.0, callback=lambda i, t, y: one.append(y))
    dynamics.ode(velocity, x, grid, callback=lambda i, t, y: two.append(y))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    converted = dynamics.sde(path, score, None, x, grid, noise=0.0)
    nb.check("from the score", converted, two[-1], atol=1e-8, rtol=1e-8)
    pair = [dynamics.sde(path, score, v, x, grid, generator=seeded(5)) for v in (velocity, None)]
    nb.check("with noise", pair[0], pair[1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("name", ["vp", "linear"])
def test_the_sde_keeps_the_marginals_of_the_path(name: str, noise: float) -> None:
    path, begin = paths.make(name), 0.1
    grid = dynamics.times(450, start=begin)
    seen: dict[float, Tensor] = {}

    def watch(i: int, t: float, x: Tensor) -> None:
        if i + 1 in (110, 225, 340, 430):
            seen[t] = x

    x = start(path, COUNT, begin)
    dynamics.sde(
        path, field(path, "score"), field(path, "velocity"), x, grid, noise=noise, generator=seeded(6), callback=watch
    )
    assert len(seen) == 4
    for t, state in seen.items():
        check_law(state, paths.marginal(MIXTURE, path, t))


def test_the_last_step_adds_no_noise() -> None:
    x, grid = normal(4, 2), [0.3, 0.6]
    for name in ("ddim one", "ancestral", "forward", "sde", "sde by score"):
        assert torch.equal(everything(x, grid)[name](), everything(x, grid)[name]())
    predictor = [
        dynamics.predictor_corrector(paths.vp(), lambda y, t: -y, x, grid, corrector_steps=0) for _ in range(2)
    ]
    assert torch.equal(*predictor)


def test_the_corrector_takes_the_step_of_its_formula() -> None:
    path, x, grid = paths.vp(), torch.full((20_000, 1), 0.9, dtype=D), [0.6, 0.7]
    plain, moved = (
        dynamics.predictor_corrector(path, lambda y, t: -y, x, grid, snr=0.3, corrector_steps=k) for k in (0, 1)
    )
    step = 2 * (0.3 * path.b(tensor(0.6))) ** 2
    # The last predictor is linear here: what it does to x it does to the corrected x.
    before = moved / (plain / x)
    nb.check_mc("mean", before, 0.9 * (1 - step))
    nb.check_mc("variance", (before - 0.9 * (1 - step)) ** 2, 2 * step)


def test_the_corrector_alone_mends_a_wrong_start() -> None:
    path, grid = paths.vp(), [0.5, 0.5001]
    target = paths.marginal(MIXTURE, path, 0.5)
    wrong = target.sample(COUNT, generator=seeded(7)) + 1.0
    with pytest.raises(CheckFailed):
        check_law(wrong, target)
    mended = dynamics.predictor_corrector(
        path, field(path, "score"), wrong, grid, snr=0.1, corrector_steps=400, generator=seeded(8)
    )
    check_law(mended, target)


# --- Langevin dynamics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.02, 0.1])
def test_unadjusted_langevin_has_the_bias_of_the_closed_form_and_metropolis_none(step: float) -> None:
    variance = tensor([0.25, 1.0])
    x = normal(6000, 2, seed=9) * variance.sqrt()
    biased = variance / (1 - step / (2 * variance))

    def log_density(y: Tensor) -> Tensor:
        return -0.5 * (y**2 / variance).sum(-1)

    plain = dynamics.langevin(lambda y: -y / variance, x, step=step, steps=250)
    nb.check_mc("plain", plain**2, biased)
    exact = dynamics.langevin(lambda y: -y / variance, x, step=step, steps=250, metropolis=log_density)
    nb.check_mc("metropolis", exact**2, variance)
    if step == 0.1:
        with pytest.raises(CheckFailed):
            nb.check_mc("plain", plain**2, variance)


def test_metropolis_keeps_a_mixture_and_finds_it_from_elsewhere() -> None:
    for begin in (MIXTURE.sample(COUNT, generator=seeded(10)), normal(COUNT, 2, seed=11)):
        samples = dynamics.langevin(
            MIXTURE.score, begin, step=0.15, steps=400, generator=seeded(12), metropolis=MIXTURE.log_prob
        )
        check_law(samples, MIXTURE)


def test_metropolis_rejects_whole_rows_and_accepts_by_the_known_probability() -> None:
    step, x = 0.8, torch.full((40_000, 1, 1), 0.3, dtype=D)

    def log_density(y: Tensor) -> Tensor:
        return -0.5 * y.flatten(1).square().sum(1)

    z = normal(1_000_000, seed=13)
    new = 0.3 - step * 0.3 + math.sqrt(2 * step) * z
    there, back = new - 0.3 * (1 - step), 0.3 - new * (1 - step)
    expected = (0.5 * (0.09 - new**2) + (there**2 - back**2) / (4 * step)).clamp_max(0).exp().mean()
    moved = dynamics.langevin(lambda y: -y, x, step=step, steps=1, metropolis=log_density)
    nb.check_mc("acceptance", (moved != x).double(), expected)


FAR = GaussianMixture(tensor([[-8.0, 0.0], [8.0, 0.0]]), tensor([0.5, 0.5]), tensor([0.2, 0.8]))


def blurred(sigma: float) -> GaussianMixture:
    return GaussianMixture(FAR.means, FAR.covs + sigma**2 * torch.eye(2, dtype=D), FAR.weights)


def test_annealing_finds_the_weights_of_far_modes_and_plain_langevin_does_not() -> None:
    sigmas = torch.logspace(1.3, -1.3, 16, dtype=D).tolist()
    x = 20 * normal(2000, 2, seed=14)
    annealed = dynamics.annealed_langevin(lambda y, s: blurred(s).score(y), x, sigmas, steps=40, generator=seeded(15))
    plain = dynamics.langevin(FAR.score, x, step=0.05, steps=640, generator=seeded(15))
    nb.check_mc("weight", (annealed[:, 0] > 0).double(), 0.8)
    right = annealed[annealed[:, 0] > 0]
    nb.check_mc("mode", right, FAR.means[1])
    nb.check("width", right.std(0), 0.5, atol=0.05)
    with pytest.raises(CheckFailed):
        nb.check_mc("weight", (plain[:, 0] > 0).double(), 0.8)


def test_the_last_annealed_step_is_the_mean_of_the_data() -> None:
    got = dynamics.annealed_langevin(lambda y, s: (POINT - y) / s**2, normal(5, 2), [1.0, 0.3], steps=3)
    nb.check("point", got, POINT.expand(5, 2), atol=1e-12)


# --- likelihood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "vp", "ve", "trigonometric"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_log_density_of_the_exact_flow_is_exact(name: str, method: str) -> None:
    path = paths.ve(0.01, 10.0) if name == "ve" else paths.make(name)
    end = 0.999 if name == "vp" else 1.0
    target = paths.marginal(MIXTURE, path, end)
    x = target.sample(100, generator=seeded(16))
    grid = dynamics.times(100, end=end) if method == "rk4" else [0.0, end]
    base, close = paths.marginal(MIXTURE, path, 0.0), 1e-6
    with torch.no_grad():
        got = dynamics.log_prob(
            field(path, "velocity"), x, grid, base=base.log_prob, method=method, rtol=close, atol=close
        )
    nb.check("log_prob", got, target.log_prob(x), atol=1e-3)
    if name in ("linear", "trigonometric"):
        with torch.no_grad():
            got = dynamics.log_prob(field(path, "velocity"), x, grid, method=method, rtol=close, atol=close)
        nb.check("normal base", got, target.log_prob(x), atol=1e-3)


def mixing(dims: int, seed: int = 17) -> Tensor:
    return 0.4 * normal(dims, dims, seed=seed)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("std", [1.0, 2.5])
def test_the_log_density_of_a_linear_flow_at_every_rank(shape: tuple[int, ...], std: float) -> None:
    dims = math.prod(shape)
    weight, x = mixing(dims), normal(7, *shape, seed=18)

    def velocity(y: Tensor, t: float) -> Tensor:
        return (y.flatten(1) @ weight.T).view_as(y)

    source = x.flatten(1) @ torch.linalg.matrix_exp(-weight).T
    expected = Normal(tensor(0.0), tensor(std)).log_prob(source).sum(1) - weight.trace()
    grid = dynamics.times(30)
    nb.check("nats", dynamics.log_prob(velocity, x, grid, prior_std=std), expected, atol=1e-6)
    bits = dynamics.log_prob(velocity, x, grid, prior_std=std, unit="bits/dim")
    nb.check("bits", bits, -expected / (dims * math.log(2)), atol=1e-6)


@pytest.mark.parametrize("divergence", ["gaussian", "rademacher"])
@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinsons_estimate_is_unbiased(divergence: str, probes: int) -> None:
    weight, x = mixing(4), normal(1, 2, 2, seed=19).expand(8000, 2, 2)

    def velocity(y: Tensor, t: float) -> Tensor:
        return (y.flatten(1) @ weight.T).view_as(y)

    with torch.no_grad():
        exact = dynamics.log_prob(velocity, x[:1], dynamics.times(4))
        got = dynamics.log_prob(velocity, x, dynamics.times(4), divergence=divergence, probes=probes)
    nb.check_mc("log_prob", got, exact)
    both = weight + weight.T
    diagonal = 0.0 if divergence == "gaussian" else float((weight.diagonal() ** 2).sum() * 2)
    variance = (float((both**2).sum()) / 2 - diagonal) / probes
    nb.check_mc("variance", (got - exact) ** 2, variance)


def test_hutchinsons_estimate_is_unbiased_on_the_mixture() -> None:
    path = paths.linear()
    x = tensor([[0.5, 0.4]]).expand(3000, 2)
    with torch.no_grad():
        for divergence in ("gaussian", "rademacher"):
            got = dynamics.log_prob(
                field(path, "velocity"), x, dynamics.times(40), divergence=divergence, generator=seeded(20)
            )
            nb.check_mc("log_prob", got, MIXTURE.log_prob(x[0]))


def test_a_diagonal_jacobian_needs_one_rademacher_probe() -> None:
    x, rate = normal(9, 3, seed=21), tensor([0.3, -0.5, 1.0])
    exact, sign, gauss = (
        dynamics.log_prob(lambda y, t: rate * y, x, dynamics.times(5), divergence=divergence)
        for divergence in ("exact", "rademacher", "gaussian")
    )
    nb.check("rademacher", sign, exact, atol=1e-12)
    assert (gauss - exact).abs().max() > 1e-3


def test_the_likelihood_is_differentiable_and_costs_no_graph_without_gradients() -> None:
    rate = torch.tensor(0.4, dtype=D, requires_grad=True)
    x = normal(6, 2, seed=22).requires_grad_()
    value = dynamics.log_prob(lambda y, t: rate * y, x, dynamics.times(40)).sum()
    by_rate, by_x = torch.autograd.grad(value, (rate, x))
    shrunk = (-2 * rate).exp() * x
    nb.check("parameter", by_rate, ((-2 * rate).exp() * x**2).sum() - 12, atol=1e-6)
    nb.check("data", by_x, -shrunk, atol=1e-6)
    with torch.no_grad():
        assert not dynamics.log_prob(lambda y, t: rate * y, x, dynamics.times(4)).requires_grad


def test_the_second_derivatives_of_the_field_reach_the_parameters() -> None:
    x, h = normal(5, 2, seed=23), 1e-5

    def value(rate: Tensor) -> Tensor:
        return dynamics.log_prob(lambda y, t: (rate * y).tanh(), x, dynamics.times(10)).sum()

    rate = torch.tensor(0.7, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(value(rate), rate)
    with torch.no_grad():
        nb.check("slope", slope, (value(rate + h) - value(rate - h)) / (2 * h), atol=1e-6)


# --- what holds for all ----------------------------------------------------------------------------------


def everything(
    x: Tensor, grid: list[float], generator: torch.Generator | None = None, **watch: Any
) -> dict[str, Callable[[], Tensor]]:
    """Every fixed-step sampler on a field made of arithmetic only."""
    p = VP

    def f(y: Tensor, t: float) -> Tensor:
        return -y * (0.5 + t)

    def log_density(y: Tensor) -> Tensor:
        return -0.5 * y.flatten(1).square().sum(1)

    kw: dict[str, Any] = {"generator": generator, **watch}
    w = watch
    found: dict[str, Callable[[], Tensor]] = {
        "ddim": lambda: dynamics.ddim(p, f, x, grid, **w),
        "multistep": lambda: dynamics.multistep(p, f, x, grid, **w),
        "edm": lambda: dynamics.edm(p, f, x, grid, **w),
        "churn": lambda: dynamics.edm(p, f, x, grid, churn=1.0, **kw),
        "ddim one": lambda: dynamics.ddim(p, f, x, grid, eta=1.0, **kw),
        "ancestral": lambda: dynamics.ancestral(p, f, x, grid, **kw),
        "forward": lambda: dynamics.ancestral(p, f, x, grid, variance="forward", **kw),
        "sde": lambda: dynamics.sde(p, f, f, x, grid, **kw),
        "sde by score": lambda: dynamics.sde(p, f, None, x, grid, **kw),
        "predictor-corrector": lambda: dynamics.predictor_corrector(p, f, x, grid, **kw),
        "langevin": lambda: dynamics.langevin(lambda y: -y, x, step=0.1, steps=len(grid) - 1, **kw),
        "metropolis": lambda: dynamics.langevin(
            lambda y: -y,
            x,
            step=0.9,
            steps=len(grid) - 1,
            metropolis=log_density,
            **kw,
        ),
        "annealed": lambda: dynamics.annealed_langevin(f, x, [1 - t for t in grid[:-1]], steps=3, **kw),
    }
    for method in dynamics.METHODS[:-1]:
        found[method] = lambda method=method: dynamics.ode(f, x, grid, method=method, **w)
    return found


NAMES = sorted(everything(torch.zeros(1, 1), [0.0, 1.0]))
DETERMINISTIC = ("ddim", "edm", "multistep", *dynamics.METHODS)
DRAWING = tuple(name for name in NAMES if name not in DETERMINISTIC)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    x, grid = normal(7, 2, 3, seed=24), dynamics.times(6)
    whole = everything(x, grid, seeded(25))[name]()
    nb.check("alone", everything(x[:1], grid, seeded(25))[name](), whole[:1], atol=1e-12)
    generator = seeded(25)
    parts = torch.cat([everything(part, grid, generator)[name]() for part in (x[:3], x[3:])])
    nb.check("parts", parts, whole, atol=1e-12)
    if name in DRAWING:
        other = everything(x, grid, seeded(26))[name]()
        assert not torch.equal(other, whole)


def test_a_generator_leaves_the_global_state_alone_and_none_uses_it() -> None:
    x, grid = normal(4, 2), dynamics.times(6)
    for name in DRAWING:
        before = torch.get_rng_state()
        everything(x, grid, seeded(1))[name]()
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(3)
        first = everything(x, grid)[name]()
        torch.manual_seed(3)
        assert torch.equal(first, everything(x, grid)[name]())


@pytest.mark.parametrize("name", NAMES)
def test_the_callback_hears_of_every_step(name: str) -> None:
    heard: list[tuple[int, float, Tensor]] = []
    grid = dynamics.times(6, end=0.9)
    last = everything(normal(4, 2), grid, callback=lambda i, t, x: heard.append((i, t, x)))[name]()
    assert [i for i, _, _ in heard] == list(range(6))
    assert torch.equal(heard[-1][2], last)
    if name in ("langevin", "metropolis"):
        step = 0.1 if name == "langevin" else 0.9
        assert [t for _, t, _ in heard] == [step * k for k in range(1, 7)]
    elif name == "annealed":
        assert [t for _, t, _ in heard] == [1 - t for t in grid[:-1]]
    else:
        assert [t for _, t, _ in heard] == grid[1:]


@pytest.mark.parametrize("name", NAMES)
def test_there_is_a_bar_where_it_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = everything(normal(4, 2), dynamics.times(6), seeded(1))[name]()
    assert capsys.readouterr().err == ""
    shown = everything(normal(4, 2), dynamics.times(6), seeded(1), progress=True)[name]()
    assert "/6" in capsys.readouterr().err
    assert torch.equal(quiet, shown)


def test_dopri5_and_the_likelihood_have_a_bar_and_dopri5_a_callback(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[float] = []
    grid = dynamics.times(3)
    dynamics.ode(
        linear_velocity, normal(4, 2), grid, method="dopri5", progress=True, callback=lambda i, t, x: heard.append(t)
    )
    assert heard == grid[1:]
    assert "/3" in capsys.readouterr().err
    dynamics.log_prob(linear_velocity, normal(4, 2), grid, progress=True)
    assert "/3" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_no_step_looks_at_the_value_of_a_tensor(name: str) -> None:
    # A meta tensor has no values: whatever would wait for the device fails.
    x = torch.empty(4, 2, 3, device="meta")
    got = everything(x, dynamics.times(5))[name]()
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(got.sum())


def test_the_likelihood_does_not_look_at_values_either() -> None:
    x = torch.empty(4, 2, 3, device="meta")
    for divergence in dynamics.DIVERGENCES:
        assert dynamics.log_prob(lambda y, t: -y, x, dynamics.times(3), divergence=divergence).shape == (4,)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_compiles_without_a_break(name: str) -> None:
    x, grid = normal(4, 2), [0.3, 0.6]
    torch.manual_seed(5)
    expected = everything(x, grid)[name]()
    torch._dynamo.reset()
    torch.manual_seed(5)
    got = torch.compile(lambda: everything(x, grid)[name](), fullgraph=True, backend="eager")()
    nb.check("compiled", got, expected, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_stays_and_agrees_with_double(name: str) -> None:
    x, grid = normal(5, 2, seed=27), dynamics.times(20)
    single = everything(x.float(), grid)[name]()
    assert single.dtype == torch.float32
    if name not in DRAWING:
        nb.check("single", single, everything(x, grid)[name](), atol=1e-4, rtol=1e-4)


def test_a_thousand_steps_in_single_precision_are_those_of_double_precision() -> None:
    path, x, grid = paths.vp(), normal(64, 2), dynamics.times(1000)
    one, two = (dynamics.ddim(path, field(path, "data"), y, grid) for y in (x.float(), x))
    nb.check("single", one, two, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_stays_empty(name: str) -> None:
    assert everything(torch.zeros(0, 2), dynamics.times(3), seeded(1))[name]().shape == (0, 2)


def test_gradients_flow_through_a_sampler() -> None:
    rate = torch.tensor(0.4, dtype=D, requires_grad=True)
    got = dynamics.ode(lambda y, t: rate * y, torch.ones(1, 1, dtype=D), dynamics.times(200), method="rk4")
    (slope,) = torch.autograd.grad(got.sum(), rate)
    nb.check("slope", slope, rate.exp(), atol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------

X, GRID = torch.zeros(3, 2), [0.0, 0.5, 1.0]


def zero(x: Tensor, t: float) -> Tensor:
    return 0 * x


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "method": (lambda: dynamics.ode(zero, X, GRID, method="rk5"), "Did you mean 'rk4'"),
    "times in a heap": (lambda: dynamics.ode(zero, X, [0.0, 0.5, 0.4]), "strictly monotone"),
    "one time": (lambda: dynamics.ode(zero, X, [0.0]), "at least two"),
    "no time": (lambda: dynamics.ode(zero, X, []), "at least two"),
    "equal times": (lambda: dynamics.ddim(VP, zero, X, [0.0, 0.0, 1.0]), "strictly increasing"),
    "backwards": (lambda: dynamics.ddim(VP, zero, X, GRID[::-1]), "strictly increasing, got 3: 1, 0.5, 0"),
    "beyond": (lambda: dynamics.multistep(VP, zero, X, [0.0, 1.2]), "1.2"),
    "nan time": (lambda: dynamics.sde(VP, zero, zero, X, [0.0, math.nan]), "nan"),
    "rank": (lambda: dynamics.ode(zero, torch.zeros(3), GRID), r"rank >= 2, got \(3,\)"),
    "integers": (lambda: dynamics.ddim(VP, zero, torch.zeros(3, 2, dtype=torch.int64), GRID), "torch.int64"),
    "field": (lambda: dynamics.ode(lambda x, t: x[:, :1], X, GRID), r"velocity must return .* got \(3, 1\)"),
    "data": (lambda: dynamics.ddim(VP, lambda x, t: x.sum(1), X, GRID), "data must return"),
    "order": (lambda: dynamics.multistep(VP, zero, X, GRID, 3), "order must be 1 or 2, got 3"),
    "eta": (lambda: dynamics.ddim(VP, zero, X, GRID, eta=1.5), "eta must lie"),
    "eta nan": (lambda: dynamics.ddim(VP, zero, X, GRID, eta=math.nan), "eta must lie"),
    "variance": (lambda: dynamics.ancestral(VP, zero, X, GRID, variance="postrior"), "Did you mean 'posterior'"),
    "noise": (lambda: dynamics.sde(VP, zero, zero, X, GRID, noise=-1.0), "noise must be"),
    "infinite g": (lambda: dynamics.sde(paths.linear(), zero, zero, X, GRID), "singular at t = 0"),
    "no velocity": (lambda: dynamics.sde(paths.linear(), zero, None, X, GRID, noise=0.0), "singular at t = 0"),
    "churn": (lambda: dynamics.edm(VP, zero, X, GRID, churn=-1.0), "churn must be"),
    "edm from a = 0": (lambda: dynamics.edm(paths.linear(), zero, X, GRID), "start later"),
    "snr": (lambda: dynamics.predictor_corrector(VP, zero, X, GRID, snr=0.0), "snr=0"),
    "corrector": (lambda: dynamics.predictor_corrector(VP, zero, X, GRID, corrector_steps=-1), "corrector_steps=-1"),
    "step": (lambda: dynamics.langevin(lambda x: x, X, step=0.0, steps=3), "step=0"),
    "steps": (lambda: dynamics.langevin(lambda x: x, X, step=0.1, steps=0), "steps=0"),
    "density": (
        lambda: dynamics.langevin(lambda x: x, X, step=0.1, steps=1, metropolis=lambda x: x),
        r"shape \(B,\) = \(3,\), got \(3, 2\)",
    ),
    "sigmas": (lambda: dynamics.annealed_langevin(zero, X, [0.1, 1.0]), r"decreasing, got \[0.1, 1.0\]"),
    "no sigma": (lambda: dynamics.annealed_langevin(zero, X, []), "decreasing"),
    "sigma zero": (lambda: dynamics.annealed_langevin(zero, X, [1.0, 0.0]), "positive"),
    "annealed step": (lambda: dynamics.annealed_langevin(zero, X, [1.0], step=-1.0), "step=-1"),
    "divergence": (lambda: dynamics.log_prob(zero, X, GRID, divergence="gauss"), "Did you mean 'gaussian'"),
    "unit": (lambda: dynamics.log_prob(zero, X, GRID, unit="bits"), "Known: 'nats', 'bits/dim'"),
    "probes": (lambda: dynamics.log_prob(zero, X, GRID, probes=0), "probes=0"),
    "prior": (lambda: dynamics.log_prob(zero, X, GRID, prior_std=0.0), "prior_std=0"),
    "likelihood backwards": (lambda: dynamics.log_prob(zero, X, GRID[::-1]), "strictly increasing"),
    "no derivative": (lambda: dynamics.log_prob(lambda x, t: torch.ones_like(x), X, GRID), "no derivative"),
    "hidden": (lambda: dynamics.log_prob(torch.no_grad()(zero), X, GRID), "torch.no_grad"),
    "base": (lambda: dynamics.log_prob(zero, X, GRID, base=lambda x: x), r"must be of shape \(B,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_value_and_a_remedy(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(DataError, match=message):
        call()

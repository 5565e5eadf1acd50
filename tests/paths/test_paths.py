"""Gaussian paths against autograd, quadrature, sampling and the partial differential equations that they solve."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

import nblib as nb
from nblib.data.toy import GaussianMixture
from nblib.data.toy import make as make_target
from nblib.errors import CheckFailed, DataError
from nblib.paths import (
    PATHS,
    PREDICTIONS,
    LearnedSchedule,
    Path,
    ddpm_betas,
    ddpm_index,
    ddpm_time,
    expand,
    linear,
    make,
    marginal,
    posterior_mean,
    sub_vp,
    trigonometric,
    ve,
    vp,
)

DOUBLE = torch.float64
NAMES = [*PATHS, "linear-floor", "learned", "steep", "squares"]
PRESERVING = ["vp", "vp-cosine", "vp-sigmoid", "trigonometric", "learned", "steep"]


def build(name: str) -> Path:
    """Every named path, and those that a user makes: learned, from a log-SNR, and without derivatives."""
    if name == "linear-floor":
        return linear(0.1)
    if name == "learned":
        torch.manual_seed(1)
        return vp(LearnedSchedule(-4.0, 6.0, hidden=16))
    if name == "steep":
        return vp(lambda t: 8 * t**3 + 2 * t - 4)
    if name == "squares":
        return Path("squares", a=lambda t: t**2, b=lambda t: 1 - t**2)
    return make(name)


every_path = pytest.mark.parametrize("name", NAMES)


def grid(n: int = 41, low: float = 0.05, high: float = 0.95) -> Tensor:
    return torch.linspace(low, high, n, dtype=DOUBLE)


def slope(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    value = f(t)
    return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def differs(got: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    """A broken variant must not pass the check that the right one passes."""
    with pytest.raises(CheckFailed):
        nb.check("broken", got.detach(), expected.detach(), atol=atol, rtol=atol)


# --- the coefficients ----------------------------------------------------------------------------------


@every_path
def test_derivatives_equal_automatic_differentiation(name: str) -> None:
    path, t = build(name), grid()
    _, _, da, db = path.coefficients(t, t)
    nb.check("da", da.detach(), slope(path.a, t), atol=1e-11, rtol=1e-11)
    nb.check("db", db.detach(), slope(path.b, t), atol=1e-11, rtol=1e-11)
    omitted = replace(path, da=None, db=None).coefficients(t, t)
    nb.check("omitted", torch.stack(omitted).detach(), torch.stack([path.a(t), path.b(t), da, db]).detach(), atol=1e-10)
    differs(-db, slope(path.b, t))


@every_path
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_coefficients_have_the_rank_and_dtype_of_the_data(name: str, rank: int) -> None:
    path = build(name)
    times: list[float | Tensor] = [0.3, torch.tensor(0.3), torch.full((2,), 0.3)]
    for dtype, t in itertools.product((torch.float32, DOUBLE), times):
        x = torch.zeros((2, 3, 4, 5)[:rank], dtype=dtype)
        size = 2 if isinstance(t, Tensor) and t.dim() else 1
        for c in path.coefficients(t, x):
            assert c.dtype == dtype
            assert c.shape == (size,) + (1,) * (rank - 1)


def test_coefficients_in_half_precision_are_those_of_float32_rounded() -> None:
    path, t = vp(), torch.tensor([0.5, 0.999])
    x = torch.zeros(2, 3)
    for half, full in zip(path.coefficients(t, x.bfloat16()), path.coefficients(t, x), strict=True):
        assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("linear", (0, 1, 1, 0)),
        ("linear-floor", (0, 1, 1, 0.1)),
        ("trigonometric", (0, 1, 1, 0)),
        ("vp-cosine", (0, 1, 1, 0)),
        ("vp-sigmoid", (0, 1, 1, 0)),
        ("ve", (1, 50, 1, 0.01)),
        ("vp", (math.exp(-5.025), math.sqrt(-math.expm1(-10.05)), 1, 0)),
        ("sub-vp", (math.exp(-5.025), -math.expm1(-10.05), 1, 0)),
        ("learned", tuple(math.sqrt(1 / (1 + math.exp(-v))) for v in (-4, 4, 6, -6))),
    ],
)
def test_ends(name: str, ends: tuple[float, ...]) -> None:
    path, t = build(name), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    (a0, a1), (b0, b1) = path.a(t).tolist(), path.b(t).tolist()
    tolerance = 1e-6 if name == "learned" else 1e-15  # its parameters are float32
    nb.check("ends", torch.tensor([a0, b0, a1, b1], dtype=DOUBLE), list(ends), atol=tolerance, rtol=tolerance)
    assert path.prior_std == pytest.approx(ends[1], abs=1e-15 if name != "learned" else 1e-6)
    if name in ("linear", "trigonometric", "vp-cosine", "vp-sigmoid"):
        assert (a0, b1) == (0.0, 0.0)  # exactly: the checks of singular ends look for zero


def test_linear_and_trigonometric_are_their_formulas() -> None:
    t = grid()
    nb.check("linear", torch.stack([linear(0.2).a(t), linear(0.2).b(t)]), torch.stack([t, 1 - 0.8 * t]), atol=1e-15)
    circle = trigonometric()
    expected = torch.stack([(math.pi * t / 2).sin(), (math.pi * t / 2).cos()])
    nb.check("trigonometric", torch.stack([circle.a(t), circle.b(t)]), expected, atol=1e-15)


@pytest.mark.parametrize("name", PRESERVING)
def test_vp_preserves_variance(name: str) -> None:
    path, t = build(name), grid(101, 0, 1)
    nb.check("circle", (path.a(t) ** 2 + path.b(t) ** 2).detach(), torch.ones_like(t), atol=1e-14)
    differs(path.a(t) ** 2 - path.b(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (1.0, 1.0), (0.5, 3.0)])
def test_vp_and_sub_vp_are_exponentials_of_the_integral_of_beta(beta_min: float, beta_max: float) -> None:
    path, below = vp(beta_min=beta_min, beta_max=beta_max), sub_vp(beta_min, beta_max)
    for t in (0.0, 0.3, 0.9, 0.999):
        integral = quad(lambda tau: beta_min + (beta_max - beta_min) * tau, 0, 1 - t)[0]
        now = torch.tensor(t, dtype=DOUBLE)
        beta = beta_min + (beta_max - beta_min) * (1 - t)
        nb.check("a", path.a(now), math.exp(-integral / 2), atol=1e-14)
        nb.check("b", path.b(now), math.sqrt(-math.expm1(-integral)), atol=1e-14)
        nb.check("g", path.diffusion(now), math.sqrt(beta), atol=1e-12)
        nb.check("sub a", below.a(now), math.exp(-integral / 2), atol=1e-14)
        nb.check("sub b", below.b(now), -math.expm1(-integral), atol=1e-14)
        nb.check("sub g", below.diffusion(now), math.sqrt(beta * -math.expm1(-2 * integral)), atol=1e-10)
        differs(path.a(now), torch.tensor(math.exp(-integral), dtype=DOUBLE))
    for value in (beta_min, beta_max):
        end = 1.0 if value == beta_min else 0.0
        nb.check("beta at the end", path.diffusion(end), math.sqrt(value), atol=1e-12)


def test_cosine_and_sigmoid_schedules_are_those_of_the_papers() -> None:
    t = grid(99, 0.01, 0.99)
    angle = (1 - t + 0.008) / 1.008 * math.pi / 2
    nb.check(
        "cosine", vp("cosine").a(t) ** 2, angle.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, atol=1e-14
    )
    low, high = torch.tensor(-3.0, dtype=DOUBLE).sigmoid(), torch.tensor(3.0, dtype=DOUBLE).sigmoid()
    expected = (high - (6 * (1 - t) - 3).sigmoid()) / (high - low)
    nb.check("sigmoid", vp("sigmoid").a(t) ** 2, expected, atol=1e-14)
    differs(vp("sigmoid").a(1 - t) ** 2, expected)


def test_ve_is_geometric() -> None:
    b = ve(0.02, 30.0).b(grid(11, 0, 1)).log()
    nb.check("steps", b.diff(), torch.full((10,), math.log(0.02 / 30) / 10, dtype=DOUBLE), atol=1e-13)


# --- log-SNR and diffusion -----------------------------------------------------------------------------


@every_path
def test_snr_increases_and_is_the_ratio(name: str) -> None:
    path, t = build(name), grid()
    snr = path.snr(t).detach()
    assert bool((snr.diff() > 0).all())
    nb.check("snr", snr / (path.a(t) / path.b(t)).detach() ** 2, torch.ones_like(t), atol=1e-12)
    nb.check("log", path.log_snr(t).detach(), snr.log(), atol=1e-12)
    assert path.log_snr(0.5).shape == ()
    assert path.log_snr(t.reshape(41, 1)).shape == (41, 1)


@every_path
@pytest.mark.parametrize("closed", [True, False])
def test_time_of_log_snr_is_the_inverse(name: str, closed: bool) -> None:
    path, t = build(name), grid(201, 0.001, 0.999)
    path = path if closed else replace(path, inverse=None)
    got = path.time_of_log_snr(path.log_snr(t))
    nb.check("inverse", got, t, atol=1e-10)
    differs(path.time_of_log_snr(path.log_snr(t)[:-1]), t[1:])
    one = path.time_of_log_snr(float(path.log_snr(0.25).detach()))
    assert one.shape == ()
    nb.check("float", one, 0.25, atol=1e-10)
    ends = path.log_snr(torch.tensor([0.0, 1.0], dtype=DOUBLE)).detach()
    nb.check("ends", path.time_of_log_snr(ends), [0.0, 1.0], atol=1e-10)
    short = torch.tensor([0.0, 1.0])
    nb.check("ends", path.time_of_log_snr(path.log_snr(short).detach()), short, atol=2e-3)
    single = path.time_of_log_snr(path.log_snr(t.float()))
    assert single.dtype == torch.float32
    nb.check("float32", single, t.float(), atol=2e-3)


@every_path
def test_a_pair_is_the_sample_and_its_velocity(name: str) -> None:
    path, t = build(name), grid(12, 0.05, 0.95)
    x1, x0 = (torch.randn(12, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x, v = path.pair(x1, x0, t)
    nb.check("sample", x, path.sample(x1, x0, t), atol=0)
    nb.check("velocity", v, path.velocity(x1, x0, t), atol=0)
    slope = (path.sample(x1, x0, t + 1e-6) - path.sample(x1, x0, t - 1e-6)) / 2e-6
    nb.check("slope", v.detach(), slope.detach(), atol=1e-5, rtol=1e-5)


@every_path
def test_diffusion_keeps_the_variance_of_the_path(name: str) -> None:
    path, t = build(name), grid()
    a, b, g = path.a(t).detach(), path.b(t).detach(), path.diffusion(t).detach()
    drift = -slope(path.a, t) / a
    variance_rate = -slope(lambda s: path.b(s) ** 2, t)  # in reversed time
    nb.check("variance", variance_rate, 2 * drift * b**2 + g**2, atol=1e-9, rtol=1e-9)
    differs(variance_rate, 2 * drift * b**2 + g**2 / 2)
    if name != "ve":  # where there is no drift
        differs(variance_rate, -2 * drift * b**2 + g**2)
    nb.check("log-SNR", g**2, b**2 * slope(path.log_snr, t), atol=1e-9, rtol=1e-9)
    general = replace(path, g=None)
    nb.check("closed form", general.diffusion(t).detach(), g, atol=1e-10, rtol=1e-10)
    assert path.diffusion(0.5).shape == ()


# --- predictions ---------------------------------------------------------------------------------------


def predictions(path: Path, x1: Tensor, x0: Tensor, t: float | Tensor) -> dict[str, Tensor]:
    _, b, da, db = path.coefficients(t, x1)
    return {"data": x1, "noise": x0, "score": -x0 / b, "velocity": da * x1 + db * x0}


TIMES: list[float | Tensor] = [0.3, torch.tensor(0.6, dtype=DOUBLE), torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)]


@every_path
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("t", TIMES, ids=["float", "0-dim", "batch"])
def test_all_sixteen_conversions_are_exact(name: str, rank: int, t: float | Tensor) -> None:
    path = build(name)
    x1, x0 = torch.randn(2, *(3, 2, 4, 5)[:rank], dtype=DOUBLE)
    x, exact = path.sample(x1, x0, t), predictions(path, x1, x0, t)
    nb.check("velocity", path.velocity(x1, x0, t).detach(), exact["velocity"].detach(), atol=1e-10)
    for source, target in itertools.product(PREDICTIONS, PREDICTIONS):
        got = path.convert(exact[source], x, t, source=source, target=target)
        assert got.shape == x.shape
        nb.check(f"{source} -> {target}", got.detach(), exact[target].detach(), atol=1e-10, rtol=1e-10)
        if source != target:
            differs(path.convert(-exact[source], x, t, source=source, target=target), exact[target])


@every_path
def test_the_velocity_is_the_time_derivative_of_the_sample(name: str) -> None:
    path, t = build(name), grid()
    x1, x0 = torch.randn(2, 41, dtype=DOUBLE)
    rate = slope(lambda s: path.sample(x1, x0, s), t)
    nb.check("rate", path.velocity(x1, x0, t).detach(), rate, atol=1e-10, rtol=1e-10)
    differs(path.velocity(x1, -x0, t), rate)


def test_conversions_that_no_end_disturbs() -> None:
    """noise -> score where a = 0, score -> data where b = 0, everything from the velocity of the linear path."""
    x1, x0 = torch.randn(2, 3, 2)
    path = linear()
    nb.check("score", path.convert(x0, x0, 0.0, source="noise", target="score"), -x0)
    nb.check("data", path.convert(x0, x1, 1.0, source="score", target="data"), x1)
    for t, x in ((0.0, x0), (1.0, x1), (torch.tensor([0.0, 0.0, 1.0]), torch.cat([x0[:2], x1[2:]]))):
        velocity = path.velocity(x1, x0, t)
        nb.check("data", path.convert(velocity, x, t, source="velocity", target="data"), x1)
        nb.check("noise", path.convert(velocity, x, t, source="velocity", target="noise"), x0)


def test_expand() -> None:
    x = torch.zeros(2, 3, 4)
    assert expand(0.5, x).shape == (1, 1, 1)
    assert expand(torch.tensor(7.0), x).item() == 7  # any coefficient, not only times
    assert expand(torch.tensor([1.0, 2.0], dtype=DOUBLE), x).flatten().tolist() == [1, 2]
    assert expand(torch.tensor([1.0, 2.0], dtype=DOUBLE), x).dtype == torch.float32


# --- learned schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_learned_schedule_increases_and_every_parameter_has_a_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    schedule = LearnedSchedule()
    t = grid(1001, 0, 1)
    value = schedule(t)
    assert bool((value.diff() > 0).all())
    nb.check("ends", value[[0, -1]].detach(), [-5.0, 13.3], atol=1e-5)
    path = vp(schedule)
    x1, x0 = torch.randn(2, 1001, 2, dtype=DOUBLE)
    (path.velocity(x1, x0, t) ** 2).mean().backward()
    for name, parameter in schedule.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 0, name


def test_the_gradient_through_the_slope_of_a_learned_schedule_is_exact() -> None:
    schedule = LearnedSchedule(-2.0, 3.0, hidden=3).double()
    path, t = vp(schedule), grid(7)
    values = {k: v.detach() for k, v in schedule.named_parameters()}

    def g_squared(*parameters: Tensor) -> Tensor:
        level = lambda s: torch.func.functional_call(schedule, dict(zip(values, parameters, strict=True)), (s,))  # noqa: E731
        return replace(path, a=vp(level).a, b=vp(level).b, g=vp(level).g).diffusion(t) ** 2

    assert torch.autograd.gradcheck(g_squared, [v.clone().requires_grad_() for v in values.values()])


def test_ends_may_be_fixed_and_their_order_survives_training() -> None:
    fixed = LearnedSchedule(-3.0, 2.0, learn_ends=False)
    assert {n for n, p in fixed.named_parameters() if not p.requires_grad} == {"low", "log_gap"}
    learned = LearnedSchedule(-3.0, 2.0)
    with torch.no_grad():
        learned.log_gap.fill_(-8.0)
    assert bool(learned(torch.tensor(1.0)) > learned(torch.tensor(0.0)))


def test_a_copy_of_a_model_has_its_own_schedule() -> None:
    schedule = LearnedSchedule()
    path = vp(schedule)
    assert path.schedule is schedule
    twin = copy.deepcopy(path)
    assert isinstance(twin.schedule, LearnedSchedule)
    with torch.no_grad():
        twin.schedule.low.add_(1)
    nb.check("twin", twin.log_snr(0.0).detach(), -4.0, atol=1e-5)
    nb.check("original", path.log_snr(0.0).detach(), -5.0, atol=1e-5)


# --- DDPM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_ddpm_index_is_the_exact_inverse_of_ddpm_time(steps: int) -> None:
    k = torch.arange(1, steps + 1)
    for dtype in (torch.float32, DOUBLE):
        times = ddpm_time(k, steps)
        assert isinstance(times, Tensor)
        assert torch.equal(torch.as_tensor(ddpm_index(times.to(dtype), steps)), k)
    assert [ddpm_index(ddpm_time(i, steps), steps) for i in k.tolist()] == k.tolist()
    assert ddpm_time(steps, steps) == 0.0
    assert ddpm_index(1.0, steps) == 1


@pytest.mark.parametrize("name", PRESERVING)
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_ddpm_betas_reproduce_the_path(name: str, steps: int) -> None:
    path, betas = build(name), ddpm_betas(build(name), steps)
    assert betas.shape == (steps,)
    assert betas.dtype == DOUBLE
    assert bool(((betas > 0) & (betas <= 1)).all())
    times = torch.tensor([float(ddpm_time(k, steps)) for k in range(1, steps + 1)], dtype=DOUBLE)
    squares = (path.a(times) ** 2).detach()
    nb.check("alphas", (1 - betas).cumprod(0), squares, atol=1e-12)
    if steps > 1:
        differs((1 - betas.flip(0)).cumprod(0), squares)


def test_ddpm_betas_of_the_linear_schedule_are_those_of_the_sde() -> None:
    """1000 steps: beta_k is about beta(k/T)/T, 1e-4 to 0.02 as Ho et al. (2020) chose."""
    betas = ddpm_betas(vp(), 1000)
    nb.check("first and last", betas[[0, -1]], [1e-4, 0.02], rtol=0.1, atol=0)


# --- mixtures ------------------------------------------------------------------------------------------


def line() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[-1.0], [0.5], [2.0]], dtype=DOUBLE),
        torch.tensor([0.3, 0.6, 0.2], dtype=DOUBLE),
        torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE),
    )


def plane() -> GaussianMixture:
    root = torch.tensor([[[1.0, 0.0], [0.6, 0.4]], [[0.3, 0.0], [-0.5, 0.9]]], dtype=DOUBLE)
    means = torch.tensor([[1.0, -1.0], [-2.0, 0.5]], dtype=DOUBLE)
    return GaussianMixture(means, root @ root.mT, torch.tensor([0.3, 0.7], dtype=DOUBLE))


def integrate(f: Callable[[Tensor], Tensor]) -> Tensor:
    """Simpson's rule over the data, (-8, 8), on a grid that is fine for the narrowest kernel used."""
    y = torch.linspace(-8, 8, 40_001, dtype=DOUBLE)
    weights = torch.full_like(y, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    return (f(y) * weights).sum(-1) * (16 / 40_000 / 3)


@every_path
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_marginals_and_posterior_means_equal_quadrature(name: str, t: float) -> None:
    path, mixture = build(name), line()
    x = torch.linspace(-4, 4, 9, dtype=DOUBLE)
    a, b, da, db = (c.squeeze().detach() for c in path.coefficients(t, x))
    x = x * max(1.0, float(b))  # where there is mass: VE is wide

    def joint(y: Tensor) -> Tensor:
        kernel = -0.5 * ((x[:, None] - a * y) / b) ** 2 - b.log() - 0.5 * math.log(2 * math.pi)
        return (kernel + mixture.log_prob(y[:, None])).exp()

    density = integrate(joint)
    nb.check("density", marginal(mixture, path, t).log_prob(x[:, None]).detach(), density.log(), atol=1e-8, rtol=1e-8)
    differs(marginal(mixture, path, t).log_prob(x[:, None]) + 0.01, density.log())

    def mean(f: Callable[[Tensor], Tensor]) -> Tensor:
        return integrate(lambda y: joint(y) * f(y)) / density

    noise = mean(lambda y: (x[:, None] - a * y) / b)
    exact = {"data": mean(lambda y: y), "noise": noise, "score": -noise / b}
    exact["velocity"] = mean(lambda y: da * y + db * (x[:, None] - a * y) / b)
    for to, expected in exact.items():
        got = posterior_mean(mixture, path, x[:, None], t, to).squeeze(-1).detach()
        nb.check(to, got, expected, atol=1e-7, rtol=1e-7)
        differs(-got, expected)


@every_path
@pytest.mark.parametrize("t", [0.2, 0.8])
def test_marginal_is_the_distribution_of_the_samples(name: str, t: float) -> None:
    path, mixture = build(name), line()
    generator = torch.Generator().manual_seed(0)
    x1 = mixture.sample(20_000, generator=generator)
    x = path.sample(x1, torch.randn(20_000, 1, dtype=DOUBLE, generator=generator), t).squeeze(-1).detach()
    law = marginal(mixture, path, t)
    means, stds = law.means.squeeze(-1).detach(), law.covs.flatten().sqrt().detach()
    mean, std = float(law.mean.detach()), float(law.cov.detach()) ** 0.5
    for cut in (mean - std, mean):
        below = (law.weights * torch.distributions.Normal(means, stds).cdf(torch.tensor(cut, dtype=DOUBLE))).sum()
        nb.check_mc("below", (x < cut).double(), below)
        with pytest.raises(CheckFailed):
            nb.check_mc("shifted", (x < cut + 0.5 * std).double(), below)


@every_path
@pytest.mark.parametrize("t", TIMES, ids=["float", "0-dim", "batch"])
def test_tweedie(name: str, t: float | Tensor) -> None:
    """The score of the exact density, by autograd, gives the posterior means (Robbins, 1956; Efron, 2011)."""
    path, mixture = build(name), plane()
    x = torch.randn(3, 2, dtype=DOUBLE)
    times = torch.as_tensor(t, dtype=DOUBLE).expand(3).tolist()
    rows = []
    for row, time in zip(x, times, strict=True):
        rows.append(slope(lambda y, time=time: marginal(mixture, path, time).log_prob(y), row))  # type: ignore[misc]
    score = torch.stack(rows)
    for to in PREDICTIONS:
        got = posterior_mean(mixture, path, x, t, to).detach()
        expected = path.convert(score, x, t, source="score", target=to).detach()
        nb.check(to, got, expected, atol=1e-9, rtol=1e-9)
        differs(path.convert(score / 2, x, t, source="score", target=to), got)
    nb.check("one time", marginal(mixture, path, times[0]).score(x[:1]).detach(), score[:1], atol=1e-10, rtol=1e-10)


def test_posterior_means_at_the_ends() -> None:
    """Where the formulas by way of another prediction are 0/0."""
    mixture, x = plane(), torch.randn(4, 2, dtype=DOUBLE)
    path = linear()
    nb.check("noise end, data", posterior_mean(mixture, path, x, 0.0), mixture.mean.expand(4, 2), atol=1e-12)
    nb.check("noise end, noise", posterior_mean(mixture, path, x, 0.0, "noise"), x, atol=1e-12)
    nb.check("noise end, score", posterior_mean(mixture, path, x, 0.0, "score"), -x, atol=1e-12)
    nb.check("noise end, velocity", posterior_mean(mixture, path, x, 0.0, "velocity"), mixture.mean - x, atol=1e-12)
    nb.check("data end, data", posterior_mean(mixture, path, x, 1.0), x, atol=1e-12)
    nb.check("data end, noise", posterior_mean(mixture, path, x, 1.0, "noise"), 0 * x, atol=1e-12)
    nb.check("data end, score", posterior_mean(mixture, path, x, 1.0, "score"), mixture.score(x), atol=1e-10)
    nb.check("data end, velocity", posterior_mean(mixture, path, x, 1.0, "velocity"), x, atol=1e-12)


def test_posterior_mean_takes_any_shape_and_dtype() -> None:
    mixture, path, t = plane(), vp(), torch.tensor([0.2, 0.5, 0.7], dtype=DOUBLE)
    x = torch.randn(3, 4, 5, 2, dtype=DOUBLE)
    got = posterior_mean(mixture, path, x, t)
    for i in range(3):
        nb.check(
            "grid", got[i], posterior_mean(mixture, path, x[i].reshape(-1, 2), float(t[i])).reshape(4, 5, 2), atol=1e-12
        )
    single = posterior_mean(mixture, path, x.float(), t)
    assert single.dtype == torch.float32
    nb.check("float32", single, got.float(), atol=1e-4)
    rows = x[0, 0]
    mapped = torch.func.vmap(lambda row: posterior_mean(mixture, path, row, 0.5))(rows)
    nb.check("vmap", mapped, posterior_mean(mixture, path, rows, 0.5), atol=1e-12)


@pytest.mark.parametrize("name", PRESERVING)
def test_a_vp_path_and_its_ve_rescaling_denoise_alike(name: str) -> None:
    """x/a is the data plus noise of standard deviation b/a: the posterior does not know the scale."""
    path, mixture = build(name), plane()
    x = torch.randn(5, 2, dtype=DOUBLE)
    for t in (0.2, 0.5, 0.9):
        a, b, _, _ = (c.detach() for c in path.coefficients(t, x))
        sigma = float(b / a)
        rescaled = Path("rescaled", a=torch.ones_like, b=lambda s, sigma=sigma: torch.full_like(s, sigma))  # type: ignore[misc]
        data = posterior_mean(mixture, path, x, t).detach()
        nb.check("data", posterior_mean(mixture, rescaled, x / a, 0.5), data, atol=1e-12)
        differs(posterior_mean(mixture, rescaled, x, 0.5), data)


@every_path
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_the_exact_velocity_solves_the_continuity_equation(name: str, t: float) -> None:
    r"""dp/dt + d(p u)/dx = 0 in one dimension, by central differences of fourth order."""
    path, mixture = build(name), line()
    width = float(marginal(mixture, path, t).cov.detach()) ** 0.5
    x, step = width * torch.linspace(-2, 2, 21, dtype=DOUBLE), 1e-3

    def difference(f: Callable[[float], Tensor], h: float) -> Tensor:
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)

    def density(time: float, y: Tensor) -> Tensor:
        return marginal(mixture, path, time).log_prob(y[:, None]).exp().detach()

    def residual(sign: float, extra: float) -> Tensor:
        def flux(h: float) -> Tensor:
            y = x + h
            velocity = posterior_mean(mixture, path, y[:, None], t, "velocity").squeeze(-1).detach()
            return density(t, y) * (sign * velocity + extra * y)

        return difference(lambda h: density(t + h, x), step) + difference(flux, step * width)

    scale = density(t, x).max()
    nb.check("continuity", residual(1, 0) / scale, torch.zeros_like(x), atol=1e-6)
    for broken in ((-1, 0), (0.9, 0), (1, 0.1)):
        differs(residual(*broken) / scale, torch.zeros_like(x), atol=1e-3)


@pytest.mark.parametrize("target", ["eight-gaussians", "two-moons"])
def test_the_book_targets_have_exact_marginals(target: str) -> None:
    mixture = make_target(target)
    assert isinstance(mixture, GaussianMixture)
    x = torch.randn(6, 2, dtype=DOUBLE)
    got = posterior_mean(mixture, vp(), x, 0.6, "score")
    nb.check("score", got, marginal(mixture, vp(), 0.6).score(x), atol=1e-9, rtol=1e-9)
    assert marginal(mixture, vp(), torch.tensor(0.6)).means.dtype == DOUBLE


# --- graphs, devices, modes ----------------------------------------------------------------------------


def loss(path: Path, x1: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
    x, velocity = path.sample(x1, x0, t), path.velocity(x1, x0, t)
    total = sum(
        path.convert(velocity, x, t, source="velocity", target=target).square().mean() for target in PREDICTIONS
    )
    return total + (path.convert(x0, x, t, source="noise", target="data") * path.snr(t).mean()).mean()


@every_path
def test_a_loss_compiles_into_one_graph(name: str) -> None:
    path = build(name)
    x1, x0, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4) * 0.8 + 0.1
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: loss(path, *args), fullgraph=True, backend="eager")
    for time in (t, 0.3, 0.4, torch.tensor(0.5)) if name in ("linear", "vp") else (t, 0.3):
        nb.check("compiled", compiled(x1, x0, time).detach(), loss(path, x1, x0, time).detach(), rtol=1e-6)


def test_a_compiled_loss_trains_the_schedule() -> None:
    schedule = LearnedSchedule(hidden=8)
    args = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    loss(vp(schedule), *args).backward()
    eager = [p.grad.clone() for p in schedule.parameters() if p.grad is not None]
    schedule.zero_grad()
    torch.compiler.reset()
    torch.compile(lambda *a: loss(vp(schedule), *a), fullgraph=True, backend="eager")(*args).backward()
    compiled = [p.grad for p in schedule.parameters() if p.grad is not None]
    assert len(compiled) == len(eager) == 6
    for got, expected in zip(compiled, eager, strict=True):
        nb.check("gradient", got, expected, rtol=1e-4, atol=1e-4)


@every_path
def test_nothing_waits_for_the_device(name: str) -> None:
    """Tensors on the meta device have no values: whatever read one would fail."""
    path = build(name)
    if path.schedule is not None:
        path.schedule.to("meta")
    x1, x0 = torch.empty(2, 4, 3, device="meta")
    for t in (torch.empty(4, device="meta"), torch.empty((), device="meta")):
        assert loss(path, x1, x0, t).device.type == "meta"
        assert path.diffusion(t).shape == t.shape
        assert torch.as_tensor(ddpm_index(t, 10)).shape == t.shape
        if path.schedule is None:
            assert posterior_mean(line(), path, x1[:, :1], t).device.type == "meta"
    if path.schedule is None:
        assert path.sample(x1, x0, 0.5).device.type == "meta"


@pytest.mark.parametrize("name", ["vp", "learned", "squares"])
def test_works_without_gradients_and_under_autocast(name: str) -> None:
    path = build(name)
    x1, x0, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4) * 0.8 + 0.1
    expected = loss(path, x1, x0, t).detach()
    with torch.no_grad():
        nb.check("no_grad", loss(path, x1, x0, t), expected, rtol=1e-6)
    with torch.inference_mode():
        nb.check("inference", loss(path, x1, x0, t), expected, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        nb.check("autocast", loss(path, x1, x0, t).detach(), expected, rtol=1e-6)


# --- bad input -----------------------------------------------------------------------------------------

X, T = torch.zeros(3, 2), torch.full((3,), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(1.0), r"sigma_min must lie in \[0, 1\), got 1.0"),
        (lambda: linear(-0.1), r"got -0.1"),
        (lambda: vp("cosin"), r"Unknown VP schedule 'cosin'. Did you mean 'cosine'\?"),
        (lambda: vp(beta_min=0.0), r"0 < beta_min <= beta_max, got beta_min=0.0, beta_max=20.0"),
        (lambda: sub_vp(3.0, 2.0), r"got beta_min=3.0, beta_max=2.0"),
        (lambda: ve(1.0, 1.0), r"0 < sigma_min < sigma_max, got sigma_min=1.0, sigma_max=1.0"),
        (lambda: LearnedSchedule(2.0, 1.0), r"low < high and hidden >= 1, got low=2.0, high=1.0, hidden=1024"),
        (lambda: LearnedSchedule(hidden=0), r"hidden=0"),
        (lambda: make("liner"), r"Unknown path 'liner'. Did you mean 'linear'\?"),
        (lambda: expand(T[:2], X), r"of shape \(3,\) for x of shape \(3, 2\); got t of shape \(2,\)"),
        (lambda: expand(T[:, None], X), r"got t of shape \(3, 1\)"),
        (lambda: linear().sample(X, X, T[:1]), r"got t of shape \(1,\)"),
        (lambda: expand(0.5, X.byte()), r"Expected floating-point data, got dtype torch.uint8: divide"),
        (lambda: linear().sample(X, X[:2], 0.5), r"x1 and x0 must have one shape, got \(3, 2\) and \(2, 2\)"),
        (lambda: linear().velocity(X, X[:2], 0.5), r"x1 and x0 must have one shape"),
        (
            lambda: linear().convert(X, X[:2], 0.5, source="data", target="noise"),
            r"value and x must have one shape, got \(3, 2\) and \(2, 2\)",
        ),
        (lambda: linear().sample(X, X, 1.5), r"Times lie in \[0, 1\].* got t = 1.5.*ddpm_time"),
        (lambda: linear().velocity(X, X, -0.1), r"got t = -0.1"),
        (lambda: linear().coefficients(math.nan, X), r"got t = nan"),
        (lambda: linear().sample(X, X, torch.tensor([0.5, 7, 0.5])), r"got t = 7"),
        (lambda: linear().log_snr(2), r"got t = 2"),
        (lambda: linear().diffusion(torch.tensor(-1)), r"got t = -1"),
        (lambda: linear().convert(X, X, 0.5, source="eps", target="data"), r"Unknown prediction 'eps'"),
        (lambda: linear().convert(X, X, 0.5, source="data", target="scores"), r"Did you mean 'score'\?"),
        (
            lambda: linear().convert(X, X, 0.0, source="noise", target="data"),
            r"noise -> data of path 'linear' is singular at t = 0: keep to t >= 1e-5",
        ),
        (
            lambda: linear().convert(X, X, torch.tensor([0.5, 1.0, 0.5]), source="noise", target="score"),
            r"noise -> score of path 'linear' is singular at t = 1: keep to t <= 1 - 1e-5",
        ),
        (lambda: trigonometric().convert(X, X, 1.0, source="data", target="noise"), r"singular at t = 1"),
        (lambda: vp().velocity(X, X, 1.0), r"The velocity of path 'vp' is singular at t = 1"),
        (
            lambda: vp("sigmoid").velocity(X, X, torch.tensor(0.0)),
            r"velocity of path 'vp-sigmoid' is singular at t = 0",
        ),
        (lambda: linear().diffusion(0.0), r"diffusion coefficient of path 'linear' is singular at t = 0"),
        (lambda: ve().time_of_log_snr(20.0), r"path 've' goes from -7.82405 to 9.21034, got 20"),
        (lambda: linear().time_of_log_snr(math.nan), r"got nan"),
        (lambda: ddpm_time(0, 10), r"DDPM's index lies in 1..10 \(steps=10 is pure noise\), got 0"),
        (lambda: ddpm_time(torch.tensor([3, 11]), 10), r"got 11"),
        (lambda: ddpm_time(1, 0), r"steps must be at least 1, got 0"),
        (lambda: ddpm_index(1.1, 10), r"got t = 1.1"),
        (lambda: ddpm_betas(linear(), 10), r"a\^2 \+ b\^2 = 1; path 'linear' is off by 0.5: use a path of vp"),
        (lambda: ddpm_betas(vp(), 0), r"steps must be at least 1"),
        (lambda: marginal(line(), vp(), T), r"marginal takes one time, got t of shape \(3,\)"),
        (lambda: marginal(line(), vp(), 2.0), r"got t = 2"),
        (lambda: posterior_mean(line(), vp(), X, 0.5), r"dimension 1, got shape \(3, 2\)"),
        (lambda: posterior_mean(plane(), vp(), X, 0.5, "epsilon"), r"Unknown prediction 'epsilon'"),
        (lambda: posterior_mean(plane(), vp(), X, T[:2]), r"got t of shape \(2,\)"),
        (lambda: posterior_mean(plane(), vp(), X, 1.0, "velocity"), r"velocity of path 'vp' is singular at t = 1"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_remedy(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_a_module_is_the_schedule_and_a_function_is_not() -> None:
    class Line(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 10 * t - 5

    assert vp(Line()).schedule is not None
    assert vp(lambda t: 10 * t - 5).schedule is None
    nb.check("line", vp(Line()).log_snr(grid()), 10 * grid() - 5, atol=1e-12)


def test_every_path_has_its_name() -> None:
    assert {make(name).name for name in PATHS} == set(PATHS)
    assert nb.paths.make is make

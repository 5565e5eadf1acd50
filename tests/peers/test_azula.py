"""Differential tests against `azula` (extra ``peers``): posterior means, preconditioning and samplers in float64.

Their time runs from data (0) to noise (1), ours the other way; a schedule of theirs is made into a path of ours by
``mirrored``. Their schedules keep some noise at the data (``sigma_min``), so that a^2 + b^2 = 1 + sigma_min^2 for "VP".
See ``test_diffusers`` on how to run the peers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import dynamics, paths
from nblib.data import toy
from nblib.data.toy import GaussianMixture
from nblib.diffusion import Preconditioned
from nblib.paths import Path, posterior_mean

pytest.importorskip("azula", reason="a peer: pip install nblib[peers]")

from azula.denoise import Denoiser, DiracPosterior, GaussianDenoiser, KarrasDenoiser
from azula.linalg.covariance import FullCovariance
from azula.noise import (
    CosineSchedule,
    RectifiedSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
)
from azula.sample import DDIMSampler, DDPMSampler, EulerSampler, HeunSampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DOUBLE = torch.float64
RING = toy.make("eight-gaussians")
assert isinstance(RING, GaussianMixture)
SCHEDULES: dict[str, Schedule] = {
    "VE": VESchedule(0.01, 50.0),
    "VP": VPSchedule(0.01, 0.01),
    "cosine": CosineSchedule(0.01, 0.01),
    "rectified": RectifiedSchedule(0.01, 0.01),
}


def normals(n: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def mirrored(schedule: Any) -> Path:
    return Path("azula", a=lambda t: schedule.alpha(1 - t), b=lambda t: schedule.sigma(1 - t))


class Exact(Denoiser):
    """The posterior mean of a mixture, as their samplers want it."""

    def __init__(self, schedule: Schedule, mixture: GaussianMixture = RING) -> None:
        super().__init__()
        self.schedule, self.mixture, self.path = schedule, mixture, mirrored(schedule)

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> DiracPosterior:
        return DiracPosterior(posterior_mean(self.mixture, self.path, x_t, 1 - t))


def sampler(kind: Any, schedule: Schedule, steps: int, **options: Any) -> Any:
    return kind(Exact(schedule), steps=steps, silent=True, dtype=DOUBLE, **options)


def ours(schedule: Schedule) -> tuple[Path, Any]:
    path = mirrored(schedule)
    return path, lambda x, t: posterior_mean(RING, path, x, t)


# --- schedules and denoisers -----------------------------------------------------------------------------------------


def test_schedules() -> None:
    """VE and the rectified one are paths of ours; their VP has beta(0) = 0, their cosine is a quarter of a circle."""
    t = torch.linspace(0, 1, 101, dtype=DOUBLE)
    ve, path = mirrored(VESchedule(0.01, 50.0)), paths.ve(0.01, 50.0)
    nb.check("VE", ve.b(t), path.b(t), rtol=1e-12)
    straight, path = mirrored(RectifiedSchedule(1e-9, 0.1)), paths.linear(0.1)
    nb.check("rectified a", straight.a(t), path.a(t), atol=2e-9)
    nb.check("rectified b", straight.b(t), path.b(t), atol=1e-12)
    circle, path = mirrored(CosineSchedule(1e-9, 1e-9)), paths.trigonometric()
    nb.check("cosine a", circle.a(t), path.a(t), atol=2e-9)
    nb.check("cosine b", circle.b(t), path.b(t), atol=2e-9)
    # exp(tau^2 log alpha_min) is exp(-half the integral of beta) for beta from 0 to -4 log alpha_min.
    theirs, path = mirrored(VPSchedule(0.01, 1e-9)), paths.vp(beta_min=1e-9, beta_max=-4 * math.log(0.01))
    nb.check("VP a", theirs.a(t), path.a(t), atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_mean_of_a_gaussian(name: str) -> None:
    mean = torch.tensor([0.7, -0.4], dtype=DOUBLE)
    cov = torch.tensor([[0.8, 0.5], [0.5, 0.6]], dtype=DOUBLE)
    values, axes = torch.linalg.eigh(cov)
    peer = GaussianDenoiser(mean, FullCovariance(axes, values), SCHEDULES[name])
    data, path = GaussianMixture(mean.unsqueeze(0), cov.unsqueeze(0)), mirrored(SCHEDULES[name])
    x = normals()
    for t in (0.0, 0.3, 1.0):
        wanted = peer(x, torch.tensor(1 - t, dtype=DOUBLE)).mean
        nb.check(f"t = {t}", posterior_mean(data, path, x, t), wanted, rtol=1e-7, atol=1e-8)


class Wave(nn.Module):
    """Some network; ``factor`` undoes c_noise = log(sigma) / 4, where theirs is log(sigma)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return (2 * x + self.factor * t.reshape(-1, 1)).sin() + self.anchor


@pytest.mark.parametrize("name", SCHEDULES)
def test_preconditioning(name: str) -> None:
    """Their data has standard deviation 1. Equal for every path, not only for a = 1 as in the source."""
    peer = KarrasDenoiser(Wave(1.0), SCHEDULES[name])
    model = Preconditioned(Wave(4.0), mirrored(SCHEDULES[name]), data_std=1.0)
    x, t = normals(), torch.linspace(0, 1, 64, dtype=DOUBLE)
    nb.check("denoiser", model(x, t), peer(x, 1 - t).mean, atol=1e-9)
    a, b, *_ = model.path.coefficients(t, t)
    nb.check("weight", model.weight(t), (a / b) ** 2 + 1, rtol=1e-9)


# --- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_and_ddim_without_noise_are_our_ddim(name: str) -> None:
    """Their Euler steps in sigma / alpha, which is the exponential integrator: on every schedule it is DDIM."""
    schedule = SCHEDULES[name]
    path, data = ours(schedule)
    x = path.prior_std * normals()
    found = dynamics.ddim(path, data, x, dynamics.times(20))
    nb.check("DDIM", found, sampler(DDIMSampler, schedule, 20)(x), atol=1e-8)
    nb.check("Euler", found, sampler(EulerSampler, schedule, 20)(x), atol=1e-8)


def test_eulers_method_in_our_time_is_another_one() -> None:
    """Ours steps in t, whatever the path. They meet where sigma / alpha is linear in t; elsewhere both have order 1."""

    class Karras(VESchedule):
        def sigma(self, t: Tensor) -> Tensor:
            return self.sigma_min + (self.sigma_max - self.sigma_min) * t

    schedule = Karras(0.01, 10.0)
    path = mirrored(schedule)
    x = path.prior_std * normals()
    velocity = lambda z, t: posterior_mean(RING, path, z, t, "velocity")  # noqa: E731
    for method, kind in (("euler", EulerSampler), ("heun", HeunSampler)):
        found = dynamics.ode(velocity, x, dynamics.times(30), method=method)
        nb.check(method, found, sampler(kind, schedule, 30)(x), atol=1e-8)


@pytest.mark.parametrize(("kind", "method", "order"), [(EulerSampler, "euler", 1), (HeunSampler, "heun", 2)])
def test_on_other_paths_both_converge_to_one_flow_at_the_same_order(kind: Any, method: str, order: int) -> None:
    schedule = SCHEDULES["cosine"]
    path, _ = ours(schedule)
    x = path.prior_std * normals(40)
    velocity = lambda z, t: posterior_mean(RING, path, z, t, "velocity")  # noqa: E731
    exact = dynamics.ode(velocity, x, dynamics.times(400), method="rk4")
    for name, run in {
        "ours": lambda n: dynamics.ode(velocity, x, dynamics.times(n), method=method),
        "theirs": lambda n: sampler(kind, schedule, n)(x),
    }.items():
        error = [float((run(n) - exact).square().mean().sqrt()) for n in (100, 200)]
        assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.35), (name, error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_sampling_is_theirs_but_for_the_noise_of_the_last_step(name: str) -> None:
    """Both add the posterior variance. Theirs also at the end, where it leads to data plus N(0, sigma_min^2): the law
    of x at their t = 0. Ours returns the mean there, which is nearer to the data.
    """
    schedule = SCHEDULES[name]
    path, data = ours(schedule)
    x = path.prior_std * normals(500)
    for peer in (sampler(DDPMSampler, schedule, 20), sampler(DDIMSampler, schedule, 20, eta=1.0)):
        torch.manual_seed(3)
        theirs = peer(x)
        torch.manual_seed(3)
        states: list[Tensor] = []
        mine = dynamics.ancestral(path, data, x, dynamics.times(20), callback=lambda _i, _t, y, s=states: s.append(y))
        z = torch.randn_like(x)  # what they draw for the last step
        t = torch.tensor([0.95, 1.0], dtype=DOUBLE)
        a, b = path.a(t), path.b(t)
        std = b[1] / b[0] * (b[0] ** 2 - (a[0] / a[1] * b[1]) ** 2).sqrt()
        nb.check("end", mine + std * z, theirs, atol=1e-7)
        torch.manual_seed(3)
        nb.check("DDIM", dynamics.ddim(path, data, x, dynamics.times(20), eta=1.0), mine, atol=1e-7)


@pytest.mark.parametrize("eta", [0.25, 0.6])
def test_their_eta_is_the_square_of_ours(eta: float) -> None:
    """Song, Meng and Ermon (2021), equation 16, scale the *standard deviation* by eta; theirs scales the variance.

    0 and 1 are the same in both. The option that makes them equal in between: eta squared.
    """
    schedule = SCHEDULES["VP"]
    path, data = ours(schedule)
    x = path.prior_std * normals()
    t = torch.tensor([0.95, 1.0], dtype=DOUBLE)
    a, b = path.a(t), path.b(t)
    std = eta * b[1] / b[0] * (b[0] ** 2 - (a[0] / a[1] * b[1]) ** 2).sqrt()
    torch.manual_seed(3)
    mine = dynamics.ddim(path, data, x, dynamics.times(20), eta=eta) + std * torch.randn_like(x)
    torch.manual_seed(3)
    nb.check("eta squared", mine, sampler(DDIMSampler, schedule, 20, eta=eta**2)(x), atol=1e-8)
    torch.manual_seed(3)
    other = sampler(DDIMSampler, schedule, 20, eta=eta)(x)
    assert float((other - mine).abs().max()) > 0.05

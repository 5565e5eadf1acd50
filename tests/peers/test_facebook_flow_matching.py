"""Differential tests against Meta's `flow_matching` (extra ``peers``): schedulers, conversions, ODE solver, likelihood.

Conventions are ours: t = 0 noise, t = 1 data, alpha = a and sigma = b; its "snr" is a / b, ours the square. See
``test_diffusers`` on how to run the peers. Its licence (CC BY-NC) forbids commercial use: it is called, not copied.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import nblib as nb
from nblib import dynamics, paths
from nblib.data import toy
from nblib.data.toy import GaussianMixture
from nblib.errors import DataError
from nblib.paths import Path, posterior_mean

# A module inside of it: the folder tests/flow_matching is on the path, and would be imported as a namespace package.
pytest.importorskip("flow_matching.path", reason="a peer: pip install nblib[peers]")

from flow_matching.path import AffineProbPath, CondOTProbPath
from flow_matching.path.scheduler import (
    CondOTScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    Scheduler,
    ScheduleTransformedModel,
    VPScheduler,
)
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DOUBLE = torch.float64
RING = toy.make("eight-gaussians")
assert isinstance(RING, GaussianMixture)


def log_of_linear_vp(t: Tensor) -> Tensor:
    return 2 * t.log() - torch.log1p(-(t**2))


PAIRS: dict[str, tuple[Scheduler, Path]] = {
    "CondOT": (CondOTScheduler(), paths.linear()),
    "cosine": (CosineScheduler(), paths.trigonometric()),
    "VP": (VPScheduler(0.1, 20.0), paths.vp()),
    "linear VP": (LinearVPScheduler(), paths.vp(log_of_linear_vp)),
    "cubic": (
        PolynomialConvexScheduler(3),
        Path("cubic", a=lambda t: t**3, b=lambda t: 1 - t**3),
    ),
}


def normals(n: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PAIRS)
def test_schedulers(name: str) -> None:
    peer, path = PAIRS[name]
    t = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE)
    out = peer(t)
    a, b, da, db = path.coefficients(t, t)
    theirs = (out.alpha_t, out.sigma_t, out.d_alpha_t, out.d_sigma_t)
    for what, got, want in zip(("a", "b", "da", "db"), (a, b, da, db), theirs, strict=True):
        nb.check(what, got, want, rtol=1e-9, atol=1e-12)
    nb.check("inverse", path.time_of_log_snr(path.log_snr(t)), peer.snr_inverse(a / b), atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_points_targets_and_conversions(name: str) -> None:
    scheduler, path = PAIRS[name]
    peer = CondOTProbPath() if name == "CondOT" else AffineProbPath(scheduler)
    x0, x1 = normals(50), 2 * normals(50, 1) + 1
    t = torch.linspace(0.02, 0.98, 50, dtype=DOUBLE)
    out = peer.sample(x_0=x0, x_1=x1, t=t)
    nb.check("x_t", path.sample(x1, x0, t), out.x_t, atol=1e-12)
    nb.check("dx_t", path.velocity(x1, x0, t), out.dx_t, rtol=1e-9, atol=1e-12)
    column = t.unsqueeze(1)
    values = {"data": x1, "noise": x0, "velocity": out.dx_t}
    theirs = {
        ("data", "velocity"): peer.target_to_velocity,
        ("noise", "velocity"): peer.epsilon_to_velocity,
        ("velocity", "data"): peer.velocity_to_target,
        ("noise", "data"): peer.epsilon_to_target,
        ("velocity", "noise"): peer.velocity_to_epsilon,
        ("data", "noise"): peer.target_to_epsilon,
    }
    for (source, target), convert in theirs.items():
        found = path.convert(values[source], out.x_t, t, source=source, target=target)
        nb.check(f"{source} -> {target}", found, convert(values[source], out.x_t, column), rtol=1e-8, atol=1e-8)


def test_the_ends_are_nan_with_them_and_refused_by_us() -> None:
    peer, path = CondOTProbPath(), paths.linear()
    x = normals(3)
    assert peer.target_to_velocity(x, x, torch.ones(3, 1, dtype=DOUBLE)).isnan().all()
    with pytest.raises(DataError, match="singular at t = 1"):
        path.convert(x, x, 1.0, source="data", target="velocity")


def test_in_float32_their_vp_sigma_cancels_and_ours_does_not() -> None:
    """sqrt(1 - exp(-T)) for small T against expm1. Judge: float64. Measured: 1e-3 against 1e-8, at 1 - t = 1e-4."""
    t = 1 - torch.tensor([1e-2, 1e-3, 1e-4])
    exact = paths.vp().b(t.double())
    theirs = VPScheduler(0.1, 20.0)(t).sigma_t
    ours = paths.vp().b(t)
    nb.check("ours", ours, exact, rtol=1e-6)
    assert float((theirs / exact - 1).abs().max()) > 1e-4


# --- solver ----------------------------------------------------------------------------------------------------------


class Exact(ModelWrapper):
    def __init__(self, path: Path) -> None:
        super().__init__(None)
        self.path = path

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return posterior_mean(RING, self.path, x, t, "velocity")


class Clamped(Exact):
    """For a solver that looks beyond [0, 1]."""

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return super().forward(x, t.clamp(0, 1))


def velocity(x: Tensor, t: float) -> Tensor:
    return posterior_mean(RING, paths.linear(), x, t, "velocity")


@pytest.mark.parametrize(("theirs", "ours"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun")])
def test_solvers_with_fixed_steps(theirs: str, ours: str) -> None:
    grid = torch.linspace(0, 1, 21, dtype=DOUBLE)
    peer = ODESolver(Exact(paths.linear()))
    x = normals()
    wanted = peer.sample(x, step_size=None, method=theirs, time_grid=grid)
    nb.check(theirs, dynamics.ode(velocity, x, dynamics.times(20), method=ours), wanted, atol=1e-10)


def test_their_rk4_is_the_three_eighths_rule() -> None:
    """torchdiffeq's "rk4" is Kutta's other method of order 4, ours the classical one: equal order, other numbers."""
    peer = ODESolver(Exact(paths.linear()))
    x = normals()
    exact = dynamics.ode(velocity, x, dynamics.times(640), method="rk4")
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for n in (40, 80):
        grid = torch.linspace(0, 1, n + 1, dtype=DOUBLE)
        found = dynamics.ode(velocity, x, dynamics.times(n), method="rk4")
        wanted = peer.sample(x, step_size=None, method="rk4", time_grid=grid)
        assert float((found - wanted).abs().max()) > 1e-9
        for name, y in (("ours", found), ("theirs", wanted)):
            errors[name].append(float((y - exact).square().mean().sqrt()))
    for name, (coarse, fine) in errors.items():
        assert math.log2(coarse / fine) == pytest.approx(4, abs=0.8), (name, coarse, fine)


def test_dopri5() -> None:
    """One solver, torchdiffeq, behind both. Theirs steps over t = 1, where a field need not exist, and interpolates
    back; ours lands on it and never looks beyond.
    """
    x = normals()
    options = {"method": "dopri5", "atol": 1e-10, "rtol": 1e-10, "time_grid": torch.tensor([0.0, 1.0], dtype=DOUBLE)}
    with pytest.raises(DataError, match="Times lie in"):
        ODESolver(Exact(paths.linear())).sample(x, step_size=None, **options)
    wanted = ODESolver(Clamped(paths.linear())).sample(x, step_size=None, **options)
    found = dynamics.ode(velocity, x, [0.0, 1.0], method="dopri5", atol=1e-10, rtol=1e-10)
    nb.check("end", found, wanted, atol=1e-7)


def test_log_densities() -> None:
    """Their ``compute_likelihood`` against ours, and both against the exact density of the mixture."""
    x = RING.sample(20, generator=torch.Generator().manual_seed(0))
    peer = ODESolver(Exact(paths.linear()))
    base = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)).log_prob
    grid = torch.linspace(1, 0, 81, dtype=DOUBLE)
    _, wanted = peer.compute_likelihood(
        x, base, step_size=None, method="midpoint", time_grid=grid, exact_divergence=True
    )
    found = dynamics.log_prob(velocity, x, dynamics.times(80), method="midpoint")
    nb.check("theirs", found, wanted.detach(), atol=1e-9)
    nb.check("exact", dynamics.log_prob(velocity, x, dynamics.times(80)), RING.log_prob(x), atol=2e-3)


def test_a_field_on_another_schedule_is_the_field_of_the_other_path() -> None:
    """Their ``ScheduleTransformedModel`` rescales space and time; ours knows the mixture's field on both paths."""
    x = normals()
    for new in ("cosine", "VP", "cubic"):
        scheduler, path = PAIRS[new]
        moved = ScheduleTransformedModel(Exact(paths.linear()), CondOTScheduler(), scheduler)
        for t in (0.2, 0.5, 0.9):
            wanted = moved(x=x, t=torch.tensor(t, dtype=DOUBLE))
            nb.check(f"{new} at {t}", posterior_mean(RING, path, x, t, "velocity"), wanted, rtol=1e-6, atol=1e-6)

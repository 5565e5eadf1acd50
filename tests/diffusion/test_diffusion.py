"""Diffusion models: what each constructor chooses, preconditioning, and samples from perfect networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import diffusion as df
from nblib import paths
from nblib.data.toy import GaussianMixture
from nblib.errors import DataError
from nblib.field import FieldModel
from nblib.networks import TimeMLP
from nblib.paths import ddpm_time, posterior_mean

DOUBLE = torch.float64
DATA = GaussianMixture(
    torch.tensor([[0.6, 0.3], [-0.6, -0.3]], dtype=DOUBLE), torch.tensor([0.3, 0.2], dtype=DOUBLE)
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    def __init__(self, path: paths.Path, kind: str, mixture: GaussianMixture = DATA) -> None:
        super().__init__()
        self.path, self.kind, self.mixture = path, kind, mixture
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return posterior_mean(self.mixture, self.path, x, t, to=self.kind) + self.anchor


def perfect(model: FieldModel) -> FieldModel:
    """The same model with the exact answer in place of its network."""
    model.network = Exact(model.path, model.target)
    return model


class Zero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.calls.append((x, t))
        return 0 * x + self.anchor


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (df.ddpm, {"method": "ancestral", "steps": 200}),
    "ddpm-cosine": (lambda n, s: df.ddpm(n, s, schedule="cosine"), {"method": "ddim", "steps": 100}),
    "vdm": (
        lambda n, s: df.vdm(n, s, schedule=paths.LearnedSchedule(hidden=16)),
        {"method": "ancestral", "steps": 100},
    ),
    "ncsn": (
        lambda n, s: df.ncsn(n, s, sigma_max=4.0, levels=30),
        {"method": "langevin", "steps": 29, "per_level": 20},
    ),
    "ve": (df.ve, {"method": "predictor-corrector", "steps": 200}),
    "vp": (df.vp, {"method": "sde", "steps": 200}),
    "sub_vp": (df.sub_vp, {"method": "dopri5"}),
    "edm": (df.edm, {"method": "heun", "grid": "edm", "steps": 30}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_perfect_network_samples_the_data_with_the_sampler_of_its_model(name: str) -> None:
    make, options = MODELS[name]
    x = perfect(make(Zero(), (2,))).sample(1500, generator=seeded(), **options)
    nb.check("mean", x.mean(0), DATA.mean, atol=0.08)
    nb.check("covariance", x.T.cov(), DATA.cov, atol=0.05)
    assert abs(float(DATA.log_prob(x).mean() - DATA.log_prob(DATA.sample(1500)).mean())) < 0.15


def test_the_constructors_choose_what_their_table_says() -> None:
    found = {name: make(Zero(), (2,)) for name, (make, _) in MODELS.items()}
    choices = {n: (m.path.name, m.target, m.times.name) for n, m in found.items()}
    assert choices == {
        "ddpm": ("vp", "noise", "grid"),
        "ddpm-cosine": ("vp-cosine", "noise", "grid"),
        "vdm": ("vp-log-snr", "noise", "low-discrepancy"),
        "ncsn": ("ve", "score", "grid"),
        "ve": ("ve", "noise", "uniform"),
        "vp": ("vp", "noise", "uniform"),
        "sub_vp": ("sub-vp", "noise", "uniform"),
        "edm": ("ve", "data", "edm"),
    }
    assert df.vp(Zero(), (2,), predict="velocity", weight="noise").target == "velocity"
    with pytest.raises(DataError, match="Unknown VP schedule"):
        df.ddpm(Zero(), (2,), schedule="cosinus")


def test_ddpm_is_trained_at_its_own_indices_with_equal_probability() -> None:
    model = df.ddpm(Zero(), (2,), steps=10)
    t = model.times.draw(20_000, model.path, like=torch.zeros(1, dtype=DOUBLE), generator=seeded())
    expected = [float(ddpm_time(k, 10)) for k in range(10, 0, -1)]
    nb.check("times", t.unique(), expected, atol=1e-12)
    nb.check_mc("probability", ((t.unsqueeze(1) - torch.tensor(expected)).abs() < 1e-3).double(), 0.1)
    # A zero network has the squared noise as its loss: 1 per dimension.
    x = DATA.sample(20_000, generator=seeded())
    nb.check("simple loss", model(x, generator=seeded()).loss, 2.0, atol=0.06)


def test_ncsn_weighs_the_squared_score_error_by_the_noise_variance() -> None:
    model = df.ncsn(Zero(), (2,), levels=5, sigma_min=0.1, sigma_max=2.0)
    t = torch.linspace(0, 1, 5, dtype=DOUBLE)
    sigma = 2.0 * (0.1 / 2.0) ** t
    nb.check("weight", model.weight(t), sigma**2, atol=1e-12)
    nb.check("levels", model.times.draw(4000, model.path, like=t, generator=seeded()).unique(), t, atol=1e-12)


# --- preconditioning ----------------------------------------------------------------------------------------------


def test_the_coefficients_are_those_of_the_source_where_a_is_one() -> None:
    path, s = paths.ve(0.002, 80.0), 0.5
    t = torch.linspace(0, 1, 7, dtype=DOUBLE)
    sigma = path.b(t)
    found = df.Preconditioned(Zero(), path, s).coefficients(t)
    expected = (
        s**2 / (sigma**2 + s**2),
        sigma * s / (sigma**2 + s**2).sqrt(),
        1 / (sigma**2 + s**2).sqrt(),
        sigma.log() / 4,
    )
    for name, got, value in zip(("skip", "out", "in", "noise"), found, expected):
        nb.check(name, got, value, atol=1e-12)
    weight = df.Preconditioned(Zero(), path, s).weight(t)
    nb.check("weight", weight, (sigma**2 + s**2) / (sigma * s) ** 2, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("path", ["ve", "vp", "linear"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_raw_network_sees_and_learns_unit_variance(path: str, t: float) -> None:
    where, s = paths.make(path), 0.7
    network = Zero()
    model = df.Preconditioned(network, where, s)
    x1 = s * torch.randn(40_000, 1, dtype=DOUBLE, generator=seeded())
    x0 = torch.randn(40_000, 1, dtype=DOUBLE, generator=seeded(1))
    time = torch.full((40_000,), t, dtype=DOUBLE)
    x = where.sample(x1, x0, time)
    c_skip, c_out, _, c_noise = (c[:1] for c in model.coefficients(time[:1]))
    nb.check("skip alone", model(x, time), c_skip * x, atol=1e-9)
    seen, told = network.calls[0]
    nb.check_mc("input", seen**2, 1.0)
    nb.check("noise", told, c_noise.expand(40_000))
    target = (x1 - c_skip * x) / c_out
    nb.check_mc("target", target**2, 1.0)
    # c_skip minimises c_out: the gap left to F is uncorrelated with the input.
    nb.check_mc("uncorrelated", target * seen, 0.0)


def test_the_loss_of_edm_is_the_unweighted_loss_of_the_raw_network() -> None:
    network = Zero()
    model = df.edm(network, (2,), data_std=0.6)
    x = DATA.sample(4000, generator=seeded())
    loss = model(x, generator=seeded(1)).loss.detach()
    seen, told = network.calls[0]
    assert isinstance(model.network, df.Preconditioned)
    t = model.times.draw(4000, model.path, like=x, generator=_after_noise(x))
    c_skip, c_out, c_in, c_noise = model.network.coefficients(t)
    nb.check("time", told, c_noise, atol=1e-9)
    target = (x - c_skip.unsqueeze(1) * seen / c_in.unsqueeze(1)) / c_out.unsqueeze(1)
    nb.check("loss", loss, target.square().sum(1).mean(), rtol=1e-6)
    with pytest.raises(DataError, match="data_std must be positive"):
        df.edm(network, (2,), data_std=0.0)


def _after_noise(x: Tensor) -> torch.Generator:
    """The generator of a forward pass with seed 1, after its noise was drawn."""
    g = seeded(1)
    torch.randn(x.shape, dtype=x.dtype, generator=g)
    return g


# --- the variational diffusion model ------------------------------------------------------------------------------


def test_the_loss_of_vdm_is_minus_its_bound_and_the_bound_is_below_the_log_density() -> None:
    data = GaussianMixture(torch.tensor([[0.6]], dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE))
    schedule = paths.LearnedSchedule(-8.0, 12.0, hidden=16).double()
    model = df.vdm(Zero(), (1,), schedule=schedule)
    model.network = Exact(model.path, "noise", data)
    x = data.sample(2000, generator=seeded())
    with torch.no_grad():
        loss = torch.stack([model(x, generator=seeded(i)).loss for i in range(20)])
        bound = model.bound(x, 20, generator=seeded(1))
    # A log-SNR from -8 to 12 leaves a gap of about e^-8 to the log-density, whose mean is minus the entropy.
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.4**2)
    nb.check_mc("bound", bound, -entropy)
    nb.check_mc("loss", loss, entropy)
    nb.check("estimates of one number", float(bound.mean() + loss.mean()), 0.0, atol=0.25)


def test_the_bound_of_vdm_does_not_depend_on_the_schedule_between_its_ends() -> None:
    data = GaussianMixture(torch.tensor([[0.6]], dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE))
    x, found = data.sample(1000, generator=seeded()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        schedule = paths.LearnedSchedule(-6.0, 8.0, hidden=4).double()
        model = df.vdm(Zero(), (1,), schedule=schedule)
        model.network = Exact(model.path, "noise", data)
        with torch.no_grad():
            found.append(model.bound(x, 25, generator=seeded(1)))
            found.append(schedule(torch.tensor(0.5, dtype=DOUBLE)))
    assert abs(found[1] - found[3]) > 0.01
    nb.check_mc("invariant", found[0] - found[2], 0.0)


def test_vdm_trains_its_schedule_to_a_better_bound() -> None:
    torch.manual_seed(0)
    data = DATA.sample(2000, generator=seeded()).float()
    schedule = paths.LearnedSchedule(-2.0, 2.0, hidden=8)
    model = df.vdm(TimeMLP(2, hidden=32, layers=2), (2,), schedule=schedule)
    before = float(model.bound(data, 4, generator=seeded()).detach().mean())
    nb.fit(model, data, steps=80, batch_size=128, lr=3e-2, progress=False, device="cpu", clip=5.0)
    after = float(model.bound(data, 16, generator=seeded()).detach().mean())
    low, high = (float(schedule(torch.tensor(t)).detach()) for t in (0.0, 1.0))
    assert high > 2.5
    assert low < high
    assert before + 0.3 < after < float(DATA.log_prob(data.double()).mean()) + 0.05
    assert math.isfinite(after)

"""Differential tests against lucidrains' `denoising-diffusion-pytorch` (extra ``peers``): schedules, posterior, losses.

Its tables are computed in float64 and kept in float32, hence the tolerances. See ``test_diffusers`` on time and on how
to run the peers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import dynamics, paths
from nblib.data.toy import GaussianMixture
from nblib.field import error_unit
from nblib.paths import Path, posterior_mean

pytest.importorskip("denoising_diffusion_pytorch", reason="a peer: pip install nblib[peers]")

from denoising_diffusion_pytorch import GaussianDiffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DOUBLE = torch.float64
T = 100
PIXELS = GaussianMixture(torch.tensor([[-0.5], [0.5]], dtype=DOUBLE), torch.tensor([0.05, 0.05], dtype=DOUBLE))


class Adapter(nn.Module):
    """What their class asks of a network: channels, its call, their step number."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, step: Tensor, _: Any = None) -> Tensor:
        return self.network(x, 1 - (step + 1).float() / T)


def peer_for(schedule: str, network: Any = None, **options: Any) -> GaussianDiffusion:
    settings = {"image_size": 2, "timesteps": T, "auto_normalize": False, "objective": "pred_noise", **options}
    return GaussianDiffusion(Adapter(network), beta_schedule=schedule, **settings)


def table(path: Path) -> Tensor:
    return path.a(1 - torch.arange(1, T + 1, dtype=DOUBLE) / T) ** 2


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
def test_schedules_are_ours_but_for_the_clipped_last_beta(schedule: str) -> None:
    peer, path = peer_for(schedule), paths.vp(schedule)
    nb.check("table", peer.alphas_cumprod[:-1], table(path)[:-1], rtol=2e-6, atol=1e-7)
    nb.check("betas", peer.betas[:-1], paths.ddpm_betas(path, T)[:-1], rtol=2e-5, atol=1e-6)
    nb.check("the last", peer.betas[-1], 0.999, atol=1e-6)  # ours: 1
    assert float(paths.ddpm_betas(path, T)[-1]) == 1


def test_the_linear_schedule_is_a_discretisation_of_ours() -> None:
    """Scaled by 1000 / T, so that sum(beta) stays: at T = 100, sum(beta^2) / 2 is already 0.7 of 10 nats."""
    peer = peer_for("linear")
    betas = peer.betas.double()
    gap = table(paths.vp()).log()[-1] - peer.alphas_cumprod.double().log()[-1]
    nb.check("to third order", gap, (betas**2 / 2 + betas**3 / 3).sum(), rtol=0.05)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
def test_the_posterior(schedule: str) -> None:
    """q(x_{k-1} | x_k, x_0): the mean of one noiseless step of ``ancestral``, and its variance."""
    peer, path = peer_for(schedule), paths.vp(schedule)
    g = torch.Generator().manual_seed(0)
    x, data = (torch.randn(5, 1, 2, 2, generator=g) for _ in range(2))
    for k in (2, 40, 99):
        times = [1 - k / T, 1 - (k - 1) / T]
        found = dynamics.ancestral(path, lambda y, t: data, x, times)
        mean, variance, _ = peer.q_posterior(data, x, torch.full((5,), k - 1))
        nb.check(f"mean {k}", found, mean, atol=2e-5)
        a2, before = (float(path.a(torch.tensor(t, dtype=DOUBLE)) ** 2) for t in times)
        nb.check(f"variance {k}", variance.flatten()[0], (1 - before) / (1 - a2) * (1 - a2 / before), rtol=1e-4)


@pytest.mark.parametrize(("objective", "kind"), [("pred_noise", "noise"), ("pred_x0", "data"), ("pred_v", "velocity")])
def test_losses(objective: str, kind: str) -> None:
    """Their weights 1, SNR and SNR / (SNR + 1) make the loss of every objective that of the noise: our weight="noise".

    v = a x0 - b x1 is our velocity at unit speed; its error is as large as that of the noise over a.
    """
    path = paths.vp("cosine")
    g = torch.Generator().manual_seed(0)
    data, noise, wrong = (torch.randn(20, 1, 2, 2, generator=g) for _ in range(3))
    step = torch.linspace(5, 90, 20).long()
    t = 1 - (step + 1).float() / T
    a, b, *_ = path.coefficients(t, data)
    value = {"noise": noise, "data": data, "velocity": a * noise - b * data}[kind]
    peer = peer_for("cosine", lambda x, s: value + wrong, objective=objective)
    theirs = peer.p_losses(data, step, noise=noise, loss_reduction="none")
    unit = torch.ones_like(t) if kind == "velocity" else error_unit(path, t, kind)
    ratio = (error_unit(path, t, "noise") / unit) ** 2
    nb.check(objective, theirs, ratio * wrong.square().flatten(1).mean(1), rtol=1e-3)


def test_ddim_without_clipping_is_ours() -> None:
    """Their ``ddim_sample`` always clips the data to [-1, 1]: pixels at +-0.5 are not touched by it.

    The grid is 25 steps of T = 100; at k = T their table keeps 0.1 percent of a, hence the start at the second point.
    """
    path = paths.vp("cosine")
    network = lambda x, t: posterior_mean(PIXELS, path, x.unsqueeze(-1).double(), t.double(), "noise").squeeze(-1)  # noqa: E731
    peer = peer_for("cosine", lambda x, t: network(x, t.clamp_min(0.0)).float(), sampling_timesteps=25)
    torch.manual_seed(0)
    states = peer.ddim_sample((6, 1, 2, 2), return_all_timesteps=True).unbind(1)
    times = dynamics.times(25)[1:]
    found = dynamics.ddim(path, lambda x, t: posterior_mean(PIXELS, path, x.unsqueeze(-1), t).squeeze(-1),
                          states[1].double(), times)  # fmt: skip
    nb.check("end", found, states[-1], atol=1e-4)

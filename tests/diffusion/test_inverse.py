"""Inverse problems: exact posteriors of mixtures, what replacement and guidance get right, and what they do not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nblib import dynamics, paths
from nblib.data.toy import GaussianMixture
from nblib.diffusion import exact_posterior, guided_by, inpaint
from nblib.errors import DataError
from nblib.field import FieldModel
from nblib.paths import posterior_mean

DOUBLE = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, -1.2], [0.4, 1.2], [1.2, -0.3]], dtype=DOUBLE),
    torch.tensor([[[0.1, 0.06], [0.06, 0.2]], [[0.3, -0.15], [-0.15, 0.15]], [[0.05, 0], [0, 0.3]]], dtype=DOUBLE),
    torch.tensor([0.3, 0.4, 0.3], dtype=DOUBLE),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


class Exact(nn.Module):
    def __init__(self, path: paths.Path, kind: str, mixture: GaussianMixture, centre: float, scale: float) -> None:
        super().__init__()
        self.path, self.kind = path, kind
        self.mixture = GaussianMixture((mixture.means - centre) / scale, mixture.covs / scale**2, mixture.weights)
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return posterior_mean(self.mixture, self.path, x, t, to=self.kind) + self.anchor


def perfect(
    mixture: GaussianMixture, name: str = "vp", kind: str = "noise", centre: float = 0.0, scale: float = 1.0
) -> FieldModel:
    path = paths.make(name)
    net = Exact(path, kind, mixture, centre, scale)
    return FieldModel(net, path, shape=(mixture.dim,), predict=kind, centre=centre, scale=scale)


def gaussian(std: float | Tensor, mean: Tensor | None = None, dim: int = 2) -> GaussianMixture:
    cov = torch.as_tensor(std, dtype=DOUBLE)
    cov = cov**2 * torch.eye(dim, dtype=DOUBLE) if cov.dim() == 0 else cov
    return GaussianMixture(torch.zeros(1, dim, dtype=DOUBLE) if mean is None else mean[None], cov[None])


# --- the exact posterior ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_std", [0.05, 0.7])
def test_exact_posterior_is_joint_density_divided_by_evidence(noise_std: float) -> None:
    matrix, y = tensor([[0.3, -1.1]]), tensor([0.4])
    post = exact_posterior(MIXTURE, matrix, y, noise_std)
    x = 1.5 * torch.randn(50, 2, dtype=DOUBLE, generator=seeded())
    likelihood = torch.distributions.Normal(x @ matrix[0], noise_std).log_prob(y)
    ratio = MIXTURE.log_prob(x) + likelihood - post.log_prob(x)
    evidence = GaussianMixture(
        MIXTURE.means @ matrix.T, matrix @ MIXTURE.covs @ matrix.T + noise_std**2 * torch.eye(1), MIXTURE.weights
    )
    assert torch.allclose(ratio, evidence.log_prob(y).expand(50), atol=1e-9)


def test_exact_posterior_of_a_known_coordinate_is_the_conditional() -> None:
    post = exact_posterior(MIXTURE, tensor([[1.0, 0.0]]), tensor([0.5]), 1e-4)
    line = torch.linspace(-4, 4, 4001, dtype=DOUBLE)
    density = MIXTURE.log_prob(torch.stack([torch.full_like(line, 0.5), line], 1)).exp()
    density = density / torch.trapezoid(density, line)
    assert abs(float(post.mean[1] - torch.trapezoid(density * line, line))) < 1e-5
    assert abs(float(post.mean[0]) - 0.5) < 1e-6
    assert float(post.cov[0, 0]) < 2e-8


def test_exact_posterior_refuses_what_does_not_fit() -> None:
    for matrix, y, std in (
        (torch.eye(3), tensor([0.0] * 3), 1.0),
        (tensor([[1.0, 0.0]]), tensor([0.0, 1.0]), 1.0),
        (tensor([1.0, 0.0]), tensor([0.0]), 1.0),
        (tensor([[1.0, 0.0]]), tensor([0.0]), 0.0),
    ):
        with pytest.raises(DataError):
            exact_posterior(MIXTURE, matrix, y, std)


# --- inpainting ------------------------------------------------------------------------------------------------

KNOWN, MASK = tensor([0.5, 99.0]), torch.tensor([True, False])


def linear_chain(path: paths.Path, rho: float, y: float, steps: int, start: float) -> tuple[float, float]:
    """Mean and variance of the unknown coordinate after ``inpaint``, N(0, [[1, rho], [rho, 1]]): all is linear."""
    t = torch.tensor(dynamics.times(steps, start=start), dtype=DOUBLE)
    a, b = path.a(t), path.b(t)
    mean, var = 0.0, path.prior_std**2
    for i in range(steps):
        cov = a[i] ** 2 * tensor([[1, rho], [rho, 1]]) + b[i] ** 2 * torch.eye(2, dtype=DOUBLE)
        on_y, on_u = (a[i] * tensor([[1, rho], [rho, 1]]) @ torch.linalg.inv(cov))[1]
        beta = b[i] ** 2 - (a[i] / a[i + 1] * b[i + 1]) ** 2
        keep, pull = a[i] / a[i + 1] * (b[i + 1] / b[i]) ** 2, a[i + 1] * beta / b[i] ** 2
        last = i == steps - 1
        noise = 0.0 if last else beta * (b[i + 1] / b[i]) ** 2
        var = (keep + pull * on_u) ** 2 * var + (pull * on_y * b[i]) ** 2 + noise
        mean = (keep + pull * on_u) * mean + pull * on_y * a[i] * y
    return float(mean), float(var)


@pytest.mark.parametrize("name", ["vp", "ve", "linear", "sub-vp"])
def test_inpainting_gaussian_data_follows_the_linear_recursion(name: str) -> None:
    rho, y, n, steps = 0.9, 0.8, 4000, 30
    model = perfect(gaussian(tensor([[1, rho], [rho, 1]])), name)
    start = model.span[0]
    known = tensor([y, 0.0]).expand(n, 2)
    x = inpaint(model, known, MASK, steps=steps, generator=seeded())
    mean, var = linear_chain(model.path, rho, y, steps, start)
    assert torch.equal(x[:, 0], known[:, 0])
    assert abs(float(x[:, 1].mean()) - mean) < 4 * math.sqrt(var / n)
    assert abs(float(x[:, 1].var()) / var - 1) < 4 * math.sqrt(2 / n)
    if name == "vp":  # and not what was asked for
        assert mean < 0.9 * rho * y


def test_resampling_removes_the_bias_of_replacement() -> None:
    rho, y, n = 0.8, 1.0, 2000
    model = perfect(gaussian(tensor([[1, rho], [rho, 1]])))
    known = tensor([y, 0.0]).expand(n, 2)
    off = [
        abs(float(inpaint(model, known, MASK, steps=40, resample=r, generator=seeded())[:, 1].mean()) - rho * y)
        for r in (1, 4, 16)
    ]
    assert off[0] > 2 * off[1] > 4 * off[2]


def test_inpaint_keeps_what_is_known_and_ignores_the_rest() -> None:
    model = perfect(MIXTURE, centre=0.3, scale=2.0)
    known = KNOWN.expand(6, 2)
    other = torch.where(MASK, known, tensor(-7.0))
    one, two = (inpaint(model, k, MASK, steps=5, generator=seeded()) for k in (known, other))
    assert torch.equal(one, two)
    assert torch.equal(one[:, 0], known[:, 0])
    both = inpaint(model, known, torch.ones(6, 2, dtype=torch.bool), steps=2)
    assert torch.equal(both, known)


def test_inpaint_of_nothing_is_ancestral_sampling() -> None:
    model = perfect(MIXTURE, centre=0.3, scale=2.0)
    free = inpaint(model, torch.zeros(3000, 2, dtype=DOUBLE), torch.tensor(False), steps=50, generator=seeded())
    plain = model.sample(3000, method="ancestral", steps=50, generator=seeded(5))
    error = (free.var(0) / 3000 + plain.var(0) / 3000).sqrt()
    assert ((free.mean(0) - plain.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(free.T.cov(), plain.T.cov(), atol=0.12)


@pytest.mark.parametrize("name", ["vp", "ve", "linear"])
def test_inpaint_is_invariant_to_units(name: str) -> None:
    """The same problem with other centre and scale of the network gives the same law."""
    kwargs: dict[str, Any] = {"steps": 40}
    known = KNOWN.expand(3000, 2)
    x = inpaint(perfect(MIXTURE, name), known, MASK, generator=seeded(), **kwargs)
    z = inpaint(perfect(MIXTURE, name, "data"), known, MASK, generator=seeded(), **kwargs)
    assert torch.allclose(x, z, atol=2e-2 if name == "linear" else 1e-6)  # the first starts at t = 0.001 on "linear"


def test_rows_do_not_depend_on_the_batch() -> None:
    model = perfect(MIXTURE)
    known = KNOWN.expand(5, 2)
    full = inpaint(model, known, MASK, steps=6, resample=2, generator=seeded())
    part = inpaint(model, known[:2], MASK, steps=6, resample=2, generator=seeded())
    assert torch.allclose(full[:2], part, atol=1e-12)
    y = tensor([[0.5]])
    full = guided_by(model, lambda x: x[:, :1], y.expand(5, 1), noise_std=0.5, steps=6, generator=seeded())
    part = guided_by(model, lambda x: x[:, :1], y.expand(2, 1), noise_std=0.5, steps=6, generator=seeded())
    assert torch.allclose(full[:2], part, atol=1e-12)


def test_inpaint_refuses_what_does_not_fit() -> None:
    model = perfect(MIXTURE)
    known = KNOWN.expand(4, 2)
    bad: tuple[tuple[Tensor, Tensor, dict[str, Any], str], ...] = (
        (known, MASK.double(), {}, "boolean"),
        (known, torch.ones(3, dtype=torch.bool), {}, "does not fit"),
        (known[:, :1], MASK, {}, "shape"),
        (known, MASK, {"steps": 0}, "steps"),
        (known, MASK, {"resample": 0}, "resample"),
        (known.long(), MASK, {}, "floating"),
    )
    for k, m, options, message in bad:
        with pytest.raises(DataError, match=message):
            inpaint(model, k, m, **options)


# --- guidance by an observation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "ve", "sub-vp"])
def test_with_the_right_spread_gaussian_data_is_sampled_exactly(name: str) -> None:
    """Data N(m, s² I), an operator with A Aᵀ = c I: the guess is the truth, whatever the units of the network."""
    s, sigma, n = 0.7, 0.3, 4000
    mean = tensor([0.5, -0.2, 1.0])
    data = gaussian(s, mean, 3)
    model = perfect(data, name, centre=0.4, scale=0.5)
    y = tensor([1.3])
    post = exact_posterior(data, torch.full((1, 3), 1 / 3, dtype=DOUBLE), y, sigma)
    x = guided_by(
        model, lambda x: x.mean(1, keepdim=True), y.expand(n, 1), noise_std=sigma, spread=s, gain=1 / 3,
        steps=300, grid="uniform" if name != "ve" else "log-snr", generator=seeded(),
    )  # fmt: skip
    error = post.cov.diagonal().sqrt() / math.sqrt(n)
    assert ((x.mean(0) - post.mean).abs() < 4 * error + 0.01).all()
    assert torch.allclose(x.T.cov(), post.cov, atol=0.05)


def test_without_spread_the_posterior_is_too_narrow_in_what_is_seen() -> None:
    """DPS takes the predicted data for certain: its variance is too small, and the spread repairs it."""
    s, sigma, n = 1.0, 0.5, 4000
    data = gaussian(s)
    model, y = perfect(data), tensor([1.0])
    exact = float(exact_posterior(data, tensor([[1.0, 0.0]]), y, sigma).cov[0, 0])
    options: dict[str, Any] = {"noise_std": sigma, "steps": 200, "generator": seeded()}
    dps, right = (
        float(guided_by(model, lambda x: x[:, :1], y.expand(n, 1), spread=r, **options)[:, 0].var()) for r in (0, s)
    )
    assert abs(right / exact - 1) < 0.1
    assert dps < 0.8 * exact


def test_strength_zero_is_ancestral_sampling() -> None:
    model = perfect(MIXTURE)
    x = guided_by(
        model, lambda x: x[:, :1], torch.zeros(3000, 1, dtype=DOUBLE), noise_std=0.1, strength=0, generator=seeded()
    )
    assert ((x.mean(0) - MIXTURE.mean).abs() < 4 * (MIXTURE.cov.diagonal() / 3000).sqrt() + 0.02).all()
    assert torch.allclose(x.T.cov(), MIXTURE.cov, atol=0.12)


def test_the_normalized_rule_takes_a_step_of_given_length() -> None:
    """One step from pure noise: the same ancestral step, minus zeta times a gradient that noise_std does not enter."""
    model = perfect(MIXTURE)
    y = tensor([[0.3]]).expand(7, 1)

    def run(**options: Any) -> Tensor:
        return guided_by(model, lambda x: x[:, :1] ** 2, y, rule="normalized", steps=1, generator=seeded(), **options)

    free, one, two = (run(noise_std=0.1, strength=z) for z in (0.0, 1.0, 2.0))
    assert torch.allclose(one - free, (two - free) / 2, atol=1e-9)
    assert torch.equal(one, run(noise_std=5.0))
    assert float((one - free).abs().max()) > 1e-4


def test_a_nonlinear_operator_is_obeyed() -> None:
    model = perfect(MIXTURE)
    y = torch.full((500, 1), 1.5, dtype=DOUBLE)
    x = guided_by(model, lambda x: x.norm(dim=1, keepdim=True), y, noise_std=0.2, steps=150, generator=seeded())
    assert abs(float(x.norm(dim=1).mean()) - 1.5) < 0.15


def test_no_gradient_is_left_behind() -> None:
    model = perfect(MIXTURE)
    x = guided_by(model, lambda x: x[:, :1], torch.zeros(3, 1, dtype=DOUBLE), noise_std=1.0, steps=2)
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_guided_by_refuses_what_does_not_fit() -> None:
    model, y = perfect(MIXTURE), torch.zeros(3, 1, dtype=DOUBLE)

    def first(x: Tensor) -> Tensor:
        return x[:, :1]

    good: dict[str, Any] = {"noise_std": 1.0, "steps": 2}
    for operator, observed, change, message in (
        (lambda x: x, y, {}, "operator"),
        (first, torch.zeros((), dtype=DOUBLE), {}, "row"),
        (first, y, {"noise_std": 0.0}, "noise_std"),
        (first, y, {"spread": -1.0}, "spread"),
        (first, y, {"gain": 0.0}, "gain"),
        (first, y, {"rule": "normalised"}, "normalized"),
        (first, y, {"steps": 0}, "steps"),
    ):
        with pytest.raises(DataError, match=message):
            guided_by(model, operator, observed, **(good | change))

"""Targets that are known exactly: density, score, moments and, for the linear model, the posterior.

They are the ground truth that every learned object of the book is drawn against. All tensors follow
the dtype of the parameters: build a target with ``dtype=torch.float64`` for checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nblib.errors import DataError, unknown

__all__ = ["Checkerboard", "GaussianMixture", "LinearGaussian", "make"]


@dataclass(frozen=True)
class GaussianMixture:
    r"""A mixture of Gaussians, :math:`p(x) = \sum_k w_k\,\mathcal N(x; m_k, S_k)`.

    Args:
        means: ``(K, D)``.
        covs: ``(K, D, D)``, or ``(K,)`` for isotropic components with these *standard deviations*.
        weights: ``(K,)``, positive, summing to one; equal where omitted.
    """

    means: Tensor
    covs: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, covs: Tensor, weights: Tensor | None = None) -> None:
        k, d = means.shape
        if covs.shape == (k,):
            covs = covs[:, None, None] ** 2 * torch.eye(d, dtype=means.dtype)
        if covs.shape != (k, d, d):
            raise DataError(f"covs must be of shape {(k,)} or {(k, d, d)}, got {tuple(covs.shape)}.")
        if weights is None:
            weights = torch.full((k,), 1.0 / k, dtype=means.dtype)
        if (
            weights.shape != (k,)
            or bool((weights <= 0).any())
            or not math.isclose(float(weights.sum()), 1, abs_tol=1e-6)
        ):
            raise DataError(f"weights must be {k} positive numbers that sum to 1, got {weights.tolist()}.")
        for name, value in (("means", means), ("covs", covs.to(means.dtype)), ("weights", weights.to(means.dtype))):
            object.__setattr__(self, name, value)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def _components(self, x: Tensor) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.means.to(x), self.covs.to(x), validate_args=False)

    def _joint(self, x: Tensor) -> Tensor:
        return self._components(x).log_prob(x.unsqueeze(-2)) + self.weights.to(x).log()

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats: ``(..., D) -> (...)``."""
        return self._joint(x).logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        r"""Exact score :math:`\nabla_x \log p(x) = \sum_k p(k\mid x)\,S_k^{-1}(m_k - x)`: ``(..., D) -> (..., D)``."""
        weights = self._joint(x).softmax(-1)
        pulls = torch.linalg.solve(self.covs.to(x), (self.means.to(x) - x.unsqueeze(-2)).unsqueeze(-1)).squeeze(-1)
        return (weights.unsqueeze(-1) * pulls).sum(-2)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent draws, ``(n, D)``."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, 1, dtype=self.means.dtype, generator=generator)
        return self.means[k] + (torch.linalg.cholesky(self.covs)[k] @ noise).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        gap = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covs + gap.unsqueeze(-1) * gap.unsqueeze(-2))


@dataclass(frozen=True)
class Checkerboard:
    """The uniform density on the dark squares of a ``cells`` x ``cells`` board over ``[-size, size]^2``.

    The log-density is ``-log(2 size^2)`` on the dark squares and ``-inf`` on the others; the score is
    zero inside every square and does not exist on the edges.
    """

    cells: int = 4
    size: float = 4.0
    dim: int = 2

    def _dark(self, x: Tensor) -> Tensor:
        square = ((x + self.size) * (self.cells / (2 * self.size))).floor()
        inside = ((x >= -self.size) & (x < self.size)).all(-1)
        return inside & (square.sum(-1) % 2 == 0)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats: ``(..., 2) -> (...)``."""
        inside = torch.full(x.shape[:-1], -math.log(2 * self.size**2), dtype=x.dtype)
        return inside.masked_fill(~self._dark(x), -math.inf)

    def score(self, x: Tensor) -> Tensor:
        """Zero on the dark squares; NaN where the density is zero."""
        return torch.zeros_like(x).masked_fill(~self._dark(x).unsqueeze(-1), math.nan)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent draws, ``(n, 2)``."""
        side = 2 * self.size / self.cells
        row = torch.randint(self.cells, (n,), generator=generator)
        half = torch.randint((self.cells + 1) // 2, (n,), generator=generator)
        column = 2 * half + row % 2
        corner = torch.stack([row, column], -1).float() * side - self.size
        return corner + side * torch.rand(n, 2, generator=generator)

    def __post_init__(self) -> None:
        if self.cells < 2 or self.cells % 2:
            raise DataError(f"cells must be an even number of at least 2, got {self.cells}.")


@dataclass(frozen=True)
class LinearGaussian:
    r"""The latent-variable model in which nothing is intractable (probabilistic PCA).

    :math:`z\sim\mathcal N(0, I)`, :math:`x\mid z\sim\mathcal N(Wz+m, \sigma^2 I)`, hence
    :math:`x\sim\mathcal N(m, WW^\top+\sigma^2I)` and :math:`z\mid x\sim\mathcal N(M^{-1}W^\top(x-m),\,\sigma^2M^{-1})`
    with :math:`M=W^\top W+\sigma^2I`. Source: Tipping and Bishop (1999).

    Args:
        weight: ``(D, L)``, the matrix W.
        bias: ``(D,)``, the vector m.
        std: the standard deviation of the observation noise.
    """

    weight: Tensor
    bias: Tensor
    std: float

    def _marginal(self) -> torch.distributions.MultivariateNormal:
        eye = torch.eye(len(self.bias), dtype=self.weight.dtype)
        return torch.distributions.MultivariateNormal(self.bias, self.weight @ self.weight.T + self.std**2 * eye)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-evidence in nats: ``(..., D) -> (...)``."""
        return self._marginal().log_prob(x)

    def score(self, x: Tensor) -> Tensor:
        """Exact score of the marginal: ``(..., D) -> (..., D)``."""
        return (self.bias - x) @ self._marginal().precision_matrix

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(..., L)`` and covariance ``(L, L)`` of z given x."""
        inner = self.weight.T @ self.weight + self.std**2 * torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        mean = torch.linalg.solve(inner, self.weight.T @ (x - self.bias).unsqueeze(-1)).squeeze(-1)
        return mean, self.std**2 * torch.linalg.inv(inner)

    def elbo(self, x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
        r"""The ELBO of :math:`q=\mathcal N(\text{mean}, \text{cov})` in closed form: ``(..., D) -> (...)``."""
        from nblib.probability import gaussian_kl_full

        d, latent = self.weight.shape
        gap = x - self.bias - mean @ self.weight.T
        spread = torch.einsum("di,...ij,dj->...", self.weight, cov, self.weight)
        fit = -0.5 * ((gap**2).sum(-1) + spread) / self.std**2 - d * math.log(self.std * math.sqrt(2 * math.pi))
        prior = torch.zeros(latent, dtype=x.dtype), torch.eye(latent, dtype=x.dtype)
        return fit - gaussian_kl_full(mean, cov, *prior)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent observations, ``(n, D)``."""
        z = torch.randn(n, self.weight.shape[1], dtype=self.weight.dtype, generator=generator)
        noise = torch.randn(n, len(self.bias), dtype=self.weight.dtype, generator=generator)
        return z @ self.weight.T + self.bias + self.std * noise


def _ring(k: int, radius: float, std: float) -> GaussianMixture:
    angle = torch.arange(k, dtype=torch.float64) * (2 * math.pi / k)
    return GaussianMixture(
        radius * torch.stack([angle.cos(), angle.sin()], -1), torch.full((k,), std, dtype=torch.float64)
    )


def _grid(side: int, spacing: float, std: float) -> GaussianMixture:
    line = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    return GaussianMixture(torch.cartesian_prod(line, line), torch.full((side * side,), std, dtype=torch.float64))


def _moons(k: int = 24, std: float = 0.1) -> GaussianMixture:
    angle = torch.linspace(0, math.pi, k, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    return GaussianMixture(
        torch.cat([upper, lower]) - torch.tensor([0.5, 0.25]), torch.full((2 * k,), std, dtype=torch.float64)
    )


def _spiral(k: int = 40, std: float = 0.08) -> GaussianMixture:
    turn = torch.linspace(0.6, 3 * math.pi, k, dtype=torch.float64)
    arm = turn.unsqueeze(-1) / math.pi * torch.stack([turn.cos(), turn.sin()], -1)
    return GaussianMixture(torch.cat([arm, -arm]), torch.full((2 * k,), std, dtype=torch.float64))


_MAKERS: dict[str, Callable[[], GaussianMixture | Checkerboard]] = {
    "eight-gaussians": lambda: _ring(8, 2.0, 0.2),
    "twenty-five-gaussians": lambda: _grid(5, 1.0, 0.1),
    "two-moons": _moons,
    "spirals": _spiral,
    "checkerboard": Checkerboard,
}


def make(name: str) -> GaussianMixture | Checkerboard:
    """A named two-dimensional target with exact ``log_prob``, ``score`` and ``sample``.

    Moons and spirals are mixtures of narrow Gaussians along the curve, so that they are exact too.

    Raises:
        DataError: unknown name.
    """
    if name not in _MAKERS:
        raise DataError(unknown("toy target", name, _MAKERS))
    return _MAKERS[name]()

r"""Score matching: fit :math:`\nabla_x\log p` to data without a normalizer.

A *score* is a callable ``(B, ...) -> (B, ...)`` that treats the examples one by one (no batch norm); :func:`score_of`
makes one of an energy. The losses return one number per example, ``(B,)``, in squared units of the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nblib.dynamics import langevin
from nblib.errors import DataError, unknown
from nblib.paths import expand
from nblib.probability import value_and_divergence
from nblib.train.protocol import LossOut

__all__ = [
    "OBJECTIVES",
    "DenoisingAutoencoder",
    "Score",
    "ScoreModel",
    "denoising",
    "directions",
    "explicit",
    "implicit",
    "score_of",
    "sliced",
]

Score = Callable[[Tensor], Tensor]
OBJECTIVES = ("denoising", "implicit", "hutchinson", "sliced")


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _like(what: str, value: Tensor, x: Tensor) -> Tensor:
    if value.shape != x.shape:
        raise DataError(f"{what} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}.")
    return value


def score_of(energy: Callable[[Tensor], Tensor]) -> Score:
    r"""The score of :math:`p(x)\propto e^{-\mathcal E(x)}` (eq-score): :math:`s(x)=-\nabla_x\mathcal E(x)`.

    Args:
        energy: ``(B, ...) -> (B,)``, each value a function of its own example alone.

    Returns:
        a score; where gradients are enabled it is differentiable in ``x`` and in the parameters of the energy.
    """

    def score(x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=differentiable)
        return -slope

    return score


def directions(x: Tensor, kind: str = "rademacher", *, generator: torch.Generator | None = None) -> Tensor:
    r"""Random directions of the shape of ``x`` with :math:`\mathbb E[vv^\top]=I`.

    Args:
        kind: ``"rademacher"`` (independent signs), ``"gaussian"``, or ``"sphere"`` (uniform, of length
            :math:`\sqrt D`).

    Raises:
        DataError: unknown kind.
    """
    if kind == "rademacher":
        return torch.randint(2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
    if kind not in ("gaussian", "sphere"):
        raise DataError(unknown("kind of direction", kind, ("rademacher", "gaussian", "sphere")))
    v = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    if kind == "gaussian":
        return v
    flat = v.flatten(1)
    return (flat * (math.sqrt(flat.shape[1]) / flat.norm(dim=1, keepdim=True))).view_as(v)


def _score_and_curvature(score: Score, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """s(x), and v'Jv or tr J."""
    probes = None if v is None else _like("v", v, x).unsqueeze(1)
    return value_and_divergence(lambda y: _like("the score", score(y), y), x, probes)


def explicit(score: Score, x: Tensor, true_score: Score) -> Tensor:
    r"""The summand of the Fisher divergence (eq-esm), for data whose score is known.

    .. math:: \tfrac12\lVert s_\theta(x)-\nabla\log p_{\mathcal D}(x)\rVert^2

    Returns:
        ``(B,)``, zero where the scores agree.
    """
    return 0.5 * _sum((_like("the score", score(x), x) - true_score(x)) ** 2)


def implicit(score: Score, x: Tensor, v: Tensor | None = None) -> Tensor:
    r"""Implicit score matching (eq-ism): no score of the data is needed.

    .. math:: \tfrac12\lVert s_\theta(x)\rVert^2+\operatorname{tr}\nabla s_\theta(x)

    Args:
        v: directions of the shape of ``x`` with :math:`\mathbb E[vv^\top]=I`. With them the trace is replaced by its
            unbiased estimate :math:`v^\top\nabla s_\theta(x)\,v` (Hutchinson), which makes this the sliced loss with
            reduced variance (eq-sliced-reduced). Without, the trace is exact and costs D backward passes.

    Returns:
        ``(B,)``; its mean is the Fisher divergence up to a constant under the conditions of thm-ism. Sources:
        Hyvärinen (2005); Song et al. (2020).

    Raises:
        DataError: the score or ``v`` is not of the shape of ``x``.
    """
    s, trace = _score_and_curvature(score, x, v)
    return 0.5 * _sum(s**2) + trace


def sliced(score: Score, x: Tensor, v: Tensor) -> Tensor:
    r"""Sliced score matching along given directions (eq-sliced).

    .. math:: \tfrac12\big(v^\top s_\theta(x)\big)^2+v^\top\nabla s_\theta(x)\,v

    Args:
        v: of the shape of ``x``, see :func:`directions`.

    Returns:
        ``(B,)``. Source: Song et al. (2020).

    Raises:
        DataError: the score or ``v`` is not of the shape of ``x``.
    """
    s, curvature = _score_and_curvature(score, x, v)
    return 0.5 * _sum(v * s) ** 2 + curvature


def denoising(score: Score, x: Tensor, sigma: float | Tensor, noise: Tensor, *, control: bool = False) -> Tensor:
    r"""Denoising score matching with Gaussian noise (eq-dsm), and its control variate (eq-dsm-control).

    .. math:: \tfrac12\Big\lVert s_\theta(x+\sigma z)+\frac z\sigma\Big\rVert^2
              \;\Big[-\frac1\sigma z^\top s_\theta(x)-\frac{\lVert z\rVert^2-D}{2\sigma^2}\Big]

    Args:
        sigma: standard deviation of the corruption, positive: a number, or one per example, ``(B,)``.
        noise: ``z``, standard normal, of the shape of ``x``.
        control: also subtract the two terms in brackets. They have mean zero for every score, and keep the variance
            of the gradient bounded for small ``sigma``; they cost a second evaluation of the score.

    Returns:
        ``(B,)``; the mean is least for the score of the *noisy* data. Source: Vincent (2011).

    Raises:
        DataError: ``sigma`` is not positive; the noise or the score is not of the shape of ``x``.
    """
    if isinstance(sigma, Tensor):
        sigma = expand(sigma, x)
    elif not sigma > 0:
        raise DataError(f"denoising needs a sigma > 0, got {sigma}: without noise there is nothing to remove.")
    target = -_like("noise", noise, x) / sigma
    noisy = x + sigma * noise
    loss = 0.5 * _sum((_like("the score", score(noisy), x) - target) ** 2)
    if control:
        loss = loss + _sum(target * score(x)) - 0.5 * _sum(target**2 - 1 / (sigma * torch.ones_like(x)) ** 2)
    return loss


def _rows(start: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    return start[torch.randint(len(start), (n,), generator=generator, device=start.device)]


@torch.no_grad()
def _chains(
    score: Score, x: Tensor, sigma: float, steps: int, step: float | None, generator: torch.Generator | None
) -> Tensor:
    """Langevin chains of a score at noise level sigma, from the rows of x."""
    return langevin(score, x, step=sigma**2 / 8 if step is None else step, steps=steps, generator=generator)


class ScoreModel(nn.Module):
    r"""A network with one of the objectives of this module as its training loss, at one noise level.

    All objectives are taken at :math:`\tilde x=x+\sigma z` and have the same minimizer, the score of the data with
    noise of standard deviation ``sigma`` (thm-chain).

    Args:
        network: ``(B, ...) -> (B, ...)``, the score; with ``energy=True`` ``(B, ...) -> (B, 1)`` or ``(B,)``, the
            energy of which the score is minus the gradient.
        sigma: standard deviation of the noise; may be 0 except for ``"denoising"``.
        objective: one of ``OBJECTIVES``.

    Raises:
        DataError: unknown objective, or a ``sigma`` that it cannot use.
    """

    def __init__(self, network: nn.Module, sigma: float, *, objective: str = "denoising", energy: bool = False) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise DataError(unknown("objective", objective, OBJECTIVES))
        if not 0 <= sigma < math.inf or (objective == "denoising" and sigma == 0):
            raise DataError(f"objective {objective!r} cannot use sigma={sigma}: give a positive, finite number.")
        self.network, self.sigma, self.objective, self.is_energy = network, sigma, objective, energy

    def energy(self, x: Tensor) -> Tensor:
        """The energy ``(B,)``, up to a constant minus the log-density of the noisy data.

        Raises:
            DataError: the network is a score; it has no energy.
        """
        if not self.is_energy:
            raise DataError("This network is a score without an energy: build ScoreModel with energy=True.")
        return self.network(x).reshape(len(x))

    def score(self, x: Tensor) -> Tensor:
        """The score ``(B, ...) -> (B, ...)``."""
        return score_of(self.energy)(x) if self.is_energy else self.network(x)

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        """The mean loss over the batch."""
        noise = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
        if self.objective == "denoising":
            return LossOut(denoising(self.score, batch, self.sigma, noise).mean(), {})
        x = batch + self.sigma * noise
        if self.objective == "implicit":
            return LossOut(implicit(self.score, x).mean(), {})
        v = directions(x, generator=generator)
        loss = sliced if self.objective == "sliced" else implicit
        return LossOut(loss(self.score, x, v).mean(), {})

    def sample(
        self,
        n: int,
        *,
        condition: None = None,
        start: Tensor,
        steps: int = 1000,
        step: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` Langevin chains (eq-langevin) from random rows of ``start``; ``step`` is sigma^2 / 8 by default."""
        return _chains(self.score, _rows(start, n, generator), self.sigma, steps, step, generator)


class DenoisingAutoencoder(nn.Module):
    r"""One hidden layer with tied weights, which is an energy-based model (thm-dae-energy).

    .. math:: r(x)=W^\top\big(d\odot\operatorname{sigmoid}(Wx+b)\big)+c,\qquad
              s(x)=\frac{r(x)-x}{\sigma^2}=-\nabla\mathcal E(x)

    with :math:`d=1`, or trained if ``scaled``, which keeps the energy (prop-curl) and frees the size of the weights.

    The training loss is the denoising score matching loss (eq-dae),
    :math:`\frac1{2\sigma^4}\lVert r(x+\sigma z)-x\rVert^2`.

    Args:
        dim: the number D of dimensions. hidden: the number of hidden units. sigma: of the noise, positive.
        scaled: train a scale for each hidden unit.
        spread: initial standard deviation of a hidden unit's input, for data of unit variance: larger for structure
            on scales smaller than one. The scales start at its inverse square.

    Source: Vincent (2011).

    Raises:
        DataError: a size or ``sigma`` is not positive.
    """

    scale: Tensor

    def __init__(self, dim: int, hidden: int, sigma: float, *, scaled: bool = False, spread: float = 1.0) -> None:
        super().__init__()
        if dim < 1 or hidden < 1 or not 0 < sigma < math.inf or not 0 < spread < math.inf:
            raise DataError(
                "DenoisingAutoencoder needs dim, hidden >= 1, sigma > 0 and spread > 0,"
                f" got dim={dim}, hidden={hidden}, sigma={sigma}, spread={spread}."
            )
        self.sigma = sigma
        self.weight = nn.Parameter(spread * torch.randn(hidden, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(spread * torch.randn(hidden))
        self.offset = nn.Parameter(torch.zeros(dim))
        if scaled:
            self.scale = nn.Parameter(torch.full((hidden,), spread**-2))
        else:
            self.register_buffer("scale", torch.ones(hidden))

    def reconstruct(self, x: Tensor) -> Tensor:
        """``r(x)``: ``(B, D) -> (B, D)``, the estimate of the clean point."""
        hidden = torch.sigmoid(F.linear(x, self.weight, self.bias))
        return (self.scale * hidden) @ self.weight + self.offset

    def score(self, x: Tensor) -> Tensor:
        """``(r(x) - x) / sigma^2``: ``(B, D) -> (B, D)``."""
        return (self.reconstruct(x) - x) / self.sigma**2

    def energy(self, x: Tensor) -> Tensor:
        r"""The energy of which the score is minus the gradient (eq-dae-energy): ``(B, D) -> (B,)``.

        .. math:: \mathcal E(x)=-\frac1{\sigma^2}\Big(c^\top x-\tfrac12\lVert x\rVert^2
                  +\sum_jd_j\operatorname{softplus}(w_j^\top x+b_j)\Big)
        """
        hidden = F.softplus(F.linear(x, self.weight, self.bias)) @ self.scale
        return -(x @ self.offset - 0.5 * (x**2).sum(-1) + hidden) / self.sigma**2

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        """The mean loss over the batch ``(B, D)``; the log has the squared error of the reconstruction."""
        noise = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
        error = _sum((self.reconstruct(batch + self.sigma * noise) - batch) ** 2).mean()
        return LossOut(error / (2 * self.sigma**4), {"squared_error": error.detach()})

    def sample(
        self,
        n: int,
        *,
        condition: None = None,
        start: Tensor,
        steps: int = 1000,
        step: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` Langevin chains (eq-langevin) from random rows of ``start``; ``step`` is sigma^2 / 8 by default."""
        return _chains(self.score, _rows(start, n, generator), self.sigma, steps, step, generator)

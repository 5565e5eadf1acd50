r"""Inverse problems with a model that was never told of them: x given a part of it, or :math:`y=Ax+\sigma z`.

The score of the data given y is :math:`\nabla\log p_t(x)+\nabla\log p_t(y\mid x)`. The model has the first term; the
second needs the law of :math:`x_1` given :math:`x_t`, of which it knows the mean. :func:`inpaint` and
:func:`guided_by` replace what is missing by two different guesses, and neither samples the posterior exactly. For
mixtures of Gaussians :func:`exact_posterior` says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nblib import dynamics
from nblib.data.toy import GaussianMixture
from nblib.errors import DataError, unknown
from nblib.field import FieldModel
from nblib.nets import randn_rows

__all__ = ["RULES", "exact_posterior", "guided_by", "inpaint"]

RULES = ("likelihood", "normalized")
Operator = Callable[[Tensor], Tensor]


def _times(model: FieldModel, steps: int, grid: str) -> list[float]:
    """Those of ``FieldModel.sample`` for a prediction of the data."""
    if steps < 1:
        raise DataError(f"steps must be at least 1, got {steps}.")
    return model._times(steps, grid, model._singular)


def _start(
    model: FieldModel, n: int, draws: int, like: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """A start in the prior and the noise of ``draws`` later steps; rows do not depend on ``n``."""
    if generator is not None:
        seed = int(torch.randint(2**62, (), device=like.device, generator=generator))
        x = model.path.prior_std * randn_rows(n, model.shape, like, generator)
        generator = torch.Generator(like.device).manual_seed(seed)
    else:
        x = model.path.prior_std * randn_rows(n, model.shape, like)
    return x, dynamics._noise(x, draws, generator)


@torch.no_grad()
def inpaint(
    model: FieldModel,
    known: Tensor,
    mask: Tensor,
    *,
    steps: int = 100,
    resample: int = 1,
    grid: str = "uniform",
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill in what is unknown: at every time the known part is replaced by its own noised value.

    .. math:: x_t\leftarrow m\odot\big(a(t)\,y+b(t)\,z\big)+(1-m)\odot x_t,\qquad z\sim\mathcal N(0,I)\text{ afresh},

    then an ancestral step of the model. The score is then taken at a *noised* y: it is
    :math:`\nabla\log p_t(x^u\mid y_t)` in place of :math:`\nabla\log p_t(x^u\mid y)`, so that early steps know too
    little of y, and later ones do not undo what those did. With ``resample`` = R > 1 every step is taken R times,
    each time but the last going back by the noising step from t' to t, so that the parts can agree.

    Args:
        known: ``(B, *shape)`` in the data's units; only the values under the mask are used.
        mask: boolean, of a shape that broadcasts to that of ``known``; True where it is known.
        steps: of the grid; the model is evaluated ``steps * resample`` times. grid: see ``dynamics.times``.
        condition: as in ``FieldModel.predict``.

    Returns:
        ``(B, *shape)``, equal to ``known`` under the mask. With a generator, row i does not depend on B; the noise of
        all steps is then drawn ahead.

    Raises:
        DataError: shapes or dtypes that do not fit, no steps, ``resample`` below 1.

    Sources: Song et al. (2021), appendix I.2; with resampling Lugmayr et al. (2022), algorithm 1.
    """
    model._check_examples(known)
    if mask.dtype != torch.bool:
        raise DataError(f"mask must be boolean, True where known, got {mask.dtype}: compare it with something.")
    try:
        mask = mask.expand(known.shape)
    except RuntimeError:
        raise DataError(f"mask of shape {tuple(mask.shape)} does not fit known of {tuple(known.shape)}.") from None
    if resample < 1:
        raise DataError(f"resample must be at least 1, got {resample}.")
    times = _times(model, steps, grid)
    y = model._inward(known)
    x, noise = _start(model, len(known), 3 * steps * resample, y, generator)
    a, b = dynamics._coefficients(model.path, times, x)
    for i in range(steps):
        back = dynamics._forward_variance(a, b, i).sqrt()
        for j in range(resample):
            k = 3 * (i * resample + j)
            x = torch.where(mask, a[i] * y + b[i] * noise(k), x)
            new = dynamics._posterior_mean(a, b, i, x, model.predict(x, times[i], "data", condition=condition))
            if i < steps - 1:
                new = new + back * b[i + 1] / b[i] * noise(k + 1)
            x = a[i] / a[i + 1] * new + back * noise(k + 2) if j < resample - 1 else new
    return torch.where(mask, known, model._outward(x))


def guided_by(
    model: FieldModel,
    operator: Operator,
    y: Tensor,
    *,
    noise_std: float,
    spread: float = 0.0,
    gain: float = 1.0,
    strength: float = 1.0,
    rule: str = "likelihood",
    steps: int = 100,
    grid: str = "uniform",
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples given an observation :math:`y=A(x_1)+\sigma z`: ancestral steps with a guess of its likelihood.

    .. math:: \nabla\log p_t(y\mid x)\approx\nabla_x\log\mathcal N\big(y;\,A(\hat x_1(x)),\,(\sigma^2+c\,r_t^2)I\big),
              \qquad r_t^2=\frac{b^2s^2}{a^2s^2+b^2},\qquad\hat x_1(x)=\mathbb E[x_1\mid x_t=x],

    whose gradient runs through the network. ``spread`` s = 0 takes the predicted data for certain, which is diffusion
    posterior sampling (DPS): the likelihood is too sharp, at early times by far. With s > 0 the data given
    :math:`x_t` is taken for a Gaussian of variance :math:`r_t^2`, which is right for data
    :math:`\mathcal N(m,s^2I)` and a linear A with :math:`AA^\top=cI`. All in the units of the data.

    The steps are explicit. Where the likelihood is sharp beside a step (s = 0 and a small ``noise_std``), they
    diverge: take more of them, s > 0, or ``rule="normalized"``, the practical algorithm of DPS: each step ends with
    :math:`-\zeta\,\nabla_x\lVert y-A(\hat x_1)\rVert`, in the units of the network, whatever ``noise_std`` is.

    Args:
        operator: A, differentiable, ``(B, *shape) -> (B, ...)``, row by row, in the units of the data. y: ``(B, ...)``.
        noise_std: sigma, positive. spread: s. gain: c.
        strength: a factor of the likelihood's gradient; the :math:`\zeta` of ``rule="normalized"``.
        condition: as in ``FieldModel.predict``.

    Returns:
        ``(B, *shape)``. With a generator, row i does not depend on B.

    Raises:
        DataError: an unknown rule, y without a batch, an operator whose values do not have the shape of y, numbers out
            of range.

    Sources: Chung et al. (2023), algorithm 1; Song et al. (2023), pseudoinverse-guided diffusion models.
    """
    if rule not in RULES:
        raise DataError(unknown("rule", rule, RULES))
    if not (noise_std > 0 and spread >= 0 and gain > 0 and math.isfinite(noise_std + spread + gain)):
        raise DataError(
            f"guided_by needs noise_std > 0, spread >= 0 and gain > 0, got noise_std={noise_std}, spread={spread},"
            f" gain={gain}."
        )
    if y.dim() < 1:
        raise DataError("y must have one row per sample, (B, ...), got a single number.")
    times = _times(model, steps, grid)
    like = next(model.parameters())
    x, noise = _start(model, len(y), steps - 1, like, generator)
    a, b = dynamics._coefficients(model.path, times, x)
    for i in range(steps):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            d = model.predict(point, times[i], "data", condition=condition)
            seen = operator(model._outward(d))
            if seen.shape != y.shape:
                raise DataError(f"operator must return the shape of y, {tuple(y.shape)}, got {tuple(seen.shape)}.")
            square = (y - seen).flatten(1).square().sum(1)
            loss = square if rule == "likelihood" else (square + torch.finfo(square.dtype).tiny).sqrt()
            (slope,) = torch.autograd.grad(loss.sum(), point)
        beta = dynamics._forward_variance(a, b, i)
        x = dynamics._posterior_mean(a, b, i, x, d.detach())
        if rule == "normalized":
            x = x - strength * slope
        else:
            s = spread / model.scale
            variance = noise_std**2 + gain * model.scale**2 * (b[i] * s) ** 2 / ((a[i] * s) ** 2 + b[i] ** 2)
            x = x - strength * (a[i + 1] / a[i] * beta / (2 * variance)) * slope
        if i < steps - 1:
            x = x + beta.sqrt() * b[i + 1] / b[i] * noise(i)
    return model._outward(x.detach())


def exact_posterior(mixture: GaussianMixture, matrix: Tensor, y: Tensor, noise_std: float) -> GaussianMixture:
    r"""The law of x given :math:`y=Ax+\sigma z` when x is from a mixture of Gaussians: another one.

    .. math:: w_k'\propto w_k\,\mathcal N(y;\,Am_k,\,M_k),\qquad m_k'=m_k+K_k(y-Am_k),\qquad
              S_k'=(I-K_kA)S_k(I-K_kA)^\top+\sigma^2K_kK_k^\top

    with :math:`M_k=AS_kA^\top+\sigma^2I` and :math:`K_k=S_kA^\top M_k^{-1}`.

    Args:
        matrix: A, ``(M, D)``. y: ``(M,)``. noise_std: positive; small for a value that is known.

    Raises:
        DataError: shapes that do not fit, or ``noise_std`` not positive.

    Source: completing the square, component by component.
    """
    if matrix.dim() != 2 or matrix.shape[1] != mixture.dim or y.shape != matrix.shape[:1]:
        raise DataError(
            f"matrix must be (M, {mixture.dim}) and y (M,), got {tuple(matrix.shape)} and {tuple(y.shape)}."
        )
    if not noise_std > 0:
        raise DataError(f"noise_std must be positive, got {noise_std}: take a small one for a value that is known.")
    matrix, y, covs = matrix.to(mixture.means), y.to(mixture.means), mixture.covs
    eye = torch.eye(len(y), dtype=covs.dtype)
    inner = matrix @ covs @ matrix.T + noise_std**2 * eye
    gain = torch.linalg.solve(inner, matrix @ covs).mT
    gap = y - mixture.means @ matrix.T
    rest = torch.eye(mixture.dim, dtype=covs.dtype) - gain @ matrix
    law = torch.distributions.MultivariateNormal(torch.zeros_like(gap), inner)
    weights = (mixture.weights.log() + law.log_prob(gap)).softmax(0)
    return GaussianMixture(
        mixture.means + (gain @ gap.unsqueeze(-1)).squeeze(-1),
        rest @ covs @ rest.mT + noise_std**2 * gain @ gain.mT,
        weights.clamp_min(torch.finfo(weights.dtype).tiny),
    )

r"""Divergences in closed form and by sampling, gradients of expectations, and the units of likelihood.

Everything is in nats. Sums run over the last axis (the dimensions of one example), never over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from nblib.errors import DataError, unknown

__all__ = [
    "bernoulli_kl",
    "bits_per_dim",
    "dequantize",
    "gaussian_kl",
    "gaussian_kl_full",
    "gaussian_log_prob",
    "gumbel_softmax",
    "logit_transform",
    "monte_carlo_kl",
    "optimal_baseline",
    "pathwise_gradient",
    "score_function_gradient",
    "value_and_divergence",
]

LOG_2PI = math.log(2 * math.pi)


def gaussian_kl(mean: Tensor, std: Tensor, prior_mean: Tensor | float = 0.0, prior_std: Tensor | float = 1.0) -> Tensor:
    r"""KL divergence of diagonal Gaussians (eq-gaussian-kl of the VAE chapter), summed over the last axis.

    .. math:: \tfrac12\sum_j\Big(\frac{\sigma_j^2 + (\mu_j-m_j)^2}{s_j^2} - 1 - \log\frac{\sigma_j^2}{s_j^2}\Big)

    Args:
        mean, std: of q, ``(..., L)``; ``std`` is a standard deviation, positive.
        prior_mean, prior_std: of p, broadcastable to q; the standard normal where omitted.

    Returns:
        ``(...)``, in nats, zero exactly where q = p. Source: Kingma and Welling (2014), appendix B.
    """
    prior_std = torch.as_tensor(prior_std, dtype=std.dtype, device=std.device)
    ratio = std / prior_std
    return 0.5 * (ratio**2 + ((mean - prior_mean) / prior_std) ** 2 - 1 - 2 * ratio.log()).sum(-1)


def gaussian_kl_full(mean: Tensor, cov: Tensor, prior_mean: Tensor, prior_cov: Tensor) -> Tensor:
    r"""KL divergence of Gaussians with full covariances (eq-gaussian-kl-full).

    .. math:: \tfrac12\big(\operatorname{tr}(S^{-1}\Sigma) + (m-\mu)^\top S^{-1}(m-\mu) - L
              + \log\det S - \log\det\Sigma\big)

    Args:
        mean, cov: of q, ``(..., L)`` and ``(..., L, L)``.
        prior_mean, prior_cov: of p, shapes as q.

    Returns:
        ``(...)``, in nats.

    Raises:
        torch.linalg.LinAlgError: a covariance is not positive definite.
    """
    q_factor, p_factor = torch.linalg.cholesky(cov), torch.linalg.cholesky(prior_cov)
    white = torch.linalg.solve_triangular(p_factor, q_factor, upper=False)
    gap = torch.linalg.solve_triangular(p_factor, (prior_mean - mean).unsqueeze(-1), upper=False)
    log_det = 2 * (_log_diagonal(p_factor) - _log_diagonal(q_factor))
    return 0.5 * ((white**2).sum((-1, -2)) + (gap**2).sum((-1, -2)) - mean.shape[-1] + log_det)


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def bernoulli_kl(probs: Tensor, prior_probs: Tensor) -> Tensor:
    r"""KL divergence of products of Bernoullis, summed over the last axis.

    .. math:: \sum_j \Big(r_j\log\frac{r_j}{p_j} + (1-r_j)\log\frac{1-r_j}{1-p_j}\Big)

    Args:
        probs: of q, in ``[0, 1]``. prior_probs: of p, in ``(0, 1)``; infinite KL is returned as ``inf``.

    Returns:
        ``(...)``, in nats.
    """
    one = torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, prior_probs)
    zero = torch.special.xlogy(1 - probs, 1 - probs) - torch.special.xlogy(1 - probs, 1 - prior_probs)
    return (one + zero).sum(-1)


def monte_carlo_kl(q: Distribution, p: Distribution, n: int) -> Tensor:
    r"""The terms of the sampled KL divergence, :math:`\log q(z_i)-\log p(z_i)` with :math:`z_i\sim q`.

    Their mean is unbiased for :math:`D_{\rm KL}(q\Vert p)`; their spread gives its standard error.
    Uses the global random state, as ``torch.distributions`` does.

    Returns:
        ``(n, *batch_shape)``, in nats.
    """
    z = q.rsample((n,)) if q.has_rsample else q.sample((n,))
    return q.log_prob(z) - p.log_prob(z)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    r"""Log-density of independent Gaussians, **not** summed (eq-gaussian-nll with its sign).

    .. math:: -\tfrac12\log 2\pi-\log\sigma-\frac{(x-\mu)^2}{2\sigma^2}

    Returns:
        the shape of ``x`` after broadcasting, in nats; ``std`` is a standard deviation.
    """
    std = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    return -0.5 * (LOG_2PI + ((x - mean) / std) ** 2) - std.log()


# --- the gradient of an expectation --------------------------------------------------------------------


def score_function_gradient(
    f: Callable[[Tensor], Tensor],
    log_prob: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    samples: Tensor,
    *,
    baseline: Tensor | float | str = 0.0,
) -> Tensor:
    r"""Single-sample score-function (REINFORCE) estimates (eq-score-function and eq-baseline).

    .. math:: g_i = (f(z_i)-b)\,\nabla_\phi\log q_\phi(z_i)

    Args:
        f: maps one sample to a scalar; need not be differentiable.
        log_prob: ``(z, params) -> scalar``, differentiable in ``params``.
        params: ``(P,)``.
        samples: ``(n, ...)``, drawn from q at ``params``.
        baseline: a number, a ``(P,)`` tensor (one per parameter), or ``"loo"`` for the mean of f over
            the other samples, which keeps every term unbiased.

    Returns:
        ``(n, P)``; each row is unbiased for the gradient. Source: Williams (1992).
    """
    values = torch.func.vmap(f)(samples).unsqueeze(-1)
    scores = torch.func.vmap(torch.func.grad(lambda p, z: log_prob(z, p)), in_dims=(None, 0))(params, samples)
    if isinstance(baseline, str):
        if baseline != "loo":
            raise DataError(unknown("baseline", baseline, ("loo",)))
        if len(values) < 2:
            raise DataError("baseline='loo' needs at least 2 samples, got 1.")
        baseline = (values.sum(0) - values) / (len(values) - 1)
    return (values - baseline) * scores


def optimal_baseline(
    f: Callable[[Tensor], Tensor],
    log_prob: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    samples: Tensor,
) -> Tensor:
    r"""The constant that minimises the variance of each component (eq-optimal-baseline), estimated.

    .. math:: b_j^\star = \frac{\mathbb E[f(z)\,s_j(z)^2]}{\mathbb E[s_j(z)^2]},\qquad
              s_j=\partial_{\phi_j}\log q_\phi(z)

    Use samples other than those of the gradient estimate, or the estimate is biased.

    Returns:
        ``(P,)``.
    """
    scores = torch.func.vmap(torch.func.grad(lambda p, z: log_prob(z, p)), in_dims=(None, 0))(params, samples)
    values = torch.func.vmap(f)(samples).unsqueeze(-1)
    return (values * scores**2).mean(0) / (scores**2).mean(0)


def pathwise_gradient(
    f: Callable[[Tensor], Tensor],
    transform: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    noise: Tensor,
) -> Tensor:
    r"""Single-sample pathwise (reparameterization) estimates (eq-pathwise).

    .. math:: g_i = \nabla_\phi f\big(T_\phi(\epsilon_i)\big)

    Args:
        f: maps one sample to a scalar, differentiable almost everywhere *and continuous*.
        transform: ``(noise, params) -> sample``.
        params: ``(P,)``. noise: ``(n, ...)``, drawn from the fixed base distribution.

    Returns:
        ``(n, P)``; unbiased under the conditions of thm-pathwise. Source: Kingma and Welling (2014).
    """
    return torch.func.vmap(torch.func.grad(lambda p, e: f(transform(e, p))), in_dims=(None, 0))(params, noise)


def gumbel_softmax(
    logits: Tensor, temperature: float, *, hard: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    r"""A relaxed one-hot sample (eq-gumbel-softmax), differentiable in the logits.

    .. math:: y=\operatorname{softmax}\big((\ell+g)/\tau\big),\qquad g_k=-\log(-\log u_k),\ u_k\sim U(0,1)

    With ``hard=True`` the value is the exact categorical sample :math:`\operatorname{onehot}(\arg\max)`, and the
    gradient is that of the relaxation (straight-through), which is biased.

    Args:
        logits: ``(..., K)``. temperature: positive.

    Returns:
        ``(..., K)``, rows on the simplex. Sources: Jang et al. (2017), Maddison et al. (2017).

    Raises:
        DataError: the temperature is not positive.
    """
    if not temperature > 0:
        raise DataError(f"temperature must be positive, got {temperature}.")
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    soft = ((logits - exponential.log()) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    # In this order: (1 + s) - s need not be 1 in floating point.
    return one_hot + (soft - soft.detach())


# --- units -----------------------------------------------------------------------------------------------


def dequantize(x: Tensor, levels: int = 256, *, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    r"""Uniform dequantization of integers to :math:`[0,1)` and the log-determinant of the scaling.

    .. math:: y=(x+u)/K,\ u\sim U[0,1)^D,\qquad \log P(x)\ge\mathbb E_u\big[\log p(y)\big]-D\log K

    The inverse is ``floor(y * levels)``, not rounding.

    Args:
        x: integers in ``{0, ..., levels - 1}``, ``(B, ...)``.

    Returns:
        ``(y, log_det)``: ``y`` float32 in ``[0, 1)``; ``log_det = -D log K`` in nats per example, to be *added*
        to the log-density of ``y``. Source: Theis et al. (2016).

    Raises:
        DataError: ``x`` is not of an integer dtype or leaves the range.
    """
    if x.is_floating_point():
        raise DataError(f"dequantize takes integers in 0..{levels - 1}, got dtype {x.dtype}.")
    if int(x.max()) >= levels or int(x.min()) < 0:
        raise DataError(f"dequantize takes integers in 0..{levels - 1}, got {int(x.min())}..{int(x.max())}.")
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    # In float32, 254 + u can round up to 255: keep u a few spacings away from 0 and 1, so that floor is exact.
    margin = levels * 2.0**-22
    y = (x + noise.clamp(margin, 1 - margin)) / levels
    return y, -x[0].numel() * math.log(levels)


def logit_transform(x: Tensor, alpha: float = 1e-6) -> tuple[Tensor, Tensor]:
    r"""Map :math:`[0,1]^D` to :math:`\mathbb R^D` by :math:`\operatorname{logit}(\alpha+(1-2\alpha)x)`.

    Returns:
        ``(y, log_det)``: ``log_det`` of shape ``(B,)`` is :math:`\log|\det\partial y/\partial x|` in nats, to be
        *added* to the log-density of ``y``. Source: Dinh et al. (2017), section 4.1.

    Raises:
        DataError: ``alpha`` is outside ``[0, 1/2)``.
    """
    if not 0 <= alpha < 0.5:
        raise DataError(f"alpha must lie in [0, 0.5), got {alpha}.")
    squeezed = alpha + (1 - 2 * alpha) * x
    log_one = torch.log1p(-squeezed)
    y = squeezed.log() - log_one
    log_det = (math.log(1 - 2 * alpha) - squeezed.log() - log_one).flatten(1).sum(1)
    return y, log_det


def value_and_divergence(
    field: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""A vector field and its divergence: exactly, or Hutchinson's estimate from probes.

    .. math:: \nabla\!\cdot f=\sum_j\partial_jf_j\qquad\text{or}\qquad \frac1n\sum_{i=1}^nv_i^\top\nabla f\,v_i

    The estimate is unbiased for independent probes with :math:`\mathbb E[vv^\top]=I`. One backward pass for each
    dimension, or for each probe.

    Args:
        x: ``(B, ...)``. field: ``(B, ...) -> (B, ...)``, each row from its own row. probes: ``(B, n, ...)``.

    Returns:
        ``(f(x), divergence)``, ``(B, ...)`` and ``(B,)``; differentiable, unless under ``torch.no_grad()``.

    Raises:
        DataError: a value or probes of another shape than ``x``; a value without derivative.

    Source: Hutchinson (1990).
    """
    differentiable = torch.is_grad_enabled()  # who trains through the divergence needs second derivatives
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        value = field(y)
        if value.shape != y.shape or (probes is not None and probes[:, 0].shape != y.shape):
            given = "" if probes is None else f", probes of {tuple(probes.shape)}"
            raise DataError(
                f"Field and probes must have the shape of x, {tuple(y.shape)}; got {tuple(value.shape)}{given}."
            )
        if not value.requires_grad:
            raise DataError(
                "The field has no derivative in x, which its divergence needs: it ran under torch.no_grad() or"
                " inference_mode(), or does not depend on x (then add 0 * x)."
            )
        units = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape[1:])
        rows = [e.expand_as(y) for e in units] if probes is None else list(probes.unbind(1))
        divergence = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        for v in rows:
            (pulled,) = torch.autograd.grad(
                value, y, v, create_graph=differentiable, retain_graph=True, materialize_grads=True
            )
            divergence = divergence + (v * pulled).flatten(1).sum(1)
    if probes is not None:
        divergence = divergence / len(rows)
    return (value, divergence) if differentiable else (value.detach(), divergence.detach())


def bits_per_dim(log_prob: Tensor, dims: int, log_det: Tensor | float = 0.0) -> Tensor:
    r"""Bits per dimension of a log-density measured after pre-processing (eq-bits-per-dim).

    .. math:: \text{bpd}=-\frac{\log p(y)+\log|\det\partial y/\partial x|}{D\log 2}

    Args:
        log_prob: of the pre-processed example, nats, any shape.
        dims: the number D of dimensions of one example (784 for 28x28).
        log_det: of the pre-processing, nats per example: what ``dequantize`` and ``logit_transform`` return, summed.

    Returns:
        the shape of ``log_prob``; a uniform model over 256 levels gives 8.
    """
    return -(log_prob + log_det) / (dims * math.log(2))

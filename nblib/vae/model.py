r"""The variational autoencoder: one class, with every choice of the chapter as an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nblib.errors import DataError, unknown
from nblib.nets import MLP, ConvDecoder, ConvEncoder, randn_rows
from nblib.probability import gaussian_kl, gaussian_log_prob
from nblib.train.protocol import LossOut
from nblib.vae.likelihoods import make_likelihood

__all__ = ["STD_KINDS", "VAE", "Latent", "latent_statistics", "std_from_raw"]

STD_KINDS = ("log-variance", "softplus", "bounded")
EPSILON = 1e-6


def std_from_raw(raw: Tensor, kind: str, bound: float = 10.0) -> Tensor:
    r"""The standard deviation from an unconstrained network output s (eq-std-parameterizations).

    .. math:: \text{log-variance: } e^{s/2}\qquad \text{softplus: }\log(1+e^s)+\epsilon\qquad
              \text{bounded: } b\,\operatorname{sigmoid}(s)+\epsilon

    with :math:`\epsilon=10^{-6}`. Any shape; returns the same shape, positive.
    """
    if kind == "log-variance":
        return (0.5 * raw).exp()
    if kind == "softplus":
        return F.softplus(raw) + EPSILON
    if kind == "bounded":
        return bound * raw.sigmoid() + EPSILON
    raise DataError(unknown("standard-deviation parameterization", kind, STD_KINDS))


class Latent(NamedTuple):
    """The diagonal Gaussian q(z|x): mean and standard deviation, each ``(B, L)``."""

    mean: Tensor
    std: Tensor

    def sample(self, k: int = 1, generator: torch.Generator | None = None) -> Tensor:
        r"""``k`` reparameterized draws :math:`z=\mu+\sigma\odot\epsilon` (eq-reparameterization): ``(k, B, L)``."""
        noise = torch.randn(k, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device, generator=generator)
        return self.mean + self.std * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of ``z``, nats, summed over the latent axis."""
        return gaussian_log_prob(z, self.mean, self.std).sum(-1)


def _log_prior(z: Tensor) -> Tensor:
    """Log-density of the standard normal prior, nats, summed over the latent axis."""
    return gaussian_log_prob(z, torch.zeros_like(z), 1.0).sum(-1)


class VAE(nn.Module):
    r"""Variational autoencoder with a standard normal prior and a diagonal Gaussian encoder.

    The training loss is the negative ELBO (eq-elbo), summed over dimensions and averaged over the batch:

    .. math:: \frac1B\sum_i\Big[-\frac1k\sum_{j=1}^k\log p_\theta(x_i\mid z_{ij})
              +\beta\,D_{\rm KL}\big(q_\phi(z\mid x_i)\Vert p(z)\big)\Big]

    Args:
        shape: ``(C, H, W)`` of one image.
        latent: the number L of latent dimensions.
        network: ``"mlp"`` or ``"conv"``. hidden: widths of the MLP's hidden layers, mirrored in the decoder.
        width: channels of the first convolutional stage. activation: see ``nblib.nets.ACTIVATIONS``.
        likelihood: see ``nblib.vae.LIKELIHOODS``; ``decoder_std`` and ``levels`` belong to it.
        std: ``"log-variance"``, ``"softplus"`` or ``"bounded"`` (by ``bound``).
        kl: ``"analytic"`` or ``"sampled"``. beta: its weight; 1 gives the bound, 0 an autoencoder's loss with noise.
        beta_warmup: training steps over which the weight rises linearly from 0 to ``beta``.
        k: samples of z per image and step; their log-likelihoods are averaged (not the likelihoods).
        encoder, decoder: own modules, ``(B, C, H, W) -> (B, 2L)`` and ``(B, L) -> (B, outputs * C * H * W)``.

    Sources: Kingma and Welling (2014); Rezende, Mohamed and Wierstra (2014).
    """

    steps: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        latent: int = 2,
        *,
        network: str = "mlp",
        hidden: Sequence[int] = (512,),
        width: int = 32,
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        decoder_std: float = 1.0,
        levels: int = 256,
        std: str = "softplus",
        bound: float = 10.0,
        kl: str = "analytic",
        beta: float = 1.0,
        beta_warmup: int = 0,
        k: int = 1,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if std not in STD_KINDS:
            raise DataError(unknown("standard-deviation parameterization", std, STD_KINDS))
        if kl not in ("analytic", "sampled"):
            raise DataError(unknown("kl", kl, ("analytic", "sampled")))
        if network not in ("mlp", "conv"):
            raise DataError(unknown("network", network, ("mlp", "conv")))
        if len(shape) != 3 or latent < 1 or k < 1 or not beta >= 0 or beta_warmup < 0 or not bound > 0 or width < 1:
            raise DataError(
                "VAE needs shape=(C, H, W), latent >= 1, k >= 1, beta >= 0, beta_warmup >= 0, bound > 0 and width >= 1,"
                f" got shape={tuple(shape)}, latent={latent}, k={k}, beta={beta}, beta_warmup={beta_warmup},"
                f" bound={bound}, width={width}."
            )
        self.shape, self.latent = tuple(shape), latent
        self.std_kind, self.bound_std, self.kl_kind = std, bound, kl
        self.beta, self.beta_warmup, self.k = beta, beta_warmup, k
        self.likelihood = make_likelihood(likelihood, std=decoder_std, levels=levels)
        out, pixels = self.likelihood.outputs, shape[0] * shape[1] * shape[2]
        if network == "mlp":
            encoder = encoder or MLP([pixels, *hidden, 2 * latent], activation)
            decoder = decoder or MLP([latent, *reversed(hidden), out * pixels], activation)
        else:
            encoder = encoder or ConvEncoder(shape, 2 * latent, width=width)
            decoder = decoder or ConvDecoder(latent, shape, out * shape[0], width=width)
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    # --- the two networks ------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Latent:
        """q(z|x) for images ``(B, C, H, W)`` in [0, 1]."""
        self.check(x)
        return self._encode(x)

    def _encode(self, x: Tensor) -> Latent:
        mean, raw = self.encoder(x).chunk(2, -1)
        return Latent(mean, std_from_raw(raw, self.std_kind, self.bound_std))

    def decode(self, z: Tensor) -> Tensor:
        """The expected image for latents ``(..., L)``: ``(..., C, H, W)``."""
        return self.likelihood.mean(self._decode(z))

    def _decode(self, z: Tensor) -> Tensor:
        flat = self.decoder(z.reshape(-1, self.latent))
        return flat.reshape(*z.shape[:-1], self.likelihood.outputs, *self.shape)

    # --- the bound -------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        """The training loss in nats per image, with the reconstruction term and the KL as logs."""
        self._check_shape(batch)
        reconstruction, kl = self._terms(batch, self.k, generator)
        loss, rate = reconstruction.mean(), kl.mean()
        return LossOut(loss + self._weight() * rate, {"reconstruction": loss.detach(), "kl": rate.detach()})

    def _weight(self) -> Tensor | float:
        """The weight of the KL at this training step (eq-kl-warmup)."""
        if not (self.training and self.beta_warmup):
            return self.beta
        self.steps += 1
        if torch.compiler.is_compiling():
            # In one graph with the counting, the backward pass would count again (pytorch/pytorch#197039).
            torch._dynamo.graph_break()
        return self.beta * (self.steps / self.beta_warmup).clamp(max=1.0)

    def _terms(self, x: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Per image: minus the expected log-likelihood, and the KL; both estimated with ``k`` samples."""
        q = self._encode(x)
        z = q.sample(k, generator)
        reconstruction = -self.likelihood.log_prob(x, self._decode(z)).mean(0)
        if self.kl_kind == "analytic":
            return reconstruction, gaussian_kl(q.mean, q.std)
        return reconstruction, (q.log_prob(z) - _log_prior(z)).mean(0)

    def bound(self, x: Tensor, k: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        r"""An unbiased estimate of the ELBO of each image (eq-elbo), whatever ``beta`` the model was trained with.

        The ``k`` samples are averaged as *logs*: more samples lower the variance and leave the expectation.

        Args:
            x: images ``(B, C, H, W)`` in [0, 1]. k: samples per image.

        Returns:
            ``(B,)``, nats.
        """
        self.check(x)
        if k < 1:
            raise DataError(f"k must be at least 1, got {k}.")
        reconstruction, kl = self._terms(x, k, generator)
        return -(reconstruction + kl)

    def log_weights(self, x: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
        r"""The logarithms of ``k`` importance weights per image (eq-log-weight).

        .. math:: \log w_j=\log p_\theta(x\mid z_j)+\log p(z_j)-\log q_\phi(z_j\mid x),\qquad z_j\sim q_\phi(z\mid x)

        Returns:
            ``(k, B)``, nats. Their mean over k is the sampled ELBO.
        """
        self.check(x)
        q = self._encode(x)
        z = q.sample(k, generator)
        return self.likelihood.log_prob(x, self._decode(z)) + _log_prior(z) - q.log_prob(z)

    def importance_bound(
        self, x: Tensor, k: int = 64, *, chunk: int = 64, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""The importance-weighted bound (eq-importance-bound), at least the ELBO and at most the evidence on average.

        .. math:: \mathcal L_k(x)=\log\frac1k\sum_{j=1}^k w_j

        Args:
            k: weights per image. chunk: how many are in memory at a time.

        Returns:
            ``(B,)``, nats. Source: Burda et al. (2016).

        Raises:
            DataError: ``k`` or ``chunk`` below 1, or unusable images.
        """
        if k < 1 or chunk < 1:
            raise DataError(f"k and chunk must be at least 1, got k={k}, chunk={chunk}.")
        sizes = [min(chunk, k - start) for start in range(0, k, chunk)]
        parts = [self.log_weights(x, size, generator=generator).logsumexp(0) for size in sizes]
        return torch.stack(parts).logsumexp(0) - math.log(k)

    # --- what one does with it -------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, condition: None = None, generator: torch.Generator | None = None, noise: bool = False
    ) -> Tensor:
        """``n`` images from the prior, ``(n, C, H, W)``; image i does not depend on ``n``.

        Args:
            condition: this model has none; anything else than None is refused.
            noise: draw from p(x|z) instead of showing its mean.
        """
        if condition is not None:
            raise DataError("This VAE is unconditional: sample() takes condition=None.")
        like = next(self.parameters())
        if not noise:
            return self.decode(randn_rows(n, (self.latent,), like, generator))
        images = like.new_empty(n, *self.shape)
        for i in range(n):  # one by one, or the noise of image i would depend on how many latents were drawn before
            params = self._decode(randn_rows(1, (self.latent,), like, generator))
            images[i] = self.likelihood.sample(params, generator)[0]
        return images

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Decode the mean of q(z|x)."""
        return self.decode(self.encode(x).mean)

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """Decode the straight line between the mean codes of two images ``(C, H, W)``: ``(steps, C, H, W)``."""
        ends = self.encode(torch.stack([a, b])).mean
        t = torch.linspace(0, 1, steps, dtype=ends.dtype, device=ends.device).unsqueeze(-1)
        return self.decode((1 - t) * ends[0] + t * ends[1])

    # --- bad input ---------------------------------------------------------------------------------------

    def _check_shape(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape or not len(x):
            raise DataError(f"Expected images of shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DataError(f"Expected floating-point images in [0, 1], got dtype {x.dtype}: divide uint8 by 255.")

    def check(self, x: Tensor) -> None:
        """Refuse images that the likelihood is not defined for.

        Raises:
            DataError: wrong shape or dtype, NaN, or values outside [0, 1].
        """
        self._check_shape(x)
        low, high = (float(v) for v in x.aminmax())
        if not (low >= 0 and high <= 1):
            what = "NaN" if low != low else f"values from {low:.4g} to {high:.4g}"
            raise DataError(
                f"The likelihood needs images in [0, 1], got {what}: rescale them (uint8 images: divide by 255)."
            )

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return (
            f"shape={self.shape}, latent={self.latent}, std={self.std_kind!r}, beta={self.beta}, parameters={count:,}"
        )


@torch.no_grad()
def latent_statistics(model: VAE, x: Tensor, *, batch_size: int = 2000, threshold: float = 0.1) -> dict[str, Any]:
    r"""How each latent dimension is used, over images ``x`` in [0, 1].

    Returns:
        ``kl_per_dim`` ``(L,)``: mean KL of each dimension, nats (they add up to the mean KL);
        ``active_kl``: how many exceed ``threshold``; ``variance_of_mean`` ``(L,)`` and ``active_units``: how many
        exceed 0.01 (Burda et al., 2016); ``means``, ``stds``: ``(N, L)``.
    """
    parts = [model.encode(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    means, stds = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    kl = gaussian_kl(means.unsqueeze(-1), stds.unsqueeze(-1)).mean(0)
    spread = means.var(0)
    return {
        "kl_per_dim": kl,
        "active_kl": int((kl > threshold).sum()),
        "variance_of_mean": spread,
        "active_units": int((spread > 0.01).sum()),
        "means": means,
        "stds": stds,
    }

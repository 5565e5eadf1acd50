r"""Likelihoods :math:`p_\theta(x\mid z)` of images in :math:`[0,1]`, given what the decoder outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nblib.errors import DataError, unknown
from nblib.probability import gaussian_log_prob

__all__ = ["LIKELIHOODS", "Bernoulli", "DiscretizedLogistic", "Gaussian", "Likelihood", "make_likelihood"]


class Likelihood(nn.Module):
    """What every likelihood offers. ``outputs`` is how many numbers per pixel it reads from the decoder.

    ``params`` has shape ``(..., outputs, C, H, W)``, images ``(..., C, H, W)``.
    """

    outputs = 1

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """Log-likelihood in nats, summed over the pixels: ``(...)``."""
        raise TypeError("Likelihood is the interface: use Bernoulli, Gaussian or DiscretizedLogistic.")

    def mean(self, params: Tensor) -> Tensor:
        """The expected image, ``(..., C, H, W)``."""
        raise TypeError("Likelihood is the interface: use Bernoulli, Gaussian or DiscretizedLogistic.")

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One image per entry of ``params``, ``(..., C, H, W)``."""
        raise TypeError("Likelihood is the interface: use Bernoulli, Gaussian or DiscretizedLogistic.")


def _sum_pixels(values: Tensor) -> Tensor:
    return values.sum((-1, -2, -3))


class Bernoulli(Likelihood):
    r"""Independent pixels in {0, 1} (eq-bernoulli-likelihood), from logits :math:`\ell`.

    .. math:: \log p(x\mid z)=\sum_d \big(x_d\,\ell_d-\operatorname{softplus}(\ell_d)\big)

    Grey values in (0, 1) are accepted as soft targets: the value is then the expectation of the
    log-likelihood over binary images drawn with these intensities, a lower bound target whose best value is
    minus the pixel entropy, not zero. It is not the log-density of the grey image.
    """

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        logits = params.squeeze(-4)
        return _sum_pixels(x * logits - F.softplus(logits))

    def mean(self, params: Tensor) -> Tensor:
        return params.squeeze(-4).sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)


class Gaussian(Likelihood):
    r"""Independent Gaussian pixels (eq-gaussian-nll), with the standard deviation fixed or learned.

    Args:
        std: a positive number (fixed), ``"shared"`` (one learned number for all pixels and images) or
            ``"pixel"`` (the decoder outputs one per pixel and image).

    A shared or per-pixel standard deviation is bounded below by ``min_std``: with a density there is
    otherwise no best value (a constant pixel drives the likelihood to infinity).
    """

    def __init__(self, std: float | str = "shared", *, min_std: float = 1e-3) -> None:
        super().__init__()
        self.min_std = min_std
        if isinstance(std, str):
            if std not in ("shared", "pixel"):
                raise DataError(unknown("decoder standard deviation", std, ("shared", "pixel", "a positive number")))
            self.outputs = 2 if std == "pixel" else 1
            if std == "shared":
                self.log_std = nn.Parameter(torch.tensor(math.log(0.3)))
        elif not std > 0:
            raise DataError(f"The decoder's standard deviation must be positive, got {std}.")
        self.kind = std

    def std(self, params: Tensor) -> Tensor:
        """The standard deviation, broadcastable to the image."""
        if self.kind == "pixel":
            return params.select(-4, 1).clamp_min(math.log(self.min_std)).exp()
        if self.kind == "shared":
            return self.log_std.clamp_min(math.log(self.min_std)).exp()
        return params.new_tensor(float(self.kind))

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        return _sum_pixels(gaussian_log_prob(x, self.mean(params), self.std(params)))

    def mean(self, params: Tensor) -> Tensor:
        return params.select(-4, 0).sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean = self.mean(params)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + self.std(params) * noise


class DiscretizedLogistic(Likelihood):
    r"""A logistic density integrated over each grey level: a true probability of 8-bit images.

    .. math:: P(k)=\sigma\Big(\frac{b_{k+1}-\mu}{s}\Big)-\sigma\Big(\frac{b_k-\mu}{s}\Big)

    with bin edges half-way between the levels and :math:`\mp\infty` at both ends. Source: Kingma et al. (2016).

    Args:
        levels: the number of grey levels; images take values ``k / (levels - 1)``.
    """

    outputs = 2

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise DataError(f"levels must be at least 2, got {levels}.")
        self.levels = levels

    def _location_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        return params.select(-4, 0).sigmoid(), params.select(-4, 1).clamp(-7.0, 2.0).exp()

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        mean, scale = self._location_scale(params)
        half = 0.5 / (self.levels - 1)
        upper, lower = (x + half - mean) / scale, (x - half - mean) / scale
        # log(sigma(u) - sigma(l)) = -softplus(-u) - softplus(l) + log(1 - exp(-(u - l))), stable in both tails
        middle = -F.softplus(-upper) - F.softplus(lower) + torch.log(-torch.expm1(lower - upper))
        log_mass = torch.where(x < half, F.logsigmoid(upper), torch.where(x > 1 - half, -F.softplus(lower), middle))
        return _sum_pixels(log_mass)

    def mean(self, params: Tensor) -> Tensor:
        """The location of the logistic: the median of the grey level, and its mean away from 0 and 1."""
        return self._location_scale(params)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, scale = self._location_scale(params)
        u = torch.rand(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator).clamp(1e-6, 1 - 1e-6)
        x = mean + scale * (u.log() - torch.log1p(-u))
        return (x.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)


LIKELIHOODS = ("bernoulli", "gaussian", "gaussian-fixed", "gaussian-pixel", "logistic")


def make_likelihood(name: str, *, std: float = 1.0, levels: int = 256) -> Likelihood:
    """A likelihood by name; ``std`` belongs to ``gaussian-fixed`` and ``levels`` to ``logistic``.

    Raises:
        DataError: unknown name.
    """
    if name == "bernoulli":
        return Bernoulli()
    if name == "gaussian":
        return Gaussian("shared")
    if name == "gaussian-fixed":
        return Gaussian(std)
    if name == "gaussian-pixel":
        return Gaussian("pixel")
    if name == "logistic":
        return DiscretizedLogistic(levels)
    raise DataError(unknown("likelihood", name, LIKELIHOODS))

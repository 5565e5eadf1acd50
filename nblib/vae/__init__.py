"""Variational autoencoders: chapter *The variational autoencoder*."""

from nblib.probability import gaussian_kl, gaussian_kl_full
from nblib.vae.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    make_likelihood,
)
from nblib.vae.model import VAE, Latent, latent_statistics, std_from_raw

__all__ = [
    "LIKELIHOODS",
    "VAE",
    "Bernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Latent",
    "Likelihood",
    "gaussian_kl",
    "gaussian_kl_full",
    "latent_statistics",
    "make_likelihood",
    "std_from_raw",
]

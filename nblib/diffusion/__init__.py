r"""Diffusion and score models as choices of the arguments of ``FieldModel``.

Every constructor takes a network ``net(x, t, condition)``, the shape of one example, and further arguments of
``FieldModel`` (``classes``, ``drop``, ``times``, ``weight``, ``centre``, ``scale``, ...), which replace its choices.

| constructor | path | predicts | times | weight |
| --- | --- | --- | --- | --- |
| ``ddpm`` | VP, a schedule | noise | a grid | simple |
| ``vdm`` | VP, learned | noise | low-discrepancy | likelihood |
| ``ncsn`` | VE | score | a grid | of the noise |
| ``ve``, ``vp``, ``sub_vp`` | of the same name | noise | uniform | simple |
| ``edm`` | VE | data, preconditioned | log-normal noise | the network's own |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nblib import paths
from nblib.diffusion.chain import Chain, ChainBound, HybridDDPM, chain_bound
from nblib.diffusion.inverse import exact_posterior, guided_by, inpaint
from nblib.diffusion.precondition import Preconditioned
from nblib.field import FieldModel, time_grid

__all__ = [
    "Chain",
    "ChainBound",
    "FieldModel",
    "HybridDDPM",
    "Preconditioned",
    "chain_bound",
    "ddpm",
    "edm",
    "exact_posterior",
    "guided_by",
    "inpaint",
    "ncsn",
    "sub_vp",
    "vdm",
    "ve",
    "vp",
]


def _build(
    network: nn.Module, path: paths.Path, shape: Sequence[int], options: dict[str, Any], **choice: Any
) -> FieldModel:
    return FieldModel(network, path, shape=shape, **{**choice, **options})


def ddpm(
    network: nn.Module, shape: Sequence[int], *, steps: int = 1000, schedule: str = "linear", **options: Any
) -> FieldModel:
    """Denoising diffusion probabilistic model: noise prediction at the times ``ddpm_time(k, steps)``.

    Its sampler is ``sample(n, method="ancestral", steps=steps)``; ``method="ddim"`` needs fewer steps.
    Sources: Ho et al. (2020); Nichol and Dhariwal (2021) for ``schedule="cosine"``.
    """
    times = time_grid(steps, last=1 - 1 / steps)
    return _build(network, paths.vp(schedule), shape, options, predict="noise", times=times)


def vdm(network: nn.Module, shape: Sequence[int], *, schedule: nn.Module | None = None, **options: Any) -> FieldModel:
    """Variational diffusion model: minus the bound in nats, with a learned log-SNR (``paths.LearnedSchedule``).

    The bound does not depend on the schedule between its ends: that part of its gradient is noise of mean zero, and
    only the ends are trained in earnest. Source: Kingma et al. (2021).
    """
    path = paths.vp(paths.LearnedSchedule() if schedule is None else schedule)
    choice = {"predict": "noise", "times": "low-discrepancy", "weight": "likelihood"}
    return _build(network, path, shape, options, **choice)


def ncsn(
    network: nn.Module,
    shape: Sequence[int],
    *,
    levels: int = 10,
    sigma_min: float = 0.01,
    sigma_max: float = 1.0,
    **options: Any,
) -> FieldModel:
    r"""Noise-conditional score network: scores at ``levels`` geometric noise levels, weighted by :math:`\sigma^2`.

    Its sampler is ``sample(n, method="langevin", steps=levels - 1)``. Source: Song and Ermon (2019).
    """
    path, times = paths.ve(sigma_min, sigma_max), time_grid(levels, last=1.0)
    return _build(network, path, shape, options, predict="score", times=times, weight="noise")


def ve(
    network: nn.Module, shape: Sequence[int], *, sigma_min: float = 0.01, sigma_max: float = 50.0, **options: Any
) -> FieldModel:
    """Variance-exploding score SDE. Source: Song et al. (2021)."""
    return _build(network, paths.ve(sigma_min, sigma_max), shape, options, predict="noise")


def vp(
    network: nn.Module, shape: Sequence[int], *, beta_min: float = 0.1, beta_max: float = 20.0, **options: Any
) -> FieldModel:
    """Variance-preserving score SDE: DDPM in continuous time. Source: Song et al. (2021)."""
    path = paths.vp("linear", beta_min=beta_min, beta_max=beta_max)
    return _build(network, path, shape, options, predict="noise")


def sub_vp(
    network: nn.Module, shape: Sequence[int], *, beta_min: float = 0.1, beta_max: float = 20.0, **options: Any
) -> FieldModel:
    """Sub-VP score SDE. Source: Song et al. (2021)."""
    return _build(network, paths.sub_vp(beta_min, beta_max), shape, options, predict="noise")


def edm(
    network: nn.Module,
    shape: Sequence[int],
    *,
    data_std: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    **options: Any,
) -> FieldModel:
    """The design of Karras et al. (2022): a preconditioned denoiser, log-normal noise levels, effective weight 1.

    Its sampler is ``sample(n, method="edm", grid="edm", steps=18)``.
    """
    path = paths.ve(sigma_min, sigma_max)
    denoiser = Preconditioned(network, path, data_std)
    return _build(denoiser, path, shape, options, predict="data", times="edm", weight=denoiser.weight)

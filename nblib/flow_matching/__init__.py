r"""Flow matching, rectified flow and stochastic interpolants as choices of the arguments of ``FieldModel``.

Every constructor takes a network ``net(x, t, condition)``, the shape of one example, and further arguments of
``FieldModel``. All predict the velocity :math:`\dot ax_1+\dot bx_0`; they differ in path and coupling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nblib import paths
from nblib.errors import DataError
from nblib.field import FieldModel, fixed_time, optimal_transport
from nblib.nets import randn_rows

__all__ = ["FieldModel", "cfm", "distill", "interpolant", "optimal_transport", "ot_cfm", "rectified_flow", "reflow"]


def cfm(network: nn.Module, shape: Sequence[int], *, sigma_min: float = 0.0, **options: Any) -> FieldModel:
    """Conditional flow matching along straight lines from noise to data. Source: Lipman et al. (2023)."""
    return FieldModel(network, paths.linear(sigma_min), shape=shape, **{"predict": "velocity", **options})


def ot_cfm(network: nn.Module, shape: Sequence[int], **options: Any) -> FieldModel:
    """Flow matching with optimal transport in each batch. Sources: Pooladian et al. (2023), Tong et al. (2024)."""
    return cfm(network, shape, **{"coupling": "ot", **options})


def rectified_flow(network: nn.Module, shape: Sequence[int], *, pairs: bool = False, **options: Any) -> FieldModel:
    """Rectified flow: independent noise at first, then (``pairs=True``) the pairs that ``reflow`` makes, or any others.

    Source: Liu, Gong and Liu (2023).
    """
    return cfm(network, shape, **{"coupling": "pairs" if pairs else "independent", **options})


def interpolant(network: nn.Module, shape: Sequence[int], *, path: str = "trigonometric", **options: Any) -> FieldModel:
    r"""Stochastic interpolant: :math:`x_t=\sin(\tfrac\pi2t)x_1+\cos(\tfrac\pi2t)x_0` and the quadratic objective.

    .. math:: \mathbb E\big[\lVert v(x_t,t)\rVert^2-2\,v(x_t,t)^\top\dot x_t\big]

    It is the regression loss without its constant, and its minimum is minus the mean squared speed of the flow.
    Source: Albergo and Vanden-Eijnden (2023).
    """
    choice = {"predict": "velocity", "objective": "quadratic"}
    return FieldModel(network, paths.make(path), shape=shape, **{**choice, **options})


@torch.no_grad()
def reflow(
    model: FieldModel,
    n: int,
    *,
    condition: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1000,
    **options: Any,
) -> Tensor:
    """Pairs of a noise and where the model's ODE carries it: ``(n, 2, *shape)``, for a model with ``coupling="pairs"``.

    Args:
        condition: None, one label, or ``(n,)`` labels. options: of ``FieldModel.transport``.

    Source: Liu, Gong and Liu (2023), algorithm 1.

    Raises:
        DataError: ``n`` or ``batch_size`` below 1, or as ``transport``.
    """
    if n < 1 or batch_size < 1:
        raise DataError(f"reflow needs n >= 1 and batch_size >= 1, got n={n}, batch_size={batch_size}.")
    like = next(model.parameters())
    parts = []
    for start in range(0, n, batch_size):
        count = min(batch_size, n - start)
        noise = model.centre + model.scale * randn_rows(count, model.shape, like, generator)
        labels = condition[start : start + count] if isinstance(condition, Tensor) else condition
        parts.append(torch.stack([noise, model.transport(noise, condition=labels, **options)], 1))
    return torch.cat(parts)


def distill(network: nn.Module, shape: Sequence[int], **options: Any) -> FieldModel:
    r"""A student that makes the whole journey in one step, :math:`x_1\approx x_0+v(x_0,0)`, learned from pairs.

    .. math:: \mathbb E\lVert x_0+v(x_0,0)-x_1\rVert^2

    is flow matching at t = 0 only. Train on ``reflow`` pairs, best from a copy of the teacher's network; its sampler is
    ``sample(n, method="euler", steps=1)``. Source: Liu, Gong and Liu (2023), section 2.2.
    """
    return cfm(network, shape, **{"coupling": "pairs", "times": fixed_time(0.0), **options})

"""What the training loop and the metrics expect of a model."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["HasBound", "HasLatent", "HasLogProb", "LossOut", "Model"]


class LossOut(NamedTuple):
    """The training loss (0-dim, nats per example where it is a likelihood) and detached 0-dim logs."""

    loss: Tensor
    logs: dict[str, Tensor]


@runtime_checkable
class Model(Protocol):
    """An ``nn.Module`` whose ``forward`` is the training loss of a batch."""

    def forward(self, batch: Any, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut: ...

    def sample(self, n: int, *, condition: Any = None, generator: torch.Generator | None = None) -> Tensor: ...


@runtime_checkable
class HasLogProb(Protocol):
    """Exact log-density or log-probability."""

    def log_prob(self, x: Tensor) -> Tensor:
        """``(B,)``, nats."""
        ...


@runtime_checkable
class HasBound(Protocol):
    """A lower bound on the log-likelihood."""

    def bound(self, x: Tensor, k: int = 1) -> Tensor:
        """``(B,)``, nats."""
        ...


@runtime_checkable
class HasLatent(Protocol):
    """Codes and back."""

    def encode(self, x: Tensor) -> Any: ...

    def decode(self, z: Tensor) -> Tensor: ...

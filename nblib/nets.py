"""Networks without opinions: no EMA, no schedule, no loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nblib.errors import DataError, unknown

__all__ = ["ACTIVATIONS", "MLP", "ConvDecoder", "ConvEncoder", "ResidualBlock", "activation", "randn_rows"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """A fresh activation module by name.

    Raises:
        DataError: unknown name, with the nearest known one.
    """
    if name not in ACTIVATIONS:
        raise DataError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """Linear layers with an activation between them: ``(B, ...) -> (B, sizes[-1])``; inputs are flattened."""

    def __init__(self, sizes: Sequence[int], activation_name: str = "tanh") -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise DataError(f"sizes needs at least two positive numbers (input, ..., output), got {list(sizes)}.")
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), activation(activation_name)]
        super().__init__(*layers[:-1])


class ResidualBlock(nn.Module):
    """``x + conv(act(norm(conv(act(norm(x))))))`` with group norm; the last convolution starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        last = self.body[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _stages(shape: Sequence[int], width: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Channels and sizes of a pyramid that halves the image until a side is at most 8."""
    size = (shape[1], shape[2])
    channels, sizes = [width], [size]
    while min(size) > 8:
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        channels.append(channels[-1] * 2)
        sizes.append(size)
    return channels, sizes


class ConvEncoder(nn.Module):
    """Residual convolutional encoder: ``(B, C, H, W) -> (B, out)``."""

    def __init__(self, shape: Sequence[int], out: int, *, width: int = 32, blocks: int = 1) -> None:
        super().__init__()
        channels, sizes = _stages(shape, width)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1)]
        for i, c in enumerate(channels):
            layers += [ResidualBlock(c) for _ in range(blocks)]
            if i + 1 < len(channels):
                layers.append(nn.Conv2d(c, channels[i + 1], 3, stride=2, padding=1))
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(channels[-1] * sizes[-1][0] * sizes[-1][1], out)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvDecoder(nn.Module):
    """Residual convolutional decoder: ``(B, latent) -> (B, out_channels, H, W)``."""

    def __init__(
        self, latent: int, shape: Sequence[int], out_channels: int, *, width: int = 32, blocks: int = 1
    ) -> None:
        super().__init__()
        channels, sizes = _stages(shape, width)
        self.start = (channels[-1], *sizes[-1])
        self.head = nn.Linear(latent, math.prod(self.start))
        layers: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            layers += [ResidualBlock(channels[i]) for _ in range(blocks)]
            if i:
                layers += [nn.Upsample(size=sizes[i - 1]), nn.Conv2d(channels[i], channels[i - 1], 3, padding=1)]
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.head(z).unflatten(1, self.start))


def randn_rows(n: int, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal ``(n, *shape)``, drawn row by row: row i is the same whatever ``n`` is."""
    rows = [torch.randn(*shape, dtype=like.dtype, device=like.device, generator=generator) for _ in range(n)]
    return torch.stack(rows) if rows else like.new_zeros(0, *shape)

r"""Networks that know the time: ``net(x, t, condition=None)`` for vectors (TimeMLP) and images (UNet, DiT).

Time t lies in [0, 1], 0 is noise and 1 is data; what lies between is no business of a network. The output has the
shape of ``x`` and starts at zero. Rows of a batch do not see each other.

The fused attention of PyTorch has no second derivatives, no forward mode and no ``vmap``. Where a loss or a divergence
needs them, put it into ``with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):``, or build the UNet
with ``attention=0``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nblib.errors import DataError, unknown

__all__ = ["TIME_EMBEDDINGS", "DiT", "FourierEmbedding", "SinusoidalEmbedding", "TimeMLP", "UNet"]


# --- time and label ------------------------------------------------------------------------------------


def _sinusoids(position: Tensor, dim: int) -> Tensor:
    """Sines and cosines at ``dim / 2`` frequencies from 1 down towards 1/10000: ``(...) -> (..., dim)``."""
    k = torch.arange(dim // 2, dtype=position.dtype, device=position.device)
    angle = position.unsqueeze(-1) * torch.exp(-math.log(10_000) * k / (dim // 2))
    return torch.cat([angle.sin(), angle.cos()], -1)


def _even(dim: int) -> int:
    if dim < 2 or dim % 2:
        raise DataError(f"An embedding is made of pairs (sine, cosine): dim must be even and positive, got {dim}.")
    return dim


class SinusoidalEmbedding(nn.Module):
    r"""Sines and cosines of the time at fixed geometric frequencies: ``(B,) -> (B, dim)``.

    .. math:: \gamma(t)=\big[\sin(s\,\omega_k t),\ \cos(s\,\omega_k t)\big]_{k=0}^{d/2-1},\qquad
              \omega_k=10000^{-2k/d}

    Args:
        dim: d, even. scale: s; 1000 stretches [0, 1] to the steps of the sources.

    Raises:
        DataError: ``dim`` is odd or not positive. Sources: Vaswani et al. (2017); Ho, Jain and Abbeel (2020).
    """

    def __init__(self, dim: int, scale: float = 1000.0) -> None:
        super().__init__()
        self.dim, self.scale = _even(dim), scale

    def forward(self, t: Tensor) -> Tensor:
        return _sinusoids(self.scale * t, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scale={self.scale:g}"


class FourierEmbedding(nn.Module):
    r"""Sines and cosines of the time at random frequencies, drawn once and not trained: ``(B,) -> (B, dim)``.

    .. math:: \gamma(t)=\big[\sin(2\pi w_k t),\ \cos(2\pi w_k t)\big]_{k=1}^{d/2},\qquad w_k\sim\mathcal N(0,s^2)

    Inner products of embeddings fall off with the time between them as
    :math:`e^{-2\pi^2s^2(t-t')^2}`: with s = 2 it reaches over about 0.1.
    The frequencies are in the state dict.

    Args:
        dim: d, even. scale: s.

    Raises:
        DataError: ``dim`` is odd or not positive. Sources: Tancik et al. (2020); Song et al. (2021).
    """

    frequency: Tensor

    def __init__(self, dim: int, scale: float = 2.0) -> None:
        super().__init__()
        self.dim, self.scale = _even(dim), scale
        self.register_buffer("frequency", scale * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scale={self.scale:g}"


TIME_EMBEDDINGS: dict[str, type[SinusoidalEmbedding] | type[FourierEmbedding]] = {
    "sinusoidal": SinusoidalEmbedding,
    "fourier": FourierEmbedding,
}


class _Embedding(nn.Module):
    """Time and label in one vector, ``gamma(t) + E[label]``: ``(B, dim)``.

    Row 0 of the table E stands for "no condition", row ``1 + label`` for a label.
    """

    def __init__(self, dim: int, time: str, classes: int | None) -> None:
        super().__init__()
        if time not in TIME_EMBEDDINGS:
            raise DataError(unknown("time embedding", time, TIME_EMBEDDINGS))
        if classes is not None and classes < 1:
            raise DataError(f"classes must be at least 1, or None for a network without labels, got {classes}.")
        self.classes = classes
        self.time = TIME_EMBEDDINGS[time](dim)
        if classes is not None:
            self.table = nn.Embedding(classes + 1, dim)

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None) -> Tensor:
        gamma = self.time(_times(t, x)).to(x.dtype)
        if self.classes is not None:
            return gamma + self._label(x, condition, self.classes)
        if condition is not None:
            raise DataError("This network has no classes: leave condition=None, or build it with classes=K.")
        return gamma

    def _label(self, x: Tensor, condition: Tensor | None, classes: int) -> Tensor:
        n = len(x)
        if condition is None:
            return self.table.weight[:1].expand(n, -1)
        if condition.shape != (n,) or condition.dtype != torch.int64:
            raise DataError(
                f"condition must be {n} labels of dtype int64, one per row of x, got shape {tuple(condition.shape)}"
                f" and dtype {condition.dtype}."
            )
        try:
            return self.table(condition + 1)
        except IndexError:  # found by the look-up on the CPU: a comparison here would wait for the GPU
            raise DataError(
                f"Labels must be from 0 to {classes - 1}, or -1 for no condition,"
                f" got labels from {int(condition.min())} to {int(condition.max())}."
            ) from None


class _Conditioning(_Embedding):
    """What modulates the layers of a network for images: a perceptron of the embedding, ``(B, dim)``."""

    def __init__(self, dim: int, time: str, classes: int | None) -> None:
        super().__init__(dim, time, classes)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None) -> Tensor:
        return self.mlp(super().forward(x, t, condition))


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """The time of each row of ``x``: ``(B,)``, in single precision at least; half precision merges near times."""
    n = len(x)
    if not isinstance(t, Tensor):
        return torch.full((n,), float(t), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if not t.is_floating_point():
        raise DataError(f"t must be floating-point times in [0, 1], got dtype {t.dtype}: divide step numbers by steps.")
    if t.shape not in ((), (n,)):
        raise DataError(f"t must be one time, or one per row of x, shape ({n},), got shape {tuple(t.shape)}.")
    return t.to(torch.promote_types(t.dtype, torch.float32)).expand(n)


def _zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _check_images(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise DataError(
            f"Expected floating-point images of shape (B, {channels}, H, W), got {tuple(x.shape)} of {x.dtype}."
        )


# --- vectors -------------------------------------------------------------------------------------------


class TimeMLP(nn.Module):
    r"""A multilayer perceptron of a vector and the time: ``(B, dim) -> (B, dim)``.

    .. math:: f(x,t,y) = W\,h_n,\qquad h_i=\operatorname{silu}(W_i h_{i-1}+b_i),\qquad h_0=[x,\ \gamma(t)+E_y]

    ``net(x, t, condition=None)``: t is a float, or times in [0, 1] ``(B,)``; condition are labels ``(B,)``, int64,
    with -1 for "no condition", as None. The output starts at zero.

    Args:
        dim: of one vector. hidden, layers: n layers of so many units; 5 of 512 are the size of the two-dimensional
            experiments of the source. With ``dim=2`` the default has 1,085,954 parameters.
        features: length of the embedding of time and label, next to x. time: see ``TIME_EMBEDDINGS``.
        classes: number of labels, or None.

    Raises:
        DataError: sizes that are not positive, an unknown embedding; at the call, a shape that does not fit, labels
            for a network without classes. Source: Lipman et al. (2023).
    """

    def __init__(
        self,
        dim: int = 2,
        *,
        hidden: int = 512,
        layers: int = 5,
        features: int = 64,
        time: str = "fourier",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if min(dim, hidden, layers) < 1:
            raise DataError(f"dim, hidden and layers must be positive, got {dim}, {hidden} and {layers}.")
        self.dim = dim
        self.embedding = _Embedding(features, time, classes)
        sizes = [dim + features, *[hidden] * layers]
        body: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            body += [nn.Linear(n_in, n_out), nn.SiLU()]
        self.body = nn.Sequential(*body, _zeroed(nn.Linear(hidden, dim)))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise DataError(f"Expected floating-point vectors (B, {self.dim}), got {tuple(x.shape)} of {x.dtype}.")
        return self.body(torch.cat([x, self.embedding(x, t, condition)], -1))


# --- the U-Net -----------------------------------------------------------------------------------------


def _norm(channels: int, *, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels, affine=affine)


class _TimeBlock(nn.Module):
    r"""A residual block whose second norm is scaled and shifted by the time and the label (FiLM).

    .. math:: S x+C_2\operatorname{silu}\big((1+\alpha)\odot N(C_1\operatorname{silu}(N(x)))+\beta\big),\qquad
              (\alpha,\beta)=W c
    """

    def __init__(self, n_in: int, n_out: int, features: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.film = nn.Linear(features, 2 * n_out)
        self.norm2, self.conv2 = _norm(n_out, affine=False), _zeroed(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.film(c)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu((1 + scale) * h + shift))


class _Attention(nn.Module):
    """Self-attention over tokens, without norm or residual: ``(B, N, dim) -> (B, N, dim)``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise DataError(f"{heads} heads do not divide {dim} channels: choose another number of heads.")
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _ImageAttention(nn.Module):
    """``x + attention(norm(x))`` over the pixels; starts as the identity."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = _norm(channels), _Attention(channels, heads)
        _zeroed(self.attention.out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class _Stage(nn.ModuleList):
    """Blocks of one resolution, each followed by self-attention where there are heads."""

    def __init__(self, n_in: int, n_out: int, blocks: int, features: int, heads: int | None) -> None:
        super().__init__()
        for i in range(blocks):
            self.append(_TimeBlock(n_out if i else n_in, n_out, features))
            if heads is not None:
                self.append(_ImageAttention(n_out, heads))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, c)
        return x


class UNet(nn.Module):
    """A U-Net of the time for images of any size: ``(B, channels, H, W) -> (B, channels, H, W)``.

    Each level but the lowest has ``blocks`` residual blocks on the way down, a strided convolution, and on the way up
    ``blocks`` more, which see the lower level (nearest neighbours) next to what this level had on the way down; the
    lowest level has ``1 + blocks``. Sides that ``2 ** (levels - 1)`` does not divide (4 by default; 28 and 32 are
    fine) are padded with zeros at the right and at the bottom, and the output is cut.

    ``net(x, t, condition=None)``: t is a float, or times in [0, 1] ``(B,)``; condition are labels ``(B,)``, int64,
    with -1 for "no condition", as None. The output starts at zero.

    Args:
        channels: of the images. width: channels of the first level. multipliers: of the width, one per level.
            With one channel the default has 1,258,177 parameters.
        blocks: residual blocks per level and direction. attention: how many of the lowest levels have self-attention
            after each block (0 for none). heads: of the attention.
        time: see ``TIME_EMBEDDINGS``. classes: number of labels, or None.

    Raises:
        DataError: sizes that are not positive or heads that do not divide the channels, an unknown embedding; at the
            call, a shape that does not fit, labels for a network without classes.

    Sources: Ronneberger, Fischer and Brox (2015); Ho, Jain and Abbeel (2020); scale and shift by Perez et al. (2018).
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        attention: int = 1,
        heads: int = 4,
        time: str = "sinusoidal",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if min(channels, width, blocks, len(multipliers), *multipliers) < 1:
            raise DataError(
                "channels, width, blocks and multipliers must be positive,"
                f" got {channels}, {width}, {blocks} and {list(multipliers)}."
            )
        if not 0 <= attention <= len(multipliers):
            raise DataError(f"attention must be from 0 to the {len(multipliers)} levels, got {attention}.")
        self.channels, self.stride = channels, 2 ** (len(multipliers) - 1)
        features = 4 * width
        widths = [width * m for m in multipliers]
        low = len(widths) - attention  # the first level with attention
        levels = [(n, heads if i >= low else None) for i, n in enumerate(widths)]
        self.conditioning = _Conditioning(features, time, classes)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.shrink, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for (n, at), below in zip(levels[:-1], widths[1:]):
            self.down.append(_Stage(n, n, blocks, features, at))
            self.shrink.append(nn.Conv2d(n, below, 3, stride=2, padding=1))
            self.up.insert(0, _Stage(below + n, n, blocks, features, at))  # from the lowest to the highest
        self.middle = _Stage(widths[-1], widths[-1], 1 + blocks, features, levels[-1][1])
        self.head = nn.Sequential(_norm(widths[0]), nn.SiLU(), _zeroed(nn.Conv2d(widths[0], channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        _check_images(x, self.channels)
        c = self.conditioning(x, t, condition)
        height, width = x.shape[2:]
        h = self.stem(F.pad(x, (0, -width % self.stride, 0, -height % self.stride)))
        skips: list[Tensor] = []
        for stage, shrink in zip(self.down, self.shrink):
            skips.append(stage(h, c))
            h = shrink(skips[-1])
        h = self.middle(h, c)
        for stage, skip in zip(self.up, reversed(skips)):
            h = stage(torch.cat([F.interpolate(h, scale_factor=2.0), skip], 1), c)
        return self.head(h)[:, :, :height, :width]


# --- the transformer -----------------------------------------------------------------------------------


class _DiTBlock(nn.Module):
    r"""Attention and a perceptron, each between a modulated norm and a gate (adaLN-zero); starts as the identity.

    .. math:: x\leftarrow x+g_1\odot A\big((1+\alpha_1)\odot N(x)+\beta_1\big),\qquad
              x\leftarrow x+g_2\odot M\big((1+\alpha_2)\odot N(x)+\beta_2\big)
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = _Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = _zeroed(nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attention((1 + scale1) * self.norm(x) + shift1)
        return x + gate2 * self.mlp((1 + scale2) * self.norm(x) + shift2)


class DiT(nn.Module):
    """A small diffusion transformer for images: ``(B, channels, H, W) -> (B, channels, H, W)``.

    Patches become tokens with sines and cosines of their row and column, go through blocks of attention and
    perceptron that time and label modulate (adaLN-zero), and become patches again. Sides must be multiples of
    ``patch``; they may differ from call to call.

    ``net(x, t, condition=None)``: t is a float, or times in [0, 1] ``(B,)``; condition are labels ``(B,)``, int64,
    with -1 for "no condition", as None. The output starts at zero.

    Args:
        channels: of the images. patch: side of a patch. dim, depth, heads: of the transformer; ``heads`` divides
            ``dim``, and so does 4. With one channel the default has 1,257,616 parameters.
        time: see ``TIME_EMBEDDINGS``. classes: number of labels, or None.

    Raises:
        DataError: sizes that are not positive or do not divide each other, an unknown embedding; at the call, a shape
            that does not fit, labels for a network without classes.

    Source: Peebles and Xie (2023).
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        patch: int = 4,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        time: str = "sinusoidal",
        classes: int | None = None,
    ) -> None:
        super().__init__()
        if min(channels, patch, dim, depth) < 1 or dim % 4:
            raise DataError(
                "channels, patch, dim and depth must be positive and dim a multiple of 4,"
                f" got {channels}, {patch}, {dim} and {depth}."
            )
        self.channels, self.patch, self.dim = channels, patch, dim
        self.conditioning = _Conditioning(dim, time, classes)
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.blocks = nn.ModuleList(_DiTBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = _zeroed(nn.Linear(dim, 2 * dim))
        self.head = _zeroed(nn.Linear(dim, channels * patch**2))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        _check_images(x, self.channels)
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise DataError(f"Sides must be multiples of the patch, {self.patch}, got {tuple(x.shape[2:])}: pad them.")
        c = self.conditioning(x, t, condition)
        patches = self.embed(x)
        rows, columns = patches.shape[2:]
        h = patches.flatten(2).transpose(1, 2) + self._positions(rows, columns, patches)
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.modulation(c).unsqueeze(1).chunk(2, -1)
        pixels = self.head((1 + scale) * self.norm(h) + shift)  # (B, patches, C * patch * patch)
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (rows, columns)), self.patch)

    def _positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Half of the channels know the row of a patch, half its column: ``(rows * columns, dim)``."""
        row, column = (
            _sinusoids(torch.arange(n, dtype=torch.float32, device=like.device), self.dim // 2) for n in (rows, columns)
        )
        grid = torch.cat([row.unsqueeze(1).expand(-1, columns, -1), column.expand(rows, -1, -1)], -1)
        return grid.flatten(0, 1).to(like.dtype)

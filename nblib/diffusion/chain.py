r"""The chain of DDPM in T steps: its bound in nats, term by term, and a model that learns the variance of its steps.

Data x is destroyed in T steps of Gaussian noise and a model undoes them. :math:`z_k` is the state after k steps:
:math:`z_0` is the data (or almost: a path may stop short of it), :math:`z_T` is noise. Times run the other way:
index k is at :math:`t_k=1-k/T`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nblib.errors import DataError, unknown
from nblib.field import FieldModel
from nblib.nets import randn_rows
from nblib.paths import Path, expand
from nblib.probability import gaussian_kl, gaussian_log_prob
from nblib.train.protocol import LossOut

__all__ = ["DECODERS", "Chain", "ChainBound", "HybridDDPM", "chain_bound"]

DECODERS = ("discretized", "normalized", "gaussian")
FIXED = ("posterior", "forward")
Index = int | Tensor
Reverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Chain:
    r"""The coefficients of the Markov chain :math:`z_0, z_1, \dots, z_T` on a Gaussian path, at T + 1 even times.

    .. math:: q(z_k\mid z_{k-1})=\mathcal N(\sqrt{\alpha_k}\,z_{k-1},\ \beta_kI),\qquad
              q(z_k\mid x)=\mathcal N(a_kx,\ b_k^2I),

    with :math:`a_k=a(t_k)`, :math:`b_k=b(t_k)`, :math:`\sqrt{\alpha_k}=a_k/a_{k-1}` and
    :math:`\beta_k=b_k^2-\alpha_kb_{k-1}^2`. On a variance-preserving path :math:`\alpha_k=1-\beta_k` and
    :math:`a_k^2=\bar\alpha_k=\prod_{j\le k}\alpha_j`. An index is an int, or ``(B,)`` integers, one per example.

    Args:
        path: a Gaussian path. steps: T.
        start: the time of :math:`z_T`; 0, or a little later where a(0) = 0 and a prediction of the noise says nothing.

    Attributes:
        a, b, time: ``(T + 1,)``, float64, by index; ``time`` falls from 1 to ``start``.
        alpha, beta: the same, ``[0]`` unused.
        last: the index of the cleanest state that still is noisy: 1 where b(1) = 0, else 0.

    Raises:
        DataError: fewer than 1 step, or a start outside [0, 1).

    Source: Ho, Jain and Abbeel (2020), section 2.
    """

    @torch.no_grad()
    def __init__(self, path: Path, steps: int, start: float = 0.0) -> None:
        if steps < 1 or not 0 <= start < 1:
            raise DataError(f"A chain needs steps >= 1 and 0 <= start < 1, got steps={steps}, start={start}.")
        self.steps = steps
        self.time = 1 - (1 - start) * torch.arange(steps + 1, dtype=torch.float64) / steps
        self.time[-1] = start
        self.a, self.b = path.a(self.time), path.b(self.time)
        before = torch.arange(steps + 1).sub(1).clamp(min=0)
        self.alpha = (self.a / self.a[before]) ** 2
        self.beta = self.b**2 - self.alpha * self.b[before] ** 2
        self.last = 1 if float(self.b[0]) < 1e-9 else 0
        self._copies: dict[torch.device, Chain] = {self.a.device: self}

    def on(self, device: torch.device) -> Chain:
        """The chain with its coefficients on a device, where indices then live too; copied there once."""
        if device not in self._copies:
            twin = copy.copy(self)
            for name in ("time", "a", "b", "alpha", "beta"):
                setattr(twin, name, getattr(self, name).to(device))
            self._copies[device] = twin
        return self._copies[device]

    def sample(self, x: Tensor, noise: Tensor, k: Index) -> Tensor:
        r"""The state :math:`z_k=a_kx+b_k\epsilon` in one go, ``(B, ...)``."""
        return expand(self.a[k], x) * x + expand(self.b[k], x) * noise

    def posterior(self, x: Tensor, z: Tensor, k: Index) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of :math:`q(z_{k-1}\mid z_k,x)`, one step undone, data known (thm-forward-posterior).

        .. math:: \tilde\mu_k=\frac{\sqrt{\alpha_k}\,b_{k-1}^2}{b_k^2}\,z+\frac{a_{k-1}\beta_k}{b_k^2}\,x,\qquad
                  \tilde\beta_k=\frac{b_{k-1}^2}{b_k^2}\,\beta_k

        Args:
            x: the data, or a prediction of it, ``(B, ...)``. z: the state at index k.

        Returns:
            the mean, ``(B, ...)``, and the variance, ``(B, 1, ...)`` or ``(1, ...)``.
        """
        share = (self.b[k - 1] / self.b[k]) ** 2
        on_z, on_x = share * self.alpha[k].sqrt(), self.a[k - 1] * self.beta[k] / self.b[k] ** 2
        return expand(on_z, x) * z + expand(on_x, x) * x, expand(share * self.beta[k], x)

    def variance(self, k: Index, kind: str = "posterior") -> Tensor:
        r"""A fixed variance of the reverse step, of the shape of k, float64.

        ``"posterior"`` is :math:`\tilde\beta_k`, right for data of one point; ``"forward"`` is :math:`\beta_k`, right
        for standard normal data. Where :math:`\tilde\beta_1=0`, its place takes :math:`\tilde\beta_2`, as in the code
        of both sources.

        Raises:
            DataError: unknown kind. Sources: Ho et al. (2020), section 3.2; Nichol and Dhariwal (2021).
        """
        if kind not in FIXED:
            raise DataError(unknown("variance", kind, FIXED))
        if kind == "forward" or self.steps == 1:
            return self.beta[k]
        index = torch.as_tensor(k).clamp(min=self.last + 1)
        return (self.b[index - 1] / self.b[index]) ** 2 * self.beta[index]


class ChainBound(NamedTuple):
    """Minus the variational bound, in three terms, each ``(B,)`` in nats: to be lowered."""

    prior: Tensor
    transitions: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the three: an upper bound on minus the log-likelihood, or its unbiased estimate."""
        return self.prior + self.transitions + self.reconstruction


def chain_bound(
    model: FieldModel,
    x: Tensor,
    *,
    steps: int = 1000,
    variance: str = "posterior",
    decoder: str = "discretized",
    levels: int | Tensor = 256,
    draws: int | None = None,
    condition: Any = None,
    generator: torch.Generator | None = None,
) -> ChainBound:
    r"""The variational bound of the T-step chain that a model defines, in three terms (eq-ddpm-bound).

    .. math:: -\log p(x)\le
              \underbrace{D_{\rm KL}\big(q(z_T\mid x)\Vert p(z_T)\big)}_{\text{prior}}
              +\sum_{k=2}^T\underbrace{\mathbb E\,D_{\rm KL}\big(q(z_{k-1}\mid z_k,x)\Vert p(z_{k-1}\mid z_k)\big)}
              _{\text{transitions}}
              +\underbrace{\mathbb E[-\log p(x\mid z_1)]}_{\text{reconstruction}}

    with :math:`p(z_T)=\mathcal N(0,b(0)^2I)`, from which samplers start, and
    :math:`p(z_{k-1}\mid z_k)=\mathcal N(\tilde\mu_k(d_\theta(z_k),z_k),\,\sigma_k^2I)`, where :math:`d_\theta` is the
    predicted data. Expectations are over :math:`z_k`, one draw each. Where the path stops short of the data,
    b(1) > 0, the sum starts at k = 1 and the reconstruction is from :math:`z_0`.

    Args:
        x: ``(B, *shape)``, in the units of the data.
        steps: T; the chain may be coarser than that of the training.
        variance: ``"posterior"`` or ``"forward"`` (see ``Chain.variance``), or ``"learned"`` for a ``HybridDDPM``.
        decoder: ``"discretized"``, the mass that :math:`\mathcal N(d_\theta(z_1),\sigma_1^2)` gives to the bin of a
            level (b(1) > 0: :math:`\mathcal N(z_0/a_0,b_0^2/a_0^2)`); ``"normalized"``,
            :math:`p(x_i\mid z_i)\propto q(z_i\mid x_i)` over the levels, without the network; ``"gaussian"``, the
            density of the first, for data without levels.
        levels: their number, spread evenly over [0, 1], or their values ``(K,)``, increasing. Bins end half-way.
        draws: None for every transition; or so many indices per example, evenly spread with a random offset.
        condition: None, one label, or ``(B,)`` labels.

    Returns:
        three terms ``(B,)`` in nats, unbiased. Of a probability with levels, of a density with ``"gaussian"``.

    Raises:
        DataError: unknown names, examples or levels that do not fit, ``draws`` below 1.

    Sources: Ho et al. (2020), equations 5 and 13; Kingma et al. (2021), equation 12 and section 3.3.
    """
    if decoder not in DECODERS:
        raise DataError(unknown("decoder", decoder, DECODERS))
    if tuple(x.shape[1:]) != model.shape or not x.is_floating_point():
        raise DataError(f"Expected floating-point examples (B, {', '.join(map(str, model.shape))}), got {x.shape}.")
    if draws is not None and draws < 1:
        raise DataError(f"draws must be at least 1, or None for every transition, got {draws}.")
    chain = Chain(model.path, steps, model.span[0])
    y = (x - model.centre) / model.scale
    reverse = _reverse(model, chain, variance, condition)

    def noised(k: Tensor) -> Tensor:
        return chain.sample(y, torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator), k)

    top = expand(chain.b[steps], y) * torch.ones_like(y)
    prior = gaussian_kl((expand(chain.a[steps], y) * y).flatten(1), top.flatten(1), 0.0, model.path.prior_std)
    transitions, terms = torch.zeros_like(prior), steps - chain.last
    for k in _indices(chain, len(x), draws, generator):
        z = noised(k)
        transitions = transitions + _transition(chain, y, z, k, reverse(z, k)) * terms / (draws or terms)
    first = torch.full((len(x),), chain.last)
    z = noised(first)
    values = None if decoder == "gaussian" else (_levels(levels, y) - model.centre) / model.scale
    if decoder == "normalized":
        assert values is not None
        a, b = expand(chain.a[first], y), expand(chain.b[first], y)
        return ChainBound(prior, transitions, -_normalized(y, z, a, b, values))
    if chain.last == 1:
        mean, var = reverse(z, first)
    else:
        a, b = expand(chain.a[first], y), expand(chain.b[first], y)
        mean, var = z / a, (b / a) ** 2
    log_p = _decode(y, mean, var, values)
    if values is None:
        log_p = log_p - y[0].numel() * math.log(model.scale)
    return ChainBound(prior, transitions, -log_p)


def _reverse(model: FieldModel, chain: Chain, variance: str, condition: Any) -> Reverse:
    """Mean and variance of p(z_{k-1} | z_k)."""
    if variance == "learned":
        if not isinstance(model, HybridDDPM):
            raise DataError("variance='learned' needs a HybridDDPM: use 'posterior' or 'forward'.")
        return lambda z, k: model.reverse(z, k, chain, condition=condition)
    chain.variance(1, variance)  # refuses an unknown name

    def fixed(z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        data = model.predict(z, chain.time[k].to(z), "data", condition=condition)
        return chain.posterior(data, z, k)[0], expand(chain.variance(k, variance), z)

    return fixed


def _indices(chain: Chain, n: int, draws: int | None, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The indices of the transitions, ``(n,)`` each: all of them, or evenly spread ones."""
    low, terms = chain.last + 1, chain.steps - chain.last
    if draws is None:
        yield from (torch.full((n,), k) for k in range(low, chain.steps + 1))
    elif terms:
        offset = torch.rand(n, generator=generator)
        for i in range(draws):
            yield low + ((offset + i) / draws * terms).long().clamp(max=terms - 1)


def _transition(chain: Chain, y: Tensor, z: Tensor, k: Tensor, reverse: tuple[Tensor, Tensor]) -> Tensor:
    """The divergence of one transition of the model from that which knows the data, ``(B,)``."""
    (mean, var), (q_mean, q_var) = reverse, chain.posterior(y, z, k)
    q_std, std = (v.sqrt().expand_as(y).flatten(1) for v in (q_var, var))
    return gaussian_kl(q_mean.flatten(1), q_std, mean.flatten(1), std)


def _levels(levels: int | Tensor, y: Tensor) -> Tensor:
    if isinstance(levels, int):
        levels = torch.linspace(0, 1, max(levels, 0), dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or bool((levels.diff() <= 0).any()):
        raise DataError("levels must be at least 2 increasing values.")
    return levels.to(y)


def _decode(y: Tensor, mean: Tensor, var: Tensor, values: Tensor | None) -> Tensor:
    """log p(x | z) of a Gaussian: its density, or its mass between the middles of neighbouring levels, ``(B,)``."""
    if values is None:
        return gaussian_log_prob(y, mean, var.sqrt()).flatten(1).sum(1)
    # In float64: far from the mean a bin is the small difference of two tiny tails.
    values, x, mean, std = values.double(), y.double(), mean.double(), var.double().sqrt()
    middles = (values[1:] + values[:-1]) / 2
    level = torch.bucketize(x, middles)
    lowest, highest = level == 0, level == len(middles)
    low = (middles[(level - 1).clamp(min=0)] - mean) / std
    high = (middles[level.clamp(max=len(middles) - 1)] - mean) / std
    flip = highest | (~lowest & (low + high > 0))  # in the upper tail the mirror image, which keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    # The two outer bins reach to infinity: nothing is subtracted.
    outer = lowest | highest
    gap = torch.special.log_ndtr(torch.where(outer, high - 1, low)) - torch.special.log_ndtr(high)
    rest = torch.log(-torch.expm1(torch.where(outer, -1.0, gap)))
    log_mass = torch.special.log_ndtr(high) + torch.where(outer, 0.0, rest)
    return log_mass.flatten(1).sum(1).to(y)


def _normalized(y: Tensor, z: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
    """log of q(z | x) normalized over the levels, at the level of the data, ``(B,)``."""
    logits = -0.5 * ((z.unsqueeze(-1) - a.unsqueeze(-1) * values) / b.unsqueeze(-1)) ** 2
    level = torch.bucketize(y, (values[1:] + values[:-1]) / 2)
    return logits.log_softmax(-1).gather(-1, level.unsqueeze(-1)).flatten(1).sum(1)


class _Half(nn.Module):
    """The first half of what a network for twice the channels says about a point: the noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def both(self, z: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        noise, raw = self.network(torch.cat([z, z], 1), t, condition).chunk(2, 1)
        return noise, raw

    def forward(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.both(z, t, condition)[0]


class HybridDDPM(FieldModel):
    r"""DDPM with learned variances: noise and variance from one network, trained by the hybrid loss (eq-hybrid).

    .. math:: \Sigma_\theta(z_k,k)=\exp\big(v\log\beta_k+(1-v)\log\tilde\beta_k\big),\qquad
              L=\mathbb E\lVert\epsilon-\epsilon_\theta(z_k,k)\rVert^2+\lambda L_{\rm vlb},

    with k uniform on 1..T, and :math:`L_{\rm vlb}` the transitions and the reconstruction of ``chain_bound`` in nats,
    estimated by T times its k-th term. In it the mean is taken as it is (no gradient), so that the second term trains
    :math:`v` alone; v is one number per entry, not confined to [0, 1].

    It is a ``FieldModel`` that predicts noise: every sampler and density of that class works, with the noise alone.

    Args:
        network: ``net(x, t, condition)`` for data with **twice the channels** (``UNet(2 * C)``, ``TimeMLP(2 * D)``):
            it is given z twice, and what it returns is the noise and 2v - 1.
        path: one that reaches the data, b(1) = 0. shape: of one example. steps: T of the training.
        vlb: :math:`\lambda`.
        levels: of the decoder, as in ``chain_bound``; None for a density.
        options: ``classes``, ``drop``, ``span``, ``centre``, ``scale`` of ``FieldModel``.

    Raises:
        DataError: fewer than 2 steps, a path with b(1) > 0, or as ``FieldModel``.

    Source: Nichol and Dhariwal (2021), section 3.1.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path | str = "vp-cosine",
        *,
        shape: Sequence[int],
        steps: int = 1000,
        vlb: float = 1e-3,
        levels: int | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(_Half(network), path, shape=shape, predict="noise", **options)
        if steps < 2 or Chain(self.path, 1).last == 0:
            raise DataError(f"HybridDDPM needs steps >= 2 and a path with b(1) = 0, got {steps}, {self.path.name!r}.")
        self.chain, self.vlb = Chain(self.path, steps, self.span[0]), vlb
        values = None if levels is None else (_levels(levels, torch.zeros(())) - self.centre) / self.scale
        self.register_buffer("values", values, persistent=False)
        self.values: Tensor | None

    def reverse(self, z: Tensor, k: Tensor, chain: Chain, *, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the reverse step from index k of a chain, ``(B, *shape)`` each.

        Args:
            z: the state, in the network's units. k: ``(B,)``. chain: that of the training, or a coarser one.
        """
        noise, v = self._both(z, k, chain, self._condition(condition, len(z), z.device))
        return self._step(noise, v, z, k, chain)

    def _both(self, z: Tensor, k: Tensor, chain: Chain, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The predicted noise, and v."""
        assert isinstance(self.network, _Half)
        noise, raw = self.network.both(z, chain.time[k].to(z), labels)
        return noise, (raw + 1) / 2

    def _step(self, noise: Tensor, v: Tensor, z: Tensor, k: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
        data = (z - expand(chain.b[k], z) * noise) / expand(chain.a[k], z)
        high, low = (expand(chain.variance(k, kind).log(), z) for kind in ("forward", "posterior"))
        return chain.posterior(data, z, k)[0], (v * high + (1 - v) * low).exp()

    def forward(self, batch: Any, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        """The hybrid loss of a batch, as that of ``FieldModel``: summed over dimensions, averaged over the batch."""
        _, y, labels = self._unpack(batch)
        labels = self._dropped(labels, generator)
        chain = self.chain.on(y.device)
        k = torch.randint(1, chain.steps + 1, (len(y),), device=y.device, generator=generator)
        noise = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        z = chain.sample(y, noise, k)
        predicted, v = self._both(z, k, chain, labels)
        error = (predicted - noise).flatten(1).square()
        mean, var = self._step(predicted.detach(), v, z, k, chain)
        first = (k == 1).view(-1, *[1] * (y.dim() - 1))  # the others decode themselves, with finite derivatives
        values = None if self.values is None else self.values.to(y)
        last = -_decode(y, torch.where(first, mean, y), torch.where(first, var, 1.0), values)
        terms = torch.where(k == 1, last, _transition(chain, y, z, k.clamp(min=2), (mean, var)))
        vlb = chain.steps * terms.mean()
        return LossOut(error.sum(1).mean() + self.vlb * vlb, {"mse": error.mean().detach(), "vlb": vlb.detach()})

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        condition: Any = None,
        generator: torch.Generator | None = None,
        steps: int = 50,
        method: str = "learned",
        **options: Any,
    ) -> Tensor:
        """``n`` samples ``(n, *shape)``: by ancestral sampling with the learned variance over ``steps`` steps.

        No noise is added at the last step. Any other ``method``, and its options, is that of ``FieldModel.sample``.

        Raises:
            DataError: ``n`` below 1, or as ``FieldModel.sample``.
        """
        if method != "learned":
            return super().sample(n, condition=condition, generator=generator, steps=steps, method=method, **options)
        if n < 1 or options:
            raise DataError(f"sample needs n >= 1 and, with method='learned', no options; got n={n}, {options}.")
        chain, like = Chain(self.path, steps, self.span[0]), next(self.parameters())
        draws = randn_rows(n, (steps, *self.shape), like, generator)
        z = self.path.prior_std * draws[:, 0]
        for k in range(steps, 0, -1):
            mean, var = self.reverse(z, torch.full((n,), k), chain, condition=condition)
            z = mean + var.sqrt() * draws[:, steps - k + 1] if k > 1 else mean
        return self._outward(z)

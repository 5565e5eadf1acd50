r"""One model for diffusion, score matching and flow matching.

A network predicts something about a point :math:`x_t` of a Gaussian path, is trained by regression, and is turned
into samples by an ODE or an SDE. DDPM, VDM, NCSN, the score SDEs, EDM, flow matching, rectified flow and stochastic
interpolants are choices of the arguments of ``FieldModel``: network, path, predicted quantity, times, weight, coupling
and sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nblib import dynamics, paths
from nblib.errors import DataError, unknown
from nblib.nets import randn_rows
from nblib.paths import PREDICTIONS, Path
from nblib.probability import gaussian_kl, gaussian_log_prob
from nblib.train.protocol import LossOut

__all__ = [
    "COUPLINGS",
    "METHODS",
    "OBJECTIVES",
    "TIMES",
    "FieldModel",
    "Times",
    "error_unit",
    "fixed_time",
    "half_log_snr_rate",
    "log_normal_sigma",
    "logit_normal",
    "optimal_transport",
    "pack",
    "time_grid",
    "uniform",
]

COUPLINGS = ("independent", "ot", "pairs")
OBJECTIVES = ("regression", "quadratic")
ODE = dynamics.METHODS
DATA = ("ddim", "ancestral", "multistep", "edm")
SCORE = ("sde", "predictor-corrector", "langevin")
METHODS = (*ODE, *DATA, *SCORE)
RANDOM = ("ddim", "ancestral", "edm", *SCORE)
RATIOS = ("edm", "log-snr")  # grids that are infinite where a or b is zero
MARGIN = 1e-3
Span = tuple[float, float]
Field = Callable[[Tensor, float], Tensor]
Classifier = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


# --- the times of training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """A distribution of training times, by what turns uniform numbers into times.

    Attributes:
        quantile: ``(u, path, span) -> t``, ``(B,) -> (B,)``, increasing in ``u``.
        density: ``(t, path, span) -> (B,)``, or None for a distribution that has none (a grid).
        stratified: take u from a grid with one random offset instead of independent draws.
    """

    name: str
    quantile: Callable[[Tensor, Path, Span], Tensor]
    density: Callable[[Tensor, Path, Span], Tensor] | None = None
    stratified: bool = False

    def draw(
        self, n: int, path: Path, span: Span = (0.0, 1.0), *, like: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""``n`` times, ``(n,)``, in dtype and on the device of ``like``.

        Stratified: :math:`u_i=(u+i/n)\bmod 1` with one uniform u. Every :math:`u_i` is uniform, and the variance of a
        mean over a smooth function falls as :math:`1/n^2` instead of :math:`1/n`. Source: Kingma et al. (2021), I.1.
        """
        u = torch.rand(1 if self.stratified else n, dtype=like.dtype, device=like.device, generator=generator)
        if self.stratified:
            u = (u + torch.arange(n, dtype=like.dtype, device=like.device) / n) % 1
        return self.quantile(u, path, span)


def uniform(*, stratified: bool = False) -> Times:
    """Uniform over the span."""
    return Times(
        "low-discrepancy" if stratified else "uniform",
        lambda u, _, span: span[0] + (span[1] - span[0]) * u,
        lambda t, _, span: torch.full_like(t, 1 / (span[1] - span[0])),
        stratified,
    )


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    r"""Times whose logit, relative to the span, is :math:`\mathcal N(m, s^2)`: most at the middle of the path.

    Source: Esser et al. (2024), section 3.1. Times run from noise to data, so ``mean > 0`` favours little noise.
    """

    def quantile(u: Tensor, _: Path, span: Span) -> Tensor:
        return span[0] + (span[1] - span[0]) * (mean + std * _normal_quantile(u)).sigmoid()

    def density(t: Tensor, _: Path, span: Span) -> Tensor:
        r = (t - span[0]) / (span[1] - span[0])
        return gaussian_log_prob(r.logit(), torch.full_like(t, mean), std).exp() / (r * (1 - r) * (span[1] - span[0]))

    return Times("logit-normal", quantile, density)


def log_normal_sigma(mean: float = -1.2, std: float = 1.2) -> Times:
    r"""Times whose noise-to-signal ratio :math:`\sigma=b/a` has :math:`\log\sigma\sim\mathcal N(m, s^2)`.

    What falls outside the span is moved to its end. Source: Karras et al. (2022), table 1.
    """

    def quantile(u: Tensor, path: Path, span: Span) -> Tensor:
        value = -2 * (mean + std * _normal_quantile(1 - u)).double()
        low, high = (path.log_snr(torch.full_like(value, s)) for s in span)
        return path.time_of_log_snr(torch.minimum(torch.maximum(value, low), high)).to(u).clamp(*span)

    def density(t: Tensor, path: Path, _: Span) -> Tensor:
        log_sigma = -0.5 * path.log_snr(t)
        return gaussian_log_prob(log_sigma, torch.full_like(t, mean), std).exp() * half_log_snr_rate(path, t)

    return Times("edm", quantile, density)


def time_grid(n: int, *, last: float) -> Times:
    """Each of ``n`` equally spaced times from 0 to ``last`` with equal probability."""
    if n < 2 or not 0 < last <= 1:
        raise DataError(f"A grid of times needs n >= 2 and 0 < last <= 1, got n={n}, last={last}.")
    return Times("grid", lambda u, *_: (u * n).floor().clamp(max=n - 1) * (last / (n - 1)))


def fixed_time(t: float) -> Times:
    """Always the time ``t``."""
    return Times("fixed", lambda u, *_: torch.full_like(u, t))


def _normal_quantile(u: Tensor) -> Tensor:
    tiny = torch.finfo(u.dtype).eps / 2
    return torch.special.ndtri(u.clamp(tiny, 1 - tiny))


TIMES = {t.name: t for t in (uniform(), uniform(stratified=True), logit_normal(), log_normal_sigma())}


# --- weights -------------------------------------------------------------------------------------------------


def half_log_snr_rate(path: Path, t: Tensor) -> Tensor:
    r"""Half the derivative of the log signal-to-noise ratio, ``(B,) -> (B,)``.

    .. math:: \tfrac12\lambda'(t)=\frac{\dot a}{a}-\frac{\dot b}{b}=\frac{\dot a b-a\dot b}{ab},\qquad
              \lambda=\log\frac{a^2}{b^2}
    """
    a, b, da, db = path.coefficients(t, t)
    return (da * b - a * db) / (a * b)


def error_unit(path: Path, t: Tensor, kind: str) -> Tensor:
    r"""How large one and the same error is in each prediction, up to a factor common to all: ``(B,) -> (B,)``.

    Predictions of :math:`x_t=ax_1+bx_0` determine each other, so their errors are proportional, up to sign:

    .. math:: \lVert e_{\rm data}\rVert:\lVert e_{\rm noise}\rVert:\lVert e_{\rm score}\rVert:\lVert e_{\rm velocity}\rVert
              = b : a : \tfrac ab : \dot ab-a\dot b
    """  # noqa: E501
    a, b, da, db = path.coefficients(t, t)
    return {"data": b, "noise": a, "score": a / b, "velocity": da * b - a * db}[kind]


# --- couplings -----------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
def optimal_transport(x0: Tensor, x1: Tensor, condition: Tensor | None = None) -> Tensor:
    r"""The order of ``x0`` that lies nearest to ``x1``.

    .. math:: \arg\min_\pi\sum_i\lVert x_1^i-x_0^{\pi(i)}\rVert^2

    Every target stays, in its place; only the noises change places. With labels, within each class only: otherwise the
    noise would know the class, and a sampler that draws it independently would start from another distribution.
    Computed on the CPU: on a GPU this waits for the batch.

    Args:
        x0, x1: ``(B, ...)``. condition: ``(B,)`` labels or None.

    Returns:
        ``x0`` in its new order. Sources: Pooladian et al. (2023), Tong et al. (2024).
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    if condition is not None:
        cost = cost.masked_fill(condition.unsqueeze(1) != condition, math.inf)
    order = linear_sum_assignment(cost.detach().cpu().numpy())[1]
    return x0[torch.from_numpy(order).to(x0.device)]


def pack(x: Tensor, labels: Tensor) -> Tensor:
    """Examples and their labels as one tensor, which ``fit`` can shuffle: ``(N, ...), (N,) -> (N, D + 1)``.

    The label is the last column. A ``FieldModel`` with classes takes it apart again.

    Raises:
        DataError: integer examples, or another number of labels.
    """
    if not x.is_floating_point() or labels.shape != x.shape[:1]:
        raise DataError(
            "pack needs floating-point examples (N, ...) and one label for each, got"
            f" {x.dtype} {tuple(x.shape)} and {tuple(labels.shape)}: divide uint8 images by 255."
        )
    return torch.cat([x.flatten(1), labels.to(x.dtype).unsqueeze(1)], 1)


# --- the model -------------------------------------------------------------------------------------------------


class FieldModel(nn.Module):
    r"""A network trained by regression along a Gaussian path :math:`x_t=a(t)x_1+b(t)x_0`, and what it generates.

    The training loss is summed over dimensions and averaged over the batch,

    .. math:: \mathbb E_{t,x_0,x_1}\big[w(t)\,\lVert f_\theta(x_t,t)-y\rVert^2\big],\qquad
              y=x_1,\ x_0,\ -x_0/b\ \text{or}\ \dot ax_1+\dot bx_0,

    with t = 0 noise and t = 1 data. Its minimizer is the conditional mean :math:`\mathbb E[y\mid x_t]` for every w > 0.

    Args:
        network: ``net(x, t, condition) ->`` the shape of x; t is ``(B,)`` in [0, 1].
        path: a ``paths.Path`` or a name of ``paths.PATHS``; its schedule, where it has one, is trained too.
        shape: of one example.
        predict: ``"data"``, ``"noise"``, ``"score"`` or ``"velocity"``: what y is.
        times: how t is drawn: ``"uniform"``, ``"low-discrepancy"``, ``"logit-normal"``, ``"edm"``, or a ``Times``.
        weight: ``"simple"`` (w = 1); the name of a prediction (w = 1 for *its* error, whatever is predicted);
            ``"likelihood"``; or a function ``t -> w``, ``(B,) -> (B,)``.
        coupling: ``"independent"``; ``"ot"``, optimal transport within the batch; ``"pairs"``: a batch brings its
            own :math:`(x_0, x_1)`.
        classes: number of classes, or None. drop: how often a label is replaced by -1, "no condition", in training.
        span: the times of training. By default [0, 1] without 0.001 at singular ends: where a rate of the path is
            infinite and, unless the velocity is predicted with a weight of its own, where a or b is zero. Samplers and
            densities leave out the same 0.001 where they need it.
        objective: ``"regression"``, or ``"quadratic"`` for :math:`w(\lVert f\rVert^2-2f^\top y)`, which has the same
            gradient and the minimum :math:`-\mathbb E[w\lVert\mathbb E[y\mid x_t]\rVert^2]`.
        centre, scale: the network sees ``(x - centre) / scale``; 0.5 and 0.5 for images in [0, 1].

    With ``weight="likelihood"`` the loss is the integral of the variational bound in continuous time, in nats:

    .. math:: \tfrac12\int\lambda'(t)\,\mathbb E\lVert\hat x_0(x_t,t)-x_0\rVert^2\,dt
              = \tfrac12\int g(t)^2\,\mathbb E\lVert s_\theta(x_t,t)+x_0/b\rVert^2\,dt,\qquad
              \lambda=\log\tfrac{a^2}{b^2},\quad g^2=b^2\lambda',

    estimated with one time per example, divided by the density of the times. For a learned schedule the loss is minus
    the whole bound (see ``bound``): the ends of the path are then trained too.

    Sources: Ho et al. (2020), Song et al. (2021), Kingma et al. (2021), Lipman et al. (2023).

    Raises:
        DataError: unknown names; a weight or coupling that does not fit the other arguments.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path | str = "linear",
        *,
        shape: Sequence[int],
        predict: str = "noise",
        times: str | Times = "uniform",
        weight: str | Callable[[Tensor], Tensor] = "simple",
        coupling: str = "independent",
        classes: int | None = None,
        drop: float = 0.1,
        span: Span | None = None,
        objective: str = "regression",
        centre: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        named: tuple[tuple[str, object, tuple[str, ...]], ...] = (
            ("prediction", predict, PREDICTIONS),
            ("times", times, tuple(TIMES)),
            ("weight", weight, ("simple", "likelihood", *PREDICTIONS)),
            ("coupling", coupling, COUPLINGS),
            ("objective", objective, OBJECTIVES),
        )
        for kind, value, known in named:
            if isinstance(value, str) and value not in known:
                raise DataError(unknown(kind, value, known))
        self.network = network
        self.path = paths.make(path) if isinstance(path, str) else path
        self.schedule = self.path.schedule  # a module's parameters are found where it is an attribute
        self.shape, self.target = tuple(shape), predict
        self.times = TIMES[times] if isinstance(times, str) else times
        self._weight, self.coupling, self.objective = weight, coupling, objective
        self.classes, self.drop = classes, drop
        self.centre, self.scale = centre, scale
        if (
            not self.shape
            or min(self.shape) < 1
            or not scale > 0
            or not 0 <= drop <= 1
            or (classes is not None and classes < 1)
        ):
            raise DataError(
                "FieldModel needs a shape of positive numbers, scale > 0, 0 <= drop <= 1 and classes >= 1 or None,"
                f" got shape={self.shape}, scale={scale}, drop={drop}, classes={classes}."
            )
        if weight == "likelihood" and self.times.density is None:
            raise DataError(
                f"weight='likelihood' needs times with a density, got {self.times.name!r}: use times='low-discrepancy'."
            )
        if weight == "likelihood" and coupling != "independent":
            raise DataError(f"The bound holds for coupling='independent', got {coupling!r} with weight='likelihood'.")
        # Where a = 0 a point says nothing about the data, where b = 0 nothing about the noise.
        with torch.no_grad():
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
            a, b, da, db = self.path.coefficients(ends, ends)
            infinite = [bool(v) for v in ~(da.isfinite() & db.isfinite())]
        self._infinite = infinite[0], infinite[1]
        self._singular = infinite[0] or float(a[0]) < 1e-6, infinite[1] or float(b[1]) < 1e-6
        own, self.span = ("simple", "velocity"), (0.0, 1.0)
        self.span = span or self._inside(
            self._infinite if predict == "velocity" and (callable(weight) or weight in own) else self._singular
        )
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise DataError(f"span must be two increasing times in [0, 1], got {self.span}.")

    def _inside(self, avoid: tuple[bool, bool]) -> Span:
        """[0, 1] without the ends to avoid; the span's own ends where it leaves them out already."""
        start, end = self.span
        return (start or MARGIN) if avoid[0] else 0.0, (end if end < 1 else 1 - MARGIN) if avoid[1] else 1.0

    # --- the loss --------------------------------------------------------------------------------------

    def forward(self, batch: Any, *, phase: str = "main", generator: torch.Generator | None = None) -> LossOut:
        """The training loss of a batch.

        Args:
            batch: examples ``(B, *shape)``; with classes ``(x, labels)`` or ``pack(x, labels)``; for
                ``coupling="pairs"`` ``(x0, x1)``, with classes ``(x0, x1, labels)``, or ``(B, 2, *shape)``.
        """
        source, x1, condition = self._unpack(batch)
        x0 = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=generator) if source is None else source
        if self.coupling == "ot":
            x0 = optimal_transport(x0, x1, condition)
        condition = self._dropped(condition, generator)
        t = self.times.draw(len(x1), self.path, self.span, like=x1, generator=generator)
        value, target = self._regress(x1, x0, t, condition)
        error = (value - target).square().flatten(1).sum(1)
        # The second form never squares the target, whose square may have no mean.
        terms = error if self.objective == "regression" else (value.square() - 2 * value * target).flatten(1).sum(1)
        loss = (terms if self._weight in ("simple", self.target) else self.weight(t) * terms).mean()
        if self.schedule is not None and self._weight == "likelihood":
            loss = loss + self._ends(x1, self.span).mean()
        return LossOut(loss, {"mse": error.detach().mean() / x1[0].numel()})

    def _dropped(self, labels: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
        """In training, some labels replaced by -1, "no condition"."""
        if labels is None or not self.training or not self.drop:
            return labels
        dropped = torch.rand(len(labels), device=labels.device, generator=generator) < self.drop
        return labels.masked_fill(dropped, -1)

    def _regress(self, x1: Tensor, x0: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's output at a point of the path, and what it should be."""
        path = self.path
        if self.target == "velocity":
            x, target = path.pair(x1, x0, t)
            return self.network(x, t, condition), target
        x = path.sample(x1, x0, t)
        if self.target == "score":
            return self.network(x, t, condition), -x0 / path.coefficients(t, x1)[1]
        return self.network(x, t, condition), x1 if self.target == "data" else x0

    def weight(self, t: Tensor) -> Tensor:
        """w(t), ``(B,) -> (B,)``, for the predicted quantity."""
        if not isinstance(self._weight, str):
            return self._weight(t)
        if self._weight == "likelihood":
            assert self.times.density is not None
            return self._likelihood_weight(t) / self.times.density(t, self.path, self.span)
        if self._weight in ("simple", self.target):
            return torch.ones_like(t)
        return (error_unit(self.path, t, self._weight) / error_unit(self.path, t, self.target)).square()

    def _likelihood_weight(self, t: Tensor) -> Tensor:
        """Half the rate of the log-SNR, for the error of the noise, in the unit of what is predicted."""
        ratio = error_unit(self.path, t, "noise") / error_unit(self.path, t, self.target)
        return half_log_snr_rate(self.path, t) * ratio.square()

    def _ends(self, x1: Tensor, span: Span) -> Tensor:
        """The two terms of the bound at the ends of the span, per example, nats: prior and reconstruction."""
        start, end = (x1.new_full((), s) for s in span)
        a, b, *_ = self.path.coefficients(start, x1)
        prior_std = self.path.b(torch.zeros_like(start))
        prior = gaussian_kl((a * x1).flatten(1), (b * torch.ones_like(x1)).flatten(1), 0.0, prior_std)
        return prior + 0.5 * x1[0].numel() * (1 + math.log(2 * math.pi) - self.path.log_snr(end))

    def bound(
        self, x: Tensor, k: int = 1, *, condition: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""An unbiased estimate of the variational bound on the log-density, in continuous time.

        .. math:: \log p(x)\ge-D_{\rm KL}\big(\mathcal N(a_sx,b_s^2I)\,\Vert\,\mathcal N(0,b_0^2I)\big)
                  -\tfrac12\int_s^e\lambda'(t)\,\mathbb E\lVert\hat x_0-x_0\rVert^2dt
                  -\tfrac D2\log\frac{2\pi e\,b_e^2}{a_e^2}

        over the span (s, e); the last term is the reconstruction under :math:`\mathcal N(x;\,x_e/a_e,\,(b_e/a_e)^2I)`.

        Args:
            x: ``(B, *shape)``. k: times and noises per example, spread evenly over the span.

        Returns:
            ``(B,)``, nats. Source: Kingma et al. (2021).

        Raises:
            DataError: unusable examples or conditions; ``k`` below 1; a coupling that is not independent.
        """
        if k < 1:
            raise DataError(f"k must be at least 1, got {k}.")
        if self.coupling != "independent":
            raise DataError(f"The bound holds for coupling='independent', got {self.coupling!r}.")
        self._check_examples(x)
        labels, x1 = self._condition(condition, len(x), x.device), self._inward(x)
        span = self._inside(self._singular)
        total = torch.zeros_like(x1.flatten(1)[:, 0])
        offset = torch.rand(len(x), dtype=x1.dtype, device=x1.device, generator=generator)
        for i in range(k):
            t = span[0] + (span[1] - span[0]) * (offset + i) / k
            x0 = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=generator)
            value, target = self._regress(x1, x0, t, labels)
            total = total + self._likelihood_weight(t) * (value - target).square().flatten(1).sum(1)
        return -total * (span[1] - span[0]) / k - self._ends(x1, span) - math.log(self.scale) * x1[0].numel()

    # --- predictions -----------------------------------------------------------------------------------

    def predict(
        self,
        x: Tensor,
        t: Tensor | float,
        to: str | None = None,
        *,
        condition: Any = None,
        guidance: float = 1.0,
        classifier: Classifier | None = None,
    ) -> Tensor:
        r"""What the model says about a point of the path, as data, noise, score or velocity.

        Classifier-free guidance, with the convention in which **w = 1 is the plain conditional model** and w = 0 the
        unconditional one (Ho and Salimans, 2022, write 1 + w for this w):

        .. math:: f = f(x,t,\varnothing)+w\,\big(f(x,t,c)-f(x,t,\varnothing)\big)

        Classifier guidance (Dhariwal and Nichol, 2021) adds to the score of the unconditional model:

        .. math:: s = s(x,t)+w\,\nabla_x\log p_t(c\mid x)

        Args:
            x: ``(B, *shape)`` in the network's units. t: a number, or ``(B,)``.
            to: the prediction wanted; by default what the network predicts.
            condition: None, one label for all, or ``(B,)`` labels; -1 is "no condition".
            guidance: w. classifier: ``(x, t, condition) -> log p_t(c | x)``, ``(B,)``, differentiable in x.

        Raises:
            DataError: unknown prediction; a condition or guidance for a model without classes.
        """
        to = to or self.target
        if to not in PREDICTIONS:
            raise DataError(unknown("prediction", to, PREDICTIONS))
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(f"Expected points of shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}.")
        rows = t.to(x).expand(len(x)) if isinstance(t, Tensor) else torch.full_like(x.flatten(1)[:, 0], t)
        if classifier is None:
            value, source = self._guided(x, rows, condition, guidance), self.target
        else:
            labels = condition if condition is None else _labels(condition, len(x), x.device)
            plain = self._guided(x, rows, None, 1.0)
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                (pull,) = torch.autograd.grad(classifier(point, rows, labels).sum(), point)
            value = self._convert(plain, x, t, self.target, "score") + guidance * pull
            source = "score"
        return self._convert(value, x, t, source, to)

    def _convert(self, value: Tensor, x: Tensor, t: Tensor | float, source: str, target: str) -> Tensor:
        return value if source == target else self.path.convert(value, x, t, source=source, target=target)

    def _guided(self, x: Tensor, t: Tensor, condition: Any, guidance: float) -> Tensor:
        if guidance != 1 and (self.classes is None or condition is None):
            raise DataError(
                f"guidance={guidance} needs a model with classes and a condition: give condition=, or guidance=1."
            )
        labels = self._condition(condition, len(x), x.device)
        if guidance == 1:
            return self.network(x, t, labels)
        assert labels is not None
        both = torch.cat([torch.full_like(labels, -1), labels])
        free, bound = self.network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return free + guidance * (bound - free)

    def _condition(self, condition: Any, n: int, device: torch.device) -> Tensor | None:
        """Labels ``(n,)`` for the network: -1 where a model with classes is given none."""
        if self.classes is None:
            if condition is not None:
                raise DataError("This model has no classes: it takes condition=None. Build it with classes=.")
            return None
        labels = _labels(-1 if condition is None else condition, n, device)
        if not torch.compiler.is_compiling() and labels.device.type == "cpu":
            low, high = int(labels.min()), int(labels.max())
            if low < -1 or high >= self.classes:
                raise DataError(f"Labels must lie in -1..{self.classes - 1}, got {low}..{high}.")
        return labels

    # --- samples and densities -------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        condition: Any = None,
        generator: torch.Generator | None = None,
        steps: int = 50,
        method: str = "heun",
        grid: str = "uniform",
        guidance: float = 1.0,
        classifier: Classifier | None = None,
        **options: Any,
    ) -> Tensor:
        """``n`` samples from Gaussian noise, ``(n, *shape)``; with a generator, sample i does not depend on ``n``.

        Args:
            condition, guidance, classifier: as in ``predict``.
            steps: of the time grid ``grid``, see ``dynamics.times``.
            method: an ODE method (``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"``, ``"dopri5"``), a method for data
                predictions (``"ddim"``, ``"ancestral"``, ``"multistep"``, ``"edm"``), or one for scores (``"sde"``,
                ``"predictor-corrector"``, ``"langevin"``).
            options: for that function of ``dynamics``; for ``"langevin"`` also ``per_level``, its steps at each time.

        Raises:
            DataError: unknown method; a condition or guidance that the model does not have; ``n`` below 1.
        """
        if n < 1:
            raise DataError(f"sample needs n >= 1, got {n}.")
        like = next(self.parameters())
        if generator is not None and method in RANDOM:
            # Drawn first, so that the sampler's noise does not depend on how many starting points are drawn.
            seed = int(torch.randint(2**62, (), device=like.device, generator=generator))
            options["generator"] = torch.Generator(like.device).manual_seed(seed)
        x = self.path.prior_std * randn_rows(n, self.shape, like, generator)
        return self._outward(self._run(x, condition, steps, method, grid, guidance, classifier, options))

    @torch.no_grad()
    def transport(
        self,
        x: Tensor,
        *,
        condition: Any = None,
        steps: int = 50,
        method: str = "heun",
        grid: str = "uniform",
        guidance: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """Carry given sources ``(B, *shape)`` along the model's ODE to t = 1; arguments as in ``sample``.

        Raises:
            DataError: as ``sample``; a method that is not one for ODEs.
        """
        if method not in ODE:
            raise DataError(unknown("ODE method", method, ODE))
        self._check_examples(x)
        start = self.path.prior_std * self._inward(x)
        return self._outward(self._run(start, condition, steps, method, grid, guidance, None, options))

    def _run(
        self,
        x: Tensor,
        condition: Any,
        steps: int,
        method: str,
        grid: str,
        guidance: float,
        classifier: Classifier | None,
        options: dict[str, Any],
    ) -> Tensor:
        if method not in METHODS:
            raise DataError(unknown("sampling method", method, METHODS))
        path = self.path

        def field(to: str) -> Field:
            return lambda z, t: self.predict(z, t, to, condition=condition, guidance=guidance, classifier=classifier)

        own = self.target == "velocity" and method in ODE and classifier is None
        avoid = self._infinite if own and grid not in RATIOS else self._singular
        times = self._times(steps, grid, avoid)
        if method in DATA:
            return getattr(dynamics, method)(path, field("data"), x, times, **options)
        if avoid[1]:  # the last step goes to the predicted data
            times = list(self._inside(avoid)) if method == "dopri5" else times[:-1]
        if len(times) > 1 or method == "langevin":
            if method in ODE:
                x = dynamics.ode(field("velocity"), x, times, method=method, **options)
            elif method == "sde":
                x = dynamics.sde(path, field("score"), None, x, times, **options)
            elif method == "predictor-corrector":
                x = dynamics.predictor_corrector(path, field("score"), x, times, **options)
            else:
                return self._langevin(field("score"), x, times, **options)
        return field("data")(x, times[-1]) if avoid[1] else x

    def _times(self, steps: int, grid: str, avoid: tuple[bool, bool]) -> list[float]:
        """Times from noise to t = 1, without a start to avoid, and with the last step from the end to avoid."""
        start, end = self._inside(avoid)
        if not (avoid[1] and grid in RATIOS):
            return dynamics.times(steps, grid, path=self.path, start=start)
        inner = dynamics.times(steps - 1, grid, path=self.path, start=start, end=end) if steps > 1 else [start]
        return [*inner, 1.0]

    def _langevin(self, score: Field, x: Tensor, times: list[float], *, per_level: int = 100, **options: Any) -> Tensor:
        """Annealed Langevin dynamics of x / a, which is data plus noise of standard deviation b / a."""
        t = torch.tensor(times, dtype=torch.float64)
        a = self.path.a(t).tolist()
        sigmas = (self.path.b(t) / self.path.a(t)).tolist()
        at = dict(zip(sigmas, zip(times, a)))

        def blurred(y: Tensor, sigma: float) -> Tensor:
            time, factor = at[sigma]
            return factor * score(factor * y, time)

        return dynamics.annealed_langevin(blurred, x / a[0], sigmas, steps=per_level, **options)

    def log_prob(
        self,
        x: Tensor,
        *,
        condition: Any = None,
        steps: int = 100,
        method: str = "rk4",
        grid: str = "uniform",
        guidance: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """The log-density by the probability-flow ODE, ``(B,)``, nats (or ``unit="bits/dim"``).

        Where the field is singular at t = 1, the density is that of the path at 0.001 before it.

        Args:
            x: ``(B, *shape)``. options: ``divergence``, ``probes``, ``generator``, ``unit`` of ``dynamics.log_prob``.
        """
        self._check_examples(x)
        own = self.target == "velocity" and grid not in RATIOS
        start, end = self._inside(self._infinite if own else self._singular)
        times = dynamics.times(steps, grid, path=self.path, start=start, end=end)

        def velocity(z: Tensor, t: float) -> Tensor:
            return self.predict(z, t, "velocity", condition=condition, guidance=guidance)

        found = dynamics.log_prob(
            velocity, self._inward(x), times, method=method, prior_std=self.path.prior_std, **options
        )
        if options.get("unit", "nats") == "bits/dim":
            return found + math.log2(self.scale)
        return found - math.log(self.scale) * math.prod(self.shape)

    # --- batches ---------------------------------------------------------------------------------------

    def _inward(self, x: Tensor) -> Tensor:
        return x if (self.centre, self.scale) == (0, 1) else (x - self.centre) / self.scale

    def _outward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.centre

    def _unpack(self, batch: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Source (None: to be drawn), target and labels of a batch, in the network's units."""
        count = 2 if self.coupling == "pairs" else 1
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
        if len(parts) == 1 and self.classes is not None and parts[0].ndim == 2:
            columns = count * math.prod(self.shape)
            if parts[0].shape[1] == columns + 1:
                one = self.shape if count == 1 else (2, *self.shape)
                parts = [parts[0][:, :-1].unflatten(1, one), parts[0][:, -1].long()]
        if count == 2 and parts[0].shape[1:] == (2, *self.shape):
            parts = [*parts[0].unbind(1), *parts[1:]]
        if len(parts) != count + (self.classes is not None):
            need = ("(x0, x1" if count == 2 else "(x") + (", labels)" if self.classes is not None else ")")
            raise DataError(f"This model takes batches {need}, got {len(parts)} part(s).")
        for part in parts[:count]:
            self._check_examples(part)
        if count == 2 and len(parts[0]) != len(parts[1]):
            raise DataError(f"Pairs need as many sources as targets, got {len(parts[0])} and {len(parts[1])}.")
        labels = self._condition(parts[count], len(parts[0]), parts[0].device) if self.classes is not None else None
        return self._inward(parts[0]) if count == 2 else None, self._inward(parts[count - 1]), labels

    def _check_examples(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape or not len(x):
            raise DataError(f"Expected examples of shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DataError(f"Expected floating-point examples, got dtype {x.dtype}: divide uint8 images by 255.")

    def check(self, batch: Any) -> None:
        """Refuse a batch that the model cannot be trained on; ``fit`` calls this once.

        Raises:
            DataError: wrong shape, dtype, number of parts, or labels outside the classes.
        """
        self._unpack(batch)

    def extra_repr(self) -> str:
        name = self._weight if isinstance(self._weight, str) else "a function of t"
        count = sum(p.numel() for p in self.parameters())
        return (
            f"path={self.path.name!r}, predict={self.target!r}, times={self.times.name!r}, weight={name!r},"
            f" coupling={self.coupling!r}, shape={self.shape}, parameters={count:,}"
        )


def _labels(condition: Any, n: int, device: torch.device) -> Tensor:
    if isinstance(condition, int):
        return torch.full((n,), condition, dtype=torch.int64, device=device)
    labels = torch.as_tensor(condition, device=device)
    if labels.shape != (n,) or labels.is_floating_point():
        raise DataError(f"condition must be one integer or {n} of them, got {labels.dtype} {tuple(labels.shape)}.")
    return labels.long()

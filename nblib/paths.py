r"""Gaussian probability paths :math:`x_t = a(t)\,x_1 + b(t)\,x_0` from noise (t = 0) to data (t = 1).

Diffusion models, score models and flow matching differ here only in the two functions a and b. Times lie in
``[0, 1]``; data is of any rank, ``(B, ...)``; t is a Python float, a 0-dim tensor or ``(B,)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nblib.data.toy import GaussianMixture
from nblib.errors import DataError, unknown

__all__ = [
    "PATHS",
    "PREDICTIONS",
    "LearnedSchedule",
    "Path",
    "ddpm_betas",
    "ddpm_index",
    "ddpm_time",
    "expand",
    "linear",
    "make",
    "marginal",
    "posterior_mean",
    "sub_vp",
    "trigonometric",
    "ve",
    "vp",
]

Function = Callable[[Tensor], Tensor]

PREDICTIONS = ("data", "noise", "score", "velocity")


def expand(t: float | Tensor, x: Tensor) -> Tensor:
    """A number per example, made to broadcast against the data: ``(B, 1, ..., 1)``, or ``(1, ..., 1)`` for one number.

    Args:
        t: a float, a 0-dim tensor or ``(B,)``; a time or any other coefficient.
        x: ``(B, ...)``, floating point; gives rank, dtype and device.

    Raises:
        DataError: the shapes do not fit, or ``x`` is not of a floating-point dtype.
    """
    if not x.is_floating_point():
        raise DataError(f"Expected floating-point data, got dtype {x.dtype}: divide uint8 images by 255.")
    ones = (1,) * x.dim()
    if not isinstance(t, Tensor):
        return torch.full(ones, t, dtype=x.dtype, device=x.device)
    if t.dim() == 0:
        return t.to(x).reshape(ones)
    if t.shape != x.shape[:1]:
        raise DataError(
            f"t must be a float, a 0-dim tensor or one number per example, of shape {tuple(x.shape[:1])} for x of"
            f" shape {tuple(x.shape)}; got t of shape {tuple(t.shape)}."
        )
    return t.to(x).reshape(-1, *ones[1:])


def _same_shape(**tensors: Tensor) -> None:
    (first, x), (second, y) = tensors.items()
    if x.shape != y.shape:
        raise DataError(f"{first} and {second} must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")


def _as_time(t: float | Tensor, x: Tensor | None = None) -> Tensor:
    """t as a tensor, at least in float32: a coefficient such as sqrt(1 - a^2) is worthless in half precision."""
    if not isinstance(t, Tensor):
        return torch.full((), t, dtype=torch.float64, device=None if x is None else x.device)
    dtype = torch.promote_types(t.dtype, torch.float32)
    return t.to(dtype) if x is None else t.to(x.device, torch.promote_types(dtype, x.dtype))


def _looks_at(t: float | Tensor) -> bool:
    """Whether a check may look at the value: not in a compiled graph, nor on an accelerator, where it would wait."""
    return not torch.compiler.is_compiling() and (not isinstance(t, Tensor) or t.is_cpu)


def _extremes(t: float | Tensor) -> tuple[float, float]:
    if not isinstance(t, Tensor):
        return t, t
    if not t.numel():
        return 0.5, 0.5
    low, high = torch.aminmax(t.detach())
    return low.item(), high.item()


def _check_time(t: float | Tensor) -> None:
    if not _looks_at(t):
        return
    low, high = _extremes(t)
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"Times lie in [0, 1], from noise to data; got t = {high if low >= 0 else low:g}."
            " Rescale them; nblib.paths.ddpm_time turns DDPM's index into a time."
        )


def _derivative(f: Function, t: Tensor) -> Tensor:
    """f'(t) of an elementwise f; by torch.func, so that it compiles without a break and works under no_grad."""
    return torch.func.grad(lambda s: f(s).sum())(t)


@dataclass(frozen=True)
class Path:
    r"""A Gaussian probability path, :math:`x_t = a(t)\,x_1 + b(t)\,x_0` with :math:`x_0\sim\mathcal N(0, I)`.

    Args:
        name: for messages.
        a, b: elementwise torch functions of a time tensor of any shape; a/b must increase.
        da, db: their derivatives; by automatic differentiation where omitted.
        inverse: the time at which the log-SNR has a value; by bisection where omitted.
        g: the diffusion coefficient, where its general formula (see ``diffusion``) is 0 times infinity.
        schedule: the module whose parameters a and b depend on, for whoever trains it.
    """

    name: str
    a: Function
    b: Function
    da: Function | None = None
    db: Function | None = None
    inverse: Function | None = None
    g: Function | None = None
    schedule: nn.Module | None = None

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        da = self.da(t) if self.da is not None else _derivative(self.a, t)
        db = self.db(t) if self.db is not None else _derivative(self.b, t)
        return da, db

    def _refuse_singular(
        self, t: float | Tensor, what: str, coefficients: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> None:
        """A quotient by a(0) = 0 or b(1) = 0 must not become NaN in a loss: only the ends can be singular."""
        if not _looks_at(t):
            return
        low, high = _extremes(t)
        for end in ([0.0] if low == 0 else []) + ([1.0] if high == 1 else []):
            with torch.no_grad():
                finite = all(bool(c.isfinite()) for c in coefficients(torch.tensor(end, dtype=torch.float64)))
            if not finite:
                inside = "t >= 1e-5" if end == 0 else "t <= 1 - 1e-5"
                raise DataError(f"{what} of path {self.name!r} is singular at t = {end:g}: keep to {inside}.")

    def coefficients(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(a, b, da, db)`` at t, with the rank and dtype of x; derivatives may be infinite at the ends.

        Raises:
            DataError: times outside [0, 1], or shapes that do not fit.
        """
        _check_time(t)
        time = _as_time(t, x)
        da, db = self._rates(time)
        return expand(self.a(time), x), expand(self.b(time), x), expand(da, x), expand(db, x)

    def sample(self, x1: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        """The point :math:`x_t = a x_1 + b x_0` of the path between data ``x1`` and noise ``x0``, ``(B, ...)``.

        Raises:
            DataError: times outside [0, 1], or shapes that do not fit.
        """
        _same_shape(x1=x1, x0=x0)
        _check_time(t)
        time = _as_time(t, x1)
        return expand(self.a(time), x1) * x1 + expand(self.b(time), x1) * x0

    def velocity(self, x1: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
        r"""The velocity :math:`\dot x_t = \dot a x_1 + \dot b x_0` of one pair, ``(B, ...)``.

        Its mean given :math:`x_t` is the field that transports the marginals. Source: Lipman et al. (2023).

        Raises:
            DataError: as ``sample``; or an end where a derivative is infinite (VP paths at t = 1).
        """
        _same_shape(x1=x1, x0=x0)
        _check_time(t)
        self._refuse_singular(t, "The velocity", self._rates)
        da, db = self._rates(_as_time(t, x1))
        return expand(da, x1) * x1 + expand(db, x1) * x0

    def pair(self, x1: Tensor, x0: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """``(sample(x1, x0, t), velocity(x1, x0, t))``, with one look at the times: what flow matching trains on.

        Raises:
            DataError: as ``velocity``.
        """
        _same_shape(x1=x1, x0=x0)
        _check_time(t)
        self._refuse_singular(t, "The velocity", self._rates)
        time = _as_time(t, x1)
        da, db = self._rates(time)
        x = expand(self.a(time), x1) * x1 + expand(self.b(time), x1) * x0
        return x, expand(da, x1) * x1 + expand(db, x1) * x0

    def convert(self, value: Tensor, x: Tensor, t: float | Tensor, *, source: str, target: str) -> Tensor:
        r"""Turn one prediction made at ``x`` into another, by the two linear equations that both obey.

        .. math:: \begin{pmatrix} a & b\\ c & d\end{pmatrix}\begin{pmatrix} x_1\\ x_0\end{pmatrix}
                  = \begin{pmatrix} x_t\\ v\end{pmatrix}

        with :math:`(c, d)` = (1, 0) for data, (0, 1) for noise, :math:`(0, -1/b)` for the score and
        :math:`(\dot a, \dot b)` for the velocity. Since it is linear, it holds for conditional means too.

        Args:
            value: the prediction, the shape of x. x: the noisy data, ``(B, ...)``.
            source, target: of ``PREDICTIONS``.

        Raises:
            DataError: unknown names, times or shapes as in ``sample``, or an end where the equations are singular.
        """
        for name in (source, target):
            if name not in PREDICTIONS:
                raise DataError(unknown("prediction", name, PREDICTIONS))
        _same_shape(value=value, x=x)
        _check_time(t)
        if source == target:
            return value
        self._refuse_singular(t, f"{source} -> {target}", lambda time: self._solve(time, source, target))
        on_x, on_value = self._solve(_as_time(t, x), source, target)
        return expand(on_x, x) * x + expand(on_value, x) * value

    def _row(self, name: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """c and d in prediction = c x1 + d x0; the score is taken as the noise, its factor -1/b apart."""
        if name == "velocity":
            return self._rates(t)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return (one, zero) if name == "data" else (zero, one)

    def _solve(self, t: Tensor, source: str, target: str) -> tuple[Tensor, Tensor]:
        """The factors of x and of the source prediction in the target prediction."""
        a, b = self.a(t), self.b(t)
        if {source, target} == {"noise", "score"}:
            on_x, on_value = torch.zeros_like(a), torch.ones_like(a)
        else:
            (c, d), (p, q) = self._row(source, t), self._row(target, t)
            det = a * d - b * c
            on_x, on_value = (p * d - q * c) / det, (q * a - p * b) / det
        if source == "score":
            return on_x, -b * on_value
        if target == "score":
            return -on_x / b, -on_value / b
        return on_x, on_value

    def snr(self, t: float | Tensor) -> Tensor:
        """The signal-to-noise ratio :math:`a^2/b^2`, increasing; the shape of t, infinite where b = 0."""
        return self.log_snr(t).exp()

    def log_snr(self, t: float | Tensor) -> Tensor:
        r"""The log-SNR :math:`\lambda = 2\log(a/b)`; of the shape of t (float64 for a float); infinite at zeros."""
        _check_time(t)
        time = _as_time(t)
        return 2 * (self.a(time).log() - self.b(time).log())

    @torch.no_grad()
    def time_of_log_snr(self, value: float | Tensor) -> Tensor:
        """The inverse of ``log_snr``, computed in float64; the shape and dtype of ``value`` (float64 for a float).

        Raises:
            DataError: the path never has this log-SNR.
        """
        wanted = _as_time(value).double()
        # The ends as two numbers on the host: a learned schedule is evaluated where it is and copied back.
        if _looks_at(value):
            low, high = self.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
            rounding = torch.finfo(value.dtype).eps if isinstance(value, Tensor) and value.is_floating_point() else 0.0
            slack = max(1e-9, 32 * rounding) * (1 + wanted.abs())
            wrong = wanted[~((wanted >= low - slack) & (wanted <= high + slack))]
            if wrong.numel():
                raise DataError(
                    f"The log-SNR of path {self.name!r} goes from {low:.6g} to {high:.6g}, got {float(wrong[0]):.6g}."
                )
        time = self.inverse(wanted) if self.inverse is not None else self._bisect(wanted)
        return time.clamp(0, 1).to(value.dtype if isinstance(value, Tensor) else torch.float64)

    def _bisect(self, wanted: Tensor) -> Tensor:
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(54):  # the spacing of float64 below 1 is 2^-53
            middle = (low + high) / 2
            below = 2 * (self.a(middle).log() - self.b(middle).log()) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def diffusion(self, t: float | Tensor) -> Tensor:
        r"""The coefficient g of the SDE that has the marginals of the path, in reversed time :math:`\tau = 1 - t`.

        .. math:: g^2 = 2\Big(b^2\,\frac{\dot a}{a} - b\,\dot b\Big) = b^2\,\dot\lambda,\qquad
                  \mathrm dx = f x\,\mathrm d\tau + g\,\mathrm dw,\quad f = -\dot a/a

        Returns:
            the shape of t (float64 for a float). Sources: Song et al. (2021); Kingma et al. (2021).

        Raises:
            DataError: times outside [0, 1], or an end where g is infinite (a = 0).
        """
        _check_time(t)
        self._refuse_singular(t, "The diffusion coefficient", lambda time: (self._diffusion(time),))
        return self._diffusion(_as_time(t))

    def _diffusion(self, t: Tensor) -> Tensor:
        if self.g is not None:
            return self.g(t)
        (a, b), (da, db) = (self.a(t), self.b(t)), self._rates(t)
        return (2 * (b**2 * da / a - b * db)).sqrt()

    @property
    def prior_std(self) -> float:
        """b(0): samplers start from :math:`N(0, b(0)^2 I)`."""
        with torch.no_grad():
            return float(self.b(torch.zeros((), dtype=torch.float64)))


# --- the named paths -----------------------------------------------------------------------------------


def linear(sigma_min: float = 0.0) -> Path:
    r"""Straight lines at constant speed: :math:`a = t,\ b = 1 - (1 - \sigma_{\min})t` (conditional optimal transport).

    Sources: Lipman et al. (2023); Liu et al. (2023).

    Raises:
        DataError: ``sigma_min`` outside [0, 1).
    """
    if not 0 <= sigma_min < 1:
        raise DataError(f"sigma_min must lie in [0, 1), got {sigma_min}.")
    slope = 1 - sigma_min
    return Path(
        "linear",
        a=lambda t: t,
        b=lambda t: (1 - t) + sigma_min * t,
        da=torch.ones_like,
        db=lambda t: torch.full_like(t, -slope),
        inverse=lambda value: 1 / ((-value / 2).exp() + slope),
    )


def trigonometric() -> Path:
    r"""A quarter of a circle: :math:`a = \sin(\pi t/2),\ b = \cos(\pi t/2)`.

    Source: Albergo and Vanden-Eijnden (2023).
    """
    quarter = math.pi / 2

    def a(t: Tensor) -> Tensor:
        return (quarter * t).sin()

    def b(t: Tensor) -> Tensor:
        return (quarter * (1 - t)).sin()  # the cosine, and exactly 0 at t = 1

    return Path(
        "trigonometric",
        a=a,
        b=b,
        da=lambda t: quarter * b(t),
        db=lambda t: -quarter * a(t),
        inverse=lambda value: (value / 2).exp().atan() / quarter,
    )


def vp(schedule: str | Function = "linear", *, beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    r"""Variance-preserving paths, :math:`a^2 + b^2 = 1`; with :math:`\tau = 1 - t`:

    * ``"linear"``: :math:`a^2 = \exp(-\int_0^\tau\beta)`; :math:`\beta` is linear from ``beta_min`` at :math:`\tau = 0`
      to ``beta_max``, the continuous limit of DDPM; a stays above 0. Sources: Ho et al. (2020); Song et al. (2021).
    * ``"cosine"``: :math:`a = \cos(\tfrac\pi2\tfrac{\tau+s}{1+s})/\cos(\tfrac\pi2\tfrac{s}{1+s})` with s = 0.008.
      Source: Nichol and Dhariwal (2021).
    * ``"sigmoid"``: :math:`a^2` is the logistic function between -3 and 3, rescaled to [0, 1].
      Source: Jabri et al. (2023).
    * a callable (an ``nn.Module`` such as ``LearnedSchedule``) that gives the increasing log-SNR:
      :math:`a^2 = \operatorname{sigmoid}(\lambda(t))`. Source: Kingma et al. (2021).

    The named three have b = 0 with an infinite slope at t = 1 (the sigmoid also a = 0 with one at t = 0), so
    their velocity does not exist there.

    Args:
        beta_min, beta_max: of ``"linear"``.

    Raises:
        DataError: unknown schedule, or not 0 < beta_min <= beta_max.
    """
    if not isinstance(schedule, str):
        by_snr = _FromLogSNR(schedule)
        module = schedule if isinstance(schedule, nn.Module) else None
        return Path("vp-log-snr", by_snr.a, by_snr.b, by_snr.da, by_snr.db, g=by_snr.g, schedule=module)
    if schedule == "linear":
        return _preserving("vp", *_beta_functions(beta_min, beta_max))
    if schedule == "cosine":
        return _cosine()
    if schedule == "sigmoid":
        return _sigmoid()
    raise DataError(unknown("VP schedule", schedule, ("linear", "cosine", "sigmoid")))


def _preserving(name: str, a: Function, b: Function, da: Function, inverse: Function) -> Path:
    """b db = -a da, hence g^2 = 2 da/a, also where b = 0."""
    return Path(
        name,
        a,
        b,
        da,
        db=lambda t: -a(t) * da(t) / b(t),
        inverse=inverse,
        g=lambda t: (2 * da(t) / a(t)).sqrt(),
    )


def _beta_integral(beta_min: float, beta_max: float) -> tuple[Function, Function, Function]:
    """Half the integral of beta from t to 1, i.e. -log a; half of beta; and the time from -log a."""
    if not 0 < beta_min <= beta_max < math.inf:
        raise DataError(f"VP needs 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}.")
    gap = beta_max - beta_min

    def decay(t: Tensor) -> Tensor:
        return (1 - t) * (beta_min / 2 + gap / 4 * (1 - t))

    def rate(t: Tensor) -> Tensor:
        return (beta_min + gap * (1 - t)) / 2

    def time(decay: Tensor) -> Tensor:  # the root of the quadratic, in the form without cancellation
        return 1 - 2 * decay / (beta_min / 2 + (beta_min**2 / 4 + gap * decay).sqrt())

    return decay, rate, time


def _beta_functions(beta_min: float, beta_max: float) -> tuple[Function, Function, Function, Function]:
    decay, rate, time = _beta_integral(beta_min, beta_max)

    def a(t: Tensor) -> Tensor:
        return (-decay(t)).exp()

    def b(t: Tensor) -> Tensor:
        return (-torch.expm1(-2 * decay(t))).sqrt()

    return a, b, lambda t: rate(t) * a(t), lambda value: time(F.softplus(-value) / 2)


def _cosine(offset: float = 0.008) -> Path:
    # Written with the complement of the angle: sines are exactly zero where a and b are.
    full = math.pi / 2 / (1 + offset)
    top = math.sin(full)

    def a(t: Tensor) -> Tensor:
        return (full * t).sin() / top

    def b(t: Tensor) -> Tensor:
        return ((full * (1 - t)).sin() * (full * (1 + t)).sin()).sqrt() / top

    def inverse(value: Tensor) -> Tensor:
        sine = value.sigmoid().sqrt() * top
        cosine = (math.cos(full) ** 2 + (-value).sigmoid() * top**2).sqrt()
        return torch.atan2(sine, cosine) / full

    return _preserving("vp-cosine", a, b, lambda t: full * (full * t).cos() / top, inverse)


def _sigmoid(reach: float = 3.0) -> Path:
    # sigmoid(x) - sigmoid(y) as sinh((x - y)/2) / (2 cosh(x/2) cosh(y/2)): no cancellation at the ends.
    scale = math.cosh(reach / 2) / math.sinh(reach)
    width = math.tanh(reach / 2)

    def square(t: Tensor) -> Tensor:
        return scale * (reach * t).sinh() / (reach * (t - 0.5)).cosh()

    def a(t: Tensor) -> Tensor:
        return square(t).sqrt()

    def da(t: Tensor) -> Tensor:
        return reach / (4 * width * (reach * (t - 0.5)).cosh() ** 2 * a(t))

    def inverse(value: Tensor) -> Tensor:
        level = 1 / (1 + math.exp(reach)) + width * value.sigmoid()
        return 0.5 + level.logit() / (2 * reach)

    return _preserving("vp-sigmoid", a, lambda t: a(1 - t), da, inverse)


@dataclass(frozen=True)
class _FromLogSNR:
    """The coefficients from the log-SNR. Methods, not closures: a deep copy of a model then copies its schedule too."""

    log_snr: Function

    def _slope(self, t: Tensor) -> Tensor:
        return _derivative(self.log_snr, t)

    def a(self, t: Tensor) -> Tensor:
        return self.log_snr(t).sigmoid().sqrt()

    def b(self, t: Tensor) -> Tensor:
        return (-self.log_snr(t)).sigmoid().sqrt()

    def da(self, t: Tensor) -> Tensor:
        return self.a(t) * self.b(t) ** 2 * self._slope(t) / 2

    def db(self, t: Tensor) -> Tensor:
        return -self.b(t) * self.a(t) ** 2 * self._slope(t) / 2

    def g(self, t: Tensor) -> Tensor:
        return self.b(t) * self._slope(t).sqrt()


class LearnedSchedule(nn.Module):
    r"""A log-SNR that is learned and strictly increasing: ``vp(LearnedSchedule())``.

    .. math:: \lambda(t) = \lambda_0 + (\lambda_1-\lambda_0)\,\frac{h(t)-h(0)}{h(1)-h(0)},\qquad
              h(t) = w t + \frac1H\sum_j v_j\operatorname{sigmoid}\big(u_j(2t-1) + c_j\big)

    with w, u and v kept positive by a softplus. Any shape of t; the dtype of t, at least that of the parameters.

    Args:
        low, high: log-SNR at t = 0 and at t = 1.
        learn_ends: learn them too (their order is kept).
        hidden: the number H of sigmoids.

    Source: Kingma et al. (2021), appendix H.

    Raises:
        DataError: not low < high, or no hidden unit.
    """

    def __init__(self, low: float = -5.0, high: float = 13.3, *, learn_ends: bool = True, hidden: int = 1024) -> None:
        super().__init__()
        if not low < high or hidden < 1:
            raise DataError(
                f"LearnedSchedule needs low < high and hidden >= 1, got low={low}, high={high}, hidden={hidden}."
            )
        self.low = nn.Parameter(torch.tensor(float(low)), requires_grad=learn_ends)
        self.log_gap = nn.Parameter(torch.tensor(math.log(high - low)), requires_grad=learn_ends)
        self.slope = nn.Parameter(torch.tensor(1.0))
        self.inner, self.shift, self.outer = (nn.Parameter(torch.randn(hidden)) for _ in range(3))

    def _rise(self, t: Tensor) -> Tensor:
        inner, shift, outer = (p.to(t.dtype) for p in (self.inner, self.shift, self.outer))
        bumps = (F.softplus(inner) * (2 * t - 1).unsqueeze(-1) + shift).sigmoid()
        return F.softplus(self.slope.to(t.dtype)) * t + (F.softplus(outer) * bumps).mean(-1)

    def forward(self, t: Tensor) -> Tensor:
        """The log-SNR at times of any shape, on the device of t."""
        time = t.to(self.low.device, torch.promote_types(t.dtype, self.low.dtype))
        start, end = self._rise(time.new_zeros(())), self._rise(time.new_ones(()))
        level = self.low + self.log_gap.exp() * (self._rise(time) - start) / (end - start)
        return level.to(t.device)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    r"""The variance-exploding path: :math:`a = 1,\ b = \sigma_{\max}^{1-t}\sigma_{\min}^{t}`.

    Source: Song et al. (2021).

    Raises:
        DataError: not 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise DataError(f"VE needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}.")
    ratio = math.log(sigma_max / sigma_min)

    def b(t: Tensor) -> Tensor:
        return sigma_max ** (1 - t) * sigma_min**t

    return Path(
        "ve",
        a=torch.ones_like,
        b=b,
        da=torch.zeros_like,
        db=lambda t: -ratio * b(t),
        inverse=lambda value: 1 + (value / 2 + math.log(sigma_min)) / ratio,
    )


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    r"""The sub-VP path: a of the linear VP path and :math:`b = 1 - a^2`, smaller than VP's. Source: Song et al. (2021).

    Raises:
        DataError: not 0 < beta_min <= beta_max.
    """
    decay, rate, time = _beta_integral(beta_min, beta_max)

    def a(t: Tensor) -> Tensor:
        return (-decay(t)).exp()

    return Path(
        "sub-vp",
        a=a,
        b=lambda t: -torch.expm1(-2 * decay(t)),
        da=lambda t: rate(t) * a(t),
        db=lambda t: -2 * rate(t) * a(t) ** 2,
        inverse=lambda value: time(torch.asinh((-value / 2).exp() / 2)),  # b/a = 2 sinh(-log a)
    )


PATHS: dict[str, Callable[[], Path]] = {
    "linear": linear,
    "vp": vp,
    "vp-cosine": lambda: vp("cosine"),
    "vp-sigmoid": lambda: vp("sigmoid"),
    "sub-vp": sub_vp,
    "ve": ve,
    "trigonometric": trigonometric,
}


def make(name: str) -> Path:
    """A path of ``PATHS`` by name, with its default arguments.

    Raises:
        DataError: unknown name, with the nearest known one.
    """
    if name not in PATHS:
        raise DataError(unknown("path", name, PATHS))
    return PATHS[name]()


# --- DDPM's indices ------------------------------------------------------------------------------------


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise DataError(f"steps must be at least 1, got {steps}.")


def ddpm_time(k: int | Tensor, steps: int) -> float | Tensor:
    r"""The time :math:`t = 1 - k/T` of DDPM's index k = 1..T; k = T is t = 0, pure noise.

    Returns:
        a float for an int, a tensor of the default dtype for a tensor.

    Raises:
        DataError: an index outside 1..steps.
    """
    _check_steps(steps)
    if _looks_at(k):
        index = torch.as_tensor(k).flatten()
        wrong = index[(index < 1) | (index > steps)]
        if wrong.numel():
            raise DataError(f"DDPM's index lies in 1..{steps} (steps={steps} is pure noise), got {wrong[0].item()}.")
    return 1 - k / steps


def ddpm_index(t: float | Tensor, steps: int) -> int | Tensor:
    """The index of 1..steps whose time is nearest to t: the exact inverse of ``ddpm_time`` on its grid.

    Returns:
        an int for a float, an int64 tensor for a tensor.

    Raises:
        DataError: times outside [0, 1].
    """
    _check_steps(steps)
    _check_time(t)
    if not isinstance(t, Tensor):
        return min(max(round((1 - t) * steps), 1), steps)
    return ((1 - t) * steps).round().long().clamp(1, steps)


@torch.no_grad()
def ddpm_betas(path: Path, steps: int) -> Tensor:
    r"""DDPM's variances :math:`\beta_1..\beta_T` of a VP path, such that :math:`\prod_{j\le k}(1-\beta_j) = a(t_k)^2`.

    Where a(0) = 0 (cosine, sigmoid) the last one is 1; published code clips it to 0.999.

    Returns:
        ``(steps,)``, float64; ``[k - 1]`` is that of index k. Source: Ho et al. (2020).

    Raises:
        DataError: the path does not preserve variance.
    """
    _check_steps(steps)
    t = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps
    square = path.a(t) ** 2
    excess = float((square + path.b(t) ** 2 - 1).abs().max())
    if excess > 1e-6:
        raise DataError(
            f"DDPM's betas exist where a^2 + b^2 = 1; path {path.name!r} is off by {excess:.3g}: use a path of vp()."
        )
    before = torch.cat([torch.ones_like(square[:1]), square[:-1]])
    return 1 - square / before


# --- exact answers for mixtures of Gaussians -----------------------------------------------------------


def marginal(mixture: GaussianMixture, path: Path, t: float | Tensor) -> GaussianMixture:
    r"""The density of :math:`x_t` when the data is a mixture: again a mixture, with exact score.

    .. math:: p_t(x) = \sum_k w_k\,\mathcal N\big(x;\ a m_k,\ a^2 S_k + b^2 I\big)

    Args:
        t: one time, a float or a 0-dim tensor.

    Raises:
        DataError: a time outside [0, 1], or several times.
    """
    if isinstance(t, Tensor) and t.dim():
        raise DataError(f"marginal takes one time, got t of shape {tuple(t.shape)}: call it once per time.")
    _check_time(t)
    means = mixture.means
    time = _as_time(t, means)
    a, b = path.a(time), path.b(time)
    covs = a**2 * mixture.covs + b**2 * torch.eye(mixture.dim, dtype=means.dtype, device=means.device)
    return GaussianMixture(a.to(means) * means, covs.to(means), mixture.weights)


def posterior_mean(mixture: GaussianMixture, path: Path, x: Tensor, t: float | Tensor, to: str = "data") -> Tensor:
    r"""What a perfect network predicts when the data is a mixture: the mean of a prediction given :math:`x_t`.

    .. math:: \mathbb E[x_1\mid x] = \sum_k p(k\mid x)\big(m_k + a S_k C_k^{-1}(x - a m_k)\big),\qquad
              \mathbb E[x_0\mid x] = \sum_k p(k\mid x)\,b\,C_k^{-1}(x - a m_k)

    with :math:`C_k = a^2 S_k + b^2 I`; the score is :math:`-\mathbb E[x_0\mid x]/b` and the velocity
    :math:`\dot a\,\mathbb E[x_1\mid x] + \dot b\,\mathbb E[x_0\mid x]`.

    Args:
        x: ``(B, ..., D)``. t: a float, a 0-dim tensor or ``(B,)``. to: of ``PREDICTIONS``.

    Returns:
        the shape of x, differentiable in it.

    Raises:
        DataError: unknown ``to``, times or shapes that do not fit, or a velocity at a singular end.
    """
    if to not in PREDICTIONS:
        raise DataError(unknown("prediction", to, PREDICTIONS))
    if x.shape[-1:] != (mixture.dim,):
        raise DataError(f"x must end in the mixture's dimension {mixture.dim}, got shape {tuple(x.shape)}.")
    _check_time(t)
    time = _as_time(t, x)
    a, b = expand(path.a(time), x).unsqueeze(-1), expand(path.b(time), x).unsqueeze(-1)
    # In the axes of each S_k its C_k is diagonal at every time.
    spread, axes = (v.to(x) for v in torch.linalg.eigh(mixture.covs))
    means = mixture.means.to(x)
    gap = torch.einsum("kij,...ki->...kj", axes, x.unsqueeze(-2) - a * means)
    variance = a**2 * spread + b**2
    joint = mixture.weights.to(x).log() - 0.5 * (gap**2 / variance + variance.log()).sum(-1)
    weights = joint.softmax(-1).unsqueeze(-1)
    pull = gap / variance

    def average(along_axes: Tensor) -> Tensor:
        return (weights * torch.einsum("kij,...kj->...ki", axes, along_axes)).sum(-2)

    if to == "score":
        return -average(pull)
    noise = average(b * pull)
    if to == "noise":
        return noise
    data = average(a * spread * pull) + (weights * means).sum(-2)
    return data if to == "data" else path.velocity(data, noise, t)

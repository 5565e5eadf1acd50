r"""Integrators that carry noise to data, and data to noise: ODEs, SDEs, exponential integrators, Langevin dynamics.

Pure functions of a field, a start and a grid of times, which is a list of floats (:func:`times`). Time runs from
noise (t = 0) to data (t = 1); a path is :math:`x_t=a(t)\,x_1+b(t)\,x_0` (:mod:`nblib.paths`); a start drawn from
the prior is ``path.prior_std * torch.randn(n, *shape)``. Fields are callables ``(x, t)`` with ``x`` of shape
``(B, ...)`` and a float ``t``, and return the shape of ``x``.

* Gradients flow as the caller says: sample under ``torch.no_grad()``.
* No step waits for the device: nothing but ``"dopri5"`` looks at the value of a tensor.
* Noise comes from the global random state, or from ``generator``: then row i is the same whatever the batch size
  (and batches drawn one after the other are rows of one large batch), for which the noise of all steps is drawn
  ahead, ``steps * x.numel()`` numbers. ``"dopri5"`` chooses its steps for the batch as a whole.
* ``progress=True`` shows a bar; ``callback(i, t, x)`` is called after each step with its number from 0, the time
  reached and the state.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nblib.errors import DataError, unknown
from nblib.nets import randn_rows
from nblib.probability import bits_per_dim, gaussian_log_prob, value_and_divergence

if TYPE_CHECKING:
    from nblib.paths import Path

__all__ = [
    "DIVERGENCES",
    "GRIDS",
    "METHODS",
    "ancestral",
    "annealed_langevin",
    "ddim",
    "edm",
    "langevin",
    "log_prob",
    "multistep",
    "ode",
    "predictor_corrector",
    "sde",
    "times",
]

Field = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor], object]

GRIDS = ("uniform", "quadratic", "edm", "log-snr")
METHODS = ("euler", "midpoint", "heun", "rk4", "dopri5")
DIVERGENCES = ("exact", "gaussian", "rademacher")
VARIANCES = ("posterior", "forward")
MAX_STEPS = 10_000  # of dopri5, in one interval of the grid


# --- grids of times --------------------------------------------------------------------------------------


@torch.no_grad()
def times(
    steps: int,
    kind: str = "uniform",
    *,
    path: Path | None = None,
    start: float = 0.0,
    end: float = 1.0,
    rho: float = 7.0,
) -> list[float]:
    r"""``steps + 1`` increasing times from ``start`` to ``end``, both exact.

    With :math:`f_i=i/N` and linear interpolation between the values at the two ends of

    .. math:: \text{uniform: } t\qquad \text{quadratic: } \sqrt{1-t}\qquad
              \text{edm: } (b/a)^{1/\rho}\qquad \text{log-snr: } \log(a^2/b^2)

    All but the first put more steps near the data. ``"edm"`` and ``"log-snr"`` need ``path``. The first is infinite
    at a = 0, the second also at b = 0: stop short of such an end, and append it if the sampler is to reach it,
    ``[*times(20, "log-snr", path=path, end=0.999), 1.0]``.

    Raises:
        DataError: unknown kind, no step, ends out of order, no path, or an infinite end.

    Sources: Song, Meng and Ermon (2021), section D.3 (quadratic); Karras et al. (2022), equation 5; Lu et al. (2022).
    """
    if kind not in GRIDS:
        raise DataError(unknown("grid of times", kind, GRIDS))
    if steps < 1 or not 0 <= start < end <= 1 or not rho > 0:
        raise DataError(
            f"times needs steps >= 1, 0 <= start < end <= 1 and rho > 0, got steps={steps}, start={start}, end={end},"
            f" rho={rho}."
        )
    fraction = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    ends = torch.tensor([start, end], dtype=torch.float64)
    if kind == "uniform":
        grid = _between(ends, fraction)
    elif kind == "quadratic":
        grid = 1 - _between((1 - ends).sqrt(), fraction) ** 2
    else:
        if path is None:
            raise DataError(f"The grid {kind!r} depends on the path: give path=...")
        ratio = path.b(ends) / path.a(ends)
        value = ratio ** (1 / rho) if kind == "edm" else -2 * ratio.log()
        if not bool(value.isfinite().all()):
            raise DataError(
                f"The grid {kind!r} is infinite at an end: b/a of the path {path.name!r} is {ratio[0]:g} at t={start}"
                f" and {ratio[1]:g} at t={end}. Choose start > 0 or end < 1."
            )
        inner = _between(value, fraction)[1:-1]
        log_snr = -2 * rho * inner.log() if kind == "edm" else inner
        grid = torch.cat([ends[:1], path.time_of_log_snr(log_snr).to(ends), ends[1:]])
    found = [start, *grid[1:-1].tolist(), end]
    _check_times(found)
    return found


def _between(ends: Tensor, fraction: Tensor) -> Tensor:
    return torch.lerp(ends[0], ends[1], fraction)


def _check_times(grid: Sequence[float], *, either_way: bool = False) -> None:
    pairs = list(itertools.pairwise(grid))
    ordered = all(s < t for s, t in pairs) or (either_way and all(s > t for s, t in pairs))
    if len(grid) < 2 or not ordered or not all(0 <= t <= 1 for t in grid):
        raise DataError(
            f"times must be at least two numbers in [0, 1], strictly {'monotone' if either_way else 'increasing'}, got"
            f" {len(grid)}: {', '.join(f'{t:.6g}' for t in grid[:6])}{', ...' if len(grid) > 6 else ''}."
        )


# --- what the samplers share -----------------------------------------------------------------------------


def _check_state(x: Tensor) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise DataError(f"x must be floating-point of shape (B, ...) with rank >= 2, got {tuple(x.shape)}, {x.dtype}.")


def _checked(name: str, field: Field) -> Field:
    """The field, refusing values that would broadcast silently."""

    def checked(x: Tensor, t: float) -> Tensor:
        value = field(x, t)
        if value.shape != x.shape:
            raise DataError(f"{name} must return the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}.")
        return value

    return checked


def _steps(grid: Sequence[float], progress: bool) -> Iterable[tuple[int, float, float]]:
    """``(i, start, end)`` of each step."""
    steps = [(i, *pair) for i, pair in enumerate(itertools.pairwise(grid))]
    if not progress:
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, unit="step", leave=False, file=sys.stderr)


def _noise(x: Tensor, n: int, generator: torch.Generator | None) -> Callable[[int], Tensor]:
    """The standard normal noise of step i < n, like x."""
    if generator is None:
        return lambda i: torch.randn_like(x)
    rows = randn_rows(len(x), (n, *x.shape[1:]), x, generator)
    return lambda i: rows[:, i]


def _coefficients(path: Path, grid: Sequence[float], x: Tensor) -> tuple[Tensor, Tensor]:
    """a and b at every time of the grid, in float64: scalars of it leave the dtype of x as it is."""
    t = torch.tensor(grid, dtype=torch.float64, device=x.device)
    return path.a(t), path.b(t)


def _rows(value: Tensor, x: Tensor) -> Tensor:
    """``(B,)`` as ``(B, 1, ...)``."""
    return value.view(-1, *[1] * (x.dim() - 1))


# --- ordinary differential equations ---------------------------------------------------------------------


def _euler(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    return x + (end - t) * f(x, t)


def _midpoint(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    h = end - t
    return x + h * f(x + h / 2 * f(x, t), (t + end) / 2)


def _heun(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    h = end - t
    slope = f(x, t)
    return x + h / 2 * (slope + f(x + h * slope, end))


def _rk4(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    h, half = end - t, (t + end) / 2
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, half)
    k3 = f(x + h / 2 * k2, half)
    k4 = f(x + h * k3, end)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


_FIXED = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}


def _dopri5(f: Field, x: Tensor, t: float, end: float, rtol: float, atol: float) -> Tensor:
    from torchdiffeq import odeint  # type: ignore[import-untyped]

    low, high = min(t, end), max(t, end)

    def inside(s: Tensor, y: Tensor) -> Tensor:
        # The guess of the first step looks beyond the interval, where there may be no field.
        return f(y, min(max(s.item(), low), high))

    grid = torch.tensor([t, end], dtype=torch.float64, device=x.device)
    options = {"step_t": grid[1:], "max_num_steps": MAX_STEPS}  # step_t: land on the end, do not step over it
    try:
        return odeint(inside, x, grid, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    except AssertionError as error:
        if not any(sign in str(error) for sign in ("underflow", "max_num_steps", "non-finite")):
            raise
        raise DataError(
            f"dopri5 found no step small enough between t={t:g} and t={end:g} for rtol={rtol:g}, atol={atol:g}"
            f" ({str(error)[:60]}): the field is singular or not finite there, or the tolerances are below the"
            f" rounding of {x.dtype}. Stop short of the singular end, loosen them, or use float64."
        ) from error


def ode(
    velocity: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    method: str = "euler",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Solve :math:`\dot x=u(x,t)` over the grid; with decreasing times, from data back to noise.

    The fixed-step methods have order 1 (``"euler"``), 2 (``"midpoint"``, ``"heun"``) and 4 (``"rk4"``) with as many
    evaluations per step. ``"heun"`` and ``"rk4"`` evaluate the velocity at the last time. ``"dopri5"`` solves every
    interval of the grid to ``rtol`` and ``atol`` with steps of its own: ``[0.0, 1.0]`` leaves it free.

    Args:
        x: ``(B, ...)``, the state at ``times[0]``.

    Returns:
        the state at ``times[-1]``, shape of ``x``.

    Raises:
        DataError: unknown method, bad grid, or a step size of ``"dopri5"`` that falls below rounding.

    Sources: Chen et al. (2018); Song et al. (2021); Dormand and Prince (1980).
    """
    if method not in METHODS:
        raise DataError(unknown("method", method, METHODS))
    _check_times(times, either_way=True)
    _check_state(x)
    velocity = _checked("velocity", velocity)
    for i, t, end in _steps(times, progress):
        x = _dopri5(velocity, x, t, end, rtol, atol) if method == "dopri5" else _FIXED[method](velocity, x, t, end)
        if callback is not None:
            callback(i, end, x)
    return x


def multistep(
    path: Path,
    data: Field,
    x: Tensor,
    times: Sequence[float],
    order: int = 2,
    *,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Exponential integrator in :math:`\lambda=\log(a/b)` for the data prediction d (DPM-Solver++, multistep).

    .. math:: x'=\frac{b'}{b}\,x+\Big(a'-a\frac{b'}{b}\Big)\hat d,\qquad
              \hat d=d_i+\frac{h}{2h_{-1}}(d_i-d_{i-1}),\qquad h=\lambda'-\lambda

    Order 1 has :math:`\hat d=d_i` and is DDIM. One evaluation per step at either order. A step more than twice as
    long as the one before is of order 1: there is nothing to extrapolate from at the first, and the last, to b = 0,
    is infinite.

    Args:
        data: predicts :math:`\mathbb E[x_1\mid x_t]`. x: ``(B, ...)``, the state at ``times[0]``.

    Raises:
        DataError: an order other than 1 and 2, or a bad grid.

    Source: Lu et al. (2022), DPM-Solver++, algorithm 2.
    """
    if order not in (1, 2):
        raise DataError(f"order must be 1 or 2, got {order}.")
    _check_times(times)
    _check_state(x)
    data = _checked("data", data)
    a, b = _coefficients(path, times, x)
    h = (a.log() - b.log()).diff()
    before = x
    for i, t, end in _steps(times, progress):
        now = data(x, t)
        guess = now
        if order == 2 and i > 0:
            weight = h[i] / (2 * h[i - 1])
            guess = now + torch.where(weight <= 1, weight, 0) * (now - before)
        shrink = b[i + 1] / b[i]
        x = shrink * x + (a[i + 1] - a[i] * shrink) * guess
        before = now
        if callback is not None:
            callback(i, end, x)
    return x


def ddim(
    path: Path,
    data: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Denoising diffusion implicit models: from the predicted data d and noise e, to the next time.

    .. math:: x'=a'd+\sqrt{b'^2-s^2}\;e+s\,z,\qquad e=\frac{x-a\,d}{b},\qquad
              s=\eta\,\frac{b'}{b}\sqrt{b^2-\Big(\frac{a\,b'}{a'}\Big)^2}

    :math:`\eta=0` is deterministic, the exponential integrator of order 1 of the probability-flow ODE, and exact for
    data of one point; :math:`\eta=1` is :func:`ancestral` sampling with the posterior variance. No noise is added at
    the last step.

    Args:
        data: predicts :math:`\mathbb E[x_1\mid x_t]`. x: ``(B, ...)``, the state at ``times[0]``. eta: in [0, 1].

    Raises:
        DataError: eta outside [0, 1], or a bad grid.

    Source: Song, Meng and Ermon (2021), equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise DataError(f"eta must lie in [0, 1], got {eta}: 0 is deterministic, 1 ancestral.")
    _check_times(times)
    _check_state(x)
    data = _checked("data", data)
    a, b = _coefficients(path, times, x)
    last = len(times) - 2
    noise = _noise(x, last if eta > 0 else 0, generator)
    for i, t, end in _steps(times, progress):
        d = data(x, t)
        e = (x - a[i] * d) / b[i]
        s = eta * _posterior_std(a, b, i)
        x = a[i + 1] * d + (b[i + 1] ** 2 - s**2).clamp_min(0).sqrt() * e
        if eta > 0 and i < last:
            x = x + s * noise(i)
        if callback is not None:
            callback(i, end, x)
    return x


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator,unused-ignore]
def _raised(path: Path, times: tuple[float, ...], gamma: float, between: tuple[float, float]) -> list[float]:
    """The times with 1 + gamma times the noise, on the host; those with too little, too much or none stay."""
    t = torch.tensor(times, dtype=torch.float64)
    sigma = (path.b(t) / path.a(t)).detach()
    raised = (1 + gamma) * sigma
    inside = (sigma >= between[0]) & (sigma <= between[1]) & (raised <= sigma[0]) & (sigma > 0)
    level = torch.where(inside, raised, sigma[0])  # where nothing is to be found, any level that there is
    return torch.where(inside, path.time_of_log_snr(-2 * level.log()), t).tolist()


def edm(
    path: Path,
    data: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    churn: float = 0.0,
    between: tuple[float, float] = (0.0, math.inf),
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Heun's method in the noise level :math:`\sigma=b/a`, with a little noise put back before each step.

    For :math:`y=x/a`, which is the data plus noise of standard deviation :math:`\sigma`, and the predicted data d,

    .. math:: \hat\sigma=(1+\gamma)\,\sigma,\qquad \hat y=y+\sqrt{\hat\sigma^2-\sigma^2}\,z,\qquad
              y'=\hat y+(\sigma'-\hat\sigma)\,\tfrac12\Big(\frac{\hat y-d(\hat y,\hat\sigma)}{\hat\sigma}
              +\frac{\tilde y-d(\tilde y,\sigma')}{\sigma'}\Big)

    where :math:`\tilde y` is the step of Euler. A last step to t = 1 is that of Euler: where :math:`\sigma'=0` it is
    :math:`d(\hat y,\hat\sigma)`.
    :math:`\gamma=\min(\text{churn}/N,\sqrt2-1)` in N steps, where :math:`\sigma` is in ``between`` and
    :math:`\hat\sigma` is not above the noise of the start, else 0. Two evaluations per step.

    Args:
        data: predicts :math:`\mathbb E[x_1\mid x_t]`. x: ``(B, ...)``, the state at ``times[0]``, where a > 0.
        churn: how much noise is put back over all steps; 0 is deterministic.

    Raises:
        DataError: a negative churn, a bad grid, or a = 0 in it.

    Source: Karras et al. (2022), algorithm 2, with its S_noise = 1.
    """
    if not (churn >= 0 and math.isfinite(churn)):
        raise DataError(f"churn must be a finite number >= 0, got {churn}: 0 is deterministic.")
    _check_times(times)
    _check_state(x)
    if not torch.compiler.is_compiling() and float(path.a(torch.tensor(times[0], dtype=torch.float64))) == 0:
        raise DataError(f"edm divides by a, which is 0 at t={times[0]:g} of the path {path.name!r}: start later.")
    data = _checked("data", data)
    a, b = _coefficients(path, times, x)
    sigma = b / a
    begin, high, scale = times, sigma, a  # where a step begins once its noise is put back
    if churn > 0:
        begin = _raised(path, tuple(times), min(churn / (len(times) - 1), math.sqrt(2) - 1), between)
        scale, b = _coefficients(path, begin, x)
        high = b / scale
    noise = _noise(x, len(times) - 1 if churn > 0 else 0, generator)
    y = x / a[0]
    for i, _, end in _steps(times, progress):
        if churn > 0:
            y = y + (high[i] ** 2 - sigma[i] ** 2).clamp_min(0).sqrt() * noise(i)
        slope = (y - data(scale[i] * y, begin[i])) / high[i]
        h = sigma[i + 1] - high[i]
        guess = y + h * slope
        if i == len(times) - 2 and end == 1:
            y = guess
        else:
            y = y + h / 2 * (slope + (guess - data(a[i + 1] * guess, end)) / sigma[i + 1])
        if callback is not None:
            callback(i, end, a[i + 1] * y)
    return a[-1] * y


# --- stochastic samplers ---------------------------------------------------------------------------------


def _forward_variance(a: Tensor, b: Tensor, i: int) -> Tensor:
    """Variance of x at time i given x at time i + 1: noising goes from the later, cleaner time to the earlier."""
    return (b[i] ** 2 - (a[i] / a[i + 1] * b[i + 1]) ** 2).clamp_min(0)


def _posterior_std(a: Tensor, b: Tensor, i: int) -> Tensor:
    """Standard deviation of x at time i + 1 given x at time i and the data."""
    return _forward_variance(a, b, i).sqrt() * b[i + 1] / b[i]


def _posterior_mean(a: Tensor, b: Tensor, i: int, x: Tensor, d: Tensor) -> Tensor:
    """Mean of x at time i + 1 given x at time i and the data."""
    variance = _forward_variance(a, b, i)
    return a[i] / a[i + 1] * (b[i + 1] / b[i]) ** 2 * x + a[i + 1] * variance / b[i] ** 2 * d


def ancestral(
    path: Path,
    data: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    variance: str = "posterior",
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Ancestral sampling of the discrete diffusion model (DDPM) whose steps are those of the grid.

    With :math:`\alpha=a/a'` and the variance of one noising step :math:`\beta=b^2-\alpha^2b'^2`,

    .. math:: x'=\frac{\alpha b'^2}{b^2}\,x+\frac{a'\beta}{b^2}\,d+\sigma z,\qquad
              \sigma^2=\frac{b'^2}{b^2}\beta\ \text{(posterior)}\quad\text{or}\quad\beta\ \text{(forward)}

    which are the two extremes, right for data of one point and for standard normal data. No noise at the last step.

    Args:
        data: predicts :math:`\mathbb E[x_1\mid x_t]`. x: ``(B, ...)``, the state at ``times[0]``.

    Raises:
        DataError: unknown variance, or a bad grid.

    Source: Ho, Jain and Abbeel (2020), equations 6, 7 and 11, and section 3.2.
    """
    if variance not in VARIANCES:
        raise DataError(unknown("variance", variance, VARIANCES))
    _check_times(times)
    _check_state(x)
    data = _checked("data", data)
    a, b = _coefficients(path, times, x)
    last = len(times) - 2
    noise = _noise(x, last, generator)
    for i, t, end in _steps(times, progress):
        x = _posterior_mean(a, b, i, x, data(x, t))
        if i < last:
            std = _posterior_std(a, b, i) if variance == "posterior" else _forward_variance(a, b, i).sqrt()
            x = x + std * noise(i)
        if callback is not None:
            callback(i, end, x)
    return x


def sde(
    path: Path,
    score: Field,
    velocity: Field | None,
    x: Tensor,
    times: Sequence[float],
    *,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Euler-Maruyama for the family of SDEs that share the marginals of the path.

    .. math:: dx=\Big[u(x,t)+\tfrac12(\kappa g)^2 s(x,t)\Big]dt+\kappa g\,dW,\qquad
              g^2=2\Big(b^2\frac{\dot a}{a}-b\,\dot b\Big)

    ``noise`` is :math:`\kappa`: 0 gives the probability-flow ODE by Euler's method, 1 the time-reversed diffusion.
    No noise is added at the last step. g is infinite where a = 0: start such a path later than 0, with steps short
    beside a / da (or the first ones are unstable).

    Args:
        velocity: the marginal velocity; from the score where None, which also needs a > 0.
        x: ``(B, ...)``, the state at ``times[0]``.

    Raises:
        DataError: negative noise, a bad grid, or a = 0 in it.

    Sources: Anderson (1982); Song et al. (2021); Karras et al. (2022), equation 6.
    """
    if not (noise >= 0 and math.isfinite(noise)):
        raise DataError(f"noise must be a finite number >= 0, got {noise}: 0 is the ODE, 1 the reverse SDE.")
    _check_times(times)
    _check_state(x)
    score = _checked("score", score)
    velocity = None if velocity is None else _checked("velocity", velocity)
    last = len(times) - 2
    draw = _noise(x, last if noise > 0 else 0, generator)
    g = torch.zeros(len(times) - 1, dtype=torch.float64, device=x.device)
    if noise > 0:  # on the host, where an infinite g is seen
        g = noise * path.diffusion(torch.tensor(times[:-1], dtype=torch.float64)).to(x.device)
    for i, t, end in _steps(times, progress):
        h = end - t
        s = score(x, t) if noise > 0 or velocity is None else torch.zeros_like(x)
        u = path.convert(s, x, t, source="score", target="velocity") if velocity is None else velocity(x, t)
        x = x + h * (u + g[i] ** 2 / 2 * s)
        if noise > 0 and i < last:
            x = x + g[i] * math.sqrt(h) * draw(i)
        if callback is not None:
            callback(i, end, x)
    return x


def predictor_corrector(
    path: Path,
    score: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    snr: float = 0.16,
    corrector_steps: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""At each time some Langevin steps (the corrector), then an ancestral step to the next time (the predictor).

    .. math:: x\leftarrow x+\epsilon\,s(x,t)+\sqrt{2\epsilon}\,z,\qquad\epsilon=2\,(r\,b(t))^2

    In the original :math:`\epsilon=2(r\lVert z\rVert/\lVert s\rVert)^2` with norms averaged over the batch, which
    makes a sample depend on its batch. Here the ratio is :math:`b(t)`, what it is for data of one point, and the
    step is below :math:`2r^2` of the smallest variance. No noise is added at the last step of the predictor.

    Args:
        snr: r. corrector_steps: 0 leaves the predictor. x: ``(B, ...)``, the state at ``times[0]``, where a > 0.

    Raises:
        DataError: snr not positive, a negative number of steps, a bad grid, or a = 0 in it.

    Source: Song et al. (2021), algorithms 2 to 5.
    """
    if not snr > 0 or corrector_steps < 0:
        raise DataError(f"Needs snr > 0 and corrector_steps >= 0, got snr={snr}, corrector_steps={corrector_steps}.")
    _check_times(times)
    _check_state(x)
    score = _checked("score", score)
    a, b = _coefficients(path, times, x)
    last, per_step = len(times) - 2, 1 + corrector_steps
    noise = _noise(x, (last + 1) * per_step, generator)
    for i, t, end in _steps(times, progress):
        step = 2 * (snr * b[i]) ** 2
        for j in range(corrector_steps):
            x = x + step * score(x, t) + (2 * step).sqrt() * noise(i * per_step + j)
        d = path.convert(score(x, t), x, t, source="score", target="data")
        x = _posterior_mean(a, b, i, x, d)
        if i < last:
            x = x + _posterior_std(a, b, i) * noise(i * per_step + corrector_steps)
        if callback is not None:
            callback(i, end, x)
    return x


# --- Langevin dynamics -----------------------------------------------------------------------------------


def langevin(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
    metropolis: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Langevin dynamics in the density whose score is given.

    .. math:: x'=x+h\,s(x)+\sqrt{2h}\,z

    Unadjusted, its stationary law is off by O(h): for N(0, v) it is N(0, v / (1 - h/2v)). With ``metropolis``,
    the log-density up to a constant, each move is a proposal, accepted with the probability of Metropolis and
    Hastings (MALA), which makes the law exact; a rejected row stays as it is.

    Args:
        score: ``(B, ...) -> (B, ...)``. metropolis: ``(B, ...) -> (B,)``. step: h.
        callback: its time is that of the diffusion, ``(i + 1) * step``.

    Raises:
        DataError: a step that is not positive, or no steps.

    Sources: Roberts and Tweedie (1996); Neal (2011).
    """
    if not (step > 0 and math.isfinite(step)) or steps < 1:
        raise DataError(f"langevin needs step > 0 and steps >= 1, got step={step}, steps={steps}.")
    _check_state(x)
    field = _checked("score", lambda y, _: score(y))
    # One column more than x has: its distribution function at a normal number is the uniform of the acceptance.
    dims = math.prod(x.shape[1:])
    noise = _noise(x.new_empty(len(x), dims + (metropolis is not None)), steps, generator)
    s = field(x, 0.0)
    log_p = None if metropolis is None else _log_density(metropolis, x)
    for i, _, time in _steps([k * step for k in range(steps + 1)], progress):
        z = noise(i)
        new = x + step * s + math.sqrt(2 * step) * z[:, :dims].reshape(x.shape)
        new_s = field(new, 0.0)
        if metropolis is not None and log_p is not None:
            new_log_p = _log_density(metropolis, new)
            there = ((new - x - step * s) ** 2).flatten(1).sum(1)
            back = ((x - new - step * new_s) ** 2).flatten(1).sum(1)
            accept = torch.special.log_ndtr(z[:, -1]) < new_log_p - log_p + (there - back) / (4 * step)
            log_p = torch.where(accept, new_log_p, log_p)
            new, new_s = torch.where(_rows(accept, x), new, x), torch.where(_rows(accept, x), new_s, s)
        x, s = new, new_s
        if callback is not None:
            callback(i, time, x)
    return x


def _log_density(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = log_density(x)
    if value.shape != x.shape[:1]:
        raise DataError(f"A log-density must be of shape (B,) = {tuple(x.shape[:1])}, got {tuple(value.shape)}.")
    return value


def annealed_langevin(
    score: Field,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    step: float = 0.1,
    steps: int = 100,
    generator: torch.Generator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    r"""Langevin dynamics in data blurred by less and less noise.

    For each :math:`\sigma` of a decreasing list, ``steps`` times

    .. math:: x'=x+h\sigma^2s(x,\sigma)+\sqrt{2h}\,\sigma z

    and last :math:`x+\sigma^2s(x,\sigma)`, the mean of the data given x at the smallest noise.

    Args:
        score: ``(x, sigma)``, the score of the data plus N(0, sigma^2). step: h, in units of sigma^2 (the step of the
            source, divided by twice its smallest sigma squared: 0.1 there).
        x: ``(B, ...)``, about as wide as the first sigma. callback: once per sigma, which is its time.

    Raises:
        DataError: sigmas that are not positive and decreasing, a step that is not positive, or no steps.

    Sources: Song and Ermon (2019), algorithm 1; the last step: Jolicoeur-Martineau et al. (2021).
    """
    if not sigmas or min(sigmas) <= 0 or any(s <= t for s, t in itertools.pairwise(sigmas)):
        raise DataError(f"sigmas must be positive and strictly decreasing, got {[round(s, 6) for s in sigmas[:6]]}.")
    if not (step > 0 and math.isfinite(step)) or steps < 1:
        raise DataError(f"annealed_langevin needs step > 0 and steps >= 1, got step={step}, steps={steps}.")
    _check_state(x)
    score = _checked("score", score)
    noise = _noise(x, len(sigmas) * steps, generator)
    for i, sigma, _ in _steps([*sigmas, 0.0], progress):
        for j in range(steps):
            x = x + step * sigma**2 * score(x, sigma) + math.sqrt(2 * step) * sigma * noise(i * steps + j)
        if i == len(sigmas) - 1:
            x = x + sigma**2 * score(x, sigma)
        if callback is not None:
            callback(i, sigma, x)
    return x


# --- likelihood ------------------------------------------------------------------------------------------


def log_prob(
    velocity: Field,
    x: Tensor,
    times: Sequence[float],
    *,
    divergence: str = "exact",
    probes: int = 1,
    method: str = "rk4",
    prior_std: float = 1.0,
    base: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    unit: str = "nats",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    progress: bool = False,
) -> Tensor:
    r"""Log-density of data under a flow, by the instantaneous change of variables.

    .. math:: \log p_1(x)=\log p_0(x_0)-\int_0^1\nabla\!\cdot u(x_t,t)\,dt

    along the trajectory of :func:`ode` from x at ``times[-1]`` back to ``times[0]``. The exact divergence costs one
    backward pass per dimension; Hutchinson's estimate :math:`v^\top(\partial u/\partial x)v` one per probe, with
    probes v fixed along the trajectory: it is unbiased, and has the smaller variance with Rademacher probes.

    Args:
        x: ``(B, ...)``. times: increasing. method, rtol, atol: as in :func:`ode`.
        divergence: ``"exact"``, or Hutchinson's with ``probes`` probes that are ``"gaussian"`` or ``"rademacher"``.
        prior_std: of the N(0, prior_std^2 I) at ``times[0]``; ``base`` is another log-density ``(B, ...) -> (B,)``.
        unit: ``"nats"``, the log-density; ``"bits/dim"``, minus it by D log 2, per dimension of x as it is.

    Returns:
        ``(B,)``. Differentiable, unless under ``torch.no_grad()``.

    Raises:
        DataError: unknown names, no probes, a bad grid or prior_std, a velocity without derivative.

    Sources: Chen et al. (2018), theorem 1; Grathwohl et al. (2019); Hutchinson (1990).
    """
    if divergence not in DIVERGENCES:
        raise DataError(unknown("divergence", divergence, DIVERGENCES))
    if unit not in ("nats", "bits/dim"):
        raise DataError(unknown("unit", unit, ("nats", "bits/dim")))
    if probes < 1 or not prior_std > 0:
        raise DataError(f"log_prob needs probes >= 1 and prior_std > 0, got probes={probes}, prior_std={prior_std}.")
    _check_times(times)
    _check_state(x)
    velocity = _checked("velocity", velocity)
    directions = None
    if divergence != "exact":
        directions = torch.stack([draw(j) for draw in [_noise(x, probes, generator)] for j in range(probes)], 1)
        if divergence == "rademacher":
            directions = torch.where(directions < 0, -1.0, 1.0).to(x)

    def extended(state: Tensor, t: float) -> Tensor:
        u, d = value_and_divergence(lambda y: velocity(y, t), state[:, :-1].reshape(x.shape), directions)
        return torch.cat([u.flatten(1), d.unsqueeze(1)], 1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    state = ode(extended, state, list(reversed(times)), method=method, rtol=rtol, atol=atol, progress=progress)
    start, change = state[:, :-1].reshape(x.shape), state[:, -1]
    if base is None:
        log_p = gaussian_log_prob(start, torch.zeros_like(start), prior_std).flatten(1).sum(1) + change
    else:
        log_p = _log_density(base, start) + change
    return log_p if unit == "nats" else bits_per_dim(log_p, math.prod(x.shape[1:]))

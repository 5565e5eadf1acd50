"""The field model against exact predictors: floors, minimizers, bounds, guidance, samples and densities."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from torch import Tensor, nn

import nblib as nb
from nblib import paths
from nblib.data import toy
from nblib.data.sets import Split
from nblib.data.toy import GaussianMixture
from nblib.errors import DataError
from nblib.field import (
    METHODS,
    TIMES,
    FieldModel,
    error_unit,
    fixed_time,
    half_log_snr_rate,
    optimal_transport,
    pack,
    time_grid,
)
from nblib.networks import TimeMLP
from nblib.paths import PREDICTIONS, posterior_mean

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(mean: float, std: float, dim: int = 1) -> GaussianMixture:
    return GaussianMixture(torch.full((1, dim), mean, dtype=DOUBLE), torch.tensor([std], dtype=DOUBLE))


MIX = GaussianMixture(
    torch.tensor([[1.0, 0.5], [-1.0, -0.5]], dtype=DOUBLE),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]], dtype=DOUBLE),
    torch.tensor([0.3, 0.7], dtype=DOUBLE),
)


class Exact(nn.Module):
    """The perfect network for known data, plus a constant that should be zero."""

    def __init__(self, mixture: GaussianMixture, path: paths.Path, kind: str) -> None:
        super().__init__()
        self.mixture, self.path, self.kind = mixture, path, kind
        self.offset = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return posterior_mean(self.mixture, self.path, x, t, to=self.kind) + self.offset


def exact(mixture: GaussianMixture, path: str = "linear", predict: str = "velocity", **options: Any) -> FieldModel:
    there = paths.make(path)
    return FieldModel(Exact(mixture, there, predict), there, shape=(mixture.dim,), predict=predict, **options)


class Recorder(nn.Module):
    """Remembers what it was given and answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=DOUBLE))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, condition))
        return 0 * x + self.unused


def losses(model: FieldModel, mixture: GaussianMixture, calls: int = 100, batch: int = 500) -> Tensor:
    g = seeded(5)
    with torch.no_grad():
        return torch.stack([model(mixture.sample(batch, generator=g), generator=g).loss for _ in range(calls)])


# --- times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("path", ["ve", "vp"])
def test_the_density_of_the_times_is_the_derivative_of_their_quantiles(name: str, path: str) -> None:
    times, span, where = TIMES[name], (0.1, 0.9), paths.make(path)
    assert times.density is not None
    u, h = torch.linspace(0.2, 0.8, 13, dtype=DOUBLE), 1e-5
    if name == "edm":
        span = (0.0, 1.0) if path == "ve" else (0.0, 1 - 1e-3)
    t = times.quantile(u, where, span)
    slope = (times.quantile(u + h, where, span) - times.quantile(u - h, where, span)) / (2 * h)
    assert ((t > span[0]) & (t < span[1])).all()
    nb.check("density", times.density(t, where, span) * slope, 1.0, atol=1e-5)


def test_the_distributions_of_times_are_those_of_their_names() -> None:
    n, g = 20_000, seeded()
    draw = lambda name: TIMES[name].draw(n, paths.ve(0.002, 80.0), like=torch.zeros(1, dtype=DOUBLE), generator=g)  # noqa: E731
    nb.check_mc("uniform", draw("uniform"), 0.5)
    logit = draw("logit-normal").logit()
    nb.check_mc("logit", torch.stack([logit, logit**2], 1), [0.0, 1.0])
    log_sigma = 0.5 * -paths.ve(0.002, 80.0).log_snr(draw("edm"))
    nb.check_mc("edm", torch.stack([log_sigma, (log_sigma + 1.2) ** 2], 1), [-1.2, 1.44])
    grid = time_grid(4, last=0.75).draw(n, paths.linear(), like=torch.zeros(1), generator=g)
    assert grid.unique().tolist() == [0.0, 0.25, 0.5, 0.75]
    nb.check_mc("grid", (grid.unsqueeze(1) == grid.unique()).double(), 0.25)


def test_low_discrepancy_times_lower_the_variance_of_a_mean_to_one_over_n_squared() -> None:
    def variance(name: str, n: int) -> float:
        g = seeded(1)
        like = torch.zeros(1, dtype=DOUBLE)
        means = [TIMES[name].draw(n, paths.linear(), like=like, generator=g).exp().mean() for _ in range(2000)]
        return float(torch.stack(means).var())

    slopes = {n: math.log(variance(n, 64) / variance(n, 8)) / math.log(8) for n in ("uniform", "low-discrepancy")}
    assert abs(slopes["uniform"] + 1) < 0.1
    assert abs(slopes["low-discrepancy"] + 2) < 0.1
    firsts = torch.stack(
        [TIMES["low-discrepancy"].draw(7, paths.linear(), like=torch.rand(1), generator=seeded(i)) for i in range(3000)]
    )
    nb.check_mc("every u is uniform", torch.stack([firsts, firsts**2], -1), [0.5, 1 / 3])


# --- the loss --------------------------------------------------------------------------------------------


def floor(path: str, predict: str, std: float, span: tuple[float, float]) -> float:
    """The loss of the perfect predictor of N(m, std^2): the mean posterior variance, by quadrature."""

    def variance(t: float) -> float:
        time = torch.tensor([t], dtype=DOUBLE)
        a, b, *_ = paths.make(path).coefficients(time, time)
        data = std**2 * b**2 / (a**2 * std**2 + b**2)
        unit = error_unit(paths.make(path), time, predict) / b
        return float(unit**2 * data)

    return quad(variance, *span, limit=200)[0] / (span[1] - span[0])


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("path", ["linear", "vp", "trigonometric"])
def test_the_loss_of_the_exact_predictor_is_the_posterior_variance(path: str, predict: str) -> None:
    span = (0.05, 0.95)
    model, data = exact(gaussian(0.7, 0.5), path, predict, span=span), gaussian(0.7, 0.5)
    nb.check_mc("floor", losses(model, data), floor(path, predict, 0.5, span))


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_any_perturbation_of_the_exact_predictor_of_a_mixture_raises_the_loss(predict: str) -> None:
    model = exact(MIX, "vp-cosine", predict, span=(0.05, 0.95))
    assert isinstance(model.network, Exact)
    pull = []
    for i in range(60):
        model.zero_grad()
        model(MIX.sample(500, generator=seeded(i)), generator=seeded(100 + i)).loss.backward()
        assert model.network.offset.grad is not None
        pull.append(model.network.offset.grad.clone())
    nb.check_mc("stationary", torch.stack(pull), 0.0)
    best = losses(model, MIX, 40)
    for offset in (-0.3, 0.3):
        model.network.offset.data.fill_(offset)
        worse = losses(model, MIX, 40)
        nb.check_mc("raised by the square", worse - best, 2 * offset**2)
        assert worse.mean() > best.mean()


def test_flow_matching_and_conditional_flow_matching_have_one_gradient() -> None:
    """A linear field k x + d: its gradient from pairs, against that towards the marginal field, by quadrature."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.d = (nn.Parameter(torch.tensor(v, dtype=DOUBLE)) for v in (0.4, -0.3))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.k * x + self.d

    mean, std, path = 0.7, 0.5, paths.linear()
    data = gaussian(mean, std)
    nodes, weights = (torch.from_numpy(v) for v in hermegauss(40))
    weights = weights / weights.sum()

    def marginal(t: float) -> tuple[float, float]:
        x = t * mean + math.sqrt(t**2 * std**2 + (1 - t) ** 2) * nodes
        gap = 0.4 * x - 0.3 - posterior_mean(data, path, x.unsqueeze(1), t, to="velocity").squeeze(1)
        return float((weights * 2 * gap * x).sum()), float((weights * 2 * gap).sum())

    expected = [quad(lambda t, i=i: marginal(t)[i], 0, 1)[0] for i in (0, 1)]
    model, found = FieldModel(Linear(), "linear", shape=(1,), predict="velocity"), []
    for i in range(200):
        model.zero_grad()
        model(data.sample(500, generator=seeded(i)), generator=seeded(1000 + i)).loss.backward()
        found.append(torch.stack([p.grad.clone() for p in model.parameters() if p.grad is not None]))
    nb.check_mc("one gradient", torch.stack(found), expected)


class Converted(nn.Module):
    """One data predictor, told as another prediction."""

    def __init__(self, body: nn.Module, path: paths.Path, kind: str) -> None:
        super().__init__()
        self.body, self.path, self.kind = body, path, kind

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.path.convert(self.body(x, t, condition), x, t, source="data", target=self.kind)


@pytest.mark.parametrize("path", ["linear", "vp", "sub-vp", "ve"])
@pytest.mark.parametrize("weight", ["likelihood", *PREDICTIONS])
def test_the_four_predictions_have_equal_losses_and_gradients_after_reweighting(path: str, weight: str) -> None:
    where, results = paths.make(path), []
    torch.manual_seed(1)
    body = TimeMLP(2, hidden=8, layers=1).double()
    for p in body.parameters():
        nn.init.normal_(p, std=0.3)
    for kind in PREDICTIONS:
        model = FieldModel(
            Converted(body, where, kind), where, shape=(2,), predict=kind, weight=weight, span=(0.05, 0.95)
        )
        model.zero_grad()
        out = model(MIX.sample(50, generator=seeded()), generator=seeded(1))
        out.loss.backward()
        grads = [p.grad.clone().flatten() for p in model.parameters() if p.grad is not None]
        results.append(torch.cat([out.loss.detach().reshape(1), *grads]))
    assert results[0].abs().max() > 1e-3
    for other in results[1:]:
        nb.check("reweighted", other / results[0].abs().max(), results[0] / results[0].abs().max(), atol=1e-8)


def test_an_own_weight_multiplies_the_squared_error() -> None:
    model, one = (exact(MIX, weight=w) for w in (lambda t: 3 + 0 * t, "simple"))
    x = MIX.sample(20, generator=seeded())
    nb.check("weight", model(x, generator=seeded()).loss, 3 * one(x, generator=seeded()).loss)


def test_the_quadratic_objective_is_the_regression_without_its_constant() -> None:
    x, found = MIX.sample(50, generator=seeded()), []
    for objective in ("regression", "quadratic"):
        model = exact(MIX, objective=objective)
        loss = model(x, generator=seeded(1)).loss
        loss.backward()
        assert isinstance(model.network, Exact)
        assert model.network.offset.grad is not None
        found.append((loss.detach(), model.network.offset.grad))
    x0 = torch.randn(x.shape, dtype=DOUBLE, generator=seeded(1))
    nb.check("constant", found[0][0] - found[1][0], (x - x0).square().sum(1).mean())
    nb.check("gradient", found[0][1], found[1][1], atol=1e-10)


# --- likelihood -------------------------------------------------------------------------------------------


def kl(mean: float, std: float, other_mean: float, other_std: float) -> float:
    return float(
        nb.probability.gaussian_kl(*(torch.tensor([v], dtype=DOUBLE) for v in (mean, std, other_mean, other_std)))
    )


@pytest.mark.parametrize(
    ("path", "predict", "times"),
    [
        ("vp", "noise", "uniform"),
        ("vp", "score", "low-discrepancy"),
        ("linear", "velocity", "logit-normal"),
        ("trigonometric", "data", "uniform"),
        ("ve", "data", "edm"),
    ],
)
def test_the_likelihood_weight_turns_the_excess_loss_into_a_kl_divergence(path: str, predict: str, times: str) -> None:
    """Data p, a perfect model of q: excess = KL(p, q) at the end of the span minus KL at its start."""
    p, q, where = (0.7, 0.5), (0.2, 0.8), paths.make(path)
    span = (0.05, 0.95) if path != "ve" else (0.3, 1.0)
    data, other = gaussian(*p), gaussian(*q)
    if times == "edm":
        times_ = nb.field.log_normal_sigma(-1.0, 1.5)
        # What falls outside the span is a point mass at its ends, which the density does not know.
        span = (0.0, 1.0)
    else:
        times_ = TIMES[times]

    def at(which: tuple[float, float], t: float) -> tuple[float, float]:
        time = torch.tensor([t], dtype=DOUBLE)
        a, b, *_ = (float(v) for v in where.coefficients(time, time))
        return a * which[0], math.hypot(a * which[1], b)

    options: dict[str, Any] = dict(weight="likelihood", times=times_, span=span)
    right, wrong = (exact(m, path, predict, **options) for m in (data, other))
    excess = losses(wrong, data, 200) - losses(right, data, 200)
    expected = kl(*at(p, span[1]), *at(q, span[1])) - kl(*at(p, span[0]), *at(q, span[0]))
    assert expected > 0.05
    nb.check_mc("excess", excess, expected)
    with pytest.raises(nb.errors.CheckFailed):
        nb.check_mc("excess", excess, 2 * expected)


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_the_bound_is_that_of_its_integral_and_below_the_log_density(path: str) -> None:
    std, where = 0.5, paths.make(path)
    model, data = exact(gaussian(0.7, std), path, "noise"), gaussian(0.7, std)
    x = data.sample(4000, generator=seeded())
    with torch.no_grad():
        bound = model.bound(x, 64, generator=seeded(1))
    span = (1e-3 if path == "linear" else 0.0, 1 - 1e-3)

    def integrand(t: float) -> float:
        time = torch.tensor([t], dtype=DOUBLE)
        a, b, *_ = where.coefficients(time, time)
        return float(half_log_snr_rate(where, time) * a**2 * std**2 / (a**2 * std**2 + b**2))

    start, end = (where.coefficients(torch.tensor([s], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)) for s in span)
    b0 = where.prior_std
    square = float(start[0]) ** 2 * (0.7**2 + std**2) + float(start[1]) ** 2
    prior = 0.5 * (square / b0**2 - 1 - 2 * math.log(float(start[1]) / b0))
    reconstruction = 0.5 * (1 + math.log(2 * math.pi)) + math.log(float(end[1] / end[0]))
    expected = -prior - quad(integrand, *span, limit=400, points=[0.99])[0] - reconstruction
    nb.check_mc("bound", bound, expected)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(std)
    assert expected < -entropy
    assert expected > -entropy - 1e-3


@pytest.mark.parametrize("predict", ["velocity", "noise"])
def test_log_prob_of_the_exact_predictor_is_that_of_the_mixture(predict: str) -> None:
    path = "linear" if predict == "velocity" else "vp"
    model, x = exact(MIX, path, predict), MIX.sample(20, generator=seeded())
    at_end = MIX if predict == "velocity" else paths.marginal(MIX, paths.make(path), 1 - 1e-3)
    with torch.no_grad():
        found = model.log_prob(x, steps=60)
    # The VP path starts at a(0) = 0.007 instead of 0.
    nb.check("log p", found, at_end.log_prob(x), atol=1e-4 if predict == "velocity" else 1e-2)
    with pytest.raises(nb.errors.CheckFailed):
        nb.check("log p", found, 1.05 * at_end.log_prob(x), atol=1e-2)


def test_log_prob_and_bound_are_in_the_units_of_the_data() -> None:
    wide = GaussianMixture(3 * MIX.means + 5, 9 * MIX.covs, MIX.weights)
    model = exact(MIX, centre=5.0, scale=3.0)
    x = wide.sample(10, generator=seeded())
    with torch.no_grad():
        nats, bits = model.log_prob(x, steps=40), model.log_prob(x, steps=40, unit="bits/dim")
        plain = exact(MIX)
        shift = model.bound(x, generator=seeded()) - plain.bound((x - 5) / 3, generator=seeded())
    nb.check("nats", nats, wide.log_prob(x), atol=1e-3)
    nb.check("bits", bits, -nats / (2 * math.log(2)), atol=1e-9)
    nb.check("bound", shift, -2 * math.log(3), atol=1e-9)


# --- couplings ----------------------------------------------------------------------------------------------


def test_the_optimal_coupling_is_the_best_of_all_permutations() -> None:
    x0, x1 = (torch.randn(6, 2, generator=seeded(s), dtype=DOUBLE) for s in (0, 1))
    cost = lambda z: float((z - x1).square().sum())  # noqa: E731
    best = min(cost(x0[list(p)]) for p in itertools.permutations(range(6)))
    nb.check("optimum", cost(optimal_transport(x0, x1)), best, atol=1e-12)
    assert best < cost(x0)


def test_a_model_with_optimal_transport_keeps_all_targets_and_all_noises() -> None:
    model = FieldModel(Recorder(), "linear", shape=(2,), predict="velocity", coupling="ot", times=fixed_time(0.25))
    plain = copy.deepcopy(model)
    plain.coupling = "independent"
    x = MIX.sample(64, generator=seeded())
    loss, other = (m(x, generator=seeded(1)).loss.detach() for m in (model, plain))
    assert isinstance(model.network, Recorder)
    point, t, _ = model.network.calls[0]
    noise = torch.randn(64, 2, dtype=DOUBLE, generator=seeded(1))
    used = (point - 0.25 * x) / 0.75
    nb.check("noises", used.sort(0).values, noise.sort(0).values, atol=1e-12)
    assert float(loss) < 0.8 * float(other)  # with a zero network the loss is the transport cost
    assert t.eq(0.25).all()


def test_optimal_transport_within_classes_leaves_the_noise_of_each_class_its_own() -> None:
    x0, x1 = (torch.randn(40, 2, generator=seeded(s)) for s in (0, 1))
    labels = torch.arange(40) % 3
    moved = optimal_transport(x0, x1, labels)
    for label in range(3):
        mine = labels == label
        nb.check("same noises", moved[mine].sort(0).values, x0[mine].sort(0).values)
    assert (moved - x1).square().sum() < (x0 - x1).square().sum()


def test_pairs_are_used_as_they_are_in_every_form() -> None:
    x0, x1, y = MIX.sample(8, generator=seeded()), MIX.sample(8, generator=seeded(1)), torch.arange(8) % 3
    options: dict[str, Any] = dict(shape=(2,), predict="velocity", coupling="pairs", times=fixed_time(0.5))
    model = FieldModel(Recorder(), "linear", **options)
    for batch in ((x0, x1), torch.stack([x0, x1], 1)):
        nb.check("loss", model(batch).loss, (x1 - x0).square().sum(1).mean())
        assert isinstance(model.network, Recorder)
        nb.check("point", model.network.calls[-1][0], (x0 + x1) / 2)
    labelled = FieldModel(Recorder(), "linear", classes=3, drop=0.0, **options)
    for with_labels in ((x0, x1, y), (torch.stack([x0, x1], 1), y), pack(torch.stack([x0, x1], 1), y)):
        nb.check("loss", labelled(with_labels).loss, (x1 - x0).square().sum(1).mean())
        assert isinstance(labelled.network, Recorder)
        condition = labelled.network.calls[-1][2]
        assert condition is not None
        assert condition.tolist() == y.tolist()


# --- conditions and guidance ----------------------------------------------------------------------------------


class ByClass(nn.Module):
    """The exact score of N(m_c, s_c^2) for class c, and of the mixture for -1."""

    def __init__(self, mixture: GaussianMixture, path: paths.Path) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))
        self.mixture, self.path = mixture, path

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is not None
        parts = [
            GaussianMixture(self.mixture.means[[c]], self.mixture.covs[[c]]) for c in range(len(self.mixture.means))
        ]
        choices = torch.stack([posterior_mean(m, self.path, x, t, to="score") for m in [*parts, self.mixture]])
        return choices[condition, torch.arange(len(x))] + 0 * self.anchor


def conditional(path: str = "vp") -> FieldModel:
    there = paths.make(path)
    return FieldModel(ByClass(MIX, there), there, shape=(2,), predict="score", classes=2)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, -0.5])
@pytest.mark.parametrize("t", [0.3, 0.8])
def test_the_guided_score_is_that_of_the_tilted_density(w: float, t: float) -> None:
    """p(x)^(1 - w) p(x|c)^w, by automatic differentiation of the exact log-densities."""
    model, x = conditional(), torch.randn(7, 2, dtype=DOUBLE, generator=seeded())
    there = paths.marginal(MIX, paths.vp(), t)
    c = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    point = x.clone().requires_grad_()
    joint = torch.stack([GaussianMixture(there.means[[k]], there.covs[[k]]).log_prob(point) for k in range(2)])
    tilted = (1 - w) * there.log_prob(point) + w * joint[c, torch.arange(7)]
    (expected,) = torch.autograd.grad(tilted.sum(), point)
    nb.check("cfg", model.predict(x, t, "score", condition=c, guidance=w), expected, atol=1e-8)

    def classifier(z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        at = paths.marginal(MIX, paths.vp(), float(time[0]))
        logits = torch.stack([GaussianMixture(at.means[[k]], at.covs[[k]]).log_prob(z) for k in range(2)], 1)
        return (logits + MIX.weights.log()).log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)

    guided = exact(MIX, "vp", "noise")  # an unconditional model and a classifier
    found = guided.predict(x, t, "score", condition=c, guidance=w, classifier=classifier)
    nb.check("classifier", found, expected, atol=1e-8)
    nb.check("data", guided.path.convert(found, x, t, source="score", target="data"),
             guided.predict(x, t, "data", condition=c, guidance=w, classifier=classifier), atol=1e-8)  # fmt: skip


def test_guided_gaussians_give_the_gaussian_of_the_product() -> None:
    """Two Gaussians of one variance at one time: the tilted density is the Gaussian with mean (1 - w) m + w m_c."""
    model, x, t, w = conditional(), torch.randn(5, 2, dtype=DOUBLE, generator=seeded()), 0.5, 3.0
    assert isinstance(model.network, ByClass)
    model.network.mixture = GaussianMixture(MIX.means, torch.tensor([0.4, 0.4], dtype=DOUBLE))
    zero, one = (model.predict(x, t, condition=c) for c in (0, 1))
    a, b, *_ = (float(v) for v in model.path.coefficients(t, x[0]))
    expected = (a * ((1 - w) * MIX.means[0] + w * MIX.means[1]) - x) / (a**2 * 0.16 + b**2)
    nb.check("product", zero + w * (one - zero), expected, atol=1e-9)


def test_conditional_samples_follow_their_class_and_no_condition_the_mixture() -> None:
    model = conditional()
    labels = torch.arange(2000) % 2
    x = model.sample(2000, condition=labels, steps=40, method="heun", generator=seeded())
    for c in (0, 1):
        nb.check_mc("class", x[labels == c], MIX.means[c], z=5)
    free = model.sample(2000, steps=40, method="heun", generator=seeded())
    nb.check_mc("mixture", free, MIX.mean, z=5)
    nb.check("-1", model.sample(3, condition=-1, generator=seeded()), model.sample(3, generator=seeded()))


def test_labels_are_dropped_in_training_only_and_as_often_as_asked() -> None:
    model = FieldModel(Recorder(), "linear", shape=(2,), predict="velocity", classes=4, drop=0.25)
    x, y = torch.zeros(20_000, 2, dtype=DOUBLE), torch.arange(20_000) % 4
    model((x, y), generator=seeded())
    model.eval()((x, y), generator=seeded())
    assert isinstance(model.network, Recorder)
    train, held_out = (c[2] for c in model.network.calls)
    assert train is not None
    assert held_out is not None
    nb.check_mc("drop", (train == -1).double(), 0.25)
    assert (train[train >= 0] == y[train >= 0]).all()
    assert (held_out == y).all()


# --- samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sample_i_is_a_function_of_the_seed_and_not_of_the_batch(method: str) -> None:
    model = exact(MIX, "vp", "noise")
    options = {"steps": 6} if method != "langevin" else {"steps": 3, "per_level": 5}
    few, many, again, other = (
        model.sample(n, method=method, generator=seeded(s), **options)  # type: ignore[arg-type]
        for n, s in ((3, 1), (7, 1), (3, 1), (3, 2))
    )
    # dopri5 chooses its steps for the whole batch.
    nb.check("batch", many[:3], few, atol=1e-3 if method == "dopri5" else 1e-10)
    assert torch.equal(few, again)
    assert not torch.allclose(few, other)


@pytest.mark.parametrize("path", ["linear", "vp", "vp-cosine", "sub-vp", "trigonometric", "ve"])
@pytest.mark.parametrize("method", ["heun", "multistep", "edm", "ancestral", "sde", "predictor-corrector"])
def test_samples_of_the_exact_predictor_have_the_moments_of_the_data(path: str, method: str) -> None:
    predict = "velocity" if path in ("linear", "trigonometric") else "noise"
    model = exact(MIX, path, predict)
    if path == "ve":
        where = paths.ve(0.01, 20.0)
        model = FieldModel(Exact(MIX, where, predict), where, shape=(2,), predict=predict)
    grid = "uniform" if method == "heun" and path == "vp" else "log-snr"
    x = model.sample(1500, method=method, steps=120, grid=grid, generator=seeded(3))
    gap = x - MIX.mean
    products = gap.unsqueeze(2) * gap.unsqueeze(1)
    nb.check("mean", x.mean(0), MIX.mean, atol=0.12)
    nb.check("covariance", products.mean(0), MIX.cov, atol=0.15)


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_adaptive_steps_end_where_many_fixed_ones_do(path: str) -> None:
    model = exact(MIX, path, "velocity" if path == "linear" else "noise")
    fixed = model.sample(
        20, method="rk4", steps=200, grid="uniform" if path == "linear" else "log-snr", generator=seeded()
    )
    nb.check("dopri5", model.sample(20, method="dopri5", steps=1, generator=seeded()), fixed, atol=5e-3)
    points = MIX.sample(5, generator=seeded())
    one, two = (model.log_prob(points, grid=grid) for grid in ("uniform", "log-snr"))
    nb.check("density", two, one, atol=3e-2)  # of the path at 0.999 where the grid is infinite


def test_annealed_langevin_samples_of_the_exact_predictor_have_the_moments_of_the_data() -> None:
    for path in ("ve", "vp"):
        where = paths.ve(0.02, 5.0) if path == "ve" else paths.vp()
        model = FieldModel(Exact(MIX, where, "score"), where, shape=(2,), predict="score")
        x = model.sample(1000, method="langevin", steps=30, per_level=20, generator=seeded(3))
        nb.check("mean", x.mean(0), MIX.mean, atol=0.15)
        nb.check("covariance", x.T.cov(), MIX.cov, atol=0.2)


def test_transport_carries_given_sources_and_sample_is_transport_of_noise() -> None:
    model = exact(gaussian(0.7, 0.5), centre=1.0, scale=2.0)
    x0 = torch.linspace(-2, 2, 9, dtype=DOUBLE).unsqueeze(1)
    # In the network's units the exact map of N(0, 1) to N(m, s^2) is m + s z.
    nb.check("map", model.transport(1 + 2 * x0, method="rk4", steps=60), 1 + 2 * (0.7 + 0.5 * x0), atol=1e-5)
    noise = torch.stack([torch.randn(1, dtype=DOUBLE, generator=g) for g in [seeded(4)] for _ in range(3)])
    nb.check("sample", model.sample(3, generator=seeded(4)), model.transport(1 + 2 * noise), atol=1e-12)


def test_images_keep_their_shape_and_range_of_units() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.value * x

    images = torch.randint(0, 17, (20, 1, 4, 4), dtype=torch.uint8, generator=seeded())
    split = Split("fake", "train", images, torch.arange(20) % 3, ("a", "b", "c"), 17, 20, "a test")
    model = FieldModel(Shift(), "vp", shape=(1, 4, 4), predict="data", centre=0.5, scale=0.5)
    history = nb.fit(model, split, steps=3, batch_size=10, ema=0.9, eval_data=split, progress=False)
    assert model.sample(2, steps=3).shape == (2, 1, 4, 4)
    nb.check("a data prediction of 0 is the middle grey", FieldModel(Shift(), "vp", shape=(1, 4, 4), predict="data",
             centre=0.5).sample(2, steps=3), 0.5)  # fmt: skip
    assert history.rows
    assert history.evals


# --- training ---------------------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> float:
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * between - within[0] - within[1])


def test_training_reaches_the_floor_and_the_data() -> None:
    data = toy.make("eight-gaussians")
    assert isinstance(data, GaussianMixture)
    x = data.sample(4000, generator=seeded())
    torch.manual_seed(0)
    model = FieldModel(TimeMLP(2, hidden=128, layers=3), "linear", shape=(2,), predict="velocity",
                       times="low-discrepancy")  # fmt: skip
    start = float(losses(model, GaussianMixture(data.means.float(), data.covs.float()), 40).mean())
    history = nb.fit(model, x.float(), steps=800, batch_size=256, lr=3e-3, schedule="cosine", ema=0.99, progress=False,
                     device="cpu")  # fmt: skip
    assert isinstance(history.ema, FieldModel)
    best = float(losses(exact(data), data, 40).mean())
    reached = float(losses(history.ema, GaussianMixture(data.means.float(), data.covs.float()), 40).mean())
    assert best < reached < best + 0.12 * (start - best)
    samples = history.ema.sample(2000, steps=40, generator=seeded(1)).double()
    noise_floor = [
        energy_distance(data.sample(2000, generator=seeded(2 * i)), data.sample(2000, generator=seeded(2 * i + 1)))
        for i in range(5, 15)
    ]
    apart = energy_distance(torch.randn(2000, 2, dtype=DOUBLE, generator=seeded(9)), x[:2000])
    found = energy_distance(samples, data.sample(2000, generator=seeded(50)))
    assert found < max(noise_floor) + 0.03 * apart, (found, noise_floor, apart, reached, best, start)


def test_training_with_packed_labels_learns_the_classes() -> None:
    y = torch.arange(2000) % 2
    x = torch.where(y == 0, -2.0, 2.0).unsqueeze(1) + 0.1 * torch.randn(2000, 1, generator=seeded())
    torch.manual_seed(0)
    model = FieldModel(TimeMLP(1, hidden=32, layers=2, classes=2), "linear", shape=(1,), predict="velocity", classes=2)
    nb.fit(model, pack(x, y), steps=300, batch_size=200, lr=5e-3, progress=False, device="cpu")
    found = model.sample(200, condition=torch.arange(200) % 2, generator=seeded())
    right = found.squeeze(1).sign() == torch.where(torch.arange(200) % 2 == 0, -1.0, 1.0)
    assert right.float().mean() > 0.97
    free = model.sample(400, generator=seeded()).squeeze(1)
    assert 0.3 < (free > 0).float().mean() < 0.7


def test_the_moving_average_of_a_learned_schedule_has_a_schedule_of_its_own() -> None:
    schedule = paths.LearnedSchedule(hidden=8)
    model = FieldModel(TimeMLP(2, hidden=8, layers=1), paths.vp(schedule), shape=(2,), weight="likelihood")
    before = copy.deepcopy(schedule.state_dict())
    history = nb.fit(model, MIX.sample(50).float(), steps=3, batch_size=20, lr=0.01, ema=0.5, progress=False,
                     device="cpu")  # fmt: skip
    assert isinstance(history.ema, FieldModel)
    assert history.ema.path.schedule is history.ema.schedule
    assert history.ema.schedule is not model.schedule
    assert model.path.schedule is schedule
    assert any(not torch.equal(before[k], v) for k, v in schedule.state_dict().items())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("path", "predict", "times", "weight"),
    [
        ("linear", "velocity", "uniform", "simple"),
        ("vp", "noise", "low-discrepancy", "likelihood"),
        ("trigonometric", "data", "logit-normal", "noise"),
        ("vp-cosine", "score", "uniform", "noise"),
        ("ve", "data", "edm", lambda t: 1 + t),
    ],
)
def test_forward_compiles_without_a_break(
    path: str, predict: str, times: str, weight: str | Callable[[Tensor], Tensor]
) -> None:
    torch._dynamo.reset()
    model = FieldModel(TimeMLP(2, hidden=8, layers=1, classes=3), path, shape=(2,), predict=predict, times=times,
                       weight=weight, classes=3)  # fmt: skip
    batch = MIX.sample(16).float(), torch.arange(16) % 3
    fast = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = model(batch).loss
    torch.manual_seed(3)
    nb.check("compiled", fast(batch).loss, expected, atol=1e-4, rtol=1e-4)


# --- bad input ----------------------------------------------------------------------------------------------------


def build(**options: Any) -> FieldModel:
    return FieldModel(Recorder(), **{"path": "linear", "shape": (2,), "predict": "velocity", **options})


X = torch.zeros(4, 2, dtype=DOUBLE)
Y = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "linaer"}, "Did you mean 'linear'"),
        ({"predict": "epsilon"}, "Unknown prediction 'epsilon'"),
        ({"times": "unifrom"}, "Did you mean 'uniform'"),
        ({"weight": "likelyhood"}, "Did you mean 'likelihood'"),
        ({"coupling": "optimal"}, "Unknown coupling 'optimal'"),
        ({"objective": "squares"}, "Unknown objective"),
        ({"weight": "likelihood", "times": fixed_time(0.5)}, "needs times with a density, got 'fixed'"),
        ({"weight": "likelihood", "coupling": "ot"}, "coupling='independent', got 'ot'"),
        ({"shape": ()}, "shape of positive numbers"),
        ({"classes": 0}, "classes=0"),
        ({"drop": 1.5}, "drop=1.5"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"span": (0.9, 0.1)}, "two increasing times"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, lambda m: m(torch.zeros(4, 3)), r"shape \(B, 2\), got \(4, 3\)"),
        ({}, lambda m: m(torch.zeros(0, 2)), r"got \(0, 2\)"),
        ({}, lambda m: m(torch.zeros(4, 2, dtype=torch.uint8)), "divide uint8"),
        ({}, lambda m: m((X, Y)), r"takes batches \(x\), got 2"),
        ({"classes": 3}, lambda m: m(X), r"takes batches \(x, labels\), got 1"),
        ({"classes": 3}, lambda m: m((X, Y[:3])), "condition must be"),
        ({"classes": 3}, lambda m: m((X, X[:, 0])), "condition must be"),
        ({"classes": 2}, lambda m: m((X, Y)), r"Labels must lie in -1..1, got 0..2"),
        ({"coupling": "pairs"}, lambda m: m(X), r"takes batches \(x0, x1\), got 1"),
        ({"coupling": "pairs"}, lambda m: m((X, X[:2])), "as many sources as targets"),
        ({}, lambda m: m.sample(2, condition=1), "has no classes"),
        ({}, lambda m: m.log_prob(X, condition=1), "has no classes"),
        ({}, lambda m: m.bound(X, condition=1), "has no classes"),
        ({}, lambda m: m.bound(X, 0), "k must be at least 1"),
        ({"coupling": "ot"}, lambda m: m.bound(X), "got 'ot'"),
        ({}, lambda m: m.sample(2, guidance=2.0), "needs a model with classes"),
        ({"classes": 3}, lambda m: m.sample(2, guidance=2.0), "and a condition"),
        ({"classes": 3}, lambda m: m.sample(2, condition=3), r"-1..2, got 3..3"),
        ({}, lambda m: m.sample(2, method="huen"), "Did you mean 'heun'"),
        ({}, lambda m: m.sample(0), "n >= 1"),
        ({}, lambda m: m.transport(X, method="ddim"), "Unknown ODE method"),
        ({}, lambda m: m.transport(X[:, :1]), "Expected examples"),
        ({}, lambda m: m.predict(X, 0.5, "epsilon"), "Unknown prediction"),
        ({}, lambda m: m.predict(X[:, :1], 0.5), "Expected points"),
        ({}, lambda m: m.check(torch.zeros(4, 3)), "Expected examples"),
        ({}, lambda m: pack(torch.zeros(4, 2, dtype=torch.uint8), Y), "pack needs"),
        ({}, lambda m: pack(X, Y[:2]), "pack needs"),
        ({}, lambda m: time_grid(1, last=1.0), "n >= 2"),
    ],
)
def test_unusable_calls_are_refused(
    options: dict[str, Any], call: Callable[[FieldModel], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        call(build(**options))


def test_the_printed_model_says_what_it_is() -> None:
    text = repr(build(weight=lambda t: t))
    assert "path='linear', predict='velocity', times='uniform', weight='a function of t'" in text

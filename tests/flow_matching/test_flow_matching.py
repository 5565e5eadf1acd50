"""Flow matching, rectified flow and interpolants on cases with closed forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import flow_matching as fm
from nblib import paths
from nblib.data.toy import GaussianMixture
from nblib.errors import DataError
from nblib.field import FieldModel
from nblib.networks import TimeMLP
from nblib.paths import posterior_mean

DOUBLE = torch.float64
MEAN = torch.tensor([0.7, -0.4], dtype=DOUBLE)
COV = torch.tensor([[0.8, 0.5], [0.5, 0.6]], dtype=DOUBLE)
DATA = GaussianMixture(MEAN.unsqueeze(0), COV.unsqueeze(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    """The marginal velocity of known data, scaled by a number that should be one."""

    def __init__(self, mixture: GaussianMixture = DATA, path: str = "linear") -> None:
        super().__init__()
        self.mixture, self.path = mixture, paths.make(path)
        self.factor = nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.factor * posterior_mean(self.mixture, self.path, x, t, to="velocity")


class Affine(nn.Module):
    """``A x + c`` at every time."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return x @ self.weight.T + self.bias


def test_the_constructors_choose_what_they_say_and_can_be_overruled() -> None:
    network = Exact()
    found = {
        make.__name__: make(network, (2,))
        for make in (fm.cfm, fm.ot_cfm, fm.rectified_flow, fm.interpolant, fm.distill)
    }
    for name, model in found.items():
        assert model.target == "velocity", name
        assert model.span == (0.0, 1.0), name
    assert [found[n].coupling for n in ("cfm", "ot_cfm", "rectified_flow", "distill")] == [
        "independent", "ot", "independent", "pairs"
    ]  # fmt: skip
    assert fm.rectified_flow(network, (2,), pairs=True).coupling == "pairs"
    assert found["interpolant"].path.name == "trigonometric"
    assert fm.cfm(network, (2,), times="logit-normal").times.name == "logit-normal"
    assert float(fm.cfm(network, (2,), sigma_min=0.1).path.b(torch.ones(()))) == pytest.approx(0.1)


def test_the_quadratic_objective_has_minus_the_mean_square_speed_as_its_minimum() -> None:
    """For data N(0, I) the trigonometric field is zero everywhere; for N(m, I) it is the speed of the mean."""
    data = GaussianMixture(MEAN.unsqueeze(0), torch.eye(2, dtype=DOUBLE).unsqueeze(0))
    model = fm.interpolant(Exact(data, "trigonometric"), (2,))
    g = seeded()

    def values(factor: float) -> Tensor:
        model.network.factor.data.fill_(factor)  # type: ignore[union-attr]
        with torch.no_grad():
            return torch.stack([model(data.sample(500, generator=g), generator=g).loss for _ in range(100)])

    # a and b rotate, so x_t - a m is N(0, I) and v = (pi/2) cos(pi t/2) m, of mean square (pi^2/8) |m|^2.
    speed = math.pi**2 / 8 * float(MEAN.square().sum())
    nb.check_mc("minimum", values(1.0), -speed)
    nb.check_mc("half the field", values(0.5), -0.75 * speed)
    nb.check_mc("twice the field", values(2.0), 0.0)


def test_minibatch_optimal_transport_shortens_the_way_to_that_of_the_optimal_map() -> None:
    """Costs of N(0, 1) to N(0, 1/4): 1 + 1/4 for independent pairs, (1 - 1/2)^2 for the optimal map."""
    data, zero = GaussianMixture(torch.zeros(1, 1, dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)), Affine(
        torch.zeros(1, 1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    )  # fmt: skip
    x = data.sample(600, generator=seeded())
    cost = {
        make.__name__: float(make(zero, (1,))(x, generator=seeded(1)).loss.detach()) for make in (fm.cfm, fm.ot_cfm)
    }
    assert cost["cfm"] == pytest.approx(1 + 0.25, rel=0.15)
    assert cost["ot_cfm"] == pytest.approx((1 - 0.5) ** 2, rel=0.15)


# --- rectified flow ----------------------------------------------------------------------------------------------


def test_reflow_pairs_have_the_right_marginals_and_no_higher_convex_cost() -> None:
    teacher = fm.rectified_flow(Exact(), (2,))
    pairs = fm.reflow(teacher, 4000, generator=seeded(), batch_size=1500, steps=40)
    assert pairs.shape == (4000, 2, 2)
    x0, x1 = pairs.unbind(1)
    nb.check_mc("source", torch.cat([x0, x0**2], 1), [0.0, 0.0, 1.0, 1.0])
    gap = x1 - MEAN
    nb.check_mc("target", torch.cat([gap, gap**2, gap.prod(1, keepdim=True)], 1), [0, 0, 0.8, 0.6, 0.5])
    independent = DATA.sample(4000, generator=seeded(1)) - x0
    costs = {
        "square": lambda d: d.square().sum(1),
        "norm": lambda d: d.norm(dim=1),
        "fourth power": lambda d: d.square().sum(1).square(),
        "one direction": lambda d: d[:, 0].abs(),
        "exponential": lambda d: d.sum(1).exp(),
    }
    for name, cost in costs.items():
        before, after = cost(independent), cost(x1 - x0)
        error = (before.var() / 4000 + after.var() / 4000).sqrt()
        nb.check_bound(name, after.mean(), before.mean(), slack=float(2 * error))
        if name == "square":
            assert after.mean() < before.mean() - 5 * error


def test_reflow_of_a_gaussian_gives_its_known_map() -> None:
    """The field of N(m, S) moves the eigenvectors of S apart: x1 = m + S^(1/2) x0."""
    pairs = fm.reflow(fm.rectified_flow(Exact(), (2,)), 50, generator=seeded(), steps=60, method="rk4")
    values, axes = torch.linalg.eigh(COV)
    root = axes @ values.sqrt().diag() @ axes.T
    nb.check("map", pairs[:, 1], MEAN + pairs[:, 0] @ root, atol=1e-5)
    some = fm.reflow(fm.rectified_flow(Exact(), (2,)), 7, generator=seeded(), steps=60, method="rk4", batch_size=3)
    nb.check("batches", some, pairs[:7], atol=1e-12)


def test_distillation_learns_the_teachers_map_exactly_and_samples_in_one_step() -> None:
    teacher = fm.rectified_flow(Exact(), (2,))
    pairs = fm.reflow(teacher, 300, generator=seeded(), steps=60, method="rk4")
    values, axes = torch.linalg.eigh(COV)
    root = axes @ values.sqrt().diag() @ axes.T
    student = fm.distill(Affine(root - torch.eye(2, dtype=DOUBLE), MEAN), (2,))
    nb.check("perfect student", student(pairs).loss, 0.0, atol=1e-8)
    one, many = (
        m.sample(5, method=how, steps=n, generator=seeded(2))
        for m, how, n in ((student, "euler", 1), (teacher, "rk4", 60))
    )
    nb.check("one step", one, many, atol=1e-4)
    beginner = fm.distill(Affine(torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)), (2,))
    nb.fit(beginner, pairs, steps=400, batch_size=300, lr=0.03, schedule="cosine", progress=False, device="cpu")
    nb.check("learned", beginner.sample(5, method="euler", steps=1, generator=seeded(2)), many, atol=1e-2)


def test_reflow_straightens_a_mixture() -> None:
    """One Euler step of a second flow, trained on the first one's pairs, is nearer to its own end than the first's."""
    torch.manual_seed(0)
    data = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.tensor([0.3, 0.3]))
    first = fm.rectified_flow(TimeMLP(1, hidden=64, layers=2), (1,))
    settings: dict[str, Any] = dict(steps=300, batch_size=256, lr=3e-3, schedule="cosine", progress=False, device="cpu")
    nb.fit(first, data.sample(3000, generator=seeded()), **settings)
    pairs = fm.reflow(first, 3000, generator=seeded(1), steps=20)
    second = fm.rectified_flow(copy.deepcopy(first.network), (1,), pairs=True)
    nb.fit(second, pairs, **settings)

    def bend(model: FieldModel) -> float:
        one, many = (model.sample(1000, method="euler", steps=n, generator=seeded(3)) for n in (1, 50))
        return float((one - many).square().mean())

    assert bend(second) < 0.3 * bend(first)


def test_data_to_data_transport_follows_given_pairs() -> None:
    x0 = torch.rand(200, 1, dtype=DOUBLE, generator=seeded())
    shift = Affine(torch.zeros(1, 1, dtype=DOUBLE), torch.full((1,), 3.0, dtype=DOUBLE))
    model = fm.rectified_flow(shift, (1,), pairs=True)
    nb.check("loss", model((x0, x0 + 3)).loss, 0.0, atol=1e-12)
    nb.check("shift", model.transport(x0), x0 + 3, atol=1e-12)
    shift.bias.data.zero_()
    nb.check("loss of standing still", model((x0, x0 + 3)).loss, 9.0, atol=1e-12)


def test_reflow_with_labels_and_units() -> None:
    class ToClass(nn.Module):
        """Straight lines to the point c from wherever one is."""

        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            assert condition is not None
            return condition.unsqueeze(1) + 0 * x + self.anchor

    model = fm.cfm(ToClass(), (2,), classes=5, centre=1.0, scale=2.0)
    labels = torch.arange(5)
    pairs = fm.reflow(model, 5, condition=labels, generator=seeded(), batch_size=2, steps=3)
    nb.check("labels", pairs[:, 1] - pairs[:, 0], 2.0 * labels.unsqueeze(1), atol=1e-9)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 3, "batch_size": 0}])
def test_reflow_refuses_numbers_that_make_no_pairs(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="n >= 1 and batch_size >= 1"):
        fm.reflow(fm.cfm(Exact(), (2,)), **wrong)

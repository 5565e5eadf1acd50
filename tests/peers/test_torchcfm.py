"""Differential tests against `torchcfm` (extra ``peers``): targets of flow matching, minibatch optimal transport.

Their conventions are ours: t = 0 is the source x0, t = 1 the data x1. Everything here is in float64. See
``test_diffusers`` on how to run the peers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import nblib as nb
from nblib import paths
from nblib.data import toy
from nblib.data.toy import GaussianMixture
from nblib.field import optimal_transport
from nblib.paths import Path

pytest.importorskip("torchcfm", reason="a peer: pip install nblib[peers]")

from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)
from torchcfm.optimal_transport import OTPlanSampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DOUBLE = torch.float64
RING = toy.make("eight-gaussians")
assert isinstance(RING, GaussianMixture)


def pairs(n: int, shape: tuple[int, ...] = (2,), seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(n, *shape, dtype=DOUBLE, generator=g) for _ in range(2))
    return x0, 2 * x1 + 1


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
@pytest.mark.parametrize(
    ("matcher", "path"),
    [
        (ConditionalFlowMatcher(0.0), paths.linear()),
        (VariancePreservingConditionalFlowMatcher(0.0), paths.trigonometric()),
    ],
    ids=["independent", "variance preserving"],
)
def test_points_and_targets_between_given_pairs(
    matcher: ConditionalFlowMatcher, path: Path, shape: tuple[int, ...]
) -> None:
    """sigma = 0 makes the definitions equal: theirs may add noise of a fixed width to the path, ours has none."""
    x0, x1 = pairs(50, shape)
    t = torch.linspace(0, 1, 50, dtype=DOUBLE)
    _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t)
    nb.check("x_t", path.sample(x1, x0, t), xt, atol=1e-14)
    nb.check("u_t", path.velocity(x1, x0, t), ut, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_the_gaussian_path_of_lipman(sigma: float) -> None:
    """Their source is the noise that they draw themselves (x0 goes unused), and sigma is our ``sigma_min``."""
    x0, x1 = pairs(50)
    t = torch.linspace(0, 0.95, 50, dtype=DOUBLE)
    matcher = TargetConditionalFlowMatcher(sigma)
    _, xt, ut, noise = matcher.sample_location_and_conditional_flow(x0, x1, t, return_noise=True)
    path = paths.linear(sigma)
    nb.check("x_t", path.sample(x1, noise, t), xt, atol=1e-14)
    nb.check("u_t", path.velocity(x1, noise, t), ut, atol=1e-12)


def test_their_quotient_for_that_velocity_does_not_exist_at_the_end() -> None:
    """(x1 - (1 - sigma) x_t) / (1 - (1 - sigma) t) is 0 / 0 at sigma = 0, t = 1, and loses digits on the way.

    The value is x1 - x0 at every t, and ours is that. In float32, next to t = 1:
    """
    x0, x1 = (v.float() for v in pairs(1000))
    matcher, path = TargetConditionalFlowMatcher(0.0), paths.linear()
    assert matcher.compute_conditional_flow(x0, x1, torch.ones(1000), x1).isnan().all()
    nb.check("ours at the end", path.velocity(x1, x0, 1.0), x1 - x0, atol=1e-6)
    t = torch.full((1000,), 1 - 1e-4)
    _, _, ut, noise = matcher.sample_location_and_conditional_flow(x0, x1, t, return_noise=True)
    theirs = (ut - (x1 - noise)).abs().max()
    ours = (path.velocity(x1, noise, t) - (x1 - noise)).abs().max()
    assert float(ours) < 1e-6
    assert float(theirs) > 1e-4


# --- optimal transport -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
@pytest.mark.parametrize("n", [5, 64])
def test_the_plan_is_the_same_permutation(n: int, shape: tuple[int, ...]) -> None:
    """Network simplex (POT) and Hungarian (SciPy): for points in general position the optimum is one permutation."""
    x0, x1 = pairs(n, shape)
    plan = torch.from_numpy(OTPlanSampler("exact").get_map(x0, x1))  # rows: sources, columns: targets
    nb.check("a permutation", plan.sort(0).values[-1], torch.full((n,), 1 / n, dtype=DOUBLE), atol=1e-12)
    partner = plan.argmax(0)
    assert partner.unique().numel() == n
    nb.check("partners", optimal_transport(x0, x1), x0[partner], atol=0)


def test_the_flow_between_optimal_pairs() -> None:
    """``replace=False`` makes their draw from the plan a shuffle of ours: compared after sorting by the targets."""
    x0, x1 = pairs(64)
    np.random.seed(0)
    a, b = OTPlanSampler("exact").sample_plan(x0, x1, replace=False)
    order, here = b[:, 0].argsort(), x1[:, 0].argsort()
    nb.check("targets", b[order], x1[here], atol=0)
    nb.check("sources", a[order], optimal_transport(x0, x1)[here], atol=0)
    t = torch.rand(64, dtype=DOUBLE)
    _, xt, ut = ConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(a[order], b[order], t)
    ours = optimal_transport(x0, x1)[here]
    nb.check("x_t", paths.linear().sample(x1[here], ours, t), xt, atol=1e-14)
    nb.check("u_t", paths.linear().velocity(x1[here], ours, t), ut, atol=1e-14)


def test_their_matcher_draws_pairs_with_replacement() -> None:
    """Of n pairs 1 - (1 - 1/n)^n, about 1 - 1/e, remain: a third of the batch is dropped and replaced by doubles.

    Both are unbiased over batches. Per batch, ours uses every target once.
    """
    n = 256
    x0, x1 = pairs(n)
    np.random.seed(0)
    matcher = ExactOptimalTransportConditionalFlowMatcher(0.0)
    kept = []
    for _ in range(20):
        _, _, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        kept.append(ut.unique(dim=0).shape[0] / n)
    nb.check("kept", sum(kept) / 20, 1 - (1 - 1 / n) ** n, atol=0.02)
    # None of them is a pair that ours does not make.
    optimal = x1 - optimal_transport(x0, x1)
    assert float((ut.unsqueeze(1) - optimal).abs().amax(-1).min(1).values.max()) < 1e-12


def test_their_cost_is_rounded_in_the_precision_of_the_data_and_ours_is_not() -> None:
    """cdist in float32 far from the origin: their plan is then a worse one, by the exact cost."""
    x0, x1 = (v + 3e4 for v in pairs(64))
    x0, x1 = x0.float(), x1.float()
    exact = (x1.double().unsqueeze(1) - x0.double()).square().sum(-1)
    rows, columns = linear_sum_assignment(exact.numpy())
    best = float(exact[rows, columns].sum())
    partner = torch.from_numpy(OTPlanSampler("exact").get_map(x0, x1)).argmax(0)
    theirs = float((x1.double() - x0[partner].double()).square().sum())
    ours = float((x1.double() - optimal_transport(x0, x1).double()).square().sum())
    nb.check("ours", ours, best, rtol=1e-9)
    assert theirs > 1.02 * best


def test_labels_are_kept_apart_by_us_and_carried_along_by_them() -> None:
    """``sample_plan_with_labels`` pairs across classes: the source then knows the class (see ``optimal_transport``).

    Two classes, at -3 and +3: their class-1 sources have mean above 0.6, where the sampler will draw from N(0, 1).
    """
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(500)
    x0 = torch.randn(1000, 1, dtype=DOUBLE, generator=g)
    x1 = 6.0 * labels.unsqueeze(1) - 3 + 0.1 * torch.randn(1000, 1, dtype=DOUBLE, generator=g)
    np.random.seed(0)
    source, _, _, y = OTPlanSampler("exact").sample_plan_with_labels(x0, x1, None, labels)
    assert float(source[y == 1].mean()) > 0.6
    ours = optimal_transport(x0, x1, labels)
    nb.check("ours, class 1", ours[labels == 1].mean(), 0.0, atol=0.15)

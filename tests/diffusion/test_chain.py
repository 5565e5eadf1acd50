"""The chain of DDPM: its coefficients, its bound against exact log-densities, and learned variances."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import paths
from nblib.data.toy import GaussianMixture
from nblib.diffusion import Chain, ChainBound, HybridDDPM, chain_bound
from nblib.errors import DataError
from nblib.field import FieldModel
from nblib.networks import TimeMLP, UNet

DOUBLE = torch.float64
PATH = paths.vp()
DATA = GaussianMixture(torch.tensor([[0.3, -0.2]], dtype=DOUBLE), torch.tensor([0.7], dtype=DOUBLE))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    """The perfect noise prediction for Gaussian data; with ``v`` also 2v - 1, as a network for twice the channels."""

    def __init__(self, path: paths.Path, v: float | None = None) -> None:
        super().__init__()
        self.path, self.v = path, v
        self.anchor = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.v is None:
            return paths.posterior_mean(DATA, self.path, x, t, to="noise") + self.anchor
        z = x.chunk(2, 1)[0]
        noise = paths.posterior_mean(DATA, self.path, z, t, to="noise") + self.anchor
        return torch.cat([noise, torch.full_like(noise, 2 * self.v - 1)], 1)


def exact(path: paths.Path = PATH, **options: Any) -> FieldModel:
    return FieldModel(Exact(path), path, shape=(2,), predict="noise", **options)


@pytest.mark.parametrize("path", [paths.vp(), paths.vp("cosine"), paths.vp("sigmoid")], ids=lambda p: p.name)
def test_a_chain_on_a_preserving_path_has_the_betas_of_ddpm(path: paths.Path) -> None:
    chain = Chain(path, 50)
    nb.check("beta", chain.beta[1:], paths.ddpm_betas(path, 50), atol=1e-12)
    nb.check("alpha", chain.alpha[1:], 1 - chain.beta[1:], atol=1e-12)
    nb.check("times", chain.time[1:], [float(paths.ddpm_time(k, 50)) for k in range(1, 51)], atol=1e-12)
    nb.check("bar", chain.alpha[1:].cumprod(0), chain.a[1:] ** 2, atol=1e-12)
    assert chain.last == 1
    assert Chain(paths.vp(paths.LearnedSchedule(hidden=4)), 5).last == 0


@pytest.mark.parametrize("path", [paths.vp(), paths.linear(), paths.ve()], ids=lambda p: p.name)
def test_the_posterior_is_that_of_generic_gaussian_conditioning(path: paths.Path) -> None:
    chain = Chain(path, 10, start=0.05)
    for k in (2, 6, 10):
        x, z = torch.randn(2, 4, 3, dtype=DOUBLE, generator=seeded(k))
        # The joint of (z_(k-1), z_k) given x: variances b^2, covariance sqrt(alpha) b_(k-1)^2.
        before, now, root = chain.b[k - 1] ** 2, chain.b[k] ** 2, chain.alpha[k].sqrt()
        gain = root * before / now
        mean, variance = chain.posterior(x, z, k)
        nb.check("mean", mean, chain.a[k - 1] * x + gain * (z - chain.a[k] * x), atol=1e-10, rtol=1e-10)
        nb.check("variance", variance, before - gain * root * before, atol=1e-12, rtol=1e-10)
        rows = chain.posterior(x, z, torch.full((4,), k))
        nb.check("one index per example", rows[0], mean, atol=1e-14)
        nb.check("the state", chain.sample(x, z, k), chain.a[k] * x + chain.b[k] * z, atol=1e-14)


def test_the_variances_are_those_of_the_sources() -> None:
    chain = Chain(PATH, 20)
    k = torch.arange(1, 21)
    nb.check("forward", chain.variance(k, "forward"), chain.beta[1:], atol=0)
    low = chain.variance(k)
    nb.check("first", low[0], low[1], atol=0)
    nb.check("rest", low[1:], chain.b[1:-1] ** 2 / chain.b[2:] ** 2 * chain.beta[2:], atol=1e-14)
    assert Chain(PATH, 1, start=0.2).variance(1) == Chain(PATH, 1, start=0.2).beta[1]
    with pytest.raises(DataError, match="posterior"):
        chain.variance(1, "posteror")
    for wrong in ({"steps": 0}, {"steps": 3, "start": 1.0}, {"steps": 3, "start": -0.1}):
        with pytest.raises(DataError, match="A chain needs"):
            Chain(PATH, **wrong)


PATHS = [paths.vp(), paths.vp("cosine"), paths.linear(), paths.vp(paths.LearnedSchedule(hidden=4).double())]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_with_a_perfect_network_the_bound_is_near_the_exact_log_density_and_never_above(path: paths.Path) -> None:
    x = DATA.sample(2000, generator=seeded())
    for variance in ("posterior", "forward"):
        with torch.no_grad():
            terms = chain_bound(exact(path), x, steps=60, variance=variance, decoder="gaussian", generator=seeded(1))
        assert isinstance(terms, ChainBound)
        assert all(term.shape == (2000,) for term in terms)
        gap = terms.total + DATA.log_prob(x)
        error = float(gap.std()) / math.sqrt(2000)
        nb.check_bound("bound", -4 * error, gap.mean())
        if variance == "forward":
            nb.check_bound("tight", gap.mean(), 0.05 + 4 * error)


def test_drawing_some_transitions_is_unbiased_for_all_of_them() -> None:
    x, model = DATA.sample(1, generator=seeded()).expand(4000, 2), exact()
    whole = chain_bound(model, x, steps=12, decoder="gaussian", generator=seeded(1))
    for draws in (1, 3, 40):
        some = chain_bound(model, x, steps=12, decoder="gaussian", draws=draws, generator=seeded(2))
        nb.check_mc("draws", some.transitions - whole.transitions, 0.0)
    nb.check("prior", whole.prior, some.prior, atol=0)


def test_units_centre_and_scale_only_change_the_reconstruction_of_a_density() -> None:
    x = DATA.sample(500, generator=seeded())
    plain = chain_bound(exact(), x, steps=8, decoder="gaussian", generator=seeded(1))
    moved = chain_bound(exact(centre=1.0, scale=3.0), 3 * x + 1, steps=8, decoder="gaussian", generator=seeded(1))
    nb.check("transitions", moved.transitions, plain.transitions, atol=1e-9)
    nb.check("Jacobian", moved.reconstruction, plain.reconstruction + 2 * math.log(3), atol=1e-9)


@pytest.mark.parametrize("decoder", ["discretized", "normalized"])
@pytest.mark.parametrize("path", [PATH, paths.vp(paths.LearnedSchedule(-3.0, 4.0, hidden=4).double())])
def test_the_decoders_of_levels_are_probabilities_and_the_bound_is_below_one(path: paths.Path, decoder: str) -> None:
    """All images of two pixels and five levels: the sum of exp(bound) cannot exceed one."""
    levels = torch.tensor([-1.0, -0.4, 0.0, 0.5, 1.3], dtype=DOUBLE)
    every = torch.cartesian_prod(levels, levels)
    x = every.repeat_interleave(300, 0)
    with torch.no_grad():
        terms = chain_bound(exact(path), x, steps=10, decoder=decoder, levels=levels, generator=seeded())
    assert float(terms.reconstruction.min()) >= -1e-12
    total = (-terms.total.view(25, 300).mean(1)).exp().sum()
    assert 0.05 < float(total) < 1.0


def test_the_discretized_decoder_keeps_its_digits_in_both_tails() -> None:
    from nblib.diffusion.chain import _decode

    values = torch.linspace(-1, 1, 256, dtype=DOUBLE)
    y = values[[0, 1, 128, 254, 255]][:, None]
    mean, var = torch.zeros(5, 1, dtype=DOUBLE), torch.full((5, 1), 1e-4, dtype=DOUBLE)
    log_p = _decode(y, mean, var, values)
    assert bool(log_p.isfinite().all())
    nb.check("symmetry", log_p[[0, 1]], log_p[[4, 3]], rtol=1e-9)
    middle, wide = torch.full((256, 1), 0.31, dtype=DOUBLE), torch.full((256, 1), 0.01, dtype=DOUBLE)
    nb.check("one", _decode(values[:, None], middle, wide, values).exp().sum(), 1.0, atol=1e-12)
    for std in (1e-3, 0.01, 1.0):
        for off in (0.0, 0.5, 100.0):
            spread = torch.full((5, 1), std**2, requires_grad=True)
            _decode(y.float(), (y + off * std).float(), spread, values.float()).sum().backward()
            assert spread.grad is not None
            assert bool(spread.grad.isfinite().all())


def test_bad_arguments_of_the_bound_are_refused() -> None:
    x, model = DATA.sample(3), exact()
    for wrong, message in (
        ({"decoder": "gausian"}, "Unknown decoder"),
        ({"variance": "posteror"}, "Unknown variance"),
        ({"variance": "learned"}, "HybridDDPM"),
        ({"draws": 0}, "draws"),
        ({"levels": 1}, "levels"),
        ({"levels": torch.tensor([1.0, 0.0])}, "increasing"),
    ):
        with pytest.raises(DataError, match=message):
            chain_bound(model, x, steps=4, **wrong)
    with pytest.raises(DataError, match="examples"):
        chain_bound(model, x[:, :1], steps=4)


# --- learned variances -------------------------------------------------------------------------------------


def hybrid(v: float = 0.5, **options: Any) -> HybridDDPM:
    return HybridDDPM(Exact(PATH, v), PATH, shape=(2,), steps=30, **options)


def test_the_learned_variance_lies_between_the_fixed_ones_on_a_log_scale() -> None:
    z, k = torch.randn(6, 2, dtype=DOUBLE, generator=seeded()), torch.tensor([1, 2, 3, 10, 20, 30])
    chain = hybrid().chain
    low, high = chain.variance(k)[:, None], chain.beta[k][:, None]
    for v in (0.0, 0.3, 1.0, 1.2):
        mean, var = hybrid(v).reverse(z, k, chain)
        nb.check("eq-hybrid", var, low ** (1 - v) * high**v, atol=1e-14)
        fixed = exact().predict(z, chain.time[k], "data")
        nb.check("mean", mean, chain.posterior(fixed, z, k)[0], atol=1e-10)
    x = DATA.sample(200, generator=seeded())
    for v, name in ((0.0, "posterior"), (1.0, "forward")):
        how: dict[str, Any] = {"steps": 30, "decoder": "gaussian"}
        learned = chain_bound(hybrid(v), x, variance="learned", generator=seeded(1), **how)
        nb.check("bound", learned.total, chain_bound(exact(), x, variance=name, generator=seeded(1), **how).total)


def test_the_hybrid_loss_is_the_simple_loss_plus_a_multiple_of_the_bound() -> None:
    x = DATA.sample(30_000, generator=seeded())
    out = hybrid(0.4, vlb=0.05)(x, generator=seeded(1))
    simple = hybrid(0.4, vlb=0.0)(x, generator=seeded(1)).loss
    nb.check("sum", out.loss, simple + 0.05 * out.logs["vlb"], atol=1e-10)
    nb.check("mse", 2 * out.logs["mse"], simple, atol=1e-10)
    with torch.no_grad():
        terms = chain_bound(hybrid(0.4), x, steps=30, variance="learned", decoder="gaussian", generator=seeded(2))
    expected = float((terms.transitions + terms.reconstruction).mean())
    assert abs(float(out.logs["vlb"]) - expected) < 0.25


def test_the_bound_sends_no_gradient_to_the_mean_and_the_simple_loss_none_to_the_variance() -> None:
    torch.manual_seed(0)
    net = TimeMLP(4, hidden=16, layers=1, features=8)
    nn.init.normal_(net.body[-1].weight, std=0.1)
    x = DATA.sample(64, generator=seeded()).float()
    grads = {}
    for vlb in (0.0, 1.0):
        net.zero_grad()
        HybridDDPM(net, PATH, shape=(2,), steps=10, vlb=vlb)(x, generator=seeded()).loss.backward()
        assert net.body[-1].weight.grad is not None
        grads[vlb] = net.body[-1].weight.grad.clone()
    nb.check("mean", grads[0.0][:2], grads[1.0][:2], atol=1e-6)
    nb.check("variance", grads[0.0][2:], 0.0, atol=0)
    assert float(grads[1.0][2:].abs().max()) > 0


def test_a_hybrid_model_trains_samples_and_is_a_field_model() -> None:
    torch.manual_seed(0)
    model = HybridDDPM(UNet(2, width=8, multipliers=(1, 2), classes=3), shape=(1, 8, 8), steps=20, levels=17, classes=3)
    images, labels = torch.rand(40, 1, 8, 8, generator=seeded()).mul(16).round() / 16, torch.arange(40) % 3
    history = nb.fit(model, nb.field.pack(images, labels), steps=3, batch_size=8, ema=0.9, device="cpu")
    trained = copy.deepcopy(history.ema or model)
    few = trained.sample(2, steps=4, condition=1, generator=seeded())
    many = trained.sample(3, steps=4, condition=1, generator=seeded())
    assert few.shape == (2, 1, 8, 8)
    nb.check("rows", few, many[:2], atol=1e-5)
    assert trained.sample(2, steps=3, method="ddim", condition=0).shape == (2, 1, 8, 8)
    terms = chain_bound(trained, images[:4], steps=20, variance="learned", levels=17, condition=labels[:4])
    assert bool(terms.total.isfinite().all())
    for wrong in ({"n": 0}, {"n": 1, "eta": 1.0}):
        with pytest.raises(DataError, match="sample needs"):
            trained.sample(**wrong)
    with pytest.raises(DataError, match="HybridDDPM needs"):
        HybridDDPM(TimeMLP(4), paths.vp(paths.LearnedSchedule(hidden=4)), shape=(2,))
    with pytest.raises(DataError, match="HybridDDPM needs"):
        HybridDDPM(TimeMLP(4), PATH, shape=(2,), steps=1)


def test_samples_of_a_perfect_hybrid_model_have_the_moments_of_the_data() -> None:
    x = hybrid(1.0).sample(4000, steps=60, generator=seeded())
    nb.check_mc("mean", x, DATA.mean)
    nb.check("covariance", x.T.cov(), DATA.cov, atol=0.05)

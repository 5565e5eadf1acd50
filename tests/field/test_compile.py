"""The losses and the samplers compile as one graph: no value is looked at on the host, so no GPU waits for it.

``fullgraph=True`` raises at the first graph break; the backend "eager" runs the captured graph as it is, which makes
this a test of the capture and not of a code generator. Constructors and samplers are found by their signatures: one
that is added later is tested without an edit here. Two things stay outside of a graph, on purpose:

* a ``torch.Generator``: TorchDynamo refuses it, so the compiled calls draw from the global random state;
* ``ot_cfm``: its assignment problem is solved on the CPU by SciPy (``torch.compiler.disable``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nblib as nb
from nblib import diffusion, dynamics, flow_matching, paths
from nblib.field import METHODS, FieldModel
from nblib.networks import DiT, TimeMLP, UNet

Network = Callable[..., nn.Module]

NETWORKS: dict[str, tuple[Network, tuple[int, ...]]] = {
    "TimeMLP": (lambda **k: TimeMLP(2, hidden=8, layers=1, features=4, **k), (2,)),
    "UNet": (lambda **k: UNet(1, width=4, multipliers=(1, 2), heads=2, **k), (1, 4, 4)),
    "DiT": (lambda **k: DiT(1, patch=2, dim=8, depth=1, heads=2, **k), (1, 4, 4)),
}
ADAPTIVE = ("dopri5",)  # chooses its steps by the error it sees
ON_THE_CPU = ("ot_cfm",)
ON_THE_HOST = ("langevin",)  # of a model: looks its noise levels up in a dictionary of floats


def constructors() -> dict[str, Callable[..., FieldModel]]:
    found = {}
    for module in (diffusion, flow_matching):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and inspect.signature(value).return_annotation == "FieldModel":
                found[name] = value
    return found


def samplers() -> dict[str, Callable[..., Tensor]]:
    """The functions of ``dynamics`` that carry a state over a grid of times or noise levels, or for some steps."""
    found = {}
    for name in dynamics.__all__:
        value = getattr(dynamics, name)
        if inspect.isfunction(value) and {"x"} < set(inspect.signature(value).parameters):
            found[name] = value
    return found


CONSTRUCTORS, SAMPLERS = constructors(), samplers()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend="eager", dynamic=False)


def batch_for(model: FieldModel, n: int = 4) -> Tensor:
    return torch.randn(n, 2, *model.shape) if model.coupling == "pairs" else torch.randn(n, *model.shape)


def randomised(model: FieldModel) -> FieldModel:
    """Networks start at zero, where a wrong graph would go unseen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_what_is_covered_has_been_found() -> None:
    """The search by signature must not come back empty-handed."""
    assert {"ddpm", "vdm", "ncsn", "ve", "vp", "sub_vp", "edm"} <= set(CONSTRUCTORS)
    assert {"cfm", "ot_cfm", "rectified_flow", "interpolant", "distill"} <= set(CONSTRUCTORS)
    assert {"ode", "ddim", "ancestral", "multistep", "sde", "predictor_corrector"} <= set(SAMPLERS)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [n for n in CONSTRUCTORS if n not in ON_THE_CPU])
def test_the_loss_is_one_graph(name: str, network: str) -> None:
    build, shape = NETWORKS[network]
    model = randomised(CONSTRUCTORS[name](build(), shape))
    batch = batch_for(model)
    torch.manual_seed(1)
    expected = model(batch).loss
    torch.manual_seed(1)
    found = compiled(model)(batch).loss
    nb.check("loss", found, expected, rtol=1e-5)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    got = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            nb.check("gradient", g, w, rtol=1e-4, atol=1e-5 * (1 + float(w.abs().max())))


def test_the_loss_with_labels_is_one_graph() -> None:
    build, shape = NETWORKS["UNet"]
    model = flow_matching.cfm(build(classes=3), shape, classes=3).train()
    assert compiled(model)((torch.randn(4, *shape), torch.tensor([0, 1, 2, 0]))).loss.isfinite()


@pytest.mark.parametrize("levels", [None, 17])
def test_the_hybrid_loss_is_one_graph(levels: int | None) -> None:
    network = TimeMLP(4, hidden=8, layers=1, features=4)
    model = randomised(diffusion.HybridDDPM(network, shape=(2,), steps=3, vlb=0.1, levels=levels))
    batch = torch.randint(17, (16, 2)) / 16
    torch.manual_seed(1)
    expected = model(batch).loss
    torch.manual_seed(1)
    found = compiled(model)(batch).loss
    nb.check("loss", found, expected, rtol=1e-5)
    for g in torch.autograd.grad(found, list(model.parameters())):
        assert g.isfinite().all()
        assert g.abs().max() > 0


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_the_assignment_is_the_only_break_of_optimal_transport(name: str) -> None:
    build, shape = NETWORKS["TimeMLP"]
    model = CONSTRUCTORS[name](build(), shape)
    found = torch._dynamo.explain(model)(batch_for(model))
    assert found.graph_break_count == 1, found.break_reasons
    assert "optimal_transport" in str(found.break_reasons[0])


def test_a_generator_is_refused_by_the_compiler_and_not_by_us() -> None:
    """If this fails, TorchDynamo has learned it: the tests here can then pass one."""

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(3, generator=generator)

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(draw)(torch.Generator())


# --- samplers ----------------------------------------------------------------------------------------------------

PATH = paths.vp()


def field(x: Tensor, t: float) -> Tensor:
    return -x * (1 + t)


VALUES: dict[str, Any] = {
    "path": PATH,
    "data": field,
    "score": field,
    "velocity": field,
    "times": [0.1, 0.4, 0.9],
    "sigmas": [1.0, 0.5],
    "step": 0.1,
    "steps": 2,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"ode {m}": ("ode", {"method": m}) for m in dynamics.METHODS if m not in ADAPTIVE},
    **{name: (name, {}) for name in SAMPLERS if name not in ("ode", "log_prob", "langevin")},
    "annealed_langevin": ("annealed_langevin", {"steps": 2}),
    "ddim eta=1": ("ddim", {"eta": 1.0}),
    "ancestral forward": ("ancestral", {"variance": "forward"}),
    "multistep order 1": ("multistep", {"order": 1}),
    "sde without velocity": ("sde", {"velocity": None}),
    "langevin": ("langevin", {"score": lambda x: -x}),
    "metropolis": ("langevin", {"score": lambda x: -x, "metropolis": lambda x: -x.square().sum(1) / 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sampler_is_one_graph(case: str) -> None:
    name, options = CASES[case]
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.name != "x"}
    arguments = {**{n: VALUES[n] for n in needed}, **options}
    x = torch.randn(3, 2)
    torch.manual_seed(2)
    expected = SAMPLERS[name](x=x, **arguments)
    torch.manual_seed(2)
    nb.check(case, compiled(SAMPLERS[name])(x=x, **arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*ADAPTIVE, *ON_THE_HOST)])
def test_sampling_a_model_is_one_graph_once_it_has_its_grid(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dynamics.times`` makes Python floats of a tensor, which breaks the graph: it is replaced by what it returns."""
    build, shape = NETWORKS["TimeMLP"]
    model = randomised(diffusion.vp(build(), shape))
    torch.manual_seed(3)
    expected = model.sample(3, steps=2, method=method)
    grid = dynamics.times(2)
    monkeypatch.setattr(dynamics, "times", lambda *_, **__: grid)
    torch.manual_seed(3)
    found = compiled(lambda: model.sample(3, steps=2, method=method))()
    nb.check(method, found, expected, rtol=1e-4, atol=1e-4)

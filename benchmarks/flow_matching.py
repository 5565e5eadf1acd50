"""Flow matching: training steps against torchcfm and Meta's flow_matching, and what dopri5 needs for equal error.

One network, one batch, one process, one thread; the variants take turns (see ``diffusion.py``). Ratios are to the first
variant of a table. Meta's package has no optimal transport. The last table counts evaluations of an exactly known
field: nothing in it depends on the machine.

    python benchmarks/flow_matching.py [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusion import Variants, machine, report, turns
from torch import Tensor, nn
from torchdiffeq import odeint

import nblib as nb
from nblib import dynamics, paths
from nblib.data import toy
from nblib.data.toy import GaussianMixture
from nblib.networks import TimeMLP, UNet

# This file has the name of a peer, and its folder comes first on the path of a script.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]


def training(network: nn.Module, data: Tensor, coupling: str) -> Variants:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    make = nb.flow_matching.ot_cfm if coupling == "ot" else nb.flow_matching.cfm
    model = make(network, data.shape[1:])
    noisy, noise, t = torch.randn_like(data), torch.randn_like(data), torch.rand(len(data))
    variants: Variants = {
        f"nblib: {make.__name__}": lambda: step(model(data).loss),
        "the network alone, on a fixed input": lambda: step(F.mse_loss(network(noisy, t), noise)),
    }
    if find_spec("torchcfm"):
        from torchcfm import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

        matcher = (ExactOptimalTransportConditionalFlowMatcher if coupling == "ot" else ConditionalFlowMatcher)(0.0)

        def torchcfm() -> None:
            s, x, u = matcher.sample_location_and_conditional_flow(torch.randn_like(data), data)
            step(F.mse_loss(network(x, s), u))

        variants[f"torchcfm: {type(matcher).__name__}"] = torchcfm
    if coupling == "independent" and find_spec("flow_matching"):
        from flow_matching.path import CondOTProbPath

        path = CondOTProbPath()

        def meta() -> None:
            point = path.sample(t=torch.rand(len(data)), x_0=torch.randn_like(data), x_1=data)
            step(F.mse_loss(network(point.x_t, point.t), point.dx_t))

        variants["flow_matching: CondOTProbPath"] = meta
    return variants


# The straight path at twice the speed: up to its time 1 it continues the field beyond our t = 1, analytically.
CONTINUED = paths.Path(
    "continued",
    a=lambda s: 2 * s,
    b=lambda s: 1 - 2 * s,
    da=lambda s: torch.full_like(s, 2.0),
    db=lambda s: torch.full_like(s, -2.0),
)


class Counted:
    """The exact velocity of a mixture on the straight path, counting evaluations, also those beyond t = 1.

    There it is continued analytically, or, as by a network that clamps its time, frozen.
    """

    def __init__(self, mixture: GaussianMixture, *, frozen: bool = False) -> None:
        self.mixture, self.frozen, self.calls, self.beyond = mixture, frozen, 0, 0

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        time = float(t)
        self.calls += 1
        self.beyond += int(time > 1)
        time = min(time, 1.0) if self.frozen else time
        return paths.posterior_mean(self.mixture, CONTINUED, x, time / 2, "velocity") / 2


def adaptive(n: int = 256) -> list[dict[str, float | str]]:
    """Evaluations and error of dopri5 at several tolerances, in float64; error: root mean square over points."""
    mixture = toy.make("eight-gaussians")
    assert isinstance(mixture, GaussianMixture)
    x = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = dynamics.ode(Counted(mixture), x, dynamics.times(500), method="rk4")
    rows: list[dict[str, float | str]] = []
    for exponent in (3, 5, 7, 9):
        tol = 10.0**-exponent
        runs = {"nblib": lambda f, tol=tol: dynamics.ode(f, x, [0.0, 1.0], method="dopri5", rtol=tol, atol=tol)}
        runs["torchdiffeq"] = lambda f, tol=tol: odeint(
            lambda t, y: f(y, t), x, span, rtol=tol, atol=tol, method="dopri5"
        )[-1]
        if find_spec("flow_matching"):
            from flow_matching.solver import ODESolver

            runs["flow_matching"] = lambda f, tol=tol: ODESolver(lambda x, t: f(x, t)).sample(
                x, step_size=None, method="dopri5", atol=tol, rtol=tol, time_grid=span
            )
        runs["torchdiffeq, field frozen beyond 1"] = runs["torchdiffeq"]
        for name, run in runs.items():
            field = Counted(mixture, frozen="frozen" in name)
            error = float((run(field) - exact).square().mean().sqrt())
            rows.append({"tolerance": tol, "solver": name, "NFE": field.calls, "beyond": field.beyond, "error": error})
    for method, order in (("heun", 2), ("rk4", 4)):
        for steps in (16, 32, 64):
            field = Counted(mixture)
            end = dynamics.ode(field, x, dynamics.times(steps), method=method)
            error = float((end - exact).square().mean().sqrt())
            rows.append(
                {"tolerance": math.nan, "solver": f"{method}, {steps} steps", "NFE": steps * order, "beyond": 0,
                 "error": error}
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine()}, {args.rounds} rounds")
    found: dict[str, object] = {}
    networks = {
        "2-D, TimeMLP of 3 x 64": (TimeMLP(2, hidden=64, layers=3), (2,), 20),
        "1 x 16 x 16, U-Net of width 8": (UNet(1, width=8, multipliers=(1, 2)), (1, 16, 16), 1),
    }
    for name, (network, shape, repeat) in networks.items():
        for batch in (64, 256):
            for coupling in ("independent", "ot"):
                title = f"(3) one training step, {name}, batch {batch}, coupling {coupling}"
                seconds = turns(training(network, torch.randn(batch, *shape), coupling), args.rounds, repeat)
                report(title, seconds)
                found[title] = seconds
    print("\n(4) dopri5 on the exact field of eight Gaussians, 256 points, float64")
    rows = adaptive()
    for row in rows:
        print(f"  tolerance {row['tolerance']:<8.0e} {row['solver']:36s} {row['NFE']:5d} evaluations"
              f" ({row['beyond']} beyond t = 1)   error {row['error']:.1e}")  # fmt: skip
    found["dopri5"] = rows
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Diffusion: a training step and 50 steps of DDIM, ours against diffusers and denoising-diffusion-pytorch.

One network (our U-Net), one batch, one process, one thread; the variants take turns in changing order, so that a
machine whose speed drifts is fair to all. Prints process CPU time, wall time and the ratio to the first variant within
a round: median and range. The peers come with the extra ``peers``; those that are absent are left out.

All call the network as ``net(x, t)`` with t in [0, 1]: diffusers' recipe leaves the call to its user, and
denoising-diffusion-pytorch gets an adapter from its step numbers. It always clips the predicted data.

    python benchmarks/diffusion.py [--rounds 15] [--width 16] [--batch-size 32] [--samples 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nblib as nb
from nblib.networks import UNet

STEPS = 1000
Variants = dict[str, Callable[[], object]]


def turns(variants: Variants, rounds: int, repeat: int = 1) -> dict[str, list[tuple[float, float]]]:
    """``(CPU, wall)`` seconds of one call, per variant and round; each variant is called once before, to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    names = list(variants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeat):
                variants[name]()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            seconds[name].append((spent[0] / repeat, spent[1] / repeat))
    return seconds


def report(title: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{title}")
    base = seconds[next(iter(seconds))]
    for name, times in seconds.items():
        ratios = [sorted(t[i] / b[i] for t, b in zip(times, base, strict=True)) for i in (0, 1)]
        cpu, wall = (1e3 * statistics.median(t[i] for t in times) for i in (0, 1))
        cells = [f"{statistics.median(r):5.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios]
        print(f"  {name:52s} {cpu:9.2f} ms CPU {wall:9.2f} ms wall   CPU {cells[0]}   wall {cells[1]}", flush=True)


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"


class Adapter(nn.Module):
    """What denoising-diffusion-pytorch asks of a network: channels, and a call with its step number."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, step: Tensor, _: Any = None) -> Tensor:
        return self.network(x, 1 - (step + 1) / STEPS)


def training(network: nn.Module, images: Tensor) -> Variants:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model = nb.diffusion.ddpm(network, images.shape[1:], steps=STEPS, centre=0.5, scale=0.5)
    noisy, noise, t = torch.randn_like(images), torch.randn_like(images), torch.rand(len(images))
    variants: Variants = {
        "nblib: FieldModel of ddpm": lambda: step(model(images).loss),
        "the network alone, on a fixed input": lambda: step(F.mse_loss(network(noisy, t), noise)),
    }
    if find_spec("diffusers"):
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(STEPS)

        def recipe() -> None:
            x = 2 * images - 1
            z, k = torch.randn_like(x), torch.randint(0, STEPS, (len(x),))
            step(F.mse_loss(network(scheduler.add_noise(x, z, k), 1 - (k + 1) / STEPS), z))

        variants["diffusers: add_noise and mse_loss"] = recipe
    if find_spec("denoising_diffusion_pytorch"):
        peer = gaussian_diffusion(network, images.shape[-1])
        variants["denoising-diffusion-pytorch: GaussianDiffusion"] = lambda: step(peer(images))
    return variants


def gaussian_diffusion(network: nn.Module, side: int, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(
        Adapter(network), image_size=side, timesteps=STEPS, objective="pred_noise", beta_schedule="linear", **options
    )


def sampling(network: nn.Module, shape: tuple[int, int, int], n: int, steps: int = 50) -> Variants:
    model = nb.diffusion.ddpm(network, shape, steps=STEPS, centre=0.5, scale=0.5)

    def alone() -> None:
        with torch.no_grad():
            x = torch.randn(n, *shape)
            for i in range(steps):
                network(x, torch.full((n,), i / steps))

    variants: Variants = {
        "nblib: sample(method='ddim')": lambda: model.sample(n, method="ddim", steps=steps),
        "the network alone": alone,
    }
    if find_spec("diffusers"):
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(STEPS, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)

        @torch.no_grad()
        def loop() -> None:
            x = torch.randn(n, *shape)
            for k in scheduler.timesteps:
                x = scheduler.step(network(x, (1 - (k + 1) / STEPS).expand(n)), k, x).prev_sample

        variants["diffusers: DDIMScheduler"] = loop
    if find_spec("denoising_diffusion_pytorch"):
        peer = gaussian_diffusion(network, shape[-1], sampling_timesteps=steps)

        def quietly() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                peer.ddim_sample((n, *shape))

        variants["denoising-diffusion-pytorch: ddim_sample"] = quietly
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine()}, U-Net of width {args.width} on 28 x 28, {args.rounds} rounds")
    images = torch.rand(args.batch_size, 1, 28, 28)
    network = UNet(1, width=args.width)
    train = turns(training(network, images), args.rounds)
    report(f"(1) one training step, batch {args.batch_size}", train)
    sample = turns(sampling(network.eval(), (1, 28, 28), args.samples), args.rounds)
    report(f"(2) 50 steps of DDIM, {args.samples} images", sample)
    tiny = UNet(1, width=2, multipliers=(1,), attention=0)
    overhead = turns(sampling(tiny.eval(), (1, 8, 8), 2), args.rounds)
    report("(2b) the same with a network of almost nothing: what the sampler itself costs, 2 images of 8 x 8", overhead)
    if args.json:
        args.json.write_text(json.dumps({"train": train, "sample": sample, "overhead": overhead}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One epoch of the 784-512-2 VAE on 60,000 images: nblib.fit, the barest loop, the usual idiom, pythae's trainer.

Same network, batch, data, optimizer and machine, one process; the variants take turns, so that a machine whose speed
drifts is fair to all. Prints seconds and the ratio to the barest loop, median and range.

    python benchmarks/epoch.py [--rounds 5] [--batch-size 128] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import nblib as nb


def barest(data: nb.data.Split, batch_size: int) -> float:
    """Images on the device as uint8, gathered by index; forward, backward, fused AdamW. Nothing else."""
    model = nb.vae.VAE().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    order = torch.randperm(len(data))
    for start in range(0, len(data), batch_size):
        x = data.x.index_select(0, order[start : start + batch_size]).float().mul_(1 / 255)
        model(x).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def fit(data: nb.data.Split, batch_size: int) -> float:
    model = nb.vae.VAE()
    started = time.perf_counter()
    nb.fit(model, data, epochs=1, batch_size=batch_size, progress=False)
    return time.perf_counter() - started


def idiom(data: nb.data.Split, batch_size: int, root: Path) -> float:
    """What most tutorials do: a torchvision dataset, ToTensor, a DataLoader, a plain loop with a running loss."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    loader = DataLoader(FashionMNIST(str(root), train=True, transform=ToTensor()), batch_size, shuffle=True)
    model = nb.vae.VAE().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    total, started = 0.0, time.perf_counter()
    for x, _ in loader:
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        total += loss.item()
    return time.perf_counter() - started


def pythae(data: nb.data.Split, batch_size: int) -> float:
    """pythae's BaseTrainer on the same two networks, images in memory as float32."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 4))

        def forward(self, x: torch.Tensor) -> ModelOutput:
            mean, log_var = self.body(x).chunk(2, -1)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 512), nn.Tanh(), nn.Linear(512, 784), nn.Sigmoid())

        def forward(self, z: torch.Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.body(z).reshape(-1, 1, 28, 28))

    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        logging.disable(logging.CRITICAL)
        model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=2, reconstruction_loss="bce"), Encoder(), Decoder())
        assert sum(p.numel() for p in model.parameters()) == 807_700
        config = BaseTrainerConfig(
            output_dir=folder, num_epochs=1, per_device_train_batch_size=batch_size, learning_rate=1e-3,
            optimizer_cls="AdamW", no_cuda=True,
        )  # fmt: skip
        trainer = BaseTrainer(model, BaseDataset(data.images, data.y), training_config=config)
        trainer.prepare_training()
        started = time.perf_counter()
        trainer.train_step(epoch=1)
        seconds = time.perf_counter() - started
        logging.disable(logging.NOTSET)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = nb.data.load("fashion-mnist", part="whole")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for prefix, split in (("train", "train"), ("t10k", "test")):
            part = data if split == "train" else nb.data.load("fashion-mnist", split, part="whole", quiet=True)
            n = len(part).to_bytes(4, "big")
            side = (28).to_bytes(4, "big")
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + n + side * 2 + part.x.numpy().tobytes())
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n + part.y.byte().numpy().tobytes())
        variants: dict[str, Callable[[], float]] = {
            "barest loop": lambda: barest(data, args.batch_size),
            "nblib.fit": lambda: fit(data, args.batch_size),
            "usual idiom": lambda: idiom(data, args.batch_size, Path(folder)),
        }
        try:
            import pythae as _  # noqa: F401

            variants["pythae trainer"] = lambda: pythae(data, args.batch_size)
        except ImportError:
            print("pythae is not installed (pip install nblib[peers]): left out.")
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for variant in variants.values():
            variant()  # warm-up
        for turn in range(args.rounds):
            for name in sorted(variants, reverse=bool(turn % 2)):
                seconds[name].append(variants[name]())
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}"
    )
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, seconds["barest loop"], strict=True)]
        print(
            f"{name:15s} {statistics.median(times):6.2f} s   {statistics.median(ratios):5.2f} times the barest loop"
            f"   ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()

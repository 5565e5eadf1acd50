"""Trained models: run a recipe, keep its weights with a card, load them in one line."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import nblib
from nblib import recipes
from nblib.data import Split
from nblib.data.sets import bundled_folder
from nblib.data.sets import load as load_data
from nblib.errors import CheckpointError, DataError, unknown
from nblib.train import History, fit, load_weights, read_checkpoint, save_checkpoint
from nblib.vae.model import VAE, latent_statistics

__all__ = ["card", "cards", "load", "names", "train"]


def _folder() -> Path:
    return bundled_folder() / "zoo"


def names() -> list[str]:
    """The trained models that nblib ships."""
    return sorted(path.stem for path in _folder().glob("*.safetensors"))


def card(name: str) -> dict[str, Any]:
    """How an entry was made: recipe, settings, seed, commit, hardware, seconds, metrics, SHA-256.

    Raises:
        DataError: unknown name.
    """
    return cast(dict[str, Any], json.loads(_file(name, ".json").read_text()))


def cards(pattern: str = "*") -> dict[str, dict[str, Any]]:
    """All recorded runs whose name matches, with or without weights."""
    found = sorted((bundled_folder() / "runs").glob("*.json")) + sorted(_folder().glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in found if fnmatch(path.stem, pattern)}


def _file(name: str, suffix: str) -> Path:
    path = Path(name).with_suffix(suffix) if name.endswith((".safetensors", ".json")) else _folder() / f"{name}{suffix}"
    if not path.is_file():
        raise DataError(unknown("zoo entry", name, names()) + " A path to a .safetensors file works too.")
    return path


def load(name: str, *, device: str | torch.device = "cpu") -> nn.Module:
    """A trained model in eval mode: an entry of the zoo, or a ``.safetensors`` file that ``train`` wrote.

    Raises:
        DataError: unknown name. CheckpointError: a damaged file, or one that holds no zoo model.
    """
    path = _file(name, ".safetensors")
    tensors, info = read_checkpoint(path)
    if "recipe" not in info:
        raise CheckpointError(f"{path} is a checkpoint of a run in progress: continue it with fit(checkpoint=...).")
    recipe = recipes.get(info["recipe"])
    data = load_data(recipe.data, "test", part="bundled" if recipe.data != "digits" else "auto", quiet=True)
    model = recipe.model(recipe.resolve(overrides=info["settings"]), data)
    load_weights(model, tensors, path)
    return model.to(device).eval()


def train(
    name: str,
    *,
    profile: str = "cpu",
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | None = None,
    part: str = "auto",
    progress: bool | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Run a recipe and write ``out`` (weights) and ``out`` with the ending ``.json`` (its card).

    A run that was stopped goes on from its checkpoint beside ``out`` when it is started again.

    Returns:
        the model (its moving average where the recipe keeps one), in eval mode, and the card.
    """
    recipe = recipes.get(name)
    settings = recipe.resolve(profile, overrides)
    data, test = load_data(recipe.data, part=part), load_data(recipe.data, "test", part=part)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.model(settings, data)
    if recipe.teacher is not None:
        model.load_state_dict(load(recipe.teacher).state_dict())
    checkpoint = Path(out).with_suffix(".resume") if out else None
    every = max(500, len(data) // max(1, settings["batch_size"]))
    history = fit(
        model,
        recipe.examples(data, settings, seed, device),
        **recipe.fit_settings(settings),
        seed=seed,
        eval_data=recipe.examples(test, settings, seed, device),
        transform=recipe.transform,
        checkpoint=checkpoint,
        checkpoint_every=every,
        device=device,
        progress=progress,
    )
    model = (history.ema or model).eval()
    tensors = model.state_dict()
    info = {"recipe": name, "settings": settings, "seed": seed, "profile": profile}
    entry = {**info, **_circumstances(data, history), "metrics": _metrics(model, test, history)}
    if out:
        path = Path(out).with_suffix(".safetensors")
        save_checkpoint(path, tensors, info)
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".json").write_text(json.dumps(entry, indent=1) + "\n")
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
    return model, entry


def _circumstances(data: Split, history: History) -> dict[str, Any]:
    assert history.model is not None
    device = next(history.model.parameters()).device
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10, check=True, env={**os.environ, "LC_ALL": "C"},
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        commit = "not from a checkout"
    return {
        "data": data.title,
        "hardware": hardware,
        "torch": torch.__version__,
        "nblib": nblib.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(history.seconds, 1),
        "steps": history.step,
        "path": [{k: round(v, 4) for k, v in row.items()} for row in history.evals],
    }


def _metrics(model: nn.Module, test: Split, history: History) -> dict[str, Any]:
    metrics: dict[str, Any] = {k: round(v, 4) for k, v in history.last.items() if k != "step"}
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    if isinstance(model, VAE):
        device = next(model.parameters()).device
        use = latent_statistics(model, test.images.to(device))
        metrics["kl_per_dim"] = [round(float(v), 4) for v in use["kl_per_dim"]]
        metrics["active_kl"], metrics["active_units"] = use["active_kl"], use["active_units"]
    return metrics

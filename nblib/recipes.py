"""Recipes: a data set, a model and training settings under one name, in three sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nblib.data import Split
from nblib.errors import DataError, unknown
from nblib.page import PROFILES

__all__ = ["RECIPES", "Recipe", "get"]

FIT = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "schedule", "warmup", "clip", "ema", "precision",
       "compile")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What ``python -m nblib train NAME`` runs.

    Attributes:
        settings: every parameter that ``--set`` knows, with its default; those of ``fit`` and those of the model.
        epochs: the number of epochs in each profile.
    """

    name: str
    about: str
    data: str
    build: Callable[..., nn.Module]
    settings: dict[str, Any]
    epochs: dict[str, float]

    def resolve(self, profile: str = "cpu", overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        """All settings for a profile, with some replaced.

        Raises:
            DataError: unknown profile or parameter; a value of another type than the default.
        """
        if profile not in PROFILES:
            raise DataError(unknown("profile", profile, PROFILES))
        settings = {**self.settings, "epochs": float(self.epochs[profile])}
        for name, value in (overrides or {}).items():
            if name not in settings:
                raise DataError(unknown(f"parameter of {self.name}", name, settings))
            settings[name] = _like(name, value, settings[name])
        return settings

    def model(self, settings: dict[str, Any], data: Split) -> nn.Module:
        """The untrained model for these settings and this data."""
        own = {name: value for name, value in settings.items() if name not in FIT}
        return self.build(shape=tuple(data.x.shape[1:]), **own)

    @staticmethod
    def fit_settings(settings: dict[str, Any]) -> dict[str, Any]:
        """The part of the settings that belongs to ``fit``."""
        return {name: value for name, value in settings.items() if name in FIT}


def _like(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``: what comes from the command line is text."""
    try:
        if isinstance(default, bool):
            if str(value).lower() not in ("true", "false"):
                raise ValueError
            return str(value).lower() == "true"
        if isinstance(default, tuple):
            return tuple(int(v) for v in (str(value).split(",") if isinstance(value, str) else value))
        if default is None:
            return None if str(value).lower() == "none" else float(value)
        typed = type(default)(value)
        if isinstance(default, int) and typed != float(value):
            raise ValueError
        return typed
    except (TypeError, ValueError):
        kind = "a number" if default is None else f"of type {type(default).__name__}"
        raise DataError(f"{name} must be {kind}, like its default {default!r}; got {value!r}.") from None


def _vae(**settings: Any) -> nn.Module:
    from nblib.vae import VAE

    return VAE(**settings)


_VAE: dict[str, Any] = {
    "latent": 2, "network": "mlp", "hidden": (512,), "activation": "tanh", "likelihood": "bernoulli",
    "decoder_std": 1.0,
    "std": "softplus", "bound": 10.0, "kl": "analytic", "beta": 1.0, "beta_warmup": 0, "k": 1,
    "batch_size": 128, "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.01, "schedule": "constant", "warmup": 600,
    "clip": None, "ema": None, "precision": "float32", "compile": False,
}  # fmt: skip

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "vae-digits",
            "the smallest: 8x8 digits, 64-128-8-128-64, seconds on a CPU",
            "digits",
            _vae,
            {**_VAE, "latent": 8, "hidden": (128,), "warmup": 0, "levels": 17},
            {"smoke": 3, "cpu": 100, "gpu": 100},
        ),
        Recipe(
            "vae-fashion",
            "784-512-2-512-784, tanh, 807,700 parameters: the network of the chapter's tables",
            "fashion-mnist",
            _vae,
            _VAE,
            {"smoke": 0.1, "cpu": 60, "gpu": 150},
        ),
        Recipe(
            "vae-mnist",
            "the same network on MNIST",
            "mnist",
            _vae,
            _VAE,
            {"smoke": 0.1, "cpu": 60, "gpu": 150},
        ),
        Recipe(
            "vae-fashion-conv",
            "residual convolutions, 16 latent dimensions, learned decoder variance",
            "fashion-mnist",
            _vae,
            {**_VAE, "network": "conv", "latent": 16, "likelihood": "gaussian", "width": 32, "clip": 1.0,
             "schedule": "cosine", "ema": 0.999},
            {"smoke": 0.02, "cpu": 3, "gpu": 60},
        ),
    )
}  # fmt: skip


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        DataError: unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        raise DataError(unknown("recipe", name, RECIPES))
    return RECIPES[name]

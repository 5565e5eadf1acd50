"""Recipes: a data set, a model and training settings under one name, in three sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nblib.data import Split
from nblib.errors import DataError, unknown
from nblib.page import PROFILES

__all__ = ["RECIPES", "Recipe", "get"]

FIT = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "schedule", "warmup", "clip", "ema", "precision",
       "compile")  # fmt: skip
PAIRS = ("pairs", "pair_steps")
Examples = Callable[[Split, dict[str, Any], int, "str | torch.device | None"], "Split | Tensor"]
Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What ``python -m nblib train NAME`` runs.

    Attributes:
        settings: every parameter that ``--set`` knows, with its default; those of ``fit``, of the pairs and of the
            model.
        epochs: the number of epochs in each profile.
        examples: ``(split, settings, seed, device) ->`` what ``fit`` is given in place of the split.
        transform: of ``fit``.
        teacher: the zoo entry whose weights the model starts from.
    """

    name: str
    about: str
    data: str
    build: Callable[..., nn.Module]
    settings: dict[str, Any]
    epochs: dict[str, float]
    examples: Examples = lambda data, *_: data
    transform: Transform | None = None
    teacher: str | None = None

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
        own = {name: value for name, value in settings.items() if name not in (*FIT, *PAIRS)}
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


def _field(method: str) -> Callable[..., nn.Module]:
    """How to build a class-conditional U-Net that is trained as one of the methods of diffusion and flow matching."""

    def build(
        shape: tuple[int, ...], width: int, multipliers: tuple[int, ...], classes: int, **options: Any
    ) -> nn.Module:
        from nblib import diffusion, flow_matching
        from nblib.networks import UNet

        constructors = {
            "ddpm": diffusion.ddpm, "vp": diffusion.vp, "cfm": flow_matching.cfm,
            "rectified_flow": flow_matching.rectified_flow, "distill": flow_matching.distill,
        }  # fmt: skip
        if "noise_schedule" in options:  # "schedule" is that of the learning rate
            options["schedule"] = options.pop("noise_schedule")
        network = UNet(shape[0], width=width, multipliers=multipliers, classes=classes)
        return constructors[method](network, shape, classes=classes, centre=0.5, scale=0.5, **options)

    return build


def _labelled(data: Split, *_: Any) -> Tensor:
    """Images and labels as rows of bytes, ``(N, D + 1)``; ``dequantized`` makes them what ``pack`` makes."""
    return torch.cat([data.x.flatten(1), data.y.to(torch.uint8).unsqueeze(1)], 1)


def dequantized(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform dequantization of all columns but the last, the label: bytes ``(B, D + 1)`` to floats."""
    x, labels = batch[:, :-1], batch[:, -1:]
    return torch.cat([(x + torch.rand(x.shape, device=x.device, generator=generator)) / 256, labels], 1)


def _pairs_of(teacher: str) -> Examples:
    """Noise and where the teacher carries it, with labels: all classes and, one time in six, no label."""

    def pairs(data: Split, settings: dict[str, Any], seed: int, device: str | torch.device | None) -> Tensor:
        from nblib import zoo
        from nblib.field import FieldModel, pack
        from nblib.flow_matching import reflow

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = zoo.load(teacher, device=device)
        assert isinstance(model, FieldModel)
        assert model.classes is not None
        held_out = data.split == "test"
        n = settings["pairs"] // 20 if held_out else settings["pairs"]
        labels = torch.arange(n, device=device) % (model.classes + 2)
        labels = labels.masked_fill(labels >= model.classes, -1)
        generator = torch.Generator(device).manual_seed(2 * seed + held_out)
        made = reflow(model, n, condition=labels, generator=generator, batch_size=500, steps=settings["pair_steps"])
        return pack(made, labels)

    return pairs


_FIELD: dict[str, Any] = {
    "width": 16, "multipliers": (1, 2, 4), "classes": 10, "drop": 0.2,
    "batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "weight_decay": 0.0, "schedule": "cosine", "warmup": 200,
    "clip": None, "ema": 0.999, "precision": "bf16", "compile": False,
}  # fmt: skip
# A student knows its labels: each pair was made with the one that it carries.
_STUDENT: dict[str, Any] = {**_FIELD, "drop": 0.0, "lr": 1e-3, "pairs": 20_000, "pair_steps": 12}
_EPOCHS = {"smoke": 0.01, "cpu": 7, "gpu": 100}


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
        Recipe(
            "ddpm-fashion",
            "a class-conditional U-Net of 316,705 parameters as DDPM: cosine schedule, 1,000 steps",
            "fashion-mnist",
            _field("ddpm"),
            {**_FIELD, "noise_schedule": "cosine"},
            _EPOCHS,
            _labelled,
            dequantized,
        ),
        Recipe(
            "score-fashion",
            "the same U-Net as a score SDE: variance preserving, continuous time",
            "fashion-mnist",
            _field("vp"),
            {**_FIELD, "times": "low-discrepancy"},
            _EPOCHS,
            _labelled,
            dequantized,
        ),
        Recipe(
            "flow-fashion",
            "the same U-Net by flow matching along straight lines",
            "fashion-mnist",
            _field("cfm"),
            _FIELD,
            _EPOCHS,
            _labelled,
            dequantized,
        ),
        Recipe(
            "reflow-fashion",
            "flow-fashion trained on the pairs that it makes",
            "fashion-mnist",
            _field("rectified_flow"),
            {**_STUDENT, "coupling": "pairs"},
            {"smoke": 0.01, "cpu": 10, "gpu": 100},
            _pairs_of("flow-fashion"),
            teacher="flow-fashion",
        ),
        Recipe(
            "distill-fashion",
            "reflow-fashion in one step",
            "fashion-mnist",
            _field("distill"),
            _STUDENT,
            {"smoke": 0.01, "cpu": 10, "gpu": 100},
            _pairs_of("reflow-fashion"),
            teacher="reflow-fashion",
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

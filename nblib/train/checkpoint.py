"""Checkpoints: one safetensors file, hashed, written aside and renamed; nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nblib.errors import CheckpointError

__all__ = ["load_weights", "read_checkpoint", "save_checkpoint"]


def _hash(tensors: dict[str, Tensor], info: str) -> str:
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``info`` so that ``path`` holds either the old or the new file, whole.

    Raises:
        CheckpointError: the file cannot be written (a full disk, no permission); the old one is untouched.
    """
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(info)
    blob = save(tensors, {"nblib": text, "sha256": _hash(tensors, text)})
    aside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        kept = "the checkpoint that was there before is intact" if path.exists() else "nothing was written"
        raise CheckpointError(
            f"Could not save {path} ({len(blob):,} bytes): {error.strerror or error}; {kept}."
            " Free some space or choose another place, then run the same call again to go on."
        ) from error


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors (on the CPU) and info.

    Raises:
        CheckpointError: no such file; not a checkpoint of nblib; truncated or altered content.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            # Cloned, or the tensors would be views of the file and change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): delete it, or use an older one.") from None
    if "nblib" not in meta:
        raise CheckpointError(f"{path} is a safetensors file, but not one that nblib wrote.")
    if meta.get("sha256") != _hash(tensors, meta["nblib"]):
        raise CheckpointError(f"{path} was altered: its content does not match its own SHA-256. Use another copy.")
    return tensors, json.loads(meta["nblib"])


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict after comparing names and shapes.

    Raises:
        CheckpointError: the weights belong to another model; the first difference is named.
    """
    own = module.state_dict()
    for name in [*own, *tensors]:
        there = tuple(tensors[name].shape) if name in tensors else "absent"
        here = tuple(own[name].shape) if name in own else "absent"
        if there != here:
            raise CheckpointError(
                f"{source} holds another model than this {type(module).__name__}: {name!r} is {there} in the file"
                f" and {here} in the model. Build the model with the settings of the checkpoint."
            )
    module.load_state_dict(tensors)

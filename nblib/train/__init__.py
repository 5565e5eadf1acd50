"""One training loop for every family."""

from nblib.train.checkpoint import load_weights, read_checkpoint, save_checkpoint
from nblib.train.history import History
from nblib.train.loop import fit
from nblib.train.protocol import HasBound, HasLatent, HasLogProb, LossOut, Model

__all__ = [
    "HasBound",
    "HasLatent",
    "HasLogProb",
    "History",
    "LossOut",
    "Model",
    "fit",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
]

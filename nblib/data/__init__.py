"""Real data (``load``) and targets whose density is known exactly (``toy``)."""

from nblib.data import toy
from nblib.data.sets import NAMES, Split, load

__all__ = ["NAMES", "Split", "load", "toy"]

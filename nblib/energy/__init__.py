"""Energy-based and score-based learning: chapter *Score matching*."""

from nblib.energy.score import (
    OBJECTIVES,
    DenoisingAutoencoder,
    Score,
    ScoreModel,
    denoising,
    directions,
    explicit,
    implicit,
    score_of,
    sliced,
)

__all__ = [
    "OBJECTIVES",
    "DenoisingAutoencoder",
    "Score",
    "ScoreModel",
    "denoising",
    "directions",
    "explicit",
    "implicit",
    "score_of",
    "sliced",
]

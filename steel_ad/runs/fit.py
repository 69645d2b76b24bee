"""A run's training, and the picture of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import parallel
from steel_ad.train.resume import resume
from steel_ad.train.state import TrainState


def fit(
    train: Callable[..., TrainState],
    state: TrainState,
    workdir: Path,
    *,
    total_steps: int,
    settings: Mapping[str, Any],
    stage: str = "train",
    evaluate_only: bool = False,
) -> tuple[TrainState, float]:
    """`train.resume.resume`, and `figures/training.png` (or `training_STAGE.png`) when a stage has been trained.

    Returns:
      The trained state, and the seconds that its training has taken over all starts.

    Raises:
      InputError: as `resume`.
    """
    state, seconds, history = resume(
        train, state, workdir, total_steps=total_steps, settings=settings, stage=stage, evaluate_only=evaluate_only
    )
    picture = workdir / "figures" / ("training.png" if stage == "train" else f"training_{stage}.png")
    if history and parallel.is_main() and not picture.exists() and not evaluate_only:
        from steel_ad.report import training  # not before the first step

        columns = {name: np.array([row[name] for row in history]) for name in ("step", "loss")}
        training.training_curve(picture, columns, title=f"training: {stage}")
    return state, seconds

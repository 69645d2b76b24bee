"""A run's training, and the picture of it."""

from collections.abc import Callable

import numpy as np

from steel_ad import parallel
from steel_ad.runs.run import Run
from steel_ad.train.resume import resume
from steel_ad.train.state import TrainState


def fit(
    this: Run,
    train: Callable[..., TrainState],
    state: TrainState,
    *,
    total_steps: int,
    stage: str = "train",
    evaluate_only: bool = False,
) -> tuple[TrainState, float]:
    """The trained state and the seconds that it took over all starts: `resume` in the run's folder, with a picture when it is
    done."""
    state, seconds, history = resume(
        *(train, state, this.folder),
        total_steps=total_steps,
        settings=this.settings,
        stage=stage,
        evaluate_only=evaluate_only,
    )
    picture = this.folder / "figures" / ("training.png" if stage == "train" else f"training_{stage}.png")
    if history and parallel.is_main() and not picture.exists() and not evaluate_only:
        from steel_ad.report import training  # not before the first step

        columns = {name: np.array([row[name] for row in history]) for name in ("step", "loss")}
        training.training_curve(picture, columns, title=f"training: {stage}")
    return state, seconds

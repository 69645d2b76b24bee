"""Training in a working directory: from its newest checkpoint to the end, with progress and a history of the steps."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steel_ad import files, parallel
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.train.state import TrainState


def resume(
    train: Callable[..., TrainState],
    state: TrainState,
    workdir: Path,
    *,
    total_steps: int,
    settings: Mapping[str, Any],
    stage: str = "train",
    evaluate_only: bool = False,
) -> tuple[TrainState, float, list[dict[str, float]]]:
    """Trains from the newest checkpoint of a stage to its end, or only restores it.

    Writes `checkpoints/` and `train.csv` for the stage "train", and for another one the same with its name.

    Args:
      train: called with the keywords `state`, `history` (of the steps before), `on_step` and `save`, as `train.fit.fit` takes
        them; returns the state after `total_steps`.
      state: the initial state; training donates it.
      settings: kept with each checkpoint.
      evaluate_only: restores, and does not train.

    Returns:
      The state, the seconds that its training took over all starts, and a row of metrics a step, with its "step" from 1.

    Raises:
      InputError: as `train`; a damaged checkpoint; a full disk; `evaluate_only` and no checkpoint.
    """
    from steel_ad.train.checkpoint import Checkpoints

    suffix = "" if stage == "train" else f"_{stage}"
    path = workdir / f"train{suffix}.csv"
    state = parallel.put(state, parallel.replicated(parallel.mesh()))
    history: list[dict[str, float]] = []
    before = seconds = 0.0
    with Checkpoints(workdir / f"checkpoints{suffix}") as checkpoints:
        if checkpoints.latest() is not None:
            state, record = checkpoints.restore(state)
            before = seconds = record["seconds"]
            history = [row for row in read_history(path) if row["step"] <= int(state.step)]
        done = int(state.step)
        if evaluate_only and done == 0:
            raise InputError(f"there is no checkpoint in {workdir} to evaluate: train first, without --evaluate_only")
        if evaluate_only or done >= total_steps:
            return state, seconds, history
        start = time.perf_counter()
        with progress(stage, total_steps, "steps", done=done) as update:

            def on_step(step: int, row: dict[str, float]) -> None:
                history.append({"step": step, **row})
                update(step, f"loss {row['loss']:.4f}")

            def save(step: int, state: TrainState) -> None:
                nonlocal seconds
                files.write_csv(path, history)
                seconds = before + time.perf_counter() - start
                checkpoints.save(step, state, {"seconds": seconds, "settings": settings})

            state = train(state=state, history=tuple(history), on_step=on_step, save=save)
    return state, seconds, history


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history, none where there is no file.

    Raises:
      InputError: the file is damaged.
    """
    if not path.exists():
        return []
    with files.understood(path, "delete it to go on without the record of the steps before"):
        return [
            {"step": int(row.pop("step")), **{k: float(v) for k, v in row.items()}}
            for row in files.read_csv(path, ("step", "loss"))
        ]

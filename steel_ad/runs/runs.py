"""What every run that trains keeps of its training: checkpoints, history and a picture."""

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import files, parallel
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.train.state import TrainState

# (step number from 1, metrics)
OnStep = Callable[[int, dict[str, float]], None]
Save = Callable[[int, TrainState], None]


def fit(
    train: Callable[[TrainState, OnStep, Save], TrainState],
    state: TrainState,
    workdir: Path,
    *,
    total_steps: int,
    settings: Mapping[str, Any],
    stage: str = "train",
    evaluate_only: bool = False,
) -> tuple[TrainState, float]:
    """Trains from the newest checkpoint of a stage to its end, with progress, history and a picture of it.

    Writes `checkpoints/`, `train.csv` and `figures/training.png` for the stage "train", and for another one the same with
    its name.

    Args:
      train: (state, on_step, save) -> the state after `total_steps`.
      state: the initial state; training donates it.
      settings: kept with each checkpoint.

    Returns:
      The trained state, and the seconds that its training has taken over all starts.

    Raises:
      InputError: as `train`; a damaged checkpoint; a full disk; `evaluate_only` and no checkpoint.
    """
    from steel_ad.train.checkpoint import Checkpoints

    main = stage == "train"
    state = parallel.put(state, parallel.replicated(parallel.mesh()))
    record_path = workdir / ("train.csv" if main else f"train_{stage}.csv")
    history: list[dict[str, float]] = []
    before = seconds = 0.0
    with Checkpoints(workdir / ("checkpoints" if main else f"checkpoints_{stage}")) as checkpoints:
        if checkpoints.latest() is not None:
            state, record = checkpoints.restore(state)
            before = seconds = record["seconds"]
            history = [row for row in _read_history(record_path) if row["step"] <= int(state.step)]
        done = int(state.step)
        if evaluate_only and done == 0:
            raise InputError(f"there is no checkpoint in {workdir} to evaluate: train first, without --evaluate_only")
        if not evaluate_only and done < total_steps:
            start = time.perf_counter()

            with progress(stage, total_steps, "steps", done=done) as update:

                def on_step(step: int, row: dict[str, float]) -> None:
                    history.append({"step": step, **row})
                    update(step, f"loss {row['loss']:.4f}")

                def save(step: int, state: TrainState) -> None:
                    nonlocal seconds
                    files.write_csv(record_path, history)
                    seconds = before + time.perf_counter() - start
                    checkpoints.save(step, state, {"seconds": seconds, "settings": settings})

                state = train(state, on_step, save)
    picture = workdir / "figures" / ("training.png" if main else f"training_{stage}.png")
    if history and parallel.is_main() and not picture.exists() and not evaluate_only:
        from steel_ad.report import figures  # not before the first step

        columns = {name: np.array([row[name] for row in history]) for name in ("step", "loss")}
        figures.training_curve(picture, columns, title=f"training: {stage}")
    return state, seconds


def _read_history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with (
        files.understood(path, "delete it to go on without the record of the steps before"),
        path.open(newline="", encoding="utf-8") as file,
    ):
        return [
            {"step": int(row.pop("step")), **{k: float(v) for k, v in row.items()}, "loss": float(row["loss"])}
            for row in csv.DictReader(file)
        ]


def uses(manifest: Sequence[dict], train: np.ndarray, validation: np.ndarray) -> list[dict]:
    """Manifest rows with a column `use`: "train", "validation" or "none"."""
    use = dict.fromkeys(train.tolist(), "train") | dict.fromkeys(validation.tolist(), "validation")
    return [{**row, "use": use.get(i, "none")} for i, row in enumerate(manifest)]

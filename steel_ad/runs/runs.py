"""What every run that trains keeps in its working directory: settings, manifest, checkpoints, history."""

import csv
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad import files, parallel
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.report import tables
from steel_ad.train.state import TrainState

# (step number from 1, metrics)
OnStep = Callable[[int, dict[str, float]], None]
Save = Callable[[int, TrainState], None]

# Settings that came after the first runs, with what those runs did.
_LATER = {"train_images": 0, "data_path": "auto", "resident_mb": 1024}


def begin(
    workdir: Path, settings: Mapping[str, Any], *, evaluate_only: bool, reading: Collection[str]
) -> dict[str, Any] | None:
    """Checks that a workdir is new or holds a run of these settings; writes nothing.

    Args:
      reading: settings that only evaluation uses, and may differ from what training began with.

    Returns:
      What `metrics.json` holds if the run is finished with these very settings and not `evaluate_only`, else None.

    Raises:
      InputError: other settings, or nothing there to evaluate.
    """
    path = workdir / "config.json"
    if not path.exists():
        if evaluate_only:
            raise InputError(f"there is no run in {workdir} to evaluate: train one first, without --evaluate_only")
        return None
    known = since(settings, files.read_json(path, dict))
    ours, theirs = ({k: v for k, v in d.items() if k not in reading} for d in (settings, known))
    if other := configs.difference(ours, theirs):
        raise InputError(f"{workdir} holds a run of another config, which differs in {other}: use a new --workdir")
    metrics = workdir / "metrics.json"
    if evaluate_only or not metrics.exists():
        return None
    record = files.read_json(metrics, dict)
    with files.understood(metrics, "delete it and run again"):
        if not record.get("finished") or since(settings, record.get("config", {})) != settings:
            return None
        # What binaries print.
        several = record.get("experiment") == "transfer"
        for part in [p for when in ("before", "after") for p in record[when].values()] if several else [record]:
            tables.metrics(part["maps"])
        return record


def since(settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, completed by those that did not exist when they were recorded."""
    return {**{k: v for k, v in _LATER.items() if k in settings}, **recorded}


def claim(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Records the settings of a new workdir, once everything that could be wrong with them has been looked at."""
    path = workdir / "config.json"
    if not path.exists():
        files.write_json(path, settings)


def keep(path: Path, record: Any, what: str) -> None:
    """Records what a run uses, or checks it against what it began with.

    Raises:
      InputError: it has changed.
    """
    if not path.exists():
        files.write_json(path, record)
    elif files.read_json(path) != record:
        raise InputError(
            f"the {what} are not those that the run in {path.parent} began with (see {path.name} there): "
            "restore them or use a new --workdir"
        )


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

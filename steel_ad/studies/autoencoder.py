"""The autoencoder experiment: train on good images, calibrate on good images, show where the defects are (SPEC section 4)."""

import csv
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.data import datasets, patches
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.studies import evaluation, files
from steel_ad.train.state import TrainState

DATA = "procedural/teardrop1"


def run(config: configs.Autoencoder, *, data: str, workdir: Path, evaluate_only: bool = False) -> dict[str, Any]:
    """Trains (or goes on training), evaluates and writes everything to `workdir`.

    Writes `config.json`, `manifest.json` (hashes of the good images and which of them calibrate), `checkpoints/`, `train.csv`,
    `metrics.json`, `scores.csv` and `figures/`. A finished run is only read.

    Returns:
      What `metrics.json` holds.

    Raises:
      InputError: data that cannot be used, a workdir of other settings or images, a dead run, a full disk.
    """
    autoencoder.loss_function(config)  # a wrong loss should fail before anything is read or written
    settings = {**configs.to_dict(config), "data": data}
    claim(workdir, settings, fresh=not evaluate_only)
    finished = workdir / "metrics.json"
    if finished.exists() and not evaluate_only:
        return files.read_json(finished)
    dataset = datasets.load(data, min_size=config.patch_size)
    train_indices, validation_indices = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
    manifest = [
        {**row, "use": "validation" if i in set(validation_indices.tolist()) else "train"}
        for i, row in enumerate(dataset.manifest)
    ]
    keep_manifest(workdir, manifest)
    training = [dataset.train[i] for i in train_indices]
    validation = [dataset.train[i] for i in validation_indices]
    state, seconds = _train(config, patches.stack(training), workdir, evaluate_only)

    detectors = {name: AutoencoderDetector(config, name) for name in config.maps}
    states = dict.fromkeys(detectors, state.params)
    good = evaluation.residual_maps(detectors, states, validation, radius=config.radius, label="calibrate")
    start = time.perf_counter()
    maps = evaluation.residual_maps(
        detectors, states, [t.image for t in dataset.test], radius=config.radius, label="test"
    )
    elapsed = time.perf_counter() - start
    reconstruct = jax.jit(lambda image: autoencoder.reconstruct(config, state.params, image.astype(jnp.float32) / 255))
    return evaluation.report(
        workdir,
        maps,
        good,
        dataset.test,
        percentile=config.percentile,
        reconstruct=lambda image: np.asarray(reconstruct(image)),
        record={
            "experiment": "autoencoder",
            "dataset": dataset.name,
            "images": {"train": len(training), "validation": len(validation), "test": len(dataset.test)},
            "config": settings,
            "train_seconds": seconds,
            "test_megapixels_per_second": sum(t.image.size for t in dataset.test) / 1e6 / elapsed if elapsed else None,
            "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
            "versions": versions(),
        },
    )


def claim(workdir: Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Records the settings of a new workdir, or checks them against those of an old one.

    Raises:
      InputError: other settings, or (`fresh` False) no run there.
    """
    path = workdir / "config.json"
    if not path.exists():
        if not fresh:
            raise InputError(f"there is no run in {workdir} to evaluate: train one first, without --evaluate_only")
        files.write_json(path, settings)
        return
    there = files.read_json(path)
    # What is read off a trained model may differ when it is only evaluated.
    reading = (
        set() if fresh else {"data", "stride", "maps", "residual_constants", "window_size", "percentile", "radius"}
    )
    ours, theirs = ({k: v for k, v in d.items() if k not in reading} for d in (settings, there))
    if other := configs.difference(ours, theirs):
        raise InputError(f"{workdir} holds a run of another config, which differs in {other}: use a new --workdir")


def keep_manifest(workdir: Path, manifest: list[dict]) -> None:
    """Records which good images the run uses, or checks them against those it began with.

    Raises:
      InputError: an image has changed, come or gone.
    """
    path = workdir / "manifest.json"
    if not path.exists():
        files.write_json(path, manifest)
    elif files.read_json(path) != manifest:
        raise InputError(
            f"the good images are not those that the run in {workdir} began with (see manifest.json there): "
            "restore them or use a new --workdir"
        )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), "device": jax.devices()[0].device_kind, **packages}


def _train(config, images, workdir: Path, evaluate_only: bool) -> tuple[TrainState, float | None]:
    """The trained state, from a checkpoint as far as there is one, and the seconds that training has taken in all."""
    from steel_ad.report import figures
    from steel_ad.train.checkpoint import Checkpoints

    state = autoencoder.initial_state(config, jax.random.key(config.seed))
    history: list[dict[str, float]] = []
    before = seconds = 0.0
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        if checkpoints.latest() is not None:
            state, record = checkpoints.restore(state)
            before = record["seconds"]
            history = [row for row in _read_history(workdir / "train.csv") if row["step"] <= int(state.step)]
        done = int(state.step)
        if evaluate_only and done == 0:
            raise InputError(f"there is no checkpoint in {workdir} to evaluate: train first, without --evaluate_only")
        if evaluate_only or done >= config.total_steps:
            return state, before
        start = time.perf_counter()

        with progress("train", config.total_steps, "steps", done=done) as update:

            def on_step(step: int, row: dict[str, float]) -> None:
                history.append({"step": step, **row})
                update(step, f"loss {row['loss']:.4f}")

            def save(step: int, state: TrainState) -> None:
                files.write_csv(workdir / "train.csv", history)
                nonlocal seconds
                seconds = before + time.perf_counter() - start
                checkpoints.save(step, state, {"seconds": seconds})

            state = autoencoder.train(config, images, state=state, on_step=on_step, save=save)
    columns = {name: np.array([row[name] for row in history]) for name in ("step", "loss")}
    figures.training_curve(workdir / "figures" / "training.png", columns, title=f"training, loss {config.loss}")
    return state, seconds


def _read_history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: int(v) if k == "step" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]

"""The autoencoder experiment: train on good images, calibrate on good images, show where the defects are (SPEC section 4)."""

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import losses, parallel
from steel_ad.data import datasets, patches, stored
from steel_ad.data.stored import Stored
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.runs import evaluation, runs
from steel_ad.versions import versions

# What is read off a trained model; --evaluate_only may change it.
READING = ("stride", "maps", "residual_constants", "window_size", "percentile", "radius")


def run(
    config: configs.Autoencoder,
    *,
    data: str,
    workdir: Path,
    evaluate_only: bool = False,
    load: datasets.Load = datasets.load,
) -> dict[str, Any]:
    """Trains (or goes on training), evaluates and writes everything to `workdir`.

    Writes `config.json`, `manifest.json` (hashes of the good images and which of them calibrate), `checkpoints/`, `train.csv`,
    `metrics.json`, `scores.csv` and `figures/`. A finished run is only read.

    Args:
      load: reads the data set, for callers that have it already.

    Returns:
      What `metrics.json` holds.

    Raises:
      InputError: data that cannot be used, a batch that the devices do not divide, a workdir of other settings or images,
        a dead run, a full disk.
    """
    check_loss(config)
    if not evaluate_only:
        autoencoder.check_batch(config, parallel.mesh())
    settings = {**configs.to_dict(config), "data": os.path.normpath(data)}
    if finished := runs.begin(workdir, settings, evaluate_only=evaluate_only, reading=READING):
        return finished
    dataset = load(data, min_size=config.patch_size, resident=config.resident_bytes)
    train_indices, validation_indices = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
    train_indices = datasets.chosen(train_indices, config.train_images, config.seed)
    runs.claim(workdir, settings)
    runs.keep(workdir / "manifest.json", runs.uses(dataset.manifest, train_indices, validation_indices), "good images")
    training, validation = (datasets.take(dataset.train, i) for i in (train_indices, validation_indices))
    plates = training if isinstance(training, Stored) else patches.stack(training)
    state, seconds = runs.fit(
        lambda state, on_step, save: autoencoder.train(config, plates, state=state, on_step=on_step, save=save),
        autoencoder.initial_state(config, jax.random.key(config.seed)),
        workdir,
        total_steps=config.total_steps,
        settings=settings,
        evaluate_only=evaluate_only,
    )

    mapper = evaluation.Mapper({name: AutoencoderDetector(config, name) for name in config.maps}, config.radius)
    states = dict.fromkeys(config.maps, state.params)
    limits = mapper.thresholds(states, validation, config.percentile, label="calibrate")
    images = datasets.images_of(dataset.test)
    start = time.perf_counter()
    maps = mapper(states, images, label="test")
    elapsed = time.perf_counter() - start
    megapixels = sum(h * w for h, w in stored.shapes(images)) / 1e6
    params = parallel.local(state.params)
    reconstruct = jax.jit(
        lambda image: autoencoder.reconstruct(config, params, image.astype(jnp.float32) / 255),
        compiler_options=cpu_compiler_options(),
    )
    return evaluation.report(
        workdir,
        maps,
        dataset.test,
        limits,
        reconstruct=lambda image: np.asarray(reconstruct(image)),
        record={
            "experiment": "autoencoder",
            "finished": int(state.step) >= config.total_steps,
            "steps": int(state.step),
            "dataset": dataset.name,
            "images": {"train": len(training), "validation": len(validation), "test": len(dataset.test)},
            "config": settings,
            "percentile": config.percentile,
            "train_seconds": seconds,
            "test_megapixels_per_second": megapixels / elapsed if elapsed else None,
            "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
            "versions": versions(),
        },
    )


def trained(config: configs.Autoencoder, workdir: Path) -> Any:
    """The parameters in the newest checkpoint of a run with these settings.

    Raises:
      InputError: there is none, or it is damaged.
    """
    state, _ = runs.fit(
        lambda state, on_step, save: state,
        autoencoder.initial_state(config, jax.random.key(config.seed)),
        workdir,
        total_steps=config.total_steps,
        settings={},
        evaluate_only=True,
    )
    return state.params


def check_loss(config: configs.Autoencoder) -> None:
    """A wrong loss should fail before anything is read or written.

    Raises:
      InputError: there is none of that name, or it does not work on the patches.
    """
    losses.check(autoencoder.loss_function(config), config.loss, config.patch_size)

"""The autoencoder experiment: train on good images, calibrate on good images, show where the defects are (SPEC section 4)."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad import losses, parallel
from steel_ad.data import datasets
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.detectors.opened import scaled
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.runs import evaluation
from steel_ad.runs.fit import fit
from steel_ad.runs.run import Run, location
from steel_ad.versions import versions


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
    and to the run's `results` folder `metrics.json`, `scores.csv` and `figures/`. A finished run is only read.

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
        parallel.check_batch(autoencoder.stage(config).batch_size, parallel.mesh())
    this = Run.begin(workdir, "autoencoder", config, {"data": location(data)}, evaluate_only=evaluate_only)
    if not evaluate_only and (record := this.finished()):
        return record
    dataset = load(data, min_size=config.patch_size, resident=config.resident_bytes)
    line = datasets.divided(dataset, config.validation_fraction, config.seed, config.train_images)
    this.claim()
    this.keep("manifest.json", line.manifest, "good images")
    state, seconds = fit(
        this,
        functools.partial(autoencoder.train, config, line.training),
        autoencoder.initial_state(config, jax.random.key(config.seed)),
        total_steps=config.total_steps,
        evaluate_only=evaluate_only,
    )
    record = {
        "finished": int(state.step) >= config.total_steps,
        "steps": int(state.step),
        "images": {"train": len(line.training), "validation": len(line.validation), "test": len(dataset.test)},
        "train_seconds": seconds,
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
    }
    return _evaluate(this, config, line, state.params, record)


def _evaluate(
    this: Run,
    config: configs.Autoencoder,
    line: datasets.Line,
    params: Any,
    record: dict[str, Any],
) -> dict[str, Any]:
    dataset = line.dataset
    mapper = evaluation.Mapper(AutoencoderDetector(config), config.radius)
    limits, _ = mapper.thresholds(params, line.validation, config.percentile, label="calibrate")
    images = datasets.images_of(dataset.test)
    start = time.perf_counter()
    maps, _ = mapper(params, images, label="test")
    elapsed = time.perf_counter() - start
    megapixels = images.num_pixels / 1e6
    here = parallel.local(params)
    reconstruct = jax.jit(
        lambda image: autoencoder.reconstruct(config, here, scaled(image)), compiler_options=cpu_compiler_options()
    )
    return evaluation.report(
        this.results,
        maps,
        dataset.test,
        limits,
        reconstruct=lambda image: np.asarray(reconstruct(image)),
        record={
            "experiment": "autoencoder",
            "dataset": dataset.name,
            "config": this.settings,
            "percentile": config.percentile,
            "test_megapixels_per_second": megapixels / elapsed if elapsed else None,
            "results": this.results_name,
            "versions": versions(),
            **record,
        },
    )


def check_loss(config: configs.Autoencoder) -> None:
    """A wrong loss should fail before anything is read or written.

    Raises:
      InputError: there is none of that name, or it does not work on the patches.
    """
    losses.check(autoencoder.loss_function(config), config.loss, config.patch_size)

"""The supervised experiment: defects inserted into good plates, two stages (SPEC section 2)."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import files, losses, metrics, parallel
from steel_ad.data import datasets, defects
from steel_ad.data.datasets import Line
from steel_ad.data.defects import Library
from steel_ad.detectors import segmentation
from steel_ad.detectors.segmentation import Samples, SegmentationDetector
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.runs import evaluation
from steel_ad.runs.evaluation import Thresholds
from steel_ad.runs.fit import fit
from steel_ad.runs.run import Run, location
from steel_ad.train.state import TrainState
from steel_ad.versions import versions

_PROCEDURAL_DEFECTS = 600
_LINE_AND = "line,"
_ALTERATIONS = {"source": "line"}  # in the record of defects; what they are made of is in the manifest
_SENTENCES = 10  # about defects left out


def run(
    config: configs.Segmentation,
    *,
    data: str,
    defects_from: str,
    workdir: Path,
    evaluate_only: bool = False,
    load: datasets.Load = datasets.load,
) -> dict[str, Any]:
    """Trains both stages on a line's good images with defects inserted (or its labelled ones), evaluates, writes `workdir`.

    Args:
      data: as `datasets.load`'s.
      defects_from: folder of defects on plain steel, "procedural", "line" (alterations of the good images), "line,FOLDER" or
        "line,procedural" for both, "labelled" (the data set's own), or "": its own where it has such, else procedural.
      load: reads the data set, for callers that have it already.

    Returns:
      What `metrics.json` holds: `maps.segmentation`, and `maps.classification` with the image keys only.

    Raises:
      InputError: data or defects that cannot be used, a workdir of other settings or images, a full disk.
    """
    check(config, evaluate_only=evaluate_only)
    inputs = {"data": location(data), "defects": defects_from}
    this = Run.begin(workdir, "segmentation", config, inputs, evaluate_only=evaluate_only)
    if not evaluate_only and (record := this.finished()):
        return record
    line = load_line(config, data, load)
    samples, used = samples_of(config, line, defects_from, [data])
    this.claim()
    this.keep("manifest.json", line.manifest, "good images")
    this.keep("defects.json", used, "defects")
    first, seconds_1 = stage_1(this, config, samples, evaluate_only=evaluate_only)
    state, seconds_2, done = stage_2(this, config, samples, first, evaluate_only=evaluate_only)
    record = {
        "experiment": "segmentation",
        "finished": done and int(first.step) >= config.total_steps,
        "config": this.settings,
        "results": this.results_name,
        "train_seconds": seconds_1 + seconds_2,
    }
    return evaluate(config, state, line, this.results, record)


def check(config: configs.Segmentation, *, evaluate_only: bool) -> None:
    """Looks at what can be wrong with the settings before anything is read or written.

    Raises:
      InputError: a loss that does not work on the patches, no such model, or a batch that the devices do not divide.
    """
    check_loss(config)
    if not evaluate_only:
        parallel.check_batch(config.batch_size, parallel.mesh())


def check_loss(config: configs.Segmentation) -> None:
    """A wrong loss should fail before anything is read or written.

    Raises:
      InputError: there is none of that name, or it does not work on the patches.
    """
    loss = losses.get(config.loss, config.loss_options, losses.SEGMENTATION_LOSSES)
    image = jax.ShapeDtypeStruct((1, config.patch_size, config.patch_size, 1), jnp.float32)
    network = segmentation.network(config)
    _, logits = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], image)
    losses.check(loss, config.loss, logits.shape[1])


def load_line(config: configs.Segmentation, data: str, load: datasets.Load = datasets.load) -> Line:
    dataset = load(data, min_size=config.patch_size, resident=config.resident_bytes)
    return datasets.divided(dataset, config.validation_fraction, config.seed, config.train_images)


def samples_of(
    config: configs.Segmentation, line: Line, defects_from: str, tested_on: Sequence[str]
) -> tuple[Samples, list[dict[str, str]]]:
    """What to train on, and a record of the defects with their hashes; none is kept for the tests of `tested_on`."""
    good, labelled = line.training, line.dataset.labelled
    if defects_from == "labelled" or (not defects_from and labelled):
        if not labelled:
            raise InputError(
                "the data set has no labelled training images: give --defects=FOLDER or --defects=procedural"
            )
        return segmentation.labelled(good, labelled, seed=config.seed), _labelled(labelled)
    if defects_from == "line":
        return Samples(good, altered=1.0), [_ALTERATIONS]
    by_line = defects_from.startswith(_LINE_AND)
    library, record = _library(config, defects_from.removeprefix(_LINE_AND), tested_on)
    if by_line:
        return Samples(good, library, config.altered), [_ALTERATIONS, *record]
    return Samples(good, library), record


def _library(
    config: configs.Segmentation, defects_from: str, tested_on: Sequence[str]
) -> tuple[Library, list[dict[str, str]]]:
    """Defects to insert, and the record of them, as `samples_of`."""
    skipped: list[str] = []
    if defects_from in ("", "procedural"):
        key = jax.random.fold_in(jax.random.key(config.seed), 7)
        library = defects.procedural(key, _PROCEDURAL_DEFECTS, size=config.defect_size)
    else:
        library, skipped = defects.load(defects_from, size=config.defect_size)
        library = defects.without(library, set().union(*map(_kept_for_tests, tested_on)))
    library, too_large = defects.fitting(library, (config.patch_size, config.patch_size))
    skipped += too_large
    for sentence in skipped[:_SENTENCES]:
        print(f"left out: {sentence}", flush=True)
    if len(skipped) > _SENTENCES:
        print(f"left out: {len(skipped) - _SENTENCES} more", flush=True)
    drawn = [hashlib.sha256(mask.tobytes()).hexdigest() for mask in np.asarray(library.mask)]
    record = [
        {"source": library.sources[s], "sha256": library.sha256[s], "mask_sha256": mask}
        for s, mask in zip(np.asarray(library.source).tolist(), drawn, strict=True)
    ]
    return library, record


def _labelled(labelled: Sequence[datasets.TestImage]) -> list[dict[str, str]]:
    """A record of labelled images with the hashes of them and their masks."""

    def one(t: datasets.TestImage) -> dict[str, str]:
        return {"source": t.name, "sha256": hashlib.sha256(t.image.tobytes() + t.mask.tobytes()).hexdigest()}

    record = []
    with ThreadPoolExecutor() as pool, progress("check labels", len(labelled), "images") as update:
        for row in pool.map(one, labelled):
            record.append(row)
            update(len(record))
    return record


def _kept_for_tests(data: str) -> set[str]:
    """Hashes of the source images whose defects a data set made by `make_dataset insert` is tested with."""
    path = Path(data) / "split.json"
    if not path.is_file():
        return set()
    record = files.read_json(path, dict)
    with files.understood(path, "make_dataset wrote something else, restore or remove it"):
        files.check(record, {"test": {"sources": [{"sha256": str}]}})
    return {source["sha256"] for source in record["test"]["sources"]}


def stage_1(
    this: Run,
    config: configs.Segmentation,
    samples: Samples,
    stage: str = "train",
    *,
    start: TrainState | None = None,
    evaluate_only: bool,
) -> tuple[TrainState, float]:
    """The trained segmentation stage, and the seconds that it took over all starts."""
    steps = config.total_adapt_steps if stage == "adapt" else config.total_steps
    trained = segmentation.stage(dataclasses.replace(config, seed=0), steps)
    return fit(
        this,
        functools.partial(segmentation.train, trained, samples, seed=config.seed, name=stage),
        segmentation.initial_segmentation(config, steps) if start is None else start,
        total_steps=steps,
        stage=stage,
        evaluate_only=evaluate_only,
    )


def stage_2(
    this: Run,
    config: configs.Segmentation,
    samples: Samples,
    first: TrainState,
    stage: str = "classifier",
    *,
    evaluate_only: bool,
) -> tuple[dict[str, Any], float, bool]:
    """The detector's state with both stages, the seconds that the classification stage took, and whether it is finished."""
    frozen = segmentation.variables(first)
    steps = config.total_classifier_steps
    trained = segmentation.stage(dataclasses.replace(config, seed=0), steps, classifier=True)
    samples = samples._replace(frozen=frozen)
    state, seconds = fit(
        this,
        functools.partial(segmentation.train, trained, samples, seed=config.seed, name=stage),
        segmentation.initial_classifier(config, parallel.local(frozen)),
        total_steps=steps,
        stage=stage,
        evaluate_only=evaluate_only,
    )
    stages = {"segmenter": frozen, "classifier": segmentation.variables(state)}
    return stages, seconds, int(state.step) >= steps


def evaluate(
    config: configs.Segmentation, state: dict[str, Any], line: Line, folder: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Calibrates and tests both stages on a line, and writes what `evaluation.report` writes to `folder`."""
    mapper = evaluation.Mapper(SegmentationDetector(config), config.radius)
    good, good_scores = mapper.thresholds(state, line.validation, config.percentile, label="calibrate")
    test = line.dataset.test
    images = datasets.images_of(test)
    start = time.perf_counter()
    maps, scores = mapper(state, images, label=f"test {line.dataset.name}")
    elapsed = time.perf_counter() - start
    megapixels = images.num_pixels / 1e6
    labels = np.array([t.defective for t in test], bool)
    classification = {}
    if scores is not None and good_scores is not None:
        classification = metrics.image_metrics(scores, labels, 0.5)
        calibrated = float(np.percentile(good_scores.astype(np.float64), config.percentile))
        classification["image_accuracy_calibrated"] = float(np.mean((scores > calibrated) == labels))
        classification["image_threshold"] = calibrated
    return evaluation.report(
        folder,
        maps,
        test,
        {"segmentation": Thresholds(config.threshold, good["segmentation"].image)},
        extra_maps={"classification": classification} if test else {},
        extra_scores={} if scores is None else {"classification": scores},
        record={
            "dataset": line.dataset.name,
            "images": {"train": len(line.training), "validation": len(line.validation), "test": len(test)},
            "test_megapixels_per_second": megapixels / elapsed if elapsed else None,
            "parameters": sum(p.size for s in state.values() for p in jax.tree.leaves(s["params"])),
            "percentile": config.percentile,
            "versions": versions(),
            **record,
        },
    )


def predictions(workdirs: Sequence[Path]) -> Path:
    """Draws several models' maps of the same test images side by side, in the first one's `figures/predictions.png`.

    Args:
      workdirs: runs of `run` on the same data, trained so far as they are.

    Raises:
      InputError: a workdir without a finished run, or runs on other data.
    """
    from steel_ad.report import evaluation as figures

    opened = [Run.open(w) for w in workdirs]
    data = opened[0].settings["data"]
    for other in opened:
        if other.name != "segmentation" or other.settings["data"] != data:
            raise InputError(f"{other.folder} holds no segmentation run on {data}: give one of the same --data")
    test = datasets.load(data, train=False, resident=0).test  # few of them are drawn
    kinds = sorted({t.kind for t in test}, key=lambda k: (k != "good", k))
    chosen = [t for kind in kinds for t in [t for t in test if t.kind == kind][:2]][:8]
    if not chosen:
        raise InputError(f"{data} has no test images to draw")
    shown: list[dict[str, tuple[np.ndarray, float]]] = [{} for _ in chosen]
    for other in opened:
        fitted = other.detector()
        mapper = evaluation.Mapper(fitted.detector, fitted.radius)
        maps, scores = mapper(fitted.state, [t.image for t in chosen], label="maps")
        name = {"unet": "U-Net", "compact_cnn": "CompactCNN"}.get(other.config.model, other.config.model)
        name = name if name not in shown[0] else f"{name}, {other.folder}"
        values = maps["segmentation"].scores if scores is None else scores
        for row, raw, score in zip(shown, maps["segmentation"].raw, values, strict=True):
            row[name] = (raw, float(score))
    picture = workdirs[0] / "figures" / "predictions.png"
    if not parallel.is_main():
        return picture
    rows = [
        figures.Prediction(name=t.name, image=t.image, truth=t.mask, maps=row)
        for t, row in zip(chosen, shown, strict=True)
    ]
    return figures.predictions(picture, rows, title=data)

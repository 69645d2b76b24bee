"""The supervised experiments: defects inserted into good plates, two stages, and transfer to another line (SPEC sections 2, 3)."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad import files, losses, metrics, parallel
from steel_ad.data import datasets, defects, patches, stored
from steel_ad.data.datasets import Dataset, Labelled
from steel_ad.data.patches import Plates
from steel_ad.data.stored import Stored
from steel_ad.detectors import segmentation
from steel_ad.detectors.segmentation import Samples, SegmentationDetector
from steel_ad.errors import InputError
from steel_ad.progress import progress
from steel_ad.runs import evaluation, runs
from steel_ad.runs.evaluation import Thresholds
from steel_ad.train.state import TrainState, create
from steel_ad.versions import versions

# What is read off a trained model; --evaluate_only may change it.
READING = ("threshold", "percentile", "radius")
_PROCEDURAL_DEFECTS = 600
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
      defects_from: folder of defects on plain steel, "procedural", "labelled" (the data set's own), or "": its own where it
        has such, else procedural.
      load: reads the data set, for callers that have it already.

    Returns:
      What `metrics.json` holds: `maps.segmentation`, and `maps.classification` with the image keys only.

    Raises:
      InputError: data or defects that cannot be used, a workdir of other settings or images, a full disk.
    """
    check_loss(config)
    if not evaluate_only:
        parallel.check_batch(config.batch_size, parallel.mesh())
    settings = {**configs.to_dict(config), "data": os.path.normpath(data), "defects": defects_from}
    if finished := runs.begin(workdir, settings, evaluate_only=evaluate_only, reading=READING):
        return finished
    line = _load_line(config, data, load)
    samples, used = _samples(config, line, defects_from, [data])
    runs.claim(workdir, settings)
    _keep(workdir, line, used)
    stage_1, seconds_1 = _stage_1(config, samples, workdir, settings, evaluate_only=evaluate_only)
    stages, seconds_2, done = _stage_2(config, samples, stage_1, workdir, settings, evaluate_only=evaluate_only)
    record = {
        "experiment": "segmentation",
        "finished": done and int(stage_1.step) >= config.total_steps,
        "config": settings,
        "train_seconds": seconds_1 + seconds_2,
    }
    return _evaluate(config, stages, line, workdir, record)


def transfer(
    config: configs.Segmentation,
    *,
    source: str,
    target: str,
    defects_from: str,
    workdir: Path,
    evaluate_only: bool = False,
    load: datasets.Load = datasets.load,
) -> dict[str, Any]:
    """Pretrains on one line, adapts on its mixture with another line's good images, tests both on both (SPEC section 3).

    Args:
      source: the line with defects; as `datasets.load`'s.
      target: the line with good images only.
      defects_from: as `run`'s, for the source line.
      load: as `run`'s, for both lines.

    Returns:
      What `metrics.json` holds: `before` and `after`, each with `source` and `target`, each as `run` returns.

    Raises:
      InputError: as `run`.
    """
    check_loss(config)
    if not evaluate_only:
        parallel.check_batch(config.batch_size, parallel.mesh())
    settings = {
        **configs.to_dict(config),
        "source": os.path.normpath(source),
        "target": os.path.normpath(target),
        "defects": defects_from,
    }
    if finished := runs.begin(workdir, settings, evaluate_only=evaluate_only, reading=READING):
        return finished
    lines = {"source": _load_line(config, source, load), "target": _load_line(config, target, load)}
    samples, used = _samples(config, lines["source"], defects_from, [source, target])
    runs.claim(workdir, settings)
    for where, line in lines.items():
        _keep(workdir / where, line, used)
    pretrained, pretrain_seconds = _stage_1(config, samples, workdir, settings, "pretrain", evaluate_only=evaluate_only)
    rule = segmentation.optimizer(config, config.total_adapt_steps)
    # Copied, since training donates what it starts from.
    params, extra = jax.tree.map(np.array, parallel.local((pretrained.params, pretrained.extra)))
    start = create(params, rule, extra)
    mixture = samples._replace(new_line=_plates(lines["target"].training))
    adapted, adapt_seconds = _stage_1(
        config, mixture, workdir, settings, "adapt", start=start, evaluate_only=evaluate_only
    )
    whole = int(pretrained.step) >= config.total_steps and int(adapted.step) >= config.total_adapt_steps
    result: dict[str, Any] = {"experiment": "transfer", "config": settings}
    for name, stage_1, data, stage_1_seconds in (
        ("before", pretrained, samples, pretrain_seconds),
        ("after", adapted, mixture, pretrain_seconds + adapt_seconds),
    ):
        stages, stage_2_seconds, done = _stage_2(
            config, data, stage_1, workdir, settings, f"classifier_{name}", evaluate_only=evaluate_only
        )
        whole = whole and done
        record = {"experiment": f"transfer, {name}", "train_seconds": stage_1_seconds + stage_2_seconds}
        result[name] = {
            where: _evaluate(config, stages, line, workdir / f"{name}_{where}", record) for where, line in lines.items()
        }
    result["finished"] = whole
    files.write_json(workdir / "metrics.json", result)
    return result


def check_loss(config: configs.Segmentation) -> None:
    """A wrong loss should fail before anything is read or written.

    Raises:
      InputError: there is none of that name, or it does not work on the patches.
    """
    loss = losses.get(config.loss, config.loss_options, losses.SEGMENTATION_LOSSES)
    losses.check(loss, config.loss, config.patch_size // (4 if config.model == "compact_cnn" else 1))


@dataclasses.dataclass(frozen=True)
class _Line:
    dataset: Dataset
    training: list[np.ndarray] | Stored
    validation: list[np.ndarray] | Stored
    manifest: list[dict[str, Any]]


def _load_line(config: configs.Segmentation, data: str, load: datasets.Load = datasets.load) -> _Line:
    dataset = load(data, min_size=config.patch_size, resident=config.resident_bytes)
    train, validation = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
    train = datasets.chosen(train, config.train_images, config.seed)
    manifest = runs.uses(dataset.manifest, train, validation)
    return _Line(dataset, datasets.take(dataset.train, train), datasets.take(dataset.train, validation), manifest)


def _plates(images: list[np.ndarray] | Stored) -> Plates | Stored:
    """As training takes them: on the device, or read while it goes on."""
    return images if isinstance(images, Stored) else patches.stack(images)


def _keep(workdir: Path, line: _Line, defects_record: list[dict[str, str]]) -> None:
    runs.keep(workdir / "manifest.json", line.manifest, "good images")
    runs.keep(workdir / "defects.json", defects_record, "defects")


def _samples(
    config: configs.Segmentation, line: _Line, defects_from: str, tested_on: Sequence[str]
) -> tuple[Samples, list[dict[str, str]]]:
    """What to train on, and a record of the defects with their hashes; none is kept for the tests of `tested_on`."""
    plates, labelled = _plates(line.training), line.dataset.labelled
    if defects_from == "labelled" or (not defects_from and labelled):
        if not labelled:
            raise InputError(
                "the data set has no labelled training images: give --defects=FOLDER or --defects=procedural"
            )
        images, masks, record = _labelled(labelled)
        return segmentation.labelled(plates, images, masks, seed=config.seed), record
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
    return Samples(plates, library), record


def _labelled(
    labelled: Sequence[datasets.TestImage],
) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray], list[dict[str, str]]]:
    """Images, masks, and a record of them with their hashes; stored ones stay so."""

    def one(i: int) -> dict[str, str]:
        t = labelled[i]
        return {"source": t.name, "sha256": hashlib.sha256(t.image.tobytes() + t.mask.tobytes()).hexdigest()}

    if not isinstance(labelled, Labelled):
        return [t.image for t in labelled], [t.mask for t in labelled], [one(i) for i in range(len(labelled))]
    record = []
    with ThreadPoolExecutor() as pool, progress("check labels", len(labelled), "images") as update:
        for row in pool.map(one, range(len(labelled))):
            record.append(row)
            update(len(record))
    return labelled.images, labelled.masks, record


def _kept_for_tests(data: str) -> set[str]:
    """Hashes of the source images whose defects a data set made by `make_dataset insert` is tested with."""
    path = Path(data) / "split.json"
    if not path.is_file():
        return set()
    record = files.read_json(path, dict)
    with files.understood(path, "make_dataset wrote something else, restore or remove it"):
        return {str(s["sha256"]) for s in record["test"]["sources"]}


def _stage_1(
    config: configs.Segmentation,
    samples: Samples | None,
    workdir: Path,
    settings: Mapping[str, Any],
    stage: str = "train",
    *,
    start: TrainState | None = None,
    evaluate_only: bool,
) -> tuple[TrainState, float]:
    steps = config.total_adapt_steps if stage == "adapt" else config.total_steps
    seedless = dataclasses.replace(config, seed=0)
    rule = segmentation.optimizer(seedless, steps)
    objective = segmentation.segmentation_objective(seedless)
    return runs.fit(
        lambda state, on_step, save: segmentation.train(
            objective, rule, samples, state, config=config, stage=stage, steps=steps, on_step=on_step, save=save
        ),
        segmentation.initial_segmentation(config, steps) if start is None else start,
        workdir,
        total_steps=steps,
        settings=settings,
        stage=stage,
        evaluate_only=evaluate_only,
    )


def _stage_2(
    config: configs.Segmentation,
    samples: Samples | None,
    stage_1: TrainState,
    workdir: Path,
    settings: Mapping[str, Any],
    stage: str = "classifier",
    *,
    evaluate_only: bool,
) -> tuple[tuple[Any, Any], float, bool]:
    """Both stages' variables, the seconds that stage 2 took, and whether it is finished."""
    frozen = segmentation.variables(stage_1)
    seedless = dataclasses.replace(config, seed=0)
    rule = segmentation.optimizer(seedless, config.total_classifier_steps)
    objective = segmentation.classifier_objective(seedless)
    state, seconds = runs.fit(
        lambda state, on_step, save: segmentation.train(
            objective,
            rule,
            (samples, frozen),
            state,
            config=config,
            stage=stage,
            steps=config.total_classifier_steps,
            on_step=on_step,
            save=save,
        ),
        segmentation.initial_classifier(config, parallel.local(frozen)),
        workdir,
        total_steps=config.total_classifier_steps,
        settings=settings,
        stage=stage,
        evaluate_only=evaluate_only,
    )
    return (frozen, segmentation.variables(state)), seconds, int(state.step) >= config.total_classifier_steps


def _evaluate(
    config: configs.Segmentation, stages: tuple[Any, Any], line: _Line, workdir: Path, record: dict[str, Any]
) -> dict[str, Any]:
    mapper = evaluation.Mapper({"segmentation": SegmentationDetector(config)}, config.radius)
    states = {"segmentation": stages[0]}
    good = mapper.thresholds(states, line.validation, config.percentile, label="calibrate")["segmentation"]
    test = line.dataset.test
    images = datasets.images_of(test)
    start = time.perf_counter()
    maps = mapper(states, images, label=f"test {line.dataset.name}")
    elapsed = time.perf_counter() - start
    megapixels = sum(h * w for h, w in stored.shapes(images)) / 1e6
    scores, good_scores = classifier_scores(config, stages, [images, line.validation])
    labels = np.array([t.defective for t in test], bool)
    classification = {}
    if test:
        classification = metrics.image_metrics(scores, labels, 0.5)
        calibrated = float(np.percentile(good_scores.astype(np.float64), config.percentile))
        classification["image_accuracy_calibrated"] = float(np.mean((scores > calibrated) == labels))
        classification["image_threshold"] = calibrated
    limits = {"segmentation": Thresholds(config.threshold, good.image)}
    return evaluation.report(
        workdir,
        maps,
        test,
        limits,
        extra_maps={"classification": classification} if test else {},
        extra_scores={"classification": scores},
        record={
            "dataset": line.dataset.name,
            "images": {"train": len(line.training), "validation": len(line.validation), "test": len(test)},
            "test_megapixels_per_second": megapixels / elapsed if elapsed else None,
            "parameters": sum(p.size for s in stages for p in jax.tree.leaves(s["params"])),
            "percentile": config.percentile,
            "versions": versions(),
            **record,
        },
    )


def classifier_scores(
    config: configs.Segmentation, stages: tuple[Any, Any], groups: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Probability of being defective of each image uint8 `[h_i, w_i]` of each group: float32 `[n]` each."""
    program = evaluation.Program(lambda stages, image: segmentation.classify(config, stages, image))
    scores = np.array(program(stages, stored.Joined(groups), label="classify"), np.float32)
    return np.split(scores, np.cumsum([len(group) for group in groups])[:-1])


def predictions(workdirs: Sequence[Path]) -> Path:
    """Draws several models' maps of the same test images side by side, in the first one's `figures/predictions.png`.

    Args:
      workdirs: runs of `run` on the same data, trained so far as they are.

    Raises:
      InputError: a workdir without a finished run, or runs on other data.
    """
    from steel_ad.report import figures

    settings = [files.read_json(w / "config.json") for w in workdirs]
    for workdir, other in zip(workdirs, settings, strict=True):
        if "defects" not in other or other["data"] != settings[0]["data"]:
            raise InputError(
                f"{workdir} holds no segmentation run on {settings[0]['data']}: give one of the same --data"
            )
    test = datasets.load(settings[0]["data"], train=False, resident=0).test  # few of them are drawn
    kinds = sorted({t.kind for t in test}, key=lambda k: (k != "good", k))
    chosen = [t for kind in kinds for t in [t for t in test if t.kind == kind][:2]][:8]
    if not chosen:
        raise InputError(f"{settings[0]['data']} has no test images to draw")
    shown: list[dict[str, tuple[np.ndarray, float]]] = [{} for _ in chosen]
    for workdir, setting in zip(workdirs, settings, strict=True):
        fields = {k: v for k, v in setting.items() if k not in ("data", "defects")}
        config = configs.from_mapping(configs.Segmentation, fields)
        stage_1, _ = _stage_1(config, None, workdir, setting, evaluate_only=True)
        stages, _, _ = _stage_2(config, None, stage_1, workdir, setting, evaluate_only=True)
        images = [t.image for t in chosen]
        mapper = evaluation.Mapper({"map": SegmentationDetector(config)}, config.radius)
        maps = mapper({"map": stages[0]}, images, label="maps")["map"]
        (scores,) = classifier_scores(config, stages, [images])
        name = {"unet": "U-Net", "compact_cnn": "CompactCNN"}[config.model]
        name = name if name not in shown[0] else f"{name}, {workdir}"
        for row, raw, score in zip(shown, maps.raw, scores, strict=True):
            row[name] = (raw, float(score))
    picture = workdirs[0] / "figures" / "predictions.png"
    if not parallel.is_main():
        return picture
    rows = [
        figures.Prediction(name=t.name, image=t.image, truth=t.mask, maps=row)
        for t, row in zip(chosen, shown, strict=True)
    ]
    return figures.predictions(picture, rows, title=settings[0]["data"])

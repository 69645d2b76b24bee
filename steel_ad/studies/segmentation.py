"""The supervised experiments: defects inserted into good plates, two stages, and transfer to another line (SPEC sections 2, 3)."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import losses, metrics
from steel_ad.data import datasets, defects, patches
from steel_ad.data.datasets import Dataset, TestImage
from steel_ad.data.defects import Library
from steel_ad.detectors import segmentation
from steel_ad.detectors.segmentation import Samples, SegmentationDetector
from steel_ad.errors import InputError
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.progress import progress
from steel_ad.studies import evaluation, files, runs
from steel_ad.studies.evaluation import Thresholds
from steel_ad.train.state import TrainState, create

# What is read off a trained model; --evaluate_only may change it.
_READING = ("threshold", "percentile", "radius")
_PROCEDURAL_DEFECTS = 600


def run(
    config: configs.Segmentation, *, data: str, defects_from: str, workdir: Path, evaluate_only: bool = False
) -> dict[str, Any]:
    """Trains both stages on a line's good images with defects inserted (or its labelled ones), evaluates, writes `workdir`.

    Args:
      data: as `datasets.load`'s.
      defects_from: folder of defects on plain steel, "procedural", or "" where the data set has labelled images.

    Returns:
      What `metrics.json` holds: `maps.segmentation`, and `maps.classification` with the image keys only.

    Raises:
      InputError: data or defects that cannot be used, a workdir of other settings or images, a full disk.
    """
    losses.get(config.loss, config.loss_options, losses.SEGMENTATION_LOSSES)  # a wrong loss should fail first
    settings = {**configs.to_dict(config), "data": data, "defects": defects_from}
    runs.claim(workdir, settings, evaluate_only=evaluate_only, reading=_READING)
    finished = workdir / "metrics.json"
    if finished.exists() and not evaluate_only:
        return files.read_json(finished)
    line = _load_line(config, data, workdir)
    samples = _samples(config, line.training, line.dataset.labelled, defects_from, data, workdir)
    stage_1, seconds_1 = _stage_1(config, samples, workdir, config.total_steps, evaluate_only=evaluate_only)
    stages, seconds_2 = _stage_2(config, samples, stage_1, workdir, evaluate_only=evaluate_only)
    return _evaluate(
        config,
        stages,
        line,
        workdir,
        {"experiment": "segmentation", "config": settings, "train_seconds": seconds_1 + seconds_2},
    )


def transfer(
    config: configs.Segmentation,
    *,
    source: str,
    target: str,
    defects_from: str,
    workdir: Path,
    evaluate_only: bool = False,
) -> dict[str, Any]:
    """Pretrains on one line, adapts on its mixture with another line's good images, tests both on both (SPEC section 3).

    Args:
      source: the line with defects; as `datasets.load`'s.
      target: the line with good images only.
      defects_from: as `run`'s, for the source line.

    Returns:
      What `metrics.json` holds: `before` and `after`, each with `source` and `target`, each as `run` returns.

    Raises:
      InputError: as `run`.
    """
    losses.get(config.loss, config.loss_options, losses.SEGMENTATION_LOSSES)
    settings = {**configs.to_dict(config), "source": source, "target": target, "defects": defects_from}
    runs.claim(workdir, settings, evaluate_only=evaluate_only, reading=_READING)
    finished = workdir / "metrics.json"
    if finished.exists() and not evaluate_only:
        return files.read_json(finished)
    lines = {
        "source": _load_line(config, source, workdir / "source"),
        "target": _load_line(config, target, workdir / "target"),
    }
    samples = _samples(
        config, lines["source"].training, lines["source"].dataset.labelled, defects_from, source, workdir
    )
    result: dict[str, Any] = {"experiment": "transfer", "config": settings}
    pretrained, _ = _stage_1(config, samples, workdir, config.total_steps, "pretrain", evaluate_only=evaluate_only)
    rule = segmentation.optimizer(config, config.total_adapt_steps)
    # Copied, since training donates what it starts from.
    params, extra = jax.tree.map(jnp.copy, (pretrained.params, pretrained.extra))
    start = create(params, rule, extra)
    mixture = samples._replace(new_line=patches.stack(lines["target"].training))
    adapted, _ = _stage_1(
        config, mixture, workdir, config.total_adapt_steps, "adapt", start=start, evaluate_only=evaluate_only
    )
    for name, stage_1, data in (("before", pretrained, samples), ("after", adapted, mixture)):
        stages, _ = _stage_2(config, data, stage_1, workdir, f"classifier_{name}", evaluate_only=evaluate_only)
        result[name] = {
            where: _evaluate(config, stages, line, workdir / f"{name}_{where}", {"experiment": f"transfer, {name}"})
            for where, line in lines.items()
        }
    files.write_json(finished, result)
    return result


@dataclasses.dataclass(frozen=True)
class _Line:
    dataset: Dataset
    training: list[np.ndarray]
    validation: list[np.ndarray]


def _load_line(config: configs.Segmentation, data: str, workdir: Path) -> _Line:
    dataset = datasets.load(data, min_size=config.patch_size)
    train, validation = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
    runs.keep(workdir / "manifest.json", runs.uses(dataset.manifest, validation), "good images")
    return _Line(dataset, [dataset.train[i] for i in train], [dataset.train[i] for i in validation])


def _samples(
    config: configs.Segmentation,
    good: Sequence[np.ndarray],
    labelled: Sequence[TestImage],
    defects_from: str,
    data: str,
    workdir: Path,
) -> Samples:
    plates = patches.stack(good)
    if not defects_from:
        if not labelled:
            raise InputError(
                f"{data} has no labelled training images: give --defects=FOLDER of defects on plain steel, or --defects=procedural"
            )
        masks = patches.stack([t.mask.astype(np.uint8) for t in labelled])
        return Samples(plates, labelled=patches.stack([t.image for t in labelled]), masks=masks)
    library = _library(config, defects_from, data, workdir)
    library, skipped = defects.fitting(library, (config.patch_size, config.patch_size))
    _name(skipped)
    return Samples(plates, library)


def _name(skipped: Sequence[str]) -> None:
    if skipped:
        print(f"{len(skipped)} left out; the first: {skipped[0]}", flush=True)


def _library(config: configs.Segmentation, defects_from: str, data: str, workdir: Path) -> Library:
    """The defects to train with: none whose source image the data set's `split.json` keeps for its tests."""
    if defects_from == "procedural":
        return defects.procedural(
            jax.random.fold_in(jax.random.key(config.seed), 7), _PROCEDURAL_DEFECTS, size=config.defect_size
        )
    library, skipped = defects.load(defects_from, size=config.defect_size)
    _name(skipped)
    split = Path(data) / "split.json"
    tested = {s["sha256"] for s in files.read_json(split)["test"]["sources"]} if split.is_file() else set()
    library = defects.without(library, tested)
    record = [{"source": s, "sha256": h} for s, h in zip(library.sources, library.sha256, strict=True)]
    runs.keep(workdir / "defects.json", record, "defects")
    return library


def _stage_1(
    config: configs.Segmentation,
    samples: Samples | None,
    workdir: Path,
    steps: int,
    stage: str = "train",
    *,
    start: TrainState | None = None,
    evaluate_only: bool,
) -> tuple[TrainState, float]:
    rule = segmentation.optimizer(config, steps)
    objective = segmentation.segmentation_objective(config)
    return runs.fit(
        lambda state, on_step, save: segmentation.train(
            objective, rule, samples, state, config=config, steps=steps, on_step=on_step, save=save
        ),
        segmentation.initial_segmentation(config, steps) if start is None else start,
        workdir,
        total_steps=steps,
        stage=stage,
        evaluate_only=evaluate_only,
    )


def _stage_2(
    config: configs.Segmentation,
    samples: Samples | None,
    stage_1: TrainState,
    workdir: Path,
    stage: str = "classifier",
    *,
    evaluate_only: bool,
) -> tuple[tuple[Any, Any], float]:
    """Both stages' variables, and the seconds that stage 2 took."""
    frozen = segmentation.variables(stage_1)
    rule = segmentation.optimizer(config, config.total_classifier_steps)
    objective = segmentation.classifier_objective(config)
    state, seconds = runs.fit(
        lambda state, on_step, save: segmentation.train(
            objective,
            rule,
            (samples, frozen),
            state,
            config=config,
            steps=config.total_classifier_steps,
            on_step=on_step,
            save=save,
        ),
        segmentation.initial_classifier(config, frozen),
        workdir,
        total_steps=config.total_classifier_steps,
        stage=stage,
        evaluate_only=evaluate_only,
    )
    return (frozen, segmentation.variables(state)), seconds


def _evaluate(
    config: configs.Segmentation, stages: tuple[Any, Any], line: _Line, workdir: Path, record: dict[str, Any]
) -> dict[str, Any]:
    detectors = {"segmentation": SegmentationDetector(config)}
    states = {"segmentation": stages[0]}
    good = evaluation.residual_maps(detectors, states, line.validation, radius=config.radius, label="calibrate")
    test = line.dataset.test
    start = time.perf_counter()
    maps = evaluation.residual_maps(
        detectors, states, [t.image for t in test], radius=config.radius, label=f"test {line.dataset.name}"
    )
    elapsed = time.perf_counter() - start
    scores = classifier_scores(config, stages, [t.image for t in test])
    good_scores = classifier_scores(config, stages, line.validation)
    labels = np.array([t.kind != "good" for t in test], bool)
    classification = {}
    if test:
        classification = metrics.image_metrics(scores, labels, 0.5)
        calibrated = float(np.percentile(good_scores.astype(np.float64), config.percentile))
        classification["image_accuracy_calibrated"] = float(np.mean((scores > calibrated) == labels))
        classification["image_threshold"] = calibrated
    limits = {
        "segmentation": Thresholds(
            config.threshold, float(np.percentile(good["segmentation"].scores.astype(np.float64), config.percentile))
        )
    }
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
            "test_megapixels_per_second": sum(t.image.size for t in test) / 1e6 / elapsed if elapsed else None,
            "parameters": sum(p.size for s in stages for p in jax.tree.leaves(s["params"])),
            "percentile": config.percentile,
            "versions": runs.versions(),
            **record,
        },
    )


def classifier_scores(
    config: configs.Segmentation, stages: tuple[Any, Any], images: Sequence[np.ndarray]
) -> np.ndarray:
    """Probability of being defective of each image uint8 `[h_i, w_i]`: float32 `[n]`."""
    program = jax.jit(
        lambda stages, image: segmentation.classify(config, stages, image.astype(jnp.float32) / 255),
        compiler_options=cpu_compiler_options(),
    )
    found = []
    with progress("classify", len(images), "images") as update:
        for i, image in enumerate(images):
            found.append(program(stages, image))
            update(i + 1)
    return np.array(found, np.float32)


def predictions(workdirs: Sequence[Path]) -> Path:
    """Draws several models' maps of the same test images side by side, in the first one's `figures/predictions.png`.

    Args:
      workdirs: finished runs of `run` on the same data.

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
    test = datasets.load(settings[0]["data"], train=False).test
    kinds = sorted({t.kind for t in test}, key=lambda k: (k != "good", k))
    chosen = [t for kind in kinds for t in [t for t in test if t.kind == kind][:2]][:8]
    if not chosen:
        raise InputError(f"{settings[0]['data']} has no test images to draw")
    shown: list[dict[str, tuple[np.ndarray, float]]] = [{} for _ in chosen]
    for workdir, setting in zip(workdirs, settings, strict=True):
        fields = {k: v for k, v in setting.items() if k not in ("data", "defects")}
        config = configs.from_mapping(configs.Segmentation, fields)
        stage_1, _ = _stage_1(config, None, workdir, config.total_steps, evaluate_only=True)
        stages, _ = _stage_2(config, None, stage_1, workdir, evaluate_only=True)
        detector = SegmentationDetector(config)
        maps = evaluation.residual_maps(
            {"map": detector}, {"map": stages[0]}, [t.image for t in chosen], radius=config.radius, label="maps"
        )["map"]
        scores = classifier_scores(config, stages, [t.image for t in chosen])
        name = {"unet": "U-Net", "compact_cnn": "CompactCNN"}[config.model]
        name = name if name not in shown[0] else f"{name}, {workdir.name}"
        for row, raw, score in zip(shown, maps.raw, scores, strict=True):
            row[name] = (raw, float(score))
    rows = [
        figures.Prediction(name=t.name, image=t.image, truth=t.mask, maps=row)
        for t, row in zip(chosen, shown, strict=True)
    ]
    return figures.predictions(workdirs[0] / "figures" / "predictions.png", rows, title=settings[0]["data"])

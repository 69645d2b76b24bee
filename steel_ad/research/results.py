"""Results of many runs as rows: of one run, of a CSV file, and of all runs below some folders (`gather`)."""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.errors import InputError
from steel_ad.runs.run import KINDS, Run

METRICS = (
    *("pixel_auroc", "pixel_auroc_fpr30", "aupro_30", "aupro_05", "pixel_ap", "aupimo", "pixel_iou", "pixel_dice"),
    *("image_auroc", "image_accuracy", "image_accuracy_calibrated", "image_tpr", "image_tnr", "image_f1"),
    *("found_fpr_01", "found_fpr_05"),
    *("found_iou_0", "found_iou_30", "false_regions_per_image", "false_regions_per_good_image"),
    *("threshold", "image_threshold"),
)
COSTS = ("train_seconds", "test_megapixels_per_second", "parameters")
# One row a map of a run.
ROW = ("experiment", "dataset", "seed", "map", *METRICS, *COSTS, "device")
_NUMBERS = {*METRICS, *COSTS}
# `settings`: as canonical JSON, what differs from the experiment's defaults, with the names of its data; `run`: their identity.
METHODS = ("run", *ROW, "settings")
# `base`: identity of what all runs of the study have in common.
STUDIES = ("study", "axis", "value", *METHODS, "base")


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row with the columns `ROW` for each map in what a run's `metrics.json` holds; None where there is no such number.

    The maps of a transfer are named by when and where they were taken, "before target segmentation".
    """
    if record["experiment"] == "transfer":
        return [
            {**row, "experiment": "transfer", "seed": record["config"]["seed"], "map": f"{when} {where} {row['map']}"}
            for when in ("before", "after")
            for where, evaluated in record[when].items()
            for row in rows({"config": record["config"], **evaluated})
        ]
    # A detector without training is not trained but fitted; where maps are timed apart, each has its own.
    timed = {"train_seconds": record.get("fit_seconds"), **record}
    common = {
        "experiment": record["experiment"],
        "dataset": str(record["dataset"]),
        "seed": record.get("config", {}).get("seed", 0),
        "device": record.get("versions", {}).get("device"),
    }
    found = []
    for name, metrics in record["maps"].items():
        every = metrics | {f"found_{k}": v for k, v in (metrics.get("defects_found") or {}).items()}
        numbers = {k: v if (v := every.get(k)) is not None and np.isfinite(v) else None for k in METRICS}
        costs = {k: v.get(name) if isinstance(v := timed.get(k), Mapping) else v for k in COSTS}
        found.append({k: {**common, "map": name, **numbers, **costs}[k] for k in ROW})
    return found


def read(path: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a CSV file that `files.write_csv` wrote; metrics and costs as floats, empty ones as None, the rest as text.

    A metric that did not exist when the file was written is None too.

    Raises:
      InputError: no such file, damaged, or without one of the other columns.
    """
    columns = list(columns)
    if not path.exists():
        raise InputError(f"there is no {path}: give --runs=FOLDER[,FOLDER...] to make it")
    with files.understood(path, "delete it and make it again"):
        rows = files.read_csv(path, set(columns) - set(METRICS))
        for row in rows:
            files.check(json.loads(row["settings"]), dict, "settings")
            int(row["seed"])
            if row["experiment"] not in KINDS:
                raise ValueError(f"there is no experiment {row['experiment']!r}")
        rows = [{**dict.fromkeys(columns, ""), **row} for row in rows]
        return [{k: (float(v) if v else None) if k in _NUMBERS else v for k, v in row.items()} for row in rows]


def series(found: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """Rows by the values of some columns, in the order in which they come first."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return groups


def ordered(values: Iterable[str]) -> list[str]:
    """Distinct values of an axis: numbers by size, others as they come."""
    distinct = list(dict.fromkeys(values))
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return distinct


def spread(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Median of a metric over rows and, where they differ, the least and the greatest: "0.912 (0.905 to 0.931)"."""
    values = [row[metric] for row in found if row[metric] is not None]
    if not values:
        return "-"
    text = "{:,.0f}".format if metric == "parameters" else _digits
    if min(values) == max(values):
        return text(values[0])
    return f"{text(float(np.median(values)))} ({text(min(values))} to {text(max(values))})"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def flat(config: Any) -> dict[str, Any]:
    """Settings by name, with each option of the loss as a setting `loss_options.NAME`."""
    values = configs.to_dict(config)
    return values | {f"loss_options.{k}": v for k, v in values.pop("loss_options", {}).items()}


@functools.cache
def _defaults(experiment: str) -> dict[str, Any]:
    kind = KINDS[experiment]
    return {**dict.fromkeys(kind.inputs, ""), **flat(kind.config())}


@functools.lru_cache(maxsize=4096)
def _settings(experiment: str, text: str) -> dict[str, Any]:
    return {**_defaults(experiment), **json.loads(text)}


def settings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """All settings of a row of `METHODS` or `STUDIES`; one that did not exist when the run was made has its default."""
    return _settings(row["experiment"], row["settings"])


def without(row: Mapping[str, Any], *keys: str) -> str:
    """A row's settings but for some, as canonical text: runs are alike in all else where it is the same."""
    return configs.canonical({k: v for k, v in settings(row).items() if k not in keys})


def method(row: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a row's method what it is: its map, some settings, and whether a segmentation's defects were labelled."""
    made_with, experiment = settings(row), row["experiment"]
    keys = [k for k in ("model", "loss", "source", "target") if k in made_with]
    if experiment == "autoencoder":
        keys += ["constants"] if "ssim" in made_with["loss"] else []
        keys += ["residual_constants"] if row["map"] == "ssim" else []
    known = {"experiment": experiment, "map": row["map"], **{k: made_with[k] for k in keys}}
    return known | ({"labelled": made_with["defects"] == "labelled"} if experiment == "segmentation" else {})


# What tells methods apart; a study's runs with other changes are no method of their own.
_OF_A_METHOD = {"seed", "loss", "constants", "residual_constants", "model"}


def gather(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all finished runs, and of all studies, below some folders; the same run twice counts once.

    Returns:
      Rows with the columns `METHODS`, and rows with the columns `STUDIES`. Both name data by the last part of its folder.

    Raises:
      InputError: no such folder, nothing there, or a file that cannot be read.
    """
    methods: dict[tuple, dict[str, Any]] = {}
    studies: dict[tuple, dict[str, Any]] = {}

    def add(row: dict[str, Any]) -> None:
        methods.setdefault(tuple(row[k] for k in ("run", "dataset", "map")), {k: row[k] for k in METHODS})

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give --runs=FOLDER[,FOLDER...] with runs or studies")
        for path in sorted(folder.rglob("metrics.json")):
            for row in _of_run(path):
                add(row)
        for path in sorted(p for p in folder.rglob("results.csv") if (p.parent / "sweep.json").exists()):
            for row, read_again in _of_sweep(path):
                studies.setdefault(tuple(row[k] for k in ("study", "value", "run", "dataset", "map", "base")), row)
                if read_again:
                    add(row)
    if not methods and not studies:
        raise InputError(f"there is no finished run below {', '.join(map(str, folders))}: give other --runs")
    return (
        sorted(methods.values(), key=lambda r: tuple(r[k] for k in ("experiment", "dataset", "seed"))),
        sorted(studies.values(), key=lambda r: tuple(r[k] for k in ("experiment", "study", "dataset", "map"))),
    )


_METRIC = (*files.NUMBER, None)
_COST = (*_METRIC, {str: _METRIC})
_PART = {
    "dataset": str,
    "maps": {str: {**{f"{k}?": _METRIC for k in METRICS}, "defects_found?": (None, {str: _METRIC})}},
    **{f"{k}?": _COST for k in (*COSTS, "fit_seconds")},
    "versions?": {"device?": (str, None)},
}


def _of_run(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished run; none of anything else, and none where a study's run is no method of its own."""
    record = files.read_json(path)
    experiment = record.get("experiment") if isinstance(record, dict) else None
    # The parts of a transfer are in its own record.
    if not isinstance(experiment, str) or experiment not in KINDS or not record.get("finished", True):
        return []
    parts = dict.fromkeys(("before", "after"), dict.fromkeys(("source", "target"), _PART))
    with files.understood(path, "remove it from --runs"):
        files.check(record, {"config": dict, **(parts if experiment == "transfer" else _PART)})
    made_with = _complete(path, experiment, record["config"])
    study = path.parents[min(3, len(path.parents) - 1)] / "sweep.json"
    if study.exists():
        base = _complete(study, experiment, files.read_json(study, dict))
        inputs = KINDS[experiment].inputs
        if {k for k in base | made_with if k not in inputs and base.get(k) != made_with.get(k)} - _OF_A_METHOD:
            return []
    named = _named(experiment, made_with)
    return [{**named, **row, "seed": str(row["seed"])} for row in rows(record)]


def _of_sweep(path: Path) -> Iterable[tuple[dict[str, Any], bool]]:
    """A sweep's rows, each with whether it is a method's that no run of its own has."""
    recorded = files.read_json(path.parent / "sweep.json", dict)
    # Run -> its settings, and the identity of those that all runs of the study have in common.
    runs: dict[str, tuple[dict[str, Any], str]] = {}
    for row in read(path, (*ROW, "study", "axis", "value", "settings", "run")):
        experiment, folder = row["experiment"], path.parent / row["run"]
        if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path.parent)):
            raise InputError(f"{path} is damaged (the run {row['run']!r} lies outside): remove it from --runs")
        if row["run"] not in runs:
            base = _complete(path, experiment, recorded)
            common = {k: v for k, v in base.items() if k not in ("seed", "data", "target")}
            begun = _complete(folder, experiment, Run.open(folder).settings)
            runs[row["run"]] = begun, _named(experiment, common)["run"]
        begun, identity = runs[row["run"]]
        made_with = begun | json.loads(row["settings"])
        axis = row["axis"]
        again = axis == "residual_constants" and row["map"] == "ssim" and made_with[axis] != begun[axis]
        made = {**row, **_named(experiment, made_with), "base": identity}
        yield {k: made[k] for k in STUDIES}, again


def _complete(path: Path, experiment: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run or a study, of what a file holds of them.

    Raises:
      InputError: they are no settings of the experiment.
    """
    kind = KINDS[experiment]
    fields = {k: v for k, v in recorded.items() if k not in (*kind.inputs, "source", "defects", "experiment")}
    try:
        config: Any = configs.from_mapping(kind.config, fields)
    except InputError as error:
        raise InputError(f"{path} is no record of a run ({error}): remove it from --runs") from None
    return flat(config) | {k: str(recorded.get(k, "")) for k in kind.inputs}


def _named(experiment: str, made_with: Mapping[str, Any]) -> dict[str, str]:
    """The columns `run` and `settings`, with folders named by their last part."""
    defaults = _defaults(experiment)
    changed = {k: v for k, v in made_with.items() if v != defaults.get(k)}
    changed |= {k: Path(v).name for k in KINDS[experiment].inputs if str(v := changed.get(k, "")).startswith("/")}
    run = configs.identity({"experiment": experiment, **changed})
    return {"run": run, "settings": configs.canonical(changed)}

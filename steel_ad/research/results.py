"""Results of many runs as rows: of one run, of a CSV file, and of all runs below some folders (`gather`)."""

import csv
import io
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import cli, files
from steel_ad import config as configs
from steel_ad.errors import InputError

METRICS = (
    *("pixel_auroc", "pixel_auroc_fpr30", "aupro_30", "aupro_05", "pixel_ap", "pixel_iou", "pixel_dice"),
    *("image_auroc", "image_accuracy", "image_accuracy_calibrated", "image_tpr", "image_tnr", "image_f1"),
    *("found_iou_0", "found_iou_30", "false_regions_per_image", "false_regions_per_good_image"),
    *("threshold", "image_threshold"),
)
COSTS = ("train_seconds", "test_megapixels_per_second", "parameters")
# One row a map of a run.
ROW = ("experiment", "dataset", "seed", "map", *METRICS, *COSTS, "device")
_NUMBERS = {*METRICS, *COSTS}


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
        flat = metrics | {f"found_{k}": v for k, v in (metrics.get("defects_found") or {}).items()}
        numbers = {k: _number(flat.get(k)) for k in METRICS}
        costs = {k: v.get(name) if isinstance(v := timed.get(k), Mapping) else v for k in COSTS}
        found.append({k: {**common, "map": name, **numbers, **costs}[k] for k in ROW})
    return found


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else value


def read(path: Path, columns: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows of a CSV file that `files.write_csv` wrote; metrics and costs as floats, empty ones as None, the rest as text.

    Raises:
      InputError: no such file, damaged, or without one of the columns.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = list(csv.DictReader(io.StringIO(text)))
        for row in found:
            if None in row or None in row.values() or not set(columns) <= set(row):
                raise ValueError("a row lacks a cell or has one too many")
        return [{k: (float(v) if v else None) if k in _NUMBERS else v for k, v in row.items()} for row in found]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and run again") from None


def command(
    binary: str, config: Any, presets: Mapping[str, Any], given: Mapping[str, str], *, file: str | None = None
) -> str:
    """The command line of a binary that has these settings: the nearest preset, what differs from it, further flags.

    Args:
      presets: name -> settings, of `configs/{file or binary}.py`.
      given: further flags.
    """
    ours = configs.to_dict(config)
    name, nearest = min(presets.items(), key=lambda p: len(_differences(ours, configs.to_dict(p[1]))))
    parts = ["python", "-m", f"experiments.{binary}", f"--config=configs/{file or binary}.py:{name}"]
    for k, v in _differences(ours, configs.to_dict(nearest)).items():
        if isinstance(v, Mapping):
            parts += [f"--loss_option={option}={value}" for option, value in v.items()]
        else:
            parts.append(f"--config.{k}={tuple(v) if isinstance(v, list) else v}")
    return shlex.join([*parts, *(f"--{k}={v}" for k, v in given.items() if v)])


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in ours.items() if v != theirs.get(k)}


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


def settings_text(changes: Mapping[str, Any]) -> str:
    """Changed settings as JSON, for a cell."""
    return json.dumps(dict(changes), sort_keys=True)


# What tells methods apart; a study's runs with other changes are no method of their own.
_OF_A_METHOD = {"seed", "loss", "constants", "residual_constants", "model"}


def gather(
    folders: Sequence[Path], presets: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all finished runs, and of all studies, below some folders; the same run twice counts once.

    Args:
      presets: experiment -> preset's name -> settings, for the commands.

    Returns:
      Rows with columns method, `ROW`, percentile and command; and rows as in the studies' `results.csv`. Both name folders by
      their last part.

    Raises:
      InputError: no such folder, nothing there, or a file that cannot be read.
    """
    methods: dict[tuple, dict[str, Any]] = {}
    studies: dict[tuple, dict[str, Any]] = {}

    def add(row: dict[str, Any]) -> None:
        methods.setdefault(tuple(row[k] for k in ("method", "dataset", "seed", "map", "command")), row)

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give --runs=FOLDER[,FOLDER...] with runs or studies")
        for path in sorted(folder.rglob("metrics.json")):
            for row in _methods(path, presets):
                add(row)
        for path in sorted(folder.rglob("results.csv")):
            if (path.parent / "sweep.json").exists():
                for row in read(path, (*ROW, *_STUDY, "axis", "run", "command")):
                    with files.understood(path, "remove it from --runs"):
                        row = {**row, "command": public(row["command"])}
                        studies.setdefault((*(row[k] for k in _STUDY), shared(row["command"])), row)
                        for again in _read_again(path.parent, row):
                            add(again)
    if not methods and not studies:
        raise InputError(f"there is no finished run below {', '.join(map(str, folders))}: give other --runs")
    return (
        sorted(methods.values(), key=lambda r: tuple(str(r[k]) for k in ("experiment", "method", "dataset", "seed"))),
        sorted(studies.values(), key=lambda r: tuple(str(r[k]) for k in ("experiment", "study", "dataset", "map"))),
    )


_STUDY = ("experiment", "study", "value", "dataset", "seed", "map")


def _methods(path: Path, presets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    record = files.read_json(path)
    experiment = record.get("experiment", "") if isinstance(record, dict) else ""
    # The parts of a transfer are in its own record.
    if not experiment or str(experiment).startswith("transfer, ") or not record.get("finished", True):
        return []
    settings = record.get("config", {})
    study = path.parents[3] / "sweep.json" if len(path.parents) > 3 else path
    try:
        if study.name == "sweep.json" and study.exists():
            base = files.read_json(study, dict)
            if {k for k, v in base.items() if k in settings and settings[k] != v} - _OF_A_METHOD:
                return []
        line = _command(experiment, settings, record, presets)
        return [
            {
                "method": _method(experiment, settings, row["map"]),
                **row,
                "seed": str(row["seed"]),
                "percentile": str(settings.get("percentile", record.get("percentile", ""))),
                "command": line,
            }
            for row in rows(record)
        ]
    except (LookupError, TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(f"{path} is no record of a run ({error}): remove it from --runs") from None


def _command(
    experiment: str, settings: Mapping[str, Any], record: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]
) -> str:
    where = {k: settings[k] for k in ("data", "source", "target", "defects") if settings.get(k)}
    if not where:
        where = {"data": record["dataset"]}
    where |= {"workdir": "W"}
    if experiment not in presets:
        return public(
            shlex.join(["python", "-m", f"experiments.{experiment}", *(f"--{k}={v}" for k, v in where.items())])
        )
    kind = type(next(iter(presets[experiment].values())))
    config = configs.from_mapping(kind, {k: v for k, v in settings.items() if k not in where})
    file = "segmentation" if experiment == "transfer" else experiment
    return public(command(experiment, config, presets[experiment], where, file=file))


def public(line: str) -> str:
    """A command line with absolute paths named by their last part, and the working directory W."""
    start, flags = _split(line)
    named = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        value = ",".join(Path(v).name if v.startswith("/") else v for v in value.split(","))
        named.append(f"{name}{equals}{'W' if name == '--workdir' else value}")
    return shlex.join([*start, *named])


def _split(line: str) -> tuple[list[str], list[str]]:
    """What stands before the flags, `python -m experiments.NAME`, `python -m steel_ad NAME` or `steel-ad NAME`, and the flags."""
    words = shlex.split(line)
    count = 2 + (words[1:2] == ["-m"]) + (words[2:3] == ["steel_ad"])
    return words[:count], cli.joined(words[count:])


def shared(line: str) -> str:
    """What the commands of one study's runs have in common, whichever seeds, values and data sets each of them added."""
    own = ("config.seed", "seeds", "study", "axis", "values", "data", "workdir")
    start, flags = _split(line)
    return shlex.join([*start, *sorted(f for f in flags if f.partition("=")[0].removeprefix("--") not in own)])


_LOSSES = {"ssim": "SSIM", "l2": "L2", "l1": "L1", "ssim_l2": "SSIM and L2"}
_NETWORKS = {"unet": "U-Net", "compact_cnn": "CompactCNN"}
_MAPS = {"segmentation": "map", "classification": "classifier"}
_UNTRAINED = {
    "phase_only": "Phase-only transform",
    "whitening": "Spectral whitening",
    "lattice": "Lattice neighbours",
}


def _method(experiment: str, settings: Mapping[str, Any], name: str) -> str:
    """What a reader calls the method that made a map."""
    if experiment == "autoencoder":
        loss = _LOSSES.get(settings["loss"], settings["loss"])
        trained = f"{loss}-AE" + (f" ({settings['constants']})" if "ssim" in settings["loss"] else "")
        return f"{trained}, " + (f"SSIM map ({settings['residual_constants']})" if name == "ssim" else "L2 map")
    if experiment in ("segmentation", "transfer"):
        network = f"{_NETWORKS[settings['model']]} ({settings['loss']})"
        if experiment == "segmentation":
            defects = "labelled defects" if settings.get("defects") == "labelled" else "inserted defects"
            return f"{network}, {defects}, {_MAPS[name]}"
        when, _, name = name.split(" ")
        lines = " to ".join(Path(settings[k]).name for k in ("source", "target"))
        return f"{network}, {lines}, {when} adapting, {_MAPS[name]}"
    return _UNTRAINED.get(name, name)


def _read_again(folder: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A method's row of a study of the residual's constants, for constants that the run itself does not have."""
    if row["axis"] != "residual_constants" or row["map"] != "ssim":
        return []
    if not Path(os.path.realpath(folder / row["run"])).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"the run {row['run']!r} lies outside {folder}")
    settings = files.read_json(folder / row["run"] / "config.json", dict)
    if settings["residual_constants"] == row["value"]:
        return []
    method = _method("autoencoder", {**settings, "residual_constants": row["value"]}, "ssim")
    kept = {k: row[k] for k in ROW}
    return [{"method": method, **kept, "percentile": str(settings["percentile"]), "command": row["command"]}]

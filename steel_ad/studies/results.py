"""Results of many runs: rows of metrics, gathered into CSV files, and the page that is made of these alone.

`gather` reads the runs' `metrics.json` and the studies' `results.csv`; `render` writes the page and its figures, the same
bytes from the same CSV files.
"""

import csv
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import config as configs
from steel_ad.errors import InputError
from steel_ad.studies import files

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
    common = {
        "experiment": record["experiment"],
        "dataset": record["dataset"],
        "seed": record.get("config", {}).get("seed", 0),
        **{name: record.get(name) for name in COSTS},
        "device": record.get("versions", {}).get("device"),
    }
    found = []
    for name, metrics in record["maps"].items():
        flat = metrics | {f"found_{k}": v for k, v in (metrics.get("defects_found") or {}).items()}
        numbers = {k: _number(flat.get(k)) for k in METRICS}
        found.append({k: {**common, "map": name, **numbers}[k] for k in ROW})
    return found


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file that `files.write_csv` wrote; metrics and costs as floats, empty ones as None, the rest as text.

    Raises:
      InputError: no such file, or damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return [
            {k: (float(v) if v else None) if k in _NUMBERS else v for k, v in row.items()}
            for row in csv.DictReader(io.StringIO(text))
        ]
    except (OSError, ValueError, TypeError) as error:
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
    """Median of a metric over rows and, where there are several, the least and the greatest: "0.912 (0.905 to 0.931)"."""
    values = [row[metric] for row in found if row[metric] is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return _digits(values[0])
    return f"{_digits(float(np.median(values)))} ({_digits(min(values))} to {_digits(max(values))})"


def _digits(value: float) -> str:
    if float(value).is_integer() and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def settings_text(changes: Mapping[str, Any]) -> str:
    """Changed settings as JSON, for a cell."""
    return json.dumps(dict(changes), sort_keys=True)


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Rows to CSV, None as an empty cell; raises as `files.write_text`."""
    files.write_csv(path, found)

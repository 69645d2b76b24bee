"""What people read in place of settings: names of methods, and the command lines that make the same numbers again."""

import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steel_ad import fields, recipes
from steel_ad.research import results
from steel_ad.research.studies import STUDIES
from steel_ad.runs.run import KINDS

Rows = Sequence[Mapping[str, Any]]

_NETWORKS = {"unet": "U-Net", "compact_cnn": "CompactCNN"}
_MAPS = {"segmentation": "map", "classification": "classifier"}
_DETECTORS = {"phase_only": "Phase-only transform", "whitening": "Spectral whitening", "lattice": "Lattice neighbours"}


def method(row: Mapping[str, Any]) -> str:
    """What a reader calls the method of a row of `results.METHODS`."""
    known = results.method(row)
    if row["experiment"] == "autoencoder":
        loss = (
            " and ".join(part.upper() for part in known["loss"].split("_"))
            if ":" not in known["loss"]
            else known["loss"]
        )
        trained = f"{loss}-AE" + (f" of {known['model']}" if known["model"] != "bergmann" else "")
        trained += f" ({known['constants']})" if "constants" in known else ""
        return f"{trained}, " + (f"SSIM map ({known['residual_constants']})" if row["map"] == "ssim" else "L2 map")
    if row["experiment"] not in ("segmentation", "transfer"):
        return _DETECTORS.get(row["map"], row["map"])
    network = f"{_NETWORKS.get(known['model'], known['model'])} ({known['loss']})"
    if row["experiment"] == "segmentation":
        defects = "labelled defects" if known["labelled"] else "inserted defects"
        return f"{network}, {defects}, {_MAPS[row['map']]}"
    when, _, name = row["map"].split(" ")
    lines = " to ".join(Path(known[k]).name for k in ("source", "target"))
    return f"{network}, {lines}, {when} adapting, {_MAPS[name]}"


def run_command(row: Mapping[str, Any]) -> str:
    """The command line of the run of a row of `results.METHODS`, without its seed."""
    made_with = {k: v for k, v in results.settings(row).items() if k != "seed"}
    where = {k: made_with[k] for k in KINDS[row["experiment"]].inputs}
    return _line(row["experiment"], {}, _flags(row["experiment"], made_with), where)


def study_commands(rows: Rows) -> list[str]:
    """The command lines of a study, of which `rows` of `results.STUDIES` are; data sets with other values or seeds have their own."""
    experiment, study, axis = (rows[0][k] for k in ("experiment", "study", "axis"))
    of_rows = [results.settings(row) for row in rows]
    made_with = {k: v for k, v in of_rows[0].items() if k != axis and all(s.get(k) == v for s in of_rows)}
    alike: dict[tuple, list[str]] = {}
    for (data,), same in results.series([{**r, "data": _data(r)} for r in rows], "data").items():
        seeds = sorted({int(row["seed"]) for row in same}) if axis != "seed" else []
        alike.setdefault((",".join(results.ordered(row["value"] for row in same)), *seeds), []).append(data)
    lines = []
    for (values, *seeds), data in alike.items():
        asked = {"study" if study in STUDIES[experiment] else "axis": study, "values": values}
        asked |= {} if experiment == "autoencoder" else {"experiment": experiment}
        where: dict[str, Any] = {"seeds": len(seeds) if len(seeds) > 1 else "", "data": ",".join(data)}
        where |= {k: made_with.get(k) for k in ("source", "defects")}
        flags = _flags(experiment, {**made_with, **({"seed": seeds[0]} if seeds else {})})
        lines.append(_line("sweep", asked, flags, where))
    return lines


def _data(row: Mapping[str, Any]) -> str:
    made_with = results.settings(row)
    return made_with.get("data") or made_with["target"]


def _flags(experiment: str, made_with: Mapping[str, Any]) -> list[str]:
    """The preset that is nearest to settings, and a flag for each that differs from it."""

    def differing(preset: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in made_with.items() if k not in KINDS[experiment].inputs and preset.get(k) != v}

    name, nearest = min(_presets(experiment).items(), key=lambda known: len(differing(known[1])))
    flags = [f"--config={name}"]
    for k, v in differing(nearest).items():
        option = k.removeprefix("loss_options.")
        flags.append(f"--config.{k}={fields.said(v)}" if option == k else f"--loss_option={option}={fields.said(v)}")
    return flags


@functools.cache
def _presets(experiment: str) -> dict[str, dict[str, Any]]:
    """Preset -> all its settings."""
    known = recipes.presets("segmentation" if experiment == "transfer" else experiment)
    return {name: results.flat(KINDS[experiment].config(**changed)) for name, changed in known.items()}


def _line(binary: str, asked: Mapping[str, Any], flags: Sequence[str], where: Mapping[str, Any]) -> str:
    before, after = ([f"--{k}={v}" for k, v in given.items() if v] for given in (asked, {**where, "workdir": "W"}))
    return shlex.join(["python", "-m", f"experiments.{binary}", *before, *flags, *after])

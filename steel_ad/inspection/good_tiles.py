"""Calibration of an inspection: finds the good images that count, scores their tiles, and sets the threshold.

The statistics are `calibration`'s: what threshold a set of scores supports, and what it promises.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import folders
from steel_ad.detectors import Fitted
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, drift, tiles
from steel_ad.inspection import strips as sources
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.strips import Strip
from steel_ad.inspection.view import View
from steel_ad.progress import progress

# Images that the pattern's lattice is read from.
_PATTERN_OF = 32
_COUNTS = ("images", "left_out_as_trained_on", "left_out_as_copies", "tiles", "groups")


class Reference(NamedTuple):
    """What inspected tiles are compared with.

    Attributes:
      threshold: a pixel of an opened map above it is defective.
      scores: of independent good tiles `[n]`; none without calibration.
      record: of the threshold and what it promises, for the summary.
      good: what drift compares, by name: values `[n]` of the same tiles; empty without calibration.
      lattice: of the good tiles' pattern, `[2][2]` px; None where they have none.
    """

    threshold: float
    scores: np.ndarray
    record: dict[str, Any]
    good: dict[str, np.ndarray]
    lattice: list[list[float]] | None


def reference(
    config: configs.Inspection,
    fitted: Fitted,
    view: View,
    good: Sequence[Path],
    folder: str,
    settings: dict[str, Any],
    out: Path,
) -> Reference:
    """The reference from good images, whose scores are kept in `calibration.json`; without images the detector's own threshold.

    Args:
      good: the images in `folder`.
      settings: of the inspection; scores that were kept with other ones are computed again.

    Raises:
      InputError: no threshold, too few images for the promise, or a damaged `calibration.json`.
    """
    if not good:
        if fitted.threshold is None:
            raise InputError(
                "the model has no threshold of its own, its run is not finished: give --calibration=FOLDER"
            )
        return Reference(fitted.threshold, np.zeros(0), {"form": "none", "threshold": fitted.threshold}, {}, None)
    path = out / "calibration.json"
    names = ("model_sha256", "calibration_files", "calibration_strips", "tile_px", "halo_px", "seed", "drift")
    made_of = {k: settings[k] for k in names}
    known = files.read_json(path, dict) if path.exists() else {}
    if known.get("made_of") != made_of:
        measured = good_scores(config, fitted, view, good, Path(folder), strips=settings["calibration_strips"])
        known = {"made_of": made_of, **measured}
        files.write_json(path, known)
    with files.understood(path, "delete it and run again"):
        files.check(
            known, {"lattice": (None, [[files.NUMBER]]), "scores": [files.NUMBER], **dict.fromkeys(_COUNTS, int)}
        )
        lattice = known["lattice"]
        if lattice is not None and (np.shape(lattice) != (2, 2) or not np.isfinite(lattice).all()):
            raise ValueError("no lattice")
        looks = (*drift.LOOKS, *(drift.PITCHES if lattice else ()))
        files.check(known, {k: [(*files.NUMBER, None)] for k in looks})
    # A pitch that is not known, NaN, is null in the file.
    values = {k: np.array(known[k], np.float64) for k in ("scores", *looks)}
    scores, counts = values.pop("scores"), {k: known[k] for k in _COUNTS}
    threshold, promise = _promise(config, scores, counts, folder)
    return Reference(threshold, scores, {**counts, **promise}, {"score": scores, **values}, lattice)


def _promise(
    config: configs.Inspection, scores: np.ndarray, counts: dict[str, int], folder: str
) -> tuple[float, dict[str, Any]]:
    """The threshold that the settings ask for, and the record of what it promises."""
    if config.false_alarms_per_m2:
        tile_m2 = (config.tile_px * config.mm_per_px / 1000) ** 2
        modelled = calibration.tail(scores, config.false_alarms_per_m2 * tile_m2)
        per_m2 = [rate / tile_m2 for rate in modelled.rate_interval]
        asked = {"form": "model", "per_m2": config.false_alarms_per_m2, "per_m2_interval": per_m2}
        return modelled.threshold, {**asked, **dataclasses.asdict(modelled)}
    try:
        promised = calibration.promise(scores, config.false_alarm_rate, config.confidence)
    except InputError as error:
        if counts["groups"] == counts["images"]:
            raise
        raise InputError(
            f"{error}; the {counts['images']} images lie in {counts['groups']} places, and those of one subfolder of {folder} count "
            "once: where they are no strip, name the subfolder itself"
        ) from None
    form = "average" if config.confidence is None else "confidence"
    return promised.threshold, {"form": form, **dataclasses.asdict(promised)}


def good_images(folder: str) -> list[Path]:
    """The calibration images below a folder.

    Raises:
      InputError: there are none, or the folder is a whole data set, with its defective images.
    """
    if (Path(folder) / "ground_truth").exists():
        raise InputError(
            f"{folder} is a data set with defective images: name its folder of good ones, such as test/good"
        )
    return folders.list_images(folder, recursive=True)


def untrained(good: Sequence[Path], fitted: Fitted) -> list[Path]:
    """The good images that the detector was not trained on.

    Raises:
      InputError: there is none.
    """
    fresh = []
    for path in good:
        # A run on images in memory knows them by their pixels.
        pixels = hashlib.sha256(folders.read_image(path).tobytes()).hexdigest()
        if not {folders.fingerprint(path), pixels} & fitted.trained_on:
            fresh.append(path)
    if not fresh:
        raise InputError(f"all {len(good)} images in {good[0].parent} were trained on: calibrate on others")
    return fresh


def good_scores(
    config: configs.Inspection,
    fitted: Fitted,
    view: View,
    good: Sequence[Path],
    root: Path,
    *,
    strips: bool = False,
) -> dict[str, Any]:
    """One tile of each group of good images that were not trained on: their scores, what drift compares, and counts.

    Args:
      root: the folder of the images; the images in one of its subfolders are a group.
      strips: the images of a group follow each other along a strip, in place of each being a plate.

    Raises:
      InputError: no image that was not trained on, or none as large as a tile.
    """
    fresh = untrained(good, fitted)
    single = list({folders.fingerprint(path): path for path in reversed(fresh)}.values())[::-1]
    parts = _parts(good, set(single), root, strips)
    small = view.tile < drift.LEAST_TILE_PX
    lattice = None if small else drift.pattern(_first_tiles([strip for _, strip in parts], view))
    scores: list[float] = []
    seen: dict[str, list[float]] = {}
    owners: list[str] = []
    with progress("calibrate", len(single), "images") as update:
        bands = sources.bands([strip for _, strip in parts], update, tile=view.tile, halo=view.halo)
        for i, band in sources.ahead(bands):
            # Only whole tiles are what is inspected.
            if band.offset + band.height == view.tile <= band.pixels.shape[1]:
                pieces = view.cut(band)
                maps = view.cores(pieces)
                scores += maps.max((1, 2)).tolist()
                for name, values in drift.measure(pieces.tiles(view.tile), lattice).items():
                    seen.setdefault(name, []).extend(values.tolist())
                owners += [parts[i][0]] * len(maps)
    if not scores:
        raise InputError(f"no image in {root} is as large as a tile of {view.tile} pixels: use a smaller --tile_px")
    drawn = calibration.one_per_group(np.arange(len(scores)), owners, seed=config.seed).astype(int)
    return {
        "images": len(single),
        "left_out_as_trained_on": len(good) - len(fresh),
        "left_out_as_copies": len(fresh) - len(single),
        "tiles": len(scores),
        "groups": len(drawn),
        "scores": np.array(scores)[drawn].tolist(),
        "lattice": None if lattice is None else lattice.tolist(),
        **{name: np.array(values)[drawn].tolist() for name, values in seen.items()},
    }


def _first_tiles(parts: Sequence[Strip], view: View) -> np.ndarray:
    """The first tile of each of up to 32 strips or images, uint8 `[n, tile, tile]`."""
    firsts = []
    for part in parts[:: -(-len(parts) // _PATTERN_OF)]:
        band = next(tiles.bands(part.frames(), tile=view.tile, halo=view.halo))
        firsts += list(tiles.whole(band, tile=view.tile)[:1])
    return np.array(firsts, np.uint8).reshape(-1, view.tile, view.tile)


def _parts(good: Sequence[Path], used: set[Path], root: Path, strips: bool) -> list[tuple[str, Strip]]:
    """The used images as (group, strip); an image that is left out is a gap between two strips of its group.

    Raises:
      InputError: the names of a strip's images are not in order.
    """
    groups: dict[str, list[Path]] = {}
    for path in good:
        groups.setdefault(path.relative_to(root).parts[0], []).append(path)
    parts = []
    for group, members in groups.items():
        if strips:
            sources.check_order(members, root)
        run: list[Path] = []
        for path, following in zip(members, [*members[1:], None], strict=True):
            run += [path] if path in used else []
            if run and not (strips and path in used and following in used):
                parts.append((group, Strip(Camera(), "", tuple(run))))
                run = []
    return parts


_COUNTED = dict.fromkeys(("groups", "images", "left_out_as_trained_on"), int)
_RATES = dict.fromkeys(("average_rate", "confidence", "confident_rate"), files.NUMBER)
_FORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "model": {**_COUNTED, "per_m2": files.NUMBER, "per_m2_interval": [files.NUMBER], "exceedances": int},
    "average": {**_COUNTED, **_RATES},
    "confidence": {**_COUNTED, **_RATES},
}


def check_promise(record: Mapping[str, Any]) -> None:
    """Looks whether a record that comes from a file says what `promise_sentence` needs.

    Raises:
      ValueError or KeyError: it does not.
    """
    files.check(record, {"form": str})
    files.check(record, _FORMS[record["form"]])
    if len(record.get("per_m2_interval", "lh")) != 2:
        raise ValueError("an interval has other than two ends")


def promise_sentence(record: dict[str, Any]) -> str:
    """What a reference's record promises, in one or two sentences."""
    if record["form"] == "none":
        return "No calibration images were given, so nothing is promised of false alarms: the threshold is the training run's."
    copies = f", {record['left_out_as_copies']} as copies" if record.get("left_out_as_copies") else ""
    counted = (
        f"{record['groups']} independent good tiles, one of each of {record['groups']} groups ({record['images']} images, "
        f"{record['left_out_as_trained_on']} more left out because they were trained on{copies})"
    )
    if record["form"] == "model":
        low, high = record["per_m2_interval"]
        return (
            f"By a model of the tail, which no set of good images can prove: {record['per_m2']:g} false alarms per square metre "
            f"(95 % interval {low:.2g} to {high:.2g}), fitted to the highest {record['exceedances']} of {counted}."
        )
    return (
        f"Of good tiles, at most {record['average_rate']:.3g} raise a false alarm on average over calibrations; with confidence "
        f"{record['confidence']:g}, at most {record['confident_rate']:.3g}. From {counted}."
    )

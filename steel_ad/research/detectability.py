"""How small a defect an inspection will catch: defects inserted into good plates, and curves of detection."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import defects, folders
from steel_ad.data.defects import Library
from steel_ad.detectors import Fitted
from steel_ad.errors import InputError
from steel_ad.inspection import calibration, good_tiles, tiles
from steel_ad.inspection import session as inspection
from steel_ad.inspection.tiles import Pieces
from steel_ad.inspection.view import View
from steel_ad.progress import progress
from steel_ad.research import pod as detectability
from steel_ad.versions import versions

_PLATES = 256
_BATCH = 16
# A defect is scaled as little as the library allows: it is drawn from those of its kind that are nearest in length.
_NEAREST = 5
_DRAWN = 600
COLUMNS = ("kind", "contrast", "trials", "found", "a50", "a90", "a90/95", "note")


def run(
    config: configs.Detectability,
    how: configs.Inspection,
    detector: Fitted,
    *,
    calibrate_on: str,
    defects_from: str,
    out: Path,
) -> dict[str, Any]:
    """Inserts defects, inspects, fits; writes `trials.csv`, `curves.csv`, `table.md`, `detectability.png`, `summary.json`.

    A defect is found if a region above the threshold overlaps it. The threshold keeps the false-alarm rate of `how`, and
    tiles are those of an inspection with the same settings. Defects go into tiles of the calibration's own images, whose
    scores are no lower than other good ones'.

    Args:
      detector: as `runs.Run.detector` has it.
      calibrate_on: folder of good images, as `inspection.run`'s.
      defects_from: folder of defects on plain steel, or "procedural".

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: a model, defects or images that cannot be used, too few good images, an `out` of other settings.
    """
    inspection.check_tile(how, detector)
    if config.largest_px > how.tile_px / 2:
        raise InputError(f"--largest_px={config.largest_px:g} is more than half a tile: use a larger --tile_px")
    inspection.check_out(out, [calibrate_on, defects_from])
    good = good_tiles.good_images(calibrate_on)
    library, skipped = _library(defects_from, how.seed)
    settings = {
        **dataclasses.asdict(config),
        **dataclasses.asdict(how),
        "contrasts": list(config.contrasts),
        "model_sha256": detector.sha256,
        "calibration": calibrate_on,
        "defects": defects_from,
    }
    claimed = out / "settings.json"
    if claimed.exists() and (other := configs.difference(settings, files.read_json(claimed, dict))):
        raise InputError(f"{out} holds other trials, which differ in {other}: use a new --out")
    if (out / "summary.json").exists():
        return files.read_json(out / "summary.json", dict)
    view = View(detector, how)
    known = good_tiles.good_scores(how, detector, view, good, Path(calibrate_on))
    promised = calibration.promise(known["scores"], how.false_alarm_rate, how.confidence)
    # Not before the calibration, so that after a refusal another rate may be asked for in the same place.
    files.write_json(claimed, settings)
    pieces = _pieces(good_tiles.untrained(good, detector), view, how.seed)
    trials = _trials(config, library, pieces, view, promised.threshold, how)
    form = "average" if how.confidence is None else "confidence"
    record = {**{k: v for k, v in known.items() if k != "scores"}, "form": form, **dataclasses.asdict(promised)}
    return _write(config, how, trials, record, settings, skipped, out)


def _library(defects_from: str, seed: int) -> tuple[Library, list[str]]:
    if defects_from == "procedural":
        return defects.procedural(jax.random.fold_in(jax.random.key(seed), 11), _DRAWN), []
    return defects.load(defects_from)


def _pieces(good: Sequence[Path], view: View, seed: int) -> Pieces:
    """The window of one random tile of each of up to 256 images, of the size that the first of them has."""
    rng = np.random.default_rng([seed, 0xDE])
    pixels: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    for i in rng.permutation(len(good)):
        image = folders.read_image(good[i])
        rows, columns = image.shape[0] // view.tile, image.shape[1] // view.tile
        if rows and columns:
            row, column = rng.integers(rows), rng.integers(columns)
            found = view.cut(list(tiles.bands([image], tile=view.tile, halo=view.halo))[row])
            if not pixels or found.pixels.shape[1:] == pixels[0].shape:
                pixels.append(found.pixels[column])
                corners.append(found.corners[column])
        if len(pixels) == _PLATES:
            break
    return Pieces(np.stack(pixels), np.stack(corners))


def _trials(
    config: configs.Detectability,
    library: Library,
    pieces: Pieces,
    view: View,
    threshold: float,
    how: configs.Inspection,
) -> list[dict[str, Any]]:
    """One row a defect: kind, contrast, length_px and whether it was found, plates in turn."""
    rng = np.random.default_rng([how.seed, 0xDF])
    lengths, kind_of = np.asarray(library.size).max(1), np.asarray(library.kind)
    wanted = np.geomspace(config.smallest_px, config.largest_px, config.trials)
    present = [k for k, name in enumerate(library.kinds) if (kind_of == k).any()]
    plan = [(k, c, size) for k in present for c in config.contrasts for size in wanted]
    rows: list[dict[str, Any]] = []
    count = len(pieces.pixels)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-len(plan) // count))])
    with progress("insert", len(plan), "defects") as update:
        for start in range(0, len(plan), _BATCH):
            images, masks = [], []
            for i in range(start, min(start + _BATCH, len(plan))):
                k, contrast, size = plan[i]
                members = np.flatnonzero(kind_of == k)
                near = members[np.argsort(np.abs(np.log(lengths[members] / size)), kind="stable")[:_NEAREST]]
                change, mask = defects.resized(library, int(rng.choice(near)), length_px=size, contrast=contrast)
                image, inside = _inserted(
                    rng, pieces.pixels[order[i]], pieces.corners[order[i]], change, mask, view.tile
                )
                images.append(image)
                masks.append(inside)
                box = max(np.ptp(axis) + 1 for axis in np.nonzero(inside))
                rows.append({"kind": library.kinds[k], "contrast": contrast, "length_px": int(box)})
            corners = pieces.corners[order[start : start + len(images)]]
            opened = view.cores(Pieces(np.stack(images), corners))
            for row, above in zip(rows[start:], (opened > np.float64(threshold)) & np.stack(masks), strict=True):
                row["found"] = int(above.any())
            update(len(rows))
    return rows


def _inserted(
    rng: np.random.Generator, piece: np.ndarray, corner: np.ndarray, change: np.ndarray, mask: np.ndarray, tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """A window, uint8 `[h, w]`, with a defect at a random place and turn of its tile, and the mask in that, bool `[t, t]`."""
    flip = tuple(slice(None, None, -1 if rng.random() < 0.5 else 1) for _ in range(2))
    change, mask = change[flip], mask[flip]
    # The mask lies wholly in the tile; what fades around it may reach out of it and of the window.
    y, x = np.nonzero(mask)
    room = [tile - (int(v.max()) - int(v.min())) for v in (y, x)]
    top, left = (int(c + rng.integers(n) - v.min()) for c, n, v in zip(corner, room, (y, x), strict=True))
    h, w = change.shape
    margin = max(h, w)
    image = np.pad(piece.astype(np.float32) / 255, margin)
    image[top + margin :, left + margin :][:h, :w] += change
    inside = np.zeros((tile, tile), bool)
    inside[y + top - corner[0], x + left - corner[1]] = True
    image = image[margin:-margin, margin:-margin]
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), inside


def _write(
    config: configs.Detectability,
    how: configs.Inspection,
    trials: list[dict[str, Any]],
    promised: dict[str, Any],
    settings: dict[str, Any],
    skipped: list[str],
    out: Path,
) -> dict[str, Any]:
    from steel_ad.report import detectability as figures
    from steel_ad.report import tables

    scale, unit = (how.mm_per_px, "mm") if how.mm_per_px else (1.0, "px")
    rows: list[dict[str, Any]] = []
    panels: dict[str, list[figures.Detection]] = {}
    for kind in dict.fromkeys(t["kind"] for t in trials):
        for contrast in config.contrasts:
            own = [t for t in trials if t["kind"] == kind and t["contrast"] == contrast]
            size = scale * np.array([t["length_px"] for t in own], np.float64)
            hit = np.array([t["found"] for t in own], bool)
            curve = detectability.fit(size, hit)
            named = {"hits": "found", "a90_95": "a90/95"}
            numbers = {named.get(k, k): v for k, v in dataclasses.asdict(curve).items()}
            rows.append({"kind": kind, "contrast": contrast, **numbers})
            fitted = curve if curve.b1 is not None else None
            panels.setdefault(kind, []).append(
                figures.Detection(name=f"contrast {contrast:g}", size=size, hit=hit, curve=fitted, a90_95=curve.a90_95)
            )
    sentence = good_tiles.promise_sentence(promised)
    table = tables.markdown(rows, COLUMNS)
    files.write_csv(out / "trials.csv", trials)
    files.write_csv(out / "curves.csv", rows)
    note = (
        f"Length in {unit} (longer side of the bounding box); contrast is the mean absolute change of brightness under the mask, "
        "of the full range. a90/95: upper 95 % confidence bound of a90 by likelihood ratio. " + sentence
    )
    files.write_text(out / "table.md", f"{table}\n\n{note}\n")
    title = f"Detection at a false-alarm rate of {how.false_alarm_rate:g} per tile"
    figures.detectability(out / "detectability.png", panels, unit=unit, title=title)
    summary = {"unit": unit, "curves": rows, "calibration": promised, "defects_left_out": len(skipped)}
    summary |= {"settings": settings, "versions": versions()}
    # Last, since its presence says that the trials are complete.
    files.write_json(out / "summary.json", summary)
    return summary

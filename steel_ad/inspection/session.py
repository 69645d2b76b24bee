"""An inspection from its settings to its report: strips and images in, a list of defects out.

What happens in between: `strips` reads, `view` is the detector's look at a band of tiles, `course` lists what is above the threshold
of `good_tiles`, `outcome` writes; `follow` does the same for a folder that a camera writes to.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import folders, video
from steel_ad.detectors import Fitted
from steel_ad.errors import InputError
from steel_ad.inspection import drift, follow, good_tiles, outcome
from steel_ad.inspection import strips as sources
from steel_ad.inspection.course import Course, Findings
from steel_ad.inspection.good_tiles import Reference
from steel_ad.inspection.journal import Journal
from steel_ad.inspection.strips import Strip
from steel_ad.inspection.view import View
from steel_ad.progress import progress


def run(
    config: configs.Inspection,
    fitted: Fitted,
    *,
    source: str,
    calibrate_on: str,
    out: Path,
    watch_idle_s: float | None = None,
) -> dict[str, Any]:
    """Inspects, and writes what `outcome.write` names.

    The same call again goes on after an interruption. A finished inspection is only read.

    Args:
      fitted: the detector, its state and its own threshold.
      source: an image, a video (one endless strip), a folder of images, or a JSON file of cameras: a list of objects with
        `name`, `source` (relative to the file), and optionally `side`, `across_mm`, `mm_per_px`.
      calibrate_on: folder of good images; the images of one of its subfolders, at any depth, come from one strip. "": nothing is
        promised of false alarms, and the detector's own threshold serves.
      watch_idle_s: None: the images that are there are inspected. A number: `source` is a folder that a camera writes to and is
        followed until SIGINT or SIGTERM or, above 0, until so many seconds have brought no new image (`follow`).

    Returns:
      What `summary.json` holds.

    Raises:
      InputError: a detector, source or calibration that cannot be used, too few good images, an `out` of other settings.
    """
    watched = watch_idle_s is not None
    if watched and not os.path.isdir(source):
        raise InputError(f"--watch follows a folder that a camera writes to, and {source} is none: leave it out")
    check_tile(config, fitted)
    cameras = sources.cameras(Path(source), config.mm_per_px or None)
    check_out(out, [calibrate_on, *(where for _, where in cameras)])
    if watched:
        # Stands for what is to come.
        strips = [Strip(cameras[0][0], "" if config.strip else source, ())]
    else:
        strips = [s for camera, where in cameras for s in sources.strips_of(where, camera, config.strip)]
    _check_flags(config, strips, calibrate_on)
    good = good_tiles.good_images(calibrate_on) if calibrate_on else []
    settings = _settings(config, fitted, source, strips, calibrate_on, good, watched=watched)
    claimed = out / "inspection.json"
    if claimed.exists():
        # A setting that did not exist when this was written has its default.
        recorded = {**dataclasses.asdict(configs.Inspection()), **files.read_json(claimed, dict)}
        if other := configs.difference(settings, recorded):
            raise InputError(f"{out} holds another inspection, which differs in {other}: use a new --out")
    if (out / "summary.json").exists() and not watched:
        return outcome.finished(out / "summary.json")
    if good and not watched:
        _check_sizes(strips, config.tile_px)
    view = View(fitted, config)
    reference = good_tiles.reference(config, fitted, view, good, calibrate_on, settings, out)
    # Not before the calibration, so that after a refusal another rate may be asked for in the same place.
    files.write_json(claimed, settings)
    if watch_idle_s is not None:
        return follow.follow(config, view, Path(source), cameras[0][0], reference, settings, watch_idle_s, out)
    start = time.perf_counter()
    findings = _inspected(view, strips, reference, out)
    if not findings.scores:
        # Nothing to keep: once the file is mended, it is another one.
        for name in ("journal.jsonl", "inspection.json"):
            (out / name).unlink(missing_ok=True)
        nothing = findings.unread[0] if findings.unread else f"{source} shows nothing: name another --source"
        raise InputError(nothing, status=1)
    return outcome.write(config, strips, findings, reference, settings, time.perf_counter() - start, out)


def _settings(
    config: configs.Inspection,
    fitted: Fitted,
    source: str,
    strips: Sequence[Strip],
    calibrate_on: str,
    good: Sequence[Path],
    *,
    watched: bool,
) -> dict[str, Any]:
    """All that the ledger depends on, for `inspection.json`."""
    return {
        **dataclasses.asdict(config),
        "model": fitted.origin,
        "model_sha256": fitted.sha256,
        "source": source,
        # The images of a watched folder are in the journal.
        "source_files": "watched" if watched else sources.stamp(strips, Path(source)),
        "calibration": calibrate_on,
        "calibration_files": sources.digest([[os.path.relpath(p, calibrate_on), folders.fingerprint(p)] for p in good]),
        "calibration_strips": bool(good) and sources.endless(strips),
        "drift": ["score", *drift.LOOKS, *drift.PITCHES],
        "training_finished": fitted.finished,
        **({} if good else {"training_threshold": fitted.threshold}),
    }


def _inspected(view: View, strips: list[Strip], reference: Reference, out: Path) -> Findings:
    """The strips' findings, from where the journal in `out` ends."""
    course = Course(view, strips, reference, Journal(out / "journal.jsonl"))
    course.resume()
    first, skip = (course.at, course.done) if course.done else (course.at + 1, 0)
    frames = sum(max(1, video.length(p)) if sources.is_video(p) else 1 for s in strips for p in s.paths)
    with progress("inspect", frames, "frames") as update:
        bands = sources.bands(
            strips, update, tile=view.tile, halo=view.halo, first=first, skip=skip, unread=course.unread
        )
        course.feed(sources.ahead(bands))
    course.finish(len(strips))
    return course.findings


def check_tile(config: configs.Inspection, fitted: Fitted) -> None:
    """Refuses a tile that the detector cannot see.

    Raises:
      InputError: with its halo it is smaller than the detector's least image.
    """
    if config.tile_px + 2 * config.halo_px < fitted.least_px:
        raise InputError(
            f"--tile_px={config.tile_px} with --halo_px={config.halo_px} on each side is smaller than the detector's patch "
            f"of {fitted.least_px}: use larger ones"
        )


def check_out(out: Path, read: Iterable[str | Path]) -> None:
    """Refuses to write into a folder that is read, where the files would be input the next time.

    Raises:
      InputError: `out` is one of the folders `read`, or lies in one.
    """
    for folder in filter(None, map(str, read)):
        if os.path.isdir(folder) and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"--out={out} lies in {folder}, which is read: write to another folder")


def _check_flags(config: configs.Inspection, strips: Sequence[Strip], calibrate_on: str) -> None:
    """Refuses settings that would have no effect, or not the one that is meant."""
    scales = {s.camera.mm_per_px for s in strips}
    if not calibrate_on and (config.confidence is not None or config.false_alarms_per_m2):
        raise InputError(
            "--confidence and --false_alarms_per_m2 are promises from good images: give --calibration=FOLDER"
        )
    if config.false_alarms_per_m2 and scales != {config.mm_per_px}:
        raise InputError(
            f"--false_alarms_per_m2 takes one scale, that of --mm_per_px={config.mm_per_px:g}, but the cameras have others: "
            "inspect them one by one"
        )
    if config.pitch_mm and scales == {None}:
        raise InputError(f"--pitch_mm={config.pitch_mm:g} needs --mm_per_px, the size of a pixel")


def _check_sizes(strips: Sequence[Strip], tile_px: int) -> None:
    """Refuses plates smaller than a tile before anything is inspected."""
    for strip in strips:
        if strip.single:
            try:
                shape = folders.image_shape(strip.paths[0])
            except InputError:  # the inspection will name it
                continue
            sources.check_size(strip.paths[0], shape, tile_px)

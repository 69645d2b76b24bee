"""Patches cut from a line-scan video's frames that are neither blank nor blurred."""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import files
from steel_ad.data import folders, video
from steel_ad.errors import InputError
from steel_ad.making import writing
from steel_ad.making.settings import FromVideo
from steel_ad.making.writing import Row
from steel_ad.progress import progress


def run(config: FromVideo, *, source: Path, out: Path) -> dict[str, Any]:
    """Cuts the frames of the video `source` into grey patches, uint8 PNG, `OUT/<frame>_<top>_<left>.png`.

    Writes `frames.csv` (what was measured, and the verdict), `manifest.csv` (file, source, frame, top, left, sha256).
    `out` is a new folder, or one to go on with.

    Returns:
      Numbers of `frames` read, `blank` and `blurred` ones, `patches` in all and those `written` now; `warning`: a sentence
      about frames that could not be read, or None.

    Raises:
      InputError: a video that cannot be used or is smaller than a patch, no frame that passes, `out` of other settings, or,
        with status 1, a video of which nothing can be read or a full disk.
    """
    if config.positions == "random":
        config = dataclasses.replace(config, per_frame=config.per_frame or 4, seed=config.seed or 0)
    with contextlib.closing(video.frames(source)) as frames:
        _check_room(source, next(frames).shape, config)
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    settings = {"command": "from_video", "video_sha256": folders.fingerprint(source), **given}
    writing.check(out, settings)
    survey = _survey(source, out / "frames.csv", config)
    verdicts = collections.Counter(row["verdict"] for row in survey)
    found = {"frames": len(survey), "blank": verdicts["blank"], "blurred": verdicts["blurred"]}
    if not verdicts["good"]:
        raise InputError(
            f"{source} has no frame to cut: of {len(survey)}, {found['blank']} are blank and {found['blurred']} blurred: "
            "use a lower --min_contrast or --min_sharpness"
        )
    with contextlib.closing(video.frames(source)) as frames:
        numbered = enumerate(frames)
        batches = []
        for row in survey:
            if row["verdict"] == "good":
                rows = _patches(source, row, config)
                draw = functools.partial(
                    _cut, numbered, row, rows, config.size, f"{out / 'frames.csv'} is not of {source}"
                )
                batches.append(writing.Batch(rows, draw))
        records = {"settings.json": settings, "frames.csv": survey}
        plan = writing.Plan(out=out, records=records, batches=batches)
        written = writing.complete([plan], label="cut", unit="patches")
    warning = video.missing(source, read=len(survey), promised=video.length(source))
    return {**found, "patches": len(plan.rows), "written": written, "warning": warning}


def _check_room(path: Path, shape: tuple[int, ...], config: FromVideo) -> None:
    height, width = shape
    size, count = config.size, config.per_frame or 1
    if min(shape) < size:
        raise InputError(
            f"{path} has frames of {width}x{height} pixels, smaller than the patch of {size}: use a smaller --size"
        )
    if count > (height - size + 1) * (width - size + 1):
        raise InputError(f"{path} has frames of {width}x{height} pixels, too small for --per_frame={count}: use less")


def _survey(path: Path, kept: Path, config: FromVideo) -> list[Row]:
    """A row for each frame: its size, what it measures, and "good", "blank" or "blurred". The file `kept` is believed if it exists."""
    if kept.exists():
        return _kept(kept)
    rows: list[Row] = []
    promised = video.length(path)
    with progress("survey", promised, "frames") as update, contextlib.suppress(video.CutShort):
        for frame in video.frames(path):
            measured = dict(zip(("contrast", "sharpness"), video.measure(frame), strict=True))
            rows.append({"frame": len(rows), "height": frame.shape[0], "width": frame.shape[1], **measured})
            if len(rows) <= promised:
                update(len(rows))
    blank = np.array([row["contrast"] < config.min_contrast for row in rows])
    sharp = np.array([row["sharpness"] for row in rows])
    usual = float(np.median(sharp[~blank])) if not blank.all() else 0.0
    verdicts = np.where(blank, "blank", np.where(sharp < config.min_sharpness * usual, "blurred", "good"))
    return [{**row, "verdict": verdict} for row, verdict in zip(rows, verdicts.tolist(), strict=True)]


def _kept(path: Path) -> list[Row]:
    with files.understood(path, "delete it and run again"):
        rows: list[Row] = [
            {
                **{k: int(row[k]) for k in ("frame", "height", "width")},
                **{k: float(row[k]) for k in ("contrast", "sharpness")},
                "verdict": row["verdict"],
            }
            for row in files.read_csv(path)
        ]
        if [row["frame"] for row in rows] != list(range(len(rows))):
            raise ValueError("its frames do not follow each other")
        if any(min(row["height"], row["width"]) < 1 for row in rows):
            raise ValueError("a frame has no pixels")
        if any(row["height"] * row["width"] > video.MAX_PIXELS for row in rows):
            raise ValueError("a frame is larger than any is read")
        return rows


def _patches(path: Path, row: Row, config: FromVideo) -> list[Row]:
    """Rows of the manifest for the patches of a surveyed frame."""
    frame, size = row["frame"], config.size
    _check_room(path, (row["height"], row["width"]), config)
    height, width = row["height"] - size + 1, row["width"] - size + 1
    if config.positions == "grid":
        corners = list(itertools.product(range(0, height, size), range(0, width, size)))
    else:
        places = np.random.default_rng([config.seed, frame]).choice(height * width, config.per_frame, replace=False)
        corners = [divmod(int(place), width) for place in np.sort(places)]
    return [
        {"file": f"{frame:06d}_{top:05d}_{left:05d}.png", "source": path.name, "frame": frame, "top": top, "left": left}
        for top, left in corners
    ]


def _cut(
    numbered: Iterator[tuple[int, np.ndarray]], row: Row, patches: list[Row], size: int, wrong: str
) -> list[np.ndarray]:
    """The patches of a surveyed frame, which comes later in `numbered` than all that were cut before."""
    image = next((image for number, image in numbered if number == row["frame"]), None)
    if image is None or image.shape != (row["height"], row["width"]):
        raise InputError(f"{wrong}: delete it and run again")
    return [image[p["top"] : p["top"] + size, p["left"] : p["left"] + size] for p in patches]

"""What is inspected: the plates, strips and videos that cameras saw, read in bands of tiles."""

import dataclasses
import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import files
from steel_ad.data import folders, video
from steel_ad.errors import InputError
from steel_ad.inspection import tiles
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.tiles import Band
from steel_ad.progress import Update

_VIDEOS = (".avi", ".mp4", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".y4m")


@dataclasses.dataclass(frozen=True)
class Strip:
    """What one camera saw without a gap.

    Attributes:
      camera: its place and scale.
      image: name of a plate; "" for an endless strip.
      paths: images that follow each other, or one video.
      frame_px: rows of the first frame; 0 where it has not been read yet.
    """

    camera: Camera
    image: str
    paths: tuple[Path, ...]
    frame_px: int = 0

    @property
    def single(self) -> bool:
        """Whether this is a plate, not an endless strip."""
        return bool(self.image)

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 `[h_i, w]` along the strip.

        Raises:
          InputError: a file that cannot be read, or frames of different widths.
        """
        width = None
        for path in self.paths:
            for frame in video.frames(path) if is_video(path) else (folders.read_image(path),):
                check_width(path, frame.shape[1], width)
                width = frame.shape[1]
                yield frame


def cameras(path: Path, usual: float | None) -> list[tuple[Camera, Path]]:
    """The cameras and the places of what they saw.

    Args:
      path: an image, a video or a folder of one camera, or a JSON list of cameras.
      usual: scale in mm a pixel of a camera that does not give its own; None where it is not known.

    Raises:
      InputError: a list that cannot be understood, or that leads out of its folder.
    """
    if path.suffix.lower() != ".json":
        return [(Camera(mm_per_px=usual), path)]
    rows = files.read_json(path)
    try:
        found = []
        for r in rows:
            scale = r.get("mm_per_px", usual)
            camera = Camera(
                str(r["name"]),
                r.get("side", "top"),
                float(r.get("across_mm", 0)),
                None if scale is None else float(scale),
            )
            str(r["name"]).encode()
            if not Path(os.path.realpath(path.parent / r["source"])).is_relative_to(os.path.realpath(path.parent)):
                raise InputError(
                    f"{path} names the source {r['source']!r}, which lies outside its folder: put the file above all of its "
                    "sources, and the sources themselves, not links, below it"
                )
            found.append((camera, path.parent / r["source"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(
            f"{path} is no list of cameras: give each name, source and optionally side, across_mm, mm_per_px"
        ) from None
    if not found or len({camera.name for camera, _ in found}) < len(found):
        raise InputError(f"{path} must list at least one camera, each with a name of its own")
    return found


def strips_of(path: Path, camera: Camera, one: bool) -> list[Strip]:
    """The strips in an image, a video or a folder; `one`: the images of the folder follow each other along one strip.

    Raises:
      InputError: `one` of what is no folder, or names of images that are not in order.
    """
    if path.is_dir():
        images = folders.list_images(path)
        if not one:
            return [Strip(camera, p.name, (p,)) for p in images]
        check_order(images, path)
        return [Strip(camera, "", tuple(images))]
    if one and not is_video(path):
        raise InputError(f"--strip is for a folder of images that follow each other, and {path} is one: leave it out")
    return [Strip(camera, "" if is_video(path) else path.name, (path,))]


def is_video(path: Path) -> bool:
    return path.suffix.lower() in _VIDEOS


def endless(strips: Sequence[Strip]) -> bool:
    """Whether any of them is an endless strip."""
    return not all(s.single for s in strips)


def check_order(paths: Sequence[Path], root: Path) -> None:
    """Refuses images that would follow each other as 1, 10, 2.

    Raises:
      InputError: plain and natural order of the names differ.
    """

    def natural(path: Path) -> list[str | int]:
        parts = re.split("([0-9]+)", os.path.relpath(path, root))
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    for plain, meant in zip(paths, sorted(paths, key=natural), strict=True):
        if plain != meant:
            raise InputError(
                f"in {root}, {plain.name} would come before {meant.name}: pad the numbers in the names with zeros, since images "
                "of a strip follow each other in plain order"
            )


def check_width(path: Path, width: int, before: int | None) -> None:
    """Refuses an image that a strip cannot go on with.

    Raises:
      InputError: it is not as wide as the strip so far, of `before` pixels (None: it is the first).
    """
    if before not in (None, width):
        raise InputError(f"{path} is {width} pixels wide, but the strip before it {before}: leave it out")


def check_size(path: Path, shape: Sequence[int], tile_px: int) -> None:
    """Refuses an image or strip of `shape` (h, w) that is smaller than a tile.

    Raises:
      InputError: it is; calibration looks at whole tiles only.
    """
    if min(shape) < tile_px:
        raise InputError(
            f"{path} is {shape[1]}x{shape[0]} pixels, less than a tile of {tile_px}, for which no promise was made: leave it out or "
            "use a smaller --tile_px"
        )


def stamp(strips: Sequence[Strip], source: Path) -> str:
    """A hash of the files' names, sizes and times, which says whether they are those of the first start without reading them.

    Raises:
      InputError: a file that is gone.
    """
    root = source if source.is_dir() else source.parent
    try:
        stats = [(path, path.stat()) for strip in strips for path in strip.paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its name") from None
    return digest([[os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def digest(listed: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def bands(
    strips: Sequence[Strip],
    update: Update,
    *,
    tile: int,
    halo: int,
    first: int = 0,
    skip: int = 0,
    unread: dict[int, str] | None = None,
) -> Iterator[tuple[int, Band]]:
    """The bands of the strips, as (strip, band).

    Args:
      update: called with the number of frames read, and the pixels a second.
      tile, halo: of the bands, px.
      first, skip: the strip to begin with, and how many of its bands are left out.
      unread: takes a sentence about each strip that cannot be read to its end, before its last band or the next strip's first one
        comes: a video that is cut short, or a plate that cannot be read. None: such a strip raises.

    Raises:
      InputError: a strip that cannot be read.
    """
    frames, pixels, start = sum(len(s.paths) for s in strips[:first]), 0, time.perf_counter()

    def read(i: int) -> Iterator[np.ndarray]:
        nonlocal frames, pixels
        try:
            for frame in strips[i].frames():
                yield frame
                frames, pixels = frames + 1, pixels + frame.size
                update(frames, f"{pixels / 1e6 / max(time.perf_counter() - start, 1e-9):.2f} Mpx/s")
        except InputError as error:
            if unread is None or not (strips[i].single or isinstance(error, video.CutShort)):
                raise
            unread[i] = str(error)

    for i in range(first, len(strips)):
        for k, band in enumerate(tiles.bands(read(i), tile=tile, halo=halo)):
            if i > first or k >= skip:
                yield i, band


def ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, produced by a thread up to `depth` ahead, so that reading and computing overlap."""
    waiting: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()

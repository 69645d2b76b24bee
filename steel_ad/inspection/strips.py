"""What is inspected: plates, strips and videos, in bands of tiles, and a detector's view of them."""

import dataclasses
import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import folders, video
from steel_ad.detectors import Fitted
from steel_ad.errors import InputError
from steel_ad.inspection import tiles
from steel_ad.inspection.ledger import Camera
from steel_ad.inspection.tiles import Band, Pieces
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.morphology import grey_opening
from steel_ad.progress import Update

_VIDEOS = (".avi", ".mp4", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".y4m")
_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Strip:
    """What one camera saw without a gap: `paths` are images that follow each other, or one video, whose first frame has
    `frame_px` rows (0: not read yet)."""

    camera: Camera
    image: str
    paths: tuple[Path, ...]
    frame_px: int = 0

    @property
    def single(self) -> bool:
        """Whether it is a plate of its own."""
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
    """The cameras and what they saw; `usual` is the scale, mm a pixel, of those that do not give theirs."""
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
    """Whether strips are inspected, not plates."""
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
      InputError: it is not as wide as the strip `before` it, if there is one.
    """
    if before not in (None, width):
        raise InputError(f"{path} is {width} pixels wide, but the strip before it {before}: leave it out")


def stamp(strips: Sequence[Strip], source: Path) -> str:
    """Of names, sizes and times: whether the files are those of the first start, without reading what may be long."""
    root = source if source.is_dir() else source.parent
    try:
        stats = [(path, path.stat()) for strip in strips for path in strip.paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its name") from None
    return digest([[os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def digest(listed: Any) -> str:
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class View:
    """The detector's opened map of a band, tile by tile, each in its window."""

    def __init__(self, detector: Fitted, config: configs.Inspection):
        self.tile, self.halo = config.tile_px, config.halo_px
        self._least = detector.least_px

        def one(state, window, corner):
            raw = detector.detector.residual(state, window.astype(jnp.float32) / 255)
            opened = grey_opening(raw, radius=detector.radius)
            return jax.lax.dynamic_slice(opened, (corner[0], corner[1]), [min(self.tile, n) for n in window.shape])

        self._state = detector.state
        self._program = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)), compiler_options=cpu_compiler_options())

    def check(self, shape: Sequence[int]) -> None:
        """Refuses what the detector cannot see.

        Raises:
          InputError: it is smaller than the detector's patch.
        """
        if min(shape) < self._least:
            raise InputError(
                f"what is inspected is {min(shape)} pixels high or wide, less than the detector's patch of {self._least}"
            )

    def cut(self, band: Band) -> Pieces:
        """The band's windows."""
        return tiles.cut(band, tile=self.tile, halo=self.halo)

    def cores(self, pieces: Pieces) -> np.ndarray:
        """Opened maps of the windows' tiles: float32 `[n, min(tile, h), min(tile, w)]`.

        Raises:
          InputError: windows that the detector cannot see, or maps that are not finite.
        """
        return _finite(np.concatenate(jax.device_get(self._begin(pieces)))[: len(pieces.pixels)])

    def whole(self, band: Band) -> np.ndarray:
        """The band's tiles that do not stick out: uint8 `[n, tile, tile]`."""
        rows = band.pixels[band.core : band.core + self.tile]
        n = rows.shape[1] // self.tile if band.height == self.tile else 0
        return rows[:, : n * self.tile].reshape(len(rows), n, self.tile).transpose(1, 0, 2)

    def _begin(self, pieces: Pieces) -> list[jax.Array]:
        self.check(pieces.pixels.shape[1:])
        # One program for all; on CPU a batch's activations would leave the caches.
        size = 1 if jax.default_backend() == "cpu" else _BATCH
        missing = -len(pieces.pixels) % size
        padded = [np.concatenate([a, np.repeat(a[-1:], missing, 0)]) for a in pieces]
        batches = zip(*(a.reshape(-1, size, *a.shape[1:]) for a in padded), strict=True)
        return [self._program(self._state, pixels, corners) for pixels, corners in batches]

    def maps(self, bands: Iterable[tuple[int, Band]]) -> Iterator[tuple[int, Band, np.ndarray]]:
        """(strip, band, opened map float32 `[height, w]`); the device works on one band while the next is prepared."""
        waiting: list[tuple[int, Band, list[jax.Array]]] = []
        for strip, band in bands:
            waiting.append((strip, band, self._begin(self.cut(band))))
            if len(waiting) > 1:
                yield self._end(waiting.pop(0))
        for last in waiting:
            yield self._end(last)

    def _end(self, item: tuple[int, Band, list[jax.Array]]) -> tuple[int, Band, np.ndarray]:
        strip, band, batches = item
        count = -(-band.pixels.shape[1] // self.tile)
        return strip, band, tiles.join(_finite(np.concatenate(jax.device_get(batches))[:count]), band)


def _finite(maps: np.ndarray) -> np.ndarray:
    if not np.isfinite(maps).all():
        raise InputError("the detector's map is not finite, so nothing can be said: train the model again", status=1)
    return maps


def bands(
    strips: Sequence[Strip],
    view: View,
    update: Update,
    *,
    first: int = 0,
    skip: int = 0,
    unread: dict[int, str] | None = None,
) -> Iterator[tuple[int, Band]]:
    """Bands of the strips from `first` on, of which `skip` bands are left out; frames and pixels read go to `update`.

    A video that is cut short ends there, and a plate that cannot be read has no band: sentences about them are in `unread`, by
    strip, before the last or the next band comes. Without `unread` they are raised.
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
        for k, band in enumerate(tiles.bands(read(i), tile=view.tile, halo=view.halo)):
            if i > first or k >= skip:
                yield i, band


def ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, produced in a thread up to `depth` ahead, so that reading and computing overlap."""
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

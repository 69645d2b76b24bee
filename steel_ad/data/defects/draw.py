"""Draws a library of defects, for when there are no pictures of any."""

import jax
import numpy as np
from jax import Array
from scipy import ndimage

from steel_ad.data.defects.library import EIGHT, MIN_AREA_PX, Cut, Library, assemble, content_hash, grown, window


def procedural(key: Array, num: int, *, size: int = 128, feather_px: int = 3) -> Library:
    """A library of `num` drawn defects, the `KINDS` in turn.

    Scratches: bright or dark, single or in bundles, often broken. Pits: dark inclusions drawn out along the strip, in
    rows. Patches: large dark stains of scale. Dents: bright on one side and dark on the other. Spots: small round
    stains. Smears: faint streaks. The strip runs along axis 0. The same key gives the same library on every device.

    Args:
      key: a JAX PRNG key.
      num: number of defects.
      size: the cut-outs' height and width in px, 64 or more; and with it the longest scratch.
      feather_px: as in `defects.load`.

    Raises:
      ValueError: `num` is below 1 or `size` below 64.
    """
    if num < 1 or size < 64:
        raise ValueError(f"need num >= 1 and size >= 64, got {num} and {size}")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    room = size - 2 * feather_px
    cuts = []
    for i in range(num):
        kind = KINDS[i % len(KINDS)]
        change, mask = _draw(rng, kind, room)
        plain = rng.uniform(0.35, 0.6) + 0.02 * _noise(rng, change.shape, 6.0, 0.7)
        image = np.round(255 * np.clip(plain + change, 0, 1)).astype(np.uint8)
        seen = window(image, change.astype(np.float32), mask, size, feather_px)
        cuts.append(Cut(seen, kind, f"procedural/{kind}/{i:05d}", content_hash(image)))
    return assemble(cuts)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], along_px: float, across_px: float) -> np.ndarray:
    """Smooth Gaussian noise of unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), (along_px, across_px), mode="wrap")
    return noise / noise.std()


def _draw(rng: np.random.Generator, kind: str, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Change of grey level [room, room] in [-1, 1] and mask of one drawn defect, inside by a pixel or more."""
    axis = np.arange(room) - (room - 1) / 2
    y, x = axis[:, None], axis[None, :]
    frame = np.minimum(room / 2 - np.abs(y), room / 2 - np.abs(x)) > 1
    while True:
        change, mask = _DRAWERS[kind](rng, y, x)
        mask &= frame
        labels, _ = ndimage.label(grown(mask), EIGHT)
        area = np.bincount(labels[mask], minlength=2)[1:]
        mask &= labels == area.argmax() + 1
        if area.max() >= 2 * MIN_AREA_PX:
            return np.clip(change, -1, 1), mask


def _turned(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a random direction, within `tilt` radians of the strip's."""
    angle = rng.uniform(-tilt, tilt)
    return y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.uniform())


def _scratch(rng, y, x):
    shape, change = (y.size, x.size), np.zeros((y.size, x.size))
    mask = np.zeros(shape, bool)
    tilt = 0.12 if rng.uniform() < 0.75 else np.pi / 2
    length, contrast = rng.uniform(20, y.size), _log(rng, 0.1, 0.5) * (1 if rng.uniform() < 0.8 else -1)
    along, across = _turned(rng, y, x, tilt)
    bend = rng.uniform(-0.15, 0.15) / length
    wander = 0.6 * _noise(rng, shape, 14, 14)
    for line in range(rng.choice([1, 2, 3, 5], p=[0.6, 0.2, 0.12, 0.08])):
        part = length * rng.uniform(0.6, 1)
        s = along - rng.uniform(-0.5, 0.5) * (length - part)
        inside = np.clip(1 - (2 * s / part) ** 2, 0, 1)
        width = _log(rng, 0.5, 2.2) * np.maximum(inside**0.2, 0.5)
        away = np.abs(across + bend * s**2 + wander - (rng.normal(0, 3.5) if line else 0)) / width
        broken = np.clip(1 + rng.uniform(0.1, 0.7) * _noise(rng, shape, 8, 30), 0.1, 1.6)
        change = np.maximum(change, np.exp(-0.5 * away**2) * broken * np.minimum(8 * inside, 1))
        mask |= (away < 1.8) & (inside > 0)
    return contrast * change, mask & (change > 0.08)


def _pit(rng, y, x):
    shape, inside = (y.size, x.size), np.full((y.size, x.size), -1.0)
    ragged = np.clip(_noise(rng, shape, 4, 1.5), -2, 2)
    spread = _log(rng, 4, 25)
    for _ in range(rng.integers(1, 6)):
        length, width = _log(rng, 4, 28), _log(rng, 1.5, 9)
        dy, dx = y - rng.normal(0, spread), x - rng.normal(0, 3)
        inside = np.maximum(inside, 1 + 0.25 * ragged - np.sqrt((dy / length) ** 2 + (dx / width) ** 2))
    depth = np.clip(3 * inside, 0, 1) * np.clip(0.8 + 0.25 * _noise(rng, shape, 5, 2), 0.3, 1.4)
    return -_log(rng, 0.07, 0.35) * depth, inside > 0.03


def _patch(rng, y, x):
    shape = (y.size, x.size)
    along, across = _turned(rng, y, x, 0.4)
    length, width = _log(rng, 12, 52), _log(rng, 8, 30)
    ragged = 0.35 * _noise(rng, shape, 14, 10) + 0.1 * _noise(rng, shape, 2.5, 2)
    inside = 1 + np.clip(ragged, -0.8, 0.8) - np.sqrt((along / length) ** 2 + (across / width) ** 2)
    cover = np.clip(inside * rng.uniform(3, 9), 0, 1)
    grain = 1 + rng.uniform(0.05, 0.25) * _noise(rng, shape, 2, 1) + 0.15 * _noise(rng, shape, 20, 8)
    return _log(rng, 0.08, 0.6) * (-1 if rng.uniform() < 0.85 else 0.7) * cover * grain, inside > 0.03


def _dent(rng, y, x):
    along, across = _turned(rng, y, x, np.pi)
    radius = _log(rng, 3.5, 20)
    r2 = (along**2 + (across / rng.uniform(0.5, 1)) ** 2) / radius**2
    bowl = np.maximum(1 - r2, 0) ** rng.uniform(1, 2)
    slope = np.gradient(bowl * radius)
    light = rng.uniform(-np.pi, np.pi)
    shade = np.cos(light) * slope[0] + np.sin(light) * slope[1]
    change = _log(rng, 0.08, 0.5) * (shade / np.abs(shade).max() - rng.uniform(0, 0.35) * bowl)
    return np.where(change > 0, rng.uniform(0.6, 1.2), 1) * change, r2 < 1


def _spot(rng, y, x):
    shape = (y.size, x.size)
    radius, ratio = _log(rng, 2.2, 14), rng.uniform(0.6, 1)
    along, across = _turned(rng, y, x, np.pi)
    wobble = np.clip(_noise(rng, shape, 4, 4), -2, 2)
    inside = radius * (1 + 0.15 * wobble) - np.sqrt(along**2 + (across / ratio) ** 2)
    cover = np.clip(inside / rng.uniform(1.5, 4) + 0.3, 0, 1)
    return _log(rng, 0.08, 0.5) * (-1 if rng.uniform() < 0.75 else 0.7) * cover, cover > 0.15


def _smear(rng, y, x):
    shape = (y.size, x.size)
    along, across = _turned(rng, y, x, 0.25)
    length, width = _log(rng, 15, 52), _log(rng, 4, 16)
    streaks = np.clip(_noise(rng, shape, 18, 1.8), -2, 2)
    inside = 1 + 0.15 * streaks - np.sqrt((along / length) ** 2 + (across / width) ** 2)
    cover = np.clip(inside / 0.4, 0, 1) * np.clip(0.75 + 0.3 * streaks, 0.05, 1.4)
    return _log(rng, 0.06, 0.25) * (-1 if rng.uniform() < 0.65 else 1) * cover, inside > 0.06


_DRAWERS = {"scratch": _scratch, "pit": _pit, "patch": _patch, "dent": _dent, "spot": _spot, "smear": _smear}
KINDS = tuple(_DRAWERS)

"""Inserts defects of a library into plates, on the device: single ones, and those that a roll repeats along a strip."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from steel_ad.data.defects.library import Library

BLENDS = ("difference", "paste")
AUGMENTS = ("thesis", "strong")

_CONTRAST = {"thesis": (1.0, 1.0), "strong": (0.5, 1.5)}  # range of the random factor on the difference, log-uniform
_SCALE = (0.5, 1.5)
_JITTER = 0.01  # spread of a roll's marks along the strip, relative to the period
_MARGIN_PX = 4  # that a resized defect leaves in its window, for what fades around it


def insert(
    key: Array,
    plates: Array,
    library: Library,
    *,
    max_defects: int = 1,
    probability: float = 1.0,
    blend: str = "difference",
    augment: str = "thesis",
) -> tuple[Array, Array]:
    """Inserts random defects at random places of plates; pure, and jitted.

    Each plate is defective with `probability`, then with 1 to `max_defects` defects, uniform over the library. A defect
    lies wholly inside the plate, uniform over all such places, flipped up-down and left-right with probability one half
    each (both together are the rotation by 180 degrees). A defect larger than the plate hangs over: see `fitting`.

    Args:
      key: a JAX PRNG key.
      plates: float32 [b, h, w] or [b, h, w, 1] in [0, 1].
      library: the defects.
      max_defects: most defects on one plate.
      probability: of a plate to be defective.
      blend: "difference" adds the defect's difference from its own background, faded around the mask; "paste" copies
        the pixels under the mask, as the thesis does.
      augment: "thesis" is the flips alone; "strong" also resizes by 0.5 to 1.5, as far as the cut-out and the plate
        have room, and multiplies the difference by 0.5 to 1.5; both are log-uniform.

    Returns:
      images: float32, of the plates' shape, in [0, 1].
      masks: bool, of the plates' shape: the labelled regions, empty where nothing was inserted.

    Raises:
      ValueError: an option or the plates' shape or dtype is none of these.
    """
    if plates.dtype != jnp.float32 or not (plates.ndim == 3 or (plates.ndim == 4 and plates.shape[3] == 1)):
        raise ValueError(f"plates must be float32 [b, h, w] or [b, h, w, 1], got {plates.dtype} {list(plates.shape)}")
    if blend not in BLENDS or augment not in AUGMENTS:
        raise ValueError(f"blend must be one of {BLENDS} and augment one of {AUGMENTS}, got {blend!r} and {augment!r}")
    if max_defects < 1 or not 0 <= probability <= 1:
        raise ValueError(f"need max_defects >= 1 and a probability in 0..1, got {max_defects} and {probability}")
    images, masks = _insert(
        key,
        plates.reshape(plates.shape[:3]),
        library,
        max_defects=max_defects,
        probability=probability,
        paste=blend == "paste",
        resize=augment == "strong",
        contrast=_CONTRAST[augment],
    )
    return images.reshape(plates.shape), masks.reshape(plates.shape)


def insert_periodic(key: Array, strip: Array, library: Library, *, period_px: float) -> tuple[Array, Array, Array]:
    """Inserts one random defect again and again along a strip, as a damaged roll does (SPEC section 1, row 6).

    The defect has one orientation and one place across the strip; its differences are added. Mark i is at
    `first + (i + 0.01 * u_i) * period_px` along the strip, u_i uniform in [-1, 1], so that errors do not add up.

    Args:
      key: a JAX PRNG key.
      strip: float32 [h, w] in [0, 1]; axis 0 runs along it.
      library: the defects; those larger than the strip hang over: see `fitting`.
      period_px: the roll's circumference.

    Returns:
      strip: float32 [h, w] in [0, 1].
      mask: bool [h, w]: the labelled regions.
      positions: int32 [k, 2]: top and left of each mark's bounding box, px; (-1, -1) for a mark beyond the strip.
        k = ceil(h / period_px), and the first is always on it.

    Raises:
      ValueError: the period is below 1, or the strip is not float32 [h, w].
    """
    if strip.dtype != jnp.float32 or strip.ndim != 2:
        raise ValueError(f"strip must be float32 [h, w], got {strip.dtype} {list(strip.shape)}")
    if not period_px >= 1:
        raise ValueError(f"need period_px >= 1, got {period_px}")
    return _insert_periodic(key, strip, library, period_px=period_px)


def _box(mask: Array) -> tuple[Array, Array]:
    """Top left corner and (h, w) of a mask's bounding box, int32 [2] each; at 0 and of full size if it is empty."""

    def span(used):
        first = jnp.argmax(used)
        return first, used.shape[0] - jnp.argmax(used[::-1]) - first

    (top, height), (left, width) = span(mask.any(axis=1)), span(mask.any(axis=0))
    return jnp.stack([top, left]).astype(jnp.int32), jnp.stack([height, width]).astype(jnp.int32)


def _log_between(u: Array, low: float | Array, high: float | Array) -> Array:
    return jnp.exp(jnp.log(low) * (1 - u) + jnp.log(high) * u)


def _below(u: Array, stop: Array | int) -> Array:
    """An integer in 0..stop - 1 (0 if there is none) from a number in [0, 1)."""
    stop = jnp.asarray(stop, jnp.int32)
    return jnp.maximum(jnp.minimum((u * stop.astype(jnp.float32)).astype(jnp.int32), stop - 1), 0)


def _resize(image: Array, factor: Array) -> Array:
    """Bilinear resize about the middle of [s, s], same window; smaller than 1 averages, so that thin lines stay."""
    s = image.shape[0]
    middle = (s - 1) / 2
    at = jnp.arange(s, dtype=jnp.float32) - middle
    distance = jnp.abs(at[:, None] / factor - at[None, :])
    weights = jnp.maximum(1 - distance * jnp.minimum(factor, 1.0), 0.0)
    # Rows beyond the source see little or nothing of it, and fade.
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 0.8)
    return jnp.linalg.multi_dot([weights, image, weights.T], precision="highest")


_PICK = 4  # numbers that `_pick` takes


def _pick(u: Array, library: Library, shape: tuple[int, ...], *, resize: bool) -> tuple[Array, Array, Array, Array]:
    """The defect that `u`, uniform in [0, 1), stands for: turned and, if wanted, resized.

    Returns its difference and cut-out, float32, and mask, bool, [s, s], and int32 [2, 2]: the top left corner of the
    mask's box in the window, and the box's (h, w).
    """
    index = _below(u[0], library.mask.shape[0])
    difference, cutout, mask = library.difference[index], library.cutout[index], library.mask[index]
    cutout = cutout.astype(jnp.float32) / 255
    if resize:
        room = jnp.minimum(jnp.asarray(shape, jnp.float32), mask.shape[0] - 2.0 * _MARGIN_PX)
        largest = jnp.min(room / library.size[index].astype(jnp.float32))
        factor = _log_between(u[3], _SCALE[0], jnp.clip(largest, _SCALE[0], _SCALE[1]))
        difference, cutout = _resize(difference, factor), _resize(cutout, factor)
        # A line of one pixel, averaged, is no higher than the factor, and less between two samples.
        mask = _resize(mask.astype(jnp.float32), factor) > 0.4 * jnp.minimum(factor, 1.0)

    def turn(image):
        image = jnp.where(u[1] < 0.5, image[::-1], image)
        return jnp.where(u[2] < 0.5, image[:, ::-1], image)

    mask = turn(mask)
    return turn(difference), turn(cutout), mask, jnp.stack(_box(mask))


def _on_plate(window: Array, corner: Array, shape: tuple[int, ...]) -> Array:
    """A window [s, s] as a plate of `shape`, 0 elsewhere; `corner` is int32 [2] on the plate and may be beyond it.

    Slicing the padded window instead of writing it into the plate fuses with what follows: neither the padding nor a
    scatter is carried out, which is ten times as fast on CPU.
    """
    padded = jnp.pad(window, [(n, n) for n in shape])
    return lax.dynamic_slice(padded, jnp.asarray(shape, jnp.int32) - corner, shape)


@functools.partial(jax.jit, static_argnames=("max_defects", "paste", "resize"))
def _insert(key, plates, library, *, max_defects, probability, paste, resize, contrast):
    shape = plates.shape[1:]

    def defect(u):
        difference, cutout, mask, (corner, size) = _pick(u[3:], library, shape, resize=resize)
        corner = _below(u[:2], jnp.asarray(shape, jnp.int32) - size + 1) - corner
        return cutout if paste else _log_between(u[2], *contrast) * difference, mask, corner

    def one(of_plate, of_defects, plate):
        count = jnp.where(of_plate[0] < probability, 1 + _below(of_plate[1], max_defects), 0)
        contents, masks, corners = jax.vmap(defect)(of_defects)
        defective = jnp.zeros(shape, bool)
        for i in range(max_defects):
            mask = _on_plate(masks[i] & (i < count), corners[i], shape)
            content = _on_plate(jnp.where(i < count, contents[i], 0.0), corners[i], shape)
            plate = jnp.where(mask, content, plate) if paste else jnp.clip(plate + content, 0.0, 1.0)
            defective |= mask
        return plate, defective

    # All from one draw: compiling many takes longer than all the rest.
    u = jax.random.uniform(key, (plates.shape[0], 2 + max_defects * (3 + _PICK)))
    return jax.vmap(one)(u[:, :2], u[:, 2:].reshape(-1, max_defects, 3 + _PICK), plates)


@functools.partial(jax.jit, static_argnames="period_px")
def _insert_periodic(key, strip, library, *, period_px):
    window, count = library.mask.shape[1], math.ceil(strip.shape[0] / period_px)
    u = jax.random.uniform(key, (2 + _PICK + count,))
    difference, _, mask, (corner, size) = _pick(u[2:], library, strip.shape, resize=False)
    places = jnp.maximum(jnp.asarray(strip.shape, jnp.int32) - size + 1, 1)
    first = _below(u[:2], jnp.minimum(places, jnp.array([math.ceil(period_px), strip.shape[1]], jnp.int32)))
    last = places[0] - 1
    steps = jnp.arange(count, dtype=jnp.float32) + _JITTER * (2 * u[2 + _PICK :] - 1)
    top = first[0] + jnp.round(steps * period_px).astype(jnp.int32)
    top = top.at[0].set(jnp.clip(top[0], 0, last))
    seen = (top >= 0) & (top <= last)
    places = jnp.stack([top, jnp.broadcast_to(first[1], top.shape)], axis=1)

    def place(i, carry):
        image, masks = carry
        at = tuple(jnp.where(seen[i], places[i], 0) - corner + window)
        change = jnp.where(seen[i], difference, 0.0)
        changed = jnp.clip(lax.dynamic_slice(image, at, mask.shape) + change, 0.0, 1.0)
        marked = lax.dynamic_slice(masks, at, mask.shape) | (mask & seen[i])
        return lax.dynamic_update_slice(image, changed, at), lax.dynamic_update_slice(masks, marked, at)

    # Written mark by mark into the one padded strip: a pass over a whole strip for each mark would be slow.
    padded = jnp.pad(strip, window)
    image, masks = lax.fori_loop(0, count, place, (padded, jnp.zeros_like(padded, bool)))
    inner = slice(window, -window), slice(window, -window)
    return image[inner], masks[inner], jnp.where(seen[:, None], places, -1)

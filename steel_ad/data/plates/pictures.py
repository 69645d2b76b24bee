"""Pictures of plates, sound or with one anomaly and its exact mask."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from steel_ad.data.plates.anomalies import LUG_ANOMALIES, anomaly
from steel_ad.data.plates.lines import ANOMALIES, VARIED, Line, find
from steel_ad.data.plates.scene import ANOMALY, Anomaly, camera, crop, photograph, pose, reach, scene

MIN_SIZE = 32

_NOTICEABLE = 2 / 255


def render(key, line: Line | str, size: int = 256, num: int = 1, *, shape: tuple[int, int] | None = None) -> jax.Array:
    """Pictures of sound plates. Picture i depends on `key` and i only, not on `num`.

    Args:
      key: a JAX PRNG key.
      line: a `Line`, or a name in `LINES`.
      size: height and width in pixels, at least 32.
      num: number of pictures.
      shape: (h, w) in pixels, instead of `size`, for a strip that is not square.

    Returns:
      float32 [num, h, w] in [0, 1].

    Raises:
      ValueError: the line is unknown, or the picture is smaller than 32 pixels.
    """
    return _render(key, find(line), _shape(size, shape), num)


def render_each(key, line: Line | str, values: Mapping[str, jax.Array], *, shape: tuple[int, int]) -> jax.Array:
    """Pictures of sound plates of as many lines: picture i is that of `render` for the line with the i-th of `values`.

    Jittable, with one program for all values; it makes all pictures at once, and takes memory for them.

    Args:
      key: a JAX PRNG key.
      line: a `Line`, or a name in `LINES`: the pattern and whatever `values` does not name.
      values: some of `VARIED` -> float32 `[num]`.
      shape: (h, w) in pixels, both at least 32.

    Returns:
      float32 [num, h, w] in [0, 1].

    Raises:
      ValueError: the line is unknown, a name is none of `VARIED`, or the picture is smaller than 32 pixels.
    """
    recipe, shape = find(line), _shape(0, shape)
    if unknown := set(values) - set(VARIED):
        raise ValueError(f"{', '.join(sorted(unknown))} cannot vary between pictures; {', '.join(VARIED)} can")
    num = next(iter(values.values())).shape[0]

    def picture(i, values):
        return _picture(jax.random.fold_in(key, i), dataclasses.replace(recipe, **values), shape)

    return jax.vmap(picture)(jnp.arange(num), dict(values))


def render_defective(
    key,
    line: Line | str,
    kind: str,
    size: int = 256,
    num: int = 1,
    *,
    shape: tuple[int, int] | None = None,
    among: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The plates that `render` gives for the same key, each with one anomaly, from obvious to hard.

    Dents, scratches and missing or worn lugs change the height field, so they are lit like the plate; spots and smears
    change the reflectance; watermarks lie on the lens. A mask is the anomaly's support on the plate, and beyond it all
    pixels that changed by more than 2/255 before camera noise.

    Args:
      key: a JAX PRNG key.
      line: a `Line`, or a name in `LINES`.
      kind: one of the line's `anomalies`.
      size: height and width in pixels, at least 32.
      num: number of pictures.
      shape: (h, w) in pixels, instead of `size`.
      among: kinds, `kind` one of them, that one compiled program draws; else each kind has its own. The pictures are the same.

    Returns:
      images: float32 [num, h, w] in [0, 1].
      masks: bool [num, h, w], true on the anomaly, never empty.

    Raises:
      ValueError: the line is unknown, it does not show a kind, `kind` is not in `among`, or the picture is smaller than 32
        pixels or, for the lug kinds, too small to be sure of a lug.
    """
    recipe, shape = find(line), _shape(size, shape)
    kinds = among or (kind,)
    for name in (kind, *kinds):
        if name not in recipe.anomalies:
            raise ValueError(f"no anomaly {name!r} on this line; there are {', '.join(recipe.anomalies)}")
    if kind not in kinds:
        raise ValueError(f"{kind!r} is not among {', '.join(kinds)}")
    need = math.ceil(2 * reach(recipe) + recipe.lug_width_px)
    if kind in LUG_ANOMALIES and min(shape) < need:
        raise ValueError(f"a picture for {kind!r} must be {need} pixels or more on this line, got {shape}")
    return _render_defective(key, kinds.index(kind), recipe, kinds, shape, num)


@functools.partial(jax.jit, static_argnames="line")
def _lattice(key, line, index):
    return pose(jax.random.fold_in(key, index), line).cell.T


def lattice(key, line: Line | str, index: int = 0) -> jax.Array:
    """True lattice of picture `index` of `render(key, line)`.

    Returns:
      float32 [2, 2]: two primitive vectors, one a row, each (y, x) in pixels. Teardrops: across and along the strip;
      diamonds: along the two rib directions.

    Raises:
      ValueError: the line is unknown.
    """
    return _lattice(key, find(line), index)


def to_uint8(images) -> jax.Array:
    """Float images in [0, 1] of any shape as uint8 in 0..255, rounded; what lies outside is clipped."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _shape(size, shape):
    shape = (size, size) if shape is None else tuple(shape)
    if min(shape) < MIN_SIZE:
        raise ValueError(f"a picture must be {MIN_SIZE} pixels or more in height and width, got {shape}")
    return shape


def _map(picture, key, num):
    return jax.lax.map(lambda i: picture(jax.random.fold_in(key, i)), jnp.arange(num))


@functools.partial(jax.jit, static_argnames=("line", "shape", "num"))
def _render(key, line, shape, num):
    return _map(lambda key: _picture(key, line, shape), key, num)


def _picture(key, line, shape):
    plate = scene(key, line, shape)
    return camera(plate, photograph(plate, line), line)


@functools.partial(jax.jit, static_argnames=("line", "kinds", "shape", "num"))
def _render_defective(key, which, line, kinds, shape, num):
    def picture(key):
        plate = scene(key, line, shape)
        streams = jnp.array([ANOMALY + ANOMALIES.index(kind) for kind in kinds])
        draws = [functools.partial(anomaly, kind=kind, scene=plate, line=line, shape=shape) for kind in kinds]
        if len(kinds) > 1:
            draws = [functools.partial(_whole, draw, plate) for draw in draws]
        drawn = jax.lax.switch(which, draws, jax.random.fold_in(key, streams[which]))
        before, after = photograph(plate, line), photograph(plate, line, drawn)
        mask = crop(drawn.support, shape) | (jnp.abs(after - before) > _NOTICEABLE)
        return camera(plate, after, line), mask

    return _map(picture, key, num)


def _whole(draw, scene, key):
    """What `draw` returns for the key with all neutral parts written out, as branches of one program need them."""
    drawn = draw(key)
    shapes = Anomaly(*[scene.texture.shape] * 6)._replace(lugs=scene.lugs.shape)
    return Anomaly(*(jnp.broadcast_to(jnp.asarray(a), s) for a, s in zip(drawn, shapes, strict=True)))

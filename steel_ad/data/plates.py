"""Procedural pictures of patterned steel plates, with built-in anomalies and their exact masks.

Stands in for the five plate datasets (SPEC section 1), whose pictures are an industrial partner's property. The
patterns are those of DIN EN 10363: teardrops with sharp ends (type T), teardrops with flattened ends (type A), diamonds
of crossing ribs (type R).

A plate is a height field. It is lit by a light that moves between pictures, and seen from above by a line-scan camera.
The strip runs along axis 0, so rolling grain runs down the picture. A lug is found by folding a pixel's position into
the unit cell: the cost of a picture does not depend on how many lugs it shows.

    images = plates.render(jax.random.key(0), "teardrop1", num=4)
    # The same four plates, dented:
    images, masks = plates.render_defective(jax.random.key(0), "teardrop1", "dent", num=4)
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PATTERNS = ("teardrop_t", "teardrop_a", "diamond")
ANOMALIES = ("dent", "scratch", "missing_lug", "worn_lug", "spot", "smear", "watermark")
MIN_SIZE = 32

# A line's numbers by which programs do not lay out their arrays: `render_each` takes them as arrays.
VARIED = (
    *("pitch_px", "angle_deg", "lug_length_px", "lug_width_px", "lug_height_px", "flank_px", "wear", "polish"),
    *("pitch_jitter", "rotation_jitter_deg", "light_elevation_deg", "light_azimuth_deg", "light_spread_deg", "ambient"),
    *("gloss", "shininess", "exposure", "exposure_jitter", "grain", "grain_height_px", "roughness_px", "drift"),
    *("blotches", "noise"),
)

_STEEL_ANOMALIES = ANOMALIES[:-1]
_LUG_ANOMALIES = ("missing_lug", "worn_lug")
_NOTICEABLE = 2 / 255
_POSE, _FIELDS, _LIGHT, _ANOMALY = range(4)  # streams of a picture's key; anomaly kinds count on from the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A production line: what its plates, its light and its camera have in common. Lengths and heights are in pixels.

    The lattice's rectangular cell is `pitch_px` across, `pitch_px * tan(angle_deg)` along the strip. Teardrops lie at
    its corners and in its middle, along the one and the other diagonal in turn; diamonds are ribs along both diagonals.
    "+-" is a uniform spread around the line's value, drawn anew for each picture; "std" is a standard deviation within
    a picture.

    Raises:
      ValueError: `pattern` or one of `anomalies` is unknown.
    """

    pattern: str  # one of PATTERNS
    pitch_px: float  # distance of equal lugs across the strip
    angle_deg: float = 45.0  # lugs' angle to the cross direction
    lug_length_px: float  # foot to foot; ribs longer than half a cell diagonal join
    lug_width_px: float  # foot to foot, at the widest
    lug_height_px: float
    flank_px: float  # width of the slope from foot to top: small is a fresh, sharp roll
    wear: float  # 0..1: loss of height and raggedness of the outline, uneven between lugs and regions
    polish: float  # relative gain in reflectance of a lug's top, by traffic and rolls; negative is a dull top
    pitch_jitter: float = 0.015  # +- relative
    rotation_jitter_deg: float = 1.0  # +-
    light_elevation_deg: float  # above the plate; low light draws long flanks
    light_azimuth_deg: float  # 0 from the right, 90 from below
    light_spread_deg: float  # +- azimuth; the elevation moves by a quarter of it
    ambient: float  # 0..1: share of the light that comes from everywhere
    gloss: float  # strength of the mirror-like part; the flat plate has brightness 1
    shininess: float  # sharpness of the highlights
    exposure: float  # 0..1: grey level of a flat, clean plate
    exposure_jitter: float = 0.08  # +- relative
    grain: float  # std of reflectance, relative, in streaks along the strip
    grain_height_px: float  # std of height, in the same direction
    grain_length_px: float  # correlation length of the streaks along the strip
    roughness_px: float  # std of height, without a direction: scale and shot marks
    drift: float  # std of the illumination, relative, over hundreds of pixels
    blotches: float  # 0..1: loss of reflectance in oxide stains
    blotch_cover: float  # 0..1: area share of the stains
    flakes: float  # 0..1: area share of scale flakes, a few pixels each
    blur_px: float  # sigma of the camera's point spread
    noise: float  # std of the camera's noise at white; falls with the root of the brightness
    anomalies: tuple[str, ...] = _STEEL_ANOMALIES  # kinds that this line's test pictures can show

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {self.pattern!r}; there are {', '.join(PATTERNS)}")
        for kind in self.anomalies:
            if kind not in ANOMALIES:
                raise ValueError(f"unknown anomaly kind {kind!r}; there are {', '.join(ANOMALIES)}")


LINES: dict[str, Line] = {
    # A clean, evenly lit line with a matt finish.
    "teardrop1": Line(
        pattern="teardrop_t",
        pitch_px=50.0,
        angle_deg=49.0,
        lug_length_px=41.0,
        lug_width_px=13.0,
        lug_height_px=3.4,
        flank_px=4.8,
        wear=0.25,
        polish=0.12,
        light_elevation_deg=44.0,
        light_azimuth_deg=215.0,
        light_spread_deg=25.0,
        ambient=0.35,
        gloss=0.2,
        shininess=25.0,
        exposure=0.38,
        grain=0.035,
        grain_height_px=0.07,
        grain_length_px=14.0,
        roughness_px=0.1,
        drift=0.06,
        blotches=0.08,
        blotch_cover=0.08,
        flakes=0.003,
        blur_px=0.7,
        noise=0.018,
    ),
    # A bright, glossy line with blunt, low, densely set lugs.
    "teardrop2": Line(
        pattern="teardrop_a",
        pitch_px=40.0,
        angle_deg=45.0,
        lug_length_px=26.0,
        lug_width_px=9.5,
        lug_height_px=2.0,
        flank_px=3.2,
        wear=0.15,
        polish=0.18,
        light_elevation_deg=56.0,
        light_azimuth_deg=300.0,
        light_spread_deg=25.0,
        ambient=0.3,
        gloss=0.55,
        shininess=45.0,
        exposure=0.5,
        grain=0.045,
        grain_height_px=0.045,
        grain_length_px=40.0,
        roughness_px=0.05,
        drift=0.06,
        blotches=0.06,
        blotch_cover=0.05,
        flakes=0.002,
        blur_px=0.6,
        noise=0.02,
    ),
    # A worn line: stained, with uneven light and uneven lugs.
    "teardrop3": Line(
        pattern="teardrop_t",
        pitch_px=62.0,
        angle_deg=45.0,
        lug_length_px=50.0,
        lug_width_px=16.0,
        lug_height_px=3.8,
        flank_px=5.5,
        wear=0.45,
        polish=0.3,
        light_elevation_deg=50.0,
        light_azimuth_deg=120.0,
        light_spread_deg=40.0,
        ambient=0.35,
        gloss=0.3,
        shininess=30.0,
        exposure=0.42,
        exposure_jitter=0.15,
        grain=0.06,
        grain_height_px=0.08,
        grain_length_px=22.0,
        roughness_px=0.12,
        drift=0.18,
        blotches=0.22,
        blotch_cover=0.22,
        flakes=0.008,
        blur_px=0.9,
        noise=0.025,
    ),
    # An oxidised, dull line under uneven light, seen through a lens that gets water on it.
    "teardrop4": Line(
        pattern="teardrop_a",
        pitch_px=52.0,
        angle_deg=52.0,
        lug_length_px=40.0,
        lug_width_px=13.0,
        lug_height_px=3.3,
        flank_px=4.0,
        wear=0.35,
        polish=-0.15,
        light_elevation_deg=50.0,
        light_azimuth_deg=30.0,
        light_spread_deg=40.0,
        ambient=0.4,
        gloss=0.2,
        shininess=20.0,
        exposure=0.38,
        exposure_jitter=0.15,
        grain=0.05,
        grain_height_px=0.05,
        grain_length_px=10.0,
        roughness_px=0.11,
        drift=0.2,
        blotches=0.25,
        blotch_cover=0.3,
        flakes=0.008,
        blur_px=1.0,
        noise=0.025,
        anomalies=ANOMALIES,
    ),
    # Crossing ribs, rolled sharp.
    "diamond": Line(
        pattern="diamond",
        pitch_px=48.0,
        angle_deg=60.0,
        lug_length_px=60.0,
        lug_width_px=9.5,
        lug_height_px=2.6,
        flank_px=3.4,
        wear=0.3,
        polish=0.15,
        light_elevation_deg=47.0,
        light_azimuth_deg=200.0,
        light_spread_deg=30.0,
        ambient=0.35,
        gloss=0.3,
        shininess=30.0,
        exposure=0.42,
        grain=0.04,
        grain_height_px=0.06,
        grain_length_px=18.0,
        roughness_px=0.09,
        drift=0.08,
        blotches=0.12,
        blotch_cover=0.1,
        flakes=0.005,
        blur_px=0.8,
        noise=0.02,
    ),
}


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
    return _render(key, _line(line), _shape(size, shape), num)


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
    recipe, shape = _line(line), _shape(0, shape)
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
    recipe, shape = _line(line), _shape(size, shape)
    kinds = among or (kind,)
    for name in (kind, *kinds):
        if name not in recipe.anomalies:
            raise ValueError(f"no anomaly {name!r} on this line; there are {', '.join(recipe.anomalies)}")
    if kind not in kinds:
        raise ValueError(f"{kind!r} is not among {', '.join(kinds)}")
    need = math.ceil(2 * _reach(recipe) + recipe.lug_width_px)
    if kind in _LUG_ANOMALIES and min(shape) < need:
        raise ValueError(f"a picture for {kind!r} must be {need} pixels or more on this line, got {shape}")
    return _render_defective(key, kinds.index(kind), recipe, kinds, shape, num)


@functools.partial(jax.jit, static_argnames="line")
def _lattice(key, line, index):
    return _pose(jax.random.fold_in(key, index), line).cell.T


def lattice(key, line: Line | str, index: int = 0) -> jax.Array:
    """True lattice of picture `index` of `render(key, line)`.

    Returns:
      float32 [2, 2]: two primitive vectors, one a row, each (y, x) in pixels. Teardrops: across and along the strip;
      diamonds: along the two rib directions.

    Raises:
      ValueError: the line is unknown.
    """
    return _lattice(key, _line(line), index)


def to_uint8(images) -> jax.Array:
    """Float images in [0, 1] of any shape as uint8 in 0..255, rounded; what lies outside is clipped."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _line(line: Line | str) -> Line:
    if isinstance(line, Line):
        return line
    if line not in LINES:
        raise ValueError(f"unknown line {line!r}; there are {', '.join(LINES)}")
    return LINES[line]


def _shape(size, shape):
    shape = (size, size) if shape is None else tuple(shape)
    if min(shape) < MIN_SIZE:
        raise ValueError(f"a picture must be {MIN_SIZE} pixels or more in height and width, got {shape}")
    return shape


def _reach(line):
    """How far, at most, any point is from the nearest lug's centre, in px: the circumradius of neighbours."""
    across, along = line.pitch_px, line.pitch_px * math.tan(math.radians(line.angle_deg))
    diagonal = math.hypot(across, along)
    reach = diagonal / 4 if line.pattern == "diamond" else diagonal**2 / (4 * max(across, along))
    return (1 + line.pitch_jitter) * reach


def _map(picture, key, num):
    return jax.lax.map(lambda i: picture(jax.random.fold_in(key, i)), jnp.arange(num))


@functools.partial(jax.jit, static_argnames=("line", "shape", "num"))
def _render(key, line, shape, num):
    return _map(lambda key: _picture(key, line, shape), key, num)


def _picture(key, line, shape):
    scene = _scene(key, line, shape)
    return _camera(scene, _photograph(scene, line), line)


@functools.partial(jax.jit, static_argnames=("line", "kinds", "shape", "num"))
def _render_defective(key, which, line, kinds, shape, num):
    def picture(key):
        scene = _scene(key, line, shape)
        streams = jnp.array([_ANOMALY + ANOMALIES.index(kind) for kind in kinds])
        draws = [functools.partial(_anomaly, kind=kind, scene=scene, line=line, shape=shape) for kind in kinds]
        if len(kinds) > 1:
            draws = [functools.partial(_whole, draw, scene) for draw in draws]
        anomaly = jax.lax.switch(which, draws, jax.random.fold_in(key, streams[which]))
        before, after = _photograph(scene, line), _photograph(scene, line, anomaly)
        mask = _crop(anomaly.support, shape) | (jnp.abs(after - before) > _NOTICEABLE)
        return _camera(scene, after, line), mask

    return _map(picture, key, num)


def _whole(draw, scene, key):
    """What `draw` returns for the key with all neutral parts written out, as branches of one program need them."""
    anomaly = draw(key)
    shapes = _Anomaly(*[scene.texture.shape] * 6)._replace(lugs=scene.lugs.shape)
    return _Anomaly(*(jnp.broadcast_to(jnp.asarray(a), s) for a, s in zip(anomaly, shapes, strict=True)))


class _Pose(NamedTuple):
    """The lattice: `cell` [2, 2] has primitive vectors (y, x) as columns; `origin` [2] is a cell's corner."""

    cell: jax.Array
    origin: jax.Array


class _Scene(NamedTuple):
    """A plate and its light, with a margin for gradient and blur. Arrays are [h, w] unless said otherwise."""

    pose: _Pose
    y: jax.Array  # [h, 1]
    x: jax.Array  # [1, w]
    lugs: jax.Array  # [2, h, w], 0..1: height of the two lug families before wear
    cells: jax.Array  # int32 [2, 2, h, w]: family, cell index
    intact: jax.Array  # [2, h, w]: what wear left of the height
    texture: jax.Array  # height of grain and roughness, px
    reflectance: jax.Array  # times illumination and exposure
    light: jax.Array  # [3]: y, x, z
    noise: jax.Array  # the camera's, of unit variance


class _Anomaly(NamedTuple):
    """What an anomaly does to a scene. Every part is neutral outside `support`."""

    support: jax.Array  # bool [h, w]
    lugs: jax.Array | float = 1.0  # factor, [2, h, w]
    height: jax.Array | float = 0.0  # px, added
    reflectance: jax.Array | float = 1.0  # factor
    veil: jax.Array | float = 0.0  # 0..1: share of stray light that the lens adds
    shade: jax.Array | float = 1.0  # factor in front of the lens


def _margin(line):
    return 1 + _blur_radius(line)


def _blur_radius(line):
    return math.ceil(2.5 * line.blur_px)


def _crop(image, shape):
    top, left = (image.shape[0] - shape[0]) // 2, (image.shape[1] - shape[1]) // 2
    return image[top : top + shape[0], left : left + shape[1]]


def _between(u, low, high):
    return low + (high - low) * u


def _log_between(u, low, high):
    return low * (high / low) ** u


def _smoothstep(x):
    x = jnp.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


@functools.cache
def _spline(size, cell):
    """Cubic B-spline weights [size, knots], rows of norm 1: white knots give unit variance everywhere."""
    at = np.arange(size)[:, None] / cell - (np.arange(math.ceil(size / cell) + 3)[None, :] - 1.5)
    d = np.abs(at)
    weights = np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _fields(key, shape, *cells):
    """Smooth noise fields [h, w] of unit variance, one a cell: its (y, x) is the field's grain in px, 1 is white.

    All come from one draw, because compiling many draws takes longer than the rest of the renderer.
    """
    splines = [[None if c <= 1 else _spline(n, float(c)) for n, c in zip(shape, cell, strict=True)] for cell in cells]
    knots = [[n if w is None else w.shape[1] for n, w in zip(shape, pair, strict=True)] for pair in splines]
    count = sum(map(math.prod, knots))
    # The same numbers; XLA takes four times as long on CPU for an odd count.
    noise = jax.random.normal(key, (count + count % 2,))
    fields, start = [], 0
    for (down, across), size in zip(splines, knots, strict=True):
        field = noise[start : start + math.prod(size)].reshape(size)
        start += math.prod(size)
        field = field if across is None else field @ across.T
        fields.append(field if down is None else down @ field)
    return fields


def _above(noise, cover, soft):
    """0..1: the highest `cover` of unit-variance noise, with an edge `soft` standard deviations wide."""
    if cover <= 0:
        return jnp.zeros_like(noise)
    return _smoothstep((noise - statistics.NormalDist().inv_cdf(1 - cover)) / soft + 0.5)


def _pose(key, line):
    u = jax.random.uniform(jax.random.fold_in(key, _POSE), (4,))
    pitch = line.pitch_px * _between(u[0], 1 - line.pitch_jitter, 1 + line.pitch_jitter)
    turn = jnp.deg2rad(_between(u[1], -line.rotation_jitter_deg, line.rotation_jitter_deg))
    traced = isinstance(line.angle_deg, jax.Array)
    aspect = jnp.tan(jnp.deg2rad(line.angle_deg)) if traced else math.tan(math.radians(line.angle_deg))
    cell = [[aspect / 2, -aspect / 2], [0.5, 0.5]] if line.pattern == "diamond" else [[0.0, aspect], [1.0, 0.0]]
    rotate = jnp.stack([jnp.cos(turn), jnp.sin(turn), -jnp.sin(turn), jnp.cos(turn)]).reshape(2, 2)
    cell = pitch * (rotate @ jnp.asarray(cell, jnp.float32))
    return _Pose(cell, cell @ u[2:])


def _inverse(cell):
    (a, b), (c, d) = cell
    return jnp.stack([d, -b, -c, a]).reshape(2, 2) / (a * d - b * c)


def _families(line):
    """The two lugs of a cell: centre and direction, both in units of the cell's vectors."""
    if line.pattern == "diamond":
        return ((0.5, 0.0), (1.0, 0.0)), ((0.0, 0.5), (0.0, 1.0))
    return ((0.0, 0.0), (1.0, 1.0)), ((0.5, 0.5), (1.0, -1.0))


def _lug(line, along, across):
    """Distance in px from a lug's outline, positive inside."""
    s = along / (line.lug_length_px / 2)
    half = line.lug_width_px / 2
    if line.pattern == "teardrop_t":
        return half * (1.0 - s * s) * (1.0 + 0.2 * s) - jnp.abs(across)
    taper = 0.35 if line.pattern == "teardrop_a" else 0.0
    side = half * (1.0 - taper * s * s) - jnp.abs(across)
    end = line.lug_length_px / 2 - jnp.abs(along)
    return jnp.minimum(side, end) - 0.5 * jnp.maximum(2.0 - jnp.abs(side - end), 0.0) ** 2 / 4


def _lugs(line, pose, y, x, ragged):
    """Heights 0..1 [2, h, w] and cell indices [2, 2, h, w] of the two families."""
    to_cell = _inverse(pose.cell)
    y, x = y - pose.origin[0], x - pose.origin[1]
    heights, cells = [], []
    for centre, direction in _families(line):
        u = to_cell[0, 0] * y + to_cell[0, 1] * x - centre[0]
        v = to_cell[1, 0] * y + to_cell[1, 1] * x - centre[1]
        i, j = jnp.round(u), jnp.round(v)
        du, dv = u - i, v - j
        dy = pose.cell[0, 0] * du + pose.cell[0, 1] * dv
        dx = pose.cell[1, 0] * du + pose.cell[1, 1] * dv
        way = pose.cell @ jnp.asarray(direction, jnp.float32)
        way = way / jnp.linalg.norm(way)
        inside = _lug(line, dy * way[0] + dx * way[1], dx * way[0] - dy * way[1])
        heights.append(_smoothstep((inside + ragged) / line.flank_px))
        cells.append(jnp.stack([i, j]).astype(jnp.int32))
    return jnp.stack(heights), jnp.stack(cells)


def _lot(cells, seed):
    """A number in [0, 1) for each lug, the same wherever the lug shows: a hash of family and cell index, [2, h, w]."""
    family = jnp.arange(2, dtype=jnp.uint32)[:, None, None]
    mixed = cells.astype(jnp.uint32) * jnp.array([0x9E3779B1, 0x85EBCA77], jnp.uint32)[None, :, None, None]
    mixed = mixed[:, 0] + mixed[:, 1] + family * jnp.uint32(0xC2B2AE3D) + seed
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
    return ((mixed ^ (mixed >> 15)) >> 8).astype(jnp.float32) / 2**24


def _scene(key, line, shape):
    margin = _margin(line)
    shape = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    pose = _pose(key, line)
    y = (jnp.arange(shape[0]) - margin).astype(jnp.float32)[:, None]
    x = (jnp.arange(shape[1]) - margin).astype(jnp.float32)[None, :]
    ragged, region, streaks, broad, rough, fine, stain, stain_edge, drift, noise = _fields(
        jax.random.fold_in(key, _FIELDS),
        shape,
        (4, 4),
        (70, 70),
        (line.grain_length_px, 1),
        (2.5 * line.grain_length_px, 3),
        (1.8, 1.8),
        (3, 2.5),
        (36, 26),
        (9, 6),
        (170, 170),
        (1, 1),
    )

    lugs, cells = _lugs(line, pose, y, x, 1.2 * line.wear * ragged)
    region = _smoothstep(0.5 + 0.4 * region)
    intact = 1.0 - line.wear * (0.55 * region[None] + 0.45 * _lot(cells, jax.random.key_data(key).ravel()[-1]))
    flakes = _above(fine, line.flakes, 0.5)
    texture = line.grain_height_px * streaks + line.roughness_px * rough + 0.5 * flakes

    stain = _above(0.85 * stain + 0.53 * stain_edge, line.blotch_cover, 0.9)
    reflectance = (1.0 + line.grain * (0.6 * streaks + 0.8 * broad)) * (1.0 - line.blotches * stain)
    exposure, azimuth, elevation = jax.random.uniform(jax.random.fold_in(key, _LIGHT), (3,), minval=-1.0)
    exposure = line.exposure * (1.0 + line.exposure_jitter * exposure)
    reflectance = reflectance * (1.0 - 0.35 * flakes) * jnp.exp(line.drift * drift) * exposure

    azimuth = jnp.deg2rad(line.light_azimuth_deg + line.light_spread_deg * azimuth)
    elevation = jnp.deg2rad(line.light_elevation_deg + line.light_spread_deg / 4 * elevation)
    flat = jnp.cos(elevation)
    light = jnp.stack([flat * jnp.sin(azimuth), flat * jnp.cos(azimuth), jnp.sin(elevation)])
    return _Scene(pose, y, x, lugs, cells, intact, texture, reflectance, light, noise)


def _photograph(scene, line, anomaly=None):
    """Light the plate (diffuse and Blinn-Phong) and take it through the lens: [h, w] without margin, before noise."""
    anomaly = _Anomaly(support=jnp.zeros(())) if anomaly is None else anomaly
    lugs = jnp.maximum(*(scene.lugs * scene.intact * anomaly.lugs))
    height = line.lug_height_px * lugs + scene.texture + anomaly.height
    top = _smoothstep((jnp.maximum(*(scene.lugs * anomaly.lugs)) - 0.5) * 2.0)

    slope_y = (height[2:, 1:-1] - height[:-2, 1:-1]) / 2.0
    slope_x = (height[1:-1, 2:] - height[1:-1, :-2]) / 2.0
    up = jax.lax.rsqrt(1.0 + slope_y**2 + slope_x**2)
    ly, lx, lz = scene.light
    diffuse = jnp.maximum((lz - slope_y * ly - slope_x * lx) * up, 0.0)
    half = jax.lax.rsqrt(2.0 + 2.0 * lz)
    mirror = (1.0 + lz - slope_y * ly - slope_x * lx) * up * half
    flat_mirror = jnp.exp(line.shininess * ((1.0 + lz) * half - 1.0))
    gleam = line.gloss * (jnp.exp(line.shininess * (mirror - 1.0)) - flat_mirror)
    lit = line.ambient * up + (1.0 - line.ambient) * diffuse / lz + gleam

    reflectance = scene.reflectance * (1.0 + line.polish * top) * anomaly.reflectance
    image = jnp.maximum(reflectance[1:-1, 1:-1] * lit, 0.0)
    image = _blur(image, line)
    inner = _crop_like(anomaly.shade, image), _crop_like(anomaly.veil, image)
    image = image * inner[0] * (1.0 - inner[1]) + line.exposure * inner[1]
    return image / jnp.sqrt(jnp.sqrt(1.0 + image**4))  # the sensor's shoulder: highlights bend, they do not clip


def _crop_like(value, image):
    return value if isinstance(value, float) else _crop(value, image.shape)


def _blur(image, line):
    radius = _blur_radius(line)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / line.blur_px) ** 2)
    taps = [float(t) for t in taps / taps.sum()]
    h, w = image.shape[0] - 2 * radius, image.shape[1] - 2 * radius
    image = sum(t * image[k : k + h] for k, t in enumerate(taps))
    return sum(t * image[:, k : k + w] for k, t in enumerate(taps))


def _camera(scene, image, line):
    return jnp.clip(image + line.noise * jnp.sqrt(image) * _crop(scene.noise, image.shape), 0.0, 1.0)


def _anomaly(key, kind, scene, line, shape):
    """Draw one anomaly of the kind; sizes follow the pitch, or the picture where that is small."""
    unit = max(16.0, min(line.pitch_px, min(shape) / 3))
    draw_key, field_key = jax.random.split(key)
    *at, turn, size, ratio, strength, extra, other = jax.random.uniform(draw_key, (8,))
    place = jnp.stack(at)
    full = scene.texture.shape

    if kind in _LUG_ANOMALIES:
        inner = max(0.0, min(shape) / 2 - _reach(line) - line.lug_length_px / 2)
        middle = jnp.asarray(shape, jnp.float32) / 2
        spread = jnp.maximum(middle - min(shape) / 2 + inner, 0.0)
        aim = middle + spread * _between(place, -1.0, 1.0)
        chosen = _nearest_lug(scene, line, aim)
        support = (chosen & (scene.lugs > 0) & (scene.lugs > scene.lugs[::-1])).any(0)
        left = 0.0 if kind == "missing_lug" else _between(strength, 0.2, 0.65)
        return _Anomaly(support, lugs=jnp.where(chosen, left, 1.0))

    cy, cx = jnp.asarray(shape, jnp.float32) * _between(place, 0.25, 0.75)
    dy, dx = scene.y - cy, scene.x - cx
    # Marks of the process run with the strip, more or less; a dent or a spot may point anywhere.
    tilt = {"scratch": 0.6, "smear": 0.3}.get(kind, math.pi)
    angle = _between(turn, -tilt, tilt)
    along, across = dy * jnp.cos(angle) + dx * jnp.sin(angle), dx * jnp.cos(angle) - dy * jnp.sin(angle)

    if kind == "dent":
        radius = unit * _between(size, 0.1, 0.28)
        r2 = (along**2 + (across / _between(ratio, 0.6, 1.0)) ** 2) / radius**2
        depth = radius * _log_between(strength, 0.12, 0.5)
        return _Anomaly(r2 < 1.0, height=-depth * jnp.maximum(1.0 - r2, 0.0) ** 1.5)

    if kind == "scratch":
        length = unit * _between(size, 0.5, 1.6)
        bend = _between(other, -0.3, 0.3) / length
        s = along / (length / 2)
        width = _between(ratio, 1.0, 2.2) * jnp.sqrt(jnp.maximum(1.0 - s * s, 0.35))
        inside = jnp.where(jnp.abs(s) < 1.0, 1.0 - ((across + bend * along**2) / width) ** 2, 0.0)
        cut = jnp.maximum(inside, 0.0)
        depth, bare = _log_between(strength, 0.25, 1.6), _log_between(extra, 0.1, 0.7)
        return _Anomaly(inside > 0.0, height=-depth * cut, reflectance=1.0 + bare * jnp.sqrt(cut))

    if kind == "spot":
        radius = unit * _between(size, 0.06, 0.25)
        wobble = jnp.clip(_fields(field_key, full, (5, 5))[0], -1.5, 1.5)
        inside = radius * (1.0 + 0.2 * wobble) - jnp.sqrt(along**2 + (across / _between(ratio, 0.6, 1.0)) ** 2)
        cover = _smoothstep(inside / 2.0 + 0.5)
        change = _log_between(strength, 0.12, 0.7) * jnp.where(other < 0.75, -1.0, 0.6)
        return _Anomaly(cover > 0.2, reflectance=1.0 + change * cover)

    if kind == "smear":
        length, width = unit * _between(size, 0.5, 1.5), unit * _between(ratio, 0.12, 0.35)
        streaks = jnp.clip(_fields(field_key, full, (14, 2.5))[0], -1.5, 1.5)
        inside = 1.0 + 0.15 * streaks - jnp.sqrt((along / (length / 2)) ** 2 + (across / (width / 2)) ** 2)
        cover = _smoothstep(inside / 0.25) * (0.75 + 0.16 * streaks)
        change = _log_between(strength, 0.12, 0.55) * jnp.where(other < 0.7, -1.0, 0.7)
        return _Anomaly(inside > 0.04, reflectance=1.0 + change * cover)

    radius = unit * _between(size, 0.2, 0.55)
    wobble = jnp.clip(_fields(field_key, full, (12, 12))[0], -1.5, 1.5)
    inside = radius * (1.0 + 0.08 * wobble) - jnp.sqrt(along**2 + (across / _between(ratio, 0.75, 1.0)) ** 2)
    cover = _smoothstep(inside / 2.5)
    rim = cover * jnp.exp(-0.5 * ((inside - 2.5) / 1.5) ** 2)
    force = _log_between(strength, 0.2, 0.6)
    return _Anomaly(inside > 0.4, veil=0.7 * force * cover, shade=1.0 - force * jnp.maximum(rim, 0.4 * cover))


def _nearest_lug(scene, line, aim):
    """Bool [2, h, w]: the cell of the lug whose centre is nearest to the point `aim` (y, x)."""
    at = _inverse(scene.pose.cell) @ (aim - scene.pose.origin)
    centres = jnp.asarray([centre for centre, _ in _families(line)], jnp.float32)
    index = jnp.round(at[None] - centres)
    away = (index + centres - at[None]) @ scene.pose.cell.T
    family = jnp.argmin((away**2).sum(1))
    same = (scene.cells == index.astype(jnp.int32)[:, :, None, None]).all(1)
    return same & (jnp.arange(2) == family)[:, None, None]

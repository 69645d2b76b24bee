"""The picture of a plate: lattice and lugs, surface, light and lens.

A plate is a height field. It is lit by a light that moves between pictures, and seen from above by a line-scan camera.
The strip runs along axis 0, so rolling grain runs down the picture. A lug is found by folding a pixel's position into
the unit cell: the cost of a picture does not depend on how many lugs it shows.
"""

import functools
import math
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

POSE, FIELDS, LIGHT, ANOMALY = range(4)  # streams of a picture's key; anomaly kinds count on from the last


class Pose(NamedTuple):
    """The lattice: `cell` [2, 2] has primitive vectors (y, x) as columns; `origin` [2] is a cell's corner."""

    cell: jax.Array
    origin: jax.Array


class Scene(NamedTuple):
    """A plate and its light, with a margin for gradient and blur. Arrays are [h, w] unless said otherwise."""

    pose: Pose
    y: jax.Array  # [h, 1]
    x: jax.Array  # [1, w]
    lugs: jax.Array  # [2, h, w], 0..1: height of the two lug families before wear
    cells: jax.Array  # int32 [2, 2, h, w]: family, cell index
    intact: jax.Array  # [2, h, w]: what wear left of the height
    texture: jax.Array  # height of grain and roughness, px
    reflectance: jax.Array  # times illumination and exposure
    light: jax.Array  # [3]: y, x, z
    noise: jax.Array  # the camera's, of unit variance


class Anomaly(NamedTuple):
    """What an anomaly does to a scene. Every part is neutral outside `support`."""

    support: jax.Array  # bool [h, w]
    lugs: jax.Array | float = 1.0  # factor, [2, h, w]
    height: jax.Array | float = 0.0  # px, added
    reflectance: jax.Array | float = 1.0  # factor
    veil: jax.Array | float = 0.0  # 0..1: share of stray light that the lens adds
    shade: jax.Array | float = 1.0  # factor in front of the lens


def pose(key, line):
    """The lattice of the plate of `key`."""
    u = jax.random.uniform(jax.random.fold_in(key, POSE), (4,))
    pitch = line.pitch_px * between(u[0], 1 - line.pitch_jitter, 1 + line.pitch_jitter)
    turn = jnp.deg2rad(between(u[1], -line.rotation_jitter_deg, line.rotation_jitter_deg))
    traced = isinstance(line.angle_deg, jax.Array)
    aspect = jnp.tan(jnp.deg2rad(line.angle_deg)) if traced else math.tan(math.radians(line.angle_deg))
    cell = [[aspect / 2, -aspect / 2], [0.5, 0.5]] if line.pattern == "diamond" else [[0.0, aspect], [1.0, 0.0]]
    rotate = jnp.stack([jnp.cos(turn), jnp.sin(turn), -jnp.sin(turn), jnp.cos(turn)]).reshape(2, 2)
    cell = pitch * (rotate @ jnp.asarray(cell, jnp.float32))
    return Pose(cell, cell @ u[2:])


def inverse(cell):
    """Inverse of a matrix [2, 2]."""
    (a, b), (c, d) = cell
    return jnp.stack([d, -b, -c, a]).reshape(2, 2) / (a * d - b * c)


def families(line):
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
    to_cell = inverse(pose.cell)
    y, x = y - pose.origin[0], x - pose.origin[1]
    heights, cells = [], []
    for centre, direction in families(line):
        u = to_cell[0, 0] * y + to_cell[0, 1] * x - centre[0]
        v = to_cell[1, 0] * y + to_cell[1, 1] * x - centre[1]
        i, j = jnp.round(u), jnp.round(v)
        du, dv = u - i, v - j
        dy = pose.cell[0, 0] * du + pose.cell[0, 1] * dv
        dx = pose.cell[1, 0] * du + pose.cell[1, 1] * dv
        way = pose.cell @ jnp.asarray(direction, jnp.float32)
        way = way / jnp.linalg.norm(way)
        inside = _lug(line, dy * way[0] + dx * way[1], dx * way[0] - dy * way[1])
        heights.append(smoothstep((inside + ragged) / line.flank_px))
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


def scene(key, line, shape):
    """The plate of `key`, with its light and its margin around `shape`."""
    margin = _margin(line)
    shape = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    lattice = pose(key, line)
    y = (jnp.arange(shape[0]) - margin).astype(jnp.float32)[:, None]
    x = (jnp.arange(shape[1]) - margin).astype(jnp.float32)[None, :]
    ragged, region, streaks, broad, rough, fine, stain, stain_edge, drift, noise = fields(
        jax.random.fold_in(key, FIELDS),
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

    lugs, cells = _lugs(line, lattice, y, x, 1.2 * line.wear * ragged)
    region = smoothstep(0.5 + 0.4 * region)
    intact = 1.0 - line.wear * (0.55 * region[None] + 0.45 * _lot(cells, jax.random.key_data(key).ravel()[-1]))
    flakes = _above(fine, line.flakes, 0.5)
    texture = line.grain_height_px * streaks + line.roughness_px * rough + 0.5 * flakes

    stain = _above(0.85 * stain + 0.53 * stain_edge, line.blotch_cover, 0.9)
    reflectance = (1.0 + line.grain * (0.6 * streaks + 0.8 * broad)) * (1.0 - line.blotches * stain)
    exposure, azimuth, elevation = jax.random.uniform(jax.random.fold_in(key, LIGHT), (3,), minval=-1.0)
    exposure = line.exposure * (1.0 + line.exposure_jitter * exposure)
    reflectance = reflectance * (1.0 - 0.35 * flakes) * jnp.exp(line.drift * drift) * exposure

    azimuth = jnp.deg2rad(line.light_azimuth_deg + line.light_spread_deg * azimuth)
    elevation = jnp.deg2rad(line.light_elevation_deg + line.light_spread_deg / 4 * elevation)
    flat = jnp.cos(elevation)
    light = jnp.stack([flat * jnp.sin(azimuth), flat * jnp.cos(azimuth), jnp.sin(elevation)])
    return Scene(lattice, y, x, lugs, cells, intact, texture, reflectance, light, noise)


def photograph(scene, line, anomaly=None):
    """The plate as lit (diffuse and Blinn-Phong) and seen through the lens: [h, w] without margin, before noise."""
    anomaly = Anomaly(support=jnp.zeros(())) if anomaly is None else anomaly
    lugs = jnp.maximum(*(scene.lugs * scene.intact * anomaly.lugs))
    height = line.lug_height_px * lugs + scene.texture + anomaly.height
    top = smoothstep((jnp.maximum(*(scene.lugs * anomaly.lugs)) - 0.5) * 2.0)

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
    return value if isinstance(value, float) else crop(value, image.shape)


def _blur(image, line):
    radius = _blur_radius(line)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / line.blur_px) ** 2)
    taps = [float(t) for t in taps / taps.sum()]
    h, w = image.shape[0] - 2 * radius, image.shape[1] - 2 * radius
    image = sum(t * image[k : k + h] for k, t in enumerate(taps))
    return sum(t * image[:, k : k + w] for k, t in enumerate(taps))


def camera(scene, image, line):
    """Adds the camera's noise, which grows with the root of the brightness."""
    return jnp.clip(image + line.noise * jnp.sqrt(image) * crop(scene.noise, image.shape), 0.0, 1.0)


def _margin(line):
    return 1 + _blur_radius(line)


def _blur_radius(line):
    return math.ceil(2.5 * line.blur_px)


def crop(image, shape):
    """The middle of an image."""
    top, left = (image.shape[0] - shape[0]) // 2, (image.shape[1] - shape[1]) // 2
    return image[top : top + shape[0], left : left + shape[1]]


def between(u, low, high):
    """From a number in [0, 1], one in the range."""
    return low + (high - low) * u


def smoothstep(x):
    """0 below 0, 1 above 1, and smooth between."""
    x = jnp.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


@functools.cache
def _spline(size, cell):
    """Cubic B-spline weights [size, knots], rows of norm 1: white knots give unit variance everywhere."""
    at = np.arange(size)[:, None] / cell - (np.arange(math.ceil(size / cell) + 3)[None, :] - 1.5)
    d = np.abs(at)
    weights = np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0))
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def fields(key, shape, *cells):
    """Smooth noise fields [h, w] of unit variance, one a cell: its (y, x) is the field's grain in px, 1 is white.

    All come from one draw, because compiling many draws takes longer than the rest of the renderer.
    """
    splines = [[None if c <= 1 else _spline(n, float(c)) for n, c in zip(shape, cell, strict=True)] for cell in cells]
    knots = [[n if w is None else w.shape[1] for n, w in zip(shape, pair, strict=True)] for pair in splines]
    count = sum(map(math.prod, knots))
    # The same numbers; XLA takes four times as long on CPU for an odd count.
    noise = jax.random.normal(key, (count + count % 2,))
    found, start = [], 0
    for (down, across), size in zip(splines, knots, strict=True):
        field = noise[start : start + math.prod(size)].reshape(size)
        start += math.prod(size)
        field = field if across is None else field @ across.T
        found.append(field if down is None else down @ field)
    return found


def _above(noise, cover, soft):
    """0..1: the highest `cover` of unit-variance noise, with an edge `soft` standard deviations wide."""
    if cover <= 0:
        return jnp.zeros_like(noise)
    return smoothstep((noise - statistics.NormalDist().inv_cdf(1 - cover)) / soft + 0.5)


def reach(line):
    """How far, at most, any point is from the nearest lug's centre, in px: the circumradius of neighbours."""
    across, along = line.pitch_px, line.pitch_px * math.tan(math.radians(line.angle_deg))
    diagonal = math.hypot(across, along)
    radius = diagonal / 4 if line.pattern == "diamond" else diagonal**2 / (4 * max(across, along))
    return (1 + line.pitch_jitter) * radius

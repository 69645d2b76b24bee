"""Anomalies of plates: one drawn on a scene, with its support."""

import math

import jax
import jax.numpy as jnp

from steel_ad.data.plates.scene import Anomaly, between, families, fields, inverse, reach, smoothstep

LUG_ANOMALIES = ("missing_lug", "worn_lug")


def anomaly(key, kind, scene, line, shape):
    """One anomaly of the kind; sizes follow the pitch, or the picture where that is small."""
    unit = max(16.0, min(line.pitch_px, min(shape) / 3))
    draw_key, field_key = jax.random.split(key)
    *at, turn, size, ratio, strength, extra, other = jax.random.uniform(draw_key, (8,))
    place = jnp.stack(at)
    full = scene.texture.shape

    if kind in LUG_ANOMALIES:
        inner = max(0.0, min(shape) / 2 - reach(line) - line.lug_length_px / 2)
        middle = jnp.asarray(shape, jnp.float32) / 2
        spread = jnp.maximum(middle - min(shape) / 2 + inner, 0.0)
        aim = middle + spread * between(place, -1.0, 1.0)
        chosen = _nearest_lug(scene, line, aim)
        support = (chosen & (scene.lugs > 0) & (scene.lugs > scene.lugs[::-1])).any(0)
        left = 0.0 if kind == "missing_lug" else between(strength, 0.2, 0.65)
        return Anomaly(support, lugs=jnp.where(chosen, left, 1.0))

    cy, cx = jnp.asarray(shape, jnp.float32) * between(place, 0.25, 0.75)
    dy, dx = scene.y - cy, scene.x - cx
    # Marks of the process run with the strip, more or less; a dent or a spot may point anywhere.
    tilt = {"scratch": 0.6, "smear": 0.3}.get(kind, math.pi)
    angle = between(turn, -tilt, tilt)
    along, across = dy * jnp.cos(angle) + dx * jnp.sin(angle), dx * jnp.cos(angle) - dy * jnp.sin(angle)

    if kind == "dent":
        radius = unit * between(size, 0.1, 0.28)
        r2 = (along**2 + (across / between(ratio, 0.6, 1.0)) ** 2) / radius**2
        depth = radius * _log_between(strength, 0.12, 0.5)
        return Anomaly(r2 < 1.0, height=-depth * jnp.maximum(1.0 - r2, 0.0) ** 1.5)

    if kind == "scratch":
        length = unit * between(size, 0.5, 1.6)
        bend = between(other, -0.3, 0.3) / length
        s = along / (length / 2)
        width = between(ratio, 1.0, 2.2) * jnp.sqrt(jnp.maximum(1.0 - s * s, 0.35))
        inside = jnp.where(jnp.abs(s) < 1.0, 1.0 - ((across + bend * along**2) / width) ** 2, 0.0)
        cut = jnp.maximum(inside, 0.0)
        depth, bare = _log_between(strength, 0.25, 1.6), _log_between(extra, 0.1, 0.7)
        return Anomaly(inside > 0.0, height=-depth * cut, reflectance=1.0 + bare * jnp.sqrt(cut))

    if kind == "spot":
        radius = unit * between(size, 0.06, 0.25)
        wobble = jnp.clip(fields(field_key, full, (5, 5))[0], -1.5, 1.5)
        inside = radius * (1.0 + 0.2 * wobble) - jnp.sqrt(along**2 + (across / between(ratio, 0.6, 1.0)) ** 2)
        cover = smoothstep(inside / 2.0 + 0.5)
        change = _log_between(strength, 0.12, 0.7) * jnp.where(other < 0.75, -1.0, 0.6)
        return Anomaly(cover > 0.2, reflectance=1.0 + change * cover)

    if kind == "smear":
        length, width = unit * between(size, 0.5, 1.5), unit * between(ratio, 0.12, 0.35)
        streaks = jnp.clip(fields(field_key, full, (14, 2.5))[0], -1.5, 1.5)
        inside = 1.0 + 0.15 * streaks - jnp.sqrt((along / (length / 2)) ** 2 + (across / (width / 2)) ** 2)
        cover = smoothstep(inside / 0.25) * (0.75 + 0.16 * streaks)
        change = _log_between(strength, 0.12, 0.55) * jnp.where(other < 0.7, -1.0, 0.7)
        return Anomaly(inside > 0.04, reflectance=1.0 + change * cover)

    radius = unit * between(size, 0.2, 0.55)
    wobble = jnp.clip(fields(field_key, full, (12, 12))[0], -1.5, 1.5)
    inside = radius * (1.0 + 0.08 * wobble) - jnp.sqrt(along**2 + (across / between(ratio, 0.75, 1.0)) ** 2)
    cover = smoothstep(inside / 2.5)
    rim = cover * jnp.exp(-0.5 * ((inside - 2.5) / 1.5) ** 2)
    force = _log_between(strength, 0.2, 0.6)
    return Anomaly(inside > 0.4, veil=0.7 * force * cover, shade=1.0 - force * jnp.maximum(rim, 0.4 * cover))


def _nearest_lug(scene, line, aim):
    """Bool [2, h, w]: the cell of the lug whose centre is nearest to the point `aim` (y, x)."""
    at = inverse(scene.pose.cell) @ (aim - scene.pose.origin)
    centres = jnp.asarray([centre for centre, _ in families(line)], jnp.float32)
    index = jnp.round(at[None] - centres)
    away = (index + centres - at[None]) @ scene.pose.cell.T
    family = jnp.argmin((away**2).sum(1))
    same = (scene.cells == index.astype(jnp.int32)[:, :, None, None]).all(1)
    return same & (jnp.arange(2) == family)[:, None, None]


def _log_between(u, low, high):
    return low * (high / low) ** u

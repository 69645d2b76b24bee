"""The one way from pixels to maps and scores, against scipy's opening of a map by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from steel_ad.detectors import Detector, opened
from steel_ad.ops.morphology import disk

RADIUS = 2


class Grey(Detector):
    """Two maps: the distance from the state's grey level, and its square."""

    name = "distance"

    def fit(self, images):
        return jnp.float32(0.3)

    def residual(self, state, image):
        return jnp.abs(image - state)

    def maps(self, state, image):
        distance = self.residual(state, image)
        return {"distance": distance, "square": distance * distance}


def maps_of(state, pixels):
    return opened.open_maps(Grey(), state, pixels, radius=RADIUS)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_maps_scores_and_openings_are_the_parts():
    pixels = images(20, 24)
    maps = jax.jit(maps_of)(jnp.float32(0.3), pixels)
    distance = np.abs(pixels / 255 - 0.3)
    assert list(maps) == ["distance", "square"]
    for raw, found in zip((distance, distance**2), maps.values(), strict=True):
        assert {a.dtype for a in found} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(found.raw, raw, atol=1e-6)
        np.testing.assert_allclose(found.opened, ndimage.grey_opening(raw, footprint=disk(RADIUS)), atol=1e-6)
        assert found.score == np.asarray(found.opened).max()


def test_images_of_many_shapes_are_the_images_one_by_one():
    """Five of one shape, so that a batch is not full, with one of another shape among them."""
    several = [*images(3, 20, 24), images(31, 9), *images(2, 20, 24)]
    found = opened.Program(maps_of)(jnp.float32(0.3), several, label="maps")
    for pixels, maps in zip(several, found, strict=True):
        expected = maps_of(jnp.float32(0.3), jnp.asarray(pixels))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), maps, expected)


def test_what_is_kept_of_an_image_is_what_is_asked_for():
    several = list(images(3, 20, 24))
    scores = opened.Program(maps_of)(jnp.float32(0.3), several, label="maps", keep=lambda m: float(m["square"].score))
    expected = [float(maps_of(jnp.float32(0.3), jnp.asarray(pixels))["square"].score) for pixels in several]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)

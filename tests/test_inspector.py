"""The inspection program against its parts in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad import metrics
from steel_ad.detectors.inspector import inspector
from steel_ad.ops.morphology import grey_opening

RADIUS = 2


class Contrast:
    """A detector without training: distance from the state's grey level."""

    def residual(self, state, image):
        return 2 * jnp.abs(image - state)


@pytest.fixture(scope="module")
def found():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    return images, inspector(Contrast(), radius=RADIUS)(jnp.float32(0.3), images)


def test_maps_and_scores_are_the_parts_rounded(found):
    images, inspected = found
    raw = 2 * np.abs(images.astype(np.float32) / 255 - np.float32(0.3))
    assert {a.dtype for a in inspected} == {jnp.dtype(jnp.float16)}
    np.testing.assert_allclose(inspected.raw, raw, rtol=2**-10, atol=1e-6)
    # Rounding and opening commute: the opening of what is handed out, to the bit.
    expected = jax.vmap(lambda m: grey_opening(m, radius=RADIUS))(inspected.raw)
    np.testing.assert_array_equal(inspected.opened, expected)
    np.testing.assert_array_equal(inspected.score, np.asarray(inspected.opened).max((1, 2)))


def test_float16_moves_exact_metrics_by_less_than_a_thousandth():
    rng = np.random.default_rng(1)
    masks = np.zeros((8, 64, 64), bool)
    masks[::2, 10:30, 20:35] = masks[2, 40:60, 40:44] = True
    raw = np.abs(rng.normal(0.5 * masks, 0.3)).astype(np.float32)
    full, half = metrics.rank(raw, masks), metrics.rank(raw.astype(np.float16), masks)
    for metric in (metrics.pixel_auroc, metrics.aupro, metrics.average_precision):
        assert metric(half) == pytest.approx(metric(full), abs=1e-3)


def test_a_batch_is_its_images_one_by_one(found):
    images, inspected = found
    alone = inspector(Contrast(), radius=RADIUS)(jnp.float32(0.3), images[1:2])
    for whole, one in zip(inspected, alone, strict=True):
        np.testing.assert_array_equal(whole[1:2], one)

"""Patches drawn on the device."""

import jax
import numpy as np
import pytest

from steel_ad.data import patches
from steel_ad.errors import InputError


@pytest.fixture
def plates():
    rng = np.random.default_rng(0)
    return patches.stack([rng.integers(1, 256, shape, dtype=np.uint8) for shape in [(20, 30), (40, 16), (16, 16)]])


def test_crops_are_slices_of_the_images(plates):
    crops = patches.random_crops(jax.random.key(0), plates.sizes, num=400, patch_size=16)
    cut = np.asarray(patches.cut(plates, crops, patch_size=16))
    assert cut.shape == (400, 16, 16, 1)
    assert cut.dtype == np.float32
    for k in range(0, 400, 37):
        i, top, left = (int(a[k]) for a in crops)
        h, w = plates.sizes[i]
        image = plates.pixels[plates.offsets[i] :][: h * w].reshape(h, w)
        expected = image[top : top + 16, left : left + 16] / np.float32(255)
        np.testing.assert_allclose(cut[k, ..., 0], expected, rtol=1e-6)


def test_crops_reach_every_image_and_every_border(plates):
    image, top, left = map(np.asarray, patches.random_crops(jax.random.key(1), plates.sizes, num=2000, patch_size=16))
    for i, (h, w) in enumerate([(20, 30), (40, 16), (16, 16)]):
        assert set(top[image == i]) == set(range(h - 15))
        assert set(left[image == i]) == set(range(w - 15))
        assert abs((image == i).mean() - 1 / 3) < 0.05


def test_flips_are_independent_in_both_directions():
    patch = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1).repeat(400, 0)
    flipped = np.asarray(patches.random_flips(jax.random.key(0), patch))[..., 0]
    views = {
        v.tobytes(): 0 for v in (patch[0, ..., 0], patch[0, ::-1, :, 0], patch[0, :, ::-1, 0], patch[0, ::-1, ::-1, 0])
    }
    for f in flipped:
        views[f.tobytes()] += 1
    assert len(views) == 4
    assert min(views.values()) > 60


def test_stack_refuses():
    with pytest.raises(ValueError, match="uint8"):
        patches.stack([np.zeros((4, 4), np.float32)])
    with pytest.raises(ValueError, match="at least one"):
        patches.stack([])
    large = np.broadcast_to(np.uint8(0), (2**16, 2**15))  # as an array it would take 2 GiB
    with pytest.raises(InputError, match=r"2\.1 gigapixels"):
        patches.stack([large])


def test_the_middles_of_images_have_the_smallest_ones_size():
    sizes = [(6, 9), (8, 5), (10, 7)]
    images = [np.arange(h * w, dtype=np.uint8).reshape(h, w) for h, w in sizes]
    found = [np.round(255 * np.asarray(m)).astype(int) for m in patches.common_size(images, 9)]
    expected = [images[0][:, 2:7], images[1][1:7], images[2][2:8, 1:6]]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)

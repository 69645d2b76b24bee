"""Windows and openings against plain numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import ndimage
from skimage.morphology import disk as skimage_disk

from steel_ad.ops import morphology, sliding

CASES = [
    (256, 256, 128, 32),
    (256, 256, 128, 128),
    (100, 77, 32, 20),
    (64, 64, 64, 64),
    (40, 33, 32, 1),
    (130, 129, 32, 32),
]


@pytest.mark.parametrize(("h", "w", "size", "stride"), CASES)
def test_windows_are_the_slices_and_average_inverts(h, w, size, stride):
    image = np.random.default_rng(0).random((h, w)).astype(np.float32)
    tiles = sliding.windows(image, size=size, stride=stride)
    places = [(i, j) for i in sliding.positions(h, size, stride) for j in sliding.positions(w, size, stride)]
    assert tiles.shape == (len(places), size, size)
    for tile, (i, j) in zip(tiles, places, strict=True):
        np.testing.assert_array_equal(tile, image[i : i + size, j : j + size])
    np.testing.assert_allclose(sliding.average(tiles, shape=(h, w), stride=stride), image, atol=1e-6)


def test_the_thesis_count():
    assert sliding.positions(256, 128, 32) == [0, 32, 64, 96, 128]


def test_average_weighs_all_windows_alike():
    rng = np.random.default_rng(1)
    h, w, size, stride = 50, 45, 16, 7
    places = [(i, j) for i in sliding.positions(h, size, stride) for j in sliding.positions(w, size, stride)]
    tiles = rng.random((len(places), size, size)).astype(np.float32)
    total, count = np.zeros((h, w)), np.zeros((h, w))
    for tile, (i, j) in zip(tiles, places, strict=True):
        total[i : i + size, j : j + size] += tile
        count[i : i + size, j : j + size] += 1
    np.testing.assert_allclose(sliding.average(tiles, shape=(h, w), stride=stride), total / count, atol=1e-6)


@pytest.mark.parametrize(("h", "w", "at_once"), [(30, 50, 100), (30, 50, 13), (50, 29, 11), (31, 47, 3), (8, 8, 1)])
def test_windows_through_a_function_few_at_a_time(h, w, at_once):
    """Several rows a step with one left over, one row in several calls, and everything in one call."""
    image = np.random.default_rng(2).random((h, w)).astype(np.float32)
    seen = []

    def function(tiles):
        seen.append(len(tiles))
        return tiles**2 + tiles.max((1, 2), keepdims=True)

    found = sliding.through(function, image, size=8, stride=5, at_once=at_once)
    assert max(seen) <= at_once
    whole = sliding.average(function(sliding.windows(image, size=8, stride=5)), shape=(h, w), stride=5)
    np.testing.assert_allclose(found, whole, atol=1e-5)


def convolutions(seen):
    """Two of 4x4 pixels and stride 2 with a bias and a ReLU each, as `sliding.heads` takes them; `seen` gets pixels a call."""
    rng = np.random.default_rng(3)
    kernels = [jnp.asarray(rng.standard_normal(shape), jnp.float32) / 8 for shape in ((4, 4, 1, 3), (4, 4, 3, 5))]

    def head(x):
        seen.append(x.size)
        x = x[..., None]
        for kernel in kernels:
            padding, names = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
            x = jax.nn.leaky_relu(lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=names) + 0.3)
        return x

    return head


@pytest.mark.parametrize(
    ("h", "w", "size", "stride", "share"),
    [
        (128, 160, 64, 16, 0.55),
        (64, 128, 64, 16, 0.85),
        (48, 80, 16, 4, 1.9),  # so small that it does not pay
        (128, 130, 64, 16, 1),  # not in steps of 4 pixels: each window by itself
        (136, 128, 64, 24, 0.85),
        (128, 128, 64, 18, 1),
        (128, 128, 64, 64, 1),
        (340, 64, 64, 16, 0.65),  # in bands
    ],
)
def test_overlapping_windows_share_what_they_have_in_common(h, w, size, stride, share):
    image = jnp.asarray(np.random.default_rng(4).random((h, w)), jnp.float32)
    seen = []
    head = convolutions(seen)
    found = sliding.heads(head, image, size=size, stride=stride)
    pixels = sum(seen)
    tiles = sliding.windows(image, size=size, stride=stride)
    np.testing.assert_allclose(found, head(tiles), atol=1e-5)
    assert pixels <= share * tiles.size
    assert pixels == tiles.size or share != 1


@pytest.mark.parametrize(
    ("h", "w", "stride", "at_once"), [(80, 96, 8, 100), (96, 80, 8, 25), (80, 64, 8, 3), (80, 62, 5, 7)]
)
def test_a_shared_head_changes_nothing_few_windows_at_a_time(h, w, stride, at_once):
    image = jnp.asarray(np.random.default_rng(5).random((h, w)), jnp.float32)
    head = convolutions([])

    def function(x):  # [n, 8, 8, 5] -> [n, 32, 32]
        return jnp.repeat(jnp.repeat(x[..., 0] * x[..., 3] - x[..., 4], 4, 1), 4, 2)

    found = sliding.through(function, image, size=32, stride=stride, at_once=at_once, head=head)
    whole = function(head(sliding.windows(image, size=32, stride=stride)))
    np.testing.assert_allclose(found, sliding.average(whole, shape=(h, w), stride=stride), atol=1e-4)


def test_sliding_refuses():
    image = jnp.zeros((20, 30))
    for size, stride in [(21, 1), (8, 9), (8, 0)]:
        with pytest.raises(ValueError, match="window"):
            sliding.windows(image, size=size, stride=stride)
    with pytest.raises(ValueError, match="windows of"):
        sliding.average(jnp.zeros((3, 8, 8)), shape=(20, 30), stride=8)
    with pytest.raises(ValueError, match="at least one window"):
        sliding.through(lambda tiles: tiles, image, size=8, stride=8, at_once=0)


def scipy_opening(image, footprint, low, high):
    eroded = ndimage.grey_erosion(image, footprint=footprint, mode="constant", cval=high)
    return ndimage.grey_dilation(eroded, footprint=footprint, mode="constant", cval=low)


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 6, 8])
def test_opening_equals_scipy(radius):
    image = np.random.default_rng(2).random((40, 33)).astype(np.float32)
    np.testing.assert_array_equal(morphology.disk(radius), skimage_disk(radius).astype(bool))
    expected = scipy_opening(image, skimage_disk(radius), -np.inf, np.inf)
    np.testing.assert_array_equal(morphology.grey_opening(image, radius=radius), expected)


def test_opening_of_integers():
    image = np.random.default_rng(2).integers(0, 255, (30, 30)).astype(np.uint8)
    np.testing.assert_array_equal(
        morphology.grey_opening(image, radius=2), scipy_opening(image.astype(int), skimage_disk(2), 0, 255)
    )


@pytest.mark.parametrize("radius", [1, 4])
def test_opening_commutes_with_thresholding(radius):
    image = ndimage.gaussian_filter(np.random.default_rng(3).random((60, 50)), 2).astype(np.float32)
    opened = morphology.grey_opening(image, radius=radius)
    disk = skimage_disk(radius)
    for t in np.percentile(image, [5, 40, 70, 95]).astype(np.float32):
        # Pixels outside of the image take no part: they neither end an erosion nor begin a dilation.
        eroded = ndimage.binary_erosion(image > t, disk, border_value=1)
        np.testing.assert_array_equal(opened > t, ndimage.binary_dilation(eroded, disk))


def test_opening_is_idempotent_and_below():
    image = np.random.default_rng(4).random((40, 40)).astype(np.float32)
    opened = morphology.grey_opening(image, radius=3)
    assert (opened <= image).all()
    np.testing.assert_array_equal(morphology.grey_opening(opened, radius=3), opened)


def test_a_defect_at_the_border_survives():
    residual = jnp.zeros((40, 40)).at[:12, :12].set(1.0)
    assert morphology.grey_opening(residual, radius=4)[0, 0] == 1


def test_opening_refuses():
    with pytest.raises(ValueError, match="opening"):
        morphology.grey_opening(jnp.zeros((2, 4, 4)), radius=1)
    with pytest.raises(ValueError, match="opening"):
        morphology.grey_opening(jnp.zeros((4, 4)), radius=-1)


def test_gradients_pass():
    image = jnp.asarray(np.random.default_rng(5).random((20, 20)).astype(np.float32))
    total = jax.grad(lambda x: morphology.grey_opening(x, radius=2).sum())(image).sum()
    assert float(total) == pytest.approx(400, rel=1e-5)  # each output pixel is one input pixel
    tiles = sliding.windows(image, size=8, stride=4)
    gradient = jax.grad(lambda t: sliding.average(t, shape=(20, 20), stride=4).sum())(tiles)
    assert float(gradient.sum()) == pytest.approx(400, rel=1e-5)

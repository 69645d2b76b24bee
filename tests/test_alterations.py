"""Alterations of a line's own good plates, and changes of light: properties, with independent oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from steel_ad.data import defects, light
from steel_ad.data.defects import line
from steel_ad.ops.filters import gaussian_mean

B, P = 16, 96


@pytest.fixture(scope="module")
def plates():
    """A wavy pattern at different phases with grain, float32 [B, P, P]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:P, :P]
    waves = [np.sin((y + a) / 2.5) * np.sin((x + b) / 4) for a, b in rng.uniform(0, 20, (B, 2))]
    return jnp.asarray(0.5 + 0.1 * np.array(waves) + 0.01 * rng.standard_normal((B, P, P)), jnp.float32)


@pytest.fixture(scope="module")
def altered(plates):
    """Many plates with one spot each: (images, masks), numpy."""
    alter = jax.jit(lambda key: defects.alter(key, plates, jnp.roll(plates, 1, 0)))
    found = [alter(jax.random.key(i)) for i in range(12)]
    assert alter._cache_size() == 1
    return tuple(np.stack(parts) for parts in zip(*found, strict=True))


def test_labels_lie_where_the_picture_changed(plates, altered):
    images, masks = altered
    assert images.dtype == np.float32
    assert masks.dtype == bool
    assert images.min() >= 0
    assert images.max() <= 1
    change = np.abs(images - np.asarray(plates))
    assert change[masks].min() > 0
    # A plate with no label is untouched, to the bit.
    clean = ~masks.any(axis=(2, 3))
    assert 0.02 < clean.mean() < 0.6
    assert change[clean].max() == 0
    # Away from a label only the soft edges of its spot changed, and weakly.
    least = line._VISIBLE * np.sqrt(np.square(plates - gaussian_mean(plates, line._SMOOTHED_PX)).mean((1, 2)))
    near = ndimage.gaussian_filter(change, (0, 0, 4, 4)) > 0.3 * least[:, None, None]
    assert (masks & ~near).mean() < 0.02 * masks.mean()
    assert change[masks].mean() > 10 * change[~masks].mean()


def test_spots_have_the_sizes_that_are_promised(altered):
    lengths, widths = [], []
    for mask in altered[1].reshape(-1, P, P):
        if mask.any():
            at = np.argwhere(mask)
            spread = np.sqrt(np.linalg.eigvalsh(np.cov(at.T) + np.eye(2) / 12))
            widths.append(4 * spread[0])
            lengths.append(4 * spread[1])
    assert max(lengths) < 1.3 * 0.7 * P
    assert min(lengths) < 12 < 40 < max(lengths)
    assert min(widths) < 4 < 15 < max(widths)
    ratio = np.array(lengths) / np.array(widths)
    assert ratio.min() < 1.5
    assert ratio.max() > 6
    areas = altered[1].sum(axis=(2, 3))
    assert areas[areas > 0].min() >= line._LEAST_AREA_PX


def test_a_spot_is_labelled_in_a_good_part_of_it_or_left_out(plates, monkeypatch):
    """Else a large spot of which a corner stands out would be in the picture, and be called good."""
    shares = {}
    for least in (0.0, line._LEAST_SHARE):
        monkeypatch.setattr(line, "_LEAST_SHARE", least)
        found = [defects.alter(jax.random.key(i), plates, jnp.roll(plates, 1, 0)) for i in range(6)]
        pairs = [(m, c) for f in found for m, c in zip(np.asarray(f[1]), np.asarray(f[0] != plates), strict=True)]
        shares[least] = [m.sum() / c.sum() for m, c in pairs if m.any()]
    few, many = (min(s) for s in (shares[line._LEAST_SHARE], shares[0.0]))
    assert few > many
    assert len(shares[0.0]) > len(shares[line._LEAST_SHARE])


def test_labels_need_a_change_beyond_the_plate_itself(plates):
    """The same spots on a plate of the same mean and more contrast are labelled on less of their area."""
    shares = []
    for contrast in (0.3, 1.0, 3.0):
        x = jnp.clip(0.5 + contrast * (plates - 0.5), 0, 1)
        masks = [defects.alter(jax.random.key(i), x, x, strength=0.3)[1] for i in range(4)]
        weak = [defects.alter(jax.random.key(i), x, x, strength=0.03)[1] for i in range(4)]
        assert np.mean(weak) < 0.2 * np.mean(masks)
        shares.append(np.mean(masks))
    assert 0 < shares[2] < 2 * shares[1]


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"probability": 0.0}])
def test_no_alteration(plates, options):
    images, masks = defects.alter(jax.random.key(0), plates, plates, **options)
    np.testing.assert_array_equal(images, plates)
    assert not np.any(masks)


def test_probability_and_number(plates):
    found = [
        [np.asarray(defects.alter(jax.random.key(i), plates, plates, **o)[1]) for i in range(12)]
        for o in ({}, {"probability": 0.5}, {"most": 3})
    ]
    whole, half, many = (np.stack(f) for f in found)
    assert abs(half.any((2, 3)).mean() / whole.any((2, 3)).mean() - 0.5) < 0.12
    spots = [
        max(ndimage.label(ndimage.binary_dilation(m, iterations=3))[1] for m in f.reshape(-1, P, P))
        for f in (whole, many)
    ]
    assert spots[1] >= 2
    assert many.mean() > 1.2 * whole.mean()


def test_same_key_same_result(plates):
    first, again, other = (defects.alter(jax.random.key(k), plates, plates, most=2)[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_pieces_come_from_the_other_plates(plates):
    """Of black plates beside a flat one, a piece shows up; of flat ones, in no place a darker one than a stain's range."""
    flat = jnp.full_like(plates, 0.5)
    # A flat plate has no contrast, so its stains have the least change, and all larger changes come from the other plates.
    found = np.stack([np.abs(defects.alter(jax.random.key(i), flat, flat)[0] - flat) for i in range(6)])
    assert 0 < found.max() < 3 * line._CHANGE[0]
    found = np.stack([np.abs(defects.alter(jax.random.key(i), flat, plates)[0] - flat) for i in range(6)])
    assert found.max() > 3 * line._CHANGE[0]


@pytest.mark.parametrize(
    ("plates", "others", "options"),
    [
        (jnp.zeros((2, 32, 32, 1)), jnp.zeros((2, 32, 32, 1)), {}),
        (jnp.zeros((2, 32, 32)), jnp.zeros((2, 32, 16)), {}),
        (jnp.zeros((2, 32, 32), jnp.uint8), jnp.zeros((2, 32, 32)), {}),
        (jnp.zeros((2, 32, 32)), jnp.zeros((2, 32, 32)), {"most": 0}),
        (jnp.zeros((2, 32, 32)), jnp.zeros((2, 32, 32)), {"probability": 1.1}),
        (jnp.zeros((2, 32, 32)), jnp.zeros((2, 32, 32)), {"strength": -1.0}),
    ],
)
def test_arguments_that_are_none(plates, others, options):
    with pytest.raises(ValueError, match=r"must be|need"):
        defects.alter(jax.random.key(0), plates, others, **options)


def test_gaussian_mean():
    x = np.random.default_rng(0).random((2, 40, 30)).astype(np.float32)
    found = gaussian_mean(jnp.asarray(x), 1.5)
    # Inside, as scipy's; at the borders the weights are those that are left.
    expected = ndimage.gaussian_filter(x.astype(np.float64), (0, 1.5, 1.5), truncate=8)
    np.testing.assert_allclose(found[:, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-6)
    np.testing.assert_allclose(gaussian_mean(jnp.ones((1, 20, 20)), 3.0), 1, atol=1e-6)


# Light.


def test_light_changes_every_patch_in_its_own_way(plates):
    images = np.asarray(light.changed(jax.random.key(0), plates, strength=1.0))
    assert images.shape == plates.shape
    assert images.min() >= 0
    assert images.max() <= 1
    means = images.mean((1, 2))
    assert means.std() > 5 * np.asarray(plates).mean((1, 2)).std()
    slopes = (images - plates)[:, :, : P // 2].mean((1, 2)) - (images - plates)[:, :, P // 2 :].mean((1, 2))
    assert slopes.std() > 0.02
    # The pattern stays: what is bright is bright.
    fine, was = (np.asarray(x - gaussian_mean(jnp.asarray(x), 6.0)) for x in (images, plates))
    assert min(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(fine, was, strict=True)) > 0.75


def test_light_without_strength_changes_nothing(plates):
    np.testing.assert_allclose(light.changed(jax.random.key(0), plates, strength=0.0), plates, atol=1e-6)


def test_light_is_of_its_key_and_compiles_once(plates):
    changed = jax.jit(lambda key: light.changed(key, plates, strength=1.0))
    first, again, other = (changed(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert changed._cache_size() == 1


def test_noise_is_of_each_patch():
    noise = np.asarray(light._noise(jax.random.key(0), 8, 64))
    np.testing.assert_allclose(noise.std((1, 2)), 1, atol=0.08)
    assert abs(np.corrcoef(noise.reshape(8, -1)) - np.eye(8)).max() < 0.1

"""The procedural plates: reproducible, lit from one height field, with the lattice and the masks they claim."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad.data import datasets, plates
from steel_ad.data.plates import pictures

SIZE = 128
KEY = jax.random.key(7)
PLAIN = dataclasses.replace(
    plates.LINES["teardrop1"],
    wear=0.0,
    polish=0.0,
    grain=0.0,
    grain_height_px=0.0,
    roughness_px=0.0,
    drift=0.0,
    blotches=0.0,
    flakes=0.0,
    noise=0.0,
)


@functools.cache
def sound(name, num=4):
    return np.asarray(plates.render(KEY, name, SIZE, num))


@functools.cache
def defective(kind, num=4):
    found = plates.render_defective(KEY, "teardrop4", kind, SIZE, num, among=plates.ANOMALIES)
    return tuple(np.asarray(a) for a in found)


def nearest_lattice_point(lag, vectors):
    return np.round(lag @ np.linalg.inv(vectors)) @ vectors


@pytest.mark.parametrize("name", plates.LINES)
def test_pictures_are_greys_of_a_plausible_brightness(name):
    images = sound(name)
    assert images.shape == (4, SIZE, SIZE)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert 0.2 < images.mean() < 0.6
    assert (images.std(axis=(1, 2)) > 0.03).all()
    assert ((images <= 0) | (images >= 1)).mean() < 1e-3


# Six pixels, mean and standard deviation of a line's first picture.
GOLDEN = {
    "teardrop1": (0.3417, 0.3284, 0.3630, 0.3366, 0.4178, 0.3372, 0.3478, 0.0496),
    "teardrop2": (0.5165, 0.4222, 0.4620, 0.4474, 0.3425, 0.4332, 0.4478, 0.0665),
    "teardrop3": (0.3304, 0.4181, 0.3441, 0.4842, 0.3572, 0.3356, 0.3238, 0.0630),
    "teardrop4": (0.3152, 0.2524, 0.2950, 0.2028, 0.3503, 0.3768, 0.3182, 0.0554),
    "diamond": (0.3564, 0.2956, 0.4021, 0.3411, 0.3953, 0.1818, 0.3325, 0.0581),
}


@pytest.mark.parametrize("name", plates.LINES)
def test_pictures_stay_what_they_were(name):
    image = sound(name)[0]
    found = (*image[10, [20, 57, 93]], *image[77, [5, 60, 111]], image.mean(), image.std())
    message = "plates have changed: every number measured on them is out of date; if they should, measure again, then update GOLDEN"
    np.testing.assert_allclose(found, GOLDEN[name], rtol=0, atol=3e-4, err_msg=message)


def test_a_picture_depends_on_key_and_index_only():
    np.testing.assert_array_equal(plates.render(KEY, "teardrop4", SIZE, 2), sound("teardrop4")[:2])
    images = sound("teardrop4")
    other = np.asarray(plates.render(jax.random.key(8), "teardrop4", SIZE, 4))
    everything = np.concatenate([images, other])
    for i in range(len(everything)):
        for j in range(i):
            assert abs(everything[i] - everything[j]).mean() > 0.02


def test_lines_differ_for_the_same_key():
    """As lines do: more than by brightness and contrast."""
    z = {name: (a := sound(name)[0]) - a.mean() for name in plates.LINES}
    for a in plates.LINES:
        for b in plates.LINES:
            if a < b:
                assert np.corrcoef(z[a].ravel(), z[b].ravel())[0, 1] < 0.8, (a, b)


def test_uneven_lines_are_less_even():
    """SPEC section 1: the background of teardrop 3 and 4 is inhomogeneous."""

    def unevenness(name):
        blocks = sound(name).reshape(4, 2, SIZE // 2, 2, SIZE // 2).mean(axis=(2, 4))
        return (blocks.std(axis=(1, 2)) / blocks.mean(axis=(1, 2))).mean()

    even = max(unevenness(name) for name in ("teardrop1", "teardrop2", "diamond"))
    assert min(unevenness(name) for name in ("teardrop3", "teardrop4")) > 1.5 * even


def test_second_key_does_not_compile_again():
    sound("teardrop4"), defective("spot")
    before = pictures._render._cache_size(), pictures._render_defective._cache_size()
    plates.render(jax.random.key(1), "teardrop4", SIZE, 4)
    for kind in ("spot", "missing_lug"):
        plates.render_defective(jax.random.key(1), "teardrop4", kind, SIZE, 4, among=plates.ANOMALIES)
    assert (pictures._render._cache_size(), pictures._render_defective._cache_size()) == before


@pytest.mark.parametrize("kind", ["dent", "smear", "worn_lug", "watermark"])
def test_a_program_of_its_own_draws_the_same(kind):
    images, masks = defective(kind)
    alone, masks_alone = plates.render_defective(KEY, "teardrop4", kind, SIZE, 4)
    np.testing.assert_allclose(alone, images, rtol=0, atol=1e-6)
    assert (masks_alone != masks).mean() < 1e-4


def test_a_lines_test_pictures_are_shared_among_its_kinds(monkeypatch):
    for name, count in (("_GOOD", 1), ("_DEFECTIVE", 23)):
        monkeypatch.setattr(datasets, name, count)
    test = datasets.load(f"procedural/teardrop4/{SIZE}", train=False).test
    kinds = [t.kind for t in test if t.kind != "good"]
    assert {kind: kinds.count(kind) for kind in kinds} == dict(
        zip(plates.ANOMALIES, (4, 4, 3, 3, 3, 3, 3), strict=True)
    )
    assert all(t.mask.any() for t in test if t.kind != "good")


@pytest.mark.parametrize("pattern", plates.PATTERNS)
def test_lattice_is_the_period_of_the_picture(pattern):
    """On a clean plate, the strongest echo lies on the lattice, and each lattice vector is an echo."""
    line = dataclasses.replace(
        PLAIN,
        pattern=pattern,
        pitch_px=34.0,
        angle_deg=55.0,
        lug_length_px=40.0 if pattern == "diamond" else 27.0,
        lug_width_px=8.0,
        pitch_jitter=0.1,
        rotation_jitter_deg=6.0,
    )
    h, w = 160, 224
    images = np.asarray(plates.render(KEY, line, num=2, shape=(h, w)))
    dy, dx = np.meshgrid(np.arange(h) - h // 2, np.arange(w) - w // 2, indexing="ij")
    for index, image in enumerate(images):
        vectors = np.asarray(plates.lattice(KEY, line, index))
        shortest = np.linalg.norm(vectors, axis=1).min()
        spectrum = abs(np.fft.fft2(image - image.mean(), (2 * h, 2 * w))) ** 2
        echo = np.fft.fftshift(np.fft.ifft2(spectrum).real)[h - h // 2 : h + h // 2, w - w // 2 : w + w // 2]
        echo = echo / ((h - abs(dy)) * (w - abs(dx)))
        distance = np.hypot(dy, dx)

        far = (distance > 0.6 * shortest) & (distance < 1.5 * shortest)
        best = np.unravel_index(np.where(far, echo, -np.inf).argmax(), echo.shape)
        lag = np.array([dy[best], dx[best]])
        np.testing.assert_allclose(lag, nearest_lattice_point(lag, vectors), atol=1.5)

        for vector in vectors:
            near = np.hypot(dy - vector[0], dx - vector[1]) < 8
            best = np.unravel_index(np.where(near, echo, -np.inf).argmax(), echo.shape)
            np.testing.assert_allclose([dy[best], dx[best]], vector, atol=1.5)
            assert echo[best] > 0.15 * echo.max()


@pytest.mark.parametrize("kind", plates.ANOMALIES)
def test_mask_is_what_the_anomaly_changed(kind):
    images, masks = defective(kind)
    assert images.dtype == np.float32
    assert masks.dtype == bool
    change = abs(images - sound("teardrop4"))
    # 2/255 before noise; the noise follows the brightness, and adds a little to it.
    assert change[~masks].max() < 2.5 / 255
    for one, mask in zip(change, masks, strict=True):
        assert 8 < mask.sum() < 0.25 * mask.size
        assert np.percentile(one[mask], 90) > 4 / 255
    assert change[masks].mean() > 20 * change[~masks].mean()


def test_anomalies_of_a_key_lie_in_different_places():
    centres = {kind: np.argwhere(defective(kind)[1][0]).mean(0) for kind in ("dent", "scratch", "spot", "smear")}
    assert np.std(list(centres.values()), axis=0).min() > 1


@pytest.mark.parametrize("pattern", ["teardrop_t", "diamond"])
def test_missing_lug_is_one_whole_lug(pattern):
    line = dataclasses.replace(PLAIN, pattern=pattern, lug_length_px=60.0 if pattern == "diamond" else 36.0)
    images, masks = (np.asarray(a) for a in plates.render_defective(KEY, line, "missing_lug", SIZE, 6))
    areas = masks.sum(axis=(1, 2))
    assert areas.max() < 1.3 * areas.min()
    border = np.ones((SIZE, SIZE), bool)
    border[2:-2, 2:-2] = False
    assert not masks[:, border].any()
    for image, mask in zip(images, masks, strict=True):
        y, x = np.round(np.argwhere(mask).mean(0)).astype(int)
        assert image[y - 3 : y + 4, x - 3 : x + 4].std() < 1e-3
        assert image.std() > 0.03


def test_a_dent_is_lit_by_the_plates_light():
    """Its far side from the light is the bright one, so it turns round with the light."""

    def brighter_side(azimuth):
        line = dataclasses.replace(PLAIN, light_azimuth_deg=azimuth, light_spread_deg=0.0, lug_height_px=0.0)
        images, masks = plates.render_defective(KEY, line, "dent", 64)
        y, x = np.nonzero(np.asarray(masks)[0])
        change = np.asarray(images)[0] - np.median(np.asarray(images)[0])
        moment = (x - x.mean()) * change[y, x]
        return moment.sum() / abs(moment).sum()

    assert brighter_side(0.0) < -0.7
    assert brighter_side(180.0) > 0.7


def test_uint8_rounds_and_clips():
    values = jnp.array([-0.1, 0.0, 0.5 / 255 + 1e-4, 0.5, 1.0, 1.2])
    np.testing.assert_array_equal(plates.to_uint8(values), np.array([0, 0, 1, 128, 255, 255], np.uint8))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown line 'teardrop9'.*teardrop1, teardrop2"):
        plates.render(KEY, "teardrop9")
    with pytest.raises(ValueError, match="32 pixels or more"):
        plates.render(KEY, "teardrop1", 31)
    with pytest.raises(ValueError, match=r"no anomaly 'hole'.*dent, scratch"):
        plates.render_defective(KEY, "teardrop1", "hole")
    with pytest.raises(ValueError, match="no anomaly 'watermark'"):
        plates.render_defective(KEY, "teardrop1", "watermark")
    with pytest.raises(ValueError, match="no anomaly 'watermark'"):
        plates.render_defective(KEY, "teardrop1", "dent", among=("dent", "watermark"))
    with pytest.raises(ValueError, match="'dent' is not among spot, smear"):
        plates.render_defective(KEY, "teardrop1", "dent", among=("spot", "smear"))
    with pytest.raises(ValueError, match="pixels or more on this line"):
        plates.render_defective(KEY, "teardrop3", "missing_lug", 48)
    with pytest.raises(ValueError, match=r"pixels or more on this line, got \(200, 48\)"):
        plates.render_defective(KEY, "teardrop3", "missing_lug", shape=(200, 48))
    with pytest.raises(ValueError, match=r"unknown pattern 'waves'.*diamond"):
        dataclasses.replace(plates.LINES["teardrop1"], pattern="waves")
    with pytest.raises(ValueError, match="unknown anomaly kind 'hole'"):
        dataclasses.replace(plates.LINES["teardrop1"], anomalies=("hole",))

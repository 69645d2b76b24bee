"""Cutting out, splitting and inserting defects, on tiny pictures made here."""

import dataclasses
import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from steel_ad.data import defects
from steel_ad.data.defects import insertion
from steel_ad.data.defects.library import Cut, assemble
from steel_ad.data.folders import write_image
from steel_ad.errors import InputError

FEATHER = 3


def key(i):
    return jax.random.key(i)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image)


def steel(seed, boxes=((10, 12, 16, 18),), change=60, shape=(40, 48)):
    """Plain steel under slanting light, with boxes (top, left, bottom, right) that differ by `change` levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = 90 + 0.6 * y + 0.4 * x + rng.normal(0, 1, shape)
    mask = np.zeros(shape, np.uint8)
    for top, left, bottom, right in boxes:
        image[top:bottom, left:right] += change
        mask[top:bottom, left:right] = 255
    return np.round(image).astype(np.uint8), mask


def put(root, kind, name, seed, **options):
    image, mask = steel(seed, **options)
    save(root / "images" / kind / f"{name}.png", image)
    save(root / "masks" / kind / f"{name}.png", mask)
    return image, mask > 0


def make(patches):
    """A library of uint8 patches [s, s] whose non-zero pixels are the defect; the difference ends with the mask."""
    cuts = []
    for i, patch in enumerate(patches):
        difference = np.where(patch > 0, patch / np.float32(255) - 0.5, 0).astype(np.float32)
        cuts.append(Cut((difference, patch, patch > 0), "mark", f"{i}.png", f"{i}.png"))
    return assemble(cuts)


@pytest.fixture(scope="module")
def ell():
    """One L-shaped defect of 5x3, of which no flip equals another, each pixel with its own value."""
    patch = np.zeros((16, 16), np.uint8)
    corner = np.zeros((5, 3), np.uint8)
    corner[:, 0], corner[4, 1:] = [200, 205, 210, 215, 220], [225, 230]
    patch[5:10, 6:9] = corner
    return make([patch]), corner


@pytest.fixture(scope="module")
def plates():
    return jax.random.uniform(key(9), (24, 40, 48), minval=0.3, maxval=0.6)


@pytest.fixture(scope="module")
def many_plates():
    return jnp.full((600, 16, 16), 0.4)


# Cutting out


def test_difference_removes_slow_light_and_is_the_defect(tmp_path):
    put(tmp_path, "scratch", "1", 0, boxes=((8, 6, 30, 12),), change=50)
    library, skipped = defects.load(tmp_path, size=32)
    assert skipped == []
    difference, mask = np.asarray(library.difference[0]), np.asarray(library.mask[0])
    # The light changes by 13 levels along the defect; its own 50 must come out nearly even.
    rows = difference[mask].reshape(22, 6).mean(axis=1) * 255
    np.testing.assert_allclose(rows, 50, atol=5)
    outside = ndimage.distance_transform_edt(~mask)
    assert np.abs(difference[(outside > 0) & (outside <= FEATHER)]).max() < 0.04
    assert not difference[outside > FEATHER + 1].any()


def test_difference_fades_instead_of_ending_with_the_mask(tmp_path):
    image, mask = steel(0, boxes=((10, 10, 24, 24),))
    mask[:] = 0
    mask[13:21, 13:21] = 255  # labelled 3 px too small
    save(tmp_path / "images" / "1.png", image)
    save(tmp_path / "masks" / "1.png", mask)
    library, _ = defects.load(tmp_path, size=32)
    row = np.asarray(library.difference[0])[16]
    # The mask begins at 12; the steel that is still defective there ends at 9, and the feather at 8.
    assert row[12] > 0.1
    assert row[12] > row[11] > row[10] > row[9] > 0


def test_cutout_mask_and_size_are_the_sources_pixels(tmp_path):
    image, mask = put(tmp_path, "scratch", "1", 0, boxes=((14, 20, 21, 24),))
    library, _ = defects.load(tmp_path, size=20)
    # A box of 7x4 lies at (20 - 7) // 2, (20 - 4) // 2 in its window.
    window = slice(14 - 6, 14 + 14), slice(20 - 8, 20 + 12)
    np.testing.assert_array_equal(library.cutout[0], image[window])
    np.testing.assert_array_equal(library.mask[0], mask[window])
    np.testing.assert_array_equal(library.size, [[7, 4]])
    assert library.cutout.dtype == jnp.uint8
    assert library.difference.dtype == jnp.float32


def test_near_fragments_are_one_defect_and_far_or_tiny_ones_are_not(tmp_path):
    boxes = ((5, 20, 10, 24), (16, 20, 20, 24), (27, 20, 33, 24), (5, 40, 7, 43))  # gaps of 6 and 7; one of 6 px
    _, mask = put(tmp_path, "scratch", "1", 0, boxes=boxes)
    library, _ = defects.load(tmp_path, size=32)
    assert sorted(np.asarray(library.size).tolist()) == [[6, 4], [15, 4]]
    assert int(library.mask.sum()) == mask.sum() - 6


@pytest.mark.parametrize("where", ["images", "flat", "beside", "parallel", "inner"])
def test_layouts(tmp_path, where):
    image, mask = steel(0)
    paths = {
        "images": ("images/scratch/Sc_1.png", "masks/scratch/Sc_1.png", "scratch"),
        "flat": ("images/Sc_1.png", "masks/Sc_1_mask.png", "defect"),
        "beside": ("scratch/Sc_1.bmp", "scratch/Sc_1_mask.png", "scratch"),
        "parallel": ("scratch/Sc_1.bmp", "ground_truth/scratch/Sc_1.png", "scratch"),
        "inner": ("scratch/Sc_1.bmp", "scratch/masks/Sc_1.png", "scratch"),
    }[where]
    save(tmp_path / paths[0], image)
    save(tmp_path / paths[1], mask)
    library, skipped = defects.load(tmp_path, size=32)
    assert skipped == []
    assert (library.kinds, library.sources) == ((paths[2],), (paths[0],))


def test_bad_files_are_named_and_the_rest_goes_on(tmp_path):
    put(tmp_path, "scratch", "good", 0)
    put(tmp_path, "scratch", "empty", 1, boxes=())
    put(tmp_path, "scratch", "large", 2, boxes=((5, 10, 32, 14),))
    put(tmp_path, "scratch", "all", 3, boxes=((0, 0, 20, 20),), shape=(20, 20))
    image, mask = steel(4)
    save(tmp_path / "images/scratch/maskless.png", image)
    save(tmp_path / "masks/scratch/imageless.png", mask)
    save(tmp_path / "images/scratch/other.png", image)
    save(tmp_path / "masks/scratch/other.png", mask[:-1])
    save(tmp_path / "images/scratch/coarse.png", image)
    save(tmp_path / "masks/scratch/coarse.jpg", mask)
    save(tmp_path / "images/scratch/good.bmp", image)
    (tmp_path / "images/scratch/damaged.png").write_bytes((tmp_path / "images/scratch/good.png").read_bytes()[:-20])
    save(tmp_path / "masks/scratch/damaged.png", mask)

    library, skipped = defects.load(tmp_path, size=32)
    assert library.sources == ("images/scratch/good.bmp",)
    expected = {
        "masks/scratch/empty.png": "labels no defect",
        "images/scratch/large.png": "4x27 pixels",
        "images/scratch/all.png": "no plain steel",
        "images/scratch/maskless.png": "has no mask",
        "masks/scratch/imageless.png": "without an image",
        "masks/scratch/other.png": "image's size",
        "masks/scratch/coarse.jpg": "JPEG",
        "images/scratch/coarse.png": "has no mask",
        "images/scratch/good.png": "same name",
        "images/scratch/damaged.png": "damaged",
    }
    for name, reason in expected.items():
        assert sum(s.startswith(str(tmp_path / name)) and reason in s for s in skipped) == 1, name
    assert len(skipped) == len(expected)


def test_nothing_left_is_an_error_with_its_reason(tmp_path):
    put(tmp_path, "scratch", "1", 0, boxes=())
    with pytest.raises(InputError, match=r"no defect that can be used.*1\.png labels no defect"):
        defects.load(tmp_path)


def test_fitting_names_what_is_larger_than_the_plate(tmp_path):
    put(tmp_path, "a", "small", 0)
    put(tmp_path, "b", "wide", 1, boxes=((10, 4, 14, 30),))
    library, _ = defects.load(tmp_path, size=40)
    kept, skipped = defects.fitting(library, (60, 25))
    assert kept.sources == ("images/a/small.png",)
    assert kept.kinds[int(kept.kind[0])] == "a"
    assert len(skipped) == 1
    assert "images/b/wide.png" in skipped[0]
    assert "26x4" in skipped[0]
    with pytest.raises(InputError, match="no defect fits"):
        defects.fitting(library, (3, 60))


# Splitting


@pytest.fixture
def many(tmp_path):
    for i in range(8):
        put(tmp_path, "scratch", str(i), i, boxes=((5, 5, 9, 9), (25, 30, 29, 34)))
    for i in range(4):
        put(tmp_path, "pit", str(i), 10 + i)
    put(tmp_path, "rare", "0", 20)
    return tmp_path


def test_split_keeps_sources_apart_and_kinds_in_proportion(many):
    library, _ = defects.load(many, size=32)
    train, test = defects.split(library, 0.25, seed=1)
    defects.check_disjoint(train, test)
    record = defects.split_record(train, test, 0.25, 1)
    assert record["test"]["defects"] == {"pit": 1, "rare": 0, "scratch": 4}
    assert record["train"]["defects"] == {"pit": 3, "rare": 1, "scratch": 12}
    assert json.loads(json.dumps(record)) == record
    assert len(record["train"]["sources"]) + len(record["test"]["sources"]) == len(library.sources)
    # Rows still belong to their own source and kind.
    for part in (train, test):
        for i in range(part.mask.shape[0]):
            assert f"images/{part.kinds[int(part.kind[i])]}/" in part.sources[int(part.source[i])]
    assert defects.split(library, 0.25, seed=1)[1].sources == test.sources
    assert any(defects.split(library, 0.25, seed=s)[1].sources != test.sources for s in range(2, 6))


def test_a_copy_under_another_name_stays_on_its_originals_side(many):
    for i in range(8):
        for part in ("images", "masks"):
            data = (many / part / "scratch" / f"{i}.png").read_bytes()
            (many / part / "scratch" / f"copy{i}.png").write_bytes(data)
    library, _ = defects.load(many, size=32)
    for seed in range(3):
        train, test = defects.split(library, 0.5, seed)
        assert not set(train.sha256) & set(test.sha256)
        copies = {name for name in test.sources if "copy" in name}
        assert {name.replace("copy", "") for name in copies} == {
            name for name in test.sources if "scratch" in name
        } - copies


def test_a_planted_leak_is_refused(many):
    library, _ = defects.load(many, size=32)
    train, test = defects.split(library, 0.25, seed=0)
    leaked = dataclasses.replace(test, sha256=(train.sha256[2], *test.sha256[1:]), sources=("x.png", *test.sources[1:]))
    for refuse in (defects.check_disjoint, lambda a, b: defects.split_record(a, b, 0.25, 0)):
        with pytest.raises(InputError, match=rf"{train.sources[2]} and x\.png are the same image"):
            refuse(train, leaked)


def test_a_single_source_cannot_be_split(tmp_path):
    put(tmp_path, "a", "1", 0)
    put(tmp_path, "b", "1", 1)
    library, _ = defects.load(tmp_path, size=32)
    with pytest.raises(InputError, match="two source images"):
        defects.split(library, 0.5, 0)


# Inserting


def test_only_mask_and_feather_change(tmp_path, plates):
    put(tmp_path, "scratch", "1", 0, boxes=((5, 30, 14, 37),), change=60)
    library, _ = defects.load(tmp_path, size=32, feather_px=FEATHER)
    images, masks = (np.asarray(a) for a in defects.insert(key(0), plates, library))
    assert (masks.sum(axis=(1, 2)) == 63).all()
    change = images - np.asarray(plates)
    assert (change[masks] > 0.15).all()
    for image, mask in zip(change, masks, strict=True):
        far = ndimage.distance_transform_edt(~mask) >= FEATHER + 1
        assert not image[far].any()


@pytest.fixture
def contrast(monkeypatch):
    """Sets the range of the random factor on the difference."""
    return lambda low, high: monkeypatch.setitem(insertion._CONTRAST, "thesis", (low, high))


def test_result_stays_in_range(ell, plates, contrast):
    contrast(3.0, 3.0)
    images, _ = defects.insert(key(0), plates, ell[0])
    assert float(images.max()) == 1.0


def test_paste_is_the_cutout_and_nothing_else(ell, plates):
    library, corner = ell
    images, masks = (np.asarray(a) for a in defects.insert(key(1), plates, library, blend="paste"))
    for plate, image, mask in zip(np.asarray(plates), images, masks, strict=True):
        assert mask.sum() == 7
        np.testing.assert_array_equal(image[~mask], plate[~mask])
        np.testing.assert_allclose(np.sort(image[mask]), corner[corner > 0] / 255, atol=1e-7)


def test_difference_is_added_with_its_sign(ell, plates, contrast):
    contrast(0.5, 0.5)
    library, _ = ell
    dark = dataclasses.replace(library, difference=-library.difference)
    images, masks = defects.insert(key(1), plates, library)
    change = np.asarray(images - plates)
    expected = 0.5 * (np.arange(200, 231, 5) / 255 - 0.5)
    for image, mask in zip(change, np.asarray(masks), strict=True):
        np.testing.assert_allclose(np.sort(image[mask]), expected, atol=1e-6)
        assert not image[~mask].any()
    np.testing.assert_allclose(defects.insert(key(1), plates, dark)[0] - plates, -change, atol=1e-6)


def test_contrast_covers_its_range_evenly_in_log(ell, many_plates, contrast):
    contrast(0.25, 1.0)
    images, _ = defects.insert(key(0), many_plates, ell[0])
    gain = np.asarray(images - many_plates).max(axis=(1, 2)) / (230 / 255 - 0.5)
    assert 0.25 <= gain.min() < 0.27
    assert 0.95 < gain.max() <= 1.0001
    assert abs(np.median(gain) - 0.5) < 0.06


def test_all_four_orientations_and_no_other(ell, plates):
    library, corner = ell
    images = jnp.concatenate([defects.insert(key(i), 0 * plates, library, blend="paste")[0] for i in range(10)])
    shapes = [corner, corner[::-1], corner[:, ::-1], corner[::-1, ::-1]]
    counts = np.zeros(4, int)
    for image in np.round(np.asarray(images) * 255).astype(np.uint8):
        (box,) = ndimage.find_objects((image > 0).astype(int))
        counts += [np.array_equal(image[box], shape) for shape in shapes]
    assert counts.sum() == 240
    assert counts.min() > 40


@pytest.mark.parametrize("augment", defects.AUGMENTS)
def test_places_are_uniform_up_to_every_border(ell, many_plates, augment):
    _, masks = defects.insert(key(0), many_plates, ell[0], augment=augment)
    masks = np.asarray(masks)
    assert masks.any(axis=(1, 2)).all()
    places = [ndimage.find_objects(mask.astype(int))[0] for mask in masks]
    rows, columns = ([place[axis] for place in places] for axis in (0, 1))
    assert min(r.start for r in rows) == min(c.start for c in columns) == 0
    assert (max(r.stop for r in rows), max(c.stop for c in columns)) == (16, 16)
    if augment == "thesis":  # 5x3 whole: 12 by 14 places
        assert (masks.sum(axis=(1, 2)) == 7).all()
        top = np.bincount([r.start for r in rows], minlength=12)
        left = np.bincount([c.start for c in columns], minlength=14)
        assert (top.size, left.size) == (12, 14)
        assert min(top.min(), left.min()) > 20


def test_strong_resizes_within_the_window_and_keeps_thin_lines():
    plates = jnp.full((24, 60, 60), 0.4)
    line, block = np.zeros((2, 48, 48), np.uint8)
    line[6:42, 24] = 255
    block[18:30, 18:30] = 255
    for patch, low, high in ((line, (18, 1), (40, 2)), (block, (6, 6), (18, 18))):
        library = make([patch])
        heights, widths = [], []
        for i in range(8):
            images, masks = defects.insert(key(i), plates, library, augment="strong")
            assert (np.asarray(images - plates)[np.asarray(masks)] > 0.02).all()
            for mask in np.asarray(masks):
                height, width = (part.stop - part.start for part in ndimage.find_objects(mask.astype(int))[0])
                heights.append(height)
                widths.append(width)
        # The line of 36 has room for 40 in its window of 48, less the margin.
        assert low[0] <= min(heights) <= low[0] + 2
        assert high[0] - 3 <= max(heights) <= high[0] + 1
        assert low[1] <= min(widths)
        assert max(widths) <= high[1] + 1


def test_probability_and_number_of_defects(ell):
    plates = jnp.full((500, 64, 64), 0.3)
    images, masks = defects.insert(key(0), plates, ell[0], probability=0.25, max_defects=3)
    touched = np.asarray(masks).any(axis=(1, 2))
    np.testing.assert_array_equal(np.asarray(images != plates).any(axis=(1, 2)), touched)
    assert 0.18 < touched.mean() < 0.32
    assert not defects.insert(key(0), plates, ell[0], probability=0.0, max_defects=3)[1].any()
    # Defects may overlap, but on a large plate they hardly do: 1, 2 and 3 are equally frequent.
    _, masks = defects.insert(key(2), plates, ell[0], max_defects=3)
    counts = np.bincount(np.asarray(masks).sum(axis=(1, 2)) // 7, minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 120


def test_all_defects_of_the_library_are_drawn():
    patches = np.zeros((5, 12, 12), np.uint8)
    for i, patch in enumerate(patches):
        patch[4:7, 4 : 5 + i] = 255
    _, masks = defects.insert(key(0), jnp.zeros((300, 16, 16)), make(list(patches)))
    counts = np.bincount(np.asarray(masks).sum(axis=(1, 2)) // 3, minlength=6)
    assert counts.size == 6
    assert counts[1:].min() > 30


def test_key_decides_and_channels_do_not(ell, plates):
    first = defects.insert(key(3), plates, ell[0])
    again = defects.insert(key(3), plates[..., None], ell[0])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b.reshape(a.shape))
    assert again[0].shape == again[1].shape == (*plates.shape, 1)
    other = defects.insert(key(4), plates, ell[0])
    assert (np.asarray(first[1] != other[1]).any(axis=(1, 2))).mean() > 0.9
    # Plates of one batch differ from each other, too.
    assert len({mask.tobytes() for mask in np.asarray(first[1])}) > 20


def test_a_new_key_or_library_of_equal_names_does_not_retrace(ell, plates):
    traces = []

    @jax.jit
    def step(key, plates, library):
        traces.append(0)
        return defects.insert(key, plates, library)

    step(key(0), plates, ell[0])
    step(key(1), plates + 0.1, dataclasses.replace(ell[0], difference=ell[0].difference * 0.5))
    assert len(traces) == 1


def test_vmap_over_keys(ell, plates):
    keys = jax.random.split(key(0), 3)
    images, masks = jax.vmap(lambda k: defects.insert(k, plates, ell[0]))(keys)
    expected = defects.insert(keys[2], plates, ell[0])
    np.testing.assert_allclose(images[2], expected[0], atol=1e-6)
    np.testing.assert_array_equal(masks[2], expected[1])


@pytest.mark.parametrize("augment", defects.AUGMENTS)
def test_lowers_for_accelerators(ell, plates, augment):
    def step(key, plates, library):
        return defects.insert(key, plates, library, augment=augment)

    def periodic(key, strip, library):
        return defects.insert_periodic(key, strip, library, period_px=20)

    for function, x in ((step, plates), (periodic, plates[0])):
        exported = jax.export.export(jax.jit(function), platforms=["cuda", "tpu"])(key(0), x, ell[0])
        assert exported.platforms == ("cuda", "tpu")


@pytest.mark.parametrize(
    "options",
    [
        {"blend": "poisson"},
        {"augment": "none"},
        {"max_defects": 0},
        {"probability": 1.5},
    ],
)
def test_bad_options(ell, plates, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        defects.insert(key(0), plates, ell[0], **options)


def test_bad_plates(ell, plates):
    for bad in (plates[0], (plates * 255).astype(jnp.uint8), jnp.zeros((1, 20, 20, 3))):
        with pytest.raises(ValueError, match="plates must be float32"):
            defects.insert(key(0), bad, ell[0])


# Periodic


def test_periodic_marks_are_one_defect_at_every_period(ell):
    strip = jnp.full((230, 30), 0.4)
    starts = set()
    for i in range(10):
        image, mask, positions = (np.asarray(a) for a in defects.insert_periodic(key(i), strip, ell[0], period_px=50))
        assert positions.shape == (5, 2)
        on = (positions >= 0).all(axis=1)
        assert (positions[~on] == -1).all()
        assert on[0]
        shown = positions[on]
        assert (np.abs(np.diff(shown[:, 0]) - 50) <= 1).all()
        assert len(set(shown[:, 1])) == 1
        # All marks that fit are there, and the box at each position is the same defect.
        assert shown[-1, 0] + 51 > 230 - 5
        found = [image[y : y + 5, x : x + 3] for y, x in shown]
        for box in found:
            np.testing.assert_array_equal(box, found[0])
        assert mask.sum() == 7 * len(shown)
        assert mask[shown[0, 0] : shown[0, 0] + 5, shown[0, 1] : shown[0, 1] + 3].sum() == 7
        np.testing.assert_array_equal(image != 0.4, mask)
        starts.add(int(shown[0, 0]))
    assert len(starts) > 5
    assert max(starts) < 50


def test_periodic_jitter_does_not_add_up(ell):
    _, _, positions = defects.insert_periodic(key(0), jnp.zeros((20_000, 16)), ell[0], period_px=400.5)
    top = np.asarray(positions)[:, 0]
    away = (top - top[0] - 400.5 * np.arange(top.size))[top >= 0]
    assert away.size >= 49
    assert 5 < np.ptp(away) <= 2 * 4.005 + 1


def test_periodic_longer_than_the_strip_shows_once(ell):
    for i in range(5):
        _, mask, positions = defects.insert_periodic(key(i), jnp.zeros((12, 12)), ell[0], period_px=400)
        assert positions.shape == (1, 2)
        assert 0 <= int(positions[0, 0]) <= 12 - 5
        assert int(mask.sum()) == 7


def test_a_bad_period(ell):
    with pytest.raises(ValueError, match="period_px"):
        defects.insert_periodic(key(0), jnp.zeros((20, 20)), ell[0], period_px=0)


# Procedural


def test_procedural_defects_are_seen_inside_their_window_and_nowhere_else():
    library = defects.procedural(key(0), 24, size=64)
    assert library.kinds == tuple(sorted(defects.KINDS))
    assert len(set(library.sha256)) == 24
    for difference, mask in zip(np.asarray(library.difference), np.asarray(library.mask), strict=True):
        assert not difference[ndimage.distance_transform_edt(~mask) >= FEATHER + 1].any()
        assert np.abs(difference[mask]).max() > 0.04
        top, left = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        assert min(top[0], left[0]) >= FEATHER
        assert max(top[-1], left[-1]) < 64 - FEATHER
    again = defects.procedural(key(0), 24, size=64)
    np.testing.assert_array_equal(library.difference, again.difference)
    assert not set(defects.procedural(key(1), 6, size=64).sha256) & set(library.sha256)


def test_procedural_dents_have_two_sides_and_pits_are_dark():
    library = defects.procedural(key(2), 30, size=64)
    for difference, kind in zip(np.asarray(library.difference), np.asarray(library.kind), strict=True):
        if library.kinds[kind] == "dent":
            assert difference.max() > 0.01
            assert difference.min() < -0.01
        if library.kinds[kind] == "pit":
            assert difference.max() <= 0


def test_procedural_refuses_what_it_cannot_draw():
    for num, size in ((0, 64), (1, 32)):
        with pytest.raises(ValueError, match="need num >= 1 and size >= 64"):
            defects.procedural(key(0), num, size=size)


def test_defects_of_kept_sources_are_left_out_and_the_others_are_as_they_were():
    library = make([np.pad(np.full((4, 4), 10 * i, np.uint8), 6) for i in (1, 2, 3)])
    left = defects.without(library, {"1.png"})
    assert np.asarray(left.source).size == 2
    for name in ("difference", "cutout", "mask", "size"):
        np.testing.assert_array_equal(getattr(left, name), np.asarray(getattr(library, name))[[0, 2]])
    with pytest.raises(InputError, match="every defect"):
        defects.without(library, {"0.png", "1.png", "2.png"})


def test_one_drawn_defect_is_enough():
    assert np.asarray(defects.procedural(key(0), 1, size=64).mask).shape == (1, 64, 64)

"""Regions of a strip in bands are those of the whole strip; rows measure what they say."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure

from steel_ad.errors import InputError
from steel_ad.inspection import ledger
from steel_ad.inspection.ledger import Camera


def strip(heights, opened, threshold=0.5, top=0):
    found, state, row = [], ledger.nothing(opened.shape[1]), top
    for height in heights:
        closed, state = ledger.advance(state, opened[row - top : row - top + height], threshold, top=row)
        found += closed
        row += height
    assert row - top == len(opened)
    return sorted([*found, *state.regions], key=lambda r: (r.top, r.left, r.bottom))


def smooth(seed, shape=(60, 41)):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return (noise / noise.std()).astype(np.float32)


@pytest.mark.parametrize("heights", [[60], [1] * 60, [7] * 8 + [4], [30, 29, 1]])
@pytest.mark.parametrize("seed", [0, 1])
def test_bands_give_the_regions_of_the_whole_strip(heights, seed):
    opened = smooth(seed)
    whole = measure.regionprops(measure.label(opened > 0.5, connectivity=2), opened)
    whole.sort(key=lambda r: (r.bbox[0], r.bbox[1], r.bbox[2]))
    found = strip(heights, opened)
    assert len(found) == len(whole) > 20
    for ours, theirs in zip(found, whole, strict=True):
        assert (ours.top, ours.left, ours.bottom, ours.right) == theirs.bbox
        assert ours.area == theirs.area
        row = ledger.row(ours, Camera(), image="", p_value=1.0)
        assert (row["along_px"] - 0.5, row["across_px"] - 0.5) == pytest.approx(theirs.centroid)
        assert row["peak"] == theirs.intensity_max
        assert row["mean"] == pytest.approx(float(theirs.intensity_mean), rel=1e-5)
        assert opened[ours.peak_y, ours.peak_x] == ours.peak
        # Theirs is the ellipse's axis (4 sigma) without a pixel's own extent.
        sigma = theirs.axis_major_length / 4
        assert row["length_px"] == pytest.approx(math.sqrt(12 * sigma**2 + 1), rel=1e-6)


def test_the_bands_do_not_change_a_bit_but_of_the_sum():
    opened = smooth(2)
    whole = strip([60], opened)
    for heights in ([1] * 60, [13, 47]):
        for ours, theirs in zip(strip(heights, opened), whole, strict=True):
            assert dataclasses.replace(ours, total=0) == dataclasses.replace(theirs, total=0)
            assert ours.total == pytest.approx(theirs.total, rel=1e-12)


def test_branches_of_a_region_unite_across_bands_and_corners():
    picture = ["#...#", ".#.#.", "..#..", "#...#"]
    opened = np.array([[c == "#" for c in line] for line in picture], np.float32)
    found = strip([1, 1, 1, 1], opened)
    assert [(r.top, r.left, r.area) for r in found] == [(0, 0, 5), (3, 0, 1), (3, 4, 1)]


def test_a_region_closes_with_the_first_row_it_does_not_reach():
    opened = np.zeros((4, 5), np.float32)
    opened[1, 2] = 1
    closed, state = ledger.advance(ledger.nothing(5), opened[:2], 0.5, top=0)
    assert (closed, len(state.regions)) == ([], 1)
    closed, state = ledger.advance(state, opened[2:], 0.5, top=2)
    assert (len(closed), state.regions) == (1, ())


def test_the_threshold_itself_is_no_defect_and_is_compared_in_float64():
    opened = np.full((2, 2), 0.1, np.float32)
    assert strip([2], opened, threshold=float(np.float32(0.1))) == []
    assert len(strip([2], opened, threshold=0.1)) == 1  # 0.1 in float32 is above 0.1


@pytest.mark.parametrize("top", [0, 10**7])
def test_a_rectangle_has_its_own_length_and_width(top):
    opened = np.zeros((40, 40), np.float32)
    opened[5:25, 10:13] = 1
    (region,) = strip([40], opened, top=top)
    row = ledger.row(region, Camera("left", "bottom", 100.0, 0.5), image="a", p_value=0.25)
    assert (row["length_px"], row["width_px"], row["orientation_deg"]) == pytest.approx((20, 3, 0))
    assert (row["along_px"], row["across_px"], row["area_px"]) == (top + 15, 11.5, 60)
    assert (row["along_mm"], row["across_mm"], row["area_mm2"]) == ((top + 15) / 2, 105.75, 15)
    assert (row["length_mm"], row["width_mm"]) == pytest.approx((10, 1.5))
    assert (row["camera"], row["side"], row["image"], row["p_value"]) == ("left", "bottom", "a", 0.25)


@pytest.mark.parametrize("angle", [-60, -20, 30, 90])
def test_orientation_is_from_the_strips_direction(angle):
    y, x = np.mgrid[-40:41, -40:41]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    opened = ((np.abs(c * y + s * x) < 30) & (np.abs(-s * y + c * x) < 3)).astype(np.float32)
    (region,) = strip([81], opened)
    assert ledger.row(region, Camera(), image="", p_value=1)["orientation_deg"] == pytest.approx(angle, abs=2)


def test_rows_have_no_millimetres_where_the_scale_is_unknown():
    (region,) = strip([1], np.ones((1, 1), np.float32))
    row = ledger.row(region, Camera(), image="", p_value=1)
    assert (row["length_px"], row["width_px"]) == pytest.approx((1, 1))
    assert row["along_mm"] is row["area_mm2"] is None


def rows_of(camera, boxes, image="coil"):
    found = []
    for top, left, bottom, right in boxes:
        opened = np.zeros((100, 100), np.float32)
        opened[top:bottom, left:right] = 1
        found += [ledger.row(r, camera, image=image, p_value=1) for r in strip([100], opened)]
    return found


def test_a_defect_seen_by_two_cameras_is_one_row():
    left, right = Camera("left", across_mm=0, mm_per_px=1), Camera("right", across_mm=80, mm_per_px=1)
    below = Camera("below", "bottom", across_mm=0, mm_per_px=1)
    rows = rows_of(left, [(10, 85, 20, 95), (50, 97, 60, 100)]) + rows_of(right, [(12, 4, 20, 14), (50, 15, 60, 30)])
    rows += rows_of(below, [(10, 85, 20, 95)])
    kept = ledger.deduplicated(rows, [left, right, below])
    assert [(r["camera"], r["top_px"]) for r in kept] == [("left", 10), ("right", 50), ("below", 10)]
    # Of one camera, and of other images, nothing is the same.
    assert len(ledger.deduplicated(rows_of(left, [(1, 1, 9, 9), (1, 1, 9, 9)]), [left])) == 2
    other = rows_of(left, [(10, 85, 20, 95)], "a") + rows_of(right, [(12, 4, 20, 14)], "b")
    assert len(ledger.deduplicated(other, [left, right])) == 2
    # Boxes that only touch do not meet.
    apart = rows_of(left, [(10, 85, 20, 90)]) + rows_of(right, [(10, 10, 20, 14)])
    assert len(ledger.deduplicated(apart, [left, right])) == 2


def test_rows_are_sorted_and_numbered():
    a, b = Camera("a", mm_per_px=1), Camera("b", "bottom", mm_per_px=1)
    rows = rows_of(b, [(1, 1, 2, 2)]) + rows_of(a, [(50, 9, 60, 12), (5, 60, 9, 70), (5, 6, 9, 7)])
    found = ledger.ordered(rows)
    assert [r["defect"] for r in found] == [1, 2, 3, 4]
    assert [(r["side"], r["top_px"], r["left_px"]) for r in found] == [
        *(("top", 5, 6), ("top", 5, 60), ("top", 50, 9), ("bottom", 1, 1))
    ]


def test_cameras_of_different_scales_are_sorted_by_millimetres():
    px = {"side": "top", "image": "", "across_px": 0.0, "across_mm": 0.0}
    rows = [
        {**px, "camera": "coarse", "along_px": 50.0, "along_mm": 50.0},
        {**px, "camera": "fine", "along_px": 100.0, "along_mm": 10.0},
    ]
    found = ledger.ordered(rows)
    assert [r["camera"] for r in found] == ["fine", "coarse"]


def test_a_camera_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="side"):
        Camera("a", "left")
    with pytest.raises(InputError, match="mm_per_px"):
        Camera("a", mm_per_px=0.0)


def test_a_camera_has_a_place():
    with pytest.raises(InputError, match="across_mm=nan"):
        Camera("a", across_mm=math.nan)


def test_of_many_rows_those_stay_that_the_definition_keeps():
    rng = np.random.default_rng(5)
    cameras = [Camera("a", mm_per_px=1), Camera("b", across_mm=20, mm_per_px=1), Camera("c", across_mm=40, mm_per_px=1)]
    rows = []
    for k in range(400):
        top, left = rng.integers(0, 600), rng.integers(0, 40)
        bottom, right = top + rng.integers(1, 300 if k % 50 == 0 else 20), left + rng.integers(1, 20)
        box = {"top_px": top, "left_px": left, "bottom_px": bottom, "right_px": right}
        area = int(rng.integers(1, 30))
        rows.append({"side": "top", "image": "", "camera": cameras[k % 3].name, "area_mm2": area, **box, "k": k})
    across = {c.name: c.across_mm for c in cameras}
    kept = []
    for r in sorted(rows, key=lambda r: -r["area_mm2"]):

        def meets(o, r=r):
            shift = across[o["camera"]] - across[r["camera"]]
            along = o["top_px"] < r["bottom_px"] and r["top_px"] < o["bottom_px"]
            return along and o["left_px"] + shift < r["right_px"] and r["left_px"] < o["right_px"] + shift

        if not any(o["camera"] != r["camera"] and meets(o) for o in kept):
            kept.append(r)
    assert 20 < len(kept) < 380
    assert [r["k"] for r in ledger.deduplicated(rows, cameras)] == sorted(r["k"] for r in kept)

"""Metrics against scikit-learn, against the definition threshold by threshold, and against counting by hand."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from steel_ad import metrics


def _oracle_area(x, y, limit):
    """Trapezoid area up to the limit over the limit, segment by segment."""
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x0 >= limit:
            break
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0) if x1 > x0 else y1
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def _oracle_pro(scores, masks):
    """(FPR, PRO) at every distinct score, straight from the definition."""
    labelled = [ndimage.label(mask, np.ones((3, 3)))[0] for mask in masks]
    components = [(i, image == k) for i, image in enumerate(labelled) for k in range(1, image.max() + 1)]
    good = sum(np.sum(~np.asarray(mask)) for mask in masks)
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([np.ravel(image) for image in scores]))[::-1]:
        called = [image >= threshold for image in scores]
        fpr.append(sum(np.sum(c & ~m) for c, m in zip(called, masks, strict=True)) / good)
        pro.append(np.mean([called[i][component].mean() for i, component in components]))
    return fpr, pro


def _case(kind):
    rng = np.random.default_rng(7)
    masks = np.zeros((6, 20, 24), bool)
    masks[0, 2:5, 3:9] = masks[0, 5, 9] = masks[0, 15:19, 1] = True
    masks[2, 0:12, 0:12] = True
    masks[4, 19, 23] = masks[4, 0, 23] = True
    scores = rng.normal(size=masks.shape) + masks * rng.uniform(0, 3, size=masks.shape)
    if kind == "rounded":
        scores = np.round(scores, 1)
    elif kind == "coarse":
        scores = np.round(scores)
    elif kind == "float16":
        scores = np.round(scores, 2).astype(np.float16)
    elif kind == "constant":
        scores = np.full(masks.shape, 0.5, np.float32)
    elif kind == "perfect":
        scores = masks + 0.25
    elif kind == "inverted":
        scores = 1.0 - masks
    elif kind == "uint8":
        scores = np.clip(scores * 40 + 80, 0, 255).astype(np.uint8)
    elif kind == "mostly defective":
        masks = ~masks
        scores = np.round(scores, 1).astype(np.float32)
    return scores, masks


KINDS = ["distinct", "rounded", "coarse", "float16", "uint8", "constant", "perfect", "inverted", "mostly defective"]


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_metrics_are_the_oracles(kind):
    scores, masks = _case(kind)
    ranking = metrics.rank(scores, masks)
    truth, flat = masks.ravel(), scores.ravel().astype(np.float64)
    fpr, tpr, _ = sk.roc_curve(truth, flat, drop_intermediate=False)
    assert metrics.pixel_auroc(ranking) == pytest.approx(sk.roc_auc_score(truth, flat), abs=1e-13)
    assert metrics.pixel_auroc_fpr30(ranking) == pytest.approx(_oracle_area(fpr, tpr, 0.3), abs=1e-13)
    assert metrics.average_precision(ranking) == pytest.approx(sk.average_precision_score(truth, flat), abs=1e-13)
    fpr, pro = _oracle_pro(scores, masks)
    for limit in (0.3, 0.05, 1.0):
        assert metrics.aupro(ranking, limit) == pytest.approx(_oracle_area(fpr, pro, limit), abs=1e-13)


def test_constant_scores_give_the_diagonal_and_perfect_ones_give_one():
    constant, perfect, inverted = (metrics.rank(*_case(kind)) for kind in ("constant", "perfect", "inverted"))
    assert metrics.pixel_auroc(constant) == pytest.approx(0.5)
    assert metrics.pixel_auroc_fpr30(constant) == pytest.approx(0.15)
    assert metrics.aupro(constant, 0.05) == pytest.approx(0.025)
    assert metrics.average_precision(constant) == pytest.approx(_case("constant")[1].mean())
    assert metrics.pixel_auroc(perfect) == metrics.aupro(perfect, 0.3) == metrics.average_precision(perfect) == 1.0
    assert metrics.pixel_auroc(inverted) == metrics.aupro(inverted, 0.3) == 0.0


def test_pro_by_hand():
    # Regions of 1 and of 4 pixels, 10 good pixels in each of two images; the second image has no defect.
    masks = [np.array([[1, 0, 1, 1, 1, 1] + [0] * 9], bool), np.zeros((1, 10), bool)]
    scores = [np.array([[9, 0, 5, 5, 2, 2] + [7] + [0] * 8], float), np.array([[5, 2, 2, 1] + [0] * 6], float)]
    # From above: 9 is the small region, 7 one good pixel, 5 half the large region and one good pixel, 2 the rest, two.
    x, y = np.array([0, 0, 1, 2, 4, 20]) / 20, [0, 0.5, 0.5, 0.75, 1, 1]
    ranking = metrics.rank(scores, masks)
    assert metrics.aupro(ranking, 1.0) == pytest.approx(np.trapezoid(y, x))
    # The limit cuts the segment from (2/20, 0.75) to (4/20, 1) in its middle.
    assert metrics.aupro(ranking, 0.15) == pytest.approx((0.05 * 0.5 + 0.05 * 0.625 + 0.05 * 0.8125) / 0.15)


def test_a_tiny_region_weighs_as_much_as_a_huge_one():
    masks = np.zeros((1, 60, 60), bool)
    masks[0, :50, :50] = True
    masks[0, 59, 59] = True
    only_huge, only_tiny = masks.astype(float), masks.astype(float)
    only_huge[0, 59, 59] = only_tiny[0, :50, :50] = -1
    for scores in (only_huge, only_tiny):
        assert metrics.aupro(metrics.rank(scores, masks), 0.3) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["distinct", "coarse", "mostly defective"])
def test_monotone_maps_change_nothing(kind):
    scores, masks = _case(kind)
    before = metrics.rank(scores, masks)
    for mapped in (np.exp(scores), 1e6 * scores.astype(np.float64) - 3, np.arctan(scores.astype(np.float64))):
        for a, b in zip(before, metrics.rank(mapped, masks), strict=True):
            np.testing.assert_array_equal(a, b)


def test_counts_above_two_to_the_24_are_exact():
    # 2^24 + 1 is the first integer that float32 cannot hold.
    good = 2**24 + 5
    scores = np.zeros((1, 1, good + 3), np.float16)
    masks = np.zeros(scores.shape, bool)
    scores[0, 0, -6:] = [2, 2, 1, 2, 1, 0]
    masks[0, 0, -3:] = True
    ranking = metrics.rank(scores, masks)
    assert ranking.fp.dtype == ranking.tp.dtype == np.int64
    assert ranking.fp.tolist() == [0, 0, 2, 2, 3, 3, good, good]
    assert ranking.tp.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    area = (2 * 0.5 + 1 * 1.5 + (good - 3) * 2.5) / (3 * good)
    assert metrics.pixel_auroc(ranking) == pytest.approx(area, abs=1e-15)


def test_float64_scores_keep_their_order():
    scores = np.array([[[1.0, 1.0 + 1e-12]]])
    assert metrics.pixel_auroc(metrics.rank(scores, np.array([[[False, True]]]))) == 1.0


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.01, float("nan")])
def test_aupro_refuses_other_limits(limit):
    with pytest.raises(ValueError, match="limit"):
        metrics.aupro(metrics.rank(*_case("coarse")), limit)


def test_curve_passes_through_the_oracles_points():
    scores, masks = _case("rounded")
    truth, flat = masks.ravel(), scores.ravel()
    full = metrics.curve(metrics.rank(scores, masks))
    assert [field[0] for field in full] == [0, 0, 0, 1]
    assert [field[-1] for field in full] == [1, 1, 1, pytest.approx(masks.mean())]
    assert all(np.all(np.diff(field) >= 0) for field in full[:3])
    labelled, count = metrics.regions(masks)
    for threshold in np.unique(flat[truth]):
        called = flat >= threshold
        pro = np.mean([called[labelled.ravel() == k].mean() for k in range(1, count + 1)])
        point = [called[~truth].mean(), called[truth].mean(), pro, truth[called].mean()]
        assert np.isclose(np.stack(full, axis=1), point, rtol=0, atol=1e-12).all(axis=1).any()


@pytest.mark.parametrize("crowded", [False, True])
def test_thin_keeps_the_ends_and_the_shape(crowded):
    full = metrics.curve(metrics.rank(*_case("distinct")))
    if crowded:  # nearly all vertices in the first thousandth: every n-th vertex would miss the rest
        fpr = np.concatenate([np.linspace(0, 1e-3, 1000), np.linspace(1e-3, 1, 40)])
        full = metrics.Curve(fpr, np.sqrt(fpr), np.sqrt(fpr), 1 - fpr)
    few = metrics.thin(full, 50)
    assert 25 < few.fpr.size <= 50 < full.fpr.size
    for thinned, whole in zip(few, full, strict=True):
        assert (thinned[0], thinned[-1]) == (whole[0], whole[-1])
    # No point of the curve is further from the thinned one than one step along it, 3 / 49.
    x = np.linspace(0, 1, 999)
    assert np.abs(np.interp(x, few.fpr, few.tpr) - np.interp(x, full.fpr, full.tpr)).max() < 3 / 49
    assert metrics.thin(full, 10**6).fpr.size <= full.fpr.size
    with pytest.raises(ValueError, match="2 points"):
        metrics.thin(full, 1)


def test_regions_are_8_connected_and_numbered_across_images():
    masks = np.zeros((3, 4, 5), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 4] = True
    masks[2, 0, 0] = True
    labels, count = metrics.regions(masks)
    assert count == 3
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels > 0, masks)
    assert labels[0, 0, 0] == labels[0, 1, 1]
    assert {labels[0, 0, 0], labels[0, 3, 4], labels[2, 0, 0]} == {1, 2, 3}
    np.testing.assert_array_equal(metrics.regions([*masks])[0], labels)


def test_regions_of_neighbouring_images_do_not_join():
    assert metrics.regions(np.ones((3, 2, 2), bool))[1] == 3


def test_image_auroc_is_scikit_learns():
    rng = np.random.default_rng(3)
    labels = rng.random(80) < 0.4
    scores = np.round(rng.normal(size=80) + labels, 1)
    assert metrics.image_auroc(scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-14)
    assert metrics.image_auroc(scores, labels.astype(int)) == metrics.image_auroc(scores, labels)
    assert np.isnan(metrics.image_auroc(scores, np.ones(80, bool)))


def test_confusion_by_hand():
    predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1], bool)
    actual = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 1], bool)
    counts = metrics.confusion(predicted, actual)
    assert counts == (3, 1, 5, 1)
    assert (counts.accuracy, counts.tpr, counts.tnr) == (0.8, 0.75, 5 / 6)
    assert (counts.f1, counts.dice, counts.iou) == (0.75, 0.75, 0.6)
    empty = metrics.confusion(np.zeros(4, bool), np.zeros(4, bool))
    assert np.isnan([empty.tpr, empty.f1, empty.iou]).all()
    assert empty.tnr == empty.accuracy == 1


def _found_case():
    masks, predicted = np.zeros((2, 2, 12, 12), bool)
    masks[0, 0:2, 0:5] = True  # 10 pixels; two predicted regions touch it: 2 + 3 pixels, 1 outside
    predicted[0, 0, 0:2] = True
    predicted[0, 1, 3:6] = True
    masks[0, 8:10, 8:10] = True  # 4 pixels; its predicted region has 12, 4 of them inside: IoU 1/3
    predicted[0, 8:11, 8:12] = True
    masks[1, 0:2, 0:5] = True  # 10 pixels, 3 found: IoU exactly 0.3
    predicted[1, 0, 0:3] = True
    masks[1, 5, 5] = True  # a neighbour, by its corner, of a predicted region, no shared pixel
    predicted[1, 6, 6] = True
    predicted[1, 11, 0] = predicted[1, 10, 1] = True  # one region, by its corners
    return masks, predicted


def test_found_defects_by_hand():
    masks, predicted = _found_case()
    # IoU: 4 / 11 with both predicted regions (2 / 10 or 2 / 11 with one), 1 / 3, 0.3, 0.
    assert metrics.defects_found(masks, predicted) == {"iou_0": 3 / 4, "iou_30": 2 / 4}
    assert metrics.defects_found(list(masks), list(predicted)) == {"iou_0": 3 / 4, "iou_30": 2 / 4}
    assert metrics.defects_found(masks, np.zeros_like(masks)) == {"iou_0": 0, "iou_30": 0}
    assert metrics.defects_found(masks, masks) == {"iou_0": 1, "iou_30": 1}
    assert np.isnan(list(metrics.defects_found(np.zeros_like(masks), predicted).values())).all()


def test_one_predicted_region_over_two_defects_counts_whole_for_both():
    masks, predicted = np.zeros((2, 1, 1, 20), bool)
    masks[0, 0, 0:2] = masks[0, 0, 8:20] = True
    predicted[0, 0, :] = True
    # 2 / 20 and 12 / 20.
    assert metrics.defects_found(masks, predicted) == {"iou_0": 1, "iou_30": 0.5}


def test_false_regions_by_hand():
    masks, predicted = _found_case()
    assert metrics.false_regions(masks, predicted) == 2 / 2
    assert metrics.false_regions(masks, masks) == 0
    assert metrics.false_regions(np.zeros_like(masks), predicted) == 6 / 2
    assert metrics.false_regions([*masks, masks[0] & False, masks[0] & False], [*predicted] * 2) == 8 / 4


KEYS = {
    "pixel_auroc", "pixel_auroc_fpr30", "aupro_30", "aupro_05", "pixel_ap", "aupimo", "pixel_iou", "pixel_dice",
    "image_auroc", "found_fpr_01", "found_fpr_05",
    "image_accuracy", "image_accuracy_calibrated", "image_tpr", "image_tnr", "image_f1", "defects_found",
    "false_regions_per_image", "false_regions_per_good_image", "threshold", "image_threshold",
}  # fmt: skip


def _maps():
    masks = np.zeros((4, 8, 8), bool)
    masks[0, 0:2, 0:2] = masks[1, 0:2, 0:2] = True
    raw = np.random.default_rng(1).random(masks.shape) + 0.4 * masks
    opened = np.zeros(masks.shape)
    opened[0, 0, 0:2] = 0.9  # found
    opened[1, 5, 5] = 0.4  # missed, but a false region is above the threshold
    opened[2, 1, 1] = 0.3  # exactly at the threshold: good
    opened[3, 1, 1] = 0.5  # false alarm
    return raw, opened, masks


def _oracle_aupimo(scores, masks, labels, low, high):
    """Of each defective image, from the definition: thresholds one by one, and the recall between any two rates that they have."""
    thresholds = [-np.inf, *np.unique(np.concatenate([np.ravel(image) for image in scores]))]
    good = [image for image, label in zip(scores, labels, strict=True) if not label]
    rates = np.array([np.mean([np.mean(image > t) for image in good]) for t in thresholds])
    edges = np.unique([low, high, *rates[(rates > low) & (rates < high)]])
    areas = []
    for image in (scores[i][masks[i]] for i in np.flatnonzero(labels)):
        area = 0.0
        for a, b in itertools.pairwise(edges):
            lowest = thresholds[np.flatnonzero(rates <= np.sqrt(a * b))[0]]
            area += (np.log10(b) - np.log10(a)) * np.mean(image > lowest)
        areas.append(area / (np.log10(high) - np.log10(low)))
    return areas


# With few pixels the bounds are wide: of three good images one pixel is 1 / 1440 of the rate, or more.
WIDE = {"low": 0.002, "high": 0.3}


@pytest.mark.parametrize("kind", ["distinct", "rounded", "coarse", "float16", "uint8", "constant", "perfect", "sizes"])
def test_aupimo_is_the_oracles(kind):
    scores, masks = _case("distinct" if kind == "sizes" else kind)
    labels = masks.any((1, 2))
    if kind == "sizes":
        scores, masks = ([a[i][:, i % 4 * 4 :] for i in range(6)] for a in (scores, masks))
    found = metrics.aupimo(scores, masks, labels, **WIDE)
    assert (found.dtype, found.shape) == (np.float64, (6,))
    assert np.isnan(found[~labels]).all()
    np.testing.assert_allclose(found[labels], _oracle_aupimo(scores, masks, labels, **WIDE), atol=1e-12)
    assert found[labels].min() >= 0
    assert found[labels].max() <= 1
    assert kind in ("constant", "perfect") or 0.05 < np.mean(found[labels]) < 0.95
    np.testing.assert_array_equal(metrics.aupimo([*scores], [*masks], labels, **WIDE), found)


def test_aupimo_by_hand():
    # 1e5 good pixels: the strongest one may be counted from 1e-5 on, the second from 2e-5 on, no further one up to 1e-4.
    good = np.zeros((2, 100, 500))
    good[0, 3, 4], good[1, 0, 0], good[1, 5:10, 5:10] = 9, 7, 5
    bad = np.zeros((1, 100, 500))
    bad[0, 0, :4] = [8, 7, 6, 5]
    # Neither good pixels of a defective image count, nor what a mask says of a good image.
    bad[0, 50:] = 20
    scores, masks = np.concatenate([good, bad]), np.zeros((3, 100, 500), bool)
    masks[2, 0, :4] = masks[0, 3, 4] = True
    # Above 7, to be used from 1e-5 to 2e-5, is the 8; above 5, to be used from there on, the 7 and the 6 too.
    area = np.log10(2) * 1 / 4 + (1 - np.log10(2)) * 3 / 4
    np.testing.assert_allclose(metrics.aupimo(scores, masks, [0, 0, 1]), [np.nan, np.nan, area])
    # One good pixel less, and it is more than 1e-5.
    short = [good[0], good[1, :, :499], bad[0]], [masks[0], masks[1, :, :499], masks[2]]
    assert np.isnan(metrics.aupimo(*short, [0, 0, 1])).all()
    assert np.isnan(metrics.aupimo(scores, masks, [1, 1, 1])).all()
    assert np.isnan(metrics.aupimo(scores, masks & False, [0, 0, 1])).all()
    results = metrics.evaluate(scores, scores, masks, [0, 0, 1], threshold=0.0, image_threshold=0.0)
    assert results["aupimo"] == pytest.approx(area)
    for bounds in ({"low": 0.0}, {"low": 1e-4}, {"high": 1.0}):
        with pytest.raises(ValueError, match="bounds"):
            metrics.aupimo(scores, masks, [0, 0, 1], **bounds)
    with pytest.raises(ValueError, match="One label"):
        metrics.aupimo(scores, masks, [0, 1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.aupimo(np.where(masks, np.inf, scores), masks, [0, 0, 1])


def test_found_at_false_alarms_by_hand():
    good, bad = np.arange(40.0), np.array([50, 38, 37.5, 37, 1])
    scores, labels = np.concatenate([good, bad]), np.arange(45) >= 40
    # 5 % of 40 are two false alarms, 39 and 38.
    assert metrics.false_alarm_limit(good, 5) == 37
    assert metrics.found_at_false_alarms(scores, labels, 5) == 3 / 5
    # 59 images allow no more than 58 at 5 %, and 100 are enough for 1 %, 99 are not.
    assert [metrics.false_alarm_limit(np.arange(n), 5) for n in (19, 20, 59, 60)] == [
        pytest.approx(np.nan, nan_ok=True),
        18,
        56,
        56,
    ]
    assert metrics.false_alarm_limit(np.arange(100), 1) == 98
    assert np.isnan(metrics.false_alarm_limit(np.arange(99), 1))
    # Whole numbers: 2900 * 0.01 is 28.99... in floating point.
    assert metrics.false_alarm_limit(np.arange(2900), 1) == 2870
    # Ties: with the third strongest, four images are at the limit or above, but none of the two more is a false alarm.
    assert metrics.false_alarm_limit(np.array([*range(36), 37, 37, 37, 39]), 5) == 37
    for none in (np.zeros(45, bool), np.ones(45, bool), np.arange(45) >= 19):
        assert np.isnan(metrics.found_at_false_alarms(scores, none, 5))
    found = metrics.image_metrics(scores, labels, 0.5)
    assert found["found_fpr_05"] == 3 / 5
    assert np.isnan(found["found_fpr_01"])


def evaluate(raw, opened, masks, **thresholds):
    return metrics.evaluate(raw, opened, masks, [mask.any() for mask in masks], **thresholds)


def test_evaluate_by_hand():
    raw, opened, masks = _maps()
    results = evaluate(raw, opened, masks, threshold=0.3, image_threshold=0.9)
    assert set(results) == KEYS
    assert {type(value) for key, value in results.items() if key != "defects_found"} == {float}
    ranking = metrics.rank(raw, masks)
    assert results["pixel_auroc"] == metrics.pixel_auroc(ranking)
    assert results["pixel_auroc_fpr30"] == metrics.pixel_auroc_fpr30(ranking)
    assert (results["aupro_30"], results["aupro_05"]) == (metrics.aupro(ranking, 0.3), metrics.aupro(ranking, 0.05))
    assert results["pixel_ap"] == metrics.average_precision(ranking)
    assert results["pixel_iou"] == 2 / 10
    assert results["pixel_dice"] == 4 / 12
    assert results["image_auroc"] == 3 / 4
    assert results["image_accuracy"] == 3 / 4
    assert results["image_accuracy_calibrated"] == 1 / 2
    assert (results["image_tpr"], results["image_tnr"], results["image_f1"]) == (1, 1 / 2, 4 / 5)
    assert results["defects_found"] == {"iou_0": 1 / 2, "iou_30": 1 / 2}
    assert results["false_regions_per_image"] == 2 / 4
    assert results["false_regions_per_good_image"] == 1 / 2
    assert (results["threshold"], results["image_threshold"]) == (0.3, 0.9)


def test_the_labels_say_which_images_are_anomalous():
    raw, opened, masks = _maps()
    results = metrics.evaluate(raw, opened, masks, [0, 0, 1, 1], threshold=0.3, image_threshold=0.9)
    assert (results["image_auroc"], results["image_tnr"], results["false_regions_per_good_image"]) == (1 / 4, 0, 1 / 2)
    assert results["pixel_auroc"] == evaluate(raw, opened, masks, threshold=0.3, image_threshold=0.9)["pixel_auroc"]
    with pytest.raises(ValueError, match="label"):
        metrics.evaluate(raw, opened, masks, [0, 1, 1], threshold=0.3, image_threshold=0.9)


def test_evaluate_takes_images_of_different_sizes():
    raw, opened, masks = _maps()
    stacked = evaluate(raw, opened, masks, threshold=0.3, image_threshold=0.45)
    cut = [slice(None), slice(None), slice(4), slice(6)]
    listed = [[image[:, s] for image, s in zip(maps, cut, strict=True)] for maps in (raw, opened, masks)]
    results = evaluate(*listed, threshold=0.3, image_threshold=0.45)
    image_keys = [key for key in KEYS if key.startswith(("image_", "defects_", "false_"))]
    assert {key: results[key] for key in image_keys} == {key: stacked[key] for key in image_keys}
    flat, _, truth = (np.concatenate([image.ravel() for image in images]) for images in listed)
    assert results["pixel_auroc"] == pytest.approx(sk.roc_auc_score(truth, flat))
    assert results["aupro_30"] == pytest.approx(_oracle_area(*_oracle_pro(listed[0], listed[2]), 0.3))
    again = evaluate(list(raw), list(opened), list(masks), threshold=0.3, image_threshold=0.45)
    np.testing.assert_equal(again, stacked)


def test_thresholds_are_not_rounded_to_the_maps_type():
    raw, opened, masks = _maps()
    value = np.float16(0.3)
    opened = np.where(opened == 0.3, value, 0).astype(np.float16)
    just_below = float(value) - 1e-6
    results = evaluate(raw, opened, masks, threshold=just_below, image_threshold=1.0)
    assert results["image_tnr"] == 1 / 2
    assert results["false_regions_per_image"] == 1 / 4


def test_image_metrics_are_those_of_evaluate():
    raw, opened, masks = _maps()
    results = evaluate(raw, opened, masks, threshold=0.3, image_threshold=0.3)
    alone = metrics.image_metrics(opened.max((1, 2)), masks.any((1, 2)), 0.3)
    np.testing.assert_equal(
        alone, {key: value for key, value in results.items() if key.startswith(("image_", "found_"))}
    )


def test_without_defects_or_without_good_images_the_rest_is_still_given():
    raw, opened, masks = _maps()
    no_defect = evaluate(raw, opened, masks & False, threshold=0.3, image_threshold=0.45)
    assert np.isnan(list(no_defect.pop("defects_found").values())).all()
    both = {"pixel_auroc", "pixel_auroc_fpr30", "aupro_30", "aupro_05", "image_auroc", "aupimo"}
    both |= {"found_fpr_01", "found_fpr_05"}
    assert {key for key, value in no_defect.items() if np.isnan(value)} == both | {"pixel_ap", "image_tpr"}
    bad = evaluate(raw, opened, masks | True, threshold=0.3, image_threshold=0.45)
    assert bad.pop("defects_found") == {"iou_0": 3 / 4, "iou_30": 0}
    assert {key for key, value in bad.items() if np.isnan(value)} == both | {
        "image_tnr",
        "false_regions_per_good_image",
    }
    assert bad["pixel_ap"] == 1
    everywhere = metrics.curve(metrics.rank(raw, masks & False))
    assert np.isnan(everywhere.tpr).all()
    assert not np.isnan(everywhere.fpr).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    raw, _, masks = _maps()
    broken = raw.copy()
    broken[0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.rank(broken, masks)
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate(raw, broken, masks, threshold=0.3, image_threshold=0.3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.image_auroc(np.array([0.0, bad]), np.array([True, False]))


def test_wrong_shapes_and_types_are_refused():
    raw, opened, masks = _maps()
    with pytest.raises(ValueError, match="differ"):
        metrics.rank(raw[:, :4], masks)
    with pytest.raises(ValueError, match="differ"):
        evaluate(raw, opened[:3], masks, threshold=0.3, image_threshold=0.3)
    with pytest.raises(ValueError, match="differ"):
        metrics.confusion(np.ones(1, bool), np.ones(3, bool))
    for measure in (metrics.false_regions, metrics.defects_found):
        with pytest.raises(ValueError, match="differ"):
            measure(masks, np.zeros((*masks.shape[:2], masks.shape[2] + 1), bool))
    with pytest.raises(ValueError, match="bool"):
        metrics.rank(raw, masks.astype(np.uint8))
    with pytest.raises(ValueError, match="bool"):
        metrics.confusion(raw, masks)
    with pytest.raises(ValueError, match="no image"):
        metrics.rank([], [])
    with pytest.raises(ValueError, match="bool image"):
        metrics.regions(masks[0])
    with pytest.raises(ValueError, match="label"):
        metrics.image_auroc(np.zeros(3), np.zeros(4, bool))
    with pytest.raises(ValueError, match="threshold is NaN"):
        evaluate(raw, opened, masks, threshold=float("nan"), image_threshold=0.3)


def _oracle_contrast(image, region, touched, reach):
    """Shift by shift, pixel by pixel."""
    rows, columns = np.nonzero(region)
    means = []
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            r, c = rows + down, columns + right
            inside = (r >= 0) & (r < image.shape[0]) & (c >= 0) & (c < image.shape[1])
            if inside.all() and not touched[r, c].any():
                means.append(np.float64(image[r, c]).mean())
    expected = np.median(means)
    noise = max(1.4826 * np.median(np.abs(means - expected)), (12 * region.sum()) ** -0.5)
    return abs(np.float64(image[region]).mean() - expected) / noise


@pytest.mark.parametrize("kind", ["blob", "scratch", "border", "flat", "two"])
def test_contrast_to_noise_is_the_oracles(kind):
    rng = np.random.default_rng(3)
    image = rng.integers(90, 110, (70, 81), np.uint8)
    region = np.zeros(image.shape, bool)
    if kind == "scratch":
        region[np.arange(20, 44), np.arange(10, 34)] = True
    else:
        region[30:36, 40:49] = True
        region[36, 41:44] = True
    if kind == "border":
        region = np.roll(region, (-30, -40), (0, 1))
    image[region] += 4
    mask = region.copy()
    if kind == "two":
        # Elsewhere, smaller and much brighter: nothing of it counts.
        mask[20:25, 30:34] = True
        image[20:25, 30:34] = 255
    if kind == "flat":
        image = np.where(region, 103, 100).astype(np.uint8)
    reach = {"scratch": 48}.get(kind, 18)
    found = metrics.contrast_to_noise(image, mask)
    assert found == pytest.approx(_oracle_contrast(image, region, mask, reach), rel=1e-9)
    assert metrics.contrast_to_noise(image.T, mask.T) == pytest.approx(found, rel=1e-9)
    assert metrics.contrast_to_noise(255 - image, mask) == pytest.approx(found, rel=1e-9)
    if kind == "flat":
        assert found == pytest.approx(3 * np.sqrt(12 * region.sum()))


def test_a_patterns_own_variation_hides_a_defect():
    """The same step of brightness: far above a plain plate's variation, and not above that of bumps of its own size."""
    rng, mask = np.random.default_rng(0), np.zeros((96, 96), bool)
    mask[44:52, 44:52] = True
    plain = rng.normal(100, 5, mask.shape)
    bumps = 12 * np.sin(np.arange(96) * np.pi / 8)
    patterned = plain + bumps * bumps[:, None] / 12
    steps = [metrics.contrast_to_noise(plate + 3 * mask, mask) for plate in (plain, patterned)]
    assert steps[0] > 3
    assert steps[1] < 2
    # The mean of 64 pixels with a spread of 5 varies by 0.625.
    found = [metrics.contrast_to_noise(rng.normal(100, 5, mask.shape) + 6.25 * mask, mask) for _ in range(40)]
    assert np.mean(found) == pytest.approx(10, rel=0.15)


def test_contrast_needs_a_region_and_surroundings():
    image, mask = np.zeros((40, 40), np.uint8), np.zeros((40, 40), bool)
    assert np.isnan(metrics.contrast_to_noise(image, mask))
    mask[2:38, 2:38] = True
    assert np.isnan(metrics.contrast_to_noise(image, mask))
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.contrast_to_noise(image[1:], mask)


def test_found_by_contrast_by_hand():
    ratios = np.array([0, 0.99, 1, 2, 2.99, 5, 80, np.nan])
    found = np.array([0, 1, 1, 0, 1, 1, 1, 1], bool)
    want = {"<1": (2, 0.5), "1-2": (1, 1.0), "2-3": (2, 0.5), "3-5": (0, np.nan), ">5": (2, 1.0)}
    want = {name: {"images": n, "found": share} for name, (n, share) in want.items()}
    np.testing.assert_equal(metrics.found_by_contrast(ratios, found), want)
    unknown = metrics.found_by_contrast(ratios, None)
    assert [b["images"] for b in unknown.values()] == [2, 1, 2, 0, 2]
    assert np.isnan([b["found"] for b in unknown.values()]).all()

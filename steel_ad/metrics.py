"""Exact evaluation metrics: numpy arrays on the host in, plain floats out.

Definitions: SPEC section 6. PRO, its 8-connected regions and the integration up to a limit are those of Bergmann et
al. 2021 ("The MVTec Anomaly Detection Dataset", IJCV 129), average precision is scikit-learn's. Nothing is binned or
sampled.

Everywhere a higher score means more anomalous, and a decision is `score > threshold`. `Images` is either one array
`[n, h, w]` or a list of `[h, w]` arrays, whose sizes may differ. A value that the data leave undefined (no defect, no
good pixel) is `float("nan")`; who writes JSON turns it into null.

    ranking = rank(scores, masks)      # the one sort, which every pixel metric shares
    pixel_auroc(ranking), aupro(ranking, 0.3), average_precision(ranking)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Images: TypeAlias = np.ndarray | Sequence[np.ndarray]

_EIGHT_CONNECTED = np.ones((3, 3), bool)


class Ranking(NamedTuple):
    """How many pixels lie at or above each threshold: the vertices of the ROC and PRO curves, from strict to lenient.

    Made by `rank`. Between two scores of defective pixels only `fp` moves, so two vertices for each distinct one of
    them (before and after its ties) are the whole curve. The first vertex is all zeros, the last one holds the totals.

    Attributes:
      fp: int64 [v], good pixels (of all images) called defective.
      tp: int64 [v], defective pixels called defective.
      overlap: float64 [v], sum over the true regions of the share of each that is called defective.
    """

    fp: np.ndarray
    tp: np.ndarray
    overlap: np.ndarray


class Curve(NamedTuple):
    """ROC, PRO and precision-recall curves on common vertices, to be joined by straight lines; float64 [v] in [0, 1].

    `fpr`, `tpr` and `pro` do not fall. `precision` is 1 where nothing is called defective. A field is NaN throughout
    where it is undefined: `fpr` without good pixels, `tpr` and `pro` without defects.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    pro: np.ndarray
    precision: np.ndarray


class Confusion(NamedTuple):
    """Counts of decisions, and the ratios made of them; each ratio is NaN where its denominator is 0."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, sum(self))

    @property
    def tpr(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def tnr(self) -> float:
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """The same number as F1, by the name that segmentation uses."""
        return self.f1


def regions(masks: Images) -> tuple[Images, int]:
    """Numbers the 8-connected regions of the masks.

    Args:
      masks: bool [n, h, w], or a sequence of bool [h, w].

    Returns:
      int32 labels in the form of `masks`, 0 outside, 1..R unique across the images; and R.

    Raises:
      ValueError: the masks are not bool images.
    """
    from scipy import ndimage  # half a second that a start of training need not wait for

    masks = _images(masks)
    _check_masks(masks)
    labels: Images
    if isinstance(masks, np.ndarray):
        labels = np.zeros(masks.shape, np.int32)
    else:
        labels = [np.zeros(mask.shape, np.int32) for mask in masks]
    count = 0
    for mask, out in zip(masks, labels, strict=True):
        if mask.any():
            found = ndimage.label(mask, _EIGHT_CONNECTED, output=out)
            out[mask] += count
            count += found
    return labels, count


def rank(scores: Images, masks: Images) -> Ranking:
    """Sorts the pixels once, for every pixel metric.

    Args:
      scores: real [n, h, w], or a sequence of [h, w]; finite. float16 is ranked as float32, float64 as itself.
      masks: bool, of the same shapes; True is defective.

    Raises:
      ValueError: a score is NaN or infinite, the shapes differ, or the masks are not bool.
    """
    scores, masks = _images(scores), _images(masks)
    _check_masks(masks)
    _check_shapes(scores, masks)
    return _rank(scores, masks, regions(masks)[0])


def curve(ranking: Ranking) -> Curve:
    """The exact curves behind the pixel metrics, all vertices; see `thin` before drawing them."""
    called = ranking.fp + ranking.tp
    precision = np.divide(ranking.tp, called, out=np.ones(called.shape), where=called > 0)
    return Curve(_share(ranking.fp), _share(ranking.tp), _share(ranking.overlap), precision)


def thin(full: Curve, points: int) -> Curve:
    """At most `points` vertices of a curve, evenly along its length, with both ends; for figures, not for areas.

    Raises:
      ValueError: `points` is below 2.
    """
    if points < 2:
        raise ValueError(f"A curve needs at least 2 points, not {points}.")
    length = np.nan_to_num(full.fpr) + np.nan_to_num(full.tpr) + np.nan_to_num(full.pro)
    kept = np.searchsorted(length, np.linspace(0, length[-1], points))
    return Curve(*(field[np.unique(kept)] for field in full))


def pixel_auroc(ranking: Ranking) -> float:
    """Area under the ROC curve of all pixels of all images, in [0, 1]; NaN without good or without defective pixels."""
    return _area(_share(ranking.fp), _share(ranking.tp), 1.0)


def pixel_auroc_fpr30(ranking: Ranking) -> float:
    """Area under the pixels' ROC curve up to an FPR of 0.3, over 0.3; in [0, 1], 0.15 for chance; NaN as above."""
    return _area(_share(ranking.fp), _share(ranking.tp), 0.3)


def aupro(ranking: Ranking, limit: float = 0.3) -> float:
    """Area under the PRO curve up to an FPR of `limit`, over `limit` (Bergmann et al. 2021), in [0, 1].

    PRO is the share of a true region that is called defective, averaged over the 8-connected regions of all images
    with equal weight; the FPR counts the good pixels of all images, defective images included. NaN without regions or
    without good pixels.

    Raises:
      ValueError: `limit` is outside (0, 1].
    """
    if not 0 < limit <= 1:
        raise ValueError(f"The FPR limit has to lie in (0, 1], not {limit}.")
    return _area(_share(ranking.fp), _share(ranking.overlap), limit)


def average_precision(ranking: Ranking) -> float:
    """Sum of precision times gain in recall over the distinct scores (scikit-learn's definition), in [0, 1].

    Ties are one step, nothing is interpolated. NaN without defective pixels.
    """
    full = curve(ranking)
    return float(np.sum(np.diff(full.tpr) * full.precision[1:]))


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of the images, in [0, 1]; NaN unless there are good and anomalous images.

    Args:
      scores: real [n], finite.
      labels: bool [n], True is anomalous.

    Raises:
      ValueError: a score is NaN or infinite, or the shapes differ.
    """
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"One score and one label an image are needed, not {scores.shape} and {labels.shape}.")
    return pixel_auroc(_rank(scores, labels, labels.astype(np.int32)))


def confusion(predicted: Images, actual: Images) -> Confusion:
    """Counts true and false positives and negatives of pixels or of images.

    Args:
      predicted: bool, any shape, or a sequence of bool images.
      actual: bool, the same shapes.

    Raises:
      ValueError: the shapes differ, or one of the two is not bool.
    """
    predicted, actual = _images(predicted), _images(actual)
    _check_shapes(predicted, actual)
    guess, truth = _flat(predicted), _flat(actual)
    if guess.dtype != bool or truth.dtype != bool:
        raise ValueError(f"Decisions have to be bool, not {guess.dtype} and {truth.dtype}.")
    tp = int(np.count_nonzero(guess & truth))
    fp = int(np.count_nonzero(guess)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Confusion(tp=tp, fp=fp, tn=guess.size - tp - fp - fn, fn=fn)


def defects_found(masks: Images, predicted: Images) -> dict[str, float]:
    """Share of the true regions that are found, by two rules.

    The IoU of a true region is taken against the union of the predicted regions that touch it. Regions are 8-connected,
    and two regions touch where they share a pixel; being neighbours is not enough.

    Args:
      masks: bool [n, h, w] or a sequence of bool [h, w], the truth.
      predicted: bool, the same shapes.

    Returns:
      `iou_0` and `iou_30`, the shares with an IoU > 0 and > 0.3, in [0, 1]; NaN both without true regions.

    Raises:
      ValueError: the shapes differ, or one of the two is not bool.
    """
    masks, predicted = _images(masks), _images(predicted)
    _check_shapes(masks, predicted)
    true_labels, true_count = regions(masks)
    found_labels, found_count = regions(predicted)
    true, found = _flat(true_labels), _flat(found_labels)
    if true_count == 0:
        return {"iou_0": float("nan"), "iou_30": float("nan")}
    true_sizes = np.bincount(true[true > 0], minlength=true_count + 1)[1:]
    found_sizes = np.bincount(found[found > 0], minlength=found_count + 1)
    both = (true > 0) & (found > 0)
    # A pair of touching regions counts once, however many pixels the two share.
    pairs, shared = np.unique(true[both].astype(np.int64) * (found_count + 1) + found[both], return_counts=True)
    region, touching = pairs // (found_count + 1) - 1, pairs % (found_count + 1)
    overlap = np.bincount(region, shared, minlength=true_count)
    touching_size = np.bincount(region, found_sizes[touching], minlength=true_count)
    iou = overlap / (true_sizes + touching_size - overlap)
    return {"iou_0": float(np.mean(iou > 0)), "iou_30": float(np.mean(iou > 0.3))}


def false_regions(masks: Images, predicted: Images) -> float:
    """Mean number per image, over all images, of predicted 8-connected regions that hold no defective pixel.

    Args:
      masks: bool [n, h, w] or a sequence of bool [h, w], the truth.
      predicted: bool, the same shapes.

    Raises:
      ValueError: the shapes differ, one of the two is not bool, or there is no image.
    """
    masks, predicted = _images(masks), _images(predicted)
    _check_masks(masks)
    _check_shapes(masks, predicted)
    labels, count = regions(predicted)
    touching = np.unique(_flat(labels)[_flat(masks)])
    return (count - int(np.count_nonzero(touching))) / len(masks)


def evaluate(
    raw: Images, opened: Images, masks: Images, labels: np.ndarray, *, threshold: float, image_threshold: float
) -> dict[str, Any]:
    """Every metric of a detector that gives a map.

    Args:
      raw: real [n, h, w], or a sequence of [h, w]; the residual maps, finite.
      opened: real, the same shapes; the maps after post-processing. The mask is `opened > threshold`, the score of an
        image is its maximum.
      masks: bool, the same shapes; the truth.
      labels: bool [n], True is anomalous.
      threshold: of the pixels; an image with any pixel above it counts as anomalous (the thesis' rule).
      image_threshold: of the images' scores, calibrated separately.

    Returns:
      By name, floats: `pixel_auroc`, `pixel_auroc_fpr30`, `aupro_30`, `aupro_05`, `pixel_ap` of the raw maps;
      `pixel_iou`, `pixel_dice`, `false_regions_per_image`, `false_regions_per_good_image` (NaN without good images) of
      the mask; `threshold`; what `image_metrics` returns at
      `threshold`, save `image_accuracy_calibrated` and `image_threshold`, which are of `image_threshold`.
      `defects_found` is the dict of the function of that name.

    Raises:
      ValueError: a score is NaN or infinite, a threshold is NaN, the shapes differ, the masks are not bool, or there is
        no image.
    """
    raw, opened, masks = _images(raw), _images(opened), _images(masks)
    ranking = rank(raw, masks)
    _check_shapes(opened, masks)
    _check_finite(_flat(opened))
    scores = np.array([image.max() for image in opened], np.float64)
    labels = np.asarray(labels, bool)
    # A Python float would be rounded to the maps' type before the comparison.
    exact_threshold = np.float64(threshold)
    predicted = opened > exact_threshold if isinstance(opened, np.ndarray) else [o > exact_threshold for o in opened]
    pixels = confusion(predicted, masks)
    calibrated = image_metrics(scores, labels, image_threshold)
    good = [[image for image, label in zip(images, labels, strict=True) if not label] for images in (masks, predicted)]
    return {
        "pixel_auroc": pixel_auroc(ranking),
        "pixel_auroc_fpr30": pixel_auroc_fpr30(ranking),
        "aupro_30": aupro(ranking, 0.3),
        "aupro_05": aupro(ranking, 0.05),
        "pixel_ap": average_precision(ranking),
        "pixel_iou": pixels.iou,
        "pixel_dice": pixels.dice,
        **image_metrics(scores, labels, threshold),
        "image_accuracy_calibrated": calibrated["image_accuracy"],
        "image_threshold": float(image_threshold),
        "defects_found": defects_found(masks, predicted),
        "false_regions_per_image": false_regions(masks, predicted),
        "false_regions_per_good_image": false_regions(*good) if good[0] else float("nan"),
        "threshold": float(threshold),
    }


def image_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """The metrics of a classifier that gives one score an image.

    Args:
      scores: real [n], finite.
      labels: bool [n], True is anomalous.
      threshold: an image counts as anomalous where its score is above.

    Returns:
      `image_auroc`, `image_accuracy`, `image_tpr`, `image_tnr`, `image_f1`, in [0, 1] or NaN; and, so that all
      detectors share their columns, `image_accuracy_calibrated`, here the same as `image_accuracy`, and
      `image_threshold`.

    Raises:
      ValueError: a score is NaN or infinite, the threshold is NaN, or the shapes differ.
    """
    if np.isnan(threshold):
        raise ValueError("The threshold is NaN.")
    auroc = image_auroc(scores, labels)
    counts = confusion(np.asarray(scores) > np.float64(threshold), np.asarray(labels).astype(bool))
    return {
        "image_auroc": auroc,
        "image_accuracy": counts.accuracy,
        "image_accuracy_calibrated": counts.accuracy,
        "image_tpr": counts.tpr,
        "image_tnr": counts.tnr,
        "image_f1": counts.f1,
        "image_threshold": float(threshold),
    }


def _rank(scores: Images, masks: Images, labels: Images) -> Ranking:
    """`rank` of checked shapes, given the true regions."""
    flat, defective = _flat(scores), _flat(masks)
    _check_finite(flat)
    # numpy has vectorised sorts for float32 and float64, none for float16.
    dtype = np.result_type(flat.dtype, np.float32)
    negatives = flat[~defective].astype(dtype, copy=False)
    negatives.sort()
    values, group = np.unique(flat[defective].astype(dtype, copy=False), return_inverse=True)
    label = _flat(labels)[defective]
    weight = 1 / np.bincount(label, minlength=1)[label]

    good = negatives.size
    above = good - np.searchsorted(negatives, values, side="right")
    at_or_above = good - np.searchsorted(negatives, values, side="left")
    fp = np.stack([above[::-1], at_or_above[::-1]], axis=1).ravel()
    tp = np.bincount(group, minlength=values.size)[::-1].cumsum()
    overlap = np.bincount(group, weight, minlength=values.size)[::-1].cumsum()
    return Ranking(
        fp=np.concatenate([[0], fp, [good]]),
        tp=np.repeat(np.append(0, tp), 2),
        overlap=np.repeat(np.append(0.0, overlap), 2),
    )


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Trapezoid area under y(x) from x = 0 to `limit`, over `limit`; the segment across the limit is cut at it."""
    if np.isnan(x[-1]) or np.isnan(y[-1]):
        return float("nan")
    stop = int(np.searchsorted(x, limit, side="right"))
    area = np.trapezoid(y[:stop], x[:stop])
    if stop < x.size:
        rest = limit - x[stop - 1]
        area += rest * (y[stop - 1] + (y[stop] - y[stop - 1]) * rest / (x[stop] - x[stop - 1]) / 2)
    return float(area / limit)


def _share(counts: np.ndarray) -> np.ndarray:
    """Cumulative counts over their total; NaN where there is nothing to count."""
    return counts / counts[-1] if counts[-1] else np.full(counts.shape, np.nan)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _images(images: Images) -> Images:
    return [np.asarray(image) for image in images] if isinstance(images, Sequence) else np.asarray(images)


def _flat(images: Images) -> np.ndarray:
    return images.reshape(-1) if isinstance(images, np.ndarray) else np.concatenate([np.ravel(i) for i in images])


def _check_masks(masks: Images) -> None:
    if len(masks) == 0:
        raise ValueError("There is no image to evaluate.")
    for mask in masks:
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"A mask has to be a bool image [h, w], not {mask.dtype} {list(mask.shape)}.")


def _check_shapes(first: Images, second: Images) -> None:
    if _shapes(first) != _shapes(second):
        raise ValueError("The arrays to be compared differ in the number or in the shape of their images.")


def _shapes(images: Images) -> list[tuple[int, ...]]:
    if isinstance(images, np.ndarray):
        return [images.shape[1:]] * len(images)
    return [image.shape for image in images]


def _check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinite values.")

"""Areas under the curves of all pixels or of all images: one sort, from which every such metric follows."""

from typing import NamedTuple

import numpy as np

from steel_ad.metrics.images import Images, as_images, check_finite, check_masks, check_shapes, pixels_of, regions


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


def rank(scores: Images, masks: Images) -> Ranking:
    """Sorts the pixels once, for every pixel metric.

    Args:
      scores: real [n, h, w], or a sequence of [h, w]; finite. float16 is ranked as float32, float64 as itself.
      masks: bool, of the same shapes; True is defective.

    Raises:
      ValueError: a score is NaN or infinite, the shapes differ, or the masks are not bool.
    """
    scores, masks = as_images(scores), as_images(masks)
    check_masks(masks)
    check_shapes(scores, masks)
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


def _rank(scores: Images, masks: Images, labels: Images) -> Ranking:
    """`rank` of checked shapes, given the true regions."""
    flat, defective = pixels_of(scores), pixels_of(masks)
    check_finite(flat)
    # numpy has vectorised sorts for float32 and float64, none for float16.
    dtype = np.result_type(flat.dtype, np.float32)
    negatives = flat[~defective].astype(dtype, copy=False)
    negatives.sort()
    values, group = np.unique(flat[defective].astype(dtype, copy=False), return_inverse=True)
    label = pixels_of(labels)[defective]
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

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

from typing import Any

import numpy as np

from steel_ad.metrics.decisions import Confusion, confusion, defects_found, false_regions
from steel_ad.metrics.false_alarms import aupimo, false_alarm_limit, found_at_false_alarms
from steel_ad.metrics.images import Images, as_images, check_finite, check_shapes, pixels_of, regions
from steel_ad.metrics.ranking import (
    Curve,
    Ranking,
    aupro,
    average_precision,
    curve,
    image_auroc,
    pixel_auroc,
    pixel_auroc_fpr30,
    rank,
    thin,
)
from steel_ad.metrics.visibility import contrast_to_noise, found_by_contrast

__all__ = ["Confusion", "Curve", "Ranking", "aupimo", "aupro", "average_precision", "confusion", "contrast_to_noise"]
__all__ += ["curve", "defects_found", "evaluate", "false_alarm_limit", "false_regions", "found_at_false_alarms"]
__all__ += [
    "found_by_contrast",
    "image_auroc",
    "image_metrics",
    "pixel_auroc",
    "pixel_auroc_fpr30",
    "rank",
    "regions",
    "thin",
]


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
      By name, floats: `pixel_auroc`, `pixel_auroc_fpr30`, `aupro_30`, `aupro_05`, `pixel_ap` and `aupimo` (its mean over
      the images that have one) of the raw maps; `pixel_iou`, `pixel_dice`, `false_regions_per_image`,
      `false_regions_per_good_image` (NaN without good images) of the mask; `threshold`; what `image_metrics` returns at
      `threshold`, save `image_accuracy_calibrated` and `image_threshold`, which are of `image_threshold`.
      `defects_found` is the dict of the function of that name.

    Raises:
      ValueError: a score is NaN or infinite, a threshold is NaN, the shapes differ, the masks are not bool, or there is
        no image.
    """
    raw, opened, masks = as_images(raw), as_images(opened), as_images(masks)
    ranking = rank(raw, masks)
    check_shapes(opened, masks)
    check_finite(pixels_of(opened))
    scores = np.array([image.max() for image in opened], np.float64)
    labels = np.asarray(labels, bool)
    # A Python float would be rounded to the maps' type before the comparison.
    exact_threshold = np.float64(threshold)
    predicted = opened > exact_threshold if isinstance(opened, np.ndarray) else [o > exact_threshold for o in opened]
    pixels = confusion(predicted, masks)
    areas = aupimo(raw, masks, labels)
    calibrated = image_metrics(scores, labels, image_threshold)
    good = [[image for image, label in zip(images, labels, strict=True) if not label] for images in (masks, predicted)]
    return {
        "pixel_auroc": pixel_auroc(ranking),
        "pixel_auroc_fpr30": pixel_auroc_fpr30(ranking),
        "aupro_30": aupro(ranking, 0.3),
        "aupro_05": aupro(ranking, 0.05),
        "pixel_ap": average_precision(ranking),
        "aupimo": float(np.mean(areas[~np.isnan(areas)])) if not np.isnan(areas).all() else float("nan"),
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
      `image_auroc`, `image_accuracy`, `image_tpr`, `image_tnr`, `image_f1`, in [0, 1] or NaN; `found_fpr_01` and
      `found_fpr_05`, which are `found_at_false_alarms` at 1 and 5 percent of these very good images; and, so that all
      detectors share their columns, `image_accuracy_calibrated`, here the same as `image_accuracy`, and `image_threshold`.

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
        "found_fpr_01": found_at_false_alarms(scores, labels, 1),
        "found_fpr_05": found_at_false_alarms(scores, labels, 5),
        "image_threshold": float(threshold),
    }

"""What is found at so few false alarms as a works can bear, the false alarms being counted on good images alone."""

import numpy as np

from steel_ad.metrics.images import Images, as_images, check_finite, check_masks, check_shapes


def aupimo(scores: Images, masks: Images, labels: np.ndarray, *, low: float = 1e-5, high: float = 1e-4) -> np.ndarray:
    """Area under the per-image overlap curve of each defective image (AUPIMO; Bertoldo et al. 2024), exact.

    The false-positive rate F(t) is the share of pixels with `score > t`, of each good image, averaged over the good images. The
    recall of an image at a rate f is the share of its defective pixels with `score > t`, at the lowest t with F(t) <= f. Its
    area is the mean of this recall over log10(f), from `low` to `high`. F is a step function of the scores, so the mean is
    a finite sum. A defective pixel that ties with good pixels is found only once F may count all of these.

    Args:
      scores: real [n, h, w], or a sequence of [h, w]; finite.
      masks: bool, of the same shapes; True is defective. Those of good images are not looked at.
      labels: bool [n], True is anomalous.
      low, high: bounds of the false-positive rate.

    Returns:
      float64 [n] in [0, 1]; NaN for a good image and for one whose mask is empty. NaN throughout where a single good pixel
      is more than `low` of the false-positive rate, or where there is no good image.

    Raises:
      ValueError: a score is NaN or infinite, the shapes differ, the masks are not bool, or not 0 < low < high < 1.
    """
    scores, masks, labels = as_images(scores), as_images(masks), np.asarray(labels).astype(bool)
    check_masks(masks)
    check_shapes(scores, masks)
    if labels.shape != (len(scores),):
        raise ValueError(f"One label an image is needed, not {labels.shape} for {len(scores)} images.")
    if not 0 < low < high < 1:
        raise ValueError(f"The bounds of the false-positive rate have to be 0 < low < high < 1, not {low} and {high}.")
    areas = np.full(len(scores), np.nan)
    good = [np.ravel(image) for image, label in zip(scores, labels, strict=True) if not label]
    for image in scores:
        check_finite(image)
    if not good or 1 / (len(good) * min(image.size for image in good)) > low:
        return areas
    limits, rates = _steps(good, high)
    widths = np.diff(np.log(np.clip(rates, low, high))) / np.log(high / low)
    for i in np.flatnonzero(labels).tolist():
        defective = scores[i][masks[i]]
        if defective.size:
            # Most pixels are below every limit, and need no sort.
            strong = np.sort(defective[defective > limits[-1]])
            above = strong.size - np.searchsorted(strong, limits, side="right")
            areas[i] = np.sum(widths * above) / defective.size
    return areas


def _steps(good: list[np.ndarray], high: float) -> tuple[np.ndarray, np.ndarray]:
    """The distinct scores of good pixels that count up to the rate `high`, from above, [m]; and the false-positive rates from
    which each of them may be the threshold, ascending to above `high`, [m + 1]."""
    values, sizes = np.concatenate(good), np.array([image.size for image in good])
    # So many pixels weigh more than `high`, whichever they are; a pixel below them has no say.
    count = min(values.size, int(high * len(good) * sizes.max()) + 2)
    chosen = np.flatnonzero(values >= np.partition(values, values.size - count)[values.size - count])
    chosen = chosen[np.argsort(values[chosen])[::-1]]
    strongest, image = values[chosen], np.searchsorted(np.cumsum(sizes), chosen, side="right")
    last = np.append(strongest[1:] != strongest[:-1], True)
    return strongest[last], np.append(0, np.cumsum(1 / (len(good) * sizes[image]))[last])


def false_alarm_limit(good: np.ndarray, percent: int) -> float:
    """The lowest threshold that at most `percent` percent of the good images' scores are above.

    Of n good images floor(n * percent / 100) may be false alarms; the threshold is the score of the image next in rank, and a
    false alarm is `score > threshold`. Ties make false alarms fewer, never more.

    Args:
      good: real [n], scores of good images; finite.
      percent: 1 to 99.

    Returns:
      The threshold; NaN where the images are too few for a single false alarm, n * percent < 100.
    """
    allowed = len(good) * percent // 100
    return float(np.sort(good)[len(good) - 1 - allowed]) if allowed else float("nan")


def found_at_false_alarms(scores: np.ndarray, labels: np.ndarray, percent: int) -> float:
    """Share of the anomalous images whose score is above `false_alarm_limit` of the good ones, in [0, 1].

    Args:
      scores: real [n], finite.
      labels: bool [n], True is anomalous.
      percent: as `false_alarm_limit` takes it.

    Returns:
      The share; NaN without anomalous images, or where the good images are too few.
    """
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    limit = false_alarm_limit(scores[~labels], percent)
    return float(np.mean(scores[labels] > limit)) if labels.any() and not np.isnan(limit) else float("nan")

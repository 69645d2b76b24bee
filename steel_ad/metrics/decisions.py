"""Decisions against the truth: counts and ratios of pixels or images, and the defects that are found."""

from typing import NamedTuple

import numpy as np

from steel_ad.metrics.images import Images, as_images, check_masks, check_shapes, pixels_of, regions


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


def confusion(predicted: Images, actual: Images) -> Confusion:
    """Counts true and false positives and negatives of pixels or of images.

    Args:
      predicted: bool, any shape, or a sequence of bool images.
      actual: bool, the same shapes.

    Raises:
      ValueError: the shapes differ, or one of the two is not bool.
    """
    predicted, actual = as_images(predicted), as_images(actual)
    check_shapes(predicted, actual)
    guess, truth = pixels_of(predicted), pixels_of(actual)
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
    masks, predicted = as_images(masks), as_images(predicted)
    check_shapes(masks, predicted)
    true_labels, true_count = regions(masks)
    found_labels, found_count = regions(predicted)
    true, found = pixels_of(true_labels), pixels_of(found_labels)
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
    masks, predicted = as_images(masks), as_images(predicted)
    check_masks(masks)
    check_shapes(masks, predicted)
    labels, count = regions(predicted)
    touching = np.unique(pixels_of(labels)[pixels_of(masks)])
    return (count - int(np.count_nonzero(touching))) / len(masks)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

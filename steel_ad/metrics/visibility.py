"""How visible a defect is beside the variation of its own plate, and what is found of defects by how visible they are."""

from typing import Any

import numpy as np

from steel_ad.metrics.images import regions

# Least, and in multiples of the region's longer side: how far the surroundings reach.
_LEAST_REACH_PX, _REACH = 16, 2
# A median of fewer shifts says little.
_LEAST_SHIFTS = 20
_BINS = {"<1": (0, 1), "1-2": (1, 2), "2-3": (2, 3), "3-5": (3, 5), ">5": (5, np.inf)}


def contrast_to_noise(image: np.ndarray, mask: np.ndarray) -> float:
    """Contrast-to-noise ratio of the greatest region of a mask.

    The region's shape is moved over the plate around it, by every whole number of pixels along both axes up to twice the longer
    side of the region, and by up to 16 px if that is more. A shift counts where the moved shape lies in the image and touches
    no pixel of the mask. The image's mean under each moved shape is what the plate has there without a defect, at the scale and in
    the direction of the defect, so a pattern's own variation counts as noise.

        contrast = |mean under the region - median of the moved means|
        noise    = 1.4826 * median of |moved mean - median of the moved means|
        ratio    = contrast / noise

    The noise is at least that of rounding to whole grey values, sqrt(1 / (12 * pixels of the region)).

    Args:
      image: real `[h, w]`, in grey values (uint8's unit).
      mask: bool `[h, w]`. Its 8-connected region with the most pixels is looked at, the first one of several.

    Returns:
      The ratio, not negative; NaN for an empty mask, and where fewer than 20 shifts count.

    Raises:
      ValueError: the shapes differ, or the mask is not a bool image.
    """
    from scipy import fft  # as `regions` does

    if image.shape != mask.shape:
        raise ValueError(f"Image and mask differ in shape: {image.shape} and {mask.shape}.")
    labels, count = regions([mask])
    if not count:
        return float("nan")
    region = labels[0] == np.bincount(labels[0][mask]).argmax()
    top, bottom, left, right = _box(region)
    reach = max(_LEAST_REACH_PX, _REACH * max(bottom - top, right - left))
    around = np.s_[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach]
    # Less the mean under the region, small numbers stay exact.
    within = np.stack([image[around] - image[region].mean(), mask[around]])
    shape = region[top:bottom, left:right]
    size = [fft.next_fast_len(n, real=True) for n in within.shape[1:]]
    sums = fft.irfft2(fft.rfft2(within, size) * fft.rfft2(shape.astype(np.float64), size).conj(), size)
    shifts = [n - s + 1 for n, s in zip(within.shape[1:], shape.shape, strict=True)]
    means, touched = sums[:, : shifts[0], : shifts[1]]
    means = means[touched < 0.5] / shape.sum()
    if means.size < _LEAST_SHIFTS:
        return float("nan")
    expected = np.median(means)
    noise = max(1.4826 * np.median(np.abs(means - expected)), np.sqrt(1 / (12 * shape.sum())))
    return float(abs(expected) / noise)


def found_by_contrast(ratios: np.ndarray, found: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """Share of defective images that are found, by the contrast-to-noise ratio of their defects.

    Args:
      ratios: float [n], not negative; images with NaN are in no bin.
      found: bool [n]; None where that is unknown.

    Returns:
      By bin, "<1", "1-2" (1 included, 2 not), "2-3", "3-5" and ">5" (5 included): `images`, how many there are, and `found`, the
      share of these, in [0, 1], NaN without any or where it is unknown.
    """
    bins = {}
    for name, (low, high) in _BINS.items():
        inside = (ratios >= low) & (ratios < high)
        share = float("nan") if found is None or not inside.any() else float(found[inside].mean())
        bins[name] = {"images": int(inside.sum()), "found": share}
    return bins


def _box(region: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1

"""Images of one or of many sizes: the form that all metrics take, its checks, and the regions of masks."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Images: TypeAlias = np.ndarray | Sequence[np.ndarray]

_EIGHT_CONNECTED = np.ones((3, 3), bool)


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

    masks = as_images(masks)
    check_masks(masks)
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


def as_images(images: Images) -> Images:
    return [np.asarray(image) for image in images] if isinstance(images, Sequence) else np.asarray(images)


def pixels_of(images: Images) -> np.ndarray:
    return images.reshape(-1) if isinstance(images, np.ndarray) else np.concatenate([np.ravel(i) for i in images])


def check_masks(masks: Images) -> None:
    if len(masks) == 0:
        raise ValueError("There is no image to evaluate.")
    for mask in masks:
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"A mask has to be a bool image [h, w], not {mask.dtype} {list(mask.shape)}.")


def check_shapes(first: Images, second: Images) -> None:
    if _shapes(first) != _shapes(second):
        raise ValueError("The arrays to be compared differ in the number or in the shape of their images.")


def _shapes(images: Images) -> list[tuple[int, ...]]:
    if isinstance(images, np.ndarray):
        return [images.shape[1:]] * len(images)
    return [image.shape for image in images]


def check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinite values.")

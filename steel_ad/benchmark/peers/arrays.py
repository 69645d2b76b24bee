"""Peers on the CPU: numpy, OpenCV, scikit-image and scikit-learn."""

import functools
import tempfile
from collections.abc import Callable

import numpy as np

from steel_ad.benchmark.timing import Frames, Images, Maps, Program
from steel_ad.ops.ssim import CONSTANTS

_C1, _C2 = CONSTANTS["thesis"]


def scikit_image(images: Images, window_size: int) -> Program:
    from skimage.metrics import structural_similarity

    x, y = images()
    one = functools.partial(
        structural_similarity, win_size=window_size, data_range=1.0, use_sample_covariance=False, full=True
    )
    return Program(call=lambda: [one(a, b)[1] for a, b in zip(x, y, strict=True)])


def cv2_box(images: Images, window_size: int) -> Program:
    import cv2  # noqa: F401

    x, y = images()
    return Program(call=lambda: [cv2_map(a, b, window_size) for a, b in zip(x, y, strict=True)])


def cv2_map(a: np.ndarray, b: np.ndarray, window_size: int) -> np.ndarray:
    """SSIM map of two float32 `[h, w]` by five box filters."""
    import cv2

    def mean(a):
        return cv2.boxFilter(a, -1, (window_size, window_size), borderType=cv2.BORDER_REFLECT_101)

    mean_a, mean_b = mean(a), mean(b)
    product, squares = mean_a * mean_b, mean_a * mean_a
    squares += mean_b * mean_b
    variances = mean(a * a)
    variances += mean(b * b)
    variances -= squares
    covariance = mean(a * b)
    covariance -= product
    product += np.float32(_C1 / 2)
    covariance += np.float32(_C2 / 2)
    product *= covariance
    product *= 4
    squares += np.float32(_C1)
    variances += np.float32(_C2)
    squares *= variances
    product /= squares
    return product


def sklearn_metrics(maps: Maps) -> Program:
    """scikit-learn's AUROC and an AU-PRO as one writes it in numpy from its definition."""
    from sklearn.metrics import roc_auc_score

    scores, masks = maps()
    return Program(call=lambda: (float(roc_auc_score(masks.ravel(), scores.ravel())), numpy_aupro(scores, masks, 0.3)))


def numpy_aupro(scores: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """AU-PRO of maps `[n, h, w]` up to an FPR of `limit` (Bergmann et al. 2021), by one sort of all pixels.

    Each pixel's change of the FPR and of the mean overlap is summed up in the order of falling scores, ties at once.
    """
    from scipy import ndimage

    change_pro = np.zeros(scores.shape)
    regions = 0
    for mask, change in zip(masks, change_pro, strict=True):
        labels, found = ndimage.label(mask, np.ones((3, 3)))
        change[mask] = (1 / np.bincount(labels.ravel()))[labels[mask]]
        regions += found
    order = np.argsort(scores, axis=None)[::-1]
    ordered = scores.ravel()[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    fpr = np.append(0, np.cumsum(~masks.ravel()[order], dtype=np.int64)[last] / np.count_nonzero(~masks))
    pro = np.append(0, np.cumsum(change_pro.ravel()[order])[last] / regions)
    within = fpr <= limit
    x, y = np.append(fpr[within], limit), np.append(pro[within], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x) / limit)


def cv2_read(images: Frames) -> Program:
    """PNG files read one after the other, without the checks that tell a damaged file."""
    import cv2

    folder = tempfile.TemporaryDirectory()
    frames = images()
    names = [f"{folder.name}/{i:03d}.png" for i in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        cv2.imwrite(name, frame)

    return Program(call=lambda: [cv2.imread(name, cv2.IMREAD_GRAYSCALE) for name in names], close=folder.cleanup)


def numpy_crops(images: Frames, num: int, side: int) -> Program:
    """Random crops and flips, float32 in [0, 1]."""
    rng, frames = np.random.default_rng(0), images()
    n, h, w = frames.shape

    def call():
        patches = np.empty((num, side, side, 1), np.float32)
        chosen = rng.integers(0, n, num)
        tops, lefts = rng.integers(0, h - side + 1, num), rng.integers(0, w - side + 1, num)
        flips = 1 - 2 * rng.integers(0, 2, (num, 2))
        for patch, i, top, left, (up, across) in zip(patches, chosen, tops, lefts, flips, strict=True):
            patch[:, :, 0] = frames[i, top : top + side, left : left + side][::up, ::across]
        patches /= 255
        return patches

    return Program(call=call)


def numpy_insert(images: Frames, library: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Program:
    """Defects\' differences `[n, s, s]` added at random places, with their masks `[n, s, s]`."""
    rng, good = np.random.default_rng(0), images().astype(np.float32) / 255
    differences, masks = library()
    h, w = good.shape[1:]
    s = masks.shape[1]

    def call():
        plates, marked = good.copy(), np.zeros(good.shape, bool)
        for plate, mark in zip(plates, marked, strict=True):
            i, up, across = rng.integers(0, len(masks)), *(1 - 2 * rng.integers(0, 2, 2))
            mask, difference = masks[i][::up, ::across], differences[i][::up, ::across]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            # The mask's box lies wholly inside of the plate, the window around it may hang over.
            top = rng.integers(0, h - (rows[-1] - rows[0])) - rows[0]
            left = rng.integers(0, w - (columns[-1] - columns[0])) - columns[0]
            y, x = slice(max(top, 0), top + s), slice(max(left, 0), left + s)
            seen = slice(y.start - top, min(s, h - top)), slice(x.start - left, min(s, w - left))
            plate[y, x] += difference[seen]
            np.clip(plate[y, x], 0, 1, out=plate[y, x])
            mark[y, x] = mask[seen]
        return plates, marked

    return Program(call=call)

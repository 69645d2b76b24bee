"""Exact pixel AUROC and AU-PRO of a test set."""

import functools

import numpy as np

from steel_ad import metrics
from steel_ad.benchmark.peers import arrays
from steel_ad.benchmark.timing import Maker, Maps, Program, Work


def works(*, tiny: bool) -> list[Work]:
    """`metrics_200x256`: 200 images of 256x256, half of them with a defect or several."""
    count, side = (4, 32) if tiny else (200, 256)
    data = functools.partial(maps, count, side)
    makers: dict[str, Maker] = {
        "steel_ad": functools.partial(_ours, data),
        "sklearn_numpy": functools.partial(arrays.sklearn_metrics, data),
    }
    # Sorting has no FLOPs; scores and masks are read once.
    return [Work(f"metrics_{count}x{side}", None, 5.0 * count * side * side, makers)]


@functools.lru_cache(maxsize=1)
def maps(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and masks bool, `[count, side, side]`: squares in every other image, with somewhat higher scores."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((count, side, side), np.float32)
    masks = np.zeros(scores.shape, bool)
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            size = rng.integers(side // 16, side // 4)
            top, left = rng.integers(0, side - size, 2)
            mask[top : top + size, left : left + size] = True
    scores[masks] += 2
    return scores, masks


def _ours(data: Maps) -> Program:
    scores, masks = data()

    def call():
        ranking = metrics.rank(scores, masks)
        return metrics.pixel_auroc(ranking), metrics.aupro(ranking, 0.3)

    return Program(call=call)

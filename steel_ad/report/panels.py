"""Grids of images: panels with labels and headers, and what is drawn in one.

Images are [h, w], either uint8 or float in [0, 1]; masks are bool [h, w].
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy import ndimage

from steel_ad.report.style import GREY, RESIDUAL_COLOURS, WIDTH_IN, new, short, widened

_CHARACTERS_PER_IN = 12


def grid(
    labels: Sequence[str],
    headers: Sequence[str],
    shape: tuple[int, ...],
    *,
    title: str,
    titled: bool = False,
    extra_in: float = 0.4,
) -> tuple[Figure, np.ndarray]:
    """A figure and its bare panels [labels, headers], for images of `shape`.

    `titled` keeps room for panels' titles below the headers, `extra_in` for what comes below the panels.
    """
    width_in = min((WIDTH_IN - 0.6) / len(headers), 3.4)
    height_in = width_in * shape[0] / shape[1]
    figure = new(len(labels) * (height_in + 0.25) + 0.8 + extra_in, title)
    figure.set_layout_engine(ConstrainedLayoutEngine(compress=True, w_pad=0.04, h_pad=0.04))
    panels = figure.subplots(len(labels), len(headers), squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=GREY, lw=0.5)
    for axes, label in zip(panels[:, 0], labels, strict=True):
        lines = [short(line, int(height_in * _CHARACTERS_PER_IN)) for line in label.split("\n")]
        axes.set_ylabel("\n".join(lines), fontsize=11, parse_math=False)
    for axes, header in zip(panels[0], headers, strict=True):
        axes.annotate(
            short(header, int(width_in * _CHARACTERS_PER_IN)),
            (0.5, 1),
            xytext=(0, 24 if titled else 6),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            weight="bold",
            fontsize=11,
            parse_math=False,
        )
    return figure, panels


def limits(image: np.ndarray) -> tuple[float, float]:
    """The darkest and brightest value, as black and white: plates with little contrast would look flat."""
    unit = _unit(image)
    return float(unit.min()), float(unit.max())


def grey(axes: Axes, image: np.ndarray, ends: tuple[float, float]) -> None:
    """Draws an image between black and white."""
    axes.imshow(_unit(image), cmap="gray", vmin=ends[0], vmax=ends[1])


def _unit(image: np.ndarray) -> np.ndarray:
    return image / np.float32(255) if image.dtype == np.uint8 else image


def coloured(axes: Axes, values: np.ndarray, norm: Normalize) -> None:
    """Draws a residual map."""
    axes.imshow(values, cmap=RESIDUAL_COLOURS, norm=norm)


def scale(maps: Sequence[np.ndarray], *, include: float | None = None) -> Normalize:
    """One scale for all maps, capped so that a few bright pixels do not darken the rest; `include` lies within it."""
    values = np.concatenate([np.ravel(values) for values in maps])
    ends = [values.min(), np.percentile(values, 99.8), *([] if include is None else [include])]
    return Normalize(*widened(float(min(ends)), float(max(ends))))


def outline(axes: Axes, mask: np.ndarray | None, colour: str, *, fill: bool = False) -> None:
    """Draws the edge of a mask, if there is one with anything in it."""
    if mask is None or not mask.any():
        return
    height, width = mask.shape
    padded = np.pad(mask, 1).astype(np.float32)  # so that outlines close at the image's edge
    axes.autoscale(False)
    places = np.arange(-1, width + 1), np.arange(-1, height + 1)
    if fill:
        axes.contourf(*places, padded, levels=[0.5, 1.5], colors=[colour], alpha=0.35)
    axes.contour(*places, padded, levels=[0.5], colors=[colour], linewidths=1.2)


def close_up(truth: np.ndarray) -> tuple[int, int, int]:
    """Top, left and side of a square in the image around the largest region, half as large again, 32 pixels or more.

    Raises ValueError where the mask is empty.
    """
    regions, count = ndimage.label(truth, np.ones((3, 3)))
    if not count:
        raise ValueError("a mask without a defect has no close-up")
    largest = int(np.argmax(np.bincount(regions.ravel())[1:]))
    rows, columns = ndimage.find_objects(regions)[largest]
    extent = max(rows.stop - rows.start, columns.stop - columns.start)
    side = min(max(32, 3 * extent // 2), *truth.shape)
    top, left = (
        int(np.clip((box.start + box.stop - side) // 2, 0, size - side))
        for box, size in zip((rows, columns), truth.shape, strict=True)
    )
    return top, left, side

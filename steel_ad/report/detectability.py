"""The figure of detectability: how small a defect is found."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from steel_ad.report import style
from steel_ad.report.style import GREY, SERIES, log_ticks, new, plain


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Trials of one kind and contrast.

    Attributes:
        name: of the contrast.
        size, hit: float and bool [n], of each trial.
        curve: size -> probability, or None where none could be fitted.
        a90_95: in the sizes' unit, or None.
    """

    name: str
    size: np.ndarray
    hit: np.ndarray
    curve: Callable[[np.ndarray], np.ndarray] | None
    a90_95: float | None


def detectability(path: Path, kinds: Mapping[str, Sequence[Detection]], *, unit: str, title: str) -> Path:
    """Probability of detection against size, one panel a kind, one curve a contrast; a90/95 is marked on the axis.

    Dots are shares of found defects among tenths of the trials, for curves that could not be fitted too.
    """
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new(0.9 + 2.6 * rows, title)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    sizes = np.concatenate([d.size for ds in kinds.values() for d in ds])
    low, high = sizes.min() / 1.1, sizes.max() * 1.1
    axis = np.geomspace(low, high, 200)
    for axes, (kind, detections) in zip(grid, kinds.items(), strict=False):
        axes.axhline(0.9, color=GREY, lw=1, ls=":")
        for d, colour in zip(detections, itertools.cycle(SERIES), strict=False):
            order = np.array_split(np.argsort(d.size), min(10, d.size.size))
            shares = np.array([d.hit[i].mean() for i in order])
            axes.plot([np.exp(np.log(d.size[i]).mean()) for i in order], shares, "o", ms=4, color=colour, alpha=0.6)
            axes.plot([], [], "o-", ms=4, color=colour, label=d.name)
            if d.curve is not None:
                axes.plot(axis, d.curve(axis), color=colour, lw=2)
            if d.a90_95 is not None and d.a90_95 <= high:
                axes.plot([d.a90_95] * 2, [0, 0.9], color=colour, lw=1.2, ls="--")
        axes.set(title=kind, xlim=(low, high), ylim=(-0.03, 1.03), xscale="log")
        log_ticks(axes.xaxis)
        plain(axes)
    for axes in grid[len(kinds) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(kinds) - columns) : len(kinds)]:
        axes.set_xlabel(f"length of the defect [{unit}]")
        axes.tick_params(labelbottom=True)
    figure.supylabel("probability of detection")
    handles, labels = grid[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, lw=1.2, ls="--"))
    figure.legend(handles, [*labels, "a90/95"], loc="outside lower center", frameon=False, ncols=len(labels) + 1)
    return style.save(figure, path)

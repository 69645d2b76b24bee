"""Figures of data sets that are made: good and defective plates, and how a defect was inserted.

Images are [h, w], either uint8 or float in [0, 1]; masks are bool [h, w].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from steel_ad.report import panels, style
from steel_ad.report.style import PREDICTION, TRUTH


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A defect-free image, a defective one, both [h, w], and the latter's truth, bool [h, w], not empty."""

    name: str
    good: np.ndarray
    defective: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """One artificial defect.

    Attributes:
        name: what the row shows.
        defect: [h, w], the defect on plain steel.
        label: bool [h, w], not empty: the part of it that is cut out.
        plate: [H, W], the pattern plate with the defect inserted.
        truth: bool [H, W], where it was inserted.
    """

    name: str
    defect: np.ndarray
    label: np.ndarray
    plate: np.ndarray
    truth: np.ndarray


def dataset_overview(path: Path, rows: Sequence[Dataset], *, title: str) -> Path:
    """One dataset a column: defect-free, defective with truth outlined, close-up of its largest defect.

    One or two datasets get a row each instead. Raises ValueError where a truth is empty.
    """
    views, names = ["defect-free", "defective", "close-up"], [row.name for row in rows]
    across = len(rows) > 2  # one or two columns alone would make a narrow, tall figure
    labels, headers = (views, names) if across else (names, views)
    figure, grid = panels.grid(labels, headers, rows[0].good.shape, title=title)
    for row, (good, defective, close_up) in zip(rows, grid.T if across else grid, strict=True):
        top, left, side = panels.close_up(row.truth)
        limits = panels.limits(row.defective)
        panels.grey(good, row.good, panels.limits(row.good))
        for axes in (defective, close_up):
            panels.grey(axes, row.defective, limits)
            panels.outline(axes, row.truth, TRUTH)
        frame = (left - 0.5, top - 0.5)
        defective.add_patch(Rectangle(frame, side, side, fill=False, ec=PREDICTION, lw=1.5, ls="--"))
        close_up.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
        close_up.spines[:].set(color=PREDICTION, lw=1.5, ls="--")
    return style.save(figure, path)


def insertion(path: Path, rows: Sequence[Insertion], *, title: str) -> Path:
    """One artificial defect a row: defect on plain steel, label, cut-out; plate with the defect inserted, truth.

    Raises ValueError where a label is empty.
    """
    headers = ["defect on plain steel", "label", "cut-out", "inserted in a plate", "truth"]
    figure, grid = panels.grid([row.name for row in rows], headers, rows[0].plate.shape, title=title)
    for row, (defect, label, cut_out, plate, truth) in zip(rows, grid, strict=True):
        limits = panels.limits(row.defect)
        panels.grey(defect, row.defect, limits)
        panels.grey(label, row.label.astype(np.float32), (0, 1))
        top, left, side = panels.close_up(row.label)
        box = slice(top, top + side), slice(left, left + side)
        panels.grey(cut_out, np.ma.masked_where(~row.label[box], row.defect[box]), limits)
        cut_out.set_facecolor("#FFF7DC")
        panels.grey(plate, row.plate, panels.limits(row.plate))
        panels.grey(truth, row.truth.astype(np.float32), (0, 1))
    return style.save(figure, path)

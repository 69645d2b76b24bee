"""The map of a coil: where its defects lie along the strip."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize

from steel_ad.report import style
from steel_ad.report.style import RESIDUAL_COLOURS, VERMILLION, new, plain, widened


@dataclass(frozen=True, kw_only=True)
class Coil:
    """One side of a strip, or images of one laid end to end, with its defects.

    Attributes:
        name: of the side.
        length, width: along and across, in the unit.
        across: of the first column, in the unit.
        joints: where one image ends and the next begins, along.
        boxes: [n, 4] of the defects: first along, first across, last along, last across.
        scores: [n], their peaks.
        periodic: bool [n], those that a roll made.
    """

    name: str
    length: float
    width: float
    across: float
    joints: Sequence[float]
    boxes: np.ndarray
    scores: np.ndarray
    periodic: np.ndarray


def coil_map(path: Path, sides: Sequence[Coil], *, unit: str, title: str) -> Path:
    """Where the defects lie: along the strip from left to right, one panel a side; the periodic ones are ringed.

    Defects too small to be seen at the figure's scale are drawn as dots.
    """
    figure = new(0.9 + 2.3 * len(sides), title)
    panels = figure.subplots(len(sides), 1, squeeze=False)[:, 0]
    scores = np.concatenate([side.scores for side in sides])
    norm = Normalize(*widened(float(scores.min()), float(scores.max()))) if scores.size else None
    thousand = unit == "mm" and max(side.length for side in sides) >= 5000
    along = 1000.0 if thousand else 1.0
    for axes, side in zip(panels, sides, strict=True):
        boxes = side.boxes.reshape(-1, 4) / (along, 1, along, 1)
        axes.set_xlim(0, side.length / along)
        axes.set_ylim(side.across + side.width, side.across)
        axes.set_facecolor("#F4F4F4")
        for joint in side.joints if len(side.joints) <= 60 else ():
            axes.axvline(joint / along, color="white", lw=1)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        if norm is not None and len(boxes):
            # One artist for all: a coil may have a hundred thousand.
            corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
            drawn = PolyCollection(
                list(corners), array=side.scores, cmap=RESIDUAL_COLOURS, norm=norm, edgecolors="face", lw=0.5
            )
            axes.add_collection(drawn, autolim=False)
            axes.scatter(*middle.T, s=14, c=side.scores, cmap=RESIDUAL_COLOURS, norm=norm, zorder=3, lw=0)
            rings = middle[side.periodic]
            if len(rings):
                axes.scatter(*rings.T, s=90, facecolor="none", edgecolor=VERMILLION, lw=1.3, zorder=4, label="periodic")
                axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
        axes.set_ylabel(f"{side.name}: across ({unit})")
        plain(axes)
        axes.grid(False)
    panels[-1].set_xlabel(f"along ({'m' if thousand else unit})")
    if norm is not None:
        figure.colorbar(ScalarMappable(norm, RESIDUAL_COLOURS), ax=list(panels), label="peak", aspect=30, pad=0.01)
    return style.save(figure, path)

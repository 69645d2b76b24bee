"""Figures of spectra: one line a column, plates above, what the DFT makes of them below (figure 3-3 of the thesis)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steel_ad.ops.spectrum import Lattice, pitch_and_angle
from steel_ad.report import style
from steel_ad.report.style import GREY, ORANGE, WIDTH_IN


@dataclass(frozen=True, kw_only=True)
class View:
    """What a figure shows of one line.

    Attributes:
        name: of the line.
        image: float [h, w] in [0, 1], one plate.
        log_amplitude, phase: float [h, w], its centred spectra, the phase in radians.
        mean_log_amplitude: float [h, w], centred, of the mean amplitude of `images` plates.
        autocorrelation: float [2 a + 1, 2 b + 1], their mean one, lag 0 in the middle.
        lattice: read off it, or None.
    """

    name: str
    image: np.ndarray
    log_amplitude: np.ndarray
    phase: np.ndarray
    mean_log_amplitude: np.ndarray
    images: int
    autocorrelation: np.ndarray
    lattice: Lattice | None


def spectra(path: Path, views: Sequence[View]) -> Path:
    """Plate, its log-amplitude spectrum, the mean one of the line, and the mean autocorrelation with the lattice's vectors."""
    counts = sorted({view.images for view in views})
    plates = "plates" if counts[-1] > 1 else "plate"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    labels = ["plate", "log(1 + amplitude)", f"mean of {number} {plates}", "autocorrelation"]
    figure, grid = _panels(labels, views)
    for view, column in zip(views, grid.T, strict=True):
        column[0].imshow(view.image, cmap="gray")
        for axes, values in zip(column[1:3], (view.log_amplitude, view.mean_log_amplitude), strict=True):
            _frequencies(axes, values, "magma", tuple(np.percentile(values, (2, 99.9))))
        h, w = view.autocorrelation.shape
        extent = (-w / 2, w / 2, h / 2, -h / 2)
        high = np.percentile(view.autocorrelation, 99.5)
        column[3].imshow(view.autocorrelation, cmap="gray", vmin=-high, vmax=high, extent=extent)
        lines = ["no lattice found"]
        if view.lattice is not None:
            for y, x in view.lattice.vectors:
                column[3].annotate(
                    "", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 1.5, "shrinkA": 0}
                )
            lines = [f"{v['pitch_px']:.2f} px at {v['angle_deg']:.2f}°" for v in pitch_and_angle(view.lattice)]
        column[3].set_xlabel("\n".join(lines), fontsize=9)
    return style.save(figure, path)


def phases(path: Path, views: Sequence[View]) -> Path:
    """Plate and its phase spectrum, from -pi to pi in a cyclic colour scale."""
    figure, grid = _panels(["plate", "phase"], views)
    for view, (above, below) in zip(views, grid.T, strict=True):
        above.imshow(view.image, cmap="gray")
        _frequencies(below, view.phase, "twilight", (-np.pi, np.pi))
    return style.save(figure, path)


def _panels(labels: Sequence[str], views: Sequence[View]) -> tuple[Figure, np.ndarray]:
    width_in = min((WIDTH_IN - 0.4) / len(views), 2.4)
    heights = [max(v.image.shape[0] / v.image.shape[1] for v in views)] * len(labels)
    figure = Figure(figsize=(width_in * len(views) + 0.4, sum(heights) * width_in + 0.9), layout="constrained")
    grid = figure.subplots(len(labels), len(views), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=GREY, lw=0.5)
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label, fontsize=10)
    for axes, view in zip(grid[0], views, strict=True):
        axes.set_title(view.name.removeprefix("procedural_"), fontsize=11, weight="bold", parse_math=False)
    return figure, grid


def _frequencies(axes: Axes, values: np.ndarray, colours: str, limits: tuple[float, float]) -> None:
    """The middle half of a centred spectrum: beyond a quarter of a cycle a pixel there is little but noise."""
    h, w = values.shape
    middle = values[h // 2 - h // 4 : h // 2 + h // 4 + 1, w // 2 - w // 4 : w // 2 + w // 4 + 1]
    axes.imshow(middle, cmap=colours, vmin=limits[0], vmax=limits[1])

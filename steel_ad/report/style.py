"""The look that all figures share: width, colours, ticks, and how a figure becomes a PNG file.

Every function that draws a figure writes it atomically (a figure is there whole or not at all), makes the folder where it is
missing, returns the path, and raises InputError (status 1) where the file cannot be written, as on a full disk.
"""

import io
import threading
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steel_ad import files

# Okabe and Ito's palette: its colours stay apart in every common form of colour blindness.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, YELLOW, BLACK = "#009E73", "#CC79A7", "#F0E442", "#000000"
GREY = "#8C8C8C"
TRUTH, PREDICTION = SKY, ORANGE
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
RESIDUAL_COLOURS = matplotlib.colormaps["viridis"]

WIDTH_IN = 10.0  # so that a figure reads well at 1000 pixels
_DPI = 120
# Matplotlib draws in one thread at a time; runs side by side on several devices draw theirs in threads.
_DRAWING = threading.Lock()


def new(height_in: float, title: str) -> Figure:
    """An empty figure below its title, which is no formula whatever its signs."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, whole or not at all, making missing folders.

    Raises:
        InputError: the disk is full or the folder not writable.
    """
    # Encoded in memory first: Pillow reports a full disk as "encoder error", the file system gives the reason.
    png = io.BytesIO()
    with _DRAWING:
        figure.savefig(png, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    files.write_bytes(path, png.getvalue())
    return path


def plain(axes: Axes) -> None:
    """Two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """Ticks at 1 and 3 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around it where it is a single value."""
    margin = 0.0 if high > low else 0.05 * abs(low) or 0.05
    return low - margin, high + margin


def short(text: str, length: int) -> str:
    """The text, with its middle left out where it is longer."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"

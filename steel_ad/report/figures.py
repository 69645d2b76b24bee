"""Figures: arrays in, one PNG out, 10 inches wide so that it reads well at 1000 pixels.

Every function writes atomically (a figure is there whole or not at all), makes the folder where it is missing, returns
the path, and raises InputError (status 1) where the file cannot be written, as on a full disk. Images are [h, w],
either uint8 or float in [0, 1]; masks are bool [h, w].
"""

import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike
from scipy import ndimage

from steel_ad.errors import InputError

# Okabe and Ito's palette: its colours stay apart in every common form of colour blindness.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, YELLOW, BLACK = "#009E73", "#CC79A7", "#F0E442", "#000000"
GREY = "#8C8C8C"
TRUTH, PREDICTION = SKY, ORANGE
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
KINDS = (VERMILLION, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK)
RESIDUAL_COLOURS = matplotlib.colormaps["viridis"]

WIDTH_IN = 10.0
DPI = 120
# Matplotlib draws in one thread at a time; runs side by side on several devices draw theirs in threads.
_DRAWING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tested image.

    Attributes:
        name: of the image; shortened in the middle where it is long.
        kind: of the defect, or "good".
        image: [h, w], uint8 or float in [0, 1].
        truth: bool [h, w], or None where it is not known.
        reconstruction: [h, w] like `image`, or None where the method makes none.
        residual: float [h, w], any unit, shared by all rows.
        mask: bool [h, w], the predicted defect.
        score: of the image, in the residual's unit.
    """

    name: str
    kind: str
    image: np.ndarray
    truth: np.ndarray | None
    reconstruction: np.ndarray | None
    residual: np.ndarray
    mask: np.ndarray
    score: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One image [h, w], its truth bool [h, w], and what each model makes of it: name -> (map float [h, w], score)."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    maps: Mapping[str, tuple[np.ndarray, float]]


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


def training_curve(path: str | os.PathLike[str], history: Mapping[str, Any], *, title: str) -> Path:
    """Loss against step, as logged and smoothed over 2 % of the run; logarithmic where it falls tenfold or more.

    Args:
        path: the PNG to write.
        history: "step" [k] and "loss" [k], k >= 1; optionally both of "validation_step" and "validation_loss" [j], and
            "learning_rate" [k], which gets a panel of its own.
        title: above the figure.
    """
    return save(_training_curve(history, title=title), path)


def examples(path: str | os.PathLike[str], rows: Sequence[Example], *, title: str, threshold: float) -> Path:
    """One image a row: image with truth, reconstruction (where any row has one), residual with score, predicted mask.

    All residuals share one colour scale, capped at their 99.8th percentile, so that rows can be compared. An image is
    called a DEFECT where its score is above `threshold`, which is in the residual's unit.
    """
    return save(_examples(rows, title=title, threshold=threshold), path)


def score_histogram(
    path: str | os.PathLike[str],
    good: ArrayLike,
    defective: ArrayLike | Mapping[str, ArrayLike],
    *,
    threshold: float,
    calibrated: float | None = None,
    of: str = "image",
    title: str,
) -> Path:
    """Image scores of good images above those of defective ones, with the thresholds as lines.

    The score axis is logarithmic where positive scores span a factor of 30 and none is negative; zeros then fall into
    the leftmost bar, and the axis says so.

    Args:
        path: the PNG to write.
        good: [n] scores.
        defective: [m] scores, or kind -> [m] scores; empty leaves the panel out.
        threshold: in the scores' unit.
        calibrated: a second threshold, drawn dashed.
        of: what has a score, for the axes.
        title: above the figure.
    """
    figure = _score_histogram(good, defective, threshold=threshold, calibrated=calibrated, of=of, title=title)
    return save(figure, path)


def curves(path: str | os.PathLike[str], series: Mapping[str, Mapping[str, Any]], *, title: str) -> Path:
    """ROC and per-region overlap (PRO) of the pixels, side by side; PRO up to a false positive rate of 0.3.

    Args:
        path: the PNG to write.
        series: name -> "fpr", "tpr" and "pro" [k], all in [0, 1], and the numbers "auroc" and "aupro_30".
        title: above the figure.
    """
    return save(_curves(series, title=title), path)


def predictions(path: str | os.PathLike[str], rows: Sequence[Prediction], *, title: str) -> Path:
    """One image a row: input, truth, and each model's map with its score above; a colour scale for each model.

    Raises ValueError where a row lacks a model that the first row has, or has another.
    """
    return save(_predictions(rows, title=title), path)


def dataset_overview(path: str | os.PathLike[str], rows: Sequence[Dataset], *, title: str) -> Path:
    """One dataset a column: defect-free, defective with truth outlined, close-up of its largest defect.

    One or two datasets get a row each instead. Raises ValueError where a truth is empty.
    """
    return save(_dataset_overview(rows, title=title), path)


def insertion(path: str | os.PathLike[str], rows: Sequence[Insertion], *, title: str) -> Path:
    """One artificial defect a row: defect on plain steel, label, cut-out; plate with the defect inserted, truth.

    Raises ValueError where a label is empty.
    """
    return save(_insertion(rows, title=title), path)


def coil_map(path: str | os.PathLike[str], sides: Sequence[Coil], *, unit: str, title: str) -> Path:
    """Where the defects lie: along the strip from left to right, one panel a side; the periodic ones are ringed.

    Defects too small to be seen at the figure's scale are drawn as dots.
    """
    return save(_coil_map(sides, unit=unit, title=title), path)


def detectability(
    path: str | os.PathLike[str], kinds: Mapping[str, Sequence[Detection]], *, unit: str, title: str
) -> Path:
    """Probability of detection against size, one panel a kind, one curve a contrast; a90/95 is marked on the axis.

    Dots are shares of found defects among tenths of the trials, for curves that could not be fitted too.
    """
    return save(_detectability(kinds, unit=unit, title=title), path)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, whole or not at all, making missing folders.

    Raises:
        InputError: the disk is full or the folder not writable.
    """
    path = Path(path)
    # Encoded in memory first: Pillow reports a full disk as "encoder error", the file system gives the reason.
    png = io.BytesIO()
    with _DRAWING:
        figure.savefig(png, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    # Always the same, so that what a killed process left is written over and renamed.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(png.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"Cannot write {path} ({reason}): free some space or choose another folder.", status=1
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _training_curve(history: Mapping[str, Any], *, title: str) -> Figure:
    step, loss = np.asarray(history["step"]), np.asarray(history["loss"], np.float64)
    rate = history.get("learning_rate")
    figure = Figure(figsize=(WIDTH_IN, 4.5 if rate is None else 5.6), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    panels = figure.subplots(
        1 if rate is None else 2, 1, sharex=True, squeeze=False, height_ratios=[1] if rate is None else [3, 1]
    )[:, 0]
    axes = panels[0]

    half = len(loss) // 100
    axes.plot(step, loss, color=BLUE, alpha=0.25 if half else 1.0, lw=1, label="training, as logged")
    if half:
        axes.plot(step, _running_mean(loss, half), color=BLUE, lw=2, label=f"training, mean of {2 * half + 1}")
    drawn = loss
    if "validation_loss" in history:
        validation = np.asarray(history["validation_loss"], np.float64)
        axes.plot(
            history["validation_step"], validation, color=VERMILLION, lw=1.5, marker="o", ms=4, label="validation"
        )
        drawn = np.concatenate([loss, validation])
    if drawn.min() > 0 and drawn.max() >= 10 * drawn.min():
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    if rate is not None:
        panels[1].plot(step, rate, color=GREY, lw=1.5)
        panels[1].set_ylabel("learning rate")
    panels[-1].set_xlabel("step")
    for panel in panels:
        plain(panel)
    return figure


def _examples(rows: Sequence[Example], *, title: str, threshold: float) -> Figure:
    headers = ["image", "reconstruction", "residual", "prediction"]
    if all(row.reconstruction is None for row in rows):
        headers.remove("reconstruction")
    labels = [f"{row.kind}\n{row.name}" for row in rows]
    figure, grid = _panels(labels, headers, rows[0].image.shape, title=title, titled=True, extra_in=1.3)
    norm = _norm([row.residual for row in rows], include=threshold)
    for i, row in enumerate(rows):
        panel = dict(zip(headers, grid[i], strict=True))
        limits = _limits(row.image)
        _grey(panel["image"], row.image, limits)
        _outline(panel["image"], row.truth, TRUTH)
        if row.reconstruction is not None:
            _grey(panel["reconstruction"], row.reconstruction, limits)
        elif "reconstruction" in panel:
            panel["reconstruction"].set_axis_off()
        _map(panel["residual"], row.residual, norm)
        _grey(panel["prediction"], row.image, limits)
        _outline(panel["prediction"], row.mask, PREDICTION, fill=True)
        _outline(panel["prediction"], row.truth, TRUTH)

        defect = row.score > threshold
        panel["residual"].set_title(
            f"{row.score:.3g}  {'DEFECT' if defect else 'OK'}", fontsize=11, color=VERMILLION if defect else BLUE
        )
    bar = figure.colorbar(
        ScalarMappable(norm, RESIDUAL_COLOURS),
        ax=grid,
        location="bottom",
        extend="max",
        shrink=0.6,
        aspect=40,
        pad=0.1 / figure.get_figheight(),
    )
    bar.ax.axvline(threshold, color="white", lw=2)
    bar.set_label(f"residual (white line: threshold {threshold:.3g}; DEFECT above it)")
    keys = [
        Line2D([], [], color=TRUTH, lw=2, label="true defect"),
        Line2D([], [], color=PREDICTION, lw=2, label="predicted"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _score_histogram(
    good: ArrayLike,
    defective: ArrayLike | Mapping[str, ArrayLike],
    *,
    threshold: float,
    calibrated: float | None,
    of: str = "image",
    title: str,
) -> Figure:
    kinds = defective if isinstance(defective, Mapping) else {"defective": defective}
    groups = [{"good": np.asarray(good, np.float64)}, {k: np.asarray(v, np.float64) for k, v in kinds.items()}]
    groups = groups[: 2 if any(v.size for v in groups[1].values()) else 1]
    scores = np.concatenate([v for group in groups for v in group.values()])
    positive = scores[scores > 0]
    log = bool(scores.min() >= 0 and positive.size and positive.max() >= 30 * positive.min())
    floor = positive.min() if log else -np.inf
    low, high = _widened(max(scores.min(), floor), scores.max())
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)

    figure = Figure(figsize=(WIDTH_IN, 1.4 + 1.9 * len(groups)), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group, colours in zip(panels, groups, ((BLUE,), KINDS), strict=False):
        bottom = np.zeros(40)
        for i, (kind, values) in enumerate(group.items()):
            counts, _ = np.histogram(np.clip(values, low, high), edges)
            axes.bar(
                edges[:-1],
                counts,
                np.diff(edges),
                bottom,
                align="edge",
                color=colours[i % len(colours)],
                hatch="/" * (3 * (i // len(colours))),
                edgecolor="white",
                lw=0.5,
                label=f"{_short(kind, 32)} ({values.size})",
            )
            bottom += counts
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_ylabel(f"{of}s")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        plain(axes)

    lines = {"threshold": (threshold, "-")} | ({} if calibrated is None else {"calibrated": (calibrated, "--")})
    # The lower threshold's label goes to the left of its line, the higher one's to the right: they never meet.
    sides = ["left"] if calibrated is None else ["right", "left"]
    for (name, (value, style)), side in zip(sorted(lines.items(), key=lambda item: item[1][0]), sides, strict=True):
        for axes in panels:
            axes.axvline(max(value, floor), color=BLACK, ls=style, lw=1.5)
        panels[0].annotate(
            f"{name} {value:.3g}",
            (max(value, floor), 1),
            xytext=(4 if side == "left" else -4, 3),
            xycoords=panels[0].get_xaxis_transform(),
            textcoords="offset points",
            ha=side,
        )
    if log:
        panels[-1].set_xscale("log")
        log_ticks(panels[-1].xaxis)
    panels[-1].set_xlabel(f"{of} score" + (" (zeros in the leftmost bar)" if log and (scores == 0).any() else ""))
    return figure


def _curves(series: Mapping[str, Mapping[str, Any]], *, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 4.8 + 0.22 * len(series)), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    roc, pro = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    roc.annotate("chance", (0.7, 0.7), xytext=(4, -4), textcoords="offset points", va="top", color=GREY)
    pro.axvline(0.3, color=GREY, lw=1.5, ls="--")
    pro.axvspan(0.3, 0.34, color=GREY, alpha=0.15, lw=0)
    pro.annotate("FPR 0.3", (0.3, 0.02), xytext=(-4, 0), textcoords="offset points", ha="right", color=GREY)
    styles = itertools.cycle(itertools.product(("-", "--", ":"), SERIES))
    for (name, curve), (style, colour) in zip(series.items(), styles, strict=False):
        label = f"{_short(name, 48)}:  AUROC {curve['auroc']:.3f},  AU-PRO {curve['aupro_30']:.3f}"
        roc.plot(curve["fpr"], curve["tpr"], color=colour, ls=style, lw=2, label=label)
        pro.plot(curve["fpr"], curve["pro"], color=colour, ls=style, lw=2)
    roc.set(title="ROC", ylabel="true positive rate (pixels)", xlim=(0, 1), ylim=(0, 1.02))
    pro.set(title="PRO", ylabel="per-region overlap", xlim=(0, 0.34), ylim=(0, 1.02))
    for axes in (roc, pro):
        axes.set_xlabel("false positive rate (pixels)")
        plain(axes)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _predictions(rows: Sequence[Prediction], *, title: str) -> Figure:
    models = list(rows[0].maps)
    if any(set(row.maps) != set(models) for row in rows):
        raise ValueError("every row needs a map of the same models")
    names, headers = [row.name for row in rows], ["input", "truth", *models]
    figure, grid = _panels(names, headers, rows[0].image.shape, title=title, titled=True, extra_in=0.9)
    for i, row in enumerate(rows):
        _grey(grid[i, 0], row.image, _limits(row.image))
        _grey(grid[i, 1], row.truth.astype(np.float32), (0, 1))
    for model, column in zip(models, grid[:, 2:].T, strict=True):
        norm = _norm([row.maps[model][0] for row in rows])
        for row, axes in zip(rows, column, strict=True):
            values, score = row.maps[model]
            _map(axes, values, norm)
            axes.set_title(f"score {score:.3g}", fontsize=11)
        # Inset, because a colour bar with its own place in the grid moves its column out of line with the others.
        figure.colorbar(
            ScalarMappable(norm, RESIDUAL_COLOURS),
            cax=column[-1].inset_axes((0, -0.12, 1, 0.06)),
            orientation="horizontal",
            extend="max",
            ticks=MaxNLocator(nbins=4),
        )
    return figure


def _dataset_overview(rows: Sequence[Dataset], *, title: str) -> Figure:
    views, names = ["defect-free", "defective", "close-up"], [row.name for row in rows]
    across = len(rows) > 2  # one or two columns alone would make a narrow, tall figure
    labels, headers = (views, names) if across else (names, views)
    figure, grid = _panels(labels, headers, rows[0].good.shape, title=title)
    for row, (good, defective, close_up) in zip(rows, grid.T if across else grid, strict=True):
        top, left, side = _close_up(row.truth)
        limits = _limits(row.defective)
        _grey(good, row.good, _limits(row.good))
        for axes in (defective, close_up):
            _grey(axes, row.defective, limits)
            _outline(axes, row.truth, TRUTH)
        frame = (left - 0.5, top - 0.5)
        defective.add_patch(Rectangle(frame, side, side, fill=False, ec=PREDICTION, lw=1.5, ls="--"))
        close_up.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
        close_up.spines[:].set(color=PREDICTION, lw=1.5, ls="--")
    return figure


def _insertion(rows: Sequence[Insertion], *, title: str) -> Figure:
    headers = ["defect on plain steel", "label", "cut-out", "inserted in a plate", "truth"]
    figure, grid = _panels([row.name for row in rows], headers, rows[0].plate.shape, title=title)
    for row, (defect, label, cut_out, plate, truth) in zip(rows, grid, strict=True):
        limits = _limits(row.defect)
        _grey(defect, row.defect, limits)
        _grey(label, row.label.astype(np.float32), (0, 1))
        top, left, side = _close_up(row.label)
        box = slice(top, top + side), slice(left, left + side)
        _grey(cut_out, np.ma.masked_where(~row.label[box], row.defect[box]), limits)
        cut_out.set_facecolor("#FFF7DC")
        _grey(plate, row.plate, _limits(row.plate))
        _grey(truth, row.truth.astype(np.float32), (0, 1))
    return figure


def _coil_map(sides: Sequence[Coil], *, unit: str, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 0.9 + 2.3 * len(sides)), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    panels = figure.subplots(len(sides), 1, squeeze=False)[:, 0]
    scores = np.concatenate([side.scores for side in sides])
    norm = Normalize(*_widened(float(scores.min()), float(scores.max()))) if scores.size else None
    thousand = unit == "mm" and max(side.length for side in sides) >= 5000
    for axes, side in zip(panels, sides, strict=True):
        along = 1000.0 if thousand else 1.0
        boxes = side.boxes.reshape(-1, 4) / (along, 1, along, 1)
        length = side.length / along
        axes.set_xlim(0, length)
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
    return figure


def _detectability(kinds: Mapping[str, Sequence[Detection]], *, unit: str, title: str) -> Figure:
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(WIDTH_IN, 0.9 + 2.6 * rows), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
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
    return figure


def _panels(
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
    figure = Figure(
        figsize=(WIDTH_IN, len(labels) * (height_in + 0.25) + 0.8 + extra_in),
        layout=ConstrainedLayoutEngine(compress=True, w_pad=0.04, h_pad=0.04),
    )
    figure.suptitle(title, fontsize=13, parse_math=False)
    grid = figure.subplots(len(labels), len(headers), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=GREY, lw=0.5)
    characters_per_in = 12
    for axes, label in zip(grid[:, 0], labels, strict=True):
        lines = [_short(line, int(height_in * characters_per_in)) for line in label.split("\n")]
        axes.set_ylabel("\n".join(lines), fontsize=11, parse_math=False)
    for axes, header in zip(grid[0], headers, strict=True):
        axes.annotate(
            _short(header, int(width_in * characters_per_in)),
            (0.5, 1),
            xytext=(0, 24 if titled else 6),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            weight="bold",
            fontsize=11,
            parse_math=False,
        )
    return figure, grid


def plain(axes: Axes) -> None:
    """The house's look: two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """Ticks at 1 and 3 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _unit(image: np.ndarray) -> np.ndarray:
    return image / np.float32(255) if image.dtype == np.uint8 else image


def _limits(image: np.ndarray) -> tuple[float, float]:
    """The darkest and brightest value, as black and white: plates with little contrast would look flat."""
    unit = _unit(image)
    return float(unit.min()), float(unit.max())


def _grey(axes: Axes, image: np.ndarray, limits: tuple[float, float]) -> None:
    axes.imshow(_unit(image), cmap="gray", vmin=limits[0], vmax=limits[1])


def _map(axes: Axes, values: np.ndarray, norm: Normalize) -> None:
    axes.imshow(values, cmap=RESIDUAL_COLOURS, norm=norm)


def _norm(maps: Sequence[np.ndarray], *, include: float | None = None) -> Normalize:
    """One scale for all maps, capped so that a few bright pixels do not darken the rest; `include` lies within it."""
    values = np.concatenate([np.ravel(values) for values in maps])
    ends = [values.min(), np.percentile(values, 99.8), *([] if include is None else [include])]
    low, high = _widened(float(min(ends)), float(max(ends)))
    return Normalize(low, high)


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around it where it is a single value."""
    margin = 0.0 if high > low else 0.05 * abs(low) or 0.05
    return low - margin, high + margin


def _outline(axes: Axes, mask: np.ndarray | None, colour: str, *, fill: bool = False) -> None:
    if mask is None or not mask.any():
        return
    height, width = mask.shape
    padded = np.pad(mask, 1).astype(np.float32)  # so that outlines close at the image's edge
    axes.autoscale(False)
    grid = np.arange(-1, width + 1), np.arange(-1, height + 1)
    if fill:
        axes.contourf(*grid, padded, levels=[0.5, 1.5], colors=[colour], alpha=0.35)
    axes.contour(*grid, padded, levels=[0.5], colors=[colour], linewidths=1.2)


def _close_up(truth: np.ndarray) -> tuple[int, int, int]:
    """Top, left and side of a square in the image around the largest region, half as large again, 32 pixels or more."""
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


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over 2 * half + 1 values around each; shorter windows at both ends."""
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"

"""Figures of tested images: examples, scores, curves, and several models' maps side by side.

Images are [h, w], either uint8 or float in [0, 1]; masks are bool [h, w].
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from steel_ad.report import panels, style
from steel_ad.report.style import BLACK, BLUE, GREY, PREDICTION, RESIDUAL_COLOURS, SERIES, TRUTH, VERMILLION

_KINDS = (VERMILLION, style.ORANGE, style.GREEN, style.PURPLE, style.SKY, style.YELLOW, BLACK)


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


def examples(path: Path, rows: Sequence[Example], *, title: str, threshold: float) -> Path:
    """One image a row: image with truth, reconstruction (where any row has one), residual with score, predicted mask.

    All residuals share one colour scale, capped at their 99.8th percentile, so that rows can be compared. An image is
    called a DEFECT where its score is above `threshold`, which is in the residual's unit.
    """
    headers = ["image", "reconstruction", "residual", "prediction"]
    if all(row.reconstruction is None for row in rows):
        headers.remove("reconstruction")
    labels = [f"{row.kind}\n{row.name}" for row in rows]
    figure, grid = panels.grid(labels, headers, rows[0].image.shape, title=title, titled=True, extra_in=1.3)
    norm = panels.scale([row.residual for row in rows], include=threshold)
    for i, row in enumerate(rows):
        panel = dict(zip(headers, grid[i], strict=True))
        limits = panels.limits(row.image)
        panels.grey(panel["image"], row.image, limits)
        panels.outline(panel["image"], row.truth, TRUTH)
        if row.reconstruction is not None:
            panels.grey(panel["reconstruction"], row.reconstruction, limits)
        elif "reconstruction" in panel:
            panel["reconstruction"].set_axis_off()
        panels.coloured(panel["residual"], row.residual, norm)
        panels.grey(panel["prediction"], row.image, limits)
        panels.outline(panel["prediction"], row.mask, PREDICTION, fill=True)
        panels.outline(panel["prediction"], row.truth, TRUTH)
        verdict, colour = ("DEFECT", VERMILLION) if row.score > threshold else ("OK", BLUE)
        panel["residual"].set_title(f"{row.score:.3g}  {verdict}", fontsize=11, color=colour)
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
    return style.save(figure, path)


def score_histogram(
    path: Path,
    good: ArrayLike,
    defective: Mapping[str, ArrayLike],
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
        defective: kind -> [m] scores; without any, the panel is left out.
        threshold: in the scores' unit.
        calibrated: a second threshold, drawn dashed.
        of: what has a score, for the axes.
        title: above the figure.
    """
    groups = [{"good": np.asarray(good, np.float64)}, {k: np.asarray(v, np.float64) for k, v in defective.items()}]
    groups = groups[: 2 if any(v.size for v in groups[1].values()) else 1]
    scores = np.concatenate([v for group in groups for v in group.values()])
    positive = scores[scores > 0]
    log = bool(scores.min() >= 0 and positive.size and positive.max() >= 30 * positive.min())
    floor = float(positive.min()) if log else -np.inf
    low, high = style.widened(max(scores.min(), floor), scores.max())
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)

    figure = style.new(1.4 + 1.9 * len(groups), title)
    column = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group, colours in zip(column, groups, ((BLUE,), _KINDS), strict=False):
        bottom = np.zeros(40)
        for i, (kind, values) in enumerate(group.items()):
            counts, _ = np.histogram(np.clip(values, low, high), edges)
            look = {"color": colours[i % len(colours)], "hatch": "/" * (3 * (i // len(colours)))}
            label = f"{style.short(kind, 32)} ({values.size})"
            axes.bar(
                edges[:-1], counts, np.diff(edges), bottom, align="edge", edgecolor="white", lw=0.5, label=label, **look
            )
            bottom += counts
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_ylabel(f"{of}s")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        style.plain(axes)
    lines = {"threshold": (threshold, "-")} | ({} if calibrated is None else {"calibrated": (calibrated, "--")})
    _thresholds(column, lines, floor)
    if log:
        column[-1].set_xscale("log")
        style.log_ticks(column[-1].xaxis)
    column[-1].set_xlabel(f"{of} score" + (" (zeros in the leftmost bar)" if log and (scores == 0).any() else ""))
    return style.save(figure, path)


def _thresholds(column: np.ndarray, lines: Mapping[str, tuple[float, str]], floor: float) -> None:
    """Draws one or two thresholds (value and line style); the axis begins at `floor`."""
    # The lower threshold's label goes to the left of its line, the higher one's to the right: they never meet.
    sides = ["left"] if len(lines) == 1 else ["right", "left"]
    for (name, (value, line)), side in zip(sorted(lines.items(), key=lambda item: item[1][0]), sides, strict=True):
        for axes in column:
            axes.axvline(max(value, floor), color=BLACK, ls=line, lw=1.5)
        column[0].annotate(
            f"{name} {value:.3g}",
            (max(value, floor), 1),
            xytext=(4 if side == "left" else -4, 3),
            xycoords=column[0].get_xaxis_transform(),
            textcoords="offset points",
            ha=side,
        )


def curves(path: Path, series: Mapping[str, Mapping[str, Any]], *, title: str) -> Path:
    """ROC and per-region overlap (PRO) of the pixels, side by side; PRO up to a false positive rate of 0.3.

    Args:
        path: the PNG to write.
        series: name -> "fpr", "tpr" and "pro" [k], all in [0, 1], and the numbers "auroc" and "aupro_30".
        title: above the figure.
    """
    figure = style.new(4.8 + 0.22 * len(series), title)
    roc, pro = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    roc.annotate("chance", (0.7, 0.7), xytext=(4, -4), textcoords="offset points", va="top", color=GREY)
    pro.axvline(0.3, color=GREY, lw=1.5, ls="--")
    pro.axvspan(0.3, 0.34, color=GREY, alpha=0.15, lw=0)
    pro.annotate("FPR 0.3", (0.3, 0.02), xytext=(-4, 0), textcoords="offset points", ha="right", color=GREY)
    looks = itertools.cycle(itertools.product(("-", "--", ":"), SERIES))
    for (name, curve), (line, colour) in zip(series.items(), looks, strict=False):
        label = f"{style.short(name, 48)}:  AUROC {curve['auroc']:.3f},  AU-PRO {curve['aupro_30']:.3f}"
        roc.plot(curve["fpr"], curve["tpr"], color=colour, ls=line, lw=2, label=label)
        pro.plot(curve["fpr"], curve["pro"], color=colour, ls=line, lw=2)
    roc.set(title="ROC", ylabel="true positive rate (pixels)", xlim=(0, 1), ylim=(0, 1.02))
    pro.set(title="PRO", ylabel="per-region overlap", xlim=(0, 0.34), ylim=(0, 1.02))
    for axes in (roc, pro):
        axes.set_xlabel("false positive rate (pixels)")
        style.plain(axes)
    figure.legend(loc="outside lower center", frameon=False)
    return style.save(figure, path)


def found_by_contrast(path: Path, maps: Mapping[str, Mapping[str, Mapping[str, Any]]], *, title: str) -> Path:
    """Shares of defective images found at 5 % false alarms, as bars by the defects' contrast-to-noise ratio.

    Args:
        path: the PNG to write.
        maps: name -> bin -> "images", their number, the same for all maps, and "found", a share in [0, 1] or NaN.
        title: above the figure.
    """
    figure = style.new(4.2, title)
    axes = figure.subplots()
    bins = next(iter(maps.values()))
    width = 0.8 / len(maps)
    for i, (name, shares) in enumerate(maps.items()):
        places = np.arange(len(bins)) + (i - (len(maps) - 1) / 2) * width
        heights = np.nan_to_num([b["found"] for b in shares.values()])
        look: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "hatch": "/" * (3 * (i // len(SERIES)))}
        bars = axes.bar(places, heights, width, edgecolor="white", lw=0.5, label=style.short(name, 48), **look)
        texts = ["" if np.isnan(b["found"]) else f"{b['found']:.2f}" for b in shares.values()]
        axes.bar_label(bars, texts, fontsize=9)
    axes.set_xticks(range(len(bins)), [f"{name}\n({b['images']})" for name, b in bins.items()])
    axes.set(xlabel="contrast-to-noise ratio of the greatest defect (images)", ylim=(0, 1.08))
    axes.set_ylabel("share found at 5 % false alarms")
    style.plain(axes)
    figure.legend(loc="outside lower center", frameon=False, ncols=min(len(maps), 4))
    return style.save(figure, path)


def predictions(path: Path, rows: Sequence[Prediction], *, title: str) -> Path:
    """One image a row: input, truth, and each model's map with its score above; a colour scale for each model.

    Raises ValueError where a row lacks a model that the first row has, or has another.
    """
    models = list(rows[0].maps)
    if any(set(row.maps) != set(models) for row in rows):
        raise ValueError("every row needs a map of the same models")
    names, headers = [row.name for row in rows], ["input", "truth", *models]
    figure, grid = panels.grid(names, headers, rows[0].image.shape, title=title, titled=True, extra_in=0.9)
    for i, row in enumerate(rows):
        panels.grey(grid[i, 0], row.image, panels.limits(row.image))
        panels.grey(grid[i, 1], row.truth.astype(np.float32), (0, 1))
    for model, column in zip(models, grid[:, 2:].T, strict=True):
        norm = panels.scale([row.maps[model][0] for row in rows])
        for row, axes in zip(rows, column, strict=True):
            values, score = row.maps[model]
            panels.coloured(axes, values, norm)
            axes.set_title(f"score {score:.3g}", fontsize=11)
        # Inset, because a colour bar with its own place in the grid moves its column out of line with the others.
        figure.colorbar(
            ScalarMappable(norm, RESIDUAL_COLOURS),
            cax=column[-1].inset_axes((0, -0.12, 1, 0.06)),
            orientation="horizontal",
            extend="max",
            ticks=MaxNLocator(nbins=4),
        )
    return style.save(figure, path)

"""The roofline picture: what each timed work reaches of what the machine can do (Williams et al. 2009)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy import optimize

from steel_ad.report import style

_HEIGHT_IN = 7.5
_LABEL_GAP = 0.06  # of the panel's height, between two works' labels


def roofline(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    ceilings: Mapping[str, float],
    *,
    title: str,
    ours: str,
) -> Path:
    """Rate against intensity, both logarithmic, below the measured ceilings; works that `ours` or a form of it, `ours`_*, did are named.

    Args:
        path: the PNG to write.
        rows: at least one; "work", "impl", "flops", "bytes" and "median_ms" of each are drawn.
        ceilings: "matmul_tflops", optionally "matmul_bf16_tflops", and "copy_gbs".
        title: above the figure.
        ours: the implementation that gets large marks and its works' names.
    """
    figure = style.new(_HEIGHT_IN, title)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="intensity (FLOP per byte that must move)", ylabel="rate (GFLOP/s)")
    points = [(row["flops"] / row["bytes"], row["flops"] / row["median_ms"] / 1e6, row) for row in rows]
    peaks = {
        name.removeprefix("matmul_").removesuffix("tflops").strip("_") or "float32": 1e3 * value
        for name, value in ceilings.items()
        if name.startswith("matmul")
    }
    ridges = [peak / ceilings["copy_gbs"] for peak in peaks.values()]
    x = [p[0] for p in points]
    left, right = min(*x, *ridges) / 4, max(*x, *ridges) * 3
    axes.set_xlim(left, right)
    axes.set_ylim(min(p[1] for p in points) / 2, max(peaks.values()) * 3)
    _ceilings(axes, peaks, ceilings["copy_gbs"], left, right)

    impls = list(dict.fromkeys(row["impl"] for row in rows if row["impl"] != ours))
    # Neighbours in the legend differ in shape and in colour.
    marks, colours = "sD^v<>pPXhd", style.SERIES[1:]
    looks = {impl: (marks[i % len(marks)], colours[i % len(colours)]) for i, impl in enumerate(impls)}
    handles = []
    if any(row["impl"] == ours for row in rows):
        handles.append(Line2D([], [], ls="", marker="o", ms=9, color=style.BLUE, label=ours))
    for impl, (marker, colour) in looks.items():
        xs, ys = zip(*((a, b) for a, b, row in points if row["impl"] == impl), strict=True)
        look: dict[str, Any] = {"ls": "", "marker": marker, "ms": 6, "mfc": "none", "mec": colour, "mew": 1.4}
        axes.plot(xs, ys, zorder=3, **look)
        handles.append(Line2D([], [], label=impl, **look))
    named = [(a, b, row) for a, b, row in points if row["impl"] == ours]
    axes.plot([p[0] for p in named], [p[1] for p in named], "o", ms=9, color=style.BLUE, mec="white", zorder=4)
    known = {row["work"] for _, _, row in named}
    for point in points:
        # On a GPU a work may have been done in bfloat16 alone.
        if point[2]["work"] not in known and point[2]["impl"].startswith(f"{ours}_"):
            known.add(point[2]["work"])
            named.append(point)
    _names(axes, named)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return style.save(figure, path)


def _ceilings(axes: Axes, peaks: Mapping[str, float], copy_gbs: float, left: float, right: float) -> None:
    highest = max(peaks.values())
    axes.plot([left, highest / copy_gbs], [left * copy_gbs, highest], color=style.BLACK, lw=1.5)
    for peak in peaks.values():
        axes.plot([peak / copy_gbs, right], [peak, peak], color=style.BLACK, lw=1.5)
    # Beside the lines there are points wherever works come near them.
    said = [f"copy {copy_gbs:.4g} GB/s", *(f"matrix product, {name}: {_rate(peak)}" for name, peak in peaks.items())]
    axes.set_title(f"ceilings: {'; '.join(said)}", fontsize=10, loc="left")
    style.plain(axes)
    for axis in (axes.xaxis, axes.yaxis):
        style.log_ticks(axis)


def _names(axes: Axes, points: Sequence[tuple[float, float, Mapping[str, Any]]]) -> None:
    """Names in a column right of the panel, in the points' order of height, each with a thin line to its point."""
    low, high = np.log10(axes.get_ylim())
    ordered = sorted(points, key=lambda p: p[1])
    places = _apart([float((np.log10(y) - low) / (high - low)) for _, y, _ in ordered], _LABEL_GAP)
    for (x, y, row), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{row['work']}\n{_rate(y)}, {_time(row['median_ms'])}",
            (x, y),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": style.GREY, "lw": 0.7, "shrinkB": 5, "relpos": (0, 0.5)},
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places within 0..1 nearest to ascending wanted ones of which neighbours are `gap` apart."""
    if not wanted:
        return []
    steps = gap * np.arange(len(wanted))
    free = optimize.isotonic_regression(np.array(wanted) - steps).x
    return (np.clip(free, 0, 1 - steps[-1]) + steps).tolist()


def _rate(gflops: float) -> str:
    return f"{gflops:.3g} GFLOP/s" if gflops < 1e3 else f"{gflops / 1e3:.3g} TFLOP/s"


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1e3 else f"{ms / 1e3:.3g} s"

"""Figures of results over many runs: a metric along a study's axis, and methods side by side."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from steel_ad.report import style
from steel_ad.report.style import BLACK, GREY, SERIES, log_ticks, new, plain

_STYLES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")

# (data set, map) -> value of the axis -> metric -> numbers of the seeds
Series = Mapping[tuple[str, str], Mapping[str, Mapping[str, Sequence[float]]]]


def study(
    path: Path,
    found: Series,
    *,
    values: Sequence[str],
    metrics: Mapping[str, str],
    axis: str,
    title: str,
) -> Path:
    """A panel a metric: its median over seeds along the axis, from the least to the greatest as a band or bar.

    Values stand evenly spaced, whatever their size; where they are no numbers, nothing joins them.

    Args:
        path: the PNG to write.
        found: as `Series`; a value, metric or number may be missing.
        values: of the axis, in order.
        metrics: key -> label.
        axis: label of the axis.
        title: above the figure.
    """
    rows = -(-len(metrics) // 3)
    figure = new(0.9 + 2.5 * rows + 0.25 * len(found), title)
    panels = figure.subplots(rows, 3, squeeze=False, sharex=True).ravel()
    for axes, (metric, label) in zip(panels, metrics.items(), strict=False):
        for number, (name, points) in enumerate(found.items()):
            _line(axes, points, values, metric, _style(list(found), name), number / max(1, len(found) - 1) - 0.5)
        axes.set_title(label, fontsize=11)
        axes.set_xlim(-0.5, len(values) - 0.5)
        crowded = sum(map(len, values)) > 24
        axes.set_xticks(
            range(len(values)), values, rotation=35 if crowded else 0, ha="right" if crowded else "center", fontsize=9
        )
        plain(axes)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(metrics) - 3) : len(metrics)]:
        axes.set_xlabel(axis, fontsize=11)
    figure.legend(handles=_keys(list(found)), loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return style.save(figure, path)


def methods(
    path: Path,
    found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    *,
    metrics: Mapping[str, str],
    title: str,
) -> Path:
    """A panel a metric, a row a method, a colour a data set: the median over seeds, and a bar from least to greatest.

    Args:
        path: the PNG to write.
        found: method -> data set -> metric -> numbers of the seeds, which may be none.
        metrics: key -> label.
        title: above the figure.
    """
    datasets = sorted({d for of in found.values() for d in of})
    figure = new(1.4 + 0.34 * len(found) + 0.12 * len(datasets), title)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        for y, of in enumerate(found.values()):
            for i, dataset in enumerate(datasets):
                if numbers := of.get(dataset, {}).get(metric):
                    place = y + 0.5 * (i / max(1, len(datasets) - 1) - 0.5)
                    colour = SERIES[i % len(SERIES)]
                    axes.plot([min(numbers), max(numbers)], [place, place], color=colour, lw=1.5)
                    marker = _MARKERS[i // len(SERIES) % len(_MARKERS)]
                    axes.plot(float(np.median(numbers)), place, color=colour, marker=marker, ms=5)
        axes.set_title(label, fontsize=11)
        plain(axes)
    panels[0].set_yticks(range(len(found)), found, fontsize=9, parse_math=False)
    panels[0].set_ylim(len(found) - 0.5, -0.5)
    keys = [
        Line2D([], [], ls="", color=SERIES[i % len(SERIES)], marker=_MARKERS[i // len(SERIES) % len(_MARKERS)], label=d)
        for i, d in enumerate(datasets)
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return style.save(figure, path)


def promises(path: Path, cases: Sequence[Mapping[str, Any]]) -> Path:
    """Promised against observed rates, a point a case: a column for each kind of plates and choice of scores, a row a form.

    A case without an alarm lies on the lower edge; a black bar is the mean.

    Args:
        path: the PNG to write.
        cases: with `plates`, `calibrated_on`, `form`, `map`, `promised`, `alarms` and `fresh`.
    """
    kinds = list(dict.fromkeys((c["plates"], c["calibrated_on"]) for c in cases))
    forms, maps = (list(dict.fromkeys(c[k] for c in cases)) for k in ("form", "map"))
    figure = new(1.2 + 3.0 * len(forms), "false alarms on fresh good plates")
    panels = figure.subplots(len(forms), len(kinds), squeeze=False, sharex=True, sharey=True)
    promised = [c["promised"] for c in cases]
    rates = [c["alarms"] / c["fresh"] for c in cases]
    low = 0.5 / max(c["fresh"] for c in cases)
    ends = min(promised) / 1.7, max(promised) * 1.7
    for (form, kind), axes in zip(itertools.product(forms, kinds), panels.flat, strict=True):
        axes.plot(ends, ends, color=GREY, lw=1.2, ls="--")
        some = [c for c in cases if (c["plates"], c["calibrated_on"], c["form"]) == (*kind, form)]
        for i, name in enumerate(maps):
            own = [c for c in some if c["map"] == name]
            places = [c["promised"] * 1.12 ** (i - (len(maps) - 1) / 2) for c in own]
            seen = [max(low, c["alarms"] / c["fresh"]) for c in own]
            axes.scatter(places, seen, s=14, color=SERIES[i % len(SERIES)], alpha=0.6, lw=0, label=name, clip_on=False)
        for rate in sorted({c["rate"] for c in some}):
            of_rate = [c for c in some if c["rate"] == rate]
            mean = np.mean([c["alarms"] / c["fresh"] for c in of_rate])
            at = np.mean([c["promised"] for c in of_rate])
            axes.plot([at / 1.4, at * 1.4], [mean, mean], color=BLACK, lw=1.6)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=(low, max(*rates, ends[1]) * 1.1))
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        plain(axes)
    for axes, (plates, chosen) in zip(panels[0], kinds, strict=True):
        axes.set_title(plates if plates == "independent" else f"{plates}: {chosen}", fontsize=11)
    for axes, form in zip(panels[:, 0], forms, strict=True):
        axes.set_ylabel(f"{form} form\nobserved rate", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("promised rate", fontsize=11)
    keys = [
        *(Line2D([], [], ls="", marker="o", color=SERIES[i % len(SERIES)], label=n) for i, n in enumerate(maps)),
        Line2D([], [], color=BLACK, lw=1.6, label="mean"),
        Line2D([], [], color=GREY, lw=1.2, ls="--", label="as promised"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=10)
    return style.save(figure, path)


def _style(names: Sequence[tuple[str, str]], name: tuple[str, str]) -> dict[str, str]:
    """Colour by data set, line and marker by map."""
    datasets, maps = (list(dict.fromkeys(n[i] for n in names)) for i in (0, 1))
    of_map = maps.index(name[1])
    return {
        "color": SERIES[datasets.index(name[0]) % len(SERIES)],
        "ls": _STYLES[of_map % len(_STYLES)],
        "marker": _MARKERS[of_map % len(_MARKERS)],
    }


def _line(axes: Axes, points, values: Sequence[str], metric: str, style: dict[str, str], offset: float) -> None:
    numeric = all(_is_number(v) for v in values)
    places, middle, low, high = [], [], [], []
    for i, value in enumerate(values):
        if numbers := points.get(value, {}).get(metric):
            places.append(i if numeric else i + 0.4 * offset)
            middle.append(float(np.median(numbers)))
            low.append(min(numbers))
            high.append(max(numbers))
    if numeric:
        axes.plot(places, middle, lw=1.8, ms=4, **style)  # type: ignore[arg-type]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.18, lw=0)
    else:
        axes.vlines(places, low, high, color=style["color"], lw=1.5)
        axes.plot(places, middle, ms=6, **{**style, "ls": ""})  # type: ignore[arg-type]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _keys(names: Sequence[tuple[str, str]]) -> list[Line2D]:
    return [
        Line2D([], [], lw=1.8, ms=5, label=", ".join(name), **_style(names, name))  # type: ignore[arg-type]
        for name in names
    ]

"""The figure of a training run: its loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad.report import style
from steel_ad.report.style import BLUE, GREY, VERMILLION, log_ticks, new, plain


def training_curve(path: Path, history: Mapping[str, Any], *, title: str) -> Path:
    """Loss against step, as logged and smoothed over 2 % of the run; logarithmic where it falls tenfold or more.

    Args:
        path: the PNG to write.
        history: "step" [k] and "loss" [k], k >= 1; optionally both of "validation_step" and "validation_loss" [j], and
            "learning_rate" [k], which gets a panel of its own.
        title: above the figure.
    """
    step, loss = np.asarray(history["step"]), np.asarray(history["loss"], np.float64)
    rate = history.get("learning_rate")
    figure = new(4.5 if rate is None else 5.6, title)
    heights = [1] if rate is None else [3, 1]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes = panels[0]

    half = len(loss) // 100
    axes.plot(step, loss, color=BLUE, alpha=0.25 if half else 1.0, lw=1, label="training, as logged")
    if half:
        axes.plot(step, _running_mean(loss, half), color=BLUE, lw=2, label=f"training, mean of {2 * half + 1}")
    drawn = loss
    if "validation_loss" in history:
        validation = np.asarray(history["validation_loss"], np.float64)
        look = {"color": VERMILLION, "lw": 1.5, "marker": "o", "ms": 4}
        axes.plot(history["validation_step"], validation, label="validation", **look)
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
    return style.save(figure, path)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over 2 * half + 1 values around each; shorter windows at both ends."""
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")

"""The loop around a jitted step: cadence, metrics fetched one call late, checkpoints, and the checks a person would make."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from steel_ad.errors import InputError
from steel_ad.train.state import TrainState

# (first step's number, metrics name -> [k])
OnMetrics = Callable[[int, dict[str, np.ndarray]], None]


def run(
    step: Callable,
    state: TrainState,
    data: Any,
    root: jax.Array,
    *,
    steps: int,
    steps_per_call: int = 1,
    on_metrics: OnMetrics,
    save: Callable[[int, TrainState], None] | None = None,
    save_every: int = 0,
) -> TrainState:
    """Trains from `state.step` to `steps`.

    Args:
      step: from `make_step`, with the same `steps_per_call`.
      data: what every call of `step` is given, or an iterator of what each one is, from `state.step` on.
      on_metrics: called with every step's metrics, in order, one call behind the device; may raise to stop the run.
      save: called with (step, state) every `save_every` steps and at the end, all metrics up to there seen and finite.

    Returns:
      The state after `steps` steps.

    Raises:
      InputError: a loss or gradient that is not finite; nothing of it has been saved.
    """
    now = int(state.step)
    each = data if isinstance(data, Iterator) else itertools.repeat(data)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        first, metrics = pending[0], jax.device_get(pending[1])
        pending = None
        # A gradient that is not finite has spoilt the parameters before the next loss shows it.
        bad = np.flatnonzero(~(np.isfinite(metrics["loss"]) & np.isfinite(metrics.get("gradient_norm", 0.0))))
        if bad.size:
            raise InputError(
                f"the loss or its gradient is not finite at step {first + bad[0] + 1}: lower --config.learning_rate or set "
                "--config.clip_norm=1 in a new --workdir; the checkpoints before it are kept",
                status=1,
            )
        on_metrics(first, metrics)

    while now < steps:
        state, metrics = step(state, next(each), root)
        settle()
        pending = (now, metrics)
        now += steps_per_call
        if save is not None and (now >= steps or (save_every and now % save_every < steps_per_call)):
            settle()
            save(now, state)
    settle()
    return state

"""One training, whatever it trains: the loop around a detector's pure functions."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from steel_ad import parallel
from steel_ad.train import feed, loop
from steel_ad.train.stage import OnStep, Row, Stage
from steel_ad.train.state import TrainState
from steel_ad.train.step import make_step

# The seed comes in as data, so that runs which differ in it alone share a step, on each device.
_step = functools.lru_cache(maxsize=16)(make_step)


def fit(
    stage: Stage,
    data: Any,
    state: TrainState,
    root: jax.Array,
    *,
    history: Sequence[Row] = (),
    on_step: OnStep | None = None,
    save: Callable[[int, TrainState], None] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains from `state` to the stage's last step, on all devices unless a `mesh` is given.

    Args:
      data: a NamedTuple for the stage's functions; fields that are Images are put on the device, or, where they are not in
        memory, read while training goes on, with the same result.
      state: training donates it.
      root: key of all random numbers.
      history: rows of the steps before, each with its "step".
      on_step: called with (step number from 1, {"loss", "gradient_norm", the objective's}) for every step, in order.
      save: called with (step, state) every `checkpoint_every` steps and at the end.

    Raises:
      InputError: a batch that the devices do not divide, a loss that is not finite, or as `stage.watch`.
    """
    mesh = parallel.mesh() if mesh is None else mesh
    parallel.check_batch(stage.batch_size, mesh)
    state = parallel.put(state, parallel.replicated(mesh))
    watch = stage.watch(history) if stage.watch else None

    def on_metrics(first: int, metrics: dict[str, np.ndarray]) -> None:
        for i in range(len(metrics["loss"])):
            row = {name: float(values[i]) for name, values in metrics.items()}
            for look in (on_step, watch):
                if look is not None:
                    look(first + i + 1, row)

    calls = feed.calls(stage, data, root, first=int(state.step), mesh=mesh)
    with contextlib.closing(calls):
        return loop.run(
            step_of(stage, mesh),
            state,
            calls,
            root,
            steps=stage.steps,
            steps_per_call=stage.steps_per_call,
            on_metrics=on_metrics,
            save=save,
            save_every=stage.checkpoint_every,
        )


def step_of(stage: Stage, mesh: Mesh) -> Callable:
    """The stage's jitted step, which takes what `feed.calls` yields."""
    return _step(stage.objective, stage.optimizer, steps_per_call=stage.steps_per_call, mesh=mesh)

"""One training, whatever it trains: the loop around a detector's pure functions."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from steel_ad import parallel
from steel_ad.train import feed, loop
from steel_ad.train.state import TrainState
from steel_ad.train.step import Objective, make_step, steps_per_call

# Metrics of a step by name.
Row = Mapping[str, float]
OnStep = Callable[[int, Row], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained and how, but for its images, its first state and its seed.

    Stages with the same `objective` and `optimizer` share a compiled step, so both should come from a cache.

    Attributes:
      objective: (params, extra, data, step, root) -> (loss, (extra, metrics)).
      choose: (data, step, root) -> the places that a step's patches are cut at: see `train.feed`.
      steps: of the whole stage.
      batch_size: patches of a step, over all devices.
      patch_size: pixels.
      checkpoint_every: steps.
      watch: called with the rows of the steps before, gives a function of (step, row) that may end training by an InputError.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    choose: feed.Choose
    steps: int
    batch_size: int
    patch_size: int
    checkpoint_every: int
    watch: Callable[[Sequence[Row]], OnStep] | None = None


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

    step, calls, per_call = prepare(stage, data, root, first=int(state.step), mesh=mesh)
    with contextlib.closing(calls):
        return loop.run(
            step,
            state,
            calls,
            root,
            steps=stage.steps,
            steps_per_call=per_call,
            on_metrics=on_metrics,
            save=save,
            save_every=stage.checkpoint_every,
        )


def prepare(
    stage: Stage, data: Any, root: jax.Array, *, first: int, mesh: Mesh
) -> tuple[Callable, Generator[Any], int]:
    """The jitted step of `train.step`, what each of its calls takes from step `first` on, and the steps of a call."""
    per_call = steps_per_call(stage.steps, stage.checkpoint_every)
    streamed = feed.streamed(data)
    step = _step(stage.objective, stage.optimizer, steps_per_call=per_call, mesh=mesh, streamed=streamed)
    calls = feed.calls(
        data,
        stage.choose,
        root,
        first=first,
        total=stage.steps,
        per_call=per_call,
        batch_size=stage.batch_size,
        patch_size=stage.patch_size,
        mesh=mesh,
    )
    return step, calls, per_call

"""What a detector says of a training: pure functions and sizes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from jax import Array

from steel_ad.data.patches import Crops
from steel_ad.train.step import Objective, steps_per_call

# Metrics of a step by name.
Row = Mapping[str, float]
OnStep = Callable[[int, Row], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained and how, but for its images, its first state and its seed.

    Stages with the same `objective` and `optimizer` share a compiled step, so both should come from a cache.

    Attributes:
      objective: (params, extra, data, step, root) -> (loss, (extra, metrics)).
      choose: (data, step, root) -> places of a step's patches in each set, by the set's field in the data; `image` is -1 where
        a sample does not look at the set.
      steps: of the whole stage.
      batch_size: patches of a step, over all devices.
      patch_size: pixels.
      checkpoint_every: steps.
      watch: called with the rows of the steps before, gives a function of (step, row) that may end training by an InputError.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    choose: Callable[[Any, Array, Array], dict[str, Crops]]
    steps: int
    batch_size: int
    patch_size: int
    checkpoint_every: int
    watch: Callable[[Sequence[Row]], OnStep] | None = None

    @property
    def steps_per_call(self) -> int:
        """Steps in one dispatch."""
        return steps_per_call(self.steps, self.checkpoint_every)

"""What training carries from step to step, and the random numbers it needs."""

import zlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array


@flax.struct.dataclass
class TrainState:
    """`step` int32 `[]`; `params` and `opt_state` as the model's and optax's; `extra`: batch statistics, or {}."""

    step: Array
    params: Any
    opt_state: Any
    extra: Any


def create(params: Any, optimizer: optax.GradientTransformation, extra: Any = None) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {} if extra is None else extra)


def stream(root: Array, name: str, step: Array | int = 0) -> Array:
    """Key of a named stream at a step; nothing carries a split key, so a resumed run draws what the first would have."""
    # crc32, since Python's own hash is salted per process.
    return jax.random.fold_in(jax.random.fold_in(root, np.uint32(zlib.crc32(name.encode()))), step)

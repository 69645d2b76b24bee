"""What training carries from step to step, and the random numbers it needs."""

import zlib
from collections.abc import Callable
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


def first(make: Callable[[Array], TrainState], key: Array) -> TrainState:
    """`make(key)`, the state before the first step, on the device: a program that runs once, so XLA's CPU compiler spends less on it."""
    if isinstance(key, jax.core.Tracer):  # part of another program
        return make(key)
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(make, compiler_options=options)(key)


def create(params: Any, optimizer: optax.GradientTransformation, extra: Any = None) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {} if extra is None else extra)


def stream(root: Array, name: str, step: Array | int = 0) -> Array:
    """Key of a named stream at a step; nothing carries a split key, so a resumed run draws what the first would have."""
    # crc32, since Python's own hash is salted per process.
    return jax.random.fold_in(jax.random.fold_in(root, np.uint32(zlib.crc32(name.encode()))), step)

"""Parameters and their initial values."""

import contextvars
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from jax import Array
from jax.nn import initializers

# While `together` traces: how many numbers -> these numbers.
_DRAW: contextvars.ContextVar[Callable[[int], Array] | None] = contextvars.ContextVar("draw", default=None)


def normal(stddev: float) -> initializers.Initializer:
    """`jax.nn.initializers.normal`, drawn as one row of numbers: the same ones, which XLA compiles in a sixth of the time."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        draw = _DRAW.get()
        row = (
            jax.random.normal(key, (math.prod(shape),), dtype) if draw is None else draw(math.prod(shape)).astype(dtype)
        )
        return row.reshape(shape) * jnp.array(stddev, dtype)

    return init


def parameter(module: nn.Module, name: str, init: initializers.Initializer, shape: tuple[int, ...]) -> Array:
    """`module.param`, float32, which traces `init` only where it is needed: flax else does so at every use, for its shape.

    Raises:
      flax.errors.ScopeParamShapeError: there is one of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value: Array = module.get_variable("params", name)
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value


def together(init: Callable[..., Any], key: Array, *arguments: Any) -> Any:
    """`init(key, *arguments)`, where all that `normal` draws are parts of one row of numbers, in the order of the draws.

    Drawn one by one they are most of the program that makes a network, and of the seconds that XLA compiles it.

    Args:
      init: (key, *arguments) -> parameters, such as a flax module's; it draws the same each time that it is traced.

    Returns:
      What `init` returns; numbers that `normal` has not drawn are those of `init` itself.
    """
    sizes: list[int] = []

    def note(size: int) -> Array:
        sizes.append(size)
        return jnp.zeros(size)

    # A function of its own, since JAX traces none twice.
    _within(note, jax.eval_shape, lambda *given: init(*given), key, *arguments)
    # Two halves in a loop, since XLA fuses what is outside of one with every part of it.
    half = -(-sum(sizes) // 2)
    # Of an even count, which XLA draws four times as fast on CPU.
    halves = jax.lax.map(lambda k: jax.random.normal(k, (half + half % 2,)), jax.random.split(key))
    parts = iter(jnp.split(halves[:, :half].ravel(), np.cumsum(sizes)))
    return _within(lambda _: next(parts), init, key, *arguments)


def _within(draw: Callable[[int], Array], call: Callable[..., Any], *arguments: Any) -> Any:
    token = _DRAW.set(draw)
    try:
        return call(*arguments)
    finally:
        _DRAW.reset(token)

"""The training step: pure, jitted, its state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from steel_ad import parallel
from steel_ad.data.patches import Streamed
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.train.state import TrainState

# (params, extra, data, step, root key) -> (loss [], (extra, metrics name -> []))
Objective = Callable[[Any, Any, Any, Array, Array], tuple[Array, tuple[Any, dict[str, Array]]]]


def steps_per_call(*cadences: int) -> int:
    """Steps in one dispatch, a divisor of every cadence: on accelerators up to 20, since dispatch costs more than a step.

    On CPU it is 1: convolutions in a loop body lose their threads.
    """
    most = 1 if jax.default_backend() == "cpu" else 20
    return max(k for k in range(1, most + 1) if all(cadence % k == 0 for cadence in cadences))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    steps_per_call: int = 1,
    mesh: Mesh | None = None,
) -> Callable:
    """Jitted `(state, data, root) -> (state, metrics)`; metrics are float32 `[steps_per_call]` each.

    They are "loss", "gradient_norm" (before any clipping) and whatever the objective adds.

    The state is donated: the one passed in must not be used again.

    Over a `mesh` (of all devices by default) the state and the results are replicated, and what the objective has passed
    through `parallel.split_batch` is spread. A `Streamed` set in `data` has patches for each of the call's steps,
    `[steps_per_call, b, p, p]`, spread by `parallel.spread_parts`; the objective gets those of its step.
    """
    mesh = parallel.mesh() if mesh is None else mesh
    whole = parallel.replicated(mesh)

    def one(state: TrainState, data, root):
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (extra, metrics)), grads = gradient(state.params, state.extra, data, state.step, root)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its float rates with int32 counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    def many(state, data, root):
        sets, tree = jax.tree.flatten(data, is_leaf=lambda d: isinstance(d, Streamed))
        batches = [d.pixels if isinstance(d, Streamed) else None for d in sets]

        def step(state, batch):
            now = [d if b is None else d._replace(pixels=b) for d, b in zip(sets, batch, strict=True)]
            return one(state, jax.tree.unflatten(tree, now), root)

        with parallel.inside(mesh):
            if steps_per_call == 1:
                state, metrics = step(state, jax.tree.map(lambda b: b[0], batches))
                return state, jax.tree.map(lambda m: jnp.reshape(m, (1,)), metrics)
            return lax.scan(step, state, batches, length=steps_per_call)

    return jax.jit(
        many,
        donate_argnums=0,
        in_shardings=(whole, None, whole),
        out_shardings=whole,
        compiler_options=cpu_compiler_options(),
    )

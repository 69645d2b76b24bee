"""A training step of several seeds: one after the other, or as one vmapped program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad import parallel
from steel_ad.benchmark import train
from steel_ad.benchmark.timing import Program, Work, compiled
from steel_ad.data import patches
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import Good
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.train.step import make_step, steps_per_call


def works(*, tiny: bool) -> list[Work]:
    """`sweep_4_seeds_b16`: one step of the autoencoder with each of four seeds."""
    config, seeds = configs.Autoencoder(crops="fresh", flips=True, batch_size=16), 4
    if tiny:
        config, seeds = dataclasses.replace(config, batch_size=2, patch_size=16, latent=4, stride=16), 2
    rng = np.random.default_rng(0)
    side = 2 * config.patch_size
    plates = patches.stack(list(rng.integers(0, 256, (4, side, side), np.uint8)))
    flops, moved = train.cost(config)
    makers = {
        "steel_ad": functools.partial(_one_by_one, config, plates, seeds),
        "steel_ad_vmapped": functools.partial(_vmapped, config, plates, seeds),
    }
    return [Work(f"sweep_{seeds}_seeds_b{config.batch_size}", seeds * flops, seeds * moved, makers)]


def _one_by_one(config: configs.Autoencoder, plates: patches.Plates, seeds: int) -> Program:
    data: Any = jax.tree.map(jnp.asarray, Good(plates))
    roots = list(jax.random.split(jax.random.key(0), seeds))
    states = [autoencoder.initial_state(config, root) for root in roots]
    per_call, step = _step(config)
    program, compile_s, counted = compiled(step, states[0], data, roots[0])

    def call():
        metrics = []
        for i, root in enumerate(roots):
            states[i], found = program(states[i], data, root)
            metrics.append(found)
        return metrics

    counted = {name: seeds * value for name, value in counted.items() if name in ("flops", "bytes accessed")}
    return Program(call=call, works=per_call, compile_s=compile_s, counted=counted, precision=config.dtype)


def _step(config: configs.Autoencoder) -> tuple[int, Any]:
    """As many steps a call as training has, and the program of them."""
    per_call = steps_per_call(config.total_steps, config.checkpoint_every)
    objective, optimizer = autoencoder.objective(config), autoencoder.optimizer(config)
    return per_call, make_step(objective, optimizer, steps_per_call=per_call, mesh=parallel.mesh(1))


def _vmapped(config: configs.Autoencoder, plates: patches.Plates, seeds: int) -> Program:
    data: Any = jax.tree.map(jnp.asarray, Good(plates))
    roots = jax.random.split(jax.random.key(0), seeds)
    states = jax.vmap(lambda root: autoencoder.initial_state(config, root))(roots)
    per_call, step = _step(config)
    # The function behind the jitted step: an inner program cannot have compiler options.
    many = jax.vmap(step.__wrapped__, in_axes=(0, None, 0))
    jitted = jax.jit(many, donate_argnums=0, compiler_options=cpu_compiler_options())
    program, compile_s, counted = compiled(jitted, states, data, roots)

    def call():
        nonlocal states
        states, metrics = program(states, data, roots)
        return metrics

    return Program(call=call, works=per_call, compile_s=compile_s, counted=counted, precision=config.dtype)

"""Peers in JAX: dm-pix, and the autoencoder as one would first write it in flax."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from steel_ad import config as configs
from steel_ad import native
from steel_ad.benchmark.timing import Images, Program, compiled
from steel_ad.detectors import autoencoder
from steel_ad.train.state import create


def dm_pix(images: Images, gradient: bool, window_size: int) -> Program:
    import dm_pix as pix

    def maps(x, y):
        # dm-pix knows no padding: its map is smaller by the window.
        return pix.ssim(x, y, filter_size=window_size, filter_sigma=1.5, return_map=True)

    function = jax.value_and_grad(lambda x, y: maps(x, y).mean()) if gradient else maps
    x, y = images()
    pair = jnp.asarray(x)[..., None], jnp.asarray(y)[..., None]
    program, compile_s, counted = compiled(jax.jit(function), *pair)
    return Program(call=lambda: program(*pair), compile_s=compile_s, counted=counted)


def linen_naive(config: configs.Autoencoder) -> Program:
    """The network as one would first write it, under a plain `jax.jit`."""
    import flax.linen as nn

    size = config.patch_size // 16
    conv = functools.partial(nn.Conv, padding=1)
    transpose = functools.partial(nn.ConvTranspose, padding="SAME")
    four: dict[str, Any] = {"kernel_size": (4, 4), "strides": (2, 2)}
    three: dict[str, Any] = {"kernel_size": (3, 3)}

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for o, shape in (
                *((32, four), (32, four), (32, three), (64, four), (64, three)),
                *((128, four), (64, three), (32, three)),
            ):
                x = nn.leaky_relu(conv(o, **shape)(x), 0.2)
            x = nn.Conv(config.latent, (size, size), padding="VALID")(x)
            x = nn.leaky_relu(nn.ConvTranspose(32, (size, size), padding="VALID")(x), 0.2)
            for layer in (
                *(conv(64, **three), conv(128, **three), transpose(64, **four), conv(64, **three)),
                *(transpose(32, **four), conv(32, **three), transpose(32, **four)),
            ):
                x = nn.leaky_relu(layer(x), 0.2)
            return nn.sigmoid(transpose(1, **four)(x))

    network, loss, optimizer = Network(), autoencoder.loss_function(config), autoencoder.optimizer(config)
    patches = jnp.asarray(batch(config))

    def step(state, x):
        value, grads = jax.value_and_grad(lambda p: loss(cast(Array, network.apply(p, x)), x).mean())(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    state = create(jax.jit(network.init)(jax.random.key(0), patches[:1]), optimizer)
    with native.suspended():
        program, compile_s, counted = compiled(jax.jit(step, donate_argnums=0), state, patches)

    def call():
        nonlocal state
        state, value = program(state, patches)
        return value

    return Program(call=call, compile_s=compile_s, counted=counted)


def batch(config: configs.Autoencoder) -> np.ndarray:
    """Random patches, float32 `[b, h, w, 1]` in [0, 1]."""
    return np.random.default_rng(0).random((config.batch_size, config.patch_size, config.patch_size, 1), np.float32)

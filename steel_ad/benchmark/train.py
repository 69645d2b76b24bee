"""One training step of the autoencoder, from resident uint8 plates to updated parameters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steel_ad import config as configs
from steel_ad import parallel
from steel_ad.benchmark import peers, ssim
from steel_ad.benchmark.timing import Maker, Program, Work, compiled, with_xla_alone
from steel_ad.data import patches
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import Good
from steel_ad.train.state import TrainState
from steel_ad.train.step import Objective, make_step, steps_per_call


def cost(config: configs.Autoencoder) -> tuple[float, float]:
    """FLOPs of a step and the least bytes it moves.

    Bytes: parameters and Adam's two moments are read and written once, every layer's output is written once for the
    backward pass and read once by it, and the patches are read.
    """
    network = autoencoder.model(config)
    shape = (config.batch_size, config.patch_size, config.patch_size, 1)

    def layers(x):
        params = network.init(jax.random.key(0), x)
        seen = network.apply(params, x, capture_intermediates=True, mutable=["intermediates"])[1]
        return params["params"], seen["intermediates"]

    params, seen = jax.eval_shape(layers, jax.ShapeDtypeStruct(shape, jnp.float32))
    forward, outputs = {}, 0
    for name, layer in params.items():
        size = math.prod(seen[name]["__call__"][0].shape)
        kh, kw, i, _ = layer["kernel"].shape
        # Kernel elements that meet one output pixel.
        taps = {"Double": kh * kw // 4, "Expand": 1}.get(name.split("_")[0], kh * kw)
        forward[name] = 2 * taps * i * size
        outputs += size
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    # Forward, input gradient and filter gradient are of one size; the patches need no gradient.
    products = 3 * sum(forward.values()) - forward["Halve_0"]
    pixels = math.prod(shape)
    loss = ssim.flops(pixels, gradient=True) if config.loss == "ssim" else 5 * pixels
    # Bias and leaky ReLU forward and backward; Adam with decay.
    flops = products + loss + 6 * outputs + 15 * count
    return float(flops), float(6 * 4 * count + 2 * jnp.dtype(config.dtype).itemsize * outputs + pixels)


def works(*, tiny: bool) -> list[Work]:
    """`train_LOSS_bBATCH`: the thesis' network and optimiser, with fresh crops and flips."""
    plain = configs.Autoencoder(crops="fresh", flips=True)
    if tiny:
        plain = dataclasses.replace(plain, patch_size=16, latent=4, stride=16)
    rng = np.random.default_rng(0)
    side = 2 * plain.patch_size
    plates = patches.stack(list(rng.integers(0, 256, (4 if tiny else 64, side, side), np.uint8)))
    found = []
    for loss, batch in [("ssim", 4)] if tiny else [("ssim", 32), ("ssim", 128), ("l2", 32), ("l2", 128)]:
        config = dataclasses.replace(plain, loss=loss, batch_size=batch)
        makers: dict[str, Maker] = {"steel_ad": functools.partial(_ours, config, plates)}
        if jax.default_backend() == "gpu":
            half = dataclasses.replace(config, dtype="bfloat16")
            makers["steel_ad_bf16"] = functools.partial(_ours, half, plates)
        makers = with_xla_alone(makers, makers["steel_ad"])
        makers |= peers.train(config, torch=not tiny)
        found.append(Work(f"train_{loss}_b{batch}", *cost(config), makers))
    return found


def _ours(config: configs.Autoencoder, plates: patches.Plates) -> Program:
    state = autoencoder.initial_state(config, jax.random.key(0))
    return stepping(autoencoder.objective(config), autoencoder.optimizer(config), state, Good(plates), config)


def stepping(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Any,
    config: configs.Autoencoder | configs.Segmentation,
) -> Program:
    """The project's own training step with its state, as many steps a call as training has."""
    root, mesh = jax.random.key(0), parallel.mesh(1)
    data = jax.tree.map(jnp.asarray, data)
    per_call = steps_per_call(config.total_steps, config.checkpoint_every)
    step = make_step(objective, optimizer, steps_per_call=per_call, mesh=mesh)
    program, compile_s, counted = compiled(step, state, data, root)
    if per_call > 1:
        # XLA counts a loop's body once, whatever its length: count a step by itself.
        counted = compiled(make_step(objective, optimizer, mesh=mesh), state, data, root)[2]

    def call():
        nonlocal state
        state, metrics = program(state, data, root)
        return metrics

    return Program(call=call, works=per_call, compile_s=compile_s, counted=counted, precision=config.dtype)

"""One training step of the U-Net, from resident uint8 plates with defects inserted to updated parameters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.benchmark import peers, train
from steel_ad.benchmark.timing import Program, Work, with_xla_alone
from steel_ad.data import defects, patches
from steel_ad.detectors import segmentation


def cost(config: configs.Segmentation) -> tuple[float, float]:
    """FLOPs of a step and the least bytes it moves, counted as the autoencoder's: see `train.cost`."""
    network = segmentation.network(config)
    shape = (config.batch_size, config.patch_size, config.patch_size, 1)

    def layers(x):
        variables = network.init(jax.random.key(0), x)
        return variables["params"], network.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[
            1
        ]

    params, seen = jax.eval_shape(layers, jax.ShapeDtypeStruct(shape, jnp.float32))
    products = outputs = normalised = 0
    for name, layer in params.items():
        size = math.prod(seen["intermediates"][name]["__call__"][0].shape)
        kh, kw, i, _ = layer["kernel"].shape
        taps = 1 if name.startswith("Upsample") else kh * kw  # kernel elements that meet one output pixel
        # Forward, input gradient and filter gradient are of one size; the images need no gradient.
        products += (2 if name == "ConvNormRelu_0" else 3) * 2 * taps * i * size
        outputs += size
        normalised += size if name.startswith("ConvNormRelu") else 0
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    # Batch norm and ReLU, forward and backward; Adam.
    flops = products + 20 * normalised + 12 * count
    return float(flops), float(6 * 4 * count + 2 * jnp.dtype(config.dtype).itemsize * outputs + math.prod(shape))


def works(*, tiny: bool) -> list[Work]:
    """`unet16_train_b8`: width 16, 256x256, binary cross-entropy, Adam."""
    width, batch, side = (2, 2, 32) if tiny else (16, 8, 256)
    config = configs.Segmentation(
        width=width, batch_size=batch, patch_size=side, loss="bce", optimizer="adam", blend="difference", steps=1000
    )
    ours = functools.partial(_ours, config)
    makers = with_xla_alone({"steel_ad": ours}, ours)
    if jax.default_backend() == "gpu":
        makers["steel_ad_bf16"] = functools.partial(_ours, dataclasses.replace(config, dtype="bfloat16"))
    makers |= peers.unet(config, torch=not tiny)
    return [Work(f"unet{width}_train_b{batch}", *cost(config), makers)]


def _ours(config: configs.Segmentation) -> Program:
    rng = np.random.default_rng(0)
    good = patches.stack(list(rng.integers(0, 256, (16, config.patch_size, config.patch_size), np.uint8)))
    library = defects.procedural(jax.random.key(0), 6, size=64)
    return train.stepping(
        segmentation.segmentation_objective(config),
        segmentation.optimizer(config, config.total_steps),
        segmentation.initial_segmentation(config, config.total_steps),
        segmentation.Samples(good, library),
        config,
    )

"""The autoencoder at stride 32 on whole images and on a strip: uint8 images in, float32 maps and scores out, on the host.

`inspection_tiles_*` is what `experiments.inspection` does between reading and listing: `View` computes an opened map for each tile with
its halo. The other works are what evaluation does: `opened.open_maps` of whole images, whose residual maps are fetched too. Whole
frames are not what an inspection runs, though they are faster: the map of a pixel is averaged over all windows that hold it, and
at a tile's border a halo of 64 px holds three of the four along an axis. Calibration looks at single tiles, so its promise is for
their maps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.benchmark import peers, ssim
from steel_ad.benchmark.timing import Frames, Program, Work, compiled, with_latency, with_xla_alone
from steel_ad.detectors import Fitted, autoencoder, opened
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.inspection import tiles
from steel_ad.inspection.view import View
from steel_ad.ops import sliding
from steel_ad.ops.convolution import cpu_compiler_options


def network_flops(config: configs.Autoencoder) -> float:
    """FLOPs of the network's convolutions on one window."""
    network = autoencoder.model(config)

    def layers(x):
        params = network.init(jax.random.key(0), x)
        return params["params"], network.apply(params, x, capture_intermediates=True, mutable=["intermediates"])[1]

    params, seen = jax.eval_shape(
        layers, jax.ShapeDtypeStruct((1, config.patch_size, config.patch_size, 1), jnp.float32)
    )
    total = 0
    for name, layer in params.items():
        kh, kw, i, _ = layer["kernel"].shape
        # Kernel elements that meet one output pixel.
        taps = {"Double": kh * kw // 4, "Expand": 1}.get(name.split("_")[0], kh * kw)
        total += 2 * taps * i * math.prod(seen["intermediates"][name]["__call__"][0].shape)
    return float(total)


def cost(config: configs.Autoencoder, shape: tuple[int, int, int]) -> tuple[float, float]:
    """FLOPs and least bytes of images `[b, h, w]`: each window through all of the network, SSIM, two maxima or minima an element of the
    disk's runs; the images and the parameters are read once, two float32 maps are written."""
    b, h, w = shape
    windows = math.prod(len(sliding.positions(side, config.patch_size, config.stride)) for side in (h, w))
    pixels = b * h * w
    opening = 2 * (2 * config.radius + 2 * config.radius)
    flops = b * windows * network_flops(config) + ssim.flops(pixels, gradient=False) + opening * pixels
    params = jax.eval_shape(lambda: autoencoder.initial_state(config, jax.random.key(0)).params)
    return flops, 9.0 * pixels + sum(4 * p.size for p in jax.tree.leaves(params))


def works(*, tiny: bool) -> list[Work]:
    """`inspection_{256,1x256,2048x4096}`: a batch of images, and one image and one frame with their latency; on accelerators also
    `inspection_8x2048x4096`, frames of which one is fetched while the next are under way. `inspection_tiles_*`: a strip in tiles."""
    config = configs.Autoencoder()
    if tiny:
        config = dataclasses.replace(config, patch_size=32, latent=4, stride=16)
    batch = 8 if jax.default_backend() == "cpu" else 128
    shapes = {"256": (batch, 256, 256), "1x256": (1, 256, 256), "2048x4096": (1, 2048, 4096)}
    if jax.default_backend() != "cpu":
        shapes["8x2048x4096"] = (8, 2048, 4096)
    found = []
    for name, shape in {"48": (2, 48, 48)}.items() if tiny else shapes.items():
        images = functools.partial(_images, shape)
        ours = functools.partial(_ours, config, images)
        makers = with_xla_alone({"steel_ad": ours}, ours, config.window_size)
        if jax.default_backend() == "gpu":
            makers["steel_ad_bf16"] = functools.partial(_ours, dataclasses.replace(config, dtype="bfloat16"), images)
        makers |= peers.inspection(config, images, torch=not tiny)
        # Enough calls for a percentile.
        block_s = 1.0 if shape[0] == 1 else 0.05
        found.append(
            Work(f"inspection_{name}", *cost(config, shape), makers, {"mpx_s": math.prod(shape) / 1e6}, block_s)
        )
    settings = configs.Inspection(tile_px=32, halo_px=16) if tiny else configs.Inspection()
    side = (48, 64) if tiny else (512, 1024) if jax.default_backend() == "cpu" else (2048, 4096)
    strip = functools.partial(_images, side)
    makers = {"steel_ad": functools.partial(_tiles, config, settings, strip)}
    if jax.default_backend() == "gpu":
        half = dataclasses.replace(config, dtype="bfloat16")
        makers["steel_ad_bf16"] = functools.partial(_tiles, half, settings, strip)
    amounts = {"mpx_s": math.prod(side) / 1e6}
    found.append(Work(f"inspection_tiles_{side[0]}x{side[1]}", *tiles_cost(config, settings, side), makers, amounts))
    return found


def tiles_cost(
    config: configs.Autoencoder, settings: configs.Inspection, shape: tuple[int, int]
) -> tuple[float, float]:
    """FLOPs and least bytes of a strip `[h, w]` in tiles, as `cost`'s of images as large as the tiles' windows."""
    h, w = (min(settings.tile_px + 2 * settings.halo_px, side) for side in shape)
    count = math.prod(-(-side // settings.tile_px) for side in shape)
    flops, _ = cost(config, (count, h, w))
    return flops, cost(config, (1, *shape))[1]


def _tiles(config: configs.Autoencoder, settings: configs.Inspection, strip: Callable[[], np.ndarray]) -> Program:
    params = autoencoder.initial_state(config, jax.random.key(0)).params
    detector = AutoencoderDetector(config)
    trained = Fitted(detector, params, config.radius, None, "", {}, frozenset())
    view, frame = View(trained, settings), strip()

    def call():
        bands = tiles.bands([frame], tile=settings.tile_px, halo=settings.halo_px)
        return [maps for _, _, maps in view.maps((0, band) for band in bands)]

    return Program(call=call, precision=config.dtype)


def _images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def program(config: configs.Autoencoder):
    """Jitted `(params, images uint8 [b, h, w]) -> Opened` of the first map."""
    detector = AutoencoderDetector(config).only(config.maps[0])

    def maps(params, image):
        return opened.open_maps(detector, params, image, radius=config.radius)[detector.name]

    return jax.jit(jax.vmap(maps, in_axes=(None, 0)), compiler_options=cpu_compiler_options())


def _ours(config: configs.Autoencoder, images: Frames) -> Program:
    params = autoencoder.initial_state(config, jax.random.key(0)).params
    frames = images()
    parts = np.split(frames, len(frames) // min(len(frames), opened.at_once(frames.shape[1:])))
    run, compile_s, counted = compiled(program(config), params, parts[0])

    def call():
        # All parts are under way before the first one is fetched.
        return jax.device_get([run(params, part) for part in parts])

    if len(frames) == 1:
        # A large frame's windows go through in a loop, whose body XLA counts once.
        looped = frames[0].size > 2**16
        return with_latency(
            Program(call=call, compile_s=compile_s, counted=None if looped else counted, precision=config.dtype)
        )
    counted = {name: len(parts) * value for name, value in counted.items() if name in ("flops", "bytes accessed")}
    return Program(call=call, compile_s=compile_s, counted=counted, precision=config.dtype)

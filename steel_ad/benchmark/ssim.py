"""SSIM maps of a batch of image pairs, and their mean with its gradient with respect to the first image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad.benchmark import peers
from steel_ad.benchmark.timing import Images, Maker, Program, Work, compiled, with_xla_alone
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.ssim import mean_residual, ssim_map

WINDOW = 11


def flops(pixels: int, *, gradient: bool, window: int = WINDOW) -> float:
    """Of a uniform window: four means of two passes, each window - 1 additions a pixel; the gradient has their transposes too."""
    passes = 8 * (2 if gradient else 1)
    return pixels * (passes * (window - 1) + (80 if gradient else 35))


def works(*, tiny: bool) -> list[Work]:
    """`ssim_{forward,gradient}_BxSIDE`."""
    found = []
    for batch, side in [(2, 32)] if tiny else [(32, 128), (8, 2048)]:
        images = functools.partial(_images, batch, side)
        pixels = batch * side * side
        for gradient in (False, True):
            ours = functools.partial(_ours, images, gradient, "uniform")
            makers: dict[str, Maker] = {
                **with_xla_alone({"steel_ad": ours}, ours, WINDOW),
                "steel_ad_gaussian": functools.partial(_ours, images, gradient, "gaussian"),
                **peers.ssim(images, gradient=gradient, window_size=WINDOW, torch=not tiny),
            }
            name = f"ssim_{'gradient' if gradient else 'forward'}_{batch}x{side}"
            # Two images are read, one map or gradient is written.
            found.append(Work(name, flops(pixels, gradient=gradient), 3 * 4 * pixels, makers))
    return found


@functools.lru_cache(maxsize=1)
def _images(batch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.random((batch, side, side), np.float32)
    return x, np.clip(x + 0.1 * rng.standard_normal(x.shape, np.float32), 0, 1)


def _ours(images: Images, gradient: bool, window: str) -> Program:
    one = jax.vmap(functools.partial(mean_residual if gradient else ssim_map, window=window, window_size=WINDOW))
    function = jax.value_and_grad(lambda x, y: one(x, y).mean()) if gradient else one
    x, y = images()
    pair = jnp.asarray(x), jnp.asarray(y)
    program, compile_s, counted = compiled(jax.jit(function, compiler_options=cpu_compiler_options()), *pair)
    return Program(call=lambda: program(*pair), compile_s=compile_s, counted=counted)

"""The same works done by others: naive flax, dm-pix, scikit-image, OpenCV, and PyTorch where it is installed.

Training peers get their batch ready cut: ours draws, cuts and flips its own within the measured time.
"""

import functools
import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from steel_ad import config as configs
from steel_ad.detectors import autoencoder
from steel_ad.ops.ssim import CONSTANTS
from steel_ad.studies.benchmark.timing import Maker, Program, Unavailable, compiled
from steel_ad.train.state import create

# The two batches to compare, float32 `[b, h, w]`.
Images = Callable[[], tuple[np.ndarray, np.ndarray]]

_C1, _C2 = CONSTANTS["thesis"]


def torch_installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def ssim(images: Images, *, gradient: bool, window_size: int, torch: bool) -> dict[str, Maker]:
    """Implementations of SSIM, or of the gradient of its mean; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {"dm_pix": functools.partial(_dm_pix, images, gradient, window_size)}
    if not gradient:
        makers["scikit_image"] = functools.partial(_scikit_image, images, window_size)
        makers["cv2_box"] = functools.partial(_cv2_box, images, window_size)
    if torch and torch_installed():
        for name in ("avg_pool", "avg_pool_separable", "avg_pool_compiled", "torchmetrics", "pytorch_msssim"):
            key = name if name in ("torchmetrics", "pytorch_msssim") else f"torch_{name}"
            makers[key] = functools.partial(_torch_ssim, name, images, gradient, window_size)
    return makers


def train(config: configs.Autoencoder, *, torch: bool) -> dict[str, Maker]:
    """Implementations of the training step; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {"linen_naive": functools.partial(_linen_naive, config)}
    if torch and torch_installed():
        for precision in ("float32", "bfloat16") if jax.default_backend() == "gpu" else ("float32",):
            for how in ("eager", "compile"):
                for layout in ("nchw", "channels_last"):
                    name = f"torch_{how}_{layout}" + ("" if precision == "float32" else "_bf16")
                    makers[name] = functools.partial(_torch_train, config, how, layout, precision)
    return makers


def _dm_pix(images: Images, gradient: bool, window_size: int) -> Program:
    import dm_pix as pix

    def maps(x, y):
        # dm-pix knows no padding: its map is smaller by the window.
        return pix.ssim(x, y, filter_size=window_size, filter_sigma=1.5, return_map=True)

    function = jax.grad(lambda x, y: maps(x, y).mean()) if gradient else maps
    x, y = images()
    pair = jnp.asarray(x)[..., None], jnp.asarray(y)[..., None]
    program, compile_s, counted = compiled(jax.jit(function), *pair)
    return Program(call=lambda: program(*pair), compile_s=compile_s, counted=counted)


def _scikit_image(images: Images, window_size: int) -> Program:
    from skimage.metrics import structural_similarity

    x, y = images()
    one = functools.partial(
        structural_similarity, win_size=window_size, data_range=1.0, use_sample_covariance=False, full=True
    )
    return Program(call=lambda: [one(a, b)[1] for a, b in zip(x, y, strict=True)])


def _cv2_box(images: Images, window_size: int) -> Program:
    import cv2

    x, y = images()

    def mean(a):
        return cv2.boxFilter(a, -1, (window_size, window_size), borderType=cv2.BORDER_REFLECT_101)

    def one(a, b):
        mean_a, mean_b = mean(a), mean(b)
        product, squares = mean_a * mean_b, mean_a * mean_a
        squares += mean_b * mean_b
        variances = mean(a * a)
        variances += mean(b * b)
        variances -= squares
        covariance = mean(a * b)
        covariance -= product
        product += np.float32(_C1 / 2)
        covariance += np.float32(_C2 / 2)
        product *= covariance
        product *= 4
        squares += np.float32(_C1)
        variances += np.float32(_C2)
        squares *= variances
        product /= squares
        return product

    return Program(call=lambda: [one(a, b) for a, b in zip(x, y, strict=True)])


def _linen_naive(config: configs.Autoencoder) -> Program:
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
    batch = jnp.asarray(_batch(config))

    def step(state, x):
        value, grads = jax.value_and_grad(lambda p: loss(cast(Array, network.apply(p, x)), x).mean())(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    state = create(jax.jit(network.init)(jax.random.key(0), batch[:1]), optimizer)
    program, compile_s, counted = compiled(jax.jit(step, donate_argnums=0), state, batch)

    def call():
        nonlocal state
        state, value = program(state, batch)
        return value

    return Program(call=call, compile_s=compile_s, counted=counted)


def _batch(config: configs.Autoencoder) -> np.ndarray:
    return np.random.default_rng(0).random((config.batch_size, config.patch_size, config.patch_size, 1), np.float32)


def _torch() -> tuple[Any, str, Callable[[Any], None]]:
    """The module, the device that jax uses too, and how to wait for it."""
    # Read as torch starts: a program from its cache would be timed as compiled.
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    if jax.default_backend() != "gpu":
        return torch, "cpu", lambda _: None
    if not torch.cuda.is_available():
        raise Unavailable("this torch sees no GPU")
    # As jax's default precision.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch, "cuda", lambda _: torch.cuda.synchronize()


def _torch_map(torch, x, y, kernels):
    """SSIM map `[b, 1, h, w]` by means of pooling with these kernels, one after the other."""
    pool, pad = torch.nn.functional.avg_pool2d, max(kernels[0]) // 2
    x, y = (torch.nn.functional.pad(a, (pad,) * 4, mode="reflect") for a in (x, y))

    def mean(a):
        return functools.reduce(lambda a, kernel: pool(a, kernel, 1), kernels, a)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return top / ((mean_x * mean_x + mean_y * mean_y + _C1) * (var_x + var_y + _C2))


def _torch_ssim(name: str, images: Images, gradient: bool, k: int) -> Program:
    torch, device, wait = _torch()
    a, b = (torch.from_numpy(i)[:, None].to(device) for i in images())
    if name == "torchmetrics":
        from torchmetrics.functional.image import structural_similarity_index_measure as measure

        def maps(a, b):
            return measure(a, b, gaussian_kernel=False, kernel_size=k, data_range=1.0, return_full_image=True)[1]

    elif name == "pytorch_msssim":
        from pytorch_msssim import ssim as measure

        # It returns the image's mean alone.
        maps = functools.partial(measure, data_range=1.0, size_average=False, win_size=k)
    else:
        kernels = [(k, 1), (1, k)] if name == "avg_pool_separable" else [(k, k)]
        maps = functools.partial(_torch_map, torch, kernels=kernels)
    if name == "avg_pool_compiled":
        maps = torch.compile(maps)

    def call():
        if not gradient:
            with torch.no_grad():
                return maps(a, b)
        a.requires_grad_(True)
        return torch.autograd.grad(maps(a, b).mean(), a)[0]

    return Program(call=call, wait=wait, compile_s=_torch_compile(call, wait) if name == "avg_pool_compiled" else None)


def _torch_compile(call, wait) -> float:
    """Seconds of the call that compiles.

    Raises:
      Unavailable: the compiler or something it needs is missing.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wait(call())
    except Exception as error:  # inductor wraps whatever went wrong
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"torch.compile failed: {reason}") from None
    return time.perf_counter() - start


def _torch_train(config: configs.Autoencoder, how: str, layout: str, precision: str) -> Program:
    torch, device, wait = _torch()
    nn, size = torch.nn, config.patch_size // 16
    torch.manual_seed(0)
    layers: list[Any] = []
    i = 1
    for kind, o in (
        *(("halve", 32), ("halve", 32), ("same", 32), ("halve", 64), ("same", 64), ("halve", 128), ("same", 64)),
        *(("same", 32), ("collapse", config.latent), ("expand", 32), ("same", 64), ("same", 128), ("double", 64)),
        *(("same", 64), ("double", 32), ("same", 32), ("double", 32), ("double", 1)),
    ):
        layers += [
            {
                "halve": lambda i, o: nn.Conv2d(i, o, 4, 2, 1),
                "same": lambda i, o: nn.Conv2d(i, o, 3, 1, 1),
                "double": lambda i, o: nn.ConvTranspose2d(i, o, 4, 2, 1),
                "collapse": lambda i, o: nn.Conv2d(i, o, size),
                "expand": lambda i, o: nn.ConvTranspose2d(i, o, size),
            }[kind](i, o),
            *([nn.LeakyReLU(0.2)] if kind != "collapse" else []),
        ]
        i = o
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = nn.Sequential(*layers[:-1], nn.Sigmoid()).to(device, memory_format=memory)
    x = torch.from_numpy(_batch(config).transpose(0, 3, 1, 2)).to(device).contiguous(memory_format=memory)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )

    def loss(x):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            y = network(x)
        y = y.float()
        if config.loss == "l2":
            return torch.nn.functional.mse_loss(y, x)
        return 1 - _torch_map(torch, y, x, [(11, 1), (1, 11)]).mean()

    if how == "compile":
        loss = torch.compile(loss)

    def call():
        optimizer.zero_grad(set_to_none=True)
        value = loss(x)
        value.backward()
        optimizer.step()
        return value

    compile_s = _torch_compile(call, wait) if how == "compile" else None
    return Program(call=call, wait=wait, compile_s=compile_s, precision=precision)

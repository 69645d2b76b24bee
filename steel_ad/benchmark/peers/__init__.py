"""The same works done by others: naive flax, dm-pix, scikit-image, scikit-learn, OpenCV, numpy, and PyTorch where it is installed.

Training peers get their batch ready cut: ours draws, cuts and flips its own within the measured time.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax

from steel_ad import config as configs
from steel_ad.benchmark.peers import arrays, jax_libraries, pytorch
from steel_ad.benchmark.timing import Frames, Images, Maker, Program


def torch_installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def ssim(images: Images, *, gradient: bool, window_size: int, torch: bool) -> dict[str, Maker]:
    """Implementations of SSIM, or of its mean and that one's gradient; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {"dm_pix": functools.partial(jax_libraries.dm_pix, images, gradient, window_size)}
    if not gradient:
        makers["scikit_image"] = functools.partial(arrays.scikit_image, images, window_size)
        makers["cv2_box"] = functools.partial(arrays.cv2_box, images, window_size)
    if torch and torch_installed():
        by_torch = ("avg_pool", "avg_pool_separable", "avg_pool_compiled", "banded", "banded_compiled")
        for key, name in (
            *((f"torch_{n}", n) for n in by_torch),
            *((n, n) for n in ("torchmetrics", "pytorch_msssim")),
        ):
            makers[key] = functools.partial(pytorch.ssim, name, images, gradient, window_size)
    return makers


def train(config: configs.Autoencoder, *, torch: bool) -> dict[str, Maker]:
    """Implementations of the training step; PyTorch's on request, if installed."""
    naive: dict[str, Maker] = {"linen_naive": functools.partial(jax_libraries.linen_naive, config)}
    return naive | _by_torch(torch, pytorch.train, config)


def unet(config: configs.Segmentation, *, torch: bool) -> dict[str, Maker]:
    """Implementations of the U-Net's training step: PyTorch's, on request and if installed."""
    return _by_torch(torch, pytorch.unet, config)


def _by_torch(torch: bool, step: Callable[..., Program], config: Any) -> dict[str, Maker]:
    if not (torch and torch_installed()):
        return {}
    ways = ("eager", "compile", "graphs") if jax.default_backend() == "gpu" else ("eager", "compile")
    return {
        f"torch_{how}_{layout}{end}": functools.partial(step, config, how, layout, precision)
        for (precision, end), how, layout in itertools.product(_precisions(), ways, _LAYOUTS)
    }


_LAYOUTS = ("nchw", "channels_last")


def _precisions() -> list[tuple[str, str]]:
    """Precisions in which PyTorch is timed, and what they add to an implementation's name."""
    return [("float32", "")] + ([("bfloat16", "_bf16")] if jax.default_backend() == "gpu" else [])


def inspection(config: configs.Autoencoder, images: Frames, *, torch: bool) -> dict[str, Maker]:
    """Implementations of inspection: PyTorch's network with OpenCV's box filters and opening."""
    if not (torch and torch_installed()):
        return {}
    return {
        f"torch_opencv_{layout}{end}": functools.partial(pytorch.inspection, config, images, layout, precision)
        for (precision, end), layout in itertools.product(_precisions(), _LAYOUTS)
    }

"""Which form of an operation runs where: one table, which the operations of `ops` ask while JAX traces them.

XLA's plain form of an operation is right on every backend, and slow on some. Its CPU backend is slow on strided and dilated
convolutions, on their gradients and on the gradient of window maxima, and has no fast form of large kernels. cuDNN is slow on few
channels, and XLA asks it for a transposed convolution's filter gradient as for a convolution with a kernel as large as the image.
Every other form computes the same numbers up to rounding. `steel_ad.native` is C++ and CUDA; the rest are XLA's own operations,
rewritten. Other accelerators get the plain forms.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from steel_ad import native

_CPU, _GPU, _BOTH, _ANY = ("cpu",), ("gpu",), ("cpu", "gpu"), ()
# The largest kernel for which the compiled form beats products of spectra: 1.5 times at 7x7, as fast at 11x11, but not its gradients.
_DIRECT_PX = 7
# Pixels of a row that become channels together, for images of one channel and others: cuDNN takes three times as long for 1 or 16
# channels as for the same work at 32.
_ABREAST_OF_IMAGES, _ABREAST = 8, 4
# Elements of a first sum. One over more than 32 becomes a reduce-window on CPU, which XLA does not fuse with what it sums.
PARTIAL_SUM = 16


class Form(NamedTuple):
    """One form of an operation.

    Attributes:
      name: by which the operation knows it.
      backends: where it is the faster one; none named: everywhere.
      fits: whether it takes these arguments.
    """

    name: str
    backends: tuple[str, ...] = _ANY
    fits: Callable[..., bool] = lambda *_: True


def _compiled(x: Array, kernel: Array) -> bool:
    return native.ready(x, kernel)


def _compiled_if_odd(x: Array, kernel: Array) -> bool:
    height, width = kernel.shape[:2]
    return height == width and height % 2 == 1 and native.ready(x, kernel)


def _to_one_channel(x: Array, kernel: Array) -> bool:
    return kernel.shape[3] == 1


def abreast(x: Array) -> int:
    """How many pixels of a row of `[b, h, w, i]` the form "abreast" takes together."""
    return _ABREAST_OF_IMAGES if x.shape[3] == 1 else _ABREAST


# Operation -> its forms. It runs in the first one that is for this backend and fits the arguments.
FORMS: dict[str, tuple[Form, ...]] = {
    # Convolutions of stride 1, by the kernel's size and the number of output channels. Arguments: x, kernel.
    "same": (Form("native", _CPU, _compiled_if_odd), Form("plain")),
    "large": (
        Form("spectra", _CPU, lambda x, kernel: kernel.shape[0] > _DIRECT_PX or not native.ready(x, kernel)),
        Form("same"),
    ),
    "narrow": (Form("abreast", _GPU, lambda x, kernel: x.shape[2] % abreast(x) == 0), Form("same")),
    # 4x4 convolutions of stride 2. Arguments: x, kernel.
    "halve": (Form("native", _CPU, _compiled), Form("blocks", _BOTH), Form("plain")),
    # Their transposes.
    "double": (
        Form("native", _CPU, _compiled),
        Form("overlaps", _BOTH, _to_one_channel),
        Form("blocks", _BOTH),
        Form("plain"),
    ),
    # Gradients of the forms "overlaps" and "blocks" of `double`.
    "double, gradient of x": (Form("blocks", _GPU, _to_one_channel), Form("plain")),
    "double, gradient of kernel": (
        Form("gradient of halve", _GPU, lambda x, kernel: kernel.shape[3] > 1),
        Form("same form"),
    ),
    # Between the levels of a U-Net. Arguments: x, and a 2x2 kernel.
    "transpose_2x2": (Form("products", _BOTH), Form("plain")),
    "max_pool": (Form("slices", _BOTH), Form("plain")),
    # Argument: x.
    "channel_sum": (Form("in two steps", _CPU, lambda x: x.shape[2] % PARTIAL_SUM == 0), Form("plain")),
    # SSIM, with its gradient; the mean of a map has its gradient from the same pass in the form "native", and from the map's in the
    # others. Arguments: images x and y, whether all exponents are 1, whether the window is uniform, and its size.
    "ssim": (
        Form("native", _CPU, lambda x, y, plain, *_: plain and native.ready(x, y)),
        Form("cuda", _GPU, lambda x, y, plain, uniform, k: plain and uniform and native.cuda_ready(k, x, y)),
        Form("plain", _ANY, lambda x, y, plain, *_: plain),
        Form("general"),
    ),
}


def choose(operation: str, *arguments: Array | bool | int) -> str:
    """The name of the form in which an operation runs here; what JAX has traced does not follow when the answer changes."""
    backend = jax.default_backend()
    forms = FORMS[operation]
    return next(f.name for f in forms if (not f.backends or backend in f.backends) and f.fits(*arguments))

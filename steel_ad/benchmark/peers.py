"""The same works done by others: naive flax, dm-pix, scikit-image, scikit-learn, OpenCV, numpy, and PyTorch where it is installed.

Training peers get their batch ready cut: ours draws, cuts and flips its own within the measured time.
"""

import contextlib
import functools
import importlib.util
import os
import tempfile
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
from steel_ad import native
from steel_ad.benchmark.timing import Maker, Program, Unavailable, compiled, seconds, with_latency
from steel_ad.detectors import autoencoder
from steel_ad.ops.ssim import CONSTANTS
from steel_ad.train.state import create

# The two batches to compare, float32 `[b, h, w]`.
Images = Callable[[], tuple[np.ndarray, np.ndarray]]
# Images uint8 `[b, h, w]`.
Frames = Callable[[], np.ndarray]
# Scores float32 and masks bool, `[b, h, w]`.
Maps = Callable[[], tuple[np.ndarray, np.ndarray]]

_C1, _C2 = CONSTANTS["thesis"]


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def ssim(images: Images, *, gradient: bool, window_size: int, torch: bool) -> dict[str, Maker]:
    """Implementations of SSIM, or of its mean and that one's gradient; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {"dm_pix": functools.partial(_dm_pix, images, gradient, window_size)}
    if not gradient:
        makers["scikit_image"] = functools.partial(_scikit_image, images, window_size)
        makers["cv2_box"] = functools.partial(_cv2_box, images, window_size)
    if torch and torch_installed():
        for name in (
            *("avg_pool", "avg_pool_separable", "avg_pool_compiled", "banded", "banded_compiled"),
            *("torchmetrics", "pytorch_msssim"),
        ):
            key = name if name in ("torchmetrics", "pytorch_msssim") else f"torch_{name}"
            makers[key] = functools.partial(_torch_ssim, name, images, gradient, window_size)
    return makers


def train(config: configs.Autoencoder, *, torch: bool) -> dict[str, Maker]:
    """Implementations of the training step; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {"linen_naive": functools.partial(_linen_naive, config)}
    if torch and torch_installed():
        for precision in ("float32", "bfloat16") if jax.default_backend() == "gpu" else ("float32",):
            for how in ("eager", "compile", "graphs") if jax.default_backend() == "gpu" else ("eager", "compile"):
                for layout in ("nchw", "channels_last"):
                    name = f"torch_{how}_{layout}" + ("" if precision == "float32" else "_bf16")
                    makers[name] = functools.partial(_torch_train, config, how, layout, precision)
    return makers


def inspection(config: configs.Autoencoder, images: Frames, *, torch: bool) -> dict[str, Maker]:
    """Implementations of inspection: PyTorch's network with OpenCV's box filters and opening."""
    if not (torch and torch_installed()):
        return {}
    precisions = ("float32", "bfloat16") if jax.default_backend() == "gpu" else ("float32",)
    return {
        f"torch_opencv_{layout}" + ("" if precision == "float32" else "_bf16"): functools.partial(
            _torch_inspection, config, images, layout, precision
        )
        for precision in precisions
        for layout in ("nchw", "channels_last")
    }


def metrics(maps: Maps) -> dict[str, Maker]:
    """scikit-learn's AUROC and an AU-PRO as one writes it in numpy from its definition."""
    return {"sklearn_numpy": functools.partial(_sklearn_metrics, maps)}


def read_png(images: Frames) -> dict[str, Maker]:
    """OpenCV alone, one file after the other, without the checks that tell a damaged file."""
    return {"cv2": functools.partial(_cv2_read, images)}


def crops(images: Frames, *, num: int, side: int) -> dict[str, Maker]:
    """Random crops and flips, float32 in [0, 1], in numpy."""
    return {"numpy": functools.partial(_numpy_crops, images, num, side)}


def insert(images: Frames, library: Callable[[], tuple[np.ndarray, np.ndarray]]) -> dict[str, Maker]:
    """Defects' differences `[n, s, s]` added at random places, with their masks `[n, s, s]`, in numpy."""
    return {"numpy": functools.partial(_numpy_insert, images, library)}


def unet(config: configs.Segmentation, *, torch: bool) -> dict[str, Maker]:
    """Implementations of the U-Net's training step; PyTorch's on request, if installed."""
    makers: dict[str, Maker] = {}
    if torch and torch_installed():
        for precision in ("float32", "bfloat16") if jax.default_backend() == "gpu" else ("float32",):
            for how in ("eager", "compile", "graphs") if jax.default_backend() == "gpu" else ("eager", "compile"):
                for layout in ("nchw", "channels_last"):
                    name = f"torch_{how}_{layout}" + ("" if precision == "float32" else "_bf16")
                    makers[name] = functools.partial(_torch_unet, config, how, layout, precision)
    return makers


def _dm_pix(images: Images, gradient: bool, window_size: int) -> Program:
    import dm_pix as pix

    def maps(x, y):
        # dm-pix knows no padding: its map is smaller by the window.
        return pix.ssim(x, y, filter_size=window_size, filter_sigma=1.5, return_map=True)

    function = jax.value_and_grad(lambda x, y: maps(x, y).mean()) if gradient else maps
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
    import cv2  # noqa: F401

    x, y = images()
    return Program(call=lambda: [_cv2_map(a, b, window_size) for a, b in zip(x, y, strict=True)])


def _cv2_map(a: np.ndarray, b: np.ndarray, window_size: int) -> np.ndarray:
    """SSIM map of two float32 `[h, w]` by five box filters."""
    import cv2

    def mean(a):
        return cv2.boxFilter(a, -1, (window_size, window_size), borderType=cv2.BORDER_REFLECT_101)

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
    with native.suspended():
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

    # One piece of code is compiled for every work, layout and precision; beyond the limit it would run eagerly.
    with contextlib.suppress(AttributeError):  # named otherwise before 2.6
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch.set_num_threads(cpus())
    if jax.default_backend() != "gpu":
        return torch, "cpu", lambda _: None
    if not torch.cuda.is_available():
        raise Unavailable("this torch sees no GPU")
    # As jax's default precision.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch, "cuda", lambda _: torch.cuda.synchronize()


def _torch_pooled(torch, kernels):
    """Means of windows `[b, 1, h, w]` by pooling with these kernels, one after the other."""
    pool = torch.nn.functional.avg_pool2d
    return lambda a: functools.reduce(lambda a, kernel: pool(a, kernel, 1), kernels, a)


def _torch_banded(torch, k, side, device):
    """Means of `[b, 1, side, side]` by products with a banded matrix from both sides, which holds the reflection too."""
    band = np.zeros((side, side), np.float32)
    for i in range(side):
        for j in range(i - k // 2, i + k // 2 + 1):
            band[i, side - 1 - abs(side - 1 - abs(j))] += 1 / k
    band = torch.from_numpy(band).to(device)
    return lambda a: band @ a @ band.T


def _torch_map(torch, mean, pad, x, y):
    """SSIM map `[b, 1, h, w]` by means over windows, after padding by reflection with so many pixels."""
    if pad:
        x, y = (torch.nn.functional.pad(a, (pad,) * 4, mode="reflect") for a in (x, y))
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return top / ((mean_x * mean_x + mean_y * mean_y + _C1) * (var_x + var_y + _C2))


def _torch_ssim(name: str, images: Images, gradient: bool, k: int) -> Program:
    torch, device, wait = _torch()
    a, b = (torch.from_numpy(i)[:, None].to(device) for i in images())
    if name == "torchmetrics":
        # The gradient of its k x k filter of five images unfolds all windows, on a CPU in main memory.
        needed = 5 * 4 * k * k * a.numel()
        if gradient and device == "cpu" and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise Unavailable(f"its gradient would need {needed / 1e9:.0f} GB")
        from torchmetrics.functional.image import structural_similarity_index_measure as measure

        def maps(a, b):
            return measure(a, b, gaussian_kernel=False, kernel_size=k, data_range=1.0, return_full_image=True)[1]

    elif name == "pytorch_msssim":
        from pytorch_msssim import ssim as measure

        # It returns the image's mean alone.
        maps = functools.partial(measure, data_range=1.0, size_average=False, win_size=k)
    elif name.startswith("banded"):
        if a.shape[-1] > 512:
            raise Unavailable("whole rows' products take too long at this size")
        maps = functools.partial(_torch_map, torch, _torch_banded(torch, k, a.shape[-1], device), 0)
    else:
        kernels = [(k, 1), (1, k)] if name == "avg_pool_separable" else [(k, k)]
        maps = functools.partial(_torch_map, torch, _torch_pooled(torch, kernels), k // 2)
    if name.endswith("compiled"):
        maps = torch.compile(maps, dynamic=False)

    def call():
        if not gradient:
            with torch.no_grad():
                return maps(a, b)
        a.requires_grad_(True)
        value = maps(a, b).mean()
        return value.detach(), torch.autograd.grad(value, a)[0]

    return Program(call=call, wait=wait, compile_s=_torch_compile(call, wait) if name.endswith("compiled") else None)


def _torch_compile(call, wait) -> float:
    """Seconds of the call that compiles, which it cannot be told from: a compiled program's `first_ms` is its second call's.

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


def _torch_autoencoder(torch: Any, config: configs.Autoencoder) -> Any:
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
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def _torch_memory(torch: Any, layout: str) -> Any:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def _torch_train(config: configs.Autoencoder, how: str, layout: str, precision: str) -> Program:
    torch, device, wait = _torch()
    memory = _torch_memory(torch, layout)
    network = _torch_autoencoder(torch, config).to(device, memory_format=memory)
    x = torch.from_numpy(_batch(config).transpose(0, 3, 1, 2)).to(device).contiguous(memory_format=memory)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )

    # The faster one on a CPU; on a GPU products would be in tensor cores' precision, too little for variances.
    if device == "cpu":
        maps = functools.partial(_torch_map, torch, _torch_banded(torch, 11, config.patch_size, device), 0)
    else:
        maps = functools.partial(_torch_map, torch, _torch_pooled(torch, [(11, 1), (1, 11)]), 5)

    def loss(x):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            y = network(x)
        y = y.float()
        if config.loss == "l2":
            return torch.nn.functional.mse_loss(y, x)
        return 1 - maps(y, x).mean()

    return _torch_step(torch, how, wait, optimizer, lambda: loss(x), precision)


def _torch_step(torch: Any, how: str, wait: Any, optimizer: Any, loss: Any, precision: str) -> Program:
    """One training step on the loss, its value and gradient as they are ("eager"), compiled, or as CUDA graphs of what is compiled."""
    mode = "reduce-overhead" if how == "graphs" else None
    value_of = loss if how == "eager" else torch.compile(loss, mode=mode, dynamic=False)

    def call():
        optimizer.zero_grad(set_to_none=True)
        value = value_of()
        value.backward()
        optimizer.step()
        return value

    compile_s = None if how == "eager" else _torch_compile(call, wait)
    return Program(call=call, wait=wait, compile_s=compile_s, precision=precision)


def _torch_unet(config: configs.Segmentation, how: str, layout: str, precision: str) -> Program:
    torch, device, wait = _torch()
    nn, width = torch.nn, config.width
    torch.manual_seed(0)

    def block(i: int, o: int) -> Any:
        layers: list[Any] = []
        for a, b in ((i, o), (o, o)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    features = [width * 2**n for n in range(5)]
    pairs = list(zip(features[:0:-1], features[-2::-1], strict=True))
    memory = _torch_memory(torch, layout)
    network = nn.ModuleDict(
        {
            "down": nn.ModuleList([block(i, o) for i, o in zip([1, *features], features, strict=False)]),
            "up": nn.ModuleList([nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs]),
            "join": nn.ModuleList([block(2 * o, o) for _, o in pairs]),
            "last": nn.Conv2d(width, 1, 1),
        }
    ).to(device, memory_format=memory)

    def logits(x):
        skips = []
        for n, down in enumerate(network["down"]):
            x = down(x if n == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(network["up"], network["join"], skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return network["last"](x)

    rng = np.random.default_rng(0)
    shape = (config.batch_size, 1, config.patch_size, config.patch_size)
    x = torch.from_numpy(rng.random(shape, np.float32)).to(device).contiguous(memory_format=memory)
    mask = torch.from_numpy((rng.random(shape) < 0.02).astype(np.float32)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)

    def loss():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            y = logits(x)
        return nn.functional.binary_cross_entropy_with_logits(y.float(), mask)

    return _torch_step(torch, how, wait, optimizer, loss, precision)


# Windows in a network call, of which PyTorch gets the number that is fastest here.
_TILES = {"cpu": (8, 16, 25, 50), "cuda": (25, 125, 500, 1000)}


def _torch_inspection(config: configs.Autoencoder, images: Frames, layout: str, precision: str) -> Program:
    import cv2

    from steel_ad.ops.morphology import disk

    torch, device, wait = _torch()
    memory = _torch_memory(torch, layout)
    network = _torch_autoencoder(torch, config).to(device, memory_format=memory).eval()
    frames = images()
    size, stride, radius = config.patch_size, config.stride, config.radius
    if (frames.shape[1] - size) % stride or (frames.shape[2] - size) % stride:
        raise Unavailable("the stride does not divide the image")
    starts = [range(0, side - size + 1, stride) for side in frames.shape[1:]]
    corners = [(n, y, x) for n in range(len(frames)) for y in starts[0] for x in starts[1]]
    count = np.zeros(frames.shape[1:], np.float32)
    for y in starts[0]:
        for x in starts[1]:
            count[y : y + size, x : x + size] += 1
    inverse = torch.from_numpy(1 / count).to(device)
    footprint = disk(radius).astype(np.uint8)

    def reconstruct(at_once):
        x = torch.from_numpy(frames).to(device).float() / 255
        windows = (
            x.unfold(1, size, stride).unfold(2, size, stride).reshape(-1, 1, size, size)
            if len(corners) < 2000
            else None
        )
        total = torch.zeros_like(x)
        for first in range(0, len(corners), at_once):
            chosen = corners[first : first + at_once]
            if windows is None:  # a large frame's windows together would take half a gigabyte
                part = torch.stack([x[n, i : i + size, j : j + size] for n, i, j in chosen])[:, None]
            else:
                part = windows[first : first + at_once]
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                tiles = network(part.contiguous(memory_format=memory))[:, 0].float()
            for (n, i, j), tile in zip(chosen, tiles, strict=True):
                total[n, i : i + size, j : j + size] += tile
        return x, total * inverse

    def inspect(at_once):
        with torch.inference_mode():
            pairs = zip(*(a.cpu().numpy() for a in reconstruct(at_once)), strict=True)
        found = []
        for image, reconstruction in pairs:
            raw = 1 - _cv2_map(reconstruction, image, config.window_size)
            opened = cv2.morphologyEx(raw, cv2.MORPH_OPEN, footprint)
            found.append((raw, opened, opened.max()))
        return found

    part = corners[: max(_TILES[device])]

    def trial(at_once):
        x = torch.rand(at_once, 1, size, size, device=device).contiguous(memory_format=memory)
        program = Program(call=lambda: network(x), wait=wait)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            seconds(program)
            return min(seconds(program, -(-len(part) // at_once)) for _ in range(3))

    best = min(_TILES[device], key=trial)
    program = Program(call=lambda: inspect(best), wait=wait, precision=precision)
    return with_latency(program) if len(frames) == 1 else program


def _sklearn_metrics(maps: Maps) -> Program:
    from sklearn.metrics import roc_auc_score

    scores, masks = maps()
    return Program(call=lambda: (float(roc_auc_score(masks.ravel(), scores.ravel())), numpy_aupro(scores, masks, 0.3)))


def numpy_aupro(scores: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """AU-PRO of maps `[n, h, w]` up to an FPR of `limit` (Bergmann et al. 2021), by one sort of all pixels.

    Each pixel's change of the FPR and of the mean overlap is summed up in the order of falling scores, ties at once.
    """
    from scipy import ndimage

    change_pro = np.zeros(scores.shape)
    regions = 0
    for mask, change in zip(masks, change_pro, strict=True):
        labels, found = ndimage.label(mask, np.ones((3, 3)))
        change[mask] = (1 / np.bincount(labels.ravel()))[labels[mask]]
        regions += found
    order = np.argsort(scores, axis=None)[::-1]
    ordered = scores.ravel()[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    fpr = np.append(0, np.cumsum(~masks.ravel()[order], dtype=np.int64)[last] / np.count_nonzero(~masks))
    pro = np.append(0, np.cumsum(change_pro.ravel()[order])[last] / regions)
    within = fpr <= limit
    x, y = np.append(fpr[within], limit), np.append(pro[within], np.interp(limit, fpr, pro))
    return float(np.trapezoid(y, x) / limit)


def _cv2_read(images: Frames) -> Program:
    import cv2

    folder = tempfile.TemporaryDirectory()
    frames = images()
    names = [f"{folder.name}/{i:03d}.png" for i in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        cv2.imwrite(name, frame)

    return Program(call=lambda: [cv2.imread(name, cv2.IMREAD_GRAYSCALE) for name in names], close=folder.cleanup)


def _numpy_crops(images: Frames, num: int, side: int) -> Program:
    rng, frames = np.random.default_rng(0), images()
    n, h, w = frames.shape

    def call():
        patches = np.empty((num, side, side, 1), np.float32)
        chosen = rng.integers(0, n, num)
        tops, lefts = rng.integers(0, h - side + 1, num), rng.integers(0, w - side + 1, num)
        flips = 1 - 2 * rng.integers(0, 2, (num, 2))
        for patch, i, top, left, (up, across) in zip(patches, chosen, tops, lefts, flips, strict=True):
            patch[:, :, 0] = frames[i, top : top + side, left : left + side][::up, ::across]
        patches /= 255
        return patches

    return Program(call=call)


def _numpy_insert(images: Frames, library: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Program:
    rng, good = np.random.default_rng(0), images().astype(np.float32) / 255
    differences, masks = library()
    h, w = good.shape[1:]
    s = masks.shape[1]

    def call():
        plates, marked = good.copy(), np.zeros(good.shape, bool)
        for plate, mark in zip(plates, marked, strict=True):
            i, up, across = rng.integers(0, len(masks)), *(1 - 2 * rng.integers(0, 2, 2))
            mask, difference = masks[i][::up, ::across], differences[i][::up, ::across]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            # The mask's box lies wholly inside of the plate, the window around it may hang over.
            top = rng.integers(0, h - (rows[-1] - rows[0])) - rows[0]
            left = rng.integers(0, w - (columns[-1] - columns[0])) - columns[0]
            y, x = slice(max(top, 0), top + s), slice(max(left, 0), left + s)
            seen = slice(y.start - top, min(s, h - top)), slice(x.start - left, min(s, w - left))
            plate[y, x] += difference[seen]
            np.clip(plate[y, x], 0, 1, out=plate[y, x])
            mark[y, x] = mask[seen]
        return plates, marked

    return Program(call=call)

"""Peers in PyTorch, with torchmetrics and pytorch-msssim: eager, compiled, and on a GPU as CUDA graphs."""

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad.benchmark.peers.arrays import cv2_map
from steel_ad.benchmark.peers.jax_libraries import batch
from steel_ad.benchmark.timing import Frames, Images, Program, Unavailable, cpus, seconds, with_latency
from steel_ad.ops.ssim import CONSTANTS

_C1, _C2 = CONSTANTS["thesis"]
# Windows in a network call, of which PyTorch gets the number that is fastest here.
_TILES = {"cpu": (8, 16, 25, 50), "cuda": (25, 125, 500, 1000)}


def _torch() -> tuple[Any, str, Callable[[Any], None]]:
    """The module, the device that jax uses too, and how to wait for it."""
    # PyTorch reads this as it starts: a program from its cache would be timed as compiled.
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
    # The precision that jax has by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch, "cuda", lambda _: torch.cuda.synchronize()


def _pooled(torch, kernels):
    """Means of windows `[b, 1, h, w]` by pooling with these kernels, one after the other."""
    pool = torch.nn.functional.avg_pool2d
    return lambda a: functools.reduce(lambda a, kernel: pool(a, kernel, 1), kernels, a)


def _banded(torch, k, side, device):
    """Means of `[b, 1, side, side]` by products with a banded matrix from both sides, which holds the reflection too."""
    band = np.zeros((side, side), np.float32)
    for i in range(side):
        for j in range(i - k // 2, i + k // 2 + 1):
            band[i, side - 1 - abs(side - 1 - abs(j))] += 1 / k
    band = torch.from_numpy(band).to(device)
    return lambda a: band @ a @ band.T


def _map(torch, mean, pad, x, y):
    """SSIM map `[b, 1, h, w]` by means over windows, after padding by reflection with so many pixels."""
    if pad:
        x, y = (torch.nn.functional.pad(a, (pad,) * 4, mode="reflect") for a in (x, y))
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return top / ((mean_x * mean_x + mean_y * mean_y + _C1) * (var_x + var_y + _C2))


def ssim(name: str, images: Images, gradient: bool, k: int) -> Program:
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
        maps = functools.partial(_map, torch, _banded(torch, k, a.shape[-1], device), 0)
    else:
        kernels = [(k, 1), (1, k)] if name == "avg_pool_separable" else [(k, k)]
        maps = functools.partial(_map, torch, _pooled(torch, kernels), k // 2)
    if name.endswith("compiled"):
        maps = torch.compile(maps, dynamic=False)

    def call():
        if not gradient:
            with torch.no_grad():
                return maps(a, b)
        a.requires_grad_(True)
        value = maps(a, b).mean()
        return value.detach(), torch.autograd.grad(value, a)[0]

    return Program(call=call, wait=wait, compile_s=_compile(call, wait) if name.endswith("compiled") else None)


def _compile(call, wait) -> float:
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


def _autoencoder(torch: Any, config: configs.Autoencoder) -> Any:
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


def _memory(torch: Any, layout: str) -> Any:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def train(config: configs.Autoencoder, how: str, layout: str, precision: str) -> Program:
    torch, device, wait = _torch()
    memory = _memory(torch, layout)
    network = _autoencoder(torch, config).to(device, memory_format=memory)
    x = torch.from_numpy(batch(config).transpose(0, 3, 1, 2)).to(device).contiguous(memory_format=memory)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )

    # The faster one on a CPU; on a GPU products would be in tensor cores' precision, too little for variances.
    if device == "cpu":
        maps = functools.partial(_map, torch, _banded(torch, 11, config.patch_size, device), 0)
    else:
        maps = functools.partial(_map, torch, _pooled(torch, [(11, 1), (1, 11)]), 5)

    def loss(x):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            y = network(x)
        y = y.float()
        if config.loss == "l2":
            return torch.nn.functional.mse_loss(y, x)
        return 1 - maps(y, x).mean()

    return _step(torch, how, wait, optimizer, lambda: loss(x), precision)


def _step(torch: Any, how: str, wait: Any, optimizer: Any, loss: Any, precision: str) -> Program:
    """One training step on the loss, its value and gradient as they are ("eager"), compiled, or as CUDA graphs of what is compiled."""
    mode = "reduce-overhead" if how == "graphs" else None
    value_of = loss if how == "eager" else torch.compile(loss, mode=mode, dynamic=False)

    def call():
        optimizer.zero_grad(set_to_none=True)
        value = value_of()
        value.backward()
        optimizer.step()
        return value

    compile_s = None if how == "eager" else _compile(call, wait)
    return Program(call=call, wait=wait, compile_s=compile_s, precision=precision)


def unet(config: configs.Segmentation, how: str, layout: str, precision: str) -> Program:
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
    memory = _memory(torch, layout)
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

    return _step(torch, how, wait, optimizer, loss, precision)


def inspection(config: configs.Autoencoder, images: Frames, layout: str, precision: str) -> Program:
    import cv2

    from steel_ad.ops.morphology import disk

    torch, device, wait = _torch()
    memory = _memory(torch, layout)
    network = _autoencoder(torch, config).to(device, memory_format=memory).eval()
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
            raw = 1 - cv2_map(reconstruction, image, config.window_size)
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

"""Convolutions and SSIM compiled for this machine's CPU, and SSIM for its NVIDIA GPU, called from inside of XLA's programs.

README.md beside this file says what is compiled and why, how to debug it and how to add to it; `ops.forms` says which programs
use it. Nothing here is needed to run: without a compiler, with several devices, in other precisions and on other accelerators
`ops` use XLA alone.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

_HERE = Path(__file__).parent
SOURCES = [_HERE / name for name in ("convolution.cc", "ssim.cc")]
_CUDA_SOURCE = _HERE / "ssim.cu"
_HEADERS = sorted(_HERE.glob("*.h"))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_TARGETS = (
    *("steel_ad_convolve", "steel_ad_double", "steel_ad_double_to_one", "steel_ad_filter_gradient"),
    *("steel_ad_ssim_residual", "steel_ad_ssim_residual_gradient", "steel_ad_ssim_mean"),
)

_CUDA_TARGETS = ("steel_ad_ssim_residual_cuda", "steel_ad_ssim_residual_gradient_cuda")
# Wide enough for the columns of a lane, and narrow enough that most lanes have results; odd, so that they have a middle.
_CUDA_WINDOWS = (5, 7, 9, 11)

_folder: Path | None = None
_suspended = False
_cuda_loaded = False


def enable(folder: str | Path) -> None:
    """Lets `ready` say yes; the library is compiled when it first does, and kept in `folder` ("": for this process alone)."""
    global _folder
    _folder = Path(folder or tempfile.mkdtemp(prefix="steel_ad_native_"))
    if not folder:
        import atexit

        atexit.register(shutil.rmtree, _folder, ignore_errors=True)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Programs traced inside use XLA alone, so that they run elsewhere or can be counted."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def ready(*arrays: Array) -> bool:
    """Whether these arrays, of one convolution or one pair of images, can be given to this module: float32, on a CPU that is one device.

    Over several devices XLA would gather what they hold before a call that it knows nothing of.
    """
    return (
        _folder is not None
        and not _suspended
        and all(a.dtype == jnp.float32 for a in arrays)
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and _load(_folder)
    )


@functools.cache
def _load(folder: Path) -> bool:
    try:
        library = ctypes.CDLL(str(build(folder)))
    except (OSError, subprocess.CalledProcessError) as error:
        _note("convolutions and SSIM run", error)
        return False
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def cuda_ready(window_size: int, *arrays: Array) -> bool:
    """Whether SSIM of these images with a uniform window can be given to this module on a GPU: float32, one device of compute
    capability 8.0 or more, `nvcc` at hand."""
    return (
        _folder is not None
        and not _suspended
        and window_size in _CUDA_WINDOWS
        and all(a.dtype == jnp.float32 for a in arrays)
        and jax.default_backend() == "gpu"
        and jax.device_count() == 1
        and _load_cuda(_folder, window_size)
    )


def forms() -> dict[str, str]:
    """Whether "convolutions" and "ssim" are at hand in this module's form ("native"; on a GPU once a program has asked for it)
    or in XLA's alone ("xla")."""
    return {
        "convolutions": "native" if ready() else "xla",
        "ssim": "native" if ready() or (_cuda_loaded and not _suspended) else "xla",
    }


@functools.cache
def _load_cuda(folder: Path, window_size: int) -> bool:
    global _cuda_loaded
    capability = getattr(jax.devices()[0], "compute_capability", "")
    # Rows are copied to shared memory by instructions that came with 8.0.
    if not capability.replace(".", "").isdigit() or float(capability) < 8:
        return False
    try:
        library = ctypes.CDLL(str(build_cuda(folder, window_size, f"sm_{capability.replace('.', '')}")))
    except (OSError, subprocess.CalledProcessError) as error:
        _note("SSIM runs", error)
        return False
    for target in _CUDA_TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(f"{target}_{window_size}", capsule, platform="CUDA")
    _cuda_loaded = True
    return True


def build_cuda(folder: Path, window_size: int, architecture: str) -> Path:
    """As `build`, for GPUs such as "sm_90", with CUDA_HOME's or PATH's `nvcc` or that which `jax[cuda13]` installs."""
    home = os.environ.get("CUDA_HOME")
    named = [shutil.which("nvcc", path=str(Path(home) / "bin"))] if home else []
    packages = (Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path)
    found = [*named, shutil.which("nvcc"), *(shutil.which("nvcc", path=str(path)) for path in packages)]
    compiler = next(filter(None, found), None)
    if not compiler:
        raise FileNotFoundError("there is no nvcc (CUDA_HOME names the folder of another)")
    flags = (*("-O3", "-std=c++17", "-w", "-shared", "-Xcompiler", "-fPIC,-w"), f"-arch={architecture}")
    return _build(folder, [compiler], (*flags, f"-DSTEEL_AD_WINDOW={window_size}"), [_CUDA_SOURCE], "")


def _note(what: str, error: Exception) -> None:
    output = getattr(error, "stderr", None) or str(error)
    first = next((line for line in output.splitlines() if "error" in line.lower()), output).strip()
    print(f"note: {what} in XLA's slower form: {first}", file=sys.stderr, flush=True)


def build(folder: Path, flags: tuple[str, ...] = _FLAGS) -> Path:
    """Compiles the library into `folder`, unless it is there already, and returns its path.

    Raises:
      OSError: no compiler, a folder that cannot be written, or a library there that is another user's.
      subprocess.CalledProcessError: the compiler failed; stderr says why.
    """
    found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    # As make's CXX, which may have arguments.
    compiler = shlex.split(os.environ.get("CXX", "")) or list(itertools.islice(found, 1))
    if not compiler:
        raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++; CXX names another)")
    return _build(folder, compiler, flags, SOURCES, _cpu())


def _build(folder: Path, compiler: list[str], flags: tuple[str, ...], sources: list[Path], machine: str) -> Path:
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*_HEADERS, *sources)))
    for part in (*compiler, *flags, jax.lib.__version__, platform.machine(), machine):
        key.update(b"\0" + part.encode())
    library = folder / f"native-{key.hexdigest()[:16]}.so"
    if library.exists():
        # What is loaded is executed.
        if hasattr(os, "getuid") and library.stat().st_uid not in (0, os.getuid()):
            raise PermissionError(f"{library} belongs to another user: give --compilation_cache=FOLDER of your own")
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="native-") as temporary:
        made = Path(temporary) / library.name

        def run(*arguments: str | Path) -> None:
            command = [*compiler, *flags, f"-I{jax.ffi.include_dir()}", *map(str, arguments)]
            subprocess.run(command, check=True, capture_output=True, text=True)

        inputs = sources
        if len(sources) > 1:
            # Side by side, since a compiler takes its sources one after the other.
            inputs = [made.with_name(f"{source.stem}.o") for source in sources]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda source, to: run("-c", source, "-o", to), sources, inputs))
        run(*inputs, "-o", made)
        os.replace(made, library)
    return library


def _cpu() -> str:
    """What distinguishes CPUs that share a home folder."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _empty(dimensions: int) -> Array:
    return jnp.zeros((0,) * dimensions, jnp.float32)


def _call(
    target: str,
    y: tuple[int, ...],
    x: Array,
    of: Array | None,
    kernel: Array,
    bias: Array | None,
    **options: np.generic | bool,
) -> Array:
    """One of the forward targets, to a result `[b, *y]`; of a `jax.vmap` over images it makes one batch."""

    def plain(x, of, kernel, bias):
        result = jax.ShapeDtypeStruct((x.shape[0], *y), jnp.float32)
        return jax.ffi.ffi_call(target, result, vmap_method="sequential")(x, of, kernel, bias, **options)

    call = custom_vmap(plain)

    @call.def_vmap
    def _(size, batched, x, of, kernel, bias):
        many_x, many_of, *others = batched
        if many_x and not any(others) and (many_of or not of.size):
            x, of = (a.reshape(-1, *a.shape[2:]) if many else a for a, many in ((x, many_x), (of, many_of)))
            found = call(x, of, kernel, bias)
            return found.reshape(size, -1, *found.shape[1:]), True
        return jax.vmap(plain, [0 if many else None for many in batched])(x, of, kernel, bias), True

    return call(x, _empty(4) if of is None else of, kernel, _empty(1) if bias is None else bias)


def convolve(
    x: Array, kernel: Array, bias: Array | None, *, stride: int, slope: float, of: Array | None = None
) -> Array:
    """Convolution, padded by (k - 1) // 2, of `[b, h, w, i]` with `[k, k, i, o]`: `[b, h / stride, w / stride, o]`, float32.

    Adds the bias `[o]` and applies a leaky ReLU of `slope` (1: none). With `of`, results of that ReLU and of x's shape, x
    is a gradient and is multiplied by the ReLU's derivative first instead.
    """
    _, h, w, _ = x.shape
    return _call(
        "steel_ad_convolve",
        (h // stride, w // stride, kernel.shape[3]),
        x,
        of,
        kernel,
        bias,
        stride=np.int64(stride),
        padding=np.int64((kernel.shape[0] - 1) // 2),
        slope=np.float32(slope),
    )


def double(
    x: Array, kernel: Array, bias: Array | None, *, slope: float, of: Array | None = None, logistic: bool = False
) -> Array:
    """Transposed convolution of stride 2 of `[b, h, w, i]` with `[4, 4, i, o]`: `[b, 2 h, 2 w, o]`; else as `convolve`.

    `logistic`, for one output channel: the logistic function of the result in place of the leaky ReLU.

    Raises:
      ValueError: `logistic` and several output channels.
    """
    _, h, w, _ = x.shape
    result = (2 * h, 2 * w, kernel.shape[3])
    if logistic and kernel.shape[3] > 1:
        raise ValueError(f"the logistic function is of one output channel, not {kernel.shape[3]}")
    if kernel.shape[3] > 1:
        return _call("steel_ad_double", result, x, of, kernel, bias, slope=np.float32(slope))
    return _call("steel_ad_double_to_one", result, x, of, kernel, bias, slope=np.float32(slope), logistic=logistic)


def filter_gradient(
    x: Array, g: Array, size: int, *, stride: int, slope: float, of: Array | None, exchanged: bool = False
) -> tuple[Array, Array]:
    """Gradients `[size, size, i, o]` and `[o]` of `convolve`'s kernel and bias, of x `[b, h, w, i]` and g, its result's gradient.

    `of`, the results of a leaky ReLU, as in `convolve`; `exchanged`: it belongs to x, whose sum `[i]` is the bias's gradient.
    The sums have a fixed order: the same numbers whatever the number of threads.
    """
    kernel = jax.ShapeDtypeStruct((size, size, x.shape[3], g.shape[3]), jnp.float32)
    bias = jax.ShapeDtypeStruct((x.shape[3] if exchanged else g.shape[3],), jnp.float32)
    call = jax.ffi.ffi_call("steel_ad_filter_gradient", (kernel, bias), vmap_method="sequential")
    of_kernel, of_bias = call(
        x,
        g,
        _empty(4) if of is None else of,
        stride=np.int64(stride),
        padding=np.int64((size - 1) // 2),
        slope=np.float32(slope),
        exchanged=exchanged,
    )
    return of_kernel, of_bias


def ssim_residual(
    x: Array, y: Array, taps: np.ndarray, *, reflect: bool, c1: float, c2: float, cuda: bool, similarity: bool = False
) -> Array:
    """`ops.ssim.ssim_residual` of float32 images `[h, w]` with exponents of 1 and a window of separable, symmetric `taps` `[k]`;
    with `similarity` 1 less that, `ops.ssim.ssim_map`. `cuda`: on a GPU, where taps must be equal."""
    k, (h, w) = len(taps), x.shape
    shape = (h, w) if reflect else (h - k + 1, w - k + 1)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    settings = {"reflect": reflect, "c1": np.float32(c1), "c2": np.float32(c2)}
    settings |= {"base": np.float32(similarity), "sign": np.float32(-1 if similarity else 1)}
    if cuda:
        return jax.ffi.ffi_call(f"{_CUDA_TARGETS[0]}_{k}", result, vmap_method="broadcast_all")(x, y, **settings)
    call = jax.ffi.ffi_call("steel_ad_ssim_residual", result, vmap_method="broadcast_all")
    return call(x, y, np.float32(taps), **settings)


def ssim_residual_gradient(
    x: Array, y: Array, g: Array, taps: np.ndarray, *, reflect: bool, c1: float, c2: float, cuda: bool
) -> Array:
    """Gradient `[h, w]` of x, given g, that of `ssim_residual`'s result; y's is the same with x and y exchanged."""
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    if cuda:
        call = jax.ffi.ffi_call(f"{_CUDA_TARGETS[1]}_{len(taps)}", result, vmap_method="broadcast_all")
        return call(x, y, g, reflect=reflect, c1=np.float32(c1), c2=np.float32(c2))
    call = jax.ffi.ffi_call("steel_ad_ssim_residual_gradient", result, vmap_method="broadcast_all")
    return call(x, y, g, np.float32(taps), reflect=reflect, c1=np.float32(c1), c2=np.float32(c2))


def ssim_mean(x: Array, y: Array, taps: np.ndarray, *, reflect: bool, c1: float, c2: float) -> tuple[Array, Array]:
    """Mean `[]` of `ssim_residual` and its gradient of x `[h, w]`, in one pass; on a CPU only."""
    results = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("steel_ad_ssim_mean", results, vmap_method="broadcast_all")
    mean, gradient = call(x, y, np.float32(taps), reflect=reflect, c1=np.float32(c1), c2=np.float32(c2))
    return mean, gradient

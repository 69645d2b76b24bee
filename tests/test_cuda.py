"""SSIM's CUDA kernels, run lane by lane on the CPU, against XLA's form in float64, and how they are compiled."""

import functools
import shutil
import subprocess
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad import native
from steel_ad.ops import ssim
from steel_ad.ops.ssim import ssim_residual

HERE = Path(__file__).parent
SOURCE = HERE.parent / "steel_ad" / "native" / "ssim.cu"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The emulation for a window of k pixels."""
    if not (compiler := shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def program(k):
        flags = ("-O1", "-std=c++17", "-w", f"-DSTEEL_AD_WINDOW={k}", f'-DKERNELS="{SOURCE}"')
        command = [compiler, *flags, str(HERE / "cuda_on_cpu.cpp"), "-o", str(folder / f"{k}")]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return folder / f"{k}"

    return program


@pytest.mark.parametrize(
    ("k", "count", "height", "width", "padding", "strips"),
    [
        (11, 1, 14, 122, "reflect", 2),  # two groups of columns, rows shared
        (11, 1, 12, 116, "reflect", 1),  # read as vectors of 4
        (11, 2, 11, 11, "reflect", 1),
        (11, 1, 40, 213, "reflect", 3),
        (11, 1, 12, 46, "reflect", 1),  # the last group of the gradient has two columns
        (9, 1, 24, 105, "reflect", 2),
        (11, 1, 16, 132, "valid", 2),
        (7, 1, 16, 61, "reflect", 1),
        (5, 1, 20, 61, "valid", 1),
    ],
)
def test_equals_float64(programs, tmp_path, k, count, height, width, padding, strips):
    rng = np.random.default_rng(0)
    x = rng.random((count, height, width), np.float32)
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1).astype(np.float32)
    # Bright and nearly flat beside full contrast.
    x[..., : width // 3] = 1 - 0.002 * x[..., : width // 3]
    y[..., : width // 3] = x[..., : width // 3] - 0.01 * rng.random((count, height, width // 3))
    with jax.enable_x64(True):
        residual = functools.partial(ssim_residual, window_size=k, c1=1e-4, c2=9e-4, padding=padding)
        expected, back = jax.vjp(jax.vmap(residual), jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.float64))
        g = rng.standard_normal(expected.shape).astype(np.float32)
        of_x = np.asarray(back(jnp.asarray(g, jnp.float64))[0])
    (tmp_path / "in").write_bytes(x.tobytes() + y.tobytes() + g.tobytes())
    sizes = (count, height, width, int(padding == "reflect"), strips)
    subprocess.run([programs(k), *map(str, sizes), tmp_path / "in", tmp_path / "out"], check=True, timeout=100)
    ours, gradient = np.split(np.fromfile(tmp_path / "out", np.float32), [expected.size])
    np.testing.assert_allclose(ours.reshape(expected.shape), 1 - np.asarray(expected), atol=2e-6)
    # XLA's form in float32 is off by 1.5e-4 here.
    assert np.linalg.norm(gradient.reshape(of_x.shape) - of_x) <= 1e-4 * np.linalg.norm(of_x)


def test_without_nvcc_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="no nvcc"):
        native.build_cuda(tmp_path, 11, "sm_90")


def test_nvcc_is_given_window_and_architecture(monkeypatch, tmp_path):
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/said"\nfor last; do :; done\ntouch "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    library = native.build_cuda(tmp_path / "cache", 7, "sm_90")
    said = (tmp_path / "bin" / "said").read_text()
    assert library.is_file()
    assert "-DSTEEL_AD_WINDOW=7" in said
    assert "-arch=sm_90" in said
    assert native.build_cuda(tmp_path / "cache", 9, "sm_90") != library


def test_what_has_been_loaded_is_recorded(monkeypatch):
    monkeypatch.setattr(native, "_folder", None)
    assert native.forms() == {"convolutions": "xla", "ssim": "xla"}

    class Gpu:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(native, "build_cuda", lambda folder, window_size, architecture: Path("missing.so"))
    assert not native._load_cuda(Path("a"), 11)
    assert native.forms()["ssim"] == "xla"
    library = types.SimpleNamespace(**{name: name for name in native._CUDA_TARGETS})
    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(jax.ffi, "pycapsule", lambda name: name)
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, *_, platform: registered.append((name, platform)))
    monkeypatch.setattr(native, "_cuda_loaded", False)
    assert native._load_cuda(Path("b"), 7)
    assert registered == [(f"{name}_7", "CUDA") for name in native._CUDA_TARGETS]
    assert native.forms() == {"convolutions": "xla", "ssim": "native"}
    with native.suspended():
        assert native.forms()["ssim"] == "xla"


def test_no_gpu_is_not_ready(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_folder", tmp_path)
    assert not native.cuda_ready(11, jnp.zeros((16, 16)))


def test_calls_name_window_and_result():
    x, y = jnp.zeros((2, 16, 16))

    def text(function):
        return str(jax.make_jaxpr(function)(x, y))

    settings = (7, None, 0.01, 0.03, "reflect")
    for similarity, base, sign in ((False, 0.0, 1.0), (True, 1.0, -1.0)):
        found = text(lambda x, y, similarity=similarity: ssim._native(x, y, "cuda", similarity, *settings))
        for part in (
            "target_name=steel_ad_ssim_residual_cuda_7",
            f"('base', np.float32({base}))",
            f"('sign', np.float32({sign}))",
        ):
            assert part in found
    gradient = text(jax.grad(lambda x, y: ssim._native(x, y, "cuda", True, *settings).mean()))
    assert "target_name=steel_ad_ssim_residual_gradient_cuda_7" in gradient

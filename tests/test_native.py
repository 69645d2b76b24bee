"""Convolutions compiled for the CPU against scipy in float64 and XLA's own; how they are compiled, and when they are not used."""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from steel_ad import native
from steel_ad.models.autoencoder import Autoencoder
from steel_ad.models.unet import UNet
from steel_ad.ops import convolution, ssim

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
LIBRARY = Path(os.environ["STEEL_AD_TEST_CACHE"])
CPU = Path("/proc/cpuinfo")
HAS_AVX512 = CPU.exists() and " avx512f" in CPU.read_text()


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.setattr(native, "_folder", LIBRARY)
    assert native.ready()


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def correlated(x, kernel, pad):
    """`[b, h, w, i]` and `[k, k, i, o]` of stride 1, in float64."""
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = [[signal.correlate(image, k, "valid")[..., 0] for k in np.moveaxis(np.float64(kernel), 3, 0)] for image in x]
    return np.moveaxis(np.array(y), 1, 3)


def doubled(x, kernel):
    """Each input pixel lays its 4x4 kernel down, mirrored, in float64."""
    b, h, w, _ = x.shape
    y = np.zeros((b, 2 * h + 2, 2 * w + 2, kernel.shape[3]))
    for r in range(h):
        for c in range(w):
            y[:, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += np.einsum(
                "bi,rcio->brco", np.float64(x[:, r, c]), np.float64(kernel[::-1, ::-1])
            )
    return y[:, 1:-1, 1:-1]


EXACT = {
    "same": lambda x, k: correlated(x, k, k.shape[0] // 2),
    "halve": lambda x, k: correlated(x, k, 1)[:, ::2, ::2],
    "double": doubled,
}
# Channels below, at and above one vector and one block; widths of one tile, of several, and of none that is full. Whole
# vectors of channels go by Winograd, but for the 5x5 and 1x1 kernels; odd numbers of channels never do.
SHAPES = [
    ("same", 3, (2, 5, 7, 3), 5),
    ("same", 3, (1, 1, 1, 1), 1),
    ("same", 3, (1, 1, 1, 16), 16),
    ("same", 3, (1, 9, 29, 16), 16),
    ("same", 3, (2, 7, 12, 32), 48),
    ("same", 3, (1, 10, 131, 16), 32),
    ("same", 3, (2, 6, 15, 17), 33),
    ("same", 5, (1, 12, 33, 2), 48),
    ("same", 1, (1, 4, 6, 13), 70),
    ("halve", 4, (2, 6, 10, 1), 32),
    ("halve", 4, (1, 2, 2, 33), 7),
    ("halve", 4, (1, 14, 62, 5), 64),
    # Tiles that go on in the next row, and weights that come in parts: rows of the kernel, and parts of a row.
    ("halve", 4, (1, 16, 16, 61), 32),
    ("halve", 4, (1, 18, 20, 93), 40),
    ("double", 4, (1, 8, 7, 79), 40),
    # More bands than parts of a filter gradient's sum.
    ("same", 3, (40, 3, 4, 3), 5),
    # Tiles that are full, and that stick out below or to the right; bands of an image, and of several small images together.
    ("halve", 4, (1, 2, 2, 16), 16),
    ("halve", 4, (3, 12, 8, 16), 48),
    ("halve", 4, (2, 18, 30, 32), 16),
    ("halve", 4, (1, 28, 262, 16), 32),
    ("double", 4, (1, 1, 1, 16), 16),
    ("double", 4, (3, 6, 4, 16), 48),
    ("double", 4, (2, 9, 15, 32), 16),
    ("double", 4, (1, 14, 131, 16), 32),
    # Groups of bands of two images, of different heights, in one of the parts.
    ("same", 3, (5, 10, 16, 64), 64),
    ("halve", 4, (9, 8, 12, 32), 64),
    ("halve", 4, (5, 20, 32, 32), 64),
    ("double", 4, (9, 4, 6, 64), 32),
    ("double", 4, (5, 10, 16, 64), 32),
    ("double", 4, (2, 3, 5, 32), 1),
    ("double", 4, (2, 33, 21, 5), 1),
    ("double", 4, (1, 1, 1, 3), 33),
    ("double", 4, (1, 5, 31, 20), 24),
]
ids = [f"{kind}{k}-{'x'.join(map(str, shape))}-{o}" for kind, k, shape, o in SHAPES]


@pytest.mark.parametrize(("kind", "k", "shape", "o"), SHAPES, ids=ids)
def test_forward_equals_scipy(kind, k, shape, o):
    x, kernel, bias = arrays(shape, (k, k, shape[3], o), (1, 1, 1, o))
    scale = np.sqrt(kernel.size / o)
    exact = EXACT[kind](x, kernel)
    np.testing.assert_allclose(getattr(convolution, kind)(x, kernel), exact, atol=5e-6 * scale)
    y = exact + bias
    found = getattr(convolution, kind)(x, kernel, bias, 0.2)
    np.testing.assert_allclose(found, np.where(y >= 0, y, 0.2 * y), atol=5e-6 * scale)


@pytest.mark.parametrize(
    ("kind", "k", "shape", "o", "slope"),
    [
        pytest.param(*case, slope, id=f"{name}-{slope}")
        for n, (case, name) in enumerate(zip(SHAPES, ids, strict=True))
        for slope in ((0.2, 1.0) if n % 6 == 0 else (0.2,))
    ],
)
def test_gradients_equal_the_plain_form_of_xla(kind, k, shape, o, slope):
    """Of sums of squares, so that every element's gradient is another; in float64 by XLA."""
    x, kernel, bias = arrays(shape, (k, k, shape[3], o), (1, 1, 1, o), seed=1)

    def loss(x, kernel, bias):
        return (getattr(convolution, kind)(x, kernel, bias, slope) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    found = gradient(x, kernel, bias)
    with native.suspended(), jax.enable_x64(True):
        expected = gradient(*map(np.float64, (x, kernel, bias)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())


@pytest.mark.parametrize("channels", [1, 16])
def test_the_logistic_function_of_a_doubled_image(channels):
    """Also of what leaves no more than 0 or 1 of it, and with its gradients."""
    x, kernel, bias = arrays((2, 17, 9, 16), (4, 4, 16, channels), (1, 1, 1, channels))
    x = x * np.geomspace(1e-3, 30, 17, dtype=np.float32)[:, None, None]
    y = EXACT["double"](x, kernel) + bias
    assert np.abs(y).max() > 200
    layer = functools.partial(convolution.double, logistic=True)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(layer(x, kernel, bias), 1 / (1 + np.exp(-y)), rtol=5e-4, atol=1e-37)

    def loss(x, kernel, bias):
        return ((layer(x, kernel, bias) - 0.4) ** 2).sum()

    found = jax.grad(loss, (0, 1, 2))(x, kernel, bias)
    with native.suspended(), jax.enable_x64(True):
        expected = jax.grad(
            lambda x, k, b: ((jax.nn.sigmoid(convolution.double(x, k, b)) - 0.4) ** 2).sum(), (0, 1, 2)
        )(*map(np.float64, (x, kernel, bias)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())


def test_the_last_layer_is_one_call_also_of_a_map_over_images():
    x, kernel, bias = arrays((3, 2, 4, 6, 8), (4, 4, 8, 1), (1, 1, 1, 1))
    layer = functools.partial(convolution.double, kernel=kernel, bias=bias, logistic=True)
    text = jax.jit(jax.vmap(layer)).lower(x).as_text()
    assert text.count("steel_ad_double_to_one") == 1
    assert "while" not in text
    np.testing.assert_array_equal(jax.vmap(layer)(x), [layer(one) for one in x])
    with pytest.raises(ValueError, match="one output channel, not 2"):
        native.double(x[0], np.zeros((4, 4, 8, 2), np.float32), None, slope=1.0, logistic=True)


def test_nothing_in_a_batch_has_no_gradient():
    kernel = np.ones((4, 4, 16, 16), np.float32)
    for layer in (convolution.halve, convolution.double):
        found = jax.grad(lambda k, layer=layer: layer(np.zeros((0, 8, 8, 16), np.float32), k).sum())(kernel)
        np.testing.assert_array_equal(found, np.zeros_like(kernel))


def test_an_exchanged_gradient_of_a_3x3_kernel():
    """The bias's gradient is the sum of x then."""
    x, g = arrays((2, 6, 7, 16), (2, 6, 7, 16))
    (plain, _), (kernel, bias) = (
        native.filter_gradient(x, g, 3, stride=1, slope=1.0, of=None, exchanged=e) for e in (False, True)
    )
    np.testing.assert_allclose(kernel, plain, atol=1e-4)
    np.testing.assert_allclose(bias, x.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_zero_has_the_slope_of_the_right_side():
    """As `jax.nn.leaky_relu`: of results that are exactly zero the gradient passes whole."""
    x, kernel = np.zeros((1, 2, 2, 1), np.float32), np.ones((3, 3, 1, 1), np.float32)
    found = jax.grad(lambda x: convolution.same(x, kernel, jnp.zeros((1, 1, 1, 1)), 0.2).sum())(x)
    np.testing.assert_array_equal(
        found, jax.lax.conv(jnp.ones((1, 1, 2, 2)), kernel.T, (1, 1), "SAME").reshape(x.shape)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "apply"),
    [
        (Autoencoder(latent=6), {}),
        pytest.param(UNet(width=4), {"train": True, "mutable": ["batch_stats"]}, marks=pytest.mark.slow),
        (UNet(width=4, upsampling="nearest"), {}),
    ],
    ids=["autoencoder", "unet", "unet_nearest"],
)
def test_networks_compute_the_same(network, apply):
    x = jax.random.uniform(jax.random.key(0), (2, 32, 32, 1))
    variables = network.init(jax.random.key(1), x)

    def loss(params):
        out = network.apply({**variables, "params": params}, x, **apply)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(out))

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert "steel_ad_convolve" in jax.jit(loss).lower(variables["params"]).as_text()
    with native.suspended():
        expected, expected_grads = jax.jit(jax.value_and_grad(lambda params: loss(params)))(variables["params"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-5)


def test_other_kernels_are_left_to_xla():
    """Their padding is not the same on both sides, or not along both axes."""
    for shape in ((2, 2, 3, 4), (3, 5, 3, 4)):
        x, kernel = arrays((1, 6, 8, 3), shape)
        gradient = jax.grad(lambda x, kernel: (convolution.same(x, kernel) ** 2).sum(), (0, 1))
        found = gradient(x, kernel)
        with native.suspended():
            expected = gradient(x, kernel)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_maps_over_kernels():
    x, kernels = arrays((2, 4, 6, 3), (3, 3, 3, 3, 5))
    found = jax.vmap(functools.partial(convolution.same, x))(kernels)
    for one, kernel in zip(found, kernels, strict=True):
        np.testing.assert_array_equal(one, convolution.same(x, kernel))


def test_a_map_over_images_is_one_call():
    """Windows go through the network by a map, which must not take them one by one."""
    x, kernel, bias = arrays((3, 2, 4, 6, 3), (3, 3, 3, 5), (1, 1, 1, 5))

    def layer(x, kernel):
        return convolution.same(x, kernel, bias, 0.2)

    mapped = jax.jit(jax.vmap(layer, (0, None)))
    assert "while" not in mapped.lower(x, kernel).as_text()
    np.testing.assert_array_equal(mapped(x, kernel), [layer(one, kernel) for one in x])
    gradient = jax.grad(lambda x, kernel: (layer(x, kernel) ** 2).sum(), (0, 1))
    found = jax.vmap(gradient, (0, None))(x, kernel)
    for n, one in enumerate(x):
        for a, b in zip(found, gradient(one, kernel), strict=True):
            np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-5)


def test_several_calls_at_once_and_in_a_loop():
    """Independent convolutions share the threads, a loop's body has none of its own: neither may wait for the other."""
    x, kernel = arrays((4, 40, 40, 16), (3, 3, 16, 16))
    alone = np.asarray(convolution.same(x, kernel))

    @jax.jit
    def many(x):
        rows = [convolution.same(x + float(i) * 0.0, kernel) for i in range(16)]
        looped = jax.lax.map(lambda _: convolution.same(x, kernel), jnp.arange(8))
        return jnp.stack(rows), looped

    for found in many(x):
        np.testing.assert_array_equal(found, np.broadcast_to(alone, found.shape))


BITS = """
import os, sys
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:int(sys.argv[1])]))
import functools, hashlib, jax, numpy as np
from steel_ad import native
native.enable(sys.argv[2])
from steel_ad.ops import convolution, ssim
rng = np.random.default_rng(0)
found = []
for function, size, channels in (
    (convolution.same, 3, 32),
    (convolution.same, 3, 5),
    (convolution.halve, 4, 32),
    (convolution.double, 4, 32),
    (functools.partial(convolution.double, logistic=True), 4, 1),
):
    x, k = (rng.standard_normal(s, np.float32) for s in ((9, 24, 40, 16), (size, size, 16, channels)))
    y, back = jax.vjp(function, x, k)
    found += [y, *back(y)]
images = rng.random((2, 5, 150, 40), np.float32)
y, back = jax.vjp(jax.vmap(ssim.ssim_residual), *images)
found += [y, *back(y)]
assert native.ready()
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in found)).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be kept to one CPU here")
def test_same_bits_on_any_number_of_threads():
    one, all_of_them = (
        subprocess.run([sys.executable, "-c", BITS, n, str(LIBRARY)], check=True, capture_output=True, text=True).stdout
        for n in ("1", "64")
    )
    assert one == all_of_them
    assert len(one) == 65


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are vectors of other processors")
@pytest.mark.parametrize(
    "architecture",
    [
        "x86-64",
        pytest.param(
            "x86-64-v3",
            marks=pytest.mark.skipif(not HAS_AVX512, reason="the tests above have had vectors of 8 numbers already"),
        ),
    ],
)
def test_narrower_vectors(tmp_path, architecture):
    """The same tests with vectors of 4 numbers, and with vectors of 8, as processors without AVX-512 have."""
    script = (
        "import sys; from steel_ad import native;"
        f"native.build.__defaults__ = ((*native._FLAGS, '-march={architecture}', '-O1'),);"
        "import pytest; sys.exit(pytest.main(['tests/test_native.py', '-q', '-n0', '-p', 'no:cacheprovider',"
        " '-k', 'scipy or plain_form or ssim_equals or logistic']))"
    )
    environment = {**os.environ, "STEEL_AD_TEST_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 2 * len(SHAPES) + 20


def test_is_not_used_where_it_does_not_apply(monkeypatch):
    x, kernel = arrays((1, 4, 4, 2), (3, 3, 2, 2))
    assert native.ready(x, kernel)
    assert not native.ready(jnp.asarray(x, jnp.bfloat16), kernel)
    with native.suspended():
        assert not native.ready(x, kernel)
        with native.suspended():
            pass
        assert not native.ready(x, kernel)
    assert native.ready(x, kernel)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not native.ready(x, kernel)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(native, "_folder", None)
    assert not native.ready(x, kernel)


def test_is_compiled_once_and_again_for_other_flags(tmp_path, monkeypatch):
    linked, compiled = [], []

    def compiler(command, **_):
        (compiled if "-c" in command else linked).append(command)
        Path(command[-1]).write_bytes(b"library")

    monkeypatch.setattr(native.subprocess, "run", compiler)
    first = native.build(tmp_path / "new")
    assert first.read_bytes() == b"library"
    assert native.build(tmp_path / "new") == first
    assert len(linked) == 1
    assert sorted(command[-3] for command in compiled) == sorted(map(str, native.SOURCES))
    assert sorted(linked[0][-2 - len(compiled) : -2]) == sorted(command[-1] for command in compiled)
    assert native.build(tmp_path / "new", ("-O1",)) != first
    monkeypatch.setattr(native, "_cpu", lambda: "another")
    assert native.build(tmp_path / "new") != first
    assert len(linked) == 3
    assert len(list((tmp_path / "new").iterdir())) == 3  # nothing but the libraries


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
def test_loads_no_library_of_another_user(tmp_path, monkeypatch):
    monkeypatch.setattr(native.subprocess, "run", lambda command, **_: Path(command[-1]).write_bytes(b"library"))
    library = native.build(tmp_path)
    assert native.build(tmp_path) == library
    os.chown(library, 12345, 12345)
    with pytest.raises(PermissionError, match="another user"):
        native.build(tmp_path)


def test_the_compiler_may_come_with_arguments(tmp_path, monkeypatch):
    (tmp_path / "one.cc").write_text('extern "C" int one() { return ONE; }')
    monkeypatch.setattr(native, "SOURCES", [tmp_path / "one.cc"])
    monkeypatch.setenv("CXX", f"env {COMPILER} -DONE=1")
    assert ctypes.CDLL(str(native.build(tmp_path))).one() == 1


@pytest.mark.parametrize("how", ["none", "broken", "folder"])
def test_says_once_why_it_is_not_used(tmp_path, monkeypatch, capsys, how):
    folder = tmp_path / "cache"
    if how == "none":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        reason = "no C++ compiler"
    elif how == "broken":
        monkeypatch.setattr(native, "SOURCES", [tmp_path / "broken.cc"])
        (tmp_path / "broken.cc").write_text("int broken(")
        reason = "error"
    else:
        folder.write_text("a file")
        reason = "exists"
    monkeypatch.setattr(native, "_folder", folder)
    assert not native.ready()
    assert not native.ready()
    said = capsys.readouterr().err
    assert said.count("note: convolutions and SSIM run in XLA's slower form") == 1
    assert reason in said
    assert len(said.splitlines()) == 1
    x, kernel = arrays((1, 4, 4, 2), (3, 3, 2, 2))
    np.testing.assert_allclose(convolution.same(x, kernel), EXACT["same"](x, kernel), atol=1e-5)


@pytest.mark.parametrize("padding", ["reflect", "valid"])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
@pytest.mark.parametrize(
    ("h", "w", "k"), [(11, 11, 11), (33, 150, 11), (141, 37, 11), (9, 16, 4), (20, 131, 7), (3, 2, 1), (5, 4, 2)]
)
def test_ssim_equals_the_form_of_xla(h, w, k, window, padding):
    """Of values and of both images' gradients, in float64 by XLA; with a flat part, and one where the images are alike."""
    x, y, g = (np.random.default_rng(0).random((3, h, w))).astype(np.float32)
    x[: h // 2, : w // 2] = 1.0
    y[: h // 3, : w // 2] = 1.0
    y[h // 2 :] = x[h // 2 :]
    rows = h if padding == "reflect" else h - k + 1
    columns = w if padding == "reflect" else w - k + 1
    g = g[:rows, :columns]
    residual = functools.partial(ssim.ssim_residual, window=window, window_size=k, padding=padding, c1=1e-4, c2=9e-4)

    def with_gradients(x, y, g):
        value, back = jax.vjp(residual, x, y)
        return value, back(g)

    found, back = jax.vjp(residual, x, y)
    with native.suspended():
        plain = np.asarray(residual(x, y))  # float32 as well
    with jax.enable_x64(True):
        exact, expected = jax.jit(with_gradients)(*map(np.float64, (x, y, g)))
    assert found.shape == (rows, columns)
    np.testing.assert_allclose(found, exact, atol=2e-4)
    exact = np.asarray(exact)
    assert np.abs(np.asarray(found) - exact).max() <= max(3 * np.abs(plain - exact).max(), 1e-5)
    for a, b in zip(back(g), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())


@pytest.mark.parametrize("level", [0, 0.5, 0.97])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_ssim_of_narrow_ranges_keeps_its_digits(level, window):
    """Of two images at once, the other one of full contrast; a lone dark pixel costs no more than full contrast does."""
    x, y, g = np.random.default_rng(0).random((3, 2, 40, 43), np.float32)
    x[0], y[0] = level + 0.03 * x[0], level + 0.03 * y[0]
    residual = jax.vmap(functools.partial(ssim.ssim_residual, window=window, c1=1e-4, c2=9e-4))

    def compared(x, y):
        found, back = jax.vjp(residual, x, y)
        with jax.enable_x64(True):
            exact, exactly_back = jax.vjp(residual, *map(np.float64, (x, y)))
            expected = exactly_back(np.float64(g))
        pairs = [tuple(map(np.asarray, pair)) for pair in ((found, exact), *zip(back(g), expected, strict=True))]
        value, *gradients = (np.abs(a - b).max((1, 2)) for a, b in pairs)
        return value, [error / np.abs(b).max((1, 2)) for error, (_, b) in zip(gradients, pairs[1:], strict=True)]

    value, gradients = compared(x, y)
    assert value[0] <= 2e-6
    assert max(a[0] for a in gradients) <= 1e-5
    x[0, 20, 20] = y[0, 20, 20] = 0
    value, gradients = compared(x, y)
    assert value[0] <= 5e-5


@pytest.mark.parametrize("padding", ["reflect", "valid"])
@pytest.mark.parametrize(
    ("h", "w", "k", "window"), [(33, 150, 11, "uniform"), (20, 37, 11, "gaussian"), (9, 16, 4, "uniform")]
)
def test_mean_ssim_and_its_gradients_in_one_pass_are_those_of_the_map(h, w, k, window, padding):
    x, y = np.random.default_rng(3).random((2, 3, h, w)).astype(np.float32)
    x[1, : h // 2] = y[1, : h // 2] = 1.0
    settings = {"window": window, "window_size": k, "padding": padding, "c1": 1e-4, "c2": 9e-4}

    def of_maps(x, y):
        return jax.vmap(functools.partial(ssim.ssim_residual, **settings))(x, y).mean((1, 2)) @ shares

    def in_one_pass(x, y):
        return jax.vmap(functools.partial(ssim.mean_residual, **settings))(x, y) @ shares

    # Another weight of each image, so that none gets its neighbour's.
    shares = np.float32([1, -2, 4])
    program = jax.jit(jax.value_and_grad(in_one_pass, argnums=(0, 1)))
    assert "steel_ad_ssim_residual" not in program.lower(x, y).as_text()
    (found, gradients), (exact, expected) = program(x, y), jax.value_and_grad(of_maps, argnums=(0, 1))(x, y)
    assert found == pytest.approx(float(exact), rel=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert in_one_pass(x, y) == pytest.approx(float(exact), rel=1e-5)


def test_ssim_of_black_images_with_constants_next_to_nothing():
    """Their product is zero in float32."""
    x = np.zeros((20, 24), np.float32)
    np.testing.assert_array_equal(ssim.ssim_residual(x, x, c1=1e-20, c2=1e-20), x)


def test_ssim_of_batches_and_channels_is_that_of_each_image():
    x, y = np.random.default_rng(1).random((2, 3, 20, 24)).astype(np.float32)
    alone = [ssim.ssim_map(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(jax.vmap(ssim.ssim_map)(x, y), alone)
    np.testing.assert_array_equal(jax.vmap(ssim.ssim_map, in_axes=(0, None))(x, y[0])[0], alone[0])
    channels = ssim.ssim_map(np.moveaxis(x, 0, 2), np.moveaxis(y, 0, 2))
    np.testing.assert_array_equal(np.moveaxis(channels, 2, 0), alone)


def test_ssim_map_is_one_less_the_residual_to_the_bit():
    x, y, g = np.random.default_rng(1).random((3, 20, 24)).astype(np.float32)
    residual, of_residual = jax.vjp(ssim.ssim_residual, x, y)
    maps, of_map = jax.vjp(ssim.ssim_map, x, y)
    np.testing.assert_array_equal(maps, 1 - residual)
    for a, b in zip(of_map(g), of_residual(-g), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ssim_of_an_image_with_itself_is_one_and_has_no_gradient():
    x = np.random.default_rng(2).random((30, 40)).astype(np.float32)
    np.testing.assert_array_equal(ssim.ssim_residual(x, x), np.zeros_like(x))
    np.testing.assert_allclose(jax.grad(lambda x, y: ssim.ssim_map(x, y).sum())(x, x), 0, atol=1e-5)


def test_ssim_takes_the_form_that_is_ready():
    x = np.zeros((16, 16), np.float32)

    def text(**options):
        return jax.jit(functools.partial(ssim.ssim_map, **options)).lower(x, x).as_text()

    assert "steel_ad_ssim_residual" in text()
    assert "steel_ad_ssim" not in text(gamma=2.0)
    with native.suspended():
        assert "steel_ad_ssim" not in text()

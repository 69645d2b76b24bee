"""SSIM against a float64 window-by-window oracle, and the properties that the definition promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from steel_ad.ops.ssim import CONSTANTS, mean_residual, ssim_map, ssim_residual


def oracle(x, y, *, weights, c1, c2, alpha=1.0, beta=1.0, gamma=1.0, padding="reflect"):
    """The definition, a window at a time, in float64."""
    x, y, k = np.float64(x), np.float64(y), len(weights)
    if padding == "reflect":
        before = (k - 1) // 2
        x, y = (np.pad(a, (before, k - 1 - before), mode="reflect") for a in (x, y))
    out = np.empty((x.shape[0] - k + 1, x.shape[1] - k + 1))
    w = np.outer(weights, weights)
    for i, j in np.ndindex(out.shape):
        p, q = x[i : i + k, j : j + k], y[i : i + k, j : j + k]
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq, pq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
        sp, sq = np.sqrt(vp), np.sqrt(vq)
        luminance = (2 * mp * mq + c1) / (mp**2 + mq**2 + c1)
        contrast = (2 * sp * sq + c2) / (vp + vq + c2)
        structure = (2 * pq + c2) / (2 * sp * sq + c2)
        if not float(gamma).is_integer():
            structure = max(structure, 0)
        out[i, j] = luminance**alpha * contrast**beta * structure**gamma
    return out


def uniform(k):
    return np.full(k, 1 / k)


def gaussian(k, sigma=1.5):
    w = np.exp(-0.5 * ((np.arange(k) - (k - 1) / 2) / sigma) ** 2)
    return w / w.sum()


def pairs():
    rng = np.random.default_rng(0)
    noise = rng.random((24, 19))
    ramp = np.linspace(0, 1, 19)[None, :].repeat(24, 0)
    return {
        "noisy": (noise, np.clip(noise + 0.2 * rng.standard_normal(noise.shape), 0, 1)),
        "flat": (np.full((24, 19), 0.3), np.full((24, 19), 0.6)),
        "bright": (0.97 + 0.002 * noise, 0.98 + 0.002 * rng.random(noise.shape)),
        "opposite": (noise, 1 - noise),
        "half": (np.where(ramp > 0.5, 1.0, 0.0), ramp),
        "tiny": (noise[:11, :11], noise[5:16, 2:13]),
    }


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("name", pairs())
def test_equals_the_definition(name, constants):
    x, y = pairs()[name]
    c1, c2 = CONSTANTS[constants]
    ours = ssim_map(jnp.float32(x), jnp.float32(y), c1=c1, c2=c2)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, oracle(np.float32(x), np.float32(y), weights=uniform(11), c1=c1, c2=c2), atol=1e-5)


@pytest.mark.parametrize("beta", [1, 1 + 1e-12])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
@pytest.mark.parametrize("level", [0, 0.5, 0.97])
def test_narrow_ranges_keep_their_digits(level, window, beta):
    """Of bright images too, where a variance of 7e-5 is what is left of squares of 1."""
    x, y = (np.float32(level + 0.03 * a) for a in np.random.default_rng(0).random((2, 40, 40)))
    c1, c2 = CONSTANTS["wang"]
    exact = oracle(x, y, weights={"uniform": uniform, "gaussian": gaussian}[window](11), c1=c1, c2=c2)
    np.testing.assert_allclose(ssim_map(x, y, window=window, c1=c1, c2=c2, beta=beta), exact, atol=2e-6)


@pytest.mark.parametrize("window_size", [1, 2, 7, 10])
@pytest.mark.parametrize("padding", ["reflect", "valid"])
@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_windows_and_padding(window_size, padding, window):
    x, y = pairs()["noisy"]
    weights = {"uniform": uniform, "gaussian": gaussian}[window](window_size)
    ours = ssim_map(jnp.float32(x), jnp.float32(y), window_size=window_size, window=window, padding=padding)
    expected = oracle(np.float32(x), np.float32(y), weights=weights, c1=0.01, c2=0.03, padding=padding)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_gaussian_over_many_blocks(sigma):
    """More rows than one block of the banded product, and not a multiple of it."""
    x, y = np.random.default_rng(1).random((2, 150, 13)).astype(np.float32)
    ours = ssim_map(x, y, window="gaussian", sigma=sigma)
    np.testing.assert_allclose(ours, oracle(x, y, weights=gaussian(11, sigma), c1=0.01, c2=0.03), atol=1e-5)


@pytest.mark.parametrize("exponents", [(2, 1, 1), (1, 2, 0), (1, 1, 3), (0.5, 1.5, 0.7)])
@pytest.mark.parametrize("name", ["noisy", "opposite", "half"])
def test_exponents(name, exponents):
    x, y = pairs()[name]
    options = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True))
    expected = oracle(np.float32(x), np.float32(y), weights=uniform(11), c1=0.01, c2=0.03, **options)
    np.testing.assert_allclose(ssim_map(jnp.float32(x), jnp.float32(y), **options), expected, atol=3e-5)


def test_equals_scikit_image_where_options_agree():
    x, y = pairs()["noisy"]
    for options, ours in [
        ({"gaussian_weights": False}, {}),
        ({"gaussian_weights": True, "sigma": 1.5}, {"window": "gaussian"}),
    ]:
        _, expected = structural_similarity(
            x, y, win_size=11, data_range=1, use_sample_covariance=False, full=True, K1=0.01, K2=0.03, **options
        )
        c1, c2 = CONSTANTS["wang"]
        found = ssim_map(jnp.float32(x), jnp.float32(y), c1=c1, c2=c2, padding="valid", **ours)
        np.testing.assert_allclose(found, expected[5:-5, 5:-5], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gamma": 0.5}, {"window": "gaussian"}])
def test_of_an_image_with_itself_is_one(options):
    for x, _ in pairs().values():
        x = jnp.float32(x)
        assert float(jnp.abs(ssim_map(x, x, **options) - 1).max()) <= (0 if not options else 2e-6)


def test_symmetric_and_bounded():
    for x, y in pairs().values():
        x, y = jnp.float32(x), jnp.float32(y)
        np.testing.assert_allclose(ssim_map(x, y), ssim_map(y, x), atol=1e-6)
        assert float(jnp.abs(ssim_map(x, y)).max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.5, "beta": 0.5, "gamma": 0.5}, {"window": "gaussian", "gamma": 2.0}]
)
def test_gradient_is_finite_everywhere(options):
    flat, black = jnp.full((12, 12), 0.5), jnp.zeros((12, 12))
    noise = jnp.float32(pairs()["noisy"][0][:12, :12])
    for x in (flat, black, noise):
        for y in (flat, black, noise, 1 - noise):
            value, gradient = jax.value_and_grad(lambda a, b=y: ssim_residual(a, b, **options).mean())(x)
            assert jnp.isfinite(value)
            assert jnp.isfinite(gradient).all()


def test_gradient_equals_finite_differences():
    x, y = (np.float32(a[:13, :12]) for a in pairs()["noisy"])
    gradient = jax.grad(lambda a: ssim_residual(a, jnp.asarray(y)).mean())(jnp.asarray(x))
    for i, j in [(0, 0), (6, 5), (12, 11)]:
        step = np.zeros(x.shape)
        step[i, j] = 1e-5
        up, down = (1 - oracle(x + s * step, y, weights=uniform(11), c1=0.01, c2=0.03).mean() for s in (1, -1))
        assert float(gradient[i, j]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-7)


def test_channels_and_batch():
    x, y = (np.stack([a, a[::-1], a**2], -1).astype(np.float32) for a in pairs()["noisy"])
    channels = ssim_map(x, y)
    assert channels.shape == x.shape
    for c in range(3):
        np.testing.assert_allclose(channels[..., c], ssim_map(x[..., c], y[..., c]), atol=1e-6)
    batch = jax.vmap(ssim_map)(np.stack([x, y]), np.stack([y, y]))
    np.testing.assert_allclose(batch[0], channels, atol=1e-6)
    np.testing.assert_array_equal(batch[1], 1)


@pytest.mark.parametrize("options", [{}, {"alpha": 2.0, "gamma": 0.5}, {"window_size": 7, "padding": "valid"}])
def test_mean_residual_is_the_mean_over_pixels_and_channels(options):
    x, y = (np.stack([a, a[::-1]], -1).astype(np.float32) for a in pairs()["noisy"])
    expected = np.mean(1 - np.float64(ssim_map(x, y, **options)))
    assert mean_residual(x, y, **options) == pytest.approx(expected, rel=1e-5)
    assert mean_residual(x[..., 1], y[..., 1], **options) == pytest.approx(
        np.mean(1 - np.float64(ssim_map(x[..., 1], y[..., 1], **options))), rel=1e-5
    )


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((10, 30), (10, 30)), {}, "10x30 holds no window of 11x11"),
        (((12, 12), (12, 13)), {}, "one shape"),
        (((12,), (12,)), {}, "one shape"),
        (((12, 12), (12, 12)), {"window": "box"}, "'box'"),
        (((12, 12), (12, 12)), {"padding": "same"}, "'same'"),
        (((12, 12), (12, 12)), {"c2": 0.0}, "positive"),
        (((12, 12), (12, 12)), {"window_size": 0}, "window of 0x0"),
        (((12, 12), (12, 12)), {"gamma": -1.0}, "not negative"),
    ],
)
def test_refuses(shapes, options, said):
    x, y = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=said):
        ssim_map(x, y, **options)


def test_refuses_bytes():
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        ssim_map(jnp.ones((12, 12), jnp.uint8), jnp.ones((12, 12), jnp.uint8))

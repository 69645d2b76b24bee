"""The network and its convolutions against lax's plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from jax import lax

from steel_ad.models import layers
from steel_ad.models.autoencoder import Autoencoder
from steel_ad.ops import convolution

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def plain_halve(x, w):
    return lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS)


def plain_double(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=DIMENSIONS)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("ours", "plain"), [(convolution.halve, plain_halve), (convolution.double, plain_double)])
@pytest.mark.parametrize(("h", "w", "i", "o"), [(8, 12, 3, 5), (2, 2, 1, 4), (16, 6, 4, 1)])
def test_rewritten_convolutions(monkeypatch, ours, plain, h, w, i, o, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, h, w, i)).astype(np.float32)
    kernel = rng.standard_normal((4, 4, i, o)).astype(np.float32)
    expected, expected_back = jax.vjp(plain, x, kernel)
    found, found_back = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    g = rng.standard_normal(expected.shape).astype(np.float32)
    for a, b in zip(found_back(g), expected_back(g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("o", [1, 4])
def test_gradients_in_bfloat16_keep_their_type(monkeypatch, o):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 4, 6, 3), (4, 4, 3, o)))
    found, back = jax.vjp(lambda a, b: convolution.double(a, b), x, kernel)
    exact, exact_back = jax.vjp(plain_double, x.astype(jnp.float32), kernel.astype(jnp.float32))
    g = jnp.ones(found.shape, jnp.bfloat16)
    for a, b in zip((found, *back(g)), (exact, *exact_back(g.astype(jnp.float32))), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize(("backend", "rewritten"), [("gpu", True), ("tpu", False)])
@pytest.mark.parametrize("ours", [convolution.halve, convolution.double])
def test_accelerators_get_their_own_form(monkeypatch, ours, backend, rewritten):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # A function of its own, since what has been traced is kept.
    program = str(jax.make_jaxpr(lambda x, kernel: ours(x, kernel))(jnp.zeros((1, 8, 8, 2)), jnp.zeros((4, 4, 2, 2))))
    assert ("window_strides=(2, 2)" in program or "lhs_dilation=(2, 2)" in program) is not rewritten


def test_convolutions_refuse():
    with pytest.raises(ValueError, match="even"):
        convolution.halve(jnp.zeros((1, 5, 4, 1)), jnp.zeros((4, 4, 1, 1)))
    with pytest.raises(ValueError, match="4x4"):
        convolution.double(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)))


@pytest.mark.parametrize(
    ("layer", "shape", "plain"),
    [
        (
            layers.Same(5),
            (2, 6, 6, 3),
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=DIMENSIONS),
        ),
        (layers.Halve(5), (2, 6, 6, 3), plain_halve),
        (layers.Double(5), (2, 6, 6, 3), plain_double),
        (
            layers.Collapse(7),
            (2, 8, 8, 3),
            lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=DIMENSIONS),
        ),
        (
            layers.Expand(5, 8),
            (2, 1, 1, 3),
            lambda x, w: lax.conv_transpose(x, w, (1, 1), "VALID", dimension_numbers=DIMENSIONS),
        ),
    ],
)
def test_layers_are_plain_convolutions_of_their_parameters(layer, shape, plain):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    bias = jnp.arange(kernel.shape[-1], dtype=jnp.float32)
    found = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(found, plain(x, kernel) + bias.reshape(1, 1, 1, -1), atol=1e-4)


def test_parameter_count_and_output():
    x = jnp.full((1, 128, 128, 1), 0.5)
    variables = jax.jit(Autoencoder().init)(jax.random.key(0), x)
    assert sum(p.size for p in jax.tree.leaves(variables)) == 1_048_549
    y = Autoencoder().apply(variables, x)
    assert y.shape == x.shape
    assert y.dtype == jnp.float32
    assert 0 < float(y.min()) <= float(y.max()) < 1


def test_other_sizes_and_codes():
    x = jnp.zeros((2, 48, 48, 1))
    variables = jax.jit(Autoencoder(latent=7).init)(jax.random.key(0), x)
    assert variables["params"]["Collapse_0"]["kernel"].shape == (3, 3, 32, 7)
    assert Autoencoder(latent=7).apply(variables, x).shape == x.shape
    for shape in [(1, 40, 40, 1), (1, 32, 48, 1)]:
        with pytest.raises(ValueError, match="multiple of 16"):
            Autoencoder().init(jax.random.key(0), jnp.zeros(shape))


def test_the_code_is_linear_and_the_only_way_through():
    """With the code's kernel at zero every patch has the same reconstruction; a ReLU there would break additivity."""
    model = Autoencoder(latent=4)
    a, b = np.random.default_rng(0).random((2, 1, 32, 32, 1)).astype(np.float32)
    variables, apply = jax.jit(model.init)(jax.random.key(0), a), jax.jit(model.apply)

    @jax.jit
    def code(x):
        _, state = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return state["intermediates"]["Collapse_0"]["__call__"][0]

    assert (code(a) < 0).any()
    blind = jax.tree.map(lambda p: p, variables)
    blind["params"]["Collapse_0"]["kernel"] = jnp.zeros_like(blind["params"]["Collapse_0"]["kernel"])
    np.testing.assert_array_equal(apply(blind, a), apply(blind, b))
    assert float(jnp.abs(apply(variables, a) - apply(variables, b)).max()) > 0


def test_bfloat16_arithmetic_keeps_float32_parameters():
    x = np.random.default_rng(0).random((1, 32, 32, 1)).astype(np.float32)
    half = Autoencoder(latent=4, dtype=jnp.bfloat16)
    variables = jax.jit(half.init)(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full = jax.jit(Autoencoder(latent=4).apply)(variables, x)
    found = jax.jit(half.apply)(variables, x)
    assert found.dtype == jnp.float32
    assert 0 < float(jnp.abs(found - full).max()) < 0.03


def test_a_parameter_is_drawn_once_and_its_shape_checked(monkeypatch):
    drawn = []
    normal = layers.normal

    def noted(stddev):
        def init(key, shape, *rest):
            drawn.append(shape)
            return normal(stddev)(key, shape, *rest)

        return init

    monkeypatch.setattr(layers, "normal", noted)
    network, x = layers.Same(4), jnp.ones((1, 4, 4, 2))
    params = network.init(jax.random.key(0), x)
    jax.eval_shape(network.apply, params, x)
    assert drawn == [(3, 3, 2, 4)]
    with pytest.raises(errors.ScopeParamShapeError, match=r'"kernel".*\(3, 3, 3, 4\).*\(3, 3, 2, 4\)'):
        network.apply(params, jnp.ones((1, 4, 4, 3)))
    with pytest.raises(errors.ScopeParamNotFoundError):
        network.apply({"params": {"kernel": params["params"]["kernel"]}}, x)

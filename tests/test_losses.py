"""Losses, their registry, and the way to one's own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad import losses
from steel_ad.errors import InputError
from steel_ad.ops.ssim import ssim_map


@pytest.fixture
def pair():
    return np.random.default_rng(0).random((2, 3, 16, 16, 1)).astype(np.float32)


def test_values(pair):
    y, x = pair
    flat = (3, -1)
    np.testing.assert_allclose(losses.get("l2")(y, x), ((y - x) ** 2).reshape(flat).mean(1), rtol=1e-6)
    np.testing.assert_allclose(losses.get("l1")(y, x), np.abs(y - x).reshape(flat).mean(1), rtol=1e-6)
    ssim = 1 - np.array([ssim_map(a, b, window_size=7).mean() for a, b in zip(y, x, strict=True)])
    np.testing.assert_allclose(losses.get("ssim", {"window_size": 7})(y, x), ssim, rtol=1e-5)
    mixed = losses.get("ssim_l2", {"weight": 0.25, "window_size": 7})(y, x)
    np.testing.assert_allclose(mixed, 0.25 * ssim + 0.75 * ((y - x) ** 2).reshape(flat).mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_is_zero_at_the_target_and_one_number_a_patch(pair, name):
    y, x = pair
    loss = losses.get(name)
    assert loss(y, x).shape == (3,)
    assert (loss(y, x) > 0).all()
    np.testing.assert_allclose(loss(x, x), 0, atol=1e-7)
    assert jnp.isfinite(jax.grad(lambda a: loss(a, x).sum())(x)).all()


def test_none_leaves_the_default(pair):
    y, x = pair
    np.testing.assert_array_equal(losses.get("ssim", {"window_size": None})(y, x), losses.get("ssim")(y, x))


def test_a_loss_of_ones_own(pair, tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def huber(y, x, *, delta=1.0):\n    return delta * (y - x).sum((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    y, x = pair
    found = losses.get("my_losses:huber", {"delta": 2.0})(y, x)
    np.testing.assert_allclose(found, 2 * (y - x).sum((1, 2, 3)), rtol=1e-6)
    with pytest.raises(InputError, match="no option 'weight'"):
        losses.get("my_losses:huber", {"weight": 1.0})
    sys.modules.pop("my_losses")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("l3", {}, "no loss 'l3': use one of l2"),
        ("nowhere:loss", {}, "cannot be loaded"),
        ("math:nothing", {}, "cannot be loaded"),
        ("math:pi", {}, "no function"),
        ("l2", {"window_size": 3}, "takes none"),
        ("ssim", {"weight": 0.5}, "no option 'weight'"),
    ],
)
def test_refuses(name, options, said):
    with pytest.raises(InputError, match=said) as error:
        losses.get(name, options)
    assert "\n" not in str(error.value)


def test_a_loss_is_tried_before_it_trains():
    losses.check(losses.get("l2"), "l2", 16)
    with pytest.raises(InputError, match=r"mine must return one number a patch, \[b\], not \(\)"):
        losses.check(lambda y, x: (y - x).sum(), "mine", 16)
    with pytest.raises(InputError, match="mine does not work on patches of 16x16"):
        losses.check(lambda y, x: y @ x[:, :3], "mine", 16)

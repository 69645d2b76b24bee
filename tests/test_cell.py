"""Cells of patterns: folding and laying out are each other's inverse, shifts are found, and light is taken apart from pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steel_ad.ops import cell

VECTORS = jnp.asarray([[0.0, 24.0], [20.0, 4.0]])


def waves(u, v, at):
    """A smooth pattern of the cell, and another one, at cell coordinates: `[2, ...]`."""
    first, second = (2 * np.pi * np.asarray(at)[..., k] for k in (0, 1))
    return np.stack(
        [
            np.cos(first) + 0.5 * np.sin(second + 1) + 0.4 * np.cos(2 * first),
            np.sin(first - second) + 0.3 * np.cos(2 * second),
        ]
    )


def test_coordinates_count_steps_of_the_lattice_from_the_middle():
    at = np.asarray(cell.coordinates(VECTORS, (41, 61)))
    np.testing.assert_allclose(at[20, 30], 0, atol=1e-6)
    np.testing.assert_allclose(at[20, 54], [1, 0], atol=1e-5)
    np.testing.assert_allclose(at[40, 34], [0, 1], atol=1e-5)


def test_folding_and_laying_out_are_each_others_inverse():
    at = cell.coordinates(VECTORS, (120, 130))
    image = jnp.asarray(waves(24, 20, at)[0], jnp.float32)
    folded = cell.fold(image, at, (24, 20))
    laid = np.asarray(cell.lay(folded[None], at)[0])
    np.testing.assert_allclose(laid, image, atol=0.3)
    assert np.abs(laid - image).mean() < 0.06
    u, v = np.meshgrid((np.arange(24) + 0.5) / 24, (np.arange(20) + 0.5) / 20, indexing="ij")
    np.testing.assert_allclose(folded, waves(24, 20, np.stack([u, v], -1))[0], atol=0.25)


@pytest.mark.parametrize("shift", [(0.25, 0.5), (0.1, 0.83), (0.0, 0.0)])
def test_the_shift_of_a_folded_image_is_found(shift):
    u, v = np.meshgrid((np.arange(24) + 0.5) / 24, (np.arange(20) + 0.5) / 20, indexing="ij")
    base, moved = (waves(24, 20, np.stack([u, v], -1) - np.array(s)) for s in ((0, 0), shift))
    basis = base / np.linalg.norm(base, axis=(1, 2), keepdims=True)
    # Light has turned the pattern: another mixture of what it is made of.
    found = cell.offset(jnp.asarray(0.4 * moved[0] - moved[1], jnp.float32), jnp.asarray(basis, jnp.float32))
    off = np.asarray(found) - shift
    np.testing.assert_allclose(off - np.round(off), 0, atol=0.02)


def test_principal_cells_are_what_shifted_images_have_in_common():
    rng = np.random.default_rng(0)
    u, v = np.meshgrid((np.arange(24) + 0.5) / 24, (np.arange(20) + 0.5) / 20, indexing="ij")
    seen = []
    for _ in range(12):
        first, second = waves(24, 20, np.stack([u, v], -1) - rng.random(2))
        seen.append(first + rng.uniform(-0.3, 0.3) * second + 0.01 * rng.normal(size=first.shape))
    basis = cell.principal(np.stack(seen), 2)
    np.testing.assert_allclose(np.einsum("iuv,juv->ij", basis, basis), np.eye(2), atol=1e-6)
    fold = jnp.asarray(seen[5], jnp.float32)
    shift = np.asarray(cell.offset(fold, jnp.asarray(basis, jnp.float32)))
    at = jnp.asarray(np.stack([u, v], -1) - shift, jnp.float32)
    rest = cell.without(fold, cell.lay(jnp.asarray(basis, jnp.float32), at))
    assert float(jnp.abs(rest).mean()) < 0.08 * np.abs(seen[5]).mean()


def test_what_a_robust_fit_leaves_is_the_defect():
    rng = np.random.default_rng(1)
    parts = np.concatenate([cell.slow((40, 50)), rng.normal(size=(2, 40, 50)).astype(np.float32)])
    defect = np.zeros((40, 50), np.float32)
    defect[10:20, 10:22] = 2
    image = np.tensordot(rng.normal(size=8).astype(np.float32), parts, 1)
    image += 0.01 * rng.normal(size=image.shape).astype(np.float32)
    rest = np.asarray(jax.jit(cell.robust_rest)(jnp.asarray(image + defect), jnp.asarray(parts)))
    plain = np.asarray(cell.without(jnp.asarray(image + defect), jnp.asarray(parts)))
    np.testing.assert_allclose(rest, defect, atol=0.15)
    assert np.abs(rest - defect).mean() < 0.2 * np.abs(plain - defect).mean()

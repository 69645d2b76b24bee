"""From one level of a U-Net to the next: images of half and of twice the size, in the form that the backend runs fast."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from steel_ad.ops import convolution, forms


def transpose_2x2(x: Array, kernel: Array) -> Array:
    """`lax.conv_transpose(x, kernel, (2, 2), "VALID")` of a 2x2 kernel: `[b, h, w, i]` -> `[b, 2 h, 2 w, o]`.

    Four of them in the plain form made a step of the U-Net on a GPU take 2.6 times as long.
    """
    return _products(x, kernel) if forms.choose("transpose_2x2", x, kernel) == "products" else _plain(x, kernel)


def _plain(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(x, kernel, (2, 2), "VALID", dimension_numbers=convolution.DIMENSIONS)


@jax.custom_vjp
def _products(x: Array, kernel: Array) -> Array:
    i, o = kernel.shape[2:]
    # The unflipped transposed convolution lays the kernel down mirrored.
    return convolution.depth_to_space(x @ kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(i, 4 * o))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _products(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # The gradient of the input is a strided convolution, which needs no copy of g in another order.
    x, kernel = saved
    i, o = kernel.shape[2:]
    (of_x,) = jax.vjp(lambda x: _plain(x, kernel), x)[1](g)
    product = x.reshape(-1, i).T @ convolution.space_to_depth(g).reshape(-1, 4 * o)
    return of_x, product.reshape(i, 2, 2, o).transpose(1, 2, 0, 3)[::-1, ::-1]


_products.defvjp(_forward, _backward)


def max_pool(x: Array) -> Array:
    """Maximum of each 2x2 block: `[b, h, w, c]` -> `[b, h / 2, w / 2, c]`, h and w even.

    In slices equal maxima share the gradient, in the plain form one of them takes it; after a ReLU most ties are zeros, which pass
    none on.
    """
    if forms.choose("max_pool", x) == "plain":
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def repeat(x: Array) -> Array:
    """Each pixel as a 2x2 block: `[b, h, w, c]` -> `[b, 2 h, 2 w, c]`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)

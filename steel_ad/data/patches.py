"""Random patches of a resident set of plates, drawn inside the jitted step (SPEC section 1, row 7)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from steel_ad.errors import InputError


class Plates(NamedTuple):
    """A set of images of any sizes: `pixels` uint8 `[total]`, one after the other row by row; `offsets` int32 `[n]` of their
    first pixels; `sizes` int32 `[n, 2]`, height and width."""

    pixels: Array | np.ndarray
    offsets: Array | np.ndarray
    sizes: Array | np.ndarray


class Streamed(NamedTuple):
    """A set of images in files as a step sees it.

    Attributes:
      pixels: patches of the set at the step's places, uint8 `[b, p, p]`; of several steps `[k, b, p, p]`; None where only places
        are chosen.
      sizes: of all its images, int32 `[n, 2]`.
    """

    pixels: Array | None
    sizes: Array | np.ndarray


class Crops(NamedTuple):
    """Places of patches: `image`, `top`, `left`, int32 `[n]` each."""

    image: Array
    top: Array
    left: Array


def stack(images: Sequence[np.ndarray]) -> Plates:
    """Plates of images uint8 `[h_i, w_i]`, as numpy arrays.

    Raises:
      ValueError: no image, or one that is not uint8 `[h, w]`.
      InputError: more pixels than int32 can number.
    """
    if not images or any(image.dtype != np.uint8 or image.ndim != 2 for image in images):
        raise ValueError("stack takes at least one image, each uint8 [h, w]")
    ends = np.cumsum([image.size for image in images])
    if ends[-1] >= 2**31:
        raise InputError(f"the images have {ends[-1] / 1e9:.1f} gigapixels, more than 2.1: use fewer")
    sizes = np.array([image.shape for image in images], np.int32)
    return Plates(np.concatenate([image.ravel() for image in images]), np.append(0, ends[:-1]).astype(np.int32), sizes)


def common_size(images: Sequence[np.ndarray], count: int) -> Iterator[Array]:
    """Up to `count` of the images uint8 `[h_i, w_i]`, evenly chosen: the middle of each, float32 in [0, 1], all of the smallest
    chosen one's height and width."""
    chosen = [
        images[i] for i in np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    ]
    h, w = np.min([image.shape for image in chosen], axis=0)
    for image in chosen:
        top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
        yield jnp.asarray(image[top : top + h, left : left + w], jnp.float32) / 255


def random_crops(key: Array, sizes: Array | np.ndarray, *, num: int, patch_size: int) -> Crops:
    """`num` places in images of `sizes` int32 `[n, 2]`, uniform over the images and over each image's own area."""
    sizes = jnp.asarray(sizes)
    of_image, of_top, of_left = jax.random.split(key, 3)
    image = jax.random.randint(of_image, (num,), 0, sizes.shape[0])
    limit = sizes[image] - (patch_size - 1)
    top = jax.random.randint(of_top, (num,), 0, limit[:, 0])
    left = jax.random.randint(of_left, (num,), 0, limit[:, 1])
    return Crops(image, top, left)


def cut_pixels(plates: Plates, crops: Crops, *, patch_size: int) -> Array:
    """The patches at those places: uint8 `[b, patch_size, patch_size]`."""
    width = plates.sizes[crops.image, 1]
    first = plates.offsets[crops.image] + crops.top * width + crops.left
    rows = first[:, None] + jnp.arange(patch_size)[None, :] * width[:, None]
    row = jax.vmap(jax.vmap(lambda start: lax.dynamic_slice(plates.pixels, (start,), (patch_size,))))
    return row(rows)


def cut(plates: Plates, crops: Crops, *, patch_size: int) -> Array:
    """The patches at those places: float32 `[b, patch_size, patch_size, 1]` in [0, 1]."""
    return scaled(cut_pixels(plates, crops, patch_size=patch_size))


def scaled(pixels: Array) -> Array:
    """Patches uint8 `[b, p, p]` as a network takes them: float32 `[b, p, p, 1]` in [0, 1]."""
    return (pixels.astype(jnp.float32) / 255)[..., None]


def random_flips(key: Array, patches: Array) -> Array:
    """Each patch `[b, p, p, c]` turned left-right and up-down, each with probability one half."""

    def one(key, patch):
        across, along = jax.random.split(key)
        return pix.random_flip_up_down(along, pix.random_flip_left_right(across, patch))

    return jax.vmap(one)(jax.random.split(key, patches.shape[0]), patches)

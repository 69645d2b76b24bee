"""What each training step is given of its image sets: patches at the places that one function, `choose`, has chosen.

`choose` runs inside the step. A set on the device is cut there; of a set that stays in its files `choose` runs here too, for many
steps at once, and worker processes cut.
"""

import contextlib
import functools
import itertools
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from steel_ad import parallel
from steel_ad.data import patches, workers
from steel_ad.data.images import Images
from steel_ad.data.patches import Crops, Plates, Streamed
from steel_ad.train.stage import Stage

# Steps whose places are chosen at once for the workers.
_AT_ONCE = 64


# A set in the data that training is given, or in what `choose` and the objective get.
Set = Plates | Streamed | Images


def cut(data: Any, places: Mapping[str, Crops], *, patch_size: int) -> dict[str, Array]:
    """In a step: patches of each set at `places`, uint8 `[b, patch_size, patch_size]`; any values where a sample does not look.

    Args:
      data: a NamedTuple, of which some fields are sets.
    """
    found: dict[str, Array] = {}
    for name, crops in places.items():
        images = getattr(data, name)
        if isinstance(images, Streamed):
            found[name] = parallel.split_batch(images.pixels)
        else:
            found[name] = patches.cut_pixels(images, parallel.split_batch(crops), patch_size=patch_size)
    return found


def on_device(data: Any, mesh: Mesh) -> Any:
    """The data as steps take it, replicated over the mesh: `Images` as Plates, or as Streamed where they stay in their files."""

    def one(field: Any) -> Any:
        if not isinstance(field, Images):
            return field
        return Streamed(None, field.sizes) if field.stored else patches.stack(field)

    return parallel.put(type(data)(*map(one, data)), parallel.replicated(mesh))


def calls(stage: Stage, data: Any, root: Array, *, first: int, mesh: Mesh) -> Generator[Any]:
    """What each call of a stage's step takes, from step `first` to the last one; each process reads its part of a batch.

    Args:
      data: a NamedTuple; its fields that are Images are put on the device, or read while training goes on.
    """
    here = on_device(data, mesh)
    sets = {name: f for name, f in data._asdict().items() if isinstance(f, Images) and f.stored}
    if not sets:
        yield from itertools.repeat(here)
    per_call, mine = stage.steps_per_call, parallel.part(stage.batch_size, mesh)
    starts = np.cumsum([0, *map(len, sets.values())], dtype=np.int32)[:-1]
    sized = parallel.local(
        type(data)(*(Streamed(None, f.sizes) if isinstance(f, Plates | Images) else f for f in data))
    )

    @functools.partial(jax.jit, static_argnames="count")
    def draw(sized, root, first, count) -> Array:
        def one(step):
            places = stage.choose(sized, step, root)
            return jnp.stack([jnp.stack(places[name], -1) for name in sets])

        return jax.lax.map(one, first + jnp.arange(count, dtype=jnp.int32), batch_size=_AT_ONCE)

    def places_of(call: int, count: int) -> np.ndarray:
        places = np.array(draw(sized, root, np.int32(call * per_call), count * per_call))[:, :, mine]
        places[..., 0] += np.where(places[..., 0] < 0, 0, starts[:, None])
        return np.moveaxis(places.reshape(count, per_call, *places.shape[1:]), 2, 1)

    batches = workers.batches(
        Images(*sets.values()),
        places_of,
        first=first // per_call,
        total=stage.steps // per_call,
        size=len(sets) * per_call * stage.batch_size,
        patch_size=stage.patch_size,
    )
    with contextlib.closing(batches):
        for batch in batches:
            pixels = {name: parallel.spread_parts(p, mesh) for name, p in zip(sets, batch, strict=True)}
            yield here._replace(**{name: getattr(here, name)._replace(pixels=p) for name, p in pixels.items()})

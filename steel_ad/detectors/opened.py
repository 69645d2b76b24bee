"""The one way from camera pixels to residual map, opened map and score (SPEC section 4, Test).

Evaluation, calibration, inspection, export, trials and re-reading compute maps here and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steel_ad import parallel
from steel_ad.data.images import Images
from steel_ad.detectors import Detector
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.morphology import grey_opening
from steel_ad.progress import progress


class Opened(NamedTuple):
    """Of one map of one image: residuals `raw` and their grey opening `opened`, float32 `[h, w]`; `score`, its maximum, `[]`."""

    raw: Array
    opened: Array
    score: Array


def scaled(pixels: Array) -> Array:
    """Pixels uint8 as detectors take them: float32 in [0, 1]."""
    return pixels.astype(jnp.float32) / 255


def open_map(raw: Array, *, radius: int) -> Opened:
    """A residual map `[h, w]` with its opening by a disk of `radius` px."""
    opened = grey_opening(raw, radius=radius)
    return Opened(raw, opened, jnp.max(opened))


def open_maps(detector: Detector, state: Any, pixels: Array, *, radius: int) -> dict[str, Opened]:
    """All maps of a detector of one image uint8 `[h, w]`, by name; pure and jittable."""
    maps = detector.maps(state, scaled(pixels))
    return {name: open_map(raw, radius=radius) for name, raw in maps.items()}


def at_once(shape: Sequence[int]) -> int:
    """Images of `shape` that one device takes together: one on CPU, where a batch's activations leave the caches, elsewhere four
    of 256x256 pixels."""
    most = 1 if jax.default_backend() == "cpu" else 4
    return max(1, min(most, most * 2**16 // (shape[0] * shape[1])))


class Program:
    """A function of a state and of pixels uint8 `[h, w]`, over many images and all devices."""

    def __init__(self, function: Callable[[Any, Array], Any]):
        self._mesh = parallel.mesh()
        whole, spread = parallel.replicated(self._mesh), parallel.spread(self._mesh)
        self._program = jax.jit(
            jax.vmap(function, in_axes=(None, 0)),
            in_shardings=(whole, spread),
            # Process 0 needs all results; results of one process are gathered on the host.
            out_shardings=whole if jax.process_count() > 1 else spread,
            compiler_options=cpu_compiler_options(),
        )

    def lower(self, state: Any, images: Any) -> Any:
        """The program of a batch uint8 `[b, h, w]`, as `jax.stages.Lowered`; shapes will do."""
        return self._program.lower(state, images)

    def __call__(
        self, state: Any, images: Sequence[np.ndarray], *, label: str, keep: Callable[[Any], Any] = lambda found: found
    ) -> list[Any]:
        """The function's results as numpy arrays, in the images' order.

        Args:
          state: the function's first argument.
          images: uint8 `[h_i, w_i]`; images of one shape share a program.
          label: of the progress bar.
          keep: an image's result -> what is kept of it.
        """
        state = parallel.put(state, parallel.replicated(self._mesh))
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(map(tuple, Images(images).sizes.tolist())):
            groups.setdefault(shape, []).append(i)
        results: list[Any] = [None] * len(images)
        done = 0
        pending: tuple[list[int], Any] | None = None

        def settle() -> None:
            nonlocal pending, done
            if pending is None:
                return
            chosen, batch = pending[0], jax.device_get(pending[1])
            pending = None
            for k, i in enumerate(chosen):
                results[i] = keep(jax.tree.map(lambda a, k=k: a[k], batch))
            done += len(chosen)
            update(done)

        with progress(label, len(images), "images") as update:
            for shape, members in groups.items():
                size = self._mesh.size * at_once(shape)
                for start in range(0, len(members), size):
                    chosen = members[start : start + size]
                    # The last batch repeats an image, so that a shape compiles once.
                    padded = chosen + [chosen[-1]] * (size - len(chosen))
                    batch = parallel.put(np.stack([images[i] for i in padded]), parallel.spread(self._mesh))
                    under_way = self._program(state, batch)
                    # The devices work on this batch while the host fetches the one before.
                    settle()
                    pending = chosen, under_way
            settle()
        return results

"""What other settings of the evaluation read off one trained autoencoder, without training again (SPEC section 4, Varied)."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad.data.datasets import TestImage
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.detectors.opened import open_map, scaled
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.progress import progress
from steel_ad.runs import evaluation
from steel_ad.runs.evaluation import Maps, Thresholds

# Settings that leave the network and what it reconstructs alone, and the stride, which leaves the network alone.
AXES = ("percentile", "radius", "stride", "residual_constants", "window_size")


class Reader:
    """Reads a trained autoencoder's maps of the same images under many settings; each stage is computed once.

    Args:
      config: of the run; the settings that are not varied.
      params: of the network.
      validation: good images, uint8 `[h_i, w_i]`, that calibrate the thresholds.
      test: images to measure, not none.
      strides: all that will be asked for.
    """

    def __init__(
        self,
        config: configs.Autoencoder,
        params: Any,
        validation: Sequence[np.ndarray],
        test: Sequence[TestImage],
        strides: Sequence[int],
    ):
        self._validation = len(validation)
        self._test = test
        self._images = [*validation, *(t.image for t in test)]
        self._reconstructions = _reconstruct(config, params, self._images, strides)
        self._raw: tuple[Any, dict[str, list[np.ndarray]]] = (None, {})
        self._opened: tuple[Any, dict[str, list[np.ndarray]]] = (None, {})

    def read(self, config: configs.Autoencoder) -> tuple[dict[str, dict[str, Any]], dict[str, Thresholds]]:
        """By map, the metrics of SPEC section 6 and the thresholds, as `studies.autoencoder.run` with these settings has them.

        Args:
          config: differs from the first one in `AXES` only.
        """
        key: tuple[Any, ...] = (config.stride, config.residual_constants, config.window_size)
        if self._raw[0] != key:
            detector = AutoencoderDetector(config)
            compare = jax.jit(
                lambda reconstruction, image: detector.compare(reconstruction, scaled(image)),
                compiler_options=cpu_compiler_options(),
            )
            self._raw = (key, _each(compare, zip(self._reconstructions[config.stride], self._images, strict=True)))
        if self._opened[0] != (key := (*key, config.radius)):
            maps = (dict(zip(self._raw[1], m, strict=True)) for m in zip(*self._raw[1].values(), strict=True))
            opening = jax.jit(
                lambda maps: {n: open_map(m, radius=config.radius).opened for n, m in maps.items()},
                compiler_options=cpu_compiler_options(),
            )
            self._opened = (key, _each(opening, ((m,) for m in maps)))
        found, limits, n = {}, {}, self._validation
        for name in config.maps:
            raw = self._raw[1][name]
            opened = self._opened[1][name]
            limits[name] = evaluation.thresholds(Maps(raw[:n], opened[:n]), config.percentile)
            found[name] = evaluation.measure(Maps(raw[n:], opened[n:]), self._test, limits[name])
        return found, limits


def _each(program, arguments) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for a in arguments:
        for name, m in jax.device_get(program(*a)).items():
            found.setdefault(name, []).append(m)
    return found


def _reconstruct(
    config: configs.Autoencoder, params: Any, images: Sequence[np.ndarray], strides: Sequence[int]
) -> dict[int, list[np.ndarray]]:
    """By stride, reconstructions of the images; windows that several strides share go through the network once."""
    found: dict[int, list[np.ndarray]] = {}
    families = list(_families(strides))
    with progress("reconstruct", len(images) * len(families), "images") as update:
        done = 0
        for family in families:
            program = jax.jit(
                lambda params, image, family=family: autoencoder.reconstructions(config, params, scaled(image), family),
                compiler_options=cpu_compiler_options(),
            )
            for image in images:
                for stride, r in zip(family, jax.device_get(program(params, image)), strict=True):
                    found.setdefault(stride, []).append(r)
                done += 1
                update(done)
    return found


def _families(strides: Sequence[int]) -> Iterator[list[int]]:
    """Groups of strides whose first divides the others."""
    left = sorted(set(strides))
    while left:
        yield [s for s in left if s % left[0] == 0]
        left = [s for s in left if s % left[0]]

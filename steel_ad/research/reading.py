"""What other settings of the evaluation read off one trained autoencoder, without training again (SPEC section 4, Varied)."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from steel_ad import config as configs
from steel_ad.data.datasets import TestImage
from steel_ad.detectors import autoencoder
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.detectors.opened import Program, open_map, scaled
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.runs import evaluation
from steel_ad.runs.evaluation import Maps, Thresholds

# Settings that leave the network and what it reconstructs alone, and the stride, which leaves the network alone.
AXES = ("percentile", "radius", "stride", "residual_constants", "window_size")


class Reader:
    """Reads a trained autoencoder's maps of the same images under many settings; images are reconstructed once.

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
        self._maps: tuple[Any, dict[str, Maps]] = (None, {})

    def read(self, config: configs.Autoencoder) -> tuple[dict[str, dict[str, Any]], dict[str, Thresholds]]:
        """By map, the metrics of SPEC section 6 and the thresholds, as `runs.autoencoder.run` with these settings has them.

        Args:
          config: differs from the first one in `AXES` only.
        """
        key = (config.stride, config.residual_constants, config.window_size, config.radius)
        if self._maps[0] != key:
            self._maps = key, self._open(config)
        found, limits, n = {}, {}, self._validation
        for name, maps in self._maps[1].items():
            limits[name] = evaluation.thresholds(Maps(maps.raw[:n], maps.opened[:n]), config.percentile)
            found[name] = evaluation.measure(Maps(maps.raw[n:], maps.opened[n:]), self._test, limits[name])
        return found, limits

    def _open(self, config: configs.Autoencoder) -> dict[str, Maps]:
        """The maps of all images."""
        detector = AutoencoderDetector(config)

        def maps(reconstruction, pixels):
            compared = detector.compare(reconstruction, scaled(pixels))
            return {name: open_map(raw, radius=config.radius) for name, raw in compared.items()}

        program = jax.jit(maps, compiler_options=cpu_compiler_options())
        pairs = zip(self._reconstructions[config.stride], self._images, strict=True)
        opened = [jax.device_get(program(*pair)) for pair in pairs]
        return {name: Maps([m[name].raw for m in opened], [m[name].opened for m in opened]) for name in config.maps}


def _reconstruct(
    config: configs.Autoencoder, params: Any, images: Sequence[np.ndarray], strides: Sequence[int]
) -> dict[int, list[np.ndarray]]:
    """By stride, reconstructions of the images; windows that several strides share go through the network once."""
    found: dict[int, list[np.ndarray]] = {}
    for family in _families(strides):

        def reconstruct(params, pixels, family=family):
            return autoencoder.reconstructions(config, params, scaled(pixels), family)

        program = Program(reconstruct)
        by_image = program(params, images, label=f"reconstruct every {', '.join(map(str, family))} px")
        found |= dict(zip(family, map(list, zip(*by_image, strict=True)), strict=True))
    return found


def _families(strides: Sequence[int]) -> Iterator[list[int]]:
    """Groups of strides whose first divides the others."""
    left = sorted(set(strides))
    while left:
        yield [s for s in left if s % left[0] == 0]
        left = [s for s in left if s % left[0]]

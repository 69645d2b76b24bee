"""Spectra, the pattern's lattice, and three detectors without training (SPEC section 5).

    python -m experiments.spectrum --data=DIR --workdir=DIR

preset   what                                                cost on 2 CPU cores
default  24 good images looked at, all three maps            seconds a data set
tiny     a smoke test on images of 64 pixels                 seconds
"""

from typing import Any

from ml_collections import ConfigDict

from steel_ad import config, recipes

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {"images": 3, "tile": 16, "smoothing_px": 5, "radius": 1},
}


def get_config(preset: str = "default") -> ConfigDict:
    """Settings of a preset, to be changed field by field in a recipe of your own; raises as `recipes.of`."""
    return recipes.of(config.Spectrum, PRESETS, preset)

"""Spectra, the pattern's lattice, and three detectors without training (SPEC section 5).

    python -m experiments.spectrum --data=DIR --workdir=DIR

preset   what                                                cost on 2 CPU cores
default  24 good images looked at, all three maps            seconds a data set
tiny     a smoke test on images of 64 pixels                 seconds
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from steel_ad.config import Spectrum

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {"images": 3, "tile": 16, "smoothing_px": 5, "radius": 1},
}


def get_config(preset: str = "default") -> ConfigDict:
    """Settings of a preset, every field open to `--config.FIELD=value`.

    Raises:
      ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: use one of {', '.join(PRESETS)}")
    return ConfigDict(dataclasses.asdict(Spectrum(**PRESETS[preset])))

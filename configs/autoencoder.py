"""Autoencoder trained on good images only (SPEC section 4).

    python -m experiments.autoencoder --config=configs/autoencoder.py:quick --data=DIR --workdir=DIR

preset   what                                                            cost on 2 CPU cores
quick    fresh crops, Adam with warm-up, cosine and clipping             3 minutes
thesis   SPEC section 4 to the letter: 10,000 fixed crops, 200 epochs    about 3 hours
demo     quick, a quarter as long: for `make demo`                       1 minute
tiny     a smoke test                                                    seconds
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from steel_ad.config import Autoencoder

PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {},
    "quick": {
        "crops": "fresh",
        # Flipped plates are lit from the wrong side: with flips, diamond falls from 0.903 to 0.866 (1200 steps).
        "flips": False,
        "constants": "wang",
        "batch_size": 16,
        "steps": 1500,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "checkpoint_every": 300,
    },
    "demo": {
        "crops": "fresh",
        "constants": "wang",
        "batch_size": 16,
        "steps": 400,
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "checkpoint_every": 200,
    },
    "tiny": {
        "crops": "fresh",
        "flips": True,
        "constants": "wang",
        "patch_size": 32,
        "latent": 8,
        "batch_size": 4,
        "steps": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "stride": 16,
        "checkpoint_every": 4,
    },
}


def get_config(preset: str = "quick") -> ConfigDict:
    """Settings of a preset, every field open to `--config.FIELD=value`.

    Raises:
      ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = ConfigDict(dataclasses.asdict(Autoencoder(**PRESETS[preset])))
    # None leaves an option at the loss's default; c1 and c2 follow `constants` unless given here.
    config.loss_options = ConfigDict(
        {
            "window_size": config_dict.placeholder(int),
            "window": config_dict.placeholder(str),
            "sigma": config_dict.placeholder(float),
            "c1": config_dict.placeholder(float),
            "c2": config_dict.placeholder(float),
            "alpha": config_dict.placeholder(float),
            "beta": config_dict.placeholder(float),
            "gamma": config_dict.placeholder(float),
            "weight": config_dict.placeholder(float),
        }
    )
    return config

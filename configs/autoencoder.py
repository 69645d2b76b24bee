"""Autoencoder trained on good images only (SPEC section 4).

    python -m experiments.autoencoder --config=quick --data=DIR --workdir=DIR

preset   what                                                            cost on 2 CPU cores
quick    fresh crops, Adam with warm-up, cosine and clipping             3 minutes
thesis   SPEC section 4 to the letter: 10,000 fixed crops, 200 epochs    about 3 hours
demo     quick, a quarter as long: for `make demo`                       1 minute
tiny     a smoke test                                                    seconds
"""

from typing import Any

from ml_collections import ConfigDict

from steel_ad import config, recipes

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
    """Settings of a preset, to be changed field by field in a recipe of your own; raises as `recipes.of`."""
    return recipes.of(config.Autoencoder, PRESETS, preset)

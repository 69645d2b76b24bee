"""CompactCNN or U-Net with a classification stage, on good plates with inserted defects (SPEC sections 2 and 3).

    python -m experiments.segmentation --config=configs/segmentation.py:quick --data=DIR --defects=DIR --workdir=DIR
    python -m experiments.transfer --config=configs/segmentation.py:quick --source=DIR --target=DIR --defects=DIR --workdir=DIR

preset   what                                                              cost on 2 CPU cores
quick    U-Net of width 16, cross-entropy and Dice, Adam, difference blend  about 10 minutes
thesis   SPEC section 2 to the letter: width 64, MSE, Adadelta, paste       days; meant for an accelerator
tiny     a smoke test                                                      seconds
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from steel_ad.config import Segmentation

PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {},
    "quick": {
        "width": 16,
        "patch_size": 256,
        "ratio": "3:1",
        "blend": "difference",
        "augment": "strong",
        "max_defects": 3,
        "loss": "bce_dice",
        "optimizer": "adam",
        "learning_rate": 2e-3,
        "warmup_steps": 30,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "steps": 800,
        "classifier_steps": 200,
        "adapt_steps": 100,
    },
    "tiny": {
        "width": 2,
        "patch_size": 32,
        "blend": "difference",
        "optimizer": "adam",
        "loss": "bce",
        "batch_size": 2,
        "steps": 4,
        "classifier_steps": 4,
        "adapt_steps": 4,
        "defect_size": 64,
        "checkpoint_every": 2,
    },
}


def get_config(preset: str = "quick") -> ConfigDict:
    """Settings of a preset, every field open to `--config.FIELD=value`.

    Raises:
      ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: use one of {', '.join(PRESETS)}")
    config = ConfigDict(dataclasses.asdict(Segmentation(**PRESETS[preset])))
    # None leaves an option at the loss's default.
    config.loss_options = ConfigDict(
        {
            "gamma": config_dict.placeholder(float),
            "alpha": config_dict.placeholder(float),
            "smooth": config_dict.placeholder(float),
            "weight": config_dict.placeholder(float),
            "window_size": config_dict.placeholder(int),
            "c1": config_dict.placeholder(float),
            "c2": config_dict.placeholder(float),
        }
    )
    return config

"""CompactCNN or U-Net with a classification stage, on good plates with inserted defects (SPEC sections 2 and 3).

    python -m experiments.segmentation --config=quick --data=DIR --defects=DIR --workdir=DIR
    python -m experiments.transfer --config=quick --source=DIR --target=DIR --defects=DIR --workdir=DIR

    python -m experiments.segmentation --config=line --data=DIR --defects=line,procedural --workdir=DIR

preset   what                                                              cost on 2 CPU cores
quick    U-Net of width 16, cross-entropy and Dice, Adam, difference blend  about 10 minutes
line     as quick, in changing light: for good plates alone                 about 10 minutes
thesis   SPEC section 2 to the letter: width 64, MSE, Adadelta, paste       days; meant for an accelerator
tiny     a smoke test                                                      seconds
"""

from typing import Any

from ml_collections import ConfigDict

from steel_ad import config, recipes

_QUICK: dict[str, Any] = {
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
}

PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {},
    "quick": _QUICK,
    "line": {**_QUICK, "light": 0.5},
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
    """Settings of a preset, to be changed field by field in a recipe of your own; raises as `recipes.of`."""
    return recipes.of(config.Segmentation, PRESETS, preset)

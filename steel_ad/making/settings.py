"""Settings of the data sets that are made; every field is a flag of its own."""

import dataclasses
import math
from typing import Any

from steel_ad.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromVideo:
    """Settings of patches that are cut from a video's frames."""

    size: int = 256  # height and width of a patch, px
    # "grid": edge to edge from the top left corner, what is left at the other edges is not used; "random": per_frame different
    # places of a frame, uniform over all of them.
    positions: str = "grid"
    per_frame: int | None = None  # patches of a frame, 4 by default; with "random" only
    seed: int | None = None  # of the places, 0 by default; with "random" only
    min_contrast: float = (
        4.0  # grey levels: a frame whose standard deviation is below it is blank; camera noise alone has 2 to 3
    )
    # A frame less sharp than this share of the median of the frames that are not blank is blurred. Sharpness depends on pattern
    # and light, so this threshold is relative.
    min_sharpness: float = 0.6

    def __post_init__(self):
        _choice(self, "positions", "grid", "random")
        if self.positions == "grid" and (self.per_frame is not None or self.seed is not None):
            raise InputError("--per_frame and --seed are for --positions=random: leave them out")
        _least(self, 1, "size", "per_frame")
        _least(self, 0, "min_contrast", "min_sharpness")
        _seed(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inserted:
    """Settings of a test set with inserted defects."""

    num_test: int = 100  # good test images, and as many defective ones
    test_fraction: float = 0.3  # of each kind's source images
    blend: str = "difference"  # or "paste"
    augment: str = "thesis"  # or "strong"
    seed: int = 0  # of everything drawn

    def __post_init__(self):
        _least(self, 1, "num_test")
        _seed(self)
        _choice(self, "blend", "difference", "paste")
        _choice(self, "augment", "thesis", "strong")
        if not 0 < self.test_fraction < 1:
            raise InputError(f"--test_fraction={self.test_fraction} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thesis:
    """Settings of the thesis' sets."""

    lines: tuple[str, ...] = ("teardrop1", "teardrop2", "teardrop3", "teardrop4", "diamond")  # names in `plates.LINES`
    num_train: int = 2000  # good training images of each line
    num_test: int = 200  # test images of each line, a multiple of 4
    seed: int = 0  # of everything drawn

    def __post_init__(self):
        if len(set(self.lines)) < len(self.lines):
            raise InputError("--lines names a line twice: name each once")
        _least(self, 1, "num_train")
        _seed(self)
        if self.num_test < 4 or self.num_test % 4:
            raise InputError(
                f"--num_test={self.num_test} must be a multiple of 4: half are good, a quarter of a special kind"
            )


def _choice(config: Any, name: str, *choices: str) -> None:
    if getattr(config, name) not in choices:
        raise InputError(f"--{name}={getattr(config, name)} must be one of {', '.join(choices)}")


def _least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not value >= least or value == math.inf):
            raise InputError(f"--{name}={value} must be a number of at least {least}")


def _seed(config: Any) -> None:
    if not 0 <= (config.seed or 0) < 2**32:
        raise InputError(f"--seed={config.seed} must be at least 0 and below {2**32}")

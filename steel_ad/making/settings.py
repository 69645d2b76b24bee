"""Settings of the data sets that are made."""

import dataclasses
from typing import Literal

from steel_ad.errors import InputError
from steel_ad.fields import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromVideo(Settings):
    """Settings of patches that are cut from a video's frames."""

    size: int = 256  # Side of a patch, px.
    # Places of the patches: grid is edge to edge from the top left corner, without what is left at the other edges; random is
    # per_frame different places of a frame, uniform over all of them.
    positions: Literal["grid", "random"] = "grid"
    per_frame: int | None = None  # Patches of a frame, 4 by default; with positions=random only.
    seed: int | None = None  # Seed of the places, 0 by default; with positions=random only.
    # Contrast, as the standard deviation of the grey levels, below which a frame is blank; camera noise alone has 2 to 3.
    min_contrast: float = 4.0
    # Sharpness, as a share of the median of the frames that are not blank, below which a frame is blurred. The threshold is
    # relative, since sharpness depends on pattern and light.
    min_sharpness: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == "grid" and (self.per_frame is not None or self.seed is not None):
            raise InputError("--per_frame and --seed are for --positions=random: leave them out")
        for name, least in (("size", 1), ("per_frame", 1), ("min_contrast", 0), ("min_sharpness", 0), ("seed", 0)):
            if getattr(self, name) is not None:
                self._must_be_at_least(least, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inserted(Settings):
    """Settings of a test set with inserted defects."""

    num_test: int = 100  # Number of good test images, and of defective ones.
    test_fraction: float = 0.3  # Share of each kind's source images that is for the test set.
    # Blending of a defect: the difference to the steel around it is added, or its pixels are pasted.
    blend: Literal["difference", "paste"] = "difference"
    augment: Literal["thesis", "strong"] = "thesis"  # Random changes of a defect.
    seed: int = 0  # Seed of everything that is drawn.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(1, "num_test")
        self._must_be_at_least(0, "seed")
        self._must(0 < self.test_fraction < 1, "test_fraction", "between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thesis(Settings):
    """Settings of the thesis' sets."""

    # Lines to make, of steel_ad.data.plates.LINES.
    lines: tuple[str, ...] = ("teardrop1", "teardrop2", "teardrop3", "teardrop4", "diamond")
    num_train: int = 2000  # Number of good training images of each line.
    # Number of test images of each line, a multiple of 4: half are good, a quarter of a special kind.
    num_test: int = 200
    seed: int = 0  # Seed of everything that is drawn.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must(0 < len(self.lines) == len(set(self.lines)), "lines", "the names of at least one line, each once")
        self._must_be_at_least(1, "num_train")
        self._must_be_at_least(0, "seed")
        self._must(self.num_test >= 4 and self.num_test % 4 == 0, "num_test", "a multiple of 4")

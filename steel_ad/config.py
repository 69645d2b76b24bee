"""Settings of the experiments; what is a field here is a flag of the binaries."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from steel_ad.errors import InputError
from steel_ad.fields import Settings, fields

T = TypeVar("T", bound=Settings)
Constants = Literal["thesis", "wang"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Settings):
    """Settings of every experiment that judges plates by a threshold from good images."""

    flag: ClassVar[str] = "--config."

    seed: int = 0  # Seed of everything that is drawn.
    validation_fraction: float = 0.2  # Share of the good images that calibrate the threshold and train nothing.
    percentile: float = 98.0  # Percentile of the good images' residuals that is the threshold.
    radius: int = 4  # Radius of the disk of the opening that cleans a residual map, px.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(0, "seed", "radius")
        self._must(0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        self._must(0 <= self.percentile <= 100, "percentile", "in 0..100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Experiment):
    """Settings of every experiment that trains a network."""

    # Network and patches.
    patch_size: int = 128  # Side of a patch, px; a multiple of 16.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Type of the arithmetic; parameters are float32.
    flips: bool = False  # Random flips of patches, before anything is inserted.
    train_images: int = 0  # Number of good images to train on, beside those that calibrate; 0: all.
    # Place of the images while training: device, all in its memory; grain, in their files, which worker processes read with
    # the same result; auto: grain for images of more than resident_mb. Defects to insert are always on the device.
    data_path: Literal["auto", "device", "grain"] = "auto"
    resident_mb: int = 1024  # Megabytes of images, a byte a pixel, up to which data_path=auto keeps them on the device.
    # Option of the loss, also of one of your own, as NAME=VALUE; repeatable.
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    # Optimiser.
    learning_rate: float = 1e-3  # Learning rate of Adam.
    warmup_steps: int = 0  # Steps over which Adam's learning rate rises from 0.
    schedule: Literal["constant", "cosine"] = "constant"  # Course of Adam's learning rate; cosine ends at 0.
    clip_norm: float = 0.0  # Largest norm of a gradient; 0: no limit.
    batch_size: int = 8  # Patches in a step, over all devices.
    steps: int = 0  # Training steps; 0: as many as epochs makes.
    checkpoint_every: int = 100  # Steps between checkpoints.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(1, "batch_size", "checkpoint_every")
        self._must_be_at_least(0, "steps", "warmup_steps", "clip_norm", "train_images", "resident_mb")
        self._must(self.patch_size >= 16 and self.patch_size % 16 == 0, "patch_size", "a multiple of 16")
        self._must(self.learning_rate > 0, "learning_rate", "positive")
        try:
            json.dumps(_nested(self.loss_options, list), allow_nan=False)
        except (TypeError, ValueError):
            raise InputError(
                f"--loss_option takes finite numbers, text, true or false, and lists of these, not {self.loss_options}"
            ) from None

    @property
    def resident_bytes(self) -> float:
        """Images of more than these are read while training."""
        return {"auto": min(self.resident_mb * 1e6, 2**31 - 1), "device": math.inf, "grain": -1}[self.data_path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder(Training):
    """Settings of the autoencoder experiment; the defaults are SPEC section 4's."""

    model: str = "bergmann"  # Network: a name in steel_ad.models.AUTOENCODERS, or your own as module:Class.
    latent: int = 100  # Length of the latent code z.
    # Patches to train on: fixed draws num_crops once and goes over them in epochs; fresh draws new ones at every step.
    crops: Literal["fixed", "fresh"] = "fixed"
    num_crops: int = 10_000  # Number of fixed patches, and of patches in an epoch.
    loss: str = "ssim"  # Loss: a name in steel_ad.losses.LOSSES, or your own as module:function.
    # Constants c1 and c2 of an SSIM loss: thesis (0.01 and 0.03), or wang (their squares).
    constants: Constants = "thesis"
    batch_size: int = 128
    epochs: int = 200  # Passes over num_crops patches; not used where steps is above 0.
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5  # Strength of the weight decay.
    # Form of the weight decay: l2 adds it to the gradient; learning_rate divides the rate by 1 + weight_decay * step.
    decay: Literal["l2", "learning_rate"] = "l2"
    stride: int = 32  # Distance of the windows that an image is reconstructed in, px.
    maps: tuple[str, ...] = ("ssim", "l2")  # Residual maps to evaluate, of ssim and l2; the run's own one first.
    residual_constants: Constants = "thesis"  # Constants c1 and c2 of the SSIM residual map, as constants.
    # Side of the SSIM residual map's window, px; the loss has its own, --loss_option=window_size=11.
    window_size: int = 11
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(1, "latent", "num_crops", "stride", "window_size")
        self._must_be_at_least(0, "epochs", "weight_decay")
        if self.total_steps < 1:
            raise InputError("neither --config.steps nor --config.epochs asks for a step: set one of them")
        for name in ("window_size", "stride"):
            self._must(getattr(self, name) <= self.patch_size, name, f"at most --config.patch_size={self.patch_size}")
        self._must(len(self.maps) > 0 and set(self.maps) <= {"ssim", "l2"}, "maps", "some of ssim, l2")

    @property
    def steps_per_epoch(self) -> int:
        """Batches in `num_crops` patches; what does not fill a batch is left for another epoch's order."""
        return max(1, self.num_crops // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.steps or self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Training):
    """Settings of the supervised experiments; the defaults are SPEC section 2's."""

    model: str = "unet"  # Network: a name in steel_ad.models.SEGMENTERS, or your own as module:Class.
    width: int = 64  # Channels of the U-Net's first block.
    upsampling: Literal["learned", "nearest"] = "learned"  # Upsampling of the U-Net.
    patch_size: int = 256
    ratio: str = "1:1"  # Ratio of defective to good samples in the segmentation stage.
    classifier_ratio: str = "1:1"  # Ratio of defective to good samples in the classification stage.
    samples: int = 2000  # Samples in an epoch.
    # Blending of an inserted defect: its pixels are pasted, or their difference to the steel around it is added.
    blend: Literal["paste", "difference"] = "paste"
    augment: Literal["thesis", "strong"] = "thesis"  # Random changes of an inserted defect.
    max_defects: int = 1  # Most defects in a defective sample.
    # Share of the defective samples that are alterations of the line's own plates, where --defects names line and others.
    altered: float = 0.5
    light: float = 0.0  # Strength of random changes of light, focus and noise in every sample, such as 1; 0: none.
    defect_size: int = 208  # Side of the largest defect that is cut out, with its margin, px.
    new_line: float = 0.5  # Share of the new line's good samples while a transfer adapts.
    loss: str = "mse"  # Loss: a name in steel_ad.losses.SEGMENTATION_LOSSES, or your own as module:function.
    optimizer: Literal["adadelta", "adam"] = "adadelta"  # Optimiser; the learning rate and its course are Adam's.
    adadelta: Literal["tf_keras", "old_keras", "pytorch"] = "tf_keras"  # Library whose defaults Adadelta has.
    epochs: int = 25  # Passes of the segmentation stage; not used where steps is above 0.
    classifier_epochs: int = 10  # Passes of the classification stage; not used where classifier_steps is above 0.
    classifier_steps: int = 0  # Steps of the classification stage; 0: as many as classifier_epochs makes.
    adapt_epochs: int = 5  # Passes over the mixture while a transfer adapts; not used where adapt_steps is above 0.
    adapt_steps: int = 0  # Steps while a transfer adapts; 0: as many as adapt_epochs makes.
    threshold: float = 0.5  # Threshold of the map.
    percentile: float = 98.0  # Percentile of the good images' scores, for the calibrated accuracy.
    radius: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(1, "width", "samples", "max_defects")
        self._must_be_at_least(0, "epochs", "classifier_epochs", "classifier_steps", "adapt_epochs", "adapt_steps")
        self._must_be_at_least(64, "defect_size")
        self._must(0 < self.new_line < 1, "new_line", "between 0 and 1")
        self._must(0 < self.altered < 1, "altered", "between 0 and 1")
        self._must_be_at_least(0, "light")
        if self.total_steps < 1 or self.total_classifier_steps < 1:
            raise InputError(
                "no step is asked for: set --config.steps or epochs, and classifier_steps or classifier_epochs"
            )
        if self.optimizer == "adadelta" and (
            self.learning_rate != 1e-3 or self.warmup_steps or self.schedule != "constant"
        ):
            raise InputError(
                "--config.learning_rate, warmup_steps and schedule are Adam's: set --config.optimizer=adam, or for Adadelta "
                "--config.adadelta alone"
            )
        for name in ("ratio", "classifier_ratio"):
            defective_share(getattr(self, name), name)
        if defective_share(self.classifier_ratio, "classifier_ratio") == 1:
            raise InputError("--config.classifier_ratio=1:0 shows no good sample: use 1:1 or 1:3")

    def _steps(self, epochs: int) -> int:
        return epochs * max(1, self.samples // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the segmentation stage."""
        return self.steps or self._steps(self.epochs)

    @property
    def total_classifier_steps(self) -> int:
        """Training steps of the classification stage."""
        return self.classifier_steps or self._steps(self.classifier_epochs)

    @property
    def total_adapt_steps(self) -> int:
        """Steps of adaptation in the transfer experiment."""
        return self.adapt_steps or self._steps(self.adapt_epochs)


def defective_share(ratio: str, name: str = "ratio") -> float:
    """Share of defective samples in a ratio such as "1:3": 0.25.

    Raises:
      InputError: no such ratio, or one without defective samples.
    """
    try:
        defective, good = (float(part) for part in ratio.split(":"))
    except ValueError:
        defective, good = -1.0, 0.0
    if not (defective > 0 and good >= 0):
        raise InputError(f"--config.{name}={ratio} must be defective:good, such as 1:0, 1:1 or 1:3")
    return defective / (defective + good)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum(Experiment):
    """Settings of the detectors without training."""

    # Detectors: names in steel_ad.detectors.REGISTRY, or your own as module:Class.
    maps: tuple[str, ...] = ("phase_only", "whitening", "lattice")
    images: int = 24  # Number of good images that are looked at.
    smoothing_px: int = 9  # Side of the box that phase-only and whitening average the energy in, twice, px.
    tile: int = 128  # Side of a whitened tile, px; even.
    background: float = 3.0  # Side of the box whose mean the lattice takes off the image first, in pitches.
    window: float = 0.25  # Side of the box that the lattice averages deviations in, in pitches.
    floor: float = 0.2  # Least deviation at a place of the lattice's cell, as a share of the cell's mean deviation.
    detail: float = 1.0  # Weight of the whitened energy in the lattice's map; 0: none.
    components: int = 8  # Ways in which the lattice's cell varies from plate to plate, such as under a moving light.

    def __post_init__(self) -> None:
        super().__post_init__()
        once = 0 < len(self.maps) == len(set(self.maps))
        self._must(once, "maps", "the names of at least one detector, each once")
        self._must_be_at_least(0, "detail")
        self._must_be_at_least(1, "images", "smoothing_px")
        self._must(self.smoothing_px % 2 == 1, "smoothing_px", "odd")
        self._must(self.tile >= 8 and self.tile % 2 == 0, "tile", "even and at least 8")
        for name in ("background", "window", "floor"):
            self._must(getattr(self, name) > 0, name, "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection(Settings):
    """Settings of an inspection."""

    map: str = ""  # Residual map of the model, such as ssim or l2 of an autoencoder; empty: the run's first.
    tile_px: int = 256  # Side of a tile, the unit of calibration and of inspection, px.
    halo_px: int = 64  # Surroundings of a tile that the detector sees, on each side, px.
    false_alarm_rate: float = 0.01  # Share of good tiles that may raise an alarm.
    # Confidence of the promised rate over calibrations, such as 0.95; average: the rate holds on average over calibrations.
    confidence: Annotated[float | None, "average"] = None
    # Tiles with a false alarm per square metre of plate, by a model of the tail, in place of false_alarm_rate; needs mm_per_px.
    false_alarms_per_m2: float = 0.0
    mm_per_px: float = 0.0  # Size of a pixel on the plate, mm; 0: not known.
    strip: bool = False  # Images of the folder that follow each other along one strip.
    pitch_mm: float = 0.0  # Pitch of the plate's pattern along the strip, for recurrence, mm; 0: not known.
    seed: int = 0  # Seed of everything that is drawn.

    def __post_init__(self) -> None:
        super().__post_init__()
        self._must_be_at_least(16, "tile_px")
        self._must_be_at_least(0, "halo_px", "seed", "mm_per_px", "pitch_mm")
        self._must(0 < self.false_alarm_rate < 1, "false_alarm_rate", "between 0 and 1")
        known = self.confidence is None or 0 < self.confidence < 1
        self._must(known, "confidence", "average or between 0 and 1, such as 0.95")
        if self.false_alarms_per_m2 and self.confidence is not None:
            raise InputError(
                "--confidence is of --false_alarm_rate, the model of --false_alarms_per_m2 has none: leave one out"
            )
        known = self.false_alarms_per_m2 == 0 or (self.false_alarms_per_m2 > 0 and self.mm_per_px > 0)
        self._must(known, "false_alarms_per_m2", "positive, and needs --mm_per_px, the size of a pixel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detectability(Settings):
    """Settings of the trials beside those of the inspection that they imitate."""

    smallest_px: float = 3.0  # Length of the smallest defect, the longer side of its bounding box, px.
    largest_px: float = 48.0  # Length of the largest defect, px.
    contrasts: tuple[float, ...] = (0.05, 0.1, 0.2)  # Mean absolute changes of brightness, of the full range.
    trials: int = 60  # Number of defects of each kind and contrast.

    def __post_init__(self) -> None:
        super().__post_init__()
        known = 1 <= self.smallest_px < self.largest_px
        self._must(known, "smallest_px", f"between 1 and --largest_px={self.largest_px}")
        known = len(self.contrasts) > 0 and all(0 < c <= 1 for c in self.contrasts)
        self._must(known, "contrasts", "shares of the full range, such as 0.1")
        self._must_be_at_least(10, "trials")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalseAlarms(Settings):
    """Settings of the simulation of promised and observed false alarms."""

    lines: int = 20  # Number of lines.
    fresh: int = 5000  # Good plates of a line to count alarms on.
    calibration: int = 2000  # Good plates, or strips, of a line to calibrate on.
    rates: tuple[float, ...] = (0.05, 0.01, 0.002)  # False-alarm rates to promise.
    maps: tuple[str, ...] = (
        "phase_only",
        "whitening",
        "lattice",
    )  # Detectors, as --config.maps of the spectrum experiment.
    size: int = 64  # Side of a plate, px.
    seed: int = 0  # Seed of the simulation.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("lines", 2), ("fresh", 1), ("calibration", 1), ("size", 48), ("seed", 0)):
            self._must_be_at_least(least, name)
        self._must(len(self.rates) > 0 and all(0 < r < 1 for r in self.rates), "rates", "numbers between 0 and 1")
        once = 0 < len(self.maps) == len(set(self.maps))
        self._must(once, "maps", "the names of at least one detector, each once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRolls(Settings):
    """Settings of the simulation of damaged rolls."""

    strips: int = 1000  # Number of strips with a period, and of strips without one.
    least_turns: int = 8  # Turns on the shortest strip.
    most_turns: int = 40  # Turns on the longest strip.
    same_place: bool = False  # Further defects that lie at the roll's place across, not anywhere.
    seed: int = 0  # Seed of the simulation.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("strips", 1), ("least_turns", 6), ("most_turns", self.least_turns), ("seed", 0)):
            self._must_be_at_least(least, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Settings):
    """Settings of an exported detector."""

    # Platforms that the file can run on; the one of this process, which checks it, is among them. ONNX names none.
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    # Height of the images, px; 0: any that the detector takes where it takes several (256 as ONNX), else 256.
    height: int = 0
    width: int = 0  # Width of the images, px; 0: as for the height.
    threshold: float | None = None  # Threshold of the mask, such as an inspection's, in place of the run's own.


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` of a recipe, of flags, or of a dict read from JSON.

    Raises:
      InputError: a field that `kind` does not have, one that is missing, a value of another type, or one that it refuses.
    """
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"there is no setting {unknown[0]!r}: the settings are {', '.join(sorted(known))}")
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{kind.flag}{name} is missing: --help says what it is")
    return kind(**{k: _nested(v, tuple) for k, v in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as a dict that JSON can hold and `from_mapping` reads back."""
    return {f.name: _nested(getattr(config, f.name), list) for f in dataclasses.fields(config)}


def _nested(value: Any, sequence: type) -> Any:
    """A value with its sequences as `sequence`, and its mappings as dicts without None, at any depth."""
    if isinstance(value, Mapping):
        return {k: _nested(v, sequence) for k, v in value.items() if v is not None}
    return sequence(_nested(v, sequence) for v in value) if isinstance(value, list | tuple) else value


def canonical(config: Any) -> str:
    """A dataclass or a dict of settings as one JSON text: equal settings have the same text, in whatever order they came."""

    def exact(text: str) -> int | float:
        # A flag gives 0 where a preset has 0.0.
        return int(value) if (value := float(text)).is_integer() else value

    text = json.dumps(config if isinstance(config, Mapping) else to_dict(config))
    return json.dumps(json.loads(text, parse_float=exact), sort_keys=True)


def identity(settings: Mapping[str, Any]) -> str:
    """A name for settings: the first 16 hexadecimal digits of the SHA-256 of their canonical text."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting in which two `to_dict`s differ, as "name (a here, b there)", or None."""
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            return f"{name} ({ours.get(name)!r} here, {theirs.get(name)!r} there)"
    return None

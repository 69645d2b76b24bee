"""Settings of the experiments as frozen dataclasses, made once from the ConfigDict that flags may have changed."""

import dataclasses
import hashlib
import json
import math
import sys
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from steel_ad.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Settings of the autoencoder experiment; the defaults are SPEC section 4's."""

    seed: int = 0
    # Model and patches.
    model: str = "bergmann"  # a name in steel_ad.models.AUTOENCODERS, or module:Class
    patch_size: int = 128  # pixels, a multiple of 16
    latent: int = 100  # z
    dtype: str = "float32"  # of the arithmetic: "float32" or "bfloat16"; parameters are float32
    crops: str = "fixed"  # "fixed": num_crops drawn once, epochs over them; "fresh": new ones at every step
    num_crops: int = 10_000
    flips: bool = False
    validation_fraction: float = 0.2  # of the good images, for the threshold
    train_images: int = 0  # of the others, to train on, 0: all
    # Where the good images are while training: "device", all in its memory; "grain": in their files, read by worker processes
    # with the same result; "auto": "grain" where they have more than resident_mb.
    data_path: str = "auto"
    resident_mb: int = 1024  # of images, a byte a pixel
    # Loss.
    loss: str = "ssim"  # a name in steel_ad.losses, or module:function
    constants: str = "thesis"  # c1, c2 of an SSIM loss: "thesis" or "wang"
    # Further keyword arguments of the loss; left out of the hash, since a dict has none.
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    # Optimiser: Adam.
    batch_size: int = 128  # over all devices
    epochs: int = 200  # over num_crops patches; with steps > 0 not used
    steps: int = 0
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    schedule: str = "constant"  # "constant" or "cosine" (to zero)
    weight_decay: float = 1e-5
    decay: str = "l2"  # weight_decay is "l2": added to the gradient, or "learning_rate": lr / (1 + weight_decay * step)
    clip_norm: float = 0.0  # largest norm of a gradient, 0: no limit
    # Evaluation.
    stride: int = 32  # pixels between reconstruction windows
    maps: tuple[str, ...] = ("ssim", "l2")
    residual_constants: str = "thesis"
    window_size: int = 11  # of the SSIM residual map, pixels; the loss has its own in loss_options
    percentile: float = 98.0
    radius: int = 4  # pixels, of the opening's disk
    # Cadence, in steps.
    checkpoint_every: int = 500

    def __post_init__(self):
        _choice(self, "dtype", "float32", "bfloat16")
        _choice(self, "crops", "fixed", "fresh")
        _choice(self, "data_path", "auto", "device", "grain")
        _choice(self, "constants", "thesis", "wang")
        _choice(self, "residual_constants", "thesis", "wang")
        _choice(self, "schedule", "constant", "cosine")
        _choice(self, "decay", "l2", "learning_rate")
        _least(self, 1, "latent", "num_crops", "batch_size", "stride", "window_size", "checkpoint_every")
        _least(self, 0, "seed", "epochs", "steps", "warmup_steps", "weight_decay", "clip_norm", "radius")
        _least(self, 0, "train_images", "resident_mb")
        if self.patch_size < 16 or self.patch_size % 16:
            raise InputError(f"--config.patch_size={self.patch_size} must be a multiple of 16")
        if not self.learning_rate > 0:
            raise InputError(f"--config.learning_rate={self.learning_rate} must be positive")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"--config.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if not 0 <= self.percentile <= 100:
            raise InputError(f"--config.percentile={self.percentile} must lie in 0..100")
        if self.total_steps < 1:
            raise InputError("neither --config.steps nor --config.epochs asks for a step: set one of them")
        if self.window_size > self.patch_size or self.stride > self.patch_size:
            raise InputError(
                f"--config.window_size={self.window_size} and --config.stride={self.stride} "
                f"must not exceed --config.patch_size={self.patch_size}"
            )
        if not self.maps or set(self.maps) - {"ssim", "l2"}:
            raise InputError(f"--config.maps={self.maps} must name at least one of 'ssim', 'l2'")

    @property
    def resident_bytes(self) -> float:
        """Images of more than these are read while training."""
        return {"auto": min(self.resident_mb * 1e6, 2**31 - 1), "device": math.inf, "grain": -1}[self.data_path]

    @property
    def steps_per_epoch(self) -> int:
        """Batches in `num_crops` patches; what does not fill a batch is left for another epoch's order."""
        return max(1, self.num_crops // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.steps or self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Settings of the supervised experiments; the defaults are SPEC section 2's."""

    seed: int = 0
    # Model.
    model: str = "unet"  # a name in steel_ad.models.SEGMENTERS, or module:Class
    width: int = 64  # of the U-Net's first block
    upsampling: str = "learned"  # of the U-Net: or "nearest"
    dtype: str = "float32"  # of the arithmetic: "float32" or "bfloat16"; parameters are float32
    # Samples.
    patch_size: int = 256  # pixels, a multiple of 16
    flips: bool = False  # of plates, before anything is inserted
    ratio: str = "1:1"  # defective : defect-free samples of the segmentation stage
    classifier_ratio: str = "1:1"  # the same of the classification stage
    samples: int = 2000  # in an epoch
    validation_fraction: float = 0.2  # of the good images, for the threshold
    train_images: int = 0  # of the others, to train on, 0: all
    # Where the training images (good, labelled, of the new line) are while training, each set by itself: "device", all in its
    # memory; "grain": in their files, read by worker processes with the same result; "auto": "grain" where they have more than
    # resident_mb. Defects to insert are on the device.
    data_path: str = "auto"
    resident_mb: int = 1024  # of images, a byte a pixel
    blend: str = "paste"  # of an inserted defect: or "difference"
    augment: str = "thesis"  # of an inserted defect: or "strong"
    max_defects: int = 1  # in one defective sample
    defect_size: int = 208  # pixels: the largest defect that is cut out, with its margin
    new_line: float = 0.5  # transfer: share of the new line's good samples while adapting
    # Losses.
    loss: str = "mse"  # a name in steel_ad.losses.SEGMENTATION_LOSSES, or module:function
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    # Optimiser.
    optimizer: str = "adadelta"  # or "adam"
    adadelta: str = "tf_keras"  # whose default settings: "tf_keras", "old_keras" or "pytorch"
    learning_rate: float = 1e-3  # of Adam, as are the next two
    warmup_steps: int = 0
    schedule: str = "constant"  # or "cosine"
    clip_norm: float = 0.0
    batch_size: int = 8  # over all devices
    epochs: int = 25  # of the segmentation stage; with steps > 0 not used
    steps: int = 0
    classifier_epochs: int = 10  # of the classification stage; with classifier_steps > 0 not used
    classifier_steps: int = 0
    adapt_epochs: int = 5  # transfer: on the mixture; with adapt_steps > 0 not used
    adapt_steps: int = 0
    # Evaluation.
    threshold: float = 0.5  # of the map
    percentile: float = 98.0  # of good images' scores, for the calibrated accuracy
    radius: int = 0  # pixels, of the opening's disk
    # Cadence, in steps.
    checkpoint_every: int = 100

    def __post_init__(self):
        _choice(self, "upsampling", "learned", "nearest")
        _choice(self, "dtype", "float32", "bfloat16")
        _choice(self, "data_path", "auto", "device", "grain")
        _choice(self, "blend", "paste", "difference")
        _choice(self, "augment", "thesis", "strong")
        _choice(self, "optimizer", "adadelta", "adam")
        _choice(self, "adadelta", "tf_keras", "old_keras", "pytorch")
        _choice(self, "schedule", "constant", "cosine")
        _least(self, 1, "width", "samples", "max_defects", "batch_size", "checkpoint_every")
        _least(self, 0, "epochs", "steps", "classifier_epochs", "classifier_steps", "adapt_epochs", "adapt_steps")
        _least(self, 0, "seed", "warmup_steps", "clip_norm", "radius", "train_images", "resident_mb")
        _least(self, 64, "defect_size")
        if self.patch_size < 16 or self.patch_size % 16:
            raise InputError(f"--config.patch_size={self.patch_size} must be a multiple of 16")
        if not self.learning_rate > 0:
            raise InputError(f"--config.learning_rate={self.learning_rate} must be positive")
        if not 0 < self.validation_fraction < 1 or not 0 < self.new_line < 1:
            raise InputError("--config.validation_fraction and --config.new_line must lie between 0 and 1")
        if not 0 <= self.percentile <= 100:
            raise InputError(f"--config.percentile={self.percentile} must lie in 0..100")
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

    @property
    def resident_bytes(self) -> float:
        """Images of more than these are read while training."""
        return {"auto": min(self.resident_mb * 1e6, 2**31 - 1), "device": math.inf, "grain": -1}[self.data_path]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Settings of the detectors without training."""

    seed: int = 0  # of the choice of good images that calibrate
    maps: tuple[str, ...] = ("phase_only", "whitening", "lattice")
    images: int = 24  # good images that are looked at
    validation_fraction: float = 0.2  # of the good images, for the threshold
    # Phase-only transform and whitening.
    smoothing_px: int = 9  # side of the box that the energy is averaged in, twice
    tile: int = 128  # pixels, even, of a whitened tile
    # Lattice; lengths are in pitches of the pattern.
    background: float = 3.0  # box whose mean is taken off the image first
    window: float = 0.25  # box that deviations are averaged in
    floor: float = 0.2  # of the deviation at a place of the cell, as a share of the cell's mean one
    detail: float = 1.0  # weight of the whitened energy, 0: none
    # Evaluation.
    percentile: float = 98.0
    radius: int = 4  # pixels, of the opening's disk

    def __post_init__(self):
        if not self.maps or len(set(self.maps)) < len(self.maps):
            raise InputError(f"--config.maps={','.join(self.maps)} must name at least one detector, each once")
        _least(self, 0, "seed", "radius", "detail")
        _least(self, 1, "images", "smoothing_px")
        if self.smoothing_px % 2 == 0:
            raise InputError(f"--config.smoothing_px={self.smoothing_px} must be odd")
        if self.tile < 8 or self.tile % 2:
            raise InputError(f"--config.tile={self.tile} must be even and at least 8")
        if not (self.background > 0 and self.window > 0 and self.floor > 0):
            raise InputError("--config.background, --config.window and --config.floor must be positive")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"--config.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if not 0 <= self.percentile <= 100:
            raise InputError(f"--config.percentile={self.percentile} must lie in 0..100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """Settings of an inspection; every field is a flag of its own."""

    map: str = ""  # of an autoencoder: "ssim" or "l2"; "": the run's first
    tile_px: int = 256  # side of a tile, the unit of calibration and of inspection
    halo_px: int = 64  # of surroundings that the detector sees beside a tile
    false_alarm_rate: float = 0.01  # of good tiles
    confidence: float | None = None  # of the promise over calibrations; None: it holds on average
    false_alarms_per_m2: float = 0.0  # of plate; above 0 in place of false_alarm_rate, by a model of the tail
    mm_per_px: float = 0.0  # 0: not known
    strip: bool = False  # a folder's images follow each other along one strip
    pitch_mm: float = 0.0  # of the plate's pattern along the strip, for recurrence; 0: not known
    seed: int = 0  # of the draws of calibration and recurrence

    def __post_init__(self):
        for name, least in (("tile_px", 16), ("halo_px", 0), ("seed", 0), ("mm_per_px", 0), ("pitch_mm", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"--{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.false_alarm_rate < 1:
            raise InputError(f"--false_alarm_rate={self.false_alarm_rate} must lie between 0 and 1")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise InputError(f"--confidence={self.confidence} must be average or lie between 0 and 1, such as 0.95")
        if self.false_alarms_per_m2 and self.confidence is not None:
            raise InputError(
                "--confidence is of --false_alarm_rate, the model of --false_alarms_per_m2 has none: leave one out"
            )
        if self.false_alarms_per_m2 < 0 or (self.false_alarms_per_m2 and not self.mm_per_px):
            raise InputError(
                f"--false_alarms_per_m2={self.false_alarms_per_m2} must be positive and needs --mm_per_px, the size of a pixel"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detectability:
    """Settings of the trials beside those of the inspection that they imitate; every field is a flag of its own."""

    smallest_px: float = 3.0  # length of the smallest defect, the longer side of its bounding box
    largest_px: float = 48.0
    contrasts: tuple[float, ...] = (0.05, 0.1, 0.2)  # mean absolute change of brightness, of the full range
    trials: int = 60  # of each kind and contrast

    def __post_init__(self):
        if not 1 <= self.smallest_px < self.largest_px:
            raise InputError(f"--smallest_px={self.smallest_px} must lie between 1 and --largest_px={self.largest_px}")
        if not self.contrasts or not all(0 < c <= 1 for c in self.contrasts):
            raise InputError(
                f"--contrasts={','.join(map(str, self.contrasts))} must be shares of the full range, such as 0.1"
            )
        if self.trials < 10:
            raise InputError(f"--trials={self.trials} must be at least 10")


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


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` of a ConfigDict or of a dict read from JSON.

    Raises:
      InputError: a field that `kind` does not have, a value of another type, or one that it refuses.
    """
    types = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(types)):
        raise InputError(f"there is no setting {unknown[0]!r}: the settings are {', '.join(sorted(types))}")
    given = {k: plain(v) for k, v in values.items()}
    for name, value in given.items():
        if not _is(value, types[name]):
            raise InputError(f"--config.{name}={repr(value)[:100]} must be {_called(types[name])}")
    return kind(**given)


_CALLED = {int: "a whole number below 2**32", float: "a finite number", bool: "true or false", str: "text"}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type, numbers finite."""
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return False
        return abs(value) < 2**32 if kind is int else abs(value) <= sys.float_info.max
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(v, typing.get_args(kind)[0]) for v in value)
    return isinstance(value, typing.get_origin(kind) or kind)


def _called(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, each of it {_CALLED[typing.get_args(kind)[0]]}"
    return _CALLED.get(kind, "names and values")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as a dict that JSON can hold and `from_mapping` reads back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def canonical(config: Any) -> str:
    """A dataclass or a dict of settings as one JSON text: equal settings have the same text, in whatever order they came."""

    def exact(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: exact(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [exact(v) for v in value]
        # A flag gives 0 where a preset has 0.0.
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(exact(config if isinstance(config, Mapping) else to_dict(config)), sort_keys=True)


def identity(settings: Mapping[str, Any]) -> str:
    """A name for settings: the first 16 hexadecimal digits of the SHA-256 of their canonical text."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting in which two `to_dict`s differ, as "name (a here, b there)", or None."""
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            return f"{name} ({ours.get(name)!r} here, {theirs.get(name)!r} there)"
    return None


def plain(value: Any) -> Any:
    """A ConfigDict as a dict without its None values, a list as a tuple, anything else as it is."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {k: v for k, v in value.items() if v is not None}
    return tuple(value) if isinstance(value, list | tuple) else value


def _choice(config: Any, name: str, *choices: str) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise InputError(f"--config.{name}={value} must be one of {', '.join(choices)}")


def _least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise InputError(f"--config.{name}={getattr(config, name)} must be at least {least}")

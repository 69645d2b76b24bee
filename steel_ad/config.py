"""Settings of the experiments as frozen dataclasses, made once from the ConfigDict that flags may have changed."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from steel_ad.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Settings of the autoencoder experiment; the defaults are SPEC section 4's."""

    seed: int = 0
    # Model and patches.
    patch_size: int = 128  # pixels, a multiple of 16
    latent: int = 100  # z
    dtype: str = "float32"  # of the arithmetic: "float32" or "bfloat16"; parameters are float32
    crops: str = "fixed"  # "fixed": num_crops drawn once, epochs over them; "fresh": new ones at every step
    num_crops: int = 10_000
    flips: bool = False
    validation_fraction: float = 0.2  # of the good images, for the threshold
    # Loss.
    loss: str = "ssim"  # a name in steel_ad.losses, or module:function
    constants: str = "thesis"  # c1, c2 of an SSIM loss: "thesis" or "wang"
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further keyword arguments of the loss
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
        _choice(self, "constants", "thesis", "wang")
        _choice(self, "residual_constants", "thesis", "wang")
        _choice(self, "schedule", "constant", "cosine")
        _choice(self, "decay", "l2", "learning_rate")
        _least(self, 1, "latent", "num_crops", "batch_size", "stride", "window_size", "checkpoint_every")
        _least(self, 0, "epochs", "steps", "warmup_steps", "weight_decay", "clip_norm", "radius")
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
    def steps_per_epoch(self) -> int:
        """Batches in `num_crops` patches; what does not fill a batch is left for another epoch's order."""
        return max(1, self.num_crops // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.steps or self.epochs * self.steps_per_epoch


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` of a ConfigDict or of a dict read from JSON.

    Raises:
      InputError: a field that `kind` does not have, or a value that it refuses.
    """
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - fields):
        raise InputError(f"there is no setting {unknown[0]!r}: the settings are {', '.join(sorted(fields))}")
    plain = {k: _plain(v) for k, v in values.items()}
    return kind(**plain)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as a dict that JSON can hold and `from_mapping` reads back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first setting in which two `to_dict`s differ, as "name (a here, b there)", or None."""
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            return f"{name} ({ours.get(name)!r} here, {theirs.get(name)!r} there)"
    return None


def _plain(value: Any) -> Any:
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

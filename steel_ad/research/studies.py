"""Studies: an axis is a setting, its values, and what else must change for a value to have its effect (SPEC, Varied).

A new study is one line in `STUDIES`.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steel_ad import config as configs
from steel_ad import fields, losses, models
from steel_ad.data import datasets
from steel_ad.data.datasets import Dataset
from steel_ad.data.images import Images
from steel_ad.errors import InputError
from steel_ad.runs.run import KINDS

# (settings, value) -> what changes
Change = Callable[[Any, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting, the values to try, and what else has to change for the value to have its effect."""

    field: str
    values: tuple[Any, ...]
    change: Change | None = None
    # Values that a data set is too small for are left out of these studies rather than refused.
    fits: Callable[[Any, Dataset, Any], bool] | None = None

    def apply(self, config: Any, value: Any) -> Any:
        """The settings with a value of the axis.

        Raises:
          InputError: the settings refuse it.
        """
        changes = {self.field: value} if self.change is None else self.change(config, value)
        return dataclasses.replace(config, **changes)


def _window(config: configs.Autoencoder, value: int) -> dict[str, Any]:
    """K of the loss and of the residual map."""
    takes = config.loss.startswith("ssim")
    options = {**config.loss_options, "window_size": value} if takes else config.loss_options
    return {"window_size": value, "loss_options": options}


def _decay(config: configs.Autoencoder, value: str) -> dict[str, Any]:
    return {"decay": value, "weight_decay": config.weight_decay or 1e-5}


def _epochs(field: str) -> Change:
    """Steps, where they are given, stand before epochs."""
    return lambda _, value: {field: value, field.replace("epochs", "steps"): 0}


def _adadelta(config: configs.Segmentation, value: str) -> dict[str, Any]:
    plain = {"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"}
    return {"optimizer": "adadelta", "adadelta": value, **plain}


def _patch_fits(value: int, dataset: Dataset, config: Any) -> bool:
    return value <= Images(dataset.train, datasets.images_of(dataset.test)).sizes.min()


def _count_fits(value: int, dataset: Dataset, config: Any) -> bool:
    train, _ = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
    return value <= len(train)


def _stride_fits(value: int, dataset: Dataset, config: Any) -> bool:
    return value <= config.patch_size


_COUNTS = (10, 25, 50, 100, 200, 400, 800, 1600)
_SUPERVISED = {
    "model": Axis("model", tuple(models.SEGMENTERS)),
    "patch_size": Axis("patch_size", (128, 256, 512), fits=_patch_fits),
    "loss": Axis("loss", tuple(losses.SEGMENTATION_LOSSES)),
    "samples": Axis("train_images", _COUNTS, fits=_count_fits),
    "seeds": Axis("seed", (0, 1, 2)),
    "ratio": Axis("ratio", ("1:0", "1:1", "1:3")),
    "adadelta": Axis("adadelta", ("tf_keras", "old_keras", "pytorch"), _adadelta),
    "upsampling": Axis("upsampling", ("learned", "nearest")),
}
STUDIES: dict[str, dict[str, Axis]] = {
    "autoencoder": {
        "latent": Axis("latent", (32, 50, 100, 200, 500)),
        "window": Axis("window_size", (3, 7, 11, 15, 19), _window),
        "patch_size": Axis("patch_size", (64, 128, 256, 512), fits=_patch_fits),
        "loss": Axis("loss", tuple(losses.LOSSES)),
        "samples": Axis("train_images", _COUNTS, fits=_count_fits),
        "epochs": Axis("epochs", (25, 50, 100, 200), _epochs("epochs")),
        "constants": Axis("constants", ("thesis", "wang")),
        "decay": Axis("decay", ("l2", "learning_rate"), _decay),
        "seeds": Axis("seed", (0, 1, 2)),
        "percentile": Axis("percentile", (90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)),
        "radius": Axis("radius", (0, 1, 2, 4, 6, 8)),
        "stride": Axis("stride", (128, 64, 32, 16), fits=_stride_fits),
        "map": Axis("residual_constants", ("thesis", "wang")),
    },
    "segmentation": {**_SUPERVISED, "epochs": Axis("epochs", (25, 100), _epochs("epochs"))},
    "transfer": {**_SUPERVISED, "epochs": Axis("adapt_epochs", (1, 5, 10), _epochs("adapt_epochs"))},
}
# Axes of a setting alone that would change nothing without these.
_CHANGES: dict[str, Change] = {
    "decay": _decay,
    "adadelta": _adadelta,
    **{field: _epochs(field) for field in ("epochs", "classifier_epochs", "adapt_epochs")},
}
# Setting -> (whether it changes nothing, how it would), of the experiment and its settings.
_VOID: dict[str, tuple[Callable[[str, Any], bool], str]] = {
    "num_crops": (lambda _, c: c.crops == "fresh" and c.steps > 0, "set --config.crops=fixed"),
    "constants": (lambda _, c: c.loss in ("l1", "l2"), "use --config.loss=ssim"),
    "residual_constants": (lambda _, c: "ssim" not in c.maps, "add ssim to --config.maps"),
    "samples": (lambda _, c: min(c.steps, c.classifier_steps) > 0, "set --config.steps=0"),
    "width": (lambda _, c: c.model != "unet", "use --config.model=unet"),
    "upsampling": (lambda _, c: c.model != "unet", "use --config.model=unet"),
    **{
        field: (lambda experiment, _: experiment != "transfer", "use --experiment=transfer")
        for field in ("new_line", "adapt_epochs", "adapt_steps")
    },
}


def check_effects(experiment: str, config: Any, studies: Mapping[str, Axis]) -> None:
    """Raises InputError where a study varies a setting that changes nothing with these settings."""
    for axis in studies.values():
        void, mend = _VOID.get(axis.field, (None, ""))
        if void and void(experiment, config):
            raise InputError(f"with these settings {axis.field} changes nothing: {mend}, or vary something else")


def select(experiment: str, studies: Sequence[str], axis: str, values: Sequence[str]) -> dict[str, Axis]:
    """The studies by name, or one along a setting of the user's choice, with the user's values where there are any.

    Args:
      studies: keys of `STUDIES[experiment]`; none with an axis.
      axis: a setting's name, or "".
      values: as text; none leaves a study's own.

    Raises:
      InputError: no such study or setting, a value that is none of its type, or values for more than one study.
    """
    if bool(studies) == bool(axis):
        raise InputError("give either --study=NAME or --axis=SETTING with --values")
    known = STUDIES[experiment]
    if unknown := [s for s in studies if s not in known]:
        kinds = ", ".join(known)
        raise InputError(f"there is no study {unknown[0]!r} of the experiment {experiment}: use one of {kinds}")
    if values and len(studies) > 1:
        raise InputError("--values are those of one study: give one --study with them")
    if axis and not values:
        raise InputError(f"--axis={axis} needs --values, such as --values=1,2,3")
    chosen = {name: known[name] for name in studies} or {axis: Axis(axis, (), _CHANGES.get(axis))}
    if values:
        ((name, one),) = chosen.items()
        read = tuple(_parse(KINDS[experiment].config, one.field, value) for value in values)
        chosen = {name: dataclasses.replace(one, fits=None, values=read)}
    return chosen


def _parse(kind: type, field: str, text: str) -> Any:
    types = {f.name: f.type for f in fields.fields(kind) if typing.get_origin(f.type) in (None, typing.Literal)}
    if field not in types:
        raise InputError(f"--axis={field} is no setting that can be varied: use one of {', '.join(types)}")
    value = fields.read(text, types[field])
    if not fields.is_a(value, types[field]):
        raise InputError(f"--values={text} must be {fields.called(types[field])}, as the setting {field} is")
    return value


def text(value: Any) -> str:
    """A value of an axis in rows, figures and flags."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)

"""A working directory of a finished training as a detector."""

from pathlib import Path
from typing import Any

import jax

from steel_ad import config as configs
from steel_ad import files, parallel
from steel_ad.detectors import Detector, Fitted, autoencoder, segmentation
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.detectors.segmentation import SegmentationDetector
from steel_ad.errors import InputError
from steel_ad.runs import autoencoder as autoencoder_run
from steel_ad.runs import segmentation as segmentation_run


def load(workdir: Path, map_name: str = "") -> Fitted:
    """The detector of a run of `experiments.autoencoder` or `experiments.segmentation`, at its newest checkpoint.

    Args:
      map_name: of an autoencoder's residual maps, "ssim" or "l2"; "" for the run's first.

    Raises:
      InputError: no such run, a damaged checkpoint, or a map that the run does not have.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(f"there is no trained model in {workdir}: name the --workdir of a run")
    settings = files.read_json(path, dict)
    metrics, manifest = workdir / "metrics.json", workdir / "manifest.json"
    evaluated = files.read_json(metrics, dict) if metrics.exists() else {}
    # The threshold belongs to the map that was evaluated last.
    reading = segmentation_run.READING if "defects" in settings else autoencoder_run.READING
    with files.understood(metrics, "restore it, or evaluate the run again"):
        settings |= {k: v for k, v in evaluated.get("config", {}).items() if k in reading}
        limits = {k: v["pixel"] for k, v in evaluated.get("thresholds", {}).items()}
        if not all(isinstance(v, float | int) for v in limits.values() if v is not None):
            raise ValueError("a threshold is no number")
    rows = files.read_json(manifest, list)
    with files.understood(manifest, "restore it"):
        trained_on = frozenset(str(r["sha256"]) for r in rows if r["use"] == "train")
    if "source" in settings:
        raise InputError(f"{workdir} is a run of experiments.transfer: name one of autoencoder or segmentation")
    fields = {k: v for k, v in settings.items() if k not in ("data", "defects")}
    detector: Detector
    if "defects" in settings:
        config = configs.from_mapping(configs.Segmentation, fields)
        name, radius = "segmentation", config.radius
        detector = SegmentationDetector(config)
        like = jax.eval_shape(lambda: segmentation.initial_segmentation(config, config.total_steps))
    else:
        coded = configs.from_mapping(configs.Autoencoder, fields)
        name, radius = map_name or coded.maps[0], coded.radius
        if name not in ("ssim", "l2"):
            raise InputError(f"--map={name} must be ssim or l2")
        detector = AutoencoderDetector(coded, name)
        like = jax.eval_shape(lambda: autoencoder.initial_state(coded, jax.random.key(coded.seed)))
    if map_name and map_name != name:
        raise InputError(f"--map={map_name} is for autoencoders: {workdir} has the map {name} only")
    train_state = newest(workdir / "checkpoints", like)
    if train_state is None:
        raise InputError(f"there is no checkpoint in {workdir}: train first")
    state = segmentation.variables(train_state) if "defects" in settings else train_state.params
    return Fitted(
        detector, state, radius, limits.get(name), str(workdir), settings, trained_on, bool(evaluated.get("finished"))
    )


def newest(folder: Path, like: Any) -> Any:
    """The training state of a folder's newest checkpoint, or None where there is none; `like` is such a state's shapes.

    Raises:
      InputError: a damaged checkpoint, or one of another structure.
    """
    from steel_ad.train.checkpoint import Checkpoints

    if not folder.is_dir():
        return None
    # A run of an accelerator is restored to what is here.
    here = jax.sharding.SingleDeviceSharding(parallel.first_device())
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
    with Checkpoints(folder) as checkpoints:
        return None if checkpoints.latest() is None else checkpoints.restore(like)[0]

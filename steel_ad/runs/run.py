"""A run: a working directory, of which kind it is, with what settings, how far it is, and the detector in it."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steel_ad import config as configs
from steel_ad import files
from steel_ad.detectors import Detector, Fitted, detector_class
from steel_ad.detectors.autoencoder import AutoencoderDetector
from steel_ad.detectors.segmentation import SegmentationDetector
from steel_ad.errors import InputError

# What binaries print of an evaluation, and what an inspection takes from it.
_EVALUATION: dict[str, Any] = {
    "maps": {str: {"defects_found?": dict}},
    "thresholds?": {str: {"pixel": (*files.NUMBER, None)}},
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all runs of an experiment have in common.

    Attributes:
      config: dataclass of its settings.
      inputs: further settings, which name data.
      reading: settings that only evaluation uses; another evaluation may differ in them.
      detectors: settings -> the detectors that a run has.
      manifests: files that say which images were trained on.
      evaluated: keys in metrics.json of the evaluation whose thresholds count.
      record: form of metrics.json, as `files.check` takes it.
    """

    config: type
    inputs: tuple[str, ...]
    reading: frozenset[str]
    detectors: Callable[[Any], list[Detector]]
    manifests: tuple[str, ...] = ("manifest.json",)
    evaluated: tuple[str, ...] = ()
    record: Any = dataclasses.field(default_factory=lambda: _EVALUATION)


_SUPERVISED = frozenset({"threshold", "percentile", "radius"})
KINDS = {
    "autoencoder": Kind(
        configs.Autoencoder,
        ("data",),
        frozenset({"stride", "maps", "residual_constants", "window_size", "percentile", "radius"}),
        lambda config: [AutoencoderDetector(config)],
    ),
    "segmentation": Kind(
        configs.Segmentation, ("data", "defects"), _SUPERVISED, lambda config: [SegmentationDetector(config)]
    ),
    "transfer": Kind(
        configs.Segmentation,
        ("source", "target", "defects"),
        _SUPERVISED,
        lambda config: [SegmentationDetector(config, stages=("adapt", "classifier_after"))],
        ("source/manifest.json", "target/manifest.json"),
        ("after", "target"),
        dict.fromkeys(("before", "after"), dict.fromkeys(("source", "target"), _EVALUATION)),
    ),
    "spectrum": Kind(
        configs.Spectrum,
        ("data",),
        frozenset(),
        lambda config: [detector_class(name).configured(config) for name in config.maps],
    ),
}


def _kind_of_old(settings: Mapping[str, Any]) -> str:
    """The kind of a run whose record was written before records named it."""
    signs = {"source": "transfer", "defects": "segmentation", "smoothing_px": "spectrum"}
    return next((kind for sign, kind in signs.items() if sign in settings), "autoencoder")


class Run:
    """A working directory.

    Attributes:
      folder: the directory.
      name: key of `KINDS`; `kind`: its value.
      settings: all settings as `config.json` keeps them, those of data included.
      results: folder that its evaluation is written to: `folder`, or one in `folder/evaluations` for other reading settings than
        those that the run was begun with, so that what an inspection of the run uses stays.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], results: Path):
        self.folder, self.name, self.kind = folder, name, KINDS[name]
        self.settings, self.results = settings, results

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """The run in a folder, with the settings that it was begun with.

        Raises:
          InputError: there is none, or its record is damaged.
        """
        path = folder / "config.json"
        # As Path.exists, but False of a name that no file can have.
        if not os.path.exists(path):
            raise InputError(f"there is no run in {folder}: name the --workdir of an experiment")
        recorded = files.read_json(path, dict)
        name = str(recorded.pop("experiment", None) or _kind_of_old(recorded))
        if name not in KINDS:
            raise InputError(
                f"{path} is of an experiment {name!r}, which this version does not know: use a new --workdir"
            )
        return cls(folder, name, completed(name, recorded), folder)

    @classmethod
    def begin(cls, folder: Path, name: str, config: Any, inputs: Mapping[str, str], *, evaluate_only: bool) -> "Run":
        """A new run of these settings, or the one in `folder` where it has the same settings but for those of reading.

        Nothing is written: see `claim`.

        Raises:
          InputError: the folder holds a run of other settings, or none that could be evaluated.
        """
        settings = {**configs.to_dict(config), **inputs}
        if not (folder / "config.json").exists():
            if evaluate_only:
                raise InputError(f"there is no run in {folder} to evaluate: train one first, without --evaluate_only")
            return cls(folder, name, settings, folder)
        known = cls.open(folder)
        if known.name != name:
            raise InputError(f"{folder} holds a run of the experiment {known.name}: use a new --workdir")
        ours, theirs = ({k: v for k, v in s.items() if k not in known.kind.reading} for s in (settings, known.settings))
        if other := configs.difference(ours, theirs):
            raise InputError(f"{folder} holds a run of another config, which differs in {other}: use a new --workdir")
        reading = {k: v for k, v in settings.items() if k in known.kind.reading}
        same = all(known.settings[k] == v for k, v in reading.items())
        return cls(folder, name, settings, folder if same else folder / "evaluations" / configs.identity(reading))

    @property
    def config(self) -> Any:
        """The settings as the kind's dataclass."""
        return configs.from_mapping(
            self.kind.config, {k: v for k, v in self.settings.items() if k not in self.kind.inputs}
        )

    def record(self) -> dict[str, Any] | None:
        """What `metrics.json` of these very settings holds, of a finished run or of a part of one; None where there is none.

        Raises:
          InputError: it is damaged.
        """
        path = self.results / "metrics.json"
        if not path.exists():
            return None
        record = files.read_json(path, dict)
        with files.understood(path, "restore it, or delete it and run again"):
            files.check(record, {"config?": dict})
        if completed(self.name, record.get("config", {})) != self.settings:
            return None
        with files.understood(path, "restore it, or delete it and run again"):
            files.check(record, self.kind.record)
        return record

    def finished(self) -> dict[str, Any] | None:
        """The record of a run that was finished with these very settings, else None; raises as `record`."""
        record = self.record()
        return record if record is not None and record.get("finished") else None

    @property
    def results_name(self) -> str:
        """The folder of its evaluation, below `folder`; "." where it is the same."""
        return self.results.relative_to(self.folder).as_posix()

    def claim(self) -> None:
        """Records the settings of a new run, once everything that could be wrong with them has been looked at."""
        if not (self.folder / "config.json").exists():
            files.write_json(self.folder / "config.json", {"experiment": self.name, **self.settings})

    def keep(self, name: str, record: Any, what: str) -> None:
        """Records what the run uses in the file `name`, or checks it against what the run began with.

        Raises:
          InputError: it has changed.
        """
        path = self.folder / name
        if not path.exists():
            files.write_json(path, record)
        elif files.read_json(path) != record:
            raise InputError(
                f"the {what} are not those that the run in {path.parent} began with (see {path.name} there): "
                "restore them or use a new --workdir"
            )

    def detector(self, map_name: str = "") -> Fitted:
        """The run's detector at its newest checkpoint, ready to inspect with.

        Args:
          map_name: which of its residual maps; "": the first.

        Raises:
          InputError: no such map, nothing that is trained, or a damaged file.
        """
        known = {d.name: d for d in self.kind.detectors(self.config)}
        if map_name and len(known) > 1 and map_name not in known:
            raise InputError(f"--map={map_name} is none of the run's maps: use one of {', '.join(known)}")
        record = part = self.record() or {}
        for key in self.kind.evaluated if record else ():
            part = part[key]
        limits = part.get("thresholds", {})
        # A detector that could not be fitted has no threshold.
        name = map_name or next((name for name in known if name in limits), next(iter(known)))
        detector = known.get(name, next(iter(known.values()))).only(name)
        threshold = limits.get(name, {"pixel": None})["pixel"]
        return Fitted(
            detector,
            detector.restore(self.folder),
            self.config.radius,
            threshold,
            str(self.folder),
            # As recorded, so that the hash of what was trained stays when later versions have more settings.
            files.read_json(self.folder / "config.json", dict),
            self._trained_on(),
            bool(record.get("finished")),
        )

    def _trained_on(self) -> frozenset[str]:
        hashes: set[str] = set()
        for name in self.kind.manifests:
            rows = files.read_json(self.folder / name, list)
            with files.understood(self.folder / name, "restore it"):
                files.check(rows, [{"sha256": str, "use": str}])
            hashes |= {row["sha256"] for row in rows if row["use"] == "train"}
        return frozenset(hashes)


def completed(name: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, with the default of each that did not exist when they were recorded."""
    defaults = {
        f.name: f.default for f in dataclasses.fields(KINDS[name].config) if f.default is not dataclasses.MISSING
    }
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return {**plain, **recorded}


def location(data: str) -> str:
    """How a run records where its data is."""
    return os.path.normpath(data)

"""Studies: one setting at a time, over its values, data sets and seeds (SPEC sections 2 and 4, Varied).

A new study is one line in `STUDIES`.
"""

import dataclasses
import functools
import math
import os
import queue
import re
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from steel_ad import config as configs
from steel_ad import fields, files, parallel
from steel_ad.data import datasets
from steel_ad.data.datasets import Dataset
from steel_ad.data.images import Images
from steel_ad.errors import InputError
from steel_ad.report import tables
from steel_ad.research import reading, results
from steel_ad.runs import autoencoder, segmentation, transfer
from steel_ad.runs.run import Run, completed

KINDS: dict[str, type] = {
    "autoencoder": configs.Autoencoder,
    "segmentation": configs.Segmentation,
    "transfer": configs.Segmentation,
}
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
    "model": Axis("model", ("compact_cnn", "unet")),
    "patch_size": Axis("patch_size", (128, 256, 512), fits=_patch_fits),
    "loss": Axis("loss", ("mse", "bce", "focal", "dice", "bce_dice", "ssim")),
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
        "loss": Axis("loss", ("l2", "l1", "ssim", "ssim_l2")),
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
    "segmentation": {
        **_SUPERVISED,
        "epochs": Axis("epochs", (25, 100), _epochs("epochs")),
    },
    "transfer": {
        **_SUPERVISED,
        "epochs": Axis("adapt_epochs", (1, 5, 10), _epochs("adapt_epochs")),
    },
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
# What the figures and tables show.
SHOWN = {
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AU-PRO to FPR 0.3",
    "image_auroc": "image AUROC",
    "image_accuracy": "image accuracy",
    "found_iou_30": "defects found at IoU > 0.3",
    "false_regions_per_image": "false regions an image",
}
COLUMNS = ("study", "axis", "value", *results.ROW, "settings", "run", "command")


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
        raise InputError(
            f"there is no study {unknown[0]!r} of the experiment {experiment}: use one of {', '.join(known)}"
        )
    if values and len(studies) > 1:
        raise InputError("--values are those of one study: give one --study with them")
    if axis and not values:
        raise InputError(f"--axis={axis} needs --values, such as --values=1,2,3")
    chosen = {name: known[name] for name in studies} or {axis: Axis(axis, (), _CHANGES.get(axis))}
    if values:
        chosen = {
            name: dataclasses.replace(a, fits=None, values=tuple(_parse(KINDS[experiment], a.field, v) for v in values))
            for name, a in chosen.items()
        }
    return chosen


def _parse(kind: type, field: str, text: str) -> Any:
    types = {f.name: f.type for f in fields.fields(kind) if typing.get_origin(f.type) in (None, typing.Literal)}
    if field not in types:
        raise InputError(f"--axis={field} is no setting that can be varied: use one of {', '.join(types)}")
    value = fields.read(text, types[field])
    if not fields.is_a(value, types[field]):
        raise InputError(f"--values={text} must be {fields.called(types[field])}, as the setting {field} is")
    return value


@dataclasses.dataclass(frozen=True)
class _Run:
    """One training run and what rows are made of it: its own with a value of a study, or, of several studies and all their
    values, those that reading it again gives."""

    data: str
    config: Any
    folder: Path
    parts: tuple[tuple[str, Axis, tuple[Any, ...]], ...]
    read: bool

    def __str__(self) -> str:
        what = "; ".join(f"{study} {', '.join(map(_text, values))}" for study, _, values in self.parts)
        return f"{self.data}, {what}, seed {self.config.seed}"


def run(
    config: Any,
    *,
    experiment: str,
    studies: Mapping[str, Axis],
    data: Sequence[str],
    workdir: Path,
    seeds: int = 1,
    source: str = "",
    defects_from: str = "",
    command: str = "",
) -> list[dict[str, Any]]:
    """Makes the runs that are still missing, reads what needs no training off trained ones, and writes the results.

    Where this process has several devices, runs go side by side, each on one of them.

    Writes `runs/`, one workdir of the experiment a run, shared by all studies of this workdir; `results.csv`, one row a run
    and map; `table.md`; and `study_<name>.png`. The last three are replaced after every run.

    Args:
      config: the experiment's settings, of which each study changes one; its seed is the first.
      experiment: a key of `STUDIES`.
      studies: from `select`.
      data: data sets, as `datasets.load`'s; of a transfer the new lines.
      seeds: how many, from the settings' own on.
      source: of a transfer, the line with defects.
      defects_from: as `studies.segmentation.run`'s.
      command: recorded in the rows.

    Returns:
      All rows of `results.csv`.

    Raises:
      InputError: data or settings that cannot be used, before anything is run; a workdir of other settings; at the end, runs
        that failed (the others are finished).
    """
    names, called = [_dataset_folder(d) for d in data], [_called(d) for d in data]
    if twice := [n for n in called if called.count(n) > 1]:
        raise InputError(f"two data sets are called {twice[0]!r}: give them folders of different names")
    for axis in studies.values():
        void, mend = _VOID.get(axis.field, (None, ""))
        if void and void(experiment, config):
            raise InputError(f"with these settings {axis.field} changes nothing: {mend}, or vary something else")
    if seeds < 1:
        raise InputError(f"--seeds={seeds} must be at least 1")
    # As the runs record it.
    kept_source = source and os.path.normpath(source)
    base = {"experiment": experiment, "source": kept_source, "defects": defects_from, **configs.to_dict(config)}
    path = workdir / "sweep.json"
    if path.exists() and (
        other := configs.difference(base, {**base, **completed(experiment, files.read_json(path, dict))})
    ):
        raise InputError(f"{workdir} holds studies of another config, which differs in {other}: use a new --workdir")
    rows = _Rows(workdir)
    with files.understood(workdir / "results.csv", "delete it and run again"):
        taken = {row["dataset"]: row["run"].split("/")[1] for row in rows.found}
    for n, folder in zip(called, names, strict=True):
        if taken.get(n, folder) != folder:
            raise InputError(
                f"{workdir} holds runs of another data set called {n!r}, in runs/{taken[n]}: use a new --workdir"
            )
    tried = [config, *(a.apply(config, v) for a in studies.values() if a.fits is None for v in a.values)]
    for c in tried:
        (autoencoder if experiment == "autoencoder" else segmentation).check_loss(c)
    load = _Loader(max(c.patch_size for c in tried), config.resident_bytes)
    plan: list[_Run] = []
    for d, name in zip(data, names, strict=True):
        plan += _plan(config, experiment, studies, d, workdir / "runs" / name, range(seeds), load)
    if not plan:
        raise InputError(f"{', '.join(data)} is too small for every value: give smaller --values or other --data")
    if not all(_finished(r, rows) for r in plan):
        for d in data:
            if not load(d).test:
                raise InputError(f"{d} has no test images: a study needs some, with masks")
        # Before hours of training that one of the last runs would then lack.
        for r in plan:
            for d in [r.data, *([source] if source else [])]:
                train, _ = datasets.split(len(load(d).train), r.config.validation_fraction, r.config.seed)
                datasets.chosen(train, r.config.train_images, r.config.seed)

    rows.arrange(r.folder for r in plan)
    failed: list[tuple[_Run, InputError]] = []
    clock = _Clock(len(plan))

    def make(r: _Run) -> Made:
        clock.announce(str(r))
        try:
            return _rows_of(r, experiment, config, load, rows, source, defects_from)
        except Exception as error:  # raised again where all runs come together
            return error

    for r, made in _spread(make, plan):
        clock.done()
        if isinstance(made, InputError) and made.status == 1:
            # A run that died is a result of the study; the others go on.
            failed.append((r, made))
            print(f"this run failed: {made}", file=sys.stderr, flush=True)
        elif isinstance(made, Exception):
            raise made
        else:
            for row in made:
                rows.put({**row, "run": str(r.folder.relative_to(workdir)), "command": command})
        if not path.exists():
            files.write_json(path, base)
        rows.write({study for study, _, _ in r.parts})
    if failed:
        raise InputError(
            f"{len(failed)} of {len(plan)} runs failed, the first in {failed[0][0].folder}: {failed[0][1]}", status=1
        )
    return rows.found


Made = list[dict[str, Any]] | Exception


def _spread(make: Callable[[_Run], Made], plan: Sequence[_Run]) -> Iterator[tuple[_Run, Made]]:
    """Runs with what is made of them, as they are finished: one after the other, or side by side on several devices."""
    devices = jax.local_devices()
    folders = list(dict.fromkeys(r.folder for r in plan))
    if parallel.is_alone() or len(devices) == 1 or len(folders) == 1 or jax.process_count() > 1:
        for r in plan:
            yield r, make(r)
        return
    # Runs of one folder need each other's results, so they stay together.
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for folder in folders:
        waiting.put(folder)
    finished: queue.SimpleQueue[tuple[_Run, Made]] = queue.SimpleQueue()

    def work(device: jax.Device) -> None:
        with parallel.alone(device):
            while True:
                try:
                    folder = waiting.get_nowait()
                except queue.Empty:
                    return
                for r in plan:
                    if r.folder == folder:
                        finished.put((r, make(r)))

    for device in devices[: len(folders)]:
        # Daemons, so that an interruption need not wait for hours of training.
        threading.Thread(target=work, args=(device,), daemon=True).start()
    for _ in plan:
        yield finished.get()


def _plan(
    config: Any, experiment: str, studies: Mapping[str, Axis], data: str, folder: Path, seeds: range, load: "_Loader"
) -> list[_Run]:
    plan: list[_Run] = []
    read: dict[int, list[tuple[str, Axis, tuple[Any, ...]]]] = {}
    for study, axis in studies.items():
        values = axis.values
        if axis.fits is not None:
            values = tuple(v for v in values if axis.fits(v, load(data), config))
            if len(values) < len(axis.values):
                left_out = ", ".join(str(v) for v in axis.values if v not in values)
                print(
                    f"{data} with these settings is too small for {axis.field} {left_out}: left out",
                    file=sys.stderr,
                    flush=True,
                )
        starts = (
            [config] if axis.field == "seed" else [dataclasses.replace(config, seed=config.seed + s) for s in seeds]
        )
        # What is read off a trained model needs one run for all values and all such studies.
        if experiment == "autoencoder" and axis.field in reading.AXES and axis.change is None:
            for c in starts:
                read.setdefault(c.seed, []).append((study, axis, values))
            continue
        for value in values:
            tried = [axis.apply(c, value) for c in starts]
            plan += [_Run(data, c, folder / _name(config, c), ((study, axis, (value,)),), False) for c in tried]
    for seed, parts in read.items():
        c = dataclasses.replace(config, seed=seed)
        plan.append(_Run(data, c, folder / _name(config, c), tuple(parts), True))
    return plan


def _rows_of(
    r: _Run, experiment: str, base: Any, load: "_Loader", rows: "_Rows", source: str, defects_from: str
) -> list[dict[str, Any]]:
    if experiment == "autoencoder":
        record = autoencoder.run(r.config, data=r.data, workdir=r.folder, load=load)
    elif experiment == "segmentation":
        record = segmentation.run(r.config, data=r.data, defects_from=defects_from, workdir=r.folder, load=load)
    else:
        record = transfer.run(
            r.config, source=source, target=r.data, defects_from=defects_from, workdir=r.folder, load=load
        )
    if not r.read:
        ((study, axis, (value,)),) = r.parts
        found = results.rows(record)
        if experiment == "transfer":
            # The source line gives other numbers with every new line.
            new = record["after"]["target"]["dataset"]
            found = [
                {**row, "dataset": f"{row['dataset']} (to {new})"} if " source " in row["map"] else row for row in found
            ]
        return [_row(study, axis, value, base, r.config, row) for row in found]
    if rows.has(r):
        return rows.of(r)
    asked = [(study, axis, value, axis.apply(r.config, value)) for study, axis, values in r.parts for value in values]
    dataset = load(r.data)
    _, validation = datasets.split(len(dataset.train), r.config.validation_fraction, r.config.seed)
    reader = reading.Reader(
        r.config,
        Run.open(r.folder).detector().state,
        [dataset.train[i] for i in validation],
        dataset.test,
        [c.stride for *_, c in asked],
    )
    made = []
    for study, axis, value, c in asked:
        metrics, _ = reader.read(c)
        again = {**record, "maps": metrics, "test_megapixels_per_second": None}
        made += [_row(study, axis, value, base, c, row) for row in results.rows(again)]
    return made


def _row(study: str, axis: Axis, value: Any, base: Any, config: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    head = {"study": study, "axis": axis.field, "value": _text(value)}
    return {**head, **row, "seed": str(row["seed"]), "settings": results.settings_text(_changes(base, config))}


def _changes(base: Any, config: Any) -> dict[str, Any]:
    """Settings that differ, with the options of the loss as settings of their own."""

    def flat(c: Any) -> dict[str, Any]:
        values = configs.to_dict(c)
        return {**values, **{f"loss_options.{k}": v for k, v in values.pop("loss_options").items()}}

    ours, theirs = flat(config), flat(base)
    return {k: v for k, v in ours.items() if v != theirs.get(k)}


def _name(base: Any, config: Any) -> str:
    """The run's folder: what differs from the settings of the study, and always the seed."""
    changes = {**_changes(base, config), "seed": config.seed}
    return re.sub(
        r"[^\w.=,+-]", "-", ",".join(f"{k}={v}" for k, v in sorted(changes.items(), key=lambda i: i[0] == "seed"))
    )


def _text(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _dataset_folder(data: str) -> str:
    path = Path(os.path.abspath(data)) if Path(data).is_dir() else Path(data)
    return "_".join(p for p in path.parts[-2:] if p.strip("/."))


def _called(data: str) -> str:
    """The name that rows give a data set, before it is read."""
    return Path(data).resolve().name if Path(data).is_dir() else data.rstrip("/").replace("/", "_")


def _finished(r: _Run, rows: "_Rows") -> bool:
    return (r.folder / "metrics.json").exists() and (not r.read or rows.has(r))


class _Loader:
    """`datasets.load`, once a data set, however many runs use it."""

    def __init__(self, least: int, resident: float):
        load = functools.partial(datasets.load, min_size=least, resident=resident)
        self._load = functools.lru_cache(maxsize=None)(load)

    def __call__(self, data: str, *, min_size: int = 0, resident: float = math.inf) -> Dataset:
        return self._load(data)


class _Rows:
    """What `results.csv` holds; a row of the same run and map replaces the one before."""

    _KEY = ("study", "value", "run", "map")

    def __init__(self, workdir: Path):
        self._workdir = workdir
        path = workdir / "results.csv"
        found = results.read(path, COLUMNS) if path.exists() else []
        self._rows = {tuple(row[k] for k in self._KEY): row for row in found}
        self._places: dict[str, int] = {}

    def arrange(self, folders: Iterable[Path]) -> None:
        """New runs' rows come in this order, after those that are there, whichever run is finished first."""
        new = (str(f.relative_to(self._workdir)) for f in folders)
        runs = dict.fromkeys([*(row["run"] for row in self._rows.values()), *new])
        self._places = {run: i for i, run in enumerate(runs)}

    @property
    def found(self) -> list[dict[str, Any]]:
        return sorted(self._rows.values(), key=lambda row: self._places.get(row["run"], 0))

    def put(self, row: dict[str, Any]) -> None:
        self._rows[tuple(row[k] for k in self._KEY)] = {k: row[k] for k in COLUMNS}

    def has(self, r: _Run) -> bool:
        """Whether every value of a run that is read again has its rows."""
        return self._asked(r) <= {(row["study"], row["value"]) for row in self.of(r)}

    def of(self, r: _Run) -> list[dict[str, Any]]:
        """The rows of a run that its studies ask for."""
        run, asked = str(r.folder.relative_to(self._workdir)), self._asked(r)
        return [row for row in self.found if row["run"] == run and (row["study"], row["value"]) in asked]

    def _asked(self, r: _Run) -> set[tuple[str, str]]:
        return {(study, _text(v)) for study, _, values in r.parts for v in values}

    def write(self, studies: set[str]) -> None:
        """All rows, the tables, and the figures of these studies."""
        from steel_ad.report import studies as figures  # not before the first run

        files.write_csv(self._workdir / "results.csv", self.found)
        files.write_text(self._workdir / "table.md", markdown(self.found))
        for study in studies:
            rows = [row for row in self.found if row["study"] == study]
            if rows:
                figures.study(self._workdir / f"study_{study}.png", **figure(rows))


def figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of `report.studies.study` for the rows of one study."""
    found: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for (dataset, name), of_map in results.series(rows, "dataset", "map").items():
        found[(dataset, name)] = {
            value: {m: [row[m] for row in same if row[m] is not None] for m in SHOWN}
            for (value,), same in results.series(of_map, "value").items()
        }
    seeds = len({row["seed"] for row in rows})
    return {
        "found": found,
        "values": results.ordered(row["value"] for row in rows),
        "metrics": SHOWN,
        "axis": rows[0]["axis"],
        "title": f"{rows[0]['experiment']}: {rows[0]['study']}"
        + (f", median and range of {seeds} seeds" if seeds > 1 and rows[0]["axis"] != "seed" else ""),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a study: median over seeds, with the least and the greatest."""
    parts = []
    for (study,), of_study in results.series(rows, "study").items():
        lines = []
        groups = results.series(of_study, "dataset", "map", "value")
        order = results.ordered(row["value"] for row in of_study)
        for dataset, name in results.series(of_study, "dataset", "map"):
            for value in order:
                if same := groups.get((dataset, name, value)):
                    line: dict[str, Any] = {"data": dataset, "map": name, of_study[0]["axis"]: value}
                    line |= {label: results.spread(same, m) for m, label in SHOWN.items()}
                    lines.append({**line, "training, s": results.spread(same, "train_seconds"), "seeds": len(same)})
        parts.append(f"## {study}\n\n{tables.markdown(lines, list(lines[0]))}\n")
    return "\n".join(parts)


class _Clock:
    """A line for each run of the study: which of how many, and about how long the rest will take."""

    def __init__(self, total: int):
        self._total, self._begun, self._done = total, 0, 0
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def announce(self, what: str) -> None:
        with self._lock:
            self._begun += 1
            left = ""
            if self._done:
                seconds = (time.monotonic() - self._start) / self._done * (self._total - self._done)
                left = f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"
            print(f"run {self._begun} of {self._total}: {what}{left}", file=sys.stderr, flush=True)

    def done(self) -> None:
        with self._lock:
            self._done += 1

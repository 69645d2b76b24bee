"""A sweep: the runs that studies ask for, made where they are missing, side by side where there are several devices."""

import dataclasses
import functools
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from steel_ad import config as configs
from steel_ad import files, parallel
from steel_ad.data import datasets
from steel_ad.data.datasets import Dataset
from steel_ad.errors import InputError
from steel_ad.research import reading, results
from steel_ad.research.studies import Axis, check_effects, text
from steel_ad.research.study_rows import Rows
from steel_ad.runs import autoencoder, segmentation, transfer
from steel_ad.runs.run import Run, completed, location

# A study, its axis and some of its values.
Part = tuple[str, Axis, tuple[Any, ...]]
Made = list[dict[str, Any]] | Exception


@dataclasses.dataclass(frozen=True)
class _Job:
    """One training run, and the rows that are made of it.

    Attributes:
      parts: the study and the value that it was made for; or, where it is read again, studies with all their values.
      read: whether its rows come from reading it again with other settings of the evaluation.
    """

    data: str
    config: Any
    folder: Path
    parts: tuple[Part, ...]
    read: bool

    def __str__(self) -> str:
        what = "; ".join(f"{study} {', '.join(map(text, values))}" for study, _, values in self.parts)
        return f"{self.data}, {what}, seed {self.config.seed}"

    @property
    def asked(self) -> set[tuple[str, str]]:
        """(study, value) of its rows."""
        return {(study, text(v)) for study, _, values in self.parts for v in values}


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """What all jobs have in common."""

    config: Any
    experiment: str
    studies: Mapping[str, Axis]
    source: str
    defects_from: str
    load: datasets.Load
    rows: Rows


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
) -> list[dict[str, Any]]:
    """Makes the runs that are still missing, reads what needs no training off trained ones, and writes the results.

    Where this process has several devices, runs go side by side, each on one of them.

    Writes `runs/`, one workdir of the experiment a run, shared by all studies of this workdir; `results.csv`, one row a run
    and map; `table.md`; and `study_<name>.png`. The last three are replaced after every run.

    Args:
      config: the experiment's settings, of which each study changes one; its seed is the first.
      experiment: a key of `studies.STUDIES`.
      studies: from `studies.select`.
      data: data sets, as `datasets.load`'s; of a transfer the new lines.
      seeds: how many, from the settings' own on.
      source: of a transfer, the line with defects.
      defects_from: as `runs.segmentation.run`'s.

    Returns:
      All rows of `results.csv`.

    Raises:
      InputError: data or settings that cannot be used, before anything is run; a workdir of other settings; at the end, runs
        that failed (the others are finished).
    """
    if seeds < 1:
        raise InputError(f"--seeds={seeds} must be at least 1")
    check_effects(experiment, config, studies)
    base = {"experiment": experiment, "source": source and location(source), "defects": defects_from}
    base |= configs.to_dict(config)
    path = workdir / "sweep.json"
    known = {**base, **completed(experiment, files.read_json(path, dict))} if path.exists() else base
    if other := configs.difference(base, known):
        raise InputError(f"{workdir} holds studies of another config, which differs in {other}: use a new --workdir")
    rows = Rows(workdir)
    folders = _folders(data, workdir, rows)
    tried = [config, *(a.apply(config, v) for a in studies.values() if a.fits is None for v in a.values)]
    for c in tried:
        (autoencoder if experiment == "autoencoder" else segmentation).check_loss(c)
    load = _loader(max(c.patch_size for c in tried), config.resident_bytes)
    sweep = _Sweep(config, experiment, studies, source, defects_from, load, rows)
    jobs = [job for d, folder in folders.items() for job in _plan(sweep, d, folder, range(seeds))]
    if not jobs:
        raise InputError(f"{', '.join(data)} is too small for every value: give smaller --values or other --data")
    if not all(_finished(job, rows) for job in jobs):
        _check_data(jobs, data, source, load)
    rows.arrange(job.folder for job in jobs)
    _make_all(sweep, jobs, path, base)
    return rows.all()


def _folders(data: Sequence[str], workdir: Path, rows: Rows) -> dict[str, Path]:
    """Data set -> the folder of its runs.

    Raises:
      InputError: two data sets, or one of these and one that is there, have the same name in rows.
    """
    names = [_called(d) for d in data]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"two data sets are called {twice[0]!r}: give them folders of different names")
    taken = {row["dataset"]: Path(row["run"]).parts[1:2] for row in rows.all()}
    folders = {d: workdir / "runs" / _dataset_folder(d) for d in data}
    for name, folder in zip(names, folders.values(), strict=True):
        if taken.get(name, (folder.name,)) != (folder.name,):
            raise InputError(
                f"{workdir} holds runs of another data set called {name!r}, in runs/{''.join(taken[name])}: use a new --workdir"
            )
    return folders


def _check_data(jobs: Sequence[_Job], data: Sequence[str], source: str, load: datasets.Load) -> None:
    """Looks at what one of the last runs would lack, after hours of training.

    Raises:
      InputError: a data set has no test images, or too few to train on.
    """
    for d in data:
        if not load(d).test:
            raise InputError(f"{d} has no test images: a study needs some, with masks")
    for job in jobs:
        for d in [job.data, *([source] if source else [])]:
            train, _ = datasets.split(len(load(d).train), job.config.validation_fraction, job.config.seed)
            datasets.chosen(train, job.config.train_images, job.config.seed)


def _plan(sweep: _Sweep, data: str, folder: Path, seeds: range) -> list[_Job]:
    """The jobs on a data set whose runs are in `folder`."""
    config = sweep.config
    jobs: list[_Job] = []
    read: dict[int, list[Part]] = {}
    for study, axis in sweep.studies.items():
        values = _fitting(axis, data, config, sweep.load)
        starts = (
            [config] if axis.field == "seed" else [dataclasses.replace(config, seed=config.seed + s) for s in seeds]
        )
        # What is read off a trained model needs one run for all values and all such studies.
        if sweep.experiment == "autoencoder" and axis.field in reading.AXES and axis.change is None:
            for c in starts:
                read.setdefault(c.seed, []).append((study, axis, values))
            continue
        for value in values:
            tried = [axis.apply(c, value) for c in starts]
            jobs += [_Job(data, c, folder / _name(config, c), ((study, axis, (value,)),), False) for c in tried]
    for seed, parts in read.items():
        c = dataclasses.replace(config, seed=seed)
        jobs.append(_Job(data, c, folder / _name(config, c), tuple(parts), True))
    return jobs


def _fitting(axis: Axis, data: str, config: Any, load: datasets.Load) -> tuple[Any, ...]:
    """The values that a data set is large enough for; the others are named on stderr."""
    if axis.fits is None:
        return axis.values
    values = tuple(v for v in axis.values if axis.fits(v, load(data), config))
    if left_out := ", ".join(str(v) for v in axis.values if v not in values):
        said = f"{data} with these settings is too small for {axis.field} {left_out}: left out"
        print(said, file=sys.stderr, flush=True)
    return values


def _make_all(sweep: _Sweep, jobs: Sequence[_Job], path: Path, base: Mapping[str, Any]) -> None:
    """Makes all rows and writes them after each run; after the first, the studies' settings `base` to `path` too.

    Raises:
      InputError: at the end, some runs died.
    """
    failed: list[tuple[_Job, InputError]] = []
    clock = _Clock(len(jobs))

    def make(job: _Job) -> Made:
        clock.announce(str(job))
        try:
            return _rows_of(sweep, job)
        except Exception as error:  # raised again where all runs come together
            return error

    for job, made in _spread(make, jobs):
        clock.done()
        if isinstance(made, InputError) and made.status == 1:
            # A run that died is a result of the study; the others go on.
            failed.append((job, made))
            print(f"this run failed: {made}", file=sys.stderr, flush=True)
        elif isinstance(made, Exception):
            raise made
        else:
            for row in made:
                sweep.rows.put({**row, "run": sweep.rows.name(job.folder)})
        if not path.exists():
            files.write_json(path, base)
        sweep.rows.write({study for study, _, _ in job.parts})
    if failed:
        raise InputError(
            f"{len(failed)} of {len(jobs)} runs failed, the first in {failed[0][0].folder}: {failed[0][1]}", status=1
        )


def _spread(make: Callable[[_Job], Made], jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Made]]:
    """Jobs with what is made of them, as they are finished: one after the other, or side by side on several devices."""
    devices = jax.local_devices()
    folders = list(dict.fromkeys(job.folder for job in jobs))
    if parallel.is_alone() or len(devices) == 1 or len(folders) == 1 or jax.process_count() > 1:
        for job in jobs:
            yield job, make(job)
        return
    # Jobs of one folder need each other's results, so they stay together.
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for folder in folders:
        waiting.put(folder)
    finished: queue.SimpleQueue[tuple[_Job, Made]] = queue.SimpleQueue()

    def work(device: jax.Device) -> None:
        with parallel.alone(device):
            while True:
                try:
                    folder = waiting.get_nowait()
                except queue.Empty:
                    return
                for job in jobs:
                    if job.folder == folder:
                        finished.put((job, make(job)))

    for device in devices[: len(folders)]:
        # Daemons, so that an interruption need not wait for hours of training.
        threading.Thread(target=work, args=(device,), daemon=True).start()
    for _ in jobs:
        yield finished.get()


def _rows_of(sweep: _Sweep, job: _Job) -> list[dict[str, Any]]:
    """The rows of a job, whose run is trained unless it is finished."""
    record = _trained(sweep, job)
    if job.read:
        return sweep.rows.of(job.folder, job.asked) if _finished(job, sweep.rows) else _read_again(sweep, job, record)
    ((study, axis, (value,)),) = job.parts
    found = results.rows(record)
    if sweep.experiment == "transfer":
        # The source line gives other numbers with every new line.
        new = record["after"]["target"]["dataset"]
        found = [{**r, "dataset": f"{r['dataset']} (to {new})"} if " source " in r["map"] else r for r in found]
    return [_row(study, axis, value, sweep.config, job.config, row) for row in found]


def _trained(sweep: _Sweep, job: _Job) -> dict[str, Any]:
    where: dict[str, Any] = {"workdir": job.folder, "load": sweep.load}
    if sweep.experiment == "autoencoder":
        return autoencoder.run(job.config, data=job.data, **where)
    where["defects_from"] = sweep.defects_from
    if sweep.experiment == "segmentation":
        return segmentation.run(job.config, data=job.data, **where)
    return transfer.run(job.config, source=sweep.source, target=job.data, **where)


def _read_again(sweep: _Sweep, job: _Job, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = [(study, axis, v, axis.apply(job.config, v)) for study, axis, values in job.parts for v in values]
    dataset = sweep.load(job.data)
    _, validation = datasets.split(len(dataset.train), job.config.validation_fraction, job.config.seed)
    state = Run.open(job.folder).detector().state
    good = [dataset.train[i] for i in validation]
    reader = reading.Reader(job.config, state, good, dataset.test, [c.stride for *_, c in asked])
    rows = []
    for study, axis, value, config in asked:
        metrics, _ = reader.read(config)
        again = {**record, "maps": metrics, "test_megapixels_per_second": None}
        rows += [_row(study, axis, value, sweep.config, config, row) for row in results.rows(again)]
    return rows


def _row(study: str, axis: Axis, value: Any, base: Any, config: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    head = {"study": study, "axis": axis.field, "value": text(value)}
    return {**head, **row, "seed": str(row["seed"]), "settings": configs.canonical(_changes(base, config))}


def _changes(base: Any, config: Any) -> dict[str, Any]:
    theirs = results.flat(base)
    return {k: v for k, v in results.flat(config).items() if v != theirs.get(k)}


def _name(base: Any, config: Any) -> str:
    """The run's folder: what differs from the settings of the study, and always the seed."""
    changes = {**_changes(base, config), "seed": config.seed}
    return re.sub(
        r"[^\w.=,+-]", "-", ",".join(f"{k}={v}" for k, v in sorted(changes.items(), key=lambda i: i[0] == "seed"))
    )


def _dataset_folder(data: str) -> str:
    path = Path(os.path.abspath(data)) if Path(data).is_dir() else Path(data)
    return "_".join(p for p in path.parts[-2:] if p.strip("/."))


def _called(data: str) -> str:
    """The name that rows give a data set, before it is read."""
    return Path(data).resolve().name if Path(data).is_dir() else data.rstrip("/").replace("/", "_")


def _finished(job: _Job, rows: Rows) -> bool:
    """Whether the run is finished and, where it is read again, every value has its rows."""
    if not (job.folder / "metrics.json").exists():
        return False
    return not job.read or job.asked <= {(row["study"], row["value"]) for row in rows.of(job.folder, job.asked)}


def _loader(least: int, resident: float) -> datasets.Load:
    """`datasets.load`, once a data set, however many runs use it."""
    load = functools.cache(functools.partial(datasets.load, min_size=least, resident=resident))

    def remembered(data: str, *, min_size: int = 0, resident: float = math.inf) -> Dataset:
        return load(data)

    return remembered


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

"""The spectrum experiment: spectra of each line, its lattice, and three detectors without training (SPEC section 5)."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.data import datasets
from steel_ad.data.images import Images
from steel_ad.data.patches import common_size
from steel_ad.detectors import Detector, detector_class
from steel_ad.detectors.lattice import line_lattice
from steel_ad.errors import InputError
from steel_ad.ops import spectrum
from steel_ad.report import spectra
from steel_ad.report.spectra import View
from steel_ad.runs import evaluation
from steel_ad.runs.run import Run, location
from steel_ad.versions import versions

_LATTICE_PX = 32  # least side of an image that a lattice is read from
LATTICE_COLUMNS = ("data", "vector", "pitch_px", "pitch_error_px", "angle_deg", "angle_error_deg", "echo")


def run(config: configs.Spectrum, *, data: Sequence[str], workdir: Path) -> dict[Path, tuple[dict[str, Any], bool]]:
    """Looks at every data set and writes everything to `workdir`, or of several to a folder in it for each.

    Writes `config.json`, `manifest.json`, `metrics.json` (with the lattice), `scores.csv` and `figures/` of each, and
    `figures/spectra.png` and `phases.png` of all. Finished ones are only read; pictures of several are drawn again.

    Returns:
      Folder -> what its `metrics.json` holds, and whether it was finished before.

    Raises:
      InputError: data that cannot be used, two data sets of one name, a workdir of other settings or images, a full disk.
    """
    if not data:
        raise InputError("--data names no data set: give at least one")
    if len(data) == 1:
        places = {workdir: data[0]}
    else:
        places = {workdir / _name(d): d for d in data}
        if len(places) < len(data):
            raise InputError(f"two of {', '.join(data)} have the same name: look at them in two calls")
    runs = {
        folder: Run.begin(folder, "spectrum", config, {"data": location(d)}, evaluate_only=False)
        for folder, d in places.items()
    }
    finished = {folder: this.finished() for folder, this in runs.items()}
    figure = workdir / "figures" / "spectra.png"
    # A figure of several data sets may show others than these.
    if all(finished.values()) and figure.exists() and len(data) == 1:
        return {folder: (result, True) for folder, result in finished.items() if result}
    detectors = [detector_class(name).configured(config) for name in config.maps]
    looked, views = {}, []
    for folder, source in places.items():
        dataset = datasets.load(source)
        _check_sizes(detectors, dataset)
        line = datasets.divided(dataset, config.validation_fraction, config.seed)
        views.append(_view(dataset.name, line.training, config.images))
        # Before anything of the others is written.
        fitted = [] if finished[folder] else _fit_all(detectors, line.training, dataset.name)
        looked[folder] = line, views[-1].lattice, fitted
    results = {}
    for folder, (line, lattice, fitted) in looked.items():
        done = finished[folder]
        results[folder] = done or _evaluate(config, runs[folder], line, lattice, fitted), done is not None
    spectra.phases(workdir / "figures" / "phases.png", views)
    # Last, since its presence says that the pictures are complete.
    spectra.spectra(figure, views)
    return results


def lattice_rows(results: Mapping[Path, tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """Rows of a table of `LATTICE_COLUMNS`, two a data set, of what `run` returned."""
    rows = []
    for result, _ in results.values():
        found = result["lattice"] or {"vectors": [{}, {}], "echo": None}
        for name, vector in zip(("first", "second"), found["vectors"], strict=True):
            # What a file holds as null.
            known = {k: v if v is not None and np.isfinite(v) else None for k, v in vector.items()}
            rows.append({"data": result["dataset"], "vector": name, "echo": found["echo"], **known})
    return rows


def _name(data: str) -> str:
    return Path(data).resolve().name if Path(data).is_dir() else data.replace("/", "_")


def _check_sizes(detectors: Sequence[Detector], dataset: datasets.Dataset) -> None:
    """Raises InputError where an image is too small for a map that is asked for."""
    least = {"lattice's figure": _LATTICE_PX, **{f"map {d.name}": d.least_px for d in detectors}}
    what = max(least, key=lambda name: least[name])
    for shape in Images(dataset.train, datasets.images_of(dataset.test)).sizes.tolist():
        if min(shape) < least[what]:
            raise InputError(
                f"an image of {dataset.name} is {shape[0]}x{shape[1]} pixels, smaller than the {least[what]} that the {what} needs: "
                "leave the image out, or choose other --config.maps or smaller settings of this one"
            )


class _Fit(NamedTuple):
    detector: Detector
    state: Any
    seconds: float


def _fit_all(detectors: Sequence[Detector], good: Sequence[np.ndarray], name: str) -> list[_Fit]:
    """The detectors that can be fitted to these images; one that cannot is left out with a word, unless it is the only one.

    Raises:
      InputError: none of them can.
    """
    fitted, refused = [], []
    for detector in detectors:
        start = time.perf_counter()
        try:
            state = detector.fit(good)
        except InputError as error:
            refused.append(error)
            continue
        fitted.append(_Fit(detector, state, time.perf_counter() - start))
    if not fitted:
        raise refused[0]
    for reason in refused:
        print(f"left out for {name}: {reason}", flush=True)
    return fitted


def _view(name: str, plates: Sequence[np.ndarray], count: int) -> View:
    """What the figures show of a line: its first plate, mean spectrum, mean autocorrelation and lattice."""
    images = list(common_size(plates, count))
    lattice, echo, _ = line_lattice(plates, count)
    mean = spectrum.centred(spectrum.mean_amplitude(jnp.stack(images)), images[0].shape[1])
    return View(
        name=name,
        image=np.asarray(images[0]),
        log_amplitude=np.asarray(spectrum.log_amplitude(images[0] - images[0].mean())),
        phase=np.asarray(spectrum.phase(images[0])),
        mean_log_amplitude=np.log1p(np.asarray(mean)),
        images=len(images),
        autocorrelation=np.asarray(echo),
        lattice=lattice,
    )


def _evaluate(
    config: configs.Spectrum,
    this: Run,
    line: datasets.Line,
    lattice: spectrum.Lattice | None,
    fitted: Sequence[_Fit],
) -> dict[str, Any]:
    """Calibrates and tests every detector, and writes what `evaluation.report` writes and the detectors' states."""
    dataset, test = line.dataset, datasets.images_of(line.dataset.test)
    limits: dict[str, evaluation.Thresholds] = {}
    maps: dict[str, evaluation.Maps] = {}
    speed = {}
    for detector, state, _ in fitted:
        mapper = evaluation.Mapper(detector, config.radius)
        limits |= mapper.thresholds(state, line.validation, config.percentile, label=f"{detector.name}: calibrate")[0]
        start = time.perf_counter()
        maps |= mapper(state, test, label=f"{detector.name}: test")[0]
        elapsed = time.perf_counter() - start
        speed[detector.name] = sum(image.size for image in test) / 1e6 / elapsed if test else None
    # Once nothing that could be wrong with the data is left.
    this.claim()
    this.keep("manifest.json", line.manifest, "good images")
    for detector, state, _ in fitted:
        detector.save(state, this.folder)
    vectors = None if lattice is None else spectrum.pitch_and_angle(lattice)
    return evaluation.report(
        this.results,
        maps,
        dataset.test,
        limits,
        record={
            "experiment": "spectrum",
            "finished": True,
            "dataset": dataset.name,
            "images": {"train": len(line.training), "validation": len(line.validation), "test": len(test)},
            "lattice": lattice and {"vectors": vectors, "echo": float(lattice.echo)},
            "config": this.settings,
            "percentile": config.percentile,
            "fit_seconds": {f.detector.name: f.seconds for f in fitted},
            "test_megapixels_per_second": speed,
            "parameters": 0,
            "results": this.results_name,
            "versions": versions(),
        },
    )

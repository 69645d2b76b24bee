"""The spectrum experiment: spectra of each line, its lattice, and three detectors without training (SPEC section 5)."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from steel_ad import config as configs
from steel_ad.data import datasets
from steel_ad.data.patches import common_size
from steel_ad.detectors import Detector
from steel_ad.detectors.lattice import LatticeDetector, line_lattice
from steel_ad.detectors.phase_only import PhaseOnlyDetector
from steel_ad.detectors.whitening import WhiteningDetector
from steel_ad.errors import InputError
from steel_ad.ops import spectrum
from steel_ad.report import spectra
from steel_ad.report.spectra import View
from steel_ad.runs import evaluation, runs
from steel_ad.versions import versions

LATTICE_COLUMNS = ("data", "vector", "pitch_px", "pitch_error_px", "angle_deg", "angle_error_deg", "echo")


def detectors(config: configs.Spectrum) -> dict[str, Detector]:
    """The settings' detectors, by the name of their map."""
    whitening = WhiteningDetector(config.tile, config.smoothing_px, config.images)
    lattice = LatticeDetector(config.images, config.background, config.window, config.floor, config.detail, whitening)
    known: dict[str, Detector] = {
        "phase_only": PhaseOnlyDetector(config.smoothing_px),
        "whitening": whitening,
        "lattice": lattice,
    }
    return {name: known[name] for name in config.maps}


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
    settings = {folder: {**configs.to_dict(config), "data": os.path.normpath(d)} for folder, d in places.items()}
    finished = {
        folder: runs.begin(folder, values, evaluate_only=False, reading=()) for folder, values in settings.items()
    }
    figure = workdir / "figures" / "spectra.png"
    # A figure of several data sets may show others than these.
    if all(finished.values()) and figure.exists() and len(data) == 1:
        return {folder: (result, True) for folder, result in finished.items() if result}
    looked, views = {}, []
    for folder, source in places.items():
        dataset = datasets.load(source)
        _check_sizes(config, dataset)
        split = datasets.split(len(dataset.train), config.validation_fraction, config.seed)
        plates = [dataset.train[i] for i in split[0]]
        view = _view(dataset.name, plates, config.images)
        # Before anything of the others is written.
        if view.lattice is None and "lattice" in config.maps:
            raise InputError(
                f"the good images of {dataset.name} show no pattern that repeats in two directions, which the map 'lattice' "
                "needs: use larger images, or leave it out with --config.maps=phase_only,whitening"
            )
        views.append(view)
        looked[folder] = dataset, plates, split, view.lattice
    results = {}
    for folder, found in looked.items():
        done = finished[folder]
        results[folder] = done or _evaluate(config, *found, folder, settings[folder]), done is not None
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


def _check_sizes(config: configs.Spectrum, dataset: datasets.Dataset) -> None:
    """Raises InputError where an image is too small for a map that is asked for."""
    smoothing, tile, patch = (
        f"smoothing of {config.smoothing_px}",
        f"tile of {config.tile}",
        "patch of 32 that a lattice needs",
    )
    least = {patch: 32, smoothing: config.smoothing_px}
    mend = {patch: "", smoothing: " or use a smaller --config.smoothing_px", tile: " or use a smaller --config.tile"}
    if set(config.maps) - {"phase_only"}:
        least[tile] = config.tile
    what = max(least, key=lambda name: least[name])
    for image in [*dataset.train, *(t.image for t in dataset.test)]:
        if min(image.shape) < least[what]:
            raise InputError(
                f"an image of {dataset.name} is {image.shape[0]}x{image.shape[1]} pixels, smaller than the {what}: leave it "
                f"out{mend[what]}"
            )


def _view(name: str, plates: Sequence[np.ndarray], count: int) -> View:
    """What the figures show of a line: its first plate, mean spectrum, mean autocorrelation and lattice."""
    images = list(common_size(plates, count))
    lattice, echo = line_lattice(plates, count)
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
    dataset: datasets.Dataset,
    plates: Sequence[np.ndarray],
    split: tuple[np.ndarray, np.ndarray],
    lattice: spectrum.Lattice | None,
    folder: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Fits, calibrates and tests every detector, and writes what `evaluation.report` writes."""
    good, test = [dataset.train[i] for i in split[1]], [t.image for t in dataset.test]
    limits, maps, seconds, speed = {}, {}, {}, {}
    for name, detector in detectors(config).items():
        start = time.perf_counter()
        states = {name: detector.fit(plates)}
        seconds[name] = time.perf_counter() - start
        mapper = evaluation.Mapper({name: detector}, config.radius)
        calibration = mapper(states, good, label=f"{name}: calibrate")
        limits[name] = evaluation.thresholds(calibration[name], config.percentile)
        start = time.perf_counter()
        maps.update(mapper(states, test, label=f"{name}: test"))
        elapsed = time.perf_counter() - start
        speed[name] = sum(image.size for image in test) / 1e6 / elapsed if test else None
    # Once nothing that could be wrong with the data is left.
    runs.claim(folder, settings)
    runs.keep(folder / "manifest.json", runs.uses(dataset.manifest, *split), "good images")
    vectors = None if lattice is None else spectrum.pitch_and_angle(lattice)
    return evaluation.report(
        folder,
        maps,
        dataset.test,
        limits,
        record={
            "experiment": "spectrum",
            "finished": True,
            "dataset": dataset.name,
            "images": {"train": len(plates), "validation": len(good), "test": len(test)},
            "lattice": lattice and {"vectors": vectors, "echo": float(lattice.echo)},
            "config": settings,
            "percentile": config.percentile,
            "fit_seconds": seconds,
            "test_megapixels_per_second": speed,
            "parameters": 0,
            "versions": versions(),
        },
    )

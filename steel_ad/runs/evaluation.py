"""Evaluation of any detector: maps, opened maps, thresholds from good images, metrics, files (SPEC sections 4 and 6)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad import files, metrics, parallel
from steel_ad.data.datasets import TestImage
from steel_ad.data.images import Images
from steel_ad.detectors import Detector, opened


@dataclasses.dataclass(frozen=True)
class Maps:
    """Of one detector and a list of images: `raw` and `opened` residual maps, float32 `[h_i, w_i]` each."""

    raw: list[np.ndarray]
    opened: list[np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """Image scores, the opened maps' maxima: float32 `[n]`."""
        return np.array([m.max() for m in self.opened], np.float32)


class Mapper:
    """All maps of a detector, and its classifier's probabilities where it has one, of many images in one program.

    Args:
      radius: of the opening's disk, in pixels.
    """

    def __init__(self, detector: Detector, radius: int):
        def one(state, pixels):
            maps = opened.open_maps(detector, state, pixels, radius=radius)
            return maps, detector.probability(state, opened.scaled(pixels))

        # A compiled program returns a dict in the order of its keys.
        self._names = detector.names
        self._program = opened.Program(one)

    def __call__(
        self, state: Any, images: Sequence[np.ndarray], *, label: str
    ) -> tuple[dict[str, Maps], np.ndarray | None]:
        """Maps by name, and probabilities float32 `[n]`, in the images' order.

        Args:
          state: what the detector's `fit` returned.
          images: uint8 `[h_i, w_i]`.
          label: of the progress bar.
        """
        results = self._program(state, images, label=label)
        maps = {n: Maps([m[n].raw for m, _ in results], [m[n].opened for m, _ in results]) for n in self._names}
        return maps, _probabilities(results)

    def thresholds(
        self, state: Any, images: Sequence[np.ndarray], percentile: float, *, label: str
    ) -> tuple[dict[str, "Thresholds"], np.ndarray | None]:
        """As `thresholds` of the maps of good images, by name, without keeping the maps; and their probabilities."""
        pixels = Images(images).num_pixels
        tails = {name: Tail(pixels, percentile) for name in self._names}

        def keep(result) -> tuple[dict[str, np.float32], Any]:
            maps, probability = result
            for name in self._names:
                tails[name].add(maps[name].raw)
            return {name: m.score for name, m in maps.items()}, probability

        results = self._program(state, images, label=label, keep=keep)
        scores = {name: np.array([s[name] for s, _ in results], np.float64) for name in tails}
        limits = {n: Thresholds(tails[n].percentile(), float(np.percentile(scores[n], percentile))) for n in tails}
        return limits, _probabilities(results)


def _probabilities(results: Sequence[tuple[Any, Any]]) -> np.ndarray | None:
    values = [p for _, p in results if p is not None]
    return np.array(values, np.float32) if values else None


class Tail:
    """A percentile of very many values that come in parts: it keeps those from the wanted one up, and no others."""

    def __init__(self, total: int, percentile: float):
        at = (total - 1) * (percentile / 100)
        self._share, self._count = at % 1, total - int(at)
        self._kept: list[np.ndarray] = []
        self._least = -np.inf

    def add(self, values: np.ndarray) -> None:
        """Takes float32 values of any shape."""
        self._kept.append(values[values >= self._least])
        if sum(map(len, self._kept)) > 1.2 * self._count + values.size:
            self._drop()

    def _drop(self) -> None:
        kept = np.concatenate(self._kept)
        if len(kept) > self._count:
            kept = np.partition(kept, len(kept) - self._count)[-self._count :]
            self._least = kept[0]
        self._kept = [kept]

    def percentile(self) -> float:
        """Once all values are in: what `np.percentile` gives in float64."""
        self._drop()
        next_up = min(1, self._count - 1)
        low, high = np.partition(self._kept[0], next_up)[[0, next_up]].astype(np.float64)
        step = high - low
        return float(high - step * (1 - self._share) if self._share >= 0.5 else low + step * self._share)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Of one map: `pixel`, a percentile of good images' raw residuals, and `image`, the same one of their scores."""

    pixel: float
    image: float


def thresholds(good: Maps, percentile: float) -> Thresholds:
    """Thresholds from good validation images' maps (SPEC section 4, Threshold)."""
    raw = np.concatenate([m.ravel() for m in good.raw])
    # In float64, so that the interpolation between two residuals is not rounded.
    return Thresholds(
        float(np.percentile(raw.astype(np.float64), percentile)),
        float(np.percentile(good.scores.astype(np.float64), percentile)),
    )


def measure(maps: Maps, test: Sequence[TestImage], limits: Thresholds) -> dict[str, Any]:
    """All metrics of SPEC section 6 of one detector's maps of the test images; NaN where one is not defined."""
    masks, labels = [t.mask for t in test], np.array([t.defective for t in test], bool)
    return metrics.evaluate(maps.raw, maps.opened, masks, labels, threshold=limits.pixel, image_threshold=limits.image)


def score_rows(
    maps: Mapping[str, Maps],
    test: Sequence[TestImage],
    limits: Mapping[str, Thresholds],
    extra_scores: Mapping[str, np.ndarray],
    contrasts: np.ndarray,
) -> list[dict[str, Any]]:
    """One row an image: name, kind, whether it is defective, how visible its greatest defect is (`metrics.contrast_to_noise`, None for
    NaN), of each map its score and the thesis' verdict, further scores."""
    scores = {name: m.scores for name, m in maps.items()}
    rows = []
    for i, t in enumerate(test):
        row: dict[str, Any] = {"image": t.name, "kind": t.kind, "defective": int(t.defective)}
        row["contrast_to_noise"] = None if np.isnan(contrasts[i]) else float(contrasts[i])
        for name in maps:
            row[f"score_{name}"] = float(scores[name][i])
            row[f"defect_{name}"] = int(np.float64(scores[name][i]) > limits[name].pixel)
        for name, values in extra_scores.items():
            row[f"score_{name}"] = float(values[i])
        rows.append(row)
    return rows


def _by_contrast(maps: Maps, test: Sequence[TestImage], contrasts: np.ndarray) -> dict[str, dict[str, Any]]:
    """Of one map, the share of defective images found at 5 % false alarms, by contrast-to-noise."""
    scores, defective = maps.scores.astype(np.float64), np.array([t.defective for t in test])
    limit = metrics.false_alarm_limit(scores[~defective], 5)
    return metrics.found_by_contrast(contrasts[defective], None if np.isnan(limit) else scores[defective] > limit)


def report(
    workdir: Path,
    maps: Mapping[str, Maps],
    test: Sequence[TestImage],
    limits: Mapping[str, Thresholds],
    *,
    record: Mapping[str, Any],
    extra_maps: Mapping[str, Mapping[str, Any]] | None = None,
    extra_scores: Mapping[str, np.ndarray] | None = None,
    reconstruct: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Measures, and writes `metrics.json`, `scores.csv` and the figures; of several processes the first one does, and all wait.

    Args:
      maps: detector name -> maps of the test images, which may be none.
      limits: detector name -> its thresholds.
      record: further entries of `metrics.json`.
      extra_maps: name -> metrics of what has no map.
      extra_scores: name -> image scores `[n]` of what has no map.
      reconstruct: uint8 `[h, w]` -> float `[h, w]`, for the example figures.

    Returns:
      What `metrics.json` holds.
    """
    if not parallel.is_main():
        parallel.barrier("report")
        return files.read_json(workdir / "metrics.json")
    folder = workdir / "figures"
    # Stale figures of an earlier evaluation would stand beside the new numbers.
    stale = [folder / "contrast.png", *folder.glob("examples_*.png"), *folder.glob("scores_*.png")]
    for old in (workdir / "metrics.json", *stale):
        old.unlink(missing_ok=True)
    found = {name: measure(maps[name], test, limits[name]) for name in maps} if test else {}
    contrasts = np.array([metrics.contrast_to_noise(t.image, t.mask) if t.defective else np.nan for t in test])
    for name, values in found.items():
        values["found_by_contrast"] = _by_contrast(maps[name], test, contrasts)
    if test:
        files.write_csv(workdir / "scores.csv", score_rows(maps, test, limits, extra_scores or {}, contrasts))
        _draw(folder, maps, test, limits, found, reconstruct, title=str(record["dataset"]))
    result = {
        "maps": {**found, **(extra_maps or {})},
        "thresholds": {name: dataclasses.asdict(t) for name, t in limits.items()},
        **record,
    }
    # Last, since its presence says that the run is complete.
    files.write_json(workdir / "metrics.json", result)
    parallel.barrier("report")
    return result


def _draw(
    folder: Path,
    maps: Mapping[str, Maps],
    test: Sequence[TestImage],
    limits: Mapping[str, Thresholds],
    found: Mapping[str, Mapping[str, Any]],
    reconstruct: Callable[[np.ndarray], np.ndarray] | None,
    *,
    title: str,
) -> None:
    """The figures of an evaluation with test images; `found` has each map's metrics."""
    from steel_ad.report import evaluation as figures

    series = {}
    kinds = np.array([t.kind for t in test])
    for name, m in maps.items():
        of_map = f"{title}, {name} map"
        rows = _example_rows(m, test, limits[name].pixel, reconstruct)
        figures.examples(folder / f"examples_{name}.png", rows, title=of_map, threshold=limits[name].pixel)
        figures.score_histogram(
            folder / f"scores_{name}.png",
            m.scores[kinds == "good"],
            {k: m.scores[kinds == k] for k in sorted(set(kinds.tolist()) - {"good"})},
            threshold=limits[name].pixel,
            calibrated=limits[name].image,
            title=of_map,
        )
        if any(t.mask.any() for t in test) and not all(t.mask.all() for t in test):
            curve = metrics.thin(metrics.curve(metrics.rank(m.raw, [t.mask for t in test])), 500)
            rates = {"fpr": curve.fpr, "tpr": curve.tpr, "pro": curve.pro}
            areas = {"auroc": found[name]["pixel_auroc"], "aupro_30": found[name]["aupro_30"]}
            series[name] = {**rates, **areas}
    if any(b["found"] >= 0 for values in found.values() for b in values["found_by_contrast"].values()):
        bins = {name: values["found_by_contrast"] for name, values in found.items()}
        figures.found_by_contrast(folder / "contrast.png", bins, title=title)
    if series:
        figures.curves(folder / "curves.png", series, title=title)


def _example_rows(maps: Maps, test: Sequence[TestImage], threshold: float, reconstruct) -> list:
    """Of each kind, the image of median score; of good ones also the worst."""
    from steel_ad.report.evaluation import Example

    scores, chosen = maps.scores, []
    for kind in sorted({t.kind for t in test}, key=lambda k: (k != "good", k)):
        members = sorted((i for i, t in enumerate(test) if t.kind == kind), key=lambda i: scores[i])
        chosen.append(members[len(members) // 2])
        if kind == "good" and len(members) > 1:
            chosen.append(members[-1])
    return [
        Example(
            name=test[i].name.rsplit("/", 1)[-1],
            kind=test[i].kind,
            image=test[i].image,
            truth=test[i].mask,
            reconstruction=None if reconstruct is None else reconstruct(test[i].image),
            residual=maps.raw[i],
            mask=maps.opened[i] > np.float64(threshold),
            score=float(scores[i]),
        )
        for i in chosen[:8]
    ]

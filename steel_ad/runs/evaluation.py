"""Evaluation of any detector: maps, opened maps, thresholds from good images, metrics, files (SPEC sections 4 and 6)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steel_ad import files, metrics, parallel
from steel_ad.data import stored
from steel_ad.data.datasets import TestImage
from steel_ad.detectors import Detector
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.ops.morphology import grey_opening
from steel_ad.progress import progress


@dataclasses.dataclass(frozen=True)
class Maps:
    """Of one detector and a list of images: `raw` and `opened` residual maps, float32 `[h_i, w_i]` each."""

    raw: list[np.ndarray]
    opened: list[np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """Image scores, the opened maps' maxima: float32 `[n]`."""
        return np.array([m.max() for m in self.opened], np.float32)


class Program:
    """A function of an image, `(states, image float32 [h, w] in [0, 1]) -> arrays`, over many images and all devices."""

    def __init__(self, function: Callable[[Any, jax.Array], Any]):
        self._mesh = parallel.mesh()
        whole, spread = parallel.replicated(self._mesh), parallel.spread(self._mesh)
        self._program = jax.jit(
            jax.vmap(lambda states, image: function(states, image.astype(jnp.float32) / 255), in_axes=(None, 0)),
            in_shardings=(whole, spread),
            # Process 0 needs all results; of one process they are gathered on the host.
            out_shardings=whole if jax.process_count() > 1 else spread,
            compiler_options=cpu_compiler_options(),
        )

    def __call__(
        self, states: Any, images: Sequence[np.ndarray], *, label: str, keep: Callable[[Any], Any] = lambda found: found
    ) -> list[Any]:
        """The function's results as numpy arrays, in the images' order.

        Args:
          states: the function's first argument.
          images: uint8 `[h_i, w_i]`; to each device images of one shape go one by one on CPU, elsewhere in batches of four
            times 256x256 pixels.
          label: of the progress bar.
          keep: an image's result -> what is kept of it.
        """
        states = parallel.put(states, parallel.replicated(self._mesh))
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(stored.shapes(images)):
            groups.setdefault(shape, []).append(i)
        found: list[Any] = [None] * len(images)
        done = 0
        pending: tuple[list[int], Any] | None = None

        def settle() -> None:
            nonlocal pending, done
            if pending is None:
                return
            chosen, results = pending[0], jax.device_get(pending[1])
            pending = None
            for k, i in enumerate(chosen):
                found[i] = keep(jax.tree.map(lambda a, k=k: a[k], results))
            done += len(chosen)
            update(done)

        with progress(label, len(images), "images") as update:
            for shape, members in groups.items():
                # On CPU a batch's activations leave the caches.
                most = 1 if jax.default_backend() == "cpu" else 4
                size = self._mesh.size * max(1, min(most, most * 2**16 // (shape[0] * shape[1])))
                for start in range(0, len(members), size):
                    chosen = members[start : start + size]
                    # The last batch repeats an image, so that a shape compiles once.
                    padded = chosen + [chosen[-1]] * (size - len(chosen))
                    batch = parallel.put(np.stack([images[i] for i in padded]), parallel.spread(self._mesh))
                    under_way = self._program(states, batch)
                    # The devices work on this batch while the host fetches the one before.
                    settle()
                    pending = chosen, under_way
            settle()
        return found


class Mapper:
    """Raw and opened residual maps of several detectors, in one program that shares what they compute in common.

    Args:
      detectors: name -> detector.
      radius: of the opening's disk, in pixels.
    """

    def __init__(self, detectors: Mapping[str, Detector], radius: int):
        self._names = tuple(detectors)

        def one(states, image):
            raw = {name: detector.residual(states[name], image) for name, detector in detectors.items()}
            return raw, {name: grey_opening(m, radius=radius) for name, m in raw.items()}

        self._program = Program(one)

    def __call__(self, states: Mapping[str, Any], images: Sequence[np.ndarray], *, label: str) -> dict[str, Maps]:
        """Maps by detector name, in the images' order.

        Args:
          states: name -> what the detector's `fit` returned.
          images, label: as of `Program`.
        """
        found = self._program(states, images, label=label)
        return {n: Maps([raw[n] for raw, _ in found], [opened[n] for _, opened in found]) for n in self._names}

    def thresholds(
        self, states: Mapping[str, Any], images: Sequence[np.ndarray], percentile: float, *, label: str
    ) -> dict[str, "Thresholds"]:
        """As `thresholds` of the maps of good images, by detector name, without keeping the maps."""
        pixels = sum(h * w for h, w in stored.shapes(images))
        tails = {name: Tail(pixels, percentile) for name in self._names}

        def keep(found) -> dict[str, np.float32]:
            for name, tail in tails.items():
                tail.add(found[0][name])
            return {name: found[1][name].max() for name in self._names}

        scores = self._program(states, images, label=label, keep=keep)
        return {
            name: Thresholds(
                tail.percentile(), float(np.percentile(np.array([s[name] for s in scores], np.float64), percentile))
            )
            for name, tail in tails.items()
        }


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
) -> list[dict[str, Any]]:
    """One row an image: name, kind, whether it is defective, of each map its score and the thesis' verdict, further scores."""
    scores = {name: m.scores for name, m in maps.items()}
    rows = []
    for i, t in enumerate(test):
        row: dict[str, Any] = {"image": t.name, "kind": t.kind, "defective": int(t.defective)}
        for name in maps:
            row[f"score_{name}"] = float(scores[name][i])
            row[f"defect_{name}"] = int(np.float64(scores[name][i]) > limits[name].pixel)
        for name, values in extra_scores.items():
            row[f"score_{name}"] = float(values[i])
        rows.append(row)
    return rows


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
    from steel_ad.report import figures

    folder = workdir / "figures"
    # What an earlier evaluation with other settings left would speak for this one.
    for old in (workdir / "metrics.json", *folder.glob("examples_*.png"), *folder.glob("scores_*.png")):
        old.unlink(missing_ok=True)
    found = {name: measure(maps[name], test, limits[name]) for name in maps} if test else {}
    result = {
        "maps": {**found, **(extra_maps or {})},
        "thresholds": {name: dataclasses.asdict(t) for name, t in limits.items()},
        **record,
    }
    if test:
        files.write_csv(workdir / "scores.csv", score_rows(maps, test, limits, extra_scores or {}))
        series = {}
        for name, m in maps.items():
            title = f"{record['dataset']}, {name} map"
            rows = _example_rows(m, test, limits[name].pixel, reconstruct)
            figures.examples(folder / f"examples_{name}.png", rows, title=title, threshold=limits[name].pixel)
            kinds = np.array([t.kind for t in test])
            figures.score_histogram(
                folder / f"scores_{name}.png",
                m.scores[kinds == "good"],
                {k: m.scores[kinds == k] for k in sorted(set(kinds.tolist()) - {"good"})},
                threshold=limits[name].pixel,
                calibrated=limits[name].image,
                title=title,
            )
            if any(t.mask.any() for t in test) and not all(t.mask.all() for t in test):
                curve = metrics.thin(metrics.curve(metrics.rank(m.raw, [t.mask for t in test])), 500)
                series[name] = {
                    "fpr": curve.fpr,
                    "tpr": curve.tpr,
                    "pro": curve.pro,
                    "auroc": found[name]["pixel_auroc"],
                    "aupro_30": found[name]["aupro_30"],
                }
        if series:
            figures.curves(folder / "curves.png", series, title=str(record["dataset"]))
    # Last, since its presence says that the run is complete.
    files.write_json(workdir / "metrics.json", result)
    parallel.barrier("report")
    return result


def _example_rows(maps: Maps, test: Sequence[TestImage], threshold: float, reconstruct) -> list:
    """Of each kind, the image of median score; of good ones also the worst."""
    from steel_ad.report.figures import Example

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

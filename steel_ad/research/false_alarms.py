"""Promised against observed false alarms: simulated lines, detectors without training, good plates without end.

A score is the maximum of a plate's opened map, as an inspection scores a tile; a plate is one tile without a halo here.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from scipy import stats

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import plates
from steel_ad.data.plates import Line
from steel_ad.detectors import Detector, detector_class
from steel_ad.detectors.opened import open_maps
from steel_ad.errors import InputError
from steel_ad.inspection import calibration
from steel_ad.ops.convolution import cpu_compiler_options
from steel_ad.progress import progress
from steel_ad.report import studies
from steel_ad.research import results

COLUMNS = ("plates", "calibrated_on", "form", "rate", "cases", "promised", "observed", "error", "held", "bar", "kept")
_BATCH = 128
_STRIP = 8  # frames
_CONFIDENCE = 0.95
_FORMS = {"confidence": _CONFIDENCE, "average": None}
_FIT, _CALIBRATION, _FRESH = range(3)


def line(rng: np.random.Generator, number: int, size: int) -> tuple[Line, dict[str, float]]:
    """A random line: its pattern, by turns, with what is common to all lines of that pattern, and what is its own.

    Four or more repeats across a plate of `size` pixels; pitch within 2.5 % and angle within 1 degree of the pattern's, so that
    one layout of the lattice's program serves all; wear, light, surface and camera are drawn widely.
    """
    pattern, angle = (("teardrop1", 45.0), ("teardrop2", 45.0), ("diamond", 50.0))[number % 3]
    base = plates.LINES[pattern]
    scale = size / 4.2 / base.pitch_px
    lengths = ("lug_length_px", "lug_width_px", "lug_height_px", "flank_px")
    base = dataclasses.replace(base, pitch_px=size / 4.2, angle_deg=angle, grain_length_px=10.0, blur_px=0.6)
    scale *= rng.uniform(0.975, 1.025)
    own = {name: scale * getattr(base, name) for name in lengths}
    own |= {
        "pitch_px": scale * plates.LINES[pattern].pitch_px,
        "angle_deg": angle + rng.uniform(-1, 1),
        "wear": rng.uniform(0.1, 0.5),
        "polish": rng.uniform(-0.15, 0.3),
        "light_elevation_deg": rng.uniform(42, 58),
        "light_azimuth_deg": rng.uniform(0, 360),
        "light_spread_deg": rng.uniform(15, 40),
        "ambient": rng.uniform(0.3, 0.4),
        "gloss": rng.uniform(0.15, 0.55),
        "exposure": rng.uniform(0.35, 0.5),
        "exposure_jitter": rng.uniform(0.05, 0.15),
        "grain": rng.uniform(0.03, 0.06),
        "roughness_px": rng.uniform(0.04, 0.12),
        "drift": rng.uniform(0.05, 0.2),
        "blotches": rng.uniform(0.05, 0.25),
        "noise": rng.uniform(0.012, 0.025),
    }
    return base, own


def frames(rng: np.random.Generator, own: Mapping[str, float], groups: np.ndarray) -> dict[str, np.ndarray]:
    """A line's parameters for each frame, where frames of one strip share light, wear, dirt and noise.

    Args:
      rng: of the strips.
      own: the line's, as `line` draws them.
      groups: int `[n]`, each frame's strip.

    Returns:
      Name -> float32 `[n]`.
    """
    strips = int(groups.max()) + 1
    turn, lift, shine, wear, dirt, noise = rng.uniform(-1, 1, (6, strips))
    spread = own["light_spread_deg"]
    shared = {
        "light_azimuth_deg": own["light_azimuth_deg"] + spread * turn,
        "light_elevation_deg": own["light_elevation_deg"] + spread / 4 * lift,
        "exposure": own["exposure"] * (1 + own["exposure_jitter"] * shine),
        "wear": own["wear"] * (1 + 0.5 * wear),
        "blotches": own["blotches"] * (1 + dirt),
        "grain": own["grain"] * (1 + 0.4 * dirt),
        "noise": own["noise"] * (1 + 0.3 * noise),
    }
    # Within a strip a tenth of the line's unrest is left.
    steady = {"light_spread_deg": spread / 10, "exposure_jitter": own["exposure_jitter"] / 10}
    values = {name: np.full(groups.size, value) for name, value in {**own, **steady}.items()}
    values |= {name: value[groups] for name, value in shared.items()}
    return {name: value.astype(np.float32) for name, value in values.items()}


def _render(key: Array, recipe: Line, values: dict[str, Array], size: int) -> Array:
    return plates.to_uint8(plates.render_each(key, recipe, values, shape=(size, size)))


def _scores(detector: Detector, state: Any, images: Array, radius: int) -> Array:
    def one(image: Array) -> Array:
        return open_maps(detector, state, image, radius=radius)[detector.name].score

    # One by one the lattice's large intermediates stay in a CPU's caches.
    return jax.lax.map(one, images, batch_size=1 if jax.default_backend() == "cpu" else len(images))


def cases(
    calibrate: np.ndarray,
    groups: np.ndarray,
    fresh: np.ndarray,
    strips: np.ndarray,
    rates: Sequence[float],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """What thresholds for each rate promise, in both forms, and what they do on fresh plates.

    Args:
      calibrate: `[n]`, scores of good plates; `groups`: int `[n]`, their strips.
      fresh: `[m]`, further ones; `strips`: int `[m]`, theirs, all of one size.
      rates: to promise.
      seed: of the draw of one score a group.

    Returns:
      A record for each form, rate, and choice of scores: one of each strip, and, where strips have several frames, all frames
      of the strips that are whole as if they were independent. `squares` is the sum over strips of their alarms squared.

    Raises:
      InputError: too few scores for a promise.
    """
    single = calibration.one_per_group(calibrate, groups.tolist(), seed=seed)
    chosen = {"one per strip": single}
    size = np.bincount(groups)
    if size.max() > 1:
        chosen["all frames"] = calibrate[size[groups] == size.max()]
    records = []
    for (name, scores), (form, confidence), rate in itertools.product(chosen.items(), _FORMS.items(), rates):
        promised = calibration.promise(scores, rate, confidence)
        alarms = np.bincount(strips, fresh > promised.threshold)
        record = {"calibrated_on": name, "form": form, "rate": rate}
        record |= {"promised": rate if confidence else promised.average_rate}
        record |= {k: getattr(promised, k) for k in ("threshold", "rank", "count")}
        record |= {"fresh": fresh.size, "alarms": int(alarms.sum()), "squares": float((alarms**2).sum())}
        records.append({**record, "strips": alarms.size})
    return records


def verdicts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether promises were kept, a row for each kind of plates, choice of scores, form and rate.

    With a confidence: a case holds if its alarms are not above what 19 of 20 samples of its size show at the promised rate; where
    frames of a strip resemble each other the sample is worth less, by the design effect of the detector's alarms over all lines.
    The promise is kept if no fewer cases hold than 95 % less the binomial error (5 %) of that many.
    On average: kept if the mean observed rate is at least half the promised one, and not above it by more than Student's 95 %
    interval, with lines as units, since the detectors saw the same plates.

    Args:
      found: records of `cases`, each also with `line`, `map` and `plates`.

    Raises:
      ValueError: cases of a single line.
    """
    keys = COLUMNS[:4]
    groups = results.series(found, *keys)
    return [dict(zip(keys, name, strict=True)) | _verdict(name[2], some) for name, some in groups.items()]


def design_effect(found: Sequence[Mapping[str, Any]]) -> float:
    """By how much strips inflate the variance of the number of alarms beside that of independent frames, at least 1."""
    between = sum(c["squares"] - c["alarms"] ** 2 / c["strips"] for c in found)
    binomial = sum(c["alarms"] * (1 - c["alarms"] / c["fresh"]) for c in found)
    return max(1.0, between / binomial) if binomial else 1.0


def _verdict(form: str, some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_line = results.series(some, "line").values()
    means = np.array([np.mean([case["alarms"] / case["fresh"] for case in of_line]) for of_line in by_line])
    if means.size < 2:
        raise ValueError("a verdict takes cases of two lines or more")
    promised = float(np.mean([case["promised"] for case in some]))
    observed = float(means.mean())
    error = float(stats.t.ppf(0.975, means.size - 1) * means.std(ddof=1) / math.sqrt(means.size))
    result = {"cases": len(some), "promised": promised, "observed": observed, "error": error}
    if form == "average":
        return {**result, "kept": bool(promised / 2 <= observed <= promised + error)}
    effects = {name: design_effect([c for c in some if c["map"] == name]) for name in {c["map"] for c in some}}
    held = plain = 0
    for case in some:
        effect = effects[case["map"]]
        allowed = effect * stats.binom.ppf(0.95, round(case["fresh"] / effect), case["promised"])
        held += case["alarms"] <= allowed
        plain += case["alarms"] <= case["fresh"] * case["promised"]
    bar = float(stats.binom.ppf(0.05, len(some), _CONFIDENCE)) / len(some)
    return {
        **result,
        "held": held / len(some),
        "held_without_allowance": plain / len(some),
        "design_effects": effects,
        "bar": bar,
        "kept": bool(held / len(some) >= bar),
    }


def run(config: configs.FalseAlarms, out: Path) -> dict[str, Any]:
    """Simulates, and writes cases and verdicts to `out`, a JSON file, with a figure of the same name beside it.

    Each line's plates come once independent, and once in strips of 8 frames: `calibration` strips, of which every 8th is whole and
    of the others one frame is seen, then `fresh` frames in whole strips. What a line gave is kept: the same call, also one with
    more `lines`, goes on after an interruption.

    Returns:
      What the file holds.

    Raises:
      InputError: a calibration too small for a rate, no such detector, an `out` of other settings.
    """
    settings = configs.to_dict(config)
    lines = settings.pop("lines")
    spectrum = configs.Spectrum(tile=config.size // 4 * 2)
    known = {name: detector_class(name).configured(spectrum) for name in config.maps}
    rate = min(config.rates)
    if config.calibration < (least := calibration.needed(rate, _CONFIDENCE)):
        raise InputError(
            f"--calibration={config.calibration} cannot promise a rate of {rate:g} with confidence {_CONFIDENCE:g}: it takes {least}"
        )
    done: dict[str, Any] = files.read_json(out, dict) if out.exists() else {"settings": settings, "lines": []}
    if not isinstance(done, dict) or done.get("settings") != settings:
        raise InputError(f"{out} holds results of other settings: use a new --out")
    simulation = _Simulation(known, settings)
    of_a_line = sum(role.size for kind in simulation.groups.values() for role in kind.values())
    seen = len(done["lines"]) * of_a_line
    with progress("plates", lines * of_a_line, "plates", done=seen) as update:

        def advance(plates: int) -> None:
            nonlocal seen
            seen += plates
            update(seen, f"line {len(done['lines']) + 1}")

        while len(done["lines"]) < lines:
            done["lines"].append(simulation.line(len(done["lines"]), advance))
            files.write_json(out, done)
    found = [{"line": i, **case} for i, record in enumerate(done["lines"]) for case in record["cases"]]
    done["verdicts"] = verdicts(found)
    studies.promises(out.with_suffix(".png"), found)
    files.write_json(out, done)
    return done


class _Simulation:
    """Lines of one study: what is the same for all of them."""

    def __init__(self, known: Mapping[str, Detector], settings: Mapping[str, Any]):
        self._detectors, self._settings = known, settings
        calibrate, fresh = settings["calibration"], settings["fresh"]
        whole = math.ceil(calibrate / _STRIP)
        strips = np.concatenate([np.repeat(np.arange(whole), _STRIP), np.arange(whole, calibrate)])
        options = cpu_compiler_options()
        self._render = jax.jit(_render, static_argnames=("recipe", "size"), compiler_options=options)
        self._scores = jax.jit(_scores, static_argnames=("detector", "radius"), compiler_options=options)
        # kind of plates -> stream -> each plate's strip
        self.groups: dict[str, dict[int, np.ndarray]] = {
            "independent": {_CALIBRATION: np.arange(calibrate), _FRESH: np.arange(fresh)},
            "in strips": {_CALIBRATION: strips, _FRESH: np.repeat(np.arange(math.ceil(fresh / _STRIP)), _STRIP)},
        }

    def line(self, number: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """The parameters and cases of a line; `advance` is told of plates that have been scored."""
        seed, size = self._settings["seed"], self._settings["size"]
        base, own = line(np.random.default_rng([seed, 0xFA, number]), number, size)
        root = jax.random.fold_in(jax.random.key(seed), number)

        def same(count: int) -> dict[str, np.ndarray]:
            return {name: np.full(count, value, np.float32) for name, value in own.items()}

        good = np.asarray(self._render(jax.random.fold_in(root, _FIT), base, same(_BATCH), size))[:24]
        states = {name: detector.fit(list(good)) for name, detector in self._detectors.items()}
        found = []
        for k, (kind, roles) in enumerate(self.groups.items()):
            scores: dict[int, dict[str, np.ndarray]] = {}
            for role, groups in roles.items():
                stream = 2 * k + role
                rng = np.random.default_rng([seed, 0xF8, number, stream])
                values = same(groups.size) if kind == "independent" else frames(rng, own, groups)
                scores[role] = self._score(jax.random.fold_in(root, stream), base, values, states, advance)
            for name in states:
                calibrate, fresh = scores[_CALIBRATION][name], scores[_FRESH][name]
                rates = self._settings["rates"]
                some = cases(calibrate, roles[_CALIBRATION], fresh, roles[_FRESH], rates, seed=number)
                found += [{"map": name, "plates": kind, **case} for case in some]
        return {"pattern": base.pattern, "parameters": own, "cases": found}

    def _score(
        self,
        key: Array,
        base: Line,
        values: dict[str, np.ndarray],
        states: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """Scores float32 `[n]` of each detector on the same n plates."""
        count = next(iter(values.values())).size
        batches: list[dict[str, Array]] = []
        for start in range(0, count, _BATCH):
            # The last batch goes round, so that all have one shape.
            batch = {name: value.take(range(start, start + _BATCH), mode="wrap") for name, value in values.items()}
            images = self._render(jax.random.fold_in(key, start), base, batch, self._settings["size"])
            radius = configs.Spectrum().radius
            batches.append({name: self._scores(d, states[name], images, radius) for name, d in self._detectors.items()})
            # The device works on this batch while the one before is waited for.
            jax.block_until_ready(batches[-2:-1])
            advance(min(_BATCH, count - start))
        scores = jax.device_get(batches)
        return {name: np.concatenate([batch[name] for batch in scores])[:count] for name in states}

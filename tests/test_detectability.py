"""Curves of detection recover what trials were drawn from, their bound covers as often as it says, and trials are as described."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from steel_ad.config import Detectability, Inspection
from steel_ad.data import defects, folders
from steel_ad.detectors import Detector, Fitted
from steel_ad.errors import InputError
from steel_ad.research import detectability as study
from steel_ad.research import pod as detectability

ROOT = Path(__file__).parent.parent
# The binary, with no network and an opening that takes what is thin.
BINARY = """
import runpy
import jax.numpy as jnp
from steel_ad.detectors import Detector, Fitted
from steel_ad.runs.run import Run

class Distance(Detector):
    name, least_px = "distance", 16
    fit = None

    def residual(self, state, image):
        return jnp.abs(image - 0.5)

fitted = Fitted(Distance(), {}, 2, None, "a run", {}, frozenset())
Run.open = lambda folder: Run(folder, "autoencoder", {}, folder)
Run.detector = lambda *_: fitted
runpy.run_module("experiments.detectability", run_name="__main__", alter_sys=True)
"""
B0, B1 = -6.0, 3.0
A90 = np.exp((np.log(9) - B0) / B1)


def trials(seed, n):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(2), np.log(40), n))
    return size, rng.random(n) < special.expit(B0 + B1 * np.log(size))


def test_the_fit_is_the_maximum_of_the_likelihood_and_recovers_the_parameters():
    size, hit = trials(0, 20_000)
    curve = detectability.fit(size, hit)
    # The likelihood is concave, and has its maximum where the score equations hold.
    left = hit - special.expit(curve.b0 + curve.b1 * np.log(size))
    np.testing.assert_allclose([left.sum(), (left * np.log(size)).sum()], 0, atol=1e-2)
    assert curve.a50 == pytest.approx(np.exp(2), rel=0.02)
    assert curve.a90 == pytest.approx(A90, rel=0.02)
    assert A90 < curve.a90_95 < 1.05 * A90
    np.testing.assert_allclose(curve([curve.a50, curve.a90]), [0.5, 0.9])
    # In other units the same curve.
    metric = detectability.fit(0.1 * size, hit)
    assert metric.a90_95 == pytest.approx(0.1 * curve.a90_95, rel=1e-4)
    assert metric.b1 == pytest.approx(curve.b1, rel=1e-5)


def test_the_bound_is_where_the_likelihood_ratio_says():
    size, hit = trials(1, 80)
    curve = detectability.fit(size, hit)
    # An independent profile: the intercept follows from the slope.
    slopes = np.linspace(0.01, 12, 4000)[:, None]
    x = np.log(size / curve.a90_95)
    p = special.expit(np.log(9) + slopes * x)
    profile = (-2 * np.log(np.where(hit, p, 1 - p)).sum(1)).min()
    p = curve(size)
    best = -2 * np.log(np.where(hit, p, 1 - p)).sum()
    assert profile - best == pytest.approx(1.6448536**2, abs=2e-3)


def test_the_bound_covers_as_often_as_it_says():
    bounds = [detectability.fit(*trials(seed, 60)).a90_95 for seed in range(200)]
    covered = np.mean([b is None or b >= A90 for b in bounds])
    # Three standard errors around 0.95.
    assert 0.90 < covered < 0.997
    # An infinite bound would cover, too.
    assert sum(b is None for b in bounds) < 10
    assert np.median([b for b in bounds if b is not None]) < 2 * A90


@pytest.mark.parametrize(
    ("size", "hit", "note"),
    [
        ([2, 4, 8], [1, 1, 1], "all of 3 were found: the curve lies below the smallest size, 2"),
        ([2, 4, 8], [0, 0, 0], "none of 3 were found: the curve lies above the largest size, 8"),
        ([2, 4, 8, 16], [0, 0, 1, 1], "all below 8 were missed and all above 4 found"),
        ([2, 4, 4, 8], [0, 1, 0, 1], "all below 4 were missed and all above 4 found"),
        ([2, 4, 8, 16], [1, 1, 0, 0], "no curve grows"),
        ([2, 4, 4, 8, 8, 16], [1, 1, 0, 1, 0, 0], "were not found more often"),
        ([3, 3, 3], [1, 0, 1], "all sizes are 3"),
    ],
)
def test_trials_without_a_curve_say_why(size, hit, note):
    curve = detectability.fit(size, hit)
    assert note in curve.note
    assert (curve.trials, curve.hits) == (len(size), sum(hit))
    assert curve.a50 is curve.a90 is curve.a90_95 is curve.b1 is None
    with pytest.raises(ValueError, match="no curve"):
        curve(3.0)


def test_an_uncertain_slope_has_no_bound():
    curve = detectability.fit([2, 4, 8, 16, 2, 4, 8, 16], [0, 1, 0, 1, 1, 0, 1, 1])
    assert curve.a90 is not None
    assert curve.a90_95 is None
    assert "no upper bound" in curve.note
    with pytest.raises(ValueError, match="above 0"):
        detectability.fit([0.0, 1.0], [0, 1])


@pytest.fixture
def line(tmp_path):
    """A folder of good plates and one of defects: discs and bars."""
    rng = np.random.default_rng(0)
    pictures = {f"good/{i}.png": rng.normal(128, 2, (70, 60)) for i in range(24)}
    y, x = np.mgrid[-40:40, -40:40]
    for kind, mask in (("disc", y**2 + x**2 <= 100), ("bar", (np.abs(y) <= 10) & (np.abs(x) <= 5))):
        pictures[f"steel/images/{kind}/0.png"] = np.where(mask, 200, 100)
        pictures[f"steel/masks/{kind}/0.png"] = 255 * mask
    for name, picture in pictures.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.write_image(path, picture.astype(np.uint8))
    return tmp_path


def test_larger_and_stronger_defects_are_found(line):
    out = line / "out"
    flags = {
        "model": "any",
        "calibration": line / "good",
        "defects": line / "steel",
        "out": out,
        "tile_px": 48,
        "halo_px": 8,
    }
    flags |= {"contrasts": "0.001,0.1", "smallest_px": 3, "largest_px": 20, "trials": 12, "mm_per_px": 0.5}
    flags |= {"false_alarm_rate": 0.2, "compilation_cache": os.environ["STEEL_AD_TEST_CACHE"]}
    command = [sys.executable, "-c", BINARY, *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "a90/95" in done.stdout
    trials = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert len(trials) == 2 * 2 * 12
    # An opening by a disk of radius 2 leaves nothing of what is less than 5 pixels wide.
    for t in trials:
        length, strong = int(t["length_px"]), t["contrast"] == "0.1"
        across = length if t["kind"] == "disc" else length / 2
        if strong and across >= 7:
            assert t["found"] == "1"
        if not strong or length <= 3:
            assert t["found"] == "0"
    lengths = [int(t["length_px"]) for t in trials]
    assert (min(lengths), max(lengths)) == pytest.approx((3, 20), abs=1)
    record = json.loads((out / "summary.json").read_text())
    assert record["unit"] == "mm"
    rows = {(r["kind"], r["contrast"]): r for r in record["curves"]}
    assert rows["disc", 0.001]["note"].startswith("none of 12 were found")
    assert rows["disc", 0.1]["found"] == sum(t["kind"] == "disc" and t["found"] == "1" for t in trials)
    assert (out / "table.md").read_text().startswith("| kind | contrast |")
    assert (out / "detectability.png").stat().st_size > 10_000


class Blank(Detector):
    """A detector whose map nobody asks for."""

    name, least_px, fit, residual = "blank", 16, None, None


def test_what_is_wrong_is_said(line, monkeypatch):
    monkeypatch.setattr(study.good_tiles, "good_scores", lambda *_: {"scores": [0.1] * 24})
    where = {
        "detector": Fitted(Blank(), {}, 2, None, "a run", {}, frozenset()),
        "calibrate_on": str(line / "good"),
        "defects_from": str(line / "steel"),
        "out": line / "out",
    }
    how = Inspection(tile_px=48, halo_px=8)
    with pytest.raises(InputError, match=r"24 independent .* it takes 99"):
        study.run(Detectability(largest_px=20), how, **where)
    with pytest.raises(InputError, match="more than half a tile"):
        study.run(Detectability(largest_px=25), how, **where)
    assert not (line / "out").exists()
    (line / "out").mkdir()
    (line / "out" / "settings.json").write_text('{"trials": 7}')
    with pytest.raises(InputError, match="holds other trials"):
        study.run(Detectability(largest_px=20), how, **where)
    with pytest.raises(InputError, match="must be at least 10"):
        Detectability(trials=5)


def test_a_defect_has_the_length_and_the_contrast_that_are_asked_for(line):
    library, _ = defects.load(line / "steel")
    for index, ratio in enumerate(library.kinds):
        for length in (3, 10, 21, 40):
            change, mask = defects.resized(library, index, length_px=length, contrast=0.1)
            y, x = np.nonzero(mask)
            sides = np.ptp(y) + 1, np.ptp(x) + 1
            assert abs(max(sides) - length) <= 1
            assert np.abs(change[mask]).mean() == pytest.approx(0.1, rel=1e-4)
            assert min(sides) == pytest.approx(length * (0.52 if ratio == "bar" else 1), abs=1.5)
            # Faded around the mask, and nothing is cut off.
            assert change.shape[0] >= sides[0]
            assert change.shape[1] >= sides[1]
            assert np.abs(change[0]).max() < 0.1


def test_every_contrast_is_a_share():
    with pytest.raises(InputError, match="contrasts"):
        Detectability(contrasts=(0.1, 2.0))

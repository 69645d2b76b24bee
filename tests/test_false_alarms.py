"""Lines drawn one program for all, thresholds on fresh scores, verdicts on simulated counts, and the binary."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steel_ad import config as configs
from steel_ad.data import plates
from steel_ad.errors import InputError
from steel_ad.research import false_alarms

ROOT = Path(__file__).parent.parent
RATES = (0.05, 0.01)


def test_each_picture_is_that_of_its_own_line():
    key, base = jax.random.key(4), plates.LINES["diamond"]
    changes = [{"pitch_px": 20.0, "angle_deg": 50.0, "wear": 0.1}, {"pitch_px": 24.0, "angle_deg": 41.0, "wear": 0.6}]
    values = {name: jnp.asarray([c[name] for c in changes], jnp.float32) for name in changes[0]}
    found = jax.jit(lambda v: plates.render_each(key, base, v, shape=(40, 48)))(values)
    assert found.shape == (2, 40, 48)
    for i, change in enumerate(changes):
        alone = plates.render(key, dataclasses.replace(base, **change), num=2, shape=(40, 48))[i]
        np.testing.assert_allclose(found[i], alone, atol=2e-4)
    with pytest.raises(ValueError, match="blur_px cannot vary"):
        plates.render_each(key, base, {"blur_px": jnp.ones(2)}, shape=(40, 48))


def test_frames_of_a_strip_share_what_the_strip_is():
    rng = np.random.default_rng(0)
    _, own = false_alarms.line(rng, 0, 64)
    groups = np.repeat(np.arange(50), 8)
    found = false_alarms.frames(rng, own, groups)
    assert set(found) == set(own)
    for name in ("light_azimuth_deg", "exposure", "wear", "blotches", "noise"):
        of_strips = found[name].reshape(50, 8)
        assert (of_strips == of_strips[:, :1]).all()
        assert np.unique(of_strips).size == 50
    # As unlike each other as independent plates are.
    spread = found["light_azimuth_deg"].std() / (own["light_spread_deg"] / np.sqrt(3))
    assert spread == pytest.approx(1, abs=0.25)


def test_lines_of_a_pattern_share_their_programs():
    render = jax.jit(false_alarms._render, static_argnames=("recipe", "size"))
    pitches, sizes = [], []
    for number in (0, 3, 6):
        base, own = false_alarms.line(np.random.default_rng(number), number, 32)
        values = {name: jnp.full(2, value, jnp.float32) for name, value in own.items()}
        images = np.asarray(render(jax.random.key(0), base, values, 32))
        assert images.dtype == np.uint8
        sizes.append(render._cache_size())
        pitches.append((own["pitch_px"], own["pitch_px"] * np.tan(np.radians(own["angle_deg"]))))
    assert sizes[0] == sizes[-1]
    assert 3.5 * np.max(pitches) < 32


def simulated(lines, rate_of, *, fresh=5000, n=1999, frames=1, form="confidence", seed=0):
    """Cases whose thresholds have the true rates of exchangeable scores, times `rate_of`."""
    rng = np.random.default_rng(seed)
    found = []
    for line in range(lines):
        for name in ("a", "b", "c"):
            for rate in RATES:
                rank = int(stats.binom.ppf(0.05, n, rate)) if form == "confidence" else round((n + 1) * rate)
                true = rate_of * rng.beta(rank, n + 1 - rank)
                # Frames of a strip alarm together.
                alarms = frames * rng.binomial(1, true, fresh // frames)
                record = {"line": line, "map": name, "plates": "p", "calibrated_on": "one per strip", "form": form}
                record |= {"rate": rate, "promised": rate, "fresh": fresh, "alarms": int(alarms.sum())}
                found.append(record | {"squares": float((alarms**2).sum()), "strips": alarms.size})
    return found


@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("form", ["confidence", "average"])
def test_exchangeable_scores_keep_the_promise_and_an_inflated_rate_breaks_it(form, frames):
    for seed in range(3):
        kept = false_alarms.verdicts(simulated(20, 1.0, form=form, frames=frames, seed=seed))
        assert [v["rate"] for v in kept] == list(RATES)
        assert all(v["kept"] and v["cases"] == 60 for v in kept)
        inflated = simulated(20, 2.5, form=form, frames=frames, seed=seed)
        assert not any(v["kept"] for v in false_alarms.verdicts(inflated))


def test_a_promise_that_is_kept_by_never_alarming_is_not_kept():
    assert not any(v["kept"] for v in false_alarms.verdicts(simulated(20, 0.3, form="average")))
    with pytest.raises(ValueError, match="two lines"):
        false_alarms.verdicts(simulated(1, 1.0))


def test_the_error_of_the_mean_is_that_of_lines_not_of_cases():
    """Detectors that saw the same plates are no further evidence."""
    once = [c for c in simulated(20, 1.0, form="average") if c["map"] == "a"]
    thrice = [{**c, "map": name} for c in once for name in "abc"]
    for one, three in zip(false_alarms.verdicts(once), false_alarms.verdicts(thrice), strict=True):
        assert three["error"] == pytest.approx(one["error"], rel=1e-9)
    rates = np.array([c["alarms"] / c["fresh"] for c in once if c["rate"] == RATES[0]])
    interval = stats.ttest_1samp(rates, 0).confidence_interval(0.95)
    assert false_alarms.verdicts(once)[0]["error"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_the_design_effect_is_one_of_independent_frames_and_the_strip_of_equal_ones():
    assert false_alarms.design_effect(simulated(20, 1.0)) == pytest.approx(1, abs=1e-9)
    assert false_alarms.design_effect(simulated(20, 1.0, frames=8)) == pytest.approx(8, rel=1e-9)
    assert false_alarms.design_effect([{"alarms": 0, "squares": 0.0, "strips": 9, "fresh": 9}]) == 1


def test_cases_count_the_alarms_of_their_thresholds():
    rng = np.random.default_rng(1)
    groups = np.concatenate([np.repeat(np.arange(50), 8), np.arange(50, 400)])
    calibrate, fresh, strips = rng.exponential(size=750), rng.exponential(size=800), np.repeat(np.arange(100), 8)
    found = false_alarms.cases(calibrate, groups, fresh, strips, RATES, seed=0)
    assert [c["count"] for c in found] == [400] * 8
    for case in found:
        above = (fresh > case["threshold"]).reshape(100, 8).sum(1)
        assert (case["alarms"], case["squares"], case["strips"]) == (above.sum(), (above**2).sum(), 100)
        wanted = np.sort(calibrate[:400])[-case["rank"]]
        assert (case["threshold"] == wanted) == (case["calibrated_on"] == "all frames")
        assert case["promised"] == (case["rate"] if case["form"] == "confidence" else case["rank"] / 401)
    single = false_alarms.cases(calibrate, np.arange(750), fresh, np.arange(800), RATES, seed=0)
    assert {c["calibrated_on"] for c in single} == {"one per strip"}


@pytest.mark.slow
def test_the_binary_resumes_and_refuses_what_it_cannot_promise(tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    line = [sys.executable, "-m", "experiments.false_alarms", f"--out={out}", "--lines=2", "--fresh=64"]
    line += ["--calibration=64", "--rates=0.05", "--maps=phase_only", "--size=48"]
    line += [f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"]
    started = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert started.returncode == 0, started.stderr
    assert "one per strip" in started.stdout
    assert out.with_suffix(".png").exists()
    found = json.loads(out.read_text())
    # Plates of both kinds, and strips' frames taken as independent, in two forms each.
    assert [len(record["cases"]) for record in found["lines"]] == [6, 6]
    assert len(found["verdicts"]) == 6

    monkeypatch.setattr(false_alarms._Simulation, "line", lambda *_: pytest.fail("a finished line was simulated again"))
    same = configs.FalseAlarms(lines=2, fresh=64, calibration=64, rates=(0.05,), maps=("phase_only",), size=48)
    assert false_alarms.run(same, out) == found
    for change, said in (
        ({"fresh": 65}, "other settings"),
        ({"rates": (0.01,)}, "it takes 299"),
        ({"maps": ("fase",)}, "there is no detector 'fase'"),
    ):
        with pytest.raises(InputError, match=said):
            false_alarms.run(dataclasses.replace(same, **change), out if "fresh" in change else tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("lines", 1, "at least 2"), ("fresh", 0, "at least 1"), ("calibration", 0, "at least 1")),
        *(("size", 47, "at least 48"), ("seed", -1, "at least 0")),
        *(("rates", r, "numbers between 0 and 1") for r in ((), (0.0,), (1.0,), (0.1, 5.0))),
        *(("maps", m, "each once") for m in ((), ("lattice", "lattice"))),
    ],
)
def test_what_cannot_be_simulated(name, value, said):
    with pytest.raises(InputError, match=f"--{name}=.* must be .*{said}"):
        configs.FalseAlarms(**{name: value})

"""Drift is noticed within the tiles that are promised, and warnings without drift are as rare as promised."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steel_ad import config as configs
from steel_ad.data import folders, plates
from steel_ad.detectors import Detector, Fitted
from steel_ad.inspection import drift
from steel_ad.inspection import session as inspection


def draw(rng, n):
    """Scores with a long tail, brightness and contrast, tied as the grey levels of a camera may be; a pattern not everywhere."""
    clear = rng.random(n) < 0.8
    return {
        "score": rng.lognormal(0, 0.4, n),
        "brightness": np.round(rng.normal(97, 4, n), 1),
        "contrast": rng.gamma(20, 1, n),
        "pitch across": np.where(clear, rng.normal(50, 0.4, n), np.nan),
        "pitch along": np.where(clear, rng.uniform(56, 58, n), np.nan),
    }


def test_false_warnings_are_as_rare_as_promised():
    rng, rate, blocks, runs = np.random.default_rng(0), 0.05, 8, 40
    warned = 0
    for _ in range(runs):
        good, values = draw(rng, 150), draw(rng, blocks * 32)
        warned += sum(
            bool(drift.moved({k: v[: 32 * i] for k, v in values.items()}, good, rate=rate, block=32))
            for i in range(1, blocks + 1)
        )
    # Windows overlap and share a calibration: the deviation is at most that of one draw in eight.
    assert 0.3 * rate < warned / (runs * blocks) < rate + 3 * np.sqrt(rate / (runs * blocks / 8))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", lambda v: 0.95 * v),
        ("score", lambda v: v * np.exp(0.5 * 0.4)),
        ("contrast", lambda v: v + 0.5 * np.sqrt(20)),
        ("pitch across", lambda v: 1.005 * v),
        ("pitch along", lambda v: np.where(np.arange(256) % 2, v + 0.6, np.nan)),
    ],
)
def test_a_small_shift_is_noticed_within_256_tiles_and_named(name, change):
    noticed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        good, values = draw(rng, 400), draw(rng, 512)
        values[name][256:] = change(values[name][256:])
        found = drift.history(values, good)
        noticed += [w.quantity for w in found] == [name] and 256 < found[0].last <= 512
        if found:
            word = "fell" if name == "brightness" else "rose"
            assert f"{name} {word} from" in str(found[0])
    assert noticed >= 19


def test_a_few_defects_are_no_drift():
    warned = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        good, values = draw(rng, 200), draw(rng, 256)
        values["score"][rng.choice(256, 8, replace=False)] += 100
        values["contrast"][rng.choice(256, 8, replace=False)] += 100
        warned += bool(drift.history(values, good))
    assert warned <= 1


def test_the_test_is_the_rank_sum_of_the_newest_tiles():
    rng = np.random.default_rng(3)
    good, values = {"score": rng.normal(size=50)}, {"score": rng.normal(size=96)}
    values["score"][64:] += 2
    (found,) = drift.moved(values, good, block=32)
    assert (found.first, found.last) == (64, 96)
    u = (values["score"][64:, None] > good["score"]).sum()
    z = (u - 16 * 50 - 0.5) / np.sqrt(32 * 50 * 83 / 12)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(z), rel=1e-9)
    assert found.median == np.median(values["score"][64:])
    # The same drift over the last four blocks, but not between two ends.
    assert drift.moved({"score": values["score"][:95]}, good, block=32) == []
    assert drift.moved({"score": np.full(64, 3.0)}, {"score": np.full(9, 3.0)}) == []
    # Tiles without a number say nothing.
    some = {"score": values["score"].copy()}
    some["score"][70] = np.nan
    (found,) = drift.moved(some, {"score": np.append(good["score"], np.nan)}, block=32)
    u -= (values["score"][70] > good["score"]).sum()
    z = (u - 31 * 25 - 0.5) / np.sqrt(31 * 50 * 82 / 12)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(z), rel=1e-9)
    assert found.median == np.nanmedian(some["score"][64:])
    for name in ("good", "values"):
        none = {"good": good, "values": values, name: {"score": np.full(96, np.nan)}}
        assert drift.moved(none["values"], none["good"], block=32) == []
    with pytest.raises(ValueError, match="do not match"):
        drift.moved({"score": [1.0]}, {"brightness": [1.0]})


def test_brightness_and_contrast_are_mean_and_deviation():
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 20)).astype(np.uint8)
    found = drift.measure(tiles, None)
    assert list(found) == ["brightness", "contrast"]
    np.testing.assert_allclose(found["brightness"], tiles.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found["contrast"], tiles.std((1, 2)), rtol=1e-12)
    assert drift.measure(np.full((1, 5, 5), 255, np.uint8), None)["contrast"] == [0.0]
    assert drift.measure(np.zeros((0, 5, 5), np.uint8), None)["brightness"].size == 0


def waves(rng, across, along, shape=(96, 96)):
    """A pattern that repeats after so many pixels, at a random place, under noise."""
    (y, x), (a, b) = np.indices(shape), rng.uniform(0, 2 * np.pi, 2)
    wave = np.cos(2 * np.pi * x / across + a) + np.cos(2 * np.pi * y / along + b)
    return np.round(128 + 30 * wave + rng.normal(0, 8, shape)).astype(np.uint8)


def test_pitches_are_those_of_the_tile_and_none_where_there_is_no_pattern():
    rng = np.random.default_rng(0)
    lattice = drift.pattern(np.stack([waves(rng, 12, 14) for _ in range(4)]))
    pitches = [(12, 14), (12.24, 14), (12, 13.5), (11.2, 13.0), (13.0, 15.1)]
    found = drift.measure(np.stack([waves(rng, *p) for p in pitches]), lattice)
    np.testing.assert_allclose(found["pitch across"], [p[0] for p in pitches], atol=0.08)
    np.testing.assert_allclose(found["pitch along"], [p[1] for p in pitches], atol=0.08)
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8), (96, 96))
    nothing = [rng.integers(0, 256, (96, 96)).astype(np.uint8), np.full((96, 96), 9, np.uint8), ramp]
    found = drift.measure(np.stack(nothing), lattice)
    assert np.isnan([found[name] for name in drift.PITCHES]).all()
    assert drift.pattern(np.stack(nothing[:2])) is None
    assert drift.pattern(np.zeros((0, 96, 96), np.uint8)) is drift.pattern(np.zeros((3, 60, 96), np.uint8)) is None
    assert drift.measure(np.zeros((0, 96, 96), np.uint8), lattice)["pitch along"].shape == (0,)


def test_pitch_is_that_of_the_repeat_along_an_axis_whatever_vectors_span_the_lattice():
    # Diamonds: both vectors are oblique, and their sum and difference are not.
    diamonds = np.array([[10.0, 8.0], [10.0, -8.0]])
    assert np.abs(drift._repeat(diamonds, 0) @ diamonds).tolist() == [20, 0]
    assert np.abs(drift._repeat(diamonds, 1) @ diamonds).tolist() == [0, 16]
    turned = np.array([[2.0, 20.0], [30.0, -3.0]])
    assert (drift._repeat(turned, 1) @ turned).tolist() == [2, 20]
    assert (drift._repeat(turned, 0) @ turned).tolist() == [30, -3]


@pytest.mark.slow
def test_a_pitch_that_is_one_percent_off_is_named_within_48_plates():
    """Every plate's own pitch varies by +-1.5 %; the encoder's fault changes the pitch along alone."""
    line = plates.LINES["teardrop1"]
    small = {"pitch_px": 25.0, "lug_length_px": 20.5, "lug_width_px": 6.5, "flank_px": 2.4, "lug_height_px": 1.7}
    encoder = np.degrees(np.arctan(1.02 * np.tan(np.radians(line.angle_deg))))
    kinds = [small, small, {**small, "pitch_px": 25.25}, {**small, "angle_deg": encoder}]
    values = {
        name: jnp.asarray(np.repeat([k.get(name, getattr(line, name)) for k in kinds], 48), jnp.float32)
        for name in (*small, "angle_deg")
    }
    images = np.asarray(plates.to_uint8(plates.render_each(jax.random.key(0), line, values, shape=(96, 96))))
    lattice = drift.pattern(images[:16])
    good, same, larger, faster = (drift.measure(plates_of, lattice) for plates_of in np.split(images, 4))
    assert not np.isnan(good["pitch along"]).any()
    named = [{one.quantity for one in drift.moved(seen, good, block=48)} for seen in (same, larger, faster)]
    assert named == [set(), {"pitch across", "pitch along"}, {"pitch along"}]
    across = next(one for one in drift.moved(larger, good, block=48) if one.quantity == "pitch across")
    assert across.good_median == pytest.approx(25, abs=0.15)
    assert across.median == pytest.approx(25.25, abs=0.15)


class Blind(Detector):
    """A detector that sees nothing."""

    name, least_px = "blind", 16

    def fit(self, images):
        return {}

    def residual(self, state, image):
        return jnp.zeros_like(image)


BLIND = Fitted(Blind(), {}, 0, None, "a run", {}, frozenset())


def test_an_inspection_says_what_moved_also_after_an_interruption(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    for i in range(60):
        folders.write_image(
            tmp_path / "good" / f"{i}.png", rng.normal(100 + rng.normal(0, 4), 6, (16, 16)).astype(np.uint8)
        )
    tiles = rng.normal(100 + rng.normal(0, 4, (128, 2, 1, 1)), 6, (128, 2, 16, 16))
    tiles[64:] -= 5
    strip = tiles.transpose(0, 2, 1, 3).reshape(2048, 32).astype(np.uint8)
    (tmp_path / "strips").mkdir()
    folders.write_image(tmp_path / "strips" / "a.png", strip)
    config = configs.Inspection(tile_px=16, halo_px=0, false_alarm_rate=0.1, strip=True)

    def inspect():
        arguments = {"source": str(tmp_path / "strips"), "calibrate_on": str(tmp_path / "good")}
        return inspection.run(config, BLIND, out=tmp_path / "out", **arguments)

    found = inspect()
    (sentence,) = found["drift"]
    assert sentence.startswith("brightness fell from 99")
    assert "in tiles 64 to 127" in sentence
    assert f"warning: {sentence}\n" in capsys.readouterr().out
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    # Again from the 100th band on.
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:100]))
    (tmp_path / "out" / "summary.json").unlink()
    assert inspect()["drift"] == [sentence]


def test_an_inspection_tells_of_the_pitch_and_passes_over_tiles_without_a_pattern(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    for i in range(20):
        folders.write_image(tmp_path / "good" / f"{i:02d}.png", waves(rng, 12 + rng.normal(0, 0.05), 12, (64, 64)))
    strip = np.concatenate([waves(rng, 12 + rng.normal(0, 0.05), 12.5, (64, 64)) for _ in range(64)])
    strip[64 * 5 : 64 * 9] = 128
    (tmp_path / "strips").mkdir()
    folders.write_image(tmp_path / "strips" / "a.png", strip)
    config = configs.Inspection(tile_px=64, halo_px=0, false_alarm_rate=0.1, strip=True)
    arguments = {"source": str(tmp_path / "strips"), "calibrate_on": str(tmp_path / "good")}
    found = inspection.run(config, BLIND, out=tmp_path / "out", **arguments)
    (sentence,) = [s for s in found["drift"] if "pitch" in s]
    said = re.match(r"pitch along rose from (\S+) px at calibration to (\S+) px in tiles 0 to 63 ", sentence)
    assert [float(pitch) for pitch in said.groups()] == pytest.approx([12, 12.5], abs=0.06)
    lines = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert [k for k, line in enumerate(lines[:-1]) if line["drawn"]["pitch along"] is None] == [5, 6, 7, 8]
    (tmp_path / "out" / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:20]))
    (tmp_path / "out" / "summary.json").unlink()
    assert inspection.run(config, BLIND, out=tmp_path / "out", **arguments)["drift"] == found["drift"]

"""Drift is noticed within the tiles that are promised, and warnings without drift are as rare as promised."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steel_ad import config as configs
from steel_ad.data import folders
from steel_ad.inspection import drift
from steel_ad.studies import inspection, trained
from steel_ad.studies.trained import Trained


def draw(rng, n):
    """Scores with a long tail, brightness and contrast, tied as the grey levels of a camera may be."""
    return {
        "score": rng.lognormal(0, 0.4, n),
        "brightness": np.round(rng.normal(97, 4, n), 1),
        "contrast": rng.gamma(20, 1, n),
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
    with pytest.raises(ValueError, match="do not match"):
        drift.moved({"score": [1.0]}, {"brightness": [1.0]})


def test_brightness_and_contrast_are_mean_and_deviation():
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 20)).astype(np.uint8)
    found = drift.measure(tiles)
    np.testing.assert_allclose(found["brightness"], tiles.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found["contrast"], tiles.std((1, 2)), rtol=1e-12)
    assert drift.measure(np.full((1, 5, 5), 255, np.uint8))["contrast"] == [0.0]
    assert drift.measure(np.zeros((0, 5, 5), np.uint8))["brightness"].size == 0


class Blind:
    """A detector that sees nothing."""

    def residual(self, state, image):
        return jnp.zeros_like(image)


def test_an_inspection_says_what_moved_also_after_an_interruption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load", lambda *_: Trained(Blind(), {}, 0, 16, None, {}, "", frozenset()))
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
        arguments = {"model": tmp_path, "source": str(tmp_path / "strips"), "calibrate_on": str(tmp_path / "good")}
        return inspection.run(config, out=tmp_path / "out", **arguments)

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

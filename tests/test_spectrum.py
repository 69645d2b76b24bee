"""Spectra against numpy, lattices against the renderer's, the three detectors, and the binary as a user meets it."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from steel_ad import config as configs
from steel_ad.data import plates
from steel_ad.detectors import lattice as lattice_detector
from steel_ad.detectors.lattice import LatticeDetector
from steel_ad.detectors.phase_only import PhaseOnlyDetector
from steel_ad.detectors.whitening import WhiteningDetector
from steel_ad.errors import InputError
from steel_ad.ops import filters, spectrum
from steel_ad.runs import spectrum as study
from steel_ad.runs.run import Run

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(5)
IMAGE = RNG.random((40, 51)).astype(np.float32)


def naive_dft(image):
    """The centred DFT by its definition, in float64."""
    h, w = image.shape
    rows, columns = (np.exp(-2j * np.pi * np.outer(np.arange(n) - n // 2, np.arange(n)) / n) for n in (h, w))
    return rows @ image.astype(np.float64) @ columns.T


def test_spectra_are_those_of_the_definition():
    expected = naive_dft(IMAGE)
    np.testing.assert_allclose(spectrum.log_amplitude(jnp.asarray(IMAGE)), np.log1p(np.abs(expected)), atol=1e-4)
    found = np.asarray(spectrum.phase(jnp.asarray(IMAGE)))
    np.testing.assert_allclose(np.abs(expected) * np.exp(1j * found), expected, atol=2e-3)
    # atan2, not atan: half of the phases lie in the left half plane.
    assert (np.abs(found) > np.pi / 2).mean() > 0.3


def test_mean_amplitude_is_that_of_windowed_images():
    images = RNG.random((3, 16, 21)).astype(np.float32)
    hann = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (16, 21)))
    expected = np.mean([np.abs(naive_dft((i - np.float64(i.mean())) * hann)) for i in images], axis=0)
    half = spectrum.mean_amplitude(jnp.asarray(images))
    np.testing.assert_allclose(spectrum.centred(half, 21), expected, atol=1e-4)
    half = spectrum.mean_amplitude(jnp.asarray(images[:, :, :20]))
    assert spectrum.centred(half, 20).shape == (16, 20)


def test_box_mean_and_samples_are_scipys():
    from scipy import ndimage

    x = IMAGE.astype(np.float64)
    for size in (7, 37, 63):
        found = jax.jit(filters.box_mean, static_argnums=1)(jnp.asarray(IMAGE), size)
        np.testing.assert_allclose(found, ndimage.uniform_filter(x, size, mode="mirror"), atol=1e-5)
    places = RNG.uniform(-2, 55, (2, 9, 5)).astype(np.float32)
    expected = ndimage.map_coordinates(x, places, order=1, mode="nearest")
    np.testing.assert_allclose(filters.sample(jnp.asarray(IMAGE), *jnp.asarray(places)), expected, atol=1e-4)
    with pytest.raises(ValueError, match="must be odd"):
        filters.box_mean(jnp.asarray(IMAGE), 8)
    with pytest.raises(ValueError, match="at most 79"):
        filters.box_mean(jnp.asarray(IMAGE), 81)


def test_autocorrelation_is_the_mean_product_at_each_lag():
    x = IMAGE.astype(np.float64)
    x = x - np.asarray(filters.box_mean(jnp.asarray(IMAGE), 11), np.float64)
    x = x - x.mean()
    found = np.asarray(spectrum.autocorrelation(jnp.asarray(IMAGE)))
    assert found.shape == (41, 51)
    for dy, dx in [(0, 0), (1, 0), (0, 1), (7, -4), (20, 25), (-20, 3)]:
        h, w = x.shape
        a = x[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
        b = x[max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)]
        assert found[20 + dy, 25 + dx] == pytest.approx((a * b).mean() / (x * x).mean(), abs=1e-4)
    np.testing.assert_allclose(found, found[::-1, ::-1], atol=1e-5)
    flat = np.asarray(spectrum.autocorrelation(jnp.full((40, 40), 0.7)))
    assert flat[20, 20] == 1
    assert np.abs(np.delete(flat.ravel(), 20 * 41 + 20)).max() < 1e-3
    with pytest.raises(ValueError, match="at least 32x32"):
        spectrum.autocorrelation(jnp.zeros((31, 64)))


def same_lattice(found, true):
    """The true vectors' relative errors, as integer combinations of the found ones; None where it is another lattice."""
    steps = np.round(true @ np.linalg.inv(found))
    if abs(round(np.linalg.det(steps))) != 1:
        return None
    return np.linalg.norm(true - steps @ found, axis=1) / np.linalg.norm(true, axis=1)


def random_line(name):
    """Every picture of it is a plate of another line: pitch +-25 %, turned by up to 8 degrees, lit from anywhere."""
    line = plates.LINES[name]
    lengths = ("pitch_px", "lug_length_px", "lug_width_px", "lug_height_px", "flank_px")
    small = {length: 0.75 * getattr(line, length) for length in lengths}
    return dataclasses.replace(line, pitch_jitter=0.25, rotation_jitter_deg=8.0, light_spread_deg=60.0, **small)


@pytest.mark.parametrize(("name", "num"), [("teardrop1", 7), ("teardrop4", 7), ("diamond", 6)])
def test_lattices_of_twenty_random_plates(name, num):
    line, key = random_line(name), jax.random.key(3)
    images = plates.render(key, line, size=192, num=num)
    for i, image in enumerate(images):
        found = spectrum.read_lattice(spectrum.autocorrelation(image))
        true = np.asarray(plates.lattice(key, line, i), np.float64)
        errors = same_lattice(np.float64(found.vectors), true)
        assert errors is not None, f"{found.vectors} is another lattice than {true}"
        assert errors.max() < 0.02


def dots(vectors, shape=(128, 150)):
    """Bright dots on a lattice, by its definition."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    at = np.stack([y, x], -1) @ np.linalg.inv(np.float64(vectors))
    away = (at - np.round(at)) @ np.float64(vectors)
    return jnp.asarray(0.3 + 0.4 * np.exp(-(away**2).sum(-1) / 18), jnp.float32)


def test_the_lattice_is_exact_on_exact_dots():
    vectors = np.array([[3.3, 24.6], [20.4, -5.2]])
    found = spectrum.read_lattice(spectrum.autocorrelation(dots(vectors)))
    np.testing.assert_allclose(found.vectors, spectrum.reduced(vectors), atol=0.05)
    assert found.echo > 0.9
    rows = spectrum.pitch_and_angle(found)
    assert rows[0]["pitch_px"] == pytest.approx(np.hypot(3.3, 24.6), abs=0.05)
    assert rows[0]["angle_deg"] == pytest.approx(np.degrees(np.arctan2(3.3, 24.6)), abs=0.1)
    assert 0 < rows[0]["pitch_error_px"] < 0.2
    # A neighbour's lattice is drawn to this one's.
    near = spectrum.refine_lattice(spectrum.autocorrelation(dots(vectors)), jnp.asarray(vectors * 1.05, jnp.float32))
    np.testing.assert_allclose(near.vectors, vectors, atol=0.05)


def test_too_few_peaks_tell_no_error():
    """Of a pattern with a single repeat within the lags there is no error to be read: none is stated."""
    vectors = np.array([[0.0, 40.0], [45.0, 0.0]])
    near = spectrum.autocorrelation(dots(vectors, (96, 100)))
    found = spectrum.refine_lattice(near, jnp.asarray(vectors, jnp.float32), order=1)
    assert np.isinf(np.asarray(found.deviation)).all()
    rows = spectrum.pitch_and_angle(found)
    assert np.isinf([r[k] for r in rows for k in ("pitch_error_px", "angle_error_deg")]).all()
    record = {"dataset": "x", "lattice": {"vectors": rows, "echo": 0.5}}
    assert [r["pitch_error_px"] for r in study.lattice_rows({Path("x"): (record, False)})] == [None, None]


def test_whitening_of_flat_plates_is_finite():
    detector = WhiteningDetector(32, 5, 2)
    state = detector.fit([np.full((64, 64), 9, np.uint8)] * 2)
    assert np.isfinite(np.asarray(detector.residual(state, jnp.full((64, 64), 9 / 255, jnp.float32)))).all()


def test_a_basis_is_reduced_to_its_lattices_shortest():
    for across in (4.0, -4.0):
        short = np.array([[1.0, 30.0], [20.0, across]])
        for mix in ([[1, 3], [0, 1]], [[2, 1], [1, 1]], [[-1, 0], [5, 1]]):
            for scale in (1, 0.01):
                np.testing.assert_allclose(spectrum.reduced(scale * np.array(mix) @ short), scale * short, atol=1e-9)


def test_what_does_not_repeat_has_no_lattice():
    assert spectrum.read_lattice(spectrum.autocorrelation(jnp.asarray(RNG.random((96, 96)), jnp.float32))) is None
    assert spectrum.read_lattice(spectrum.autocorrelation(jnp.full((96, 96), 0.5))) is None
    stripes = jnp.broadcast_to(jnp.asarray(np.sin(np.arange(96) / 3), jnp.float32), (96, 96))
    assert spectrum.read_lattice(spectrum.autocorrelation(stripes)) is None
    with pytest.raises(InputError, match="no pattern that repeats"):
        LatticeDetector().fit([np.full((64, 64), 9, np.uint8)])


def test_median_by_halving_is_numpys():
    values = RNG.normal(size=(9, 50)).astype(np.float32)
    valid = RNG.random((9, 50)) < 0.7
    valid[:, 0] = False
    found = np.asarray(lattice_detector._median(jnp.asarray(values), jnp.asarray(valid)))
    assert found[0] == 0
    for k in range(1, 50):
        kept = np.sort(values[valid[:, k], k])
        assert found[k] == pytest.approx(kept[(len(kept) - 1) // 2], abs=1e-3)


DETECTORS = {
    "phase_only": PhaseOnlyDetector(7),
    "whitening": WhiteningDetector(48, 7, 4),
    "lattice": LatticeDetector(4, whitening=WhiteningDetector(48, 7, 4)),
}


@pytest.fixture(scope="module")
def line():
    """Good plates of a quick line; one more, and the same one with a dark spot."""
    recipe = dataclasses.replace(plates.LINES["teardrop2"], pitch_px=24.0, lug_length_px=17.0, lug_width_px=6.5)
    images = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), recipe, shape=(96, 120), num=5)))
    y, x = np.mgrid[:96, :120]
    spot = (y - 40) ** 2 + (x - 70) ** 2 <= 16
    good = images[4].astype(np.float32) / 255
    return list(images[:4]), good, np.where(spot, 0.4 * good, good), spot


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_finds_a_spot(name, line):
    images, good, bad, spot = line
    detector = DETECTORS[name]
    state = detector.fit(images)
    before, after = np.asarray(
        jax.jit(jax.vmap(detector.residual, in_axes=(None, 0)))(state, jnp.stack([jnp.asarray(good), jnp.asarray(bad)]))
    )
    assert before.shape == good.shape
    assert before.dtype == np.float32
    assert np.isfinite(after).all()
    assert after[spot].mean() > 1.5 * before[spot].mean()
    peak = np.unravel_index(after.argmax(), after.shape)
    assert np.hypot(peak[0] - 40, peak[1] - 70) < 12
    far = np.hypot(*(np.indices(good.shape) - np.array([40, 70])[:, None, None])) > 60
    np.testing.assert_allclose(after[far].mean(), before[far].mean(), rtol=0.2)


def test_phase_only_ignores_gain_and_has_mean_square_one(line):
    _, _, bad, _ = line
    detector = PhaseOnlyDetector(1)
    found = np.asarray(detector.residual({}, jnp.asarray(bad)))
    assert (found**2).mean() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(detector.residual({}, 0.5 * jnp.asarray(bad)), found, atol=1e-2)


def test_whitened_noise_of_the_lines_spectrum_is_flat():
    """The residual of images whose spectrum is the line's own has the same energy everywhere."""
    noise = np.clip(128 + 30 * np.random.default_rng(0).normal(size=(6, 96, 96)), 0, 255).astype(np.uint8)
    detector = WhiteningDetector(32, 9, 6)
    state = detector.fit(list(noise))
    found = np.asarray(detector.residual(state, jnp.asarray(noise[0], jnp.float32) / 255))
    inner = found[16:-16, 16:-16]
    assert inner.std() < 0.2 * inner.mean()


def lattice_residual_by_definition(detector, cell, vectors, image):
    """Without the whitened energy, in float64: every repeat of every place of the cell, gone through one by one."""
    h, w = image.shape
    first, second = (np.hypot(*vector) for vector in cell)
    n, m = max(4, round(first)), max(4, round(second))

    def mean(x, size):
        return ndimage.uniform_filter(x, size, mode="mirror")

    def odd(pitches):
        size = 2 * round((pitches * (first + second) / 2 - 1) / 2) + 1
        return min(size, 2 * ((min(h, w) - 1) // 2) - 1)

    def at(x, places):
        return ndimage.map_coordinates(x, np.moveaxis(places, -1, 0), order=1, mode="nearest")

    x = mean(mean(image.astype(np.float64), 3), 3)
    x = x - mean(x, odd(detector.background))
    middle = np.array([(h - 1) / 2, (w - 1) / 2])
    cells = np.moveaxis(np.mgrid[-20:21, -20:21], 0, -1).reshape(-1, 2)
    typical, spread = np.zeros((n, m)), np.zeros((n, m))
    for i, j in np.ndindex(n, m):
        places = (cells + np.array([i / n, j / m])) @ vectors + middle
        places = places[((places >= 0) & (places <= 2 * middle)).all(1)]
        # The lower one of two in the middle.
        values = at(x, places)
        typical[i, j] = np.sort(values)[(len(values) - 1) // 2]
        spread[i, j] = np.sort(np.abs(values - typical[i, j]))[(len(values) - 1) // 2]
    for _ in range(2):
        spread = ndimage.uniform_filter(spread, 3, mode="wrap")
    spread = spread + detector.floor * spread.mean() + 1e-4
    inside = (np.moveaxis(np.mgrid[:h, :w], 0, -1) - middle) @ np.linalg.inv(vectors)
    inside = (inside - np.floor(inside)) * np.array([n, m])
    expected, scale = (at(np.pad(c, [(0, 1), (0, 1)], mode="wrap"), inside) for c in (typical, spread))
    return np.sqrt(mean(((x - expected) / scale) ** 2, odd(detector.window)))


def test_the_lattices_comparison_of_repeats_is_that_of_its_definition(line):
    images, _, bad, _ = line
    detector = dataclasses.replace(DETECTORS["lattice"], background=2.5, window=0.4, floor=0.3, detail=0.75)
    state = detector.fit(images)
    image = jnp.asarray(bad)
    vectors = np.asarray(spectrum.refine_lattice(spectrum.autocorrelation(image), state.vectors).vectors, np.float64)
    expected = lattice_residual_by_definition(detector, state.cell, vectors, bad)
    against_line, coarse, energy = map(np.asarray, detector.parts(state, image))
    # A repeat that lies on the image's edge counts or not, as rounding has it; that moves the medians of some places of the cell.
    np.testing.assert_allclose(coarse, expected, rtol=0.03)
    assert np.median(np.abs(coarse / expected - 1)) < 2e-3
    np.testing.assert_allclose(energy, detector.whitening.residual(state.amplitude, image), rtol=1e-5)
    levels = np.asarray(state.levels)
    whole = (against_line / levels[0] + coarse / levels[1] + 0.75 * energy / levels[2]) / 2.75
    np.testing.assert_allclose(np.asarray(detector.residual(state, image)), whole, rtol=1e-4)


def test_lattice_deviation_ignores_gain_and_offset(line):
    images, _, bad, _ = line
    detector = dataclasses.replace(DETECTORS["lattice"], detail=0.0)
    state = detector.fit(images)
    residual = jax.jit(detector.residual)
    found = np.asarray(residual(state, jnp.asarray(bad)))
    other = np.asarray(residual(state, 0.6 * jnp.asarray(bad) + 0.1))
    np.testing.assert_allclose(other, found, rtol=0.05, atol=0.1)


@pytest.fixture(scope="module")
def few_repeats():
    """Plates of a line that shows 1.6 repeats across and 1.4 along."""
    recipe = dataclasses.replace(plates.LINES["teardrop2"], pitch_px=60.0, lug_length_px=42.0, lug_width_px=16.0)
    return np.asarray(plates.to_uint8(plates.render(jax.random.key(3), recipe, shape=(96, 96), num=33)))


def test_little_more_than_one_repeat_is_enough(few_repeats):
    """The line's cell says what a plate should look like where the image itself has nothing to compare it with."""
    detector = LatticeDetector(8, whitening=WhiteningDetector(48, 7, 4))
    state = detector.fit(list(few_repeats[:32]))
    assert not state.repeats
    assert np.hypot(*np.asarray(state.vectors[0])) == pytest.approx(60, abs=1.5)
    good = few_repeats[32].astype(np.float32) / 255
    y, x = np.mgrid[:96, :96]
    spot = (y - 40) ** 2 + (x - 30) ** 2 <= 25
    residual = jax.jit(detector.residual)
    before, after = (np.asarray(residual(state, jnp.asarray(i))) for i in (good, np.where(spot, good - 0.12, good)))
    peak = np.unravel_index(after.argmax(), after.shape)
    assert np.hypot(peak[0] - 40, peak[1] - 30) < 10
    assert after.max() > 1.5 * before.max()
    again = detector.from_arrays(detector.to_arrays(state))
    np.testing.assert_allclose(residual(again, jnp.asarray(good)), before, rtol=1e-5)


def test_another_state_of_the_same_shape_does_not_compile_again(line):
    images, good, _, _ = line
    detector = DETECTORS["lattice"]
    state = detector.fit(images)
    program = jax.jit(detector.residual)
    program(state, jnp.asarray(good))
    program(dataclasses.replace(state, vectors=state.vectors * 1.01), jnp.asarray(good))
    assert program._cache_size() == 1


# The binary.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "line"
    recipe = dataclasses.replace(plates.LINES["teardrop2"], pitch_px=20.0, lug_length_px=14.0, lug_width_px=5.5)
    good = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), recipe, size=64, num=6)))
    bad, masks = plates.render_defective(jax.random.key(1), recipe, "spot", size=64, num=2)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i in range(5):
        write(root / "train" / "good" / f"{i}.png", good[i])
    write(root / "test" / "good" / "0.png", good[5])
    for i, (image, mask) in enumerate(zip(np.asarray(plates.to_uint8(bad)), np.asarray(masks), strict=True)):
        write(root / "test" / "spot" / f"{i}.png", image)
        write(root / "ground_truth" / "spot" / f"{i}_mask.png", mask.astype(np.uint8) * 255)
    return root


def start(*arguments):
    line = [sys.executable, "-m", "experiments.spectrum", "--config=configs/spectrum.py:tiny"]
    line += [f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_binary_leaves_what_the_readme_promises_and_says_when_it_is_done(data, tmp_path):
    workdir = tmp_path / "w"
    result = start(f"--data={data}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "pixel_auroc" in result.stdout
    assert "pitch_px" in result.stdout
    record = json.loads((workdir / "metrics.json").read_text())
    assert set(record["maps"]) == {"phase_only", "whitening", "lattice"}
    assert record["images"] == {"train": 4, "validation": 1, "test": 3}
    assert [v["pitch_px"] for v in record["lattice"]["vectors"]] == pytest.approx([20, 20], rel=0.03)
    rows = list(csv.DictReader((workdir / "scores.csv").read_text().splitlines()))
    assert [r["image"] for r in rows] == ["good/0.png", "spot/0.png", "spot/1.png"]
    pictures = {p.name for p in (workdir / "figures").iterdir()}
    each = {f"{kind}_{name}.png" for kind in ("examples", "scores") for name in record["maps"]}
    assert pictures == {"spectra.png", "phases.png", "curves.png", *each}

    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    again = start(f"--data={data}", f"--workdir={workdir}")
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def tiny(**settings):
    from configs.spectrum import PRESETS

    return configs.Spectrum(**{**PRESETS["tiny"], **settings})


@pytest.mark.slow
def test_several_data_sets_have_a_folder_each_and_one_figure(data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        image = np.full((64, 64), 90 + i, np.uint8) + RNG.integers(0, 9, (64, 64), dtype=np.uint8)
        assert cv2.imwrite(str(other / f"{i}.png"), image)
    workdir = tmp_path / "w"
    results = study.run(tiny(maps=("phase_only",)), data=[str(data), str(other)], workdir=workdir)
    assert list(results) == [workdir / "line", workdir / "other"]
    assert (workdir / "figures" / "spectra.png").exists()
    assert not (workdir / "metrics.json").exists()
    # Without test images there are thresholds; without a pattern no lattice.
    record = json.loads((workdir / "other" / "metrics.json").read_text())
    assert record["maps"] == {}
    assert record["thresholds"]["phase_only"]["pixel"] > 0
    assert record["lattice"] is None
    assert [r["data"] for r in study.lattice_rows(results)] == ["line", "line", "other", "other"]
    with pytest.raises(InputError, match="another config, which differs in maps"):
        study.run(tiny(), data=[str(data), str(other)], workdir=workdir)
    with pytest.raises(InputError, match="same name"):
        study.run(tiny(), data=[str(data), str(data)], workdir=tmp_path / "v")
    with pytest.raises(InputError, match=r"no pattern.*--config.maps=phase_only,whitening"):
        study.run(tiny(maps=("lattice",)), data=[str(other)], workdir=tmp_path / "u")
    assert not (tmp_path / "u").exists()
    # Beside others it is left out.
    study.run(tiny(maps=("lattice", "phase_only")), data=[str(other)], workdir=tmp_path / "u")
    assert Run.open(tmp_path / "u").detector().detector.name == "phase_only"
    with pytest.raises(InputError, match="there is no fitted detector"):
        Run.open(tmp_path / "u").detector("lattice")
    # The figure of these two is none of another two.
    before = (workdir / "figures" / "spectra.png").stat().st_mtime_ns
    study.run(tiny(maps=("phase_only",)), data=[str(data), str(other)], workdir=workdir)
    assert (workdir / "figures" / "spectra.png").stat().st_mtime_ns > before


def test_wrong_input_ends_in_one_sentence(data, tmp_path):
    cases = {
        "must be even": {"tile": 15},
        "must be odd": {"smoothing_px": 4},
        "no detector 'ssim': use one of phase_only, whitening, lattice": {"maps": ("ssim",)},
        "64x64 pixels, smaller than the 128 that the map whitening needs": {"tile": 128},
        "smaller than the 65 that the map phase_only needs": {"smoothing_px": 65},
    }
    for sentence, settings in cases.items():
        with pytest.raises(InputError, match=sentence):
            study.run(tiny(**settings), data=[str(data)], workdir=tmp_path / "w")
    result = start("--loss_option=a=1", f"--data={data}", f"--workdir={tmp_path / 'w'}")
    assert result.returncode == 2
    assert "loss_option" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()


def test_the_mean_spectrum_of_equal_images_is_that_of_one():
    image = np.random.default_rng(3).integers(0, 255, (48, 48), np.uint8)
    one, three = (WhiteningDetector(48).fit([image] * n)["amplitude"] for n in (1, 3))
    np.testing.assert_allclose(one, three, rtol=1e-5)
    centred = image / 255 - np.mean(image / 255)
    expected = np.abs(np.fft.rfft2(centred * np.outer(*[np.sin(np.pi * (np.arange(48) + 0.5) / 48) ** 2] * 2)))
    assert np.corrcoef(np.ravel(one), expected.ravel())[0, 1] > 0.99
    assert np.mean(one) == pytest.approx(expected.mean(), rel=0.05)

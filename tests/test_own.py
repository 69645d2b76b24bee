"""A user's own detector, network, loss: each named once, and all of the project knows it."""

import json

import cv2
import jax
import numpy as np
import pytest

from steel_ad import config as configs
from steel_ad.inspection import session
from steel_ad.report import detectability as figures
from steel_ad.research import detectability, results, results_page
from steel_ad.runs import autoencoder, export, segmentation, spectrum
from steel_ad.runs.run import Run

OWN = "tests.own:Deviation"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A line of grey plates 64x64; a defective one has a dark square."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    def plate():
        return rng.integers(110, 146, (64, 64), np.uint8)

    for i in range(8):
        write(root / "train" / "good" / f"{i}.png", plate())
        write(root / "more" / f"{i}.png", plate())
    for i in range(12):
        write(root / "calibration" / f"{i}.png", plate())
    for i in range(3):
        write(root / "test" / "good" / f"{i}.png", plate())
        bad, mask = plate(), np.zeros((64, 64), np.uint8)
        bad[20:40, 10 + i : 30], mask[20:40, 10 + i : 30] = 30, 255
        write(root / "test" / "dark" / f"{i}.png", bad)
        write(root / "ground_truth" / "dark" / f"{i}_mask.png", mask)
    return root


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("own") / "run"
    config = configs.Spectrum(maps=(OWN, "phase_only"), images=3, tile=16, smoothing_px=5, radius=1)
    return workdir, spectrum.run(config, data=[str(data)], workdir=workdir)[workdir][0]


def test_a_detector_of_ones_own_is_evaluated_and_restored(fitted, data):
    workdir, record = fitted
    assert list(record["maps"]) == ["deviation", "phase_only"]
    assert record["maps"]["deviation"]["image_auroc"] == 1.0
    found = Run.open(workdir).detector()
    assert found.detector.name == "deviation"
    mean = np.mean([cv2.imread(str(data / r["path"]), 0).mean() for r in _used(workdir)]) / 255
    np.testing.assert_allclose(found.state["mean"], mean, rtol=1e-6)
    assert found.threshold == record["thresholds"]["deviation"]["pixel"]
    assert Run.open(workdir).detector("phase_only").detector.name == "phase_only"


def _used(workdir):
    return [r for r in json.loads((workdir / "manifest.json").read_text()) if r["use"] == "train"]


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(figures, "detectability", lambda *a, **k: None)


def test_a_detector_of_ones_own_inspects(fitted, data, tmp_path):
    how = configs.Inspection(tile_px=64, halo_px=0, false_alarm_rate=0.1)
    given = {"calibrate_on": str(data / "calibration"), "out": tmp_path / "out"}
    summary = session.run(how, Run.open(fitted[0]).detector(), source=str(data / "test" / "dark"), **given)
    assert summary["defects"] == summary["tiles_with_an_alarm"] == 3


@pytest.mark.usefixtures("without_pictures")
def test_a_detector_of_ones_own_is_sized(fitted, data, tmp_path):
    how = configs.Inspection(tile_px=64, halo_px=0, false_alarm_rate=0.1)
    config = configs.Detectability(smallest_px=3, largest_px=24, contrasts=(0.3,), trials=10)
    given = {"calibrate_on": str(data / "calibration"), "defects_from": "procedural", "out": tmp_path / "out"}
    summary = detectability.run(config, how, Run.open(fitted[0]).detector(), **given)
    assert sum(curve["found"] for curve in summary["curves"]) > 10


def test_a_detector_of_ones_own_is_exported(fitted, tmp_path):
    out = tmp_path / "own.stablehlo"
    export.run(configs.Export(height=32, width=40), Run.open(fitted[0]).detector(), out)
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    dark = np.full((1, 32, 40), 128, np.uint8)
    dark[0, 5:20, 5:20] = 10
    assert program.call(dark)["mask"][0, 10, 10]
    assert not program.call(dark)["mask"][0, 30, 30]


def test_a_detector_of_ones_own_is_in_the_results(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(results_page.figures, "methods", lambda *a, **k: None)
    methods, found = results.gather([fitted[0].parent])
    (row,) = [r for r in methods if r["map"] == "deviation"]
    assert row["image_auroc"] == 1.0
    results_page.write(tmp_path / "results.md", methods, found)
    page = results_page.render(tmp_path / "results.md").read_text()
    (line,) = [line for line in page.splitlines() if "deviation" in line and line.startswith("|")]
    assert "1.000" in line


@pytest.mark.slow
def test_networks_and_a_loss_of_ones_own_train(data, tmp_path):
    common = {"patch_size": 32, "batch_size": 2, "steps": 4, "checkpoint_every": 2}
    config = configs.Autoencoder(
        model="tests.own:Mirror", loss="tests.own:halves", crops="fresh", stride=16, latent=3, **common
    )
    record = autoencoder.run(config, data=str(data), workdir=tmp_path / "ae")
    assert record["finished"]
    assert record["parameters"] == 32 * 3 + 3 + 3 * 32 + 32
    assert Run.open(tmp_path / "ae").detector().detector.config.model == "tests.own:Mirror"
    config = configs.Segmentation(
        model="tests.own:Edges", width=3, loss="bce", optimizer="adam", classifier_steps=2, defect_size=64, **common
    )
    record = segmentation.run(config, data=str(data), defects_from="procedural", workdir=tmp_path / "net")
    assert record["finished"]
    state = Run.open(tmp_path / "net").detector().state
    assert sum(p.size for p in jax.tree.leaves(state["segmenter"])) == 9 * 3 + 3 + 3 + 1

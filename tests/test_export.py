"""An exported file is the trained model: for every detector, without the project, or there is none."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from configs.autoencoder import PRESETS as AUTOENCODERS
from configs.segmentation import PRESETS as SEGMENTATIONS
from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import plates
from steel_ad.detectors import Detector, Fitted
from steel_ad.detectors import autoencoder as detectors
from steel_ad.detectors import segmentation as networks
from steel_ad.errors import InputError
from steel_ad.runs import export
from steel_ad.runs.run import Run, completed
from steel_ad.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plates_64():
    return np.asarray(plates.to_uint8(plates.render(jax.random.key(0), "teardrop1", size=64, num=20)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Workdirs of tiny networks of each kind, with random weights: training is not tested."""
    root = tmp_path_factory.mktemp("models")
    coded = configs.Autoencoder(**{**AUTOENCODERS["tiny"], "radius": 1, "maps": ("l2", "ssim")})
    state = random_state(lambda: detectors.initial_state(coded, jax.random.key(0)))
    keep(root / "autoencoder", {**configs.to_dict(coded), "data": ""}, {"l2": 0.2, "ssim": 0.5}, checkpoints=state)
    for name in ("unet", "compact_cnn"):
        config = configs.Segmentation(**{**SEGMENTATIONS["tiny"], "model": name, "radius": 1})
        first = random_state(lambda config=config: networks.initial_segmentation(config, config.total_steps))
        frozen = networks.variables(first)
        second = random_state(lambda config=config, frozen=frozen: networks.initial_classifier(config, frozen))
        settings = {**configs.to_dict(config), "data": "", "defects": ""}
        keep(root / name, settings, {"segmentation": 0.19}, checkpoints=first, checkpoints_classifier=second)
    return root


def random_state(make):
    rng = np.random.default_rng(0)

    def leaf(path, like):
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.zeros(like.shape, like.dtype)
        spread = 1 if like.ndim < 2 else np.sqrt(2 / np.prod(like.shape[:-1]))
        values = spread * rng.standard_normal(like.shape)
        return jnp.asarray(1 + abs(values) if "var" in jax.tree_util.keystr(path) else values, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make))


def keep(workdir, settings, thresholds, **states):
    files.write_json(workdir / "config.json", settings)
    files.write_json(workdir / "manifest.json", [])
    limits = {k: {"pixel": v} for k, v in thresholds.items()}
    config = completed("segmentation" if "defects" in settings else "autoencoder", settings)
    files.write_json(workdir / "metrics.json", {"config": config, "maps": {}, "thresholds": limits})
    for folder, state in states.items():
        with Checkpoints(workdir / folder) as checkpoints:
            checkpoints.save(1, state, {"seconds": 0.0, "settings": settings})


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Exported files by name, the U-Net's by the binary."""
    root = tmp_path_factory.mktemp("files")
    found = {name: root / f"{name}.stablehlo" for name in ("autoencoder", "unet", "compact_cnn")}
    export.run(
        configs.Export(height=48, width=40), Run.open(models / "autoencoder").detector("ssim"), found["autoencoder"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # Compiling its large kernels takes long, and agreement is tested with the others.
        patch.setattr(export, "check", lambda *_: 0.0)
        export.run(
            configs.Export(height=33, width=40, threshold=0.25),
            Run.open(models / "compact_cnn").detector(),
            found["compact_cnn"],
        )
    cache = f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"
    line = [sys.executable, "-m", "experiments.export", cache, f"--model={models / 'unet'}", f"--out={found['unet']}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "16*h" in done.stdout
    return found


def opened(detector, image):
    """Of an image uint8 `[h, w]`, with OpenCV's morphology."""
    raw = jax.jit(detector.detector.residual)(detector.state, jnp.asarray(image, jnp.float32) / 255)
    disk = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return cv2.dilate(cv2.erode(np.asarray(raw), disk), disk)


@pytest.mark.slow
def test_files_agree_with_the_models_where_the_project_is_not_installed(models, exported, plates_64, tmp_path):
    script = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("steel_ad", "flax", "orbax", "cv2"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
try:
    import steel_ad
except ImportError:
    print("without steel_ad")
"""
    image = plates_64[10, :48, :32]
    np.save(tmp_path / "image.npy", image)
    calls = [str(exported["unet"]), str(tmp_path / "image.npy"), str(tmp_path / "found.npz")]
    loader = ROOT / "docs" / "load_detector.py"
    assert len(loader.read_text().splitlines()) < 20
    line = [sys.executable, "-I", "-c", script, str(loader), *calls]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("without steel_ad\n")
    found = np.load(tmp_path / "found.npz")
    detector = Run.open(models / "unet").detector()
    expected = opened(detector, image)
    np.testing.assert_allclose(found["map"][0], expected, atol=1e-4)
    np.testing.assert_allclose(found["score"][0], expected.max(), atol=1e-4)
    np.testing.assert_array_equal(found["mask"], found["map"] > np.float64(detector.threshold))
    assert 0 < found["mask"].mean() < 1
    assert 0 <= found["probability"][0] <= 1
    record = json.loads(exported["unet"].with_suffix(".json").read_text())
    assert record["threshold"] == detector.threshold
    assert record["model_sha256"] == detector.sha256
    assert record["file_sha256"] == hashlib.sha256(exported["unet"].read_bytes()).hexdigest()
    assert record["largest_difference"] <= 1e-4


@pytest.mark.slow
def test_sizes_and_batches_are_free_where_they_can_be(exported, plates_64):
    unet = jax.export.deserialize(bytearray(exported["unet"].read_bytes()))
    whole = unet.call(plates_64[:3])
    assert whole["map"].shape == whole["mask"].shape == (3, 64, 64)
    assert whole["map"].dtype == jnp.float32
    np.testing.assert_allclose(whole["map"][1:2], unet.call(plates_64[1:2])["map"], atol=1e-6)
    with pytest.raises(ValueError, match="16"):
        unet.call(plates_64[:1, :40])
    coded = jax.export.deserialize(bytearray(exported["autoencoder"].read_bytes()))
    assert coded.call(plates_64[:2, :48, :40])["score"].shape == (2,)


@pytest.mark.slow
def test_products_are_full_float32_on_every_platform(exported):
    for file in exported.values():
        program = jax.export.deserialize(bytearray(file.read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        text = program.mlir_module()
        products = [
            line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
        ]
        assert products
        assert all("HIGHEST" in line for line in products)


class Brightness(Detector):
    """A detector whose map is the image."""

    name = "brightness"
    least_px = 32

    def fit(self, images):
        return {}

    def residual(self, state, image):
        return image


# In place of a network, where none is tested.
PLAIN = Fitted(Brightness(), {}, 1, 0.5, "", {}, frozenset())


def test_no_file_is_written_that_does_not_agree(tmp_path, monkeypatch):
    whole = export._program

    def changed(key, change):
        def program(*arguments):
            return lambda image: {**(found := whole(*arguments)(image)), key: change(found[key])}

        return program

    def run():
        return export.run(configs.Export(height=40, width=300), PLAIN, tmp_path / "a.stablehlo")

    for key, change in (("map", lambda v: v + 2e-4), ("score", lambda v: v - 2e-4), ("map", lambda v: v * jnp.nan)):
        monkeypatch.setattr(export, "_program", changed(key, change))
        with pytest.raises(InputError, match="differs from the trained model"):
            run()
    monkeypatch.setattr(export, "_program", changed("mask", lambda v: v.at[0, 0].set(~v[0, 0])))
    with pytest.raises(InputError, match="in 3 pixels of its masks"):
        run()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export, "_program", whole)
    assert run()["largest_difference"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.stablehlo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ("cpu", "gpu")}, "--platforms=cpu,gpu must be a list, each of it one of cpu"),
        ({"platforms": ("tpu",)}, "--platforms lacks cpu"),
        ({"height": 16}, "--height=16 is smaller than the detector's least image of 32"),
        ({"out": "a.json"}, "JSON file beside it"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, arguments, message):
    arguments = dict(arguments)
    out = tmp_path / arguments.pop("out", "a.stablehlo")
    with pytest.raises(InputError, match=message):
        export.run(configs.Export(**arguments), PLAIN, out)
    assert not list(tmp_path.iterdir())


def test_a_pixel_at_the_threshold_is_no_defect():
    image = jnp.full((8, 8), 51, jnp.uint8)
    level = float(export._program(PLAIN, 0.5)(image)["map"].max())
    for threshold, above in ((level, False), (level - 1e-12, True), (level + 1e-12, False)):
        assert bool(export._program(PLAIN, threshold)(image)["mask"].any()) is above


@pytest.mark.parametrize("name", ["autoencoder", "unet", "compact_cnn"])
def test_an_onnx_file_agrees_with_the_model(models, plates_64, tmp_path, name):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    record = export.run(configs.Export(height=48, width=64), Run.open(models / name).detector(), tmp_path / "a.onnx")
    assert record["input"]["shape"] == [1, 48, 64]
    assert record["largest_difference"] < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    names = [output.name for output in session.get_outputs()]
    assert set(names) == set(record["outputs"])
    found = dict(zip(names, session.run(names, {"images": plates_64[:1, :48]}), strict=True))
    assert found["map"].shape == (1, 48, 64)
    np.testing.assert_array_equal(found["mask"], found["map"] > np.float32(record["threshold"]))
    assert found["score"] == found["map"].max()


def test_onnx_without_its_converter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'steel_ad\[onnx\]'"):
        export.run(configs.Export(), PLAIN, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())

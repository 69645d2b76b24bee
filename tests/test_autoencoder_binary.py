"""The binary as a user meets it: a run, resuming, evaluating again, and everything that can be wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steel_ad import config as configs
from steel_ad import files
from steel_ad.data import plates, workers
from steel_ad.detectors import autoencoder
from steel_ad.errors import InputError
from steel_ad.report import evaluation as figures
from steel_ad.runs import autoencoder as study
from steel_ad.runs import evaluation
from steel_ad.runs.run import Run
from steel_ad.train import resume
from steel_ad.train.checkpoint import Checkpoints
from steel_ad.train.state import create

ROOT = Path(__file__).parent.parent
METRICS = {
    *("pixel_auroc", "pixel_auroc_fpr30", "aupro_30", "aupro_05", "pixel_ap", "aupimo", "pixel_iou", "pixel_dice"),
    *("image_auroc", "image_accuracy", "image_accuracy_calibrated", "image_tpr", "image_tnr", "image_f1"),
    *("found_fpr_01", "found_fpr_05", "found_by_contrast"),
    *("defects_found", "false_regions_per_image", "false_regions_per_good_image", "threshold", "image_threshold"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "line"
    good = np.asarray(plates.to_uint8(plates.render(jax.random.key(0), "teardrop1", size=64, num=8)))
    bad, masks = plates.render_defective(jax.random.key(1), "teardrop1", "smear", size=64, num=3)
    bad, masks = np.asarray(plates.to_uint8(bad)), np.asarray(masks)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i in range(6):
        write(root / "train" / "good" / f"{i}.png", good[i])
    for i in range(2):
        write(root / "test" / "good" / f"{i}.png", good[6 + i])
    for i in range(3):
        write(root / "test" / "smear" / f"{i}.png", bad[i])
        write(root / "ground_truth" / "smear" / f"{i}_mask.png", masks[i].astype(np.uint8) * 255)
    return root


def command(*arguments, preset="tiny"):
    cache = f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"
    return [
        sys.executable,
        "-m",
        "experiments.autoencoder",
        f"--config=configs/autoencoder.py:{preset}",
        cache,
        *arguments,
    ]


def start(*arguments, preset="tiny", shell_limit=None):
    line = command(*arguments, preset=preset)
    if shell_limit:
        line = ["bash", "-c", f'{shell_limit}; exec "$@"', "bash", *line]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def without_pictures(monkeypatch):
    """Of the evaluation; the finished run has them, and they take longer than a tiny run."""
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda *a, **k: None)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    result = start(f"--data={data}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_run_leaves_what_the_readme_promises(finished):
    workdir, result = finished
    assert "pixel_auroc" in result.stdout
    assert "Traceback" not in result.stderr
    assert "train: 8/8 steps" in result.stderr
    record = json.loads((workdir / "metrics.json").read_text())
    assert set(record["maps"]) == {"ssim", "l2"}
    for found in record["maps"].values():
        assert set(found) == METRICS
        assert set(found["defects_found"]) == {"iou_0", "iou_30"}
        assert 0 <= found["pixel_auroc"] <= 1
    assert record["images"] == {"train": 5, "validation": 1, "test": 5}
    rows = list(csv.DictReader((workdir / "scores.csv").read_text().splitlines()))
    assert [r["image"] for r in rows] == ["good/0.png", "good/1.png", "smear/0.png", "smear/1.png", "smear/2.png"]
    assert [int(r["defective"]) for r in rows] == [0, 0, 1, 1, 1]
    steps = [int(r["step"]) for r in csv.DictReader((workdir / "train.csv").read_text().splitlines())]
    assert steps == list(range(1, 9))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert sorted(r["use"] for r in manifest) == ["train"] * 5 + ["validation"]
    pictures = {p.name for p in (workdir / "figures").iterdir()}
    assert pictures == {
        *("training.png", "curves.png", "examples_ssim.png", "examples_l2.png", "scores_ssim.png", "scores_l2.png")
    }


def test_a_finished_run_says_so_and_stays(finished, data):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    result = start(f"--data={data}", f"--workdir={workdir}")
    assert result.returncode == 0
    assert "finished already" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_restored_as_a_detector(finished):
    workdir, _ = finished
    model = Run.open(workdir).detector()
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert model.trained_on == {r["sha256"] for r in manifest if r["use"] == "train"}
    assert model.threshold == json.loads((workdir / "metrics.json").read_text())["thresholds"]["ssim"]["pixel"]
    assert Run.open(workdir).detector("l2").sha256 != model.sha256 == Run.open(workdir).detector("ssim").sha256
    config = tiny()
    like = autoencoder.initial_state(config, jax.random.key(1))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        kept, _ = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, model.state, kept.params)
    assert (model.radius, model.least_px, model.detector.name) == (config.radius, config.patch_size, "ssim")


def tiny(**settings):
    from configs.autoencoder import PRESETS

    return configs.Autoencoder(**{**PRESETS["tiny"], **settings})


def test_trained_parameters_are_those_of_the_newest_checkpoint(tmp_path, monkeypatch):
    small = create({"w": jnp.zeros(3)}, optax.sgd(0.1))  # the network takes its time to compile
    monkeypatch.setattr(autoencoder, "initial_state", lambda *_: small)
    with pytest.raises(InputError, match="there is no checkpoint in"):
        autoencoder.AutoencoderDetector(tiny()).restore(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (2, 4):
            state = small.replace(step=jnp.int32(step), params={"w": jnp.full(3, 0.5 * step)})
            checkpoints.save(step, state, {"seconds": 0.0})
    np.testing.assert_array_equal(autoencoder.AutoencoderDetector(tiny()).restore(tmp_path)["w"], [2, 2, 2])


@pytest.mark.usefixtures("without_pictures")
def test_evaluate_only_reads_other_settings(finished, data):
    workdir, _ = finished
    before = json.loads((workdir / "metrics.json").read_text())
    after = study.run(tiny(percentile=50.0, maps=("l2",)), data=str(data), workdir=workdir, evaluate_only=True)
    assert set(after["maps"]) == {"l2"}
    assert after["maps"]["l2"]["threshold"] < before["maps"]["l2"]["threshold"]
    assert after["maps"]["l2"]["pixel_auroc"] == pytest.approx(before["maps"]["l2"]["pixel_auroc"])
    assert after["train_seconds"] == before["train_seconds"]


@pytest.mark.usefixtures("without_pictures")
def test_the_threshold_is_the_percentile_of_good_residuals(finished, data):
    workdir, _ = finished
    config = tiny()
    with Checkpoints(workdir / "checkpoints") as kept:
        params = kept.restore(autoencoder.initial_state(config, jax.random.key(0)))[0].params
    manifest = json.loads((workdir / "manifest.json").read_text())
    (held_out,) = [r["path"] for r in manifest if r["use"] == "validation"]
    image = cv2.imread(str(data / held_out), cv2.IMREAD_GRAYSCALE)
    residual = autoencoder.AutoencoderDetector(config).only("l2").residual(params, image.astype(np.float32) / 255)
    mapper = evaluation.Mapper(autoencoder.AutoencoderDetector(config).only("l2"), config.radius)
    maps = mapper(params, [image], label="maps")[0]["l2"]
    np.testing.assert_allclose(maps.raw[0], residual, atol=1e-5)
    found = evaluation.thresholds(maps, 98)
    assert found.pixel == pytest.approx(np.percentile(np.float64(maps.raw[0]), 98))
    assert found.image == pytest.approx(maps.opened[0].max())
    said = study.run(config, data=str(data), workdir=workdir, evaluate_only=True)["thresholds"]["l2"]
    assert said == pytest.approx({"pixel": found.pixel, "image": found.image}, rel=1e-4)


def test_an_evaluation_reconstructs_an_image_once():
    """The compiled program of both maps, openings and scores has as many convolutions as one reconstruction."""
    config = tiny()
    detector = autoencoder.AutoencoderDetector(config)
    params = autoencoder.initial_state(config, jax.random.key(0)).params

    def convolutions(function, state, image):
        return jax.jit(function).lower(state, image).compile().as_text().count(" convolution(")

    image = np.zeros((64, 64), np.float32)
    once = convolutions(lambda p, x: autoencoder.reconstruct(config, p, x), params, image)
    program = evaluation.Mapper(detector, config.radius)._program
    text = program.lower(params, np.zeros((1, 64, 64), np.uint8)).compile().as_text()
    assert len(config.maps) == 2
    assert text.count(" convolution(") == once > 0


def run_until(step, config, data, workdir):
    """A run that ends right after that step's checkpoint."""
    stop, save = type("Stop", (Exception,), {}), Checkpoints.save

    def stopping(self, now, *arguments):
        save(self, now, *arguments)
        if now == step:
            self.wait()
            raise stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(stop):
            study.run(config, data=str(data), workdir=workdir)


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_evaluating_half_a_run_does_not_finish_it(data, tmp_path):
    config = tiny()
    run_until(4, config, data, tmp_path / "w")
    half = study.run(config, data=str(data), workdir=tmp_path / "w", evaluate_only=True)
    assert (half["steps"], half["finished"]) == (4, False)
    whole = study.run(config, data=str(data), workdir=tmp_path / "w")
    assert (whole["steps"], whole["finished"]) == (8, True)
    assert (tmp_path / "w" / "figures" / "training.png").exists()
    before = Run.open(tmp_path / "w").detector()
    other = study.run(tiny(percentile=50.0), data=str(data), workdir=tmp_path / "w")  # as good as --evaluate_only
    assert other["percentile"] == 50
    assert len(list((tmp_path / "w" / "evaluations").glob("*/metrics.json"))) == 1
    # What an inspection uses is the run's own evaluation still.
    after = Run.open(tmp_path / "w").detector()
    assert (after.threshold, after.sha256) == (before.threshold, before.sha256)
    assert study.run(config, data=str(data), workdir=tmp_path / "w")["percentile"] == 98


def test_large_and_mixed_images(data, tmp_path):
    """More windows than go through the network at once, beside small images."""
    config = tiny()
    params = autoencoder.initial_state(config, jax.random.key(0)).params
    image = np.random.default_rng(0).random((300, 160)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        whole = jax.jit(lambda p, x: autoencoder.reconstruct(config, p, x))(params, image)
        patch.setattr(autoencoder, "_TILES_ON_CPU", 10**6)
        at_once = jax.jit(lambda p, x: autoencoder.reconstruct(config, p, x))(params, image)
        np.testing.assert_allclose(at_once, whole, atol=1e-6)
    mapper = evaluation.Mapper(autoencoder.AutoencoderDetector(config).only("l2"), 2)
    images = [np.uint8(255 * image), np.uint8(255 * image[:40, :50]), np.uint8(255 * image[:40, :50])[::-1]]
    maps = mapper(params, images, label="maps")[0]["l2"]
    assert [m.shape for m in maps.raw] == [m.shape for m in maps.opened] == [i.shape for i in images]
    residual = jax.jit(autoencoder.AutoencoderDetector(config).only("l2").residual)
    for m, i in zip(maps.raw, images, strict=True):
        expected = residual(params, i.astype(np.float32) / 255)
        np.testing.assert_allclose(m, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_killed_runs_end_where_undisturbed_ones_do(data, tmp_path, monkeypatch):
    """SIGKILL in mid-run, while processes read images, and an exception later on; the final parameters and the training record
    are, to the bit, those of an undisturbed run."""
    monkeypatch.setattr(workers, "_workers", lambda: 0)  # processes take seconds to start
    config = tiny(steps=24, checkpoint_every=4, data_path="grain")
    study.run(config, data=str(data), workdir=tmp_path / "a")
    settings = ("--config.steps=24", "--config.checkpoint_every=4", "--config.data_path=grain", "--nonative")
    process = subprocess.Popen(
        command(*settings, f"--data={data}", f"--workdir={tmp_path / 'b'}"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "b" / "checkpoints" / "step_8").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the pipe stays open while a process that reads images is left
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "b" / "metrics.json").exists()
    run_until(20, config, data, tmp_path / "b")
    assert not (tmp_path / "b" / "metrics.json").exists()
    study.run(config, data=str(data), workdir=tmp_path / "b")
    ends = []
    for name in ("a", "b"):
        with Checkpoints(tmp_path / name / "checkpoints") as kept:
            assert kept.latest() == 24
            ends.append(kept.restore(autoencoder.initial_state(tiny(), jax.random.key(0)))[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert (tmp_path / "a" / "train.csv").read_text() == (tmp_path / "b" / "train.csv").read_text()
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text())["maps"] for n in ("a", "b"))
    assert a == b


def test_no_workdir_is_half_claimed_by_a_wrong_loss(data, tmp_path):
    with pytest.raises(InputError, match="no loss 'l3'"):
        study.run(tiny(loss="l3"), data=str(data), workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def sentence(result, *said, status=2):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    assert all(s in lines[0] for s in said), lines[0]


def test_a_loss_that_does_not_work_is_said_first():
    sentence(start("--loss_option=sigma=0", "--workdir=/tmp/none"), "ssim", "positive")


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_a_full_disk_loses_nothing(finished, data, tmp_path):
    """A limit on file size stands in for a full disk: the parameters do not fit, what is there stays whole."""
    result = start(f"--data={data}", f"--workdir={tmp_path / 'w'}", "--compilation_cache=", shell_limit="ulimit -f 40")
    sentence(result, "cannot be written", status=1)
    assert not (tmp_path / "w" / "metrics.json").exists()
    study.run(tiny(), data=str(data), workdir=tmp_path / "w")
    a, b = (json.loads((w / "metrics.json").read_text())["images"] for w in (finished[0], tmp_path / "w"))
    assert a == b


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: None, "data"),
        (lambda d: d.mkdir(), "no images"),
        (lambda d: (d.mkdir(), (d / "a.png").write_bytes(b"no picture")), "a.png"),
        (lambda d: (d.mkdir(), cv2.imwrite(str(d / "a.png"), np.zeros((16, 40), np.uint8))), "smaller than the patch"),
        (lambda d: (d.mkdir(), cv2.imwrite(str(d / "a.png"), np.zeros((40, 40), np.uint8))), "at least 2"),
    ],
)
def test_data_that_cannot_be_used(break_it, said, tmp_path):
    break_it(tmp_path / "data")
    with pytest.raises(InputError) as error:
        study.run(tiny(), data=str(tmp_path / "data"), workdir=tmp_path / "w")
    assert said in str(error.value)
    assert not (tmp_path / "w").exists()  # or the mended command would find a workdir of another config
    assert "\n" not in str(error.value)
    assert error.value.status == 2


def test_a_mask_of_another_size(data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "data")
    cv2.imwrite(str(tmp_path / "data" / "ground_truth" / "smear" / "1_mask.png"), np.zeros((32, 64), np.uint8))
    with pytest.raises(InputError, match=r"1_mask\.png"):
        study.run(tiny(), data=str(tmp_path / "data"), workdir=tmp_path / "w")


def test_a_workdir_of_another_run(finished, data, tmp_path):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"another config.*latent"):
        study.run(tiny(latent=9), data=str(data), workdir=workdir)
    with pytest.raises(InputError, match=r"another config.*data"):
        study.run(tiny(), data="procedural/diamond", workdir=workdir)
    with pytest.raises(InputError, match="no run in"):
        study.run(tiny(), data=str(data), workdir=tmp_path / "none", evaluate_only=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_images_that_changed_under_a_run(data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "data")
    study.run(tiny(), data=str(tmp_path / "data"), workdir=tmp_path / "w")
    (tmp_path / "w" / "metrics.json").unlink()
    (tmp_path / "data" / "train" / "good" / "0.png").unlink()
    with pytest.raises(InputError, match="not those that the run"):
        study.run(tiny(), data=str(tmp_path / "data"), workdir=tmp_path / "w")


def test_a_folder_of_good_images_alone(data, tmp_path):
    result = study.run(tiny(), data=str(data / "train" / "good"), workdir=tmp_path / "w")
    assert result["maps"] == {}
    assert result["thresholds"]["ssim"]["pixel"] > 0


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.0]})
    assert files.read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.0]}
    with pytest.raises(InputError, match="cannot be read"):
        files.read_json(tmp_path / "b.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as error:
        files.write_text(tmp_path / "file" / "c.json", "x")
    assert error.value.status == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": NaN}', b'{"a": 1', b"3", b"\xff", b"[1]", b""])
def test_json_of_another_kind_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json cannot be read") as error:
        files.read_json(tmp_path / "a.json", dict)
    assert "\n" not in str(error.value)


def test_what_a_killed_process_left_is_written_over(tmp_path, monkeypatch):
    """The next process has another number, which must not be part of the name."""

    def killed(*_):
        raise KeyboardInterrupt

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a.csv", "x")
    monkeypatch.setattr(os, "replace", replace)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "getpid", lambda: 1)
    files.write_text(tmp_path / "a.csv", "y")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "y"


@pytest.mark.parametrize(
    "content", ["step,loss\n1,x\n", "step,loss\n1\n", "loss\n1\n", "step,loss\n1,2,3\n", "step\n1\n"]
)
def test_a_damaged_record_of_the_steps_is_named(tmp_path, content):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(InputError, match=r"train\.csv is damaged"):
        resume.read_history(tmp_path / "train.csv")


@pytest.mark.parametrize("content", ["[]", '{"finished": 1, "config": []}', '{"finished": 1, "config": 3}', '"x"'])
def test_a_damaged_end_of_a_run_is_named(tmp_path, content):
    def begin():
        return Run.begin(tmp_path, "autoencoder", tiny(), {"data": "d"}, evaluate_only=False)

    this = begin()
    this.claim()
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.json (is damaged|cannot be read)"):
        begin().finished()
    for maps in ({"maps": {"l2": 3}}, {"maps": [1]}, {}):
        files.write_json(tmp_path / "metrics.json", {"finished": True, "config": this.settings, **maps})
        with pytest.raises(InputError, match=r"metrics\.json is damaged"):
            begin().finished()


def test_a_record_without_a_new_setting_is_the_run_with_its_default(tmp_path):
    """Records written before a setting, or the name of the experiment, existed."""
    settings = configs.to_dict(tiny())
    for name in ("model", "resident_mb"):
        del settings[name]
    files.write_json(tmp_path / "config.json", {**settings, "data": "d"})
    this = Run.begin(tmp_path, "autoencoder", tiny(), {"data": "d"}, evaluate_only=False)
    assert this.settings["model"] == "bergmann"
    assert Run.open(tmp_path).config == tiny()
    with pytest.raises(InputError, match=r"differs in resident_mb \(7 here, 1024 there\)"):
        Run.begin(tmp_path, "autoencoder", tiny(resident_mb=7), {"data": "d"}, evaluate_only=False)


def test_an_error_is_one_line_whatever_names_are_in_it():
    assert str(InputError("a\nb\r\nc")) == "a b c"

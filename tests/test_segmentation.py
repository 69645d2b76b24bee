"""The supervised line: samples, losses, stages, both binaries, and what can be wrong."""

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

from steel_ad import config as configs
from steel_ad import files, losses, parallel
from steel_ad.config import Segmentation
from steel_ad.data import datasets, defects, patches, plates
from steel_ad.data.images import Images
from steel_ad.detectors import segmentation
from steel_ad.detectors.segmentation import Samples
from steel_ad.errors import InputError
from steel_ad.report import evaluation as figures
from steel_ad.report import training
from steel_ad.runs import segmentation as study
from steel_ad.runs import transfer
from steel_ad.runs.run import Run
from steel_ad.train import feed
from steel_ad.train.checkpoint import Checkpoints
from steel_ad.train.state import create
from steel_ad.train.step import make_step

ROOT = Path(__file__).parent.parent
IMAGE_KEYS = {
    "image_auroc",
    "found_fpr_01",
    "found_fpr_05",
    "image_accuracy",
    "image_accuracy_calibrated",
    "image_tpr",
    "image_tnr",
    "image_f1",
    "image_threshold",
}


def tiny(**settings):
    from configs.segmentation import PRESETS

    return Segmentation(**{**PRESETS["tiny"], **settings})


@pytest.fixture(scope="module")
def good():
    return list(np.asarray(plates.to_uint8(plates.render(jax.random.key(0), "teardrop1", size=64, num=6))))


@pytest.fixture(scope="module")
def library():
    return defects.fitting(defects.procedural(jax.random.key(1), 24, size=64), (32, 32))[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory, good):
    """A line in the MVTec layout, and in `defects/` images of plain steel with masks."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i, image in enumerate(good):
        write(root / "line" / "train" / "good" / f"{i}.png", image)
    write(root / "line" / "test" / "good" / "0.png", good[0][::-1])
    marked, mask = good[1].copy(), np.zeros((64, 64), np.uint8)
    mask[20:30, 25:45] = 255
    marked[mask > 0] = 250
    write(root / "line" / "test" / "pit" / "0.png", marked)
    write(root / "line" / "ground_truth" / "pit" / "0_mask.png", mask)
    for i in range(4):
        steel = (120 + 4 * rng.standard_normal((60, 60))).astype(np.uint8)
        spot = np.zeros((60, 60), np.uint8)
        spot[25 : 33 + i, 22:36] = 255
        steel[spot > 0] = 220
        write(root / "defects" / "images" / "pit" / f"{i}.png", steel)
        write(root / "defects" / "masks" / "pit" / f"{i}.png", spot)
    return root


# Losses.


def test_segmentation_losses_equal_their_definitions():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 12, 12, 1)).astype(np.float32)
    target = (rng.random(logits.shape) < 0.3).astype(np.float32)
    p, flat = 1 / (1 + np.exp(-np.float64(logits))), (3, -1)
    cross = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    truth = np.where(target > 0, p, 1 - p)
    expected = {
        "mse": (np.tanh(np.float64(logits)) - target) ** 2,
        "bce": cross,
        "focal": 2 * np.where(target > 0, 0.3, 0.7) * (1 - truth) ** 1.5 * cross,
    }
    for name, value in expected.items():
        loss = losses.get(name, {"gamma": 1.5, "alpha": 0.3} if name == "focal" else {}, losses.SEGMENTATION_LOSSES)
        np.testing.assert_allclose(loss(logits, target), value.reshape(flat).mean(1), rtol=1e-5)
    p, t = p.reshape(flat), target.reshape(flat)
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    np.testing.assert_allclose(losses.dice(logits, target), dice, rtol=1e-5)
    mixed = losses.get("bce_dice", {"weight": 0.25}, losses.SEGMENTATION_LOSSES)(logits, target)
    np.testing.assert_allclose(mixed, 0.25 * dice + 0.75 * cross.reshape(flat).mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", losses.SEGMENTATION_LOSSES)
def test_segmentation_losses_fall_towards_the_mask(name):
    loss = losses.get(name, {}, losses.SEGMENTATION_LOSSES)
    for target in (jnp.zeros((1, 12, 12, 1)), jnp.zeros((1, 12, 12, 1)).at[:, 3:9, 3:9].set(1)):
        sure = 40 * (2 * target - 1) if name != "mse" else 40 * target
        assert float(loss(sure, target)[0]) < 0.02 < float(loss(-sure + 20 * (name == "mse"), target)[0])
        for logits in (sure, -sure, jnp.zeros_like(sure)):
            assert jnp.isfinite(jax.grad(lambda a, t=target: loss(a, t).sum())(logits)).all()


def test_the_map_of_a_loss():
    assert losses.activation("mse") is jnp.tanh
    assert float(losses.activation("bce")(jnp.float32(0))) == 0.5


# Samples.


def batches(config, share, samples, num=30):
    draw = jax.jit(lambda step: segmentation.draw(config, share, samples, step, jax.random.key(0)))
    found = [draw(jnp.int32(s)) for s in range(num)]
    assert draw._cache_size() == 1
    return segmentation.Batch(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def test_inserted_samples_follow_the_ratio(good, library):
    config = tiny(batch_size=8)
    samples = Samples(jax.tree.map(jnp.asarray, patches.stack(good)), library)
    for ratio, share in (("1:0", 1.0), ("1:1", 0.5), ("1:3", 0.25)):
        assert configs.defective_share(ratio) == share
        batch = batches(config, share, samples)
        assert abs(batch.label.mean() - share) < 0.1
        np.testing.assert_array_equal(batch.label, batch.mask.any(axis=(1, 2, 3)))
    assert batch.image.shape == (240, 32, 32, 1)
    assert set(np.unique(batch.mask)) == {0, 1}


def test_alterations_are_a_share_of_the_defective_samples(good, library):
    """Of black plates: an alteration is all that is not black where nothing else is inserted."""
    config = tiny(batch_size=8, patch_size=48)
    plates = jax.tree.map(jnp.asarray, patches.stack(good))
    plain = batches(config, 0.75, Samples(plates, library))
    for altered in (0.0, 0.5, 1.0):
        batch = batches(config, 0.75, Samples(plates, library, altered))
        np.testing.assert_array_equal(batch.label, batch.mask.any(axis=(1, 2, 3)))
        other = (batch.image != plain.image).any(axis=(1, 2, 3))
        assert (other.mean() == 0) == (altered == 0)
        # Of two samples that are both good neither differs.
        assert other.mean() <= altered + 0.1
    alone = batches(config, 0.75, Samples(plates, altered=1.0))
    np.testing.assert_array_equal(alone.image, batch.image)
    np.testing.assert_array_equal(alone.mask, batch.mask)
    assert 0.3 < alone.label.mean() < 0.75


def test_light_changes_every_sample_and_no_mask(good, library):
    samples = Samples(jax.tree.map(jnp.asarray, patches.stack(good)), library)
    plain, lit = (batches(tiny(light=light), 0.5, samples, num=4) for light in (0.0, 1.0))
    np.testing.assert_array_equal(plain.mask, lit.mask)
    assert (plain.image != lit.image).any(axis=(1, 2, 3)).all()


def test_labelled_samples_keep_image_and_mask_together(good):
    marked = np.full((80, 70), 100, np.uint8)
    marked[70:72, 5:8] = 255  # small and in a corner: a random crop would nearly always miss it
    samples = segmentation.labelled(Images(good), [datasets.TestImage("0", "pit", marked, marked > 200)], seed=0)
    batch = batches(tiny(batch_size=8), 0.75, feed.on_device(samples, parallel.mesh()))
    assert abs(batch.label.mean() - 0.75) < 0.1
    places = {tuple(np.argwhere(m[..., 0])[0]) for m in batch.mask[batch.label > 0]}
    assert len(places) > 20  # and not always at the same place of the patch
    np.testing.assert_array_equal(batch.mask[batch.label > 0], batch.image[batch.label > 0] > 200 / 255)


def test_the_new_line_is_mixed_in_as_good(good, library):
    black = patches.stack([np.zeros((40, 40), np.uint8)])
    samples = jax.tree.map(jnp.asarray, Samples(patches.stack(good), library, new_line=black))
    batch = batches(tiny(batch_size=8, new_line=0.25), 1.0, samples)
    dark = batch.image.max(axis=(1, 2, 3)) == 0
    assert abs(dark.mean() - 0.25) < 0.1
    np.testing.assert_array_equal(batch.label, ~dark)


@pytest.mark.slow
@pytest.mark.parametrize("inserted", [True, False])
def test_a_detector_learns_from_good_images_with_and_without_a_library(good, library, inserted):
    config = tiny(light=1.0)
    detector = segmentation.SegmentationDetector(config, library if inserted else None)
    learnt = detector.fit(good)
    untrained = segmentation.variables(segmentation.initial_segmentation(config, 4))
    assert jax.tree.structure(learnt) == jax.tree.structure({"segmenter": untrained})
    moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(learnt), jax.tree.leaves(untrained), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert detector.residual(learnt, jnp.zeros((20, 24))).shape == (20, 24)


@pytest.mark.parametrize("ratio", ["1", "0:1", "a:b", "1:-1", "1:2:3"])
def test_ratios_that_are_none(ratio):
    with pytest.raises(InputError, match="1:3"):
        tiny(ratio=ratio)


# Stages.


@pytest.mark.parametrize("model", [pytest.param("unet", marks=pytest.mark.slow), "compact_cnn"])
def test_stages_never_compile_twice_and_classify(good, library, model):
    config = tiny(model=model)
    samples = jax.tree.map(jnp.asarray, Samples(patches.stack(good), library))
    root = jax.random.key(0)
    state = segmentation.initial_segmentation(config, 4)
    state, samples = parallel.put((state, samples), parallel.replicated(parallel.mesh()))
    before = jax.device_get(segmentation.variables(state))
    step = make_step(segmentation.segmentation_objective(config), segmentation.optimizer(config, 4))
    for _ in range(2):
        state, _ = step(state, samples, root)
    assert step._cache_size() == 1
    frozen = segmentation.variables(state)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(frozen))
    assert any(jax.tree.leaves(moved["batch_stats"]))

    second = parallel.put(segmentation.initial_classifier(config, frozen), parallel.replicated(parallel.mesh()))
    start = jax.device_get(second.params)
    step = make_step(segmentation.classifier_objective(config), segmentation.optimizer(config, 4))
    for _ in range(2):
        second, metrics = step(second, samples._replace(frozen=frozen), root)
    assert step._cache_size() == 1
    assert set(metrics) == {"loss", "gradient_norm", "accuracy"}
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), start, jax.device_get(second.params))))

    detector = segmentation.SegmentationDetector(config)
    image = jnp.asarray(good[0][:50, :37]).astype(jnp.float32) / 255
    state = {"segmenter": frozen, "classifier": segmentation.variables(second)}
    assert jax.jit(detector.residual)(state, image).shape == (50, 37)
    probability = jax.jit(detector.probability)(state, image)
    assert probability.shape == ()
    assert 0 < float(probability) < 1


def test_the_quarter_mask_is_reduced_by_area():
    mask = jnp.zeros((1, 8, 8, 1)).at[0, :4, :2].set(1)
    np.testing.assert_array_equal(segmentation._reduced(mask, (1, 2, 2, 1))[0, :, :, 0], [[0.5, 0], [0, 0]])
    np.testing.assert_array_equal(segmentation._reduced(mask, (1, 8, 8, 1)), mask)


def test_adadelta_has_the_settings_of_three_libraries():
    sizes = {}
    for name in ("tf_keras", "old_keras", "pytorch"):
        rule = segmentation.optimizer(tiny(optimizer="adadelta", adadelta=name), 4)
        with jax.numpy_dtype_promotion("standard"):
            delta, _ = rule.update({"w": jnp.ones(1)}, rule.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)})
        sizes[name] = float(delta["w"][0])
    # First step: -lr * sqrt(eps) / sqrt((1 - rho) + eps).
    assert sizes["tf_keras"] == pytest.approx(-1e-3 * (1e-7 / 0.05) ** 0.5, rel=1e-3)
    assert sizes["old_keras"] == pytest.approx(-((1e-7 / 0.05) ** 0.5), rel=1e-3)
    assert sizes["pytorch"] == pytest.approx(-((1e-6 / 0.1) ** 0.5), rel=1e-3)


def test_steps_lower_for_every_platform(good, library):
    config = tiny()
    samples = jax.tree.map(jnp.asarray, Samples(patches.stack(good), library))
    state = segmentation.initial_segmentation(config, 4)
    frozen = segmentation.variables(state)
    programs = [
        (make_step(segmentation.segmentation_objective(config), segmentation.optimizer(config, 4)), (state, samples)),
        (
            make_step(segmentation.classifier_objective(config), segmentation.optimizer(config, 4)),
            (segmentation.initial_classifier(config, frozen), samples._replace(frozen=frozen)),
        ),
    ]
    platforms = ("cpu", "cuda", "tpu")
    for program, arguments in programs:
        assert jax.export.export(program, platforms=platforms)(*arguments, jax.random.key(0)).platforms == platforms


def test_every_stage_draws_samples_of_its_own(good, library):
    """The classifier would else be trained on the very samples that its segmentation stage has been fitted to."""
    seen = {}
    samples = Samples(patches.stack(good), library)

    def spy(stage):
        def objective(params, extra, data, step, root):
            jax.debug.callback(lambda a: seen.setdefault(stage, np.asarray(a)), jax.random.key_data(root))
            return jnp.sum(params["w"] ** 2), (extra, {})

        return objective

    for stage in ("train", "classifier", "adapt"):
        rule = segmentation.optimizer(tiny(), 2)
        state = create({"w": jnp.ones(1)}, rule)
        spied = dataclasses.replace(segmentation.stage(tiny(), 2), objective=spy(stage))
        segmentation.train(spied, samples, state, seed=0, name=stage)
    jax.effects_barrier()
    assert len({tuple(k.tolist()) for k in seen.values()}) == 3


# Runs.


def start(binary, *arguments):
    line = [sys.executable, "-m", f"experiments.{binary}", "--config=configs/segmentation.py:tiny", *arguments]
    line.append(f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}")
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_segmentation_binary(data, tmp_path):
    arguments = (f"--data={data / 'line'}", f"--defects={data / 'defects'}", f"--workdir={tmp_path / 'w'}")
    result = start("segmentation", *arguments)
    assert result.returncode == 0, result.stderr
    assert "image_tpr  image_tnr" in result.stdout
    record = json.loads((tmp_path / "w" / "metrics.json").read_text())
    assert set(record["maps"]) == {"segmentation", "classification"}
    assert set(record["maps"]["classification"]) == IMAGE_KEYS
    assert set(record["maps"]["segmentation"]) > IMAGE_KEYS
    assert record["maps"]["segmentation"]["threshold"] == 0.5
    assert "score_classification" in (tmp_path / "w" / "scores.csv").read_text()
    assert len(json.loads((tmp_path / "w" / "defects.json").read_text())) == 4
    stage_1 = tmp_path / "w" / "checkpoints"
    assert sorted(p.name for p in stage_1.iterdir()) == ["step_2", "step_4"]  # stage 2 has its own folder
    again = start("segmentation", *arguments, f"--beside={tmp_path / 'w'}")
    assert "finished already" in again.stdout
    assert (tmp_path / "w" / "figures" / "predictions.png").exists(), again.stderr
    given = {"data": str(data / "line"), "defects_from": str(data / "defects"), "workdir": tmp_path / "w"}
    with pytest.raises(InputError, match=r"another config.*width") as error:
        study.run(tiny(width=4), **given)
    assert error.value.status == 2


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_dagm_layout_trains_and_tests(tmp_path, good):
    """Images of the folders themselves, defective ones where `Label` has a mask, in training too."""
    root = tmp_path / "Class1"
    for part, bad in (("Train", {1, 4}), ("Test", {0})):
        (root / part / "Label").mkdir(parents=True)
        for i, image in enumerate(good):
            label = np.zeros(image.shape, np.uint8)
            if i in bad:
                label[10:20, 30:45] = 255
            marked = np.where(label > 0, 250, image if part == "Train" else image[::-1]).astype(np.uint8)
            assert cv2.imwrite(str(root / part / f"{i:04d}.PNG"), marked)
            if i in bad:
                assert cv2.imwrite(str(root / part / "Label" / f"{i:04d}_label.PNG"), label)
    record = study.run(tiny(), data=str(root), defects_from="", workdir=tmp_path / "w")
    assert set(record["maps"]) == {"segmentation", "classification"}
    assert record["images"] == {"train": 3, "validation": 1, "test": 6}
    used = json.loads((tmp_path / "w" / "defects.json").read_text())
    assert [row["source"] for row in used] == ["defect/0001.PNG", "defect/0004.PNG"]
    with (tmp_path / "w" / "scores.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file) if row["defective"] == "1"] == ["defect/0000.PNG"]


class Stopped(Exception):
    """Takes the place of a kill, between two checkpoints."""


def stopped_after(patch, folder, step):
    """Lets a run end right after that step's checkpoint in that folder."""
    save = Checkpoints.save

    def saving(self, now, *arguments):
        save(self, now, *arguments)
        if (self.directory.name, now) == (folder, step):
            self.wait()
            raise Stopped

    patch.setattr(Checkpoints, "save", saving)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def last(folder, like):
    with Checkpoints(folder) as kept:
        return jax.device_get(kept.restore(like)[0])


@pytest.fixture
def few_defects(monkeypatch):
    monkeypatch.setattr(study, "_PROCEDURAL_DEFECTS", 24)


@pytest.fixture
def without_pictures(monkeypatch):
    """Of the evaluation; the binaries' runs have them, and they take longer than a tiny run."""
    monkeypatch.setattr(training, "training_curve", lambda *a, **k: None)
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda *a, **k: None)


@pytest.mark.slow
@pytest.mark.usefixtures("few_defects", "without_pictures")
def test_stage_1_is_what_it_was_after_stage_2(data, tmp_path):
    given = {"data": str(data / "line"), "defects_from": "procedural", "workdir": tmp_path / "w"}
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, "checkpoints_classifier", 2)
        with pytest.raises(Stopped):
            study.run(tiny(), **given)
    before = contents(tmp_path / "w" / "checkpoints")
    assert study.run(tiny(), **given)["finished"]
    assert contents(tmp_path / "w" / "checkpoints") == before
    stage_1 = last(tmp_path / "w" / "checkpoints", segmentation.initial_segmentation(tiny(), 4))
    state = Run.open(tmp_path / "w").detector().state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["segmenter"]), segmentation.variables(stage_1))


@pytest.mark.slow
@pytest.mark.usefixtures("few_defects", "without_pictures")
def test_interrupted_transfer_ends_as_an_undisturbed_one_and_adapts_to_the_target(data, good, tmp_path):
    (tmp_path / "target" / "train" / "good").mkdir(parents=True)
    for i, image in enumerate(good):
        assert cv2.imwrite(str(tmp_path / "target" / "train" / "good" / f"{i}.png"), image.T // 2)
    given = {"source": str(data / "line"), "target": str(tmp_path / "target"), "defects_from": "procedural"}
    mixed = {}
    with pytest.MonkeyPatch.context() as patch:
        train = segmentation.train

        def seen(stage, samples, *arguments, name, **rest):
            mixed[name] = samples.new_line
            return train(stage, samples, *arguments, name=name, **rest)

        patch.setattr(segmentation, "train", seen)
        whole = transfer.run(tiny(), **given, workdir=tmp_path / "a")
    assert mixed["pretrain"] is None
    assert mixed["classifier_before"] is None
    for stage in ("adapt", "classifier_after"):
        assert max(i.max() for i in mixed[stage]) == max(int(i.max()) // 2 for i in good)

    for folder in ("checkpoints_adapt", "checkpoints_classifier_before"):
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(patch, folder, 2)
            with pytest.raises(Stopped):
                transfer.run(tiny(), **given, workdir=tmp_path / "b")
    again = transfer.run(tiny(), **given, workdir=tmp_path / "b")
    for when in ("before", "after"):
        np.testing.assert_equal(again[when]["source"]["maps"], whole[when]["source"]["maps"])
        assert again[when]["target"]["maps"] == {}
    for stage in ("pretrain", "adapt"):
        like = segmentation.initial_segmentation(tiny(), 4)
        ends = [last(tmp_path / run / f"checkpoints_{stage}", like) for run in ("a", "b")]
        jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.fixture
def no_training(good, monkeypatch):
    """Stages that end at once, each after seconds of its own, with the steps of `short` missing; `seen`: what they are given."""
    line = datasets.Dataset("line", Images(good), [{"path": str(i)} for i in range(6)], [])
    seconds = {
        "train": 1,
        "pretrain": 1,
        "adapt": 20,
        "classifier": 300,
        "classifier_before": 300,
        "classifier_after": 4000,
    }
    short, seen = set(), {}

    def stage_1(this, config, samples, stage="train", *, start=None, evaluate_only):
        seen[stage] = samples, start
        state = create({"w": jnp.full(2, float(len(seen)))}, segmentation.optimizer(config, 4))
        return state.replace(step=np.int32(4 - (stage in short))), seconds[stage]

    def stage_2(this, config, samples, stage_1, stage="classifier", *, evaluate_only):
        seen[stage] = samples, stage_1
        return stage, seconds[stage], stage not in short

    def evaluate(config, stages, line, workdir, record):
        found = {**record, "of": stages, "in": workdir.name, "line": line.dataset.name, "maps": {}}
        files.write_json(workdir / "metrics.json", found)
        return found

    monkeypatch.setattr(study, "stage_1", stage_1)
    monkeypatch.setattr(study, "stage_2", stage_2)
    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "samples_of", lambda config, line, *_: (Samples(line.training), ["d"]))
    return {"load": lambda data, **_: dataclasses.replace(line, name=data)}, short, seen


@pytest.mark.parametrize("unfinished", ["", "train", "classifier"])
def test_a_run_is_finished_with_both_its_stages(no_training, tmp_path, unfinished):
    given, short, seen = no_training
    short.add(unfinished)
    given = {"data": "a//b", "defects_from": "labelled", "workdir": tmp_path, **given}
    record = study.run(tiny(), **given)
    assert (record["finished"], record["train_seconds"], record["experiment"]) == (not unfinished, 301, "segmentation")
    assert record["config"] == {**configs.to_dict(tiny()), "data": "a/b", "defects": "labelled"}
    assert files.read_json(tmp_path / "config.json") == {"experiment": "segmentation", **record["config"]}
    assert files.read_json(tmp_path / "defects.json") == ["d"]
    assert [row["use"] for row in files.read_json(tmp_path / "manifest.json")].count("train") == 5
    seen.clear()
    assert study.run(tiny(), **given) == record
    assert bool(seen) == bool(unfinished)  # what is finished is only read


@pytest.mark.parametrize("unfinished", ["", "pretrain", "adapt", "classifier_before", "classifier_after"])
def test_a_transfer_is_finished_with_all_its_stages(no_training, tmp_path, unfinished):
    given, short, seen = no_training
    short.add(unfinished)
    lines = {"source": "old", "target": "new"}
    given = {**lines, "defects_from": "", "workdir": tmp_path, **given}
    record = transfer.run(tiny(), **given)
    assert (record["finished"], record["experiment"]) == (not unfinished, "transfer")
    assert record == files.read_json(tmp_path / "metrics.json")
    settings = {**configs.to_dict(tiny()), **lines, "defects": ""}
    assert files.read_json(tmp_path / "config.json") == {"experiment": "transfer", **settings}
    for where in lines:
        assert files.read_json(tmp_path / where / "defects.json") == ["d"]
    # What came after pretraining took it as well.
    for when, seconds in (("before", 301), ("after", 4021)):
        for where, name in lines.items():
            found = record[when][where]
            assert (found["of"], found["in"]) == (f"classifier_{when}", f"{when}_{where}")
            assert (found["line"], found["train_seconds"]) == (name, seconds)
    # Adapting starts from what was pretrained, at step 0 and on a mixture.
    samples, start = seen["adapt"]
    assert int(start.step) == 0
    np.testing.assert_array_equal(start.params["w"], [1, 1])
    assert seen["pretrain"][0].new_line is seen["classifier_before"][0].new_line is None
    assert samples.new_line is seen["classifier_after"][0].new_line is not None
    assert [int(seen[f"classifier_{when}"][1].params["w"][0]) for when in ("before", "after")] == [1, 2]
    seen.clear()
    assert transfer.run(tiny(), **given) == record
    assert bool(seen) == bool(unfinished)


def test_stages_of_a_batch_that_the_devices_do_not_divide_are_only_evaluated(no_training, tmp_path, monkeypatch):
    given = {"defects_from": "", "workdir": tmp_path / "w", **no_training[0]}
    monkeypatch.setattr(parallel, "mesh", lambda: jax.sharding.AbstractMesh((3,), ("data",)))
    for run, data in ((study.run, {"data": "a"}), (transfer.run, {"source": "a", "target": "b"})):
        with pytest.raises(InputError, match="a batch of 2 cannot be divided among 3 devices"):
            run(tiny(), **data, **given)
        with pytest.raises(InputError, match="there is no run in"):
            run(tiny(), **data, **given, evaluate_only=True)


@pytest.mark.slow
def test_transfer_binary(data, tmp_path):
    result = start(
        "transfer",
        f"--source={data / 'line'}",
        f"--target={data / 'line'}",
        f"--defects={data / 'defects'}",
        f"--workdir={tmp_path / 'w'}",
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "w" / "metrics.json").read_text())
    for when in ("before", "after"):
        for where in ("source", "target"):
            assert set(record[when][where]["maps"]) == {"segmentation", "classification"}
            assert (tmp_path / "w" / f"{when}_{where}" / "figures" / "examples_segmentation.png").exists()
    assert record["before"]["source"]["maps"] != record["after"]["source"]["maps"]
    assert "after, target line, segmentation" in result.stdout


def test_defects_kept_for_testing_are_not_trained_on(data, tmp_path):
    library, _ = defects.load(data / "defects", size=64)
    train, test = defects.split(library, 0.5, seed=0)
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "split.json").write_text(json.dumps(defects.split_record(train, test, 0.5, 0)))
    line = study.load_line(tiny(), str(data / "line"), datasets.load)
    other = str(tmp_path / "elsewhere")  # in transfer, any of the lines may hold defects back
    found, record = study.samples_of(tiny(), line, str(data / "defects"), [other, str(tmp_path / "line")])
    assert {r["sha256"] for r in record} == set(train.sha256)
    defects.check_disjoint(found.library, test)
    every, _ = study.samples_of(tiny(), line, str(data / "defects"), [other])
    assert set(every.library.sha256) == set(library.sha256)
    (tmp_path / "line" / "split.json").write_text("[]")
    with pytest.raises(InputError, match=r"split\.json"):
        study.samples_of(tiny(), line, str(data / "defects"), [str(tmp_path / "line")])
    with pytest.raises(InputError, match="kept for testing"):
        defects.without(library, library.sha256)


def test_alterations_of_the_line_alone_and_with_others(data):
    line = study.load_line(tiny(), str(data / "line"), datasets.load)
    folder = str(data / "defects")
    alone, record = study.samples_of(tiny(), line, "line", [])
    assert alone.library is None
    assert alone.altered == 1
    assert record == [{"source": "line"}]
    inserted, others = study.samples_of(tiny(), line, folder, [])
    assert inserted.altered is None
    both, record = study.samples_of(tiny(altered=0.3), line, f"line,{folder}", [])
    assert both.altered == 0.3
    assert record == [{"source": "line"}, *others]
    assert both.library.sources == inserted.library.sources
    drawn, _ = study.samples_of(tiny(), line, "line,procedural", [])
    assert drawn.library.sources[0].startswith("procedural/")


def test_one_picture_in_two_file_formats_is_one_source(data, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            picture = cv2.imread(str(data / "defects" / kind / "pit" / f"{i}.png"), cv2.IMREAD_GRAYSCALE)
            assert cv2.imwrite(str(tmp_path / kind / f"{i}.png"), picture)
            assert cv2.imwrite(str(tmp_path / kind / f"copy{i}.bmp"), picture)
    library, _ = defects.load(tmp_path, size=64)
    assert len(library.sources) == 6
    train, test = defects.split(library, 0.4, seed=0)
    assert not set(train.sha256) & set(test.sha256)
    with pytest.raises(InputError, match="same image"):
        defects.check_disjoint(library, test)


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_labelled_data_trains_without_defects_from_elsewhere(good, data, tmp_path):
    marked = good[1].copy()
    marked[20:40, 20:40] = 255
    line = datasets.Dataset(
        "x",
        Images(good),
        [{"path": str(i)} for i in range(6)],
        [],
        [datasets.TestImage("0", "pit", marked, marked == 255)],
    )
    given = {"data": "x", "defects_from": "labelled"}
    record = study.run(tiny(), **given, workdir=tmp_path / "w", load=lambda *_, **__: line)
    assert record["maps"] == {}
    assert record["images"]["train"] == 5
    with pytest.raises(InputError, match="no labelled training images"):
        study.run(tiny(), **given, workdir=tmp_path / "v", load=lambda *_, **__: dataclasses.replace(line, labelled=[]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patch_size": 40}, "multiple of 16"),
        ({"classifier_ratio": "1:0"}, "no good sample"),
        ({"steps": 0, "epochs": 0}, "no step"),
        ({"defect_size": 10}, "at least 64"),
        ({"new_line": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        tiny(**settings)


def test_a_wrong_loss_or_model_leaves_no_workdir(data, tmp_path):
    with pytest.raises(InputError, match="no model 'resnet': use one of unet, compact_cnn"):
        study.run(tiny(model="resnet"), data=str(data / "line"), defects_from="procedural", workdir=tmp_path / "w")
    with pytest.raises(InputError, match="no loss 'l2': use one of mse"):
        study.run(tiny(loss="l2"), data=str(data / "line"), defects_from="procedural", workdir=tmp_path / "w")
    with pytest.raises(InputError, match="no loss 'l2': use one of mse"):
        transfer.run(tiny(loss="l2"), source="none", target="none", defects_from="", workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("model", "side"), [("unet", 32), ("compact_cnn", 8)])
def test_a_loss_is_tried_on_masks_of_the_size_that_the_network_gives(monkeypatch, model, side):
    def of_this_size(logits, target):
        assert logits.shape == target.shape == (2, side, side, 1)
        return losses.mse(logits, target)

    monkeypatch.setitem(losses.SEGMENTATION_LOSSES, "own", of_this_size)
    study.check_loss(tiny(model=model, loss="own"))
    with pytest.raises(InputError, match=f"own does not work on patches of {side // 2}x{side // 2}"):
        study.check_loss(tiny(model=model, loss="own", patch_size=16))


# What is read off trained stages.


def test_models_are_drawn_side_by_side_on_two_images_of_each_kind(good, tmp_path, monkeypatch):
    kinds = ["pit", "good", "dent", "arc", "good", "spot", "pit", "pit", "dent", "arc", "good", "dent"]
    test = [datasets.TestImage(f"{i}", kind, good[i % 6], good[i % 6] > 128) for i, kind in enumerate(kinds)]
    monkeypatch.setattr(datasets, "load", lambda *_, **__: datasets.Dataset("line", Images(), [], test, []))
    # A model's map is the image, brighter by what was learnt, which is its probability too.
    learnt = {"a": 1.0, "b": 2.0, "c": 3.0}
    kind = segmentation.SegmentationDetector
    monkeypatch.setattr(kind, "residual", lambda self, state, image: image + state)
    monkeypatch.setattr(kind, "probability", lambda self, state, image: state + 0 * image.mean())
    monkeypatch.setattr(kind, "restore", lambda self, folder: np.float32(learnt[folder.name]))
    drawn = []
    monkeypatch.setattr(figures, "predictions", lambda path, rows, *, title: drawn.extend(rows) or path)
    for name, model in (("a", "unet"), ("b", "compact_cnn"), ("c", "unet")):
        settings = {**configs.to_dict(tiny(model=model)), "data": "x", "defects": ""}
        files.write_json(tmp_path / name / "config.json", settings)
        files.write_json(tmp_path / name / "manifest.json", [])
    picture = study.predictions([tmp_path / name for name in learnt])
    assert picture == tmp_path / "a" / "figures" / "predictions.png"
    # Good ones first, then by name, and no more than eight.
    assert [row.name for row in drawn] == ["1", "4", "3", "9", "2", "8", "0", "6"]
    for row in drawn:
        np.testing.assert_array_equal(row.image, test[int(row.name)].image)
        np.testing.assert_array_equal(row.truth, test[int(row.name)].mask)
        assert list(row.maps) == ["U-Net", "CompactCNN", f"U-Net, {tmp_path / 'c'}"]
        for (raw, score), added in zip(row.maps.values(), learnt.values(), strict=True):
            np.testing.assert_allclose(raw, row.image / 255 + added, rtol=1e-6)
            assert score == added
    drawn.clear()
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "is_main", lambda: False)
        assert study.predictions([tmp_path / "a"]) == picture
    assert not drawn
    test.clear()
    with pytest.raises(InputError, match="no test images to draw"):
        study.predictions([tmp_path / "a"])
    for settings in ({"data": "x"}, {"data": "y", "defects": ""}):
        files.write_json(tmp_path / "b" / "config.json", settings)
        with pytest.raises(InputError, match="b holds no segmentation run on x"):
            study.predictions([tmp_path / "a", tmp_path / "b"])

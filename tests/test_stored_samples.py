"""Supervised training on images and masks that stay in their files: the samples, steps and results of those in memory."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.segmentation import PRESETS
from steel_ad import parallel
from steel_ad.config import Autoencoder, Segmentation
from steel_ad.data import datasets, defects, images, workers
from steel_ad.data.images import Images, Later
from steel_ad.data.patches import Streamed
from steel_ad.detectors import segmentation
from steel_ad.detectors.segmentation import Samples
from steel_ad.errors import InputError
from steel_ad.ops import convolution
from steel_ad.report import evaluation as figures
from steel_ad.report import training
from steel_ad.runs import segmentation as study
from steel_ad.runs import transfer
from steel_ad.train import feed, fit
from steel_ad.train import step as steps
from steel_ad.train.checkpoint import Checkpoints

TINY = Segmentation(**{**PRESETS["tiny"], "flips": True, "batch_size": 4})
ROOT = jax.random.key(3)


@pytest.fixture(scope="module")
def library():
    return defects.fitting(defects.procedural(jax.random.key(1), 6, size=64), (32, 32))[0]


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A class of DAGM, of whose nine training images four are labelled, and another line."""
    root = tmp_path_factory.mktemp("stored") / "Class1"
    rng = np.random.default_rng(0)
    for part, count, bad in (("Train", 9, (1, 4, 5, 7)), ("Test", 3, (0,))):
        for i in range(count):
            image = rng.integers(20 * i, 20 * i + 60, (48, 48) if part == "Test" else (40 + 8 * (i % 2), 48), np.uint8)
            if i in bad:
                label = np.zeros(image.shape, np.uint8)
                label[5 * i : 5 * i + 4, 30:45] = 255
                image[label > 0] = 250
                write(root / part / "Label" / f"{i:04d}_label.PNG", label)
            write(root / part / f"{i:04d}.PNG", image)
    for i in range(5):
        write(root.parent / "line" / "train" / "good" / f"{i}.png", rng.integers(0, 9 + i, (36, 40), np.uint8))
    return root


@pytest.fixture
def here(monkeypatch):
    """Reads in this process, since processes take seconds to start."""
    monkeypatch.setattr(workers, "_workers", lambda: 0)


@pytest.fixture
def own_code(monkeypatch):
    """The code that XLA makes by default: its older emitters, with which the suite compiles, round what they fuse otherwise."""
    options = convolution.cpu_compiler_options() or {}
    if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
        options = {**options, "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(steps, "cpu_compiler_options", lambda: options or None)
    clear = fit._step.cache_clear
    clear()
    yield
    clear()


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(training, "training_curve", lambda *a, **k: None)
    for name in ("examples", "score_histogram", "curves"):
        monkeypatch.setattr(figures, name, lambda *a, **k: None)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def samples(root, library, what):
    """The same samples in memory and in their files."""
    found = []
    for resident in (float("inf"), -1):
        data = datasets.load(str(root), resident=resident)
        line = datasets.load(str(root.parent / "line"), resident=resident)
        good, new_line = data.train, line.train
        if "labelled" in what:
            made = segmentation.labelled(good, data.labelled, seed=0)
        else:
            made = Samples(good, library, 0.5 if "altered" in what else None)
        found.append(made._replace(new_line=new_line) if "new line" in what else made)
    if "some" in what:  # the labelled images alone, or the good ones of the new line alone, do not fit
        found[1] = found[1]._replace(good=found[0].good)
    return found


KINDS = ["inserted, new line", "inserted, altered, new line", "labelled", "labelled, new line, some in memory"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("what", KINDS)
def test_the_samples_are_those_of_images_in_memory(root, library, what, monkeypatch):
    """To the bit, from the first step and from a later one, in several portions."""
    monkeypatch.setattr(workers, "_PLACES", 2 * TINY.batch_size * 3)
    mesh, share, taken = parallel.mesh(), 0.5, set()
    resident, there = samples(root, library, what)
    resident = feed.on_device(resident, mesh)
    draw = jax.jit(lambda data, step: segmentation.draw(TINY, share, data, step, ROOT))
    stage = segmentation.stage(dataclasses.replace(TINY, ratio="1:1"), 8)
    for first in (0, 5):
        for s, call in enumerate(feed.calls(stage, there, ROOT, first=first, mesh=mesh), first):
            now = [f._replace(pixels=f.pixels[0]) if isinstance(f, Streamed) else f for f in call]
            got = draw(Samples(*now), jnp.int32(s))
            expected = draw(resident, jnp.int32(s))
            same(got, expected)
            taken |= set(np.asarray(expected.label).tolist())
        assert s == 7
    assert taken == {0, 1}


@pytest.mark.slow
@pytest.mark.usefixtures("own_code")
def test_worker_processes_give_the_steps_of_images_in_memory(root, library, monkeypatch):
    """To the bit: parameters, statistics and every loss; and the step is compiled once."""
    compiled, make = [], fit._step
    monkeypatch.setattr(fit, "_step", lambda *a, **k: compiled.append(make(*a, **k)) or compiled[-1])
    monkeypatch.setattr(workers, "_workers", lambda: 2)
    config = dataclasses.replace(TINY, model="compact_cnn")  # it compiles in half the time
    stage, ends = segmentation.stage(config, 4), []
    for data in samples(root, library, "labelled, new line"):
        state, rows = segmentation.initial_segmentation(config, 4), []
        rest = {"seed": 0, "name": "train", "on_step": lambda *row, rows=rows: rows.append(row)}
        ends.append((segmentation.train(stage, data, state, **rest), rows))
    same(*ends)
    assert [s for s, _ in rows] == [1, 2, 3, 4]
    assert compiled[0] is compiled[1]
    assert compiled[0]._cache_size() == 2  # once for either data


class Stopped(Exception):
    """Takes the place of a kill, between two checkpoints."""


def stopped_after(folder, step, call, *arguments, **given):
    """A run that ends right after that step's checkpoint in that folder."""
    save = Checkpoints.save

    def saving(self, now, *rest):
        save(self, now, *rest)
        if (self.directory.name, now) == (folder, step):
            self.wait()
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        with pytest.raises(Stopped):
            call(*arguments, **given)


@pytest.mark.slow
@pytest.mark.usefixtures("here", "own_code", "without_pictures")
def test_a_run_from_files_goes_on_in_mid_epoch_and_ends_as_one_in_memory(root, tmp_path):
    """To the bit: both stages' losses, scores and metrics."""
    ratios = {"ratio": "3:1", "classifier_ratio": "1:3", "samples": 32}  # eight steps an epoch
    config = dataclasses.replace(TINY, model="compact_cnn", **ratios)
    given = {"data": str(root), "defects_from": "labelled"}
    whole = study.run(config, **given, workdir=tmp_path / "device")
    grain = dataclasses.replace(config, data_path="grain")
    for folder in ("checkpoints", "checkpoints_classifier"):
        stopped_after(folder, 2, study.run, grain, **given, workdir=tmp_path / "grain")
    again = study.run(grain, **given, workdir=tmp_path / "grain")
    assert again["finished"]
    for key in ("maps", "thresholds", "images", "dataset"):
        np.testing.assert_equal(again[key], whole[key])
    for name in ("train.csv", "train_classifier.csv", "scores.csv", "manifest.json", "defects.json"):
        assert (tmp_path / "grain" / name).read_bytes() == (tmp_path / "device" / name).read_bytes()
    with pytest.raises(InputError, match="data_path"):
        study.run(config, **given, workdir=tmp_path / "grain")


def test_transfer_reads_both_lines_from_their_files(root, tmp_path, monkeypatch):
    held = {}

    def train(stage, data, state, *, name, **_):
        held[name] = data
        return state

    monkeypatch.setattr(segmentation, "train", train)
    monkeypatch.setattr(study, "evaluate", lambda *_: {})
    given = {"source": str(root), "target": str(root.parent / "line"), "defects_from": ""}
    transfer.run(dataclasses.replace(TINY, data_path="grain"), **given, workdir=tmp_path / "w")
    assert list(held) == ["pretrain", "adapt", "classifier_before", "classifier_after"]
    for data in held.values():
        assert all(isinstance(s, Images) for s in (data.good, data.labelled, data.masks))
    for stage, size in (
        ("pretrain", None),
        ("adapt", [36, 40]),
        ("classifier_before", None),
        ("classifier_after", [36, 40]),
    ):
        new = held[stage].new_line
        assert (None if new is None else new.sizes[0].tolist()) == size


def test_dagm_stays_in_its_files(root):
    here, there = (datasets.load(str(root), resident=r) for r in (float("inf"), 0))
    kept = [
        (d.train, datasets.images_of(d.labelled), datasets.masks_of(d.labelled), datasets.images_of(d.test))
        for d in (here, there)
    ]
    assert [[i.stored for i in sets] for sets in kept] == [[False] * 4, [True] * 4]
    assert not datasets.masks_of(there.test).stored
    for a, b in zip(*kept, strict=True):
        same([*a], [*b])
    for a, b in ((here.labelled, there.labelled), (here.test, there.test)):
        assert [(t.name, t.kind) for t in a] == [(t.name, t.kind) for t in b]
        same([(t.image, t.mask) for t in a], [(t.image, t.mask) for t in b])
    assert [t.name for t in there.labelled[1:3]] == ["defect/0004.PNG", "defect/0005.PNG"]


def test_a_label_that_cannot_be_used_ends_in_a_sentence(root, tmp_path):
    for label, said in ((np.zeros((40, 48)), "labels no pixel"), (np.ones((9, 9)), "give a mask of the image's size")):
        shutil.copytree(root, tmp_path / said)
        write(tmp_path / said / "Train" / "Label" / "0004_label.PNG", label.astype(np.uint8))
        labelled = datasets.load(str(tmp_path / said), resident=-1).labelled
        with pytest.raises(InputError, match=rf"0004_label\.PNG.*{said}"):
            study._labelled(labelled)
        with pytest.raises(InputError, match=said):
            datasets.load(str(tmp_path / said))


def test_images_of_any_kind_are_one_sequence(root):
    there, drawn = datasets.load(str(root), resident=-1), []

    def draw():
        drawn.append(1)
        return np.ones((5, 2), np.uint8)

    parts = [there.train, [np.zeros((3, 4), np.uint8), Later((5, 2), draw)], datasets.masks_of(there.labelled)]
    joined = Images(*parts)
    assert drawn == []
    assert joined.sizes.tolist() == [[40, 48]] * 2 + [[48, 48], [40, 48], [40, 48]] + [[3, 4], [5, 2]] + [
        list(t.mask.shape) for t in there.labelled
    ]
    every = [image for part in parts[:1] for image in part] + [parts[1][0], draw()] + [*parts[2]]
    assert len(joined) == len(every) == 11
    same([*joined], every)
    same([*joined[4:7]], every[4:7])
    same([*joined.take(np.array([10, 0]))], [every[10], every[0]])
    same(joined[-1], every[-1])
    with pytest.raises(IndexError):
        joined[11]
    assert not Images(parts[1][:1]).stored
    assert Images(parts[1]).stored
    assert (Images().sizes.shape, Images().num_pixels, Images().stored) == ((0, 2), 0, False)
    places = np.array([[[-1, 9, 9], [0, 2, 1]], [[7, 4, 29], [-1, 0, 0]]], np.int32)
    there, cut = workers._cut(joined, 3, places)
    assert len(cut) == 2  # nothing is sent of what nobody looks at
    nothing = np.zeros((3, 3), np.uint8)
    same(workers._whole(there, cut), [[nothing, every[0][2:5, 1:4]], [every[7][4:7, 29:32], nothing]])


def test_a_layout_is_one_function_and_one_line(root, tmp_path, monkeypatch):
    """Images `NNN_good.png`, `NNN_bad.png` and `NNN_bad.mask.png` in one folder."""

    def flat(data, *, min_size, train, resident):
        good = images.read(sorted(Path(data).glob("*_good.png")), min_size=min_size, resident=resident)
        bad = images.read(sorted(Path(data).glob("*_bad.png")), min_size=min_size, resident=resident)
        masks = sorted(Path(data).glob("*_bad.mask.png"))
        test = [
            datasets.TestImage(mask.name, "bad", item, images.read_mask(mask, item.shape, "is empty"))
            for item, mask in zip(bad.items, masks, strict=True)
        ]
        return datasets.Dataset("flat", good, [{}] * len(good), test)

    layout = datasets.Layout(lambda data: any(Path(data).glob("*_bad.mask.png")), flat)
    monkeypatch.setattr(datasets, "LAYOUTS", {"flat": layout, **datasets.LAYOUTS})
    dagm = datasets.load(str(root), resident=-1)
    for i, image in enumerate(dagm.train):
        write(tmp_path / "flat" / f"{i}_good.png", image)
    write(tmp_path / "flat" / "7_bad.png", dagm.labelled[0].image)
    write(tmp_path / "flat" / "7_bad.mask.png", np.uint8(200) * dagm.labelled[0].mask)
    found = datasets.load(str(tmp_path / "flat"), min_size=40, resident=0)
    same([*found.train], [*dagm.train])
    same((found.test[0].image, found.test[0].mask), (dagm.labelled[0].image, dagm.labelled[0].mask))
    assert len(dagm.labelled) == 4


def test_settings(tmp_path):
    with pytest.raises(InputError, match="auto, device, grain"):
        dataclasses.replace(TINY, data_path="disk")
    with pytest.raises(InputError, match="at least 0"):
        dataclasses.replace(TINY, resident_mb=-1)
    for config in (TINY, Autoencoder()):
        assert dataclasses.replace(config, resident_mb=2).resident_bytes == 2e6
        assert dataclasses.replace(config, resident_mb=4000).resident_bytes == 2147483647  # what int32 can number
    with pytest.raises(InputError, match="adadelta, adam"):
        dataclasses.replace(TINY, optimizer="sgd")
    assert dataclasses.replace(TINY, data_path="device").resident_bytes == float("inf")
    grain = dataclasses.replace(TINY, data_path="grain")
    with pytest.raises(InputError, match="drawn, not read from files"):
        study.run(grain, data="procedural/diamond/128", defects_from="", workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_record_of_labelled_images_is_the_same(root):
    rows = [study._labelled(datasets.load(str(root), resident=r).labelled) for r in (float("inf"), -1)]
    assert rows[0] == rows[1]
    assert json.dumps(rows[0]).count("sha256") == 4

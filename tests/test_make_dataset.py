"""Data sets made from videos, from good plates and defects, and the thesis' five; and the DAGM reader."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from steel_ad.data import datasets, defects, folders, video
from steel_ad.errors import InputError
from steel_ad.making import batches, from_video, inserted, thesis
from steel_ad.making.settings import FromVideo, Inserted, Thesis

ROOT = Path(__file__).parent.parent
BLANK, BLURRED = 2, 4


def start(*arguments):
    line = [sys.executable, "-m", "experiments.make_dataset", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def cut(source, out, **options):
    return from_video.run(FromVideo(**options), source=source, out=out)


def insert(data, defects_from, out, **options):
    return inserted.run(Inserted(**options), data=str(data), defects_from=str(defects_from), out=out)


def make_thesis(out, defects_from, **options):
    return thesis.run(Thesis(**options), defects_from=str(defects_from), out=out)


def texture(seed, shape=(96, 80), sigma=1.0):
    noise = np.random.default_rng(seed).normal(0, 1, (shape[0] + 40, shape[1] + 40))
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma)[20:-20, 20:-20]
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    folders.write_image(path, image.astype(np.uint8))


def write_video(path, images):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, images[0].shape[::-1])
    for image in images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    writer.release()


def decode(path):
    capture, images = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (found := capture.read())[0]:
        images.append(cv2.cvtColor(found[1], cv2.COLOR_BGR2GRAY))
    return images


def manifest(out):
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(out):
    """Every file below a folder, hidden ones too: a leftover counts."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def one_sentence(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message, caught.value.status


@pytest.fixture(scope="module")
def plate(tmp_path_factory):
    """Six frames, one blank but for noise, one out of focus; and what a decoder makes of them."""
    images = [texture(i) for i in range(6)]
    images[BLANK] = np.clip(np.random.default_rng(9).normal(90, 1.5, (96, 80)), 0, 255).astype(np.uint8)
    images[BLURRED] = texture(4, sigma=4.0)
    path = tmp_path_factory.mktemp("video") / "plate.avi"
    write_video(path, images)
    return path, decode(path)


# From video.


@pytest.mark.parametrize("options", [{}, {"positions": "random", "per_frame": 5, "seed": 3}], ids=["grid", "random"])
def test_patches_are_the_frames_pixels(tmp_path, plate, options):
    path, frames = plate
    found = cut(path, tmp_path / "out", size=32, **options)
    rows = manifest(tmp_path / "out")
    assert list(rows[0]) == ["file", "source", "frame", "top", "left", "sha256"]
    assert {row["file"] for row in rows} == {p.name for p in folders.good_images(tmp_path / "out")}
    for row in rows:
        top, left, file = int(row["top"]), int(row["left"]), tmp_path / "out" / row["file"]
        patch = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(patch, frames[int(row["frame"])][top : top + 32, left : left + 32])
        assert patch.shape == (32, 32)
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert row["source"] == "plate.avi"
    places = [[(int(r["top"]), int(r["left"])) for r in rows if int(r["frame"]) == f] for f in (0, 1, 3, 5)]
    assert found["patches"] == found["written"] == len(rows) == sum(map(len, places))  # no other frame
    if options:
        assert [len(set(of_frame)) for of_frame in places] == [5] * 4
        assert places[0] != places[1]
    else:
        assert places == [[(top, left) for top in (0, 32, 64) for left in (0, 32)]] * 4


def test_blank_and_blurred_frames_are_counted_and_zero_lets_them_pass(tmp_path, plate):
    found = cut(plate[0], tmp_path / "a", size=64)
    assert (found["frames"], found["blank"], found["blurred"], found["warning"]) == (6, 1, 1, None)
    with (tmp_path / "a" / "frames.csv").open(newline="") as file:
        verdicts = [row["verdict"] for row in csv.DictReader(file)]
    assert verdicts == ["good", "good", "blank", "good", "blurred", "good"]
    found = cut(plate[0], tmp_path / "b", size=64, min_contrast=0, min_sharpness=0)
    assert (found["blank"], found["blurred"], found["patches"]) == (0, 0, 6)
    message, _ = one_sentence(cut, plate[0], tmp_path / "c", size=64, min_contrast=200)
    assert "6 are blank" in message
    assert not (tmp_path / "c").exists()  # so that a lower threshold may use the folder


def test_truncated_video_keeps_what_is_whole_and_names_the_rest(tmp_path, plate):
    path, frames = plate
    short = tmp_path / "short.avi"
    short.write_bytes(path.read_bytes()[: int(0.8 * path.stat().st_size)])
    out = tmp_path / "out"
    for again in (False, True):
        result = start("from_video", f"--video={short}", f"--out={out}", "--size=32")
        assert result.returncode == 0, result.stderr
        *progress, warning = result.stderr.splitlines()
        assert all(line.startswith(("survey: ", "cut: ")) for line in progress)  # no word of FFmpeg's
        assert len(progress) == (0 if again else 1)
        with (out / "frames.csv").open(newline="") as file:
            read = len(list(csv.DictReader(file)))
        assert 2 <= read < 6
        assert warning.startswith("warning: ")
        assert f"promises 6 frames, of which {6 - read} cannot be read" in warning
    rows = manifest(out)
    assert {int(row["frame"]) for row in rows} == set(range(read)) - {BLANK, BLURRED}
    for row in rows:  # a frame half grey would differ
        top, left = int(row["top"]), int(row["left"])
        patch = folders.read_image(out / row["file"])
        np.testing.assert_array_equal(patch, frames[int(row["frame"])][top : top + 32, left : left + 32])


def test_damage_in_the_middle_is_said_in_our_words_only(tmp_path, plate):
    content = bytearray(plate[0].read_bytes())
    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        at = int(share * len(content))
        content[at : at + 300] = b"\xff" * 300
    (tmp_path / "damaged.avi").write_bytes(content)
    result = start("from_video", f"--video={tmp_path / 'damaged.avi'}", f"--out={tmp_path / 'out'}", "--size=32")
    assert result.returncode == 0
    assert all(line.startswith(("survey: ", "cut: ", "warning: ")) for line in result.stderr.splitlines())


def test_random_places_are_all_different(tmp_path, plate):
    cut(plate[0], tmp_path / "out", size=80, positions="random", per_frame=17)  # of 17
    assert [int(row["top"]) for row in manifest(tmp_path / "out")] == list(range(17)) * 4


KILLED = """
import os, signal, sys
from pathlib import Path
from steel_ad.data import folders
from steel_ad.making import from_video
from steel_ad.making.settings import FromVideo

count, write = 0, os.replace
def replace(source, target):
    global count
    count += str(target).endswith(".png")
    os.kill(os.getpid(), signal.SIGKILL) if count == 9 else write(source, target)
folders.os.replace = replace
from_video.run(FromVideo(size=32), source=Path(sys.argv[1]), out=Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_to_the_same_set(tmp_path, plate):
    path, out, whole = plate[0], tmp_path / "out", tmp_path / "whole"
    line = [sys.executable, "-c", KILLED, str(path), str(out)]
    assert subprocess.run(line, cwd=ROOT, timeout=300, check=False).returncode == -signal.SIGKILL
    assert len(list(out.glob("*.png"))) == 8
    assert list(out.glob(".*.tmp"))
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.png")}
    assert cut(path, out, size=32)["written"] == 24 - 8
    assert {p: p.stat().st_mtime_ns for p in before} == before
    cut(path, whole, size=32)
    assert contents(out) == contents(whole)
    assert cut(path, out, size=32)["written"] == 0
    next(iter(before)).write_bytes(b"other")
    message, _ = one_sentence(cut, path, out, size=32)
    assert "is not what manifest.csv says" in message


def test_other_settings_and_other_folders_are_refused(tmp_path, plate):
    path, out = plate[0], tmp_path / "out"
    cut(path, out, size=64)
    before = contents(out)
    message, status = one_sentence(cut, path, out, size=32)
    assert (status, "differs in size (32 here, 64 there)" in message) == (2, True)
    other = tmp_path / "other.avi"
    write_video(other, [texture(7)])
    assert "video_sha256" in one_sentence(cut, other, out, size=64)[0]
    assert contents(out) == before
    save(tmp_path / "mine" / "a.png", texture(0))
    assert "holds other files" in one_sentence(cut, path, tmp_path / "mine", size=64)[0]


def test_what_is_no_video_ends_in_a_sentence_and_leaves_nothing(tmp_path, plate):
    out = tmp_path / "out"
    save(tmp_path / "picture.png", texture(0))
    (tmp_path / "text.avi").write_text("no frames here\n" * 100)  # FFmpeg would draw a text
    writer = cv2.VideoWriter(str(tmp_path / "empty.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (80, 96))
    writer.release()
    (tmp_path / "head.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(5000))
    (tmp_path / "start.avi").write_bytes(plate[0].read_bytes()[:6000])
    for name, words, expected in (
        ("absent.avi", "does not exist", 2),
        ("", "is not a file", 2),
        ("picture.png", "is not a video", 2),
        ("text.avi", "is not a video", 2),
        ("empty.avi", "has no frames", 2),
        ("head.mp4", "cannot be opened", 1),
        ("start.avi", "none of its 6 frames can be read", 1),
    ):
        message, status = one_sentence(cut, tmp_path / name, out)
        assert (words in message, status) == (True, expected), (name, message, status)
    message, status = one_sentence(cut, plate[0], out, size=81)
    assert ("80x96 pixels, smaller than the patch of 81" in message, status) == (True, 2)
    for options in (
        {"positions": "everywhere"},
        {"per_frame": 3},
        {"seed": 1},
        {"size": 0},
        {"min_contrast": float("nan")},
        {"positions": "random", "seed": -1},
        {"positions": "random", "size": 80, "per_frame": 18},
    ):
        assert one_sentence(cut, plate[0], out, **{"size": 32} | options)[1] == 2
    assert not out.exists()


def test_frames_are_independent_arrays_of_any_colour(tmp_path):
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 2] = 200
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    writer.write(red)
    writer.write(red // 2)
    writer.release()
    first, second = video.frames(tmp_path / "red.avi")
    assert (first.dtype, first.shape) == (np.uint8, (48, 64))
    assert abs(float(first.mean()) - 0.299 * 200) < 2
    assert abs(float(second.mean()) - 0.299 * 100) < 2


# Insertion.


def steel(seed, change=70, side=9):
    image = np.clip(np.random.default_rng(seed).normal(110, 2, (60, 60)), 0, 255)
    mask = np.zeros((60, 60), bool)
    mask[25 : 25 + side, 22 : 25 + side] = True
    return (image + change * mask).astype(np.uint8), mask * 255


@pytest.fixture(scope="module")
def steels(tmp_path_factory):
    """Two kinds of defects from four images each, and one file that cannot be used."""
    root = tmp_path_factory.mktemp("steel")
    for k, kind in enumerate(("dark", "light")):
        for i in range(4):
            image, mask = steel(10 * k + i, change=-80 if kind == "dark" else 80, side=7 + i)
            save(root / "images" / kind / f"{i}.png", image)
            save(root / "masks" / kind / f"{i}.png", mask)
    save(root / "images" / "dark" / "unlabelled.png", texture(0))
    return root


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """20 good training plates, the last two of equal content, and 3 good test plates of which one is a training plate."""
    root = tmp_path_factory.mktemp("line")
    for i in range(20):
        save(root / "train" / "good" / f"{i:02d}.png", texture(100 + min(i, 18), (64, 72)))
    for i in range(3):
        save(root / "test" / "good" / f"{i}.png", texture(100 + i * 50, (64, 72)))
    return root


def test_inserted_defects_are_where_the_masks_say_and_from_the_test_side(tmp_path, steels, line):
    out = tmp_path / "out"
    found = insert(line, steels, out, num_test=4, test_fraction=0.5, blend="paste", seed=1)
    assert found["kinds"] == {"good": 4, "dark": 2, "light": 2}
    assert len(found["skipped"]) == 1

    record = json.loads((out / "split.json").read_text())
    sides = {side: {s["sha256"] for s in record[side]["sources"]} for side in ("train", "test")}
    assert [len(side) for side in sides.values()] == [4, 4]
    assert not sides["train"] & sides["test"]
    assert record["skipped"] == found["skipped"]

    rows = [row for row in manifest(out) if row["file"].startswith("test/") and row["defect"]]
    assert len({row["defect"] for row in rows}) == 4  # each in turn, none twice before all were used
    for row in rows:
        whole = folders.read_image(steels / row["defect"])
        assert hashlib.sha256(repr(whole.shape).encode() + whole.tobytes()).hexdigest() in sides["test"]
        kind, name = row["file"].split("/")[1:]
        assert row["defect"].startswith(f"images/{kind}/")
        plate, image = folders.read_image(line / row["plate"]), folders.read_image(out / row["file"])
        mask = folders.read_mask(out / "ground_truth" / kind / name.replace(".png", "_mask.png"), plate.shape)
        np.testing.assert_array_equal(image[~mask], plate[~mask])
        i = int(Path(row["defect"]).stem)
        assert mask.sum() == (7 + i) * (10 + i)
        source, label = steel((0 if kind == "dark" else 10) + i, change=-80 if kind == "dark" else 80, side=7 + i)
        assert sorted(image[mask]) == sorted(source[label > 0])

    read = datasets.load(str(out))
    assert [t.kind for t in read.test] == ["dark"] * 2 + ["good"] * 4 + ["light"] * 2
    train = {image.tobytes() for image in read.train}
    good = {t.image.tobytes() for t in read.test if t.kind == "good"}
    plates = {folders.read_image(line / row["plate"]).tobytes() for row in rows}
    # 8 plates in all, of different content; 3 are the line's own test plates, one of them a training plate as well.
    assert (len(good), len(plates), len(train), len(read.train)) == (4, 4, 19 - 1 - 5, 19 - 1 - 5)
    assert not (train & good) | (train & plates) | (good & plates)
    own = {folders.read_image(p).tobytes() for p in (line / "test" / "good").iterdir()}
    assert own <= good | plates


def test_insertion_goes_on_and_changes_nothing_else(tmp_path, steels, line):
    out = tmp_path / "out"
    insert(line, steels, out, num_test=3)
    before = contents(out)
    for name in ("test/dark/0001.png", "ground_truth/light/0000_mask.png", "train/good/0004.png", "manifest.csv"):
        (out / name).unlink()
    left = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert insert(line, steels, out, num_test=3)["written"] == 3
    assert contents(out) == before
    assert {p: p.stat().st_mtime_ns for p in left} == left
    for options, name in (({"seed": 1}, "defects|seed"), ({"blend": "paste"}, "blend"), ({"num_test": 2}, "num_test")):
        with pytest.raises(InputError, match=f"differs in ({name})"):
            insert(line, steels, out, **{"num_test": 3} | options)
    assert contents(out) == before


def test_a_source_on_both_sides_is_refused_before_anything_is_written(tmp_path, monkeypatch, steels, line):
    split = defects.split

    def leaking(library, fraction, seed):
        return library, split(library, fraction, seed)[1]

    monkeypatch.setattr(defects, "split", leaking)
    with pytest.raises(InputError, match="are the same image, in both libraries"):
        insert(line, steels, tmp_path / "out", num_test=2)
    assert not (tmp_path / "out").exists()


def test_insertion_refuses_what_it_cannot_use(tmp_path, steels, line):
    def refused(data=line, defects_=steels, **options):
        return one_sentence(insert, data, defects_, tmp_path / "out", **{"num_test": 2} | options)[0]

    # 13 of the 19 different training plates would have to go.
    assert "too few for --num_test=8" in refused(num_test=8)
    assert "no line 'circles'" in refused("procedural/circles")
    assert "does not exist" in refused(tmp_path / "absent")
    assert "does not exist" in refused(defects_=tmp_path / "absent")
    assert "--blend" in refused(blend="glue")
    assert "--augment" in refused(augment="weak")
    assert "--test_fraction" in refused(test_fraction=1.0)
    for part in ("images", "masks"):
        for i in range(2):
            save(tmp_path / "named" / part / "good" / f"{i}.png", steel(i)[part == "masks"])
    assert "called 'good'" in refused(defects_=tmp_path / "named")
    assert not (tmp_path / "out").exists()


# The thesis' sets.


@pytest.mark.slow
def test_thesis_sets(tmp_path, monkeypatch, steels):
    for name, value in (("SIZE_PX", 64), ("LIBRARY_SIZE_PX", 40), ("BATCH", 4)):
        monkeypatch.setattr(batches, name, value)
    for name, value in (("PERIOD_PX", 90.0), ("MARKS", 2)):
        monkeypatch.setattr(thesis, name, value)
    out = tmp_path / "out"
    options = {"lines": ("teardrop1", "teardrop4"), "num_train": 5, "num_test": 8}
    found = make_thesis(out, steels, **options)
    assert found["written"] == found["files"] == 2 * (5 + 8 + 4)
    for name, special in (("teardrop1", "periodic"), ("teardrop4", "watermark")):
        read = datasets.load(str(out / name))
        assert len({image.tobytes() for image in read.train}) == 5
        kinds = [t.kind for t in read.test]
        assert {kind: kinds.count(kind) for kind in kinds} == {"good": 4, special: 2, "dark": 1, "light": 1}
        assert all(t.mask.any() == (t.kind != "good") and t.image.shape == (64, 64) for t in read.test)
        assert len({t.image.tobytes() for t in read.test} | {i.tobytes() for i in read.train}) == 13
        assert (out / name / "split.json").read_text() == (out / "teardrop1" / "split.json").read_text()
    # The two marks of a roll are one defect: as large, and no further apart across the strip than patches show.
    one, two = (t.mask for t in datasets.load(str(out / "teardrop1")).test if t.kind == "periodic")
    rows = [row for row in manifest(out / "teardrop1") if row["file"].startswith("test/periodic/")]
    assert len({row["defect"] for row in rows}) == 1
    np.testing.assert_array_equal(*(np.flatnonzero(mask.any(axis=0)) for mask in (one, two)))
    assert {p.name for p in (out / "figures").iterdir()} == {"insertion.png", "datasets.png"}

    before = contents(out)
    (out / "teardrop1" / "test" / "periodic" / "0001.png").unlink()
    (out / "teardrop4" / "ground_truth" / "watermark" / "0000_mask.png").unlink()
    assert make_thesis(out, steels, **options)["written"] == 2
    assert contents(out) == before
    message, _ = one_sentence(make_thesis, out, steels, **options | {"num_train": 6})
    assert "num_train (6 here, 5 there)" in message
    for wrong in (
        {"lines": ("teardrop9",)},
        {"lines": ()},
        {"lines": ("diamond",) * 2},
        {"num_test": 6},
        {"num_train": 0},
    ):
        one_sentence(make_thesis, tmp_path / "wrong", steels, **options | wrong)
    assert not (tmp_path / "wrong").exists()


# The command line.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a command: from_video, insert, thesis"),
        (("from_movie", "--video=a"), "'from_movie' is not a command: give one of from_video, insert, thesis"),
        (("thesis", "insert"), "'thesis insert' is not a command"),
        (("--size=64", "thesis", "--out=x"), "--size is not a flag of thesis"),
        (("insert", "--out=x"), "--data is missing"),
    ],
)
def test_commands_and_their_flags(arguments, words):
    result = start(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


# DAGM 2007.


@pytest.fixture
def dagm(tmp_path):
    """Class1: Train with 3 good and 2 defective images, Test with 2 good and 1 defective, labels with weak values."""
    root = tmp_path / "Class1"
    for part, names, defective in (("Train", range(1, 6), (2, 5)), ("Test", range(1, 4), (3,))):
        for i in names:
            save(root / part / f"{i:04d}.PNG", texture(i + 10 * (part == "Test"), (40, 48)))
        for i in defective:
            label = np.zeros((40, 48))
            label[i : i + 5, 7:20] = 1 if i == 5 else 255
            save(root / part / "Label" / f"{i:04d}_label.PNG", label)
        (root / part / "Label" / "Labels.txt").write_text("1\n1\t0\t0001.PNG\t0\t\n")
    return root


def test_dagm_is_read_with_its_labels(dagm):
    read = datasets.load(str(dagm))
    assert read.name == "Class1"
    assert [row["path"] for row in read.manifest] == [f"Train/{i:04d}.PNG" for i in (1, 3, 4)]
    for row, image in zip(read.manifest, read.train, strict=True):
        np.testing.assert_array_equal(image, folders.read_image(dagm / row["path"]))
        assert row["sha256"] == folders.fingerprint(dagm / row["path"])
        assert row["bytes"] == os.path.getsize(dagm / row["path"])
    assert [(t.name, t.kind) for t in read.labelled] == [("defect/0002.PNG", "defect"), ("defect/0005.PNG", "defect")]
    for labelled, i in zip(read.labelled, (2, 5), strict=True):
        expected = np.zeros((40, 48), bool)
        expected[i : i + 5, 7:20] = True
        np.testing.assert_array_equal(labelled.mask, expected)
        np.testing.assert_array_equal(labelled.image, folders.read_image(dagm / "Train" / f"{i:04d}.PNG"))
    found = {t.name: t for t in read.test}
    assert set(found) == {"good/0001.PNG", "good/0002.PNG", "defect/0003.PNG"}
    assert {name for name, t in found.items() if t.mask.any()} == {"defect/0003.PNG"}
    np.testing.assert_array_equal(found["defect/0003.PNG"].image, folders.read_image(dagm / "Test" / "0003.PNG"))

    only_test = datasets.load(str(dagm), train=False)
    assert ([*only_test.train], only_test.manifest, only_test.labelled, len(only_test.test)) == ([], [], [], 3)


def test_dagm_refuses_small_images_and_labels_that_fit_nothing(dagm):
    assert "smaller than the patch of 41" in one_sentence(datasets.load, str(dagm), min_size=41)[0]
    save(dagm / "Test" / "Label" / "0009_label.PNG", np.ones((40, 48)))
    assert "is a label without an image" in one_sentence(datasets.load, str(dagm))[0]
    (dagm / "Test" / "Label" / "0009_label.PNG").unlink()
    save(dagm / "Test" / "Label" / "0001_label.PNG", np.zeros((40, 48)))
    assert "labels no pixel" in one_sentence(datasets.load, str(dagm))[0]


def test_the_other_layout_is_not_taken_for_dagm(line):
    assert len(datasets.load(str(line)).train) == 20


def test_frames_larger_than_any_is_read_are_not_decoded(plate, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 80)
    assert len(list(video.frames(plate[0]))) == 6
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 80 - 1)
    message, status = one_sentence(cut, plate[0], tmp_path / "out", size=32)
    assert ("frames of 80x96 pixels" in message, status) == (True, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("frames.csv", "0,96,80", "x,96,80"),
        ("frames.csv", "0,96,80", "1000000000,96,80"),
        ("frames.csv", "0,96,80", "0,96,1000000000"),
        ("frames.csv", "0,96,80", "0,96,64"),
        ("frames.csv", "0,96,80", "0,0,80"),
        ("frames.csv", "verdict", "veredict"),
        ("frames.csv", "5,96,80", "5,96\n"),
        (
            "frames.csv",
            None,
            "frame,height,width,contrast,sharpness,verdict\n" + "".join(f"{i},96,80,9,9,good\n" for i in range(9)),
        ),
        ("manifest.csv", "sha256", "sha"),
        ("settings.json", "{", "[{"),
        ("settings.json", None, "[1]"),
    ],
)
def test_a_damaged_set_is_named_and_not_followed(plate, tmp_path, name, old, new):
    out = tmp_path / "out"
    cut(plate[0], out, size=32)
    text = (out / name).read_text()
    assert old is None or old in text
    (out / name).write_text(new if old is None else text.replace(old, new, 1))
    (out / "000000_00000_00000.png").unlink()
    if name != "manifest.csv":
        (out / "manifest.csv").unlink()
        for patch in out.glob("*.png"):
            patch.unlink()
    message, _ = one_sentence(cut, plate[0], out, size=32)
    assert name in message


def test_a_folder_named_like_drawn_plates_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("procedural/diamond").mkdir(parents=True)
    for i in range(3):
        folders.write_image(tmp_path / "procedural" / "diamond" / f"{i}.png", np.full((40, 40), 50 * i, np.uint8))
    assert [int(image[0, 0]) for image in datasets.load("procedural/diamond").train] == [0, 50, 100]
    with pytest.raises(InputError, match="procedural"):
        datasets.load("procedural")


def test_one_image_at_least_is_held_out_and_one_is_left():
    for count, held_out in ((2, 1), (4, 1), (30, 3)):
        train, validation = datasets.split(count, 0.1, 0)
        assert len(validation) == held_out
        assert sorted([*train, *validation]) == list(range(count))


def test_a_frame_without_contrast_has_no_sharpness():
    assert video.measure(np.full((20, 20), 9, np.uint8)) == (0.0, 0.0)


def test_a_video_cut_short_is_no_mistake_in_the_command():
    assert video.CutShort("").status == 1

"""The inspection as a plant meets it: the same ledger however a strip is cut, resumed or read, and a report that opens offline."""

import base64
import contextlib
import csv
import hashlib
import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from steel_ad import config as configs
from steel_ad import files
from steel_ad.config import Inspection
from steel_ad.data import folders, plates, video
from steel_ad.detectors import Detector, Fitted, autoencoder, segmentation
from steel_ad.errors import InputError
from steel_ad.inspection import coil, follow, good_tiles, journal, ledger, strips, tiles, watch
from steel_ad.inspection import session as inspection
from steel_ad.inspection.view import View
from steel_ad.ops.morphology import disk
from steel_ad.report import coils
from steel_ad.report import evaluation as figures
from steel_ad.runs.run import Run
from steel_ad.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
RESULTS = ("ledger.csv", "ledger.jsonl")


def tile_settings(**settings):
    return Inspection(**{"tile_px": 48, "halo_px": 8, "false_alarm_rate": 0.2, **settings})


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def plates_64():
    return np.asarray(plates.to_uint8(plates.render(jax.random.key(0), "teardrop1", size=64, num=20)))


class Contrast(Detector):
    """A detector that needs no network: how far each pixel is from grey."""

    name, least_px = "contrast", 16

    def fit(self, images):
        return ()

    def residual(self, state, image):
        return jnp.abs(image - 0.5)


def fitted(detector, threshold=None, trained_on=frozenset()):
    return Fitted(detector, (), 1, threshold, "a run", {}, trained_on)


def keep_run(workdir, config, like, trained_on, **settings):
    """What a run leaves, as far as an inspection reads it, with random weights."""
    files.write_json(workdir / "config.json", {**configs.to_dict(config), "data": "line", **settings})
    uses = [{"path": p.name, "sha256": folders.fingerprint(p), "use": "train"} for p in trained_on]
    files.write_json(workdir / "manifest.json", [*uses, {"path": "x", "sha256": "0", "use": "validation"}])
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), jax.eval_shape(like))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"seconds": 0.0})
    return state


@pytest.fixture(scope="module")
def model(tmp_path_factory, plates_64):
    """A workdir of a tiny autoencoder, and beside it good images, some of which it was trained on."""
    from configs.autoencoder import PRESETS

    root = tmp_path_factory.mktemp("model")
    for i, image in enumerate(plates_64):
        write(root / "good" / f"{i:02d}.png", image)
    config = configs.Autoencoder(**{**PRESETS["tiny"], "radius": 1, "maps": ("l2", "ssim")})
    keep_run(
        root / "ae",
        config,
        lambda: autoencoder.initial_state(config, jax.random.key(0)),
        sorted((root / "good").iterdir())[:5],
    )
    return root


@pytest.fixture(scope="module")
def strip():
    """A strip 330 pixels long and 90 wide, with a bright and a dark mark across tile borders."""
    image = np.asarray(plates.to_uint8(plates.render(jax.random.key(3), "teardrop1", shape=(330, 90))))[0].copy()
    image[140:152, 40:60] = 255
    image[300:306, 2:20] = 40
    return image


def inspect(model, source, out, *, good=None, threshold=None, detector=None, drawn=None, watch_idle_s=None, **settings):
    """An inspection by `Contrast` or another detector without a network, and with figures of one pixel, whose arguments go to
    `drawn`: neither network nor drawing is what is tested here."""
    on = frozenset(r["sha256"] for r in files.read_json(model / "ae" / "manifest.json") if r["use"] == "train")
    dot = folders.png(np.zeros((1, 1), np.uint8))

    def draw(path, *arguments, **named):
        files.write_bytes(path, dot)
        if drawn is not None:
            drawn[path.name] = (arguments, named)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coils, "coil_map", draw)
        patch.setattr(figures, "score_histogram", draw)
        good = str(model / "good") if good is None else str(good)
        arguments = {"source": str(source), "calibrate_on": good, "out": out, "watch_idle_s": watch_idle_s}
        return inspection.run(tile_settings(**settings), fitted(detector or Contrast(), threshold, on), **arguments)


@pytest.fixture(scope="module")
def whole(model, strip, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write(root / "in" / "a.png", strip)
    drawn = {}
    found = inspect(model, root / "in", root / "out", strip=True, drawn=drawn)
    (root / "drawn").write_text(said(drawn))
    return found, root / "out"


def said(drawn):
    """What figures were drawn of, as text."""
    with np.printoptions(threshold=sys.maxsize):
        return repr(drawn)


def test_marks_are_found_where_they_are(whole):
    summary, out = whole
    rows = list(csv.DictReader((out / "ledger.csv").read_text().splitlines()))
    assert len(rows) == summary["defects"] > 0
    worst = max(rows, key=lambda r: float(r["peak"]))
    assert 135 <= int(worst["top_px"]) <= int(worst["bottom_px"]) <= 157
    assert [int(r["defect"]) for r in rows] == list(range(1, len(rows) + 1))
    assert [json.loads(line)["peak"] for line in (out / "ledger.jsonl").read_text().splitlines()] == [
        float(r["peak"]) for r in rows
    ]
    assert float(worst["p_value"]) == 1 / (1 + summary["calibration"]["groups"])
    assert summary["tiles"] == 7 * 2
    assert 0 < summary["tiles_with_an_alarm"] < summary["tiles"]


@pytest.mark.parametrize("heights", [[1] * 330, [48] * 6 + [42]])
def test_the_result_does_not_depend_on_how_the_strip_is_cut(model, strip, whole, tmp_path, heights, monkeypatch):
    pieces = np.split(strip, np.cumsum(heights)[:-1])
    monkeypatch.setattr(strips.Strip, "frames", lambda self: iter(pieces if self.image == "" else [strip]))
    write(tmp_path / "in" / "a.png", strip)
    (tmp_path / "out").mkdir()
    # The fixture's calibration, since reading is replaced here.
    (tmp_path / "out" / "calibration.json").write_text((whole[1] / "calibration.json").read_text())
    drawn = {}
    inspect(model, tmp_path / "in", tmp_path / "out", strip=True, drawn=drawn)
    assert said(drawn) == (whole[1].parent / "drawn").read_text()
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (whole[1] / name).read_bytes()


@pytest.mark.parametrize("kept_lines", [0, 3.5, 5, 7])
def test_an_interrupted_inspection_goes_on_without_losing_or_doubling_a_row(model, whole, tmp_path, kept_lines):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("inspection.json", "calibration.json"):
        (out / name).write_text((whole[1] / name).read_text())
    lines = (whole[1] / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8  # seven bands and the end
    cut = b"".join(lines[: int(kept_lines)])
    if kept_lines % 1:
        cut += lines[int(kept_lines)][:40]
    (out / "journal.jsonl").write_bytes(cut)
    drawn = {}
    inspect(model, whole[1].parent / "in", out, strip=True, drawn=drawn)
    assert said(drawn) == (whole[1].parent / "drawn").read_text()
    assert (out / "journal.jsonl").read_bytes() == (whole[1] / "journal.jsonl").read_bytes()
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole[1] / name).read_bytes()


def test_images_go_on_after_an_interruption_between_them(model, plates_64, tmp_path):
    for i in range(3):
        image = plates_64[i].copy()
        image[20:29, 50 - 10 * i : 60 - 10 * i] = 255
        write(tmp_path / "in" / f"{i}.png", image)
    inspect(model, tmp_path / "in", tmp_path / "a")
    lines = (tmp_path / "a" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["finished"] for line in lines] == 3 * [False, False, True]
    for kept in (3, 4, 6, 9):
        out = tmp_path / f"after_{kept}"
        out.mkdir()
        for name in ("inspection.json", "calibration.json"):
            (out / name).write_bytes((tmp_path / "a" / name).read_bytes())
        (out / "journal.jsonl").write_bytes(b"".join(lines[:kept]))
        inspect(model, tmp_path / "in", out)
        for name in (*RESULTS, "journal.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


class Shifted(Contrast):
    """How far each pixel is from that a pitch of 8 behind it: much where the image is mirrored."""

    def residual(self, state, image):
        return jnp.abs(image - jnp.roll(image, -8, 1)) + jnp.abs(image - jnp.roll(image, -8, 0))


def sines(path, rng, count, shape):
    y, x = np.indices(shape)
    for i in range(count):
        a, b = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * x / 8 + a) + np.sin(2 * np.pi * y / 8 + b)
        write(path / f"{i:03d}.png", np.round(128 + 40 * wave + rng.normal(0, 4, shape)).astype(np.uint8))


def test_the_promise_holds_on_images_that_are_no_multiple_of_the_tile(model, tmp_path):
    rng = np.random.default_rng(0)
    sines(tmp_path / "good", rng, 39, (70, 60))
    sines(tmp_path / "in", rng, 60, (70, 60))
    found = inspect(
        model,
        tmp_path / "in",
        tmp_path / "out",
        good=tmp_path / "good",
        detector=Shifted(),
        tile_px=32,
        false_alarm_rate=0.1,
    )
    assert found["tiles"] == 60 * 6
    promised = found["calibration"]["average_rate"]
    spread = np.sqrt(promised * (1 - promised) * (1 / 40 + 1 / 60))
    assert found["tiles_with_an_alarm"] / found["tiles"] <= promised + 3 * spread


def test_a_plate_smaller_than_a_tile_has_no_promise(model, plates_64, tmp_path):
    write(tmp_path / "in" / "a.png", plates_64[0])
    write(tmp_path / "in" / "b.png", plates_64[1][:40])
    with pytest.raises(InputError, match=r"b.png is 64x40 pixels, less than a tile"):
        inspect(model, tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match=r"less than a tile"):
        inspect(model, tmp_path / "in" / "b.png", tmp_path / "out")
    assert inspect(model, tmp_path / "in", tmp_path / "out", good="", threshold=2.0)["tiles"] == 6
    # What is no image at all is named instead, with a promise too.
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    found = inspect(model, tmp_path / "in", tmp_path / "promised")
    assert found["tiles"] == 4
    assert [s.partition("/in/")[2][:5] for s in found["unread"]] == ["b.png"]


def test_files_are_known_by_more_than_name_and_size(model, plates_64, strip, tmp_path):
    source = tmp_path / "a.bmp"
    write(source, strip)
    inspect(model, source, tmp_path / "out")
    os.utime(source, ns=(0, 0))
    with pytest.raises(InputError, match="source_files"):
        inspect(model, source, tmp_path / "out")
    good = tmp_path / "good"
    for i in range(8):
        write(good / f"{i}.bmp", plates_64[6 + i])
    first = inspect(model, source, tmp_path / "b", good=good)["calibration"]
    (tmp_path / "b" / "inspection.json").unlink()
    (tmp_path / "b" / "summary.json").unlink()
    for i in range(2):
        (good / "strip").mkdir(exist_ok=True)
        os.rename(good / f"{i}.bmp", good / "strip" / f"{i}.bmp")
    again = inspect(model, source, tmp_path / "b", good=good)["calibration"]
    assert (first["groups"], again["groups"]) == (8, 7)
    write(good / "7.bmp", plates_64[19])
    with pytest.raises(InputError, match="calibration_files"):
        inspect(model, source, tmp_path / "b", good=good)


def test_a_group_is_a_subfolder_of_the_root_and_copies_count_once(model, plates_64, tmp_path):
    good = tmp_path / "good"
    for i, image in enumerate(plates_64[6:18]):
        write(good / f"strip_{i % 4}" / f"part_{i // 6}" / f"{i}.png", image)
        write(good / f"strip_{i % 4}" / f"copy_{i}.png", image)
    write(tmp_path / "a.png", plates_64[19])
    found = inspect(model, tmp_path / "a.png", tmp_path / "out", good=good, false_alarm_rate=0.4)["calibration"]
    assert (found["groups"], found["images"], found["left_out_as_copies"]) == (4, 12, 12)
    assert "12 as copies" in good_tiles.promise_sentence(found)


def test_a_strip_calibrates_on_strips_in_the_order_of_their_names(model, strip, plates_64, tmp_path):
    good = tmp_path / "good"
    for i in range(5):
        for k, part in enumerate(np.split(strip // 2 + np.uint8(8 * i), 11)):  # of 30 lines each, less than a tile
            write(good / f"{i}" / f"{k:02d}.png", part)
    write(tmp_path / "in" / "0.png", strip)
    found = inspect(model, tmp_path / "in", tmp_path / "out", good=good, strip=True)
    assert (found["calibration"]["groups"], found["calibration"]["tiles"]) == (5, 5 * 7 * 2)
    with pytest.raises(InputError, match=r"no image .* as large as a tile"):
        inspect(model, tmp_path / "in", tmp_path / "other", good=good)
    # What is left out is a gap.
    (good / "0" / "05.png").write_bytes((good / "1" / "05.png").read_bytes())
    gap = inspect(model, tmp_path / "in", tmp_path / "gap", good=good, strip=True)["calibration"]
    assert (gap["left_out_as_copies"], gap["tiles"]) == (1, 2 * (4 * 7 + 4 + 4))
    os.rename(good / "2" / "02.png", good / "2" / "2.png")
    os.rename(good / "2" / "10.png", good / "2" / "a10.png")
    os.rename(good / "2" / "00.png", good / "2" / "10.png")
    with pytest.raises(InputError, match=r"03.png would come before 2.png: pad"):
        inspect(model, tmp_path / "in", tmp_path / "third", good=good, strip=True)
    for i in (2, 10):
        write(tmp_path / "frames" / f"frame_{i}.png", plates_64[0])
    with pytest.raises(InputError, match=r"frame_10.png would come before frame_2.png"):
        inspect(model, tmp_path / "frames", tmp_path / "third", strip=True)


def test_a_map_that_is_not_finite_is_no_clean_plate(model, plates_64, tmp_path):
    class Broken(Contrast):
        def residual(self, state, image):
            return jnp.where(image == image.max(), jnp.nan, image)

    write(tmp_path / "a.png", plates_64[0])
    with pytest.raises(InputError, match="not finite") as error:
        inspect(model, tmp_path / "a.png", tmp_path / "out", good="", threshold=2.0, detector=Broken())
    assert error.value.status == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_period_of_the_tile_or_the_frame_is_said_to_be_one(model, tmp_path):
    image = np.full((48 * 20, 64), 128, np.uint8)
    for turn in range(20):
        image[48 * turn + 5 : 48 * turn + 14, 30:39] = 255
    for k, part in enumerate(np.split(image, 10)):
        write(tmp_path / "in" / f"{k}.png", part)
    one = {"good": "", "threshold": 0.2, "strip": True, "mm_per_px": 0.5}
    (roll,) = inspect(model, tmp_path / "in", tmp_path / "a", **one)["recurrence"]
    assert roll["period"] == pytest.approx(24, rel=0.01)
    assert "This is the height of a tile" in roll["sentence"]
    (roll,) = inspect(model, tmp_path / "in", tmp_path / "b", tile_px=80, **one)["recurrence"]
    assert "height of a" not in roll["sentence"]
    (roll,) = inspect(model, tmp_path / "in", tmp_path / "c", tile_px=32, halo_px=8, **one)["recurrence"]
    assert "height of a" not in roll["sentence"]
    for k, part in enumerate(np.split(image, 20)):
        write(tmp_path / "frames" / f"{k:02d}.png", part)
    (roll,) = inspect(model, tmp_path / "frames", tmp_path / "d", tile_px=80, **one)["recurrence"]
    assert "This is the height of a frame" in roll["sentence"]


def test_a_finished_inspection_is_only_read_and_its_folder_is_not_for_another(model, whole):
    _, out = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    source = out.parent / "in"
    assert inspect(model, source, out, strip=True) == json.loads((out / "summary.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(InputError, match="false_alarm_rate"):
        inspect(model, source, out, strip=True, false_alarm_rate=0.1)


def test_a_setting_that_came_later_has_its_default_in_an_old_record(model, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "out")
    claimed = files.read_json(tmp_path / "out" / "inspection.json")
    for lost, message in (({"pitch_mm", "seed"}, None), ({"strip"}, "strip"), ({"model"}, "model")):
        kept = {k: v for k, v in claimed.items() if k not in lost}
        files.write_json(tmp_path / "out" / "inspection.json", kept)
        with pytest.raises(InputError, match=f"differs in {message}") if message else contextlib.nullcontext():
            assert (
                inspect(model, whole[1].parent / "in", tmp_path / "out", strip=True)["defects"] == whole[0]["defects"]
            )


def test_a_tile_sees_itself_and_its_halo_and_nothing_else(strip):
    class Surroundings(Contrast):
        least_px = 32

        def residual(self, state, image):
            return jnp.abs(image - image.mean())

    view = View(fitted(Surroundings()), tile_settings())
    (first, second, *_) = view.maps((0, b) for b in tiles.bands([strip], tile=48, halo=8))
    image = strip.astype(np.float32) / 255
    # Windows of 64 that would reach beyond an end of the strip, 90 wide, are moved inside.
    for (_, band, found), (top, above) in ((first, (0, 0)), (second, (40, 8))):
        assert (band.top, found.shape) == (top + above, (48, 90))
        for window, start, left, right in ((0, 0, 0, 48), (26, 42, 48, 90)):
            piece = image[top : top + 64, window : window + 64]
            opened = ndimage.grey_opening(np.abs(piece - piece.mean()), footprint=disk(1))
            core = opened[above : above + 48, start - window :][:, :48][:, left - start : right - start]
            np.testing.assert_allclose(found[:, left:right], core, atol=1e-5)


def test_a_window_that_the_detector_cannot_see_is_refused():
    class Large(Contrast):
        least_px = 60

    view = View(fitted(Large()), tile_settings())
    with pytest.raises(InputError, match="50 pixels high or wide"):
        list(view.maps((0, b) for b in tiles.bands([np.zeros((90, 50), np.uint8)], tile=48, halo=8)))


def test_images_that_were_trained_on_do_not_calibrate(whole, model):
    record = whole[0]["calibration"]
    assert record["left_out_as_trained_on"] == 5
    assert record["images"] == record["groups"] == 15
    assert record["tiles"] == 60  # four of 48 in an image of 64, flush with its ends
    known = json.loads((whole[1] / "calibration.json").read_text())
    assert whole[0]["threshold"] == sorted(known["scores"])[-3]  # the floor(16 x 0.2)-th largest


def test_images_of_one_subfolder_are_one_group(model, plates_64, tmp_path):
    for i, image in enumerate(plates_64[6:18]):
        write(tmp_path / "good" / f"strip_{i % 4}" / f"{i}.png", image)
    write(tmp_path / "a.png", plates_64[19])
    found = inspect(model, tmp_path / "a.png", tmp_path / "out", good=tmp_path / "good", false_alarm_rate=0.4)
    assert (found["calibration"]["images"], found["calibration"]["groups"]) == (12, 4)
    with pytest.raises(InputError, match=r"4 independent .* it takes 99"):
        inspect(model, tmp_path / "a.png", tmp_path / "other", good=tmp_path / "good", false_alarm_rate=0.01)
    # What was refused may be asked again in the same place, with another rate.
    again = inspect(model, tmp_path / "a.png", tmp_path / "other", good=tmp_path / "good", false_alarm_rate=0.4)
    assert again["threshold"] == found["threshold"]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.rows = [], [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td" and "data-value" in named:
            self.rows[-1].append(named["data-value"])
        self.sources += [v for k, v in attributes if k in ("src", "href")]


def test_the_report_opens_offline_and_holds_every_row(whole):
    summary, out = whole
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    pictures = [base64.b64decode(s.partition(",")[2]) for s in page.sources]
    assert pictures[:2] == [(out / name).read_bytes() for name in ("coil_map.png", "scores.png")]
    shown = cv2.imdecode(np.frombuffer(pictures[2], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert shown.max() == 255  # the bright mark is the worst
    assert "http" not in text
    rows = [r for r in page.rows if r]
    assert len(rows) == summary["defects"]
    peaks = [json.loads(line)["peak"] for line in (out / "ledger.jsonl").read_text().splitlines()]
    position = rows[0].index(repr(max(peaks)))
    assert [float(r[position]) for r in rows] == sorted(peaks, reverse=True)
    assert summary["settings"]["model_sha256"] in text
    assert good_tiles.promise_sentence(summary["calibration"]) in text


def test_plates_that_cannot_be_read_are_named_and_the_rest_goes_on(model, tmp_path):
    marked = np.full((60, 60), 128, np.uint8)
    marked[20:30, 20:30] = 255
    for name in ("b", "d"):
        write(tmp_path / "in" / f"{name}.png", marked)
    for name in ("a", "c", "e"):
        whole = (tmp_path / "in" / "b.png").read_bytes()
        (tmp_path / "in" / f"{name}.png").write_bytes(whole[: len(whole) // 2])
    found = inspect(model, tmp_path / "in", tmp_path / "out", good="", threshold=0.3)
    rows = csv.DictReader((tmp_path / "out" / "ledger.csv").read_text().splitlines())
    assert [row["image"] for row in rows] == ["b.png", "d.png"]
    assert ["/a.png" in found["unread"][0], "/c.png" in found["unread"][1], "/e.png" in found["unread"][2]] == [
        True
    ] * 3
    assert "/c.png is cut short" in (tmp_path / "out" / "report.html").read_text()
    # Again after the first lines, and after the last.
    journal = (tmp_path / "out" / "journal.jsonl").read_text().splitlines(keepends=True)
    for kept in (1, 2, 3, len(journal)):
        (tmp_path / "out" / "summary.json").unlink()
        (tmp_path / "out" / "journal.jsonl").write_text("".join(journal[:kept]))
        again = inspect(model, tmp_path / "in", tmp_path / "out", good="", threshold=0.3)
        assert again["unread"] == found["unread"]
        assert (tmp_path / "out" / "journal.jsonl").read_text() == "".join(journal)
    with pytest.raises(InputError, match=r"a\.png is cut short"):
        inspect(model, tmp_path / "in" / "a.png", tmp_path / "none", good="", threshold=0.3)
    assert not any(p.is_file() for p in (tmp_path / "none").rglob("*"))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_table_sorts_and_pictures_show_in_a_browser_without_a_network(whole, tmp_path):
    """A click on a heading sorts by it, one more the other way round."""
    text = (whole[1] / "report.html").read_text()
    (tmp_path / "page.html").write_text(
        text.replace(
            "</body>",
            """<script>
const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === "area px");
const seen = () => [...table.tBodies[0].rows].map(r => Number(r.cells[at].dataset.value));
const found = [];
for (let i = 0; i < 2; i++) { table.tHead.rows[0].cells[at].click(); found.push(seen()); }
Promise.all([...document.images].map(i => i.decode())).then(() => {
  found.push([...document.images].map(i => i.naturalWidth));
  document.title = JSON.stringify(found);
});
</script></body>""",
        )
    )
    page = (tmp_path / "page.html").as_uri()
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
    line = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page,
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    up, down, widths = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert up == sorted(up) != down == up[::-1]
    assert len(up) == whole[0]["defects"]
    assert min(widths) > 0


def test_a_video_is_one_strip_and_its_periodic_defect_is_named(model, tmp_path, plates_64):
    rng = np.random.default_rng(0)
    image = np.full((60 * 16, 64), 128, np.uint8)
    for turn in range(16):
        if turn not in (3, 7, 11):
            y = 17 + 60 * turn
            image[y : y + 9, 30:39] = 255
    for y in rng.integers(0, 900, 3):
        image[y : y + 5, 5:10] = 255
    path = tmp_path / "coil.avi"
    # Uncompressed, so that the frames are what was written.
    writer = cv2.VideoWriter(str(path), 0, 25, (64, 60), isColor=False)
    for frame in np.split(image, 16):
        writer.write(frame)
    writer.release()
    good = tmp_path / "good"
    for i in range(4):
        write(good / f"{i}.png", np.full((64, 64), 127 + i, np.uint8))
    found = inspect(model, path, tmp_path / "out", good=good, mm_per_px=2.0)
    (roll,) = found["recurrence"]
    assert roll["period"] == pytest.approx(120, rel=0.01)
    assert (roll["turns"], roll["side"], roll["unit"]) == (16, "top", "mm")
    assert roll["sentence"] in (tmp_path / "out" / "report.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert all(r["along_mm"] == 2 * r["along_px"] for r in rows)


def test_cameras_share_a_strip_and_its_defects(model, strip, tmp_path):
    write(tmp_path / "left.png", strip[:, :64])
    write(tmp_path / "right.png", strip[:, 36:])
    cameras = [
        {"name": "left", "source": "left.png", "mm_per_px": 0.5},
        {"name": "right", "source": "right.png", "mm_per_px": 0.5, "across_mm": 18},
    ]
    (tmp_path / "left").mkdir()
    (tmp_path / "right").mkdir()
    for name in ("left", "right"):
        os.rename(tmp_path / f"{name}.png", tmp_path / name / "a.png")
    for camera in cameras:
        camera["source"] = camera["name"]
    (tmp_path / "cameras.json").write_text(json.dumps(cameras))
    inspect(model, tmp_path / "cameras.json", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    bright = [r for r in rows if abs(r["along_mm"] - 73) < 3 and abs(r["across_mm"] - 25) < 3]
    assert len(bright) == 1
    (tmp_path / "cameras.json").write_text(json.dumps([{"source": "left"}]))
    with pytest.raises(InputError, match="no list of cameras"):
        inspect(model, tmp_path / "cameras.json", tmp_path / "other")


def test_a_segmentation_run_is_restored_as_a_detector(tmp_path):
    from configs.segmentation import PRESETS

    config = configs.Segmentation(**PRESETS["tiny"])
    state = keep_run(
        tmp_path,
        config,
        lambda: segmentation.initial_segmentation(config, config.total_steps),
        [],
        defects="procedural",
    )
    found = Run.open(tmp_path).detector()
    jax.tree.map(np.testing.assert_array_equal, found.state, {"segmenter": segmentation.variables(state)})
    assert (found.detector.config, found.radius, found.threshold) == (config, config.radius, None)
    with pytest.raises(InputError, match="is no map of this detector"):
        Run.open(tmp_path).detector("ssim")


def test_without_calibration_the_runs_own_threshold_serves_and_promises_nothing(model, plates_64, tmp_path):
    write(tmp_path / "a.png", plates_64[0])
    found = inspect(model, tmp_path / "a.png", tmp_path / "out", good="", threshold=0.25)
    assert found["threshold"] == 0.25
    assert found["defects"] > 0
    assert "nothing is promised" in good_tiles.promise_sentence(found["calibration"])
    assert '"p_value": null' in (tmp_path / "out" / "ledger.jsonl").read_text()
    with pytest.raises(InputError, match="give --calibration"):
        inspect(model, tmp_path / "a.png", tmp_path / "other", good="")


def test_a_rate_that_no_set_of_images_can_prove_is_called_a_model(model, plates_64, whole, tmp_path):
    rng = np.random.default_rng(0)
    known = json.loads((whole[1] / "calibration.json").read_text())
    known["made_of"]["calibration_strips"] = False
    known["scores"] = (0.3 + 0.01 * rng.exponential(size=400)).tolist()
    files.write_json(tmp_path / "out" / "calibration.json", known)
    write(tmp_path / "a.png", plates_64[0])
    found = inspect(model, tmp_path / "a.png", tmp_path / "out", false_alarms_per_m2=0.01, mm_per_px=0.2)
    record = found["calibration"]
    assert record["rate"] == pytest.approx(0.01 * (48 * 0.2e-3) ** 2)
    assert record["per_m2_interval"][0] < 0.01 < record["per_m2_interval"][1]
    assert found["threshold"] > max(known["scores"])
    assert "no set of good images can prove" in (tmp_path / "out" / "report.html").read_text()


def test_tiles_of_a_strip_see_its_surroundings_and_are_the_same_in_every_cut():
    rng = np.random.default_rng(0)
    for height, tile, halo in ((1, 32, 8), (33, 32, 8), (64, 32, 8), (97, 16, 20), (200, 32, 0)):
        image = rng.integers(0, 255, (height, 50)).astype(np.uint8)
        starts = [np.minimum(np.arange(0, n, tile), max(0, n - tile)) for n in (height, 50)]
        size = tile + 2 * halo
        windows = [np.clip(s - halo, 0, max(0, n - size)) for s, n in zip(starts, (height, 50), strict=True)]
        cuts = [np.sort(rng.integers(0, height + 1, n)) for n in rng.integers(1, 30, 18)]
        for cut in ([image], np.split(image, height), *(np.split(image, at) for at in cuts)):
            found = list(tiles.bands(cut, tile=tile, halo=halo))
            assert [b.top for b in found] == list(range(0, height, tile))
            for band, row, top in zip(found, starts[0], windows[0], strict=True):
                assert (band.top - band.offset, band.core) == (row, row - top)
                pieces = tiles.cut(band, tile=tile, halo=halo)
                np.testing.assert_array_equal(pieces.corners[:, 0], row - top)
                np.testing.assert_array_equal(pieces.corners[:, 1], starts[1] - windows[1])
                for left, piece in zip(windows[1], pieces.pixels, strict=True):
                    np.testing.assert_array_equal(piece, image[top : top + size, left : left + size])
            cores = [tiles.cut(b, tile=tile, halo=halo).tiles(tile) for b in found]
            joined = [tiles.join(c, b) for c, b in zip(cores, found, strict=True)]
            np.testing.assert_array_equal(np.concatenate(joined), image)
            expected = [joined[0][:, k : k + tile].max() for k in range(0, 50, tile)]
            assert tiles.maxima(joined[0], tile).tolist() == expected
    with pytest.raises(ValueError, match="does not follow"):
        list(tiles.bands([image, image[:, 1:]], tile=16, halo=0))


def test_a_strip_goes_on_from_the_rows_that_its_next_bands_may_show():
    rng = np.random.default_rng(0)
    for height, tile, halo in ((97, 16, 20), (200, 32, 8), (64, 32, 0)):
        image = rng.integers(0, 255, (height, 9)).astype(np.uint8)
        expected = list(tiles.bands([image], tile=tile, halo=halo))
        for rows in range(1, height):
            whole = tiles.Cutter(tile, halo)
            done = len(list(whole.push(image[:rows])))
            # What would be the end changes nothing.
            ends = list(whole.end())
            assert sum(band.height for band in ends) == rows - done * tile
            first = whole.needed(done * tile)
            later = tiles.Cutter(tile, halo, done * tile, first, image[first:rows])
            for cutter in (whole, later):
                found = [*cutter.push(image[rows:]), *cutter.end()]
                assert len(found) == len(expected) - done
                for a, b in zip(found, expected[done:], strict=True):
                    assert (a.top, a.height, a.offset, a.core) == (b.top, b.height, b.offset, b.core)
                    np.testing.assert_array_equal(a.pixels, b.pixels)


def command(*arguments):
    cache = f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"
    line = [sys.executable, "-m", "experiments.inspection", cache, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_binary_tells_of_defects_by_its_status(model, strip, tmp_path):
    write(tmp_path / "a.png", strip)
    tiling = ("--tile_px=48", "--halo_px=8", "--false_alarm_rate=0.2", f"--calibration={model / 'good'}")
    found = command(f"--model={model / 'ae'}", f"--source={tmp_path / 'a.png'}", f"--out={tmp_path / 'b'}", *tiling)
    assert found.returncode == 3, found.stderr
    assert "on average" in found.stdout
    assert "Mpx/s" in found.stderr


def test_a_clean_plate_has_an_empty_ledger(model, plates_64, whole, tmp_path):
    known = json.loads((whole[1] / "calibration.json").read_text())
    known["made_of"]["calibration_strips"] = False
    known["scores"] = [s + 10 for s in known["scores"]]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "calibration.json").write_text(json.dumps(known))
    write(tmp_path / "a.png", plates_64[0])
    found = inspect(model, tmp_path / "a.png", tmp_path / "out")
    assert found["defects"] == found["tiles_with_an_alarm"] == 0
    assert (tmp_path / "out" / "ledger.csv").read_text() == ",".join(["defect", *ledger.COLUMNS]) + "\n"
    assert "Clean" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--model": "nowhere"}, "no run in nowhere"),
        ({"--source": "nowhere.png"}, "cannot be read"),
        ({"--confidence": "high"}, "must be average or a finite number"),
        ({"--false_alarms_per_m2": "0.1"}, "needs --mm_per_px"),
        ({"--halo_px": "0", "--tile_px": "16"}, "smaller than the detector's patch"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(model, strip, tmp_path, arguments, message):
    from absl.testing import flagsaver

    write(tmp_path / "a.png", strip)
    given = {"--model": str(model / "ae"), "--source": str(tmp_path / "a.png"), "--out": str(tmp_path / "out")}
    from absl import flags

    import experiments.inspection as binary

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    values = {k.removeprefix("--"): v for k, v in (given | arguments).items()}
    typed = {k: flags.FLAGS[k].parser.parse(v) for k, v in values.items()}
    with flagsaver.flagsaver(**typed), pytest.raises(InputError, match=message):
        binary.main()
    assert not (tmp_path / "out").exists()


def test_close_ups_are_png():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    decoded = cv2.imdecode(np.frombuffer(folders.png(image), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, image)


def test_a_name_that_is_not_utf_8_costs_no_report(model, plates_64, tmp_path):
    (tmp_path / "in").mkdir()
    image = plates_64[0].copy()
    image[10:20, 10:20] = 255
    (tmp_path / "in" / os.fsdecode(b"pl\xe9.png")).write_bytes(folders.png(image))
    found = inspect(model, tmp_path / "in", tmp_path / "out", good="", threshold=0.25)
    assert found["defects"] > 0
    for name in ("ledger.csv", "report.html"):
        assert "pl\\udce9.png" in (tmp_path / "out" / name).read_text()


def test_the_journal_keeps_close_ups_of_the_worst_only(model, tmp_path):
    image = np.full((144, 480), 128, np.uint8)
    for k in range(30):
        image[10:16, 16 * k + 2 : 16 * k + 8] = 255
        image[80:110, 16 * k + 2 : 16 * k + 6] = 180
    write(tmp_path / "a.png", image)
    inspect(model, tmp_path / "a.png", tmp_path / "out", good="", threshold=0.1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert len(lines[1]["open"]["regions"]) == 30
    assert lines[1]["open"]["close_ups"] == [None] * 30
    assert len(list((tmp_path / "out" / "close_ups").iterdir())) == 24


def test_a_video_that_is_cut_short_is_reported_as_far_as_it_goes(model, tmp_path, monkeypatch):
    frame = np.full((40, 64), 128, np.uint8)
    last = frame.copy()
    last[30:38, 20:30] = 255

    def frames(path):
        yield from (frame, frame, last)
        raise video.CutShort(f"{path} promises 9 frames")

    monkeypatch.setattr(video, "frames", frames)
    monkeypatch.setattr(video, "length", lambda path: 9)
    (tmp_path / "a.avi").write_bytes(b"x")
    found = inspect(model, tmp_path / "a.avi", tmp_path / "out", good="", threshold=0.25)
    assert (found["defects"], found["megapixels"]) == (1, 120 * 64 / 1e6)
    assert len(found["unread"]) == 1
    assert "Not all was inspected" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "summary.json").unlink()
    assert inspect(model, tmp_path / "a.avi", tmp_path / "out", good="", threshold=0.25)["unread"] == found["unread"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strip": True}, "--strip is for a folder"),
        ({"pitch_mm": 5.0}, "--pitch_mm=5 needs --mm_per_px"),
        ({"confidence": 0.95, "good": "", "threshold": 0.5}, "give --calibration"),
        ({"false_alarms_per_m2": 0.1, "mm_per_px": 1.0, "good": "", "threshold": 0.5}, "give --calibration"),
        ({"false_alarms_per_m2": 0.1, "mm_per_px": 1.0, "confidence": 0.9}, "leave one out"),
    ],
)
def test_settings_without_effect_are_refused(model, strip, tmp_path, settings, message):
    write(tmp_path / "a.png", strip)
    with pytest.raises(InputError, match=message):
        inspect(model, tmp_path / "a.png", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_never_what_is_read(model, strip, tmp_path):
    write(tmp_path / "in" / "a.png", strip)
    write(tmp_path / "good" / "a.png", strip)
    for out in (tmp_path / "in", tmp_path / "in" / "out", tmp_path / "good" / "out"):
        with pytest.raises(InputError, match="which is read"):
            inspect(model, tmp_path / "in", out, good=tmp_path / "good")
    (tmp_path / "good" / "ground_truth").mkdir()
    with pytest.raises(InputError, match="a data set with defective images"):
        inspect(model, tmp_path / "in", tmp_path / "out", good=tmp_path / "good")


def test_the_scale_is_that_of_cameras_without_one(model, strip, tmp_path):
    for name in ("left", "right"):
        write(tmp_path / f"{name}.png", strip)
    rows = [{"name": "left", "source": "left.png"}, {"name": "right", "source": "right.png", "mm_per_px": 0.5}]
    (tmp_path / "cameras.json").write_text(json.dumps(rows))
    inspect(model, tmp_path / "cameras.json", tmp_path / "out", good="", threshold=0.3, mm_per_px=2.0)
    found = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert {(r["camera"], r["along_mm"] / r["along_px"]) for r in found} == {("left", 2.0), ("right", 0.5)}
    with pytest.raises(InputError, match="takes one scale"):
        inspect(model, tmp_path / "cameras.json", tmp_path / "b", false_alarms_per_m2=0.1, mm_per_px=2.0)


def test_cameras_without_a_scale_have_rolls_of_their_own(tmp_path):
    write(tmp_path / "0.png", np.zeros((70, 9), np.uint8))
    cameras = [ledger.Camera("left"), ledger.Camera("right")]
    seen = [strips.Strip(c, "", (tmp_path / "0.png",)) for c in cameras]
    look = {"side": "top", "image": "", "length_px": 9.0, "width_px": 9.0, "peak": 1.0, "across_px": 4.0}
    rows = [{**look, "defect": k, "camera": "left", "along_px": 100.0 * k + 31} for k in range(20)]
    rng = np.random.default_rng(0)
    rows += [{**look, "defect": 20 + k, "camera": "right", "along_px": rng.uniform(0, 4000)} for k in range(20)]
    (roll,) = coil.rolls(tile_settings(), seen, {0: [2000, 9], 1: [4000, 9]}, rows)
    assert (roll["cameras"], roll["turns"], roll["members"]) == (["left"], 20, list(range(20)))


def test_the_coil_map_lays_each_sides_images_end_to_end_in_millimetres():
    left, right = ledger.Camera("left", "top", 7.0, 0.5), ledger.Camera("right", "top", 100.0, 2.0)
    below = ledger.Camera("below", "bottom", 3.0, 1.0)
    seen = [strips.Strip(c, name, ()) for c in (left, right) for name in ("b.png", "a.png")] + [
        strips.Strip(below, "a.png", ())
    ]
    sizes = {0: [10, 30], 1: [40, 30], 2: [8, 10], 3: [20, 10], 4: [50, 6]}
    look = {"side": "top", "top_px": 1, "left_px": 2, "bottom_px": 3, "right_px": 5}
    rows = [
        {**look, "defect": 0, "camera": "right", "image": "b.png", "peak": 0.5},
        {**look, "defect": 1, "camera": "left", "image": "a.png", "peak": 0.25},
        {**look, "defect": 2, "camera": "below", "image": "a.png", "peak": 1.0, "side": "bottom"},
    ]
    (top, bottom), unit = coil.sides(seen, sizes, rows, [{"members": [1, 2]}])
    assert unit == "mm"
    # The right camera's a.png is the longer one, 40 mm; its b.png is 16 mm.
    assert (top.name, top.length, top.width, top.across, top.joints) == ("top", 56, 113, 7, [40])
    np.testing.assert_array_equal(top.boxes, [[42, 104, 46, 110], [0.5, 8, 1.5, 9.5]])
    assert (top.scores.tolist(), top.periodic.tolist()) == ([0.5, 0.25], [False, True])
    assert (bottom.name, bottom.length, bottom.width, bottom.across, bottom.joints) == ("bottom", 50, 6, 3, [])
    np.testing.assert_array_equal(bottom.boxes, [[1, 5, 3, 8]])
    assert bottom.periodic.tolist() == [True]


def test_the_coil_map_is_in_pixels_where_one_camera_has_no_scale():
    cameras = ledger.Camera("left", "top", 7.0, 0.5), ledger.Camera("right", "top", 100.0)
    seen = [strips.Strip(c, name, ()) for c in cameras for name in ("a.png", "b.png")]
    sizes = {0: [10, 30], 1: [40, 30], 2: [8, 36], 3: [20, 10]}
    row = {"side": "top", "top_px": 1, "left_px": 2, "bottom_px": 3, "right_px": 5, "defect": 0, "peak": 1.0}
    (top,), unit = coil.sides(seen, sizes, [{**row, "camera": "left", "image": "b.png"}], [])
    assert (unit, top.length, top.width, top.across, top.joints) == ("px", 50, 36, 0, [10])
    np.testing.assert_array_equal(top.boxes, [[11, 2, 13, 5]])
    assert not top.periodic.any()
    (top,), _ = coil.sides(seen, sizes, [], [])
    assert top.boxes.shape == (0, 4)


def test_a_stamp_is_of_places_sizes_and_times(tmp_path):
    def stamp(folder, content=b"1234", time_ns=10**18, name="0.png"):
        path = tmp_path / folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
        strip = strips.Strip(ledger.Camera("left"), "", (path,))
        inside = strips.stamp([strip], path.parent)
        # An image alone is where its folder is.
        assert inside == strips.stamp([strip], path)
        return inside

    first = stamp("a")
    assert first == hashlib.sha256(b'[["0.png", 4, 1000000000000000000]]').hexdigest()
    assert first == stamp("b")
    assert first == stamp("c", b"4321")
    assert len({first, stamp("d", b"12345"), stamp("e", time_ns=10**18 + 1), stamp("f", name="1.png")}) == 4
    gone = strips.Strip(ledger.Camera("left"), "", (tmp_path / "gone.png",))
    with pytest.raises(InputError, match=r"gone\.png cannot be read \(No such file"):
        strips.stamp([gone], tmp_path)


def test_a_runs_threshold_is_that_of_its_own_settings(model, tmp_path):
    shutil.copytree(model / "ae", tmp_path / "ae")
    known = files.read_json(tmp_path / "ae" / "config.json")
    for config, threshold, finished in ((known, 0.7, True), ({**known, "radius": 3}, None, False)):
        record = {"finished": True, "config": config, "maps": {}, "thresholds": {"l2": {"pixel": 0.7}}}
        files.write_json(tmp_path / "ae" / "metrics.json", record)
        found = Run.open(tmp_path / "ae").detector()
        assert (found.radius, found.detector.name, found.threshold, found.finished) == (1, "l2", threshold, finished)
        assert found.sha256 == Run.open(model / "ae").detector().sha256


def test_a_model_is_known_by_what_its_run_recorded(model, tmp_path):
    """A later version with more settings goes on with the inspections of an earlier one."""
    shutil.copytree(model / "ae", tmp_path / "ae")
    recorded = files.read_json(tmp_path / "ae" / "config.json")
    assert "model" in recorded
    for record in (recorded, {k: v for k, v in recorded.items() if k != "model"}):
        files.write_json(tmp_path / "ae" / "config.json", record)
        found = Run.open(tmp_path / "ae").detector()
        hashed = ["l2", 1, {k: v for k, v in record.items() if k not in ("data", "experiment")}]
        digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
        for leaf in jax.tree.leaves(found.state):
            digest.update(np.asarray(leaf).tobytes())
        assert found.sha256 == digest.hexdigest()


@pytest.fixture
def quick(monkeypatch):
    """A watch that need not wait for slow cameras."""
    monkeypatch.setattr(watch, "SETTLED_S", 0.1)
    monkeypatch.setattr(watch, "GIVEN_UP_S", 1.5)
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    monkeypatch.setattr(follow, "REFRESH_S", 0.05)


def marked_images(strip, plates_64, one):
    """Parts of a strip, less than a tile and more, with marks across their edges; or plates, each with a mark."""
    if one:
        return np.split(strip, np.cumsum([30, 40, 80, 20, 100]))
    images = plates_64[:5].copy()
    for i, image in enumerate(images):
        image[20:29, 50 - 10 * i : 60 - 10 * i] = 255
    return list(images)


def camera(folder, images, *, first=0, slowly=(2,)):
    """Writes images one after another, some of them slowly under their own name, others under another that is changed then."""
    for k, image in enumerate(images, first):
        data, path = folders.png(image), folder / f"{k}.png"
        if k in slowly:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(0.4)
                file.write(data[len(data) // 2 :])
        else:
            (folder / "hidden.tmp").write_bytes(data)
            os.rename(folder / "hidden.tmp", path)
        time.sleep(0.03)


@contextlib.contextmanager
def meanwhile(function, *arguments, **named):
    thread = threading.Thread(target=function, args=arguments, kwargs=named)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def same_ledger(a, b):
    for name in RESULTS:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    pictures = [{p.name: p.read_bytes() for p in (out / "close_ups").iterdir()} for out in (a, b)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("one", [False, True])
def test_images_that_come_while_a_folder_is_watched_make_the_ledger_of_the_whole(
    model, strip, plates_64, tmp_path, quick, one, capsys
):
    images = marked_images(strip, plates_64, one)
    (tmp_path / "in").mkdir()
    camera(tmp_path / "in", images[:1])
    with meanwhile(camera, tmp_path / "in", images[1:], first=1):
        found = inspect(model, tmp_path / "in", tmp_path / "out", strip=one, watch_idle_s=1.0)
    expected = inspect(model, tmp_path / "in", tmp_path / "once", strip=one)
    same_ledger(tmp_path / "out", tmp_path / "once")
    assert found["watched"] == {"images": len(images), "ended": True, "waiting": []}
    for key in ("defects", "tiles", "tiles_with_an_alarm", "megapixels", "recurrence", "drift", "unread"):
        assert found[key] == expected[key]
    told = capsys.readouterr().out
    assert sum(int(line.split("defects: ")[1].split(",")[0]) for line in told.splitlines()) == found["defects"]


@pytest.mark.parametrize("one", [False, True])
def test_a_watch_that_is_killed_goes_on_without_losing_or_doubling_a_row(
    model, strip, plates_64, tmp_path, quick, one, monkeypatch
):
    images = marked_images(strip, plates_64, one)
    (tmp_path / "in").mkdir()
    camera(tmp_path / "in", images, slowly=())
    inspect(model, tmp_path / "in", tmp_path / "once", strip=one)
    write_line, left = journal.Journal.write, [0]

    def killed(self, record):
        write_line(self, record)
        left[0] -= 1
        if left[0] == 0:
            with self._path.open("a") as file:
                file.write('{"strip": 0, "fini')
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "write", killed)
    (tmp_path / "later").mkdir()
    for k in range(2, len(images)):
        os.rename(tmp_path / "in" / f"{k}.png", tmp_path / "later" / f"{k}.png")
    kills = 0
    for k in range(2, len(images)):
        left[0] = 1 if one else 2
        try:
            inspect(model, tmp_path / "in", tmp_path / "out", strip=one, watch_idle_s=0.3)
        except KeyboardInterrupt:
            kills += 1
        os.rename(tmp_path / "later" / f"{k}.png", tmp_path / "in" / f"{k}.png")
    assert kills >= 2
    # An end, and the same again.
    left[0] = 0
    for _ in range(2):
        inspect(model, tmp_path / "in", tmp_path / "out", strip=one, watch_idle_s=0.3)
        same_ledger(tmp_path / "out", tmp_path / "once")


@pytest.mark.slow
def test_a_strip_goes_on_after_an_end_and_without_its_first_images(model, strip, tmp_path, quick):
    images = np.split(strip, 11)
    (tmp_path / "in").mkdir()
    camera(tmp_path / "in", images[:5], slowly=())
    first = inspect(model, tmp_path / "in", tmp_path / "out", strip=True, watch_idle_s=0.3)
    assert first["megapixels"] == 150 * 90 / 1e6
    same = inspect(model, tmp_path / "in", tmp_path / "five", strip=True)
    assert same["tiles"] == first["tiles"]
    same_ledger(tmp_path / "out", tmp_path / "five")
    # Two bands are journaled, up to row 96; the third may show rows from 40 on.
    os.rename(tmp_path / "in" / "0.png", tmp_path / "0.png")
    for k, image in enumerate(images[5:], 5):
        write(tmp_path / "in" / f"9{k:02d}.png", image)
    inspect(model, tmp_path / "in", tmp_path / "out", strip=True, watch_idle_s=0.3)
    os.rename(tmp_path / "0.png", tmp_path / "in" / "0.png")
    inspect(model, tmp_path / "in", tmp_path / "once", strip=True)
    same_ledger(tmp_path / "out", tmp_path / "once")
    os.unlink(tmp_path / "in" / "908.png")
    with pytest.raises(InputError, match=r"908.png is gone or was changed"):
        inspect(model, tmp_path / "in", tmp_path / "out", strip=True, watch_idle_s=0.3)


def test_what_cannot_be_part_of_a_watched_strip_is_named_and_left_out(model, strip, tmp_path, quick):
    folder = tmp_path / "in"
    for k, part in enumerate(np.split(strip, 3)):
        write(folder / f"{k}.png", part)
    write(folder / "4.png", strip[:, :50])
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes()[:-20])
    write(folder / "5.png", strip[:50])

    def late():
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "summary.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        write(folder / "00.png", strip)

    with meanwhile(late):
        found = inspect(model, folder, tmp_path / "out", strip=True, watch_idle_s=1.0)
    assert [s.partition("/in/")[2][:15] for s in sorted(found["unread"])] == [
        "00.png came aft",
        "3.png is cut sh",
        "4.png is 50 pix",
    ]
    assert "Not all was inspected" in (tmp_path / "out" / "report.html").read_text()
    for name in ("00", "3", "4"):
        os.unlink(folder / f"{name}.png")
    inspect(model, folder, tmp_path / "once", strip=True)
    same_ledger(tmp_path / "out", tmp_path / "once")


@pytest.mark.slow
def test_a_watched_plate_that_cannot_be_read_is_inspected_once_it_can(model, plates_64, tmp_path, quick):
    folder = tmp_path / "in"
    for k in range(3):
        write(folder / f"{k}.png", plates_64[k])
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:-20])
    write(folder / "small.png", plates_64[0][:20])
    found = inspect(model, folder, tmp_path / "out", watch_idle_s=2.0)
    assert [s.partition("/in/")[2][:10] for s in found["unread"]] == ["1.png is c", "small.png "]
    (folder / "1.png").write_bytes(whole)
    os.unlink(folder / "small.png")
    write(folder / "2.png", plates_64[3])
    found = inspect(model, folder, tmp_path / "out", watch_idle_s=0.3)
    assert (found["watched"]["images"], len(found["unread"])) == (3, 1)
    assert "2.png was written again after it was inspected" in found["unread"][0]


def test_a_watch_ends_on_a_signal_and_keeps_its_report_up_to_date(model, plates_64, tmp_path, quick):
    (tmp_path / "in").mkdir()
    seen = []

    def send():
        deadline = time.monotonic() + 60
        for k in (3, 1):
            image = plates_64[k].copy()
            image[10:20, 10:20] = 255
            write(tmp_path / "in" / f"{k}.png", image)
            while time.monotonic() < deadline:
                time.sleep(0.02)
                if (tmp_path / "out" / "summary.json").exists():
                    seen.append(files.read_json(tmp_path / "out" / "summary.json")["watched"])
                    if seen[-1]["images"] == (1 if k == 3 else 2):
                        break
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with meanwhile(send):
        found = inspect(model, tmp_path / "in", tmp_path / "out", good="", threshold=0.4, watch_idle_s=0.0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [(one["images"], one["ended"]) for one in (seen[0], seen[-1])] == [(1, False), (2, False)]
    assert found["watched"]["ended"]
    rows = csv.DictReader((tmp_path / "out" / "ledger.csv").read_text().splitlines())
    assert {row["image"] for row in rows} == {"1.png", "3.png"}
    inspect(model, tmp_path / "in", tmp_path / "once", good="", threshold=0.4)
    same_ledger(tmp_path / "out", tmp_path / "once")


def test_a_watch_is_of_a_folder(model, strip, tmp_path):
    write(tmp_path / "a.png", strip)
    for source in ("a.png", "a.avi"):
        with pytest.raises(InputError, match="--watch follows a folder"):
            inspect(model, tmp_path / source, tmp_path / "out", watch_idle_s=0.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_binary_that_watches_ends_with_its_report_and_status(model, strip, tmp_path):
    write(tmp_path / "in" / "a.png", strip)
    cache = f"--compilation_cache={os.environ['STEEL_AD_TEST_CACHE']}"
    tiling = ("--tile_px=48", "--halo_px=8", "--false_alarm_rate=0.2", f"--calibration={model / 'good'}")
    line = [sys.executable, "-m", "experiments.inspection", cache, *tiling, "--watch", f"--model={model / 'ae'}"]
    line += [f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline and not (tmp_path / "out/summary.json").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 3, err
    assert "a.png: defects: " in out
    assert files.read_json(tmp_path / "out" / "summary.json")["watched"]["ended"]


@pytest.mark.parametrize("source", ["../a", "/etc/passwd", "link", "../in/../../x", ".."])
def test_a_list_of_cameras_leads_nowhere_else(tmp_path, source):
    write(tmp_path / "a" / "0.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "a")
    path = tmp_path / "in" / "cameras.json"
    path.write_text(json.dumps([{"name": "a", "source": source}]))
    with pytest.raises(InputError, match="lies outside its folder"):
        strips.cameras(path, None)


@pytest.mark.parametrize(
    "rows",
    [
        [3],
        {"a": 1},
        [{"name": "a", "source": 3}],
        [{"name": "\ud800", "source": "x"}],
        [{"name": "a", "source": "a\0"}],
    ],
)
def test_what_is_no_list_of_cameras(tmp_path, rows):
    (tmp_path / "cameras.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="no list of cameras"):
        strips.cameras(tmp_path / "cameras.json", None)


@pytest.mark.parametrize("damage", ["number", "lost", "twice", "swapped", "bit"])
def test_a_changed_journal_is_believed_up_to_the_change(model, whole, tmp_path, damage):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("inspection.json", "calibration.json"):
        (out / name).write_bytes((whole[1] / name).read_bytes())
    lines = (whole[1] / "journal.jsonl").read_bytes().splitlines(keepends=True)
    if damage == "number":
        lines[3] = lines[3].replace(b'"bands": 4', b'"bands": 5')
        assert b'"bands": 5' in lines[3]
    elif damage == "lost":
        del lines[3]
    elif damage == "twice":
        lines.insert(3, lines[3])
    elif damage == "swapped":
        lines[3], lines[4] = lines[4], lines[3]
    else:
        lines[3] = lines[3][:20] + bytes([lines[3][20] ^ 4]) + lines[3][21:]
    (out / "journal.jsonl").write_bytes(b"".join(lines))
    inspect(model, whole[1].parent / "in", out, strip=True)
    for name in (*RESULTS, "journal.jsonl"):
        assert (out / name).read_bytes() == (whole[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", {"calibration": 3}),
        ("summary.json", {"defects": "x"}),
        ("summary.json", {"unread": [1]}),
        ("summary.json", {"recurrence": None}),
        ("summary.json", {"recurrence": [{"side": "top"}]}),
        ("calibration.json", {"scores": ["x"]}),
        ("calibration.json", {"scores": 3}),
        ("calibration.json", {"brightness": [[1]]}),
        ("calibration.json", {"groups": None}),
        ("calibration.json", {"lattice": []}),
        ("calibration.json", {"lattice": ""}),
        ("calibration.json", {"lattice": [[1, float("inf")], [0, 1]]}),
    ],
)
def test_a_damaged_record_is_named(model, whole, tmp_path, name, change):
    out = tmp_path / "out"
    out.mkdir()
    for kept in ("inspection.json", name):
        (out / kept).write_bytes((whole[1] / kept).read_bytes())
    files.write_json(out / name, {**files.read_json(out / name), **change})
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        inspect(model, whole[1].parent / "in", out, strip=True)
    (out / name).write_text("[1, 2]")
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        inspect(model, whole[1].parent / "in", out, strip=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.json", {"config": 3}),
        ("metrics.json", {"thresholds": []}),
        ("metrics.json", {"thresholds": {"l2": {"pixel": "x"}}}),
        ("metrics.json", {"thresholds": {"l2": 3}}),
        ("config.json", {"latent": "x"}),
        ("config.json", {"patch_size": None}),
        ("manifest.json", None),
    ],
)
def test_a_damaged_model_is_named(model, tmp_path, name, change):
    shutil.copytree(model / "ae", tmp_path / "ae")
    config = files.read_json(tmp_path / "ae" / "config.json")
    known = {"config": config, "maps": {}, "finished": True} if name == "metrics.json" else config
    files.write_json(tmp_path / "ae" / name, [3] if change is None else {**known, **change})
    with pytest.raises(InputError, match=r"is damaged|--config\.(latent|patch_size)"):
        Run.open(tmp_path / "ae").detector()


def test_a_models_settings_import_nothing(model, tmp_path, monkeypatch):
    """The loss is the user's own module, which who only inspects need not have, and which must not run."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(model / "ae", tmp_path / "ae")
    files.write_json(
        tmp_path / "ae" / "config.json", {**files.read_json(tmp_path / "ae" / "config.json"), "loss": "evil:f"}
    )
    Run.open(tmp_path / "ae").detector()
    assert "evil" not in sys.modules


def test_reading_a_model_leaves_a_checkpoint_that_is_being_written(model, tmp_path):
    shutil.copytree(model / "ae", tmp_path / "ae")
    under_way = tmp_path / "ae" / "checkpoints" / "step_2.orbax-checkpoint-tmp"
    (under_way / "state").mkdir(parents=True)
    before = set((tmp_path / "ae").rglob("*"))
    Run.open(tmp_path / "ae").detector()
    assert set((tmp_path / "ae").rglob("*")) == before

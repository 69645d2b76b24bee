"""Feeds damaged and hostile files to what the binaries read them with.

    python -m tests.stress.mutations --count=5000 --seed=0 [--only=png,checkpoint]

Images, videos, settings, manifests, records and checkpoints are changed by bits, bytes, pieces, declared sizes, types and names.
Every reader must succeed or raise InputError with one sentence; within ten seconds and two gigabytes more than before, and without
opening a file for writing outside its own folder. Readers run in a child process, which a crash or a hang ends and the next one
replaces.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np

from steel_ad.errors import InputError
from tests.stress import kills

SECONDS, MEMORY = 10, 2 * 2**30
Rng = np.random.Generator
_BIG = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x00\x01\x00\x00", b"\x80\0\0\0")
_HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "7", "../x", "../../../x", "/etc/passwd", "/dev/zero", "a\0b", "\ud800", "A" * 5000, "\n", "top", "."),
    *([], {}, [[]], [0], ["x"], [None], {"x": 1}, [{}], [[0, "x"]], {"": {}}),
)


def change_bytes(rng: Rng, data: bytes) -> bytes:
    """One to eight of these: bits, bytes and numbers replaced; pieces left out, repeated, filled; the end cut or added to."""
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4, 8]))):
        if not out:
            break
        # Half of them in the header.
        at = int(rng.integers(min(len(out), 64) if rng.random() < 0.5 else len(out)))
        size = int(rng.integers(1, max(2, min(512, len(out) - at))))
        kind = int(rng.integers(8))
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        elif kind == 2:
            out[at : at + 4] = _BIG[rng.integers(len(_BIG))]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + size]
        elif kind == 5:
            out[at:at] = bytes(out[at : at + size]) * int(rng.choice([1, 2, 50]))
        elif kind == 6:
            out[at : at + size] = bytes(size)
        else:
            out += rng.bytes(size)
    return bytes(out)


def change_png(rng: Rng, data: bytes) -> bytes:
    """Chunks changed, left out, repeated or of another declared size, with checksums that agree."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    k = int(rng.integers(len(chunks)))
    kind, body = chunks[k]
    what = int(rng.integers(4))
    if what == 0:
        chunks[k] = kind, change_bytes(rng, body)
    elif what == 1:
        chunks.insert(k, (kind, body))
    elif what == 2:
        chunks.insert(k, (bytes(rng.choice([b"tEXt", b"iCCP", b"PLTE", b"tRNS", b"eXIf", b"IDAT"])), rng.bytes(99)))
    else:
        head = bytearray(chunks[0][1])
        head[int(rng.integers(len(head)))] = int(rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 64, 255]))
        chunks[0] = chunks[0][0], bytes(head)
    parts = [struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunks]
    return data[:8] + b"".join(parts)


def change_image(rng: Rng, data: bytes) -> bytes:
    return change_png(rng, data) if data[:4] == b"\x89PNG" and rng.random() < 0.6 else change_bytes(rng, data)


def change_value(rng: Rng, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced by something else, left out, repeated or added."""
    holder = [copy.deepcopy(value)]
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        where, key = _somewhere(rng, holder)
        kind = int(rng.integers(6))
        if kind == 0 and where is not holder:
            del where[key]
        elif kind == 1 and isinstance(where, list) and where is not holder:
            where[key:key] = [copy.deepcopy(where[key])] * int(rng.choice([1, 2, 100]))
        elif kind == 2 and isinstance(where, dict):
            where[str(_HOSTILE[rng.integers(len(_HOSTILE))])] = _HOSTILE[rng.integers(len(_HOSTILE))]
        else:
            where[key] = copy.deepcopy(_HOSTILE[rng.integers(len(_HOSTILE))])
    return holder[0]


def _somewhere(rng: Rng, holder: list) -> tuple[Any, Any]:
    where, key = holder, 0
    while isinstance(where[key], dict | list) and where[key] and rng.random() < 0.75:
        where = where[key]
        key = list(where)[rng.integers(len(where))] if isinstance(where, dict) else int(rng.integers(len(where)))
    return where, key


def change_json(rng: Rng, data: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return change_bytes(rng, data)
    if kind < 0.23:
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000
    return json.dumps(change_value(rng, json.loads(data))).encode()


def change_lines(rng: Rng, data: bytes) -> bytes:
    """JSON lines: one of them changed, left out, repeated or cut."""
    lines = data.splitlines(keepends=True)
    k, kind = int(rng.integers(len(lines))), int(rng.integers(6))
    if kind == 0:
        del lines[k]
    elif kind == 1:
        lines.insert(int(rng.integers(len(lines))), lines[k])
    elif kind == 2:
        lines[k] = change_bytes(rng, lines[k])
    elif kind == 3:
        return b"".join(lines)[: int(rng.integers(len(data)))]
    else:
        lines[k] = change_json(rng, lines[k]) + b"\n"
    return b"".join(lines)


def change_csv(rng: Rng, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, data)
    rows = list(csv.reader(io.StringIO(data.decode())))
    r, kind = int(rng.integers(len(rows))), int(rng.integers(5))
    c = int(rng.integers(len(rows[r])))
    if kind == 0:
        del rows[r]
    elif kind == 1:
        del rows[r][c]
    elif kind == 2:
        rows.insert(r, list(rows[r]))
    else:
        rows[r][c] = str(_HOSTILE[rng.integers(len(_HOSTILE))])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class Target:
    """What is damaged and who reads it.

    Attributes:
      files: pattern of the files of which one is changed, below the target's folder.
      change: (rng, bytes) -> bytes.
      read: called with the target's folder; `out` in it is for output.
      weight: how often it comes, relative to the others.
    """

    files: str
    change: Callable[[Rng, bytes], bytes]
    read: Callable[[Path], Any]
    weight: float = 1


def _image(path: Path) -> None:
    from steel_ad.data import folders

    shape = (0, 0)
    try:
        shape = folders.image_shape(path)
    finally:
        image = folders.read_image(path)
        assert image.dtype == np.uint8, image.dtype
        assert image.ndim == 2
        assert image.shape == shape, (image.shape, shape)
    folders.read_mask(path, shape)


def _one_image(folder: Path) -> None:
    (path,) = folder.glob("x.*")
    _image(path)


def _video(folder: Path) -> None:
    _patches(folder / "x.avi", folder / "out")


def _cut(folder: Path) -> None:
    _patches(kept() / "cut.avi", folder / "out")


def _patches(source: Path, out: Path) -> None:
    from steel_ad.making import from_video
    from steel_ad.making.settings import FromVideo

    from_video.run(FromVideo(size=16, min_contrast=0, min_sharpness=0), source=source, out=out)


def _link(folder: Path) -> None:
    """A set with a link or a name that leads elsewhere."""
    from steel_ad.data import datasets

    rng = np.random.default_rng(int((folder / "seed").read_text()))
    line = folder / "line"
    paths = sorted(p for p in line.rglob("*") if not p.is_symlink())
    path = paths[rng.integers(len(paths))]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    where = ("../../x", "/etc/passwd", "/dev/zero", "/", ".", path.name, "../good/0.png", "/proc/self/mem", "absent")
    path.symlink_to(where[rng.integers(len(where))])
    datasets.load(str(line), min_size=16)


def _cameras(folder: Path) -> None:
    from steel_ad.inspection import strips

    path = folder / "CAMERAS.json"
    found = strips.cameras(path, 0.1)
    whole = [s for camera, where in found for s in strips.strips_of(where, camera, False)]
    strips.stamp(whole, path)
    for s in whole:
        assert Path(os.path.realpath(s.paths[0])).is_relative_to(os.path.realpath(folder)), f"reads {s.paths[0]}"
        for _ in s.frames():
            pass


def inspect(folder: Path) -> None:
    """An inspection by a detector without a network, and with figures of one pixel, as far as the binary prints it."""
    from steel_ad import config as configs
    from steel_ad import files
    from steel_ad.data import folders
    from steel_ad.detectors import Detector, Fitted
    from steel_ad.inspection import good_tiles
    from steel_ad.inspection import session as inspection
    from steel_ad.report import coils, evaluation

    class Contrast(Detector):
        name, least_px, fit = "contrast", 16, None

        def residual(self, state, image):
            return abs(image - 0.5)

    def draw(path, *_, **__):
        files.write_bytes(path, folders.png(np.zeros((1, 1), np.uint8)))
        return path

    inputs = kept() / "inputs"
    with (
        mock.patch.object(coils, "coil_map", draw),
        mock.patch.object(evaluation, "score_histogram", draw),
    ):
        found = inspection.run(
            configs.Inspection(tile_px=32, halo_px=0, false_alarm_rate=0.2),
            Fitted(Contrast(), (), 1, 0.3, "a run", {}, frozenset()),
            source=str(inputs / "strip.avi"),
            calibrate_on=str(inputs / "calibration"),
            out=folder / "out",
        )
    good_tiles.promise_sentence(found["calibration"])
    said = [f"{roll['side']}: {roll['sentence']}" for roll in found["recurrence"]]
    said += [f"{found['defects']}; {found['tiles_with_an_alarm']} of {found['tiles']}", " ".join(found["unread"])]


def _going_on(*without: str) -> Callable[[Path], None]:
    """An inspection that goes on in a folder that lacks some files."""

    def read(folder: Path) -> None:
        for name in without:
            (folder / "out" / name).unlink(missing_ok=True)
        inspect(folder)

    return read


def _model(folder: Path) -> None:
    from steel_ad.runs.run import Run

    Run.open(folder).detector()


def _run(folder: Path) -> None:
    """What the training binary reads before it goes on, and what it prints of a finished run."""
    from steel_ad import files
    from steel_ad.runs.run import Run
    from steel_ad.train.resume import read_history

    this = Run.open(folder)
    assert this.config
    this.finished()
    read_history(folder / "train.csv")
    this.keep("manifest.json", files.read_json(kept() / "inputs" / "model" / "manifest.json"), "good images")


def _results(folder: Path) -> None:
    from steel_ad.research import results

    found, studies = results.gather([folder])
    assert found or studies


def _split(folder: Path) -> None:
    from steel_ad.runs import segmentation

    segmentation._kept_for_tests(str(folder))


def _settings(folder: Path) -> None:
    from steel_ad import config as configs
    from steel_ad import files

    configs.from_mapping(configs.Segmentation, files.read_json(folder / "settings.json", dict))


IMAGES = ("png", "png16", "pngrgba", "jpg", "progressive", "bmp", "tif", "tifdeflate", "tif16", "pgm")
TARGETS: dict[str, Target] = {
    **{name: Target("x.*", change_image, _one_image, 1.2) for name in IMAGES},
    "video": Target("x.avi", change_bytes, _video, 3),
    "link": Target("seed", lambda rng, _: str(rng.integers(2**31)).encode(), _link, 1),
    "cameras": Target("CAMERAS.json", change_json, _cameras, 2.5),
    "frames": Target("out/frames.csv", change_csv, _cut, 0.6),
    "manifest": Target("out/manifest.csv", change_csv, _cut, 0.6),
    "set": Target("out/settings.json", change_json, _cut, 0.6),
    "journal": Target("out/journal.jsonl", change_lines, _going_on("summary.json"), 2.5),
    "calibration": Target(
        "out/calibration.json", change_json, _going_on("summary.json", "journal.jsonl", "inspection.json"), 1.5
    ),
    "inspection": Target("out/inspection.json", change_json, inspect, 0.6),
    "summary": Target("out/summary.json", change_json, inspect, 0.8),
    "checkpoint": Target("checkpoints/step_*/**/*", change_bytes, _model, 1),
    "model": Target("*.json", change_json, _model, 1),
    "run": Target(
        "*.*", lambda rng, data: change_json(rng, data) if data[:1] in b"[{" else change_csv(rng, data), _run, 3
    ),
    "results": Target("metrics.json", change_json, _results, 2),
    "study": Target("study/results.csv", change_csv, _results, 1),
    "split": Target("split.json", change_json, _split, 0.6),
    "settings": Target("settings.json", change_json, _settings, 1.5),
}
_TRAINED = ("model", "checkpoint", "run", "results")
_KEPT: list[Path] = []


def kept() -> Path:
    """The folder of whole files."""
    return _KEPT[0]


def make_whole(work: Path, names: list[str]) -> None:
    """A folder for each target with whole files, which its reader reads without a word."""
    from steel_ad import config as configs

    inputs, whole = work / "inputs", work / "whole"
    kills.make_inputs(inputs)
    trained = {*_TRAINED, "study"} & {*names}
    if trained and (end := kills.run(kills.CASES["autoencoder"], inputs, inputs / "model", work)).status:
        raise RuntimeError(end.said)
    y, x = np.indices((37, 45))
    grey = (128 + 60 * np.sin(x / 3) * np.cos(y / 4)).astype(np.uint8)
    colour, deep = np.dstack([grey, 255 - grey, grey // 2]), grey.astype(np.uint16) * 257
    for name, suffix, image, options in (
        ("png", ".png", grey, []),
        ("png16", ".png", np.dstack([deep] * 3), []),
        ("pngrgba", ".png", np.dstack([colour, grey]), []),
        ("jpg", ".jpg", colour, []),
        ("progressive", ".jpg", colour, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        ("bmp", ".bmp", colour, []),
        ("tif", ".tif", colour, [cv2.IMWRITE_TIFF_COMPRESSION, 1]),
        ("tifdeflate", ".tif", grey, [cv2.IMWRITE_TIFF_COMPRESSION, 8]),
        ("tif16", ".tif", deep, [cv2.IMWRITE_TIFF_COMPRESSION, 5]),
        ("pgm", ".pgm", grey, []),
    ):
        (whole / name).mkdir(parents=True)
        assert cv2.imwrite(str(whole / name / f"x{suffix}"), image, options)
    for place in (whole / "video" / "x.avi", work / "cut.avi"):
        place.parent.mkdir(exist_ok=True)
        writer = cv2.VideoWriter(str(place), cv2.VideoWriter_fourcc(*"MJPG"), 25, (48, 32))
        for i in range(4):
            writer.write(np.roll(colour[:32], 3 * i, 1)[:, :48].repeat(2, 1)[:, :48])
        writer.release()
    shutil.copytree(inputs / "line", whole / "link" / "line")
    (whole / "link" / "seed").write_text("0")
    (whole / "cameras" / "left").mkdir(parents=True)
    shutil.copy(inputs / "plates" / "0.png", whole / "cameras" / "left" / "0.png")
    shutil.copy(work / "cut.avi", whole / "cameras" / "right.avi")
    cameras = [
        {"name": "left", "source": "left", "side": "top", "across_mm": 0, "mm_per_px": 0.1},
        {"name": "right", "source": "right.avi", "across_mm": 9.5},
    ]
    (whole / "cameras" / "CAMERAS.json").write_text(json.dumps(cameras))
    for name in {*_TRAINED} & trained:
        # Pictures are of no interest.
        less = ("figures", "checkpoints") if name in ("run", "results") else ("figures",)
        shutil.copytree(inputs / "model", whole / name, ignore=shutil.ignore_patterns(*less))
    _in_child(lambda: _make_by_reading(whole, names))
    record = {"fraction": 0.3, "seed": 0}
    record |= {
        side: {"defects": {"pit": 1}, "sources": [{"path": "a.png", "sha256": "0"}]} for side in ("train", "test")
    }
    for name, value in (("split", record), ("settings", configs.to_dict(configs.Segmentation()))):
        (whole / name).mkdir()
        (whole / name / f"{name}.json").write_text(json.dumps(value))


def _make_by_reading(whole: Path, names: list[str]) -> None:
    from steel_ad.research import results

    for name in ("frames", "manifest", "set"):
        _cut(whole / name)
    for name in {"journal", "calibration", "inspection", "summary"} & {*names}:
        inspect(whole / name)
    if "study" not in names:
        return
    study = whole / "study" / "study"
    study.mkdir(parents=True)
    (study / "sweep.json").write_text("{}")
    row = dict.fromkeys(("study", "axis", "value", *results.ROW, "settings"), "1")
    row |= {"axis": "residual_constants", "map": "ssim", "value": "wang", "run": "runs/a", "settings": "{}"}
    row |= {"experiment": "autoencoder"}
    (study / "runs" / "a").mkdir(parents=True)
    shutil.copy(kept() / "inputs" / "model" / "config.json", study / "runs" / "a")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row))
    writer.writeheader()
    writer.writerows([row, {**row, "value": "thesis"}])
    (study / "results.csv").write_text(text.getvalue())


def _in_child(function: Callable[[], None]) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the whole files cannot be made")


def outcome(target: Target, folder: Path, rng: Rng) -> tuple[str, str]:
    """("read" or "refused" or what is wrong, details) of one damaged copy."""
    candidates = sorted(p for p in folder.glob(target.files) if p.is_file())
    path = candidates[rng.integers(len(candidates))]
    path.write_bytes(target.change(rng, path.read_bytes()))
    try:
        target.read(folder)
    except InputError as error:
        sentence = str(error)
        return ("refused", sentence) if sentence.strip() and "\n" not in sentence else ("no sentence", repr(sentence))
    except MemoryError:
        return "memory", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    return "read", ""


def _work(work: Path, items: list[tuple[int, str]], seed: int, pipe: int) -> None:
    """The child: items one after the other, each announced before and told of after."""
    folder, opened = work / "item", []
    allowed = (str(folder), "/dev/null", str(work / "cache"))

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event in ("os.rename", "os.link", "os.symlink"):
            path, writes = arguments[1], True
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            path, writes = arguments[0], True
        else:
            return
        if writes and isinstance(path, str | bytes | os.PathLike):
            # Below the folder that a descriptor stands for, where one is given.
            at = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            name = os.path.realpath(Path(os.readlink(f"/proc/self/fd/{at}") if at >= 0 else "", os.fsdecode(path)))
            if watching and not name.startswith(allowed):
                opened.append(f"{event} {name}")

    watching = False
    sys.addaudithook(watch)
    log = os.open(work / "words.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _KEPT[:] = [work]
    import jax

    jax.config.update("jax_compilation_cache_dir", str(work / "cache"))
    jax.devices()
    limit = _memory("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with os.fdopen(pipe, "wb") as out:
        for number, name in items:
            pickle.dump((number, name), out)
            out.flush()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(work / "whole" / name, folder, symlinks=True)
            opened.clear()
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the highest memory, anew
            before, start, watching = _memory("VmRSS"), time.monotonic(), True
            signal.alarm(SECONDS)
            what, details = outcome(TARGETS[name], folder, np.random.default_rng([seed, number]))
            signal.alarm(0)
            watching = False
            grown = _memory("VmHWM") - before
            if opened:
                what, details = "outside", "; ".join(opened)
            elif grown > MEMORY:
                what, details = "memory", f"{grown} bytes"
            pickle.dump((what, details, time.monotonic() - start, grown), out)
            out.flush()
    os._exit(0)


def _memory(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def results_of(work: Path, items: list[tuple[int, str]], seed: int) -> Iterator[tuple[int, str, str, str, float, int]]:
    """(number, target, what, details, seconds, memory) of every item, over as many children as it takes."""
    while items:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            try:
                _work(work, items, seed, write)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(write)
        last = None
        try:
            with os.fdopen(read, "rb") as told, contextlib.suppress(EOFError):
                while True:
                    last = pickle.load(told)
                    found = pickle.load(told)
                    items, done, last = items[1:], last, None
                    yield (*done, *found)
        except GeneratorExit:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if last is None and items:
            raise RuntimeError(f"a worker ended with {status}: {(work / 'words.txt').read_text()[-2000:]}")
        if last is not None:
            items = items[1:]
            what = "hang" if status == -signal.SIGALRM else "crash"
            yield (*last, what, f"status {status}", float(SECONDS) if what == "hang" else 0.0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=1e9, help="No further one after so long.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first one, to see one again.")
    parser.add_argument("--only", default="", help=f"Some of {','.join(TARGETS)}.")
    parser.add_argument("--work", default="", help="Folder for everything, by default one that is removed.")
    flags = parser.parse_args()
    names = flags.only.split(",") if flags.only else list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {unknown.pop()}")
    kills.warm_up()
    warnings.simplefilter("ignore")
    work = Path(flags.work or tempfile.mkdtemp(prefix="steel_ad_mutations_")).absolute()
    _KEPT[:] = [work]
    try:
        if not (work / "whole").exists():
            make_whole(work, names)
        return _report(flags.count, flags.first, names, flags.seed, flags.minutes, work)
    finally:
        if not flags.work:
            shutil.rmtree(work)


def _report(count: int, first: int, names: list[str], seed: int, minutes: float, work: Path) -> int:
    start = time.monotonic()
    weights = np.array([TARGETS[name].weight for name in names])
    # Each number has its own draws, so that one can be seen again alone.
    items = [
        (i, names[np.random.default_rng([seed, i, 1]).choice(len(names), p=weights / weights.sum())])
        for i in range(first, first + count)
    ]
    done: dict[str, Counter[str]] = {name: Counter() for name in names}
    bad: dict[tuple[str, str, str], list[int]] = {}
    slowest, largest = 0.0, 0
    for number, name, what, details, seconds, grown in results_of(work, items, seed):
        done[name][what] += 1
        slowest, largest = max(slowest, seconds), max(largest, grown)
        if what not in ("read", "refused"):
            last = details.strip().splitlines()[-1][:160]
            if (name, what, last) not in bad:
                print(f"{number} {name}: {what}\n{details}", flush=True)
            bad.setdefault((name, what, last), []).append(number)
        total = sum(of.total() for of in done.values())
        if total % 500 == 0:
            print(f"{total}/{count} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if time.monotonic() - start > 60 * minutes:
            break
    columns = sorted({what for of in done.values() for what in of}, key=lambda w: (w not in ("read", "refused"), w))
    print("\n" + f"{'':>14}" + "".join(f"{c:>12}" for c in columns))
    for name in names:
        print(f"{name:>14}" + "".join(f"{done[name][c]:>12}" for c in columns))
    print(
        f"{sum(of.total() for of in done.values())} mutations in {time.monotonic() - start:.0f} s; longest {slowest:.1f} s; most memory "
        f"{largest / 2**20:.0f} MiB; {sum(map(len, bad.values()))} findings, {len(bad)} different"
    )
    for (name, what, last), numbers in bad.items():
        print(f"- {name}, {what}: {last} ({len(numbers)} times, first {numbers[0]})")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

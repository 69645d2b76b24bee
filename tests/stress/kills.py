"""Kills the binaries at random moments, starts them again, and compares the end with that of an undisturbed run.

    python -m tests.stress.kills --kills=200 --seed=0 [--only=autoencoder,insert] [--work=DIR]

One process imports everything and forks a child for every run, which saves the imports; JAX starts its backend in the child.
A run is disturbed in one of five ways: SIGKILL after a random time; SIGKILL just before its n-th operation on a file of its
output; a limit on the size of files; "no space left" from its n-th new file on; and, where mounting is allowed, a disk that is
really full. Then the same command runs again, until it ends by itself. It must end with the status of an undisturbed run and leave the same
files with the same contents, but for seconds and speeds, and no others.
"""

import argparse
import contextlib
import csv
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

ROOT = Path(__file__).parent.parent.parent
WAYS = ("time", "call", "size", "space", "disk")
LIMIT_S = 300
# What an undisturbed run does not repeat either.
_TIMED = {"train_seconds", "seconds", "fit_seconds", "test_megapixels_per_second", "megapixels_per_second"}
_TIMED_TEXT = (
    (re.compile(r"[\d.]+ Mpx/s"), "Mpx/s"),
    (re.compile(r"(\| training, s [^\n]*\n[^\n]*\n)((?:\|[^\n]*\n)+)"), ""),
)
_WARM = {
    "inspection": ("session",),
    "making": ("from_video", "inserted", "thesis"),
    "report": ("coils", "evaluation", "inspection_page", "making", "spectra", "studies", "training"),
    "research": ("sweep",),
    "runs": ("autoencoder", "segmentation", "spectrum"),
    "train": ("checkpoint",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command without its output: the binary, its flags given the folder of inputs, and the name of the flag for the output."""

    binary: str
    flags: Callable[[Path], list[str]]
    out: str = "workdir"
    ends: tuple[int, ...] = (0,)


def _autoencoder(*more: str) -> Case:
    config = ["--config=configs/autoencoder.py:tiny", "--config.maps=('l2',)"]
    return Case("autoencoder", lambda inputs: [*config, f"--data={inputs / 'line'}", *more])


def _inspection(source: str, *more: str) -> Case:
    tile = ["--tile_px=32", "--halo_px=0", "--false_alarm_rate=0.2"]
    return Case(
        "inspection",
        lambda inputs: [
            *(f"--model={inputs / 'model'}", f"--source={inputs / source}", f"--calibration={inputs / 'calibration'}"),
            *(*tile, *more),
        ],
        "out",
        (0, 3),
    )


CASES = {
    "autoencoder": _autoencoder(),
    "checkpoints": _autoencoder("--config.checkpoint_every=1"),
    "segmentation": Case(
        "segmentation",
        lambda inputs: [
            *("--config=configs/segmentation.py:tiny", f"--data={inputs / 'line'}", f"--defects={inputs / 'defects'}")
        ],
    ),
    "plates": _inspection("plates"),
    "strip": _inspection("strip.avi"),
    "from_video": Case(
        "make_dataset", lambda inputs: ["from_video", f"--video={inputs / 'strip.avi'}", "--size=32"], "out"
    ),
    "insert": Case(
        "make_dataset",
        lambda inputs: [
            *("insert", f"--data={inputs / 'line'}", f"--defects={inputs / 'defects'}", "--num_test=2"),
        ],
        "out",
    ),
    "thesis": Case(
        "make_dataset",
        lambda inputs: [
            *("thesis", f"--defects={inputs / 'defects'}", "--lines=teardrop2,teardrop4", "--num_train=3"),
            "--num_test=4",
        ],
        "out",
    ),
    "spectrum": Case(
        "spectrum",
        lambda inputs: ["--config=configs/spectrum.py:tiny", f"--data={inputs / 'line'},{inputs / 'other'}"],
    ),
    "sweep": Case(
        "sweep",
        lambda inputs: [
            *("--config=configs/autoencoder.py:tiny", "--config.steps=4", "--config.maps=('l2',)"),
            *("--axis=latent", "--values=4,8", f"--data={inputs / 'line'}"),
        ],
    ),
}


def make_inputs(folder: Path) -> None:
    """Two lines with defects, defects on plain steel, plates to calibrate on and to inspect, and a video of a strip."""
    rng = np.random.default_rng(7)

    def plate(height: int, width: int, pitch: float = 12.0) -> np.ndarray:
        y, x = np.indices((height, width))
        a, b = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin(2 * np.pi * (x + 0.3 * y) / pitch + a) + np.sin(2 * np.pi * (y - 0.2 * x) / pitch + b)
        return np.clip(128 + 35 * wave + rng.normal(0, 5, wave.shape), 0, 255).astype(np.uint8)

    def write(path: Path, image: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    def damaged(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros_like(image)
        top, left = rng.integers(8, np.array(image.shape) - 24)
        mask[top : top + 6, left : left + 14] = 255
        return np.where(mask > 0, 255 - image // 3, image).astype(np.uint8), mask

    for line, pitch in (("line", 12.0), ("other", 10.0)):
        for i in range(10):
            write(folder / line / "train" / "good" / f"{i}.png", plate(64, 64, pitch))
        for i in range(2):
            write(folder / line / "test" / "good" / f"{i}.png", plate(64, 64, pitch))
            image, mask = damaged(plate(64, 64, pitch))
            write(folder / line / "test" / "smear" / f"{i}.png", image)
            write(folder / line / "ground_truth" / "smear" / f"{i}_mask.png", mask)
    for i in range(6):
        steel = np.clip(rng.normal(120, 8, (96, 96)), 0, 255).astype(np.uint8)
        image, mask = damaged(steel)
        kind = ("dent", "pit")[i % 2]
        write(folder / "defects" / "images" / kind / f"{i}.png", image)
        write(folder / "defects" / "masks" / kind / f"{i}.png", mask)
    for i in range(12):
        write(folder / "calibration" / f"{i:02d}" / "plate.png", plate(64, 64))
    for i in range(6):
        write(folder / "plates" / f"{i}.png", damaged(plate(64, 96))[0] if i % 2 else plate(64, 96))
    writer = cv2.VideoWriter(str(folder / "strip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (96, 64))
    for i in range(8):
        frame = damaged(plate(64, 96))[0] if i in (2, 5) else plate(64, 96)
        writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    writer.release()


def warm_up() -> None:
    """Imports what the binaries import, so that forked children have it; starts no backend and no thread."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    for room, names in _WARM.items():
        for name in names:
            importlib.import_module(f"steel_ad.{room}.{name}")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    warnings.filterwarnings("ignore", message="This process")


@dataclasses.dataclass
class Ended:
    """How a child ended: its status (negative: the signal), its output, and what it did until then."""

    status: int
    said: str
    seconds: float
    calls: int


def run(case: Case, inputs: Path, out: Path, work: Path, way: str = "", amount: float = 0) -> Ended:
    """One start of a command, disturbed in one of `WAYS` or not at all."""
    flags = [
        *case.flags(inputs),
        f"--{case.out}={out}",
        f"--compilation_cache={work / 'cache'}",
    ]
    counted = work / "calls.txt"
    counted.write_text("0")
    # No file, which a limit on the size of files would cut.
    heard, log = os.pipe()
    fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 2**20)
    sys.stdout.flush()
    sys.stderr.flush()
    seconds, last = 0.0, time.monotonic()
    child = os.fork()
    if not child:
        _work(case.binary, flags, out, log, counted, way, amount)
    deadline = amount if way == "time" else LIMIT_S
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        # A longer gap means that this process was stopped, and most likely the child with it: no time to call it hanging for.
        seconds, last = seconds + min(now - last, 0.5), now
        if ended:
            break
        if seconds > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    os.close(log)
    with os.fdopen(heard, errors="replace") as words:
        said = words.read()
    if way != "time" and seconds > LIMIT_S:
        raise RuntimeError(f"{case.binary} hangs: {said[-2000:]}")
    return Ended(os.waitstatus_to_exitcode(status), said, seconds, int(counted.read_text() or 0))


def _work(binary: str, flags: list[str], out: Path, log: int, counted: Path, way: str, amount: float) -> None:
    """The child: runs the binary as the command line would, and ends."""
    status = 1
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(ROOT)
        if way == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(amount), resource.RLIM_INFINITY))
        calls = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal calls
            if not _touches(event, arguments, str(out)):
                return
            calls += 1
            if calls >= amount and way == "call":
                os.kill(os.getpid(), signal.SIGKILL)
            if calls >= amount and way == "space" and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

        sys.addaudithook(watch)
        sys.argv = [f"experiments/{binary}.py", *flags]
        try:
            runpy.run_module(f"experiments.{binary}", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        counted.write_text(str(calls))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _touches(event: str, arguments: tuple, out: str) -> bool:
    """Whether an audit event changes a file of the output."""
    if event == "open":
        path, _, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return False
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
        path = arguments[0]
        if event in ("os.mkdir", "os.remove", "os.rmdir") and arguments[-1] >= 0:
            # Below the folder that a descriptor stands for.
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(path))
    else:
        return False
    return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(out)


def contents(out: Path) -> dict[str, Any]:
    """What a run left, by path: hashes, and of files with seconds or speeds in them what is left without these.

    Of checkpoints the folders count, since their files carry dates; what is in them shows in all that follows from it.
    """
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if "/step_" in f"/{name}":
            if path.name.startswith("step_"):
                found[name] = "folder"
        elif path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".json":
            found[name] = _untimed(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            found[name] = [{k: v for k, v in row.items() if k not in _TIMED} for row in rows]
        elif path.suffix in (".html", ".md"):
            text = path.read_text()
            for pattern, instead in _TIMED_TEXT:
                text = pattern.sub(instead, text)
            found[name] = hashlib.sha256(text.encode()).hexdigest()
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in _TIMED}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{name} " + ("is lost" if name not in found else "is left over" if name not in expected else "differs")
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]


def wrong_words(said: str) -> str:
    """What is wrong with the output of a run whose disk was full; "" where one sentence says so."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or len(errors) != 1:
        return said[-3000:] or "it says nothing"
    return ""


@contextlib.contextmanager
def small_disk(out: Path, size: int) -> Iterator[Callable[[], None]]:
    """A disk of `size` bytes at `out`; what it yields enlarges it."""
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "stress", str(out)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(out)], check=True) and None
    finally:
        subprocess.run(["umount", str(out)], check=True)


def may_mount(work: Path) -> bool:
    folder = work / "probe"
    try:
        with small_disk(folder, 2**16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        folder.rmdir()


@dataclasses.dataclass(frozen=True)
class Whole:
    """An undisturbed run: what it left, how it ended, how long it took, its operations on files, its sizes in bytes."""

    contents: dict[str, Any]
    status: int
    seconds: float
    calls: int
    largest: int
    total: int


def undisturbed(name: str, inputs: Path, work: Path) -> Whole:
    """Twice, since the first run compiles; both must agree, or nothing can be compared."""
    case, left = CASES[name], []
    for _ in range(2):
        out = work / "out" / name
        end = run(case, inputs, out, work)
        if end.status not in case.ends:
            raise RuntimeError(f"{name} fails undisturbed: {end.said[-3000:]}")
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        left.append(Whole(contents(out), end.status, end.seconds, end.calls, max(sizes), sum(sizes)))
        shutil.rmtree(out)
    if wrong := differences(left[0].contents, left[1].contents):
        raise RuntimeError(f"{name} does not repeat itself undisturbed: {wrong}")
    return left[1]


def episode(
    name: str, whole: Whole, ways: list[str], rng: np.random.Generator, inputs: Path, work: Path, say: Callable
) -> tuple[list[str], list[str]]:
    """A run that is disturbed in these ways, one after the other, and then left alone; those that ended it, and what is wrong."""
    case, out, wrong, hit = CASES[name], work / "out" / name, [], []
    with contextlib.ExitStack() as stack:
        enlarge: Callable[[], None] = lambda: None  # noqa: E731
        if ways[0] == "disk":
            enlarge = stack.enter_context(small_disk(out, int(rng.uniform(0.02, 1) * whole.total) + 4096))
        for way in ways:
            amount = {
                "time": rng.uniform(0, whole.seconds),
                "call": float(rng.integers(1, whole.calls + 1)),
                "size": float(np.exp(rng.uniform(0, np.log(max(2, whole.largest))))),
                "space": float(rng.integers(1, whole.calls + 1)),
                "disk": 0.0,
            }[way]
            end = run(case, inputs, out, work, way, amount)
            after = f"{amount:.2f}" if way == "time" else f"{amount:.0f}"
            say(f"{name}: {way} {after} of {whole.seconds:.2f} s, {whole.calls} calls: status {end.status}")
            hit += [way] if end.status not in case.ends else []
            if way in ("size", "space", "disk") and end.status not in case.ends:
                if end.status != 1 or wrong_words(end.said):
                    wrong.append(f"after {way} {after}, status {end.status}: {wrong_words(end.said)}")
            elif end.status not in (-signal.SIGKILL, *case.ends):
                wrong.append(f"after {way} {after}, status {end.status}: {end.said[-3000:]}")
        enlarge()
        end = run(case, inputs, out, work)
        if end.status != whole.status or "Traceback" in end.said:
            wrong.append(f"started again, it ends with status {end.status}: {end.said[-3000:]}")
        wrong += differences(contents(out), whole.contents)
        for path in list(out.iterdir()) if out.is_dir() else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if out.exists():
        out.rmdir()
    return hit, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="How many runs are ended before their end.")
    parser.add_argument("--minutes", type=float, default=1e9, help="No further run is disturbed after so long.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"Some of {','.join(CASES)}.")
    parser.add_argument("--ways", default="", help=f"Some of {','.join(WAYS)}.")
    parser.add_argument("--work", default="", help="Folder for everything, by default one that is removed.")
    flags = parser.parse_args()
    names = flags.only.split(",") if flags.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"there is no case {unknown.pop()}")
    warm_up()
    rng = np.random.default_rng(flags.seed)
    kept = Path(flags.work) if flags.work else Path(tempfile.mkdtemp(prefix="steel_ad_kills_"))
    work, inputs = kept.absolute(), kept.absolute() / "inputs"
    try:
        if not inputs.exists():
            make_inputs(inputs)
        (work / "out").mkdir(exist_ok=True)
        ways = flags.ways.split(",") if flags.ways else list(WAYS)
        return _disturb(flags.kills, flags.minutes, names, ways, rng, inputs, work)
    finally:
        if not flags.work:
            shutil.rmtree(work)


def _disturb(
    kills: int, minutes: float, names: list[str], ways: list[str], rng: np.random.Generator, inputs: Path, work: Path
) -> int:
    start = time.monotonic()
    if any(CASES[name].binary == "inspection" for name in names) and not (inputs / "model").exists():
        end = run(CASES["autoencoder"], inputs, inputs / "model", work)
        if end.status:
            raise RuntimeError(f"the model for the inspection cannot be trained: {end.said[-3000:]}")
    if "disk" in ways and not may_mount(work):
        print("no disk may be mounted here: a limit on the size of files and made-up errors stand for a full one")
        ways = [way for way in ways if way != "disk"]
    wholes: dict[str, Whole] = {}
    done: Counter[tuple[str, str]] = Counter()
    bad: list[str] = []
    spent = dict.fromkeys(names, 0.0)

    def say(text: str) -> None:
        print(f"{done.total()}/{kills} {time.monotonic() - start:.0f} s  {text}", flush=True)

    while done.total() < kills and time.monotonic() - start < 60 * minutes:
        # Those that end soon come more often, but not all the time.
        name = min(names, key=lambda n: (n in wholes, spent[n] + 5 * sum(done[n, way] for way in ways)))
        before = time.monotonic()
        if name not in wholes:
            wholes[name] = undisturbed(name, inputs, work)
            say(f"{name}: undisturbed {wholes[name].seconds:.2f} s, {wholes[name].calls} operations on files")
            before = time.monotonic()
        share = np.array([3 if way in ("time", "call") else 1 for way in ways])
        chosen = [
            str(w) for w in rng.choice(ways, min(kills - done.total(), int(rng.integers(2, 6))), p=share / share.sum())
        ]
        if chosen[0] == "disk":
            chosen = ["disk"]
        chosen = [w for w in chosen if w != "disk"] or ["disk"]
        hit, wrong = episode(name, wholes[name], chosen, rng, inputs, work, say)
        done.update((name, way) for way in hit)
        spent[name] += time.monotonic() - before
        say(f"{name}: " + (f"WRONG: {'; '.join(wrong)}" if wrong else "ends as if undisturbed"))
        bad += [f"{name} after {', '.join(chosen)}: {w}" for w in wrong]
    print("\n" + "".join(f"{title:>14}" for title in ("", *ways)))
    for name in names:
        print(f"{name:>14}" + "".join(f"{done[name, way]:>14}" for way in ways))
    print(f"{done.total()} runs ended before their end in {time.monotonic() - start:.0f} s; {len(bad)} findings")
    for text in bad:
        print(f"- {text}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

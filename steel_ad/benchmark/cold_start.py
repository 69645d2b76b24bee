"""From the start of the process to the first training step of `experiments.autoencoder`, its programs compiled before."""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steel_ad.benchmark import data
from steel_ad.benchmark.timing import Program, Unavailable, Work
from steel_ad.data import datasets

OURS = "steel_ad"
# Where the package is.
_ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = "import steel_ad.cli, steel_ad.report.tables, steel_ad.runs.autoencoder"


def works(*, tiny: bool) -> list[Work]:
    """`cold_start`: the second start of `quick` on procedural plates, and on the same from PNG files; `compile_s` is what the first
    one took."""
    starts = {
        OURS: functools.partial(_start, cached=True),
        f"{OURS}_from_files": functools.partial(_start, cached=True, files=True),
        f"{OURS}_without_cache": functools.partial(_start, cached=False),
    }
    return [Work("cold_start", None, None, ({} if tiny else starts) | {f"{OURS}_import_only": _import})]


def _start(*, cached: bool, files: bool = False) -> Program:
    folder = tempfile.TemporaryDirectory()
    cache = str(Path(folder.name) / "cache") if cached else ""
    images = f"procedural/{data.LINE}"
    if files:
        plates = np.stack(datasets.load(images).train)
        images = f"{folder.name}/images"
        Path(images).mkdir()
        data.write_pngs(Path(images), plates)
    count = 0

    def call():
        nonlocal count
        count += 1
        first_step(
            (
                *(sys.executable, "-m", "steel_ad", "autoencoder", "--config=quick"),
                *(f"--data={images}", "--config.steps=1", f"--compilation_cache={cache}"),
                f"--workdir={folder.name}/{count}",
            ),
            # What a start leaves behind when it is ended.
            {"TMPDIR": folder.name},
        )

    # What cannot start is left out here; within a block it would end the benchmark.
    start = time.perf_counter()
    try:
        call()
    except Unavailable:
        folder.cleanup()
        raise
    elapsed = time.perf_counter() - start
    compile_s = elapsed if cached else None
    return Program(call=call, wait=lambda _: None, warm=False, compile_s=compile_s, close=folder.cleanup)


def first_step(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Starts a training binary, waits for the line that reports its only step, and ends it.

    Raises:
      Unavailable: it ended before.
    """
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=_ROOT, env={**os.environ, **(environment or {})}, **streams) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said = line
            if line.startswith("train: 1/1 "):
                process.kill()
                return
    raise Unavailable(f"{' '.join(command[1:4])} ended before its first step: {said}")


def _import() -> Program:
    def call():
        done = subprocess.run((sys.executable, "-c", _IMPORTS), capture_output=True, text=True, check=False, cwd=_ROOT)
        if done.returncode:
            raise Unavailable(f"{_IMPORTS} failed: {done.stderr}")

    call()
    return Program(call=call, wait=lambda _: None, warm=False)

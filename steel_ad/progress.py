"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Of several processes the first one's alone; none of runs side by side on devices of their own.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from steel_ad import parallel

Update = Callable[..., None]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def progress(label: str, total: int, unit: str, *, done: int = 0, every_s: float = 10.0) -> Iterator[Update]:
    """Shows how far `label` has come; yields `update(done, note="")`, `done` counted in `unit`s from 0 to `total`."""
    if not parallel.is_main() or parallel.is_alone():
        yield lambda *_, **__: None
        return
    if sys.stderr.isatty():
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]} {task.fields[note]}"),
            bars.TimeRemainingColumn(),
        )
        start = time.monotonic()
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, completed=done, rate="", note="")

            def draw(now: int, note: str = "") -> None:
                rate = (now - done) / max(time.monotonic() - start, 1e-9)
                bar.update(task, completed=now, rate=f"{rate:.1f} {unit}/s", note=note)

            yield draw
        return
    start = last = time.monotonic()

    def write(now: int, note: str = "") -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last >= every_s or now >= total:
            last = clock
            rate = (now - done) / max(clock - start, 1e-9)
            left = _clock((total - now) / rate) if rate > 0 else "?"
            print(
                f"{label}: {now}/{total} {unit}, {rate:.1f} {unit}/s, {left} left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield write

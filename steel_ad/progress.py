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


class _Rate:
    """Units a second since the first report: what comes before it includes compiling."""

    def __init__(self, done: int) -> None:
        self.since, self.before, self.reports = time.monotonic(), done, 0

    def __call__(self, now: int) -> float:
        clock = time.monotonic()
        rate = (now - self.before) / max(clock - self.since, 1e-9)
        self.reports += 1
        if self.reports == 1:
            self.since, self.before = clock, now
        return rate


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
        rate_of = _Rate(done)
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total, completed=done, rate="", note="")

            def draw(now: int, note: str = "") -> None:
                bar.update(task, completed=now, rate=f"{rate_of(now):.1f} {unit}/s", note=note)

            yield draw
        return
    last, rate_of = time.monotonic(), _Rate(done)

    def write(now: int, note: str = "") -> None:
        nonlocal last
        clock, rate = time.monotonic(), rate_of(now)
        if clock - last >= every_s or now >= total:
            last = clock
            known = now >= total or (rate > 0 and rate_of.reports > 1)
            left = _clock((total - now) / max(rate, 1e-9)) if known else "?"
            print(
                f"{label}: {now}/{total} {unit}, {rate:.1f} {unit}/s, {left} left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield write

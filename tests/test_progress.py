"""Lines of progress where there is no terminal."""

import pytest

from steel_ad import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)

    def at(seconds):
        now[0] = seconds

    return at


def test_rate_and_time_left_do_not_count_what_was_compiled_before_the_first_report(clock, capsys):
    with progress.progress("train", 1000, "steps") as update:
        for seconds, done in ((100, 20), (105, 120), (110, 220), (120, 420), (149, 1000)):
            clock(seconds)
            update(done, f"loss {done}")
    assert capsys.readouterr().err.splitlines() == [
        "train: 20/1000 steps, 0.2 steps/s, ? left loss 20",
        "train: 220/1000 steps, 20.0 steps/s, 0:39 left loss 220",
        "train: 420/1000 steps, 20.0 steps/s, 0:29 left loss 420",
        "train: 1000/1000 steps, 20.0 steps/s, 0:00 left loss 1000",
    ]


def test_a_work_of_one_report_and_one_that_goes_on(clock, capsys):
    with progress.progress("read", 8, "images", done=4) as update:
        clock(2)
        update(8)
    with progress.progress("read", 9000, "images", done=1000) as update:
        for seconds, done in ((3, 1000), (13, 1000), (33, 3000)):
            clock(seconds)
            update(done)
    assert capsys.readouterr().err.splitlines() == [
        "read: 8/8 images, 2.0 images/s, 0:00 left",
        "read: 1000/9000 images, 0.0 images/s, ? left",
        "read: 3000/9000 images, 66.7 images/s, 1:30 left",
    ]

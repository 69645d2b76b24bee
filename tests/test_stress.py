"""Short forms of the harnesses in tests/stress, which run for minutes when started by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(name, *arguments, work):
    line = [sys.executable, "-m", f"tests.stress.{name}", *arguments, f"--work={work}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": os.environ["STEEL_AD_TEST_CACHE"]}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_killed_data_sets_end_as_undisturbed_ones(tmp_path):
    result = start("kills", "--kills=6", "--seed=0", "--only=from_video,insert", work=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 runs ended before their end" in result.stdout
    assert "insert: ends as if undisturbed" in result.stdout


def test_a_run_that_loses_something_is_found_out(tmp_path):
    """The harness itself: a frame that is not cut, and a file that stays behind."""
    from stress import kills

    (tmp_path / "a").mkdir()
    for name, text in (("x.png", "1"), ("metrics.json", '{"seconds": 1, "loss": 2}')):
        (tmp_path / "a" / name).write_text(text)
    whole = kills.contents(tmp_path / "a")
    (tmp_path / "a" / "metrics.json").write_text('{"seconds": 3, "loss": 2}')
    assert not kills.differences(kills.contents(tmp_path / "a"), whole)
    (tmp_path / "a" / "metrics.json").write_text('{"seconds": 3, "loss": 2.5}')
    (tmp_path / "a" / "x.png").rename(tmp_path / "a" / ".x.png.tmp")
    found = kills.differences(kills.contents(tmp_path / "a"), whole)
    assert found == [".x.png.tmp is left over", "metrics.json differs", "x.png is lost"]


def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    names = "png,png16,progressive,bmp,tifdeflate,tif16,pgm,video,link,cameras,frames,set,split,settings"
    result = start("mutations", "--count=100", "--seed=4", f"--only={names}", work=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 findings" in result.stdout

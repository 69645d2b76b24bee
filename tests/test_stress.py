"""Short forms of the harnesses in tests/stress, which run for minutes when started by hand."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
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


TOY = '''"""A module."""
def clip(x: int, low: int = 2) -> int:
    """At least `low`."""
    if x is None:
        raise ValueError("there is no" + " 1")
    return max(x, low) * 2 + 1

class Kept(list):
    def add(self, x):
        if x > 0 and x not in self:
            self.append(x)
        return self
'''


def of_toy(clip, kept):
    def told(call):
        try:
            return call()
        except Exception as error:
            return type(error)

    calls = [lambda: clip(None), lambda: clip(1), lambda: clip(5), lambda: kept().add(0)]
    calls += [lambda x=x: kept([x]).add(abs(x)) for x in (0, 3, -1)]
    return [told(call) for call in (*calls, lambda: kept([0]).add(3))]


def test_every_mutant_of_a_module_does_something_else(tmp_path):
    from stress import mutants

    (tmp_path / "toy.py").write_text(TOY)
    found = mutants.mutations(str(tmp_path / "toy.py"))
    kinds = {
        "default",
        "condition",
        "comparison",
        "raise",
        "return",
        "function",
        "operator",
        "constant",
        "logic",
        "call",
    }
    assert {m.kind for m in found} == kinds
    assert {m.function for m in found} == {"clip", "Kept.add"}
    assert not any("there is no" in m.text for m in found if m.kind != "raise")

    def run(code):
        names = {"_changed_value": mutants.changed}
        exec(code, names)
        return of_toy(names["clip"], names["Kept"])

    whole = run(compile(TOY, "toy", "exec"))
    assert whole == [ValueError, 5, 11, [], [0], [3], [-1, 1], [0, 3]]
    for m in found:
        assert run(mutants.mutated(str(tmp_path / "toy.py"), m.file, m.index)) != whole, m


@pytest.mark.parametrize(
    "value", ["x", 1, 1.5, True, (1, 2), [], {"a": 1}, {1}, Path("a"), None, np.zeros(2), np.ones(1, bool), jnp.ones(1)]
)
def test_a_changed_value_is_of_the_same_type(value):
    from stress import mutants

    other = mutants.changed(value)
    assert np.any(other != value)
    assert value is None or isinstance(other, type(value))


@pytest.mark.slow
def test_a_weak_test_lets_a_mutant_live(tmp_path):
    """In a process that the test starts: one that looks at the sentence alone lets the status be any."""
    program = "from steel_ad.errors import InputError as E; print(E('a\\nb'))"
    test = f"def test(): assert subprocess.check_output([sys.executable, '-c', {program!r}]) == b'a b\\n'"
    (tmp_path / "test_weak.py").write_text(f"import subprocess, sys\n{test}\n")
    result = start("mutants", "--only=steel_ad/errors.py", f"--tests={tmp_path / 'test_weak.py'}::test", work=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 mutants of 1 functions" in result.stdout
    assert result.stdout.splitlines()[-2].endswith("1 were not killed")
    assert result.stdout.endswith("default: status=2 -> 3: survived 1 tests\n")
    assert "Functions of which none was killed: 0\n" in result.stdout
    # One that is killed is enough for a function.
    weak = f"--tests={tmp_path / 'test_weak.py'}::test"
    result = start("mutants", "--only=steel_ad/errors.py", weak, "--until_killed", work=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 mutants of 1 functions" in result.stdout

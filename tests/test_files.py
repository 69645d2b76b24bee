"""Small files: what damage is, and that a bug of the code which reads them is not called damage."""

import csv

import pytest

from steel_ad import config as configs
from steel_ad import files
from steel_ad.errors import InputError
from steel_ad.runs import run
from steel_ad.runs.run import Run


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), csv.Error("x")])
def test_what_content_that_cannot_be_parsed_raises_is_damage(tmp_path, error):
    sentence = r"a\.json is damaged \(\w+: '?x'?\): mend it"
    with pytest.raises(InputError, match=sentence), files.understood(tmp_path / "a.json", "mend it"):
        raise error


@pytest.mark.parametrize("error", [TypeError, AttributeError, IndexError, ZeroDivisionError, NameError])
def test_a_bug_is_no_damage(tmp_path, error):
    with pytest.raises(error), files.understood(tmp_path / "a.json", "mend it"):
        raise error


def test_a_bug_beside_a_record_is_raised_as_it_is(tmp_path, monkeypatch):
    this = Run.begin(tmp_path, "autoencoder", configs.Autoencoder(), {"data": "d"}, evaluate_only=False)
    this.claim()
    files.write_json(tmp_path / "metrics.json", {"config": this.settings, "maps": {}})
    assert this.record() is not None
    for bug in (ValueError, KeyError, AttributeError):

        def broken(*_, bug=bug):
            raise bug("a bug")

        monkeypatch.setattr(run, "completed", broken)
        with pytest.raises(bug, match="a bug"):
            this.record()


FORM = {"a": [(int, None)], "b?": {str: files.NUMBER}, "c": (dict, [str])}


@pytest.mark.parametrize(
    "value",
    [
        {"a": [], "c": {}},
        {"a": [1, None, 3], "b": {"x": 0.5, "y": 1}, "c": ["q"], "d": object},
    ],
)
def test_a_value_of_its_form(value):
    files.check(value, FORM)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": 1}, "a is 1"),
        ({"a": [True]}, "a is True"),
        ({"a": [1.0]}, r"a is 1\.0"),
        ({"a": [2**63]}, "a is"),
        ({"a": None}, "a is null"),
        ({"b": {"x": "1"}}, "x is '1'"),
        ({"b": {"x": None}}, "x is null"),
        ({"b": {"x": True}}, "x is True"),
        ({"b": []}, "b is a list"),
        ({"c": [1]}, "c is a list"),
    ],
)
def test_a_value_of_another_form(change, said):
    with pytest.raises(ValueError, match=said):
        files.check({"a": [1], "c": {}, **change}, FORM)


def test_a_value_that_lacks_a_key():
    with pytest.raises(ValueError, match="the file has no c"):
        files.check({"a": [1]}, FORM)
    with pytest.raises(ValueError, match="the file is a list"):
        files.check([], FORM)
    with pytest.raises(ValueError, match="too large"):
        files.check(10**400, int)


def test_rows_of_text(tmp_path):
    path = tmp_path / "a.csv"
    rows = [{"a": "1", "b": 'x,"\ny'}, {"a": "", "b": "2"}]
    files.write_csv(path, rows)
    assert files.read_csv(path, ("b",)) == rows
    files.write_text(path, "")
    assert files.read_csv(path, ("b",)) == []
    for text in ("a,b\n1\n", "a,b\n1,2,3\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="lacks a cell"):
            files.read_csv(path)
    path.write_text("a\n1\n")
    with pytest.raises(ValueError, match="lacks a cell"):
        files.read_csv(path, ("b",))
